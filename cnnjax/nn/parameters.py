"""Parameters of layers, cheap to trace."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.nn.lowering import lowering
from cnnjax.runtime.types import AnyArray

# Whether new parameters are zeros.
_SHAPES_ONLY = jax.make_user_context(False)


class ParameterShapeError(ValueError):
    """A parameter has another shape than the layer's input needs."""


def eval_shape(function: Callable, *arguments) -> Any:
    """Returns the shapes of a function's outputs, as `jax.eval_shape` does, in less time.

    The function is traced as plain lax calls and without the layers' initializers: their forms for
    the CPU and their random numbers change no shape, and are most of what there is to trace.
    """
    with lowering("reference"), _SHAPES_ONLY(True):
        return jax.eval_shape(function, *arguments)


def parameter(
    layer: nn.Module, name: str, initializer: Callable, shape: tuple[int, ...]
) -> AnyArray:
    """Returns a layer's float32 parameter, initializing it if it is new.

    The initializer is called as `initializer(key, shape, dtype)`. This is Flax's `param`, but
    quicker if the parameter exists: Flax traces the initializer at every call to learn the shape.

    Raises `ParameterShapeError` if the parameter has another shape.
    """
    if not layer.has_variable("params", name):
        if _SHAPES_ONLY.value:
            # Unlike `param`, this derives no key.
            return layer.variable("params", name, jnp.zeros, shape, jnp.float32).value
        return layer.param(name, initializer, shape, jnp.float32)
    value = nn.meta.unbox(layer.get_variable("params", name))
    if np.shape(value) != shape:
        path = "/".join((*layer.path, name))
        raise ParameterShapeError(
            f"the parameter {path} has the shape {np.shape(value)}, and this input needs {shape}: "
            "it has other channels or another size than the network was initialized with"
        )
    return value
