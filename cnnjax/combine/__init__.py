"""Combinations of trained networks.

Ensembles average the networks' outputs; soups and Polyak averages average their parameters.
"""

from typing import TYPE_CHECKING

from cnnjax.runtime import lazy

if TYPE_CHECKING:
    from cnnjax.combine.__main__ import main
    from cnnjax.combine.averages import average, ensemble_logits, greedy, learned
    from cnnjax.combine.combination import run
    from cnnjax.combine.methods import METHODS
    from cnnjax.combine.networks import member_logits, reestimate_statistics

__all__ = [
    "METHODS",
    "average",
    "ensemble_logits",
    "greedy",
    "learned",
    "main",
    "member_logits",
    "reestimate_statistics",
    "run",
]

__getattr__, __dir__ = lazy.attributes(
    __name__,
    {
        "METHODS": "methods",
        "average": "averages",
        "ensemble_logits": "averages",
        "greedy": "averages",
        "learned": "averages",
        "main": "__main__",
        "member_logits": "networks",
        "reestimate_statistics": "networks",
        "run": "combination",
    },
)
