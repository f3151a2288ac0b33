"""How well a predicted map shows position."""

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

# Below this range, in units of a target that spans [0, 1], a map is called constant: ranking its rounding errors would
# give correlations of up to 0.1 that mean nothing.
CONSTANT = 1e-4


def scores(
    prediction: Float[np.ndarray, "*images _ _"], target: Float[np.ndarray, "_ _"]
) -> dict[str, Float[np.ndarray, "*images"]]:
    """Per-image scores of `prediction` [..., height, width] against `target` [height, width], each of shape [...].

    `spc` is Spearman's rank correlation (0 where the prediction is constant), `mae` the mean absolute error, `r2` the share
    of the target's variance that is explained (0 for its mean, negative for worse). Raises `ValueError` where shapes differ.
    """
    if prediction.shape[-2:] != target.shape:
        raise ValueError(
            f"a prediction of shape {prediction.shape} does not fit a target of shape {target.shape}"
        )
    flat = prediction.reshape(-1, target.size).astype(np.float64)
    goal = target.ravel().astype(np.float64)
    goal_ranks = scipy.stats.rankdata(goal) - (goal.size + 1) / 2
    ranks = scipy.stats.rankdata(flat, axis=1) - (goal.size + 1) / 2
    norm = np.linalg.norm(ranks, axis=1) * np.linalg.norm(goal_ranks)
    varies = np.ptp(flat, axis=1) >= CONSTANT
    error = flat - goal
    result = {
        "spc": np.where(varies, ranks @ goal_ranks / np.where(norm > 0, norm, 1), 0.0),
        "mae": np.abs(error).mean(1),
        "r2": 1 - np.square(error).sum(1) / np.square(goal - goal.mean()).sum(),
    }
    return {name: value.reshape(prediction.shape[:-2]) for name, value in result.items()}


def border_distance(height: int, width: int) -> Int[np.ndarray, "{height} {width}"]:
    """How many positions lie between each position and the nearest border."""
    return np.minimum.outer(
        *(np.minimum(np.arange(n), np.arange(n)[::-1]) for n in (height, width))
    )


def rings(size: int, count: int) -> Int[np.ndarray, "{size} {size}"]:
    """Divides a square map by the distance to its border into `count` rings of one width, 0 the outermost."""
    return np.minimum(border_distance(size, size) * 2 * count // size, count - 1)


def by_ring(
    prediction: Float[np.ndarray, "n size size"], target: Float[np.ndarray, "size size"], count: int
) -> dict[str, Float[np.ndarray, "n {count}"]]:
    """`spc` and `mae` of every ring by itself."""
    where = rings(len(target), count)
    found = [
        scores(prediction[:, where == ring][:, None], target[where == ring][None])
        for ring in range(count)
    ]
    return {name: np.stack([ring[name] for ring in found], 1) for name in ("spc", "mae")}
