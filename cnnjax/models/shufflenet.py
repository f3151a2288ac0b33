"""ShuffleNetV2, in torchvision's structure and names.

Source: Ma et al. 2018 (arXiv 1807.11164), table 5.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

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


def channel_shuffle(x: jnp.ndarray) -> jnp.ndarray:
    """Interleaves the channels of the two halves.

    The halves of the next unit then mix those of this one.
    """
    *shape, channels = x.shape
    return x.reshape(*shape, 2, channels // 2).swapaxes(-1, -2).reshape(x.shape)


class Unit(nn.Module):
    """Two branches: at stride 2 both see all channels, at stride 1 one half passes by.

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
        conv = functools.partial(_conv, fill=self.fill, dtype=self.dtype)
        norm = functools.partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)

        downsample = functools.partial(
            sample, stride=self.stride, sampling=self.sampling, fill=self.fill
        )
        stride = conv_stride(self.stride, self.sampling)

        def depthwise(y, name):
            return conv(y.shape[-1], 3, stride, padding=1, groups=y.shape[-1], name=name)(y)

        half = self.features // 2
        if self.stride == 1:
            left, right = jnp.split(x, 2, axis=3)
            dense = None
        else:
            dense = norm(name="branch1.1")(depthwise(x, "branch1.0"), train)
            left = downsample(dense)
            left = relu(norm(name="branch1.3")(conv(half, 1, name="branch1.2")(left), train))
            right = x
        right = relu(norm(name="branch2.1")(conv(half, 1, name="branch2.0")(right), train))
        right = norm(name="branch2.4")(depthwise(right, "branch2.3"), train)
        # Both branches keep the same positions.
        right = downsample(right, like=dense)
        right = relu(norm(name="branch2.6")(conv(half, 1, name="branch2.5")(right), train))
        return channel_shuffle(concatenate([left, right], self.fill))


class ShuffleNetV2(Network):
    """ShuffleNetV2.

    The stages `conv1` (before the max-pool), `stage2`, `stage3` and `stage4` have strides 2, 8, 16
    and 32.

    Attributes:
      widths: channels of stages 2, 3 and 4, even numbers.
      last: channels of the convolution before the head.
    """

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
        policy = {"fill": self.padding, "sampling": self.sampling}
        stride = conv_stride(2, self.sampling)
        x = _conv(24, 3, stride, padding=1, name="conv1.0", **shared)(x)
        x = relu(norm(name="conv1.1")(x, train))
        x = sample(x, 2, **policy)
        x = yield "conv1", x
        x = max_pool(x, 3, 2, padding=1, **policy)
        for stage, depth, width in zip((2, 3, 4), DEPTHS, self.widths):
            for number in range(depth):
                x = Unit(
                    width,
                    2 if number == 0 else 1,
                    sampling=self.sampling,
                    axis_name=self.axis_name,
                    name=f"stage{stage}.{number}",
                    **shared,
                )(x, train)
            x = yield f"stage{stage}", x
        x = relu(norm(name="conv5.1")(_conv(self.last, 1, name="conv5.0", **shared)(x), train))
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name="fc")(global_avg_pool(x))


register("shufflenet_v2_x0_5", functools.partial(ShuffleNetV2, widths=(48, 96, 192)))
register("shufflenet_v2_x1_0", functools.partial(ShuffleNetV2, widths=(116, 232, 464)))
register("shufflenet_v2_x1_5", functools.partial(ShuffleNetV2, widths=(176, 352, 704)))
register("shufflenet_v2_x2_0", functools.partial(ShuffleNetV2, widths=(244, 488, 976), last=2048))
