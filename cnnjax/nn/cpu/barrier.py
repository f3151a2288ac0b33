"""Barriers that keep XLA from recomputing a value or merging two operations."""

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from cnnjax.nn.cpu.linear import linear_call
from cnnjax.runtime.types import AnyArray


@jax.jit
def materialize(x: AnyArray) -> AnyArray:
    """Returns `x`, computed once instead of again in every operation that reads it.

    The plain form is `x` itself. XLA's CPU backend fuses cheap operations into each of their
    readers: it computed BatchNorm's gradient nine times for the kernel of a depthwise convolution.
    `lax.optimization_barrier` does not help, as it is removed before operations are fused. A call
    that XLA may not inline stops the fusion and copies nothing. Barriers stand around output
    gradients of convolutions and BatchNorm and around inputs of convolutions.
    """
    return linear_call(_call, lambda residuals, dy: (dy,), (), x, like=x)


@jax.jit
def materialize_gradient(x: AnyArray) -> AnyArray:
    """Returns `x`, whose cotangent is computed only once.

    Use it for a map with several readers, whose cotangents are added. In a DenseNet block, XLA
    fused the sums of all layers into one operation and recomputed each layer's BatchNorm gradient
    in every sum.
    """
    transpose = lambda residuals, dy: (materialize(dy),)
    return linear_call(lambda residuals, x: x, transpose, (), x, like=x)


def _call(residuals: tuple, x: AnyArray) -> AnyArray:
    # An attribute that XLA's inliner reads (github.com/openxla/xla/pull/23947).
    with set_xla_metadata(inlineable="false"):
        return _identity(x)


@jax.jit
def _identity(x):
    return x
