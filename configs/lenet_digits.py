"""LeNet on scikit-learn's 8x8 digits, which need no download.

    python -m cnnjax.main --config configs/lenet_digits.py
"""
from cnnjax.train.defaults import get_config as _defaults


def get_config():
    config = _defaults()
    config.epochs = 30
    return config
