"""Occlusion: a network's answers with a part of the image hidden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from cnnjax.models import Network
from cnnjax.runtime.types import AnyArray
from cnnjax.visualize.stages import class_logits

_BATCH = 16


def occlusion(
    model: Network,
    variables: dict,
    image: Float[AnyArray, "height width channels"],
    size: int,
    stride: int,
    value: float = 0.0,
) -> Float[np.ndarray, "rows columns {model.num_classes}"]:
    """Computes the logits for an image with a hidden square, for each of its places.

    The square [i, j] has its upper left corner at row min(i * stride, height - size) and column
    min(j * stride, width - size): the last squares are flush with the border.

    Args:
      model: the network.
      variables: its variables.
      image: as the network takes it, without the batch axis.
      size: side of the square in pixels.
      stride: pixels from one square to the next.
      value: what the square is filled with; 0 is the mean color of a normalized image.

    Raises `ValueError` if the image has a batch axis or is of integers, the square does not fit
    into it, `stride` is not positive, or the network labels pixels.

    Source: Zeiler and Fergus 2014 (arXiv 1311.2901), section 4.2.
    """
    if image.ndim != 3:
        raise ValueError(
            f"an image of shape {image.shape} is not [height, width, channels], without the batch "
            "axis"
        )
    rows, columns = (corners(side, size, stride) for side in image.shape[:2])
    # (row, column) of each square's upper left corner: [squares, 2]
    places = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    # [batches, _BATCH, 2]. The last batch is filled up, so that all are of one shape and compiled
    # once.
    batches = -(-len(places) // _BATCH)
    filled = np.resize(places, (batches * _BATCH, 2)).reshape(batches, _BATCH, 2)
    fill = jnp.asarray(value, image.dtype)
    # Otherwise, every batch would copy them to the device.
    variables = jax.device_put(variables)
    logits = [
        _occluded_logits(model, variables, image, corners=batch, value=fill, size=size)
        for batch in filled
    ]
    return np.concatenate(logits)[: len(places)].reshape(len(rows), len(columns), -1)


def corners(side: int, size: int, stride: int) -> Int[np.ndarray, " positions"]:
    """Returns where squares begin along one side of an image, in pixels.

    Args:
      side: of the image.
      size: of the square.
      stride: from one square to the next. The last step is shorter if it would leave the image.

    Raises `ValueError` if the square does not fit into the image, or `stride` is not positive.
    """
    if not 1 <= size <= side:
        raise ValueError(
            f"size={size} of the square is not between 1 and {side}, the side of the image"
        )
    if stride < 1:
        raise ValueError(f"stride={stride} is not a positive number of pixels")
    steps = -(-(side - size) // stride)
    return np.minimum(np.arange(steps + 1) * stride, side - size)


@functools.partial(jax.jit, static_argnames=("model", "size"))
def _occluded_logits(model, variables, image, *, corners, value, size):
    # Relative to each square's corner: [batch, height] and [batch, width]
    rows = jnp.arange(image.shape[0]) - corners[:, :1]
    columns = jnp.arange(image.shape[1]) - corners[:, 1:]
    hidden_rows = (rows >= 0) & (rows < size)
    hidden_columns = (columns >= 0) & (columns < size)
    # [batch, height, width, 1]
    hidden = hidden_rows[:, :, None, None] & hidden_columns[:, None, :, None]
    return class_logits(model, variables, jnp.where(hidden, value, image))
