"""The lecture's ConvNet on CIFAR-10: rate 0.25 halved at epochs 10, 14 and 18 (it prints 0 % train and 20 % test error).

    python -m cnnjax.main --config configs/convnet_cifar10.py --config.data_dir=FOLDER

Only its first epoch was run (2 CPU cores, 21 November 2026, n=1, 6 minutes): mean training loss 2.3001, error 89.55 %, 90.00 % at its end.
That is chance (loss 2.3026): as the lecture writes it, without normalisation or momentum, the network has not left its plateau by
then. Whether it does so in 20 epochs, and reaches the lecture's figures, is not known here.
"""
from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.model = "convnet"
    config.dataset = "cifar10"
    config.epochs = 20
    config.momentum = 0.0  # the lecture names none
    config.schedule.update({"name": "step", "learning_rate": 0.25, "factor": 0.5, "epochs": (10, 14, 18)})
    config.checkpoint_every_steps = 200
    return config


def sweep():
    return defaults.product({"seed": range(3)})
