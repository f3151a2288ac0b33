"""Frozen encoders: a network's stages over images, brought to one grid and kept."""

import functools
import hashlib
import pathlib
import zipfile
from collections.abc import Iterator, Sequence

import flax.errors
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from cnnjax.data import augment
from cnnjax.models import Network
from cnnjax.nn import resize
from cnnjax.runtime import workdir
from cnnjax.runtime.types import AnyArray
from cnnjax.weights import variable_shapes

FEATURE_SIZE = 28  # Islam et al. 2020, section 3.2: every stage is resized to 28x28
_BATCH = 8
_MOMENTS = {"imagenet": augment.IMAGENET, "unit": (np.zeros(3, np.float32), np.ones(3, np.float32))}
PIXELS = tuple(_MOMENTS)


def normalize(
    images: Shaped[AnyArray, "batch height width 3"], pixels: str = "imagenet"
) -> Float[AnyArray, "batch height width 3"]:
    """RGB from 0 to 255 -> float32 with ImageNet's mean and standard deviation taken out, or, as "unit", from 0 to 1.

    Black is not 0, the value of zero padding, in the first: a black image can show its border to a network without biases.
    """
    return augment.normalize(images, *_MOMENTS[pixels])


def stage_shapes(model: Network, size: int, last: str | None = None) -> dict[str, tuple[int, ...]]:
    """The shape [batch, height, width, channels] of every stage up to `last` for one image, without computing it.

    Raises `ValueError` if the image is too small for the network under its padding, or of a size that it does not take.
    """
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    try:
        run = lambda v, x: model.apply(
            v, x, method="stages", last=last, rngs={"padding": jax.random.key(0)}
        )
        stages = jax.eval_shape(run, variable_shapes(model), image)
    except flax.errors.ScopeParamShapeError as error:
        takes = "x".join(map(str, model.input_shape))
        raise ValueError(
            f"image_size={size}: {type(model).__name__} takes images of {takes} alone, not {size}x{size}x3"
        ) from error
    return {name: stage.shape for name, stage in stages.items()}


def reachable_stages(model: Network, size: int) -> list[str]:
    """The stages of which something is left of an image of `size`: without padding, the last ones may vanish."""
    names = list(stage_shapes(model.clone(padding="zeros"), size))
    while names:
        try:
            return list(stage_shapes(model, size, names[-1]))
        except ValueError:
            names.pop()
    return names


def image_features(
    images: UInt8[np.ndarray, "n height width 3"],
    pixels: str = "imagenet",
    coordinates: bool = False,
) -> Float[np.ndarray, "n 28 28 channels"]:
    """The controls without an encoder: the images themselves on the grid, with channels that count columns and rows if asked."""
    found = np.asarray(jax.jit(lambda x: resize(normalize(x, pixels), FEATURE_SIZE))(images))
    grid = np.broadcast_to(
        np.indices(found.shape[1:3], np.float32).transpose(1, 2, 0)[..., ::-1],
        (*found.shape[:3], 2),
    )
    return np.concatenate([found, grid], -1) if coordinates else found


def in_batches(
    images: Shaped[np.ndarray, "n ..."], size: int
) -> Iterator[tuple[int, int, Shaped[np.ndarray, "batch ..."]]]:
    """Yields (start, count, batch): `count` images from `start` on, the last batch filled up so that all compile as one shape."""
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        yield (
            start,
            len(batch),
            np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), 0)]),
        )


@functools.partial(jax.jit, static_argnames=("model", "stages", "pixels"))
def _joined_stages(model, variables, images, stages, pixels, key):
    maps = model.apply(
        variables,
        normalize(images, pixels),
        method="stages",
        last=stages[-1],
        rngs={"padding": key},
    )
    return jnp.concatenate(
        [resize(maps[stage].astype(jnp.float32), FEATURE_SIZE) for stage in stages], -1
    )


def _content(model, variables, images, stage, pixels) -> str:
    """The hash of what makes a stage's features: the compiler's input, the weights that it reads, and the images."""
    batch = jax.ShapeDtypeStruct((_BATCH, *images.shape[1:]), images.dtype)
    read = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), normalize(x, pixels), method="stages", last=stage),
        batch,
    )
    leaves = flax.traverse_util.flatten_dict(variables)
    leaves = {path: leaves[path] for path in sorted(flax.traverse_util.flatten_dict(read))}
    program = _joined_stages.lower(
        model, flax.traverse_util.unflatten_dict(leaves), batch, (stage,), pixels, jax.random.key(0)
    )
    found = hashlib.sha256(program.as_text().encode())
    for array in (*leaves.values(), images):
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _kept(path: pathlib.Path) -> Float[np.ndarray, "n 28 28 channels"]:
    try:
        with np.load(path) as archive:
            return archive["features"]
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged: remove it, and the same command computes its features anew"
        ) from error


def encode_once(
    folder: pathlib.Path,
    model: Network,
    variables: dict,
    images: UInt8[np.ndarray, "n height width 3"],
    stages: Sequence[str],
    pixels: str = "imagenet",
) -> Float[np.ndarray, "n 28 28 channels"]:
    """`encode`, which a folder remembers stage by stage: what was once computed of the same weights and images is read.

    Raises `ValueError` if a file in it is damaged.
    """
    paths = {
        stage: folder / f"{_content(model, variables, images, stage, pixels)}.npz"
        for stage in stages
    }
    if lacking := [stage for stage in stages if not paths[stage].exists()]:
        channels = [
            shape[3]
            for stage, shape in stage_shapes(model, images.shape[1], lacking[-1]).items()
            if stage in lacking
        ]
        parts = np.split(
            encode(model, variables, images, lacking, pixels), np.cumsum(channels)[:-1], axis=3
        )
        folder.mkdir(parents=True, exist_ok=True)
        for stage, part in zip(lacking, parts):
            workdir.write_arrays(paths[stage], {"features": part}, compress=False)
    return np.concatenate([_kept(path) for path in paths.values()], -1)


def encode(
    model: Network,
    variables: dict,
    images: UInt8[np.ndarray, "n height width 3"],
    stages: Sequence[str],
    pixels: str = "imagenet",
) -> Float[np.ndarray, "n 28 28 channels"]:
    """Runs a frozen encoder once over images -> the named stages, resized and joined.

    `stages` are in the network's order: nothing after the last is computed. The encoder is in evaluation mode; padding='random'
    draws other noise for every image.
    """
    out = np.empty((len(images), FEATURE_SIZE, FEATURE_SIZE, 0), np.float32)
    for start, count, batch in in_batches(images, _BATCH):
        part = np.asarray(
            _joined_stages(model, variables, batch, tuple(stages), pixels, jax.random.key(start))
        )[:count]
        if start == 0:  # now the number of channels is known
            out = np.empty((len(images), *part.shape[1:]), np.float32)
        out[start : start + len(part)] = part
    return out
