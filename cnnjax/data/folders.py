"""Labeled images on disk: folders of classes, and prepared tensorflow-datasets.

A source gives an image and its label by number; its splits are found by their names.
"""

import collections
import io
import logging
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import PIL.Image

from cnnjax.data import splits
from cnnjax.data.photographs import SUFFIXES, Damaged, describe_passed_over, list_folder, open_rgb
from cnnjax.runtime import files
from cnnjax.runtime.errors import one_line

_LOG = logging.getLogger("cnnjax")
# Names of the validation split. ImageNet's labeled test split has such a name, too.
_VALIDATION = ("val", "validation", "valid")

# ------------------------------------------------------------------ sources: image number -> image


class Folder:
    """Images under ROOT/CLASS/ in the order of their names.

    The classes are the names of the folders that are not hidden (`splits.class_name`). Other files,
    images outside a class folder and folders inside one are passed over.

    Args:
      root: the folder.
      order: classes of the training split, so that labels mean the same. They come first, in this
        order; others follow by name.

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
        ranks = {name: rank for rank, name in enumerate(order)}

        def rank_of(folder: pathlib.Path) -> int:
            return ranks.get(splits.class_name(folder.name), len(ranks))

        # Classes of `order` come first; `sorted` keeps the others by name.
        folders = sorted(top.folders, key=rank_of)
        self.classes = splits.class_names([folder.name for folder in folders])
        _check_names(folders)
        self.files: list[tuple[pathlib.Path, int]] = []
        # Counts of what is passed over, by its kind.
        others = collections.Counter(top.others)
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
        self._split = split
        try:
            builder = tfds.builder(name, data_dir=data_dir or None)
            keys = builder.info.supervised_keys
            # Images stay encoded: tensorflow-datasets would return the numbers of a palette's
            # colors as gray, and CMYK as RGBA.
            decoders = {keys[0]: tfds.decode.SkipDecoding()} if keys else None
            self._records = builder.as_data_source(split=split, decoders=decoders)
        except Exception as error:
            # tensorflow-datasets raises many kinds of errors, one of them if TensorFlow is not
            # installed.
            reason = str(error).strip().partition("\n")[0][:200]
            where = f" --data_dir={data_dir}" if data_dir else ""
            raise ValueError(
                f"dataset='tfds:{name}' has no split {split!r} in data_dir={data_dir!r} that can "
                f"be read ({type(error).__name__}: {reason}); prepare it, where TensorFlow is "
                f"installed, with: tfds build {name} --file_format=array_record{where}"
            ) from error
        features = builder.info.features
        is_image = keys and isinstance(features[keys[0]], tfds.features.Image)
        if not is_image or not isinstance(features[keys[1]], tfds.features.ClassLabel):
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

    def _read_record(self, index: int) -> tuple[bytes, int]:
        """Reads an encoded image and its label, which may be of no class."""
        try:
            record = self._records[index]
        except Exception as error:
            # array_record raises it, or the example's decoder.
            raise Damaged(
                f"record {index} of {self.place} cannot be decoded: {one_line(error)}"
            ) from error
        return record[self._image], int(record[self._label])

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        name = f"record {index} of {self.place}"
        encoded, label = self._read_record(index)
        splits.check_labels(np.array([label]), len(self.classes), name)
        return open_rgb(io.BytesIO(encoded), name), label

    def labels(self) -> np.ndarray:
        """Reads the labels of all images, int32 [n].

        This reads the whole files of the split.

        Raises:
          ValueError: for a label that belongs to no class.
        """
        labels = [self._read_record(index)[1] for index in range(len(self))]
        splits.check_labels(np.array(labels), len(self.classes), self.place)
        return np.array(labels, np.int32)

    def is_labeled(self) -> bool:
        """Tells whether the first image has a label; in a withheld test set it is -1."""
        if not len(self):
            return False
        try:
            _, label = self._read_record(0)
        except Damaged:
            # The image is reported or skipped when it is read.
            return True
        return label >= 0

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
    if dataset == "folder" and data_dir and not os.path.isdir(data_dir):
        raise ValueError(f"{place} is not a folder")
    if "train" not in names:
        hint = "" if data_dir else "; name the folder that holds train with --config.data_dir"
        parent = pathlib.Path(data_dir).parent
        if data_dir and dataset == "folder" and (parent / "train").is_dir():
            hint = f"; did you mean {parent}?"
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


def open_splits(dataset: str, data_dir: str, n_validation: int = 0) -> Mapping[str, Source]:
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
    _check_classes(sources, data_dir)
    if names["test"] != "test":
        _LOG.info("%s is the test set, as there is no labeled split named test", names["test"])
    if dataset == "folder":
        _log_unused_folders(pathlib.Path(data_dir), names.values())
    return _with_validation(sources, data_dir, n_validation)


def _check_classes(sources: Mapping[str, Folder | Tfds], data_dir: str) -> None:
    """Logs each split's images and checks that a label means the same class in all splits."""
    classes = sources["train"].classes
    for use, source in sources.items():
        _LOG.info("%s: %s", use, _describe(source))
        if change := splits.describe_classes(classes, source.classes):
            raise ValueError(
                f"data_dir={data_dir!r}: the {use} split has other classes than the training "
                f"split ({change}); expected the same"
            )


def _log_unused_folders(root: pathlib.Path, used: Collection[str]) -> None:
    unused = [path for path in list_folder(root).folders if path.name not in used]
    if passed_over := describe_passed_over(root, collections.Counter(), unused):
        _LOG.info("%s: %s", root, passed_over)


def _with_validation(
    sources: Mapping[str, Folder | Tfds], data_dir: str, n_validation: int
) -> Mapping[str, Source]:
    """Holds out training images for validation if the data set has no validation split.

    Raises:
      ValueError: if `n_validation` is not the size of the data set's own validation split.
    """
    if not n_validation:
        return sources
    if "validation" in sources:
        count = len(sources["validation"])
        if n_validation != count:
            raise ValueError(
                f"n_validation={n_validation} is not 0 or {count}, the validation images that "
                f"data_dir={data_dir!r} has of its own"
            )
        return sources
    rest, held_out = hold_out(sources["train"], n_validation)
    _LOG.info("validation: %s of the training images", f"{n_validation:,}")
    return {**sources, "train": rest, "validation": held_out}
