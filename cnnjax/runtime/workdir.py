"""A work directory: the record of one run, in which every file is whole or absent."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
import platform
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from cnnjax.runtime import backend

_MANIFEST = "manifest.json"
# Files that reports and figures are made from.
_SEALED = (".json", ".jsonl", ".npz", ".safetensors")
# What reports print of an environment.
_REPORTED = frozenset(
    ("backend", "cpus", "devices", "git_revision", "packages", "platform", "python", "xla_flags")
)
# Seconds after which a claim is renewed, and after which it is void unless it was.
_RENEWED = 15.0
_EXPIRES = 120.0
# Seconds that processes which found a claim void take to remove it.
_SETTLES = 0.2


class Claimed(ValueError):
    """Another process is at work in a work directory."""


class Interrupted(Exception):
    """A run was stopped and has saved its state: the same command goes on from there."""


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is whole or absent.

    Of several processes that compute together one writes.
    """
    if not backend.writes():
        return
    # A name of its own for every call: several processes may write one table.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        # The error of a full disk names no file.
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_json(path: pathlib.Path, value) -> None:
    """Write a value as JSON; a NaN or an infinity raises `ValueError`, since JSON has neither."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_arrays(path: pathlib.Path, arrays: dict, compress: bool = True) -> None:
    """Write arrays by name as an npz file, which has a checksum of each."""
    # Imported when needed: every --help imports this module.
    import numpy as np

    buffer = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(buffer, allow_pickle=False, **arrays)
    write(path, buffer.getvalue())


def read_json(path: pathlib.Path, **options):
    """Read a JSON file. Raises `ValueError`, with its name, if it is not JSON."""
    try:
        return json.loads(path.read_bytes(), **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({str(error)[:200]})") from error


def finished(path: pathlib.Path, compute: Callable, *arguments):
    """Read a result from its JSON file, or compute it from the arguments and write the file."""
    if not path.exists():
        result = compute(*arguments)
        path.parent.mkdir(exist_ok=True)
        write_json(path, result)
    return read_json(path)


def write_figure(path: pathlib.Path, figure) -> None:
    """Write a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    write(path, buffer.getvalue())


def file_label(name: str) -> str:
    """Make a name fit for a file's: a network FILE.py:NAME goes without its folders.

    Eight characters of a digest tell it from those of other folders.
    """
    if "/" not in name:
        return name
    return f"{name.rpartition('/')[2]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def digest(config: dict) -> str:
    """Eight characters that tell a configuration from others."""
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _git_revision() -> str | None:
    """The commit of the checkout that the code runs from, or None outside one.

    A "+" follows the commit if files differ from it.
    """

    def git(*arguments):
        done = subprocess.run(
            ["git", *arguments],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{revision}+" if changes else revision


# ------------------------------------------------------------------ one configuration


def _difference(old, new, prefix: str = "") -> str | None:
    """The first key at which two nested configurations differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        # Keys that were introduced since come last: another value says more.
        for key in [*sorted(old), *sorted(new.keys() - old.keys())]:
            found = _difference(old.get(key), new.get(key), f"{prefix}{key}.")
            if found:
                return found
        return None
    return None if old == new else f"{prefix[:-1]}={old!r} there, {new!r} now"


def check_config(folder: pathlib.Path, config: dict) -> None:
    """Raise `ValueError` if a work directory holds a run of another configuration.

    So it does if its config.json is not JSON.
    """
    # As it will be read back: tuples are lists.
    wanted = json.loads(json.dumps(config))
    try:
        recorded = json.loads((folder / "config.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"workdir={str(folder)!r} holds a config.json that is not JSON ({error}); remove it if "
            "the run is of this very configuration, or choose another --workdir"
        ) from error
    # Earlier records of `cnnjax.visualize` name their own folder, which may have been renamed.
    if isinstance(recorded, dict) and "workdir" not in wanted:
        recorded.pop("workdir", None)
    # Earlier records name a model of one's own without its file, or the file without its folder.
    if isinstance(recorded, dict):
        name = recorded.get("model")
        if str(wanted.get("model")).endswith((f".py:{name}", f"/{name}")):
            recorded["model"] = wanted["model"]
    if difference := _difference(recorded, wanted):
        raise ValueError(
            f"workdir={str(folder)!r} holds a run of another configuration ({difference}); choose "
            "another --workdir"
        )


def _is_begun(folder: pathlib.Path) -> bool:
    """Whether a work directory holds more than the record of a run that was refused."""
    for path in folder.iterdir():
        is_record = path.name in ("config.json", "environment.json") or path.suffix == ".claim"
        # A refused run may leave the empty folder of its checkpoints.
        is_empty = path.is_dir() and not any(path.iterdir())
        if not is_record and not is_empty:
            return True
    return False


def read_record(folder: pathlib.Path, kind: str) -> dict | None:
    """Read the configuration that a run of this kind recorded.

    None where there is none. A damaged record is reported where configurations are compared.
    """
    try:
        recorded = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if isinstance(recorded, dict) and recorded.get("kind") == kind:
        return recorded
    return None


def prepare(folder: str | os.PathLike, config: dict) -> pathlib.Path:
    """Create a work directory with the configuration and the environment; return its path.

    Raises `ValueError` if it cannot be written to or holds a run of another configuration.
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Where nothing was begun there is nothing to mix up: the run before was refused.
        if _is_begun(folder) and (folder / "config.json").exists():
            check_config(folder, config)
        write_json(folder / "config.json", config)
    except OSError as error:
        raise ValueError(
            f"workdir={str(folder)!r} cannot be written to: {error.strerror}"
        ) from error
    # The environment of a finished run is the one that made its results.
    if not (folder / "results.json").exists():
        write_json(folder / "environment.json", _environment(folder, config))
    return folder


def _environment(folder: pathlib.Path, config: dict) -> dict:
    """Describe the code, the versions and the machine of this start of a run.

    Earlier starts with other ones are listed under "earlier", each once.
    """
    now = backend.describe() | {"seed": config.get("seed"), "git_revision": _git_revision()}
    earlier = []
    for environment in _recorded_environments(folder) if _is_begun(folder) else ():
        is_whole = isinstance(environment, dict) and environment.keys() >= _REPORTED
        if is_whole and environment != now and environment not in earlier:
            earlier.append(environment)
    return now | {"earlier": earlier} if earlier else now


def _recorded_environments(folder: pathlib.Path) -> list:
    """Read environment.json: those of earlier starts, and that of the last one."""
    try:
        last = read_json(folder / "environment.json")
        earlier = last.pop("earlier", [])
        return [*earlier, last]
    except (OSError, ValueError, AttributeError, TypeError):
        return []  # there is none, or a damaged one


def _forget(folder: pathlib.Path) -> None:
    """Remove the record of a run that was refused before it began."""
    if backend.writes() and not _is_begun(folder):
        for name in ("config.json", "environment.json"):
            (folder / name).unlink(missing_ok=True)
        # Made before the first step; it goes only if it is empty.
        with contextlib.suppress(OSError):
            (folder / "checkpoints").rmdir()


# ------------------------------------------------------------------ seals


def _sealed(folder: pathlib.Path) -> dict[str, str]:
    """The SHA-256 by name of the files that a finished run's reports are made from.

    config.json is not among them: it is compared when it is read.
    """
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _SEALED and path.name not in ("config.json", _MANIFEST):
            hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def seal(folder: pathlib.Path) -> None:
    """Record the hashes of a finished run's files in manifest.json."""
    if backend.writes():
        write_json(folder / _MANIFEST, _sealed(folder))


def unseal(folder: pathlib.Path) -> None:
    """Remove the hashes of a run that goes on, whose files change from now on."""
    if backend.writes():
        (folder / _MANIFEST).unlink(missing_ok=True)


def check_seal(folder: pathlib.Path) -> None:
    """Raise `ValueError` if a file of a finished run has changed since it was sealed.

    A run that was never sealed passes.
    """
    path = folder / _MANIFEST
    if not path.exists():
        return
    try:
        recorded = dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: remove it to take the files beside it as they are"
        ) from error
    hashes = _sealed(folder)
    for name, expected in recorded.items():
        if hashes.get(name) != expected:
            raise ValueError(
                f"{folder / name} is not as it was written: remove results.json, and run the "
                "command again to recompute everything"
            )


def completed(
    run: Callable, config, folder: str | os.PathLike, adopt: Callable | None = None
) -> dict:
    """The results of a configuration in its work directory, where it is run unless it has been.

    `adopt(config, folder)` may bring the directory of an earlier run and the configuration into
    line before they are compared. Of several processes that compute together one has the results,
    the others an empty dict. Raises `ValueError` as `prepare` and `claim` do; a run that is refused
    leaves no folder.
    """
    folder = pathlib.Path(folder)
    # Claimed before config.json is written, which must be that of the run under way.
    with _removed_if_empty(folder), claim(folder):
        if adopt:
            adopt(config, folder)
        prepare(folder, config.to_dict())
        if (folder / "results.json").exists():
            check_seal(folder)
        else:
            unseal(folder)
            with _forgotten_if_refused(folder):
                run(config, folder)
        seal(folder)
        return read_json(folder / "results.json") if backend.writes() else {}


@contextlib.contextmanager
def prepared(folder: str | os.PathLike, config: dict) -> Iterator[pathlib.Path]:
    """Prepare a work directory for what is done in the context; it gives the directory's path.

    Raises `ValueError` as `prepare` does. What is refused before it writes leaves no folder.
    """
    folder = pathlib.Path(folder)
    with _removed_if_empty(folder):
        prepare(folder, config)
        with _forgotten_if_refused(folder):
            yield folder


@contextlib.contextmanager
def _removed_if_empty(folder: pathlib.Path) -> Iterator[None]:
    """Remove the folders that the context created if they are empty at its end."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        # Only empty folders can be removed: those of a run that was refused.
        with contextlib.suppress(OSError):
            for path in created:
                path.rmdir()


@contextlib.contextmanager
def _forgotten_if_refused(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, FileNotFoundError):
        _forget(folder)
        raise


# ------------------------------------------------------------------ one process at a time


def _namespace() -> str | None:
    """What process numbers on this machine belong to; containers have namespaces of their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _is_gone(claimed: dict) -> bool:
    """Whether the process of a claim is known to have ended."""
    # Claims of earlier versions do not name their namespace.
    namespace = claimed.get("namespace", _namespace())
    is_here = claimed["host"] == platform.node() and namespace == _namespace()
    has_list = pathlib.Path("/proc/self").exists()
    return is_here and has_list and not pathlib.Path(f"/proc/{claimed['process']}").exists()


def _holder(path: pathlib.Path, held: bytes, mine: pathlib.Path) -> str | None:
    """Who holds a claim of this content, or None if it is void.

    It is void if it was not renewed for long, or its process is gone from this machine.
    """
    try:
        # Both times are the file system's, whatever this machine's clock says.
        os.utime(mine)
        idle = mine.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        claimed = json.loads(held)
        holder = f"process {claimed['process']} on {claimed['host']}"
        is_gone = _is_gone(claimed)
    # A damaged claim is not renewed, and so void before long.
    except (ValueError, KeyError, TypeError):
        holder = "process unknown on a machine"
        is_gone = False
    return None if is_gone or idle > _EXPIRES else holder


def _name(mine: pathlib.Path, path: pathlib.Path) -> None:
    """Give a claim its name. Raises `FileExistsError` if there is a claim of this name."""
    try:
        # A file with two names, of which only one process can make the second.
        os.link(mine, path)
    except OSError as error:
        # File systems such as exFAT have one name for each file.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with path.open("xb") as file:
            file.write(mine.read_bytes())


def _remove_void(path: pathlib.Path, held: bytes, mine: pathlib.Path) -> None:
    """Remove a void claim, unless another process has put its own there since it was read."""
    void = mine.with_suffix(".void")
    # Only one process can rename it.
    with contextlib.suppress(FileNotFoundError):
        path.rename(void)
        if void.read_bytes() != held:
            with contextlib.suppress(FileExistsError):
                _name(void, path)
        void.unlink()


def _take(path: pathlib.Path, mine: pathlib.Path) -> None:
    """Give the claim `mine` the name `path`. Raises `Claimed` if another process holds it."""
    met_void = False
    while True:
        try:
            _name(mine, path)
            # A process that found the same claim void may be removing ours in its place.
            if met_void:
                time.sleep(_SETTLES)
            if _is_same(path, mine):
                return
        except FileExistsError:
            try:
                held = path.read_bytes()
            except FileNotFoundError:
                continue
            if holder := _holder(path, held, mine):
                raise Claimed(
                    f"workdir={str(path.parent)!r} is in use by {holder}; wait for it, or choose "
                    "another --workdir"
                ) from None
            met_void = True
            _remove_void(path, held, mine)


def _is_same(path: pathlib.Path, mine: pathlib.Path) -> bool:
    """Whether a claim is `mine`, which has an id of its own."""
    try:
        return path.read_bytes() == mine.read_bytes()
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
    """Keep other processes out of a work directory, which is created, while the context lasts.

    A claim whose process is gone from this machine, or that was not renewed for two minutes, is
    void. Raises `Claimed` if another process is in the directory, and `ValueError` if it cannot be
    written to.
    """
    if not backend.writes():
        yield
        return
    path = folder / "run.claim"
    mine = folder / f".{uuid.uuid4().hex}.claim"
    holder = {
        "host": platform.node(),
        "process": os.getpid(),
        "namespace": _namespace(),
        # Tells this claim from an earlier one of the same process.
        "id": mine.stem,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(mine, json.dumps(holder))
    except OSError as error:
        raise ValueError(
            f"workdir={str(folder)!r} cannot be written to: {error.strerror}"
        ) from error
    done = threading.Event()

    def renew():
        while not done.wait(_RENEWED):
            with contextlib.suppress(OSError):
                if _is_same(path, mine):
                    os.utime(path)

    try:
        _take(path, mine)
        threading.Thread(target=renew, daemon=True).start()
        try:
            yield
        finally:
            done.set()
            # On a disk that can no longer be written to, the failure itself is reported.
            with contextlib.suppress(OSError):
                if _is_same(path, mine):
                    path.unlink()
    finally:
        with contextlib.suppress(OSError):
            mine.unlink()
