"""Pooling by shifted views of the map."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.nn.cpu.conv import tap_views
from cnnjax.nn.cpu.linear import linear_call
from cnnjax.nn.geometry import Window
from cnnjax.nn.padding import pad_constant
from cnnjax.runtime.types import AnyArray

Widths = tuple[tuple[int, int], ...]


def sum_windows(x: AnyArray, size: tuple[int, int], stride: tuple[int, int]) -> AnyArray:
    """Sums each window as a sum of shifted views.

    The plain form is `lax.reduce_window`.
    """
    return functools.reduce(operator.add, tap_views(x, size, Window(stride)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def max_windows(
    x: AnyArray, size: tuple[int, int], stride: tuple[int, int], widths: Widths
) -> AnyArray:
    """Takes the maximum of each window as a maximum of shifted views.

    `widths` is the border of each axis, (low, high); it never wins.

    The plain form is `lax.reduce_window`, whose gradient, select-and-scatter, is slow on the CPU.
    This gradient is the same bit for bit: a window's whole gradient goes to its first maximum, row
    by row.
    """
    padded = pad_constant(x, widths, -np.inf)
    return functools.reduce(jnp.maximum, tap_views(padded, size, Window(stride)))


@max_windows.defjvp
def _max_windows_tangent(size, stride, widths, primals, tangents):
    (x,) = primals
    y = max_windows(x, size, stride, widths)
    window = {"size": size, "stride": stride, "widths": widths}
    select = functools.partial(_select_tangents, **window)
    scatter = functools.partial(_scatter_cotangents, **window)
    return y, linear_call(select, scatter, (x,), *tangents, like=y)


# Compiled as wholes, since outside jit `jax_debug_infs` would find the padded map.
_compiled = functools.partial(jax.jit, static_argnames=("size", "stride", "widths"))


@_compiled
def _select_tangents(residuals, dx, *, size, stride, widths):
    (x,) = residuals
    first = _first_maxima(pad_constant(x, widths, -np.inf), size, stride)
    views = tap_views(pad_constant(dx, widths, 0), size, Window(stride))
    shares = (jnp.where(first == tap, view, 0) for tap, view in enumerate(views))
    return functools.reduce(operator.add, shares)


@_compiled
def _scatter_cotangents(residuals, dy, *, size, stride, widths):
    (x,) = residuals
    x = pad_constant(x, widths, -np.inf)
    first = _first_maxima(x, size, stride)
    dx = _scatter(first, dy, x.shape, size, stride)
    return (pad_constant(dx, [(-low, -high) for low, high in widths], 0),)


def _first_maxima(x, size, stride):
    """Returns the tap of each window's first maximum, row by row, int32.

    Comparing with the maximum itself would save a pass, but XLA may compute `x` twice and round it
    differently, and then no tap would be equal.
    """
    largest, *views = tap_views(x, size, Window(stride))
    first = jnp.zeros(largest.shape, jnp.int32)
    for tap, view in enumerate(views, 1):
        # Like select-and-scatter, moves on from a NaN.
        is_larger = ~(largest >= view)
        first = jnp.where(is_larger, tap, first)
        largest = jnp.where(is_larger, view, largest)
    return first


def _scatter(first, dy, shape, size, stride):
    """Sends each window's cotangent to its first maximum.

    The plain form is a padded copy of the cotangents for each tap of a window, and their sum. Here
    each position asks the windows that cover it, in one pass over the map. The map is divided into
    blocks of the stride's size, so that one window begins in each block, and those that cover a
    block begin in it or in one of the blocks before it.

    Args:
      first: the taps that `_first_maxima` returns.
      dy: the cotangents [batch, windows down, windows across, channels].
      shape: the map's shape.
      size: a window's (height, width).
      stride: a (height, width) pair.
    """
    blocks = [-(-length // step) for length, step in zip(shape[1:3], stride)]
    reach = [-(-window // step) for window, step in zip(size, stride)]
    widths = [(r - 1, b - count) for r, b, count in zip(reach, blocks, dy.shape[1:3])]
    widths = [(0, 0), *widths, (0, 0)]
    first = pad_constant(first, widths, -1)
    dy = pad_constant(dy, widths, 0)

    def windows_before(values, down, across):
        """Returns the values of the windows that begin so many blocks earlier.

        There is one window for each block.
        """
        top = reach[0] - 1 - down
        left = reach[1] - 1 - across
        cut = values[:, top : top + blocks[0], left : left + blocks[1]]
        return cut[:, :, None, :, None, :]

    dx = jnp.zeros((), dy.dtype)
    # In the order in which select-and-scatter adds windows.
    for down in reversed(range(reach[0])):
        for across in reversed(range(reach[1])):
            own_tap = _taps_of_block(size, stride, down, across)
            is_first = windows_before(first, down, across) == own_tap
            dx += jnp.where(is_first, windows_before(dy, down, across), 0)
    batch, height, width, channels = shape
    dx = dx.reshape(batch, blocks[0] * stride[0], blocks[1] * stride[1], channels)
    return dx[:, :height, :width]


def _taps_of_block(size, stride, down, across):
    """Numbers a block's positions as taps of the window some blocks earlier.

    Returns int32 [1, 1, stride, 1, stride, 1]; -2 where the window does not reach.
    """
    rows = stride[0] * down + np.arange(stride[0])[:, None]
    columns = stride[1] * across + np.arange(stride[1])
    is_inside = (rows < size[0]) & (columns < size[1])
    tap = np.where(is_inside, rows * size[1] + columns, -2).astype(np.int32)
    return tap.reshape(1, 1, stride[0], 1, stride[1], 1)
