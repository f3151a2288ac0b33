"""Attributes of a package that are imported at their first use.

JAX takes seconds to import. Modules that need it are imported late, so that --help is fast.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any


def attributes(
    package: str, modules: dict[str, str], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Builds the `__getattr__` and the `__dir__` of a package.

    Args:
      package: the name of the package.
      modules: for each attribute, the module that defines it.
      submodules: modules of the package that are attributes themselves; names that are in
        `modules`, too, are passed over.
    """

    def get_attribute(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def list_attributes() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules, *submodules})

    return get_attribute, list_attributes
