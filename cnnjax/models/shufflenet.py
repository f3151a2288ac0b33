"""ShuffleNetV2, in torchvision's structure and names.

Source: Ma et al. 2018 (arXiv 1807.11164), table 5.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cnnjax.models.base import Network, register
from cnnjax.nn import (
    BatchNorm,
    Conv,
    Dense,
    concatenate,
    conv_stride,
    global_avg_pool,
    max_pool,
    relu,
    sample,
)

_conv = functools.partial(Conv, use_bias=False)

# Units of stages 2, 3 and 4 (table 5).
DEPTHS = (4, 8, 4)


def channel_shuffle(x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
    """Interleaves the channels of the two halves.

    The halves of the next unit then mix those of this one.
    """
    *shape, channels = x.shape
    return x.reshape(*shape, 2, channels // 2).swapaxes(-1, -2).reshape(x.shape)


def _depthwise(channels: int, **fields) -> Conv:
    """Returns a 3x3 convolution of each channel by itself."""
    return _conv(channels, 3, padding=1, groups=channels, **fields)


class Unit(nn.Module):
    """Two branches: at stride 2 both see all channels, at stride 1 one half passes unchanged.

    Source: figures 3d and 3c.
    """

    features: int
    stride: int
    fill: str
    sampling: str
    dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        shared = {"fill": self.fill, "dtype": self.dtype}
        conv = functools.partial(_conv, **shared)
        depthwise = functools.partial(
            _depthwise, stride=conv_stride(self.stride, self.sampling), **shared
        )
        norm = functools.partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
        downsample = functools.partial(
            sample, stride=self.stride, sampling=self.sampling, fill=self.fill
        )
        half = self.features // 2
        if self.stride == 1:
            branch1, branch2 = jnp.split(x, 2, axis=3)
            unsampled = None
        else:
            unsampled = depthwise(x.shape[-1], name="branch1.0")(x)
            unsampled = norm(name="branch1.1")(unsampled, train)
            branch1 = downsample(unsampled)
            branch1 = conv(half, 1, name="branch1.2")(branch1)
            branch1 = norm(name="branch1.3")(branch1, train)
            branch1 = relu(branch1)
            branch2 = x
        branch2 = conv(half, 1, name="branch2.0")(branch2)
        branch2 = norm(name="branch2.1")(branch2, train)
        branch2 = relu(branch2)
        branch2 = depthwise(half, name="branch2.3")(branch2)
        branch2 = norm(name="branch2.4")(branch2, train)
        # Under 'aps', branch 2 keeps the grid that branch 1 chose; without a downsampling branch,
        # `like` is None.
        branch2 = downsample(branch2, like=unsampled)
        branch2 = conv(half, 1, name="branch2.5")(branch2)
        branch2 = norm(name="branch2.6")(branch2, train)
        branch2 = relu(branch2)
        joined = concatenate([branch1, branch2], self.fill)
        return channel_shuffle(joined)


class ShuffleNetV2(Network):
    """ShuffleNetV2, for mobile devices: depthwise convolutions and channel shuffles.

    The stages `conv1` (before the max-pool), `stage2`, `stage3` and `stage4` have strides 2, 8, 16
    and 32.

    Attributes:
      widths: channels of stages 2, 3 and 4, even numbers.
      last: channels of the convolution before the head.
    """

    # Checked to be positive, with the fields of all networks.
    _sizes = ("last",)

    widths: tuple[int, int, int] = (116, 232, 464)
    last: int = 1024

    def __post_init__(self):
        super().__post_init__()
        if any(width % 2 for width in self.widths):
            raise ValueError(
                f"widths={self.widths!r} are not all even numbers; each unit has two branches with "
                "half of the channels"
            )

    @nn.nowrap
    def walk(self, x, train):
        shared = {"fill": self.padding, "dtype": self.dtype}
        norm = functools.partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
        fill_and_sampling = {"fill": self.padding, "sampling": self.sampling}
        stem_stride = conv_stride(2, self.sampling)
        x = _conv(24, 3, stem_stride, padding=1, name="conv1.0", **shared)(x)
        x = norm(name="conv1.1")(x, train)
        x = relu(x)
        x = sample(x, 2, **fill_and_sampling)
        x = yield "conv1", x
        x = max_pool(x, 3, 2, padding=1, **fill_and_sampling)
        for stage, depth, width in zip((2, 3, 4), DEPTHS, self.widths):
            for index in range(depth):
                stride = 2 if index == 0 else 1
                unit = Unit(
                    width,
                    stride=stride,
                    sampling=self.sampling,
                    axis_name=self.axis_name,
                    name=f"stage{stage}.{index}",
                    **shared,
                )
                x = unit(x, train)
            x = yield f"stage{stage}", x
        x = _conv(self.last, 1, name="conv5.0", **shared)(x)
        x = norm(name="conv5.1")(x, train)
        x = relu(x)
        x = global_avg_pool(x)
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name="fc")(x)


register("shufflenet_v2_x0_5", functools.partial(ShuffleNetV2, widths=(48, 96, 192)))
register("shufflenet_v2_x1_0", functools.partial(ShuffleNetV2, widths=(116, 232, 464)))
register("shufflenet_v2_x1_5", functools.partial(ShuffleNetV2, widths=(176, 352, 704)))
register("shufflenet_v2_x2_0", functools.partial(ShuffleNetV2, widths=(244, 488, 976), last=2048))
