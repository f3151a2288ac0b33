"""A network with its published weights, in one call."""

import logging
import os

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cnnjax.models import Network, create_model
from cnnjax.runtime.configuration import LARGEST_SEED, is_whole
from cnnjax.runtime.progress import log_once
from cnnjax.weights import download, files, records, torchvision


def load_pretrained(
    name: str,
    *,
    tag: str | None = None,
    num_classes: int | None = None,
    padding: str = "zeros",
    sampling: str = "stride",
    dtype: DTypeLike = jnp.float32,
    path: str | os.PathLike | None = None,
    transform_input: bool | None = None,
    seed: int = 0,
) -> tuple[Network, dict]:
    """Loads a network with ImageNet weights.

    The network is built as the weights need it: GoogLeNet and Inception v3 convert their input and
    have no auxiliary heads (`fields_for`). Its input is the output of `preprocess`.

    Args:
      name: the network, such as "resnet50"; `python -m cnnjax.weights` lists all.
      tag: "imagenet1k_v1", the default, or "imagenet1k_v2" where there are newer weights.
      num_classes: gives the network a head of that many classes, drawn at random from `seed`. The
        head of the file is not read, even if it has as many classes: `load_torchvision`, with a
        network of `create_model`, keeps it.
      padding: field of the network; it does not change the weights.
      sampling: likewise.
      dtype: likewise; the weights stay float32.
      path: a file to read the weights from, instead of looking for them (see `fetch`); `~` is
        expanded. Unless `num_classes` is given, it must hold a head of 1,000 classes.
      transform_input: whether the network of the file at `path` converts its input, which
        GoogLeNet and Inception v3 can; by default as published for a published file, whatever its
        name, and as recorded for that of a training run. For other files, False is assumed, and a
        warning logged.
      seed: of a new head.

    Returns (model, variables). The variables are NumPy arrays: before many calls, copy them to the
    device with `jax.device_put`; otherwise, every call does.

    Raises `ValueError` if the weights are unknown, an argument is not accepted, or a file does not
    fit or holds the weights of another `tag`, `FileNotFoundError` if there is no file at `path`,
    and `RuntimeError` if the weights cannot be obtained.
    """
    # All arguments are checked before a download.
    record = records.find(name, records.V1 if tag is None else tag)
    if path is not None and tag is not None:
        records.check_tag(record, path, "path")
    if num_classes is not None and not (is_whole(num_classes) and num_classes >= 1):
        raise ValueError(f"num_classes={num_classes!r} is not a positive whole number")
    if not (is_whole(seed) and 0 <= seed <= LARGEST_SEED):
        raise ValueError(
            f"seed={seed!r} is not a whole number of at least 0 and at most {LARGEST_SEED}"
        )
    if transform_input is not None:
        if name not in records.CONVERTING:
            raise ValueError(
                f"transform_input={transform_input!r} is not a field of {name}; it is one of "
                f"{' and '.join(records.CONVERTING)}"
            )
        if not isinstance(transform_input, bool):
            raise ValueError(f"transform_input={transform_input!r} is not True, False or None")
        if path is None and not transform_input:
            raise ValueError(
                "transform_input=False is for a file at path; the published weights need True"
            )
    fields = records.fields_for(name, "imagenet" if path is None else path, transform_input)
    model = create_model(name, padding=padding, sampling=sampling, dtype=dtype, **fields)
    file = download.fetch(name, record.tag) if path is None else path
    argument = "weights" if path is None else "path"
    if num_classes is None:
        return model, torchvision.load_torchvision(file, model, argument=argument)
    variables = _without_head(file, model, num_classes, argument)
    model = model.clone(num_classes=num_classes)
    return model, _with_fresh_head(model, variables, seed)


def _without_head(file: str | os.PathLike, model: Network, num_classes: int, argument: str) -> dict:
    """Loads all but the head, which the file may lack or hold in any form.

    A warning says so if the file has a head of `num_classes`.
    """
    tensors = torchvision.read_for(model, file, argument)
    keys = torchvision.torchvision_keys(torchvision.variable_shapes(model))
    head_paths = torchvision.head(model)
    head = [key for key, path in keys.items() if path in head_paths]
    shapes = [tensors[key].shape for key in head if key in tensors]
    if any(shape[:1] == (num_classes,) for shape in shapes):
        log_once(
            logging.WARNING,
            f"{argument}={str(file)!r}: its head of {num_classes} classes is not read, since "
            "num_classes asks for a new one; create_model and load_torchvision keep it",
        )
    modules = tuple(f"{key.rpartition('.')[0]}." for key in head)
    others = {key: tensor for key, tensor in tensors.items() if not key.startswith(modules)}
    return torchvision.fill(model, files.StateDict(others, tensors.names), head, file, argument)


def _with_fresh_head(model: Network, variables: dict, seed: int) -> dict:
    """Returns the variables with a newly initialized head."""
    head = torchvision.head(model)
    image = jnp.zeros((1, *model.input_shape))

    @jax.jit  # compiles what the head needs and leaves out the rest
    def draw(key):
        drawn = model.clone(padding="zeros").init(key, image)
        flat = flax.traverse_util.flatten_dict(drawn)
        return {path: flat[path] for path in head}

    flat = flax.traverse_util.flatten_dict(variables)
    flat |= jax.device_get(draw(jax.random.key(seed)))
    return torchvision.nested(flat)
