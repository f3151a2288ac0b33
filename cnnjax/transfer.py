"""Transfer: starting from another network's weights, freezing parts, linear readouts of features.

A part is named by a stage or by a shell pattern on torchvision's names of the parameters, such as
`features.*` or `*.bias`. A stage name means the parameters between the previous stage and this one;
"logits" means those after the last stage. BatchNorm's statistics go with its parameters. The head
is every variable whose shape depends on the number of classes; it is loaded only if it is named.
"""

import fnmatch
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Integer

from cnnjax import ridge, weights
from cnnjax.data import splits
from cnnjax.models import Network
from cnnjax.nn import BatchNorm
from cnnjax.nn.parameters import eval_shape
from cnnjax.runtime import workdir
from cnnjax.runtime.paths import expand_user
from cnnjax.weights import records
from cnnjax.weights.files import StateDict
from cnnjax.weights.torchvision import AUXILIARY, Path, fill, fits, read_for, wanted_shapes

WEIGHTS = records.WEIGHTS
STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0)


# ------------------------------------------------------------------ parts of a network


@functools.lru_cache(maxsize=64)
def stage_paths(model: Network) -> dict[str, frozenset[Path]]:
    """Returns the paths of the parameters that each stage adds to the stages before it.

    A path is a tuple such as ("params", "conv1", "kernel"). "logits" is the last stage. It includes
    the auxiliary classifiers, which are heads too. Nothing is computed.
    """
    model = model.clone(padding="zeros")
    image = jax.ShapeDtypeStruct((1, *model.input_shape), np.float32)
    init = functools.partial(model.init_with_output, method="stages")
    stages, _ = eval_shape(init, jax.random.key(0), image)
    added: dict[str, frozenset[Path]] = {}
    seen: set[Path] = set()

    def run(network: Network, image: jax.Array) -> None:
        """Runs the network and records the parameters that exist by the end of each stage."""

        def record(name, y=None):
            """Records what has been added by the end of a stage, and returns the stage's map."""
            params = flatten_dict(network.variables.get("params", {}))
            heads = () if name == "logits" else AUXILIARY
            paths = {("params", *path) for path in params if path[0] not in heads}
            added[name] = frozenset(paths - seen)
            seen.update(paths)
            return y

        network(image, replace={name: functools.partial(record, name) for name in stages})
        record("logits")

    eval_shape(nn.init(run, model), jax.random.key(0), image)
    return added


def _with_statistics(model: Network, selected: set[Path]) -> frozenset[Path]:
    """Adds the statistics of every BatchNorm whose parameters are all selected."""
    # A path is a collection, the names of modules, and the name of the array.
    variables = flatten_dict(weights.variable_shapes(model))
    params = {path for path in variables if path[0] == "params"}
    layers = {path[1:-1] for path in selected}
    incomplete_layers = {path[1:-1] for path in params - selected}
    statistics = {
        path
        for path in variables
        if path[0] == "batch_stats" and path[1:-1] in layers - incomplete_layers
    }
    return frozenset(selected | statistics)


def select(model: Network, parts: str | Sequence[str], argument: str = "parts") -> frozenset[Path]:
    """Returns the paths of the named parts' variables.

    A path is a tuple such as ("params", "conv1", "kernel").

    Args:
      model: the network.
      parts: stages, or patterns of torchvision's names, or a single one.
      argument: the name of the argument that lists the parts, for the error.

    Raises:
      ValueError: if a part matches no parameter.
    """
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    return _select(model, parts, argument)


@functools.lru_cache(maxsize=256)
def _select(model: Network, parts: tuple[str, ...], argument: str) -> frozenset[Path]:
    if not parts:
        return frozenset()
    keys = {
        key: path
        for key, path in weights.torchvision_keys(weights.variable_shapes(model)).items()
        if path[0] == "params"
    }
    stages = stage_paths(model)
    selected: set[Path] = set()
    for part in parts:
        matches = stages.get(part) or {keys[key] for key in fnmatch.filter(keys, part)}
        if not matches:
            raise ValueError(
                f"{argument}={part!r} names no parameters of the model; it accepts stages, "
                f"{', '.join(stages)}, and patterns of names such as {min(keys)}"
            )
        selected |= matches
    return _with_statistics(model, selected)


def split(tree: dict, paths: frozenset[Path], collection: str = "params") -> tuple[dict, dict]:
    """Splits a collection's tree into (leaves outside `paths`, leaves in `paths`)."""
    outside: dict = {}
    inside: dict = {}
    for path, leaf in flatten_dict(tree).items():
        part = inside if (collection, *path) in paths else outside
        part[path] = leaf
    return unflatten_dict(outside), unflatten_dict(inside)


def merge(*trees: Mapping) -> dict:
    """Joins trees; where several have a leaf, that of the last tree is used."""
    merged: dict = {}
    for tree in trees:
        merged |= flatten_dict(tree)
    return unflatten_dict(merged)


def in_evaluation_mode(frozen: frozenset[Path]) -> Callable:
    """Returns an interceptor for `flax.linen.intercept_methods` that freezes BatchNorms.

    A BatchNorm whose statistics are in `frozen` normalizes by them and leaves them unchanged.
    """

    def intercept(call, arguments, options, context):
        module = context.module
        is_norm = isinstance(module, BatchNorm)
        if is_norm and ("batch_stats", *module.path, "mean") in frozen:
            # Without `train`, that is in evaluation mode.
            return call(arguments[0])
        return call(*arguments, **options)

    return intercept


@functools.lru_cache(maxsize=64)
def check_statistics(model: Network, purpose: str) -> None:
    """Checks that `cnnjax.nn.BatchNorm` alone keeps statistics in a network.

    No other normalization can be frozen or have its statistics estimated anew.

    Args:
      model: the network.
      purpose: what needs this, for the error.

    Raises:
      ValueError: if another module keeps statistics.
    """
    batch_norms = set()

    def record(call, arguments, options, context):
        if isinstance(context.module, BatchNorm):
            batch_norms.add(context.module.path)
        return call(*arguments, **options)

    # A function of its own: jax would not trace `model.init` a second time.
    def init(key, image):
        return model.clone(padding="zeros").init(key, image)

    image = jax.ShapeDtypeStruct((1, *model.input_shape), np.float32)
    with nn.intercept_methods(record):
        variables = eval_shape(init, jax.random.key(0), image)
    with_statistics = {path[:-1] for path in flatten_dict(variables.get("batch_stats", {}))}
    if others := sorted(".".join(path) for path in with_statistics - batch_norms):
        raise ValueError(
            f"{purpose} needs BatchNorm to be cnnjax.nn.BatchNorm; in {type(model).__name__}, "
            f"other modules keep statistics: {', '.join(others)}"
        )


# ------------------------------------------------------------------ from another network


def weights_file(path: str | os.PathLike, argument: str = "initial_weights") -> pathlib.Path:
    """Finds the file of initial weights.

    Args:
      path: a weights file, or the work directory of a finished training run or of a
        combination that is one network; `~` is expanded.
      argument: the name of the argument that gives the path, for the error.

    Raises:
      ValueError: if there is no such file, or if a file of the run has changed since.
    """
    place = expand_user(path)
    file = place / WEIGHTS if place.is_dir() else place
    # A run that is being extended has the weights of its earlier end, and no results.
    is_unfinished = place.is_dir() and not (place / "results.json").is_file()
    if is_unfinished or not file.is_file():
        raise ValueError(
            f"{argument}={str(path)!r} is neither a safetensors or .pth file nor the work "
            "directory of a finished training run or of a combination that is one network"
        )
    if place.is_dir():
        workdir.check_seal(place)
    return file


def load_initial_weights(
    path: str | os.PathLike, model: Network, parts: str | Sequence[str] = ()
) -> dict:
    """Loads parts of a network from a weights file or a training run.

    Parameters that are not loaded may have another shape in the file, or be absent. Only if `parts`
    are named may the file hold what the model lacks.

    Args:
      path: as in `weights_file`.
      model: the network.
      parts: as in `select`; by default all but the head.

    Returns:
      The variables of the parts, host arrays.

    Raises:
      ValueError: if the file lacks one of these variables or has it in another shape, if it holds
        what the model lacks, if it is known to need another `transform_input` than the model has,
        or if a part matches nothing.
    """
    file = weights_file(path)
    shapes = weights.variable_shapes(model)
    keys = weights.torchvision_keys(shapes)
    if parts:
        selected = select(model, parts, "initial_parts")
    else:
        selected = frozenset(flatten_dict(shapes)) - weights.head(model)
    not_loaded = {key for key, variable in keys.items() if variable not in selected}
    tensors = read_for(model, file, "initial_weights")
    # Of a file that holds what the model lacks, only parts that are named are taken: without them,
    # `fill` refuses it as a file of another network.
    considered = keys.keys() if parts else tensors.keys()
    loaded = {key: tensors[key] for key in tensors if key in considered and key not in not_loaded}
    wanted = wanted_shapes(shapes, not_loaded)
    foreign = loaded.keys() - keys.keys()
    if foreign:
        problem = _foreign_head(model, tensors, foreign)
    else:
        problem = _misfit(model, tensors, wanted)
    if problem:
        # If nothing fits, `fill` refuses the file.
        fitting = _fitting_parts(model, tensors, wanted)
        if fitting:
            raise ValueError(
                f"initial_weights={str(path)!r}: {problem}; name what is to be taken in "
                f"initial_parts, such as {fitting}"
            )
    selected_tensors = StateDict(loaded, tensors.names)
    return fill(model, selected_tensors, not_loaded, path=file, argument="initial_weights")


def _foreign_head(model: Network, tensors: StateDict, foreign: Collection[str]) -> str:
    """Describes another head in a file; empty if what the model lacks is not only that.

    Args:
      model: the network.
      tensors: those of the file.
      foreign: the keys of the file that the model lacks.
    """
    keys = weights.torchvision_keys(weights.variable_shapes(model))
    heads = {key.split(".")[0] for key, path in keys.items() if path in weights.head(model)}
    if not {key.split(".")[0] for key in foreign} <= heads:
        return ""
    return f"its head is another one, with {tensors.names[min(foreign)]}"


def _misfit(model: Network, tensors: StateDict, wanted: Mapping[str, tuple[int, ...]]) -> str:
    """Describes a wanted tensor that a file lacks or has in another shape; empty if all fit."""
    keys = weights.torchvision_keys(weights.variable_shapes(model))
    channels = model.input_shape[2]
    for key, shape in sorted(wanted.items()):
        if key not in tensors:
            return f"{key} is absent there"
        file_shape = tensors[key].shape
        if fits(file_shape, shape):
            continue
        # The first axis of a head's tensors has the length of the number of classes.
        if keys[key] in weights.head(model) and file_shape and file_shape[0] != shape[0]:
            return f"{key} is of {file_shape[0]} classes there"
        problem = f"{key} is of another shape there, {file_shape} instead of {shape}"
        # The second axis of a kernel has the length of the number of its input's channels.
        if len(file_shape) == 4 and shape == (file_shape[0], channels, *file_shape[2:]):
            problem += f", since its images have {file_shape[1]} channels and not {channels}"
        return problem
    return ""


def _fitting_parts(
    model: Network, tensors: StateDict, wanted: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Returns the wanted stages that fit; if there are none, the first parameter that fits."""
    keys = weights.torchvision_keys(weights.variable_shapes(model))
    fitting = {
        key for key, shape in wanted.items() if key in tensors and fits(tensors[key].shape, shape)
    }
    paths = {keys[key] for key in fitting}
    stages = [name for name, added in stage_paths(model).items() if added]
    if whole := tuple(name for name in stages if select(model, name) <= paths):
        return whole
    return tuple(sorted(key for key in fitting if keys[key][0] == "params")[:1])


# ------------------------------------------------------------------ frozen features


def linear_probe(
    train: Float[np.ndarray, "n features"],
    labels: Integer[np.ndarray, " n"],
    test: Float[np.ndarray, "m features"],
    test_labels: Integer[np.ndarray, " m"],
) -> tuple[float, float]:
    """Fits a linear classifier to features by ridge regression.

    The targets are one-hot labels; the solution is exact. The strength of the penalty is the one of
    1, 10, 100, 1,000, 10,000 and 100,000 (`STRENGTHS`) that is most accurate on held-out training
    examples after a fit of the others. The final fit uses all training examples.

    The last fifth is held out. If this fifth has a class that the others lack, or if the examples
    are sorted by class, it is the last fifth of each class instead, where a class with a single
    example loses none.

    Returns:
      The test accuracy and the strength.

    Raises:
      ValueError: for fewer than 5 training examples, for negative labels, or if no class has two
        examples.
    """
    if len(train) < 5:
        raise ValueError(f"train has {len(train)} examples; expected at least 5")
    n_labels = int(max(labels.max(), test_labels.max(initial=0))) + 1
    splits.check_labels(labels, n_labels, "train")
    splits.check_labels(test_labels, n_labels, "test")
    is_held_out = _hold_out(labels)
    train = train.astype(np.float64)
    test = test.astype(np.float64)
    targets = np.eye(int(labels.max()) + 1)[labels]

    def predict(is_fitted: np.ndarray, strengths: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """Fits the examples of a mask [n]; returns classes [strengths, m] of m inputs."""
        examples = train[is_fitted]
        scaler = ridge.fit_scaler(examples)
        x = scaler(examples)
        y = targets[is_fitted]
        mean = y.mean(0)
        weights = ridge.solve(ridge.factor(x.T @ x), x.T @ (y - mean), strengths)
        return (scaler(inputs) @ weights + mean).argmax(-1)

    predicted = predict(~is_held_out, np.array(STRENGTHS), train[is_held_out])
    accuracies = (predicted == labels[is_held_out]).mean(1)
    strength = STRENGTHS[accuracies.argmax()]
    predicted = predict(np.ones(len(train), bool), np.array([strength]), test)
    return float((predicted == test_labels).mean()), strength


def _hold_out(labels: np.ndarray) -> np.ndarray:
    """Chooses the examples, a mask [n], on which `linear_probe` chooses the strength."""
    classes = np.unique(labels)
    is_held_out = np.arange(len(labels)) >= len(labels) * 4 // 5
    are_all_fitted = len(np.unique(labels[~is_held_out])) == len(classes)
    is_sorted = len(classes) > 1 and np.count_nonzero(np.diff(labels)) == len(classes) - 1
    if are_all_fitted and not is_sorted:
        return is_held_out
    is_held_out[:] = False
    for label in classes:
        members = np.flatnonzero(labels == label)
        is_held_out[members[max(len(members) * 4 // 5, 1) :]] = True
    if not is_held_out.any():
        raise ValueError(
            f"labels: each of the {len(classes)} classes has one example, so none can be held out "
            "to choose the strength; expected two examples of a class at least"
        )
    return is_held_out
