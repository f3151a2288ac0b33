"""The position study on ImageNet weights: the paper's own VGG-16 and ResNet-152.

Give it a folder of photographs:

    python -m cnnjax.main --config configs/posenet_imagenet.py --config.photographs=FOLDER

The weights are found in PyTorch's cache or the Hugging Face cache, or downloaded once (770 MB).
Without an internet connection, a one-line error says which file to put where. Without padding, an
image of 224 pixels leaves nothing of ResNet-152 beyond layer2, so the study reads the stages up to
layer2; leave "none" out of `paddings` to read all stages. The weights of one encoder can come from
a file instead:

    python -m cnnjax.main --config configs/posenet_imagenet.py --config.photographs=FOLDER \\
        --config.encoders="('resnet18',)" --config.weights=FILE

Measured with the second command, with a file that ends at layer3
(`--config.missing="('layer4','fc')" --config.stages="('stem','layer1','layer2','layer3')"`) and the
100 photographs of BSDS500's validation set: SPC (R2) of H with the exact readout, means over 3
seeds with 32 photograph crops and one black image each (the spread was not recorded), 2 CPU cores,
21 November 2026.

| padding | photographs | black |
| --- | --- | --- |
| zeros | .46 (.20) | .71 (.26) |
| none | .04 (.00) | 0 |
| reflect | .37 (.13) | 0 |
| replicate | .28 (.08) | 0 |
| circular | .53 (.26) | 0 |

Other photographs give other figures: docs/position_results.md.
"""

import ml_collections

from cnnjax.position import defaults


def get_config() -> ml_collections.ConfigDict:
    config = defaults.get_config()
    config.weights = "imagenet"
    config.encoders = ("vgg16", "resnet152")
    config.n_train = 48
    config.n_held_out = 16
    config.n_test = 32
    config.n_noise = 8
    return config
