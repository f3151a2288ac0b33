"""Folders of images and prepared tensorflow-datasets, streamed by grain.

A batch depends on (seed, step) alone, whatever the number of workers. So a stream that starts at a
step continues an interrupted one exactly, with the same images, order and crops.
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
from collections.abc import Iterator, Sequence
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
from cnnjax.runtime import files

_LOG = logging.getLogger("cnnjax")
# Names of the validation split. ImageNet's labeled test split has such a name, too.
_VALIDATION = ("val", "validation", "valid")
# The number of images that one process decodes while worker processes would still be starting.
FEW_IMAGES = 500

# ------------------------------------------------------------------ sources: image number -> image


class Folder:
    """Images under ROOT/CLASS/ in the order of their names.

    The classes are the names of the folders that are not hidden (`splits.class_name`). Other files,
    images outside a class folder and folders inside one are passed over.

    Args:
      root: the folder.
      order: classes whose folders come first, in this order; the others follow by name.

    Attributes:
      place: the folder, for messages.
      classes: the classes' names.
      files: the path and the label of every image.
      passed_over: what was passed over, in words.

    Raises:
      ValueError: if it is not a folder, has no class folders, a class has no images, or two
        classes have one name.
    """

    def __init__(self, root: str | os.PathLike, order: Sequence[str] = ()):
        root = pathlib.Path(root)
        expected = f"expected {root}/CLASS/IMAGE with {', '.join(SUFFIXES)}"
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder; {expected}")
        top = list_folder(root)
        if not top.folders:
            reason = "no images"
            if top.images:
                reason = f"no class folders, and images outside one ({len(top.images):,})"
            raise ValueError(f"{root} has {reason}; {expected}")
        self.place = str(root)
        places = {name: place for place, name in enumerate(order)}
        place_of = lambda folder: places.get(splits.class_name(folder.name), len(places))
        folders = sorted(top.folders, key=place_of)
        self.classes = tuple(splits.class_name(folder.name) for folder in folders)
        _check_names(folders)
        self.files: list[tuple[pathlib.Path, int]] = []
        # Counts of what is passed over, by its kind.
        others = top.others
        if top.images:
            others["outside a class folder"] = len(top.images)
        nested: list[pathlib.Path] = []
        for label, folder in enumerate(folders):
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
        """Returns the labels of all images, int32 [n]."""
        return np.array([label for _, label in self.files], np.int32)

    def digest(self) -> str:
        """Describes the images by their classes and names, in order, wherever the folder is."""
        names = [
            f"{self.classes[label]}/{splits.class_name(path.name)}" for path, label in self.files
        ]
        return files.digest({"files": names})


def _check_names(folders: list[pathlib.Path]) -> None:
    """Checks the names of class folders.

    Raises:
      ValueError: if one is not UTF-8, as reports are, or if two differ in their Unicode form only.
    """
    for folder in folders:
        try:
            folder.name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the class folder {str(folder)!r} has a name that is not UTF-8; rename it"
            ) from error
    named: dict[str, pathlib.Path] = {}
    for folder in folders:
        name = splits.class_name(folder.name)
        other = named.setdefault(name, folder)
        if other != folder:
            raise ValueError(
                f"the class folders {ascii(other.name)} and {ascii(folder.name)} of "
                f"{folder.parent} are the same name, {name!r}, in two Unicode forms; put their "
                "images into one"
            )


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
            # It raises many kinds of errors, one of them if TensorFlow is not installed.
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
        self._full_name = builder.info.full_name

    def __len__(self):
        return len(self._records)

    def _read_record(self, records, index: int):
        try:
            return records[index]
        except Exception as error:
            # It comes from array_record, from the example's decoder, or from the image's.
            reason = " ".join(str(error).split())[:200]
            raise Damaged(f"record {index} of {self.place} cannot be decoded: {reason}") from error

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        record = self._read_record(self._records, index)
        pixels = record[self._image]
        label = int(record[self._label])
        splits.check_labels(np.array([label]), len(self.classes), f"record {index} of {self.place}")
        if pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        return PIL.Image.fromarray(pixels).convert("RGB"), label

    def _open_undecoded(self):
        """Opens the records with their images as encoded bytes, which saves decoding them."""
        import tensorflow_datasets as tfds

        builder = tfds.builder(self._name, data_dir=self._data_dir)
        decoders = {self._image: tfds.decode.SkipDecoding()}
        return builder.as_data_source(split=self._split, decoders=decoders)

    def labels(self) -> np.ndarray:
        """Reads the labels of all images, int32 [n].

        This reads the whole files of the split.

        Raises:
          ValueError: for a label that belongs to no class.
        """
        records = self._open_undecoded()
        numbers = range(len(self))
        labels = [int(self._read_record(records, index)[self._label]) for index in numbers]
        splits.check_labels(np.array(labels), len(self.classes), self.place)
        return np.array(labels, np.int32)

    def is_labeled(self) -> bool:
        """Tells whether the first image has a label; in a withheld test set it is -1."""
        if not len(self):
            return False
        try:
            record = self._read_record(self._open_undecoded(), 0)
        except Damaged:
            # Whatever reads the image later reports it, or passes it over.
            return True
        return int(record[self._label]) >= 0

    def digest(self) -> str:
        """Describes the records by the data set's configuration and version, and the split."""
        return files.digest({"name": self._full_name, "split": self._split})


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

    def digest(self) -> str:
        """Describes the whole source; the part's size decides which images it has."""
        return self._source.digest()


Source = Folder | Tfds | Part


def hold_out(source: Folder | Tfds, count: int) -> tuple[Part, Part]:
    """Divides a source into (the rest, `count` images) by `splits.hold_out`."""
    mask = splits.hold_out(source.labels(), count)
    return Part(source, np.flatnonzero(~mask)), Part(source, np.flatnonzero(mask))


# ------------------------------------------------------------------ splits: name -> use


def _known_splits(dataset: str, data_dir: str) -> dict[str, bool]:
    """Finds the splits that are known by name, and whether they have labels."""
    known = ("train", *_VALIDATION, "test")
    if dataset == "folder":
        root = pathlib.Path(data_dir)
        is_labeled = {split: True for split in known if (root / split).is_dir()}
        if "test" in is_labeled:
            # The images of a withheld test set lie in its folder itself, not in class folders.
            is_labeled["test"] = bool(list_folder(root / "test").folders)
        return is_labeled
    name = dataset.removeprefix("tfds:")
    present = Tfds(name, data_dir, "train").splits
    return {split: Tfds(name, data_dir, split).is_labeled() for split in known if split in present}


def find_splits(dataset: str, data_dir: str) -> dict[str, str]:
    """Finds which split of a data set is for training, validation and the test.

    A split called val, validation or valid is for validation if there is a labeled test split.
    Otherwise it is for the test, as in ImageNet.

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
    """Opens the splits of a data set and logs the number of images and classes.

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
    sources: dict[str, Folder | Tfds] = {}
    for use, name in names.items():
        if dataset == "folder":
            # Two Unicode forms of a name sort differently, and a label is a class's place.
            order = sources["train"].classes if "train" in sources else ()
            sources[use] = Folder(pathlib.Path(data_dir) / name, order)
        else:
            sources[use] = Tfds(dataset.removeprefix("tfds:"), data_dir, name)

    # A label means the same class in every split.
    classes = sources["train"].classes
    for use, source in sources.items():
        _LOG.info("%s: %s", use, _describe(source))
        if change := splits.describe_classes(classes, source.classes):
            raise ValueError(
                f"data_dir={data_dir!r}: the {use} split has other classes than the training "
                f"split ({change}); expected the same"
            )
    if names["test"] != "test":
        _LOG.info("%s is the test set, as there is no labeled split named test", names["test"])

    # Training images are held out only where the data set has no validation split.
    if not n_validation:
        return {**sources}
    if "validation" in sources:
        count = len(sources["validation"])
        if n_validation != count:
            raise ValueError(
                f"n_validation={n_validation} is not 0 or {count}, the validation images that "
                f"data_dir={data_dir!r} has of its own"
            )
        return {**sources}
    rest, held_out = hold_out(sources["train"], n_validation)
    _LOG.info("validation: %s of the training images", f"{n_validation:,}")
    return {**sources, "train": rest, "validation": held_out}


# ------------------------------------------------------------------ crops


def area_crop(image: PIL.Image.Image, size: int, generator: np.random.Generator) -> PIL.Image.Image:
    """Crops 8 to 100 % of the area at an aspect of 3/4 to 4/3, resized to a square.

    Szegedy et al. 2014; torchvision's RandomResizedCrop.
    """
    # As in torchvision: if none of ten random crops fits into the image, take the largest centered
    # one whose aspect is allowed.
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
    """Resizes an image's shorter side to `shorter` and crops a square.

    Args:
      image: any image.
      size: the crop's side in pixels.
      shorter: the image's shorter side before the crop.
      generator: draws the place of the crop; None for the center.
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


def shorter_side(size: int, resize: int) -> int:
    """Returns `resize`, or for 0 the customary 256/224 of a crop's side."""
    return resize or round(size * 256 / 224)


def center(image: PIL.Image.Image, size: int, resize: int) -> PIL.Image.Image:
    """Resizes an image and crops its center, for evaluation.

    Args:
      image: any image.
      size: the crop's side in pixels.
      resize: as in `shorter_side`.
    """
    return resized_crop(image, size, shorter_side(size, resize), None)


# ------------------------------------------------------------------ batches


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclasses.dataclass(frozen=True)
class TrainingBatches:
    """The batches of training steps.

    Every epoch has its own order and drops the remainder. A batch is uint8 [batch, size, size, 3]
    and int32 [batch], of which each process gets its own part.

    Attributes:
      source: the images.
      batch_size: the number of images in a batch, over all processes.
      steps: the steps.
      seed: of the order and the crops.
      size: the side of the square crops, in pixels.
      resize: the image's shorter side before the crop; 0 for crops of random area and aspect.
      process_index: the number of this process.
      process_count: the number of processes that share each batch.
      skip_damaged: whether an image that cannot be decoded is replaced by the next undamaged one of
        the epoch's order, with the same random numbers for the crop. Batches then have a third
        array, int32 [batch]: for each place the number of the damaged image, or -1.

    Raises:
      ValueError: if the processes do not divide the batch, or `resize` is below the crop's size.
    """

    source: Source
    batch_size: int
    steps: range
    seed: int
    size: int
    resize: int
    process_index: int = 0
    process_count: int = 1
    skip_damaged: bool = False

    def __post_init__(self):
        if self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of {self.process_count} processes"
            )
        check_resize(self.resize, self.size)

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        # Every epoch has an order of its own, and each process its part of every batch.
        count = len(self.source)
        epoch, step_in_epoch = divmod(self.steps[index], count // self.batch_size)
        order = _epoch_order(self.seed, epoch, count)
        process_size = self.batch_size // self.process_count
        start = step_in_epoch * self.batch_size + self.process_index * process_size
        images = []
        labels = []
        damaged = []
        for place in range(start, start + process_size):
            image, label, damaged_number = self._decode(order, place)
            # The crop depends on the epoch and the image, not on the process or the worker.
            generator = np.random.default_rng([self.seed, epoch, int(order[place])])
            if self.resize:
                crop = resized_crop(image, self.size, self.resize, generator)
            else:
                crop = area_crop(image, self.size, generator)
            images.append(np.asarray(crop))
            labels.append(label)
            damaged.append(damaged_number)
        batch = [np.stack(images), np.asarray(labels, np.int32)]
        if self.skip_damaged:
            batch.append(np.asarray(damaged, np.int32))
        return tuple(batch)

    def _decode(self, order: np.ndarray, place: int) -> tuple[PIL.Image.Image, int, int]:
        """Decodes the image at a place in an epoch's order, or the next undamaged one.

        Returns:
          The image, its label, and the number of the damaged image that it replaces or -1.

        Raises:
          Damaged: for a damaged image, unless `skip_damaged`.
          ValueError: if all images are damaged.
        """
        for offset in range(len(order)):
            try:
                image, label = self.source[int(order[(place + offset) % len(order)])]
            except Damaged as error:
                if not self.skip_damaged:
                    raise Damaged(f"{error}; skip_damaged=True trains without it") from error
                last_error = error
            else:
                damaged_number = int(order[place]) if offset else -1
                return image, label, damaged_number
        raise ValueError(
            f"skip_damaged=True: none of the {len(order)} images can be decoded; {last_error}"
        )


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """All images in order, in batches of the same form; the last one may be shorter.

    Attributes:
      source: the images.
      batch_size: the number of images in a batch.
      size: the side of the square crops, in pixels.
      resize: as in `shorter_side`.
    """

    source: Source
    batch_size: int
    size: int
    resize: int

    def __len__(self):
        return math.ceil(len(self.source) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        images = []
        labels = []
        start = index * self.batch_size
        for number in range(start, min(start + self.batch_size, len(self.source))):
            image, label = self.source[number]
            images.append(np.asarray(center(image, self.size, self.resize)))
            labels.append(label)
        return np.stack(images), np.asarray(labels, np.int32)


def check_resize(resize: int, image_size: int) -> None:
    """Raises `ValueError` if images would be resized to less than the crop."""
    if resize and resize < image_size:
        raise ValueError(f"resize={resize} is not 0 or at least image_size={image_size}")


def iterate(
    batches: TrainingBatches | EvaluationBatches, workers: int = 0
) -> Iterator[tuple[np.ndarray, ...]]:
    """Streams batches, decoded by worker processes, or by this process if there are none.

    Raises:
      ValueError: from the iterator, for an image that cannot be read, or decoded.
    """
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    stream = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        # grain asks for absl's flags, which a program without any never parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers)
        stream = stream.mp_prefetch(processes, _start_worker)
    iterator = _iterate_and_close(iter(stream), len(batches), has_workers=workers > 0)
    _open_iterators.add(iterator)
    return iterator


# ------------------------------------------------------------------ worker processes

# Iterators whose worker processes may still run. They are closed at exit, while the modules that
# closing needs still exist; an iterator of grain that is torn down later prints errors.
_open_iterators: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_iterators() -> None:
    for iterator in list(_open_iterators):
        iterator.close()


def _iterate_and_close(iterator, count: int, has_workers: bool) -> Iterator:
    """Yields `count` batches of one of grain's iterators and closes it.

    It is closed, which ends its worker processes, before the last batch is yielded: a caller that
    knows the number of batches never asks for more, so nothing after the last one would run. A
    caller that stops earlier closes it by letting go of this generator.
    """
    failure = None
    shared: list[SharedMemory] = []
    try:
        for number in range(1, count + 1):
            batch = next(iterator)
            if has_workers:
                # Its arrays lie in shared memory, which must not outlive the workers: they are
                # copied. grain closes the memory in a thread, some time after the array is gone.
                shared = [memory for memory in shared if memory.buf]
                shared += [array.shm for array in batch if getattr(array, "shm", None)]
                batch = tuple(map(np.array, batch))
            if number < count:
                yield batch
    except Exception as error:
        if not has_workers:
            raise
        # Raised below, and without its traceback, whose frames hold the iterator.
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
    """Waits until grain has closed blocks of shared memory, for five seconds at most.

    grain closes them in a thread. A program that ended before would not wait for this thread, and
    Python would report the blocks as leaked.
    """
    deadline = time.monotonic() + 5
    while any(memory.buf for memory in memories) and time.monotonic() < deadline:
        time.sleep(0.001)


def _start_worker(index: int, count: int) -> None:
    """Prepares a worker process: it ignores signals, and ends when its parent ends.

    Args:
      index: the number of the worker, which grain passes.
      count: the number of workers.
    """
    # Ctrl-C sends its signal to all processes of a group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent():
        parent.join()
        os._exit(0)

    threading.Thread(target=exit_with_parent, daemon=True).start()
