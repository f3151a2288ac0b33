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
    """Returns a float32 parameter of a layer, drawn by `initializer(key, shape, dtype)` if new.

    As Flax's `param`, but quicker if the parameter exists: to know its shape, Flax traces the
    initializer at every call. Raises `flax.errors.ScopeParamShapeError` for one of
    another shape, as Flax does.
    """
    if not layer.has_variable("params", name):
        return layer.param(name, initializer, shape, jnp.float32)
    value = nn.meta.unbox(layer.get_variable("params", name))
    if np.shape(value) != shape:
        path = "/" + "/".join(layer.path)
        raise flax.errors.ScopeParamShapeError(name, path, np.shape(value), shape)
    return value
