"""A network with its published weights, in one call."""

import os

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cnnjax.models import Network, create_model
from cnnjax.runtime.configuration import LARGEST_SEED, is_whole
from cnnjax.weights import download, records, torchvision


def load_pretrained(
    name: str,
    *,
    tag: str = records.V1,
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
      tag: "imagenet1k_v1", or "imagenet1k_v2" where there are newer weights.
      num_classes: gives the network a head of that many classes, drawn at random from `seed`.
      padding: field of the network; it does not change the weights.
      sampling: likewise.
      dtype: likewise; the weights stay float32.
      path: a file to read the weights from, instead of looking for them (see `fetch`); `~` is
        expanded.
      transform_input: whether the network of the file at `path` converts its input, which
        GoogLeNet and Inception v3 can; by default as published for a published file, whatever its
        name, and as recorded for that of a training run. For other files, False is assumed, and a
        warning logged.
      seed: of a new head.

    Returns (model, variables). The variables are NumPy arrays: before many calls, copy them to the
    device with `jax.device_put`; otherwise, every call does.

    Raises `ValueError` if the weights are unknown, an argument is not accepted, or a file does not
    fit, `FileNotFoundError` if there is no file at `path`, and `RuntimeError` if the weights cannot
    be obtained.
    """
    # All arguments are checked before a download.
    records.find(name, tag)
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
    file = download.fetch(name, tag) if path is None else path
    variables = torchvision.load_torchvision(file, model)
    if num_classes is None:
        return model, variables
    model = model.clone(num_classes=num_classes)
    return model, _with_fresh_head(model, variables, seed)


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
