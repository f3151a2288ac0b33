"""Checks of a position study's configuration, before anything is computed."""

import pathlib
from collections.abc import Collection

import ml_collections

from cnnjax import weights
from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.nn import check_fill
from cnnjax.position import defaults
from cnnjax.position.encoder import FEATURE_SIZE, PIXELS, reachable_stages
from cnnjax.position.patterns import ALIGNED
from cnnjax.position.targets import TARGETS
from cnnjax.runtime import configuration
from cnnjax.runtime.paths import expand_user

DATA = ("natural", "shuffled_pixels", "black", "white", "noise")
FITTED_TO = ("photographs", "shuffled_pixels", "noise")
RINGS = 7  # from the border to the center, for scores by distance to the border
# Keys of a configuration that are tuples of names.
_NAMES = ("encoders", "missing", "paddings", "stages", "targets", "data", "sgd_paddings")


def check(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path | None = None,
    overrides: Collection[str] = (),
) -> None:
    """Checks a configuration before anything is computed; may download ImageNet's weights.

    Args:
      config: the configuration.
      folder: the work directory, which `cnnjax.main` gives to every job; not used here.
      overrides: the keys that the command line sets; not used here, either.

    Raises:
      ValueError: with the key, its value and what is accepted.
      RuntimeError: if ImageNet's weights are not on this machine and cannot be downloaded.
    """
    configuration.check_keys(config, defaults.get_config(), "cnnjax.position.defaults")
    configuration.check_seed(config)
    _check_names(config)
    _check_numbers(config)
    _check_photographs(config)
    if config.weights == "imagenet":
        for name in config.encoders:
            # Without a connection, this fails before anything is computed.
            weights.fetch(name)
    for name in config.encoders:
        common_stages(config, name)


def _check_names(config: ml_collections.ConfigDict) -> None:
    configuration.check_names(config, _NAMES)
    for key, accepted in (("targets", TARGETS), ("data", DATA)):
        for value in config[key]:
            if value not in accepted:
                raise ValueError(f"{key}={value!r} is not one of {', '.join(accepted)}")
    for key in ("targets", "data", "paddings"):
        if not config[key] or len(set(config[key])) < len(config[key]):
            raise ValueError(f"{key}={tuple(config[key])} must name at least one, each once")
    if len(set(config.encoders)) < len(config.encoders):
        raise ValueError(f"encoders={tuple(config.encoders)} must name each once")
    for fill in (*config.paddings, *config.sgd_paddings):
        check_fill(fill, "padding")
    # The default names paddings that a study may leave out; only an explicit choice must be among
    # them.
    unread = set(config.sgd_paddings) - set(config.paddings)
    if unread and config.sgd_paddings != defaults.get_config().sgd_paddings:
        raise ValueError(
            f"sgd_paddings={tuple(config.sgd_paddings)} must all be among "
            f"paddings={tuple(config.paddings)}"
        )
    for fill in config.paddings:
        if config.registered and fill not in ("none", *ALIGNED):
            raise ValueError(
                f"padding={fill!r} moves positions, so that stages cannot be registered=True; "
                f"expected none, {', '.join(ALIGNED)}"
            )
    for key, choices in (("pixels", PIXELS), ("fitted_to", FITTED_TO)):
        if config[key] not in choices:
            raise ValueError(f"{key}={config[key]!r} is not one of {', '.join(choices)}")
    for name in config.encoders:
        # Refuses unknown names.
        create_model(name)
    is_file = expand_user(config.weights).is_file()
    if config.weights not in ("random", "imagenet") and not is_file:
        raise ValueError(
            f"weights={config.weights!r} is neither 'random', 'imagenet' nor a safetensors or .pth "
            "file"
        )
    if config.missing and config.weights == "random":
        raise ValueError(
            f"missing={tuple(config.missing)} names modules that a file of weights lacks; with "
            "weights='random' there is no file"
        )


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    for key in ("n_train", "n_held_out", "n_test", "n_noise", "seeds", "sgd_steps"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]} is not a positive number")
    last = config.seed + config.seeds - 1
    if last > configuration.LARGEST_SEED:
        raise ValueError(
            f"seed={config.seed} and seeds={config.seeds} need seeds up to {last}; the largest "
            f"is {configuration.LARGEST_SEED}"
        )
    if config.readout_padding < 0:
        raise ValueError(f"readout_padding={config.readout_padding} is not a number of at least 0")
    are_numbers = all(configuration.is_number(number) for number in config.noise)
    if len(config.noise) != 2 or not are_numbers or min(config.noise) < 0:
        raise ValueError(f"noise={tuple(config.noise)} is not a mean and a standard deviation")
    if config.hidden < 0:
        raise ValueError(
            f"hidden={config.hidden} is not a number of channels, or 0 for as many as the "
            "features have"
        )
    # The targets' map needs a position in each ring. Shuffled targets are made on the readout's
    # grid, which is checked below.
    least = 2 if config.shuffled else 2 * RINGS - 1
    if config.image_size < least:
        raise ValueError(
            f"image_size={config.image_size} is not a number of pixels of at least {least}"
        )
    side = FEATURE_SIZE + 2 * config.readout_padding
    if not 1 <= config.kernel <= side:
        raise ValueError(
            f"kernel={config.kernel} is not between 1 and {side}, the side of the features"
        )
    if config.shuffled and readout_side(config) < 2 * RINGS:
        raise ValueError(
            f"kernel={config.kernel} leaves a grid of {readout_side(config)} positions a side, on "
            f"which targets are shuffled; expected at least {2 * RINGS}"
        )
    if config.depth < 1 or config.depth * (config.kernel - 1) >= side:
        raise ValueError(
            f"depth={config.depth} is not a number of {config.kernel}x{config.kernel} "
            f"convolutions, at least 1, that leave something of {side}x{side} features"
        )
    # Whether the readout's maps have a single position.
    is_single = side - config.depth * (config.kernel - 1) == 1
    if is_single and config.n_train == 1 and not config.mirrored:
        raise ValueError(
            f"n_train=1 and kernel={config.kernel} leave the SGD readout's BatchNorm a single "
            "value; expected n_train of at least 2"
        )


def readout_side(config: ml_collections.ConfigDict) -> int:
    """Returns the side of the exact readout's maps."""
    return FEATURE_SIZE + 2 * config.readout_padding - config.kernel + 1


def _check_photographs(config: ml_collections.ConfigDict) -> None:
    # This logs the files that are passed over.
    paths = photographs.list_photographs(config.photographs)
    # Too few are refused here.
    photographs.split(paths, (config.n_train, config.n_held_out, config.n_test), config.seed)
    photographs.check_sizes(paths, config.image_size, f"image_size={config.image_size}")


def common_stages(config: ml_collections.ConfigDict, name: str) -> tuple[str, ...]:
    """Returns the stages to read from an encoder, the same for all paddings.

    Raises `ValueError` if a padding reaches none, or not those that the configuration names.
    """
    reachable = {}
    for fill in config.paddings:
        reachable[fill] = reachable_stages(create_model(name, padding=fill), config.image_size)
    if not config.stages:
        # Each padding reaches the network's first stages; the one that reaches fewest decides.
        fill, common = min(reachable.items(), key=lambda item: len(item[1]))
        if not common and not reachable_stages(create_model(name), config.image_size):
            raise ValueError(f"encoders={name!r} has no stages")
        if not common:
            raise ValueError(
                f"image_size={config.image_size} leaves nothing of any stage of {name} under "
                f"padding={fill!r}; take a larger one"
            )
        return tuple(common)
    for fill, names in reachable.items():
        for stage in config.stages:
            if stage not in names:
                raise ValueError(
                    f"stages={stage!r} is not a stage that {name} reaches with padding={fill!r} at "
                    f"image_size={config.image_size}; it reaches {', '.join(names) or 'none'}"
                )
    # In the order of the network, not of the configuration.
    in_order = next(iter(reachable.values()))
    return tuple(stage for stage in in_order if stage in config.stages)
