"""Signals from a unit back to the image, under several rules for ReLUs.

They are saliency, deconvolution and guided backpropagation.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cnnjax import weights
from cnnjax.inspect.trace import operations, trace
from cnnjax.models import Network
from cnnjax.nn import relu_rule
from cnnjax.nn.activation import RELU
from cnnjax.nn.geometry import check_map
from cnnjax.runtime.types import AnyArray
from cnnjax.visualize.stages import check_classes, check_stage, class_logits, stage_maps

RULES = ("gradient", "deconvnet", "guided")
# The name under which a network yields the scores of its classes.
_LOGITS = "logits"


def saliency(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
    channel: int | Sequence[int] | Int[AnyArray, " batch"],
    rule: str,
) -> Float[Array, "batch height width channels"]:
    """Sends a signal back from a class's score, or from a channel's strongest unit, to each image.

    With "logits" and "gradient", this is the gradient of a class's score (Simonyan et al. 2013,
    arXiv 1312.6034, section 3). Its saliency map is the largest absolute value over the colors.

    A max-pool sends the signal to where the maximum was (the deconvnet's switches). Everything else
    that is not a ReLU passes it back as its derivative does, and so does a saturated ReLU6.

    Args:
      model: the network.
      variables: its variables.
      images: as the network takes them.
      stage: name of the stage; "logits" for the scores of the classes.
      channel: a channel of the stage, or a class: one for all images, or one for each.
      rule: how ReLUs pass the signal: "gradient", "deconvnet" or "guided" (see
        `cnnjax.nn.relu_rule`).

    Raises `ValueError` if the images are not a batch or are integers, or the stage, a channel, a
    class or the rule is unknown. Rules other than "gradient" need `cnnjax.nn.relu`; they are
    refused if the network has none, or also calls `jax.nn.relu`.
    """
    check_map(images)
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of {', '.join(RULES)}")
    if stage == _LOGITS:
        check_classes(model, channel)
    else:
        check_stage(model, stage, channel)
    if rule != "gradient":
        check_relus(model, stage, rule)
    channels = jnp.broadcast_to(jnp.asarray(channel), len(images))
    return _signals(model, variables, images, channels, stage=stage, rule=rule)


@functools.partial(jax.jit, static_argnames=("model", "stage", "rule"))
def _signals(model, variables, images, channels, *, stage, rule):
    def strongest(images):
        maps = _outputs(model, variables, images, stage)
        # Logits are [batch, classes], maps [batch, height, width, channels].
        chosen = jnp.expand_dims(channels, range(1, maps.ndim))
        maps = jnp.take_along_axis(maps, chosen, -1).reshape(len(images), -1)
        units = jnp.take_along_axis(maps, maps.argmax(1)[:, None], 1)
        return units.astype(jnp.float32).sum()

    with relu_rule(rule):
        return jax.grad(strongest)(images)


def _outputs(model, variables, images, stage):
    """Computes the maps of a stage, or the logits."""
    if stage == _LOGITS:
        return class_logits(model, variables, images)
    return stage_maps(model, variables, images, stage)


def check_relus(model: Network, stage: str, rule: str) -> None:
    """Raises `ValueError` if there is no ReLU that follows a rule, or one that does not."""
    own, others = _relus(model, stage)
    if not own:
        raise ValueError(
            f"rule={rule!r} is about cnnjax.nn.relu, and this network has none up to stage "
            f"{stage!r}"
        )
    if others:
        raise ValueError(
            f"rule={rule!r} is about cnnjax.nn.relu, and up to stage {stage!r} this network also "
            "calls jax.nn.relu; call cnnjax.nn.relu there"
        )


@functools.cache
def _relus(model, stage) -> tuple[int, int]:
    """Counts the calls of `cnnjax.nn.relu`, and those of `jax.nn.relu`, up to a stage."""
    model = model.clone(padding="zeros")
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    maps = lambda variables, image: _outputs(model, variables, image, stage)
    # Under a rule, ReLUs carry their name through the trace.
    with relu_rule("guided"):
        program = trace(maps, weights.variable_shapes(model), image)
    named = [
        operation.primitive.name
        for operation in operations(program.eqns)
        if operation.params.get("name") == RELU
    ]
    # cnnjax.nn.relu leaves an operation "name"; jax.nn.relu is itself compiled, so it leaves a
    # "jit".
    return named.count("name"), named.count("jit")
