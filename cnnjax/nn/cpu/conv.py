"""Ungrouped convolution in the form that XLA's CPU backend runs fast.

The backend is fast only if a convolution is written NHWC x HWIO -> NHWC, ungrouped and without
input dilation, and it rewrites other forms into that one only outside loops. The two gradients
that JAX derives have other forms: inside `lax.scan`, a training step ran on a naive loop nest. So
this module states both gradients in the fast form.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnjax.nn.cpu.barrier import materialize
from cnnjax.nn.cpu.linear import add_given, linear_call, vary_alike
from cnnjax.nn.geometry import Window
from cnnjax.runtime.types import AnyArray

_LAYOUT = ("NHWC", "HWIO", "NHWC")
LARGE = 2**20  # elements, 4 MB: a map that is too large for the caches
_FEW_IN = 3  # channels that leave the matrix product inside a convolution half empty
_FEW_OUT = 16
_MOST_PLANES = 16  # convolutions that a strided input gradient may consist of
_LARGEST_ROW = 4  # a row's matrix of the kernel gradient, relative to the map


def convolve(x: AnyArray, kernel: AnyArray, window: Window) -> jax.Array:
    """Convolves `x`, NHWC, with `kernel`, HWIO, with gradients in the fast form.

    The plain form is `lax.conv_general_dilated` with the gradients that JAX derives.
    """
    return _convolve(*vary_alike(x, kernel), window)


def with_gradients(
    forward: Callable, input_gradient: Callable, kernel_gradient: Callable
) -> Callable:
    """Builds a convolution from a forward function and its two gradients.

    Args:
      forward: `forward(x, kernel, window)` convolves; it is its own tangent.
      input_gradient: `input_gradient(x_shape, kernel, window, dy)` returns the image's gradient.
      kernel_gradient: `kernel_gradient(x, kernel_shape, window, dy)` returns the kernel's.

    Returns a function of an image, a kernel and a window, which is traced once for each shape.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
    def convolution(x, kernel, window):
        return forward(x, kernel, window)

    @functools.partial(convolution.defjvp, symbolic_zeros=True)
    def convolution_tangent(window, primals, tangents):
        x, kernel = primals
        x = materialize(x)

        def tangent(residuals, dx, dkernel):
            x, kernel = residuals
            return add_given(
                None if dx is None else forward(dx, kernel, window),
                None if dkernel is None else forward(x, dkernel, window),
            )

        def cotangents(residuals, dy):
            x, kernel = residuals
            dy = materialize(dy)
            return (
                input_gradient(x.shape, kernel, window, dy),
                kernel_gradient(x, kernel.shape, window, dy),
            )

        y = forward(x, kernel, window)
        return y, linear_call(tangent, cotangents, (x, kernel), *tangents, like=y)

    return jax.jit(convolution, static_argnums=2)


# ------------------------------------------------------------------ forward


def packed_outputs(x: AnyArray, kernel_shape: tuple, window: Window) -> int:
    """Returns how many neighboring outputs of a row are packed as channels."""
    many_channels = kernel_shape[2] > _FEW_IN and kernel_shape[3] > _FEW_OUT
    if many_channels or window.stride != (1, 1) or window.dilation != (1, 1):
        return 1
    _, width = window.output_shape(x.shape, kernel_shape[:2])
    best = 4 if kernel_shape[2] <= _FEW_IN and kernel_shape[3] < 64 else 2
    return next(count for count in (best, 2, 1) if width % count == 0)


def _forward(x, kernel, window):
    """Convolves; with few channels, by space-to-width packing of the output.

    The plain form is one convolution. With up to 3 channels in or 16 out, the matrix product inside
    it has few columns, and each value is gathered anew for every output. A wider kernel with a
    stride computes two or four neighbors of a row as if they were channels.
    """
    count = packed_outputs(x, kernel.shape, window)
    if count == 1:
        return _plain(x, kernel, window)
    shifted = [
        jnp.pad(kernel, ((0, 0), (place, count - 1 - place), (0, 0), (0, 0)))
        for place in range(count)
    ]
    strided = Window(stride=(1, count), padding=window.padding)
    y = _plain(x, jnp.concatenate(shifted, axis=3), strided)
    batch, height, width, _ = y.shape
    return y.reshape(batch, height, width * count, kernel.shape[3])


def _plain(x, kernel, window):
    padding = window.padding
    if _exchanges_operands(x, kernel.shape[:2]):
        x = _pad(x, [(amount, amount, 0) for amount in padding], kernel.shape[:2])
        padding = (0, 0)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.stride,
        padding=[(amount, amount) for amount in padding],
        rhs_dilation=window.dilation,
        dimension_numbers=_LAYOUT,
    )


def _exchanges_operands(x, kernel_size) -> bool:
    """Tells whether XLA would exchange image and kernel, which leaves the fast form.

    It does so if the kernel is larger than the map, such as 3x3 on 2x2, after it has moved zero
    padding into the convolution.
    """
    return math.prod(kernel_size) > math.prod(x.shape[1:3])


def keep_padding_apart(x: AnyArray, padded: AnyArray, kernel_size: tuple) -> AnyArray:
    """Keeps XLA from moving padding into the convolution after it.

    XLA would then exchange the convolution's operands. The plain form is `padded`. An optimization
    barrier keeps the two operations apart.
    """
    return lax.optimization_barrier(padded) if _exchanges_operands(x, kernel_size) else padded


def _pad(x, widths, kernel_size):
    """Pads rows and columns by (low, high, interior) with zeros, before a convolution."""
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *widths, (0, 0, 0)])
    return keep_padding_apart(x, padded, kernel_size)


# ------------------------------------------------------------------ gradient of the input


def spread_cotangent(x_shape: tuple, kernel_shape: tuple, window: Window, dy: AnyArray) -> AnyArray:
    """Pads the output's gradient so that the flipped kernel turns it into the input's.

    The plain form is a convolution with input dilation, which leaves the fast form (jax issue
    23783), so interior padding is an operation of its own.
    """
    return _pad(dy, _spread_widths(x_shape, kernel_shape, window, dy.shape), kernel_shape[:2])


def _spread_widths(x_shape, kernel_shape, window, dy_shape):
    """Returns by how much `spread_cotangent` pads rows and columns, as (low, high, interior)."""
    widths = []
    for axis in (0, 1):
        reach = window.dilation[axis] * (kernel_shape[axis] - 1)
        low = reach - window.padding[axis]
        size = (dy_shape[axis + 1] - 1) * window.stride[axis] + 1
        widths.append((low, x_shape[axis + 1] + reach - size - low, window.stride[axis] - 1))
    return widths


def _flip(kernel):
    """Rotates a kernel by 180 degrees and exchanges its inputs and outputs."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def input_gradient(x_shape: tuple, kernel: AnyArray, window: Window, dy: AnyArray) -> jax.Array:
    """Convolves the dilated gradient of the output with the flipped kernel."""
    if window.stride != (1, 1) and window.dilation == (1, 1):
        if math.prod(window.stride) > _MOST_PLANES:
            return _gradient_by_pixel_shuffle(x_shape, kernel, window, dy)
        return gradient_by_planes(x_shape, kernel, window, dy, _correlate_padded)
    spread = spread_cotangent(x_shape, kernel.shape, window, dy)
    return _forward(spread, _flip(kernel), Window(dilation=window.dilation))


def _correlate_padded(dy, kernel, widths):
    padded = _pad(dy, [(low, high, 0) for low, high in widths], kernel.shape[:2])
    return _forward(padded, _flip(kernel), Window())


def gradient_by_planes(
    x_shape: tuple, kernel: AnyArray, window: Window, dy: AnyArray, correlate: Callable
) -> jax.Array:
    """Computes the input's gradient plane by plane.

    This is the sub-pixel decomposition of a transposed convolution. The plain form dilates the
    output's gradient by the stride, so that most of its factors are zeros. Here every stride-th row
    and column of the result is a convolution of its own with the kernel's taps that meet it.

    Args:
      x_shape: the input's shape [batch, height, width, in].
      kernel: [kernel height, kernel width, in, out], where `in` is 1 if it is depthwise.
      window: how the kernel moves, without dilation.
      dy: the output's gradient [batch, height', width', out].
      correlate: `correlate(dy, kernel, widths)` pads rows and columns by (low, high), which may be
        negative, and convolves with the kernel, which is not flipped yet.

    Returns the input's gradient, of the shape `x_shape`.
    """
    stride = window.stride
    padding = window.padding
    batch = dy.shape[0]
    channels = x_shape[3]
    size = [-(-x_shape[axis + 1] // stride[axis]) for axis in (0, 1)]

    def plane(row, column):
        # Input row `row + q * stride` meets tap `top` with the output's row `q + down`, and columns
        # are as rows.
        down, top = divmod(row + padding[0], stride[0])
        across, left = divmod(column + padding[1], stride[1])
        plane_kernel = kernel[top :: stride[0], left :: stride[1]]
        if not plane_kernel.size:
            return jnp.zeros((batch, *size, channels), dy.dtype)
        widths = [
            (plane_kernel.shape[0] - 1 - down, size[0] + down - dy.shape[1]),
            (plane_kernel.shape[1] - 1 - across, size[1] + across - dy.shape[2]),
        ]
        return correlate(dy, plane_kernel, widths)

    rows = []
    for row in range(stride[0]):
        planes = [plane(row, column) for column in range(stride[1])]
        rows.append(jnp.stack(planes, 3))
    interleaved = jnp.stack(rows, 2)
    whole = interleaved.reshape(batch, size[0] * stride[0], size[1] * stride[1], channels)
    return whole[:, : x_shape[1], : x_shape[2]]


def _gradient_by_pixel_shuffle(x_shape, kernel, window, dy):
    """Computes the input's gradient as one convolution whose channels are the planes.

    The plain form is `gradient_by_planes`, which is 256 convolutions for 16x16 patches. Here a
    pixel shuffle (depth-to-space) moves the planes to their positions. All of them have as many
    taps, since the kernel is padded with zeros to a multiple of the stride.
    """
    stride = window.stride
    padding = window.padding
    batch = dy.shape[0]
    channels = x_shape[3]
    depth = [-(-kernel.shape[axis] // stride[axis]) for axis in (0, 1)]
    missing = [(0, depth[axis] * stride[axis] - kernel.shape[axis]) for axis in (0, 1)]
    padded = jnp.pad(kernel, [*missing, (0, 0), (0, 0)])
    split = padded.reshape(depth[0], stride[0], depth[1], stride[1], *kernel.shape[2:])
    by_plane = split.transpose(0, 2, 1, 3, 4, 5)
    by_plane = by_plane.reshape(*depth, math.prod(stride) * channels, kernel.shape[3])
    # Here the low border belongs to the map; it is cut off at the end.
    size = [-(-(x_shape[axis + 1] + padding[axis]) // stride[axis]) for axis in (0, 1)]
    widths = [(depth[axis] - 1, size[axis] - dy.shape[axis + 1]) for axis in (0, 1)]
    planes = _correlate_padded(dy, by_plane, widths)
    interleaved = planes.reshape(batch, *size, *stride, channels).transpose(0, 1, 3, 2, 4, 5)
    whole = interleaved.reshape(batch, size[0] * stride[0], size[1] * stride[1], channels)
    top, left = padding
    return whole[:, top : top + x_shape[1], left : left + x_shape[2]]


# ------------------------------------------------------------------ gradient of the kernel


def kernel_gradient(x: AnyArray, kernel_shape: tuple, window: Window, dy: AnyArray) -> jax.Array:
    """Correlates the input with the output's gradient in the form fastest for a shape.

    Args:
      x: the input [batch, height, width, in].
      kernel_shape: the kernel's shape (kernel height, kernel width, in, out).
      window: how the kernel moves.
      dy: the output's gradient [batch, height', width', out].

    Returns the kernel's gradient, of the shape `kernel_shape`.
    """
    if not x.size:
        return jnp.zeros(kernel_shape, dy.dtype)
    has_small_rows = kernel_shape[1] <= _LARGEST_ROW * math.prod(window.stride)
    by_rows = window.stride != (1, 1) and kernel_shape[0] <= 3 and has_small_rows
    if kernel_shape[:2] == (1, 1) or by_rows:
        return _kernel_gradient_by_rows(x, kernel_shape, window, dy)
    patch = math.prod(kernel_shape[:3])
    if kernel_shape[2] <= _FEW_IN and patch <= kernel_shape[3]:
        return _kernel_gradient_by_im2col(x, kernel_shape, window, dy)
    keeps_size = math.prod(dy.shape[1:3]) >= math.prod(x.shape[1:3])
    if kernel_shape[3] < kernel_shape[2] and window.stride == (1, 1) and keeps_size:
        return _kernel_gradient_from_outputs(x, kernel_shape, window, dy)
    return _kernel_gradient_by_convolution(x, kernel_shape, window, dy)


def _kernel_gradient_by_rows(x, kernel_shape, window, dy):
    """Takes a matrix product for each row of the kernel (im2col of a row).

    The plain form is a convolution in which the output's gradient is a dilated kernel; here neither
    side is transposed. A row's matrix has about `width / prod(stride)` times as many values
    as the map.
    """
    views = list(tap_views(x, kernel_shape[:2], window))
    positions = math.prod(dy.shape[:3])
    columns = dy.reshape(positions, kernel_shape[3])
    products = []
    for start in range(0, len(views), kernel_shape[1]):
        row = jnp.concatenate(views[start : start + kernel_shape[1]], axis=3)
        row = row.reshape(positions, row.shape[3])
        products.append(_sum_outer_products(row, columns))
    return jnp.stack(products).reshape(kernel_shape)


def _sum_outer_products(left, right):
    """Multiplies the transpose of `left` by `right`, both [positions, channels].

    The plain form transposes `left` on its way into the matrix product. Where `right` has fewer
    channels, the product is taken with the two exchanged, and its small result is transposed. An
    optimization barrier keeps XLA from exchanging them again.
    """
    over_positions = (((0,), (0,)), ((), ()))
    positions, channels = left.shape
    if right.shape[1] >= channels or is_below(positions, channels):
        return lax.dot_general(left, right, over_positions)
    return lax.optimization_barrier(lax.dot_general(right, left, over_positions)).T


def _kernel_gradient_by_im2col(x, kernel_shape, window, dy):
    """Takes one matrix product of the patches (im2col), packed as in the forward pass.

    The plain form transposes the output's gradient, by far the larger side if the kernel sees few
    values. Neighboring outputs of a row count as channels of one output: their patches overlap, so
    one patch for all of them has fewer values, and the product has more columns. The filters of
    the neighbors are cut out of the result and added.
    """
    height, width, channels, filters = kernel_shape
    count = packed_outputs(x, kernel_shape, window)
    patch = (height, width + count - 1)
    strides = (window.stride[0], window.stride[1] * count)
    views = tap_views(x, patch, dataclasses.replace(window, stride=strides))
    patches = jnp.concatenate(list(views), axis=3)
    positions = math.prod(patches.shape[:3])
    rows = patches.reshape(positions, patches.shape[3])
    product = _sum_outer_products(rows, dy.reshape(positions, count * filters))
    product = product.reshape(*patch, channels, count, filters)
    parts = [product[:, place : place + width, :, place] for place in range(count)]
    return functools.reduce(operator.add, parts)


def _kernel_gradient_by_convolution(x, kernel_shape, window, dy):
    """Convolves with batch and channels exchanged.

    The batch, over which the gradient sums, takes the place of channels. The plain form is the same
    convolution by dimension numbers, which leaves the fast form.
    """
    widths = []
    for axis in (0, 1):
        # A stride may leave a margin of the map unread, which is cropped by a negative amount.
        needed = (dy.shape[axis + 1] - 1) * window.stride[axis] + 1
        needed += window.dilation[axis] * (kernel_shape[axis] - 1)
        low = window.padding[axis]
        widths.append((low, needed - low - x.shape[axis + 1], 0))
    # Its kernel, dy, is dilated by the stride and moves by the dilation.
    gradient = _convolve_over_batch(x, dy, widths, stride=window.dilation, dilation=window.stride)
    return gradient.transpose(1, 2, 0, 3)


def _kernel_gradient_from_outputs(x, kernel_shape, window, dy):
    """Convolves the output's gradient with the image, batch and channels exchanged.

    The plain form is `_kernel_gradient_by_convolution`, which transposes the image and gathers its
    patches. Here it is the output's gradient that is transposed and gathered, which has fewer
    channels. The sum runs over all positions of the image, more than the output's if the kernel is
    not padded.
    """
    widths = _spread_widths(x.shape, kernel_shape, window, dy.shape)
    gradient = _convolve_over_batch(dy, x, widths, stride=window.dilation)
    return _flip(gradient.transpose(1, 2, 0, 3))


def _convolve_over_batch(x, kernel, widths, *, stride, dilation=(1, 1)):
    """Convolves maps with maps, summing over the batch: [channels of x, height, width, others]."""
    if is_below(x.size, LARGE):
        x = _pad(x, widths, kernel.shape[1:3]).transpose(3, 1, 2, 0)
    else:
        x = _pad(batch_last(x), widths, kernel.shape[1:3])
    return lax.conv_general_dilated(
        x,
        kernel.transpose(1, 2, 0, 3),
        window_strides=stride,
        padding="VALID",
        rhs_dilation=dilation,
        dimension_numbers=_LAYOUT,
    )


def is_below(size, bound: int) -> bool:
    """Compares a size with a bound.

    A symbolic size, as in `jax.export`, counts as below the bound.
    """
    return not isinstance(size, int) or size < bound


def batch_last(x: AnyArray) -> jax.Array:
    """Transposes NHWC maps to [channels, height, width, batch] in two steps.

    The plain form is `x.transpose(3, 1, 2, 0)`. A plain matrix transposition first, which reads
    memory in order, makes the kernel gradient of a map too large for the caches faster, and that of
    a smaller one slower. An optimization barrier keeps XLA from joining the two steps.
    """
    batch, *rest = x.shape
    rows = lax.optimization_barrier(x.reshape(batch, math.prod(rest)).T)
    return rows.reshape(*rest, batch).transpose(2, 0, 1, 3)


def tap_views(x: AnyArray, kernel_size: tuple, window: Window) -> Iterator[AnyArray]:
    """Yields a strided view of the padded map for each tap of a kernel, row by row.

    Each view has the output's height and width.
    """
    height, width = window.output_shape(x.shape, kernel_size)
    widths = [(0, 0), *((amount, amount) for amount in window.padding), (0, 0)]
    padded = x if window.padding == (0, 0) else jnp.pad(x, widths)
    for row, column in np.ndindex(*kernel_size):
        top = row * window.dilation[0]
        left = column * window.dilation[1]
        yield padded[
            :,
            top : top + (height - 1) * window.stride[0] + 1 : window.stride[0],
            left : left + (width - 1) * window.stride[1] + 1 : window.stride[1],
        ]


_convolve = with_gradients(_forward, input_gradient, kernel_gradient)
