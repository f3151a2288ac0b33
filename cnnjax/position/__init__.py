"""The position study: how well position can be read from a network's features."""

from typing import TYPE_CHECKING

from cnnjax.runtime import lazy

if TYPE_CHECKING:
    from cnnjax.position import encoder, metrics, patterns, readout, results, targets

__all__ = ["encoder", "metrics", "patterns", "readout", "results", "targets"]

__getattr__, __dir__ = lazy.attributes(__name__, {}, submodules=__all__)
