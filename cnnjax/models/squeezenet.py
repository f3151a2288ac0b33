"""SqueezeNet and its authors' version 1.1, in torchvision's structure and names.

Source: Iandola et al. 2016 (arXiv 1602.07360), table 1.
"""

import functools

import flax.linen as nn
from jax.typing import DTypeLike

from cnnjax.models.base import Network, register
from cnnjax.nn import Conv, concatenate, conv_stride, global_avg_pool, max_pool, relu, sample

_conv = functools.partial(
    Conv, kernel_init=nn.initializers.he_uniform(), bias_init=nn.initializers.zeros
)

# (squeeze, expand) filters of fire modules 2 to 9; both expanding convolutions have `expand`
# filters.
_FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


class Fire(nn.Module):
    """A 1x1 convolution to few channels, then parallel 1x1 and 3x3 ones (figure 1)."""

    squeeze: int
    expand: int
    fill: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(_conv, fill=self.fill, dtype=self.dtype)
        x = conv(self.squeeze, 1, name="squeeze")(x)
        x = relu(x)
        expanded = [
            conv(self.expand, 1, name="expand1x1")(x),
            conv(self.expand, 3, padding=1, name="expand3x3")(x),
        ]
        x = concatenate(expanded, self.fill)
        return relu(x)


class SqueezeNet(Network):
    """SqueezeNet, of few parameters: 1x1 and 3x3 convolutions side by side.

    The stages are `conv1` and the last fire module before each max-pool and at the end, with
    strides 2, 4, 8 and 16.

    Attributes:
      stem: filters and kernel of the first convolution.
      pools: the layers, counted as in table 1, that a max-pool follows.
      dropout: rate before the last convolution.
    """

    stem: tuple[int, int] = (96, 7)
    pools: tuple[int, ...] = (1, 4, 8)
    dropout: float = 0.5

    @nn.nowrap
    def walk(self, x, train):
        shared = {"fill": self.padding, "dtype": self.dtype}
        fill_and_sampling = {"fill": self.padding, "sampling": self.sampling}
        features, size = self.stem
        stride = conv_stride(2, self.sampling)
        x = _conv(features, size, stride, name="features.0", **shared)(x)
        x = relu(x)
        x = sample(x, 2, **fill_and_sampling)
        pool = functools.partial(max_pool, window=3, stride=2, ceil=True, **fill_and_sampling)
        # torchvision numbers convolution, ReLU, pools and fire modules alike.
        index = 2
        if 1 in self.pools:
            x = yield "conv1", x
            x = pool(x)
            index += 1
        # In table 1, the fire modules are layers 2 to 9.
        for layer, (squeeze, expand) in enumerate(_FIRES, 2):
            x = Fire(squeeze, expand, name=f"features.{index}", **shared)(x)
            index += 1
            if layer in self.pools or layer == 9:
                x = yield f"fire{layer}", x
            if layer in self.pools:
                x = pool(x)
                index += 1
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        head = _conv(
            self.num_classes,
            1,
            kernel_init=nn.initializers.normal(0.01),
            name="classifier.1",
            **shared,
        )
        x = head(x)
        x = relu(x)
        yield "logits", global_avg_pool(x)


register("squeezenet1_0", SqueezeNet)
register("squeezenet1_1", functools.partial(SqueezeNet, stem=(64, 3), pools=(1, 3, 5)))
