"""The keys that every configuration of the position study has, with their default values."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The configuration of a study on random weights."""
    config = ml_collections.ConfigDict()
    config.kind = "position"
    config.encoders = ("vgg16", "resnet18")
    # Or "imagenet", or the path of a safetensors or .pth file.
    config.weights = "random"
    # Top-level modules that the file is known not to hold, such as ("layer4", "fc").
    config.missing = ()
    config.paddings = ("zeros", "none", "reflect", "replicate", "circular")
    # Empty: all stages that every padding reaches.
    config.stages = ()
    config.targets = ("H", "V", "G", "HS", "VS")
    config.data = ("natural", "black", "white", "noise")
    # A folder; empty: the photographs that scikit-image and scikit-learn carry.
    config.photographs = ""
    config.image_size = 224
    config.n_train = 24
    config.n_held_out = 6
    config.n_test = 12
    config.n_noise = 2
    # "imagenet": standardized by its mean and deviation. "unit": from 0 to 1, where black is what
    # zero padding fills with.
    config.pixels = "imagenet"
    # A control: the image with two channels of coordinates, read out without an encoder.
    config.coordinates = False
    # Train on every crop and its three mirror images, so that content carries no signed position.
    config.mirrored = False
    # A control that must fail: train towards targets whose pixels are shuffled.
    config.shuffled = False
    config.kernel = 1
    # Convolutions of the authors' readout, and the channels between them; 0 channels: as many as
    # the features have, as in the authors' code.
    config.depth = 1
    config.hidden = 0
    # Zeros around the features, on each side.
    config.readout_padding = 0
    # Paddings for which the authors' readout is trained beside the exact one.
    config.sgd_paddings = ("zeros", "none")
    config.sgd_steps = 540
    config.seeds = 3
    config.seed = 0
    return config
