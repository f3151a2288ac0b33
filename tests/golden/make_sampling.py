"""Makes sampling.npz: what the authors' code gives for the weights and inputs of formula.py.

    git clone https://github.com/achaman2/truly_shift_invariant_cnns aps
    mkdir aps/model_classes
    ln -s ../cifar10_training/model_classes aps/model_classes/models_for_cifar10
    pip install torch==2.13.0 numpy && python tests/golden/make_sampling.py aps

Chaman and Dokmanic's repository holds Zhang's filters, too, with circular borders. "TAPS/BORDER"
holds a filtered map; "blur/KIND" and "aps/KIND" the output of a residual block of stride 2 with
circular borders, of the kind basic or bottleneck. Channels come first.
"""

import pathlib
import re
import sys

import formula
import numpy as np
import torch

sys.path.insert(0, sys.argv[1])

from model_classes.models_for_cifar10.aps_models import resnet as aps  # noqa: E402
from model_classes.models_for_cifar10.lpf_models import blurpool  # noqa: E402
from model_classes.models_for_cifar10.lpf_models import resnet as blur  # noqa: E402

CHANNELS = 8
FILTERED = (3, 9, 8)


def downsample(pool, channels, features):
    convolution = torch.nn.Conv2d(channels, features, 1, bias=False)
    return torch.nn.Sequential(pool, convolution, torch.nn.BatchNorm2d(features))


def own_name(key):
    """Returns a parameter's name here, where padding and filters are no modules with a number."""
    key = re.sub(r"^(conv\d)(\.1)+\.", r"\1.", key)
    return re.sub(r"^downsample\.(\d)", lambda found: f"downsample.{int(found[1]) - 1}", key)


def block(module, kind, pool, size):
    """Returns the output of a block whose parameters are the formula's."""
    kinds = {"basic": module.BasicBlock, "bottleneck": module.Bottleneck}
    width = CHANNELS // 2
    features = width * kinds[kind].expansion
    built = kinds[kind](
        CHANNELS,
        width,
        stride=2,
        downsample=downsample(pool, CHANNELS, features),
        filter_size=size,
        conv_pad_type="circular",
    ).double()
    state = {}
    for key, value in built.state_dict().items():
        if key.endswith(("num_batches_tracked", "filt")):
            state[key] = value
        else:
            parameter = formula.parameter(own_name(key), tuple(value.shape))
            state[key] = torch.tensor(parameter).double()
    built.load_state_dict(state)
    x = torch.tensor(formula.uniform("block", (3, CHANNELS, 8, 8))).double()
    return built.eval()(x).detach().numpy()


def main():
    arrays = {}
    x = torch.tensor(formula.uniform("filter", (2, *FILTERED)))
    for taps in (3, 5):
        for border in ("reflect", "replicate", "zero", "circular"):
            pool = blurpool.BlurPool(3, border, taps, circular_flag=border == "circular")
            arrays[f"{taps}/{border}"] = pool(x).numpy()
    for kind in ("basic", "bottleneck"):
        pool = blurpool.BlurPool(CHANNELS, filt_size=3, circular_flag=True)
        arrays[f"blur/{kind}"] = block(blur, kind, pool, 3)
        pool = aps.ApsPool(CHANNELS, filt_size=1, circular_flag=True)
        arrays[f"aps/{kind}"] = block(aps, kind, pool, 1)
    np.savez_compressed(pathlib.Path(__file__).with_name("sampling.npz"), **arrays)


if __name__ == "__main__":
    main()
