"""Grad-CAM: the positions of a stage that speak for a class."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cnnjax.models import Network
from cnnjax.nn.geometry import widen
from cnnjax.runtime.types import AnyArray
from cnnjax.visualize.stages import check_classes, check_stage, class_logits, stage_maps


def grad_cam(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
    classes: int | Sequence[int] | Int[AnyArray, " batch"],
) -> Float[Array, "batch rows columns"]:
    """Weights a stage's maps by the mean gradients of the class's logit.

    Returns the weighted sum of the maps over channels, in float32 or more, with negative values set
    to 0.

    Args:
      model: the network.
      variables: its variables.
      images: as the network takes them.
      stage: name of the stage.
      classes: one for all images, or one for each.

    Raises `ValueError` if the stage or a class is unknown or the network labels pixels.

    Source: Selvaraju et al. 2017 (arXiv 1610.02391), equations 1 and 2.
    """
    check_stage(model, stage)
    check_classes(model, classes)
    chosen = jnp.broadcast_to(jnp.asarray(classes), len(images))
    return _grad_cam(model, variables, images, stage, chosen)


@functools.partial(jax.jit, static_argnames=("model", "stage"))
def _grad_cam(model, variables, images, stage, classes):
    maps = stage_maps(model, variables, images, stage)

    def evidence(maps):
        logits = class_logits(model, variables, images, replace={stage: lambda _: maps})
        return jnp.take_along_axis(logits, classes[:, None], 1).sum()

    importance = widen(jax.grad(evidence)(maps)).mean((1, 2), keepdims=True)
    return jnp.maximum((importance * widen(maps)).sum(3), 0)
