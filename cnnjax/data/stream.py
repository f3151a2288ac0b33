"""Folders of images and prepared tensorflow-datasets, streamed by grain.

A batch follows from (seed, step) alone, whatever the number of workers: a stream that starts at a
step gives what an uninterrupted one gives from there.
"""

import atexit
import dataclasses
import functools
import gc
import logging
import math
import multiprocessing
import os
import pathlib
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory

import grain
import numpy as np
import PIL.Image
from absl import flags

from cnnjax.data import splits
from cnnjax.data.photographs import (
    SUFFIXES,
    Damaged,
    describe_passed_over,
    list_folder,
    open_rgb,
    resized_window,
)

_LOG = logging.getLogger("cnnjax")
# The names of the validation split; ImageNet's labeled test is called so, too.
_VALIDATION = ("val", "validation", "valid")
# Images that one process decodes in the seconds that worker processes take to start.
FEW_IMAGES = 500

# ------------------------------------------------------------------ sources: an image by its number


class Folder:
    """Images under ROOT/CLASS/ in the order of their names.

    The classes are the folders' names; hidden folders are none. Other files, images outside a
    class folder and folders inside one are passed over; `passed_over` says how many.

    Raises:
      ValueError: if there are no images, or a class has none.
    """

    def __init__(self, root: str | os.PathLike):
        root = pathlib.Path(root)
        expected = f"expected {root}/CLASS/IMAGE with {', '.join(SUFFIXES)}"
        if not root.is_dir():
            raise ValueError(f"{root} has no images; {expected}")
        top = list_folder(root)
        if not top.folders:
            raise ValueError(f"{root} has no images; {expected}")
        self.place = str(root)
        self.classes = tuple(folder.name for folder in top.folders)
        self.files: list[tuple[pathlib.Path, int]] = []
        others = top.others
        if top.images:
            others["outside a class folder"] = len(top.images)
        nested: list[pathlib.Path] = []
        for label, folder in enumerate(top.folders):
            _check_name(folder)
            listing = list_folder(folder)
            if not listing.images:
                passed_over = describe_passed_over(root, listing.others, listing.folders)
                reason = passed_over or "it is empty"
                raise ValueError(f"the class folder {folder} has no images; {expected} ({reason})")
            self.files += [(path, label) for path in listing.images]
            others += listing.others
            nested += listing.folders
        self.passed_over = describe_passed_over(root, others, nested)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        path, label = self.files[index]
        return open_rgb(path), label

    def labels(self) -> np.ndarray:
        """Return the labels of all images, int32 [n]."""
        return np.array([label for _, label in self.files], np.int32)


def _check_name(folder: pathlib.Path) -> None:
    """Refuse the name of a class that reports, which are UTF-8, could not hold."""
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the class folder {str(folder)!r} has a name that is not UTF-8; rename it"
        ) from error


class Tfds:
    """A split of a data set that tensorflow-datasets prepared for random access.

    TensorFlow is not needed to read it.

    Raises:
      ValueError: if the data set is unknown, not prepared, or not of labeled images of 8 bits.
    """

    passed_over = ""

    def __init__(self, name: str, data_dir: str, split: str):
        import tensorflow_datasets as tfds

        self.place = f"dataset='tfds:{name}', split {split!r}"
        self._name = name
        self._data_dir = data_dir or None
        self._split = split
        try:
            builder = tfds.builder(name, data_dir=self._data_dir)
            self._records = builder.as_data_source(split=split)
        except Exception as error:
            # It raises errors of many kinds, among them of TensorFlow's absence.
            reason = str(error).strip().partition("\n")[0][:200]
            where = f" --data_dir={data_dir}" if data_dir else ""
            raise ValueError(
                f"dataset='tfds:{name}' has no split {split!r} in data_dir={data_dir!r} that can "
                f"be read ({type(error).__name__}: {reason}); prepare it, where TensorFlow is "
                f"installed, with: tfds build {name} --file_format=array_record{where}"
            ) from error
        keys = builder.info.supervised_keys
        features = builder.info.features
        is_image = keys and isinstance(features[keys[0]], tfds.features.Image)
        if not is_image or not hasattr(features[keys[1]], "names"):
            raise ValueError(
                f"dataset='tfds:{name}' is not of labeled images: its supervised keys are {keys}"
            )
        pixels = features[keys[0]].np_dtype
        if pixels != np.uint8:
            # Pillow would clip 16 bits to 255.
            raise ValueError(f"dataset='tfds:{name}' has images of {pixels}; expected uint8")
        self._image, self._label = keys[:2]
        self.classes = tuple(features[self._label].names)
        self.splits = tuple(builder.info.splits)

    def __len__(self):
        return len(self._records)

    def _record(self, records, index: int):
        try:
            return records[index]
        except Exception as error:
            # Of array_record, of the example's decoder, of the image's.
            reason = " ".join(str(error).split())[:200]
            raise Damaged(f"record {index} of {self.place} cannot be decoded: {reason}") from error

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        record = self._record(self._records, index)
        pixels = record[self._image]
        label = int(record[self._label])
        splits.check_labels(np.array([label]), len(self.classes), f"record {index} of {self.place}")
        if pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        return PIL.Image.fromarray(pixels).convert("RGB"), label

    def _undecoded(self):
        """The records with their images as encoded bytes."""
        import tensorflow_datasets as tfds

        builder = tfds.builder(self._name, data_dir=self._data_dir)
        decoders = {self._image: tfds.decode.SkipDecoding()}
        return builder.as_data_source(split=self._split, decoders=decoders)

    def labels(self) -> np.ndarray:
        """Read the labels of all images, int32 [n], which reads their files whole.

        Raises:
          ValueError: for labels that are no class's.
        """
        records = self._undecoded()
        numbers = range(len(self))
        labels = [int(self._record(records, index)[self._label]) for index in numbers]
        splits.check_labels(np.array(labels), len(self.classes), self.place)
        return np.array(labels, np.int32)

    def is_labeled(self) -> bool:
        """Look at the first image: those of a withheld test set have the label -1."""
        try:
            return len(self) > 0 and int(self._record(self._undecoded(), 0)[self._label]) >= 0
        except Damaged:
            # It is reported, or passed over, where it is read.
            return True


class Part:
    """Some of a source's images, by their numbers in it."""

    def __init__(self, source: "Source", numbers: np.ndarray):
        self.classes: tuple[str, ...] = source.classes
        self._source = source
        self._numbers = numbers

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        return self._source[int(self._numbers[index])]


Source = Folder | Tfds | Part


def hold_out(source: Folder | Tfds, count: int) -> tuple[Part, Part]:
    """Divide a source into (the rest, `count` images) by `splits.hold_out`."""
    mask = splits.hold_out(source.labels(), count)
    return Part(source, np.flatnonzero(~mask)), Part(source, np.flatnonzero(mask))


# ------------------------------------------------------------------ splits: what each is used for


def _known_splits(dataset: str, data_dir: str) -> dict[str, bool]:
    """Find the splits that are known by name, and whether they have labels."""
    known = ("train", *_VALIDATION, "test")
    if dataset == "folder":
        root = pathlib.Path(data_dir)
        present = {name: True for name in known if (root / name).is_dir()}
        if "test" in present:
            # The images of a withheld test set lie in its folder as they are.
            present["test"] = bool(list_folder(root / "test").folders)
        return present
    name = dataset.removeprefix("tfds:")
    names = Tfds(name, data_dir, "train").splits
    return {split: Tfds(name, data_dir, split).is_labeled() for split in known if split in names}


def find_splits(dataset: str, data_dir: str) -> dict[str, str]:
    """Find which split of a data set is for training, validation and the test.

    The split called val, validation or valid is for validation where there is a labeled test
    split, and otherwise for the test, as ImageNet's is.

    Args:
      dataset: "folder" (`data_dir`/SPLIT/CLASS/IMAGE) or "tfds:NAME".
      data_dir: the folder of the images, or of what tensorflow-datasets prepared.

    Returns:
      The splits' names by use: "train", "test" and, if there is one, "validation".

    Raises:
      ValueError: if there is no training split, none for the test, or two for validation.
    """
    place = f"data_dir={data_dir!r}"
    kind = "folder"
    if dataset != "folder":
        place = f"dataset={dataset!r} in {place}"
        kind = "split"
    is_labeled = _known_splits(dataset, data_dir)
    names = [name for name in is_labeled if is_labeled[name]]
    validation = [name for name in names if name in _VALIDATION]
    if "train" not in names:
        hint = "" if data_dir else "; name the folder that holds train with --config.data_dir"
        raise ValueError(f"{place} has no {kind} train of images by class{hint}")
    if len(validation) > 1:
        raise ValueError(f"{place} has {' and '.join(validation)}; expected one of them")
    if "test" in names and validation:
        return {"train": "train", "validation": validation[0], "test": "test"}
    if "test" in names:
        return {"train": "train", "test": "test"}
    if validation:
        return {"train": "train", "test": validation[0]}
    expected = " or ".join(("test", *_VALIDATION))
    unlabeled = [f"; its {name} has no labels" for name in is_labeled if not is_labeled[name]]
    raise ValueError(f"{place} has no {kind} {expected} of images by class{''.join(unlabeled)}")


def _describe(source: Folder | Tfds) -> str:
    noun = "class" if len(source.classes) == 1 else "classes"
    counts = f"{len(source):,} images, {len(source.classes)} {noun} in {source.place}"
    if source.passed_over:
        return f"{counts}; {source.passed_over}"
    return counts


def open_splits(dataset: str, data_dir: str, n_validation: int = 0) -> dict[str, Source]:
    """Open the splits of a data set and log the number of images and classes.

    Args:
      dataset: as in `find_splits`.
      data_dir: as in `find_splits`.
      n_validation: training images to hold out for validation; 0, or all of them, where there is
        a validation split.

    Returns:
      The sources by use: "train", "test" and, if there is one, "validation".

    Raises:
      ValueError: as `find_splits` and `hold_out`; if a split has no images or other classes than
        the training split.
    """
    names = find_splits(dataset, data_dir)
    opened: dict[str, Folder | Tfds] = {}
    for use, name in names.items():
        if dataset == "folder":
            opened[use] = Folder(pathlib.Path(data_dir) / name)
        else:
            opened[use] = Tfds(dataset.removeprefix("tfds:"), data_dir, name)
    trained = opened["train"].classes
    for use, source in opened.items():
        _LOG.info("%s: %s", use, _describe(source))
        if source.classes != trained:
            raise ValueError(
                f"data_dir={data_dir!r}: the {use} split has the classes "
                f"{', '.join(source.classes)}, and the training split {', '.join(trained)}; "
                "expected the same"
            )
    if names["test"] != "test":
        _LOG.info("%s is the test set, as there is no labeled split named test", names["test"])
    if not n_validation:
        return {**opened}
    if "validation" in opened:
        own = len(opened["validation"])
        if n_validation != own:
            raise ValueError(
                f"n_validation={n_validation} is not 0 or {own}, the validation images that "
                f"data_dir={data_dir!r} has of its own"
            )
        return {**opened}
    rest, held_out = hold_out(opened["train"], n_validation)
    _LOG.info("validation: %s of the training images", f"{n_validation:,}")
    return {**opened, "train": rest, "validation": held_out}


# ------------------------------------------------------------------ crops


def area_crop(image: PIL.Image.Image, size: int, generator: np.random.Generator) -> PIL.Image.Image:
    """Crop 8 to 100 % of the area at an aspect of 3/4 to 4/3, resized to a square.

    Szegedy et al. 2014; torchvision's RandomResizedCrop.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1.0)
        aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w = round(float(np.sqrt(area * aspect)))
        h = round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(0, width - w + 1))
            top = int(generator.integers(0, height - h + 1))
            break
    else:
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
        left = (width - w) // 2
        top = (height - h) // 2
    return image.resize(
        (size, size), PIL.Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
    )


def resized_crop(
    image: PIL.Image.Image, size: int, shorter: int, generator: np.random.Generator | None
) -> PIL.Image.Image:
    """Crop a square from the image with its shorter side resized to `shorter`.

    Without a generator it is the center, and with one at random.
    """
    scale = shorter / min(image.size)
    width, height = (max(size, round(n * scale)) for n in image.size)
    if generator is None:
        left = (width - size) // 2
        top = (height - size) // 2
    else:
        left, top = generator.integers(0, (width - size + 1, height - size + 1)).tolist()
    return resized_window(
        image,
        size=(width, height),
        place=(left, top),
        window=size,
        filter=PIL.Image.Resampling.BILINEAR,
    )


def center(image: PIL.Image.Image, size: int, resize: int) -> PIL.Image.Image:
    """Crop the center of an image, as an evaluation sees it.

    Args:
      image: any image.
      size: the crop's side in pixels.
      resize: the image's shorter side before the crop; 0 for the customary 256/224 of `size`.
    """
    return resized_crop(image, size, resize or round(size * 256 / 224), None)


# ------------------------------------------------------------------ batches


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclasses.dataclass(frozen=True)
class _TrainingBatches:
    """Training batches as a sequence; each of grain's workers takes its steps."""

    source: Source
    batch_size: int
    steps: range
    seed: int
    size: int
    resize: int
    process_index: int
    process_count: int
    skip_damaged: bool

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, at: int) -> tuple[np.ndarray, ...]:
        count = len(self.source)
        epoch, within = divmod(self.steps[at], count // self.batch_size)
        order = _epoch_order(self.seed, epoch, count)
        share = self.batch_size // self.process_count
        start = within * self.batch_size + self.process_index * share
        images = []
        labels = []
        damaged = []
        for place in range(start, start + share):
            image, label, number = self._decoded(order, place)
            generator = np.random.default_rng([self.seed, epoch, int(order[place])])
            if self.resize:
                crop = resized_crop(image, self.size, self.resize, generator)
            else:
                crop = area_crop(image, self.size, generator)
            images.append(np.asarray(crop))
            labels.append(label)
            damaged.append(number)
        batch = [np.stack(images), np.asarray(labels, np.int32)]
        if self.skip_damaged:
            batch.append(np.asarray(damaged, np.int32))
        return tuple(batch)

    def _decoded(self, order: np.ndarray, place: int) -> tuple[PIL.Image.Image, int, int]:
        """Decode the image at a place in an epoch's order.

        In the place of a damaged one it is the next that is whole.

        Returns:
          The image, its label, and the damaged one's number or -1.
        """
        for after in range(len(order)):
            try:
                image, label = self.source[int(order[(place + after) % len(order)])]
            except Damaged as error:
                if not self.skip_damaged:
                    raise Damaged(f"{error}; skip_damaged=True trains without it") from error
                last = error
            else:
                number = -1
                if after:
                    number = int(order[place])
                return image, label, number
        raise ValueError(
            f"skip_damaged=True: none of the {len(order)} images can be decoded; {last}"
        )


@dataclasses.dataclass(frozen=True)
class _EvaluationBatches:
    """All images in order, the last batch being shorter, as a sequence of batches."""

    source: Source
    batch_size: int
    size: int
    resize: int

    def __len__(self):
        return math.ceil(len(self.source) / self.batch_size)

    def __getitem__(self, at: int) -> tuple[np.ndarray, ...]:
        images = []
        labels = []
        start = at * self.batch_size
        for index in range(start, min(start + self.batch_size, len(self.source))):
            image, label = self.source[index]
            images.append(np.asarray(center(image, self.size, self.resize)))
            labels.append(label)
        return np.stack(images), np.asarray(labels, np.int32)


def check_resize(resize: int, image_size: int) -> None:
    """Raise `ValueError` if images would be resized to less than the crop."""
    if resize and resize < image_size:
        raise ValueError(f"resize={resize} is not 0 or at least image_size={image_size}")


def batches(
    source: Source,
    batch_size: int,
    seed: int,
    image_size: int,
    *,
    resize: int,
    train: bool,
    steps: range | None = None,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    skip_damaged: bool = False,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Stream batches of images and labels.

    In training every epoch has its own order and drops the remainder, and each process gets its
    own part of each batch. An evaluation goes through the source once, in order, and its last
    batch may be shorter.

    Args:
      source: the images.
      batch_size: images of a batch, of all processes together.
      seed: of the order and the crops.
      image_size: the side of the square crops, in pixels.
      resize: the image's shorter side before the crop, at random places in training and at the
        center in an evaluation; 0 for crops of random area and aspect in training.
      train: whether this is training.
      steps: the training steps whose batches are given.
      workers: processes that decode; 0 decodes in this process.
      process_index: which of the processes this is.
      process_count: the processes that share each training batch.
      skip_damaged: whether, in training, the next whole image of the epoch's order takes the place
        (and the crop's random numbers) of one that cannot be decoded.

    Returns:
      An iterator of (uint8 [batch, image_size, image_size, 3], int32 [batch]); in training with
      `skip_damaged` there is a third array, int32 [batch]: for each place the number of the
      damaged image, or -1.

    Raises:
      ValueError: if the processes do not divide the batch, or `resize` is below the crop's size;
        from the iterator, for an image that cannot be read, or decoded.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} is not a multiple of {process_count} processes")
    check_resize(resize, image_size)
    made: _TrainingBatches | _EvaluationBatches
    if train:
        assert steps is not None
        made = _TrainingBatches(
            source=source,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            size=image_size,
            resize=resize,
            process_index=process_index,
            process_count=process_count,
            skip_damaged=skip_damaged,
        )
    else:
        made = _EvaluationBatches(
            source=source, batch_size=batch_size, size=image_size, resize=resize
        )
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    stream = grain.MapDataset.source(made).to_iter_dataset(options)
    if workers:
        # grain asks for absl's flags, which a program without any never parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers)
        stream = stream.mp_prefetch(processes, _start_worker)
    iterator = _closing(iter(stream), len(made), has_workers=workers > 0)
    _open.add(iterator)
    return iterator


# ------------------------------------------------------------------ worker processes

# Streams that may have processes under way. They are closed at exit, while the modules that closing
# needs are still there; an iterator of grain that is torn down later complains.
_open: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_open() -> None:
    for stream in list(_open):
        stream.close()


def _closing(iterator, count: int, has_workers: bool) -> Iterator:
    """Give `count` batches; end the worker processes before the last.

    Or earlier, when the iterator is let go of.
    """
    failure = None
    shared: list[SharedMemory] = []
    try:
        for left in reversed(range(count)):
            batch = next(iterator)
            if has_workers:
                # Its arrays lie in shared memory, which must not outlive the workers. grain closes
                # it in a thread, some time after the array is gone.
                shared = [memory for memory in shared if memory.buf]
                shared += [array.shm for array in batch if getattr(array, "shm", None)]
                batch = tuple(map(np.array, batch))
            if left:
                yield batch
    except Exception as error:
        if not has_workers:
            raise
        # The frames of its traceback hold the iterator, so it is raised without.
        failure = error.with_traceback(None)
    finally:
        iterator.close()
        if has_workers:
            # grain leaves its iterators in reference cycles, each with semaphores and a batch in
            # shared memory.
            del iterator
            gc.collect()
            _wait_until_closed(shared)
    if failure:
        raise failure
    if count:
        yield batch


def _wait_until_closed(memories: list[SharedMemory]) -> None:
    """Wait, for seconds at most, until grain has closed blocks of memory.

    It does so in a thread that the end of a program would not wait for, and Python would report
    them as leaked.
    """
    deadline = time.monotonic() + 5
    while any(memory.buf for memory in memories) and time.monotonic() < deadline:
        time.sleep(0.001)


def _start_worker(index: int, count: int) -> None:
    """Prepare a worker process.

    It leaves signals to its parent, and ends when that has ended, in whatever way.
    """
    # Signals such as Ctrl-C reach all processes of a group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow():
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
