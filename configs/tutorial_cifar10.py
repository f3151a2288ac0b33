"""PyTorch's "Training a classifier" tutorial: its network on CIFAR-10, trained in the same way.

2 epochs, batches of 4, a learning rate of 0.001.

    python -m cnnjax.main --config configs/tutorial_cifar10.py --config.data_dir=FOLDER

Measured over 5 seeds (python -m cnnjax.sweep, 2 CPU cores, 21 November 2026): 41.66 ± 0.62 % train
and 44.04 ± 0.51 % test error (mean and sample standard deviation), half a minute of training per
run.
"""

from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.model = "tutorial_net"
    config.dataset = "cifar10"
    config.epochs = 2
    config.batch_size = 4
    config.schedule.learning_rate = 0.001
    config.checkpoint_every_steps = 5000
    return config


def sweep():
    return defaults.product({"seed": range(5)})
