"""GoogLeNet with BatchNorm, in torchvision's structure and names.

Source: Szegedy et al. 2014 (arXiv 1409.4842), table 1. As in torchvision, the "5x5" branch
is a 3x3 convolution (pytorch/vision issue 906).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cnnjax.models.base import Network, register
from cnnjax.nn import (
    BatchNorm,
    Conv,
    Dense,
    adaptive_avg_pool,
    concatenate,
    conv_stride,
    flatten,
    global_avg_pool,
    max_pool,
    relu,
    sample,
)
from cnnjax.runtime import imagenet
from cnnjax.runtime.types import AnyArray

# torchvision truncates at +-2, two hundred standard deviations away.
_normal = nn.initializers.normal(0.01)

# Table 1: filters of the 1x1, the 3x3 with its reduction, the "5x5" with its reduction, and the
# projection after the pool.
TABLE = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
# The window of the max-pool, of stride 2, that follows a block.
_POOLED = {"inception3b": 3, "inception4e": 2}
# The classifier on a block's map.
AUXILIARY = {"inception4a": "aux1", "inception4d": "aux2"}


class ConvNorm(nn.Module):
    """A convolution without bias, BatchNorm, ReLU, and its sampling."""

    features: int
    size: int | tuple[int, int]
    stride: int = 1
    padding: int | tuple[int, int] = 0
    kernel_init: Callable = _normal
    fill: str = "zeros"
    sampling: str = "stride"
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = Conv(
            self.features,
            self.size,
            conv_stride(self.stride, self.sampling),
            self.padding,
            use_bias=False,
            kernel_init=self.kernel_init,
            fill=self.fill,
            dtype=self.dtype,
            name="conv",
        )(x)
        norm = BatchNorm(eps=1e-3, axis_name=self.axis_name, dtype=self.dtype, name="bn")
        x = norm(x, train)
        x = relu(x)
        return sample(x, self.stride, sampling=self.sampling, fill=self.fill)


class Inception(nn.Module):
    """Four parallel branches (figure 2b); `widths` is a row of table 1."""

    widths: tuple[int, int, int, int, int, int]
    fill: str
    dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(
            ConvNorm, fill=self.fill, dtype=self.dtype, axis_name=self.axis_name
        )
        one, reduce3, three, reduce5, five, projection = self.widths
        pooled = max_pool(x, 3, 1, padding=1, fill=self.fill)
        branch1 = conv(one, 1, name="branch1")(x, train)
        branch2 = conv(reduce3, 1, name="branch2.0")(x, train)
        branch2 = conv(three, 3, padding=1, name="branch2.1")(branch2, train)
        branch3 = conv(reduce5, 1, name="branch3.0")(x, train)
        branch3 = conv(five, 3, padding=1, name="branch3.1")(branch3, train)
        branch4 = conv(projection, 1, name="branch4.1")(pooled, train)
        return concatenate([branch1, branch2, branch3, branch4], self.fill)


def sow_logits(classifier: nn.Module, logits: Float[Array, "batch classes"]) -> None:
    """Leaves an auxiliary classifier's logits, float32, in the collection "auxiliary".

    Args:
      classifier: the module whose logits they are.
      logits: [batch, classes].
    """
    if not classifier.is_initializing():
        classifier.sow(
            "auxiliary",
            "logits",
            logits.astype(jnp.float32),
            init_fn=lambda: None,
            reduce_fn=lambda _, new: new,
        )


class Auxiliary(nn.Module):
    """A classifier on an intermediate map (section 5)."""

    num_classes: int
    dropout: float
    fill: str
    dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        dense = functools.partial(Dense, kernel_init=_normal, dtype=self.dtype)
        x = adaptive_avg_pool(x, 4)
        x = ConvNorm(
            128, 1, fill=self.fill, dtype=self.dtype, axis_name=self.axis_name, name="conv"
        )(x, train)
        x = flatten(x)
        x = dense(1024, name="fc1")(x)
        x = relu(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = dense(self.num_classes, name="fc2")(x)
        sow_logits(self, logits)


def normalize_by_half(
    x: Float[AnyArray, "batch height width channels"],
) -> Float[AnyArray, "batch height width channels"]:
    """Converts normalization by ImageNet's moments to normalization by 0.5 and 0.5.

    Google's GoogLeNet and Inception v3 were trained on the latter (torchvision's
    `transform_input`).

    Args:
      x: images [batch, height, width, 3], normalized by `imagenet.MOMENTS`.

    Returns [batch, height, width, 3].
    Raises `ValueError` if `x` does not have three channels.
    """
    if x.shape[-1] != 3:
        raise ValueError(
            f"an input of shape {x.shape} does not have the 3 channels that transform_input=True "
            "converts"
        )
    mean, std = imagenet.MOMENTS
    scale = jnp.asarray(std / 0.5, x.dtype)
    shift = jnp.asarray((mean - 0.5) / 0.5, x.dtype)
    return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(shift, x.shape)


class GoogLeNet(Network):
    """GoogLeNet as in torchvision, with BatchNorm.

    The stages `conv1`, `conv3`, `inception3b`, `inception4e` and `inception5b` have strides 2, 4,
    8, 16 and 32. In training the auxiliary classifiers leave {"aux1": {"logits": ...}, "aux2": ...}
    in the collection "auxiliary"; section 5 adds their losses with a weight of 0.3. With
    `aux_logits=False` there are neither classifiers nor their parameters.
    """

    dropout: float = 0.2  # torchvision's; the publication has 0.4
    dropout_aux: float = 0.7
    aux_logits: bool = True
    # Whether the input is converted first, which torchvision's ImageNet weights need.
    transform_input: bool = False

    @nn.nowrap
    def walk(self, x, train):
        if self.transform_input:
            x = normalize_by_half(x)
        shared = {"fill": self.padding, "dtype": self.dtype, "axis_name": self.axis_name}
        pool = functools.partial(
            max_pool, stride=2, ceil=True, fill=self.padding, sampling=self.sampling
        )
        stem = ConvNorm(64, 7, 2, padding=3, sampling=self.sampling, name="conv1", **shared)
        x = stem(x, train)
        x = yield "conv1", x
        x = pool(x, 3)
        x = ConvNorm(64, 1, name="conv2", **shared)(x, train)
        x = ConvNorm(192, 3, padding=1, name="conv3", **shared)(x, train)
        x = yield "conv3", x
        x = pool(x, 3)
        for name, widths in TABLE.items():
            x = Inception(widths, name=name, **shared)(x, train)
            if name in AUXILIARY and self.aux_logits and (train or self.is_initializing()):
                auxiliary = Auxiliary(
                    self.num_classes, self.dropout_aux, name=AUXILIARY[name], **shared
                )
                auxiliary(x, train)
            if name in _POOLED:
                x = yield name, x
                x = pool(x, _POOLED[name])
        x = yield "inception5b", x
        x = global_avg_pool(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        head = Dense(self.num_classes, kernel_init=_normal, dtype=self.dtype, name="fc")
        yield "logits", head(x)


register("googlenet", GoogLeNet)
