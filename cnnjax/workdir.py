"""A work directory: the record of one run, in which every file is whole or absent."""
import hashlib
import io
import json
import os
import pathlib
import subprocess

from cnnjax import backend


class Interrupted(Exception):
    """A run was stopped and has saved where it was: the same command goes on from there."""


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file by way of a temporary name beside it, so that an interruption leaves the old file or none."""
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
        begun = any(other.name not in ("config.json", "environment.json") for other in folder.iterdir())  # else nothing can be mixed up
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
