"""Transfer: which part of a network is taken from another one, which is frozen, and what a linear readout makes of its features.

A part is named by a stage ("layer2" is what that stage adds to the one before, "logits" what follows the last) or by a shell
pattern on torchvision's names of the parameters (`features.*`, `*.bias`). BatchNorm's statistics go with its parameters. The head
is what depends on the number of classes; of another network it is taken only where it is named.
"""

import fnmatch
import functools
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Integer

from cnnjax import ridge, weights
from cnnjax.models import Network
from cnnjax.nn import BatchNorm
from cnnjax.runtime import workdir

WEIGHTS = "weights.safetensors"  # what a training run leaves in its work directory
STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0)


# ------------------------------------------------------------------ parts of a network, as paths in its tree of variables

_shapes = functools.lru_cache(maxsize=64)(weights.variable_shapes)


@functools.lru_cache(maxsize=64)
def stage_paths(model: Network) -> dict[str, frozenset[tuple[str, ...]]]:
    """Of every stage, and of "logits", the paths of the parameters that it adds to the stages before it; nothing is computed."""
    model, image = (
        model.clone(padding="zeros"),
        jax.ShapeDtypeStruct((1, *model.input_shape), np.float32),
    )
    run = lambda **options: jax.eval_shape(
        functools.partial(model.init_with_output, method="stages", **options),
        jax.random.key(0),
        image,
    )
    maps, everything = run()
    found: dict[str, frozenset[tuple[str, ...]]] = {}
    seen: set[tuple[str, ...]] = set()
    for name in [*maps, "logits"]:
        variables = run(last=name)[1] if name in maps else everything
        paths = {("params", *path) for path in flatten_dict(variables.get("params", {}))}
        found[name], seen = frozenset(paths - seen), seen | paths
    return found


def _with_statistics(model: Network, chosen: set[tuple[str, ...]]) -> frozenset[tuple[str, ...]]:
    """Parameters' paths, and those of the statistics of every BatchNorm whose parameters are all among them."""
    everything = flatten_dict(_shapes(model))
    layers = {path[1:-1] for path in chosen}
    layers -= {path[1:-1] for path in everything if path[0] == "params" and path not in chosen}
    return frozenset(
        chosen | {path for path in everything if path[0] == "batch_stats" and path[1:-1] in layers}
    )


@functools.lru_cache(maxsize=256)
def select(
    model: Network, parts: tuple[str, ...], argument: str = "parts"
) -> frozenset[tuple[str, ...]]:
    """The paths of the named parts' variables. Raises `ValueError`, naming `argument`, for a part that there is none of."""
    if not parts:
        return frozenset()
    keys = {
        key: path
        for key, path in weights.torchvision_keys(_shapes(model)).items()
        if path[0] == "params"
    }
    chosen: set[tuple[str, ...]] = set()
    for part in parts:
        found = stage_paths(model).get(part) or {keys[key] for key in fnmatch.filter(keys, part)}
        if not found:
            raise ValueError(
                f"{argument}={part!r} names no parameters of the model; it accepts stages, {', '.join(stage_paths(model))}, "
                f"and patterns of names such as {min(keys)}"
            )
        chosen |= found
    return _with_statistics(model, chosen)


@functools.lru_cache(maxsize=64)
def head(model: Network) -> frozenset[tuple[str, ...]]:
    """The paths of the variables whose shape depends on the number of classes, auxiliary classifiers among them."""
    one, two = (flatten_dict(_shapes(model.clone(num_classes=count))) for count in (1, 2))
    return frozenset(path for path in one if one[path].shape != two[path].shape)


def split(
    tree: dict, paths: frozenset[tuple[str, ...]], collection: str = "params"
) -> tuple[dict, dict]:
    """Divides a collection's tree into (what is not in `paths`, what is)."""
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in flatten_dict(tree).items():
        parts[(collection, *path) in paths][path] = leaf
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def merge(*trees: Mapping) -> dict:
    """Joins trees; where two have a leaf, the later one's counts."""
    return unflatten_dict(
        {path: leaf for tree in trees for path, leaf in flatten_dict(tree).items()}
    )


def in_evaluation_mode(frozen: frozenset[tuple[str, ...]]) -> Callable:
    """For `flax.linen.intercept_methods`: the BatchNorms whose statistics are in `frozen` normalize by them, and leave them as they are."""

    def intercept(call, arguments, options, context):
        if (
            isinstance(context.module, BatchNorm)
            and ("batch_stats", *context.module.path, "mean") in frozen
        ):
            return call(arguments[0])
        return call(*arguments, **options)

    return intercept


# ------------------------------------------------------------------ from another network


def weights_file(path: str | os.PathLike) -> pathlib.Path:
    """A safetensors file itself, or that of a training run's work directory. Raises `ValueError` if there is none."""
    file = pathlib.Path(path) / WEIGHTS if pathlib.Path(path).is_dir() else pathlib.Path(path)
    if not file.is_file():
        raise ValueError(
            f"initial_weights={str(path)!r} is neither a safetensors file nor the work directory of a finished training run"
        )
    if file != pathlib.Path(path):
        workdir.check_seal(pathlib.Path(path))
    return file


def take(path: str | os.PathLike, model: Network, parts: tuple[str, ...] = ()) -> dict:
    """Reads parts of a network, by default all but its head, from a file or a run -> those of its variables, host arrays.

    The file may be of another number of classes and lack modules that are not taken, but nothing in it may be foreign to the
    model. Raises `ValueError` where something that is to be taken is absent or of another shape.
    """
    file, shapes = weights_file(path), flatten_dict(_shapes(model))
    chosen = (
        select(model, tuple(parts), "initial_parts") if parts else frozenset(shapes) - head(model)
    )
    keys, held = weights.torchvision_keys(_shapes(model)), weights.read(file)
    modules = lambda names: {name.split(".")[0] for name in names}
    classes = next(
        (len(held[key]) for key in sorted(keys) if key in held and keys[key] in head(model)),
        model.num_classes,
    )
    loaded = flatten_dict(
        weights.load_torchvision(
            file, model.clone(num_classes=classes), sorted(modules(keys) - modules(held))
        )
    )
    for key in sorted(keys):
        if keys[key] in chosen and (
            keys[key] not in loaded or loaded[keys[key]].shape != shapes[keys[key]].shape
        ):
            state = f"of {classes} classes" if keys[key] in loaded else "absent"
            raise ValueError(
                f"initial_weights={str(path)!r}: {key} is {state} there; name what is to be taken in initial_parts, such as "
                f"{next(iter(stage_paths(model)))!r}"
            )
    return unflatten_dict({path: loaded[path] for path in chosen})


# ------------------------------------------------------------------ frozen features


def linear_probe(
    train: Float[np.ndarray, "n features"],
    labels: Integer[np.ndarray, " n"],
    test: Float[np.ndarray, "m features"],
    test_labels: Integer[np.ndarray, " m"],
) -> tuple[float, float]:
    """Fits a linear classifier to features by ridge regression.

    The targets are one-hot labels; the solution is exact. The last fifth of the training features
    chooses a strength from `STRENGTHS`, then all of them are fitted with it. Returns the test
    accuracy and the strength.
    """
    train = train.astype(np.float64)
    test = test.astype(np.float64)
    targets = np.eye(int(labels.max()) + 1)[labels]

    def predict(count: int, strengths: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """Classes [strengths, n] of inputs, by classifiers fitted to the first `count` examples."""
        scaler = ridge.fit_scaler(train[:count])
        x = scaler(train[:count])
        mean = targets[:count].mean(0)
        weights = ridge.solve(ridge.factor(x.T @ x), x.T @ (targets[:count] - mean), strengths)
        return (scaler(inputs) @ weights + mean).argmax(-1)

    fitted = len(train) * 4 // 5
    held_out = predict(fitted, np.array(STRENGTHS), train[fitted:])
    accuracies = (held_out == labels[fitted:]).mean(1)
    strength = STRENGTHS[accuracies.argmax()]
    predicted = predict(len(train), np.array([strength]), test)
    return float((predicted == test_labels).mean()), strength
