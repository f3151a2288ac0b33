"""MNASNet-B1, in torchvision's structure and names.

B1 is the network without squeeze-and-excitation of the authors' released code; figure 7 shows the
one with it.

Source: Tan et al. 2018 (arXiv 1807.11626).
"""

import functools

import flax.linen as nn
from jax.typing import DTypeLike

from cnnjax.models.base import Network, register
from cnnjax.nn import (
    BatchNorm,
    Conv,
    Dense,
    conv_stride,
    fit_to_branch,
    global_avg_pool,
    he_normal_fan_out,
    relu,
    sample,
)

_conv = functools.partial(Conv, use_bias=False, kernel_init=he_normal_fan_out)
# The publication's 0.9997 weighs the old statistics.
_norm = functools.partial(BatchNorm, momentum=1 - 0.9997)

# Output channels at width 1, kernel, stride of the first repetition, expansion, repetitions;
# torchvision's layers 8 ... 13.
TABLE = (
    (24, 3, 2, 3, 3),
    (40, 5, 2, 3, 3),
    (80, 5, 2, 6, 3),
    (96, 3, 1, 6, 2),
    (192, 5, 2, 6, 4),
    (320, 3, 1, 6, 1),
)


def scaled(channels: int, width: float) -> int:
    """Returns `width` times `channels` as a multiple of 8.

    The multiple is the nearest, or the next larger one if rounding would lose more than a tenth.
    """
    exact = width * channels
    nearest = max(8, int(exact + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * exact else nearest + 8


class InvertedResidual(nn.Module):
    """A block of 1x1, depthwise and 1x1 convolutions.

    The first widens to `expansion` times the channels; the last has no activation.
    """

    features: int
    size: int
    stride: int
    expansion: int
    fill: str
    sampling: str
    dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(_conv, fill=self.fill, dtype=self.dtype)
        norm = functools.partial(_norm, axis_name=self.axis_name, dtype=self.dtype)
        width = self.expansion * x.shape[-1]
        y = conv(width, 1, name="layers.0")(x)
        y = norm(name="layers.1")(y, train)
        y = relu(y)
        stride = conv_stride(self.stride, self.sampling)
        y = conv(width, self.size, stride, padding=self.size // 2, groups=width, name="layers.3")(y)
        y = norm(name="layers.4")(y, train)
        y = relu(y)
        y = sample(y, self.stride, sampling=self.sampling, fill=self.fill)
        y = conv(self.features, 1, name="layers.6")(y)
        y = norm(name="layers.7")(y, train)
        has_skip = self.stride == 1 and x.shape[-1] == self.features
        if not has_skip:
            return y
        return fit_to_branch(x, y) + y


class MNASNet(Network):
    """MNASNet-B1, for mobile devices: MobileNetV2's blocks, arranged by a search.

    The stages `stage1` ... `stage5` are the maps of the last blocks at strides 2, 4, 8, 16 and 32.

    Attributes:
      width: factor of all numbers of channels but the last (`scaled`).
      dropout: rate before the head.
    """

    # Checked to be positive, with the fields of all networks.
    _sizes = ("width",)

    width: float = 1.0
    dropout: float = 0.2

    @nn.nowrap
    def walk(self, x, train):
        shared = {"fill": self.padding, "dtype": self.dtype}
        norm = functools.partial(_norm, axis_name=self.axis_name, dtype=self.dtype)
        first = scaled(32, self.width)
        second = scaled(16, self.width)
        stem_stride = conv_stride(2, self.sampling)
        x = _conv(first, 3, stem_stride, padding=1, name="layers.0", **shared)(x)
        x = norm(name="layers.1")(x, train)
        x = relu(x)
        x = sample(x, 2, sampling=self.sampling, fill=self.padding)
        x = _conv(first, 3, padding=1, groups=first, name="layers.3", **shared)(x)
        x = norm(name="layers.4")(x, train)
        x = relu(x)
        x = _conv(second, 1, name="layers.6", **shared)(x)
        x = norm(name="layers.7")(x, train)
        stage = 1
        for layer, (features, size, first_stride, expansion, repetitions) in enumerate(TABLE, 8):
            # The map before a stride ends a stage.
            if first_stride == 2:
                x = yield f"stage{stage}", x
                stage += 1
            for index in range(repetitions):
                stride = first_stride if index == 0 else 1
                block = InvertedResidual(
                    scaled(features, self.width),
                    size,
                    stride=stride,
                    expansion=expansion,
                    sampling=self.sampling,
                    axis_name=self.axis_name,
                    name=f"layers.{layer}.{index}",
                    **shared,
                )
                x = block(x, train)
        x = yield f"stage{stage}", x
        x = _conv(1280, 1, name="layers.14", **shared)(x)
        x = norm(name="layers.15")(x, train)
        x = relu(x)
        x = global_avg_pool(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        head = Dense(
            self.num_classes,
            kernel_init=nn.initializers.variance_scaling(1.0, "fan_out", "uniform"),
            bias_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="classifier.1",
        )
        yield "logits", head(x)


for _width in (0.5, 0.75, 1.0, 1.3):
    register(f"mnasnet{_width}".replace(".", "_"), functools.partial(MNASNet, width=_width))
