"""DenseNet-BC, in torchvision's structure and names.

Source: Huang et al. 2016 (arXiv 1608.06993), table 1.
"""

import functools

import flax.linen as nn
from jax.typing import DTypeLike

from cnnjax.models.base import Network, register
from cnnjax.nn import (
    BatchNorm,
    Conv,
    Dense,
    avg_pool,
    concatenate,
    conv_stride,
    global_avg_pool,
    max_pool,
    relu,
    sample,
)

# PyTorch's `kaiming_normal_`, which is not truncated.
_he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_conv = functools.partial(Conv, use_bias=False, kernel_init=_he_normal)


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 to four times the growth, BN-ReLU-3x3 to the growth (section 3).

    The result is appended to the input's channels.
    """

    growth: int
    dropout: float
    fill: str
    dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(_conv, fill=self.fill, dtype=self.dtype)
        norm = functools.partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
        y = norm(name="norm1")(x, train)
        y = relu(y)
        y = conv(4 * self.growth, 1, name="conv1")(y)
        y = norm(name="norm2")(y, train)
        y = relu(y)
        y = conv(self.growth, 3, padding=1, name="conv2")(y)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return concatenate([x, y], self.fill)


class DenseNet(Network):
    """DenseNet-BC: each layer reads all earlier maps of its block.

    The stages `stem` (before the max-pool) and `denseblock1` ... `denseblock4` have strides 2, 4,
    8, 16 and 32.

    Attributes:
      depths: layers of each block.
      growth: channels that a layer adds.
      dropout: rate after each layer.
    """

    # Checked to be positive, with the fields of all networks.
    _sizes = ("growth",)

    depths: tuple[int, int, int, int] = (6, 12, 24, 16)
    growth: int = 32
    # 0.2 in the publication, for data without augmentation.
    dropout: float = 0.0

    @nn.nowrap
    def walk(self, x, train):
        shared = {"fill": self.padding, "dtype": self.dtype}
        norm = functools.partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
        fill_and_sampling = {"fill": self.padding, "sampling": self.sampling}
        stride = conv_stride(2, self.sampling)
        x = _conv(2 * self.growth, 7, stride, padding=3, name="features.conv0", **shared)(x)
        x = norm(name="features.norm0")(x, train)
        x = relu(x)
        x = sample(x, 2, **fill_and_sampling)
        x = yield "stem", x
        x = max_pool(x, 3, 2, padding=1, **fill_and_sampling)
        for block, depth in enumerate(self.depths, 1):
            for layer in range(1, depth + 1):
                x = DenseLayer(
                    self.growth,
                    self.dropout,
                    axis_name=self.axis_name,
                    name=f"features.denseblock{block}.denselayer{layer}",
                    **shared,
                )(x, train)
            x = yield f"denseblock{block}", x
            if block < len(self.depths):
                x = norm(name=f"features.transition{block}.norm")(x, train)
                x = relu(x)
                x = _conv(x.shape[-1] // 2, 1, name=f"features.transition{block}.conv", **shared)(x)
                x = avg_pool(x, 2, **fill_and_sampling)
        x = norm(name="features.norm5")(x, train)
        x = relu(x)
        x = global_avg_pool(x)
        head = Dense(
            self.num_classes,
            bias_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="classifier",
        )
        yield "logits", head(x)


register("densenet121", functools.partial(DenseNet, depths=(6, 12, 24, 16)))
register("densenet161", functools.partial(DenseNet, depths=(6, 12, 36, 24), growth=48))
register("densenet169", functools.partial(DenseNet, depths=(6, 12, 32, 32)))
register("densenet201", functools.partial(DenseNet, depths=(6, 12, 48, 32)))
