"""Linear readouts of position from frozen features, as unpadded convolutions.

There are two ways to find the weights of the k x k convolution. `fit_exact` solves the ridge
regression, which has one solution and no seed. `fit_sgd` trains as the authors' code does
(github.com/SenJia/Position-Information), with BatchNorm and a sigmoid after the convolution, and
optionally with hidden convolutions before it.

Both treat all targets, and `fit_exact` all ridge strengths, as columns of one kernel: a whole set
of readouts is one program on the same features.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cnnjax import ridge
from cnnjax.nn import resize
from cnnjax.position.convolution import (
    apply_scaler,
    check_kernel,
    convolve,
    correlate,
    fit_scaler,
    window_taps,
)
from cnnjax.position.sgd_readout import Sgd, fit_sgd, full_size_error
from cnnjax.runtime.types import AnyArray

__all__ = ["STRENGTHS", "Exact", "Sgd", "fit_exact", "fit_sgd", "full_size_error"]

# Ridge strengths to choose from, per training position and for features of unit variance. Each
# target takes the one with the least error on held-out photographs.
STRENGTHS = tuple(10.0**power for power in range(-3, 4))

# Conjugate gradients stop at this residual, relative to the right-hand side, or after this many
# steps. The weakest strengths may then miss it; `Exact.residual` is that of the chosen ones.
_TOLERANCE = 1e-5
_MAX_STEPS = 300


class Exact(NamedTuple):
    """A solved readout, applied by calling it.

    Attributes:
      scaler: standardizes the features first.
      kernel: the convolution's kernel.
      intercept: the convolution's bias.
      strength: the ridge strength chosen for each target.
      residual: the largest relative residual of the linear systems; 0 where they were factored.
    """

    scaler: ridge.Scaler
    kernel: Float[Array, "k k channels targets"]
    intercept: Float[Array, " targets"]
    strength: Float[np.ndarray, " targets"]
    residual: float

    def __call__(
        self, features: Float[AnyArray, "n height width channels"]
    ) -> Float[np.ndarray, "n targets rows columns"]:
        """Predicts the maps of all targets, smaller than the features by k - 1."""
        maps = _read_exact(self.scaler, features, self.kernel, self.intercept)
        return np.asarray(maps).transpose(0, 3, 1, 2)


@jax.jit
def _read_exact(scaler, features, kernel, intercept):
    # As in `fit_exact`: TF32 and bfloat16 are too coarse for the weak strengths.
    with jax.default_matmul_precision("highest"):
        return convolve(apply_scaler(scaler, features), kernel) + intercept


def fit_exact(
    train: Float[AnyArray, "n height width channels"],
    held_out: Float[AnyArray, "m height width channels"],
    targets: Float[AnyArray, "targets side side"],
    size: int = 1,
    align_corners: bool = True,
) -> Exact:
    """Solves the ridge readout of every target.

    The kernel minimizes the mean squared error over training positions plus `strength` times the
    squared weights, on the readout's own grid, to which targets are resized.

    Args:
      train: features to fit to; they also set the scaler.
      held_out: features whose squared error chooses each target's strength, one of the powers of
        ten from 10^-3 to 10^3 (`STRENGTHS`).
      targets: the position maps.
      size: k of the k x k kernel.
      align_corners: whether the targets' corners lie on the grid's.

    Raises `ValueError` if the kernel is larger than the map, or if there are no images to fit to or
    to hold out.
    """
    check_kernel(train, size, layers=1)
    for name, features in (("train", train), ("held_out", held_out)):
        if not len(features):
            raise ValueError(f"{name} has features of no image; expected at least one")
    train = jnp.asarray(train)
    scaler = fit_scaler(train)
    train = apply_scaler(scaler, train)
    held_out = apply_scaler(scaler, held_out)
    grid = (train.shape[1] - size + 1, train.shape[2] - size + 1)
    goal = _resize_targets(targets, grid, align_corners)

    # Accelerators' shorter products (TF32, bfloat16) are too coarse for the weak strengths.
    with jax.default_matmul_precision("highest"):
        solve = _solve_pointwise if size == 1 else _solve_windows
        # One column for each strength and target, the strengths outermost.
        kernel, residual = solve(train, goal, size)
        intercept, error = _intercept_and_error(train, held_out, kernel, goal)

    best = np.asarray(error).reshape(len(STRENGTHS), len(targets)).argmin(0)
    # The column of strength i and target j is i * len(targets) + j.
    chosen = best * len(targets) + np.arange(len(targets))
    return Exact(
        scaler=scaler,
        kernel=kernel[..., chosen],
        intercept=intercept[chosen],
        strength=np.asarray(STRENGTHS)[best],
        residual=float(residual[chosen].max()),
    )


@functools.partial(jax.jit, static_argnames=("grid", "align_corners"))
def _resize_targets(targets, grid, align_corners):
    """Resizes the position maps [targets, side, side] to [*grid, targets]."""
    return resize(targets[..., None], grid, align_corners)[..., 0].transpose(1, 2, 0)


@jax.jit
def _intercept_and_error(train, held_out, kernel, goal):
    """Returns each column's intercept, and its mean squared error on held-out features."""
    goal = jnp.tile(goal, (1, 1, kernel.shape[3] // goal.shape[2]))
    intercept = goal.mean((0, 1)) - convolve(train, kernel).mean((0, 1, 2))
    error = jnp.square(convolve(held_out, kernel) + intercept - goal).mean((0, 1, 2))
    return intercept, error


def _factor_channels(features: Float[Array, "n height width channels"]) -> ridge.Factors:
    """Factors the Gram matrix of channels, averaged over positions."""
    positions = math.prod(features.shape[:3])
    return ridge.factor(np.asarray(_gram(features), np.float64) / positions)


@jax.jit
def _gram(features):
    flat = features.reshape(-1, features.shape[3])
    return flat.T @ flat


def _center(
    goal: Float[Array, "rows columns targets"], count: int
) -> Float[Array, "{count} rows columns targets"]:
    """Repeats the goal for every image, without its mean.

    The mean is left to the intercept, which then drops out of the system.
    """
    return jnp.broadcast_to(goal - goal.mean((0, 1)), (count, *goal.shape))


def _solve_pointwise(features, goal, size):
    """Solves a 1x1 readout by factoring its channels' Gram matrix (`cnnjax.ridge`).

    `size` is 1. Returns the kernel, and residuals of 0, since the system is factored.
    """
    channels = features.shape[3]
    positions = len(features) * goal.shape[0] * goal.shape[1]
    products = np.asarray(_target_products(features, goal), np.float64) / positions
    weights = ridge.solve(_factor_channels(features), products, np.asarray(STRENGTHS))
    # [strengths, channels, targets] -> [1, 1, channels, strengths * targets]
    kernel = weights.transpose(1, 0, 2).reshape(1, 1, channels, -1)
    return jnp.asarray(kernel, jnp.float32), np.zeros(kernel.shape[3])


@jax.jit
def _target_products(features, goal):
    """Multiplies channels by targets, summed over all positions: [channels, targets]."""
    return correlate(features, _center(goal, len(features)), size=1)[0, 0]


def _solve_windows(features, goal, size):
    """Solves a k x k readout by conjugate gradients.

    The Gram matrix of k^2 times as many features is too large to factor: 12,000 rows for a 3x3
    kernel on VGG-16's 1,472 channels. Returns the kernel and each column's relative residual.
    """
    values, basis = _factor_channels(features)
    return _conjugate_gradients(
        features,
        jnp.tile(goal, (1, 1, len(STRENGTHS))),
        strengths=jnp.asarray(np.repeat(STRENGTHS, goal.shape[2]), jnp.float32),
        values=jnp.asarray(values, jnp.float32),
        basis=jnp.asarray(basis, jnp.float32),
        size=size,
    )


class _Descent(NamedTuple):
    """The state of conjugate gradients, for all columns at once."""

    kernel: Float[Array, "k k channels columns"]
    residual: Float[Array, "k k channels columns"]
    direction: Float[Array, "k k channels columns"]
    energy: Float[Array, " columns"]  # residual . preconditioned residual
    steps: int | Array


@functools.partial(jax.jit, static_argnames="size")
def _conjugate_gradients(features, goal, *, strengths, values, basis, size):
    """Solves the ridge systems of all columns by preconditioned conjugate gradients.

    Args:
      features: standardized, [n, height, width, channels].
      goal: [rows, columns, columns of the kernel].
      strengths: the ridge strength of each column.
      values: the eigenvalues of the channels' Gram matrix.
      basis: its eigenvectors, [channels, channels].
      size: k of the k x k kernel.

    Returns the kernel [k, k, channels, columns] and each column's relative residual.
    """
    positions = len(features) * goal.shape[0] * goal.shape[1]

    def dot(a, b):
        return (a * b).sum((0, 1, 2))

    # The matrix of the normal equations, applied to a kernel.
    def system(kernel):
        maps = convolve(features, kernel)
        gradient = correlate(features, maps - maps.mean((0, 1, 2)), size)
        return gradient / positions + strengths * kernel

    # The preconditioner inverts a simpler system: the correlation of two features is that of their
    # channels times that of their offset. Its Gram matrix is a Kronecker product (taps x channels),
    # so its eigenvectors are products of the two factors' eigenvectors.
    tap_values, tap_basis = jnp.linalg.eigh(_spatial_correlation(features, size))
    spectrum = jnp.maximum(tap_values, 1e-6)[:, None] * values  # [taps, channels]

    def precondition(residual):
        flat = residual.reshape(size * size, -1, residual.shape[3])
        rotated = jnp.einsum("ta,tcx,cd->adx", tap_basis, flat, basis)
        rotated = rotated / (spectrum[..., None] + strengths)
        return jnp.einsum("ta,adx,cd->tcx", tap_basis, rotated, basis).reshape(residual.shape)

    right = correlate(features, _center(goal, len(features)), size) / positions
    norm = jnp.maximum(jnp.sqrt(dot(right, right)), 1e-30)

    def relative(residual):
        return jnp.sqrt(dot(residual, residual)) / norm

    def unfinished(state):
        return (relative(state.residual).max() > _TOLERANCE) & (state.steps < _MAX_STEPS)

    def step(state):
        product = system(state.direction)
        rate = state.energy / jnp.maximum(dot(state.direction, product), 1e-30)
        residual = state.residual - rate * product
        preconditioned = precondition(residual)
        energy = dot(residual, preconditioned)
        momentum = energy / jnp.maximum(state.energy, 1e-30)
        return _Descent(
            kernel=state.kernel + rate * state.direction,
            residual=residual,
            direction=preconditioned + momentum * state.direction,
            energy=energy,
            steps=state.steps + 1,
        )

    direction = precondition(right)
    start = _Descent(
        kernel=jnp.zeros_like(right),
        residual=right,
        direction=direction,
        energy=dot(right, direction),
        steps=0,
    )
    kernel = lax.while_loop(unfinished, step, start).kernel
    # The residual kept by the loop drifts from the true one; this is the true one.
    return kernel, relative(right - system(kernel))


def _spatial_correlation(
    features: Float[Array, "n height width channels"], size: int
) -> Float[Array, "taps taps"]:
    """Correlates features between the taps of a k x k window, averaged over channels."""
    height, width = features.shape[1:3]
    gap = size - 1
    around = jnp.pad(features, ((0, 0), (gap, gap), (0, gap), (0, 0)))
    # The correlation at an offset is that at its opposite: half of the offsets are enough.
    shifts = np.array(list(itertools.product(range(-gap, size), range(size))))

    def index(row, column):
        """Returns where `shifts` lists an offset; columns are 0 or more."""
        return (row + gap) * size + column

    def total(shift):
        start = (0, gap + shift[0], shift[1], 0)
        return (lax.dynamic_slice(around, start, features.shape) * features).sum()

    # One shift after the other: a shifted copy is as large as the features, and XLA would make
    # the copies of all shifts at once.
    totals = lax.map(total, jnp.asarray(shifts))
    overlaps = (height - abs(shifts[:, 0])) * (width - shifts[:, 1])
    means = totals / overlaps.astype(np.float32)

    taps = np.array(window_taps(size))
    offsets = taps[:, None] - taps
    # An offset with a negative column is looked up at its opposite.
    offsets = np.where(offsets[..., 1:] < 0, -offsets, offsets)
    rows = offsets[..., 0]
    columns = offsets[..., 1]
    # Relative to the correlation of each feature with itself.
    return means[index(rows, columns)] / means[index(0, 0)]
