"""Small networks that studies train in seconds; they are not in the registry."""

import flax.linen as nn
import jax

from cnnjax.models.base import Network
from cnnjax.models.resnet import Block, basic
from cnnjax.nn import (
    BatchNorm,
    Conv,
    Dense,
    conv_stride,
    global_avg_pool,
    he_normal_fan_out,
    relu,
    sample,
)


class SmallConvNet(Network):
    """3x3 convolutions and a linear layer on their global average.

    `layers` has the features and stride of each; the stages are `conv1`, `conv2`, ...
    """

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (24, 24, 3)
    layers: tuple[tuple[int, int], ...] = ((16, 1), (32, 2), (32, 2), (64, 1))

    @nn.nowrap
    def walk(self, x, train):
        for number, (features, stride) in enumerate(self.layers, 1):
            name = f"conv{number}"
            conv = Conv(
                features,
                3,
                conv_stride(stride, self.sampling),
                padding=1,
                fill=self.padding,
                kernel_init=he_normal_fan_out,
                dtype=self.dtype,
                name=name,
            )
            x = conv(x)
            x = relu(x)
            x = sample(x, stride, sampling=self.sampling, fill=self.padding)
            x = yield name, x
        x = global_avg_pool(x)
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name="fc")(x)


class SmallResNet(Network):
    """A ResNet of four basic blocks, without a max-pool.

    A 7x7 convolution of stride 2 comes first; the stages are `layer1` to `layer4`. The head is
    GAPNet's, whose logits are the global average of a 3x3 convolution. With `permute` it is
    PermuteNet's, which draws a permutation of the averaged channels from the random stream
    "dropout".

    Source: Islam et al., ICCV 2021, arXiv 2108.07884.
    """

    widths: tuple[int, ...] = (8, 16, 32, 64)
    permute: bool = False

    @nn.nowrap
    def walk(self, x, train):
        stem = Conv(
            self.widths[0],
            7,
            conv_stride(2, self.sampling),
            padding=3,
            fill=self.padding,
            use_bias=False,
            kernel_init=he_normal_fan_out,
            dtype=self.dtype,
            name="conv1",
        )
        norm = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="bn1")
        x = stem(x)
        x = norm(x, train)
        x = relu(x)
        x = sample(x, 2, sampling=self.sampling, fill=self.padding)
        for number, width in enumerate(self.widths, 1):
            stride = 1 if number == 1 else 2
            name = f"layer{number}"
            block = Block(
                basic(width, stride),
                fill=self.padding,
                sampling=self.sampling,
                dtype=self.dtype,
                axis_name=self.axis_name,
                name=name,
            )
            x = block(x, train)
            x = yield name, x
        if self.permute:
            key = self.make_rng("dropout")
            x = global_avg_pool(x)
            x = jax.random.permutation(key, x, axis=1)
            yield "logits", Dense(self.num_classes, dtype=self.dtype, name="head")(x)
        else:
            head = Conv(
                self.num_classes, 3, padding=1, fill=self.padding, dtype=self.dtype, name="head"
            )
            x = head(x)
            yield "logits", global_avg_pool(x)
