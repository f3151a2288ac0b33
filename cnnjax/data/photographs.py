"""Image files in folders, photographs, and synthetic images.

Images are uint8 [height, width, 3]; batches of crops are uint8 [batch, size, size, 3].
"""

import collections
import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

from cnnjax.runtime import files
from cnnjax.runtime.errors import one_line
from cnnjax.runtime.paths import package_folder
from cnnjax.runtime.progress import log_once

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# The suffixes of image files, in either case, for every reader of folders.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Photographs inside the scikit-image and scikit-learn wheels, which need no download. The last
# three of scikit-image's are textures.
_SKIMAGE = (
    "astronaut",
    "camera",
    "chelsea",
    "clock_motion",
    "coffee",
    "coins",
    "motorcycle_left",
    "rocket",
    "brick",
    "grass",
    "gravel",
)
_SKLEARN = ("china", "flower")
EMBEDDED = (*_SKIMAGE, *_SKLEARN)


class Listing(NamedTuple):
    """The entries of a folder, apart from hidden folders."""

    images: list[pathlib.Path]
    folders: list[pathlib.Path]
    # The other files, counted by kind: ".gif", "without a suffix", "hidden".
    others: collections.Counter[str]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # `is_dir` fails for a link to itself. Treat it as a file, so that the error of opening it
        # names it.
        return False


def list_folder(folder: pathlib.Path) -> Listing:
    """Lists the image files, folders and other files of a folder by name.

    Hidden folders (".git", ".ipynb_checkpoints") are left out; a link counts as what it points to.
    """
    listing = Listing([], [], collections.Counter())
    # `scandir` knows files from folders without asking the file system for each.
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = pathlib.Path(entry.path)
            suffix = path.suffix.lower()
            if _is_folder(entry):
                if not entry.name.startswith("."):
                    listing.folders.append(path)
            elif entry.name.startswith("."):
                # For example, the "._photo.jpg" that macOS puts beside each file.
                listing.others["hidden"] += 1
            elif suffix in SUFFIXES:
                listing.images.append(path)
            else:
                listing.others[suffix or "without a suffix"] += 1
    return listing


def describe_others(others: collections.Counter[str]) -> str:
    """Describes files that are passed over: "12 files passed over: 8 .gif, 4 .txt"."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
    noun = "file" if others.total() == 1 else "files"
    return f"{others.total():,} {noun} passed over: {kinds}"


def describe_passed_over(
    root: pathlib.Path, others: collections.Counter[str], folders: list[pathlib.Path]
) -> str:
    """Describes the files and folders that are passed over; empty if there are none.

    Args:
      root: the folder that was read.
      others: files, counted by kind.
      folders: folders below `root`; the first three are named.
    """
    passed_over = []
    if others:
        passed_over.append(describe_others(others))
    if folders:
        noun = "folder" if len(folders) == 1 else "folders"
        names = [str(path.relative_to(root)) for path in folders[:3]]
        if len(folders) > 3:
            names.append("...")
        passed_over.append(f"{len(folders):,} {noun} passed over: {', '.join(names)}")
    return "; ".join(passed_over)


def _embedded() -> list[pathlib.Path]:
    skimage_data = package_folder("skimage") / "data"
    sklearn_data = package_folder("sklearn") / "datasets" / "images"
    paths = [next(skimage_data.glob(f"{name}.*")) for name in _SKIMAGE]
    return paths + [next(sklearn_data.glob(f"{name}.*")) for name in _SKLEARN]


def _list_below(folder: pathlib.Path) -> Listing:
    """Lists the images and other files of a folder and its subfolders.

    The folders listed are links, which are not followed: they may lead back up.
    """
    top = list_folder(folder)
    listing = Listing(top.images, [], top.others)
    for inner in top.folders:
        if inner.is_symlink():
            listing.folders.append(inner)
            continue
        below = _list_below(inner)
        listing.images.extend(below.images)
        listing.folders.extend(below.folders)
        listing.others.update(below.others)
    return listing


def find_photographs(
    folder: str | os.PathLike = "", argument: str = "photographs"
) -> tuple[list[pathlib.Path], str]:
    """Lists the image files of a folder and its subfolders.

    Args:
      folder: the folder; empty for the photographs included in scikit-image and scikit-learn.
      argument: what errors call `folder`.

    Returns:
      The paths in order, without what is in hidden folders; and a description of the files and
      links to folders that are passed over, empty if there are none.

    Raises:
      ValueError: if the folder does not exist or holds no image.
    """
    if not folder:
        return _embedded(), ""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{argument}={str(folder)!r} is not a folder")
    listing = _list_below(folder)
    passed_over = describe_passed_over(folder, listing.others, listing.folders)
    if listing.folders:
        passed_over += "; links to folders are not followed"
    if not listing.images:
        reason = f" ({passed_over})" if passed_over else ""
        raise ValueError(
            f"{argument}={str(folder)!r} holds no image file; expected {', '.join(SUFFIXES)}"
            f"{reason}"
        )
    return sorted(listing.images), passed_over


def list_photographs(
    folder: str | os.PathLike = "", argument: str = "photographs"
) -> list[pathlib.Path]:
    """Lists photographs like `find_photographs`, and logs what is passed over."""
    paths, passed_over = find_photographs(folder, argument)
    if passed_over:
        log_once(logging.INFO, f"{folder}: {passed_over}")
    return paths


def check_channels(channels: int, subject: str) -> None:
    """Checks that photographs can be read with a network's number of channels.

    Args:
      channels: the channels of the network's input.
      subject: start of the error, such as "resnet18 takes images".

    Raises:
      ValueError: unless there are 1 or 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"{subject} of {channels} channels; photographs have 3, or 1 in gray")


class Damaged(ValueError):
    """An image file that can be read but not decoded as a whole."""


@contextlib.contextmanager
def open_image(file: pathlib.Path | BinaryIO, name: str = "") -> Iterator[PIL.Image.Image]:
    """Opens an image: JPEG, PNG, WebP or BMP, whatever its suffix.

    Any exception in the body of `with` becomes `Damaged`, because Pillow decodes an image there,
    when its pixels are first used. Errors of the system and of memory become a plain `ValueError`.

    Other formats are refused, because Pillow passes some of them to external programs (EPS to
    Ghostscript).

    Args:
      file: the image's path, or a stream of its bytes.
      name: how errors begin; empty for the path.

    Raises:
      Damaged: if it cannot be decoded or has more pixels than Pillow's `MAX_IMAGE_PIXELS`.
      ValueError: if the file cannot be read.
    """
    name = name or str(file)
    try:
        with PIL.Image.open(file, formats=_FORMATS) as image:
            # Up to twice the limit, Pillow only warns of a decompression bomb.
            pixels = image.width * image.height
            limit = PIL.Image.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:
                raise ValueError(f"it has {pixels:,} pixels; at most {limit:,} are accepted")
            yield image
    except Exception as error:
        # Any exception, because a damaged image raises nearly anything.
        reason = one_line(error)
        if isinstance(error, PIL.UnidentifiedImageError):
            # Pillow's own message would name a stream by its place in memory.
            reason = f"cannot identify image file; expected {', '.join(_FORMATS)}"
        if isinstance(error, PIL.Image.DecompressionBombError):
            reason = f"at most {PIL.Image.MAX_IMAGE_PIXELS:,} pixels are accepted"
        is_os_error = isinstance(error, OSError) and error.errno is not None
        if is_os_error or isinstance(error, MemoryError):
            raise ValueError(f"{name} cannot be read: {reason or 'out of memory'}") from error
        raise Damaged(
            f"{name} is not a readable image: {reason or type(error).__name__}"
        ) from error


def image_size(path: pathlib.Path) -> tuple[int, int]:
    """Reads an image's (height, width) from its header.

    Raises:
      ValueError: if it is not a readable image.
    """
    with open_image(path) as image:
        return image.height, image.width


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Converts an image to RGB.

    Pillow itself reduces color images of 16 bits, and gray ones with transparency, to 8 bits when
    it opens a file.

    Raises:
      ValueError: if the pixels of a gray image have more than 8 bits.
    """
    # Pillow's modes "I", "I;16" and "F", which it would clip to 255.
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of more than 8 bits (Pillow's mode {image.mode}); expected 8")
    # Converting an image that is RGB already would copy it.
    if image.mode == "RGB":
        return image
    return image.convert("RGB")


def open_rgb(file: pathlib.Path | BinaryIO, name: str = "") -> PIL.Image.Image:
    """Decodes an image to RGB.

    As in torchvision, transparency is dropped and an orientation in the metadata is not applied.

    Args:
      file: as in `open_image`.
      name: as in `open_image`.

    Raises:
      Damaged: if it cannot be decoded whole, or is gray of more than 8 bits.
      ValueError: if the file cannot be read.
    """
    with open_image(file, name) as image:
        image.load()
        # Pillow drops the transparency of a palette with a warning.
        image.info.pop("transparency", None)
        return to_rgb(image)


def read_image(path: pathlib.Path) -> np.ndarray:
    """Reads an image file as uint8 [height, width, 3].

    Raises:
      ValueError: as `open_rgb`.
    """
    return np.asarray(open_rgb(path))


def split(
    paths: list[pathlib.Path], shares: tuple[int, ...], seed: int
) -> list[list[pathlib.Path]]:
    """Divides photographs at random into disjoint parts.

    Args:
      paths: the photographs.
      shares: the parts' sizes in proportion; each part gets at least one photograph.
      seed: random seed of the order.

    Raises:
      ValueError: if there are fewer photographs than parts.
    """
    if len(paths) < len(shares):
        raise ValueError(
            f"photographs: {len(paths)} files; expected at least {len(shares)}, one for each of "
            "the disjoint parts"
        )
    order = np.random.default_rng(seed).permutation(len(paths))
    ends = np.round(np.cumsum(shares) / sum(shares) * len(paths)).astype(int)
    last = 0
    for index in range(len(ends)):
        # At least one photograph for this part, and for each part after it.
        earliest = last + 1
        parts_after = len(ends) - index - 1
        latest = len(paths) - parts_after
        ends[index] = np.clip(ends[index], earliest, latest)
        last = ends[index]
    parts = []
    for part in np.split(order, ends[:-1]):
        parts.append([paths[index] for index in sorted(part)])
    return parts


def choose(paths: Sequence, count: int, seed: int) -> list:
    """Chooses photographs at random, if there are more than are needed.

    With one seed, a smaller choice is the start of a larger one, unless the larger one is the whole
    list.

    Args:
      paths: the photographs, or their numbers.
      count: how many are needed.
      seed: random seed of the choice.

    Returns:
      `count` photographs in random order; all of them, in their own order, if there are no more.
    """
    if count >= len(paths):
        return list(paths)
    # The 1 gives this choice a random stream of its own.
    order = np.random.default_rng([seed, 1]).permutation(len(paths))
    return [paths[index] for index in order[:count]]


def shuffle(paths: Sequence, count: int, seed: int) -> list:
    """Returns at most `count` photographs in a seed's random order, even if it takes all."""
    order = np.random.default_rng(seed).permutation(len(paths))
    return [paths[index] for index in order[:count]]


def is_random_choice(parts: list[list[pathlib.Path]], counts: tuple[int, ...]) -> bool:
    """Tells whether `choose` is random for a part, which has more photographs than are needed."""
    return any(count < len(part) for part, count in zip(parts, counts, strict=True))


def describe_files(folder: str | os.PathLike = "") -> str:
    """Describes the files that `find_photographs` lists.

    Returns, in words, their number and a digest of their names and sizes.
    """
    paths, _ = find_photographs(folder)
    sizes = {}
    for path in paths:
        name = str(path.relative_to(folder)) if folder else path.name
        sizes[name] = path.stat().st_size
    return f"{len(paths)} file(s), digest {files.digest(sizes)}"


def are_exchangeable(path: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Tells whether two paths to the same files give the same results."""
    # photographs="" stands for the packages' photographs in a fixed order. The same files in a
    # folder are sorted by name and give other crops, so the two are not exchanged.
    return bool(path) and bool(other)


def check_sizes(paths: list[pathlib.Path], size: int, limit: str) -> None:
    """Checks by their headers that photographs are large enough for crops.

    Args:
      paths: the photographs.
      size: the crops' side in pixels.
      limit: how the error names the size, such as "image_size=224".

    Raises:
      ValueError: if one is smaller than `size` or cannot be read.
    """
    for path in paths:
        height, width = image_size(path)
        if min(height, width) < size:
            raise ValueError(f"photographs: {path} is {height}x{width}, smaller than {limit}")


def random_crops(paths: list[pathlib.Path], count: int, size: int, seed: int) -> np.ndarray:
    """Cuts random squares from photographs, taken in turn.

    If there are more photographs than crops, they are chosen at random.

    Args:
      paths: the photographs.
      count: how many crops.
      size: their side in pixels.
      seed: random seed of their places, and of the choice.

    Returns:
      uint8 [count, size, size, 3].

    Raises:
      ValueError: if there is no photograph, or if one is smaller than `size` or cannot be read.
    """
    if not paths:
        raise ValueError(f"paths=[]: {count} crops need at least one photograph")
    paths = choose(paths, count, seed)
    rng = np.random.default_rng(seed)
    squares = np.empty((count, size, size, 3), np.uint8)
    for first, path in enumerate(paths):
        image = read_image(path)
        height, width = image.shape[:2]
        if min(height, width) < size:
            raise ValueError(f"{path} is {height}x{width}, smaller than size={size}")
        for index in range(first, count, len(paths)):
            top = rng.integers(0, height - size + 1)
            left = rng.integers(0, width - size + 1)
            squares[index] = image[top : top + size, left : left + size]
    return squares


def shuffle_pixels(images: np.ndarray, seed: int) -> np.ndarray:
    """Permutes the pixels of each image, all channels of a pixel together."""
    rng = np.random.default_rng(seed)
    pixels = [rng.permutation(image.reshape(-1, 3)).reshape(image.shape) for image in images]
    return np.stack(pixels)


def fit(path: pathlib.Path, height: int, width: int) -> np.ndarray:
    """Resizes a photograph to cover a shape and crops its center.

    Returns:
      uint8 [height, width, 3].

    Raises:
      ValueError: as `open_rgb`.
    """
    size = (width, height)
    return np.asarray(PIL.ImageOps.fit(open_rgb(path), size, PIL.Image.Resampling.BICUBIC))


def fit_squares(paths: Sequence[pathlib.Path], side: int) -> np.ndarray:
    """Resizes photographs to cover a square and crops their centers.

    Args:
      paths: the photographs.
      side: the squares' side in pixels.

    Returns:
      uint8 [n, side, side, 3].

    Raises:
      ValueError: as `open_rgb`.
    """
    squares = np.empty((len(paths), side, side, 3), np.uint8)
    for index, path in enumerate(paths):
        squares[index] = fit(path, side, side)
    return squares


def synthetic(
    kind: str,
    count: int,
    size: int,
    seed: int | Sequence[int],
    mean: float = 127.5,
    deviation: float = 64.0,
) -> np.ndarray:
    """Makes images without content.

    Args:
      kind: "black" (0), "white" (255), or "noise" (Gaussian, clipped).
      count: how many images.
      size: their side in pixels.
      seed: random seed of the noise.
      mean: mean of the noise before it is clipped to 0 to 255.
      deviation: standard deviation of the noise before it is clipped.

    Returns:
      uint8 [count, size, size, 3].

    Raises:
      ValueError: if `kind` is none of these.
    """
    shape = (count, size, size, 3)
    if kind == "black":
        return np.zeros(shape, np.uint8)
    if kind == "white":
        return np.full(shape, 255, np.uint8)
    if kind == "noise":
        noise = np.random.default_rng(seed).normal(mean, deviation, shape)
        return np.clip(np.round(noise), 0, 255).astype(np.uint8)
    raise ValueError(f"kind={kind!r} is not one of black, white, noise")
