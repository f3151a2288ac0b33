"""What a training run leaves in its work directory, while it goes on and at its end."""

import contextlib
import json
import logging
import pathlib
import time
from typing import Any

import jax
import numpy as np
import safetensors
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from cnnjax import transfer, weights
from cnnjax.data import augment
from cnnjax.runtime import backend, workdir
from cnnjax.train import evaluate, report, step
from cnnjax.train.adopt import EXTENDED
from cnnjax.train.run import Run, Scored

_LOG = logging.getLogger("cnnjax")
# Images, and images with masks, that the report shows.
_MISTAKES = 36
_SCENES = 6
# The curves are drawn again after so many seconds, since drawing takes half of one.
_SECONDS_BETWEEN_CURVES = 30.0


# ------------------------------------------------------------------ while training goes on


class History:
    """One entry an epoch, in metrics.jsonl, as TensorBoard events and as curves.

    Attributes:
      entries: what was measured, epoch by epoch.
      seconds: of training.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._events: EventsWriter | None = None
        self._drawn = time.monotonic()
        self.entries: list[dict] = []
        self.seconds = 0.0

    def restore(self, entries: list[dict], seconds: float) -> None:
        """Go on from a checkpoint; the files may be ahead of it, or damaged."""
        self.entries = entries
        self.seconds = seconds
        self._write_metrics()
        self._events = write_events(self._folder / "tensorboard", entries)

    def append(self, entry: dict, seconds: float) -> None:
        """Add an epoch that took some seconds, and write it at once."""
        self.entries.append(entry)
        self.seconds += seconds
        self._write_metrics()
        if self._events is None:
            self._events = write_events(self._folder / "tensorboard", self.entries)
        else:
            _append_event(self._events, entry, self._folder / "tensorboard")
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_CURVES and backend.writes():
            report.write_curves(self._folder, self.entries)
            self._drawn = time.monotonic()

    def close(self) -> None:
        """Close the file of events."""
        # A full disk was told when the event was written.
        with contextlib.suppress(OSError):
            if self._events is not None:
                self._events.close()

    def _write_metrics(self) -> None:
        lines = [json.dumps(entry) + "\n" for entry in self.entries]
        workdir.write(self._folder / "metrics.jsonl", "".join(lines))

    def best(self) -> dict | None:
        """The first epoch of the smallest validation error; None without validation."""
        measured = [entry for entry in self.entries if "validation_error" in entry]
        return min(measured, key=lambda entry: entry["validation_error"], default=None)

    def epochs_since_best(self) -> int:
        best = self.best()
        return 0 if best is None else len(self.entries) - best["epoch"]


def write_events(folder: pathlib.Path, entries: list[dict]) -> EventsWriter | None:
    """Begin a file of TensorBoard events with what was measured so far; older files are removed."""
    if not backend.writes():
        return None
    try:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.*"):
            old.unlink()
        # Unlike SummaryWriter, it writes in this thread: an event is there when the epoch ends.
        writer = EventsWriter(str(folder / "events"))
        for entry in entries:
            _add_event(writer, entry)
        writer.flush()
    except OSError as error:
        # A full disk's error names no file.
        error.filename = str(folder)
        raise
    return writer


def _append_event(writer: EventsWriter, entry: dict, folder: pathlib.Path) -> None:
    try:
        _add_event(writer, entry)
        writer.flush()
    except OSError as error:
        error.filename = str(folder)
        raise


def _add_event(writer: EventsWriter, entry: dict) -> None:
    for name, value in entry.items():
        if name not in ("epoch", "step"):
            event = event_pb2.Event(summary=summary.scalar(name, value), step=entry["step"])
            event.wall_time = time.time()
            writer.write_event(event)


# ------------------------------------------------------------------ at the end


def final_scores(entry: dict, last: dict, trained: Scored | None, tested: Scored) -> dict:
    """Put together the scores that the final weights have.

    Args:
      entry: the epoch that the weights are of.
      last: the last epoch.
      trained: scores on the training set, in evaluation mode and without augmentation; for streamed
        data the mean over that epoch's steps stays.
      tested: scores on the test set.
    """
    final = {name: last[name] for name in ("epoch", "step")}
    final |= {name: entry[name] for name in ("train_loss", "train_error")}
    if trained:
        final |= {f"train_{name}": trained.scores[name] for name in ("loss", "error")}
    final |= {name: value for name, value in entry.items() if name.startswith("validation_")}
    return final | {f"test_{name}": value for name, value in tested.scores.items()}


def write_weights(folder: pathlib.Path, state: step.State) -> None:
    """Write the weights that were scored, a state of host arrays, as weights.safetensors."""
    path = folder / transfer.WEIGHTS
    try:
        weights.save_torchvision(state.evaluated(), path)
    except safetensors.SafetensorError as error:
        # Its name for an OSError.
        raise OSError(f"{path} could not be written: {error}") from error


def write_predictions(folder: pathlib.Path, run: Run, tested: Scored) -> None:
    """Write every prediction on the test set, and the images of the worst mistakes, as test.npz.

    The worst are the most confident ones, and for masks those with most pixels wrong. For several
    classes an image the outputs are kept.
    """
    outputs = tested.outputs
    labels = tested.labels
    arrays: dict[str, Any] = {"labels": labels}
    if run.config.loss == "sigmoid":
        arrays["outputs"] = outputs
    elif run.config.loss == "pixelwise":
        predicted = outputs.argmax(-1).astype(np.uint8)
        wrong_share = ((predicted != labels) & (labels != augment.IGNORED)).mean((1, 2))
        arrays |= {"predicted": predicted, "shown": np.argsort(-wrong_share)[:_SCENES]}
    else:
        predicted = outputs.argmax(-1)
        shifted = np.exp(outputs - outputs.max(-1, keepdims=True))
        confidence = shifted.max(-1) / shifted.sum(-1)
        wrong = np.flatnonzero(predicted != labels)
        shown = wrong[np.argsort(-confidence[wrong])][:_MISTAKES]
        arrays |= {"predicted": predicted, "confidence": confidence, "shown": shown}
    if "shown" in arrays:
        arrays["images"] = np.zeros((0, 1, 1, 1), np.uint8)
        if len(arrays["shown"]):
            arrays["images"] = run.data.test_images(arrays["shown"])
    workdir.write_arrays(folder / "test.npz", arrays)


def write_results(
    folder: pathlib.Path,
    *,
    run: Run,
    state: step.State,
    history: History,
    final: dict,
    chosen: dict,
    tested: Scored,
    seconds: float,
) -> None:
    """Write results.json, which makes a run a finished one."""
    results = {
        "kind": "train",
        "final": final,
        "weights": chosen,
        "history": history.entries,
        "classes": list(run.data.classes),
        "image_shape": list(run.data.image_shape),
        "mean": run.data.moments[0].tolist(),
        "std": run.data.moments[1].tolist(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }
    if (folder / EXTENDED).exists():
        results["extended_from"] = workdir.read_json(folder / EXTENDED)
    loss = run.config.loss
    if loss != "cross_entropy":
        results["by_class"] = evaluate.by_class(loss, tested.outputs, tested.labels)
    results |= {
        "n_train": run.data.n_train,
        "n_validation": run.data.n_validation,
        "n_test": len(tested.labels),
        "training_seconds": round(history.seconds, 1),
        "seconds": round(seconds, 1),
    }
    workdir.write_json(folder / "results.json", results)
