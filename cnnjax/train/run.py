"""Building a network from a training configuration, and reopening a finished training run."""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from cnnjax import transfer, weights
from cnnjax.data import arrays, augment
from cnnjax.models import Network, create_model
from cnnjax.runtime import workdir
from cnnjax.train import defaults


def is_streamed(config: ml_collections.ConfigDict) -> bool:
    """Tell whether a configuration's images are decoded as they are needed."""
    return config.dataset == "folder" or config.dataset.startswith("tfds:")


def build_model(
    config: ml_collections.ConfigDict,
    num_classes: int,
    image_shape: tuple[int, int, int],
    axis_name: str | None = None,
) -> Network:
    """Build the network of a training configuration.

    Args:
      config: a training configuration.
      num_classes: the number of classes of its data set.
      image_shape: height, width and channels of its images.
      axis_name: the device axis over which BatchNorm takes its statistics.
    """
    return create_model(
        config.model,
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype).type,
        input_shape=image_shape,
        axis_name=axis_name,
        **config.model_fields,
    )


def moments_of(
    config: ml_collections.ConfigDict, mean: np.ndarray, std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the mean and deviation that pixels of 0 to 1 are normalized by.

    Args:
      config: a training configuration.
      mean: the data's own, of each channel.
      std: the data's own, of each channel.

    Returns:
      The mean and the standard deviation, float32 [channels].

    Raises:
      ValueError: for ImageNet's moments, where images do not have three channels.
    """
    if config.pixels == "imagenet":
        if len(mean) != 3:
            raise ValueError(
                f"pixels='imagenet' is for three channels; the images of "
                f"dataset={config.dataset!r} have {len(mean)}"
            )
        mean, std = augment.IMAGENET
    if config.pixels == "centred":
        std = np.full(len(std), 1 / 255)
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished training run, ready to use without its data set.

    Attributes:
      config: the run's configuration.
      model: its network.
      variables: the trained variables, host arrays.
      classes: the classes' names.
      mean: what pixels of 0 to 1 are normalized by, float32 [channels].
      std: likewise.
      image_shape: height, width and channels of the network's input.
      resize: the shorter side, in pixels, to which an image is resized before its center is
        cropped to `image_shape`.
    """

    config: ml_collections.ConfigDict
    model: Network
    variables: dict
    classes: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    image_shape: tuple[int, int, int]
    resize: int


def open_run(folder: str | pathlib.Path) -> TrainedRun:
    """Reopen the work directory of a finished training run.

    Directories whose results.json does not record the normalization take it from the data set.

    Args:
      folder: the work directory; `~` is expanded.

    Raises:
      ValueError: if it is not a finished training run, if its files have changed since, or if the
        data set is needed and cannot be read.
    """
    folder = pathlib.Path(folder).expanduser()
    missing = [
        name
        for name in ("config.json", "results.json", transfer.WEIGHTS)
        if not (folder / name).is_file()
    ]
    if missing:
        raise ValueError(f"{folder} is not a finished training run: it has no {', '.join(missing)}")
    config = read_config(folder)
    results = workdir.read_json(folder / "results.json")
    workdir.check_seal(folder)
    facts = _input_facts(folder, config, results)
    model = build_model(config, len(results["classes"]), facts["image_shape"])
    return TrainedRun(
        config=config,
        model=model,
        variables=weights.load_torchvision(folder / transfer.WEIGHTS, model),
        classes=tuple(results["classes"]),
        resize=_resize(config, facts["image_shape"]),
        **facts,
    )


def read_config(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """Read the configuration of a training run, finished or not.

    Keys that were introduced after the run take their default.

    Raises:
      ValueError: if the folder is not the work directory of a training run.
    """
    path = folder / "config.json"
    recorded = workdir.read_json(path, object_hook=_with_tuples) if path.is_file() else None
    if not isinstance(recorded, dict) or recorded.get("kind") != "train":
        raise ValueError(f"{folder} is not a training run: its config.json is not one's")
    config = defaults.get_config().to_dict()
    return ml_collections.ConfigDict(config | recorded)


def _with_tuples(found: dict[str, Any]) -> dict[str, Any]:
    """Turn lists into tuples, since a model's fields are hashed."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def _resize(config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]) -> int:
    """The shorter side before the center crop; images of small data sets are not cropped."""
    shorter = min(image_shape[:2])
    if not is_streamed(config):
        return shorter
    return config.resize or round(shorter * 256 / 224)


def _input_facts(
    folder: pathlib.Path, config: ml_collections.ConfigDict, results: dict
) -> dict[str, Any]:
    """The shape and the normalization of a run's images, recorded or from the data set."""
    if "image_shape" in results:
        return {
            "image_shape": tuple(results["image_shape"]),
            "mean": np.array(results["mean"], np.float32),
            "std": np.array(results["std"], np.float32),
        }
    if is_streamed(config):
        shape = (config.image_size, config.image_size, 3)
        mean, std = moments_of(config, *augment.IMAGENET)
        return {"image_shape": shape, "mean": mean, "std": std}
    try:
        images = arrays.load(config.dataset, config.data_dir, config.n_validation).train.images
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{folder} was trained before results.json recorded the normalization of images, and "
            f"the data set to compute it from cannot be read: {error}"
        ) from error
    mean, std = moments_of(config, *arrays.normalization(images))
    return {"image_shape": images.shape[1:], "mean": mean, "std": std}
