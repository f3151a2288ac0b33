"""The position study on ImageNet weights, on a folder of photographs.

From the Hugging Face hub, or of one encoder from a safetensors file with torchvision's names:

    python -m cnnjax.main --config configs/posenet_imagenet.py --config.photographs=FOLDER
    python -m cnnjax.main --config configs/posenet_imagenet.py --config.photographs=FOLDER \
        --config.encoders="('resnet18',)" --config.weights=FILE
"""
import ml_collections

from configs import posenet


def get_config() -> ml_collections.ConfigDict:
    config = posenet.get_config()
    config.weights = "imagenet"
    config.n_train = 48
    config.n_held_out = 16
    config.n_test = 32
    config.n_noise = 8
    return config
