"""The files that a training run writes, while it trains and at its end."""

import json
import logging
import pathlib
import struct
import time
from typing import Any

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from cnnjax import transfer, weights
from cnnjax.data.splits import IGNORED
from cnnjax.runtime import files, processes
from cnnjax.train import evaluate, report, step
from cnnjax.train.training import Scored, Training

_LOG = logging.getLogger("cnnjax")
# The number of images, and of images with masks, that the report shows.
_MISTAKES = 36
_SCENES = 6
# Drawing the curves takes half a second, so they are drawn again after some time only.
_SECONDS_BETWEEN_CURVES = 30.0
# Lists the final scores before each extension of a run.
EXTENDED = "extended.json"
# TensorBoard looks for names with "tfevents".
_EVENTS = "events.out.tfevents.0"


# ------------------------------------------------------------------ while the run trains


class History:
    """One entry per epoch, in metrics.jsonl, as TensorBoard events and as curves.

    Attributes:
      entries: the measurements of each epoch.
      seconds: of training.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._events = folder / "tensorboard"
        self._last_drawing = time.monotonic()
        self.entries: list[dict] = []
        self.seconds = 0.0

    def restore(self, entries: list[dict], seconds: float) -> None:
        """Continues from a checkpoint; the files may be ahead of it, so they are rewritten."""
        self.entries = entries
        self.seconds = seconds
        self._write_metrics()
        write_events(self._events, entries)

    def append(self, entry: dict, seconds: float) -> None:
        """Adds an epoch and the seconds that it took, and writes it at once."""
        self.entries.append(entry)
        self.seconds += seconds
        self._write_metrics()
        if len(self.entries) == 1:
            write_events(self._events, self.entries)
        else:
            append_events(self._events, [entry])
        seconds_since_drawing = time.monotonic() - self._last_drawing
        if seconds_since_drawing > _SECONDS_BETWEEN_CURVES and processes.writes():
            report.write_curves(self._folder, self.entries)
            self._last_drawing = time.monotonic()

    def _write_metrics(self) -> None:
        lines = [json.dumps(entry) + "\n" for entry in self.entries]
        files.write(self._folder / "metrics.jsonl", "".join(lines))

    def best(self) -> dict | None:
        """Finds the first epoch of the smallest validation error; None without validation."""
        return _best(self.entries)


def _best(entries: list[dict]) -> dict | None:
    measured = [entry for entry in entries if "validation_error" in entry]
    return min(measured, key=lambda entry: entry["validation_error"], default=None)


def stops_early(epochs: int, entries: list[dict]) -> bool:
    """Tells whether the validation error has not fallen for a number of epochs.

    Args:
      epochs: as `early_stopping` in the configuration; 0 never stops early.
      entries: the history.
    """
    best = _best(entries)
    return best is not None and 0 < epochs <= len(entries) - best["epoch"]


def write_events(folder: pathlib.Path, entries: list[dict]) -> None:
    """Writes all epochs so far as TensorBoard events, and removes older files of events."""
    if not processes.writes():
        return
    with files.naming(folder):
        folder.mkdir(exist_ok=True)
        for old_file in folder.glob("events.*"):
            old_file.unlink()
        version = event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")
        (folder / _EVENTS).write_bytes(_record(version))
    append_events(folder, entries)


def append_events(folder: pathlib.Path, entries: list[dict]) -> None:
    """Appends epochs to the file of events, which TensorBoard reads while it grows.

    tensorboardX's own writer writes in a thread, where a full disk would go unnoticed.
    """
    if not processes.writes():
        return
    records = []
    for entry in entries:
        for name, value in entry.items():
            if name not in ("epoch", "step"):
                scalar = summary.scalar(name, value)
                event = event_pb2.Event(wall_time=time.time(), step=entry["step"], summary=scalar)
                records.append(_record(event))
    with files.naming(folder), (folder / _EVENTS).open("ab") as file:
        file.write(b"".join(records))


def _record(event: event_pb2.Event) -> bytes:
    """Encodes an event as a TFRecord: its length and its bytes, each with a checksum."""

    def checksum(content: bytes) -> bytes:
        return struct.pack("<I", masked_crc32c(content))

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


# ------------------------------------------------------------------ at the end


def final_scores(entry: dict, last: dict, trained: Scored | None, tested: Scored) -> dict:
    """Collects the scores of the final weights.

    Args:
      entry: the history's entry of the epoch whose weights were kept.
      last: the entry of the last epoch.
      trained: scores on the training set, in evaluation mode and without augmentation; None for
        streamed data, where the mean over the epoch's steps is used instead.
      tested: scores on the test set.
    """
    final = {name: last[name] for name in ("epoch", "step")}
    final |= {name: entry[name] for name in ("train_loss", "train_error")}
    if trained:
        final |= {f"train_{name}": trained.scores[name] for name in ("loss", "error")}
    final |= {name: value for name, value in entry.items() if name.startswith("validation_")}
    return final | {f"test_{name}": value for name, value in tested.scores.items()}


def write_weights(folder: pathlib.Path, state: step.State) -> None:
    """Writes the weights that were scored, of host arrays, as weights.safetensors."""
    weights.save_torchvision(state.variables_to_score(), folder / transfer.WEIGHTS)


def write_predictions(folder: pathlib.Path, training: Training, tested: Scored) -> None:
    """Writes the predictions on the test set, and the worst mistakes, as test.npz.

    The worst mistakes are the most confident ones; for masks, those with most wrong pixels. For
    several classes per image, the outputs are written instead.
    """
    outputs = tested.outputs
    labels = tested.labels
    arrays: dict[str, Any] = {"labels": labels}
    if training.config.loss == "sigmoid":
        arrays["outputs"] = outputs
    elif training.config.loss == "pixelwise":
        predicted = outputs.argmax(-1).astype(np.uint8)
        wrong_share = ((predicted != labels) & (labels != IGNORED)).mean((1, 2))
        arrays |= {"predicted": predicted, "shown": np.argsort(-wrong_share)[:_SCENES]}
    else:
        predicted = outputs.argmax(-1)
        # The largest softmax probability; without the shift, large logits would overflow.
        exponentials = np.exp(outputs - outputs.max(-1, keepdims=True))
        confidence = exponentials.max(-1) / exponentials.sum(-1)
        wrong = np.flatnonzero(predicted != labels)
        shown = wrong[np.argsort(-confidence[wrong])][:_MISTAKES]
        arrays |= {"predicted": predicted, "confidence": confidence, "shown": shown}
    if "shown" in arrays:
        arrays["images"] = np.zeros((0, 1, 1, 1), np.uint8)
        if len(arrays["shown"]):
            arrays["images"] = training.data.test_images(arrays["shown"])
    files.write_arrays(folder / "test.npz", arrays)


def write_results(
    folder: pathlib.Path,
    *,
    training: Training,
    origin: dict,
    state: step.State,
    history: History,
    final: dict,
    chosen: dict,
    tested: Scored,
    seconds: float,
) -> None:
    """Writes results.json, the last of the results: with it, the run is finished.

    `origin` is what the weights come from besides the configuration: images, network, and initial
    weights.
    """
    results = {
        "kind": "train",
        "final": final,
        "weights": chosen,
        "history": history.entries,
        "classes": list(training.data.classes),
        "image_shape": list(training.data.image_shape),
        "mean": training.data.moments[0].tolist(),
        "std": training.data.moments[1].tolist(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        **origin,
    }
    if (folder / EXTENDED).exists():
        # If an extension was interrupted at its start and given up, its last entry is this run.
        recorded = files.read_json(folder / EXTENDED)
        if earlier := [scores for scores in recorded if scores["epoch"] < final["epoch"]]:
            results["extended_from"] = earlier
    results |= {
        "by_class": evaluate.by_class(training.config.loss, tested.outputs, tested.labels),
        "n_train": training.data.n_train,
        "n_validation": training.data.n_validation,
        "n_test": len(tested.labels),
        "test_digest": training.data.test_digest,
        "training_seconds": round(history.seconds, 1),
        "seconds": round(seconds, 1),
    }
    files.write_json(folder / "results.json", results)
