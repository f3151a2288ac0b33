"""Augmentation inside jit: each image from a key of its own, so that how a batch is divided over devices changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, Shaped, UInt8

from cnnjax.runtime.types import AnyArray

# Of ImageNet's RGB values between 0 and 1, as fb.resnet.torch and Caffe's AlexNet use them (Krizhevsky et al. 2012, section 4.1).
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

FILLS = {"zeros": "constant", "reflect": "reflect"}
IGNORED = 255  # the label of a pixel that counts for nothing
# Mean and standard deviation of the ImageNet training set, RGB in [0, 1]: what torchvision's weights expect.
IMAGENET = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)


def normalize(
    images: Shaped[AnyArray, "batch height width channels"],
    mean: Float[AnyArray, "*#moments"],
    std: Float[AnyArray, "*#moments"],
) -> Float32[AnyArray, "*members batch height width channels"]:
    """Images of 0 to 255 -> (images / 255 - mean) / std; moments [members, 1, 1, 1, channels] give one result for each."""
    return (images.astype(jnp.float32) / 255 - mean) / std


def _crop(key, image, padding, fill, value=0):
    height, width, channels = image.shape
    options = {"constant_values": value} if fill == "zeros" else {}
    padded = jnp.pad(
        image, ((padding, padding), (padding, padding), (0, 0)), mode=FILLS[fill], **options
    )
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), (height, width, channels))


def _cutout(key, image, size):
    """Blackens a square whose center is anywhere in the image (DeVries and Taylor 2017)."""
    center = jax.random.randint(key, (2,), 0, jnp.asarray(image.shape[:2]))
    away = [jnp.arange(n) - c for n, c in zip(image.shape[:2], center)]
    inside = [(a >= -(size // 2)) & (a < size - size // 2) for a in away]
    return jnp.where((inside[0][:, None] & inside[1])[:, :, None], 0, image)


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
    """Augments images of 0 to 255, each with its key.

    `flip` mirrors one image in two, by chance, left to right; `crop` shifts by up to that many pixels in both directions, over a border
    of `fill` ("zeros", which is black, or "reflect"); `colour` adds ImageNet's principal components of color, each times a
    normal number of that standard deviation (0.1 in Krizhevsky et al. 2012); `cutout` blackens a square of that side.
    """

    def one(key, image):
        keys = jax.random.split(key, 4)
        if flip:
            image = jnp.where(jax.random.bernoulli(keys[0]), image[:, ::-1], image)
        if crop:
            image = _crop(keys[1], image, crop, fill)
        image = image.astype(jnp.float32)
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
    """Mirrors and shifts the masks of images as `augment` does the images with these keys and arguments.

    What comes in over a border of zeros is ignored; a pixel that is blackened or of another color is of the same class.
    """

    def one(key, mask):
        keys = jax.random.split(key, 4)
        if flip:
            mask = jnp.where(jax.random.bernoulli(keys[0]), mask[:, ::-1], mask)
        return _crop(keys[1], mask[:, :, None], crop, fill, IGNORED)[:, :, 0] if crop else mask

    return jax.vmap(one)(keys, masks)


def views(
    images: Float[Array, "batch height width channels"], count: int, size: int
) -> list[Float[Array, "batch {size} {size} channels"]]:
    """The views of images that a test averages over.

    1: the center; 2: the center and its mirror image; 10: the corners, the center and their mirror images (Krizhevsky et
    al. 2012, section 4.1).
    """
    height, width = images.shape[1:3]
    bottom, right = height - size, width - size
    middle = (bottom // 2, right // 2)
    places = [middle] if count < 10 else [(0, 0), (0, right), (bottom, 0), (bottom, right), middle]
    crops = [images[:, top : top + size, left : left + size] for top, left in places]
    return crops if count == 1 else crops + [crop[:, :, ::-1] for crop in crops]
