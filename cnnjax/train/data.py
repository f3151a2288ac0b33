"""Where a training run's images come from: resident on the devices, or streamed from the host.

Both kinds have one interface, `TrainingData`; `open_data` chooses between them.
"""

import collections
import functools
import hashlib
import logging
import time
from collections.abc import Iterator
from typing import Protocol

import jax
import ml_collections
import numpy as np

from cnnjax.data import arrays, crops, folders, photographs, stream
from cnnjax.runtime import files, imagenet
from cnnjax.train import evaluate, step
from cnnjax.train.parallel import Parallel

_LOG = logging.getLogger("cnnjax")
# The target length of `advance` in seconds; signals and losses are checked between its calls, for
# which the host waits for the device. The CPU backend allocates memory anew in each compiled call,
# page by page, which takes an eighth of the ConvNet's time where a call is one step.
SECONDS_A_CALL = 2.0
# The most steps of `Streamed.advance`, whose batches may all wait on the device.
_STREAMED_STEPS = 8

Moments = tuple[np.ndarray, np.ndarray]
Batches = Iterator[tuple[np.ndarray, np.ndarray]]


class TrainingData(Protocol):
    """A data set as training uses it.

    Attributes:
      classes: the classes' names.
      image_shape: height, width and channels of the network's input.
      n_train: the number of training images.
      n_validation: the number of validation images.
      digest: a hash of the training and validation images: of their content or, if streamed, of
        their names.
      test_digest: the same of the test images.
      moments: the mean and standard deviation that pixels of 0 to 1 are normalized by.
      damaged: the number of damaged images that this process passed over in this epoch; None if
        they end the run instead.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    n_train: int
    n_validation: int
    digest: str
    moments: Moments
    damaged: int | None

    @property
    def test_digest(self) -> str: ...

    def advance(
        self,
        *,
        recipe: step.Recipe,
        numbers: step.Numbers,
        constants: step.Constants,
        state: step.State,
        steps: range,
    ) -> tuple[step.State, int]:
        """Takes one or more of the given steps.

        Args:
          recipe: what a step is.
          numbers: its numbers.
          constants: what all steps of the run share, replicated.
          state: the replicated state before the first of the steps; its memory is reused.
          steps: the steps to take, all of one epoch.

        Returns:
          The state, and the number of the next step.
        """
        ...

    def evaluation(self, split: str, views: int = 1) -> Batches | None:
        """Iterates over a split's images and labels in order, batch by batch.

        Args:
          split: "train", "validation" or "test".
          views: the number of views of an image to evaluate. With ten, images keep the margin that
            corner crops need.

        Returns:
          The batches; None if there is no such split, or if it is too large to go through again.
        """
        ...

    def test_images(self, numbers: np.ndarray) -> np.ndarray:
        """Returns some of the test images, uint8."""
        ...


class DatasetTooLarge(MemoryError):
    """The images of a data set do not fit into memory, whatever the batch size is."""


def is_exhausted(error: BaseException) -> bool:
    """Tells whether an error says that memory does not suffice."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return str(error).startswith("RESOURCE_EXHAUSTED")
    return isinstance(error, MemoryError)


def is_streamed(config: ml_collections.ConfigDict | dict) -> bool:
    """Tells whether a configuration's images are decoded as they are needed."""
    return config["dataset"] == "folder" or config["dataset"].startswith("tfds:")


def has_validation(config: ml_collections.ConfigDict) -> bool:
    """Tells whether a configuration's data have images for validation."""
    if config.n_validation:
        return True
    if not is_streamed(config):
        return False
    return "validation" in folders.find_splits(config.dataset, config.data_dir)


def open_data(config: ml_collections.ConfigDict, parallel: Parallel) -> TrainingData:
    """Opens a configuration's data set.

    Raises:
      DatasetTooLarge: if the images do not fit into the memory of the host or of a device.
    """
    kind = Streamed if is_streamed(config) else Resident
    try:
        return kind(config, parallel)
    except (RuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
        first = str(error).partition("\n")[0]
        raise DatasetTooLarge(
            f"dataset={config.dataset!r} does not fit into memory ({first}); take fewer images, or "
            "stream them with dataset='folder'"
        ) from error


def moments_of(config: ml_collections.ConfigDict, mean: np.ndarray, std: np.ndarray) -> Moments:
    """Chooses the mean and deviation that pixels of 0 to 1 are normalized by.

    Args:
      config: a training configuration.
      mean: the mean of each channel of the data.
      std: the standard deviation of each channel of the data.

    Returns:
      The mean and the standard deviation, float32 [channels].

    Raises:
      ValueError: for ImageNet's moments, where images do not have three channels.
    """
    if config.pixels == "imagenet":
        if len(mean) != 3:
            raise ValueError(
                f"pixels='imagenet' is for three channels; the images of "
                f"dataset={config.dataset!r} have {len(mean)}"
            )
        mean, std = imagenet.MOMENTS
    if config.pixels == "centred":
        std = np.full(len(std), 1 / 255)
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)


def _check_color(config: ml_collections.ConfigDict, channels: int) -> None:
    """Raises `ValueError` for a color shift of images that do not have three channels."""
    shift = config.augment.get("colour", 0.0)
    if shift and channels != 3:
        raise ValueError(
            f"augment.colour={shift} is for images of three channels; the images of "
            f"dataset={config.dataset!r} have {channels}"
        )


def digest_arrays(*parts: arrays.Split | None) -> str:
    """Hashes the images and labels of splits into eight characters; None is an absent split."""
    digest = hashlib.sha256()
    for part in parts:
        if part is not None:
            digest.update(np.ascontiguousarray(part.images).data)
            digest.update(np.ascontiguousarray(part.labels).data)
    return digest.hexdigest()[:8]


class _CallLength:
    """Chooses how many steps take about `SECONDS_A_CALL`."""

    def __init__(self, parallel: Parallel):
        self._parallel = parallel
        self._is_compiled = False
        # The seconds of a step in each of the last three calls.
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=3)

    def steps(self) -> int:
        """Returns the number of steps for the next call, the same in all processes."""
        count = 1
        if self._step_seconds:
            count = max(1, int(SECONDS_A_CALL / max(self._step_seconds)))
        return min(self._parallel.gather(count))

    def record(self, steps: int, seconds: float) -> None:
        """Records the time of a call, except the first, which compiles."""
        if self._is_compiled:
            self._step_seconds.append(seconds / steps)
        self._is_compiled = True


class Resident:
    """A data set that lives on the devices; one compiled call takes many steps."""

    damaged: int | None = None

    def __init__(self, config: ml_collections.ConfigDict, parallel: Parallel):
        self._config = config
        self._parallel = parallel
        self._dataset = arrays.load(config.dataset, config.data_dir, config.n_validation)
        train = self._dataset.train
        validation = self._dataset.validation
        self.classes = self._dataset.classes
        self.image_shape = train.images.shape[1:]
        _check_color(config, self.image_shape[-1])
        self.n_train = len(train.images)
        self.n_validation = 0 if validation is None else len(validation.labels)
        self.digest = digest_arrays(train, validation)
        self.moments = moments_of(config, *arrays.normalization(train.images))
        # A device may report only later that it has no room.
        self._placed = jax.block_until_ready(parallel.replicate(tuple(train)))
        self._epoch: int | None = None
        self._order = None
        self._call_length = _CallLength(parallel)

    @functools.cached_property
    def test_digest(self) -> str:
        return digest_arrays(self._dataset.test)

    def advance(self, *, recipe, numbers, constants, state, steps):
        batch_size = self._config.batch_size
        epoch = steps.start // (self.n_train // batch_size)
        if self._epoch != epoch:
            order = step.epoch_order(self.n_train, epoch, self._config.seed)
            self._epoch = epoch
            self._order = self._parallel.replicate(order)
        images, labels = self._placed
        take_steps = step.resident_steps(self._parallel, recipe, batch_size)
        stop = min(steps.stop, steps.start + self._call_length.steps())
        began = time.monotonic()
        state = take_steps(
            state,
            constants,
            step.Images(images=images, labels=labels, order=self._order),
            numbers,
            np.int32(stop),
        )
        jax.block_until_ready(state)
        self._call_length.record(stop - steps.start, time.monotonic() - began)
        return state, stop

    def evaluation(self, split, views=1):
        part = getattr(self._dataset, split)
        if part is None:
            return None
        size = self._config.batch_size
        images = evaluate.batches_of(part.images, size)
        return zip(images, evaluate.batches_of(part.labels, size))

    def test_images(self, numbers):
        return self._dataset.test.images[numbers]


class Streamed:
    """A data set that is read and decoded as it is needed; one compiled call takes one step."""

    def __init__(self, config: ml_collections.ConfigDict, parallel: Parallel):
        self._config = config
        self._parallel = parallel
        self._sources = folders.open_splits(config.dataset, config.data_dir, config.n_validation)
        self.classes = self._sources["train"].classes
        self.image_shape = (config.image_size, config.image_size, 3)
        self.n_train = len(self._sources["train"])
        self.n_validation = len(self._sources.get("validation", ()))
        uses = [use for use in ("train", "validation") if use in self._sources]
        self.digest = files.digest({use: self._sources[use].digest() for use in uses})
        self.moments = moments_of(config, *imagenet.MOMENTS)
        self._batches: Iterator | None = None
        self._call_length = _CallLength(parallel)
        self.damaged = 0 if config.skip_damaged else None
        self._reported: set[int] = set()

    @functools.cached_property
    def test_digest(self) -> str:
        return self._sources["test"].digest()

    def _training_batches(self, first: int) -> stream.TrainingBatches:
        """Returns the batches of all steps from `first` to the end of the run."""
        config = self._config
        total = config.epochs * (self.n_train // config.batch_size)
        return stream.TrainingBatches(
            source=self._sources["train"],
            batch_size=config.batch_size,
            steps=range(first, total),
            seed=config.seed,
            size=config.image_size,
            resize=config.resize,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            skip_damaged=config.skip_damaged,
        )

    def advance(self, *, recipe, numbers, constants, state, steps):
        if self._batches is None:
            batches = self._training_batches(steps.start)
            self._batches = stream.iterate(batches, self._config.workers)
        take_step = step.streamed_step(self._parallel, recipe)
        stop = min(steps.stop, steps.start + min(self._call_length.steps(), _STREAMED_STEPS))
        began = time.monotonic()
        for _ in range(steps.start, stop):
            # With `skip_damaged`, a third array has the number of each damaged image, or -1.
            images, labels, *third = next(self._batches)
            for damaged in third:
                self._count_damaged(damaged[damaged >= 0].tolist())
            # The next batch is read and copied while the device computes this step.
            state = take_step(
                state,
                constants,
                self._parallel.share((images, labels)),
                numbers,
                np.int32(self.n_train // self._config.batch_size),
            )
        jax.block_until_ready(state)
        self._call_length.record(stop - steps.start, time.monotonic() - began)
        return state, stop

    def _count_damaged(self, damaged: list[int]) -> None:
        """Counts images that were passed over, and logs the name of each once."""
        self.damaged = (self.damaged or 0) + len(damaged)
        for number in sorted(set(damaged) - self._reported):
            self._reported.add(number)
            # Decoded once more, for the error that has its name.
            try:
                self._sources["train"][number]
            except photographs.Damaged as error:
                _LOG.warning("passed over: %s", error)

    def evaluation(self, split, views=1):
        if split == "train" or split not in self._sources:
            return None
        size = self._config.image_size
        resize = self._config.resize
        if views == 10:
            # Ten views include corner crops, so the whole center square is kept, at the scale of
            # one view.
            resize = crops.shorter_side(size, resize)
            size = resize
        source = self._sources[split]
        # Every evaluation starts its worker processes anew, which takes longer than a few images.
        workers = 0 if len(source) < stream.FEW_IMAGES else self._config.workers
        batches = stream.EvaluationBatches(source, self._config.batch_size, size, resize)
        return stream.iterate(batches, workers)

    def test_images(self, numbers):
        source = self._sources["test"]
        size = self._config.image_size
        centers = []
        for number in numbers:
            # Cropped before the next one is decoded: whole photographs take up to 270 MB each.
            image, _ = source[int(number)]
            centers.append(np.asarray(crops.center(image, size, self._config.resize)))
        return np.stack(centers)
