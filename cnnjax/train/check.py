"""Checks of a training configuration that need no computation."""

import pathlib
from collections.abc import Collection

import ml_collections

from cnnjax import transfer, weights
from cnnjax.data import arrays, augment, crops, folders
from cnnjax.models import Network, create_model
from cnnjax.runtime import configuration, workdir
from cnnjax.train import defaults, schedules, step
from cnnjax.train.checkpoints import was_completed
from cnnjax.train.data import has_validation, is_streamed
from cnnjax.train.optimizers import OPTIMIZERS
from cnnjax.train.parallel import WAYS

# The smallest value of keys that are numbers.
_LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "accumulate": 1,
    "checkpoint_every_steps": 1,
    "keep_checkpoints": 1,
    "image_size": 1,
    "n_validation": 0,
    "resize": 0,
    "workers": 0,
    "mixup": 0,
    "weight_decay": 0,
    "clip_norm": 0,
    "early_stopping": 0,
}
_SHARES = ("label_smoothing", "ema_decay", "momentum")
_CHOICES = {
    "loss": step.LOSSES,
    "optimizer": tuple(OPTIMIZERS),
    "dtype": ("float32", "bfloat16"),
    "test_views": augment.VIEWS,
    "parallel": WAYS,
    "final_weights": ("best", "last"),
    "pixels": ("standardised", "imagenet", "centred"),
}
# Fields of the model that other keys or the data decide.
_DECIDED_FIELDS = ("num_classes", "dtype", "axis_name", "input_shape")


def check(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path | None = None,
    overrides: Collection[str] = (),
) -> None:
    """Checks a configuration before anything is computed.

    Args:
      config: the configuration.
      folder: the work directory, which may not exist yet; None for a run without one.
      overrides: the keys that the command line sets, such as "schedule.name".

    Raises:
      ValueError: with the key, its value and what is accepted.
    """
    configuration.check_keys(config, defaults.get_config(), "cnnjax.train.defaults")
    configuration.check_seed(config)
    _check_values(config)
    schedules.settings(config.schedule)
    _check_validation(config, folder)
    _check_model(config)
    _check_initial_weights(config, folder)
    _check_loss(config)
    if is_streamed(config):
        crops.check_resize(config.resize, config.image_size)
    _check_views(config)
    _check_unread(config, folder, overrides)


def _check_values(config: ml_collections.ConfigDict) -> None:
    """Checks keys whose values do not depend on other keys."""
    for key, least in _LEAST.items():
        configuration.check_least(key, config[key], least)
    for key in _SHARES:
        if not 0 <= config[key] < 1:
            raise ValueError(f"{key}={config[key]} is not between 0 and 1, 1 excluded")
    for key, accepted in _CHOICES.items():
        if config[key] not in accepted:
            raise ValueError(f"{key}={config[key]!r} is not one of {', '.join(map(str, accepted))}")
    # A configuration file may set a section with fewer keys; `augment` has their defaults.
    for key in ("crop", "cutout", "colour"):
        configuration.check_least(f"augment.{key}", config.augment.get(key, 0), 0)
    fill = config.augment.get("fill", "zeros")
    if fill not in augment.FILLS:
        raise ValueError(f"augment.fill={fill!r} is not one of {', '.join(augment.FILLS)}")


def _is_finished(folder: pathlib.Path | None) -> bool:
    return folder is not None and (folder / "results.json").exists()


def _check_validation(config: ml_collections.ConfigDict, folder: pathlib.Path | None) -> None:
    """Checks that there are validation images if anything needs them.

    A finished run has had them, and is reported again without its data set.
    """
    are_needed = config.schedule.name == "plateau" or config.early_stopping
    if not are_needed or _is_finished(folder):
        return
    # This reads the folder of a streamed data set.
    if has_validation(config):
        return
    cause = f"early_stopping={config.early_stopping}"
    if config.schedule.name == "plateau":
        cause = "schedule.name='plateau'"
    problem = "n_validation=0 is not a positive number"
    if is_streamed(config):
        test_split = folders.find_splits(config.dataset, config.data_dir)["test"]
        absence = "there is no labeled split named val"
        if test_split != "test":
            absence = f"{test_split} is the test set, as there is no labeled split named test"
        problem = f"{absence}; add one, or hold out images with n_validation=N"
    raise ValueError(f"{cause} watches the validation error: {problem}")


def _check_model(config: ml_collections.ConfigDict) -> None:
    """Checks the model, its fields and the parts that the configuration names."""
    for field in _DECIDED_FIELDS:
        if field in config.model_fields:
            raise ValueError(
                f"model_fields.{field}={config.model_fields[field]!r}: the data and the keys of "
                "the configuration decide this field"
            )
    _check_parts(config, create_model(config.model, **config.model_fields))


def _check_parts(config: ml_collections.ConfigDict, model: Network) -> None:
    """Checks the parts with initial weights, with rates of their own, and frozen."""
    configuration.check_names(config, ("initial_parts", "freeze"))
    if config.initial_parts and not config.initial_weights:
        raise ValueError(
            f"initial_parts={config.initial_parts} needs initial_weights, a file or a run that "
            "they are taken from"
        )
    if not all(_is_rate(pair) for pair in config.rates):
        raise ValueError(
            f"rates={config.rates} is not a tuple of pairs of a part and a positive number, such "
            "as (('conv1', 0.1),)"
        )
    rated = tuple(part for part, _ in config.rates)
    transfer.select(model, tuple(config.initial_parts), "initial_parts")
    transfer.select(model, rated, "rates")
    frozen = transfer.select(model, tuple(config.freeze), "freeze")
    if not config.freeze:
        return
    transfer.check_statistics(model, f"freeze={config.freeze}")
    trained, _ = transfer.split(weights.variable_shapes(model)["params"], frozen)
    if not trained:
        raise ValueError(f"freeze={config.freeze} leaves no parameter to train")


def _check_frozen_rates(config: ml_collections.ConfigDict) -> None:
    """Refuses rates of parts that are frozen as a whole."""
    model = create_model(config.model, **config.model_fields)
    frozen = transfer.select(model, tuple(config.freeze), "freeze")
    for pair in config.rates:
        if transfer.select(model, pair[0], "rates") <= frozen:
            raise ValueError(
                f"rates={config.rates}: freeze={config.freeze} freezes all of {pair[0]!r}, so its "
                "rate would have no effect; leave out this pair"
            )


def _check_initial_weights(config: ml_collections.ConfigDict, folder: pathlib.Path | None) -> None:
    """Checks that there are initial weights, unless a run in the folder has started from them."""
    if not config.initial_weights:
        return
    if folder is not None and (_is_finished(folder) or was_completed(folder / "checkpoints")):
        return
    transfer.weights_file(config.initial_weights)


def _is_rate(pair) -> bool:
    """Tells whether a pair is the name of a part and a positive number."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return False
    part, rate = pair
    return isinstance(part, str) and configuration.is_number(rate) and rate > 0


def _check_loss(config: ml_collections.ConfigDict) -> None:
    """Checks that the loss fits the labels of the data set."""
    fitting = "cross_entropy"
    if not is_streamed(config):
        fitting = arrays.loss_of(config.dataset)
    if config.loss != fitting:
        raise ValueError(
            f"loss={config.loss!r} does not fit the labels of dataset={config.dataset!r}, which "
            f"are for loss={fitting!r}"
        )


def _check_views(config: ml_collections.ConfigDict) -> None:
    """Checks that the test images have the views to average."""
    if config.test_views > 1 and config.loss != "cross_entropy":
        raise ValueError(
            f"test_views={config.test_views} averages the probabilities of classes, for "
            f"loss='cross_entropy'; loss={config.loss!r} accepts 1"
        )
    has_corners = is_streamed(config) and not 0 < config.resize <= config.image_size
    if config.test_views == 10 and not has_corners:
        raise ValueError(
            "test_views=10 takes corners, which needs a streamed dataset and a resize above "
            f"image_size: dataset={config.dataset!r}, resize={config.resize}, "
            f"image_size={config.image_size}"
        )


def _check_unread(
    config: ml_collections.ConfigDict, folder: pathlib.Path | None, overrides: Collection[str]
) -> None:
    """Refuses changed keys without effect.

    They are rates of frozen parts, image sizes for data in memory, and keys that the schedule does
    not read. A run that has started may keep them.
    """
    if folder is not None and workdir.has_started(folder):
        return
    _check_frozen_rates(config)
    default = defaults.get_config()
    if not is_streamed(config):
        for key in ("image_size", "resize"):
            if config[key] != default[key]:
                raise ValueError(
                    f"{key}={config[key]} is for streamed images, of dataset='folder' or "
                    f"'tfds:NAME'; dataset={config.dataset!r} accepts {default[key]}, the default"
                )
    name = config.schedule.name
    is_read = {"name", "learning_rate", "warmup_epochs", *schedules.KEYS[name]}
    settings = schedules.settings(config.schedule)
    unread = []
    for key, value in settings.items():
        # The command line may choose another schedule than the configuration file, whose keys then
        # stay. Under "constant", the default, they rather show that the name is missing.
        is_meant = name == "constant" or f"schedule.{key}" in overrides
        is_changed = configuration.to_tuples(value) != default.schedule[key]
        if key not in is_read and is_meant and is_changed:
            unread.append(key)
    if unread:
        given = ", ".join(f"schedule.{key}={settings[key]!r}" for key in unread)
        accepted = ", ".join(f"{key}={default.schedule[key]!r}" for key in unread)
        raise ValueError(
            f"{given}: schedule.name={name!r} reads none of these and accepts their "
            f"defaults, {accepted}; set schedule.name, or these keys"
        )
