"""The parts of a training run, and finished runs reopened from their folders."""

import dataclasses
import logging
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
import PIL.Image
import PIL.ImageOps

from cnnjax import transfer, weights
from cnnjax.data import arrays, crops, photographs, splits
from cnnjax.models import Network, create_model
from cnnjax.models.base import digest_network
from cnnjax.runtime import files, imagenet, workdir
from cnnjax.runtime.configuration import to_tuples
from cnnjax.runtime.paths import expand_user, find_moved
from cnnjax.runtime.progress import log_once
from cnnjax.train import defaults, step
from cnnjax.train.data import is_streamed, moments_of

# ------------------------------------------------------------------ a run's parts


def build_model(
    config: ml_collections.ConfigDict,
    num_classes: int,
    image_shape: tuple[int, int, int],
    axis_name: str | None = None,
) -> Network:
    """Builds the network of a training configuration.

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


def warn_if_edited(model: str, recorded: str | None) -> None:
    """Logs a warning if the file of a user's network has changed since a run recorded it.

    Args:
      model: the network's name.
      recorded: as `digest_network` returned it; None in records of earlier versions.
    """
    if recorded is not None and recorded != digest_network(model):
        place = model.rpartition(":")[0]
        log_once(
            logging.WARNING,
            f"{place} has changed since the run was trained; its network may differ",
        )


def build_recipe(config: ml_collections.ConfigDict, model: Network) -> step.Recipe:
    """Builds the recipe of a configuration's training step: all but its numbers."""
    return step.Recipe(
        model=model,
        optimizer=config.optimizer,
        decay_all=config.decay_all,
        loss=config.loss,
        augment=tuple(sorted(config.augment.items())),
        mixup=config.mixup > 0,
        ema=config.ema_decay > 0,
        accumulate=config.accumulate,
        freeze=tuple(config.freeze),
        rates=tuple(part for part, _ in config.rates),
        clip=config.clip_norm > 0,
    )


def build_numbers(config: ml_collections.ConfigDict) -> step.Numbers:
    """Collects the numbers of a configuration's training step."""
    return step.Numbers(
        seed=config.seed,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing,
        mixup=config.mixup,
        ema_decay=config.ema_decay,
        rates=tuple(float(rate) for _, rate in config.rates),
        clip_norm=config.clip_norm,
    )


# ------------------------------------------------------------------ a finished run


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished training run, ready to use without its data set.

    It may also be the network that a combination of runs made (`cnnjax.combine`).

    Attributes:
      config: the run's configuration; that of the first run for a combination.
      model: its network.
      variables: the trained variables, host arrays: NumPy's. Before many calls, copy them to the
        device with `jax.device_put`; otherwise, every call does.
      classes: the classes' names.
      mean: the mean that pixels of 0 to 1 are normalized by, float32 [channels].
      std: the standard deviation that they are normalized by, likewise.
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

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean and standard deviation that pixels of 0 to 1 are normalized by."""
        return self.mean, self.std

    @property
    def multi_label(self) -> bool:
        """Tells whether an image may have several classes."""
        return self.config.loss == "sigmoid"

    def read(self, file: str | os.PathLike, times: int = 1, views: int = 1) -> np.ndarray:
        """Reads a photograph as the run's test images were read.

        Args:
          file: an image file; `~` is expanded.
          times: a multiple of the height and width of `image_shape` to read the image at.
          views: the number of views to cut from the image (`cnnjax.data.augment.views`). With ten,
            it keeps the margin that corner crops need: its height and width are `resize`.

        Returns:
          uint8 [times * height, times * width, channels], where height and width are those of
          `image_shape`, or `resize` with ten views. There must be 1 channel, gray, or 3.

        Raises:
          ValueError: if the file cannot be read, or is not an image that can be decoded.
        """
        size = (self.resize, self.resize) if views == 10 else self.image_shape[:2]
        height, width = (times * side for side in size)
        image = photographs.open_rgb(expand_user(file))
        if height == width:
            image = crops.center(image, height, times * self.resize)
        else:
            # Streamed images are square, so the run was on a data set in memory, whose images are
            # not cropped: the photograph keeps as much as its shape allows.
            image = PIL.ImageOps.fit(image, (width, height), PIL.Image.Resampling.BILINEAR)
        channels = self.image_shape[2]
        image = image.convert("L" if channels == 1 else "RGB")
        return np.asarray(image).reshape(height, width, channels)


def open_run(folder: str | os.PathLike) -> TrainedRun:
    """Reopens the work directory of a finished training run, or of a combination with one network.

    If its results.json is of a version that did not record the normalization of images, it is
    computed from the data set.

    Args:
      folder: the work directory; `~` is expanded.

    Raises:
      ValueError: if it is neither a finished training run nor a combination with one network, if
        its files have changed since, or if the data set is needed and cannot be read.
    """
    folder = expand_user(folder)
    combination = workdir.read_record(folder, "combine")
    missing = [
        name
        for name in ("config.json", "results.json", transfer.WEIGHTS)
        if not (folder / name).is_file()
    ]
    is_started = combination is not None or read_recorded(folder) is not None
    if "results.json" in missing and is_started:
        raise ValueError(f"{folder} {why_unfinished(folder)}")
    if combination is not None and missing:
        raise ValueError(
            f"{folder} holds scores only, since method={combination['method']!r} makes no network "
            "of its own; open one of the runs that it combined"
        )
    if missing:
        raise ValueError(f"{folder} is not a finished training run: it has no {', '.join(missing)}")
    results = files.read_json(folder / "results.json")
    if combination is None:
        config = read_config(folder)
    else:
        config = _read_combined_config(folder)
    workdir.check_seal(folder)
    image_settings = _image_settings(folder, config, results)
    image_shape = image_settings["image_shape"]
    model = build_model(config, len(results["classes"]), image_shape)
    warn_if_edited(config.model, results.get("network_sha256"))
    return TrainedRun(
        config=config,
        model=model,
        variables=weights.load_torchvision(folder / transfer.WEIGHTS, model),
        # Earlier versions recorded the numbers of a user's file as numbers.
        classes=splits.class_names(results["classes"]),
        resize=_resize(config, image_shape),
        **image_settings,
    )


def why_unfinished(folder: pathlib.Path) -> str:
    """Says why a training run has no results, and what gives it some.

    Args:
      folder: the work directory of a run without results.json.

    Returns:
      A sentence without its subject, the folder.
    """
    failure = folder / workdir.FAILURE
    if not failure.is_file():
        return "is not finished, for it has no results.json: run its own command again"
    reason = files.read_json(failure)["error"].partition("\n")[0] or "no reason given"
    return f"failed ({reason}): remove {failure} and run the sweep again"


def read_config(folder: str | os.PathLike) -> ml_collections.ConfigDict:
    """Reads the configuration of a training run, finished or not.

    Keys that were introduced after the run have the value that was in effect before.

    Args:
      folder: the work directory; `~` is expanded.

    Raises:
      ValueError: if the folder is not the work directory of a training run.
    """
    folder = expand_user(folder)
    recorded = read_recorded(folder)
    if recorded is None:
        raise ValueError(
            f"{folder} is not a training run: its config.json is missing or of another kind"
        )
    return complete(recorded)


def _read_combined_config(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """Reads the configuration of the network that a combination of runs made.

    Raises `ValueError` if the combination is of a version that did not record it.
    """
    results = files.read_json(folder / "results.json", object_hook=_with_tuples)
    if "config" not in results:
        raise ValueError(
            f"{folder} was written before results.json of a combination recorded the network: run "
            "its own command again"
        )
    return complete(find_network(results["config"], folder))


def read_recorded(folder: pathlib.Path) -> dict[str, Any] | None:
    """Reads the keys that a training run recorded; None if the folder is not a run's.

    The model is that of `find_network`.
    """
    path = folder / "config.json"
    recorded = files.read_json(path, object_hook=_with_tuples) if path.is_file() else None
    if isinstance(recorded, dict) and recorded.get("kind") == "train":
        return find_network(recorded, folder)
    return None


def find_network(recorded: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Returns a run's recorded keys with the present path of a user's network.

    A project may have been moved since, or copied from another machine. If FILE of FILE.py:NAME is
    gone, it is looked for from the run's folder, the folders above it and the current folder, as
    `find_moved` says.
    """
    place, _, attribute = str(recorded.get("model")).rpartition(":")
    # `pathlib.Path.is_file` raises `PermissionError` in folders that cannot be read.
    if not place.endswith(".py") or os.path.isfile(place):
        return recorded
    absolute = pathlib.Path(os.path.abspath(folder))
    near = [absolute, *absolute.parents]
    moved = find_moved(pathlib.Path(place), near, elsewhere=pathlib.Path.cwd())
    if moved is None:
        return recorded
    log_once(logging.WARNING, f"there is no {place} any more: the network is that of {moved}")
    return recorded | {"model": f"{moved}:{attribute}"}


def complete(recorded: dict[str, Any]) -> ml_collections.ConfigDict:
    """Adds the keys that were introduced after a run, with the values in effect before."""
    return ml_collections.ConfigDict(defaults.get_config().to_dict() | defaults.BEFORE | recorded)


def _with_tuples(record: dict[str, Any]) -> dict[str, Any]:
    """Turns lists into tuples, which they were before they were written as JSON."""
    return {key: to_tuples(value) for key, value in record.items()}


def _resize(config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]) -> int:
    """Returns the shorter side before the center crop; small data sets are not cropped."""
    shorter = min(image_shape[:2])
    if not is_streamed(config):
        return shorter
    return crops.shorter_side(shorter, config.resize)


def _image_settings(
    folder: pathlib.Path, config: ml_collections.ConfigDict, results: dict
) -> dict[str, Any]:
    """Returns the shape and the normalization of a run's images."""
    if "image_shape" in results:
        return {
            "image_shape": tuple(results["image_shape"]),
            "mean": np.array(results["mean"], np.float32),
            "std": np.array(results["std"], np.float32),
        }
    if is_streamed(config):
        shape = (config.image_size, config.image_size, 3)
        mean, std = moments_of(config, *imagenet.MOMENTS)
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
