"""The position study on ImageNet weights, on a folder of photographs.

From the Hugging Face hub, or of one encoder from a safetensors file with torchvision's names:

    python -m cnnjax.main --config configs/posenet_imagenet.py --config.photographs=FOLDER
    python -m cnnjax.main --config configs/posenet_imagenet.py --config.photographs=FOLDER \
        --config.encoders="('resnet18',)" --config.weights=FILE

Measured on the second form, with a file that ends at layer3 (--config.missing="('layer4','fc')"
--config.stages="('stem','layer1','layer2','layer3')") and the 100 photographs of BSDS500's validation set: SPC (R2) of H with the exact
readout, 3 seeds, 32 photograph crops and one black image each: zeros .46 (.20) on photographs and .71 (.26) on black, none .04 (.00) and
0, reflect .37 (.13) and 0, replicate .28 (.08) and 0, circular .53 (.26) and 0 (2 CPU cores, 21 November 2026). Other photographs give
other figures: docs/position.md.
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
