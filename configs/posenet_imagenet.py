"""The position study on ImageNet weights: the paper's own VGG-16 and ResNet-152.

Give it a folder of photographs:

    python -m cnnjax.main --config configs/posenet_imagenet.py --config.photographs=FOLDER

The weights are found in PyTorch's or the Hugging Face cache or downloaded, 770 MB once; without a
network, one line says which file to put where. Without padding, an image of 224 pixels leaves
nothing of ResNet-152 beyond layer2, so this is as far as the study reads; leave "none" out of
`paddings` to read all stages. One encoder can be read from a file instead:

    python -m cnnjax.main --config configs/posenet_imagenet.py --config.photographs=FOLDER \\
        --config.encoders="('resnet18',)" --config.weights=FILE

Measured on the second form, with a file that ends at layer3 (`--config.missing="('layer4','fc')"
--config.stages="('stem','layer1','layer2','layer3')"`) and the 100 photographs of BSDS500's
validation set; 3 seeds, 32 photograph crops and one black image each, 2 CPU cores, 21 November
2026. SPC (R2) of H with the exact readout:

| padding | photographs | black |
| --- | --- | --- |
| zeros | .46 (.20) | .71 (.26) |
| none | .04 (.00) | 0 |
| reflect | .37 (.13) | 0 |
| replicate | .28 (.08) | 0 |
| circular | .53 (.26) | 0 |

Other photographs give other figures: docs/position.md.
"""

import ml_collections

from configs import posenet


def get_config() -> ml_collections.ConfigDict:
    config = posenet.get_config()
    config.weights = "imagenet"
    config.encoders = ("vgg16", "resnet152")
    config.n_train = 48
    config.n_held_out = 16
    config.n_test = 32
    config.n_noise = 8
    return config
