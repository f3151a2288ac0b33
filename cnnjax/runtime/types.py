"""Array types for shape annotations: `Float[AnyArray, "batch height width channels"]`."""

from typing import Any

import jax
import numpy as np

# On the host or on a device; a traced array is a `jax.Array`.
AnyArray = np.ndarray | jax.Array
# A leaf of a pytree: an array or a number. `Any`, since jax also builds these classes with shapes
# or placeholders as leaves.
Leaf = Any
