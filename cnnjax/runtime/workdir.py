"""A work directory: the record of one run, in which every file is whole or absent."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import platform
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator

from cnnjax.runtime import backend

_MANIFEST = "manifest.json"
_SEALED = (
    ".json",
    ".jsonl",
    ".npz",
    ".safetensors",
)  # reports and figures are written anew from these
_RENEWED, _EXPIRES = (
    15.0,
    120.0,
)  # seconds: how often a claim is renewed, and after how long without it is void


class Claimed(ValueError):
    """Another process is at work in a work directory."""


class Interrupted(Exception):
    """A run was stopped and has saved where it was: the same command goes on from there."""


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file by way of a temporary name beside it, so that an interruption leaves the old file or none.

    Of several processes that compute together one writes.
    """
    if not backend.writes():
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk's names none
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_json(path: pathlib.Path, value) -> None:
    """Writes a value as JSON; a NaN or an infinity raises `ValueError`, since JSON has neither."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_arrays(path: pathlib.Path, arrays: dict, compress: bool = True) -> None:
    """Writes arrays by name as an npz file, which has a checksum of each."""
    import numpy as np  # here, since every --help imports this module

    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, allow_pickle=False, **arrays)
    write(path, buffer.getvalue())


def read_json(path: pathlib.Path, **options):
    """What a JSON file holds. Raises `ValueError`, with its name, if it is not JSON."""
    try:
        return json.loads(path.read_bytes(), **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({str(error)[:200]})") from error


def finished(path: pathlib.Path, compute: Callable, *arguments):
    """What a cell's JSON file holds; where there is none it is computed from the arguments and written."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_json(path, compute(*arguments))
    return read_json(path)


def write_figure(path: pathlib.Path, figure) -> None:
    """Writes a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    write(path, buffer.getvalue())


def digest(config: dict) -> str:
    """Eight characters that tell a configuration from others."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def _git_revision() -> str | None:
    """The commit of the checkout that the code runs from, with "+" where files differ from it; None outside one."""

    def git(*arguments):
        folder = pathlib.Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _difference(old, new, prefix: str = "") -> str | None:
    """The first key at which two nested configurations differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = (
            _difference(old.get(key), new.get(key), f"{prefix}{key}.")
            for key in sorted(old.keys() | new.keys())
        )
        return next((difference for difference in found if difference), None)
    return None if old == new else f"{prefix[:-1]}={old!r} there, {new!r} now"


def check_config(folder: pathlib.Path, config: dict) -> None:
    """Raises `ValueError` if a work directory holds a run of another configuration, or a config.json that is none."""
    config = json.loads(json.dumps(config))  # as it will be read back: tuples are lists
    try:
        if difference := _difference(json.loads((folder / "config.json").read_text()), config):
            raise ValueError(
                f"workdir={str(folder)!r} holds a run of another configuration ({difference}); choose another --workdir"
            )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"workdir={str(folder)!r} holds a config.json that is not JSON ({error}); remove it if the run is of this very "
            "configuration, or choose another --workdir"
        ) from error


def prepare(folder: str | os.PathLike, config: dict) -> pathlib.Path:
    """Creates a work directory and records the configuration and the environment in it -> its path.

    Raises `ValueError` if it cannot be written to or holds a run of another configuration.
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = any(
            other.name not in ("config.json", "environment.json") and other.suffix != ".claim"
            for other in folder.iterdir()
        )
        # In a folder where nothing was begun there is nothing to mix up: the run before was refused.
        if begun and (folder / "config.json").exists():
            check_config(folder, config)
        write_json(folder / "config.json", config)
    except OSError as error:
        raise ValueError(
            f"workdir={str(folder)!r} cannot be written to: {error.strerror}"
        ) from error
    if not (folder / "results.json").exists():  # else it says what made them
        write_json(
            folder / "environment.json",
            backend.describe() | {"seed": config.get("seed"), "git_revision": _git_revision()},
        )
    return folder


def _sealed(folder: pathlib.Path) -> dict[str, str]:
    """The SHA-256 of the files that a finished run's reports are made from, by name; config.json is compared as it is read."""
    paths = (
        path
        for path in sorted(folder.iterdir())
        if path.suffix in _SEALED and path.name not in ("config.json", _MANIFEST)
    )
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def seal(folder: pathlib.Path) -> None:
    """Records in manifest.json what the files of a finished run are."""
    if backend.writes():
        write_json(folder / _MANIFEST, _sealed(folder))


def check_seal(folder: pathlib.Path) -> None:
    """Raises `ValueError` if a file of a finished run is not as it was sealed; one that was never sealed passes."""
    path = folder / _MANIFEST
    if not path.exists():
        return
    try:
        recorded = dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: remove it to take the files beside it as they are"
        ) from error
    found = _sealed(folder)
    if changed := [name for name in recorded if recorded[name] != found.get(name)]:
        raise ValueError(
            f"{folder / changed[0]} is not as it was written: remove results.json, and the same command makes all anew"
        )


def completed(run: Callable, config, folder: str | os.PathLike) -> dict:
    """The results of a configuration in its work directory; it is run there unless it has been.

    Of several processes that compute together one has them, the others nothing. Raises `ValueError` as `prepare` and `claim` do.
    """
    with claim(
        folder := pathlib.Path(folder)
    ):  # before config.json is written, which must be that of the run under way
        prepare(folder, config.to_dict())
        if (folder / "results.json").exists():
            check_seal(folder)
        else:
            run(config, folder)
        seal(folder)
        return read_json(folder / "results.json") if backend.writes() else {}


def _holder(path: pathlib.Path, mine: pathlib.Path) -> str | None:
    """Who holds a claim; None if it is void: not renewed for long, or made on this machine by a process that is gone."""
    try:
        held = path.read_bytes()
        os.utime(mine)  # both times are the file system's, whatever this machine's clock says
        idle = mine.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        host, process = (json.loads(held)[key] for key in ("host", "process"))
    except (ValueError, KeyError, TypeError):  # damaged: it will not be renewed for ever
        host, process = "a machine", "unknown"
    here = host == platform.node() and pathlib.Path("/proc/self").exists()
    gone = here and not pathlib.Path(f"/proc/{process}").exists()
    return None if gone or idle > _EXPIRES else f"process {process} on {host}"


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of a work directory, which is made, for as long as this one works in it.

    Raises `Claimed` if one is in it already, and `ValueError` if it cannot be written to. A claim whose process is gone from this
    machine, or has not renewed it for two minutes, is void.
    """
    if not backend.writes():
        yield
        return
    path, mine = folder / "run.claim", folder / f".{uuid.uuid4().hex}.claim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(mine, json.dumps({"host": platform.node(), "process": os.getpid()}))
    except OSError as error:
        raise ValueError(
            f"workdir={str(folder)!r} cannot be written to: {error.strerror}"
        ) from error
    done = threading.Event()

    def renew():
        while not done.wait(_RENEWED):
            with contextlib.suppress(OSError):
                os.utime(mine)

    try:
        while True:
            try:
                os.link(
                    mine, path
                )  # one file of two names, and only one process can make the second
                break
            except FileExistsError:
                if holder := _holder(path, mine):
                    raise Claimed(
                        f"workdir={str(folder)!r} is in use by {holder}; wait for it, or choose another --workdir"
                    ) from None
                with contextlib.suppress(FileNotFoundError):
                    path.rename(mine.with_suffix(".void"))  # only one process can take it away
                    mine.with_suffix(".void").unlink()
        threading.Thread(target=renew, daemon=True).start()
        try:
            yield
        finally:
            done.set()
            with contextlib.suppress(
                OSError
            ):  # on a disk that can no longer be written to, what failed is told
                if path.samefile(mine):
                    path.unlink()
    finally:
        with contextlib.suppress(OSError):
            mine.unlink()
