"""Drawing: images side by side, signals as colors, heat over photographs."""

import math

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.figure import Figure

from cnnjax.inspect import Field
from cnnjax.runtime.figures import replace_undrawable

# The least height of an image in a mosaic.
_LEAST_PIXELS = 48


def grid(rows: int, columns: int, inches: float = 2.0):
    """Makes a figure and its axes [rows, columns], squares of `inches` without ticks."""
    # Room for a title.
    height = inches * rows + 0.5
    figure = Figure(figsize=(inches * columns, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    return figure, axes


def set_title(axis, text: str, fontsize: float) -> None:
    """Sets a title as plain text, such as the name of a file or a class.

    matplotlib would read formulas between two dollar signs. Characters that the font lacks become
    question marks.
    """
    drawable = replace_undrawable(text)
    axis.set_title(drawable, fontsize=fontsize, parse_math=False)


def signals_to_rgb(
    signals: Float[np.ndarray, "n height width channels"],
) -> Float[np.ndarray, "n height width 3"]:
    """Shows signals of either sign as RGB in [0, 1] about gray.

    Each signal is divided by the 99.5th percentile of its absolute values.
    """
    strong = np.quantile(np.abs(signals), 0.995, (1, 2, 3), keepdims=True)
    colors = np.clip(0.5 + 0.5 * signals / np.maximum(strong, 1e-12), 0, 1)
    return np.broadcast_to(colors, (*signals.shape[:3], 3))


def mosaic(images: Shaped[np.ndarray, "n height width *colors"]) -> Shaped[np.ndarray, "..."]:
    """Joins images into one, in a square of rows and columns with white lines between."""
    # Enlarge small images by whole pixels.
    zoom = math.ceil(_LEAST_PIXELS / images.shape[1])
    images = images.repeat(zoom, 1).repeat(zoom, 2)
    side = int(np.ceil(np.sqrt(len(images))))
    gap = images.shape[1] // 24
    cells = np.ones((side**2, *images.shape[1:]), np.float32)
    cells[: len(images)] = images
    colors = [(0, 0)] * (images.ndim - 3)
    cells = np.pad(cells, [(0, 0), (0, gap), (0, gap), *colors], constant_values=1)
    height, width = cells.shape[1:3]
    # [side, side, height, width] -> one image; the last gap is cut off.
    cells = cells.reshape(side, side, *cells.shape[1:]).swapaxes(1, 2)
    return cells.reshape(side * height, side * width, *images.shape[3:])[:-gap, :-gap]


def patches(
    images: Shaped[np.ndarray, "n height width *colors"],
    places: Int[np.ndarray, "n 2"],
    field: Field,
    blank: float,
) -> Shaped[np.ndarray, "n _ _ *colors"]:
    """Cuts out what the units at `places` see; `blank` fills the rest."""
    height, width = field.size()
    result = []
    for image, place in zip(images, places):
        first_pixel = np.array(field.low) + np.array(field.step) * place
        last_pixel = np.array(field.high) + np.array(field.step) * place
        before = np.maximum(-first_pixel, 0)
        after = np.maximum(last_pixel + 1 - image.shape[:2], 0)
        colors = [(0, 0)] * (image.ndim - 2)
        padded = np.pad(image, [*zip(before, after), *colors], constant_values=blank)
        top, left = first_pixel + before
        result.append(padded[top : top + height, left : left + width])
    return np.stack(result)


def overlay(axis, image: np.ndarray, heat: np.ndarray, first, steps, **limits):
    """Draws a map over an image in gray.

    Args:
      axis: matplotlib's axes.
      image: [height, width, colors], values of 0 to 255.
      heat: the map.
      first: row and column, in pixels, of the center of the map's first position.
      steps: pixels from one position to the next, down and to the right.
      limits: vmin and vmax of the colors.
    """
    axis.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255)
    top, left = (center - step / 2 for center, step in zip(first, steps))
    rows, columns = heat.shape
    extent = (left, left + steps[1] * columns, top + steps[0] * rows, top)
    shown = axis.imshow(
        heat, cmap="jet", alpha=0.5, extent=extent, interpolation="bilinear", **limits
    )
    axis.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    return shown
