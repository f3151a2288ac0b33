"""Padding as a policy: symmetric amounts, and one fill for a whole model.

The fills, shown on the row 1234 with an amount of 2:

    zeros          00 1234 00
    none              1234         no padding anywhere, whatever the amount: maps shrink
    reflect        32 1234 32      mirrored about the border pixel
    symmetric      21 1234 43      mirrored about the border, the border pixel included (Alsallakh
                                   et al. 2021, arXiv 2010.02178): 'replicate' where the amount is 1
    replicate      11 1234 44      the border pixel repeated
    circular       34 1234 12      wrapped around
    partial        00 1234 00      zeros, and a convolution is rescaled by (kernel taps / taps
                                   inside the image): partial convolution, Liu et al. 2018
                                   (arXiv 1811.11718)
    mean           mm 1234 mm      each channel's mean over the map, here 2.5
    random         rr 1234 rr      noise with each channel's mean and deviation over the map,
                                   drawn anew for every call
    interpolate  1 1.4 1.9 ... 4   no border: the map is stretched to the padded size (Islam et
                                   al. 2021, arXiv 2101.12322)
    full           00 1234 00      zeros; a convolution takes d(k - 1) on each side, so that every
                                   weight meets every pixel: maps grow (F-Conv, Kayhan and van
                                   Gemert 2020, arXiv 2003.07064)
    one-sided    0000 1234         the zeros of both sides above and to the left

Except for 'none' and 'full', the amount does not depend on the fill (no 'SAME'): the sampling grid
of a strided network is the same under all fills but 'one-sided' and 'interpolate', so a comparison
of the others compares nothing else.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from cnnjax.nn.cpu.barrier import materialize_gradient
from cnnjax.nn.geometry import Both, check_map, pair
from cnnjax.nn.lowering import uses_cpu_forms
from cnnjax.nn.resize import resize
from cnnjax.runtime.types import AnyArray

FILLS = (
    "zeros",
    "none",
    "reflect",
    "replicate",
    "circular",
    "partial",
    "mean",
    "random",
    "interpolate",
    "full",
    "one-sided",
    "symmetric",
)
# Fills of zeros, which a max-pool replaces by a border that never wins.
ZERO_FILLS = ("zeros", "partial", "full", "one-sided")
_NUMPY_MODES = {
    "reflect": "reflect",
    "symmetric": "symmetric",
    "replicate": "edge",
    "circular": "wrap",
}


def check_fill(fill: str, name: str = "fill") -> None:
    """Raises `ValueError` if `fill` is not one of `FILLS`.

    `name` is the argument that the error names: "padding" for a network.
    """
    if fill not in FILLS:
        raise ValueError(f"{name}={fill!r} is not one of {', '.join(FILLS)}")


def pad(
    x: Float[AnyArray, "batch height width channels"],
    amount: Both,
    fill: str,
    key: Key[Array, ""] | None = None,
) -> Float[AnyArray, "batch height_out width_out channels"]:
    """Pads maps with a fill.

    Args:
      x: [batch, height, width, channels].
      amount: rows and columns on each side, an integer or a (height, width) pair.
      fill: one of `FILLS`.
      key: source of the noise of 'random'.

    Returns [batch, height + 2 * rows, width + 2 * columns, channels]; `x` itself under 'none'.
    Raises `ValueError` if the fill is unknown, if `x` is not a floating-point array
    [batch, height, width, channels], if 'random' has no key, or if a map is too small for its own
    border to be mirrored or wrapped.
    """
    check_fill(fill)
    check_map(x)
    amount = pair(amount, "amount", 0)
    if fill == "none" or amount == (0, 0):
        return x
    if fill == "interpolate":
        height, width = amount
        return resize(x, (x.shape[1] + 2 * height, x.shape[2] + 2 * width))
    widths = ((0, 0), *border_widths(amount, fill), (0, 0))
    if fill == "mean":
        return _set_into(_mean(x), x, widths)
    if fill == "random":
        return _set_into(_noise(x, amount, key), x, widths)
    if fill in _NUMPY_MODES:
        _check_border(x, amount, fill)
        return jnp.pad(x, widths, mode=_NUMPY_MODES[fill])
    if fill in ZERO_FILLS:
        return pad_constant(x, widths, 0)
    raise ValueError(f"fill={fill!r} is in FILLS, but `pad` has no case for it")


def pad_constant(x: AnyArray, widths: Sequence[tuple[int, int]], value: float) -> Array:
    """Pads each axis by (low, high) with a constant; negative widths crop.

    `jnp.pad` would first make an array of the constant, which `jax_debug_infs` would report.
    """
    return jax.lax.pad(x, np.asarray(value, x.dtype), [(low, high, 0) for low, high in widths])


def border_widths(amount: tuple[int, int], fill: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the (low, high) rows and columns that a fill adds."""
    height, width = amount
    if fill == "one-sided":
        return (2 * height, 0), (2 * width, 0)
    return (height, height), (width, width)


def _set_into(frame: AnyArray, x: AnyArray, widths) -> Array:
    """Places `x` inside `frame`, a larger map or one value for each channel."""
    inside = jnp.pad(jnp.ones((1, *x.shape[1:3], 1), bool), widths)
    return jnp.where(inside, jnp.pad(x, widths), frame.astype(jnp.result_type(x)))


def _mean(x: AnyArray) -> Array:
    # NumPy's own mean sums bfloat16 in bfloat16.
    return jnp.mean(x, (1, 2), keepdims=True)


def _noise(x, amount, key) -> Array:
    """Draws noise of the padded size with each channel's mean and deviation."""
    if key is None:
        raise ValueError(
            "padding='random' draws noise: a network needs rngs={'padding': key} to be applied"
        )
    batch, height, width, channels = x.shape
    shape = (batch, height + 2 * amount[0], width + 2 * amount[1], channels)
    mean = _mean(x)
    variance = jnp.var(x, (1, 2), keepdims=True)
    # The derivative of a root is infinite at 0, the variance of a map of one pixel.
    is_constant = variance == 0
    deviation = jnp.where(is_constant, 0, jnp.sqrt(jnp.where(is_constant, 1, variance)))
    return mean + deviation * jax.random.normal(key, shape, mean.dtype)


def _check_border(x, amount, fill):
    """Raises `ValueError` if a map is too small for its own border.

    A mirrored border also needs a pixel beyond the border pixel.
    """
    for size, n in zip(x.shape[1:3], amount):
        least = {"reflect": n + 1, "symmetric": n, "circular": n, "replicate": 1}[fill]
        if size < least:
            raise ValueError(
                f"padding={fill!r} cannot pad a {x.shape[1]}x{x.shape[2]} map by "
                f"{amount[0]}x{amount[1]}: the image is too small for this network under this fill"
            )


def center(
    x: Float[AnyArray, "batch _ _ channels"], height: int, width: int
) -> Float[AnyArray, "batch {height} {width} channels"]:
    """Crops or zero-pads maps about their centers to a height and width.

    An odd remainder is cropped at the far side and padded at the near side.

    Args:
      x: [batch, rows, columns, channels].
      height: rows of the result.
      width: columns of the result.

    Returns [batch, height, width, channels].
    """
    for axis, size in ((1, height), (2, width)):
        excess = x.shape[axis] - size
        if excess > 0:
            x = jax.lax.slice_in_dim(x, excess // 2, excess // 2 + size, axis=axis)
        elif excess < 0:
            widths = [(0, 0)] * 4
            widths[axis] = ((-excess + 1) // 2, -excess // 2)
            x = jnp.pad(x, widths)
    return x


def align(
    branches: Sequence[Float[AnyArray, "batch _ _ _"]], fill: str
) -> list[Float[AnyArray, "batch height width _"]]:
    """Crops or zero-pads maps about their centers to one size.

    The size is that of the smallest map, or of the largest under 'full'.

    Args:
      branches: maps [batch, rows, columns, channels], whose sizes and channels may differ.
      fill: one of `FILLS`, the one under which the maps were computed.

    Returns the maps in the same order, each [batch, height, width, channels].
    """
    choose = max if fill == "full" else min
    height = choose(y.shape[1] for y in branches)
    width = choose(y.shape[2] for y in branches)
    return [center(y, height, width) for y in branches]


def concatenate(
    branches: Sequence[Float[AnyArray, "batch _ _ _"]], fill: str
) -> Float[Array, "batch height width channels"]:
    """Joins maps along their channels.

    `align` comes first, as sizes differ under 'none' and 'full'.

    Args:
      branches: as in `align`.
      fill: as in `align`.

    Returns [batch, height, width, channels], with the channels of all maps in their order.
    """
    joined = jnp.concatenate(align(branches, fill), axis=3)
    return materialize_gradient(joined) if uses_cpu_forms() else joined


def fit_to_branch(
    x: Float[AnyArray, "batch _ _ channels"],
    branch: Float[AnyArray, "batch _ _ _"],
    stride: int = 1,
) -> Float[AnyArray, "batch _ _ channels"]:
    """Fits a residual block's input to its branch, center on center.

    A 1x1 convolution of `stride` on the result has the size of the branch's map. The input is
    cropped where the branch has shrunk ('none') and zero-padded where it has grown ('full');
    otherwise it is returned unchanged.

    Args:
      x: the input, [batch, rows, columns, channels].
      branch: the branch's map, of which only height and width count.
      stride: the branch's stride.

    Returns [batch, rows', columns', channels].
    """
    height, width = ((size - 1) * stride + 1 for size in branch.shape[1:3])
    fits_rows = height <= x.shape[1] < height + stride
    fits_columns = width <= x.shape[2] < width + stride
    if fits_rows and fits_columns:
        return x
    return center(x, height, width)
