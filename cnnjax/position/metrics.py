"""How well a predicted map shows position."""

import numpy as np
from jaxtyping import Float, Int

METRICS = ("spc", "mae", "r2")
RING_METRICS = ("spc", "mae")
# A map with a smaller range counts as constant, where targets span 0 to 1: the ranks of its
# rounding errors would give meaningless correlations of up to 0.1.
CONSTANT = 1e-4


def scores(
    prediction: Float[np.ndarray, "*images _ _"], target: Float[np.ndarray, "_ _"]
) -> dict[str, Float[np.ndarray, "*images"]]:
    """Scores predicted maps [..., height, width] against a target, map by map.

    Returns scores by name:

    - `spc`: Spearman's rank correlation; 0 for a constant map or target.
    - `mae`: the mean absolute error.
    - `r2`: the share of the target's variance explained; 0 for its mean, negative if worse, and
      NaN for a constant target.

    A map with NaN has NaN for every score.

    Raises `ValueError` if the shapes of prediction and target differ.
    """
    # Imported when needed: it takes a second, and --help waits for all imports of a study.
    import scipy.stats

    if prediction.shape[-2:] != target.shape:
        raise ValueError(
            f"a prediction of shape {prediction.shape} does not fit a target of shape "
            f"{target.shape}"
        )
    flat = prediction.reshape(-1, target.size).astype(np.float64)
    goal = target.ravel().astype(np.float64)

    # Spearman's correlation is Pearson's of the ranks, which have the mean (n + 1) / 2. A map of
    # equal values has ranks of norm 0.
    mean_rank = (goal.size + 1) / 2
    goal_ranks = scipy.stats.rankdata(goal) - mean_rank
    ranks = scipy.stats.rankdata(flat, axis=1) - mean_rank
    norm = np.linalg.norm(ranks, axis=1) * np.linalg.norm(goal_ranks)
    correlation = ranks @ goal_ranks / np.where(norm > 0, norm, 1)
    # The range of a map with NaN is NaN, which is not less than anything.
    is_constant = np.ptp(flat, axis=1) < CONSTANT

    error = flat - goal
    variance = np.square(goal - goal.mean()).sum()
    if np.ptp(goal) == 0:
        # Rounding of the mean may leave a variance that means nothing.
        variance = np.nan
    result = {
        "spc": np.where(is_constant, 0.0, correlation),
        "mae": np.abs(error).mean(1),
        "r2": 1 - np.square(error).sum(1) / variance,
    }
    return {name: value.reshape(prediction.shape[:-2]) for name, value in result.items()}


def border_distance(height: int, width: int) -> Int[np.ndarray, "{height} {width}"]:
    """Counts the positions between each position and the nearest border."""
    rows = np.minimum(np.arange(height), np.arange(height)[::-1])
    columns = np.minimum(np.arange(width), np.arange(width)[::-1])
    return np.minimum.outer(rows, columns)


def rings(size: int, count: int) -> Int[np.ndarray, "{size} {size}"]:
    """Divides a square map into `count` rings of equal width, from the border inwards.

    Raises `ValueError` if a ring would have no position.
    """
    most = -(-size // 2)
    if not 1 <= count <= most:
        raise ValueError(
            f"count={count} is not between 1 and {most}, the most rings of a {size}x{size} map"
        )
    return np.minimum(border_distance(size, size) * 2 * count // size, count - 1)


def by_ring(
    prediction: Float[np.ndarray, "n size size"], target: Float[np.ndarray, "size size"], count: int
) -> dict[str, Float[np.ndarray, "n {count}"]]:
    """Scores each ring of square maps by itself: `spc` and `mae`.

    Raises `ValueError` as `rings`.
    """
    where = rings(len(target), count)
    by_number = []
    for number in range(count):
        is_inside = where == number
        # `scores` takes maps of two dimensions: a ring's pixels are a map of one row.
        by_number.append(scores(prediction[:, is_inside][:, None], target[is_inside][None]))
    result = {}
    for name in RING_METRICS:
        result[name] = np.stack([ring_scores[name] for ring_scores in by_number], 1)
    return result
