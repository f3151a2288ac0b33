"""The position study with the readout of the authors' released code.

    python -m cnnjax.main --config configs/posenet_authors.py --config.photographs=FOLDER

`configs/posenet.py` differs from the authors' code (github.com/SenJia/Position-Information). This
configuration follows that code in these settings:

- pixels from 0 to 1, and features that are not standardized;
- a 3x3 readout trained on batches of 32 images for some 5,000 steps;
- predictions upsampled without aligned corners;
- dark noise images.

These differences remain:

- Weights are random; the authors use ImageNet weights (`--config.weights=imagenet`).
- Photographs are other ones, cropped to squares; the authors squash whole images.
- Position maps are formulas fitted to the authors' image files.

To read the authors' stages of a ResNet, use `--config.encoders="('resnet18',)"
--config.stages="('layer1','layer2','layer3','layer4')"
--config.paddings="('zeros',)"`. The padding `none` is left out because an image of 224 pixels
without padding does not reach layer4.
"""

import ml_collections

from cnnjax.position import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults.get_config()
    config.encoders = ("vgg16",)
    config.paddings = ("zeros", "none")
    # Photograph crops to fit to, to choose the exact readout's strength on, and to score on.
    config.n_train = 96
    config.n_held_out = 32
    config.n_test = 32
    # Dark noise: mean and standard deviation of the pixels, from 0 to 255.
    config.noise = (25.0, 24.0)
    # Pixels from 0 to 1, and features that are not standardized.
    config.pixels = "unit"
    config.standardize = False
    # The readout is a 3x3 convolution, whose predictions are upsampled without aligned corners.
    config.kernel = 3
    config.align_corners = False
    config.sgd_steps = 5000
    return config
