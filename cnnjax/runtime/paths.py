"""Paths as users write them, and those of installed packages."""

import importlib.util
import os
import pathlib


def expand_user(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path in which "~" at the start is the home folder.

    `pathlib.Path.expanduser` raises `RuntimeError` for "~photo.jpg", which could be the home folder
    of a user photo.jpg; os.path leaves such names as they are.
    """
    return pathlib.Path(os.path.expanduser(path))


def package_folder(name: str) -> pathlib.Path:
    """Returns the folder of an installed package without importing it.

    scikit-learn takes a second to import, which a file of its data does not need.

    Raises `ModuleNotFoundError` if the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return pathlib.Path(spec.origin).parent
