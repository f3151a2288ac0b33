"""ResNet, ResNeXt and Wide ResNet in torchvision's structure and names.

ResNet is He et al. 2015 (arXiv 1512.03385), table 1; ResNeXt, Xie et al. 2016 (arXiv 1611.05431),
table 1, splits the 3x3 convolution into groups; Wide ResNet, Zagoruyko and Komodakis 2016 (arXiv
1605.07146), table 9, widens it. As in torchvision, the bottleneck's stride sits on its 3x3
convolution (the publication has it on the first 1x1).
"""

import functools
from collections.abc import Callable

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
    max_pool,
    relu,
    sample,
)


class Block(nn.Module):
    """A residual block.

    Its skip is projected if a convolution has a stride or the channels differ.

    Attributes:
      layers: (features, kernel, stride, groups) of each of the branch's convolutions.
    """

    layers: tuple[tuple[int, int, int, int], ...]
    fill: str
    sampling: str
    dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(
            Conv, fill=self.fill, dtype=self.dtype, use_bias=False, kernel_init=he_normal_fan_out
        )
        norm = functools.partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
        downsample = functools.partial(sample, sampling=self.sampling, fill=self.fill)
        y = x
        for number, (features, size, stride, groups) in enumerate(self.layers, 1):
            y = conv(
                features,
                size,
                conv_stride(stride, self.sampling),
                padding=size // 2,
                groups=groups,
                name=f"conv{number}",
            )(y)
            y = norm(name=f"bn{number}")(y, train)
            if number < len(self.layers):
                y = relu(y)
            # The skip keeps the positions that the branch keeps.
            x = downsample(x, stride, like=y)
            y = downsample(y, stride)
        # The branch's stride; at most one of its convolutions has one.
        stride = max(stride for _, _, stride, _ in self.layers)
        # Samplings other than 'stride' have reduced the skip already, in the loop.
        skip_stride = conv_stride(stride, self.sampling)
        x = fit_to_branch(x, y, skip_stride)
        # The published stride decides, as in torchvision, so that parameters depend on neither the
        # sampling nor the map's size.
        if stride > 1 or x.shape[-1] != y.shape[-1]:
            x = conv(y.shape[-1], 1, skip_stride, name="downsample.0")(x)
            x = norm(name="downsample.1")(x, train)
        return relu(x + y)


def basic(width: int, stride: int) -> tuple:
    """Returns two 3x3 convolutions (table 1, 18 and 34 layers)."""
    return (width, 3, stride, 1), (width, 3, 1, 1)


def bottleneck(width: int, stride: int, inner: int = 1, groups: int = 1) -> tuple:
    """Returns 1x1, 3x3 and 1x1 convolutions (table 1, 50 layers and more).

    The first two have `inner` times the width, the last four times. The 3x3 convolution is split
    into `groups`.
    """
    return (inner * width, 1, 1, 1), (inner * width, 3, stride, groups), (4 * width, 1, 1, 1)


class ResNet(Network):
    """ResNet; with other blocks ResNeXt (grouped convolutions) and Wide ResNet.

    The stages `stem` (before the max-pool) and `layer1` ... `layer4` have strides 2, 4, 8, 16 and
    32.

    Attributes:
      depths: blocks of each layer.
      block: `block(width, stride)` returns the convolutions of a block (`Block.layers`), such as
        `basic` and `bottleneck`.
    """

    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    block: Callable = basic

    @nn.nowrap
    def walk(self, x, train):
        fill_and_sampling = {"fill": self.padding, "sampling": self.sampling}
        x = Conv(
            64,
            7,
            conv_stride(2, self.sampling),
            padding=3,
            use_bias=False,
            kernel_init=he_normal_fan_out,
            fill=self.padding,
            dtype=self.dtype,
            name="conv1",
        )(x)
        x = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="bn1")(x, train)
        x = relu(x)
        x = sample(x, 2, **fill_and_sampling)
        x = yield "stem", x
        x = max_pool(x, 3, 2, padding=1, **fill_and_sampling)
        for stage, depth in enumerate(self.depths):
            for index in range(depth):
                width = 64 * 2**stage
                stride = 2 if stage > 0 and index == 0 else 1
                block = Block(
                    self.block(width, stride),
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"layer{stage + 1}.{index}",
                    **fill_and_sampling,
                )
                x = block(x, train)
            x = yield f"layer{stage + 1}", x
        x = global_avg_pool(x)
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name="fc")(x)


register("resnet18", functools.partial(ResNet, depths=(2, 2, 2, 2), block=basic))
register("resnet34", functools.partial(ResNet, depths=(3, 4, 6, 3), block=basic))
register("resnet50", functools.partial(ResNet, depths=(3, 4, 6, 3), block=bottleneck))
register("resnet101", functools.partial(ResNet, depths=(3, 4, 23, 3), block=bottleneck))
register("resnet152", functools.partial(ResNet, depths=(3, 8, 36, 3), block=bottleneck))
register(
    "resnext50_32x4d",
    functools.partial(
        ResNet, depths=(3, 4, 6, 3), block=functools.partial(bottleneck, inner=2, groups=32)
    ),
)
register(
    "wide_resnet50_2",
    functools.partial(ResNet, depths=(3, 4, 6, 3), block=functools.partial(bottleneck, inner=2)),
)
