"""One training step on one device: a pure function of the state, a batch and the step's number.

A run resumes from its state alone, since every random key derives from the seed and the step: the
order of images from the seed and the epoch; augmentation from the seed, the step and an image's
place in the whole batch; dropout, random padding and mixup from the seed, the step, the device and
the part of its batch (`Recipe.accumulate`). So only these three depend on the number of devices.

Numbers (learning rate, momentum, weight decay, ...) are arguments, so all seeds and scalar settings
share one compilation.
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
from jaxtyping import Array, Float, Int, Integer

from cnnjax import transfer
from cnnjax.data.augment import augment, augment_masks, normalize
from cnnjax.data.splits import IGNORED
from cnnjax.models import Network
from cnnjax.runtime.types import AnyArray, Leaf
from cnnjax.train.optimizers import optimizer
from cnnjax.train.parallel import Parallel

LOSSES = ("cross_entropy", "sigmoid", "pixelwise")

# The purposes of random numbers, each with a key of its own.
_SHUFFLE = 0
_AUGMENT = 1
_DROPOUT = 2
_MIXUP = 3


# ------------------------------------------------------------------ what a step is made of


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training step is, apart from its numbers; equal recipes share one compilation.

    Attributes:
      model: the network.
      optimizer: one of `cnnjax.train.optimizers.OPTIMIZERS`.
      decay_all: whether weight decay applies to biases and normalization, too.
      loss: one of `LOSSES`.
      augment: arguments of `cnnjax.data.augment.augment`, as sorted pairs.
      mixup: whether images are mixed.
      ema: whether averages of the parameters and of BatchNorm's statistics are kept.
      accumulate: parts of a device's batch that are computed one after the other.
      freeze: parts of the model that are not trained, as in `cnnjax.transfer`.
      rates: parts whose learning rates `Numbers.rates` multiply.
      clip: whether gradients are scaled down to `Numbers.clip_norm`.
    """

    model: Network
    optimizer: str = "sgd"
    decay_all: bool = True
    loss: str = "cross_entropy"
    augment: tuple[tuple[str, Any], ...] = ()
    mixup: bool = False
    ema: bool = False
    accumulate: int = 1
    freeze: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()
    clip: bool = False

    def frozen_paths(self) -> frozenset[transfer.Path]:
        """Returns the paths of the frozen parts' variables."""
        return transfer.select(self.model, self.freeze)


@flax.struct.dataclass
class Numbers:
    """The scalar settings of a step.

    Attributes:
      seed: of everything random.
      momentum: as in `cnnjax.train.optimizers.optimizer`.
      weight_decay: likewise.
      label_smoothing: the share of the probability that is spread over all classes.
      mixup: both parameters of the Beta distribution (Zhang et al. 2018).
      ema_decay: the largest decay of the averages of parameters and statistics.
      rates: factors of the learning rate of each of `Recipe.rates`; the last one that names a
        parameter counts.
      clip_norm: the largest global norm of the gradients.
    """

    seed: Leaf
    momentum: Leaf = 0.9
    weight_decay: Leaf = 0.0
    label_smoothing: Leaf = 0.0
    mixup: Leaf = 0.0
    ema_decay: Leaf = 0.0
    rates: tuple[Leaf, ...] = ()
    clip_norm: Leaf = 0.0


@flax.struct.dataclass
class State:
    """All that training changes.

    Attributes:
      step: the number of steps taken.
      params: the network's parameters.
      batch_stats: BatchNorm's statistics.
      opt_state: the optimizer's state.
      ema: the average of the parameters, if the recipe keeps one.
      ema_batch_stats: the average of BatchNorm's statistics, likewise.
      totals: sums of loss, errors and examples over the epoch.
      bad_step: the first step whose loss was not finite, or -1.
    """

    step: Leaf
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    ema: dict | None
    ema_batch_stats: dict | None
    totals: dict
    bad_step: Leaf

    def variables_to_score(self) -> dict:
        """Returns the variables to score.

        They are the parameters and BatchNorm's statistics, averaged if the recipe averages them.
        """
        if self.ema is None:
            return {"params": self.params, "batch_stats": self.batch_stats}
        return {"params": self.ema, "batch_stats": self.ema_batch_stats}


@flax.struct.dataclass
class Batch:
    """A device's part of a batch, and how this step treats it.

    Attributes:
      images: uint8 [batch, height, width, channels].
      labels: as in `loss_and_errors`.
      moments: mean and standard deviation, [channels], that images are normalized by.
      learning_rate: of this step.
      steps_per_epoch: the number of steps after which `State.totals` restart from zero.
    """

    images: Leaf
    labels: Leaf
    moments: tuple[Leaf, Leaf]
    learning_rate: Leaf
    steps_per_epoch: Leaf


@flax.struct.dataclass
class _Gradients:
    """What a batch, or a part of it, contributes to a step.

    Attributes:
      grads: the mean gradient of the trained parameters.
      batch_stats: BatchNorm's new statistics.
      loss: the sum over the images.
      errors: the sum over the images.
    """

    grads: dict
    batch_stats: dict
    loss: Leaf
    errors: Leaf


# ------------------------------------------------------------------ the state before the first step


def _optimizer(recipe: Recipe, numbers: Numbers, learning_rate) -> optax.GradientTransformation:
    return optimizer(
        recipe.optimizer,
        learning_rate,
        momentum=numbers.momentum,
        weight_decay=numbers.weight_decay,
        decay_all=recipe.decay_all,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(
    recipe: Recipe,
    input_shape: tuple[int, int, int],
    numbers: Numbers,
    pretrained: dict | None = None,
) -> State:
    """Builds the state before the first step.

    Frozen parameters have no part in the optimizer's state.

    Args:
      recipe: the step.
      input_shape: height, width and channels.
      numbers: its numbers, among them the seed of the initial variables.
      pretrained: variables that replace initial ones.
    """
    image = jnp.zeros((1, *input_shape), jnp.float32)
    initial = recipe.model.init(jax.random.key(numbers.seed), image)
    variables = transfer.merge(initial, pretrained or {})
    params = variables["params"]
    batch_stats = variables.get("batch_stats", {})
    trained, _ = _split_frozen(recipe, params)
    return State(
        step=jnp.int32(0),
        params=params,
        batch_stats=batch_stats,
        opt_state=_optimizer(recipe, numbers, jnp.float32(0)).init(trained),
        ema=params if recipe.ema else None,
        ema_batch_stats=batch_stats if recipe.ema else None,
        totals=dict.fromkeys(("loss", "errors", "count"), jnp.float32(0)),
        bad_step=jnp.int32(-1),
    )


# ------------------------------------------------------------------ the loss


def loss_and_errors(
    kind: str,
    logits: Float[AnyArray, "batch *pixels classes"],
    labels: Integer[AnyArray, "batch ..."],
    smoothing=0.0,
) -> tuple[Float[AnyArray, " batch"], Float[AnyArray, " batch"]]:
    """Computes the loss and the share of errors of each image.

    Args:
      kind: one of `LOSSES`. "cross_entropy" is for one class per image; "sigmoid" for several, its
        loss averaged over the classes; "pixelwise" for masks, its loss averaged over the pixels
        whose label is not 255.
      logits: [batch, classes], and [batch, height, width, classes] for masks.
      labels: classes [batch], 0 and 1 [batch, classes] for "sigmoid", or masks
        [batch, height, width].
      smoothing: the share of the probability that is spread over all classes, as in PyTorch.

    Raises:
      ValueError: for another kind.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss={kind!r} is not one of {', '.join(LOSSES)}")
    if kind == "sigmoid":
        targets = labels.astype(jnp.float32) * (1 - smoothing) + smoothing / 2
        losses = optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1)
        return losses, jnp.mean((logits > 0) != (labels > 0), -1, dtype=jnp.float32)
    labels = labels.astype(jnp.int32)
    counted = jnp.ones(labels.shape, bool)
    if kind == "pixelwise":
        counted = labels != IGNORED
    one_hot = jax.nn.one_hot(jnp.where(counted, labels, 0), logits.shape[-1], dtype=jnp.float32)
    losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, smoothing))
    errors = (logits.argmax(-1) != labels).astype(jnp.float32)
    axes = tuple(range(1, labels.ndim))
    n_counted = jnp.maximum(counted.sum(axes, keepdims=True), 1)
    # The weight of each pixel in its image's mean. With one class per image there are no pixel
    # axes, and the weight is 1.
    weight = counted.astype(jnp.float32) / n_counted.astype(jnp.float32)
    return (losses * weight).sum(axes), (errors * weight).sum(axes)


# ------------------------------------------------------------------ the step


def batch_step(
    recipe: Recipe, state: State, batch: Batch, numbers: Numbers, axis_name: str | None = None
) -> State:
    """Takes one training step on this device's part of a batch.

    Args:
      recipe: what the step is.
      state: the state before.
      batch: this device's part.
      numbers: the step's numbers.
      axis_name: the axis of the devices that share the batch; None for one device.

    Returns:
      The state after, the same on all devices.
    """
    rank = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    images, labels = _prepare(recipe, batch, _key(state, numbers, _AUGMENT), rank)
    gradients = _accumulate(
        recipe=recipe, state=state, numbers=numbers, images=images, labels=labels, rank=rank
    )
    count = jnp.float32(len(batch.images))
    if axis_name is not None:
        gradients, count = _reduce(recipe, state, gradients, count, axis_name)
    return _update(
        recipe=recipe, state=state, batch=batch, numbers=numbers, gradients=gradients, count=count
    )


def _key(state: State, numbers: Numbers, purpose: int) -> jax.Array:
    """Derives this step's random key for a purpose."""
    step_key = jax.random.fold_in(jax.random.key(numbers.seed), state.step)
    return jax.random.fold_in(step_key, purpose)


def _prepare(recipe: Recipe, batch: Batch, key: jax.Array, rank) -> tuple[AnyArray, AnyArray]:
    """Augments and normalizes a device's images; masks are augmented in the same way."""
    size = len(batch.images)
    # The key of an image depends on its place in the whole batch, not on the number of devices.
    places = rank * size + jnp.arange(size)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(places)
    settings = dict(recipe.augment)
    images = normalize(augment(keys, batch.images, **settings), *batch.moments)
    labels = batch.labels
    if recipe.loss == "pixelwise":
        labels = augment_masks(keys, labels, **settings)
    return images, labels


def _accumulate(recipe: Recipe, state: State, numbers: Numbers, images, labels, rank) -> _Gradients:
    """Computes the gradients of a device's images, in `recipe.accumulate` parts one by one."""

    def part_keys(purpose):
        """Returns a key for each part."""
        device_key = jax.random.fold_in(_key(state, numbers, purpose), rank)
        return jax.random.split(device_key, recipe.accumulate)

    dropout_keys = part_keys(_DROPOUT)
    mixup_keys = part_keys(_MIXUP)
    if recipe.accumulate == 1:
        return _gradients(
            recipe=recipe,
            state=state,
            numbers=numbers,
            images=images,
            labels=labels,
            keys=(dropout_keys[0], mixup_keys[0]),
        )

    def add_part(total: _Gradients, part):
        images, labels, dropout_key, mixup_key = part
        gradients = _gradients(
            recipe=recipe,
            # BatchNorm's statistics pass from part to part.
            state=dataclasses.replace(state, batch_stats=total.batch_stats),
            numbers=numbers,
            images=images,
            labels=labels,
            keys=(dropout_key, mixup_key),
        )
        total = _Gradients(
            grads=jax.tree.map(jnp.add, total.grads, gradients.grads),
            batch_stats=gradients.batch_stats,
            loss=total.loss + gradients.loss,
            errors=total.errors + gradients.errors,
        )
        return total, None

    trained, _ = _split_frozen(recipe, state.params)
    zeros = _Gradients(
        grads=jax.tree.map(jnp.zeros_like, trained),
        batch_stats=state.batch_stats,
        loss=jnp.float32(0),
        errors=jnp.float32(0),
    )
    split = lambda x: x.reshape(recipe.accumulate, -1, *x.shape[1:])
    parts = (split(images), split(labels), dropout_keys, mixup_keys)
    total, _ = jax.lax.scan(add_part, zeros, parts)
    mean = jax.tree.map(lambda g: g / recipe.accumulate, total.grads)
    return dataclasses.replace(total, grads=mean)


def _split_frozen(recipe: Recipe, variables: dict, collection: str = "params") -> tuple[dict, dict]:
    """Splits the variables of a collection into those of trained and those of frozen parts."""
    return transfer.split(variables, recipe.frozen_paths(), collection)


def _gradients(recipe: Recipe, state: State, numbers: Numbers, images, labels, keys) -> _Gradients:
    """Computes the gradients of a part of a device's images; `keys` are dropout's and mixup's."""
    dropout_key, mixup_key = keys
    trained, frozen = _split_frozen(recipe, state.params)
    # Mixup: the weight of each image's own pixels and label. The rest is that of the image at the
    # opposite place in the batch.
    share: float | jax.Array = 1.0
    if recipe.mixup:
        share = jax.random.beta(mixup_key, numbers.mixup, numbers.mixup, dtype=jnp.float32)
        images = share * images + (1 - share) * images[::-1]

    def losses_of(logits):
        smoothing = numbers.label_smoothing
        losses, errors = loss_and_errors(recipe.loss, logits, labels, smoothing)
        if recipe.mixup:
            opposite = loss_and_errors(recipe.loss, logits, labels[::-1], smoothing)
            losses = share * losses + (1 - share) * opposite[0]
            errors = share * errors + (1 - share) * opposite[1]
        return losses, errors

    def mean_loss(trained):
        variables = {
            "params": transfer.merge(trained, frozen),
            "batch_stats": state.batch_stats,
        }
        # BatchNorms of frozen parts normalize by their stored statistics and leave them unchanged.
        with nn.intercept_methods(transfer.in_evaluation_mode(recipe.frozen_paths())):
            logits, updated = recipe.model.apply(
                variables,
                images,
                train=True,
                mutable=["batch_stats", "auxiliary"],
                rngs={"dropout": dropout_key, "padding": dropout_key},
            )
        losses, errors = losses_of(logits)
        auxiliary_loss = 0.0
        for head_logits in jax.tree.leaves(updated.get("auxiliary", {})):
            head_losses, _ = losses_of(head_logits)
            auxiliary_loss += head_losses.mean()
        loss = losses.mean() + recipe.model.auxiliary_weight * auxiliary_loss
        return loss, (updated.get("batch_stats", {}), losses.sum(), errors.sum())

    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
    (_, (batch_stats, loss, errors)), grads = value_and_grad(trained)
    return _Gradients(grads=grads, batch_stats=batch_stats, loss=loss, errors=errors)


def _reduce(
    recipe: Recipe, state: State, gradients: _Gradients, count, axis_name: str
) -> tuple[_Gradients, Array]:
    """Averages gradients and statistics over the devices, and sums losses, errors and images."""
    means = (gradients.grads, gradients.batch_stats)
    sums = (gradients.loss, gradients.errors, count)
    grads, batch_stats = jax.lax.pmean(means, axis_name)
    loss, errors, count = jax.lax.psum(sums, axis_name)
    # The mean of equal numbers may differ from them in its last bit. Frozen statistics must not
    # change, so they are put back.
    _, frozen = _split_frozen(recipe, state.batch_stats, "batch_stats")
    batch_stats = transfer.merge(batch_stats, frozen)
    return _Gradients(grads=grads, batch_stats=batch_stats, loss=loss, errors=errors), count


def _update(
    recipe: Recipe, state: State, batch: Batch, numbers: Numbers, gradients: _Gradients, count
) -> State:
    """Applies the optimizer, moves the averages and adds up the epoch's sums."""
    trained, frozen = _split_frozen(recipe, state.params)
    grads = gradients.grads
    if recipe.clip:
        grads = _clip(grads, numbers.clip_norm)
    transform = _optimizer(recipe, numbers, batch.learning_rate)
    updates, opt_state = transform.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, _scale_parts(recipe, numbers, updates))
    params = transfer.merge(trained, frozen)
    ema = None
    ema_batch_stats = None
    if state.ema is not None and state.ema_batch_stats is not None:
        # The decay rises to its largest value. Otherwise, the averages of a short run would consist
        # mostly of its random start.
        steps = jnp.float32(state.step)
        decay = jnp.minimum(numbers.ema_decay, (1 + steps) / (10 + steps))
        ema = _move_average(recipe, decay, state.ema, params, "params")
        ema_batch_stats = _move_average(
            recipe, decay, state.ema_batch_stats, gradients.batch_stats, "batch_stats"
        )
    begins_epoch = state.step % batch.steps_per_epoch == 0
    sums = {"loss": gradients.loss, "errors": gradients.errors, "count": count}
    totals = {
        name: jnp.where(begins_epoch, 0, state.totals[name]) + value for name, value in sums.items()
    }
    is_first_bad = (state.bad_step < 0) & ~jnp.isfinite(gradients.loss)
    return State(
        step=state.step + 1,
        params=params,
        batch_stats=gradients.batch_stats,
        opt_state=opt_state,
        ema=ema,
        ema_batch_stats=ema_batch_stats,
        totals=totals,
        bad_step=jnp.where(is_first_bad, state.step, state.bad_step),
    )


def _clip(grads: dict, largest) -> dict:
    """Scales gradients down to the largest global norm, if theirs is larger."""
    scale = largest / jnp.maximum(optax.tree.norm(grads), largest)
    return jax.tree.map(lambda g: scale * g, grads)


def _move_average(recipe: Recipe, decay, average: dict, variables: dict, collection: str) -> dict:
    """Moves an average of the variables of a collection by one step."""
    # Frozen variables are left out: their average could differ from them in its last bit.
    trained, frozen = _split_frozen(recipe, variables, collection)
    average, _ = _split_frozen(recipe, average, collection)
    average = optax.incremental_update(trained, average, 1 - decay)
    return transfer.merge(average, frozen)


def _scale_parts(recipe: Recipe, numbers: Numbers, updates: dict) -> dict:
    """Multiplies updates by the rates of their parts.

    With every optimizer, updates are proportional to the learning rate: scaling them is scaling it.
    """
    rates: dict = {}
    for part, rate in zip(recipe.rates, numbers.rates):
        # `select` returns paths that begin with "params"; those of updates do not.
        paths = transfer.select(recipe.model, (part,))
        rates |= {path[1:]: rate for path in paths}
    scaled = {path: leaf * rates.get(path, 1.0) for path, leaf in flatten_dict(updates).items()}
    return unflatten_dict(scaled)


# ------------------------------------------------------------------ compiled programs


@flax.struct.dataclass
class Constants:
    """What all steps of a run share, on every device.

    Attributes:
      moments: as in `Batch`.
      rates: the learning rate of every step, float32 [steps].
    """

    moments: tuple[Leaf, Leaf]
    rates: Leaf


@flax.struct.dataclass
class Images:
    """A data set on every device, and the order in which an epoch goes through it.

    Attributes:
      images: uint8 [n, height, width, channels].
      labels: as in `loss_and_errors`.
      order: the epoch's permutation, int32 [n].
    """

    images: Leaf
    labels: Leaf
    order: Leaf


@functools.partial(jax.jit, static_argnums=0)
def epoch_order(count: int, epoch, seed) -> Int[AnyArray, " {count}"]:
    """Permutes the numbers of `count` images, for an epoch and a seed."""
    epoch_key = jax.random.fold_in(jax.random.key(seed), epoch)
    return jax.random.permutation(jax.random.fold_in(epoch_key, _SHUFFLE), count)


@functools.lru_cache(maxsize=32)
def resident_steps(parallel: Parallel, recipe: Recipe, batch_size: int) -> Callable:
    """Compiles steps on a data set that lives on the devices.

    The number of steps in one call does not change a bit of the result: the loop's body is one
    program.

    Returns:
      A function of (state, `Constants`, `Images`, `Numbers`, stop) that takes the steps from the
      state's own step up to `stop`, which is excluded, all in one epoch. The first three are
      replicated.
    """

    def take_steps(axis_name, state, constants, data, numbers, stop):
        steps_per_epoch = len(data.order) // batch_size
        size = batch_size
        rank = 0
        if axis_name is not None:
            size = batch_size // jax.lax.axis_size(axis_name)
            rank = jax.lax.axis_index(axis_name)

        def take_step(step, state):
            start = step % steps_per_epoch * batch_size + rank * size
            indices = jax.lax.dynamic_slice(data.order, (start,), (size,))
            batch = Batch(
                images=data.images[indices],
                labels=data.labels[indices],
                moments=constants.moments,
                learning_rate=constants.rates[step],
                steps_per_epoch=steps_per_epoch,
            )
            return batch_step(recipe, state, batch, numbers, axis_name=axis_name)

        return jax.lax.fori_loop(state.step, stop, take_step, state)

    return parallel.compile(take_steps, replicated=3, plain=2, donate=True)


@functools.lru_cache(maxsize=32)
def streamed_step(parallel: Parallel, recipe: Recipe) -> Callable:
    """Compiles one step on a batch that comes from the host.

    Returns:
      A function of (state, `Constants`, (images, labels), `Numbers`, steps_per_epoch). The first
      two are replicated, the third is shared.
    """

    def take_step(axis_name, state, constants, data, numbers, steps_per_epoch):
        images, labels = data
        batch = Batch(
            images=images,
            labels=labels,
            moments=constants.moments,
            learning_rate=constants.rates[state.step],
            steps_per_epoch=steps_per_epoch,
        )
        return batch_step(recipe, state, batch, numbers, axis_name=axis_name)

    return parallel.compile(take_step, replicated=2, shared=1, plain=2, donate=True)


@functools.lru_cache(maxsize=32)
def finiteness(parallel: Parallel) -> Callable:
    """Compiles a test of whether all parameters of a replicated state are finite."""

    def is_finite(axis_name, state):
        leaves = jax.tree.leaves(
            (state.params, state.batch_stats, state.ema, state.ema_batch_stats)
        )
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()

    return parallel.compile(is_finite, replicated=1)
