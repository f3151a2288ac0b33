"""Computations on the members' networks: outputs and new BatchNorm statistics."""

import functools
from collections.abc import Callable

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import transfer
from cnnjax.models import Network
from cnnjax.nn import BatchNorm
from cnnjax.nn.sums import channel_sum, squared_deviation
from cnnjax.train import evaluate
from cnnjax.train.parallel import Parallel
from cnnjax.transfer import Path


@functools.cache
def member_logits(output: Callable) -> Callable:
    """Returns a function that computes all members' outputs, for `predict_batches`.

    Args:
      output: what to compute for one member, a function of (model, variables, images), such as
        `evaluate.logits`.

    Returns:
      A function of the model, variables stacked [members, ...] and images [members, batch, height,
      width, channels], normalized as each member needs them. It returns
      [batch, members, classes].
    """

    def all_outputs(model, variables, images):
        # One member after the other. On 2 CPU cores, three to five members take 3.0 to 5.6 times
        # as long as one, in the memory of one. vmap, which turns their convolutions into grouped
        # ones, takes between 0.6 times (three ResNet-18 on 32x32) and 9.3 times (five LeNets).
        outputs = jax.lax.map(lambda member: output(model, *member), (variables, images))
        return outputs.swapaxes(0, 1)

    return all_outputs


def logits_in_training_mode(
    model: Network, variables, images, frozen: frozenset[Path] = frozenset()
) -> jnp.ndarray:
    """Computes logits with the batch's statistics; dropout is the same for every batch.

    A BatchNorm whose statistics are in `frozen` uses them instead.
    """
    rngs = {"dropout": jax.random.key(0), "padding": jax.random.key(0)}
    with nn.intercept_methods(transfer.in_evaluation_mode(frozen)):
        logits, _ = model.apply(
            variables, images, train=True, mutable=["batch_stats", "auxiliary"], rngs=rngs
        )
    return logits


# Cached: `evaluate.compiled` keeps a program by its function.
@functools.cache
def _input_moments(frozen: frozenset[Path]) -> Callable:
    """Returns a function that computes the moments of every BatchNorm's input in training mode.

    Args:
      frozen: as in `logits_in_training_mode`.

    Returns:
      A function of the model, variables and images. It returns, by the module's path, the mean and
      variance [1, channels] and the number of values [1].
    """

    def input_moments(model, variables, images):
        moments = {}

        def record(call, arguments, options, context):
            if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
                x = arguments[0].astype(jnp.float32)
                count = x.size // x.shape[-1]
                mean = channel_sum(x) / count
                variance = squared_deviation(x, mean) / count
                moments[context.module.path] = (mean[None], variance[None], jnp.full(1, count))
            return call(*arguments, **options)

        with nn.intercept_methods(record):
            logits_in_training_mode(model, variables, images, frozen)
        return moments

    return input_moments


def reestimate_statistics(
    parallel: Parallel,
    model: Network,
    variables,
    moments,
    images: np.ndarray,
    batch_size: int,
    frozen: frozenset[Path] = frozenset(),
) -> dict:
    """Computes the BatchNorm statistics that averaged parameters need.

    They are the mean and the unbiased variance over all full batches. On the way to a BatchNorm,
    each batch is normalized by its own statistics (Izmailov et al. 2018, arXiv 1803.05407, section
    3.2).

    Args:
      parallel: how to run the network on the devices.
      model: the network.
      variables: its variables, host arrays.
      moments: the mean and deviation that images are normalized by, host arrays.
      images: training images in random order, uint8 [n, height, width, channels].
      batch_size: the number of images of a batch.
      frozen: the paths of frozen variables (`transfer.select`). As in training, a frozen BatchNorm
        normalizes by its statistics, which are returned unchanged.

    Returns:
      The collection `batch_stats`; {} if the network has none.

    Raises:
      ValueError: if there are not enough images for one batch.
    """
    batch_stats = variables.get("batch_stats", {})
    outdated, frozen_statistics = transfer.split(batch_stats, frozen, "batch_stats")
    if not outdated:
        return batch_stats
    if not 1 <= batch_size <= len(images):
        raise ValueError(
            f"batch_size={batch_size} is not from 1 to {len(images)}, the number of images"
        )
    compute = evaluate.compiled(parallel, model, _input_moments(frozen))
    replicated = parallel.replicate((variables, moments))
    full_batches = images[: len(images) // batch_size * batch_size]
    batch_moments = []
    for batch in evaluate.batches_of(full_batches, batch_size):
        batch_moments.append(parallel.fetch_shared(compute(*replicated, parallel.share(batch))))
    statistics: dict[tuple[str, ...], np.ndarray] = {}
    for path in batch_moments[0]:
        # A triple for each batch: mean and variance [1, channels], number of values [1].
        of_batches = [by_path[path] for by_path in batch_moments]
        means, variances, counts = (np.concatenate(x).astype(np.float64) for x in zip(*of_batches))
        # All batches have one size. So the variance of all values is the mean of the variances
        # within batches plus the variance of their means, here made unbiased.
        mean = means.mean(0)
        total = counts.sum()
        variance = (variances + np.square(means - mean)).mean(0) * total / (total - 1)
        statistics[(*path, "mean")] = mean.astype(np.float32)
        statistics[(*path, "var")] = variance.astype(np.float32)
    return transfer.merge(flax.traverse_util.unflatten_dict(statistics), frozen_statistics)
