"""Padding as a policy: *how much* is explicit and symmetric, *with what* is one word that reaches a whole model.

The fills, shown on the row 1234 with an amount of 2:

    zeros      00 1234 00
    none          1234       nothing is padded anywhere, whatever the amount: maps shrink
    reflect    32 1234 32    mirrored about the border pixel
    replicate  11 1234 44    the border pixel repeated
    circular   34 1234 12    wrapped around
    partial    00 1234 00    zeros, and a convolution is rescaled by (kernel cells / cells inside the image): partial
                             convolution, Liu et al. 2018 (arXiv 1811.11718)

Because the amount never depends on the fill (no 'SAME'), the sampling grid of a strided network is the same under all
fills that pad, and a comparison of fills is a comparison of nothing else.
"""
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

FILLS = ("zeros", "none", "reflect", "replicate", "circular", "partial")
_NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def check_fill(fill: str) -> str:
    """Returns `fill`; raises `ValueError` if it is not one of `FILLS`."""
    if fill not in FILLS:
        raise ValueError(f"padding={fill!r} is not one of {', '.join(FILLS)}")
    return fill


def pair(value: int | tuple[int, int], name: str, least: int) -> tuple[int, int]:
    """A (height, width) pair from an integer or a pair; raises `ValueError` below `least`."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or any(not isinstance(v, (int, np.integer)) or v < least for v in both):
        raise ValueError(f"{name}={value!r} is not an integer, or a pair of integers, of at least {least}")
    return both


def pad(x: jnp.ndarray, amount: tuple[int, int], fill: str, value: float = 0.0) -> jnp.ndarray:
    """Pads `x` [batch, height, width, channels] by `amount` (rows on each side, columns on each side).

    `value` is what 'zeros' and 'partial' fill with (-inf before a max-pool). Raises `ValueError` for an unknown fill, and
    where a map is too small for its own border to be mirrored or wrapped.
    """
    check_fill(fill)
    if fill == "none" or amount == (0, 0):
        return x
    widths = ((0, 0), (amount[0],) * 2, (amount[1],) * 2, (0, 0))
    if fill not in _NUMPY_MODES:
        return jnp.pad(x, widths, constant_values=jnp.asarray(value, x.dtype))
    least = {"reflect": 1, "replicate": 1 - max(amount), "circular": 0}[fill]
    if min(size - n for size, n in zip(x.shape[1:3], amount)) < least:
        raise ValueError(f"padding={fill!r} cannot pad a {x.shape[1]}x{x.shape[2]} map by {amount[0]}x{amount[1]}: "
                         "the image is too small for this network under this fill")
    return jnp.pad(x, widths, mode=_NUMPY_MODES[fill])


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """The number of output positions along one axis: floor((n + 2p - d(k - 1) - 1) / s) + 1."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def valid_counts(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> np.ndarray:
    """How many of a window's `kernel` taps lie inside the image, for each output position along one axis."""
    starts = np.arange(output_size(size, kernel, stride, padding, dilation)) * stride - padding
    taps = starts[:, None] + np.arange(kernel) * dilation
    return ((taps >= 0) & (taps < size)).sum(1)


def center_crop(x: jnp.ndarray, height: int, width: int) -> jnp.ndarray:
    """Crops `x` [batch, height, width, channels] about its centre; raises `ValueError` if it is smaller than asked."""
    top, left = x.shape[1] - height, x.shape[2] - width
    if top < 0 or left < 0:
        raise ValueError(f"a {x.shape[1]}x{x.shape[2]} map cannot be cropped to {height}x{width}")
    return x[:, top // 2:top // 2 + height, left // 2:left // 2 + width]


def concatenate(branches: Sequence[jnp.ndarray]) -> jnp.ndarray:
    """Joins maps along their channels, each cropped about its centre to the smallest, as they differ where nothing is padded."""
    height, width = (min(y.shape[axis] for y in branches) for axis in (1, 2))
    return jnp.concatenate([center_crop(y, height, width) for y in branches], axis=3)


def crop_to_branch(x: jnp.ndarray, branch: jnp.ndarray, stride: int = 1) -> jnp.ndarray:
    """Crops a residual block's input so that a 1x1 convolution of `stride` on it lands on the branch's map, centre on centre.

    With any fill but 'none' this changes nothing that the strided convolution reads.
    """
    height, width = ((size - 1) * stride + 1 for size in branch.shape[1:3])
    if x.shape[1] < height + stride and x.shape[2] < width + stride:
        return x
    return center_crop(x, height, width)
