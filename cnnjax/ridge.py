"""Ridge regression: least squares with a penalty on the weights, solved exactly.

Used by linear readouts and probes. Arrays are NumPy float64, since float32 is too imprecise for the
weakest penalties. The cost is one eigendecomposition.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from threadpoolctl import ThreadpoolController

from cnnjax.runtime.types import AnyArray


class Scaler(NamedTuple):
    """Standardizes features [..., features].

    Features that `fit_scaler` takes for constant become 0.
    """

    mean: Float[AnyArray, " features"]
    scale: Float[AnyArray, " features"]

    def __call__(
        self, features: Float[AnyArray, "*positions features"]
    ) -> Float[AnyArray, "*positions features"]:
        return (features - self.mean) * self.scale


def fit_scaler(features: Float[AnyArray, "*positions features"]) -> Scaler:
    """Fits a scaler to training features, with NumPy or inside `jax.jit`.

    A feature whose standard deviation is below 1e-6 of the largest counts as constant. In float32,
    rounding gives a constant feature a deviation of about that size; dividing by it would amplify
    noise. Bring features of very different units to one unit first.
    """
    xp = features.__array_namespace__()
    axes = tuple(range(features.ndim - 1))
    mean = features.mean(axes)
    std = features.std(axes)
    varies = std > 1e-6 * std.max()
    # The inner `where` avoids a division by 0.
    scale = xp.where(varies, 1 / xp.where(varies, std, 1), 0)
    return Scaler(mean, scale)


class Factors(NamedTuple):
    """The eigendecomposition of a Gram matrix: `basis @ diag(values) @ basis.T`."""

    values: Float[np.ndarray, " n"]
    basis: Float[np.ndarray, "n n"]


# Let n be the number of examples, d of features and t of targets: x is [n, d], y is [n, t], and
# both have their means subtracted, which leaves the intercept out of the system. The weights w
# with the least |x w - y|^2 + s |w|^2 have two forms:
#
#   (A) w = (x' x + s I)^-1 x' y    a system of d equations, for n >= d
#   (B) w = x' (x x' + s I)^-1 y    a system of n equations, for n < d
#
# Either Gram matrix, x' x or x x', is q diag(v) q' with orthogonal q. Adding s I adds s to each
# eigenvalue in v, so (gram + s I)^-1 = q diag(1 / (v + s)) q': after one eigendecomposition, each
# further strength s costs two matrix products. With the mean squared error in place of its sum,
# the Gram matrix and the products x' y are divided by n, and s is per example.


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def factor(gram: Float[AnyArray, "n n"]) -> Factors:
    """Decomposes a Gram matrix, x' x or x x' (see the comment above)."""
    # OpenBLAS's threads meet thousands of times in a decomposition and wait in busy loops. Beside
    # other work, as in a sweep's jobs, two threads take many times as long as one; on an idle
    # machine they save a third.
    with _blas().limit(limits=1):
        values, basis = np.linalg.eigh(np.asarray(gram, np.float64))
    # The eigenvalues of a Gram matrix are at least 0, but for rounding.
    return Factors(np.maximum(values, 0), basis)


def solve(
    factors: Factors,
    products: Float[AnyArray, "n targets"],
    strengths: Float[AnyArray, "*strengths"] | float,
) -> Float[np.ndarray, "*strengths n targets"]:
    """Solves (gram + strength I) w = products for every strength and target.

    Form (A) passes x' y as `products` and gets the weights; form (B) passes y and gets the
    coefficients by which x' is multiplied.
    """
    rotated = factors.basis.T @ np.asarray(products, np.float64)
    denominators = factors.values[:, None] + np.asarray(strengths)[..., None, None]
    return factors.basis @ (rotated / denominators)
