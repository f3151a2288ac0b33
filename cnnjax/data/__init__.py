"""Data sets: read whole into memory, or streamed."""

from typing import TYPE_CHECKING

from cnnjax.runtime import lazy

if TYPE_CHECKING:
    from cnnjax.data import arrays, splits

__all__ = ["arrays", "splits"]

__getattr__, __dir__ = lazy.attributes(__name__, {}, submodules=__all__)
