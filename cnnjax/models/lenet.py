"""LeNet-5 as published, and the NUS lecture's LeNet for MNIST.

Source of the former: LeCun, Bottou, Bengio and Haffner 1998.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from cnnjax.models.base import Network, register
from cnnjax.nn import Conv, Dense, add_bias, avg_pool, conv, flatten, max_pool, relu
from cnnjax.runtime.types import AnyArray

# Table I: which of S2's six maps (rows) each of C3's sixteen maps (columns) reads.
_TABLE = """
    X...XXX..XXXX.XX
    XX...XXX..XXXX.X
    XXX...XXX..X.XXX
    .XXX..XXXX..X.XX
    ..XXX..XXXX.XX.X
    ...XXX..XXXX.XXX
"""
CONNECTIONS = np.array([list(row) for row in _TABLE.split()]) == "X"

# The output units' target codes: digits drawn on 7x12 bitmaps, as section II.B describes them (its
# own drawings are printed only in part, in figure 3; these are new).
_DIGITS = """
    ..###.. ...#... .#####. .#####. .....#. ####### ..####. ####### .#####. .#####.
    .#...#. ..##... #.....# #.....# ....##. #...... .#..... ......# #.....# #.....#
    #.....# .#.#... ......# ......# ...#.#. #...... #...... ......# #.....# #.....#
    #.....# ...#... ......# ......# ..#..#. #...... #...... .....#. #.....# #.....#
    #.....# ...#... .....#. ......# .#...#. #...... #...... .....#. #.....# #.....#
    #.....# ...#... ....#.. ..####. #....#. ######. ######. ....#.. .#####. .######
    #.....# ...#... ...#... ......# #....#. ......# #.....# ....#.. #.....# ......#
    #.....# ...#... ..#.... ......# ####### ......# #.....# ...#... #.....# ......#
    #.....# ...#... .#..... ......# .....#. ......# #.....# ...#... #.....# ......#
    #.....# ...#... #...... ......# .....#. ......# #.....# ..#.... #.....# ......#
    .#...#. ...#... #...... #.....# .....#. #.....# #.....# ..#.... #.....# .....#.
    ..###.. .#####. ####### .#####. .....#. .#####. .#####. ..#.... .#####. .####..
"""


def _draw_codes() -> Float32[np.ndarray, "digits pixels"]:
    """Returns the digits' codes: 1 where a pixel is drawn, -1 elsewhere."""
    # Twelve rows of ten digits each.
    lines = _DIGITS.split()
    codes = []
    for digit in range(10):
        bitmap = "".join(lines[digit::10])
        codes.append([1.0 if pixel == "#" else -1.0 for pixel in bitmap])
    return np.array(codes, np.float32)


CODES = _draw_codes()


def squash(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the scaled hyperbolic tangent of appendix A, which maps +-1 to +-1."""
    return 1.7159 * jnp.tanh(x * (2 / 3))


def uniform_initializer(fan_in):
    """Returns the initializer of appendix A, uniform in +-2.4 / fan-in.

    `fan_in` may be an array, with one value per output unit.
    """
    bound = jnp.asarray(2.4 / np.asarray(fan_in), jnp.float32)

    def initialize(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialize


class Subsample(nn.Module):
    """The sum of each 2x2 square, with a trainable coefficient and bias."""

    fill: str
    sampling: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", uniform_initializer(4), (x.shape[-1],)).astype(self.dtype)
        bias = self.param("bias", uniform_initializer(4), (x.shape[-1],)).astype(self.dtype)
        # Four times the average is the sum.
        sums = 4 * avg_pool(x, 2, fill=self.fill, sampling=self.sampling)
        # Broadcast explicitly, because JAX can be set to refuse operands of different ranks
        # (`jax_numpy_rank_promotion`).
        scale = jnp.broadcast_to(scale, sums.shape)
        return add_bias(sums * scale, bias)


class TableConv(nn.Module):
    """A 5x5 convolution along the table's connections only.

    The parameter `kernel` [5, 5, connections] has one plane for each connection.
    """

    fill: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        sources, targets = np.nonzero(CONNECTIONS)
        fan_in = 25 * CONNECTIONS.sum(0)
        initializer = uniform_initializer(fan_in[targets])
        connected = self.param("kernel", initializer, (5, 5, len(sources)))
        bias = self.param("bias", uniform_initializer(fan_in), (CONNECTIONS.shape[1],))
        # A 5x5 kernel with zeros where the table has no connection.
        full_kernel = jnp.zeros((5, 5, *CONNECTIONS.shape), connected.dtype)
        full_kernel = full_kernel.at[:, :, sources, targets].set(connected)
        y = conv(x, full_kernel.astype(self.dtype), fill=self.fill)
        return add_bias(y, bias.astype(self.dtype))


class LeNet5(Network):
    """LeNet-5 of 1998, figure 2: 60,000 trainable parameters.

    The stages are `c1`, `c3` and `c5`, before each subsampling. Convolutions are not padded, as
    published, so `padding` affects only the filters of `sampling`. Exception: 'full' pads each
    convolution by 4.

    Attributes:
      output: "rbf", the published units, whose logit is minus the squared distance of F6 to the
        fixed code of the class; or "linear".
    """

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (32, 32, 1)
    output: str = "rbf"

    def __post_init__(self):
        super().__post_init__()
        if self.output not in ("rbf", "linear"):
            raise ValueError(f"output={self.output!r} is not one of rbf, linear")
        if self.output == "rbf" and self.num_classes > len(CODES):
            raise ValueError(
                f"num_classes={self.num_classes} is more than the {len(CODES)} digits that have "
                "a code; use output='linear'"
            )

    @nn.nowrap
    def walk(self, x, train):
        subsample = functools.partial(
            Subsample, fill=self.padding, sampling=self.sampling, dtype=self.dtype
        )
        x = Conv(
            6,
            5,
            kernel_init=uniform_initializer(25),
            bias_init=uniform_initializer(25),
            dtype=self.dtype,
            fill=self.padding,
            name="c1",
        )(x)
        x = squash(x)
        x = yield "c1", x
        x = subsample(name="s2")(x)
        x = squash(x)
        x = TableConv(self.padding, self.dtype, name="c3")(x)
        x = squash(x)
        x = yield "c3", x
        x = subsample(name="s4")(x)
        x = squash(x)
        x = Conv(
            120,
            5,
            kernel_init=uniform_initializer(400),
            bias_init=uniform_initializer(400),
            dtype=self.dtype,
            fill=self.padding,
            name="c5",
        )(x)
        x = squash(x)
        x = yield "c5", x
        x = flatten(x)
        x = Dense(
            84,
            kernel_init=uniform_initializer(x.shape[1]),
            bias_init=uniform_initializer(x.shape[1]),
            dtype=self.dtype,
            name="f6",
        )(x)
        x = squash(x)
        if self.output == "linear":
            head = Dense(
                self.num_classes,
                kernel_init=uniform_initializer(84),
                bias_init=uniform_initializer(84),
                dtype=self.dtype,
                name="output",
            )
            yield "logits", head(x)
        else:
            codes = jnp.asarray(CODES[: self.num_classes], x.dtype)
            yield "logits", -jnp.square(x[:, None] - codes[None]).sum(-1)


class LeNet(Network):
    """The LeNet for MNIST of NUS CS5242, lecture 8: 50-100-100.

    It has 500 + 45,100 + 490,100 + 1,010 parameters. The stages are `conv1` and `conv2`, before
    each pool. The slide prints no ReLU between the linear layers; we apply one, as the lecture's
    VGG does.
    """

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (28, 28, 1)

    @nn.nowrap
    def walk(self, x, train):
        for number, features in enumerate((50, 100), 1):
            x = Conv(
                features,
                3,
                padding=1,
                fill=self.padding,
                dtype=self.dtype,
                name=f"conv{number}",
            )(x)
            x = relu(x)
            x = yield f"conv{number}", x
            x = max_pool(x, 2, fill=self.padding, sampling=self.sampling)
        x = flatten(x)
        x = Dense(100, dtype=self.dtype, name="linear1")(x)
        x = relu(x)
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name="linear2")(x)


register("lenet", LeNet)
register("lenet5", LeNet5)
