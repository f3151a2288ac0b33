"""Effective receptive fields, and the least image in which a unit sees no border."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cnnjax import inspect
from cnnjax.models import Network
from cnnjax.runtime.types import AnyArray
from cnnjax.visualize.stages import check_stage, receptive_field, stage_maps

# Luo et al. 2016 (arXiv 1701.04128), section 3: a pixel is in the effective field above
# 1 - 95.45 % of the strongest.
_IN_FIELD = 1 - 0.9545


def frame(model: Network, stage: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[slice, ...]]:
    """Finds the least image whose central unit of a stage sees no border.

    It is never larger than the publication's image; if that is the limit, the unit is the central
    one and sees everything.

    Returns the image's (height, width), the unit's (row, column), and the slices of the image that
    the unit sees. Raises `ValueError` as `receptive_field`.
    """
    field = receptive_field(model, stage)
    # The first unit whose field begins inside the image.
    unit = tuple(-(low // step) for low, step in zip(field.low, field.step))
    seen = field.shifted(unit)
    size = tuple(high + 1 for high in seen.high)
    height, width, _ = model.input_shape
    if size[0] <= height and size[1] <= width:
        return size, unit, tuple(map(slice, seen.low, size))
    ((_, map_shape),) = inspect.receptive_fields(model, (stage,))
    central = tuple(n // 2 for n in map_shape[1:3])
    return (height, width), central, (slice(None), slice(None))


def effective_receptive_field(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
    seed: int = 0,
) -> Float[np.ndarray, "height width"]:
    """Measures how much each pixel moves the central unit of a stage.

    Returns the root mean square of each pixel's gradient over images and colors, relative to the
    strongest pixel. All channels of the unit send signals back at once, with random signs.

    Raises `ValueError` if there is no such stage.

    Source: Luo et al. 2016 (arXiv 1701.04128), section 3.
    """
    check_stage(model, stage)
    key = jax.random.key(seed)
    field = np.asarray(_central_gradients(model, variables, images, key, stage))
    return field / max(field.max(), np.finfo(np.float32).tiny)


@functools.partial(jax.jit, static_argnames=("model", "stage"))
def _central_gradients(model, variables, images, key, stage):
    maps, pull_back = jax.vjp(lambda images: stage_maps(model, variables, images, stage), images)
    signs = jax.random.rademacher(key, (len(maps), maps.shape[3]), maps.dtype)
    row = maps.shape[1] // 2
    column = maps.shape[2] // 2
    (gradient,) = pull_back(jnp.zeros_like(maps).at[:, row, column].set(signs))
    return jnp.sqrt(jnp.square(gradient.astype(jnp.float32)).mean((0, 3)))


def effective_size(field: Float[np.ndarray, "height width"]) -> float:
    """Returns the side, in pixels, of a square with an effective field's area.

    The field has the pixels above 4.55 % of its largest value.
    """
    return float(np.sqrt((field > _IN_FIELD * field.max()).sum()))
