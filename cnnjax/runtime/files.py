"""Files that are whole or absent, in the formats of a work directory."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cnnjax.runtime import processes


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary name for a file, which becomes `path` when the context ends.

    So the file is whole or absent, also after a power failure. After an error it is removed.
    """
    # A name of its own for every call: several processes may write one file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        # Otherwise, after a power failure, the name could be on the disk without the content.
        sync(partial)
        partial.replace(path)
        # Not every file system can sync a folder.
        with contextlib.suppress(OSError):
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def sync(path: pathlib.Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Not every file system can do this.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file that is whole or absent (`replacing`).

    Of several processes that compute together, only the first one writes.
    """
    if not processes.writes():
        return
    if isinstance(content, str):
        # A file's name may hold bytes that are not UTF-8.
        content = content.encode("utf-8", "backslashreplace")
    with naming(path), replacing(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Adds a path to an `OSError`; that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_json(path: pathlib.Path, value, default: Callable[[Any], Any] | None = None) -> None:
    """Writes a value as JSON.

    Args:
        path: the file.
        value: a JSON value, in which `default` may convert what JSON cannot hold.
        default: as that of `json.dumps`.

    Raises:
        FloatingPointError: for a NaN or an infinity, since JSON has neither.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False, default=default)
    except ValueError as error:
        raise FloatingPointError(
            f"{path}: a number is not finite, so nothing is written ({error})"
        ) from error
    write(path, text + "\n")


def write_arrays(path: pathlib.Path, arrays: dict, compress: bool = True) -> None:
    """Writes named arrays as an npz file, which holds a checksum of each."""
    # Imported when needed: every --help imports this module.
    import numpy as np

    buffer = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(buffer, allow_pickle=False, **arrays)
    write(path, buffer.getvalue())


@contextlib.contextmanager
def open_arrays(path: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    """Opens an npz file, whose arrays are read in the context, by their names.

    Raises:
        ValueError: with the file's name, if it is damaged or lacks an array.
    """
    # Imported when needed: every --help imports this module.
    import numpy as np

    try:
        # Opened here, since np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file) as archive:
            yield archive
    except KeyError as error:
        raise ValueError(
            f"{path} lacks an array ({error.args[0]}); remove it, and the same command computes it "
            "again"
        ) from error
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged: remove it, and the same command computes it again"
        ) from error


def read_json(path: pathlib.Path, **options):
    """Reads a JSON file.

    Raises:
        ValueError: with the file's name, if it is not JSON.
    """
    try:
        return json.loads(path.read_bytes(), **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({str(error)[:200]})") from error


def read_or_compute(path: pathlib.Path, compute: Callable, *arguments):
    """Reads a result from its JSON file, or computes it and writes the file."""
    if not path.exists():
        result = compute(*arguments)
        path.parent.mkdir(exist_ok=True)
        write_json(path, result)
    return read_json(path)


def write_figure(path: pathlib.Path, figure) -> None:
    """Writes a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    write(path, buffer.getvalue())


def file_label(name: str) -> str:
    """Turns a network's name into part of a file name: FILE.py:NAME loses its folders.

    Eight characters of a digest tell it from networks of the same name in other folders.
    """
    if "/" not in name:
        return name
    base = name.rpartition("/")[2]
    suffix = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{base}-{suffix}"


def digest(value: Any) -> str:
    """Hashes what JSON holds into eight characters."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
