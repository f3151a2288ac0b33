"""Pooling with PyTorch's semantics and the model's padding policy at the border."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cnnjax.nn.cpu.pooling import max_windows, sum_windows
from cnnjax.nn.geometry import Both, Window, check_map, output_size, pair, widen
from cnnjax.nn.lowering import unrolls_pools
from cnnjax.nn.padding import ZERO_FILLS, border_widths, check_fill, pad
from cnnjax.nn.sampling import FILTERS, check_sampling, sample
from cnnjax.runtime.types import AnyArray

# Unrolled pools have an operation for each value of a window. In larger windows, they would take
# too long to compile.
_LARGEST_UNROLLED = 64


class _Pool(NamedTuple):
    """How the windows of a pool move over a map, as (height, width) pairs.

    Attributes:
      size: rows and columns of a window.
      stride: positions from one window to the next.
      border: rows and columns that the fill adds on each side.
      missing: rows and columns that the last window lacks under `ceil`.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    border: tuple[int, int]
    missing: tuple[int, int]


def max_pool(
    x: Float[AnyArray, "batch height width channels"],
    window: Both,
    stride: Both | None = None,
    padding: Both = 0,
    *,
    ceil: bool = False,
    fill: str = "zeros",
    sampling: str = "stride",
) -> Float[Array, "batch height_out width_out channels"]:
    """Takes the largest value of each window.

    Args:
      x: [batch, height, width, channels].
      window: size of a window, an integer or a (height, width) pair.
      stride: step from one window to the next; the window's size unless given.
      padding: the amount on each side; 'none' makes it 0.
      ceil: whether an incomplete window at the end counts, as under PyTorch's ceil_mode; its
        missing values never win. Under 'none' no window is incomplete.
      fill: what the border is filled with (`cnnjax.nn.padding`). Under fills of zeros, and
        'random', the border never wins, as in PyTorch; under other fills it takes part.
      sampling: how a stride reduces the resolution (`cnnjax.nn.sampling`).

    Returns [batch, height', width', channels].
    Raises `ValueError` if `x` is not a floating-point array [batch, height, width, channels],
    `fill` or `sampling` is unknown, a number is out of range, a map is too small for its border,
    the output would be empty, or the padding is more than half of the window or, under
    'one-sided', half of it.
    """
    check_sampling(sampling)
    pool = _pool(x, window, stride, padding, fill, ceil)
    # A window that lies in this border has no largest value.
    covers_window = any(2 * amount == length for amount, length in zip(pool.border, pool.size))
    if fill == "one-sided" and covers_window:
        raise ValueError(
            f"padding={pool.border}, all on one side, is as large as the window, {pool.size}; "
            "fill='one-sided' accepts less than half of it"
        )
    if sampling != "stride" and pool.stride != (1, 1):
        return _sampled_max(x, pool, fill, sampling)
    return _max_pool(x, pool, fill)


def _sampled_max(x, pool, fill, sampling):
    """Samples the dense map of maxima."""
    dense_pool = pool._replace(stride=(1, 1))
    if fill == "circular":
        x = _wrap(x, pool)
        dense_pool = dense_pool._replace(border=(0, 0), missing=(0, 0))
    dense = _max_pool(x, dense_pool, fill)
    return sample(dense, pool.stride, sampling=sampling, fill=fill)


# Compiled as a whole, so that `jax_debug_infs` does not see the infinities. The border that never
# wins is added inside the maximum: a gradient keeps the operands, and a map padded with infinities
# must not be one of them.
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _max_pool(x, pool, fill):
    fill = "zeros" if fill == "random" else fill
    rows, columns = (0, 0), (0, 0)
    if fill in ZERO_FILLS:
        rows, columns = border_widths(pool.border, fill)
    else:
        x = pad(x, pool.border, fill)
    widths = (
        (0, 0),
        (rows[0], rows[1] + pool.missing[0]),
        (columns[0], columns[1] + pool.missing[1]),
        (0, 0),
    )
    if _is_unrolled(pool.size):
        return max_windows(x, pool.size, pool.stride, widths)
    return _reduce_windows(x, -np.inf, lax.max, pool, widths)


def _is_unrolled(size) -> bool:
    return unrolls_pools() and math.prod(size) <= _LARGEST_UNROLLED


def _reduce_windows(x, start, operation, pool, widths="VALID"):
    # A constant of NumPy, by which lax recognizes a maximum or a sum.
    start = np.asarray(start, x.dtype)
    size = (1, *pool.size, 1)
    return lax.reduce_window(x, start, operation, size, (1, *pool.stride, 1), widths)


def avg_pool(
    x: Float[AnyArray, "batch height width channels"],
    window: Both,
    stride: Both | None = None,
    padding: Both = 0,
    *,
    fill: str = "zeros",
    sampling: str = "stride",
) -> Float[Array, "batch height_out width_out channels"]:
    """Takes the mean of each window.

    Arguments are those of `max_pool`. Under fills of zeros the border counts, as by PyTorch's
    default; under 'partial' and 'random' only values inside the image count. If the stride is above
    1, the filter of a `sampling` such as 'blur' replaces the mean; an axis of stride 1 is then not
    averaged. Types below 32 bits are summed in float32.

    Raises `ValueError` as `max_pool` does; under 'one-sided' too, the padding may be half of the
    window.
    """
    check_sampling(sampling)
    pool = _pool(x, window, stride, padding, fill)
    if sampling != "stride" and pool.stride != (1, 1):
        return _sampled_mean(x, pool, fill, sampling)
    fill = "partial" if fill == "random" else fill
    padded = widen(pad(x, pool.border, fill))
    if _is_unrolled(pool.size):
        total = sum_windows(padded, pool.size, pool.stride)
    else:
        total = _reduce_windows(padded, 0, lax.add, pool)
    if fill == "partial":
        inside = Window(pool.stride, pool.border).valid_taps(x.shape, pool.size).clip(1)
        mean = total / jnp.asarray(inside, total.dtype)[None, :, :, None]
    else:
        mean = total / math.prod(pool.size)
    return jnp.asarray(mean, jnp.result_type(x))


def _sampled_mean(x, pool, fill, sampling):
    """Filters a map instead of averaging it, or samples a grid of its dense means."""
    if sampling in FILTERS:
        height, width = Window(pool.stride, pool.border).output_shape(x.shape, pool.size)
        # An odd window whose border is half of it is centered on positions 0, s, 2s, ... So is the
        # filter with its own border, and the pool's border is dropped.
        border = tuple(
            0 if length == 2 * amount + 1 else amount
            for length, amount in zip(pool.size, pool.border)
        )
        if border != (0, 0) and fill in ("partial", "random"):
            # Partial convolution: divide by the weights that lie inside the image.
            inside = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
            settings = {"stride": pool.stride, "sampling": sampling, "fill": "zeros"}
            filtered = sample(pad(x, border, "zeros"), **settings)
            share = sample(pad(inside, border, "zeros"), **settings)
            # Where the filter reaches no pixel, both are 0.
            filtered /= jnp.where(share > 0, share, 1)
        else:
            filtered = sample(pad(x, border, fill), pool.stride, sampling=sampling, fill=fill)
        return filtered[:, :height, :width]
    border = pool.border
    if fill == "circular":
        x = _wrap(x, pool)
        border = (0, 0)
    dense = avg_pool(x, pool.size, 1, border, fill=fill)
    return sample(dense, pool.stride, sampling=sampling, fill=fill)


def _wrap(x, pool):
    """Pads a map circularly until the stride divides the number of dense windows.

    2x2 windows on a map of even size then wrap around its end, as in the code of Chaman and
    Dokmanic: a circular shift of the map shifts the dense windows, and loses none.
    """
    widths = []
    for length, size, stride, border, missing in zip(x.shape[1:3], *pool):
        count = stride * output_size(length + missing, size, stride, border)
        widths.append((border, count + size - 1 - length - border))
    return jnp.pad(x, ((0, 0), *widths, (0, 0)), mode="wrap")


def _pool(x, window, stride, padding, fill, ceil=False) -> _Pool:
    """Checks a pool's arguments and returns how its windows move."""
    check_map(x)
    check_fill(fill)
    size = pair(window, "window", 1)
    stride = size if stride is None else pair(stride, "stride", 1)
    padding = (0, 0) if fill == "none" else pair(padding, "padding", 0)
    # As in PyTorch. A window that lies in the border has nothing of the map.
    if any(2 * amount > length for amount, length in zip(padding, size)):
        raise ValueError(f"padding={padding} is more than half of the window, {size}")
    missing = (0, 0)
    if ceil and fill != "none":
        rows, columns = map(_missing, x.shape[1:3], size, stride, padding)
        missing = (rows, columns)
    lengths = [length + more for length, more in zip(x.shape[1:3], missing)]
    if min(map(output_size, lengths, size, stride, padding)) < 1:
        raise ValueError(
            f"a {size[0]}x{size[1]} pool with padding={fill!r} has no output on a "
            f"{x.shape[1]}x{x.shape[2]} map: the image is too small for this network"
        )
    return _Pool(size, stride, padding, missing)


def _missing(size: int, window: int, stride: int, padding: int) -> int:
    """Counts the values that the last window lacks under PyTorch's ceil_mode.

    A window counts if it begins inside the image or its first border.
    """
    windows = -(-(size + 2 * padding - window) // stride) + 1
    if (windows - 1) * stride >= size + padding:
        windows -= 1
    return max(0, (windows - 1) * stride + window - size - 2 * padding)


def adaptive_avg_pool(
    x: Float[AnyArray, "batch height width channels"], size: Both
) -> Float[AnyArray, "batch height_out width_out channels"]:
    """Averages into a grid of `size` bins, whatever the map's size, as PyTorch does.

    Bins are a matrix product with the whole map, so that one infinite value or NaN of a channel
    makes all its bins NaN; in PyTorch, only those that cover it.

    Args:
      x: [batch, height, width, channels].
      size: rows and columns of the grid, an integer or a (height, width) pair.

    Returns [batch, *size, channels].
    Raises `ValueError` if `x` is not a floating-point array [batch, height, width, channels]
    or `size` is not positive.
    """
    check_map(x)
    size = pair(size, "size", 1)
    if x.shape[1:3] == size:
        return x
    if size == (1, 1):
        return jnp.mean(x, (1, 2), keepdims=True)
    wide = widen(x)
    rows, columns = (jnp.asarray(_bins(n, m), wide.dtype) for n, m in zip(x.shape[1:3], size))
    # The default precision of an accelerator, TF32 or bfloat16, has three digits.
    means = jnp.einsum("ah,nhwc,bw->nabc", rows, wide, columns, precision="highest")
    return means.astype(jnp.result_type(x))


def _bins(size: int, out: int) -> Float[np.ndarray, "{out} {size}"]:
    """Makes the averaging matrix of PyTorch's adaptive pooling.

    Bin i covers positions from floor(i n / m) to ceil((i + 1) n / m).
    """
    i = np.arange(out)[:, None]
    position = np.arange(size)
    inside = (position >= i * size // out) & (position < -(-(i + 1) * size // out))
    return inside / inside.sum(1, keepdims=True)


def global_avg_pool(
    x: Float[AnyArray, "batch height width channels"],
) -> Float[AnyArray, "batch channels"]:
    """Takes the mean over all positions.

    Returns [batch, channels].
    Raises `ValueError` if `x` is not a floating-point array [batch, height, width, channels].
    """
    check_map(x)
    # NumPy's own mean would sum bfloat16 in bfloat16.
    return jnp.mean(x, (1, 2))


def flatten(
    x: Float[AnyArray, "batch height width channels"],
) -> Float[AnyArray, "batch values"]:
    """Flattens each map with its channels first, in PyTorch's order.

    Returns [batch, channels * height * width].
    Raises `ValueError` if `x` is not a floating-point array [batch, height, width, channels].
    """
    check_map(x)
    batch, height, width, channels = x.shape
    return x.transpose(0, 3, 1, 2).reshape(batch, channels * height * width)
