"""Small data sets, read whole from their original files: CIFAR-10 and -100, MNIST, Fashion-MNIST, CamVid, scikit-learn's digits."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import logging
import math
import os
import pathlib
import pickle
import sys
import tarfile
from typing import NamedTuple, Protocol

import numpy as np
import pooch
import requests

from cnnjax.data.augment import IGNORED
from cnnjax.data.photographs import opened, read_image

DIGITS = tuple("0123456789")


class Split(NamedTuple):
    """uint8 images [n, height, width, channels] and labels: int32 [n]; of scenes, int32 [n, classes] of 0 and 1; masks, uint8
    [n, height, width] with 255 where a pixel is of no class."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The parts of a data set; `validation` is None where no images were held out."""

    train: Split
    validation: Split | None
    test: Split
    classes: tuple[str, ...]


# ------------------------------------------------------------------ formats: bytes -> arrays, refusing what is not as published


def read_idx(data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An IDX file (LeCun, yann.lecun.com/exdb/mnist) of unsigned bytes -> uint8 of `shape`. Raises `ValueError` for any other."""
    header = bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape)
    if data[: len(header)] != header:
        raise ValueError(
            f"{name} begins with {data[: len(header)].hex()}; the IDX header of unsigned bytes {list(shape)} is {header.hex()}"
        )
    return _records(data[len(header) :], name, shape)


def _records(data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(data) != math.prod(shape):
        raise ValueError(
            f"{name} holds {len(data):,} bytes of data where {list(shape)} are {math.prod(shape):,}: it is truncated or of "
            "another kind"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _planes(pixels: np.ndarray) -> np.ndarray:
    """CIFAR's rows of 3072: red, then green, then blue -> [n, 32, 32, 3]."""
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def read_cifar_binary(data: bytes, name: str, count: int, label_bytes: int = 1) -> Split:
    """CIFAR's binary layout; of CIFAR-100's two label bytes the second is the fine label. Raises `ValueError` for any other."""
    rows = _records(data, name, (count, label_bytes + 3072))
    return Split(_planes(rows[:, label_bytes:]), rows[:, label_bytes - 1].astype(np.int32))


class _Inert:
    """What stands for NumPy's objects in a pickle: it keeps the state that the file gives it, and NumPy itself is never called."""

    state = ()

    def __init__(self, *arguments):
        pass


class _ArraysOnly(pickle._Unpickler):
    """Builds plain containers and `_Inert` arrays, so that a file from strangers neither runs code nor reaches into memory.

    It is the unpickler in Python, whose memo grows with what is put there (a file of 9 bytes can make the one in C reserve gigabytes), and
    makes lists of tuples, since those that hold each other as keys of a dictionary take exponential time to hash.
    """

    _ALLOWED = {
        ("_codecs", "encode"): lambda text, how: text.encode(
            "latin1"
        ),  # how Python 3 writes bytes in protocol 2
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
            raise pickle.UnpicklingError("it gives a state to what is no array")
        self.stack[-1].state = state

    def _marked(self):
        found = self.pop_mark()  # which changes the stack
        self.append(found)

    def _last(self, count):
        self.stack[len(self.stack) - count :] = [self.stack[len(self.stack) - count :]]

    dispatch = pickle._Unpickler.dispatch | {
        pickle.BUILD[0]: _build,
        pickle.TUPLE[0]: _marked,
        pickle.EMPTY_TUPLE[0]: lambda self: self._last(0),
        pickle.TUPLE1[0]: lambda self: self._last(1),
        pickle.TUPLE2[0]: lambda self: self._last(2),
        pickle.TUPLE3[0]: lambda self: self._last(3),
    }
    del dispatch[
        pickle.BYTEARRAY8[0]
    ]  # which is as long as it says before its bytes are looked for


def read_cifar_pickle(data: bytes, name: str, count: int, key: bytes = b"labels") -> Split:
    """CIFAR's Python layout, a dictionary of an array of bytes and a list of labels, read without running what it holds.

    Raises `ValueError` for any other content.
    """
    try:
        found = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        labels, (_, shape, _, is_fortran, pixels) = found[key], found[b"data"].state
        if shape != [count, 3072] or type(pixels) is not bytes or len(pixels) != count * 3072:
            raise ValueError(f"its pixels are not an array of {count} x 3072 bytes")
        if (
            type(labels) is not list
            or len(labels) != count
            or any(type(label) is not int or not 0 <= label < 256 for label in labels)
        ):
            raise ValueError(f"its labels are not a list of {count} whole numbers from 0 to 255")
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is not a CIFAR batch in the Python layout: {type(error).__name__}: {reason}"
        ) from error
    rows = np.frombuffer(pixels, np.uint8).reshape((count, 3072), order="F" if is_fortran else "C")
    return Split(_planes(rows), np.asarray(labels, np.int32))


# ------------------------------------------------------------------ files: found, or downloaded with their hash checked


class File(NamedTuple):
    """A published file."""

    name: str
    urls: tuple[str, ...]
    md5: str


def _reason(error: BaseException) -> str:
    """An exception's first cause, in a line: what the libraries above it say is longer and tells less."""
    while error.__context__:
        error = error.__context__
    return " ".join(str(error).split())[:300]


def _download(file: File, folder: pathlib.Path) -> pathlib.Path:
    """Fetches a file into a folder. Raises `ValueError`, and leaves nothing behind, if no address serves it whole."""
    pooch.get_logger().setLevel(logging.ERROR)
    fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    failures = []
    for url in file.urls:
        try:
            return pathlib.Path(
                pooch.retrieve(url, f"md5:{file.md5}", file.name, folder, downloader=fetch)
            )
        except (requests.RequestException, ValueError, OSError) as error:
            failures.append(f"{url}: {_reason(error)}")
    with contextlib.suppress(OSError):
        for path in absent:
            path.rmdir()
    raise ValueError(
        f"{file.name} is not in {folder} and could not be downloaded ({'; '.join(failures)}); put it there by hand"
    )


def _check_hash(path: pathlib.Path, file: File) -> None:
    """Raises `ValueError` for a compressed file other than the published one, before anything of it is decompressed."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "md5").hexdigest()
    if found != file.md5:
        raise ValueError(
            f"{path} has the MD5 hash {found}, and the published file has {file.md5}: it is damaged or another file"
        )


def _begin(path: pathlib.Path, limit: int) -> bytes:
    """A file's bytes, but no more than one beyond what is expected."""
    with path.open("rb") as stream:
        return stream.read(limit + 1)


def _read(path: pathlib.Path, file: File, limit: int) -> bytes:
    """A published file, or what was in it if it has been decompressed, but no more than one byte beyond what is expected."""
    if path.suffix != ".gz":
        return _begin(path, limit)
    _check_hash(path, file)
    with gzip.open(path) as stream:
        return stream.read(limit + 1)


# ------------------------------------------------------------------ data sets


class Source(Protocol):
    """A data set in its original files."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def read(self, data_dir: pathlib.Path) -> tuple[Split, ...]:
        """The training and the test images, and those for validation where it has some of its own."""
        ...


@dataclasses.dataclass(frozen=True)
class Idx:
    """A data set in the layout of MNIST: four IDX files, compressed or not."""

    folders: tuple[
        str, ...
    ]  # where the files are looked for; the first is where they are downloaded to
    files: tuple[File, ...]  # images and labels, of training and test
    classes: tuple[str, ...]
    counts: tuple[int, int] = (60_000, 10_000)
    shape: tuple[int, int, int] = (28, 28, 1)

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split]:
        arrays = []
        for number, file in enumerate(self.files):
            shape = (self.counts[number // 2], *(self.shape[:2] if number % 2 == 0 else ()))
            places = [
                data_dir / folder / name
                for folder in self.folders
                for name in (file.name, file.name.removesuffix(".gz"))
            ]
            places.append(
                data_dir / file.name
            )  # compressed only: of the hash alone it is known whose it is
            path = next((path for path in places if path.is_file()), None) or _download(
                file, data_dir / self.folders[0]
            )
            arrays.append(
                read_idx(_read(path, file, 4 + 4 * len(shape) + math.prod(shape)), str(path), shape)
            )
        images, labels = arrays[::2], arrays[1::2]
        train, test = (Split(x[..., None], y.astype(np.int32)) for x, y in zip(images, labels))
        return train, test


@dataclasses.dataclass(frozen=True)
class Cifar:
    """A data set in the layouts of CIFAR: binary or Python batches, in a folder or in the published archive."""

    binary: str  # the folders' names, which the archives hold as well
    python: str
    archives: tuple[
        File, ...
    ]  # of the binary layout, which is the one downloaded, and of the Python layout
    train: tuple[str, ...]  # the batches' names, without ".bin"
    test: str
    classes: tuple[str, ...]
    label_bytes: int = 1
    key: bytes = b"labels"
    counts: tuple[int, int] = (50_000, 10_000)

    def _batch(self, binary: bool, data: bytes, name: str, count: int) -> Split:
        return (
            read_cifar_binary(data, name, count, self.label_bytes)
            if binary
            else read_cifar_pickle(data, name, count, self.key)
        )

    def _contents(self, data_dir: pathlib.Path):
        """(whether the layout is the binary one, a function of a batch's name that gives its bytes, and where they come from)."""
        names, limit = (
            (*self.train, self.test),
            2 * 3074 * max(self.counts),
        )  # a pickle may be longer than what it holds
        layouts = (
            (True, self.binary, self.archives[0]),
            (False, self.python, self.archives[1]),
        )  # the first is downloaded
        for binary, folder, _ in layouts:
            suffix = ".bin" if binary else ""
            for place in (data_dir / folder, data_dir):
                if any((place / f"{name}{suffix}").is_file() for name in names):
                    missing = [
                        f"{name}{suffix}"
                        for name in names
                        if not (place / f"{name}{suffix}").is_file()
                    ]
                    if missing:
                        raise ValueError(
                            f"{place} lacks {', '.join(missing)}; it has other batches of the same data set"
                        )
                    return (
                        binary,
                        lambda name, place=place, suffix=suffix: _begin(
                            place / f"{name}{suffix}", limit
                        ),
                        str(place),
                    )
        present = [layout for layout in layouts if (data_dir / layout[2].name).is_file()]
        binary, folder, file = (present or layouts)[0]
        path = data_dir / file.name if present else _download(file, data_dir)
        _check_hash(path, file)  # of which it then is known what is in it
        return (
            binary,
            lambda name: self._member(path, f"{folder}/{name}{'.bin' if binary else ''}"),
            str(path),
        )

    def _member(self, archive: pathlib.Path, name: str) -> bytes:
        """One batch, read from within the archive: nothing is unpacked to the disk."""
        with tarfile.open(archive) as file:
            batch = file.extractfile(name)
            assert (
                batch is not None
            )  # of an archive of this hash it is known that this is a file in it
            return batch.read()

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split]:
        binary, content, place = self._contents(data_dir)
        share = self.counts[0] // len(self.train)
        batch = lambda name, count: self._batch(
            binary, content(name), f"{place}/{name}{'.bin' if binary else ''}", count
        )
        train = Split(*map(np.concatenate, zip(*(batch(name, share) for name in self.train))))
        return train, batch(self.test, self.counts[1])


class Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, which need no file: the first 1,437 are for training, the last 360 for the test."""

    classes = DIGITS

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split]:
        import sklearn.datasets

        found = sklearn.datasets.load_digits()
        images = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
        labels = found.target.astype(np.int32)
        return Split(images[:1437], labels[:1437]), Split(images[1437:], labels[1437:])


@dataclasses.dataclass(frozen=True)
class CamVid:
    """CamVid's road scenes (Brostow et al. 2009) in the layout of SegNet's tutorial: folders of images and of masks for each part.

    The masks name eleven classes for each pixel; with `loss="sigmoid"` the labels say which of them appear in a scene instead.
    """

    loss: str
    size: tuple[int, int] = (180, 240)  # height and width; the original's are 360 and 480
    counts: tuple[int, int, int] = (367, 233, 101)  # of training, test and validation images
    # In the order of their numbers; 11 is void, a pixel of none of them.
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
    present: int = 50  # pixels of a class that make it appear in a scene: a thousandth of it

    def _mask(self, path: pathlib.Path) -> np.ndarray:
        with opened(path) as image:
            mask = np.array(image)
        if mask.dtype != np.uint8 or mask.shape != self.size or mask.max() > len(self.classes):
            raise ValueError(
                f"{path} is a mask of {mask.dtype} {list(mask.shape)} up to {mask.max()}; expected uint8 {list(self.size)} up "
                f"to {len(self.classes)}"
            )
        return np.where(mask == len(self.classes), np.uint8(IGNORED), mask)

    def _part(self, folder: pathlib.Path, name: str, count: int) -> Split:
        found = [
            {
                path.stem: path
                for path in sorted((folder / part).glob("*"))
                if path.suffix in (".png", ".jpg")
            }
            for part in (name, f"{name}annot")
        ]
        if found[0].keys() != found[1].keys() or len(found[0]) != count:
            raise ValueError(
                f"{folder} holds {len(found[0])} images in {name} and {len(found[1])} masks in {name}annot; expected {count} "
                "of either, of the same names (CamVid is not downloaded: put it there by hand)"
            )
        images = [read_image(path) for path in found[0].values()]
        for path, image in zip(found[0].values(), images):
            if image.shape[:2] != self.size:
                raise ValueError(
                    f"{path} is {image.shape[0]}x{image.shape[1]}; expected {self.size[0]}x{self.size[1]}"
                )
        masks = np.stack([self._mask(path) for path in found[1].values()])
        if self.loss == "pixelwise":
            return Split(np.stack(images), masks)
        pixels = np.stack([(masks == number).sum((1, 2)) for number in range(len(self.classes))], 1)
        return Split(np.stack(images), (pixels >= self.present).astype(np.int32))

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split, Split]:
        train, test, validation = (
            self._part(data_dir / "camvid", *part)
            for part in zip(("train", "test", "val"), self.counts)
        )
        return train, test, validation


def _idx_files(urls: tuple[str, ...], hashes: tuple[str, ...]) -> tuple[File, ...]:
    names = [
        f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    return tuple(
        File(name, tuple(url + name for url in urls), md5) for name, md5 in zip(names, hashes)
    )


def _cifar_files(number: int, binary_md5: str, python_md5: str) -> tuple[File, ...]:
    """Krizhevsky's page, www.cs.toronto.edu/~kriz/cifar.html, prints these hashes."""
    names = [f"cifar-{number}-{layout}.tar.gz" for layout in ("binary", "python")]
    return tuple(
        File(name, (f"https://www.cs.toronto.edu/~kriz/{name}",), md5)
        for name, md5 in zip(names, (binary_md5, python_md5))
    )


_CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar
    cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
    kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
    otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew
    skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout
    tulip turtle wardrobe whale willow_tree wolf woman worm"""

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
        "cifar-10-batches-bin",
        "cifar-10-batches-py",
        _cifar_files(10, "c32a1d4ab5d03f1284b67883e8d87530", "c58f30108f718f92721af3b95e74349a"),
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": Cifar(
        "cifar-100-binary",
        "cifar-100-python",
        _cifar_files(100, "03b5dce01913d631647c71ecec9e9cb8", "eb9058c3a382ffc7106e4002c42a8d85"),
        ("train",),
        "test",
        tuple(_CIFAR100.split()),
        label_bytes=2,
        key=b"fine_labels",
    ),
    "camvid": CamVid("pixelwise"),
    "camvid_scenes": CamVid("sigmoid"),
}


def check_name(name: str) -> None:
    """Raises `ValueError` for a name that is not in `DATASETS`."""
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r} is not one of {', '.join(DATASETS)}, tfds:NAME, folder")


def loss_of(name: str) -> str:
    """The loss that a data set's labels are made for: those of `CamVid` say their own, all others are one class of an image."""
    return getattr(DATASETS.get(name), "loss", "cross_entropy")


def hold_out(labels: np.ndarray, count: int) -> np.ndarray:
    """Chooses `count` images, of every class as many as the next -> a mask [n]; always the same ones, so that runs compare."""
    generator = np.random.default_rng(0)
    classes = generator.permutation(np.unique(labels))
    mask = np.zeros(len(labels), bool)
    for rank, label in enumerate(classes):
        share = count // len(classes) + (rank < count % len(classes))
        members = np.flatnonzero(labels == label)
        if share > len(members):
            raise ValueError(
                f"n_validation={count} asks for {share} images of class {label}, which has {len(members)}"
            )
        mask[generator.permutation(members)[:share]] = True
    return mask


def load(name: str, data_dir: str | os.PathLike = "", n_validation: int = 0) -> Dataset:
    """Reads a data set from its original files in `data_dir`, downloading those that are absent.

    `n_validation` training images, balanced over the classes, are held out; a data set with validation images of its own gives all
    of those or none. Raises `ValueError` for an unknown name, for files that are absent and cannot be downloaded, and for files
    that are not as published.
    """
    check_name(name)
    source = DATASETS[name]
    train, test, *own = source.read(pathlib.Path(data_dir or "data"))
    if own:
        if n_validation not in (0, len(own[0].images)):
            raise ValueError(
                f"n_validation={n_validation} is not 0 or {len(own[0].images)}, the validation images that {name} has of its "
                "own"
            )
        return Dataset(train, own[0] if n_validation else None, test, source.classes)
    for part, split in (("training", train), ("test", test)):
        if split.labels.min() < 0 or split.labels.max() >= len(source.classes):
            raise ValueError(
                f"the {part} labels of {name} in data_dir={data_dir!r} reach from {split.labels.min()} to "
                f"{split.labels.max()}; expected 0 to {len(source.classes) - 1}"
            )
    if not 0 <= n_validation < len(train.labels):
        raise ValueError(
            f"n_validation={n_validation} is not between 0 and {len(train.labels) - 1}, the training images but one"
        )
    if not n_validation:
        return Dataset(train, None, test, source.classes)
    mask = hold_out(train.labels, n_validation)
    return Dataset(
        Split(train.images[~mask], train.labels[~mask]),
        Split(train.images[mask], train.labels[mask]),
        test,
        source.classes,
    )


def normalization(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation of each channel of uint8 images [n, height, width, channels], in units of 0 to 1."""
    levels = np.arange(256) / 255
    moments = []
    for channel in range(images.shape[-1]):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean = share @ levels
        moments.append((mean, np.sqrt(share @ np.square(levels - mean))))
    mean, std = np.transpose(moments)
    return mean.astype(np.float32), np.maximum(std, 1e-6).astype(np.float32)
