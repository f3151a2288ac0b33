"""Training from a configuration: data, steps, evaluation, checkpoints; the same engine for every network.

`check` refuses a bad configuration before anything is computed; `run` trains in a work directory, and goes on where an earlier
run in it stopped.
"""

import json
import logging
import math
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors
import tensorboardX

from cnnjax import report, transfer, weights
from cnnjax.data import arrays, augment, stream
from cnnjax.models import Network, create_model
from cnnjax.runtime import backend, configuration, signals, workdir
from cnnjax.train import defaults, evaluate, step
from cnnjax.train.checkpoints import Checkpoints
from cnnjax.train.optimizers import optimizer
from cnnjax.train.parallel import WAYS, Parallel
from cnnjax.train.run import build_model, is_streamed, moments_of
from cnnjax.train.schedules import Plateau, learning_rates

_LOG = logging.getLogger("cnnjax")
# How long the devices are left alone: signals are heeded, and losses looked at, that often. The CPU takes a step's memory anew in
# each call, page by page, which is an eighth of the ConvNet's time where a call is one step.
_SECONDS_A_CALL = 2.0
_MISTAKES, _SCENES = 36, 6  # images, and images with masks, that are shown in the report


def _has_validation(config: ml_collections.ConfigDict) -> bool:
    if config.n_validation:
        return True
    return is_streamed(config) and "validation" in stream.find_splits(
        config.dataset, config.data_dir
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Raises `ValueError`, naming the key, its value and what is accepted, for whatever can be seen to be wrong before computing."""
    configuration.check_keys(config, defaults.get_config(), "cnnjax.train.defaults")
    configuration.check_seed(config)
    least = dict.fromkeys(
        (
            "epochs",
            "batch_size",
            "accumulate",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "image_size",
        ),
        1,
    )
    least |= dict.fromkeys(("n_validation", "resize", "workers", "mixup", "weight_decay"), 0)
    for key, value in least.items():
        if config[key] < value:
            raise ValueError(f"{key}={config[key]} is not a number of at least {value}")
    for key in ("label_smoothing", "ema_decay", "momentum"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"{key}={config[key]} is not between 0 and 1, 1 excluded")
    for key, accepted in (
        ("loss", step.LOSSES),
        ("dtype", ("float32", "bfloat16")),
        ("test_views", (1, 2, 10)),
        ("parallel", WAYS),
        ("pixels", ("standardised", "imagenet", "centred")),
    ):
        if config[key] not in accepted:
            raise ValueError(f"{key}={config[key]!r} is not one of {', '.join(map(str, accepted))}")
    if config.augment.fill not in augment.FILLS:
        raise ValueError(
            f"augment.fill={config.augment.fill!r} is not one of {', '.join(augment.FILLS)}"
        )
    optimizer(config.optimizer, 0.0)
    learning_rates(config.schedule, 1, config.epochs)
    if config.schedule.name == "plateau" and not _has_validation(config):
        raise ValueError(
            "schedule.name='plateau' watches the validation error: n_validation=0 is not a positive number"
        )
    for field in ("num_classes", "dtype", "axis_name", "input_shape"):
        if field in config.model_fields:
            raise ValueError(
                f"model_fields.{field}={config.model_fields[field]!r}: the data and the keys of "
                "the configuration decide this field"
            )
    _check_parts(config, create_model(config.model, **config.model_fields))
    if not is_streamed(config):
        arrays.check_name(config.dataset)
    fitting = "cross_entropy" if is_streamed(config) else arrays.loss_of(config.dataset)
    if config.loss != fitting:
        raise ValueError(
            f"loss={config.loss!r} does not fit the labels of dataset={config.dataset!r}, which are for loss={fitting!r}"
        )
    if config.test_views > 1 and config.loss != "cross_entropy":
        raise ValueError(
            f"test_views={config.test_views} averages the probabilities of classes, for loss='cross_entropy'; loss="
            f"{config.loss!r} accepts 1"
        )
    if config.test_views == 10 and (
        not is_streamed(config) or 0 < config.resize <= config.image_size
    ):
        raise ValueError(
            "test_views=10 takes corners, which needs a streamed dataset and a resize above image_size: "
            f"dataset={config.dataset!r}, resize={config.resize}, image_size={config.image_size}"
        )


def _check_parts(config: ml_collections.ConfigDict, model: Network) -> None:
    """`check` of what is transferred, frozen and trained at rates of its own."""
    if config.initial_weights:
        transfer.weights_file(config.initial_weights)
    elif config.initial_parts:
        raise ValueError(
            f"initial_parts={config.initial_parts} needs initial_weights, a file or a run that they are taken from"
        )
    for pair in config.rates:
        if not (
            len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], (int, float))
            and 0 < pair[1] < math.inf
        ):
            raise ValueError(
                f"rates={pair} is not a pair of a part and a positive number, such as ('conv1', 0.1)"
            )
    for argument, parts in (
        ("initial_parts", config.initial_parts),
        ("rates", tuple(part for part, _ in config.rates)),
        ("freeze", config.freeze),
    ):
        transfer.select(model, tuple(parts), argument)
    if (
        config.freeze
        and not transfer.split(
            weights.variable_shapes(model)["params"], transfer.select(model, tuple(config.freeze))
        )[0]
    ):
        raise ValueError(f"freeze={config.freeze} leaves no parameter to train")


class _Resident:
    """A data set that lives on the devices; one call takes many steps."""

    damaged: int | None = None  # as `_Streamed`'s

    def __init__(self, config, parallel: Parallel):
        self.config, self.parallel = config, parallel
        self.data = arrays.load(config.dataset, config.data_dir, config.n_validation)
        self.classes, self.count, self.shape = (
            self.data.classes,
            len(self.data.train.images),
            self.data.train.images.shape[1:],
        )
        validation = self.data.validation
        self.n_validation = 0 if validation is None else len(validation.labels)
        self.moments = parallel.replicate(
            moments_of(config, *arrays.normalization(self.data.train.images))
        )
        self._placed = parallel.replicate(tuple(self.data.train))
        self._epoch, self._order = None, None
        self._seconds: list[float] = []  # of one step, call by call

    def advance(self, recipe, state, rates, numbers, first: int, last: int):
        """Takes steps from `first` to `last`, of one epoch, or as many of them as fill a call -> (state, the step reached)."""
        epoch = first // (self.count // self.config.batch_size)
        if self._epoch != epoch:
            self._epoch, self._order = (
                epoch,
                self.parallel.replicate(step.epoch_order(self.count, epoch, self.config.seed)),
            )
        # The first call compiles and the second times one step.
        at_once = max(1, int(_SECONDS_A_CALL / min(self._seconds))) if len(self._seconds) > 1 else 1
        last = min(last, first + min(self.parallel.gather(at_once)))
        began = time.monotonic()
        state = step.resident_steps(self.parallel, recipe, self.config.batch_size)(
            state, self._placed, self._order, self.moments, rates, np.int32(last), numbers
        )
        jax.block_until_ready(state)
        self._seconds = [*self._seconds, (time.monotonic() - began) / (last - first)][-3:]
        return state, last

    def evaluation(
        self, name: str, views: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]] | None:
        """A split's batches of images and labels, in order; None where there is no such split."""
        split, size = getattr(self.data, name), self.config.batch_size
        return split and zip(
            evaluate.batches_of(split.images, size), evaluate.batches_of(split.labels, size)
        )

    def test_images(self, numbers: np.ndarray) -> np.ndarray:
        return self.data.test.images[numbers]


class _Streamed:
    """A data set that is read and decoded as it is needed; one call takes one step."""

    def __init__(self, config, parallel: Parallel):
        self.config, self.parallel = config, parallel
        self.sources = stream.open_splits(config.dataset, config.data_dir, config.n_validation)
        self.classes, self.count = self.sources["train"].classes, len(self.sources["train"])
        self.n_validation = len(self.sources.get("validation", ()))
        self.shape = (config.image_size, config.image_size, 3)
        self.moments = parallel.replicate(moments_of(config, *augment.IMAGENET))
        self._batches: Iterator | None = None
        self._told: set[int] = set()
        self.damaged = (
            0 if config.skip_damaged else None
        )  # images that this process passed over in this epoch; None where they are not

    def _read(self, name: str, size: int, *, train: bool, **options):
        source, workers = self.sources[name], self.config.workers
        # Every evaluation starts its worker processes anew, which takes longer than a few images.
        if not train and len(source) < stream.FEW_IMAGES:
            workers = 0
        return stream.batches(
            source,
            self.config.batch_size,
            self.config.seed,
            size,
            resize=self.config.resize,
            train=train,
            workers=workers,
            **options,
        )

    def advance(self, recipe, state, rates, numbers, first: int, last: int):
        if self._batches is None:
            steps = range(first, self.config.epochs * (self.count // self.config.batch_size))
            self._batches = self._read(
                "train",
                self.config.image_size,
                train=True,
                steps=steps,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                skip_damaged=self.config.skip_damaged,
            )
        images, labels, *damaged = next(self._batches)
        if damaged:
            self._count(damaged[0][damaged[0] >= 0].tolist())
        images, labels = self.parallel.share((images, labels))
        per_epoch = np.int32(self.count // self.config.batch_size)
        return step.streamed_step(self.parallel, recipe)(
            state, self.moments, rates, images, labels, per_epoch, numbers
        ), first + 1

    def _count(self, damaged: list[int]) -> None:
        """Counts images that were passed over, and names each once."""
        self.damaged = (self.damaged or 0) + len(damaged)
        for number in sorted(set(damaged) - self._told):
            self._told.add(number)
            try:
                self.sources["train"][number]
            except stream.Damaged as error:
                _LOG.warning("passed over: %s", error)

    def evaluation(
        self, name: str, views: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]] | None:
        """As `_Resident.evaluation`, but the training images are not gone through again; of ten views, the corners are to be had."""
        if name == "train" or name not in self.sources:
            return None
        size = self.config.image_size
        return self._read(
            name, size if views < 10 else self.config.resize or round(size * 256 / 224), train=False
        )

    def test_images(self, numbers: np.ndarray) -> np.ndarray:
        size, source = self.config.image_size, self.sources["test"]
        return np.stack(
            [
                np.asarray(stream.center(source[int(number)][0], size, self.config.resize))
                for number in numbers
            ]
        )


class Training:
    """A training run under way: what `run` would otherwise pass from function to function."""

    def __init__(self, config, folder: pathlib.Path):
        self.config, self.folder, self.parallel = config, folder, Parallel(config.parallel)
        if config.batch_size % (self.parallel.size * config.accumulate):
            raise ValueError(
                f"batch_size={config.batch_size} is not a multiple of {self.parallel.size} device(s) times "
                f"accumulate={config.accumulate}"
            )
        self.data = (_Streamed if is_streamed(config) else _Resident)(config, self.parallel)
        self.steps_per_epoch = self.data.count // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size={config.batch_size} is more than the {self.data.count} training images"
            )
        axis_name = self.parallel.axis_name if config.sync_batch_norm else None
        self.model = build_model(config, len(self.data.classes), self.data.shape, axis_name)
        self._check_output()
        self.recipe = step.Recipe(
            self.model,
            config.optimizer,
            config.decay_all,
            config.loss,
            tuple(sorted(config.augment.items())),
            config.mixup > 0,
            config.ema_decay > 0,
            config.accumulate,
            tuple(config.freeze),
            tuple(part for part, _ in config.rates),
        )
        self.numbers = step.Numbers(
            config.seed,
            config.momentum,
            config.weight_decay,
            config.label_smoothing,
            config.mixup,
            config.ema_decay,
            tuple(float(rate) for _, rate in config.rates),
        )
        self.rates = learning_rates(config.schedule, self.steps_per_epoch, config.epochs)
        self.plateau = Plateau.of(config.schedule) if config.schedule.name == "plateau" else None
        self.history: list[dict] = []
        self.seconds = 0.0

    def _check_output(self) -> None:
        """Raises `ValueError` if the model's output is not of the kind that the loss is of."""
        image = jax.ShapeDtypeStruct((1, *self.data.shape), jnp.float32)
        found = jax.eval_shape(
            self.model.clone(padding="zeros").init_with_output, jax.random.key(0), image
        )[0].shape[1:]
        wanted = (
            (*self.data.shape[:2], len(self.data.classes))
            if self.config.loss == "pixelwise"
            else (len(self.data.classes),)
        )
        if found != wanted:
            raise ValueError(
                f"model={self.config.model!r} puts out {list(found)} for an image; loss={self.config.loss!r} accepts "
                f"{list(wanted)}"
            )

    def score(self, state, name: str, views: int = 1):
        """The score on a split, in evaluation mode, and the logits and labels; None where there is no such split."""
        pairs, seen = self.data.evaluation(name, views), []
        if pairs is None:
            return None

        def batches():
            for images, theirs in pairs:
                seen.append(theirs)
                yield images

        variables = {
            "params": state.ema if self.recipe.ema else state.params,
            "batch_stats": state.batch_stats,
        }
        outputs = evaluate.predict(
            self.parallel,
            self.model,
            variables,
            self.data.moments,
            batches(),
            self.config.batch_size,
            evaluate.averaged(views),
        )
        labels = np.concatenate(seen)
        return evaluate.score(self.config.loss, outputs, labels), outputs, labels

    def end_epoch(self, state, seconds: float) -> None:
        """Scores the epoch, lets the plateau rule decide, and tells the person and the files."""
        totals = {name: float(value) for name, value in self.parallel.fetch(state.totals).items()}
        epoch = len(self.history) + 1
        rate = float(
            self.rates[epoch * self.steps_per_epoch - 1]
            * (self.plateau.scale if self.plateau else 1)
        )
        line = {
            "epoch": epoch,
            "step": epoch * self.steps_per_epoch,
            "learning_rate": rate,
            "train_loss": totals["loss"] / totals["count"],
            "train_error": totals["errors"] / totals["count"],
        }
        if (damaged := self.damaged()) is not None:
            line["damaged"], self.data.damaged = damaged, 0
        if scored := self.score(state, "validation"):
            line |= {f"validation_{name}": value for name, value in scored[0].items()}
            if self.plateau:
                watched = line | {"validation_accuracy": 1 - line["validation_error"]}
                self.plateau.update(watched[f"validation_{self.config.schedule.metric}"])
        self.history.append(line)
        self.seconds += seconds
        left = self.seconds / epoch * (self.config.epochs - epoch)
        percent = ", ".join(
            f"{name.replace('_', ' ')} {100 * line[name]:.2f} %"
            for name in line
            if name.endswith("_error")
        )
        if damaged:
            percent += f", {damaged} damaged images passed over"
        _LOG.info(
            "epoch %d/%d: train loss %.4f, %s, rate %.3g, %s img/s, %s left",
            epoch,
            self.config.epochs,
            line["train_loss"],
            percent,
            rate,
            f"{totals['count'] / seconds:,.0f}",
            time.strftime("%H:%M:%S", time.gmtime(left)),
        )
        self.write_history()

    def write_history(self) -> None:
        workdir.write(
            self.folder / "metrics.jsonl",
            "".join(json.dumps(entry) + "\n" for entry in self.history),
        )

    def damaged(self) -> int | None:
        """The images that all processes have passed over in this epoch; None where they are not passed over."""
        return None if self.data.damaged is None else sum(self.parallel.gather(self.data.damaged))

    def record(self) -> dict:
        """What a checkpoint holds besides the state."""
        return {
            "history": self.history,
            "plateau": self.plateau and self.plateau.state(),
            "seconds": self.seconds,
            "damaged": self.damaged(),
        }

    def train(self) -> step.State:
        """Trains to the end -> the state, on the devices. Raises `workdir.Interrupted` or `FloatingPointError`."""
        every, total = self.config.checkpoint_every_steps, len(self.rates)
        taken = (
            transfer.take(self.config.initial_weights, self.model, self.config.initial_parts)
            if self.config.initial_weights
            else None
        )
        state, at, stop = step.init(self.recipe, self.data.shape, self.numbers, taken), 0, 0
        received: list[int] = []

        def hear(number):
            received.append(number)
            _LOG.info(
                "%s: saving after this step; once more to stop at once", signal.Signals(number).name
            )

        with (
            signals.heeded(lambda number, frame: None, hear),
            Checkpoints(self.folder / "checkpoints", self.config.keep_checkpoints) as checkpoints,
        ):
            if found := checkpoints.restore(state):
                at, state, record = found
                self.history, self.seconds = record["history"], record["seconds"]
                if self.plateau:
                    self.plateau.restore(record["plateau"])
                if self.data.damaged is not None and jax.process_index() == 0:
                    self.data.damaged = record["damaged"]  # of all processes
                self.write_history()  # the file may be ahead of the checkpoint, or damaged
                _LOG.info("going on from step %d of %d", at, total)
            state = self.parallel.replicate(state)
            began, scale, rates = time.monotonic(), 1.0, self.parallel.replicate(self.rates)
            while at < total:
                if self.plateau and self.plateau.scale != scale:
                    scale = self.plateau.scale
                    rates = self.parallel.replicate(self.rates * np.float32(scale))
                last = min(
                    at // self.steps_per_epoch * self.steps_per_epoch + self.steps_per_epoch,
                    at // every * every + every,
                )
                state, at = self.data.advance(self.recipe, state, rates, self.numbers, at, last)
                bad = int(self.parallel.fetch(state.bad_step))
                if bad >= 0:
                    kept = [
                        f"the last checkpoint is that of step {saved}, in {checkpoints.folder}"
                        for saved in checkpoints.steps()[-1:]
                    ]
                    raise FloatingPointError(
                        f"the loss is not finite at step {bad} (learning rate {self.rates[bad] * scale:g}); "
                        + (kept or ["there is no checkpoint yet"])[0]
                    )
                improved = None
                if at % self.steps_per_epoch == 0:
                    best = min(
                        (entry.get("validation_error", 1.0) for entry in self.history), default=2.0
                    )
                    self.end_epoch(state, time.monotonic() - began)
                    began = time.monotonic()
                    error = self.history[-1].get("validation_error")
                    improved = error if error is not None and error < best else None
                stop = max(self.parallel.gather(received[0] if received else 0))
                if at % every == 0 or at == total or improved is not None or stop:
                    checkpoints.save(at, self.parallel.fetch(state), self.record(), improved)
                if stop:
                    break
        if stop := stop or (
            received[0] if received else 0
        ):  # it may have come while the last checkpoint was written
            raise workdir.Interrupted(
                f"stopped by {signal.Signals(stop).name} after step {at} of {total}, which is saved; the same "
                "command goes on from there"
            )
        return state


def _write_mistakes(
    folder: pathlib.Path, loss: str, data, outputs: np.ndarray, labels: np.ndarray
) -> None:
    """Keeps every prediction, and the images of the worst mistakes, for the report: the most confident ones, and of masks those with
    most pixels wrong. Of several classes an image the outputs are kept."""
    kept: dict[str, Any]
    predicted: np.ndarray
    if loss == "sigmoid":
        kept = {"outputs": outputs}
    elif loss == "pixelwise":
        predicted = outputs.argmax(-1).astype(np.uint8)
        wrong = ((predicted != labels) & (labels != augment.IGNORED)).mean((1, 2))
        kept = {"predicted": predicted, "shown": np.argsort(-wrong)[:_SCENES]}
    else:
        shifted = np.exp(outputs - outputs.max(-1, keepdims=True))
        predicted, confidence = outputs.argmax(-1), shifted.max(-1) / shifted.sum(-1)
        wrong = np.flatnonzero(predicted != labels)
        kept = {
            "predicted": predicted,
            "confidence": confidence,
            "shown": wrong[np.argsort(-confidence[wrong])][:_MISTAKES],
        }
    if "shown" in kept:
        kept["images"] = (
            data.test_images(kept["shown"])
            if len(kept["shown"])
            else np.zeros((0, 1, 1, 1), np.uint8)
        )
    workdir.write_arrays(folder / "test.npz", {"labels": labels} | kept)


def _write_events(folder: pathlib.Path, history: list[dict]) -> None:
    """The history as TensorBoard events."""
    for old in folder.glob("events.*"):
        old.unlink()
    try:
        with tensorboardX.SummaryWriter(str(folder)) as writer:
            for entry in history:
                for name, value in entry.items():
                    if name not in ("epoch", "step"):
                        writer.add_scalar(name, value, entry["step"])
    except OSError as error:
        error.filename = str(folder)  # a full disk's names none
        raise


def run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Trains, scores the test set once, and writes results.json, metrics.jsonl, test.npz, TensorBoard events and the report.

    Raises `workdir.Interrupted` when it was stopped, and `MemoryError` where memory does not suffice.
    """
    try:
        _run(config, folder)
    except KeyboardInterrupt as stop:  # outside of the steps
        raise workdir.Interrupted(
            "stopped; the same command goes on from the last checkpoint"
        ) from stop
    except (RuntimeError, MemoryError) as error:
        first = str(error).partition("\n")[0]
        if (
            isinstance(error, MemoryError)
            or isinstance(error, jax.errors.JaxRuntimeError)
            and first.startswith("RESOURCE_EXHAUSTED")
        ):
            raise MemoryError(
                f"batch_size={config.batch_size} does not fit into memory ({first}); lower it, or raise accumulate="
                f"{config.accumulate}, the parts that a batch is computed in"
            ) from error
        if "Worker process was terminated" in first:  # grain's
            raise RuntimeError(
                f"one of workers={config.workers} processes that decode images was killed, as systems do when memory runs "
                "out; the same command goes on from the last checkpoint"
            ) from error
        raise


def _run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    began = time.monotonic()
    current = Training(config, folder)
    try:
        state = current.train()
    except RuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise RuntimeError(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on, most likely because another is gone "
            f"({str(error).splitlines()[0]}); start them all again, and the run goes on from its last checkpoint"
        ) from error
    tested, outputs, labels = current.score(state, "test", config.test_views)
    trained = current.score(state, "train")
    final = {
        name: current.history[-1][name] for name in ("epoch", "step", "train_loss", "train_error")
    }
    if trained:  # in evaluation mode, without augmentation; of streamed data the last epoch's running mean stays
        final |= {"train_loss": trained[0]["loss"], "train_error": trained[0]["error"]}
    final |= {
        name: value for name, value in current.history[-1].items() if name.startswith("validation_")
    }
    final |= {f"test_{name}": value for name, value in tested.items()}
    _LOG.info(
        "final: train error %.2f %%, test error %.2f %%",
        100 * final["train_error"],
        100 * final["test_error"],
    )
    end = current.parallel.fetch(state)
    if not backend.writes():
        return
    try:
        weights.save_torchvision(
            {
                "params": end.ema if current.recipe.ema else end.params,
                "batch_stats": end.batch_stats,
            },
            folder / transfer.WEIGHTS,
        )
    except safetensors.SafetensorError as error:  # its name for an OSError
        raise OSError(f"{folder / transfer.WEIGHTS} could not be written: {error}") from error
    _write_mistakes(folder, config.loss, current.data, outputs, labels)
    by_class = (
        {}
        if config.loss == "cross_entropy"
        else {"by_class": evaluate.by_class(config.loss, outputs, labels)}
    )
    _write_events(folder / "tensorboard", current.history)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(end.params))
    mean, std = current.parallel.fetch(current.data.moments)
    workdir.write_json(
        folder / "results.json",
        {
            "kind": "train",
            "final": final,
            "history": current.history,
            "classes": list(current.data.classes),
            "image_shape": list(current.data.shape),
            "mean": mean.tolist(),
            "std": std.tolist(),
            "parameters": parameters,
            **by_class,
            "n_train": current.data.count,
            "n_validation": current.data.n_validation,
            "n_test": len(labels),
            "training_seconds": round(current.seconds, 1),
            "seconds": round(time.monotonic() - began, 1),
        },
    )
    report.write(folder)
