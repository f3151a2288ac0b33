"""Layers, windows and receptive fields of networks, found without computing.

Networks are traced on shapes alone, and what a value depends on is followed through the traced
operations. Nothing here knows a particular network.
"""

from cnnjax.inspect.fields import EVERYTHING, Field, receptive_field, receptive_fields
from cnnjax.inspect.layers import Layer, layers, totals
from cnnjax.inspect.trace import count_named
from cnnjax.inspect.windows import Window, windows

__all__ = [
    "EVERYTHING",
    "Field",
    "Layer",
    "Window",
    "count_named",
    "layers",
    "receptive_field",
    "receptive_fields",
    "totals",
    "windows",
]
