"""CIFAR-10 to 94 % in eight epochs, by the recipe of `airbench94_muon` (Jordan 2024).

Published: 94.01 % in 2.59 s on an A100 (n=200).

    python -m experiments.speedrun --data_dir FOLDER [--runs 200] [--KEY VALUE ...]

KEY is any key of this file, such as `--epochs 8`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.epochs = 8
    config.batch_size = 2000
    config.width = 64  # channels of the first group; the others have 256
    config.n_train = 50_000
    config.n_test = 10_000
    # Muon trains the 3x3 filters, with momentum 0.6 and 3 Newton-Schulz steps.
    config.filter_rate = 0.24
    config.filter_momentum = 0.6
    # SGD with Nesterov momentum trains all other parameters, on gradients of the summed loss.
    config.bias_rate = 0.053
    config.head_rate = 0.67
    config.momentum = 0.85
    # At the peak of the learning rate, whatever the peak is, the decay of a step is this times the
    # batch size.
    config.weight_decay = 2e-6
    config.whiten_epochs = 3  # epochs in which the first layer's bias is trained
    config.label_smoothing = 0.2
    config.crop = 2  # pixels that a crop moves at most, over a reflected border
    return config
