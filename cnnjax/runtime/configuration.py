"""Configurations: read from a file, changed key by key, and checked for keys that do not exist."""

import ast
import copy
import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from cnnjax.runtime import source

# A network's own fields are the only keys that may be added: `create_model` checks them.
_OPEN_SECTION = "model_fields"
# jax makes a random key of a 32-bit integer.
LARGEST_SEED = 2**31 - 1


def load(path: str) -> ml_collections.ConfigDict:
    """Read a configuration file.

    Raises `ValueError` if the file cannot be run or has no `get_config()`.
    """
    module = source.import_file(path)
    if not hasattr(module, "get_config"):
        raise ValueError(
            f"config={path!r} has no get_config(): define one that returns a configuration, such "
            "as that of cnnjax.train.defaults"
        )
    with source.running(path):
        config = module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"get_config() of config={path!r} returns {type(config).__name__}, not a ConfigDict"
        )
    return expand_paths(config)


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The values of a configuration by dotted key: `schedule.learning_rate`."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            nested = flatten(value)
            values |= {f"{key}.{name}": leaf for name, leaf in nested.items()}
        else:
            values[key] = value
    return values


def expand_paths(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy of a configuration, in which "~" at the start of a string is the home folder."""
    expanded = copy.deepcopy(config)
    for key, value in flatten(config).items():
        if isinstance(value, str) and value.startswith("~"):
            expanded.update_from_flattened_dict({key: os.path.expanduser(value)})
    return expanded


def override(
    config: ml_collections.ConfigDict, changes: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """A copy of a configuration with other values for some dotted keys.

    Raises `ValueError` for an unknown key and for a value of another type.
    """
    changed = copy.deepcopy(config)
    known = flatten(config)
    for key, value in changes.items():
        if key not in known and not _is_open(key):
            raise ValueError(_describe_unknown(key, known))
        try:
            changed.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            expected = type(known[key]).__name__
            raise ValueError(f"{key}={value!r} is not of the type {expected}") from error
    return expand_paths(changed)


def check_keys(
    config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict, origin: str
) -> None:
    """Raise `ValueError` if a configuration has an unknown key or lacks one.

    `defaults` has all keys; `origin` says in the message where they come from.
    """
    known = flatten(defaults)
    found = flatten(config)
    for key in found:
        if key not in known and not _is_open(key):
            raise ValueError(_describe_unknown(key, known))
    if missing := [key for key in defaults if key not in config]:
        raise ValueError(
            f"the configuration lacks the key {missing[0]}; start from {origin}.get_config()"
        )


def check_seed(config: ml_collections.ConfigDict) -> None:
    """Raise `ValueError` for a seed that jax's random keys cannot take."""
    if not 0 <= config.seed <= LARGEST_SEED:
        raise ValueError(
            f"seed={config.seed} is not a number of at least 0 and at most {LARGEST_SEED}"
        )


def parse_overrides(config: ml_collections.ConfigDict, arguments: Iterable[str]) -> dict[str, Any]:
    """The changes that `--config.KEY=VALUE` or `--config.KEY VALUE` ask for, by dotted key.

    Values are read as the type that the key has in `config`. Raises `ValueError` for anything else.
    """
    known = flatten(config)
    changes: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, text = argument.partition("=")
        key = name.removeprefix("--config.")
        if key == name:
            raise ValueError(
                f"unexpected argument {argument!r}; options are written --workdir=FOLDER or "
                "--config.KEY=VALUE"
            )
        if not equals:
            text = next(rest, "")
            if not text:
                raise ValueError(f"--config.{key} has no value")
        changes[key] = _parse_value(text, known.get(key))
    return changes


def _parse_value(text: str, current: Any) -> Any:
    """The value that a command line gives to a key; text that is of no other type stays text."""
    if isinstance(current, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if isinstance(current, bool) and text in ("0", "1"):
        return text == "1"
    try:
        # Not as a literal: "inf" is a float, too.
        value = float(text) if isinstance(current, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(current, tuple) and not isinstance(value, (tuple, list)):
        return (value,)
    return value


def _is_open(key: str) -> bool:
    return key.startswith(f"{_OPEN_SECTION}.")


def _describe_unknown(key: str, known: Mapping[str, Any]) -> str:
    # "padding" is closer to any short key than to model_fields.padding.
    near = [name for name in known if name.endswith(f".{key}")]
    near = near or difflib.get_close_matches(key, known, n=1)
    advice = f"did you mean {' or '.join(near)}?" if near else f"its keys are {', '.join(known)}"
    return f"{key} is not a key of the configuration; {advice}"
