"""Small data sets in their original files.

CIFAR-10 and -100, MNIST, Fashion-MNIST, CamVid, scikit-learn's digits.
"""

import dataclasses
import functools
import gzip
import math
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from cnnjax.data import published
from cnnjax.data.cifar_pickle import read_cifar_pickle
from cnnjax.data.photographs import list_folder, open_image, read_image
from cnnjax.data.published import File, read_cifar_binary
from cnnjax.data.splits import IGNORED, Split, class_names
from cnnjax.runtime.errors import one_line
from cnnjax.runtime.paths import package_folder

_DIGITS = tuple("0123456789")


class Source(Protocol):
    """A data set in its original files, and the loss that its labels are for."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def loss(self) -> str: ...

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
      size: height and width of an image.
    """

    folders: tuple[str, ...]
    files: tuple[File, ...]
    classes: tuple[str, ...]
    counts: tuple[int, int] = (60_000, 10_000)
    size: tuple[int, int] = (28, 28)
    loss = "cross_entropy"

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
        return published.download(file, data_dir / self.folders[0])

    def _array(self, data_dir: pathlib.Path, file: File, shape: tuple[int, ...]) -> np.ndarray:
        path = self._find(data_dir, file)
        header_bytes = 4 + 4 * len(shape)
        content = published.read(path, file, header_bytes + math.prod(shape))
        return published.read_idx(content, str(path), shape)

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split]:
        parts = []
        for number, count in enumerate(self.counts):
            image_file, label_file = self.files[2 * number : 2 * number + 2]
            images = self._array(data_dir, image_file, (count, *self.size))
            labels = self._array(data_dir, label_file, (count,))
            parts.append(Split(images[..., None], labels.astype(np.int32)))
        train, test = parts
        return train, test


class CifarLayout(NamedTuple):
    """One of the layouts in which CIFAR's batches are published.

    Attributes:
      folder: the folder's name, also within the archive.
      suffix: the ending of the batches' names.
      archive: the published archive.
      read: reads a batch from its bytes, its name for errors, and its number of images.
    """

    folder: str
    suffix: str
    archive: File
    read: Callable[[bytes, str, int], Split]


@dataclasses.dataclass(frozen=True)
class Cifar:
    """A data set in the layouts of CIFAR, in a folder or in the published archive.

    Attributes:
      layouts: the binary layout, which is downloaded if there is none, and the Python layout.
      train: the training batches' names, without a suffix.
      test: the test batch's name.
      classes: the classes' names.
      counts: the number of training and test images.
    """

    layouts: tuple[CifarLayout, CifarLayout]
    train: tuple[str, ...]
    test: str
    classes: tuple[str, ...]
    counts: tuple[int, int] = (50_000, 10_000)
    loss = "cross_entropy"

    def _file_names(self, layout: CifarLayout) -> list[str]:
        """Lists the files of the training batches, and last that of the test batch."""
        return [f"{name}{layout.suffix}" for name in (*self.train, self.test)]

    def _find_folder(self, data_dir: pathlib.Path) -> tuple[CifarLayout, pathlib.Path] | None:
        """Finds the batches' layout and folder; returns None if there are none.

        Raises:
          ValueError: if some of the batches are missing.
        """
        for layout in self.layouts:
            names = self._file_names(layout)
            for place in (data_dir / layout.folder, data_dir):
                missing = [name for name in names if not (place / name).is_file()]
                if not missing:
                    return layout, place
                if len(missing) < len(names):
                    raise ValueError(
                        f"{place} lacks {', '.join(missing)}; it has other batches of the same "
                        "data set"
                    )
        return None

    def _find_archive(self, data_dir: pathlib.Path) -> tuple[CifarLayout, pathlib.Path]:
        """Finds an archive and its layout, or downloads the one of the binary layout."""
        for layout in self.layouts:
            path = data_dir / layout.archive.name
            if path.is_file():
                break
        else:
            layout, _ = self.layouts
            path = published.download(layout.archive, data_dir)
        # An archive with this hash holds all batches.
        published.check_hash(path, layout.archive)
        return layout, path

    def _contents(self, layout: CifarLayout, place: pathlib.Path) -> Iterator[tuple[str, bytes]]:
        """Yields the names and contents of the files in a folder or an archive, in any order."""
        names = self._file_names(layout)
        if place.is_dir():
            for name in names:
                # A pickle may be longer than its arrays.
                yield name, published.read_start(place / name, 2 * 3074 * max(self.counts))
            return
        paths = {f"{layout.folder}/{name}": name for name in names}
        # The archive is read as a stream. To go back, it would be decompressed from its start.
        with tarfile.open(place, "r|gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name in paths else None
                if file is not None:
                    yield paths[member.name], file.read()

    def read(self, data_dir: pathlib.Path) -> tuple[Split, Split]:
        layout, place = self._find_folder(data_dir) or self._find_archive(data_dir)
        *train_names, test_name = self._file_names(layout)
        counts = dict.fromkeys(train_names, self.counts[0] // len(train_names))
        counts[test_name] = self.counts[1]
        batches = {}
        for name, data in self._contents(layout, place):
            batches[name] = layout.read(data, f"{place}/{name}", counts[name])
        train = Split(
            np.concatenate([batches[name].images for name in train_names]),
            np.concatenate([batches[name].labels for name in train_names]),
        )
        return train, batches[test_name]


class Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, which need no file.

    The first 1,437 are for training and the last 360 for the test.
    """

    classes = _DIGITS
    loss = "cross_entropy"

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
        with open_image(path) as image:
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
    loss = "cross_entropy"

    @functools.cached_property
    def _members(self) -> dict[str, np.ndarray]:
        names = ["train_images", "train_labels", "test_images", "test_labels", "classes"]
        subject = f"dataset={str(self.path)!r}"
        try:
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                # Only files of data sets with validation images have these.
                if "validation_images" in file:
                    names += ["validation_images", "validation_labels"]
                return {name: file[name] for name in names}
        except MemoryError:
            raise
        except Exception as error:
            # A damaged file can raise any exception; only those of the system have a number.
            if isinstance(error, OSError) and error.errno is not None:
                raise ValueError(f"{subject} cannot be read: {error.strerror}") from error
            reason = one_line(error)
            message = f"{subject} is not a file that cnnjax.data.arrays.save wrote"
            # NumPy takes other files for pickles, and advises to unpickle them.
            if "allow_pickle" not in reason:
                message += f": {type(error).__name__}: {reason}"
            raise ValueError(message) from error

    @property
    def classes(self) -> tuple[str, ...]:
        names = self._members["classes"]
        check_classes(names, f"dataset={str(self.path)!r}")
        # Numbers become text here, once for all that shows or compares classes.
        return class_names(names.tolist())

    def read(self, data_dir: pathlib.Path) -> tuple[Split, ...]:
        members = self._members
        parts = [
            Split(members["train_images"], members["train_labels"]),
            Split(members["test_images"], members["test_labels"]),
        ]
        if "validation_images" in members:
            parts.append(Split(members["validation_images"], members["validation_labels"]))
        return tuple(parts)


def check_classes(names: np.ndarray, subject: str) -> None:
    """Checks that the names of classes can be recorded as JSON.

    Args:
      names: the names.
      subject: how the error begins.

    Raises:
      ValueError: unless they are a list of text or finite numbers.
    """
    values = names.tolist()
    is_list = names.ndim == 1
    if not (is_list and all(_is_class_name(value) for value in values)):
        raise ValueError(
            f"{subject} has classes={repr(values)[:100]}; expected a one-dimensional array of "
            "text or finite numbers"
        )


def _is_class_name(value: object) -> bool:
    """Tells whether a value is text or a finite number."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (str, int))


def _by_stem(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Maps the names of image files without suffixes to their paths."""
    if not folder.is_dir():
        return {}
    return {path.stem: path for path in list_folder(folder).images}


_IDX_NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _idx_files(urls: tuple[str, ...], hashes: tuple[str, ...]) -> tuple[File, ...]:
    files = []
    for name, md5 in zip(_IDX_NAMES, hashes):
        addresses = tuple(url + name for url in urls)
        files.append(File(name, addresses, md5))
    return tuple(files)


def _cifar_file(name: str, md5: str) -> File:
    """Describes an archive of CIFAR; www.cs.toronto.edu/~kriz/cifar.html prints the hashes."""
    return File(name, (f"https://www.cs.toronto.edu/~kriz/{name}",), md5)


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
        folders=("mnist", "MNIST/raw"),
        files=_idx_files(
            urls=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
            hashes=(
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
        ),
        classes=_DIGITS,
    ),
    "fashion_mnist": Idx(
        folders=("fashion_mnist", "FashionMNIST/raw"),
        files=_idx_files(
            urls=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
            hashes=(
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
        ),
        classes=(
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
        layouts=(
            CifarLayout(
                folder="cifar-10-batches-bin",
                suffix=".bin",
                archive=_cifar_file("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
                read=read_cifar_binary,
            ),
            CifarLayout(
                folder="cifar-10-batches-py",
                suffix="",
                archive=_cifar_file("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
                read=read_cifar_pickle,
            ),
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
        layouts=(
            CifarLayout(
                folder="cifar-100-binary",
                suffix=".bin",
                archive=_cifar_file("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
                read=functools.partial(read_cifar_binary, label_bytes=2),
            ),
            CifarLayout(
                folder="cifar-100-python",
                suffix="",
                archive=_cifar_file("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
                read=functools.partial(read_cifar_pickle, key=b"fine_labels"),
            ),
        ),
        train=("train",),
        test="test",
        classes=tuple(_CIFAR100.split()),
    ),
    "camvid": CamVid("pixelwise"),
    "camvid_scenes": CamVid("sigmoid"),
}
