"""Frozen encoders: a network's stages over images, resized to one grid and joined."""

import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Float32, Shaped, UInt8

from cnnjax.data import augment
from cnnjax.inspect import check_stages, located, receptive_fields, stage_names
from cnnjax.models import Network, create_model
from cnnjax.nn import linear_interpolation, resize
from cnnjax.nn.parameters import ParameterShapeError, eval_shape
from cnnjax.runtime import files, imagenet
from cnnjax.runtime.paths import expand_user
from cnnjax.runtime.progress import log_once
from cnnjax.runtime.types import AnyArray
from cnnjax.weights import variable_shapes

FEATURE_SIZE = 28  # Islam et al. 2020, section 3.2: every stage is resized to 28x28
_BATCH = 8
# Where stages are sampled: with aligned corners, as the authors do, or all at the same pixels.
GRIDS = ("corners", "registered")
# The mean and standard deviation by which `normalize` standardizes pixels from 0 to 1.
_MOMENTS = {"imagenet": imagenet.MOMENTS, "unit": (np.zeros(3, np.float32), np.ones(3, np.float32))}
PIXELS = tuple(_MOMENTS)


def normalize(
    images: Shaped[AnyArray, "batch height width 3"], pixels: str = "imagenet"
) -> Float[AnyArray, "batch height width 3"]:
    """Converts RGB from 0 to 255 to a network's input, float32.

    With "imagenet", black is not 0, the value of zero padding: a black image can show its border to
    a network without biases.

    Args:
      images: RGB, [batch, height, width, 3].
      pixels: "imagenet" subtracts ImageNet's mean and divides by its standard deviation; "unit"
        scales to 0 to 1.

    Raises `ValueError` for other `pixels`.
    """
    if pixels not in PIXELS:
        raise ValueError(f"pixels={pixels!r} is not one of {', '.join(PIXELS)}")
    return augment.normalize(images, *_MOMENTS[pixels])


def check_images(images: AnyArray) -> None:
    """Raises `ValueError` if images are not uint8 RGB, which `normalize` scales from 0 to 255."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}; expected uint8 [n, height, width, 3]"
        )


def stage_shapes(model: Network, size: int, last: str | None = None) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the stages up to `last` for one square image.

    Nothing is computed. Shapes are [batch, height, width, channels].

    Raises `ValueError` if the image is too small for the network under its padding, or has a size
    that the network does not take.
    """
    return dict(_stage_shapes(model, size, last))


# Cached: a study asks for the same shapes at every point, and each call traces the network.
@functools.lru_cache(maxsize=256)
def _stage_shapes(model, size, last):
    def stages(variables, images):
        rngs = {"padding": jax.random.key(0)}
        return model.apply(variables, images, method="stages", last=last, rngs=rngs)

    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    try:
        maps = eval_shape(stages, variable_shapes(model), image)
    # Flax's own layers raise Flax's error.
    except (ParameterShapeError, flax.errors.ScopeParamShapeError) as error:
        accepted = "x".join(map(str, model.input_shape))
        raise ValueError(
            f"image_size={size}: {type(model).__name__} takes only images of {accepted}, not "
            f"{size}x{size}x3"
        ) from error
    return {name: stage.shape for name, stage in maps.items()}


def reachable_stages(model: Network, size: int) -> list[str]:
    """Lists the stages with at least one position left for an image of `size`.

    Without padding, maps shrink in every layer and the last stages may vanish.
    """
    names = list(stage_shapes(model.clone(padding="zeros"), size))
    while names:
        try:
            return list(stage_shapes(model, size, names[-1]))
        except ValueError:
            names.pop()
    return names


def random_encoder(
    name: str, padding: str, size: int, seed: int
) -> tuple[Network, dict, tuple[str, ...]]:
    """Draws an encoder's weights for square images of `size`.

    Returns the network, its variables, and the stages that an image of this size reaches without
    padding, which are the same for every padding.
    """
    stages = tuple(reachable_stages(create_model(name, padding="none"), size))
    model = create_model(name, padding=padding)
    return model, draw_variables(model, size, stages[-1], jax.random.key(seed)), stages


@functools.partial(jax.jit, static_argnames=("model", "size", "last"))
def draw_variables(model: Network, size: int, last: str, key: jax.Array) -> dict:
    """Draws an encoder's weights up to the stage `last`, for square images of `size`."""
    blank = jnp.zeros((1, size, size, 3))
    return dict(model.init(key, blank, method="stages", last=last))


def image_features(
    images: UInt8[np.ndarray, "n height width 3"],
    pixels: str = "imagenet",
    coordinates: bool = False,
) -> Float[np.ndarray, "n 28 28 channels"]:
    """Resizes images to the grid, as features of the controls without an encoder.

    Args:
      images: uint8 RGB.
      pixels: as in `normalize`.
      coordinates: whether two channels with each position's column and row are appended.

    Raises `ValueError` if the images are not uint8 RGB.
    """
    check_images(images)
    features = np.asarray(_resized(images, pixels))
    if not coordinates:
        return features
    rows, columns = np.indices(features.shape[1:3], np.float32)
    grid = np.broadcast_to(np.stack([columns, rows], -1), (*features.shape[:3], 2))
    return np.concatenate([features, grid], -1)


@functools.partial(jax.jit, static_argnames="pixels")
def _resized(images, pixels):
    return resize(normalize(images, pixels), FEATURE_SIZE)


def in_batches(
    images: Shaped[np.ndarray, "n ..."], size: int
) -> Iterator[tuple[int, int, Shaped[np.ndarray, "batch ..."]]]:
    """Yields (start, count, batch): `count` images, beginning with number `start`.

    The last batch is filled up with its last image, so that all batches compile as one shape.
    """
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        filling = np.repeat(batch[-1:], size - len(batch), 0)
        yield start, len(batch), np.concatenate([batch, filling])


# ------------------------------------------------------------------ encoding


def registered(
    model: Network, stages: tuple[str, ...], size: int
) -> list[Float32[np.ndarray, "28 _"]]:
    """Makes the matrices that sample all stages at the same pixels.

    The grid spans the part of the image that the centers of all stages' receptive fields cover.

    Args:
      model: the network.
      stages: names of stages, in the network's order.
      size: side of the square images.

    Returns a matrix of linear interpolation for each stage. Raises `ValueError` if a stage is
    unknown, its positions have no known field, or its field down differs from that to the right.
    """
    # The centers of the columns' fields; those of the rows are the same.
    centers = []
    for stage, (field, shape) in zip(stages, receptive_fields(model, stages, (size, size, 3))):
        field = located(field, stage)
        # (step, low, high) along each axis
        down, right = zip(field.step, field.low, field.high)
        if down != right:
            raise ValueError(
                f"stage={stage!r} has a receptive field that differs down and to the right, of "
                f"size {field.size()} and stride {field.step}; expected equal ones"
            )
        middle = (field.low[1] + field.high[1]) / 2
        centers.append(middle + field.step[1] * np.arange(shape[2]))
    first = max(stage_centers[0] for stage_centers in centers)
    last = min(stage_centers[-1] for stage_centers in centers)
    if first == last:
        log_once(
            logging.WARNING,
            f"{type(model).__name__} with padding={model.padding!r}: its stages at {size} px share "
            "a single pixel, so registered features are the same at every position",
        )
    pixels = np.linspace(first, last, FEATURE_SIZE)
    matrices = [linear_interpolation(pixels, stage_centers) for stage_centers in centers]
    return [matrix.astype(np.float32) for matrix in matrices]


@functools.partial(jax.jit, static_argnames=("model", "stages", "pixels"))
def _joined_stages(model, variables, images, stages, pixels, key, samplers=(None,)):
    """Runs the encoder, and joins its stages on the grid of each sampler.

    A sampler has a matrix of interpolation for each stage, or is None for aligned corners.
    """
    maps = model.apply(
        variables,
        normalize(images, pixels),
        method="stages",
        last=stages[-1],
        rngs={"padding": key},
    )
    check_stages(maps, stages)
    stage_maps = [maps[stage] for stage in stages]
    return [_join(stage_maps, matrices) for matrices in samplers]


def _join(maps, matrices):
    """Samples the stages on one grid, and joins their channels."""
    resized = []
    for number, features in enumerate(maps):
        features = features.astype(jnp.float32)
        if matrices is None:
            resized.append(resize(features, FEATURE_SIZE))
        else:
            matrix = matrices[number]
            resized.append(
                jnp.einsum("iy,nyxc,jx->nijc", matrix, features, matrix, precision="highest")
            )
    return jnp.concatenate(resized, -1)


def encode(
    model: Network,
    variables: dict,
    images: UInt8[np.ndarray, "n height width 3"],
    stages: str | Sequence[str],
    pixels: str = "imagenet",
    is_registered: bool = False,
    first: int = 0,
) -> Float[np.ndarray, "n 28 28 channels"]:
    """Runs a frozen encoder over images and joins its resized stages.

    The encoder is in evaluation mode. Under padding='random' every image gets its own noise.

    Args:
      model: the network.
      variables: its variables.
      images: uint8 RGB.
      stages: names in the network's order, or a single one: nothing after the last is computed.
      pixels: as in `normalize`.
      is_registered: whether all stages are sampled at the same pixels, instead of aligning their
        corners; for 'none' and for fills that keep every position where it is.
      first: the number of the first image, if images are encoded in several calls; the noise of
        padding='random' depends on it.

    Raises `ValueError` if the images are not uint8 RGB, no stage is named, or a stage is unknown or
    comes after the last one.
    """
    grid = "registered" if is_registered else "corners"
    features = encode_on_grids(
        model, variables, images, stages, grids=(grid,), pixels=pixels, first=first
    )
    return features[grid]


def encode_on_grids(
    model: Network,
    variables: dict,
    images: UInt8[np.ndarray, "n height width 3"],
    stages: str | Sequence[str],
    grids: Sequence[str],
    pixels: str = "imagenet",
    first: int = 0,
) -> dict[str, Float[np.ndarray, "n 28 28 channels"]]:
    """Encodes like `encode`, on each of several grids, in one run of the encoder.

    A grid is "corners", with aligned corners as in `encode`, or "registered", with all stages at
    the same pixels.

    Raises `ValueError` as `encode`, and for any other grid.
    """
    check_images(images)
    stages = stage_names(stages)
    for grid in grids:
        if grid not in GRIDS:
            raise ValueError(f"grids={grids!r}: {grid!r} is not one of {', '.join(GRIDS)}")
    size = images.shape[1]
    samplers = [None if grid == "corners" else registered(model, stages, size) for grid in grids]
    features: dict[str, np.ndarray] = {}
    for grid in grids:
        # Stays if there are no images: only a batch tells the number of channels.
        features[grid] = np.empty((len(images), FEATURE_SIZE, FEATURE_SIZE, 0), np.float32)
    # Otherwise, every batch would copy them to the device.
    variables = jax.device_put(variables)
    for start, count, batch in in_batches(images, _BATCH):
        key = jax.random.key(first + start)
        encoded = _joined_stages(
            model, variables, batch, stages, pixels=pixels, key=key, samplers=samplers
        )
        for grid, part in zip(grids, encoded):
            if start == 0:
                # Now the number of channels is known. The array is allocated once, since the
                # features of a study may take gigabytes.
                features[grid] = np.empty((len(images), *part.shape[1:]), np.float32)
            features[grid][start : start + count] = np.asarray(part)[:count]
    return features


# ------------------------------------------------------------------ encoding with an on-disk cache


def encode_once(
    folder: str | os.PathLike,
    model: Network,
    variables: dict,
    images: UInt8[np.ndarray, "n height width 3"],
    stages: str | Sequence[str],
    pixels: str = "imagenet",
) -> Float[np.ndarray, "n 28 28 channels"]:
    """Encodes like `encode`, with an on-disk cache per stage.

    Args:
      folder: the cache; `~` is expanded.
      model: the network.
      variables: its variables.
      images: uint8 RGB.
      stages: as in `encode`.
      pixels: as in `normalize`.

    Raises `ValueError` as `encode`, and if a file in the cache is damaged.
    """
    check_images(images)
    stages = stage_names(stages)
    folder = expand_user(folder)
    paths = {}
    for stage in stages:
        digest = _stage_digest(model, variables, images, stage, pixels)
        paths[stage] = folder / f"{digest}.npz"

    missing = [stage for stage in stages if not paths[stage].exists()]
    if missing:
        features = encode(model, variables, images, missing, pixels)
        shapes = stage_shapes(model, images.shape[1], missing[-1])
        ends = np.cumsum([shapes[stage][3] for stage in missing])[:-1]
        folder.mkdir(parents=True, exist_ok=True)
        for stage, part in zip(missing, np.split(features, ends, axis=3)):
            files.write_arrays(paths[stage], {"features": part}, compress=False)
    return np.concatenate([_read_features(path) for path in paths.values()], -1)


def _stage_digest(model, variables, images, stage: str, pixels: str) -> str:
    """Hashes all that determines a stage's features.

    That is its program, its weights and the images.
    """
    batch = jax.ShapeDtypeStruct((_BATCH, *images.shape[1:]), images.dtype)

    def initialize(images):
        key = jax.random.key(0)
        return model.init(key, normalize(images, pixels), method="stages", last=stage)

    # Only the weights up to this stage: weights of later layers do not change it.
    used = sorted(flatten_dict(eval_shape(initialize, batch)))
    everything = flatten_dict(variables)
    leaves = {path: everything[path] for path in used}

    # The compiler's input stands for the network's code and its padding.
    program = _joined_stages.lower(
        model, unflatten_dict(leaves), batch, (stage,), pixels, jax.random.key(0)
    )
    digest = hashlib.sha256(program.as_text().encode())
    for array in (*leaves.values(), images):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read_features(path: pathlib.Path) -> Float[np.ndarray, "n 28 28 channels"]:
    with files.open_arrays(path) as archive:
        return archive["features"]
