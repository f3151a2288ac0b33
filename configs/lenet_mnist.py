"""LeNet on MNIST."""
from cnnjax.train.defaults import get_config as _defaults


def get_config():
    config = _defaults()
    config.dataset = "mnist"
    config.epochs = 20
    config.schedule.learning_rate = 0.05
    return config
