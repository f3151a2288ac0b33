"""Augmentation inside jit.

Each image has its own key, so results do not depend on how a batch is divided over devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key, Shaped, UInt8

from cnnjax.data.splits import IGNORED
from cnnjax.runtime.types import AnyArray

# The principal components of ImageNet's RGB values between 0 and 1 (Krizhevsky et al. 2012, section
# 4.1), as in fb.resnet.torch and Caffe's AlexNet.
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

FILLS = {"zeros": "constant", "reflect": "reflect"}
# The numbers of views that `views` cuts.
VIEWS = (1, 2, 10)


def normalize(
    images: Shaped[AnyArray, "batch height width channels"],
    mean: Float[AnyArray, "*#moments"],
    std: Float[AnyArray, "*#moments"],
) -> Float32[AnyArray, "*members batch height width channels"]:
    """Computes (images / 255 - mean) / std.

    Args:
      images: values of 0 to 255.
      mean: for each channel, in units of 0 to 1; [members, 1, 1, 1, channels] for several results.
      std: as `mean`.
    """
    return (images.astype(jnp.float32) / 255 - mean) / std


def _move(keys, image, *, flip, crop, fill, value=0):
    """Mirrors an image [height, width, channels] by the first key, and shifts it by the second.

    Pixels that come in over a border of "zeros" are `value`.
    """
    if flip:
        image = jnp.where(jax.random.bernoulli(keys[0]), image[:, ::-1], image)
    if crop:
        border = ((crop, crop), (crop, crop), (0, 0))
        options = {"constant_values": value} if fill == "zeros" else {}
        padded = jnp.pad(image, border, mode=FILLS[fill], **options)
        top, left = jax.random.randint(keys[1], (2,), 0, 2 * crop + 1)
        image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
    return image


def _check_fill(fill):
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r} is not one of {', '.join(FILLS)}")


def _cutout(key, image, size):
    """Blackens a square whose center is anywhere in the image.

    Source: DeVries and Taylor 2017, who fill with the mean: they cut after normalization.
    """
    center = jax.random.randint(key, (2,), 0, jnp.asarray(image.shape[:2]))

    def inside(length, middle):
        away = jnp.arange(length) - middle
        return (away >= -(size // 2)) & (away < size - size // 2)

    rows = inside(image.shape[0], center[0])
    columns = inside(image.shape[1], center[1])
    return jnp.where((rows[:, None] & columns)[:, :, None], 0, image)


def augment(
    keys: Key[Array, " batch"],
    images: Shaped[AnyArray, "batch height width channels"],
    *,
    flip: bool = False,
    crop: int = 0,
    fill: str = "zeros",
    cutout: int = 0,
    colour: float = 0.0,
) -> Float32[Array, "batch height width channels"]:
    """Augments images, each with its key.

    Args:
      keys: one for each image.
      images: values of 0 to 255.
      flip: whether each image is mirrored left to right with probability 1/2.
      crop: the most pixels that an image is shifted by in each direction.
      fill: what comes in over the border: "zeros", which is black, or "reflect".
      cutout: the side of the square that is blackened, in pixels; 0 for none.
      colour: the standard deviation of the normal numbers that multiply ImageNet's principal
        components of color before they are added (0.1 in Krizhevsky et al. 2012); 0 for none.

    Raises:
      ValueError: for another fill.
    """
    _check_fill(fill)

    def one(key, image):
        keys = jax.random.split(key, 4)
        image = _move(keys, image, flip=flip, crop=crop, fill=fill).astype(jnp.float32)
        if colour:
            amounts = colour * jax.random.normal(keys[2], (3,)) * jnp.asarray(_EIGENVALUES)
            image = jnp.clip(image + 255 * jnp.asarray(_EIGENVECTORS) @ amounts, 0, 255)
        if cutout:
            image = _cutout(keys[3], image, cutout)
        return image

    return jax.vmap(one)(keys, images)


def augment_masks(
    keys: Key[Array, " batch"],
    masks: UInt8[AnyArray, "batch height width"],
    *,
    flip: bool = False,
    crop: int = 0,
    fill: str = "zeros",
    **_,
) -> UInt8[Array, "batch height width"]:
    """Mirrors and shifts masks as `augment` does their images.

    Pixels that come in over a border of zeros are `IGNORED`. Cutout and colors leave masks alone.

    Args:
      keys: those of the images.
      masks: a class for each pixel.
      flip: as in `augment`.
      crop: as in `augment`.
      fill: as in `augment`.

    Raises:
      ValueError: for another fill.
    """
    _check_fill(fill)

    def one(key, mask):
        keys = jax.random.split(key, 4)
        moved = _move(keys, mask[..., None], flip=flip, crop=crop, fill=fill, value=IGNORED)
        return moved[..., 0]

    return jax.vmap(one)(keys, masks)


def views(
    images: Float[Array, "batch height width channels"], count: int, size: tuple[int, int]
) -> list[Float[Array, "batch {size[0]} {size[1]} channels"]]:
    """Cuts the views of images over which a test averages.

    Args:
      images: values of any kind.
      count: 1 for the center, 2 for the center and its mirror image, 10 for the corners, the center
        and their mirror images (Krizhevsky et al. 2012, section 4.1).
      size: the views' height and width in pixels.

    Raises:
      ValueError: for another count, or for views larger than the images.
    """
    height, width = size
    if count not in VIEWS:
        raise ValueError(f"count={count!r} is not one of {', '.join(map(str, VIEWS))}")
    if height > images.shape[1] or width > images.shape[2]:
        raise ValueError(
            f"views of {height}x{width} are larger than the images, "
            f"{images.shape[1]}x{images.shape[2]}"
        )
    bottom = images.shape[1] - height
    right = images.shape[2] - width
    places = [(bottom // 2, right // 2)]
    if count == 10:
        places = [(0, 0), (0, right), (bottom, 0), (bottom, right), *places]
    crops = [images[:, top : top + height, left : left + width] for top, left in places]
    if count == 1:
        return crops
    return crops + [crop[:, :, ::-1] for crop in crops]
