"""Resizing of feature maps."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cnnjax.nn.geometry import Both, pair
from cnnjax.runtime.types import AnyArray


def resize(
    x: Float[AnyArray, "batch height width channels"], size: Both
) -> Float[AnyArray, "batch height_out width_out channels"]:
    """Bilinear resizing of `x` with corners aligned, PyTorch's align_corners=True.

    Corner pixels keep their places, and a constant map stays constant to the last bit.
    """
    for axis, out in zip((1, 2), pair(size, "size", 1)):
        at = np.linspace(0, x.shape[axis] - 1, out)
        low = np.minimum(at.astype(int), max(x.shape[axis] - 2, 0))
        fraction = jnp.asarray((at - low).reshape(-1, *(1,) * (3 - axis)), x.dtype)
        first = jnp.take(x, low, axis)
        x = first + fraction * (jnp.take(x, np.minimum(low + 1, x.shape[axis] - 1), axis) - first)
    return x
