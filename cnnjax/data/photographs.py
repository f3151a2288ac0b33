"""Photographs, from a folder or from the packages that carry some, and the synthetic images that control for them.

Images are uint8 [height, width, 3]; batches of crops are uint8 [batch, size, size, 3].
"""

import contextlib
import os
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
import PIL.Image

warnings.filterwarnings(
    "error", category=PIL.Image.DecompressionBombWarning
)  # else told and then decoded
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Photographs inside the scikit-image and scikit-learn wheels (no download); the last three are of textures.
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


def _embedded() -> list[pathlib.Path]:
    import skimage
    import sklearn

    skimage_data = pathlib.Path(skimage.__file__).parent / "data"
    sklearn_data = pathlib.Path(sklearn.__file__).parent / "datasets" / "images"
    return [
        next(folder.glob(f"{name}.*"))
        for folder, names in ((skimage_data, _SKIMAGE), (sklearn_data, _SKLEARN))
        for name in names
    ]


def list_photographs(folder: str | os.PathLike = "") -> list[pathlib.Path]:
    """The image files of a folder and its subfolders, in order of name; without one, those that scikit-image and scikit-learn carry.

    Raises `ValueError` if the folder does not exist or holds no image.
    """
    if not folder:
        return _embedded()
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"photographs={str(folder)!r} is not a folder")
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file()
    )
    if not found:
        raise ValueError(
            f"photographs={str(folder)!r} holds no image file; expected {', '.join(_SUFFIXES)}"
        )
    return found


class Damaged(ValueError):
    """A file that is there and can be read, and is no image that can be decoded whole."""


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[PIL.Image.Image]:
    """An image file, open; only JPEG, PNG, WebP and BMP, since Pillow would hand others to programs outside (EPS to Ghostscript).

    Raises `Damaged` if it cannot be decoded or has more pixels than Pillow's `MAX_IMAGE_PIXELS`, and `ValueError` if it cannot be read.
    """
    try:
        with PIL.Image.open(path, formats=_FORMATS) as image:
            yield image
    except Exception as error:  # a damaged image raises nearly anything
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{path} cannot be read: {reason or 'out of memory'}") from error
        raise Damaged(
            f"{path} is not a readable image: {reason or type(error).__name__}"
        ) from error


def image_size(path: pathlib.Path) -> tuple[int, int]:
    """(height, width) from the file's header; raises `ValueError` if it is no readable image."""
    with opened(path) as image:
        return image.height, image.width


def read_image(path: pathlib.Path) -> np.ndarray:
    """An image file as uint8 [height, width, 3]; raises `ValueError` if it cannot be decoded whole."""
    with opened(path) as image:
        return np.asarray(image.convert("RGB"))


def split(
    paths: list[pathlib.Path], shares: tuple[int, ...], seed: int
) -> list[list[pathlib.Path]]:
    """Divides photographs at random into disjoint parts in proportion to `shares`, each of at least one.

    Raises `ValueError` if there are fewer photographs than parts.
    """
    if len(paths) < len(shares):
        raise ValueError(
            f"{len(paths)} photographs cannot be divided into {len(shares)} disjoint parts"
        )
    order = np.random.default_rng(seed).permutation(len(paths))
    ends = np.round(np.cumsum(shares) / sum(shares) * len(paths)).astype(int)
    for i in range(len(ends)):  # at least one photograph each, from the left and from the right
        ends[i] = min(max(ends[i], i + 1), len(paths) - len(ends) + i + 1)
    return [[paths[j] for j in sorted(part)] for part in np.split(order, ends[:-1])]


def crops(paths: list[pathlib.Path], count: int, size: int, seed: int) -> np.ndarray:
    """`count` random square crops [count, size, size, 3], the photographs taken in turn.

    Raises `ValueError` if a photograph is smaller than `size` or cannot be read.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((count, size, size, 3), np.uint8)
    for number, path in enumerate(paths[:count]):
        image = read_image(path)
        if min(image.shape[:2]) < size:
            raise ValueError(
                f"{path} is {image.shape[0]}x{image.shape[1]}, smaller than image_size={size}"
            )
        for i in range(number, count, len(paths)):
            top, left = (rng.integers(0, n - size + 1) for n in image.shape[:2])
            out[i] = image[top : top + size, left : left + size]
    return out


def synthetic(kind: str, count: int, size: int, seed: int) -> np.ndarray:
    """Images without content: "black" (0), "white" (255), "noise" (Gaussian about 127.5, standard deviation 64, clipped).

    Raises `ValueError` for another kind.
    """
    shape = (count, size, size, 3)
    if kind == "black":
        return np.zeros(shape, np.uint8)
    if kind == "white":
        return np.full(shape, 255, np.uint8)
    if kind == "noise":
        return np.clip(
            np.round(np.random.default_rng(seed).normal(127.5, 64, shape)), 0, 255
        ).astype(np.uint8)
    raise ValueError(f"data={kind!r} is not one of natural, black, white, noise")
