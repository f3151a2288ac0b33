"""Checkpoints, written by orbax while training continues.

Each has a manifest of its files' hashes, and is used only if every file has its hash.
"""

import contextlib
import copy
import logging
import os
import pathlib
import shutil
import threading
import time
import traceback
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

from cnnjax.runtime import files, processes
from cnnjax.runtime.paths import sha256
from cnnjax.train import tensorstore_noise

_LOG = logging.getLogger("cnnjax")
_MANIFEST = "manifest.json"
# The module of jax in which processes wait for each other.
_WAITING = "jax.experimental.multihost_utils"
# Parts of a state that checkpoints of earlier versions lack, and the parts that they begin from.
_ADDED_PARTS = {".ema_batch_stats": ".batch_stats"}


def _hashes(folder: pathlib.Path) -> dict[str, str]:
    """Computes the SHA-256, by path, of every file in a folder except the manifest."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path == folder / _MANIFEST:
            continue
        hashes[path.relative_to(folder).as_posix()] = sha256(path)
    return hashes


def _damage(folder: pathlib.Path) -> str | None:
    """Says what is wrong with a checkpoint's files; None if nothing is."""
    try:
        recorded = files.read_json(folder / _MANIFEST)
    except FileNotFoundError:
        return f"it has no {_MANIFEST}, so it was not written to its end"
    except (OSError, ValueError) as error:
        return f"its {_MANIFEST} cannot be read ({error})"
    if not isinstance(recorded, dict) or not recorded:
        return f"its {_MANIFEST} is not a list of hashes by name"
    try:
        hashes = _hashes(folder)
    except FileNotFoundError:
        # Of several processes, the first one deletes old checkpoints.
        return "a file was removed while it was read"
    # Other files do no harm, such as those that some systems leave in every folder they copy.
    for name in sorted(recorded):
        if recorded[name] != hashes.get(name):
            return f"{name} is not as it was written"
    return None


def was_completed(folder: pathlib.Path) -> bool:
    """Tells whether a folder has a checkpoint that was written to its end, damaged now or not."""
    return any(folder.glob(f"*/{_MANIFEST}"))


def _leaves(state) -> dict:
    """Lists a state's arrays by path."""
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths_and_leaves}


def _shapes_and_dtypes(state) -> dict[str, list]:
    """Lists the shape and, last, the dtype of a state's arrays, by path."""
    return {name: [*leaf.shape, str(leaf.dtype)] for name, leaf in _leaves(state).items()}


def _saved_name(name: str, saved: dict[str, list]) -> str:
    """Returns the name of the array in a checkpoint that holds a leaf of a state."""
    for added, origin in _ADDED_PARTS.items():
        if name not in saved and name.startswith(added):
            return origin + name.removeprefix(added)
    return name


def _has_waited_in_vain(failure: Exception) -> bool:
    """Tells whether a process could not write because another one, which writes too, is gone."""
    if isinstance(failure, (TimeoutError, jax.errors.JaxRuntimeError)):
        return True
    # jaxlib also raises `ValueError`, as tensorstore does if the disk is full.
    frames = traceback.walk_tb(failure.__traceback__)
    return any(frame.f_globals.get("__name__") == _WAITING for frame, _ in frames)


class NotWritten(RuntimeError):
    """A checkpoint could not be written to the disk."""


class Checkpoints:
    """The checkpoints of a folder; leaving their context waits for unfinished ones.

    A checkpoint holds a state, any tree of arrays, and a record, anything that JSON holds.

    Args:
      folder: where the checkpoints are.
      keep: the number of last checkpoints to keep, at least 2, besides the best one.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        # orbax refuses relative paths.
        self.folder = pathlib.Path(folder).absolute()
        # orbax logs every step through absl; failures are raised here instead.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        tensorstore_noise.quieten()
        # If the newest one is damaged, the one before is used.
        self._keep = max(keep, 2)
        self._manager = self._open()
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None

    def _open(self) -> ocp.CheckpointManager:
        """Opens the folder, and removes what was not written to its end."""
        # Without a policy, orbax deletes no checkpoint: it would do so before the manifest of the
        # new one is written, and a process that is killed in between needs the old ones.
        options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self.folder, options=options)

    def _close(self) -> None:
        # The first of these repeats a failure to write that is known already.
        for finish in (self._manager.wait_until_finished, self._manager.close):
            with contextlib.suppress(Exception):
                finish()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.wait()
            if error is None:
                self._raise_failure()
            elif self._failure is not None:
                # The error that ends the run must not be hidden by this one.
                _LOG.warning("%s", self._describe(self._failure))
        finally:
            self._close()

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / str(step)

    def _all_steps(self) -> list[int]:
        """Lists the steps of all checkpoints, in order."""
        # orbax does not notice which ones `_delete_old` has deleted.
        names = {path.name for path in self.folder.iterdir()}
        return sorted(step for step in self._manager.all_steps() if str(step) in names)

    def wait(self) -> None:
        """Waits for the checkpoint that is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def has_failed(self) -> bool:
        """Tells whether the last checkpoint is known to have failed; the next `save` retries."""
        return self._failure is not None

    def _describe(self, failure: Exception) -> str:
        return (
            f"a checkpoint could not be written to {self.folder}: {failure}; the earlier ones are "
            "whole"
        )

    def _raise_failure(self) -> None:
        """Raises `RuntimeError` if the last checkpoint could not be written."""
        if self._failure is None:
            return
        failure = self._failure
        self._failure = None
        kind = RuntimeError if _has_waited_in_vain(failure) else NotWritten
        raise kind(self._describe(failure)) from failure

    def _seal(self, step: int, best: int | None) -> None:
        """Writes the manifest once all other files are on the disk; deletes old checkpoints."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = self._path(step)
                files.write_json(folder / _MANIFEST, _hashes(folder))
        except Exception as error:
            # The next `save` or the end of the context looks at it.
            self._failure = error
            if jax.process_index() == 0:
                # Without its manifest it is of no use, and would be in the way of another try.
                shutil.rmtree(self._path(step), ignore_errors=True)
            return
        if jax.process_index() == 0:
            self._delete_old(best)

    def _delete_old(self, best: int | None) -> None:
        """Deletes all checkpoints but the last ones and that of the best step."""
        # Those that cannot be deleted now are tried again after the next checkpoint.
        with contextlib.suppress(OSError):
            steps = self._all_steps()
            for step in set(steps) - {*steps[-self._keep :], best}:
                shutil.rmtree(self._path(step), ignore_errors=True)

    def save(self, step: int, state, record: dict, best: int | None = None) -> None:
        """Begins to write a checkpoint, unless there is one of this step.

        The caller may change the state's memory and the record at once. If the last checkpoint
        could not be written, as on a disk that was full for a moment, this one is written before
        the call returns.

        Args:
          step: the number of the step.
          state: the state, host arrays.
          record: what else to save, as JSON.
          best: the step whose checkpoint is kept, however old; None if there is none.

        Raises:
          RuntimeError: if the last checkpoint could not be written, and this one cannot either; of
            several processes, at the first failure.
        """
        self.wait()
        # Several processes could only retry together, and perhaps not all have failed.
        if jax.process_count() > 1:
            self._raise_failure()
        failure = self._failure
        if failure is not None:
            # orbax would raise it once more.
            self._failure = None
            self._close()
            self._manager = self._open()
        if step in self._manager.all_steps():
            return
        # Copied, since a host array that was fetched from a CPU device may share its memory.
        leaves = {name: np.array(leaf) for name, leaf in _leaves(state).items()}
        header = {
            "record": copy.deepcopy(record),
            "leaves": _shapes_and_dtypes(state),
        }
        contents = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves), header=ocp.args.JsonSave(header)
        )
        try:
            self._manager.save(step, args=contents, force=True)
        except (OSError, ValueError) as error:
            self._failure = error
            # The other processes, if there are any, wait for this one.
            if jax.process_count() > 1:
                self._raise_failure()
        else:
            self._writing = threading.Thread(target=self._seal, args=(step, best))
            self._writing.start()
        if failure is not None:
            self.wait()
            self._raise_failure()
            _LOG.warning("%s, and that of step %d is written now", self._describe(failure), step)

    def steps(self) -> list[int]:
        """Lists the steps of the checkpoints that are not damaged, in order."""
        self.wait()
        return [step for step in self._all_steps() if _damage(self._path(step)) is None]

    def _header(self, step: int) -> dict:
        contents = ocp.args.Composite(header=ocp.args.JsonRestore())
        return self._manager.restore(step, args=contents)["header"]

    def record(self, step: int) -> dict:
        """Reads the record of one checkpoint, without its state."""
        return self._header(step)["record"]

    def restore_step(self, step: int, like):
        """Reads one checkpoint.

        Averages of BatchNorm's statistics, which checkpoints of earlier versions lack, begin from
        the statistics.

        Args:
          step: its step.
          like: a tree of the state's structure, shapes and dtypes.

        Returns:
          The state (host arrays) and the record.

        Raises:
          ValueError: if the checkpoint's state is not like `like`.
        """
        header = self._header(step)
        saved = header["leaves"]
        expected = _shapes_and_dtypes(like)
        for name in sorted(saved.keys() | expected.keys()):
            found = saved.get(_saved_name(name, saved))
            if found != expected.get(name):
                raise ValueError(
                    f"{self._path(step)} holds {found} for {name}, where "
                    f"{expected.get(name)} is expected: it is of another model, optimizer or "
                    "number of classes"
                )
        targets = {
            _saved_name(name, saved): np.zeros(shape, dtype)
            for name, (*shape, dtype) in expected.items()
        }
        contents = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
        leaves = self._manager.restore(step, args=contents)["state"]
        structure = jax.tree.structure(like)
        state = jax.tree.unflatten(
            structure, [leaves[_saved_name(name, saved)] for name in expected]
        )
        return state, header["record"]

    def restore(self, like, check_record: Callable[[dict], None] | None = None):
        """Reads the newest checkpoint that is not damaged.

        Newer ones, which are damaged, are renamed, with a warning. If this raises, all stay as they
        are. A run that was killed while it wrote its first checkpoint has none.

        Args:
          like: a tree of the state's structure, shapes and dtypes.
          check_record: called with the record before the state is read.

        Returns:
          The step, the state (host arrays) and the record; None if there is no checkpoint.

        Raises:
          ValueError: if checkpoints were completed but all are damaged, or if the state is of
            another structure.
        """
        self.wait()
        damages: dict[int, str] = {}
        restored = None
        for step in reversed(self._all_steps()):
            if damage := _damage(self._path(step)):
                damages[step] = damage
                continue
            if check_record is not None:
                check_record(self.record(step))
            restored = (step, *self.restore_step(step, like))
            break
        if restored is None and was_completed(self.folder):
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged; remove the folder to start from "
                "the beginning"
            )
        if damages:
            self._put_aside(damages)
        if damages and restored is None:
            _LOG.warning("no checkpoint was ever written to its end: starting from the beginning")
        return restored

    def _put_aside(self, damages: dict[int, str]) -> None:
        """Renames damaged checkpoints; `damages` says by step what is wrong with them."""
        for step, damage in damages.items():
            _LOG.warning(
                "checkpoint %s is damaged: %s; it is renamed to damaged-%d-*, which may be "
                "deleted, and the one before is used",
                self._path(step),
                damage,
                step,
            )
        # Renamed once every process has read them, and before any looks for the others.
        processes.wait_for_others("a damaged checkpoint is read")
        if jax.process_index() == 0:
            for step in damages:
                self._path(step).rename(self.folder / f"damaged-{step}-{time.time_ns()}")
        processes.wait_for_others("a damaged checkpoint is put aside")
        self._manager.reload()
