"""Convolutional networks in JAX and Flax, and the studies that lectures on them report."""

from cnnjax.runtime import backend

__version__ = "0.1.0"

backend.set_flags()  # before jax starts; everything that needs jax is imported only when asked for


def __getattr__(name: str):
    if name in ("create_model", "list_models"):
        from cnnjax import models

        return getattr(models, name)
    if name == "load_pretrained":
        from cnnjax import weights

        return weights.load_pretrained
    raise AttributeError(f"module 'cnnjax' has no attribute {name!r}")
