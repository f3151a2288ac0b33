"""Training and testing a small network on images in memory, without a work directory."""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from cnnjax import transfer
from cnnjax.data import arrays, augment
from cnnjax.inspect.trace import apply
from cnnjax.models import Network
from cnnjax.nn import global_avg_pool
from cnnjax.runtime import imagenet
from cnnjax.train import evaluate, step
from cnnjax.train.parallel import Parallel

_TEST_BATCH = 200
# The learning rate of the first step.
_RATE = 2e-3


def train_epochs(
    model: Network,
    data: arrays.Split,
    epochs: int,
    seed: int,
    *,
    batch_size: int,
    momentum: float = 0.9,
) -> Iterator[dict]:
    """Trains with Adam, at a rate that falls linearly to 0.

    The next epoch reuses the memory of the variables, so use them before asking for it.

    Yields:
      The variables before the first and after every epoch.
    """
    recipe = step.Recipe(model, "adam")
    numbers = step.Numbers(seed=seed, momentum=momentum)
    steps = len(data.labels) // batch_size
    take_steps = step.resident_steps(Parallel("jit"), recipe, batch_size)
    rates = np.linspace(_RATE, 0, epochs * steps, dtype=np.float32)
    constants = step.Constants(moments=imagenet.MOMENTS, rates=rates)
    state = step.init(recipe, data.images.shape[1:], numbers)
    resident = jax.device_put(tuple(data))
    for epoch in range(epochs + 1):
        yield {"params": state.params, "batch_stats": state.batch_stats}
        if epoch < epochs:
            order = step.epoch_order(len(data.labels), epoch, seed)
            stop = (epoch + 1) * steps
            images = step.Images(images=resident[0], labels=resident[1], order=order)
            state = take_steps(state, constants, images, numbers, stop)


@functools.partial(jax.jit, static_argnames="model")
def _classes(model, variables, images, key):
    x = augment.normalize(images, *imagenet.MOMENTS)
    return model.apply(variables, x, rngs={"padding": key, "dropout": key}).argmax(1)


def classify(model: Network, variables: dict, images: np.ndarray) -> np.ndarray:
    """Returns the predicted class of each uint8 image.

    A network that draws random numbers gets new ones for every batch.
    """
    parts = []
    for start in range(0, len(images), _TEST_BATCH):
        batch = images[start : start + _TEST_BATCH]
        parts.append(_classes(model, variables, batch, jax.random.key(start)))
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("model", "stage"))
def _pooled(model, variables, images, stage):
    x = augment.normalize(images, *imagenet.MOMENTS)
    return global_avg_pool(apply(model, variables, x, method="stages", last=stage)[stage])


def pooled_features(
    model: Network,
    variables: dict,
    images: np.ndarray,
    batch_size: int = _TEST_BATCH,
) -> np.ndarray:
    """Returns the last stage's global average of each uint8 image, [n, channels].

    The variables of the head may be absent.
    """
    # The stages are in order; "logits" follows the last one of features.
    last_stage = list(transfer.stage_paths(model))[-2]
    variables = jax.device_put(variables)
    parts = []
    for batch in evaluate.batches_of(images, batch_size):
        parts.append(_pooled(model, variables, batch, last_stage))
    return np.concatenate(parts)


def resize(split: arrays.Split, size: int) -> arrays.Split:
    """Returns images of `size` pixels a side, uint8, bilinear."""

    @jax.jit
    def resized(images):
        shape = (len(images), size, size, 3)
        enlarged = jax.image.resize(images.astype(np.float32), shape, "bilinear")
        return enlarged.round().astype(np.uint8)

    # In ten parts, since float32 images take four times the memory of uint8 ones.
    parts = [np.asarray(resized(part)) for part in np.array_split(split.images, 10)]
    return arrays.Split(np.concatenate(parts), split.labels)
