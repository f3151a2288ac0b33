"""A network's stages on images: maps, strongest units, first filters."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Float32, Int, Shaped

from cnnjax import inspect, weights
from cnnjax.data import augment
from cnnjax.inspect.fields import STRETCHED
from cnnjax.inspect.trace import apply
from cnnjax.models import Network
from cnnjax.nn.parameters import eval_shape
from cnnjax.runtime import imagenet
from cnnjax.runtime.types import AnyArray

# Mean and standard deviation of each color, in units of 0 to 1.
Moments = tuple[Float[AnyArray, " colors"], Float[AnyArray, " colors"]]


def stage_channels(model: Network) -> dict[str, int]:
    """Counts the channels of each stage that yields maps, in order, without computing them."""
    return {name: shape[3] for name, shape in _stage_shapes(model).items() if len(shape) == 4}


@functools.cache
def _stage_shapes(model):
    """Returns the shapes of all stages, by name and in order."""
    # The fill changes neither names nor channels, and this one needs no large image.
    model = model.clone(padding="zeros")
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    shapes = eval_shape(
        lambda variables, image: apply(model, variables, image, method="stages"),
        weights.variable_shapes(model),
        image,
    )
    return {name: shape.shape for name, shape in shapes.items()}


def check_stage(model: Network, stage: str, channels=()) -> None:
    """Raises `ValueError` if the stage or a channel is unknown, or the stage yields no maps."""
    known = stage_channels(model)
    shapes = _stage_shapes(model)
    if stage in shapes and stage not in known:
        raise ValueError(
            f"stage={stage!r} yields an array of shape {shapes[stage]} for one image; expected a "
            f"stage of maps [batch, height, width, channels]: {', '.join(known) or 'none'}"
        )
    if stage not in known:
        raise ValueError(
            f"stage={stage!r} is not a stage of this network; "
            f"its stages are {', '.join(known) or 'none'}"
        )
    for channel in np.ravel(channels):
        if not 0 <= channel < known[stage]:
            raise ValueError(
                f"channel={channel} is not between 0 and {known[stage] - 1}, "
                f"the channels of stage {stage}"
            )


def check_classes(model: Network, classes) -> None:
    """Raises `ValueError` if a class is unknown."""
    chosen = np.ravel(classes)
    if not ((0 <= chosen) & (chosen < model.num_classes)).all():
        raise ValueError(
            f"classes={chosen.tolist()} are not all between 0 and {model.num_classes - 1}, "
            "the network's classes"
        )


def receptive_field(model: Network, stage: str) -> inspect.Field:
    """Finds the largest part of the image that a position of a stage sees.

    Raises `ValueError` as `cnnjax.inspect.receptive_field`.
    """
    check_stage(model, stage)
    return inspect.receptive_field(model, stage)


def map_grid(model: Network, stage: str) -> tuple[Sequence[float], Sequence[float]]:
    """Finds where the positions of a stage's map lie in an image of the network's size.

    They are the centers of receptive fields. Positions that see the whole image are spread evenly
    over it, and so are those whose place is unknown.

    Returns the row and column of the first position, and the steps down and to the right, in
    pixels. Raises `ValueError` if there is no such stage, or if padding='interpolate' stretches its
    map.
    """
    check_stage(model, stage)
    ((field, map_shape),) = inspect.receptive_fields(model, (stage,))
    if isinstance(field, inspect.Field) or field == STRETCHED:
        field = inspect.located(field, stage)
        first = [(low + high) / 2 for low, high in zip(field.low, field.high)]
        return first, field.step
    steps = [side / count for side, count in zip(model.input_shape[:2], map_shape[1:3])]
    return [(step - 1) / 2 for step in steps], steps


def class_logits(model: Network, variables: dict, images, **options):
    """Runs a network in evaluation mode.

    Raises `ValueError` if the network labels pixels.
    """
    output = apply(model, variables, images, **options)
    if output.ndim > 2:
        raise ValueError(
            f"{type(model).__name__} labels pixels; expected a network that classifies images"
        )
    return output


def stage_maps(model: Network, variables: dict, images, stage: str):
    """Computes the maps of one stage, for use inside compiled functions."""
    return apply(model, variables, images, method="stages", last=stage)[stage]


_compiled_maps = jax.jit(stage_maps, static_argnames=("model", "stage"))
logits = jax.jit(class_logits, static_argnames="model")


def first_filters(
    model: Network, variables: dict
) -> tuple[str, Float[np.ndarray, "height width in filters"]]:
    """Returns the name and the kernels of the convolution that runs first.

    Raises `ValueError` if the network has no convolution, or if its weights lack it.
    """
    names = [
        layer.name for layer in inspect.layers(model.clone(padding="zeros")) if layer.kind == "Conv"
    ]
    if not names:
        raise ValueError("the network has no convolution, and so no filters to show")
    keys = weights.torchvision_keys(weights.variable_shapes(model))
    path = keys[f"{names[0]}.weight"][1:]
    params = flatten_dict(variables["params"])
    if path not in params:
        raise ValueError(f"the weights do not hold {names[0]}, whose filters are to be shown")
    return names[0], np.asarray(params[path])


def activations(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
) -> Float[Array, "batch rows columns units"]:
    """Computes the maps of a stage.

    Raises `ValueError` if there is no such stage.
    """
    check_stage(model, stage)
    return _compiled_maps(model, variables, images, stage)


def peaks(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
) -> tuple[Float32[np.ndarray, "batch units"], Int[np.ndarray, "batch units 2"]]:
    """Finds each channel's largest activation on each image, and its row and column.

    Raises `ValueError` if there is no such stage.
    """
    maps = np.asarray(activations(model, variables, images, stage), np.float32)
    flat = maps.reshape(len(maps), -1, maps.shape[-1])
    places = np.divmod(flat.argmax(1), maps.shape[2])
    return flat.max(1), np.stack(places, -1)


def network_input(
    model: Network,
    images: Shaped[AnyArray, "batch height width 3"],
    moments: Moments = imagenet.MOMENTS,
) -> Float[AnyArray, "batch height width channels"]:
    """Normalizes RGB from 0 to 255 for a network.

    A network of one channel gets the mean of the three.

    Args:
      model: the network.
      images: RGB, [batch, height, width, 3].
      moments: mean and standard deviation; ImageNet's unless given.
    """
    gray = model.input_shape[2] == 1
    # Moments of one channel: it was trained on gray images. With those of three, colors are
    # normalized first and averaged after.
    if gray and len(moments[0]) == 1:
        images = images.astype(jnp.float32).mean(3, keepdims=True)
    x = augment.normalize(images, *moments)
    return x.mean(3, keepdims=True) if gray else x
