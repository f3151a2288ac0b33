"""The position study with the readout of the authors' released code.

    python -m cnnjax.main --config configs/posenet_authors.py --config.photographs=FOLDER

Where `configs/posenet.py` departs from github.com/SenJia/Position-Information, this follows it:
pixels from 0 to 1, features as they are, a 3x3 readout trained on batches of 32 images for some
5,000 steps, predictions upsampled without aligned corners, and dark noise images. Weights are
random all the same; the authors' are ImageNet's (`--config.weights=imagenet`). Photographs are
cropped to squares, where the authors squash whole images.

ResNets have the authors' stages with `--config.encoders="('resnet18',)"
--config.stages="('layer1','layer2','layer3','layer4')" --config.paddings="('zeros',)"`: without
padding, an image of 224 pixels does not reach layer4.
"""

import ml_collections

from cnnjax.position import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults.get_config()
    config.encoders = ("vgg16",)
    config.paddings = ("zeros", "none")
    config.n_train = 96
    config.n_held_out = 32
    config.n_test = 32
    config.noise = (25.0, 24.0)
    config.pixels = "unit"
    config.standardize = False
    config.align_corners = False
    config.kernel = 3
    config.sgd_steps = 5000
    return config
