"""ReLU, and the rules for passing signals back through it to the image."""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from cnnjax.runtime.types import AnyArray

RELU = "relu"  # the name that a ReLU under a rule has in a traced program


def _deconvnet(x, dy):
    """Passes positive signals.

    Source: Zeiler and Fergus 2014 (arXiv 1311.2901).
    """
    return dy > 0


def _guided(x, dy):
    """Passes positive signals through active units.

    Source: Springenberg et al. 2015 (arXiv 1412.6806).
    """
    return (x > 0) & (dy > 0)


def _redirected(x, dy):
    """Passes the gradient, or a redirected signal where it is 0 for a whole image.

    Such an image gets any signal that wakes units. After Lucid, the code of Olah et al. 2017
    (distill.pub/2017/feature-visualization).
    """
    gradient = (x > 0) & (dy != 0)
    silent = ~gradient.any(range(1, x.ndim), keepdims=True)
    return (x > 0) | (dy > 0) & silent


# Where a signal dy passes a ReLU with the input x. "gradient" is the derivative (for saliency,
# Simonyan et al. 2013, arXiv 1312.6034); figure 1 of Springenberg et al. compares the first three.
_PASSES = {"gradient": None, "deconvnet": _deconvnet, "guided": _guided, "redirected": _redirected}

# A user context is part of jit's cache key: what is traced under one rule never serves another.
_RULE = jax.make_user_context("gradient")


def relu_rule(rule: str) -> contextlib.AbstractContextManager:
    """Sets how ReLUs that are traced inside a `with` block pass signals back.

    Values are the same under every rule, and the rule holds in the current thread only. Rules other
    than "gradient" have no forward mode (`jax.jvp`).

    Args:
      rule: "gradient" (the derivative), "deconvnet", "guided" or "redirected".

    Raises `ValueError` if `rule` is none of these.
    """
    if rule not in _PASSES:
        raise ValueError(f"rule={rule!r} is not one of {', '.join(_PASSES)}")
    return _RULE(rule)


def relu(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Returns max(x, 0); its gradient follows the rule of `relu_rule`."""
    if _RULE.value == "gradient":
        return jax.nn.relu(x)
    return _ruled_relu(x, _RULE.value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _ruled_relu(x, rule):
    return checkpoint_name(jnp.maximum(x, 0), RELU)


def _ruled_relu_forward(x, rule):
    return _ruled_relu(x, rule), x


def _ruled_relu_backward(rule, x, dy):
    return (jnp.where(_PASSES[rule](x, dy), dy, 0),)


_ruled_relu.defvjp(_ruled_relu_forward, _ruled_relu_backward)
