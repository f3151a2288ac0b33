"""Networks that the lectures and their tutorials define themselves.

Initialization is PyTorch's unless stated.
"""

import functools
import string

import flax.linen as nn

from cnnjax.models.base import Network, register
from cnnjax.nn import Conv, Dense, flatten, max_pool, relu

_KERAS = {"kernel_init": nn.initializers.glorot_uniform(), "bias_init": nn.initializers.zeros}


class TutorialNet(Network):
    """`Net` of PyTorch's "Training a classifier" tutorial (WPI CS 539).

    Its layers are 6-16-120-84-10. The stages are `conv1` and `conv2`, before each pool.
    """

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (32, 32, 3)

    @nn.nowrap
    def walk(self, x, train):
        for number, features in enumerate((6, 16), 1):
            x = Conv(features, 5, fill=self.padding, dtype=self.dtype, name=f"conv{number}")(x)
            x = relu(x)
            x = yield f"conv{number}", x
            x = max_pool(x, 2, fill=self.padding, sampling=self.sampling)
        x = flatten(x)
        for number, features in enumerate((120, 84), 1):
            x = Dense(features, dtype=self.dtype, name=f"fc{number}")(x)
            x = relu(x)
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name="fc3")(x)


class KerasConvNet(Network):
    """The cats-and-dogs network of Chollet, "Deep Learning with Python" (WPI CS 539).

    Initialization is Keras's. The stages are `conv1` ... `conv4`, before each pool. The only logit
    is that of the second class, for a sigmoid.
    """

    num_classes: int = 1
    input_shape: tuple[int, int, int] = (150, 150, 3)

    @nn.nowrap
    def walk(self, x, train):
        shared = {**_KERAS, "dtype": self.dtype}
        for number, features in enumerate((32, 64, 128, 128), 1):
            x = Conv(features, 3, fill=self.padding, name=f"conv{number}", **shared)(x)
            x = relu(x)
            x = yield f"conv{number}", x
            x = max_pool(x, 2, fill=self.padding, sampling=self.sampling)
        x = flatten(x)
        x = Dense(512, name="fc1", **shared)(x)
        x = relu(x)
        yield "logits", Dense(self.num_classes, name="fc2", **shared)(x)


class ConvNet(Network):
    """The VGG for CIFAR-10 of NUS CS5242, lecture 8; `_512x2` has two convolutions in block 4.

    The stages `block1` to `block4`, before each pool, have strides 1, 2, 4 and 8.

    Four pools leave 2 x 2 x 512 = 2048 values, so that linear layers of 4096, 4096 and 10 have the
    printed 25.2 M parameters. The lecture names no initialization; this one is Glorot's, Keras's
    default, with which its rate of 0.25 learns from the first steps (PyTorch's is still at chance
    after an epoch, He's ends in NaN within ten steps).
    """

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (32, 32, 3)
    blocks: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256, 256), (512,))

    @nn.nowrap
    def walk(self, x, train):
        shared = {**_KERAS, "dtype": self.dtype}
        for number, block in enumerate(self.blocks, 1):
            for index, features in enumerate(block):
                letter = string.ascii_lowercase[index]
                x = Conv(
                    features,
                    3,
                    padding=1,
                    fill=self.padding,
                    name=f"conv{number}{letter}",
                    **shared,
                )(x)
                x = relu(x)
            x = yield f"block{number}", x
            x = max_pool(x, 2, fill=self.padding, sampling=self.sampling)
        x = flatten(x)
        for number in (1, 2):
            x = Dense(4096, name=f"linear{number}", **shared)(x)
            x = relu(x)
        yield "logits", Dense(self.num_classes, name="linear3", **shared)(x)


register("tutorial_net", TutorialNet)
register("keras_convnet", KerasConvNet)
# The lecture draws one convolution in the fourth block and calls the network ten layers deep (27.5
# M parameters), but prints two convolutions and 30 M in total (29.9 M): each is a network here.
register("convnet", ConvNet)
register(
    "convnet_512x2",
    functools.partial(ConvNet, blocks=((64, 64), (128, 128), (256, 256), (512, 512))),
)
