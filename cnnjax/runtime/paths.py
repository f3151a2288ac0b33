"""Paths as users write them."""

import os
import pathlib


def expand_user(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path in which "~" at the start is the home folder.

    `pathlib.Path.expanduser` raises `RuntimeError` for "~photo.jpg", which could be the home folder
    of a user photo.jpg; os.path leaves such names as they are.
    """
    return pathlib.Path(os.path.expanduser(path))
