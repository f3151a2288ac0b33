"""A one-layer perceptron on CIFAR-10, the NUS lecture's first baseline.

It has 0.03 M parameters. The lecture prints 59 % train and 65 % test error.

    python -m cnnjax.main --config configs/mlp1_cifar10.py --config.data_dir=FOLDER

Measured over 5 seeds (python -m cnnjax.sweep, 2 CPU cores, 21 November 2026): 54.96 ± 0.09 % train
and 59.37 ± 0.27 % test error (mean and sample standard deviation), 7 to 11 s of training per run.
"""

from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.model = "mlp1"
    config.dataset = "cifar10"
    config.epochs = 20
    config.momentum = 0.0  # the lecture mentions no momentum
    config.schedule.update({"name": "step", "learning_rate": 0.01, "factor": 1 / 1.5, "every": 5})
    return config


def sweep():
    return defaults.product({"seed": range(5)})
