"""Combinations of trained networks.

Ensembles average the networks' outputs; soups and Polyak averages average their parameters.
"""

from cnnjax.runtime import lazy

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
