"""The position study on random weights: VGG-16 and ResNet-18 under five paddings, against the image alone.

    python -m cnnjax.main --config configs/posenet.py
"""
import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.kind = "position"
    config.encoders = ("vgg16", "resnet18")
    config.weights = "random"  # or "imagenet" (from the hub), or the path of a safetensors file
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
    config.kernel = 1
    config.sgd_paddings = ("zeros", "none")  # the authors' readout beside the exact one
    config.sgd_steps = 540
    config.seeds = 3
    config.seed = 0
    return config
