"""Convolutional networks in JAX and Flax, and studies of what padding does."""

from cnnjax.runtime import backend, lazy

__version__ = "0.1.0"

# Before jax starts: names that need jax are imported on first use.
backend.set_flags()

__getattr__, __dir__ = lazy.attributes(
    __name__,
    {"create_model": "models", "list_models": "models", "load_pretrained": "weights"},
    submodules=(
        "combine",
        "inspect",
        "models",
        "nn",
        "position",
        "summary",
        "transfer",
        "visualize",
        "weights",
    ),
)
