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
from collections.abc import Iterator

from cnnjax import backend

_RENEWED, _EXPIRES = 15.0, 120.0  # seconds: how often a claim is renewed, and after how long without it is void


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
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value) -> None:
    """Writes a value as JSON; a NaN or an infinity raises `ValueError`, since JSON has neither."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


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
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _difference(old, new, prefix: str = "") -> str | None:
    """The first key at which two nested configurations differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = (_difference(old.get(key), new.get(key), f"{prefix}{key}.") for key in sorted(old.keys() | new.keys()))
        return next((difference for difference in found if difference), None)
    return None if old == new else f"{prefix[:-1]}={old!r} there, {new!r} now"


def prepare(folder: str | os.PathLike, config: dict) -> pathlib.Path:
    """Creates a work directory and records the configuration and the environment in it -> its path.

    Raises `ValueError` if it cannot be written to or holds a run of another configuration.
    """
    folder = pathlib.Path(folder)
    config = json.loads(json.dumps(config))  # as it will be read back: tuples are lists
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.json"
        begun = any(other.name not in ("config.json", "environment.json") and other.suffix != ".claim" for other in folder.iterdir())
        # In a folder where nothing was begun there is nothing to mix up: the run before was refused.
        if begun and path.exists() and (difference := _difference(json.loads(path.read_text()), config)):
            raise ValueError(f"workdir={str(folder)!r} holds a run of another configuration ({difference}); choose another --workdir")
        write_json(path, config)
    except OSError as error:
        raise ValueError(f"workdir={str(folder)!r} cannot be written to: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"workdir={str(folder)!r} holds a config.json that is not JSON ({error}); choose another --workdir") from error
    if not (folder / "results.json").exists():  # else it says what made them
        write_json(folder / "environment.json", backend.describe() | {"seed": config.get("seed"), "git_revision": _git_revision()})
    return folder


def _holder(path: pathlib.Path, mine: pathlib.Path) -> str | None:
    """Who holds a claim; None if it is void: not renewed for long, or made on this machine by a process that is gone."""
    try:
        held = json.loads(path.read_text())
        os.utime(mine)  # both times are the file system's, whatever this machine's clock says
        idle = mine.stat().st_mtime - path.stat().st_mtime
        here = held["host"] == platform.node() and pathlib.Path("/proc/self").exists()
        gone = here and not pathlib.Path(f"/proc/{held['process']}").exists()
    except FileNotFoundError:
        return None
    return None if gone or idle > _EXPIRES else f"process {held['process']} on {held['host']}"


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of a work directory for as long as this one works in it. Raises `Claimed` if one is in it already.

    A claim whose process is gone from this machine, or has not renewed it for two minutes, is void.
    """
    if not backend.writes():
        yield
        return
    path, mine = folder / "run.claim", folder / f".{uuid.uuid4().hex}.claim"
    mine.write_text(json.dumps({"host": platform.node(), "process": os.getpid()}))
    done = threading.Event()

    def renew():
        while not done.wait(_RENEWED):
            with contextlib.suppress(OSError):
                os.utime(mine)

    try:
        while True:
            try:
                os.link(mine, path)  # one file of two names, and only one process can make the second
                break
            except FileExistsError:
                if holder := _holder(path, mine):
                    raise Claimed(f"workdir={str(folder)!r} is in use by {holder}; wait for it, or choose another --workdir") from None
                with contextlib.suppress(FileNotFoundError):
                    path.rename(mine.with_suffix(".void"))  # only one process can take it away
                    mine.with_suffix(".void").unlink()
        threading.Thread(target=renew, daemon=True).start()
        try:
            yield
        finally:
            done.set()
            with contextlib.suppress(FileNotFoundError):
                if path.samefile(mine):
                    path.unlink()
    finally:
        mine.unlink(missing_ok=True)
