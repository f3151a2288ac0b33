"""An image in one of the cells of a larger canvas.

Source: Islam et al. 2021 (arXiv 2101.12322).
"""

import numpy as np
from jaxtyping import Integer, UInt8

from cnnjax.data import arrays, augment

GRID = 3  # cells along a side
SIDE = 32  # pixels of an image's side
# Tasks on a canvas, with their number of classes.
TASKS = {"location": GRID**2, "object": 10}
# The normalization takes the color "mean" to 0, the value of zero padding, up to rounding.
CANVASES = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "mean": tuple(round(255 * value) for value in augment.IMAGENET[0]),
}


def place(
    images: UInt8[np.ndarray, "n 32 32 3"],
    cells: Integer[np.ndarray, " n"],
    canvas: str = "black",
) -> UInt8[np.ndarray, "n 96 96 3"]:
    """Places images in their cells, which are counted from 0 row by row."""
    out = np.empty((len(images), GRID, SIDE, GRID, SIDE, 3), np.uint8)
    out[:] = np.array(CANVASES[canvas], np.uint8)
    out[np.arange(len(images)), cells // GRID, :, cells % GRID] = images
    return out.reshape(len(images), GRID * SIDE, GRID * SIDE, 3)


def draw(
    split: arrays.Split, count: int, seed: int, canvas: str = "black"
) -> tuple[UInt8[np.ndarray, "n 96 96 3"], dict[str, np.ndarray]]:
    """Places random images of a split in random cells of a canvas.

    Returns the canvases and the labels of each task.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(split.labels))[:count]
    cells = generator.integers(0, GRID**2, count).astype(np.int32)
    labels = {"location": cells, "object": split.labels[chosen]}
    return place(split.images[chosen], cells, canvas), labels
