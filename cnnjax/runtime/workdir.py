"""A work directory: the record of one run, in which every file is whole or absent.

A directory passes through these states, each with files that the states before lack:

    state      files                                  written by
    ---------  -------------------------------------  --------------------------------------
    claimed    run.claim                              `claim`, which removes it at its end
    recorded   config.json, then environment.json     `prepare`
    started    metrics.jsonl, checkpoints/, ...       the run
    finished   results.json, after all other results  the run
    sealed     manifest.json: hashes of the results   `seal`

`run_once` takes a configuration through all of them. Called again after it was stopped, it
continues from the state that it finds: it replaces the claim of a process that has ended, runs a
recorded or started run, and returns the results of a finished one once they match their hashes.
Commands that need no seal use `prepared` around their work, or `prepare`, which does not claim.

A run is refused if it raises `ValueError` or `FileNotFoundError` before it has started. Its record
is then removed, and the directory with it unless it was there before. A start that is refused later
leaves the record of the starts before. Logs (*.log, *.txt, *.out, *.err) and hidden files in the
directory belong to the user and do not start a run; a seal covers the run's own files only.
"""

import contextlib
import errno
import functools
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
from cnnjax.runtime.paths import sha256

_MANIFEST = "manifest.json"
_CLAIM = "run.claim"
_RECORD = ("config.json", "environment.json")
# Keys of a study's record that say what was measured and where; the others are options.
_MEASURED_KEYS = ("contents", "environment")
# Logs of the user, such as what `tee`, nohup or Slurm have written of the output; runs write none.
_LOG_SUFFIXES = (".log", ".txt", ".out", ".err")
# Files of finished runs that reports, figures and other commands are made from. config.json is not
# among them: `check_config` compares it.
_SEALED = frozenset(
    (
        "environment.json",
        "extended.json",
        "maps.npz",
        "metrics.jsonl",
        "results.json",
        "test.npz",
        "weights.safetensors",
    )
)
# What reports print of an environment.
_REPORTED_KEYS = frozenset(
    ("backend", "cpus", "devices", "git_revision", "packages", "platform", "python", "xla_flags")
)
# Seconds between two renewals of a claim, and the age at which it is stale.
_RENEWAL_SECONDS = 15.0
_STALE_SECONDS = 120.0
# Seconds within which all processes that found the same stale claim have removed it.
_SETTLING_SECONDS = 0.2


class Claimed(ValueError):
    """Another process is using a work directory."""


class OtherConfiguration(ValueError):
    """A work directory holds a run of another configuration."""


class Interrupted(Exception):
    """A run was stopped and has saved its state: the same command continues it."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary name for a file, which becomes `path` when the context ends.

    So the file is whole or absent: after an error it is removed.
    """
    # A name of its own for every call: several processes may write one file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file that is whole or absent (`replacing`).

    Of several processes that compute together, only the first one writes.
    """
    if not backend.writes():
        return
    with naming(path), replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Adds a path to errors of the system; that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_json(path: pathlib.Path, value) -> None:
    """Writes a value as JSON.

    Raises:
        FloatingPointError: for a NaN or an infinity, since JSON has neither.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
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
    return f"{name.rpartition('/')[2]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def digest(config: dict) -> str:
    """Hashes a configuration into eight characters."""
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@functools.cache
def _git_revision() -> str | None:
    """Returns the commit of the checkout that the code runs from, or None outside one.

    The package may also be installed in the folder of another project, whose commit says nothing
    about this code: git must know this file. A "+" follows the commit if files differ from it. It
    is read once, since later changes of the files do not change what this process has imported.
    """
    this_file = pathlib.Path(__file__)

    def git(*arguments):
        process = subprocess.run(
            ["git", *arguments],
            cwd=this_file.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return process.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", this_file.name)
        revision = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{revision}+" if changes else revision


# ------------------------------------------------------------------ one configuration


def _difference(old, new, prefix: str = "") -> str | None:
    """Describes the first key in which two nested configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        # A changed value says more than a key that was introduced since, which comes last.
        for key in [*sorted(old), *sorted(new.keys() - old.keys())]:
            difference = _difference(old.get(key), new.get(key), f"{prefix}{key}.")
            if difference:
                return difference
        return None
    return None if old == new else f"{prefix[:-1]}={old!r} there, {new!r} now"


def check_config(folder: pathlib.Path, config: dict, computes: bool = True) -> None:
    """Checks that a work directory holds a run of this configuration.

    Args:
        folder: the work directory.
        config: the configuration.
        computes: whether results may be added. If not, it does not matter which files and machine
            the call would measure.

    Raises:
        OtherConfiguration: if it holds one of another configuration.
        ValueError: if its config.json is not JSON.
    """
    # As JSON holds it: tuples become lists.
    current = json.loads(json.dumps(config))
    try:
        recorded = read_json(folder / "config.json")
    except ValueError as error:
        raise ValueError(
            f"workdir={str(folder)!r} holds a config.json that is not JSON ({error.__cause__}); "
            "remove it if the run is of this very configuration, or choose another --workdir"
        ) from error
    if isinstance(recorded, dict):
        # Earlier records of `cnnjax.visualize` name their own folder, which may have been renamed.
        if "workdir" not in current:
            recorded.pop("workdir", None)
        # Earlier records of studies lack the digests of their files, and their machine.
        for key in _MEASURED_KEYS:
            if key not in recorded or not computes:
                recorded[key] = current.get(key)
    if difference := _difference(recorded, current):
        raise OtherConfiguration(
            f"workdir={str(folder)!r} holds a run of another configuration ({difference}); choose "
            "another --workdir"
        )


def has_started(folder: pathlib.Path) -> bool:
    """Tells whether a work directory holds more than a record and what is no result.

    Empty folders do not count: a refused run may leave that of its checkpoints.
    """
    if not folder.is_dir():
        return False
    for path in folder.iterdir():
        is_empty_folder = path.is_dir() and not any(path.iterdir())
        if path.name not in (*_RECORD, _CLAIM) and not _is_aside(path.name) and not is_empty_folder:
            return True
    return False


def _is_aside(name: str) -> bool:
    """Tells whether a file is no result: a log of the user's, or hidden.

    Hidden files are the user's, such as .DS_Store, or temporary ones, which a process that was
    killed may leave.
    """
    return name.startswith(".") or name.endswith(_LOG_SUFFIXES)


def read_record(folder: pathlib.Path, kind: str) -> dict | None:
    """Reads the configuration that a run of this kind recorded; None if there is none.

    A damaged record counts as none: `check_config` reports it.
    """
    try:
        recorded = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    if isinstance(recorded, dict) and recorded.get("kind") == kind:
        return recorded
    return None


def prepare(folder: str | os.PathLike, config: dict, computes: bool = True) -> pathlib.Path:
    """Creates a work directory and records the configuration and the environment.

    Args:
        folder: the work directory.
        config: what the directory is bound to.
        computes: whether results are computed in this call; if not, the directory keeps the record
            of what made them.

    Returns:
        The directory's path.

    Raises:
        ValueError: if it cannot be written to or holds a run of another configuration.
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A run that has not started has left nothing that could be mixed up with another's.
        if has_started(folder) and (folder / "config.json").exists():
            check_config(folder, config, computes)
        if computes or not (folder / "config.json").exists():
            write_json(folder / "config.json", config)
    except OSError as error:
        raise ValueError(
            f"workdir={str(folder)!r} cannot be written to: {error.strerror}"
        ) from error
    if computes:
        write_json(folder / "environment.json", _environment(folder, config))
    return folder


def _environment(folder: pathlib.Path, config: dict) -> dict:
    """Describes the code, the versions and the machine of this start of a run.

    Different environments of earlier starts are listed under "earlier", each once.
    """
    current = backend.describe() | {"seed": config.get("seed"), "git_revision": _git_revision()}
    recorded = []
    if has_started(folder):
        recorded = read_environments(folder)
    earlier = []
    for environment in recorded:
        if environment != current and environment not in earlier:
            earlier.append(environment)
    if earlier:
        current["earlier"] = earlier
    return current


def read_environments(folder: pathlib.Path) -> list[dict]:
    """Reads the environments of all recorded starts, the last one last.

    Damaged records, and those that lack what reports print, are left out.
    """
    try:
        last = read_json(folder / "environment.json")
        earlier = last.pop("earlier", [])
        recorded = [*earlier, last]
    except (OSError, ValueError, AttributeError, TypeError):
        # The file is absent or damaged.
        return []
    return [
        environment
        for environment in recorded
        if isinstance(environment, dict) and environment.keys() >= _REPORTED_KEYS
    ]


# ------------------------------------------------------------------ seals


def _hash_results(folder: pathlib.Path) -> dict[str, str]:
    """Computes the SHA-256, by name, of a run's results."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.name in _SEALED:
            hashes[path.name] = sha256(path)
    return hashes


def seal(folder: pathlib.Path) -> None:
    """Records the hashes of a finished run's files in manifest.json."""
    if backend.writes():
        write_json(folder / _MANIFEST, _hash_results(folder))


def unseal(folder: pathlib.Path) -> None:
    """Removes the hashes of a run that continues, since its files will change."""
    if backend.writes():
        (folder / _MANIFEST).unlink(missing_ok=True)


def check_seal(folder: pathlib.Path) -> None:
    """Checks that the files of a finished run are as they were when it was sealed.

    A run that was never sealed passes.

    Raises:
        ValueError: if a file has changed, or the record of the hashes is damaged.
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
    hashes = _hash_results(folder)
    # Earlier versions also recorded files that are not a run's, such as a sweep's or the user's.
    for name in sorted(hashes.keys() | (_SEALED & recorded.keys())):
        if hashes.get(name) != recorded.get(name):
            raise ValueError(
                f"{folder / name} is not as it was written: remove results.json, and run the "
                "command again to recompute everything"
            )


def run_once(
    run: Callable, config, folder: str | os.PathLike, adopt: Callable | None = None
) -> dict:
    """Runs a configuration in its work directory, unless its results are there already.

    Args:
        run: called with the configuration and the folder.
        config: a `ConfigDict`.
        folder: the work directory.
        adopt: called with the configuration and the folder before these are compared, to bring
            into line the directory of an earlier version.

    Returns:
        The content of results.json; of several processes that compute together, one returns it and
        the others an empty dict.

    Raises:
        ValueError: as `prepare` and `claim`. A run that is refused leaves no folder.
    """
    folder = pathlib.Path(folder)
    # Claimed before config.json is written, which must not change under a run of another process.
    with _removed_if_empty(folder), claim(folder):
        with _undone_if_refused(folder):
            if adopt:
                adopt(config, folder)
            is_finished = (folder / "results.json").exists()
            prepare(folder, config.to_dict(), computes=not is_finished)
            if is_finished:
                check_seal(folder)
            else:
                unseal(folder)
                run(config, folder)
        # A seal is not renewed: what has changed since must be noticed.
        if not (folder / _MANIFEST).exists():
            seal(folder)
        return read_json(folder / "results.json") if backend.writes() else {}


@contextlib.contextmanager
def prepared(
    folder: str | os.PathLike, config: dict, computes: bool = True
) -> Iterator[pathlib.Path]:
    """Claims and prepares a work directory for the work in the context, and gives its path.

    The arguments are those of `prepare`.

    Raises:
        ValueError: as `claim` and `prepare`. Work that is refused before it writes leaves no
            folder.
    """
    folder = pathlib.Path(folder)
    with _removed_if_empty(folder), claim(folder), _undone_if_refused(folder):
        prepare(folder, config, computes)
        yield folder


@contextlib.contextmanager
def _removed_if_empty(folder: pathlib.Path) -> Iterator[None]:
    """Removes the folders that the context created if they are empty at its end."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        # `rmdir` removes empty folders only: those of a run that was refused.
        with contextlib.suppress(OSError):
            for path in created:
                path.rmdir()


@contextlib.contextmanager
def _undone_if_refused(folder: pathlib.Path) -> Iterator[None]:
    """Undoes the record of a start that the context refuses before it has computed anything."""
    record: dict[pathlib.Path, bytes | None] = {}
    was_started = has_started(folder)
    for name in (*_RECORD, _MANIFEST):
        path = folder / name
        # The record of a run that has not started is not worth keeping.
        record[path] = path.read_bytes() if was_started and path.is_file() else None
    before = _list_times(folder)
    try:
        yield
    except (ValueError, FileNotFoundError):
        if backend.writes() and _list_times(folder).items() <= before.items():
            # On a disk that can no longer be written to, the refusal itself is reported.
            with contextlib.suppress(OSError):
                for path, content in record.items():
                    _restore(path, content)
            # Training creates it before its first step; `rmdir` removes it only if it is empty.
            with contextlib.suppress(OSError):
                (folder / "checkpoints").rmdir()
        raise


def _list_times(folder: pathlib.Path) -> dict[str, int]:
    """Lists when each file of results, in subfolders, too, was last written.

    Records are left out: a refusal restores those of networks in a study's folder as well.
    """
    times = {}
    for root, _, names in os.walk(folder):
        for name in names:
            is_record = name in (*_RECORD, _MANIFEST, _CLAIM)
            if not is_record and not _is_aside(name):
                path = os.path.join(root, name)
                # Another process may remove its temporary file meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    times[path] = os.lstat(path).st_mtime_ns
    return times


def _restore(path: pathlib.Path, content: bytes | None) -> None:
    """Gives a file its earlier content, or removes it if there was none."""
    if content is None:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_bytes() != content:
        write(path, content)


# ------------------------------------------------------------------ one process at a time
#
# A claim is a lock file, run.claim, that names the host, the process and an id of its own. To claim
# a directory, a process
#
# 1. writes its claim as .ID.claim (`own_claim` below);
# 2. makes run.claim a hard link to it, which fails if there is a run.claim already;
# 3. if there is one that is stale, renames it to .ID.void, deletes it, and repeats step 2. A claim
#    is stale if its process is gone from this machine or, where that cannot be seen, has not
#    renewed it for two minutes. A suspended process (Ctrl-Z) of this machine keeps its claim;
# 4. renews run.claim while it works: a thread sets the file's time;
# 5. removes run.claim and .ID.claim.
#
# Two processes may find the same stale claim, and the slower one may remove the claim that the
# faster one has just made. So a process that has removed a stale claim waits a moment after step 2
# and then looks whether run.claim is still its own.


def _pid_namespace() -> str | None:
    """Returns the namespace of process numbers, of which each container has its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _boot_id() -> str | None:
    """Returns the id of this start of the system, which tells machines of one host name apart."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _started_at(process: int) -> int | None:
    """Returns when a process of this machine began, in ticks of its clock; None if it has ended.

    Raises `OSError` if that cannot be seen.
    """
    try:
        # This asks the system itself. /proc may hide the processes of other users (hidepid).
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        # It is another user's, and running.
        pass
    content = pathlib.Path(f"/proc/{process}/stat").read_bytes()
    # The fields after the name, which is in brackets and may hold spaces and brackets.
    state, *fields = content.rpartition(b")")[2].split()
    # A zombie has ended, and waits for its parent to notice.
    return None if state in (b"Z", b"X") else int(fields[18])


def _own_start() -> int | None:
    """Returns when this process began; None if /proc does not tell."""
    try:
        # /proc may be that of another namespace (unshare --pid), with other numbers.
        if os.readlink("/proc/self") == str(os.getpid()):
            return _started_at(os.getpid())
    except OSError:
        # Some systems have no /proc.
        pass
    return None


def _is_running(holder: dict) -> bool | None:
    """Tells whether the process that a claim names is running; None if that cannot be seen."""
    # Claims of earlier versions name neither their namespace nor the start of their system.
    here = {"host": platform.node(), "namespace": _pid_namespace(), "boot": _boot_id()}
    is_here = all(holder.get(name, value) == value for name, value in here.items())
    if not is_here or _own_start() is None:
        return None
    try:
        started = _started_at(holder["process"])
    except OSError:
        return None
    if started is None:
        return False
    # Claims of earlier versions do not say when their process began. Another process may have its
    # number by now.
    if holder.get("started") is None:
        return None
    return started == holder["started"]


def _describe_holder(path: pathlib.Path, content: bytes, own_claim: pathlib.Path) -> str | None:
    """Names the process that holds a claim, for an error; None if the claim is stale.

    Args:
        path: run.claim.
        content: what was read from it.
        own_claim: the claim of this process, whose time is set to now.
    """
    try:
        # Both times are the file system's, whatever this machine's clock says.
        os.utime(own_claim)
        age = own_claim.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        holder = json.loads(content)
        description = f"process {holder['process']} on {holder['host']}"
        is_running = _is_running(holder)
        # Only a process that is known to be the holder is safe to end.
        if is_running:
            description += (
                " (if it is suspended, continue it with fg; if it hangs, end it with "
                f"kill -9 {holder['process']})"
            )
    # A damaged claim is not renewed, and so it is stale before long.
    except (ValueError, KeyError, TypeError, OverflowError):
        description = "process unknown on a machine"
        is_running = None
    if is_running is None:
        is_running = age <= _STALE_SECONDS
    return description if is_running else None


def _link(own_claim: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a claim the name `path`. Raises `FileExistsError` if there is such a file."""
    try:
        # Of several processes, only one can create the link.
        os.link(own_claim, path)
    except OSError as error:
        # File systems such as exFAT have no hard links; there the claim is copied.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with path.open("xb") as file:
            file.write(own_claim.read_bytes())


def _remove_stale(path: pathlib.Path, content: bytes, own_claim: pathlib.Path) -> None:
    """Removes a stale claim, unless another process has replaced it since it was read."""
    removed = own_claim.with_suffix(".void")
    # Of several processes, only one can rename it.
    with contextlib.suppress(FileNotFoundError):
        path.rename(removed)
        if removed.read_bytes() != content:
            # It is another's valid claim, which is put back.
            with contextlib.suppress(FileExistsError):
                _link(removed, path)
        removed.unlink()


def _acquire(path: pathlib.Path, own_claim: pathlib.Path) -> None:
    """Claims the directory. Raises `Claimed` if another process holds it."""
    has_met_stale = False
    while True:
        try:
            _link(own_claim, path)
            # A process that met the same stale claim may be removing ours in its place.
            if has_met_stale:
                time.sleep(_SETTLING_SECONDS)
            if _is_own(path, own_claim):
                return
        except FileExistsError:
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            if holder := _describe_holder(path, content, own_claim):
                raise Claimed(
                    f"workdir={str(path.parent)!r} is in use by {holder}; wait for it, or choose "
                    "another --workdir"
                ) from None
            has_met_stale = True
            _remove_stale(path, content, own_claim)


def _is_own(path: pathlib.Path, own_claim: pathlib.Path) -> bool:
    """Tells whether run.claim is the claim of this process, which has an id of its own."""
    try:
        return path.read_bytes() == own_claim.read_bytes()
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _renewed(path: pathlib.Path, own_claim: pathlib.Path) -> Iterator[None]:
    """Renews a claim now and then, from a thread, while the context lasts."""
    done = threading.Event()

    def renew():
        while not done.wait(_RENEWAL_SECONDS):
            with contextlib.suppress(OSError):
                if _is_own(path, own_claim):
                    os.utime(path)

    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of a work directory, which is created, while the context lasts.

    Raises:
        Claimed: if another process is using the directory.
        ValueError: if the directory cannot be written to.
    """
    if not backend.writes():
        yield
        return
    path = folder / _CLAIM
    own_claim = folder / f".{uuid.uuid4().hex}.claim"
    holder = {
        "host": platform.node(),
        "process": os.getpid(),
        "namespace": _pid_namespace(),
        "boot": _boot_id(),
        "started": _own_start(),
        # Tells this claim from an earlier one of the same process.
        "id": own_claim.stem,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(own_claim, json.dumps(holder))
    except OSError as error:
        raise ValueError(
            f"workdir={str(folder)!r} cannot be written to: {error.strerror}"
        ) from error
    try:
        _acquire(path, own_claim)
        try:
            with _renewed(path, own_claim):
                yield
        finally:
            # On a disk that can no longer be written to, the failure itself is reported.
            with contextlib.suppress(OSError):
                if _is_own(path, own_claim):
                    path.unlink()
    finally:
        with contextlib.suppress(OSError):
            own_claim.unlink()
