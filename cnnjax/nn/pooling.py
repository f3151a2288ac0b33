"""Pooling: PyTorch's semantics, every border filled by the model's padding policy, fast gradients on every platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cnnjax.nn.geometry import Both, output_size, pair, valid_counts
from cnnjax.nn.padding import check_fill, pad
from cnnjax.runtime.types import AnyArray


def _window_taps(x, window, stride):
    """Each of a window's taps as a strided view [batch, height', width', channels], row by row, with its (row, column)."""
    height, width = (
        output_size(x.shape[axis + 1], window[axis], stride[axis], 0) for axis in (0, 1)
    )
    for i in range(window[0]):
        for j in range(window[1]):
            yield (
                (i, j),
                x[
                    :,
                    i : i + (height - 1) * stride[0] + 1 : stride[0],
                    j : j + (width - 1) * stride[1] + 1 : stride[1],
                ],
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x, window, stride):
    """Max-pool without padding. XLA's own gradient, select-and-scatter, is 3 to 80 times slower on the CPU."""
    return functools.reduce(jnp.maximum, (tap for _, tap in _window_taps(x, window, stride)))


def _max_pool_forward(x, window, stride):
    y = _max_pool(x, window, stride)
    return y, (x, y)


def _tiled_gradient(x, y, dy, window):
    """The gradient where windows tile the image: each cell asks whether it is its window's first maximum, in one pass."""
    count = window[0] * window[1]
    first = jnp.full(y.shape, count - 1, jnp.int32)
    for cell, (_, tap) in reversed(list(enumerate(_window_taps(x, window, window)))):
        first = jnp.where(tap == y, cell, first)
    cell = np.arange(count, dtype=np.int32).reshape(1, 1, window[0], 1, window[1], 1)
    widen = lambda a: a[:, :, None, :, None, :]
    return jnp.where(widen(first) == cell, widen(dy), 0).reshape(x.shape)


def _max_pool_backward(window, stride, residuals, dy):
    """Gives each window's gradient to its first maximum, and sums overlapping windows in their order: bit for bit the native result."""
    x, y = residuals
    if window == stride and all(size % step == 0 for size, step in zip(x.shape[1:3], stride)):
        return (_tiled_gradient(x, y, dy, window),)
    taken = jnp.zeros(y.shape, bool)
    shares = []
    for (i, j), tap in _window_taps(x, window, stride):
        first = (tap == y) & ~taken
        taken |= first
        widths = [
            (at, size - at - (count - 1) * step - 1, step - 1)
            for at, size, count, step in zip((i, j), x.shape[1:3], y.shape[1:3], stride)
        ]
        shares.append((jnp.where(first, dy, 0), [(0, 0, 0), *widths, (0, 0, 0)]))
    dx = jnp.zeros(x.shape, dy.dtype)
    for share, widths in reversed(shares):  # a later tap belongs to an earlier window
        dx += lax.pad(share, jnp.zeros((), dy.dtype), widths)
    return (dx,)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _lacking(size: int, window: int, stride: int, padding: int) -> int:
    """How many cells a last, incomplete window lacks, if it begins inside the image or its first border (PyTorch's ceil_mode)."""
    windows = -(-(size + 2 * padding - window) // stride) + 1
    if (windows - 1) * stride >= size + padding:
        windows -= 1
    return max(0, (windows - 1) * stride + window - size - 2 * padding)


def _geometry(x, window, stride, padding, fill, ceil=False):
    check_fill(fill)
    window = pair(window, "window", 1)
    stride = window if stride is None else pair(stride, "stride", 1)
    padding = (0, 0) if fill == "none" else pair(padding, "padding", 0)
    axes = list(zip(x.shape[1:3], window, stride, padding))
    lacking = [_lacking(*axis) if ceil and fill != "none" else 0 for axis in axes]
    if any(output_size(size + more, *rest) < 1 for more, (size, *rest) in zip(lacking, axes)):
        raise ValueError(
            f"a {window[0]}x{window[1]} pool with padding={fill!r} has no output on a {x.shape[1]}x{x.shape[2]} map: "
            "the image is too small for this network"
        )
    return window, stride, padding, lacking


def max_pool(
    x: Float[AnyArray, "batch height width channels"],
    window: Both,
    stride: Both | None = None,
    padding: Both = 0,
    *,
    ceil: bool = False,
    fill: str = "zeros",
) -> Float[Array, "batch height_out width_out channels"]:
    """The largest value of each window of `x`; `stride` defaults to `window`.

    Under fills of zeros, and 'random', the border never wins, as in PyTorch; under other fills it takes part. With `ceil` an
    incomplete window at the end counts, the cells it lacks never winning; 'none' adds no such cells. Raises `ValueError`
    where nothing would be left.
    """
    size, step, border, lacking = _geometry(x, window, stride, padding, fill, ceil)
    fill = "zeros" if fill == "random" else fill
    x = pad(x, border, fill, value=-jnp.inf)
    if any(lacking):
        x = jnp.pad(
            x,
            ((0, 0), *((0, n) for n in lacking), (0, 0)),
            constant_values=jnp.asarray(-jnp.inf, x.dtype),
        )
    return _max_pool(x, size, step)


def avg_pool(
    x: Float[AnyArray, "batch height width channels"],
    window: Both,
    stride: Both | None = None,
    padding: Both = 0,
    *,
    fill: str = "zeros",
) -> Float[Array, "batch height_out width_out channels"]:
    """The mean of each window of `x`; `stride` defaults to `window`.

    Under fills of zeros the border counts, as PyTorch's default has it; under 'partial' and 'random' only cells inside the image
    do. Raises `ValueError` where nothing would be left.
    """
    size, step, border, _ = _geometry(x, window, stride, padding, fill)
    fill = "partial" if fill == "random" else fill
    total = functools.reduce(
        jnp.add, (tap for _, tap in _window_taps(pad(x, border, fill), size, step))
    )
    if fill == "partial":
        inside = np.multiply.outer(
            *(
                valid_counts(x.shape[axis + 1], size[axis], step[axis], border[axis])
                for axis in (0, 1)
            )
        )
        return total / jnp.asarray(np.maximum(inside, 1)[None, :, :, None], x.dtype)
    return total / (size[0] * size[1])


def _bins(size: int, out: int) -> Float[np.ndarray, "{out} {size}"]:
    """The averaging matrix [out, size] of PyTorch's adaptive pooling: bin i covers floor(i n / m) to ceil((i + 1) n / m)."""
    i, position = np.arange(out)[:, None], np.arange(size)
    inside = (position >= i * size // out) & (position < -(-(i + 1) * size // out))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def adaptive_avg_pool(
    x: Float[AnyArray, "batch height width channels"], size: Both
) -> Float[AnyArray, "batch height_out width_out channels"]:
    """Averages `x` into a grid of `size` bins, whatever its height and width, as PyTorch does."""
    size = pair(size, "size", 1)
    if x.shape[1:3] == size:
        return x
    if size == (1, 1):
        return x.mean((1, 2), keepdims=True)
    rows, columns = (jnp.asarray(_bins(n, m), x.dtype) for n, m in zip(x.shape[1:3], size))
    return jnp.einsum("ah,nhwc,bw->nabc", rows, x, columns)


def global_avg_pool(
    x: Float[AnyArray, "batch height width channels"],
) -> Float[AnyArray, "batch channels"]:
    """The mean over all positions."""
    return x.mean((1, 2))
