"""Linear readouts of position from frozen features, as unpadded convolutions.

There are two ways to find the weights of the k x k convolution. `fit_exact` solves the ridge
regression, which has one solution and no seed. `fit_sgd` trains as the authors' code does
(github.com/SenJia/Position-Information), with BatchNorm and a sigmoid after the convolution, and
optionally with hidden convolutions before it.

Both treat all targets, and `fit_exact` all ridge strengths, as columns of one kernel: a whole set of
readouts is one program on the same features.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

from cnnjax import ridge
from cnnjax.nn import conv, resize
from cnnjax.runtime.types import AnyArray

# Ridge strengths to choose from, per training position and for features of unit variance. Each
# target takes the one with the least error on held-out photographs.
STRENGTHS = tuple(10.0**power for power in range(-3, 4))

# Conjugate gradients stop at this residual, relative to the right-hand side, or after this many
# steps. The weakest strengths may then miss it; `Exact.residual` is that of the chosen ones.
_TOLERANCE = 1e-5
_MAX_STEPS = 300

# The authors' code: SGD, learning rate 0.1 cut to a tenth at epoch 10 of 15, batches of 32.
_LEARNING_RATE = 0.1
_MOMENTUM = 0.9
_WEIGHT_DECAY = 1e-4
_BATCH = 32
_BN_MOMENTUM = 0.1
_BN_EPS = 1e-5

_fit_scaler = jax.jit(ridge.fit_scaler)


def _check_kernel(features: Float[AnyArray, "n height width channels"], size: int, layers: int):
    height, width = features.shape[1:3]
    if size < 1 or layers * (size - 1) >= min(height, width):
        times = f" {layers} times" if layers > 1 else ""
        raise ValueError(f"kernel={size} does not fit {height}x{width} features{times}")


# ------------------------------------------------------------------ the convolution


def _taps(size: int) -> list[tuple[int, int]]:
    """Lists the (row, column) offsets of a k x k window."""
    return [(i, j) for i in range(size) for j in range(size)]


@jax.custom_vjp
def _convolve(
    features: Float[Array, "n height width channels"], kernel: Float[Array, "k k channels columns"]
) -> Float[Array, "n height-k+1 width-k+1 columns"]:
    """Convolves without padding.

    It is differentiable in the kernel only, as the features are frozen.
    """
    # One matrix product for all taps, then a sum of k^2 shifted maps of a few columns. The plain
    # form is one `lax.conv`; unfolding windows (im2col) would copy the features k^2 times.
    size = kernel.shape[0]
    channels = features.shape[3]
    matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    products = features.reshape(-1, channels) @ matrix
    products = products.reshape(*features.shape[:3], size, size, -1)
    height = features.shape[1] - size + 1
    width = features.shape[2] - size + 1
    shifted = (products[:, i : i + height, j : j + width, i, j] for i, j in _taps(size))
    return functools.reduce(operator.add, shifted)


def _correlate(
    features: Float[Array, "n height width channels"],
    maps: Float[Array, "n _ _ columns"],
    size: int,
) -> Float[Array, "k k channels columns"]:
    """Correlates features with maps at each offset of the window.

    This is the transpose of `_convolve`.
    """
    gap = size - 1
    channels = features.shape[3]
    shifted = [jnp.pad(maps, ((0, 0), (i, gap - i), (j, gap - j), (0, 0))) for i, j in _taps(size)]
    columns = jnp.stack(shifted, 3).reshape(-1, size * size * maps.shape[3])
    # Columns first: XLA's CPU backend multiplies features' @ maps, which JAX would derive, at
    # half the speed.
    product = columns.T @ features.reshape(-1, channels)
    return product.reshape(size, size, maps.shape[3], channels).transpose(0, 1, 3, 2)


def _convolve_forward(features, kernel):
    return _convolve(features, kernel), (features, kernel.shape[0])


def _convolve_backward(residuals, maps):
    features, size = residuals
    return None, _correlate(features, maps, size)


_convolve.defvjp(_convolve_forward, _convolve_backward)


# ------------------------------------------------------------------ the exact readout


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
    return _convolve(scaler(features), kernel) + intercept


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
      held_out: features whose squared error chooses each target's strength, of `STRENGTHS`.
      targets: the position maps.
      size: k of the k x k kernel.
      align_corners: whether the targets' corners lie on the grid's.

    Raises `ValueError` if the kernel is larger than the map.
    """
    _check_kernel(train, size, layers=1)
    train = jnp.asarray(train)
    scaler = _fit_scaler(train)
    train = _standardize(scaler, train)
    held_out = _standardize(scaler, held_out)
    grid = (train.shape[1] - size + 1, train.shape[2] - size + 1)
    goal = _resize_targets(targets, grid, align_corners)

    # Accelerators' shorter products (TF32, bfloat16) are too coarse for the weak strengths.
    with jax.default_matmul_precision("highest"):
        solve = _solve_pointwise if size == 1 else _solve_windows
        # One column for each strength and target, the strengths outermost.
        kernel, residual = solve(train, goal, size)
        intercept, error = _intercept_and_error(train, held_out, kernel, goal)

    best = np.asarray(error).reshape(len(STRENGTHS), len(targets)).argmin(0)
    chosen = best * len(targets) + np.arange(len(targets))
    return Exact(
        scaler=scaler,
        kernel=kernel[..., chosen],
        intercept=intercept[chosen],
        strength=np.asarray(STRENGTHS)[best],
        residual=float(residual[chosen].max()),
    )


@jax.jit
def _standardize(scaler, features):
    return scaler(features)


@functools.partial(jax.jit, static_argnames=("grid", "align_corners"))
def _resize_targets(targets, grid, align_corners):
    """Resizes the position maps [targets, side, side] to [*grid, targets]."""
    return resize(targets[..., None], grid, align_corners)[..., 0].transpose(1, 2, 0)


@jax.jit
def _intercept_and_error(train, held_out, kernel, goal):
    """Returns each column's intercept, and its mean squared error on held-out features."""
    goal = jnp.tile(goal, (1, 1, kernel.shape[3] // goal.shape[2]))
    intercept = goal.mean((0, 1)) - _convolve(train, kernel).mean((0, 1, 2))
    error = jnp.square(_convolve(held_out, kernel) + intercept - goal).mean((0, 1, 2))
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
    """Solves a 1x1 readout by factoring its channels' Gram matrix (`cnnjax.ridge`)."""
    channels = features.shape[3]
    positions = len(features) * goal.shape[0] * goal.shape[1]
    products = np.asarray(_target_products(features, goal), np.float64) / positions
    weights = ridge.solve(_factor_channels(features), products, STRENGTHS)
    kernel = weights.transpose(1, 0, 2).reshape(1, 1, channels, -1)
    return jnp.asarray(kernel, jnp.float32), np.zeros(kernel.shape[3])


@jax.jit
def _target_products(features, goal):
    """Multiplies channels by targets, summed over all positions: [channels, targets]."""
    return _correlate(features, _center(goal, len(features)), size=1)[0, 0]


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
    positions = len(features) * goal.shape[0] * goal.shape[1]

    def dot(a, b):
        return (a * b).sum((0, 1, 2))

    def system(kernel):
        maps = _convolve(features, kernel)
        gradient = _correlate(features, maps - maps.mean((0, 1, 2)), size)
        return gradient / positions + strengths * kernel

    # The preconditioner is the inverse of the system of features whose correlation between
    # channels does not depend on the offset between positions, nor that between positions on the
    # channel. Its Gram matrix is a Kronecker product, so its eigenvectors are products too.
    tap_values, tap_basis = jnp.linalg.eigh(_spatial_correlation(features, size))
    spectrum = jnp.maximum(tap_values, 1e-6)[:, None] * values  # [taps, channels]

    def precondition(residual):
        flat = residual.reshape(size * size, -1, residual.shape[3])
        rotated = jnp.einsum("ta,tcx,cd->adx", tap_basis, flat, basis)
        rotated = rotated / (spectrum[..., None] + strengths)
        return jnp.einsum("ta,adx,cd->tcx", tap_basis, rotated, basis).reshape(residual.shape)

    right = _correlate(features, _center(goal, len(features)), size) / positions
    norm = jnp.maximum(jnp.sqrt(dot(right, right)), 1e-30)

    def relative(residual):
        return jnp.sqrt(dot(residual, residual)) / norm

    def unfinished(state):
        return (relative(state.residual).max() > _TOLERANCE) & (state.steps < _MAX_STEPS)

    def step(state):
        image = system(state.direction)
        rate = state.energy / jnp.maximum(dot(state.direction, image), 1e-30)
        residual = state.residual - rate * image
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

    def total(shift):
        start = (0, gap + shift[0], shift[1], 0)
        return (lax.dynamic_slice(around, start, features.shape) * features).sum()

    # One shift after the other: a shifted copy is as large as the features, and XLA would make
    # the copies of all shifts at once.
    totals = lax.map(total, jnp.asarray(shifts))
    overlaps = (height - abs(shifts[:, 0])) * (width - shifts[:, 1])
    means = totals / overlaps.astype(np.float32)

    taps = np.array(_taps(size))
    offsets = taps[:, None] - taps
    offsets = np.where(offsets[..., 1:] < 0, -offsets, offsets)
    center = gap * size
    return means[(offsets[..., 0] + gap) * size + offsets[..., 1]] / means[center]


# ------------------------------------------------------------------ the authors' readout


class Sgd(NamedTuple):
    """Trained readouts of all targets, applied by calling it.

    Attributes:
      scaler: standardizes the features first.
      layers: each layer's `kernel` and BatchNorm's `scale` and `bias`, the outputs side by side.
      moments: each layer's running mean and variance.
    """

    scaler: ridge.Scaler
    layers: list[dict]
    moments: list[tuple]

    def __call__(
        self, features: Float[AnyArray, "n height width channels"]
    ) -> Float[np.ndarray, "n targets rows columns"]:
        """Predicts maps, smaller by k - 1 for each layer."""
        maps = _read_sgd(self.scaler, self.layers, self.moments, features)
        return np.asarray(maps).transpose(0, 3, 1, 2)


@jax.jit
def _read_sgd(scaler, layers, moments, features):
    return _forward(layers, scaler(features), moments)[0]


def fit_sgd(
    train: Float[AnyArray, "n height width channels"],
    targets: Float[AnyArray, "targets side side"],
    size: int = 1,
    steps: int = 540,
    seed: int = 0,
    hidden: tuple[int, ...] = (),
    standardize: bool = True,
    align_corners: bool = True,
) -> Sgd:
    """Trains the authors' readout of every target.

    Args:
      train: features to fit to.
      targets: the position maps.
      size: k of the k x k kernels.
      steps: SGD steps on batches of 32 images, or of all images if there are fewer.
      seed: of the initialization and the batches.
      hidden: channels of the layers before the last, each followed by BatchNorm and ReLU.
      standardize: whether each channel gets unit variance first. Without it only the mean is
        subtracted, which changes nothing, as BatchNorm follows.
      align_corners: whether the corners of the predictions lie on the targets'.

    Raises `ValueError` if the kernels are larger than the map.
    """
    _check_kernel(train, size, layers=len(hidden) + 1)
    train = jnp.asarray(train)
    scaler = _fit_scaler(train)
    if not standardize:
        scaler = scaler._replace(scale=jnp.ones_like(scaler.scale))
    layers, moments = _train(
        _standardize(scaler, train),
        jnp.asarray(targets),
        jax.random.key(seed),
        size=size,
        steps=steps,
        hidden=hidden,
        align_corners=align_corners,
    )
    return Sgd(scaler=scaler, layers=layers, moments=moments)


@functools.partial(jax.jit, static_argnames=("size", "steps", "hidden", "align_corners"))
def _train(features, targets, key, *, size, steps, hidden, align_corners):
    widths = (features.shape[3], *hidden, 1)
    side = features.shape[1] - (len(hidden) + 1) * (size - 1)
    batch_size = min(_BATCH, len(features))
    init_key, order_key = jax.random.split(key)
    error = full_size_error(targets, side, align_corners)

    def loss(layers, batch):
        maps, moments = _forward(layers, batch)
        # Every output has its own parameters, so the sum over outputs trains each by itself.
        return error(maps).sum(), moments

    def learning_rate(step):
        return jnp.where(step < steps * 2 // 3, _LEARNING_RATE, _LEARNING_RATE / 10)

    def draw_batch(step):
        if batch_size == len(features):
            return features
        step_key = jax.random.fold_in(order_key, step)
        chosen = jax.random.choice(step_key, len(features), (batch_size,), replace=False)
        return features[chosen]

    optimizer = optax.chain(
        optax.add_decayed_weights(_WEIGHT_DECAY),
        optax.sgd(learning_rate, momentum=_MOMENTUM),
    )

    def average(running, new):
        return running + _BN_MOMENTUM * (new - running)

    def train_step(carry, step):
        layers, state, running = carry
        grads, moments = jax.grad(loss, has_aux=True)(layers, draw_batch(step))
        updates, state = optimizer.update(grads, state, layers)
        layers = optax.apply_updates(layers, updates)
        running = jax.tree.map(average, running, moments)
        return (layers, state, running), None

    layers = _initialize(init_key, size, widths, len(targets))
    running = [(jnp.zeros_like(layer["bias"]), jnp.ones_like(layer["bias"])) for layer in layers]
    start = (layers, optimizer.init(layers), running)
    (layers, _, running), _ = lax.scan(train_step, start, jnp.arange(steps))
    return layers, running


def _initialize(key, size: int, widths: Sequence[int], outputs: int) -> list[dict]:
    """Draws the layers of all outputs, uniformly as in Glorot and Bengio 2010.

    The convolutions have no bias: BatchNorm would subtract it.
    """
    layers = []
    for number, (inputs, width) in enumerate(itertools.pairwise(widths)):
        layer_key = jax.random.fold_in(key, number)
        bound = (6 / (size**2 * (inputs + width))) ** 0.5
        shape = (size, size, inputs, width * outputs)
        layers.append(
            {
                "kernel": jax.random.uniform(layer_key, shape, minval=-bound, maxval=bound),
                "scale": jnp.ones(shape[3]),
                "bias": jnp.zeros(shape[3]),
            }
        )
    return layers


def _forward(layers, features, moments=None):
    """Runs the layers of all outputs; returns maps in (0, 1) and the layers' moments.

    BatchNorm normalizes by `moments`, or by the batch's own if there are none.
    """
    outputs = layers[-1]["kernel"].shape[3]  # one for each target
    x = features
    found = []
    for number, layer in enumerate(layers):
        if number == 0:
            # All outputs read the same features; after this layer, each has its own channels.
            x = _convolve(x, layer["kernel"])
        else:
            x = conv(x, layer["kernel"], groups=outputs)
        if moments:
            mean, var = moments[number]
        else:
            mean = x.mean((0, 1, 2))
            var = x.var((0, 1, 2))
            # As in PyTorch, the batch is normalized by the biased variance, and the running average
            # takes the unbiased one.
            count = x.size // x.shape[3]
            found.append((mean, var * (count / (count - 1))))
        x = (x - mean) / jnp.sqrt(var + _BN_EPS) * layer["scale"] + layer["bias"]
        is_last = number == len(layers) - 1
        x = jax.nn.sigmoid(x) if is_last else jax.nn.relu(x)
    return x, found


def full_size_error(
    targets: Float[AnyArray, "targets size size"], side: int, align_corners: bool = True
) -> Callable[[Array], Array]:
    """Returns a function that computes the full-size error from small maps.

    The function takes maps [n, side, side, targets] to their mean squared errors at the targets'
    size. The plain form upsamples the maps first, to 64 times as many values in the default study.
    Upsampling is linear, U y U', so the same number comes from the small grid: with K = U' U,

        |U y U' - t|^2 = <K y K, y> - 2 <y, U' t U> + |t|^2
    """
    size = targets.shape[1]
    identity = jnp.eye(side)[None, :, :, None]
    up = resize(identity, (size, side), align_corners)[0, :, :, 0]
    overlap = up.T @ up / size
    pull = jnp.einsum("ya,tyx,xb->abt", up, targets, up) / size**2
    square = jnp.square(targets).mean((1, 2))

    def error(maps):
        smooth = jnp.einsum("ac,ncdt,db->nabt", overlap, maps, overlap)
        return (maps * (smooth - 2 * pull)).sum((1, 2)).mean(0) + square

    return error
