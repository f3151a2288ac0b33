"""Checks of a training configuration that need no computation."""

import math

import ml_collections

from cnnjax import transfer, weights
from cnnjax.data import arrays, augment
from cnnjax.models import Network, create_model
from cnnjax.runtime import configuration
from cnnjax.train import defaults, step
from cnnjax.train.data import has_validation, is_streamed
from cnnjax.train.optimizers import optimizer
from cnnjax.train.parallel import WAYS
from cnnjax.train.schedules import learning_rates


def check(config: ml_collections.ConfigDict) -> None:
    """Raises `ValueError`, naming the key, its value and what is accepted, for whatever can be seen
    to be wrong before computing."""
    configuration.check_keys(config, defaults.get_config(), "cnnjax.train.defaults")
    configuration.check_seed(config)
    least = dict.fromkeys(
        (
            "epochs",
            "batch_size",
            "accumulate",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "image_size",
        ),
        1,
    )
    least |= dict.fromkeys(
        (
            "n_validation",
            "resize",
            "workers",
            "mixup",
            "weight_decay",
            "early_stopping",
        ),
        0,
    )
    for key, value in least.items():
        if config[key] < value:
            raise ValueError(f"{key}={config[key]} is not a number of at least {value}")
    for key in ("label_smoothing", "ema_decay", "momentum"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"{key}={config[key]} is not between 0 and 1, 1 excluded")
    for key, accepted in (
        ("loss", step.LOSSES),
        ("dtype", ("float32", "bfloat16")),
        ("test_views", (1, 2, 10)),
        ("parallel", WAYS),
        ("final_weights", ("best", "last")),
        ("pixels", ("standardised", "imagenet", "centred")),
    ):
        if config[key] not in accepted:
            raise ValueError(f"{key}={config[key]!r} is not one of {', '.join(map(str, accepted))}")
    if config.augment.fill not in augment.FILLS:
        raise ValueError(
            f"augment.fill={config.augment.fill!r} is not one of {', '.join(augment.FILLS)}"
        )
    optimizer(config.optimizer, 0.0)
    learning_rates(config.schedule, 1, config.epochs)
    if config.schedule.name == "plateau" and not has_validation(config):
        raise ValueError(
            "schedule.name='plateau' watches the validation error: n_validation=0 is not a "
            "positive number"
        )
    if config.early_stopping and not has_validation(config):
        raise ValueError(
            f"early_stopping={config.early_stopping} watches the validation error: "
            "n_validation=0 is "
            "not a positive number"
        )
    for field in ("num_classes", "dtype", "axis_name", "input_shape"):
        if field in config.model_fields:
            raise ValueError(
                f"model_fields.{field}={config.model_fields[field]!r}: the data and the keys of "
                "the configuration decide this field"
            )
    _check_parts(config, create_model(config.model, **config.model_fields))
    if not is_streamed(config):
        arrays.check_name(config.dataset)
    fitting = "cross_entropy" if is_streamed(config) else arrays.loss_of(config.dataset)
    if config.loss != fitting:
        raise ValueError(
            f"loss={config.loss!r} does not fit the labels of dataset={config.dataset!r}, which "
            f"are for loss={fitting!r}"
        )
    if config.test_views > 1 and config.loss != "cross_entropy":
        raise ValueError(
            f"test_views={config.test_views} averages the probabilities of classes, for "
            "loss='cross_entropy'; loss="
            f"{config.loss!r} accepts 1"
        )
    if config.test_views == 10 and (
        not is_streamed(config) or 0 < config.resize <= config.image_size
    ):
        raise ValueError(
            "test_views=10 takes corners, which needs a streamed dataset and a resize above "
            "image_size: "
            f"dataset={config.dataset!r}, resize={config.resize}, image_size={config.image_size}"
        )


def _check_parts(config: ml_collections.ConfigDict, model: Network) -> None:
    """`check` of what is transferred, frozen and trained at rates of its own."""
    if config.initial_weights:
        transfer.weights_file(config.initial_weights)
    elif config.initial_parts:
        raise ValueError(
            f"initial_parts={config.initial_parts} needs initial_weights, a file or a run that "
            "they are taken from"
        )
    for pair in config.rates:
        if not (
            len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], (int, float))
            and 0 < pair[1] < math.inf
        ):
            raise ValueError(
                f"rates={pair} is not a pair of a part and a positive number, such as ('conv1', "
                "0.1)"
            )
    for argument, parts in (
        ("initial_parts", config.initial_parts),
        ("rates", tuple(part for part, _ in config.rates)),
        ("freeze", config.freeze),
    ):
        transfer.select(model, tuple(parts), argument)
    if (
        config.freeze
        and not transfer.split(
            weights.variable_shapes(model)["params"], transfer.select(model, tuple(config.freeze))
        )[0]
    ):
        raise ValueError(f"freeze={config.freeze} leaves no parameter to train")
