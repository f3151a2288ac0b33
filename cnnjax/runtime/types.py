"""What the shapes in annotations are said of: `Float[AnyArray, "batch height width channels"]`."""

from typing import Any

import jax
import numpy as np

AnyArray = np.ndarray | jax.Array  # on the host or on a device; traced ones are of the second kind
Leaf = Any  # of a tree: an array or a number, but its shape, or a mere mark, where jax rebuilds the tree of those
