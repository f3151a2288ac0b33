"""What happens on one device in one training step: a pure function of the state, a batch and the step's number.

Everything random derives from (seed, step, place in the batch), everything that is a number (learning rate, momentum, weight
decay, ...) is an argument: seeds and scalar settings share one compilation, and a run resumes from its state alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int, Integer, UInt8

from cnnjax import transfer
from cnnjax.data.augment import IGNORED, augment, augment_masks, normalize
from cnnjax.models import Network
from cnnjax.runtime.types import AnyArray, Leaf
from cnnjax.train.optimizers import optimizer
from cnnjax.train.parallel import Parallel

LOSSES = ("cross_entropy", "sigmoid", "pixelwise")
# Weights of the auxiliary heads' losses: Szegedy et al. 2014, section 5. Models without such heads have none.
_AUXILIARY = 0.3

_SHUFFLE, _AUGMENT, _DROPOUT, _MIXUP = range(4)  # what a random number is for


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training step is, but for its numbers; equal recipes share one compilation."""

    model: Network
    optimizer: str = "sgd"
    decay_all: bool = True  # else weight decay spares biases and normalization
    loss: str = "cross_entropy"
    augment: tuple[tuple[str, Any], ...] = ()  # arguments of `cnnjax.data.augment.augment`
    mixup: bool = False
    ema: bool = False
    accumulate: int = 1  # parts of a device's batch that are computed one after the other
    freeze: tuple[str, ...] = ()  # parts of the model, as in `cnnjax.transfer`
    rates: tuple[str, ...] = ()  # parts whose learning rates `Numbers.rates` multiply


@flax.struct.dataclass
class Numbers:
    """The scalar settings of a step."""

    seed: Leaf
    momentum: Leaf = 0.9
    weight_decay: Leaf = 0.0
    label_smoothing: Leaf = 0.0
    mixup: Leaf = 0.0  # both parameters of the Beta distribution (Zhang et al. 2018)
    ema_decay: Leaf = 0.0
    rates: tuple[Leaf, ...] = ()  # of several that a parameter has, the last counts


@flax.struct.dataclass
class State:
    """All that training changes. `totals` sums loss, errors and examples over the epoch; `bad_step` is the first of a loss that is
    not finite, or -1."""

    step: Leaf
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    ema: dict | None
    totals: dict
    bad_step: Leaf


def _optimizer(recipe: Recipe, numbers: Numbers, learning_rate):
    return optimizer(
        recipe.optimizer, learning_rate, numbers.momentum, numbers.weight_decay, recipe.decay_all
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(
    recipe: Recipe, input_shape: tuple[int, int, int], numbers: Numbers, taken: dict | None = None
) -> State:
    """The state before the first step: the model's initial variables of the seed, but for those of the tree `taken`.

    Frozen parameters have no part in the optimizer's state.
    """
    variables = transfer.merge(
        recipe.model.init(jax.random.key(numbers.seed), jnp.zeros((1, *input_shape))), taken or {}
    )
    params = variables["params"]
    trained, _ = transfer.split(params, transfer.select(recipe.model, recipe.freeze))
    return State(
        step=jnp.int32(0),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=_optimizer(recipe, numbers, 0.0).init(trained),
        ema=params if recipe.ema else None,
        totals=dict.fromkeys(("loss", "errors", "count"), jnp.float32(0)),
        bad_step=jnp.int32(-1),
    )


def loss_and_errors(
    kind: str,
    logits: Float[AnyArray, "batch *pixels classes"],
    labels: Integer[AnyArray, "batch ..."],
    smoothing=0.0,
) -> tuple[Float[AnyArray, " batch"], Float[AnyArray, " batch"]]:
    """The loss and the share of errors of each image.

    "cross_entropy": `logits` [batch, classes], `labels` [batch]. "sigmoid": `labels` [batch, classes] of 0 and 1, the loss
    averaged over classes. "pixelwise": `logits` [batch, height, width, classes], `labels` [batch, height, width], averaged over
    the pixels whose label is not 255. Smoothing is that of PyTorch: the share of the probability that is spread over all classes.
    """
    if kind == "sigmoid":
        targets = labels.astype(jnp.float32) * (1 - smoothing) + smoothing / 2
        return optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1), jnp.mean(
            (logits > 0) != (labels > 0), -1, dtype=jnp.float32
        )
    labels = labels.astype(jnp.int32)
    counted = (labels != IGNORED) if kind == "pixelwise" else jnp.ones(labels.shape, bool)
    targets = optax.smooth_labels(
        jax.nn.one_hot(jnp.where(counted, labels, 0), logits.shape[-1]), smoothing
    )
    losses, errors = optax.softmax_cross_entropy(logits, targets), logits.argmax(-1) != labels
    axes = tuple(range(1, labels.ndim))
    share = counted / jnp.maximum(counted.sum(axes, keepdims=True), 1)
    return (losses * share).sum(axes), (errors * share).sum(axes)


def _gradients(recipe: Recipe, numbers: Numbers, trained, fixed, batch_stats, images, labels, keys):
    """One part of a device's batch: gradients by what is trained, new batch statistics, and the sums of loss and errors."""
    weight: float | jax.Array = 1.0
    if recipe.mixup:
        weight = jax.random.beta(keys[1], numbers.mixup, numbers.mixup)
        images = weight * images + (1 - weight) * images[::-1]

    def loss(trained):
        variables = {"params": transfer.merge(trained, fixed), "batch_stats": batch_stats}
        with nn.intercept_methods(
            transfer.in_evaluation_mode(transfer.select(recipe.model, recipe.freeze))
        ):
            logits, new = recipe.model.apply(
                variables,
                images,
                train=True,
                mutable=["batch_stats", "auxiliary"],
                rngs={"dropout": keys[0], "padding": keys[0]},
            )

        def of(logits):
            losses, errors = loss_and_errors(recipe.loss, logits, labels, numbers.label_smoothing)
            if recipe.mixup:
                losses = (
                    weight * losses
                    + (1 - weight)
                    * loss_and_errors(recipe.loss, logits, labels[::-1], numbers.label_smoothing)[0]
                )
            return losses, errors

        losses, errors = of(logits)
        auxiliary = sum(of(head)[0].mean() for head in jax.tree.leaves(new.get("auxiliary", {})))
        return losses.mean() + _AUXILIARY * auxiliary, (
            new.get("batch_stats", {}),
            losses.sum(),
            errors.sum(),
        )

    (_, (batch_stats, losses, errors)), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    return grads, batch_stats, losses, errors


def _scaled(recipe: Recipe, numbers: Numbers, updates: dict) -> dict:
    """Updates, which are proportional to the learning rate with every optimizer, times the rates of their parts."""
    rates = {
        path[1:]: rate
        for part, rate in zip(recipe.rates, numbers.rates)
        for path in transfer.select(recipe.model, (part,))
    }
    return unflatten_dict(
        {path: leaf * rates.get(path, 1.0) for path, leaf in flatten_dict(updates).items()}
    )


def batch_step(
    axis_name,
    recipe: Recipe,
    state: State,
    images: UInt8[AnyArray, "batch height width channels"],
    labels: Integer[AnyArray, "batch ..."],
    moments,
    learning_rate,
    steps_per_epoch,
    numbers: Numbers,
) -> State:
    """One step on this device's part of a batch; `moments` are the mean and std that they are normalized by."""
    size = len(images)
    rank = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    key = lambda purpose: jax.random.fold_in(
        jax.random.fold_in(jax.random.key(numbers.seed), state.step), purpose
    )
    places = jax.vmap(functools.partial(jax.random.fold_in, key(_AUGMENT)))(
        rank * size + jnp.arange(size)
    )
    images = normalize(augment(places, images, **dict(recipe.augment)), *moments)
    if recipe.loss == "pixelwise":
        labels = augment_masks(places, labels, **dict(recipe.augment))

    parts = jax.tree.map(lambda x: x.reshape(recipe.accumulate, -1, *x.shape[1:]), (images, labels))
    keys = [
        jax.random.split(jax.random.fold_in(key(purpose), rank), recipe.accumulate)
        for purpose in (_DROPOUT, _MIXUP)
    ]

    frozen = transfer.select(recipe.model, recipe.freeze)
    trained, fixed = transfer.split(state.params, frozen)

    def part(carry, inputs):
        total, batch_stats, losses, errors = carry
        grads, batch_stats, more_losses, more_errors = _gradients(
            recipe, numbers, trained, fixed, batch_stats, *inputs
        )
        return (
            jax.tree.map(jnp.add, total, grads),
            batch_stats,
            losses + more_losses,
            errors + more_errors,
        ), None

    if recipe.accumulate == 1:
        grads, batch_stats, losses, errors = _gradients(
            recipe, numbers, trained, fixed, state.batch_stats, images, labels, [k[0] for k in keys]
        )
    else:
        start = (
            jax.tree.map(jnp.zeros_like, trained),
            state.batch_stats,
            jnp.float32(0),
            jnp.float32(0),
        )
        (grads, batch_stats, losses, errors), _ = jax.lax.scan(part, start, (*parts, keys))
        grads = jax.tree.map(lambda g: g / recipe.accumulate, grads)
    count = jnp.float32(size)
    if axis_name is not None:
        grads, batch_stats = jax.lax.pmean((grads, batch_stats), axis_name)
        losses, errors, count = jax.lax.psum((losses, errors, count), axis_name)
        # Of equal numbers, too, the mean may differ in its last bit.
        batch_stats = transfer.merge(
            batch_stats, transfer.split(state.batch_stats, frozen, "batch_stats")[1]
        )

    updates, opt_state = _optimizer(recipe, numbers, learning_rate).update(
        grads, state.opt_state, trained
    )
    trained = optax.apply_updates(trained, _scaled(recipe, numbers, updates))
    ema = None
    if state.ema is not None:  # frozen parameters are their own average, to the bit
        average, _ = transfer.split(state.ema, frozen)
        ema = transfer.merge(
            optax.incremental_update(trained, average, 1 - numbers.ema_decay), fixed
        )
    begins = state.step % steps_per_epoch == 0
    sums = {"loss": losses, "errors": errors, "count": count}
    return State(
        step=state.step + 1,
        params=transfer.merge(trained, fixed),
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema=ema,
        totals={
            name: jnp.where(begins, 0, state.totals[name]) + value for name, value in sums.items()
        },
        bad_step=jnp.where(
            (state.bad_step < 0) & ~jnp.isfinite(losses), state.step, state.bad_step
        ),
    )


@functools.partial(jax.jit, static_argnums=0)
def epoch_order(count: int, epoch, seed) -> Int[AnyArray, " {count}"]:
    """The order in which an epoch takes its `count` images, a permutation of the seed and the epoch."""
    return jax.random.permutation(
        jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), _SHUFFLE), count
    )


def _resident_steps(
    axis_name,
    recipe: Recipe,
    batch_size: int,
    state: State,
    data,
    order,
    moments,
    rates,
    last,
    numbers: Numbers,
) -> State:
    images, labels = data
    steps_per_epoch = len(order) // batch_size
    size = batch_size if axis_name is None else batch_size // jax.lax.axis_size(axis_name)
    rank = 0 if axis_name is None else jax.lax.axis_index(axis_name)

    def body(step, state):
        chosen = jax.lax.dynamic_slice(
            order, (step % steps_per_epoch * batch_size + rank * size,), (size,)
        )
        return batch_step(
            axis_name,
            recipe,
            state,
            images[chosen],
            labels[chosen],
            moments,
            rates[step],
            steps_per_epoch,
            numbers,
        )

    return jax.lax.fori_loop(state.step, last, body, state)


@functools.lru_cache(maxsize=32)
def resident_steps(parallel: Parallel, recipe: Recipe, batch_size: int) -> Callable:
    """Compiles steps on a data set that lives on the device.

    The result takes (state, (images, labels), order, moments, rates: replicated; last, numbers) and steps from the state's own
    step up to `last`, all in one epoch. How many steps one call takes does not change a bit: the loop's body is one program.
    """
    function = lambda axis_name, *arguments: _resident_steps(
        axis_name, recipe, batch_size, *arguments
    )
    return parallel.compile(function, replicated=5, plain=2, donate=True)


@functools.lru_cache(maxsize=32)
def streamed_step(parallel: Parallel, recipe: Recipe) -> Callable:
    """Compiles one step on a batch that comes from the host.

    The result takes (state, moments, rates: replicated; images, labels: shared; steps_per_epoch, numbers).
    """

    def function(axis_name, state, moments, rates, images, labels, steps_per_epoch, numbers):
        return batch_step(
            axis_name,
            recipe,
            state,
            images,
            labels,
            moments,
            rates[state.step],
            steps_per_epoch,
            numbers,
        )

    return parallel.compile(function, replicated=3, shared=2, plain=2, donate=True)
