"""Weights under torchvision's names, in safetensors files: no PyTorch, no pickle.

A model's parameter tree *is* torchvision's state dict with other leaf names and axes: the path joined with dots, `kernel` and
`scale` called weight, `mean` and `var` called running_mean and running_var; kernels [height, width, in, out] stored as
[out, in, height, width], dense kernels transposed. So one mechanical mapping serves every model.
"""

import os
import pathlib
from collections.abc import Sequence

import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from cnnjax.models import Network

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_TOLD = 5  # keys that an error names
# timm stores torchvision's VGG with a convolutional classifier of the same numbers.
_TIMM_VGG = {
    "pre_logits.fc1": "classifier.0",
    "pre_logits.fc2": "classifier.3",
    "head.fc": "classifier.6",
}


def torchvision_keys(variables: dict) -> dict[str, tuple]:
    """torchvision's key -> path in the tree of variables."""
    flat = flax.traverse_util.flatten_dict(
        {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    )
    return {".".join((*path[1:-1], _LEAVES[path[-1]])): path for path in flat}


def _axes(rank: int) -> tuple[int, ...]:
    """torchvision's axes of a tensor in terms of ours."""
    return {4: (3, 2, 0, 1), 2: (1, 0)}.get(rank, tuple(range(rank)))


def _to_torchvision(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(_axes(array.ndim)))


def _to_ours(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`array`, which has torchvision's `shape`, in our axes."""
    return np.ascontiguousarray(
        array.reshape(shape).transpose(np.argsort(_axes(len(shape)))), np.float32
    )


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor can fill a parameter: of its shape, or the kernel of a convolution that reads the whole map of a dense layer."""
    return found == wanted or (
        len(found) == 4 and len(wanted) == 2 and (found[0], np.prod(found[1:])) == wanted
    )


def variable_shapes(model: Network) -> dict:
    """The shapes of a model's variables as published (zero padding, its own image size), without computing anything.

    Padding changes no shape but that of a dense layer on a flattened, unpooled map (LeNet), which 'none' shrinks.
    """
    image = jax.ShapeDtypeStruct((1, *model.input_shape), np.float32)
    return jax.eval_shape(model.clone(padding="zeros").init, jax.random.key(0), image)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by torchvision's names. Raises `FileNotFoundError` or `ValueError` if it is none."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights={str(path)!r} is not a file; expected a safetensors file with torchvision's names"
        )
    try:
        tensors = safetensors.numpy.load_file(path)
        for key, value in tensors.items():
            if not key.isprintable() or value.dtype.kind == "c":
                raise ValueError(
                    f"{key!r} holds {value.dtype}; expected real numbers and a printable name"
                )
    except (
        safetensors.SafetensorError,
        KeyError,
        ValueError,
        AttributeError,
    ) as error:  # AttributeError: numbers that NumPy has not
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"weights={str(path)!r} is not a readable safetensors file ({reason}); pickled .pth files are not "
            "read, since they can run code"
        ) from error
    if any(key.startswith("pre_logits.") for key in tensors):
        for theirs, ours in _TIMM_VGG.items():
            tensors = {
                key.replace(theirs, ours, 1) if key.startswith(theirs + ".") else key: value
                for key, value in tensors.items()
            }
    return {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}


def load_torchvision(path: str | os.PathLike, model: Network, missing: Sequence[str] = ()) -> dict:
    """Reads a safetensors file with torchvision's (or, for VGG, timm's) names into {"params": ..., "batch_stats": ...}.

    Every key must be used, every parameter filled, every shape right: otherwise a `ValueError` says what is wrong.
    `missing` names top-level modules, such as ("layer4", "fc"), that the file is known not to hold; the result then lacks
    them. Raises `FileNotFoundError` if there is no such file.
    """
    tensors = read(path)
    shapes = variable_shapes(model)
    flat = flax.traverse_util.flatten_dict(shapes)
    keys = torchvision_keys(shapes)
    modules = {key.split(".")[0] for key in keys}
    if isinstance(missing, str):
        missing = (missing,)
    if unknown := set(missing) - modules:
        raise ValueError(
            f"missing={sorted(unknown)} are not modules of this model; its modules are {', '.join(sorted(modules))}"
        )
    keys = {key: where for key, where in keys.items() if key.split(".")[0] not in missing}

    wanted = {
        key: tuple(flat[where].shape[axis] for axis in _axes(flat[where].ndim))
        for key, where in keys.items()
    }
    problems = [
        f"not in the file: {key} {shape}" for key, shape in wanted.items() if key not in tensors
    ]
    problems += [
        f"not in the model: {key} {value.shape}"
        for key, value in tensors.items()
        if key not in wanted
    ]
    for key, shape in wanted.items():
        if key in tensors and not _fits(tensors[key].shape, shape):
            problems.append(
                f"of another shape: {key} is {tensors[key].shape} in the file and {shape} in the model"
            )
    if problems:
        more = f"; and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
        raise ValueError(
            f"weights={str(path)!r} do not fit the model (name modules known to be absent in `missing`): "
            + "; ".join(sorted(problems)[:_TOLD])
            + more
        )
    loaded = {where: _to_ours(tensors[key], wanted[key]) for key, where in keys.items()}
    return {"params": {}, "batch_stats": {}, **flax.traverse_util.unflatten_dict(loaded)}


def save_torchvision(variables: dict, path: str | os.PathLike) -> None:
    """Writes variables to a safetensors file that torchvision's `load_state_dict` accepts; the file appears whole or not at all."""
    flat = flax.traverse_util.flatten_dict(variables)
    tensors = {
        key: _to_torchvision(np.asarray(flat[where], np.float32))
        for key, where in torchvision_keys(variables).items()
    }
    for key in [key for key in tensors if key.endswith("running_mean")]:
        tensors[key.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors.numpy.save_file(tensors, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def fetch(name: str) -> str:
    """Downloads torchvision's ImageNet weights of the model `name` from timm's repository on the Hugging Face hub -> path of the file.

    The file stays in the standard Hugging Face cache. Raises `RuntimeError`, saying what to do, where it cannot be had.
    """
    import huggingface_hub

    repository = f"timm/{name}.tv_in1k"
    try:
        return huggingface_hub.hf_hub_download(repository, "model.safetensors")
    except Exception as error:  # the hub's client raises errors of many libraries: network, proxy, offline mode, no such repository
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"weights='imagenet': {repository} is neither in the Hugging Face cache nor to be had from the hub ({reason}). Offline, "
            "fetch its model.safetensors on another machine and give its path as the weights"
        ) from error
