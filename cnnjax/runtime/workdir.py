"""A work directory: the record of one run, in which every file is whole or absent.

A directory passes through these states, each with files that the states before lack:

    state      files                                  written by
    ---------  -------------------------------------  --------------------------------------
    claimed    run.claim                              `claims.claim`, until its end
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
import functools
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator

from cnnjax.runtime import claims, files, host, processes
from cnnjax.runtime.paths import sha256

_MANIFEST = "manifest.json"
# A sweep records here why a run failed, and does not start it again.
FAILURE = "failure.json"
_RECORD = ("config.json", "environment.json")
# Keys of a study's record that say what was measured and where; the others are options.
_MEASURED_KEYS = ("contents", "environment")
# What messages call the runs of a kind.
_KINDS = {
    "combine": "a combination of runs",
    "position": "a position study",
    "train": "a training run",
}
# The number of differing keys that a refusal lists.
_LISTED_KEYS = 3
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
# Files whose names a run takes, besides its record.
_RESULTS = sorted({*_SEALED, _MANIFEST, "report.md"} - {*_RECORD})
# What reports print of an environment.
_REPORTED_KEYS = frozenset(
    ("backend", "cpus", "devices", "git_revision", "packages", "platform", "python", "xla_flags")
)


class OtherConfiguration(ValueError):
    """A work directory holds a run of another configuration."""


class Interrupted(Exception):
    """A run was stopped and has saved its state: the same command continues it."""


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


def _list_differences(old, new, introduced: bool, prefix: str = "") -> dict[str, str]:
    """Describes, by key, where two nested configurations differ.

    Args:
        old: a configuration or a value in it.
        new: what is compared with it.
        introduced: whether to list keys that only `new` has.
        prefix: what the keys begin with.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        differences: dict[str, str] = {}
        keys = sorted(old)
        if introduced:
            keys += sorted(new.keys() - old.keys())
        for key in keys:
            name = f"{prefix}{key}."
            differences |= _list_differences(old.get(key), new.get(key), introduced, name)
        return differences
    key = prefix[:-1]
    return {} if old == new else {key: f"{key}={old!r} there, {new!r} now"}


def _describe_difference(recorded, current: dict) -> str | None:
    """Says what of a recorded configuration differs from the current one; None if nothing does."""
    # Changed values say more than keys that later versions added, which may be many. So added keys
    # are listed only if nothing but `data_dir` has changed.
    differences = _list_differences(recorded, current, introduced=False)
    if not differences.keys() - {"data_dir"}:
        differences = _list_differences(recorded, current, introduced=True)
    if not differences:
        return None
    if isinstance(recorded, dict):
        kind = str(recorded.get("kind"))
        if "kind" in differences and kind in _KINDS:
            return _KINDS[kind]
        if "command" in differences and "command" in recorded:
            return f"a run of the command {recorded['command']!r}"
    # Moved to the end: another `data_dir` is accepted if its images are the same, so it is seldom
    # the reason.
    if "data_dir" in differences:
        differences["data_dir"] = differences.pop("data_dir")
    texts = list(differences.values())
    if len(texts) > _LISTED_KEYS:
        texts[_LISTED_KEYS:] = [f"and {len(texts) - _LISTED_KEYS} more"]
    return f"a run of another configuration ({'; '.join(texts)})"


def differences(recorded: dict, config: dict) -> set[str]:
    """Finds the keys in which a recorded configuration differs from the one to run."""
    current = _as_recorded(config)
    keys = recorded.keys() | current.keys()
    return {key for key in keys if recorded.get(key) != current.get(key)}


def _as_recorded(config: dict) -> dict:
    """Returns a configuration as JSON holds it: tuples become lists."""
    return json.loads(json.dumps(config))


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
    current = _as_recorded(config)
    try:
        recorded = files.read_json(folder / "config.json")
    except ValueError as error:
        raise ValueError(
            f"workdir={str(folder)!r} holds a config.json that is not JSON ({error.__cause__}); "
            "remove it if the run is of this very configuration, or choose another --workdir"
        ) from error
    if isinstance(recorded, dict):
        # Earlier records of `cnnjax.visualize` name their own folder, which may have been renamed.
        if "workdir" not in current:
            recorded.pop("workdir", None)
        # Earlier records of studies lack the study's name.
        if "study" in current:
            recorded.setdefault("study", current["study"])
        # They also lack the digests of their files, and their machine.
        for key in _MEASURED_KEYS:
            if key not in recorded or not computes:
                recorded[key] = current.get(key)
    if difference := _describe_difference(recorded, current):
        raise OtherConfiguration(
            f"workdir={str(folder)!r} holds {difference}; choose another --workdir"
        )


def has_started(folder: pathlib.Path) -> bool:
    """Tells whether a run has left anything but its record.

    Logs and hidden files do not count, nor do empty folders: a refused run may leave an empty
    checkpoints/.
    """
    if not folder.is_dir():
        return False
    for path in folder.iterdir():
        is_record = path.name in (*_RECORD, claims.CLAIM)
        is_empty_folder = path.is_dir() and not any(path.iterdir())
        if not (is_record or is_empty_folder or _is_aside(path.name)):
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
        recorded = files.read_json(folder / "config.json")
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
            files.write_json(folder / "config.json", config)
    except OSError as error:
        raise claims.unusable(folder, error) from error
    if computes:
        files.write_json(folder / "environment.json", _environment(folder, config))
    return folder


def _environment(folder: pathlib.Path, config: dict) -> dict:
    """Describes the code, the versions and the machine of this start of a run.

    Different environments of earlier starts are listed under "earlier", each once.
    """
    current = host.describe() | {"seed": config.get("seed"), "git_revision": _git_revision()}
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
        last = files.read_json(folder / "environment.json")
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
    if processes.writes():
        files.write_json(folder / _MANIFEST, _hash_results(folder))


def unseal(folder: pathlib.Path) -> None:
    """Removes the hashes of a run that continues, since its files will change."""
    if processes.writes():
        (folder / _MANIFEST).unlink(missing_ok=True)


def _forget_failure(folder: pathlib.Path) -> None:
    """Removes a sweep's record of why a run failed, since the run begins again."""
    if processes.writes():
        (folder / FAILURE).unlink(missing_ok=True)


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
        recorded = dict(files.read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: remove it to take the files beside it as they are"
        ) from error
    hashes = _hash_results(folder)
    # Earlier versions also recorded files that are not a run's, such as a sweep's or the user's.
    for name in sorted(hashes.keys() | (_SEALED & recorded.keys())):
        if hashes.get(name) != recorded.get(name):
            problem = "is not as it was written" if name in hashes else "is missing"
            advice = "remove results.json, and run the command again to recompute everything"
            # It was written when the run was extended, and no command writes it again.
            if name == "extended.json":
                advice = f"results.json lists the same scores; remove {name} and {_MANIFEST}"
            raise ValueError(f"{folder / name} {problem}: {advice}")


def run_once(
    run: Callable, config, folder: str | os.PathLike, adopt: Callable | None = None
) -> dict:
    """Runs a configuration in its work directory, unless its results are there already.

    Args:
        run: called with the configuration and the folder.
        config: a `ConfigDict`.
        folder: the work directory.
        adopt: called with the configuration and the folder before they are compared, to update the
            record of an earlier version.

    Returns:
        The content of results.json; of several processes that compute together, one returns it and
        the others an empty dict.

    Raises:
        ValueError: as `prepare` and `claims.claim`, and for files that no run wrote and that this
            one would overwrite. A run that is refused leaves no folder.
    """
    folder = pathlib.Path(folder)
    # Claimed before config.json is written, which must not change under a run of another process.
    with _removed_if_empty(folder), claims.claim(folder):
        _check_foreign(folder, config.to_dict())
        with _undone_if_refused(folder):
            if adopt:
                adopt(config, folder)
            is_finished = (folder / "results.json").exists()
            prepare(folder, config.to_dict(), computes=not is_finished)
            if is_finished:
                check_seal(folder)
            else:
                unseal(folder)
                _forget_failure(folder)
                run(config, folder)
        # A seal is not renewed: what has changed since must be noticed.
        if not (folder / _MANIFEST).exists():
            seal(folder)
        return files.read_json(folder / "results.json") if processes.writes() else {}


def _check_foreign(folder: pathlib.Path, config: dict) -> None:
    """Raises `ValueError` if a file that a run would overwrite or remove is not a run's own."""
    if foreign := _find_foreign(folder, config):
        raise ValueError(
            f"workdir={str(folder)!r} holds {foreign} of something else; remove it or choose "
            "another --workdir"
        )


def _find_foreign(folder: pathlib.Path, config: dict) -> str | None:
    """Finds a file in a work directory that has a name of a run's, but that no run wrote.

    A run records its configuration and environment before it writes results. The user may have
    removed a damaged record of the configuration.
    """
    # Another program may write a file of this name, but not with our keys.
    if read_environments(folder):
        return None
    if (folder / "config.json").exists():
        # `check_config` compares the record of a run that has started.
        is_own = has_started(folder) or _has_keys_of(folder / "config.json", config)
        return None if is_own else "config.json"
    for name in ("environment.json", FAILURE, *_RESULTS):
        if (folder / name).exists():
            return name
    # Training removes earlier events.
    for path in (folder / "tensorboard").glob("events.*"):
        return f"tensorboard/{path.name}"
    return None


def _has_keys_of(path: pathlib.Path, config: dict) -> bool:
    """Tells whether a file is JSON with the keys of a configuration.

    A process that was killed at its start may have left the record of other values.
    """
    try:
        recorded = files.read_json(path)
    except ValueError:
        return False
    return isinstance(recorded, dict) and recorded.keys() >= config.keys() - {*_MEASURED_KEYS}


@contextlib.contextmanager
def prepared(
    folder: str | os.PathLike, config: dict, computes: bool = True, unrecorded: str | None = None
) -> Iterator[pathlib.Path]:
    """Claims and prepares a work directory for the work in the context, and gives its path.

    Args:
        folder: as in `prepare`.
        config: likewise.
        computes: likewise.
        unrecorded: the name of a result beside which earlier versions left no record. A folder that
            holds it, and no record, is accepted.

    Raises:
        ValueError: as `claims.claim` and `prepare`, and for files that no run wrote. Work that is
            refused before it writes leaves no folder.
    """
    folder = pathlib.Path(folder)
    with _removed_if_empty(folder), claims.claim(folder):
        if unrecorded is None or not (folder / unrecorded).exists():
            _check_foreign(folder, config)
        with _undone_if_refused(folder):
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
    # The content to restore; None removes the file. A run that has not started keeps no record.
    earlier: dict[pathlib.Path, bytes | None] = {}
    was_started = has_started(folder)
    for name in (*_RECORD, _MANIFEST, FAILURE):
        path = folder / name
        earlier[path] = None
        if was_started and path.is_file():
            earlier[path] = path.read_bytes()
    before = _list_times(folder)
    try:
        yield
    except (ValueError, FileNotFoundError):
        # No file was added or written since; some may have been removed.
        is_untouched = _list_times(folder).items() <= before.items()
        if processes.writes() and is_untouched:
            # On a disk that can no longer be written to, the refusal itself is reported.
            with contextlib.suppress(OSError):
                for path, content in earlier.items():
                    _restore(path, content)
            # Training creates it before its first step; `rmdir` removes it only if it is empty.
            with contextlib.suppress(OSError):
                (folder / "checkpoints").rmdir()
        raise


def _list_times(folder: pathlib.Path) -> dict[str, int]:
    """Lists when each file of results, in subfolders, too, was last written.

    Records do not count as results. This includes those of the networks in a study's folder, which
    a refusal restores as well.
    """
    times = {}
    for root, _, names in os.walk(folder):
        for name in names:
            is_record = name in (*_RECORD, _MANIFEST, claims.CLAIM)
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
        files.write(path, content)
