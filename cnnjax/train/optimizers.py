"""Optimizers, made of optax's transformations.

They are built inside jit. Every number may be traced, so changing one compiles nothing.
"""

import functools
from collections.abc import Callable

import jax
import optax


def _kernels(params):
    """Marks kernels with True; biases and normalization parameters have one dimension."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _as_matrices(params):
    """Says which parameters are matrices for Muon: kernels, [height * width * in, out]."""

    def axes(x):
        if x.ndim < 2:
            return None
        *inputs, output = range(x.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(inputs), output)

    return jax.tree.map(axes, params)


def _sgd(rate, momentum, decay, mask, nesterov=False):
    return optax.chain(
        optax.add_decayed_weights(decay, mask),
        optax.trace(decay=momentum, nesterov=nesterov),
        optax.scale_by_learning_rate(rate),
    )


def _adam(rate, momentum, decay, mask):
    return optax.chain(
        optax.add_decayed_weights(decay, mask),
        optax.scale_by_adam(b1=momentum),
        optax.scale_by_learning_rate(rate),
    )


def _adamw(rate, momentum, decay, mask):
    return optax.adamw(rate, b1=momentum, weight_decay=decay, mask=mask)


def _muon(rate, momentum, decay, mask):
    return optax.contrib.muon(
        rate,
        beta=momentum,
        weight_decay=decay,
        weight_decay_mask=mask,
        # optax's mask does not reach biases and normalization, which its `nadamw` trains.
        adam_weight_decay=0.0 if mask else decay,
        muon_weight_dimension_numbers=_as_matrices,
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": _sgd,
    "nesterov": functools.partial(_sgd, nesterov=True),
    "adam": _adam,
    "adamw": _adamw,
    "muon": _muon,
}


def optimizer(
    name: str, learning_rate, momentum=0.9, weight_decay=0.0, decay_all: bool = True
) -> optax.GradientTransformation:
    """Builds one of `OPTIMIZERS`.

    "sgd" and "nesterov" are PyTorch's: weight decay is added to the gradient, and the learning rate
    multiplies the momentum buffer. "adam" couples weight decay in the same way, "adamw" does not.
    "muon" (Jordan et al. 2024) takes kernels as matrices [height * width * in, out]. AdamW with
    Nesterov momentum (optax's `nadamw`) trains everything else, with betas of 0.9 and 0.999 and the
    same learning rate.

    Args:
      name: one of `OPTIMIZERS`.
      learning_rate: of this step.
      momentum: momentum of "sgd" and "nesterov", the first beta of "adam" and "adamw" (the second
        is 0.999), and the beta of "muon".
      weight_decay: the factor of the parameters.
      decay_all: whether biases and normalization parameters decay, too.

    Raises:
      ValueError: for another name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is not one of {', '.join(OPTIMIZERS)}")
    mask = None if decay_all else _kernels
    return OPTIMIZERS[name](learning_rate, momentum, weight_decay, mask)
