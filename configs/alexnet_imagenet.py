"""AlexNet on ImageNet by the recipe of 2012, which the lectures repeat.

    python -m cnnjax.main --config configs/alexnet_imagenet.py --config.data_dir=FOLDER

FOLDER contains train/CLASS/IMAGE and val/CLASS/IMAGE. To read ImageNet as prepared by
tensorflow-datasets instead, use --config.dataset=tfds:imagenet2012.

- Augmentation: images at 256 pixels, random crops and mirror images, shifts along the principal
  components of color. Crops have 227 pixels, which the layers need; the publication says 224.
- Regularization: dropout, response normalization, weight decay of 5e-4 on every parameter.
- Optimizer: SGD with momentum 0.9 in batches of 128. The learning rate 0.01 is divided by 10, at
  most three times, whenever the error on held-out images no longer falls.
- Test: the average over ten crops.

Published: 18.2 % top-5 error of one network. Not measured here, because this takes a GPU and
ImageNet.
"""

from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.model = "alexnet_2012"
    config.dataset = "folder"
    config.n_validation = 10_000
    config.image_size = 227
    config.resize = 256
    config.workers = 8
    config.pixels = "centred"
    config.augment.flip = True
    config.augment.colour = 0.1
    config.test_views = 10
    config.weight_decay = 5e-4
    config.schedule.update(
        {"name": "plateau", "learning_rate": 0.01, "factor": 0.1, "patience": 4, "min_lr": 1e-5}
    )
    config.epochs = 90
    return config
