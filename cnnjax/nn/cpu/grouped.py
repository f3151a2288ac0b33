"""Grouped and depthwise convolution without the naive loop nest of XLA's CPU backend."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.nn.cpu.barrier import materialize
from cnnjax.nn.cpu.conv import convolve, spread_cotangent, taps
from cnnjax.nn.cpu.linear import add_given, linear_call, vary_alike
from cnnjax.nn.cpu.sums import channel_sum
from cnnjax.nn.geometry import Window
from cnnjax.runtime.types import AnyArray

_TOGETHER = 32  # channels of an ungrouped convolution that stands for several groups


def convolve_grouped(x: AnyArray, kernel: AnyArray, window: Window, groups: int) -> jax.Array:
    """Convolves `x`, NHWC, with `kernel`, HWIO, in the form that suits the number of groups."""
    if groups == 1:
        return convolve(x, kernel, window)
    if groups == x.shape[3]:
        return convolve_depthwise(x, kernel, window)
    return convolve_block_diagonal(x, kernel, window, groups)


def convolve_block_diagonal(
    x: AnyArray, kernel: AnyArray, window: Window, groups: int
) -> jax.Array:
    """Convolves by block-diagonal grouping: ungrouped convolutions of some 32 channels.

    The plain form is one convolution with `feature_group_count`, a naive loop nest (585 ms where
    7 ms suffice, 32 groups). Here the kernels hold several groups on their diagonal. Matrix
    products of fewer channels waste more than the zeros do, and so does compiling a convolution
    for each group.
    """
    depth = kernel.shape[2]
    width = kernel.shape[3] // groups
    together = max(
        count
        for count in range(1, groups + 1)
        if groups % count == 0 and (count == 1 or count * max(depth, width) <= _TOGETHER)
    )
    blocks = groups // together
    diagonal = np.kron(np.eye(together), np.ones((depth, width))) > 0
    outputs = []
    for inputs, weights in zip(jnp.split(x, blocks, axis=3), jnp.split(kernel, blocks, axis=3)):
        tiled = jnp.tile(weights, (1, 1, together, 1))
        block_diagonal = jnp.where(diagonal[None, None], tiled, 0)
        outputs.append(convolve(inputs, block_diagonal, window))
    return jnp.concatenate(outputs, axis=3)


def convolve_depthwise(x: AnyArray, kernel: AnyArray, window: Window) -> jax.Array:
    """Convolves each channel with its own kernel by shift-and-add.

    The plain form is one convolution with a group for each channel, a naive loop nest (26 to 57
    ms where 1.5 ms suffice, 3x3). Here shifted, scaled copies of the image are added.
    """
    repeated = jnp.repeat(x, kernel.shape[3] // x.shape[3], axis=3)
    return _depthwise(*vary_alike(repeated, kernel), window)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _depthwise(x, kernel, window):
    return _shift_and_add(x, kernel, window)


@functools.partial(_depthwise.defjvp, symbolic_zeros=True)
def _depthwise_tangent(window, primals, tangents):
    def tangent(residuals, dx, dkernel):
        x, kernel = residuals
        return add_given(
            None if dx is None else _shift_and_add(dx, kernel, window),
            None if dkernel is None else _shift_and_add(x, dkernel, window),
        )

    def cotangents(residuals, dy):
        x, kernel = residuals
        dy = materialize(dy)
        spread = spread_cotangent(x.shape, kernel.shape, window, dy)
        dx = _shift_and_add(spread, kernel[::-1, ::-1], Window(dilation=window.dilation))
        views = taps(x, kernel.shape[:2], window, dy.shape[1:3])
        dkernel = jnp.stack([channel_sum(view, dy) for view in views])
        return dx, dkernel.reshape(kernel.shape)

    return _depthwise(*primals, window), linear_call(tangent, cotangents, primals, *tangents)


def _shift_and_add(x, kernel, window):
    size = window.output_shape(x.shape, kernel.shape[:2])
    views = taps(x, kernel.shape[:2], window, size)
    scales = kernel.reshape(kernel.shape[0] * kernel.shape[1], kernel.shape[3])
    scaled = (view * jnp.broadcast_to(scale, view.shape) for view, scale in zip(views, scales))
    return functools.reduce(operator.add, scaled)
