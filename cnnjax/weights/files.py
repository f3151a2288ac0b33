"""Files of named tensors: safetensors, and the .pth files of PyTorch.

The tensors get torchvision's names, whatever wrapper or older version wrote the file.
"""

import os
import pathlib
import re
from collections.abc import Collection, Iterable

import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy

from cnnjax.runtime.errors import one_line
from cnnjax.runtime.files import naming, replacing
from cnnjax.runtime.paths import expand_user
from cnnjax.weights import pth, records

_PTH_SUFFIXES = (".pth", ".pt")
# What DataParallel, torch.compile and AveragedModel add to the names inside the module they wrap.
_WRAPPER = re.compile(r"\b(?:module|_orig_mod)\.")
# The usual name of the network in a LightningModule.
_LIGHTNING = "model."
# Numbers that BatchNorm and AveragedModel count for themselves.
_COUNTERS = ("num_batches_tracked", "n_averaged")
# DenseNets: PyTorch 0.3 writes `denselayer1.norm.1.weight`, later ones `denselayer1.norm1.weight`.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
# timm stores torchvision's VGG with a convolutional classifier of the same numbers.
_TIMM_VGG = {
    "pre_logits.fc1.": "classifier.0.",
    "pre_logits.fc2.": "classifier.3.",
    "head.fc.": "classifier.6.",
}


class StateDict(dict[str, np.ndarray]):
    """Tensors by torchvision's names; `names` maps these to the file's own names."""

    def __init__(self, tensors: dict[str, np.ndarray], names: dict[str, str]):
        super().__init__(tensors)
        self.names = names

    def without(self, modules: Iterable[str]) -> "StateDict":
        """Returns the tensors that are not in the named top-level modules."""
        modules = set(modules)
        tensors = {key: value for key, value in self.items() if key.split(".")[0] not in modules}
        return StateDict(tensors, self.names)


def _unwrapped(name: str, known: Collection[str]) -> str:
    """Removes wrappers from a name, the outermost first, until it is `known` or none is left."""
    while name not in known and _WRAPPER.search(name):
        name = _WRAPPER.sub("", name, count=1)
    return name


def _prefix(keys: list[str], known: Collection[str]) -> str:
    """Returns what stands before a network's names in all keys, such as "net."; often nothing.

    It is the shortest prefix without which a key is `known`, or else Lightning's.
    """
    is_known = lambda key: _unwrapped(key, known) in known
    # A network of the user's may itself have a module of that name.
    if any(map(is_known, keys)):
        return ""
    common = os.path.commonprefix(keys)
    for dot in re.finditer(r"\.", common):
        prefix = common[: dot.end()]
        if any(is_known(key.removeprefix(prefix)) for key in keys):
            return prefix
    return _LIGHTNING if common.startswith(_LIGHTNING) else ""


def _torchvision_names(keys: list[str], known: Collection[str]) -> dict[str, str]:
    """Maps torchvision's names to a file's own, leaving out counters.

    Names that are `known` stay as they are.

    Raises `ValueError` if two tensors would have one name.
    """
    keys = [key for key in keys if key in known or key.split(".")[-1] not in _COUNTERS]
    is_timm_vgg = any(key.startswith("pre_logits.") for key in keys)
    renamed = _TIMM_VGG if is_timm_vgg else {}
    prefix = _prefix(keys, known)
    names: dict[str, str] = {}
    for own in keys:
        name = _unwrapped(own.removeprefix(prefix), known)
        if name not in known:
            name = _OLD_DENSENET.sub(r"\1\2", name)
            for theirs, ours in renamed.items():
                if name.startswith(theirs):
                    name = ours + name.removeprefix(theirs)
        if name in names:
            raise ValueError(f"{names[name]!r} and {own!r} are both {name!r}")
        names[name] = own
    return names


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        try:
            return safetensors.numpy.load_file(path)
        except AttributeError:
            # NumPy lacks bfloat16, which JAX has.
            tensors = safetensors.flax.load_file(path)
            return {name: np.asarray(tensor) for name, tensor in tensors.items()}
    except (safetensors.SafetensorError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from error


def read(
    path: str | os.PathLike, known: Collection[str] = (), argument: str = "weights"
) -> StateDict:
    """Reads the tensors of a safetensors or .pth file by torchvision's names.

    Nothing in a file can run code. The names may hold the wrappers of DataParallel, torch.compile,
    AveragedModel and Lightning (`model.`, if all names begin so), be DenseNet's old names or timm's
    names of VGG, and lie under `state_dict`, `model_state_dict`, `model` or `net` in a checkpoint.
    With `known` names, any other prefix of all names, such as `net.`, is removed, too. Counters,
    such as BatchNorm's, are left out. A file with the name of a published one must have its hash.

    Args:
      path: the file; `~` is expanded.
      known: names that stay as they are, such as those of the model.
      argument: what errors call `path`.

    Returns a `StateDict`: arrays by torchvision's names, whose `names` maps these to the file's
    own.
    Raises `FileNotFoundError` if there is no such file, and `ValueError` if it cannot be read.
    """
    if not os.fspath(path):
        raise ValueError(f"{argument}='' is not a path")
    path = expand_user(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument}={str(path)!r} is not a file; expected a safetensors or .pth file with "
            "torchvision's names"
        )
    record = records.of_name(path)
    # The Hugging Face hub has the same numbers in files of another format.
    if record and path.suffix in _PTH_SUFFIXES:
        records.check_sha256(path, record.sha256)
    is_pth = pth.is_pth(path)
    try:
        tensors = pth.read(path) if is_pth else _read_safetensors(path)
        for key, value in tensors.items():
            if not key.isprintable() or value.dtype.kind == "c":
                raise ValueError(
                    f"{key!r} holds {value.dtype}; expected real numbers and a printable name"
                )
        names = _torchvision_names(list(tensors), known)
    except ValueError as error:
        reason = one_line(error)
        kind = "readable .pth file" if is_pth else "readable safetensors or .pth file"
        raise ValueError(f"{argument}={str(path)!r} is not a {kind} ({reason})") from error
    return StateDict({name: tensors[own] for name, own in names.items()}, names)


def write(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes tensors in the format of the file's suffix.

    The file appears whole or not at all. Raises `OSError` if it cannot be written.
    """
    try:
        with naming(path), replacing(path) as partial:
            if path.suffix in _PTH_SUFFIXES:
                pth.write(tensors, partial)
            else:
                # safetensors creates files that only their owner may read; a plain `open` follows
                # the umask, as every other file of a work directory does.
                partial.write_bytes(b"")
                mode = partial.stat().st_mode
                safetensors.numpy.save_file(tensors, partial)
                partial.chmod(mode)
    except safetensors.SafetensorError as error:
        # safetensors raises this in place of an `OSError`.
        raise OSError(f"{path} could not be written: {error}") from error
