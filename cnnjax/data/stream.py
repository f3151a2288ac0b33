"""Large data sets, read and decoded as they are needed: folders of images and prepared tensorflow-datasets, streamed by grain.

A batch follows from (seed, step) alone, whatever the number of workers: a stream that starts at a step gives what an
uninterrupted one gives from there.
"""

import atexit
import functools
import gc
import multiprocessing
import os
import pathlib
import signal
import threading
import weakref
from collections.abc import Iterator

import grain
import numpy as np
import PIL.Image
from absl import flags

from cnnjax.data.photographs import Damaged, opened

_SUFFIXES = (".jpg", ".jpeg", ".png")
_open: weakref.WeakSet = weakref.WeakSet()  # streams that may have processes under way
_SPLITS = {
    "train": ("train",),
    "test": ("val", "validation", "test"),
}  # ImageNet's labeled test is called validation


class Folder:
    """Images under ROOT/CLASS/, in the order of their names; the classes are the names of the folders.

    Raises `ValueError` where there are none.
    """

    def __init__(self, root: str | os.PathLike):
        root = pathlib.Path(root)
        self.classes = (
            tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
            if root.is_dir()
            else ()
        )
        self._files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / name).iterdir())
            if path.suffix.lower() in _SUFFIXES
        ]
        if not self._files:
            raise ValueError(
                f"{root} has no images; expected {root}/CLASS/IMAGE with {', '.join(_SUFFIXES)}"
            )

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        path, label = self._files[index]
        with opened(path) as image:
            if image.mode[0] in "IF":  # which Pillow would clip to 255
                raise ValueError(
                    f"pixels of more than 8 bits (Pillow's mode {image.mode}); expected 8"
                )
            image.load()
            return image if image.mode == "RGB" else image.convert(
                "RGB"
            ), label  # converting would copy it


class Tfds:
    """A split of a data set that tensorflow-datasets has prepared for random access; TensorFlow is not needed to read it.

    Raises `ValueError` where it is unknown, not prepared, or not of labeled images.
    """

    def __init__(self, name: str, data_dir: str, split: str):
        import tensorflow_datasets as tfds

        where, self._name = data_dir or None, f"dataset='tfds:{name}', split {split!r}"
        try:
            builder = tfds.builder(name, data_dir=where)
            self._records = builder.as_data_source(split=split)
        except Exception as error:  # it raises errors of many kinds, and of TensorFlow's absence
            raise ValueError(
                f"dataset='tfds:{name}' has no split {split!r} in data_dir={data_dir!r} that can be read ({type(error).__name__}: "
                f"{str(error).strip().partition(chr(10))[0][:200]}); prepare it, where TensorFlow is installed, with: "
                f"tfds build {name} --file_format=array_record"
                + (f" --data_dir={data_dir}" if data_dir else "")
            ) from error
        keys, features = builder.info.supervised_keys, builder.info.features
        if (
            not keys
            or not isinstance(features[keys[0]], tfds.features.Image)
            or not hasattr(features[keys[1]], "names")
        ):
            raise ValueError(
                f"dataset='tfds:{name}' is not of labeled images: its supervised keys are {keys}"
            )
        self._image, self._label = keys[:2]
        self.classes = tuple(features[self._label].names)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        try:
            record = self._records[index]
        except Exception as error:  # of array_record, of the example's decoder, of the image's
            raise Damaged(
                f"record {index} of {self._name} cannot be decoded: {' '.join(str(error).split())[:200]}"
            ) from error
        pixels = record[self._image]
        return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert(
            "RGB"
        ), int(record[self._label])


class Part:
    """Some of a source's images, by their numbers in it."""

    def __init__(self, source: "Source", numbers: np.ndarray):
        self.classes: tuple[str, ...] = source.classes
        self._source, self._numbers = source, numbers

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        return self._source[int(self._numbers[index])]


Source = Folder | Tfds | Part


def hold_out(source: Source, count: int) -> tuple[Part, Part]:
    """Divides a source into (the rest, `count` images), always the same ones. Raises `ValueError` if that leaves none."""
    if not 0 < count < len(source):
        raise ValueError(
            f"n_validation={count} is not between 1 and {len(source) - 1}, the training images but one"
        )
    order = np.random.default_rng(0).permutation(len(source))
    return Part(source, np.sort(order[count:])), Part(source, np.sort(order[:count]))


def open_source(dataset: str, data_dir: str, split: str) -> Folder | Tfds:
    """The "train" or "test" split of "folder" (data_dir/train and data_dir/val, validation or test) or of "tfds:NAME"."""
    if dataset == "folder":
        root = pathlib.Path(data_dir)
        found = [root / name for name in _SPLITS[split] if (root / name).is_dir()]
        if not found:
            raise ValueError(
                f"data_dir={data_dir!r} has no folder {' or '.join(_SPLITS[split])} of images by class"
            )
        return Folder(found[0])
    name = dataset.removeprefix("tfds:")
    if split == "train":
        return Tfds(name, data_dir, "train")
    try:
        return Tfds(name, data_dir, "test")
    except ValueError:
        return Tfds(name, data_dir, "validation")


def _area_crop(
    image: PIL.Image.Image, size: int, generator: np.random.Generator
) -> PIL.Image.Image:
    """A crop of 8 to 100 % of the area and an aspect of 3/4 to 4/3, resized (Szegedy et al. 2014; torchvision's RandomResizedCrop)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1.0)
        aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            left, top = (
                int(generator.integers(0, width - w + 1)),
                int(generator.integers(0, height - h + 1)),
            )
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return image.resize(
        (size, size), PIL.Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
    )


def _crop(
    image: PIL.Image.Image, size: int, shorter: int, generator: np.random.Generator | None
) -> PIL.Image.Image:
    """The image with its shorter side resized to `shorter`, cropped to a square at random, or in the center without a generator."""
    scale = shorter / min(image.size)
    image = image.resize(
        [max(size, round(n * scale)) for n in image.size], PIL.Image.Resampling.BILINEAR
    )
    room = [n - size for n in image.size]
    left, top = (
        [n // 2 for n in room] if generator is None else generator.integers(0, np.add(room, 1))
    )
    return image.crop((left, top, left + size, top + size))


def center(image: PIL.Image.Image, size: int, resize: int) -> PIL.Image.Image:
    """What evaluation sees of an image: the center, with the shorter side at `resize`, or at the customary 256/224 of `size` for 0."""
    return _crop(image, size, resize or round(size * 256 / 224), None)


class _Batches:
    """The batches of a source as a sequence: grain's workers each take their steps of it."""

    def __init__(
        self,
        source,
        batch_size,
        steps,
        seed,
        size,
        resize,
        train,
        process_index,
        process_count,
        skip_damaged,
    ):
        self.source, self.batch_size, self.steps, self.seed, self.size, self.resize = (
            source,
            batch_size,
            steps,
            seed,
            size,
            resize,
        )
        self.train, self.process_index, self.process_count, self.skip_damaged = (
            train,
            process_index,
            process_count,
            skip_damaged,
        )

    def __len__(self):
        return len(self.steps)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as its worker
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.source))

    def _decoded(self, order: np.ndarray, place: int) -> tuple[PIL.Image.Image, int, int]:
        """An image of an epoch, its label, and -1; or, for a damaged one, the next in the epoch's order that is whole, and its number."""
        for after in range(len(order)):
            try:
                return *self.source[int(order[(place + after) % len(order)])], int(
                    order[place]
                ) if after else -1
            except Damaged as error:
                if not self.skip_damaged:
                    raise
                last = error
        raise ValueError(
            f"skip_damaged=True: none of the {len(order)} images can be decoded; {last}"
        )

    def __getitem__(self, at: int) -> tuple[np.ndarray, ...]:
        step = self.steps[at]
        images, labels, damaged = [], [], []
        if not self.train:
            for index in range(
                step * self.batch_size, min((step + 1) * self.batch_size, len(self.source))
            ):
                image, label = self.source[index]
                images.append(np.asarray(center(image, self.size, self.resize)))
                labels.append(label)
            return np.stack(images), np.asarray(labels, np.int32)
        epoch, within = divmod(step, len(self.source) // self.batch_size)
        share, order = self.batch_size // self.process_count, self._order(epoch)
        start = within * self.batch_size + self.process_index * share
        for place in range(start, start + share):
            image, label, number = self._decoded(order, place)
            generator = np.random.default_rng([self.seed, epoch, int(order[place])])
            crop = (
                _crop(image, self.size, self.resize, generator)
                if self.resize
                else _area_crop(image, self.size, generator)
            )
            images.append(np.asarray(crop))
            labels.append(label)
            damaged.append(number)
        return (
            np.stack(images),
            np.asarray(labels, np.int32),
            *([np.asarray(damaged, np.int32)] if self.skip_damaged else []),
        )


def batches(
    source,
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
    """Streams batches of (uint8 images [batch, image_size, image_size, 3], int32 labels [batch]).

    In training, `steps` says which; every epoch has its own order, drops the remainder, and each process gets its own part of
    each batch. Otherwise the source is gone through once, in order, the last batch being shorter. Crops are squares of the
    image with its shorter side at `resize`, at random places in training and in the center otherwise; with `resize` 0 they are
    of random area and aspect.

    With `skip_damaged`, in training, the next whole image of the epoch's order takes the place (and the crop's random numbers) of
    one that cannot be decoded, and a batch has a third array, int32 [batch]: the number of the damaged image of each place, or -1.
    Raises `ValueError` for an image that cannot be decoded otherwise, or be read at all, and if the processes do not divide the batch.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} is not a multiple of {process_count} processes")
    if resize and resize < image_size:
        raise ValueError(f"resize={resize} is not 0 or at least image_size={image_size}")
    steps = steps if train else range(-(-len(source) // batch_size))
    made = _Batches(
        source,
        batch_size,
        steps,
        seed,
        image_size,
        resize,
        train,
        process_index,
        process_count,
        skip_damaged,
    )
    stream = grain.MapDataset.source(made).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
    if workers:
        if (
            not flags.FLAGS.is_parsed()
        ):  # grain asks for flags, which a program that has none never parses
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), _start_worker
        )
    found = _closing(iter(stream), len(made), workers > 0)
    _open.add(found)
    return found


def _closing(iterator, count: int, has_workers: bool) -> Iterator:
    """Ends the worker processes before it gives the last of `count` batches, or when it is let go of earlier."""
    try:
        for left in reversed(range(count)):
            batch = next(iterator)
            if has_workers:  # its arrays lie in shared memory, which must not outlive the workers
                batch = tuple(map(np.array, batch))
            if left:
                yield batch
    finally:
        iterator.close()
        if has_workers:
            del iterator
            gc.collect()  # grain leaves its iterators in reference cycles, each with semaphores and a batch in shared memory
    if count:
        yield batch


@atexit.register
def _close_open() -> None:
    """Closes what is still open while the modules that this needs are there."""
    for stream in list(_open):
        stream.close()


def _start_worker(index: int, count: int) -> None:
    """What a worker process does first: leaves signals, which reach all of a group, to its parent, and ends when that has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow():
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
