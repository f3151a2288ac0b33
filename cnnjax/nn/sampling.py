"""Sampling as a policy: how a strided convolution or pool gets its smaller map.

A convolution or pool of stride s is a dense one (stride 1) followed by taking every s-th position.
One word for a whole model says how the dense map is reduced:

    stride    every s-th position, as published: only these are computed
    blur      a binomial filter, 1 2 1 along each axis, then every s-th position (Zhang 2019,
              arXiv 1904.11486)
    blur5     the same with 1 4 6 4 1
    aps       adaptive polyphase sampling: for each image, the one of the s x s grids of every s-th
              position that has the largest norm (Chaman and Dokmanic 2021, arXiv 2011.14214)

As in the authors' code, a convolution is sampled after its activation, a max-pool is computed
densely, and under the filters an average pool is the filter alone. The small map has the size that
'stride' gives. Only under the fill 'none', which also drops the filter's border, is a filtered map
smaller, and with it a dense layer on a flattened map, such as LeNet's. No other parameters depend
on the policy.
"""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from cnnjax.nn.geometry import Both, check_map, pair
from cnnjax.nn.padding import center, pad
from cnnjax.runtime.types import AnyArray

# Lengths of the filters along each axis, in taps.
FILTERS = {"blur": 3, "blur5": 5}
SAMPLINGS = ("stride", *FILTERS, "aps")


def check_sampling(sampling: str) -> None:
    """Raises `ValueError` if `sampling` is not one of `SAMPLINGS`."""
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling={sampling!r} is not one of {', '.join(SAMPLINGS)}")


def conv_stride(stride: int, sampling: str) -> int:
    """Returns the stride of a convolution whose map goes through `sample`."""
    return stride if sampling == "stride" else 1


def sample(
    x: Float[AnyArray, "batch height width channels"],
    stride: Both,
    *,
    sampling: str,
    fill: str = "zeros",
    like: Float[AnyArray, "batch _ _ _"] | None = None,
) -> Float[AnyArray, "batch height_out width_out channels"]:
    """Samples a dense map.

    Under 'stride' it returns the map unchanged: its convolution was already strided.

    Args:
      x: [batch, height, width, channels].
      stride: an integer or a (height, width) pair.
      sampling: one of `SAMPLINGS`.
      fill: what the filters' border is filled with (`cnnjax.nn.padding`). Under 'partial' and
        'random' the weights inside the map are rescaled to a sum of 1.
      like: a dense map by which 'aps' chooses the grid and to whose size `x` is cut, for a skip
        that is added to that map.

    Returns [batch, height', width', channels]: the size divided by the stride and rounded up. A
    filter with fill='none' first takes its border, 2 or 4 positions, off the size.
    Raises `ValueError` if the policy is unknown, `x` is not a floating-point array
    [batch, height, width, channels], or the map is too small for the filter's border.
    """
    check_sampling(sampling)
    check_map(x)
    stride = pair(stride, "stride", 1)
    if sampling == "stride" or stride == (1, 1):
        return x
    if like is None:
        like = x
    else:
        # Sizes differ only under 'none' and 'full'.
        x = center(x, *like.shape[1:3])
    if sampling == "aps":
        return _choose_grid(x, like, stride)
    return _blur(x, stride, FILTERS[sampling], fill)


def _blur(x, stride, length, fill):
    """Filters the strided axes and computes only the positions that are kept."""
    weights = np.array([math.comb(length - 1, tap) for tap in range(length)]) / 2 ** (length - 1)
    amount = tuple(length // 2 if step > 1 else 0 for step in stride)
    fill = "partial" if fill == "random" else fill
    padded = pad(x, amount, fill)
    filtered = [size for size, step in zip(padded.shape[1:3], stride) if step > 1]
    if min(filtered) < length:
        raise ValueError(
            f"a filter of {length} taps with padding={fill!r} has no output on a "
            f"{x.shape[1]}x{x.shape[2]} map: the image is too small for this network"
        )
    y = padded
    for axis, step in enumerate(stride, 1):
        if step > 1:
            y = _filter(y, weights, step, axis)
            if fill == "partial":
                # The sum of the filter's weights that lie inside the map, for each position.
                sums = np.convolve(np.ones(x.shape[axis]), weights)
                inside = sums[length // 2 : length // 2 + x.shape[axis]]
                # Followed by axes of length 1, it broadcasts along `axis` of the map.
                later_axes = [1] * (3 - axis)
                y /= jnp.asarray(inside[::step], y.dtype).reshape(-1, *later_axes)
    return y


def _filter(x, weights, step, axis):
    """Sums shifted views: a filter shared by all channels needs no convolution."""
    reach = x.shape[axis] - len(weights) + 1
    views = [
        float(weight) * lax.slice_in_dim(x, tap, tap + reach, step, axis)
        for tap, weight in enumerate(weights)
    ]
    return sum(views[1:], views[0])


def _choose_grid(x, like, stride):
    """Keeps, for each image, the grid on which `like` has the largest norm.

    Of equal norms, the first grid is kept.
    """
    energies = [
        jnp.square(grid.astype(jnp.float32)).sum((1, 2, 3)) for grid in _grids(like, stride)
    ]
    chosen = jnp.stack(energies).argmax(0)[:, None, None, None]
    first, *others = _grids(x, stride)
    y = first
    for number, grid in enumerate(others, 1):
        y = jnp.where(chosen == number, grid, y)
    return y


def _grids(x: AnyArray, stride: tuple[int, int]) -> Iterator[AnyArray]:
    """Yields the polyphase components, row by row, all of one size.

    As in the authors' code, a map that the stride does not divide is followed by its first rows.
    """
    missing = [(0, -size % step) for size, step in zip(x.shape[1:3], stride)]
    if any(count for _, count in missing):
        x = jnp.pad(x, ((0, 0), *missing, (0, 0)), mode="wrap")
    for row, column in np.ndindex(*stride):
        yield x[:, row :: stride[0], column :: stride[1]]
