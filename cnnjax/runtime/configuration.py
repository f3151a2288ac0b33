"""Configurations: read from a file, changed key by key, and checked for keys that do not exist."""

import ast
import contextlib
import copy
import difflib
import json
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import RequiredValueError

from cnnjax.runtime import source

# A network's own fields are the only keys that may be added: `create_model` checks them.
_OPEN_SECTION = "model_fields"
# Keys introduced since the names of folders do not depend on all keys, with the values that change
# nothing.
_LATER = {"clip_norm": 0.0, "fitted_to": "photographs"}
# jax makes a random key of a 32-bit integer.
LARGEST_SEED = 2**31 - 1


def load(path: str) -> ml_collections.ConfigDict:
    """Reads a configuration file.

    Raises:
        ValueError: if the file cannot be run, has no `get_config()`, or leaves a key without a
            value.
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
    _check_values(config, f"config={path!r}: ")
    return expand_paths(_with_plain_values(config))


def _check_values(config: ml_collections.ConfigDict, subject: str) -> None:
    """Raises `ValueError`, which begins with `subject`, for an empty required placeholder."""
    for key in config:
        try:
            value = config[key]
        except RequiredValueError as error:
            raise ValueError(
                f"{subject}{key} is a required placeholder; give it a value in get_config()"
            ) from error
        if isinstance(value, ml_collections.ConfigDict):
            _check_values(value, f"{subject}{key}.")


def _with_plain_values(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Copies a configuration, with numbers in place of NumPy's scalars.

    The copy of a locked or a frozen configuration can be changed.

    Raises:
        ValueError: for a value that the record cannot hold.
    """
    plain = copy.deepcopy(ml_collections.ConfigDict(config))
    plain.unlock()
    # A NumPy scalar has another type than the number that replaces it.
    with plain.ignore_type():
        for key, value in flatten(config).items():
            if not _is_json(value):
                _check_plain(key, value)
                plain.update_from_flattened_dict({key: to_tuples(value)})
    return plain


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Lists the values of a configuration by dotted key: `schedule.learning_rate`."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            nested = flatten(value)
            values |= {f"{key}.{name}": leaf for name, leaf in nested.items()}
        else:
            values[key] = value
    return values


def expand_paths(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Copies a configuration, with "~" at the start of a string as the home folder."""
    expanded = copy.deepcopy(config)
    for key, value in flatten(config).items():
        if isinstance(value, str) and value.startswith("~"):
            expanded.update_from_flattened_dict({key: os.path.expanduser(value)})
    return expanded


def override(
    config: ml_collections.ConfigDict, changes: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """Copies a configuration and changes the values of some dotted keys.

    Raises:
        ValueError: for an unknown key and for a value of another type.
    """
    changed = copy.deepcopy(config)
    known = flatten(config)
    for key, value in changes.items():
        _check_key(key, known, _OPEN_SECTION in config)
        _check_type(key, value, known)
        try:
            changed.update_from_flattened_dict({key: to_tuples(value)})
        except (TypeError, ValueError) as error:
            expected = type(known.get(key)).__name__
            raise ValueError(f"{key}={value!r} is not of the type {expected}") from error
    return expand_paths(changed)


def without_later(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out keys that change nothing and that no version had that hashed all keys.

    Its digests of a configuration are then those of these versions, in the names of folders.
    """
    return {key: value for key, value in keys.items() if key not in _LATER or value != _LATER[key]}


def to_tuples(value: Any) -> Any:
    """Turns a list, and the lists inside it, into tuples: a network's fields are hashed.

    NumPy's scalars become numbers, which JSON can hold.
    """
    # Subclasses stay as they are: a named tuple keeps its names.
    if type(value) in (list, tuple):
        return tuple(to_tuples(element) for element in value)
    # Without an import of NumPy, which --help would wait for.
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def check_keys(
    config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict, origin: str
) -> None:
    """Checks that a configuration has the keys and types of the defaults.

    Args:
        config: the configuration.
        defaults: a configuration with all keys.
        origin: the module of the defaults, for the error.

    Raises:
        ValueError: for an unknown key, a value of another type, or a key that is absent.
    """
    known = flatten(defaults)
    for key, value in flatten(config).items():
        _check_key(key, known, _OPEN_SECTION in defaults)
        _check_type(key, value, known)
    if missing := [key for key in defaults if key not in config]:
        raise ValueError(
            f"the configuration lacks the key {missing[0]}; start from {origin}.get_config()"
        )


def check_seed(config: ml_collections.ConfigDict) -> None:
    """Raises `ValueError` for a seed that jax's random keys cannot take."""
    if not 0 <= config.seed <= LARGEST_SEED:
        raise ValueError(
            f"seed={config.seed} is not a number of at least 0 and at most {LARGEST_SEED}"
        )


def check_least(key: str, value: Any, least: float) -> None:
    """Raises `ValueError` for a value that is not a finite number of at least `least`."""
    if value == math.inf:
        raise ValueError(f"{key}={value!r} is not a finite number")
    if not is_number(value) or value < least:
        raise ValueError(f"{key}={value!r} is not a number of at least {least}")


def is_number(value: Any) -> bool:
    """Tells whether a value is a finite number; True and False are not."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Tells whether a value is a whole number; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_names(config: ml_collections.ConfigDict, keys: Iterable[str]) -> None:
    """Raises `ValueError` if a tuple of names holds anything but strings."""
    for key in keys:
        for name in config[key]:
            if not isinstance(name, str):
                raise ValueError(f"{key}={name!r} is not a name; {key} accepts a tuple of strings")


def parse_overrides(config: ml_collections.ConfigDict, arguments: Iterable[str]) -> dict[str, Any]:
    """Parses `--config.KEY=VALUE` and `--config.KEY VALUE` into changes by dotted key.

    Args:
        config: the configuration to change; a value is read as the type that its key has here.
        arguments: the arguments of the command line.

    Raises:
        ValueError: for any other argument, and for a key without a value.
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
    """Parses the value of a key on the command line; a value that is no literal is text."""
    if isinstance(current, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if isinstance(current, bool) and text in ("0", "1"):
        return text == "1"
    value: Any = text
    if isinstance(current, float):
        # `float` accepts "inf", too, which is no literal of Python.
        with contextlib.suppress(ValueError):
            value = float(text)
    else:
        value = parse_literal(text)
    if isinstance(current, tuple) and not isinstance(value, (tuple, list)):
        # Text such as "(nan, 1)" looks like a tuple but is no literal. Where numbers are expected,
        # it stays text, which is refused later.
        looks_like_tuple = isinstance(value, str) and value.startswith(("(", "["))
        if looks_like_tuple and any(is_number(element) for element in current):
            return value
        return (value,)
    return value


def parse_literal(text: str) -> Any:
    """Parses a literal of Python; other text is returned as it is."""
    try:
        return ast.literal_eval(text)
    # Sets such as {[1]} raise `TypeError`; literals nested too deeply raise the last two.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _is_open(key: str) -> bool:
    """Tells whether a key is a network's field; keys inside a field are not."""
    section, _, field = key.partition(".")
    return section == _OPEN_SECTION and field.isidentifier()


def _check_key(key: str, known: Mapping[str, Any], has_open_section: bool) -> None:
    if key not in known and not (has_open_section and _is_open(key)):
        raise ValueError(_describe_unknown(key, known))


def _check_type(key: str, value: Any, known: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a value of another type than the known one.

    ml_collections itself accepts None for any type and True for 1.
    """
    _check_plain(key, value)
    if not _is_open(key) and not _has_type_of(value, known[key]):
        expected = type(known[key]).__name__
        raise ValueError(f"{key}={value!r} is not of the type {expected}")


def _check_plain(key: str, value: Any) -> None:
    """Raises `ValueError` for a value that the record, which is JSON, cannot hold."""
    if isinstance(value, Mapping) or not _is_json(to_tuples(value)):
        raise ValueError(f"{key}={value!r} is not a string, a number, or a tuple of them")


def _is_json(value: Any) -> bool:
    """Tells whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _has_type_of(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if isinstance(default, bool) != isinstance(value, bool):
        return False
    if isinstance(default, int):
        return isinstance(value, numbers.Integral)
    if isinstance(default, float):
        return isinstance(value, numbers.Real)
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list))
    return isinstance(value, type(default))


def _describe_unknown(key: str, known: Mapping[str, Any]) -> str:
    # By similarity alone, "padding" would suggest any short key before model_fields.padding.
    near = [name for name in known if name.endswith(f".{key}")]
    if not near:
        near = difflib.get_close_matches(key, known, n=1)
    if near:
        advice = f"did you mean {' or '.join(near)}?"
    else:
        advice = f"its keys are {', '.join(known)}"
    return f"{key} is not a key of the configuration; {advice}"
