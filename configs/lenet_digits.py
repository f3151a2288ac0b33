"""LeNet on scikit-learn's 8x8 digits, which need no download.

    python -m cnnjax.main --config configs/lenet_digits.py

Measured: 0.00 % train and 4.44 % test error (n=1, 2 CPU cores without AVX-512, 30 November 2026),
in about half a minute.
"""

from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.model = "lenet"
    config.dataset = "digits"
    config.epochs = 30
    return config


def sweep():
    return defaults.product({"schedule.learning_rate": (0.03, 0.1), "seed": range(3)})
