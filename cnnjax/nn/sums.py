"""Sums over all positions, channel by channel, fast on the CPU: of them are BatchNorm and the gradients of biases made."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.runtime.types import AnyArray


def channel_sum(*factors: Float[AnyArray, "*positions channels"]) -> Float[Array, " channels"]:
    """Multiplies maps elementwise and sums over all axes but the last.

    XLA's CPU backend reduces rows two to nine times slower than it multiplies them with a row of ones, so there up to eight
    parts of the batch are added elementwise, together with the product, and a matrix product does the rest. It sums a map's
    columns apart and those at last: one long float32 sum would lose two more digits (and Inception v3 its parity).
    """
    product = functools.partial(functools.reduce, operator.mul)
    if jax.default_backend() != "cpu":
        return product(factors).sum(tuple(range(factors[0].ndim - 1)))
    parts = zip(*(jnp.split(factor, math.gcd(factor.shape[0], 8)) for factor in factors))
    total = functools.reduce(operator.add, map(product, parts))
    rows = total.reshape(-1, math.prod(total.shape[1:][-2:]))
    return (jnp.ones((1, rows.shape[0]), rows.dtype) @ rows).reshape(-1, total.shape[-1]).sum(0)


@jax.custom_vjp
def add_bias(
    x: Float[Array, "*positions channels"], bias: Float[Array, " channels"]
) -> Float[Array, "*positions channels"]:
    """Adds `bias` to each position of `x`; the gradient of the bias is a `channel_sum`."""
    return x + bias


add_bias.defvjp(lambda x, bias: (x + bias, None), lambda _, dy: (dy, channel_sum(dy)))
