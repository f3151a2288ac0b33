"""Resizing of feature maps."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cnnjax.nn.geometry import Both, pair
from cnnjax.runtime.types import AnyArray


def resize(
    x: Float[AnyArray, "batch height width channels"], size: Both
) -> Float[AnyArray, "batch height_out width_out channels"]:
    """Resizes maps bilinearly with corners aligned, as PyTorch's align_corners=True does.

    Corner pixels keep their places, and a constant map stays constant to the last bit.
    """
    for axis, out in zip((1, 2), pair(size, "size", 1)):
        last = x.shape[axis] - 1
        position = np.linspace(0, last, out)
        low = np.minimum(position.astype(int), max(last - 1, 0))
        fraction = jnp.asarray(position - low, x.dtype)
        fraction = jnp.expand_dims(fraction, [other for other in range(4) if other != axis])
        first = jnp.take(x, low, axis)
        second = jnp.take(x, np.minimum(low + 1, last), axis)
        x = first + fraction * (second - first)
    return x
