"""Checkpoints: written by orbax while training goes on, and believed only if every file has the
hash that it was written with."""

import contextlib
import copy
import hashlib
import logging
import os
import pathlib
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from cnnjax.runtime import workdir
from cnnjax.train import tensorstore_noise

_LOG = logging.getLogger("cnnjax")
_MANIFEST = "manifest.json"


def _hashes(folder: pathlib.Path) -> dict[str, str]:
    """The SHA-256 of every file under a folder, by relative path."""
    found = {}
    for path in sorted(
        path for path in folder.rglob("*") if path.is_file() and path != folder / _MANIFEST
    ):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return found


def _damage(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        recorded = workdir.read_json(folder / _MANIFEST)
    except FileNotFoundError:
        return f"it has no {_MANIFEST}, so it was not written to its end"
    except (OSError, ValueError) as error:
        return f"its {_MANIFEST} cannot be read ({error})"
    if not isinstance(recorded, dict):
        return f"its {_MANIFEST} is not a list of hashes by name"
    found = _hashes(folder)
    changed = [
        name
        for name in sorted(recorded.keys() | found.keys())
        if recorded.get(name) != found.get(name)
    ]
    return f"{changed[0]} is not as it was written" if changed else None


def _described(state) -> dict[str, list]:
    """The shape and, last, the dtype of a state's arrays, by path."""
    return {
        jax.tree_util.keystr(path): [*leaf.shape, str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _leaves(state) -> dict[str, np.ndarray]:
    """A state's arrays on the host, by path."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


class Checkpoints:
    """A folder of checkpoints, of which the last `keep` are kept, and the one of the smallest
    metric.

    A context manager: leaving it waits for what is still being written. A state is any tree of
    arrays, a record any JSON.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()  # orbax refuses relative paths
        logging.getLogger("absl").setLevel(
            logging.CRITICAL
        )  # orbax tells every step; what fails is raised here
        tensorstore_noise.quieten()
        best = BestN(
            get_metric_fn=lambda metrics: metrics["metric"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = AnyPreservationPolicy([LatestN(keep), best])
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
            with contextlib.suppress(Exception):  # it repeats a failure to write that has been told
                self._manager.close()

    def _finish(self) -> None:
        """Waits for the checkpoint that is being written. Raises `RuntimeError` if it could not
        be."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise RuntimeError(
                f"a checkpoint could not be written to {self.folder}: {failure}; the earlier "
                "ones are whole"
            ) from failure

    def _seal(self, step: int) -> None:
        """Writes the manifest once all else is on the disk."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                workdir.write_json(
                    self.folder / str(step) / _MANIFEST, _hashes(self.folder / str(step))
                )
        except Exception as error:  # told to whoever saves or leaves next
            self._failure = error

    def save(self, step: int, state, record: dict, metric: float | None = None) -> None:
        """Begins to write a checkpoint, unless there is one of this step; the state's memory and
        the record may be changed at once.

        Raises `RuntimeError` if this one or the one before could not be written.
        """
        self._finish()
        if step in self._manager.all_steps():
            return
        # Copied, since a host array that was fetched from a CPU device may share the device's
        # memory.
        leaves = {name: leaf.copy() for name, leaf in _leaves(state).items()}
        try:
            header = {
                "record": copy.deepcopy(record),
                "metric": metric,
                "leaves": _described(state),
            }
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(leaves), header=ocp.args.JsonSave(header)
                ),
                metrics=None if metric is None else {"metric": metric},
                force=True,
            )
        except (OSError, ValueError) as error:
            self._failure = error
            self._finish()
        self._writing = threading.Thread(target=self._seal, args=(step,))
        self._writing.start()

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are whole, in order."""
        self._finish()
        return [
            step
            for step in sorted(self._manager.all_steps())
            if _damage(self.folder / str(step)) is None
        ]

    def _header(self, step: int) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(header=ocp.args.JsonRestore()))[
            "header"
        ]

    def restore_step(self, step: int, like):
        """One checkpoint -> (step, state, record). Raises `ValueError` if it is of another state
        than `like`."""
        header, expected = self._header(step), _described(like)
        for name in sorted(header["leaves"].keys() | expected.keys()):
            if header["leaves"].get(name) != expected.get(name):
                raise ValueError(
                    f"{self.folder / str(step)} holds {header['leaves'].get(name)} for {name}, "
                    f"where {expected.get(name)} is "
                    "expected: it is of another model or optimizer"
                )
        targets = {name: np.zeros(shape, dtype) for name, (*shape, dtype) in expected.items()}
        found = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(targets))
        )["state"]
        return (
            step,
            jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in expected]),
            header["record"],
        )

    def restore(self, like):
        """The newest whole checkpoint -> (step, state of host arrays, record), or None if there is
        none.

        `like` gives the state's structure, shapes and dtypes. A damaged checkpoint is put aside,
        with a warning. Raises `ValueError` if all are damaged, or if the state is of another
        structure.
        """
        self._finish()
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            damage = _damage(self.folder / str(step))
            if damage is None:
                return self.restore_step(step, like)
            _LOG.warning(
                "checkpoint %s is damaged: %s; it is put aside, and the one before is used",
                self.folder / str(step),
                damage,
            )
            if jax.process_index() == 0:
                (self.folder / str(step)).rename(self.folder / f"damaged-{step}-{time.time_ns()}")
            self._manager.reload()
        if steps:
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged; remove the folder to start from "
                "the beginning"
            )
        return None

    def restore_best(self, like):
        """The checkpoint of the smallest metric -> (step, state, record). Raises `ValueError` if
        there is none, or it is damaged."""
        self._finish()
        metrics = {step: self._header(step)["metric"] for step in self._manager.all_steps()}
        measured = {step: metric for step, metric in metrics.items() if metric is not None}
        if not measured:
            raise ValueError(f"no checkpoint in {self.folder} has a metric")
        best = min(measured, key=measured.get)
        if damage := _damage(self.folder / str(best)):
            raise ValueError(
                f"the best checkpoint, {self.folder / str(best)}, is damaged: {damage}"
            )
        return self.restore_step(best, like)
