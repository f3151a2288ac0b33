"""Variables as torchvision's state dict: one mapping for every network.

A model's parameter tree *is* torchvision's state dict with other leaf names and axes. The mapping
is mechanical and checked: the path joined with dots is the key; `kernel` and `scale` are called
weight, `mean` and `var` running_mean and running_var, and other leaves keep their names. Kernels
[height, width, in, out] are stored as [out, in, height, width], dense kernels transposed, and other
leaves as they are.
"""

import contextlib
import functools
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from cnnjax.models import Network
from cnnjax.nn.parameters import eval_shape
from cnnjax.runtime.paths import expand_user
from cnnjax.weights import files, records

Path = tuple[str, ...]  # of a variable in a network's tree

# By collection, torchvision's names of leaves. Others keep their own, such as those that a user's
# network gives to `self.param`.
_LEAVES = {
    "params": {"kernel": "weight", "scale": "weight"},
    "batch_stats": {"mean": "running_mean", "var": "running_var"},
}
# Heads that only training uses (GoogLeNet's and Inception's). Files hold them; a network built
# with `aux_logits=False` does not.
AUXILIARY = ("aux1", "aux2", "AuxLogits")
_MOST_PROBLEMS = 5  # problems that an error names


def torchvision_keys(variables: dict) -> dict[str, Path]:
    """Maps torchvision's keys to paths in the tree of variables.

    A path is a tuple such as ("params", "conv1", "kernel").

    Raises `ValueError` if two parameters have one key.
    """
    collections = {name: variables.get(name, {}) for name in _LEAVES}
    keys: dict[str, Path] = {}
    for path in flax.traverse_util.flatten_dict(collections):
        leaf = _LEAVES[path[0]].get(path[-1], path[-1])
        key = ".".join((*path[1:-1], leaf))
        if key in keys:
            raise ValueError(
                f"the parameters {'/'.join(keys[key])} and {'/'.join(path)} are both {key} in "
                "weights files; rename one of them"
            )
        keys[key] = path
    return keys


def _axes(path: Path, rank: int) -> tuple[int, ...]:
    """Returns torchvision's axes of the tensor at a path, in terms of ours."""
    kernels = {4: (3, 2, 0, 1), 2: (1, 0)}
    unchanged = tuple(range(rank))
    return kernels.get(rank, unchanged) if path[-1] == "kernel" else unchanged


def _torchvision_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _axes(path, len(shape)))


def _to_torchvision(path: Path, array: np.ndarray) -> np.ndarray:
    # `ascontiguousarray` would turn a scalar into a vector.
    return np.asarray(array.transpose(_axes(path, array.ndim)), order="C")


def _to_ours(path: Path, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Copies `array`, reshaped to torchvision's `shape`, into our axes as float32."""
    axes = np.argsort(_axes(path, len(shape)))
    # Always a copy: the array may be a view of a mapped file.
    return np.array(array.reshape(shape).transpose(axes), np.float32, order="C")


def fits(file_shape: tuple[int, ...], model_shape: tuple[int, ...]) -> bool:
    """Tells whether a tensor of `file_shape` can fill torchvision's `model_shape`.

    A convolution over the whole map fills the dense layer of the same numbers, as timm stores VGG.
    """
    if len(file_shape) == 4 and len(model_shape) == 2:
        return (file_shape[0], int(np.prod(file_shape[1:]))) == model_shape
    return file_shape == model_shape


def variable_shapes(model: Network) -> dict:
    """Returns the shapes of a model's variables at its own image size.

    Nothing is computed. Only the padding policies `none` and `full` change shapes, and only those
    of a dense layer on a flattened map (LeNet's). Deep networks have no pixel left at their own
    image size under `none`; their parameters do not depend on the padding.
    """
    # A copy, since callers may change their own.
    return jax.tree.map(lambda leaf: leaf, _variable_shapes(model))


# Tracing a deep network takes seconds, and one command asks several times.
@functools.lru_cache(maxsize=64)
def _variable_shapes(model: Network) -> dict:
    image = jax.ShapeDtypeStruct((1, *model.input_shape), np.float32)
    trace = lambda: eval_shape(model.init, jax.random.key(0), image)
    if model.padding == "zeros":
        return trace()
    if model.padding in ("none", "full"):
        with contextlib.suppress(ValueError):
            return trace()
    return _variable_shapes(model.clone(padding="zeros"))


@functools.lru_cache(maxsize=64)
def head(model: Network) -> frozenset[Path]:
    """Returns the paths of the variables whose shape depends on the number of classes.

    A path is a tuple such as ("params", "fc", "kernel"). Auxiliary classifiers are among them.
    """
    # Any other number of classes; the shapes of the model's own are needed elsewhere, too.
    other = model.clone(num_classes=1 if model.num_classes > 1 else 2)
    shapes = flax.traverse_util.flatten_dict(variable_shapes(model))
    others = flax.traverse_util.flatten_dict(variable_shapes(other))
    return frozenset(path for path in shapes if shapes[path].shape != others[path].shape)


def _check_missing(missing: Sequence[str], keys: dict[str, Path]) -> None:
    modules = {key.split(".")[0] for key in keys}
    if unknown := set(missing) - modules - set(keys):
        raise ValueError(
            f"missing={sorted(unknown)} are not modules of this model; "
            f"its modules are {', '.join(sorted(modules))}"
        )


class _Misfits(NamedTuple):
    """The tensors that do not fit, by torchvision's keys.

    Attributes:
      absent: those of the model that the file lacks.
      foreign: those of the file that the model lacks.
      misshapen: those whose shapes differ.
    """

    absent: list[str]
    foreign: list[str]
    misshapen: list[str]


def _misfits(tensors: files.StateDict, wanted: dict[str, tuple[int, ...]]) -> _Misfits:
    """Compares a file with the shapes that a model needs."""
    return _Misfits(
        absent=[key for key in wanted if key not in tensors],
        foreign=[key for key in tensors if key not in wanted],
        misshapen=[
            key for key in wanted if key in tensors and not fits(tensors[key].shape, wanted[key])
        ],
    )


def _describe(
    misfits: _Misfits, tensors: files.StateDict, wanted: dict[str, tuple[int, ...]]
) -> str:
    """Lists what does not fit by the file's own names; a long list is cut off."""
    problems = [f"not in the file: {key} {wanted[key]}" for key in misfits.absent]
    for key in misfits.foreign:
        problems.append(f"not in the model: {tensors.names[key]} {tensors[key].shape}")
    for key in misfits.misshapen:
        problems.append(
            f"of another shape: {tensors.names[key]} is {tensors[key].shape} in the file and "
            f"{wanted[key]} in the model"
        )
    listed = "; ".join(sorted(problems)[:_MOST_PROBLEMS])
    if len(problems) > _MOST_PROBLEMS:
        listed += f"; and {len(problems) - _MOST_PROBLEMS} more"
    return listed


def _advice(
    misfits: _Misfits,
    tensors: files.StateDict,
    wanted: dict[str, tuple[int, ...]],
    model: Network,
    missing: Collection[str],
) -> str:
    """Returns advice about a file that does not fit."""
    if tensors and wanted and not set(tensors) & set(wanted):
        example = tensors.names[min(tensors)]
        return (
            f"none of the file's names is one of the model's; the file's are like {example}, the "
            f"model's like {min(wanted)}: choose the network of the file, or rename its tensors, "
            "which cnnjax.weights.read returns"
        )
    if misfits.foreign:
        advice = (
            "the file holds tensors that the model lacks: it is of another network or other fields"
        )
        if any(key in missing or key.split(".")[0] in missing for key in misfits.foreign):
            advice += ", or `missing` names modules that it holds"
        return advice
    if misfits.misshapen:
        classes = None if misfits.absent else _count_classes(misfits, tensors, wanted, model)
        if classes:
            return (
                f"the file is of {classes} classes, the model of {model.num_classes}; "
                f"load_torchvision reads it into create_model(NAME, num_classes={classes})"
            )
        return "the file is of another network or other fields"
    held = {key.split(".")[0] for key in tensors}
    lacking = {key.split(".")[0] for key in misfits.absent}
    if held & lacking:
        return f"the file holds only parts of {', '.join(sorted(held & lacking))}"
    names = "".join(f"{name!r}, " for name in sorted(lacking))
    return (
        f"if the file is known to lack these modules, name them: missing=({names.strip()}) in "
        "cnnjax.weights.load_torchvision, visualize or the position study"
    )


def _count_classes(
    misfits: _Misfits, tensors: files.StateDict, wanted: dict[str, tuple[int, ...]], model: Network
) -> int | None:
    """Counts the file's classes; None if it differs in more than their number."""
    paths = torchvision_keys(variable_shapes(model))
    counts = set()
    for key in misfits.misshapen:
        found = tensors[key].shape
        # torchvision's first axis is the output's.
        if not found or not fits(found, (found[0], *wanted[key][1:])):
            return None
        if paths[key] not in head(model):
            return None
        counts.add(found[0])
    return counts.pop() if len(counts) == 1 else None


def _check_values(key: str, value: np.ndarray) -> None:
    """Raises `ValueError` if a trained network cannot have such values."""
    if not value.size:
        return
    least = value.min()  # NaN if any value is
    greatest = value.max()
    if not (np.isfinite(least) and np.isfinite(greatest)):
        raise ValueError(
            f"{key} holds values that are not finite; the training diverged, or the file is damaged"
        )
    if key.endswith("running_var") and least < 0:
        raise ValueError(f"{key} holds a negative variance, {least:g}; the file is damaged")


def load_torchvision(
    path: str | os.PathLike,
    model: Network,
    missing: Sequence[str] = (),
    argument: str = "weights",
) -> dict:
    """Reads a file with torchvision's names into a model's variables.

    The file is safetensors or .pth. Every tensor must be used, every parameter filled, every shape
    right and every value finite. Auxiliary heads in the file are ignored if the model is built with
    `aux_logits=False`. Under the padding policies `none` and `full`, a file saved under `zeros` is
    accepted as well: its dense layers then keep the shapes of the file.

    Args:
      path: the file; `~` is expanded. See `read` for the names that are understood.
      model: the network.
      missing: top-level modules, such as ("layer4", "fc"), and complete names of tensors, such as
        "classifier.6.bias", that the file is known not to hold; the result lacks them.
      argument: what errors call `path`.

    Returns {"params": ..., "batch_stats": ...}, float32 host arrays: NumPy's. Before many calls,
    copy them to the device with `jax.device_put`; otherwise, every call does.

    Raises `FileNotFoundError` if there is no such file, and `ValueError` if it does not fit, or if
    it is known to need another `transform_input` than the model has.
    """
    if isinstance(missing, str):
        missing = (missing,)
    _check_missing(missing, torchvision_keys(variable_shapes(model)))
    tensors = read_for(model, path, argument)
    return fill(model, tensors, missing, path, argument)


def read_for(model: Network, path: str | os.PathLike, argument: str) -> files.StateDict:
    """Reads a file's tensors, without auxiliary heads that the model was built without.

    The names of the model stay as they are. Arguments and errors are those of `load_torchvision`.
    """
    tensors = files.read(path, torchvision_keys(variable_shapes(model)), argument)
    is_transformed = getattr(model, "transform_input", None)
    # Most networks take every input as it is.
    if is_transformed is not None:
        was_transformed = records.transforms_input(path)
        if was_transformed is not None and was_transformed != is_transformed:
            raise ValueError(
                f"{argument}={str(path)!r} needs a model with transform_input={was_transformed} "
                "(in configurations, model_fields.transform_input)"
            )
    if not getattr(model, "aux_logits", True):
        tensors = tensors.without(AUXILIARY)
    return tensors


def fill(
    model: Network,
    tensors: files.StateDict,
    missing: Collection[str],
    path: str | os.PathLike,
    argument: str,
) -> dict:
    """Turns a file's tensors into a model's variables.

    `path` and `argument` name the file in errors. Otherwise as `load_torchvision`.
    """
    keys = torchvision_keys(variable_shapes(model))
    try:
        shapes = _fitting_shapes(tensors, model, missing)
    except ValueError as error:
        raise ValueError(f"{argument}={str(path)!r} does not fit the model {error}") from error
    loaded = {}
    for key, shape in shapes.items():
        value = _to_ours(keys[key], tensors[key], shape)
        try:
            _check_values(tensors.names[key], value)
        except ValueError as error:
            raise ValueError(f"{argument}={str(path)!r}: {error}") from error
        loaded[keys[key]] = value
    return nested(loaded)


def nested(flat: dict[Path, Any]) -> dict:
    """Returns the tree of variables by their paths; both collections are there, if only empty."""
    return {"params": {}, "batch_stats": {}, **flax.traverse_util.unflatten_dict(flat)}


def _fitting_shapes(
    tensors: files.StateDict, model: Network, missing: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Maps the keys to read to torchvision's shapes.

    Raises `ValueError` if the file does not fit, naming all that does not fit.
    """
    wanted = wanted_shapes(variable_shapes(model), missing)
    misfits = _misfits(tensors, wanted)
    if not any(misfits):
        return wanted
    if model.padding in ("none", "full"):
        padded = wanted_shapes(variable_shapes(model.clone(padding="zeros")), missing)
        if not any(_misfits(tensors, padded)):
            return padded
    advice = _advice(misfits, tensors, wanted, model, missing)
    raise ValueError(f"({advice}): {_describe(misfits, tensors, wanted)}")


def wanted_shapes(shapes: dict, missing: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Maps the keys that a file must hold to torchvision's shapes."""
    flat = flax.traverse_util.flatten_dict(shapes)
    wanted = {}
    for key, path in torchvision_keys(shapes).items():
        if key not in missing and key.split(".")[0] not in missing:
            wanted[key] = _torchvision_shape(path, flat[path].shape)
    return wanted


def save_torchvision(variables: dict, path: str | os.PathLike) -> None:
    """Writes variables to a file that torchvision's `load_state_dict` accepts.

    A name that ends in .pth or .pt gives the format of `torch.save`, which `torch.load` reads with
    `weights_only=True`; any other name gives safetensors. torchvision takes both for every network
    except MNASNet, whose loader needs the version that only .pth carries. Tensors are float32, and
    BatchNorm's counters of batches are 0. The file appears whole or not at all.

    Args:
      variables: {"params": ..., "batch_stats": ...}, or one of the two.
      path: the file; `~` is expanded.

    Raises `ValueError` if there are variables of other collections, which the file cannot hold, or
    two parameters have one key.
    """
    if others := sorted(variables.keys() - _LEAVES.keys()):
        listed = ", ".join(map(repr, others[:_MOST_PROBLEMS]))
        more = ", ..." if len(others) > _MOST_PROBLEMS else ""
        raise ValueError(
            f"variables has {listed}{more}; expected the collections "
            f"{', '.join(map(repr, _LEAVES))} only"
        )
    flat = flax.traverse_util.flatten_dict(variables)
    tensors = {}
    for key, path_in_tree in torchvision_keys(variables).items():
        array = np.asarray(flat[path_in_tree], np.float32)
        tensors[key] = _to_torchvision(path_in_tree, array)
    for key in [key for key in tensors if key.endswith("running_mean")]:
        tensors[key.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    files.write(tensors, expand_user(path))
