"""Convolutional networks in JAX and Flax, and the studies that lectures on them report."""

from cnnjax.runtime import backend, lazy

__version__ = "0.1.0"

# Before jax starts: what needs jax is imported when it is asked for.
backend.set_flags()

__getattr__ = lazy.attributes(
    __name__,
    {"create_model": "models", "list_models": "models", "load_pretrained": "weights"},
)
