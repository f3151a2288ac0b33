"""Small data sets, read whole from their original files.

CIFAR-10 and -100, MNIST, Fashion-MNIST, CamVid, scikit-learn's digits.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import logging
import math
import os
import pathlib
import pickle
import re
import sys
import tarfile
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import pooch
import requests

from cnnjax.data import splits
from cnnjax.data.photographs import list_folder, opened, read_image
from cnnjax.data.splits import IGNORED
from cnnjax.runtime import workdir
from cnnjax.runtime.paths import expand_user, package_folder

DIGITS = tuple("0123456789")


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
      images: uint8 [n, height, width, channels].
      labels: int32 [n]; for several classes per image, int32 [n, classes] of 0 and 1; for masks,
        uint8 [n, height, width] with 255 for pixels of no class.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of a data set; `validation` is None if it has no validation images."""

    train: Split
    validation: Split | None
    test: Split
    classes: tuple[str, ...]


# ------------------------------------------------------------------ formats: bytes -> arrays


def read_idx(data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an IDX file of unsigned bytes (LeCun, yann.lecun.com/exdb/mnist).

    Args:
      data: the file's bytes.
      name: the file's name, for errors.
      shape: the array's expected shape.

    Returns:
      uint8 of `shape`.

    Raises:
      ValueError: for any other content.
    """
    header = bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape)
    start = data[: len(header)]
    if start != header:
        raise ValueError(
            f"{name} begins with {start.hex()}; the IDX header of unsigned bytes {list(shape)} is "
            f"{header.hex()}"
        )
    return _as_array(data[len(header) :], name, shape)


def _as_array(data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Views bytes as uint8 of a shape; raises `ValueError` if there are more or fewer."""
    if len(data) != math.prod(shape):
        raise ValueError(
            f"{name} holds {len(data):,} bytes of data where {list(shape)} are "
            f"{math.prod(shape):,}: it is truncated or of another kind"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _from_planes(pixels: np.ndarray) -> np.ndarray:
    """Turns CIFAR's rows of 3072 bytes (red, green, then blue) into [n, 32, 32, 3]."""
    planes = pixels.reshape(-1, 3, 1024)
    images = np.empty((len(planes), 1024, 3), np.uint8)
    # A plane at a time, which is faster than NumPy's copy of the transposed array.
    for color in range(3):
        images[:, :, color] = planes[:, color]
    return images.reshape(-1, 32, 32, 3)


def read_cifar_binary(data: bytes, name: str, count: int, label_bytes: int = 1) -> Split:
    """Reads a batch in CIFAR's binary layout.

    Args:
      data: the file's bytes.
      name: the file's name, for errors.
      count: the expected number of images.
      label_bytes: how many labels each image has; the last of them is read, which is the fine
        label of CIFAR-100's two.

    Raises:
      ValueError: for a file of another length.
    """
    rows = _as_array(data, name, (count, label_bytes + 3072))
    labels = rows[:, label_bytes - 1].astype(np.int32)
    return Split(_from_planes(rows[:, label_bytes:]), labels)


class _Inert:
    """A stand-in for NumPy's objects in a pickle, which keeps their state."""

    state = ()

    def __init__(self, *arguments):
        pass


def _encode_latin1(text, encoding):
    """Stands in for `codecs.encode`, which pickles of Python 3 in protocol 2 call."""
    return text.encode("latin1")


class _ArraysOnly(pickle._Unpickler):
    """An unpickler that builds plain containers and `_Inert` arrays only.

    A file from strangers can neither run code nor reach into memory. Nor can it exhaust memory or
    time:

    - It is the unpickler written in Python. Its memo grows with what is put there, while a file of
      9 bytes can make the unpickler in C reserve gigabytes.
    - It turns tuples into lists. Nested tuples as keys of a dictionary can take exponential time to
      hash.
    """

    _ALLOWED = {
        ("_codecs", "encode"): _encode_latin1,
        ("numpy.core.multiarray", "_reconstruct"): _Inert,
        ("numpy._core.multiarray", "_reconstruct"): _Inert,
        ("numpy", "ndarray"): _Inert,
        ("numpy", "dtype"): _Inert,
    }

    def find_class(self, module, name):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only NumPy arrays are allowed"
            )
        return self._ALLOWED[module, name]

    def _build(self):
        state = self.stack.pop()
        if type(self.stack[-1]) is not _Inert:
            raise pickle.UnpicklingError("it gives a state to an object that is not an array")
        self.stack[-1].state = state

    def _list_to_mark(self):
        # `pop_mark` replaces the stack, so `self.append` is looked up after it.
        items = self.pop_mark()
        self.append(items)

    def _list_of_last(self, count):
        first = len(self.stack) - count
        self.stack[first:] = [self.stack[first:]]

    dispatch = pickle._Unpickler.dispatch | {
        pickle.BUILD[0]: _build,
        pickle.TUPLE[0]: _list_to_mark,
        pickle.EMPTY_TUPLE[0]: lambda self: self._list_of_last(0),
        pickle.TUPLE1[0]: lambda self: self._list_of_last(1),
        pickle.TUPLE2[0]: lambda self: self._list_of_last(2),
        pickle.TUPLE3[0]: lambda self: self._list_of_last(3),
    }
    # A bytearray would be allocated at its declared length before its bytes are read.
    del dispatch[pickle.BYTEARRAY8[0]]


def read_cifar_pickle(data: bytes, name: str, count: int, key: bytes = b"labels") -> Split:
    """Reads a batch in CIFAR's Python layout without running what the pickle holds.

    The layout is a dictionary of an array of bytes and a list of labels.

    Args:
      data: the file's bytes.
      name: the file's name, for errors.
      count: the expected number of images.
      key: the dictionary's key of the labels.

    Raises:
      ValueError: for any other content.
    """
    try:
        batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        labels = batch[key]
        _, shape, _, is_fortran, pixels = batch[b"data"].state
        if shape != [count, 3072] or type(pixels) is not bytes or len(pixels) != count * 3072:
            raise ValueError(f"its pixels are not an array of {count} x 3072 bytes")
        is_list = type(labels) is list and len(labels) == count
        if not is_list or not all(type(label) is int and 0 <= label < 256 for label in labels):
            raise ValueError(f"its labels are not a list of {count} whole numbers from 0 to 255")
    except Exception as error:
        # A damaged pickle can raise any exception.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is not a CIFAR batch in the Python layout: {type(error).__name__}: {reason}"
        ) from error
    rows = np.frombuffer(pixels, np.uint8)
    if is_fortran:
        rows = rows.reshape(3072, count).T
    rows = rows.reshape(count, 3072)
    return Split(_from_planes(rows), np.asarray(labels, np.int32))


# ------------------------------------------------------------------ files: found or downloaded


class File(NamedTuple):
    """A published file."""

    name: str
    urls: tuple[str, ...]
    md5: str


def _first_cause(error: BaseException) -> str:
    """Describes an exception's first cause in one line.

    The exceptions that libraries make of it are longer and say less.
    """
    while error.__context__:
        error = error.__context__
    return " ".join(str(error).split())[:300]


def _download(file: File, folder: pathlib.Path) -> pathlib.Path:
    """Downloads a file into a folder.

    Raises:
      ValueError: if it could not be downloaded from any address; no folder is left behind then.
    """
    pooch.get_logger().setLevel(logging.ERROR)
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    known_hash = f"md5:{file.md5}"
    failures = []
    for url in file.urls:
        try:
            path = pooch.retrieve(url, known_hash, file.name, folder, downloader=downloader)
            return pathlib.Path(path)
        except (requests.RequestException, ValueError, OSError) as error:
            failures.append(f"{url}: {_first_cause(error)}")
    with contextlib.suppress(OSError):
        for path in new_folders:
            path.rmdir()
    raise ValueError(
        f"{file.name} is not in {folder} and could not be downloaded ({'; '.join(failures)}); "
        "put it there by hand"
    )


def _check_hash(path: pathlib.Path, file: File) -> None:
    """Raises `ValueError` if a file, not yet decompressed, is not the published one."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "md5").hexdigest()
    if digest != file.md5:
        raise ValueError(
            f"{path} has the MD5 hash {digest}, and the published file has {file.md5}: it is "
            "damaged or another file"
        )


def _read(path: pathlib.Path, file: File, limit: int) -> bytes:
    """Reads a published file, compressed or not, up to one byte beyond `limit`."""
    if path.suffix != ".gz":
        return _read_start(path, limit)
    _check_hash(path, file)
    with gzip.open(path) as stream:
        return stream.read(limit + 1)


def _read_start(path: pathlib.Path, limit: int) -> bytes:
    """Reads a file up to one byte beyond `limit`, which shows that it is too long."""
    with path.open("rb") as stream:
        return stream.read(limit + 1)


# ------------------------------------------------------------------ data sets


class Source(Protocol):
    """A data set in its original files."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def read(self, data_dir: pathlib.Path) -> tuple[Split, ...]:
        """Reads the training and test splits, and the validation split if there is one."""
        ...


@dataclasses.dataclass(frozen=True)
class Idx:
    """A data set in the layout of MNIST: four IDX files, compressed or not.

    Attributes:
      folders: the folders to look for the files in; they are downloaded to the first.
      files: images and labels for training, then for the test.
      classes: the classes' names.
      counts: the number of training and test images.
      shape: height, width and channels of an image.
    """

    folders: tuple[str, ...]
    files: tuple[File, ...]
    classes: tuple[str, ...]
    counts: tuple[int, int] = (60_000, 10_000)
    shape: tuple[int, int, int] = (28, 28, 1)

    def _find(self, data_dir: pathlib.Path, file: File) -> pathlib.Path:
        plain = file.name.removesuffix(".gz")
        for folder in self.folders:
            for name in (file.name, plain):
                path = data_dir / folder / name
                if path.is_file():
                    return path
        # MNIST's and Fashion-MNIST's files have the same names. Outside their folders only the
        # hash, which is known of compressed files only, tells them apart.
        path = data_dir / file.name
        if path.is_file():
            return path
        return _download(file, data_dir / self.folders[0])

    def _array(self, data_dir: pathlib.Path, file: File, shape: tuple[int, ...]) -> np.ndarray:
        path = self._find(data_dir, file)
        header_bytes = 4 + 4 * len(shape)
        return read_idx(_read(path, file, header_bytes + math.prod(shape)), str(path), shape)

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split]:
        parts = []
        for number, count in enumerate(self.counts):
            image_file, label_file = self.files[2 * number : 2 * number + 2]
            images = self._array(data_dir, image_file, (count, *self.shape[:2]))
            labels = self._array(data_dir, label_file, (count,))
            parts.append(Split(images[..., None], labels.astype(np.int32)))
        train, test = parts
        return train, test


@dataclasses.dataclass(frozen=True)
class Cifar:
    """A data set in the layouts of CIFAR, in a folder or in the published archive.

    Attributes:
      binary: the folder's name in the binary layout, also within the archive.
      python: the folder's name in the Python layout.
      archives: the archive of the binary layout, which is downloaded if there is none, and that of
        the Python layout.
      train: the training batches' names, without ".bin".
      test: the test batch's name.
      classes: the classes' names.
      label_bytes: as in `read_cifar_binary`.
      key: as in `read_cifar_pickle`.
      counts: the number of training and test images.
    """

    binary: str
    python: str
    archives: tuple[File, ...]
    train: tuple[str, ...]
    test: str
    classes: tuple[str, ...]
    label_bytes: int = 1
    key: bytes = b"labels"
    counts: tuple[int, int] = (50_000, 10_000)

    def _file_names(self, is_binary: bool) -> list[str]:
        """Lists the files of the training batches, and last that of the test batch."""
        suffix = ".bin" if is_binary else ""
        return [f"{name}{suffix}" for name in (*self.train, self.test)]

    def _find_folder(self, data_dir: pathlib.Path) -> tuple[bool, pathlib.Path] | None:
        """Finds the folder of the batches.

        Returns:
          Whether their layout is the binary one, and the folder; None if there is none.

        Raises:
          ValueError: if some of the batches are missing.
        """
        for is_binary, folder in ((True, self.binary), (False, self.python)):
            names = self._file_names(is_binary)
            for place in (data_dir / folder, data_dir):
                missing = [name for name in names if not (place / name).is_file()]
                if not missing:
                    return is_binary, place
                if len(missing) < len(names):
                    raise ValueError(
                        f"{place} lacks {', '.join(missing)}; it has other batches of the same "
                        "data set"
                    )
        return None

    def _find_archive(self, data_dir: pathlib.Path) -> tuple[bool, pathlib.Path]:
        """Finds an archive, or downloads the one of the binary layout.

        Returns:
          Whether its layout is the binary one, and its path.
        """
        binary, python = self.archives
        # The Python layout is read only if its archive is the only one.
        is_binary = (data_dir / binary.name).is_file() or not (data_dir / python.name).is_file()
        file = binary if is_binary else python
        path = data_dir / file.name
        if not path.is_file():
            path = _download(file, data_dir)
        # An archive with this hash holds all batches.
        _check_hash(path, file)
        return is_binary, path

    def _contents(self, is_binary: bool, place: pathlib.Path) -> Iterator[tuple[str, bytes]]:
        """Yields the names and contents of the files in a folder or an archive, in any order."""
        names = self._file_names(is_binary)
        if place.is_dir():
            for name in names:
                # A pickle may be longer than its arrays.
                yield name, _read_start(place / name, 2 * 3074 * max(self.counts))
            return
        folder = self.binary if is_binary else self.python
        paths = {f"{folder}/{name}": name for name in names}
        # The archive is read as a stream. To go back, it would be decompressed from its start.
        with tarfile.open(place, "r|gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name in paths else None
                if file is not None:
                    yield paths[member.name], file.read()

    def _batch(self, is_binary: bool, data: bytes, description: str, count: int) -> Split:
        if is_binary:
            return read_cifar_binary(data, description, count, self.label_bytes)
        return read_cifar_pickle(data, description, count, self.key)

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split]:
        is_binary, place = self._find_folder(data_dir) or self._find_archive(data_dir)
        *train_names, test_name = self._file_names(is_binary)
        counts = dict.fromkeys(train_names, self.counts[0] // len(train_names))
        counts[test_name] = self.counts[1]
        batches = {}
        for name, data in self._contents(is_binary, place):
            batches[name] = self._batch(is_binary, data, f"{place}/{name}", counts[name])
        train = Split(
            np.concatenate([batches[name].images for name in train_names]),
            np.concatenate([batches[name].labels for name in train_names]),
        )
        return train, batches[test_name]


class Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, which need no file.

    The first 1,437 are for training and the last 360 for the test.
    """

    classes = DIGITS

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split]:
        # The file of `sklearn.datasets.load_digits`.
        with gzip.open(package_folder("sklearn") / "datasets" / "data" / "digits.csv.gz") as file:
            table = np.loadtxt(file, delimiter=",")
        # A row has 64 pixels from 0 to 16, and the digit.
        images = np.round(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        labels = table[:, 64].astype(np.int32)
        return Split(images[:1437], labels[:1437]), Split(images[1437:], labels[1437:])


@dataclasses.dataclass(frozen=True)
class CamVid:
    """CamVid's road scenes (Brostow et al. 2009) in the layout of SegNet's tutorial.

    Each split has a folder of images and a folder of masks. A mask holds, for each pixel, the
    number of one of the eleven classes, or 11 for void: none of them.

    Attributes:
      loss: "pixelwise" for masks as labels; "sigmoid" for the classes that appear in a scene.
      size: height and width; the original's are 360 and 480.
      counts: the number of training, test and validation images.
      classes: the classes' names.
      present: the number of pixels from which a class appears in a scene, about a thousandth.
    """

    loss: str
    size: tuple[int, int] = (180, 240)
    counts: tuple[int, int, int] = (367, 233, 101)
    classes: tuple[str, ...] = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    present: int = 50

    def _mask(self, path: pathlib.Path) -> np.ndarray:
        with opened(path) as image:
            mask = np.array(image)
            image_format = image.format
        void = len(self.classes)
        if mask.dtype != np.uint8 or mask.shape != self.size or mask.max() > void:
            raise ValueError(
                f"{path} is a mask of {mask.dtype} {list(mask.shape)} up to {mask.max()}; "
                f"expected uint8 {list(self.size)} up to {void}"
            )
        if image_format == "JPEG":
            raise ValueError(f"{path} is a mask in JPEG, which changes labels; expected PNG")
        return np.where(mask == void, np.uint8(IGNORED), mask)

    def _image(self, path: pathlib.Path) -> np.ndarray:
        image = read_image(path)
        height, width = image.shape[:2]
        if (height, width) != self.size:
            raise ValueError(f"{path} is {height}x{width}; expected {self.size[0]}x{self.size[1]}")
        return image

    def _split(self, folder: pathlib.Path, name: str, count: int) -> Split:
        image_paths = _by_stem(folder / name)
        mask_paths = _by_stem(folder / f"{name}annot")
        if image_paths.keys() != mask_paths.keys() or len(image_paths) != count:
            raise ValueError(
                f"{folder} holds {len(image_paths)} images in {name} and {len(mask_paths)} masks "
                f"in {name}annot; expected {count} of either, of the same names (CamVid is not "
                "downloaded: put it there by hand)"
            )
        images = np.stack([self._image(path) for path in image_paths.values()])
        masks = np.stack([self._mask(path) for path in mask_paths.values()])
        if self.loss == "pixelwise":
            return Split(images, masks)
        pixels = [(masks == number).sum((1, 2)) for number in range(len(self.classes))]
        return Split(images, (np.stack(pixels, 1) >= self.present).astype(np.int32))

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split, Split]:
        folder = data_dir / "camvid"
        train, test, validation = self.counts
        return (
            self._split(folder, "train", train),
            self._split(folder, "test", test),
            self._split(folder, "val", validation),
        )


@dataclasses.dataclass(frozen=True)
class Npz:
    """A data set in one file that `save` wrote."""

    path: pathlib.Path

    @functools.cached_property
    def _members(self) -> dict[str, np.ndarray]:
        names = ("train_images", "train_labels", "test_images", "test_labels", "classes")
        subject = f"dataset={str(self.path)!r}"
        try:
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                return {name: file[name] for name in names}
        except MemoryError:
            raise
        except Exception as error:
            # A damaged file can raise any exception; only those of the system have a number.
            if isinstance(error, OSError) and error.errno is not None:
                raise ValueError(f"{subject} cannot be read: {error.strerror}") from error
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{subject} is not a file that cnnjax.data.arrays.save wrote: "
                f"{type(error).__name__}: {reason}"
            ) from error

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._members["classes"].tolist())

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split]:
        members = self._members
        return (
            Split(members["train_images"], members["train_labels"]),
            Split(members["test_images"], members["test_labels"]),
        )


def save(data: Dataset, path: str | os.PathLike) -> None:
    """Writes a data set with one class per image to a file that `load` reads.

    Args:
      data: the data set. Its validation images are not written: `load` holds some out. Labels may
        be integers of any type.
      path: the file, whose name ends in ".npz"; `~` is expanded.

    Raises:
      ValueError: for a file of another name, and for a data set that `load` would refuse.
    """
    path = expand_user(path)
    if path.suffix != ".npz":
        raise ValueError(f"path={str(path)!r} does not end in .npz")
    parts = {"training": data.train, "test": data.test}
    _check_parts(parts, len(data.classes), "cross_entropy", str(path))
    members = {
        "train_images": data.train.images,
        "train_labels": data.train.labels.astype(np.int32),
        "test_images": data.test.images,
        "test_labels": data.test.labels.astype(np.int32),
        "classes": np.array(data.classes),
    }
    workdir.write_arrays(path, members, compress=False)


def _by_stem(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Maps the names of image files without suffixes to their paths."""
    if not folder.is_dir():
        return {}
    return {path.stem: path for path in list_folder(folder).images}


def _idx_files(urls: tuple[str, ...], hashes: tuple[str, ...]) -> tuple[File, ...]:
    names = [
        f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    files = []
    for name, md5 in zip(names, hashes):
        addresses = tuple(url + name for url in urls)
        files.append(File(name, addresses, md5))
    return tuple(files)


def _cifar_files(number: int, binary_md5: str, python_md5: str) -> tuple[File, ...]:
    """Lists CIFAR's archives; www.cs.toronto.edu/~kriz/cifar.html prints their hashes."""
    names = [f"cifar-{number}-{layout}.tar.gz" for layout in ("binary", "python")]
    return tuple(
        File(name, (f"https://www.cs.toronto.edu/~kriz/{name}",), md5)
        for name, md5 in zip(names, (binary_md5, python_md5))
    )


_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
    kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
    mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
    tank telephone television tiger tractor train trout tulip turtle wardrobe whale
    willow_tree wolf woman worm
"""

DATASETS: dict[str, Source] = {
    "digits": Digits(),
    # The hashes are those of torchvision's lists.
    "mnist": Idx(
        ("mnist", "MNIST/raw"),
        _idx_files(
            (
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
            (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
        ),
        DIGITS,
    ),
    "fashion_mnist": Idx(
        ("fashion_mnist", "FashionMNIST/raw"),
        _idx_files(
            ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
            (
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
        ),
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
    "cifar10": Cifar(
        binary="cifar-10-batches-bin",
        python="cifar-10-batches-py",
        archives=_cifar_files(
            10, "c32a1d4ab5d03f1284b67883e8d87530", "c58f30108f718f92721af3b95e74349a"
        ),
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        classes=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
    ),
    "cifar100": Cifar(
        binary="cifar-100-binary",
        python="cifar-100-python",
        archives=_cifar_files(
            100, "03b5dce01913d631647c71ecec9e9cb8", "eb9058c3a382ffc7106e4002c42a8d85"
        ),
        train=("train",),
        test="test",
        classes=tuple(_CIFAR100.split()),
        label_bytes=2,
        key=b"fine_labels",
    ),
    "camvid": CamVid("pixelwise"),
    "camvid_scenes": CamVid("sigmoid"),
}


# A slice as tensorflow-datasets writes it: "cifar10[:12000]".
_SLICE = re.compile(r"(?P<name>.+)\[:(?P<count>[1-9][0-9]*)\]")


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
        raise ValueError(
            f"dataset={name!r} is not one of {names}, tfds:NAME, folder, FILE.npz, or a slice such "
            "as cifar10[:12000]"
        )


def _find_source(name: str) -> Source:
    check_name(name)
    base, _ = _parse(name)
    if base.endswith(".npz"):
        return Npz(expand_user(base))
    return DATASETS[base]


def _source_loss(source: Source | None) -> str:
    return getattr(source, "loss", "cross_entropy")


def loss_of(name: str) -> str:
    """Returns the loss that a data set's labels are for."""
    base, _ = _parse(name)
    return _source_loss(DATASETS.get(base))


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
        expected = {"pixelwise": images.shape[:3], "sigmoid": (len(images), count)}
        labels_shape = expected.get(loss, (len(images),))
        if labels.dtype.kind not in "iu" or labels.shape != labels_shape:
            raise ValueError(
                f"{subject} has labels of {labels.dtype} {list(labels.shape)}; expected integers "
                f"{list(labels_shape)}"
            )
        splits.check_labels(labels, count, subject, loss)


def load(name: str, data_dir: str | os.PathLike = "", n_validation: int = 0) -> Dataset:
    """Reads a data set from its original files, downloading those that are absent.

    Args:
      name: one of `DATASETS`, or a file that `save` wrote. A number of training images may follow:
        "cifar10[:12000]" has the first 12,000, and the whole test set. `~` is expanded.
      data_dir: the folder of the files; empty for "data"; `~` is expanded.
      n_validation: the number of training images to hold out, balanced over the classes. For a data
        set with a validation split it is the size of this split, or 0 to leave the split out.

    Raises:
      ValueError: for an unknown name, for more training images than there are, for files that are
        absent and cannot be downloaded, for files other than the published ones, for splits
        without images or with images of other shapes than the training set's, and for labels that
        belong to no class.
    """
    source = _find_source(name)
    train, test, *rest = source.read(expand_user(data_dir or "data"))
    validation = rest[0] if rest else None
    parts = {"training": train, "test": test}
    if validation is not None:
        parts["validation"] = validation
    place = f"{name} in data_dir={data_dir!r}"
    _check_parts(parts, len(source.classes), _source_loss(source), place)
    if isinstance(source, Npz):
        # A file that `save` did not write may hold integers of any type.
        train = Split(train.images, train.labels.astype(np.int32))
        test = Split(test.images, test.labels.astype(np.int32))
    train = _slice(train, name)
    if validation is not None and n_validation not in (0, len(validation.images)):
        raise ValueError(
            f"n_validation={n_validation} is not 0 or {len(validation.images)}, the validation "
            f"images that {name} has of its own"
        )
    if not n_validation:
        return Dataset(train, None, test, source.classes)
    if validation is not None:
        return Dataset(train, validation, test, source.classes)
    mask = splits.hold_out(train.labels, n_validation)
    held_out = Split(train.images[mask], train.labels[mask])
    remaining = Split(train.images[~mask], train.labels[~mask])
    return Dataset(remaining, held_out, test, source.classes)


def _slice(train: Split, name: str) -> Split:
    """Returns the first training images, as many as the data set's name says."""
    base, count = _parse(name)
    if count is None:
        return train
    if count > len(train.images):
        raise ValueError(f"dataset={name!r}: {base} has {len(train.images)} training images")
    return Split(train.images[:count], train.labels[:count])


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
