"""Parameters of layers, cheap to trace."""

from collections.abc import Callable

import flax.errors
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from cnnjax.runtime.types import AnyArray


def parameter(
    layer: nn.Module, name: str, initializer: Callable, shape: tuple[int, ...]
) -> AnyArray:
    """Returns a layer's float32 parameter, initializing it if it is new.

    The initializer is called as `initializer(key, shape, dtype)`. This is Flax's `param`, but
    quicker if the parameter exists: Flax traces the initializer at every call to learn the shape.

    Raises `flax.errors.ScopeParamShapeError` if the parameter has another shape, as Flax does.
    """
    if not layer.has_variable("params", name):
        return layer.param(name, initializer, shape, jnp.float32)
    value = nn.meta.unbox(layer.get_variable("params", name))
    if np.shape(value) != shape:
        path = "/" + "/".join(layer.path)
        raise flax.errors.ScopeParamShapeError(name, path, np.shape(value), shape)
    return value
