"""The position study on random weights: VGG-16 and ResNet-18 under five paddings, against the image alone.

    python -m cnnjax.main --config configs/posenet.py

3 min 40 s on 2 CPU cores (jaxlib 0.10.2, 21 November 2026). SPC (R2) of H with the exact readout, 3 seeds, 12 photograph crops and one
black image each: VGG-16 with zeros .86 (.70) on photographs and .92 (.81) on black; ResNet-18 .83 (.65) and .92 (.79); with every other
padding at most .08 (.00) on photographs and exactly 0 on black.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.kind = "position"
    config.encoders = ("vgg16", "resnet18")
    config.weights = "random"  # or "imagenet", or the path of a safetensors or .pth file
    config.missing = ()  # top-level modules that the file is known not to hold, such as ("layer4", "fc")
    config.paddings = ("zeros", "none", "reflect", "replicate", "circular")
    config.stages = ()  # empty: all that every padding reaches
    config.targets = ("H", "V", "G", "HS", "VS")
    config.data = ("natural", "black", "white", "noise")
    config.photographs = ""  # a folder; empty: those that scikit-image and scikit-learn carry
    config.image_size = 224
    config.n_train = 24
    config.n_held_out = 6
    config.n_test = 12
    config.n_noise = 2
    config.pixels = "imagenet"  # its mean and deviation taken out, or "unit": from 0 to 1, where black is what zero padding fills with
    config.coordinates = (
        False  # a control: the image with two channels of coordinates, read out without an encoder
    )
    config.mirrored = False  # train on every crop and its three mirror images, so that content carries no signed position
    config.shuffled = (
        False  # train towards targets whose pixels are shuffled: a control that must fail
    )
    config.kernel = 1
    config.depth = 1  # convolutions of the authors' readout
    config.hidden = (
        0  # channels between them; 0: as many as the features have, as in the authors' code
    )
    config.readout_padding = 0  # zeros around the features, on each side
    config.sgd_paddings = ("zeros", "none")  # the authors' readout beside the exact one
    config.sgd_steps = 540
    config.seeds = 3
    config.seed = 0
    return config
