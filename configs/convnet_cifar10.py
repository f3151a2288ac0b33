"""The NUS lecture's ConvNet on CIFAR-10.

The learning rate 0.25 is halved at epochs 10, 14 and 18. The lecture prints 0 % train and 20 % test
error.

    python -m cnnjax.main --config configs/convnet_cifar10.py --config.data_dir=FOLDER

Measured: 0.00 % train and 20.79 % test error (n=1, 2 CPU cores, 22 November 2026; 3 minutes per
epoch with nothing else running). The lecture names no initialization. With PyTorch's, the network
is at chance after the first epoch (loss 2.3001, error 89.55 %); see
`cnnjax.models.lectures.ConvNet`.
"""

from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.model = "convnet"
    config.dataset = "cifar10"
    config.epochs = 20
    config.momentum = 0.0  # the lecture mentions no momentum
    config.schedule.update(
        {"name": "step", "learning_rate": 0.25, "factor": 0.5, "epochs": (10, 14, 18)}
    )
    config.checkpoint_every_steps = 200
    return config


def sweep():
    return defaults.product({"seed": range(3)})
