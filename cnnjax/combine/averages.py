"""Averages of parameter trees, the choice of ingredients, and means of logits."""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

# The learning rate of `learned`, as in the code of Wortsman et al. 2022, appendix I.
_LEARNING_RATE = 0.05


def average(trees: Sequence, weights: Sequence[float] | dict[str, Sequence[float]]):
    """Computes a weighted sum of trees of arrays.

    Args:
      trees: trees of the same structure and shapes.
      weights: one weight per tree, or, by layer, a list of one weight per tree.

    Returns a tree with the leaves' own types; sums are taken in float64.
    """

    def combine_leaves(path, *leaves):
        coefficients = weights
        if isinstance(weights, dict):
            coefficients = weights[_module_name(path)]
        total = np.tensordot(np.asarray(coefficients, np.float64), np.stack(leaves), 1)
        return total.astype(leaves[0].dtype)

    return jax.tree_util.tree_map_with_path(combine_leaves, *trees)


def _module_name(path) -> str:
    """Returns the name of the module that a parameter belongs to."""
    return ".".join(key.key for key in path[:-1])


def greedy(
    single_accuracies: Sequence[float], accuracy_of_average: Callable[[list[int]], float]
) -> list[int]:
    """Chooses the ingredients of a soup: recipe 1 of Wortsman et al. 2022 (arXiv 2203.05482).

    Models are tried from the best one down; each is added if the average does not get worse.

    Args:
      single_accuracies: the accuracy of each model alone, on validation images.
      accuracy_of_average: accuracy of the average of the models with these indices.

    Returns:
      The indices of the models, in the order in which they were added.
    """
    ingredients: list[int] = []
    best = -np.inf
    # The sort is stable: of equally accurate models the first comes first.
    indices = range(len(single_accuracies))
    from_best_down = sorted(indices, key=lambda index: -single_accuracies[index])
    for index in from_best_down:
        candidate = accuracy_of_average([*ingredients, index])
        if candidate >= best:
            ingredients = [*ingredients, index]
            best = candidate
    return ingredients


def learned(
    loss: Callable, trees: Sequence, batches: Iterable, by_layer: bool = False
) -> dict[str, list[float]]:
    """Learns the weights of an average by Adam, one step for each batch.

    The weights are a softmax: they are positive and their sum is 1. The temperature of Wortsman et
    al. 2022, learned beside the weights, changes no prediction and is left out.

    Args:
      loss: a function of (tree, batch).
      trees: the trees to average.
      batches: the batches, one for each step.
      by_layer: whether each layer has weights of its own.

    Returns:
      By layer name, the weight of each tree.
    """
    paths = jax.tree_util.tree_leaves_with_path(trees[0])
    layers = sorted({_module_name(path) for path, _ in paths})
    # The row of each layer in the scores, [rows, trees].
    rows = len(layers) if by_layer else 1
    row = {layer: index if by_layer else 0 for index, layer in enumerate(layers)}
    optimizer = optax.adam(_LEARNING_RATE)

    def mix(scores, stacked):
        weights = jax.nn.softmax(scores)

        def mix_leaves(path, leaves):
            # An accelerator would add in TF32 or bfloat16 by default, which have three digits.
            return jnp.tensordot(weights[row[_module_name(path)]], leaves, 1, precision="highest")

        return jax.tree_util.tree_map_with_path(mix_leaves, stacked)

    @jax.jit
    def update(scores, state, stacked, batch):
        gradient = jax.grad(lambda scores: loss(mix(scores, stacked), batch))(scores)
        changes, state = optimizer.update(gradient, state)
        return scores + changes, state

    stacked = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *trees))
    scores = jnp.zeros((rows, len(trees)))
    state = optimizer.init(scores)
    for batch in batches:
        scores, state = update(scores, state, stacked, batch)
    weights = scipy.special.softmax(np.asarray(scores, np.float64), axis=1)
    return {layer: weights[row[layer]].tolist() for layer in layers}


def ensemble_logits(logits: np.ndarray, mean_of: str = "probabilities") -> np.ndarray:
    """Averages the outputs of an ensemble's members.

    Args:
      logits: [..., members, classes].
      mean_of: "probabilities" or "logits".

    Returns:
      The logarithm of the mean probability, or the mean of the logits; [..., classes].

    Raises:
      ValueError: if `mean_of` is neither.
    """
    if mean_of not in ("probabilities", "logits"):
        raise ValueError(f"mean_of={mean_of!r} is not one of probabilities, logits")
    if mean_of == "logits":
        return logits.mean(-2)
    members = logits.shape[-2]
    log_probabilities = scipy.special.log_softmax(logits, axis=-1)
    return scipy.special.logsumexp(log_probabilities, axis=-2) - math.log(members)
