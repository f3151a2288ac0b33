"""Checkpoints, written by orbax while training continues.

Each has a manifest of its files' hashes, and is used only if every file has its hash.
"""

import contextlib
import copy
import logging
import os
import pathlib
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from cnnjax.runtime import backend, files
from cnnjax.runtime.paths import sha256
from cnnjax.train import tensorstore_noise

_LOG = logging.getLogger("cnnjax")
_MANIFEST = "manifest.json"
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
    hashes = _hashes(folder)
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


class NotWritten(RuntimeError):
    """A checkpoint could not be written to the disk."""


class _Best:
    """Preserves the checkpoint of the best step.

    orbax's own policy, `BestN`, ranks by metrics that are written with each checkpoint. Here, a
    checkpoint may be written before its state is scored.

    Attributes:
      step: the best step; None if there is none.
    """

    def __init__(self):
        self.step: int | None = None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Tells orbax which checkpoints to keep."""
        return [info.step == self.step for info in checkpoints]


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
        self._best = _Best()
        # orbax deletes old checkpoints before the manifest of the new one is written. A process
        # that is killed in between needs the one before.
        policy = AnyPreservationPolicy([LatestN(max(keep, 2)), self._best])
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True, preservation_policy=policy
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self._finish()
        finally:
            # Closing repeats a failure to write that has been raised already.
            with contextlib.suppress(Exception):
                self._manager.close()

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / str(step)

    def _finish(self) -> None:
        """Waits for the checkpoint that is being written; raises `RuntimeError` if it failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            failure = self._failure
            self._failure = None
            # Of several processes that write together, one that waits for another in vain gets
            # one of these errors.
            is_waiting = isinstance(failure, (TimeoutError, jax.errors.JaxRuntimeError))
            kind = RuntimeError if is_waiting else NotWritten
            raise kind(
                f"a checkpoint could not be written to {self.folder}: {failure}; the earlier "
                "ones are whole"
            ) from failure

    def _seal(self, step: int) -> None:
        """Writes the manifest once all other files are on the disk."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = self._path(step)
                files.write_json(folder / _MANIFEST, _hashes(folder))
        except Exception as error:
            # Raised by the next call of `_finish`.
            self._failure = error

    def save(self, step: int, state, record: dict, best: int | None = None) -> None:
        """Begins to write a checkpoint, unless there is one of this step.

        The caller may change the state's memory and the record at once.

        Args:
          step: the number of the step.
          state: the state, host arrays.
          record: what else to save, as JSON.
          best: the step whose checkpoint is kept, however old; None if there is none.

        Raises:
          RuntimeError: if this checkpoint or the one before could not be written.
        """
        self._finish()
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
        # Set first, since saving deletes the checkpoints that are not preserved.
        self._best.step = best
        try:
            self._manager.save(step, args=contents, force=True)
        except (OSError, ValueError) as error:
            self._failure = error
            self._finish()
        self._writing = threading.Thread(target=self._seal, args=(step,))
        self._writing.start()

    def steps(self) -> list[int]:
        """Lists the steps of the checkpoints that are not damaged, in order."""
        self._finish()
        steps = sorted(self._manager.all_steps())
        return [step for step in steps if _damage(self._path(step)) is None]

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

    def restore(self, like):
        """Reads the newest checkpoint that is not damaged.

        A damaged checkpoint is renamed, with a warning, and the one before is read. A run that was
        killed while it wrote its first checkpoint has none.

        Args:
          like: a tree of the state's structure, shapes and dtypes.

        Returns:
          The step, the state (host arrays) and the record; None if there is no checkpoint.

        Raises:
          ValueError: if checkpoints were completed but all are damaged, or if the state is of
            another structure.
        """
        self._finish()
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            folder = self._path(step)
            damage = _damage(folder)
            if damage is None:
                state, record = self.restore_step(step, like)
                return step, state, record
            _LOG.warning(
                "checkpoint %s is damaged: %s; it is put aside, and the one before is used",
                folder,
                damage,
            )
            # Renamed once every process has read it, and before any looks for the others.
            backend.wait_for_others("a damaged checkpoint is read")
            if jax.process_index() == 0:
                folder.rename(self.folder / f"damaged-{step}-{time.time_ns()}")
            backend.wait_for_others("a damaged checkpoint is put aside")
            self._manager.reload()
        if was_completed(self.folder):
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged; remove the folder to start from "
                "the beginning"
            )
        if steps:
            _LOG.warning("no checkpoint was ever written to its end: starting from the beginning")
        return None
