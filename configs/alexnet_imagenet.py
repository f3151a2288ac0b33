"""AlexNet on ImageNet by the recipe of 2012, which the lectures repeat.

    python -m cnnjax.main --config configs/alexnet_imagenet.py --config.data_dir=FOLDER

FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE; --config.dataset=tfds:imagenet2012 reads what
tensorflow-datasets prepared. Images at 256 pixels, random crops and mirror images, shifts along the
principal components of color, dropout, response normalization, batches of 128, momentum 0.9, decay
5e-4 of every parameter; the rate 0.01 is divided by 10, three times at most, where the error of
held-out images no longer falls; the test averages ten crops. Crops are of 227 pixels, which the
layers need and the publication calls 224. Published: 18.2 % top-5 error of one network. Not
measured here: this takes a GPU and ImageNet.
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
