"""Sums over positions and their transposes, broadcasts, as matrix products.

Used by BatchNorm and by bias gradients.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cnnjax.nn.cpu.barrier import materialize
from cnnjax.nn.cpu.linear import add_given, linear_call, vary_alike
from cnnjax.nn.geometry import widen
from cnnjax.runtime.types import AnyArray

_PARTS = 8  # parts of the batch that are added elementwise


def sum_products(*factors: Float[AnyArray, "*positions channels"]) -> Float[Array, " channels"]:
    """Sums the elementwise product of maps over all axes but the last, in float32 or more.

    The plain form is `(a * b).sum(axes)`. XLA's CPU backend reduces rows slower than it multiplies
    them with a row of ones, so up to eight parts of the batch are added elementwise, together with
    the product, and a matrix product sums the rows. It keeps the columns of a map apart, which are
    added at the end: one long float32 sum would lose digits (and Inception v3 its parity).
    """
    product = functools.partial(functools.reduce, operator.mul)
    if factors[0].ndim == 1:
        return product(factors)
    count = _count_parts(factors[0].shape[0])
    split = [jnp.split(widen(factor), count) for factor in factors]
    products = (product(parts) for parts in zip(*split))
    added = functools.reduce(operator.add, products)
    return _sum_columns([added])[0].astype(factors[0].dtype)


def _sum_columns(maps: Sequence[AnyArray]) -> Float[Array, "maps channels"]:
    """Sums each of several maps of one shape, first over rows and then over columns."""
    shape = maps[0].shape
    column_shape = shape[1:][-2:]
    width = math.prod(column_shape)
    rows = math.prod(shape[: -len(column_shape)])
    # XLA compiles a product with one row anew wherever it stands, and calls a library for two rows:
    # ResNet-50's training step compiles faster (docs/cpu_forms.md, History). For many maps, two
    # rows take longer.
    ones = jnp.ones((2 if len(maps) <= 2 else 1, rows), maps[0].dtype)
    sums = jnp.stack([(ones @ x.reshape(rows, width))[0] for x in maps])
    return sums.reshape(len(maps), width // shape[-1], shape[-1]).sum(1)


def _count_parts(batch) -> int:
    """Counts the parts into which a batch is divided for summing.

    In `jax.export` the number of images is symbolic, and nothing is known about its divisors.
    """
    return math.gcd(batch, _PARTS) if isinstance(batch, int) else 1


def channel_sums(maps: Sequence[AnyArray]) -> Float[Array, "maps channels"]:
    """Sums each of several maps of one shape over all axes but the last.

    The plain form is a `sum_products` of each. One reduction of all maps over parts of the batch
    reads the arrays they are products of only once.
    """
    if maps[0].ndim == 1:  # one position: nothing to sum
        return jnp.stack(maps)
    batch, *image = maps[0].shape
    if _count_parts(batch) == 1 and len(image) == 3:
        # The rows of one image, or of an odd number of images, take the place of the batch.
        batch = batch * image[0]
        maps = [x.reshape(batch, *image[1:]) for x in maps]
    count = _count_parts(batch)
    if count > 1:
        maps = [x.reshape(count, batch // count, *x.shape[1:]) for x in maps]
        maps = _add_parts(maps)
    return _sum_columns(maps)


@jax.custom_jvp
def _add_parts(maps):
    """Sums each map over its first axis, all in one pass."""
    zeros = [np.zeros((), x.dtype) for x in maps]
    return lax.reduce(maps, zeros, lambda a, b: list(map(operator.add, a, b)), (0,))


@_add_parts.defjvp
def _add_parts_tangent(primals, tangents):
    # JAX's own rule fails where only some of the maps have a tangent.
    return _add_parts(*primals), [tangent.sum(0) for tangent in tangents[0]]


@jax.jit
def channel_sum(x: Float[AnyArray, "*positions channels"]) -> Float[Array, " channels"]:
    """Sums over all axes but the last; its transpose is a broadcast.

    The values are those of `sum_products`.
    """
    # The transpose holds the shape alone: a tracer would leak.
    shape = x.shape
    return linear_call(lambda _, x: sum_products(x), lambda _, sums: (spread(sums, shape),), (), x)


@functools.partial(jax.jit, static_argnums=1)
def spread(
    values: Float[AnyArray, " channels"], shape: tuple
) -> Float[Array, "*positions channels"]:
    """Broadcasts one value per channel to all positions; its transpose is `channel_sum`."""
    return linear_call(
        lambda _, values: jnp.broadcast_to(values, shape),
        lambda _, dy: (channel_sum(dy),),
        (),
        values,
    )


@jax.custom_jvp
def _squared_deviation(x, mean):
    centered = x - jnp.broadcast_to(mean, x.shape)
    return sum_products(centered, centered)


def _squared_deviation_tangent(primals, tangents):
    x, mean = primals
    dx, _ = tangents  # deviations from the mean add up to zero, and so does its derivative
    centered = x - spread(mean, x.shape)
    tangent = linear_call(
        lambda residuals, dx: 2 * sum_products(residuals[0], dx),
        lambda residuals, dy: (spread(2 * dy, residuals[0].shape) * residuals[0],),
        (centered,),
        dx,
        like=mean,
    )
    return _squared_deviation(x, mean), tangent


_squared_deviation.defjvp(_squared_deviation_tangent)


@jax.jit
def squared_deviation(
    x: Float[AnyArray, "*positions channels"], mean: Float[AnyArray, " channels"]
) -> Float[Array, " channels"]:
    """Sums the squares of `x - mean` over all axes but the last.

    The derivative in `mean` is taken to be zero, which it is over all devices together.
    """
    return _squared_deviation(*vary_alike(x, mean))


@jax.custom_jvp
def _scale_and_shift(x, mean, factor, bias):
    return x * jnp.broadcast_to(factor, x.shape) + jnp.broadcast_to(bias - mean * factor, x.shape)


def _scaled_tangents(residuals, dx, dmean, dfactor, dbias):
    x, mean, factor = residuals
    over = functools.partial(jnp.broadcast_to, shape=x.shape)
    return add_given(
        None if dx is None else over(factor) * dx,
        None if dmean is None else -over(factor * dmean),
        None if dfactor is None else (x - over(mean)) * over(dfactor),
        None if dbias is None else over(dbias),
    )


def _scaled_cotangents(residuals, dy):
    x, mean, factor = residuals
    dy = materialize(dy)
    centered = x - jnp.broadcast_to(mean, x.shape)
    sums, products = channel_sums([dy, dy * centered])
    return jnp.broadcast_to(factor, x.shape) * dy, -factor * sums, products, sums


def _scale_and_shift_tangent(primals, tangents):
    y = _scale_and_shift(*primals)
    return y, linear_call(_scaled_tangents, _scaled_cotangents, primals[:3], *tangents, like=y)


_scale_and_shift.defjvp(_scale_and_shift_tangent, symbolic_zeros=True)


@jax.jit
def scale_and_shift(
    x: Float[AnyArray, "*positions channels"],
    mean: Float[AnyArray, " channels"],
    factor: Float[AnyArray, " channels"],
    bias: Float[AnyArray, " channels"],
) -> Float[Array, "*positions channels"]:
    """Returns `(x - mean) * factor + bias`, channel by channel.

    It is computed as `x * factor + (bias - mean * factor)`, which is also the plain form. Autodiff
    sums rows in six separate passes; here both directions are a few passes of `sum_products`.
    """
    return _scale_and_shift(*vary_alike(x, mean, factor, bias))
