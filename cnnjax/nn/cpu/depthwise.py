"""Depthwise convolution by shift-and-add."""

import functools
import itertools
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnjax.nn.cpu.conv import (
    LARGE,
    gradient_by_planes,
    is_below,
    spread_cotangent,
    tap_views,
    with_gradients,
)
from cnnjax.nn.cpu.linear import vary_alike
from cnnjax.nn.cpu.sums import channel_sums
from cnnjax.nn.geometry import Window, widen
from cnnjax.runtime.types import AnyArray

# Taps whose sums are taken in one pass; more do not fit into the registers.
_TAPS_PER_PASS = 9
# Taps that are unrolled. A kernel of more is summed in a loop over its rows: XLA fuses only so many
# views into one pass, and its compilation time grows with their number.
_MOST_UNROLLED = 128

Range = tuple[int, int]  # positions along an axis, (first, end)
Piece = tuple[Range, Range]  # rows and columns of the output


def convolve_depthwise(x: AnyArray, kernel: AnyArray, window: Window) -> jax.Array:
    """Convolves each channel with its own kernel by shift-and-add.

    The plain form is one convolution with a group for each channel, a naive loop nest
    (docs/performance.md compares the two: the rows of mobilenet_v2, in brackets). Here shifted,
    scaled copies of the image are added, for large kernels in a loop over the kernel's rows.
    """
    repeated = jnp.repeat(x, kernel.shape[3] // x.shape[3], axis=3)
    return _depthwise(*vary_alike(repeated, kernel), window)


def _shift_and_add(x, kernel, window, size=None):
    """Adds shifted, scaled copies of the image, piece by piece of the output.

    `size` is the output's (height, width), given if the padding differs between the two sides.
    """
    kernel_size = kernel.shape[:2]
    size = size or window.output_shape(x.shape, kernel_size)
    rows = []
    for pieces in _pieces(x, kernel_size, window, size):
        padded = [_read(x, kernel_size, window, piece) for piece in pieces]
        rows.append(_join([_add_taps(inputs, kernel, window) for inputs in padded], axis=2))
    return _join(rows, axis=1)


def _join(arrays, axis):
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def _add_taps(padded, kernel, window):
    kernel = widen(kernel)

    def add_row(row, total):
        inputs = widen(_rows_under(padded, kernel.shape[:2], window, row))
        kernel_row = lax.dynamic_slice_in_dim(kernel, row, 1, 0)
        return total + _add_unrolled(inputs, kernel_row, window)

    if not _is_long(kernel.shape[:2]):
        return _add_unrolled(widen(padded), kernel, window).astype(padded.dtype)
    return lax.fori_loop(1, kernel.shape[0], add_row, add_row(0, 0)).astype(padded.dtype)


def _add_unrolled(padded, kernel, window):
    scales = kernel.reshape(kernel.shape[0] * kernel.shape[1], kernel.shape[3])
    views = _views(padded, kernel.shape[:2], window)
    scaled = (view * jnp.broadcast_to(scale, view.shape) for view, scale in zip(views, scales))
    return functools.reduce(operator.add, scaled)


def _is_long(kernel_size) -> bool:
    """Tells whether the program of a kernel is a loop over its rows."""
    return kernel_size[0] > 1 and kernel_size[0] * kernel_size[1] > _MOST_UNROLLED


def _rows_under(padded, kernel_size, window, row) -> jax.Array:
    """Returns the rows of the padded image that one row of the kernel meets."""
    height = padded.shape[1] - window.dilation[0] * (kernel_size[0] - 1)
    return lax.dynamic_slice_in_dim(padded, window.dilation[0] * row, height, axis=1)


def _views(padded, kernel_size, window) -> Iterator[AnyArray]:
    return tap_views(padded, kernel_size, Window(stride=window.stride, dilation=window.dilation))


def _input_gradient(x_shape, kernel, window, dy):
    flipped = kernel[::-1, ::-1]
    if window.stride == (1, 1):
        reach = (window.dilation[axis] * (kernel.shape[axis] - 1) for axis in (0, 1))
        low = tuple(map(operator.sub, reach, window.padding))
        return _shift_and_add(
            dy, flipped, Window(padding=low, dilation=window.dilation), x_shape[1:3]
        )
    if window.dilation == (1, 1):
        return gradient_by_planes(x_shape, kernel, window, dy, _correlate)
    spread = spread_cotangent(x_shape, kernel.shape, window, dy)
    return _shift_and_add(spread, flipped, Window(dilation=window.dilation))


def _correlate(dy, kernel, widths):
    low = tuple(width[0] for width in widths)
    size = tuple(dy.shape[axis + 1] + sum(widths[axis]) - kernel.shape[axis] + 1 for axis in (0, 1))
    return _shift_and_add(dy, kernel[::-1, ::-1], Window(padding=low), size)


def _kernel_gradient(x, kernel_shape, window, dy):
    """Sums products of the image and the output's gradient, several taps in one pass.

    One pass per tap would read both maps from memory every time.
    """
    kernel_size = kernel_shape[:2]
    piece_gradients = []
    for piece in itertools.chain(*_pieces(x, kernel_size, window, dy.shape[1:3])):
        (top, bottom), (left, right) = piece
        padded = widen(_read(x, kernel_size, window, piece))
        dy_piece = widen(dy[:, top:bottom, left:right])
        piece_gradients.append(_sum_products(padded, kernel_size, window, dy_piece))
    gradient = functools.reduce(operator.add, piece_gradients).reshape(kernel_shape)
    return gradient.astype(dy.dtype)


def _sum_products(padded, kernel_size, window, dy):
    def row_sums(row):
        inputs = _rows_under(padded, kernel_size, window, row)
        return _sum_products_unrolled(inputs, (1, kernel_size[1]), window, dy)

    if _is_long(kernel_size):
        return lax.map(row_sums, jnp.arange(kernel_size[0]))
    return _sum_products_unrolled(padded, kernel_size, window, dy)


def _sum_products_unrolled(padded, kernel_size, window, dy):
    products = [view * dy for view in _views(padded, kernel_size, window)]
    starts = range(0, len(products), _TAPS_PER_PASS)
    return jnp.concatenate(
        [channel_sums(products[start : start + _TAPS_PER_PASS]) for start in starts]
    )


_depthwise = with_gradients(_shift_and_add, _input_gradient, _kernel_gradient)


# ------------------------------------------------------------------ pieces of the output


def _pieces(x, kernel_size, window, size) -> list[list[Piece]]:
    """Cuts a large output into its middle, which reads no padding, and four strips.

    Returns rows of pieces. Without them, the whole image would be copied to be padded. That takes
    longer than the convolution, above all if the copy exceeds the 32 MB that the memory allocator
    keeps.
    """
    height, width = size
    rows, columns = (_middle(x.shape, kernel_size, window, size, axis) for axis in (0, 1))
    has_middle = rows[0] < rows[1] and columns[0] < columns[1]
    if is_below(x.size, LARGE) or not has_middle:
        return [[((0, height), (0, width))]]
    grid = [
        [((0, rows[0]), (0, width))],
        [(rows, (0, columns[0])), (rows, columns), (rows, (columns[1], width))],
        [((rows[1], height), (0, width))],
    ]
    occupied = [[piece for piece in row if not _is_empty(piece)] for row in grid]
    return [row for row in occupied if row]


def _middle(x_shape, kernel_size, window, size, axis) -> Range:
    """Returns the outputs along an axis whose windows lie inside the image."""
    stride = window.stride[axis]
    padding = window.padding[axis]
    reach = window.dilation[axis] * (kernel_size[axis] - 1)
    first = max(-(-padding // stride), 0)
    end = (x_shape[axis + 1] + padding - reach - 1) // stride + 1
    return first, min(end, size[axis])


def _is_empty(piece) -> bool:
    return any(first >= end for first, end in piece)


def _read(x, kernel_size, window, piece) -> jax.Array:
    """Returns the part of the image that a piece of the output reads, padded."""
    inside = []
    widths = []
    for axis, (first, end) in enumerate(piece):
        size = x.shape[axis + 1]
        start = first * window.stride[axis] - window.padding[axis]
        stop = (end - 1) * window.stride[axis] - window.padding[axis] + 1
        stop += window.dilation[axis] * (kernel_size[axis] - 1)
        low = min(max(-start, 0), stop - start)
        read = slice(min(max(start, 0), size), min(max(stop, 0), size))
        inside.append(read)
        widths.append((low, stop - start - low - (read.stop - read.start)))
    part = x[:, inside[0], inside[1]]
    if not np.any(widths):
        return part
    return jnp.pad(part, [(0, 0), *widths, (0, 0)])
