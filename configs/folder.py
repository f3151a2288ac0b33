"""Training on your own images: one folder per class, below train/ and val/.

    python -m cnnjax.main --config configs/folder.py --config.data_dir=FOLDER --workdir runs/mine

The model is a narrow VGG with BatchNorm on crops of 128 pixels, small enough for a laptop. With few
images, start from ImageNet weights instead, with a higher rate for the new head:
`--config.model=resnet18 --config.initial_weights=FILE --config.rates="(('*',0.1),('fc.*',1.0))"`.
"""

from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.model = "scene_net"
    config.dataset = "folder"
    config.image_size = 128
    config.resize = 144
    config.augment.flip = True
    config.optimizer = "adamw"
    config.weight_decay = 1e-4
    config.schedule.update({"name": "cosine", "learning_rate": 0.002})
    config.batch_size = 16
    config.epochs = 20
    # A small data set has few steps.
    config.checkpoint_every_steps = 100
    return config
