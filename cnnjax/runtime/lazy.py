"""Attributes of a package that are imported when they are asked for.

JAX takes seconds to import. What needs it is imported late, so that --help is there at once.
"""

import importlib
from collections.abc import Callable
from typing import Any


def attributes(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """Build the `__getattr__` of a package.

    Args:
      package: the name of the package.
      modules: by attribute, the module of the package that has it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return get
