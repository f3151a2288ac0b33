"""Layers, windows and receptive fields of networks, found without computing.

Networks are traced on shapes alone, and what a value depends on is followed through the traced
operations. Nothing here knows a particular network.
"""

from cnnjax.inspect.fields import (
    Field,
    Unlocated,
    check_stages,
    located,
    receptive_field,
    receptive_fields,
    stage_names,
)
from cnnjax.inspect.layers import Layer, layers, totals
from cnnjax.inspect.windows import Window, windows

__all__ = [
    "Field",
    "Layer",
    "Unlocated",
    "Window",
    "check_stages",
    "layers",
    "located",
    "receptive_field",
    "receptive_fields",
    "stage_names",
    "totals",
    "windows",
]
