"""VGG, in torchvision's structure and names.

Source: Simonyan and Zisserman 2014 (arXiv 1409.1556), table 1.
"""

import functools

import flax.linen as nn

from cnnjax.models.base import Network, register
from cnnjax.nn import (
    BatchNorm,
    Conv,
    Dense,
    adaptive_avg_pool,
    flatten,
    he_normal_fan_out,
    local_response_norm,
    max_pool,
    relu,
)
from cnnjax.runtime.configuration import is_whole

# Table 1, one tuple per block: a number is a 3x3 convolution with that many filters, (n, 1) a 1x1
# convolution, "LRN" the normalization; a max-pool ends every block.
_TABLE = {
    "A": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "A-LRN": ((64, "LRN"), (128,), (256, 256), (512, 512), (512, 512)),
    "B": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "C": ((64, 64), (128, 128), (256, 256, (256, 1)), (512, 512, (512, 1)), (512, 512, (512, 1))),
    "D": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "E": ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512)),
}


class VGG(Network):
    """VGG of 11 to 19 layers: `_bn` has BatchNorm, `_lrn` and `_c` are columns A-LRN and C.

    The stages `block1` ... `block5` are each block's last activation, before its max-pool, with
    strides 1, 2, 4, 8 and 16. With `every_layer` the stages are the activations of all convolutions
    instead: `conv1_1`, `conv1_2`, `conv2_1`, ...

    Attributes:
      blocks: the layers of each block: a number is a 3x3 convolution with that many filters, a pair
        (filters, kernel) a convolution, "LRN" the normalization.
      batch_norm: whether each convolution is followed by BatchNorm.
      every_layer: whether every convolution is a stage.
      dropout: rate after each dense layer but the last.

    Raises `ValueError` if a layer of `blocks` is anything else.
    """

    blocks: tuple = _TABLE["D"]
    batch_norm: bool = False
    every_layer: bool = False
    dropout: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        for block in self.blocks:
            if not isinstance(block, (tuple, list)) or not all(map(_is_layer, block)):
                raise ValueError(
                    f"blocks has {block!r}, which is not a tuple of layers: numbers of filters, "
                    "pairs (filters, kernel) or 'LRN'"
                )

    @nn.nowrap
    def walk(self, x, train):
        # torchvision numbers every layer of `features`: convolution, normalization, ReLU and pool.
        index = 0
        for number, block in enumerate(self.blocks, 1):
            within = 0
            for layer in block:
                if layer == "LRN":
                    # Section 2.1: the parameters of Krizhevsky et al. 2012.
                    x = local_response_norm(x)
                    index += 1
                    continue
                features, size = layer if isinstance(layer, tuple) else (layer, 3)
                x = Conv(
                    features,
                    size,
                    padding=size // 2,
                    fill=self.padding,
                    dtype=self.dtype,
                    kernel_init=he_normal_fan_out,
                    bias_init=nn.initializers.zeros,
                    name=f"features.{index}",
                )(x)
                index += 1
                if self.batch_norm:
                    norm = BatchNorm(
                        axis_name=self.axis_name, dtype=self.dtype, name=f"features.{index}"
                    )
                    x = norm(x, train)
                    index += 1
                x = relu(x)
                index += 1
                within += 1
                if self.every_layer:
                    x = yield f"conv{number}_{within}", x
            if not self.every_layer:
                x = yield f"block{number}", x
            x = max_pool(x, 2, fill=self.padding, sampling=self.sampling)
            index += 1
        x = adaptive_avg_pool(x, 7)
        x = flatten(x)
        dense = functools.partial(
            Dense,
            kernel_init=nn.initializers.normal(0.01),
            bias_init=nn.initializers.zeros,
            dtype=self.dtype,
        )
        for layer in (0, 3):
            x = dense(4096, name=f"classifier.{layer}")(x)
            x = relu(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        yield "logits", dense(self.num_classes, name="classifier.6")(x)


def _is_layer(layer) -> bool:
    """Tells whether a layer of a block is one that `walk` knows."""
    sizes = layer if isinstance(layer, tuple) and len(layer) == 2 else (layer,)
    return layer == "LRN" or all(is_whole(size) and size >= 1 for size in sizes)


for _name, _column in (("vgg11", "A"), ("vgg13", "B"), ("vgg16", "D"), ("vgg19", "E")):
    register(_name, functools.partial(VGG, blocks=_TABLE[_column]))
    register(f"{_name}_bn", functools.partial(VGG, blocks=_TABLE[_column], batch_norm=True))
register("vgg11_lrn", functools.partial(VGG, blocks=_TABLE["A-LRN"]))
register("vgg16_c", functools.partial(VGG, blocks=_TABLE["C"]))
