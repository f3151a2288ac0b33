"""Resizing of feature maps."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Real

from cnnjax.nn.geometry import Both, check_map, pair
from cnnjax.runtime.types import AnyArray


def resize(
    x: Float[AnyArray, "batch height width channels"], size: Both, align_corners: bool = True
) -> Float[AnyArray, "batch height_out width_out channels"]:
    """Resizes maps bilinearly, as PyTorch's interpolate does without antialiasing.

    A constant map stays constant to the last bit.

    Args:
      x: [batch, height, width, channels].
      size: an integer or a (height, width) pair.
      align_corners: True aligns the centers of the corner pixels, False the outer edges, as in
        PyTorch.

    Returns [batch, *size, channels].
    Raises `ValueError` if `x` is not a floating-point array [batch, height, width, channels], or
    `size` is not positive.
    """
    check_map(x)
    for axis, out in zip((1, 2), pair(size, "size", 1)):
        last = x.shape[axis] - 1
        if align_corners:
            position = np.linspace(0, last, out)
        else:
            position = (np.arange(out) + 0.5) * x.shape[axis] / out - 0.5
            position = position.clip(0, last)
        low = np.minimum(position.astype(int), max(last - 1, 0))
        fraction = jnp.asarray(position - low, jnp.result_type(x))
        fraction = jnp.expand_dims(fraction, [other for other in range(4) if other != axis])
        first = jnp.take(x, low, axis)
        second = jnp.take(x, np.minimum(low + 1, last), axis)
        x = first + fraction * (second - first)
    return x


def linear_interpolation(
    to: Real[np.ndarray, " to"], known: Real[np.ndarray, " known"]
) -> Float[np.ndarray, "to known"]:
    """Returns the matrix of linear interpolation along one axis, [to, known].

    Beyond the first and the last known position, the nearest one counts.

    Args:
      to: positions to interpolate at.
      known: positions of the known values, in ascending order.
    """
    return np.stack([np.interp(to, known, unit) for unit in np.eye(len(known))], 1)
