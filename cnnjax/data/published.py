"""Published files of data sets: found or downloaded, checked by their hashes, and decoded."""

import contextlib
import gzip
import hashlib
import logging
import math
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import pooch

from cnnjax.data.splits import Split
from cnnjax.runtime.errors import one_line

# ------------------------------------------------------------------ files: found or downloaded


class File(NamedTuple):
    """A published file."""

    name: str
    urls: tuple[str, ...]
    md5: str


def _first_cause(error: BaseException) -> str:
    """Describes an exception's first cause in one line.

    The exceptions that libraries make of it are longer and say less.
    """
    while error.__context__:
        error = error.__context__
    return one_line(error)


def download(file: File, folder: pathlib.Path) -> pathlib.Path:
    """Downloads a file into a folder.

    Raises:
      ValueError: if it could not be downloaded from any address; no folder is left behind then.
    """
    pooch.get_logger().setLevel(logging.ERROR)
    is_watched = sys.stderr is not None and sys.stderr.isatty()
    downloader = pooch.HTTPDownloader(progressbar=is_watched, timeout=30)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    known_hash = f"md5:{file.md5}"
    failures = []
    for url in file.urls:
        try:
            path = pooch.retrieve(url, known_hash, file.name, folder, downloader=downloader)
            return pathlib.Path(path)
        # The errors of requests, which pooch downloads with, are `OSError`s.
        except (ValueError, OSError) as error:
            failures.append(f"{url}: {_first_cause(error)}")
    with contextlib.suppress(OSError):
        for path in new_folders:
            path.rmdir()
    raise ValueError(
        f"{file.name} is not in {folder} and could not be downloaded ({'; '.join(failures)}); "
        "put it there by hand, or name the folder that has it with data_dir"
    )


def check_hash(path: pathlib.Path, file: File) -> None:
    """Raises `ValueError` if a file, not yet decompressed, is not the published one."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "md5").hexdigest()
    if digest != file.md5:
        raise ValueError(
            f"{path} has the MD5 hash {digest}, and the published file has {file.md5}: it is "
            "damaged or another file; remove or rename it"
        )


def read(path: pathlib.Path, file: File, limit: int) -> bytes:
    """Reads a published file, compressed or not, up to one byte beyond `limit`."""
    if path.suffix != ".gz":
        return read_start(path, limit)
    check_hash(path, file)
    with gzip.open(path) as stream:
        return stream.read(limit + 1)


def read_start(path: pathlib.Path, limit: int) -> bytes:
    """Reads a file up to one byte beyond `limit`, which shows that it is too long."""
    with path.open("rb") as stream:
        return stream.read(limit + 1)


# ------------------------------------------------------------------ formats: bytes -> arrays


def read_idx(data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an IDX file of unsigned bytes (LeCun, yann.lecun.com/exdb/mnist).

    Args:
      data: the file's bytes.
      name: the file's name, for errors.
      shape: the array's expected shape.

    Returns:
      uint8 of `shape`.

    Raises:
      ValueError: for any other content.
    """
    header = bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape)
    start = data[: len(header)]
    if start != header:
        raise ValueError(
            f"{name} begins with {start.hex()}; the IDX header of unsigned bytes {list(shape)} is "
            f"{header.hex()}"
        )
    return _as_array(data[len(header) :], name, shape)


def _as_array(data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Views bytes as uint8 of a shape; raises `ValueError` if there are more or fewer."""
    if len(data) != math.prod(shape):
        raise ValueError(
            f"{name} holds {len(data):,} bytes of data where {list(shape)} are "
            f"{math.prod(shape):,}: it is truncated or of another kind"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def from_planes(pixels: np.ndarray) -> np.ndarray:
    """Turns CIFAR's rows of 3072 bytes (red, green, then blue) into [n, 32, 32, 3]."""
    planes = pixels.reshape(-1, 3, 1024)
    images = np.empty((len(planes), 1024, 3), np.uint8)
    # A plane at a time, which is faster than NumPy's copy of the transposed array.
    for color in range(3):
        images[:, :, color] = planes[:, color]
    return images.reshape(-1, 32, 32, 3)


def read_cifar_binary(data: bytes, name: str, count: int, label_bytes: int = 1) -> Split:
    """Reads a batch in CIFAR's binary layout.

    Args:
      data: the file's bytes.
      name: the file's name, for errors.
      count: the expected number of images.
      label_bytes: how many labels each image has; the last of them is read, which is the fine
        label of CIFAR-100's two.

    Raises:
      ValueError: for a file of another length.
    """
    rows = _as_array(data, name, (count, label_bytes + 3072))
    labels = rows[:, label_bytes - 1].astype(np.int32)
    return Split(from_planes(rows[:, label_bytes:]), labels)
