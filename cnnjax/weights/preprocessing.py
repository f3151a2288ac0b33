"""Preparing a photograph for a network with published weights.

As in torchvision's `ImageClassification` transform, the shorter side is resized with antialiasing,
the center is cut out, pixels are scaled to 0 ... 1 and normalized per channel.
"""

import os

import numpy as np
import PIL.Image

from cnnjax.data import photographs
from cnnjax.data.crops import resized_window
from cnnjax.runtime import imagenet
from cnnjax.runtime.paths import expand_user
from cnnjax.weights.records import Record


def resize_and_crop(image: PIL.Image.Image, record: Record) -> np.ndarray:
    """Resizes an image and returns its center, uint8 [crop, crop, 3].

    Raises `ValueError` as `photographs.to_rgb`.
    """
    image = photographs.to_rgb(image)
    width, height = image.size
    short = min(width, height)
    # Rounded down, as torchvision does; Pillow's resizing is antialiased.
    size = (record.resize * width // short, record.resize * height // short)
    # To the nearest pixel, and halves to the even one.
    left = round((size[0] - record.crop) / 2)
    top = round((size[1] - record.crop) / 2)
    return np.asarray(resized_window(image, size=size, place=(left, top), window=record.crop))


def preprocess(image: PIL.Image.Image | str | os.PathLike, record: Record) -> np.ndarray:
    """Prepares a photograph as the weights of `record` expect it.

    Args:
      image: a file's path, or an image of Pillow's in memory.
      record: the weights' record, as `find` returns it.

    Returns float32 [crop, crop, 3], normalized. Raises `ValueError` if `image` is neither, `record`
    is no record, a file cannot be read, or the pixels of a gray image have more than 8 bits.
    """
    if not isinstance(record, Record):
        raise ValueError(
            f"record={record!r} is not a record of weights; cnnjax.weights.find(NAME) returns one"
        )
    if isinstance(image, (str, os.PathLike)):
        image = photographs.open_rgb(expand_user(image))
    if not isinstance(image, PIL.Image.Image):
        raise ValueError(
            f"image={type(image).__name__} is neither a path nor an image of Pillow's; "
            "PIL.Image.fromarray makes one of a uint8 array [height, width, 3]"
        )
    pixels = resize_and_crop(image, record)
    mean, std = imagenet.MOMENTS
    return (pixels / np.float32(255) - mean) / std
