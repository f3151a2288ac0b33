"""Small data sets, read whole into memory: loaded by name, checked, and saved."""

import collections
import dataclasses
import difflib
import os
import re

import numpy as np

from cnnjax.data import splits
from cnnjax.data.sources import DATASETS, Npz, Source, check_classes
from cnnjax.data.splits import Split
from cnnjax.runtime import files
from cnnjax.runtime.paths import expand_user

# A slice as tensorflow-datasets writes it: "cifar10[:12000]".
_SLICE = re.compile(r"(?P<name>.+)\[:(?P<count>[1-9][0-9]*)\]")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of a data set; `validation` is None if it has no validation images."""

    train: Split
    validation: Split | None
    test: Split
    classes: tuple[str, ...]


def save(data: Dataset, path: str | os.PathLike) -> None:
    """Writes a data set with one class per image to a file that `load` reads.

    Args:
      data: the data set, with or without validation images. Labels may be integers of any type, and
        in a list.
      path: the file, whose name ends in ".npz"; `~` is expanded.

    Raises:
      ValueError: for a file of another name, for two classes of one name, and for a data set that
        `load` would refuse.
    """
    path = expand_user(path)
    if path.suffix != ".npz":
        raise ValueError(f"path={str(path)!r} does not end in .npz")
    classes = np.array(data.classes)
    check_classes(classes, str(path))
    _check_distinct(classes, str(path))
    train = _as_arrays(data.train)
    test = _as_arrays(data.test)
    parts = {"training": train, "test": test}
    if data.validation is not None:
        parts["validation"] = _as_arrays(data.validation)
    _check_parts(parts, len(classes), "cross_entropy", str(path))
    members = {
        "train_images": train.images,
        "train_labels": train.labels.astype(np.int32),
        "test_images": test.images,
        "test_labels": test.labels.astype(np.int32),
        "classes": classes,
    }
    if "validation" in parts:
        validation = parts["validation"]
        members |= {
            "validation_images": validation.images,
            "validation_labels": validation.labels.astype(np.int32),
        }
    files.write_arrays(path, members, compress=False)


def _as_arrays(split: Split) -> Split:
    """Returns a split as arrays; a user may give lists."""
    return Split(images=np.asarray(split.images), labels=np.asarray(split.labels))


def _check_distinct(classes: np.ndarray, subject: str) -> None:
    """Raises `ValueError`, which begins with `subject`, if two classes have one name.

    `load` still accepts such files: earlier versions wrote them, and their runs may be resumed.
    """
    counts = collections.Counter(splits.class_names(classes.tolist()))
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"{subject} has {count} classes named {name!r}; expected one")


def _parse(name: str) -> tuple[str, int | None]:
    """Splits a name into the data set's and a number of training images, None for all."""
    match = _SLICE.fullmatch(name)
    if match is None:
        return name, None
    return match["name"], int(match["count"])


def is_known(name: str) -> bool:
    """Tells whether `load` accepts a name."""
    base, _ = _parse(name)
    return base in DATASETS or base.endswith(".npz")


def check_name(name: str) -> None:
    """Raises `ValueError` for a name that `load` does not accept."""
    if not is_known(name):
        names = ", ".join(DATASETS)
        base, _ = _parse(name)
        near = difflib.get_close_matches(base, [*DATASETS, "folder"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"dataset={name!r} is not one of {names}, tfds:NAME, folder, FILE.npz, or a slice such "
            f"as cifar10[:12000]{hint}"
        )


def _find_source(name: str) -> Source:
    check_name(name)
    base, _ = _parse(name)
    if base.endswith(".npz"):
        return Npz(expand_user(base))
    return DATASETS[base]


def loss_of(name: str) -> str:
    """Returns the loss that a data set's labels are for."""
    return _find_source(name).loss


def _check_parts(parts: dict[str, Split], count: int, loss: str, place: str) -> None:
    """Checks that images and labels fit together and can be trained on.

    Args:
      parts: the splits by name; one of them is "training".
      count: the number of classes.
      loss: what the labels are for, which decides their shape (`Split`).
      place: where the splits are, for the error.

    Raises:
      ValueError: if they do not.
    """
    shape = parts["training"].images.shape[1:]
    for part, (images, labels) in parts.items():
        subject = f"the {part} set of {place}"
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"{subject} has images of {images.dtype} {list(images.shape)}; expected uint8 "
                "[n, height, width, channels]"
            )
        if not len(images):
            raise ValueError(f"{subject} has no images")
        if images.shape[1:] != shape:
            raise ValueError(
                f"{subject} has images of {list(images.shape[1:])}; those of the training set are "
                f"{list(shape)}"
            )
        if loss == "pixelwise":
            labels_shape = images.shape[:3]
        elif loss == "sigmoid":
            labels_shape = (len(images), count)
        else:
            labels_shape = (len(images),)
        if labels.dtype.kind not in "iu" or labels.shape != labels_shape:
            raise ValueError(
                f"{subject} has labels of {labels.dtype} {list(labels.shape)}; expected integers "
                f"{list(labels_shape)}"
            )
        splits.check_labels(labels, count, subject, loss)


def load(
    name: str | os.PathLike, data_dir: str | os.PathLike = "", n_validation: int = 0
) -> Dataset:
    """Reads a data set from its original files, downloading those that are absent.

    Args:
      name: digits, mnist, fashion_mnist, cifar10, cifar100, camvid or camvid_scenes, or a file that
        `save` wrote. A number of training images may follow: "cifar10[:12000]" has the first
        12,000, and the whole test set. `~` is expanded.
      data_dir: the folder of the files; empty for "data"; `~` is expanded.
      n_validation: the number of training images to hold out, balanced over the classes if each
        image has one. For a data set with a validation split it is the size of this split, or 0 to
        leave the split out.

    Raises:
      ValueError: for each of these:
        - an unknown name, or a data set that is streamed (folder, tfds:NAME);
        - more training images than there are;
        - an `n_validation` that cannot be held out, or is not the size of the data set's own split;
        - files that are absent and cannot be downloaded, or are not the published ones;
        - splits without images, or with images of other shapes than the training set's;
        - labels that belong to no class;
        - classes that are neither text nor numbers.
    """
    name = os.fspath(name)
    data_dir = data_dir or "data"
    base, _ = _parse(name)
    if base == "folder" or base.startswith("tfds:"):
        raise ValueError(f"dataset={name!r} is streamed and cannot be read whole")
    source = _find_source(name)
    # Not every data set has the third one.
    parts = dict(zip(("training", "test", "validation"), source.read(expand_user(data_dir))))
    place = f"{name} in data_dir={data_dir!r}"
    _check_parts(parts, len(source.classes), source.loss, place)
    if isinstance(source, Npz):
        # A file that `save` did not write may hold integers of any type.
        for part, (images, labels) in parts.items():
            parts[part] = Split(images, labels.astype(np.int32))
    train = _slice(parts["training"], name)
    test = parts["test"]
    validation = parts.get("validation")
    if not n_validation:
        return Dataset(train, None, test, source.classes)
    if validation is None:
        mask = splits.hold_out(train.labels, n_validation)
        return Dataset(train.take(~mask), train.take(mask), test, source.classes)
    if n_validation == len(validation.images):
        return Dataset(train, validation, test, source.classes)
    raise ValueError(
        f"n_validation={n_validation} is not 0 or {len(validation.images)}, the validation images "
        f"that {name} has of its own"
    )


def _slice(train: Split, name: str) -> Split:
    """Returns the first training images, as many as the data set's name says."""
    base, count = _parse(name)
    if count is None:
        return train
    if count > len(train.images):
        raise ValueError(f"dataset={name!r}: {base} has {len(train.images)} training images")
    return train.take(slice(count))


def check_counts(data: Dataset, train: int, test: int) -> None:
    """Raises `ValueError` if more images are asked for than there are."""
    for name, count, split in (("train", train, data.train), ("test", test, data.test)):
        if count > len(split.labels):
            raise ValueError(
                f"{name}={count} is more than the {len(split.labels)} images of that part"
            )


def normalization(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes the mean and standard deviation of each channel, in units of 0 to 1.

    Args:
      images: uint8 [n, height, width, channels].
    """
    # Computed from the histogram of the 256 levels, without a floating-point copy of the images.
    levels = np.arange(256) / 255
    means = []
    deviations = []
    for channel in range(images.shape[-1]):
        values = images[..., channel].ravel()
        share = np.bincount(values, minlength=256) / values.size
        mean = share @ levels
        means.append(mean)
        deviations.append(np.sqrt(share @ np.square(levels - mean)))
    # Without a lower bound, the pixels of a constant channel would be divided by zero.
    std = np.maximum(np.array(deviations), 1e-6)
    return np.array(means, np.float32), std.astype(np.float32)
