"""Pooling by shifted views of the map."""

import functools
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnjax.nn.cpu.conv import taps
from cnnjax.nn.cpu.linear import linear_call
from cnnjax.nn.geometry import Window
from cnnjax.nn.padding import pad_constant
from cnnjax.runtime.types import AnyArray

Widths = tuple[tuple[int, int], ...]


def sum_windows(x: AnyArray, size: tuple[int, int], stride: tuple[int, int]) -> jax.Array:
    """Sums each window as a sum of shifted views; the plain form is `lax.reduce_window`."""
    return functools.reduce(operator.add, _views(x, size, stride))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def max_windows(
    x: AnyArray, size: tuple[int, int], stride: tuple[int, int], widths: Widths
) -> jax.Array:
    """Takes the maximum of each window as a maximum of shifted views.

    `widths` is the border of each axis, (low, high), which never wins.

    The plain form is `lax.reduce_window`, whose gradient, select-and-scatter, is 3 to 80 times
    slower on the CPU. This gradient is the same bit for bit: the first maximum of a window, row
    by row, has all of it.
    """
    return functools.reduce(jnp.maximum, _views(pad_constant(x, widths, -np.inf), size, stride))


@max_windows.defjvp
def _max_windows_tangent(size, stride, widths, primals, tangents):
    (x,) = primals
    y = max_windows(x, size, stride, widths)
    window = {"size": size, "stride": stride, "widths": widths}
    select = functools.partial(_select_tangents, **window)
    scatter = functools.partial(_scatter_cotangents, **window)
    return y, linear_call(select, scatter, (x, y), *tangents, like=y)


# Compiled as wholes, since outside jit `jax_debug_infs` would find the padded map.
_compiled = functools.partial(jax.jit, static_argnames=("size", "stride", "widths"))


@_compiled
def _select_tangents(residuals, dx, *, size, stride, widths):
    x, y = residuals
    firsts = _first_maxima(pad_constant(x, widths, -np.inf), y, size, stride)
    views = zip(firsts, _views(pad_constant(dx, widths, 0), size, stride))
    return functools.reduce(operator.add, (jnp.where(first, view, 0) for first, view in views))


@_compiled
def _scatter_cotangents(residuals, dy, *, size, stride, widths):
    x, y = residuals
    x = pad_constant(x, widths, -np.inf)
    tiles = all(length % step == 0 for length, step in zip(x.shape[1:3], stride))
    if size == stride and tiles:
        dx = _scatter_into_tiles(x, y, dy, size)
    else:
        dx = _scatter(x, y, dy, size, stride)
    return (pad_constant(dx, [(-low, -high) for low, high in widths], 0),)


def _views(x, size, stride):
    window = Window(stride=stride)
    return taps(x, size, window, window.output_shape(x.shape, size))


def _first_maxima(x, y, size, stride) -> Iterator[jax.Array]:
    """Yields for each tap the windows whose first maximum it is."""
    found = jnp.zeros(y.shape, bool)
    for view in _views(x, size, stride):
        first = (view == y) & ~found
        found |= first
        yield first


def _scatter(x, y, dy, size, stride):
    """Adds the shares of overlapping windows in the windows' order, as select-and-scatter does."""
    shares = []
    places = np.ndindex(*size)
    for place, first in zip(places, _first_maxima(x, y, size, stride)):
        widths = [
            (start, length - start - (count - 1) * step - 1, step - 1)
            for start, length, count, step in zip(place, x.shape[1:3], y.shape[1:3], stride)
        ]
        shares.append((jnp.where(first, dy, 0), [(0, 0, 0), *widths, (0, 0, 0)]))
    dx = jnp.zeros(x.shape, dy.dtype)
    for share, widths in reversed(shares):  # a later tap belongs to an earlier window
        dx += lax.pad(share, jnp.zeros((), dy.dtype), widths)
    return dx


def _scatter_into_tiles(x, y, dy, size):
    """Scatters where windows tile the map: each position asks whether it is the first maximum.

    One pass over the map, 1.0 to 1.6 times faster than view by view.
    """
    count = size[0] * size[1]
    first = jnp.full(y.shape, count - 1, jnp.int32)
    for tap, view in reversed(list(enumerate(_views(x, size, size)))):
        first = jnp.where(view == y, tap, first)
    own_tap = np.arange(count, dtype=np.int32).reshape(1, 1, size[0], 1, size[1], 1)
    widen = lambda a: a[:, :, None, :, None, :]
    return jnp.where(widen(first) == own_tap, widen(dy), 0).reshape(x.shape)
