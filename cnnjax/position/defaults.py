"""The keys of every configuration of the position study, with their defaults."""

import ml_collections

# Keys that were introduced after the first studies, with what was in force before.
BEFORE = {
    "noise": (127.5, 64.0),
    "align_corners": True,
    "standardize": True,
    "registered": False,
    "fitted_to": "photographs",
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of a study on random weights."""
    config = ml_collections.ConfigDict()
    # What the configuration is for: "position".
    config.kind = "position"
    # Names of registered networks, or FILE.py:NAME for your own.
    config.encoders = ("vgg16", "resnet18")
    # "random", "imagenet", or the path of a safetensors or .pth file.
    config.weights = "random"
    # Top-level modules that the file is known not to hold, such as ("layer4", "fc").
    config.missing = ()
    # The fills that are compared: names of `cnnjax.nn.padding`.
    config.paddings = ("zeros", "none", "reflect", "replicate", "circular")
    # Empty: all stages that every padding reaches.
    config.stages = ()
    # Position maps: "H", "V", "G", "HS", "VS".
    config.targets = ("H", "V", "G", "HS", "VS")
    # Images that readouts are fitted to: crops of "photographs"; "shuffled_pixels", the same with
    # the pixels of each crop in random order; or "noise".
    config.fitted_to = "photographs"
    # Images that readouts are scored on: crops of other photographs ("natural"), the same with
    # "shuffled_pixels", "black", "white" and "noise".
    config.data = ("natural", "black", "white", "noise")
    # A folder; empty: the photographs included in scikit-image and scikit-learn.
    config.photographs = ""
    # Height and width of the crops, in pixels.
    config.image_size = 224
    # Images that readouts are fitted to.
    config.n_train = 24
    # Images of the same kind that the strength of the exact readout is chosen on.
    config.n_held_out = 6
    # Photograph crops to score on.
    config.n_test = 12
    # Noise images to score on.
    config.n_noise = 2
    # Mean and standard deviation of the noise images; (25.0, 24.0) in the authors' code.
    config.noise = (127.5, 64.0)
    # "imagenet": standardized by its mean and deviation. "unit": from 0 to 1, where black is what
    # zero padding fills with.
    config.pixels = "imagenet"
    # True: sample all stages at the same pixels of the image. False: resize all stages with their
    # corners aligned, as the authors' code does, although stages cover different parts of the
    # image.
    config.registered = False
    # A control: the image with two channels of coordinates, read out without an encoder.
    config.coordinates = False
    # Fit to every image and its three mirror images, so that content carries no signed position.
    config.mirrored = False
    # A control: targets on the readout's grid, with their pixels in random order.
    config.shuffled = False
    # Height and width of the readout's convolution.
    config.kernel = 1
    # Convolutions of the authors' readout.
    config.depth = 1
    # Channels between these convolutions; 0 for as many as the features have, as in the authors'
    # code.
    config.hidden = 0
    # Zeros around the features, on each side.
    config.readout_padding = 0
    # Upsample predictions with corners aligned; False in the authors' code.
    config.align_corners = True
    # Give the authors' readout features of unit variance; False in the authors' code.
    config.standardize = True
    # Paddings for which the authors' readout is trained beside the exact one.
    config.sgd_paddings = ("zeros", "none")
    # Steps of the authors' readout.
    config.sgd_steps = 540
    # Repetitions, each with weights, photographs, and crops of its own.
    config.seeds = 3
    # The first seed.
    config.seed = 0
    return config
