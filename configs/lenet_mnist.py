"""The lecture's LeNet on MNIST, as it is written there: rate 0.25 divided by 1.5 every 5 epochs (it prints 0 % train, 0.78 % test error).

    python -m cnnjax.main --config configs/lenet_mnist.py --config.data_dir=FOLDER
"""
from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.dataset = "mnist"
    config.epochs = 20
    config.momentum = 0.0  # the lecture names none
    config.schedule.update({"name": "step", "learning_rate": 0.25, "factor": 1 / 1.5, "every": 5})
    return config


def sweep():
    return defaults.product({"seed": range(3)})
