"""Paths as users write them, and those of installed packages."""

import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Sequence

# The number of folders in which a moved file is looked for by its bare name: those of a run, of its
# sweep, of the runs and of their project.
_BARE_NAME_FOLDERS = 4


def expand_user(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path in which "~" at the start is the home folder.

    `pathlib.Path.expanduser` raises `RuntimeError` for "~photo.jpg", which could be the home folder
    of a user photo.jpg; os.path leaves such names as they are.
    """
    return pathlib.Path(os.path.expanduser(path))


def sha256(path: pathlib.Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_moved(
    path: pathlib.Path, near: Sequence[pathlib.Path], elsewhere: pathlib.Path
) -> pathlib.Path | None:
    """Finds a file whose folder has been moved or renamed since its path was recorded.

    Of /old/project/nets/mine.py, the ends old/project/nets/mine.py, project/nets/mine.py and
    nets/mine.py are looked for, the longest first, in each folder. The bare name mine.py is looked
    for in the first four near folders only: elsewhere, it may well be another file's.

    Args:
        path: the recorded path.
        near: folders to search, the nearest first.
        elsewhere: a folder to search last.

    Returns:
        The new path; None if there is no such file.
    """
    bare_name_start = len(path.parts) - 1
    for start in range(1, len(path.parts)):
        folders = [*near, elsewhere]
        if start == bare_name_start:
            folders = list(near[:_BARE_NAME_FOLDERS])
        for folder in folders:
            # Spelled as in configurations (`models.base.name_with_file`).
            candidate = os.path.abspath(folder.joinpath(*path.parts[start:]))
            # `pathlib.Path.is_file` raises `PermissionError` in folders that cannot be read.
            if os.path.isfile(candidate):
                return pathlib.Path(candidate)
    return None


def package_folder(name: str) -> pathlib.Path:
    """Returns the folder of an installed package without importing it.

    scikit-learn takes a second to import, which a file of its data does not need.

    Raises `ModuleNotFoundError` if the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return pathlib.Path(spec.origin).parent
