"""Padding as a policy: *how much* is explicit and symmetric, *with what* is one word that reaches a whole model.

The fills, shown on the row 1234 with an amount of 2:

    zeros          00 1234 00
    none              1234         nothing is padded anywhere, whatever the amount: maps shrink
    reflect        32 1234 32      mirrored about the border pixel
    replicate      11 1234 44      the border pixel repeated
    circular       34 1234 12      wrapped around
    partial        00 1234 00      zeros, and a convolution is rescaled by (kernel cells / cells inside the image): partial
                                   convolution, Liu et al. 2018 (arXiv 1811.11718)
    mean           mm 1234 mm      each channel's mean over the map, here 2.5
    random         rr 1234 rr      noise of each channel's mean and deviation over the map, drawn anew for every call
    interpolate  1 1.4 1.9 ... 4   no border: the map is stretched to the padded size (Islam et al. 2021, arXiv 2101.12322)
    full           00 1234 00      zeros, for a convolution always as many as bring every weight to every pixel, d(k - 1) on each
                                   side: maps grow (F-Conv, Kayhan and van Gemert 2020, arXiv 2003.07064)
    one-sided    0000 1234         the zeros of both sides above and to the left

But for 'none' and 'full' the amount does not depend on the fill (no 'SAME'): the sampling grid of a strided network is the
same under all of them, and a comparison of fills is a comparison of nothing else.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

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
)
_NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def check_fill(fill: str) -> str:
    """Returns `fill`; raises `ValueError` if it is not one of `FILLS`."""
    if fill not in FILLS:
        raise ValueError(f"padding={fill!r} is not one of {', '.join(FILLS)}")
    return fill


def _framed(x: AnyArray, widths, frame: AnyArray) -> Array:
    """`x` inside a larger map `frame`."""
    inside = jnp.pad(jnp.ones((1, *x.shape[1:3], 1), bool), widths)
    return jnp.where(inside, jnp.pad(x, widths), frame.astype(x.dtype))


def pad(
    x: Float[AnyArray, "batch height width channels"],
    amount: tuple[int, int],
    fill: str,
    value: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[AnyArray, "batch height_out width_out channels"]:
    """Pads `x` by `amount` (rows on each side, columns on each side).

    `value` is what fills of zeros fill with (-inf before a max-pool), `key` what 'random' draws from. Raises `ValueError` for
    an unknown fill, for 'random' without a key, and where a map is too small for its own border to be mirrored or wrapped.
    """
    check_fill(fill)
    if fill == "none" or amount == (0, 0):
        return x
    widths = ((0, 0), (amount[0],) * 2, (amount[1],) * 2, (0, 0))
    if fill == "interpolate":
        return resize(x, (x.shape[1] + 2 * amount[0], x.shape[2] + 2 * amount[1]))
    if fill in ("mean", "random"):
        mean = x.mean((1, 2), keepdims=True)
        if fill == "mean":
            return _framed(x, widths, mean)
        if key is None:
            raise ValueError(
                "padding='random' draws noise: a network needs rngs={'padding': key} to be applied"
            )
        shape = (len(x), x.shape[1] + 2 * amount[0], x.shape[2] + 2 * amount[1], x.shape[3])
        return _framed(
            x, widths, mean + x.std((1, 2), keepdims=True) * jax.random.normal(key, shape, x.dtype)
        )
    if fill == "one-sided":
        widths = ((0, 0), (2 * amount[0], 0), (2 * amount[1], 0), (0, 0))
    if fill not in _NUMPY_MODES:
        return jnp.pad(x, widths, constant_values=jnp.asarray(value, x.dtype))
    least = {"reflect": 1, "replicate": 1 - max(amount), "circular": 0}[fill]
    if min(size - n for size, n in zip(x.shape[1:3], amount)) < least:
        raise ValueError(
            f"padding={fill!r} cannot pad a {x.shape[1]}x{x.shape[2]} map by {amount[0]}x{amount[1]}: "
            "the image is too small for this network under this fill"
        )
    return jnp.pad(x, widths, mode=_NUMPY_MODES[fill])


def center(
    x: Float[AnyArray, "batch _ _ channels"], height: int, width: int
) -> Float[AnyArray, "batch {height} {width} channels"]:
    """Crops `x` about its center, or sets it into zeros, until it has this size."""
    for axis, size in ((1, height), (2, width)):
        less = x.shape[axis] - size
        if less >= 0:
            x = jax.lax.slice_in_dim(x, less // 2, less // 2 + size, axis=axis)
        else:
            x = jnp.pad(
                x, [((-less + 1) // 2, -less // 2) if at == axis else (0, 0) for at in range(4)]
            )
    return x


def align(
    branches: Sequence[Float[AnyArray, "batch _ _ _"]], fill: str
) -> list[Float[AnyArray, "batch height width _"]]:
    """Brings maps to one size about their centers: the smallest where nothing is padded, the largest, in zeros, under 'full'."""
    choose = max if fill == "full" else min
    height, width = (choose(y.shape[axis] for y in branches) for axis in (1, 2))
    return [center(y, height, width) for y in branches]


def concatenate(
    branches: Sequence[Float[AnyArray, "batch _ _ _"]], fill: str
) -> Float[Array, "batch height width channels"]:
    """Joins maps along their channels, brought to one size first, as they differ under 'none' and 'full'."""
    return jnp.concatenate(align(branches, fill), axis=3)


def fit_to_branch(
    x: Float[AnyArray, "batch _ _ channels"],
    branch: Float[AnyArray, "batch _ _ _"],
    stride: int = 1,
) -> Float[AnyArray, "batch _ _ channels"]:
    """Fits a residual block's input so that a 1x1 convolution of `stride` on it lands on the branch's map, center on center.

    It is cropped under 'none' and set into zeros under 'full'; with any other fill this changes nothing that the strided
    convolution reads.
    """
    height, width = ((size - 1) * stride + 1 for size in branch.shape[1:3])
    if all(size <= has < size + stride for size, has in zip((height, width), x.shape[1:3])):
        return x
    return center(x, height, width)
