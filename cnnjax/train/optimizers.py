"""Optimizers, made of optax's pieces and built inside jit: every number may be traced, so changing
one compiles nothing."""

import jax
import optax


def _kernels(params):
    """True for kernels, False for biases and normalization, which have one dimension."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _as_matrices(params):
    """How Muon sees parameters: kernels as matrices [height * width * in, out], all else not at
    all."""

    def axes(x):
        return (
            optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)
            if x.ndim > 1
            else None
        )

    return jax.tree.map(axes, params)


def _sgd(rate, momentum, decay, mask, nesterov=False):
    return optax.chain(
        optax.add_decayed_weights(decay, mask),
        optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(rate),
    )


OPTIMIZERS = {
    "sgd": _sgd,
    "nesterov": lambda rate, momentum, decay, mask: _sgd(
        rate, momentum, decay, mask, nesterov=True
    ),
    "adam": lambda rate, momentum, decay, mask: optax.chain(
        optax.add_decayed_weights(decay, mask),
        optax.scale_by_adam(momentum),
        optax.scale_by_learning_rate(rate),
    ),
    "adamw": lambda rate, momentum, decay, mask: optax.adamw(
        rate, momentum, weight_decay=decay, mask=mask
    ),
    "muon": lambda rate, momentum, decay, mask: optax.contrib.muon(
        rate,
        beta=momentum,
        weight_decay=decay,
        weight_decay_mask=mask,
        adam_weight_decay=0.0 if mask else decay,
        muon_weight_dimension_numbers=_as_matrices,
    ),
}


def optimizer(
    name: str, learning_rate, momentum=0.9, weight_decay=0.0, decay_all: bool = True
) -> optax.GradientTransformation:
    """Builds one of `OPTIMIZERS`; `decay_all=False` spares biases and normalization parameters from
    weight decay.

    "sgd" and "nesterov" are PyTorch's: weight decay is added to the gradient, and the learning rate
    multiplies the momentum's buffer. "adam" couples weight decay in the same way, "adamw" does not;
    `momentum` is their first beta, the second is 0.999. "muon" (Jordan et al. 2024) takes kernels
    as matrices [height * width * in, out]; all else goes to AdamW with betas of 0.9 and 0.999, at
    the same learning rate. Raises `ValueError` for another name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is not one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](learning_rate, momentum, weight_decay, None if decay_all else _kernels)
