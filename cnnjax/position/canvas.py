"""An image in one of the cells of a larger canvas.

Source: Islam et al. 2021 (arXiv 2101.12322).
"""

import numpy as np
from jaxtyping import Integer, UInt8

from cnnjax.data import arrays
from cnnjax.runtime import imagenet

GRID = 3  # cells along a side
SIDE = 32  # pixels of an image's side
# Tasks on a canvas, with their number of classes.
TASKS = {"location": GRID**2, "object": 10}
# The normalization takes the color "mean" to 0, the value of zero padding, up to rounding.
CANVASES = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "mean": tuple(round(255 * value) for value in imagenet.MOMENTS[0]),
}


def place(
    images: UInt8[np.ndarray, "n 32 32 3"],
    cells: Integer[np.ndarray, " n"],
    canvas: str = "black",
) -> UInt8[np.ndarray, "n 96 96 3"]:
    """Places images in their cells, which are counted from 0 row by row.

    Raises `ValueError` if there is no such cell or canvas.
    """
    if canvas not in CANVASES:
        raise ValueError(f"canvas={canvas!r} is not one of {', '.join(CANVASES)}")
    cells = np.asarray(cells)
    outside = cells[(cells < 0) | (cells >= GRID**2)]
    if outside.size:
        raise ValueError(f"cells: {outside[0]} is not the number of a cell, 0 to {GRID**2 - 1}")
    # [image, row of cells, row of pixels, column of cells, column of pixels, color]
    out = np.empty((len(images), GRID, SIDE, GRID, SIDE, 3), np.uint8)
    out[:] = np.array(CANVASES[canvas], np.uint8)
    # The two cell numbers choose one [pixel row, pixel column, color] block per image.
    out[np.arange(len(images)), cells // GRID, :, cells % GRID] = images
    return out.reshape(len(images), GRID * SIDE, GRID * SIDE, 3)


def draw(
    split: arrays.Split, count: int, seed: int, canvas: str = "black"
) -> tuple[UInt8[np.ndarray, "n 96 96 3"], dict[str, np.ndarray]]:
    """Places random images of a split in random cells of a canvas.

    Returns the canvases and the labels of each task. Raises `ValueError` if the split has fewer
    than `count` images, or for an unknown canvas.
    """
    if not 0 <= count <= len(split.labels):
        raise ValueError(f"count={count} is not from 0 to {len(split.labels)}, the split's images")
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(split.labels))[:count]
    cells = generator.integers(0, GRID**2, count).astype(np.int32)
    labels = {"location": cells, "object": split.labels[chosen]}
    return place(split.images[chosen], cells, canvas), labels
