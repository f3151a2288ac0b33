"""Square crops of images, for training and evaluation."""

import numpy as np
import PIL.Image

# The most pixels that an image is resized to as a whole: 67 MB in Pillow.
_MOST_RESIZED = 2**24


def resized_window(
    image: PIL.Image.Image,
    size: tuple[int, int],
    place: tuple[int, int],
    window: int,
) -> PIL.Image.Image:
    """Resizes an image bilinearly and cuts a square window out of it, in bounded memory.

    Args:
      image: any image.
      size: width and height of the resized image.
      place: left and top of the window in the resized image.
      window: the window's side in pixels.
    """
    bilinear = PIL.Image.Resampling.BILINEAR
    width, height = size
    left, top = place
    if width * height <= _MOST_RESIZED:
        resized = image.resize(size, bilinear)
        return resized.crop((left, top, left + window, top + window))
    # A strip of 20,000 x 1 pixels would become 5,120,000 x 256, so only the window is resized. This
    # is not done for all images, since Pillow keeps the box in single precision: some pixels differ
    # by one level from those of the whole resized image.
    across = image.width / width
    down = image.height / height
    right = min((left + window) * across, image.width)
    bottom = min((top + window) * down, image.height)
    return image.resize((window, window), bilinear, box=(left * across, top * down, right, bottom))


def area_crop(image: PIL.Image.Image, size: int, generator: np.random.Generator) -> PIL.Image.Image:
    """Crops 8 to 100 % of the area at an aspect of 3/4 to 4/3, resized to a square.

    Szegedy et al. 2014; torchvision's RandomResizedCrop.
    """
    # As in torchvision: if none of ten random crops fits into the image, take the largest centered
    # one whose aspect is allowed.
    width, height = image.size
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1.0)
        aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w = round(float(np.sqrt(area * aspect)))
        h = round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(0, width - w + 1))
            top = int(generator.integers(0, height - h + 1))
            break
    else:
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
        left = (width - w) // 2
        top = (height - h) // 2
    return image.resize(
        (size, size), PIL.Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
    )


def resized_crop(
    image: PIL.Image.Image, size: int, shorter: int, generator: np.random.Generator | None
) -> PIL.Image.Image:
    """Resizes an image's shorter side to `shorter` and crops a square.

    Args:
      image: any image.
      size: the crop's side in pixels.
      shorter: the image's shorter side before the crop.
      generator: draws the place of the crop; None for the center.
    """
    scale = shorter / min(image.size)
    width, height = (max(size, round(n * scale)) for n in image.size)
    if generator is None:
        left = (width - size) // 2
        top = (height - size) // 2
    else:
        left, top = generator.integers(0, (width - size + 1, height - size + 1)).tolist()
    return resized_window(image, size=(width, height), place=(left, top), window=size)


def shorter_side(size: int, resize: int) -> int:
    """Returns `resize`, or for 0 the customary 256/224 of a crop's side."""
    return resize or round(size * 256 / 224)


def center(image: PIL.Image.Image, size: int, resize: int) -> PIL.Image.Image:
    """Resizes an image and crops its center, for evaluation.

    Args:
      image: any image.
      size: the crop's side in pixels.
      resize: as in `shorter_side`.
    """
    return resized_crop(image, size, shorter_side(size, resize), None)


def check_resize(resize: int, image_size: int) -> None:
    """Raises `ValueError` if images would be resized to less than the crop."""
    if resize and resize < image_size:
        raise ValueError(f"resize={resize} is not 0 or at least image_size={image_size}")
