"""Combinations of trained networks.

Ensembles average what networks answer; soups and Polyak averages average their parameters.
"""

import importlib

# What needs JAX is imported when it is asked for, so that the command's --help is there at once.
_MODULES = {
    "METHODS": "methods",
    "average": "averages",
    "ensemble_logits": "averages",
    "greedy": "averages",
    "learned": "averages",
    "main": "__main__",
    "member_logits": "networks",
    "reestimate_statistics": "networks",
    "run": "combination",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
