"""Sums over all positions, channel by channel, for BatchNorm and biases."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.nn.cpu import sums
from cnnjax.nn.geometry import widen
from cnnjax.nn.lowering import uses_cpu_forms
from cnnjax.runtime.types import AnyArray


def channel_sum(x: Float[AnyArray, "*positions channels"]) -> Float[Array, " channels"]:
    """Sums over all axes but the last."""
    if uses_cpu_forms():
        return sums.channel_sum(x)
    return x.sum(tuple(range(x.ndim - 1)))


def squared_deviation(
    x: Float[AnyArray, "*positions channels"], mean: Float[AnyArray, " channels"]
) -> Float[Array, " channels"]:
    """Sums the squares of `x - mean` over all axes but the last.

    `mean` must be the mean of `x`.
    """
    if uses_cpu_forms():
        return sums.squared_deviation(x, mean)
    return channel_sum(jnp.square(x - jnp.broadcast_to(mean, x.shape)))


def scale_and_shift(
    x: Float[AnyArray, "*positions channels"],
    mean: Float[AnyArray, " channels"],
    factor: Float[AnyArray, " channels"],
    bias: Float[AnyArray, " channels"],
) -> Float[Array, "*positions channels"]:
    """Returns `(x - mean) * factor + bias`, channel by channel.

    It is computed as `x * factor + (bias - mean * factor)`.
    """
    if uses_cpu_forms():
        return sums.scale_and_shift(x, mean, factor, bias)
    shift = bias - mean * factor
    return jnp.broadcast_to(factor, x.shape) * x + jnp.broadcast_to(shift, x.shape)


def add_bias(
    x: Float[AnyArray, "*positions channels"], bias: Float[AnyArray, " channels"]
) -> Float[Array, "*positions channels"]:
    """Adds `bias` to each position of `x`."""
    if uses_cpu_forms():
        return sums.spread(bias, x.shape) + x
    # The gradient is a sum over all positions, of the type that the bias is broadcast in.
    return jnp.broadcast_to(widen(bias), x.shape).astype(bias.dtype) + x
