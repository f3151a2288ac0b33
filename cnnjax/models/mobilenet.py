"""MobileNetV2, in torchvision's structure and names.

Source: Sandler et al. 2018 (arXiv 1801.04381), table 2.
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
    conv_stride,
    fit_to_branch,
    global_avg_pool,
    he_normal_fan_out,
    relu,
    sample,
)
from cnnjax.runtime.types import AnyArray

_conv = functools.partial(Conv, use_bias=False, kernel_init=he_normal_fan_out)

# Table 2: expansion t, output channels c, repetitions n, stride s of the first repetition.
TABLE = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def relu6(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Returns min(max(x, 0), 6), with PyTorch's gradient of 0 at both ends."""
    return jnp.where(x >= 6, jnp.asarray(6, x.dtype), relu(x))


class InvertedResidual(nn.Module):
    """A block of 1x1, depthwise 3x3 and 1x1 convolutions (figure 4d).

    The first widens to `expansion` times the channels; the last has no activation.
    """

    features: int
    stride: int
    expansion: int
    fill: str
    sampling: str
    dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(_conv, fill=self.fill, dtype=self.dtype)
        norm = functools.partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
        width = self.expansion * x.shape[-1]
        # torchvision numbers the layers of a block; the first is left out without expansion.
        depthwise = 0 if self.expansion == 1 else 1
        project = depthwise + 1
        last_norm = depthwise + 2
        y = x
        if self.expansion > 1:
            y = conv(width, 1, name="conv.0.0")(y)
            y = norm(name="conv.0.1")(y, train)
            y = relu6(y)
        stride = conv_stride(self.stride, self.sampling)
        y = conv(width, 3, stride, padding=1, groups=width, name=f"conv.{depthwise}.0")(y)
        y = norm(name=f"conv.{depthwise}.1")(y, train)
        y = relu6(y)
        y = sample(y, self.stride, sampling=self.sampling, fill=self.fill)
        y = conv(self.features, 1, name=f"conv.{project}")(y)
        y = norm(name=f"conv.{last_norm}")(y, train)
        has_skip = self.stride == 1 and x.shape[-1] == self.features
        if not has_skip:
            return y
        return fit_to_branch(x, y) + y


class MobileNetV2(Network):
    """MobileNetV2, for mobile devices: inverted residuals, depthwise convolutions.

    The stages `stage1` to `stage5` are the last maps at strides 2, 4, 8, 16 and 32.
    """

    dropout: float = 0.2

    @nn.nowrap
    def walk(self, x, train):
        shared = {"fill": self.padding, "dtype": self.dtype}
        norm = functools.partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
        stem_stride = conv_stride(2, self.sampling)
        x = _conv(32, 3, stem_stride, padding=1, name="features.0.0", **shared)(x)
        x = norm(name="features.0.1")(x, train)
        x = relu6(x)
        x = sample(x, 2, sampling=self.sampling, fill=self.padding)
        # torchvision numbers the stem, the blocks and the last convolution alike.
        layer = 1
        stage = 1
        for expansion, features, repetitions, first_stride in TABLE:
            # The map before a stride ends a stage.
            if first_stride == 2:
                x = yield f"stage{stage}", x
                stage += 1
            for index in range(repetitions):
                stride = first_stride if index == 0 else 1
                block = InvertedResidual(
                    features,
                    stride=stride,
                    expansion=expansion,
                    sampling=self.sampling,
                    axis_name=self.axis_name,
                    name=f"features.{layer}",
                    **shared,
                )
                x = block(x, train)
                layer += 1
        x = yield f"stage{stage}", x
        # 1280: table 2, second last convolution.
        x = _conv(1280, 1, name=f"features.{layer}.0", **shared)(x)
        x = norm(name=f"features.{layer}.1")(x, train)
        x = relu6(x)
        x = global_avg_pool(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        head = Dense(
            self.num_classes,
            kernel_init=nn.initializers.normal(0.01),
            bias_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="classifier.1",
        )
        yield "logits", head(x)


register("mobilenet_v2", MobileNetV2)
