"""Weights under torchvision's names, in safetensors files: no PyTorch, no pickle."""

from cnnjax.weights.torchvision import (
    fetch,
    load_torchvision,
    read,
    save_torchvision,
    torchvision_keys,
    variable_shapes,
)

__all__ = [
    "fetch",
    "load_torchvision",
    "read",
    "save_torchvision",
    "torchvision_keys",
    "variable_shapes",
]
