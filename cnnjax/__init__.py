"""Convolutional networks in JAX and Flax, and studies of what padding does."""

from typing import TYPE_CHECKING

from cnnjax.runtime import backend, lazy

# For editors and type checkers: `lazy.attributes` imports these names at their first use.
if TYPE_CHECKING:
    from cnnjax import (
        combine,
        data,
        inspect,
        models,
        nn,
        position,
        study,
        summary,
        train,
        transfer,
        visualize,
        weights,
    )
    from cnnjax.models import create_model, list_models
    from cnnjax.weights import load_pretrained

__version__ = "0.1.0"

__all__ = [
    "combine",
    "create_model",
    "data",
    "inspect",
    "list_models",
    "load_pretrained",
    "models",
    "nn",
    "position",
    "study",
    "summary",
    "train",
    "transfer",
    "visualize",
    "weights",
]

# Before jax starts: names that need jax are imported on first use.
backend.set_flags()

__getattr__, __dir__ = lazy.attributes(
    __name__,
    {"create_model": "models", "list_models": "models", "load_pretrained": "weights"},
    submodules=__all__,
)
