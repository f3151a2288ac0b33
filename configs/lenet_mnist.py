"""The NUS lecture's LeNet on MNIST, with its settings.

The learning rate 0.25 is divided by 1.5 every 5 epochs. The lecture prints 0 % train and 0.78 %
test error.

    python -m cnnjax.main --config configs/lenet_mnist.py --config.data_dir=FOLDER

Measured over 3 seeds (python -m cnnjax.sweep, 2 CPU cores, 21 November 2026): 0.00 ± 0.00 % train
and 0.74 ± 0.05 % test error (mean and sample standard deviation), 10 minutes of training per run on
an idle machine.
"""

from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.model = "lenet"
    config.dataset = "mnist"
    config.epochs = 20
    config.momentum = 0.0  # the lecture mentions no momentum
    config.schedule.update({"name": "step", "learning_rate": 0.25, "factor": 1 / 1.5, "every": 5})
    return config


def sweep():
    return defaults.product({"seed": range(3)})
