"""Parameters of layers, cheap to trace."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from cnnjax.runtime.types import AnyArray


class ParameterShapeError(ValueError):
    """A parameter has another shape than the layer's input needs."""


def parameter(
    layer: nn.Module, name: str, initializer: Callable, shape: tuple[int, ...]
) -> AnyArray:
    """Returns a layer's float32 parameter, initializing it if it is new.

    The initializer is called as `initializer(key, shape, dtype)`. This is Flax's `param`, but
    quicker if the parameter exists: Flax traces the initializer at every call to learn the shape.

    Raises `ParameterShapeError` if the parameter has another shape.
    """
    if not layer.has_variable("params", name):
        return layer.param(name, initializer, shape, jnp.float32)
    value = nn.meta.unbox(layer.get_variable("params", name))
    if np.shape(value) != shape:
        path = "/".join((*layer.path, name))
        raise ParameterShapeError(
            f"the parameter {path} has the shape {np.shape(value)}, and this input needs {shape}: "
            "it has other channels or another size than the network was initialized with"
        )
    return value
