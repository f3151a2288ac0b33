"""Array types for shape annotations: `Float[AnyArray, "batch height width channels"]`."""

from typing import Any

import jax
import numpy as np

# On the host or on a device; a traced array is a `jax.Array`.
AnyArray = np.ndarray | jax.Array
# An array or a number of a tree; a shape or a marker where jax rebuilds the tree of those.
Leaf = Any
