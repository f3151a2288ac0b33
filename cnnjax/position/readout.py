"""Linear readouts of position from frozen features: one k x k convolution without padding per target.

Two ways to find its weights. `fit_exact` solves the ridge regression, which has one solution and no seed. `fit_sgd` trains
as the authors' code does (github.com/SenJia/Position-Information), with BatchNorm and a sigmoid after the convolution, and with
further convolutions before it if asked. Each does all targets, and all strengths or seeds, in one program: for given features they
are columns of one matrix.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

from cnnjax.nn import conv, resize
from cnnjax.runtime.types import AnyArray

# Ridge strengths on offer, for features of unit variance; the best on held-out photographs is taken for each target.
STRENGTHS = tuple(10.0**power for power in range(-3, 4))
# Conjugate gradients stop at this residual relative to the right-hand side, or at this many steps: then the weakest
# strengths are short of it, and `Exact.residual` tells whether the chosen ones are.
_TOLERANCE, _MOST_ITERATIONS = 1e-5, 300
# The authors' code: SGD, learning rate 0.1 cut to a tenth after two thirds (epoch 10 of 15), batches of 32.
_LEARNING_RATE, _MOMENTUM, _WEIGHT_DECAY, _BATCH = 0.1, 0.9, 1e-4, 32
_BN_MOMENTUM, _BN_EPS = 0.1, 1e-5


class Scaler(NamedTuple):
    """Standardizes features [..., channels] per channel; channels that do not vary in training are switched off."""

    mean: Float[Array, " channels"]
    scale: Float[Array, " channels"]

    def __call__(
        self, features: Float[AnyArray, "*positions channels"]
    ) -> Float[AnyArray, "*positions channels"]:
        return (features - self.mean) * self.scale


@jax.jit
def fit_scaler(features: Float[Array, "n height width channels"]) -> Scaler:
    """The scaler of training features."""
    mean, std = features.mean((0, 1, 2)), features.std((0, 1, 2))
    live = std > 1e-6 * std.max()
    return Scaler(mean, jnp.where(live, 1 / jnp.where(live, std, 1), 0))


@jax.custom_vjp
def _apply(
    features: Float[Array, "n height width channels"], kernel: Float[Array, "k k channels columns"]
) -> Float[Array, "n height-k+1 width-k+1 columns"]:
    """A convolution as one matrix product and k^2 shifted sums.

    Differentiable in the kernel only: the features are frozen.
    """
    size, channels = kernel.shape[0], features.shape[3]
    products = features.reshape(-1, channels) @ kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    products = products.reshape(*features.shape[:3], size, size, -1)
    height, width = (n - size + 1 for n in features.shape[1:3])
    return functools.reduce(
        operator.add,
        (
            products[:, i : i + height, j : j + width, i, j]
            for i in range(size)
            for j in range(size)
        ),
    )


def _adjoint(
    features: Float[Array, "n height width channels"],
    maps: Float[Array, "n _ _ columns"],
    size: int,
) -> Float[Array, "k k channels columns"]:
    """The transpose of `_apply`."""
    gap = size - 1
    shifted = jnp.stack(
        [
            jnp.pad(maps, ((0, 0), (i, gap - i), (j, gap - j), (0, 0)))
            for i in range(size)
            for j in range(size)
        ],
        3,
    )
    channels = features.shape[3]
    # Columns first: the CPU backend multiplies features' @ maps, which JAX would derive, at half the speed.
    product = shifted.reshape(-1, size * size * maps.shape[3]).T @ features.reshape(-1, channels)
    return product.reshape(size, size, maps.shape[3], channels).transpose(0, 1, 3, 2)


_apply.defvjp(
    lambda features, kernel: (_apply(features, kernel), (features, kernel.shape[0])),
    lambda residuals, maps: (None, _adjoint(residuals[0], maps, residuals[1])),
)


@jax.jit
def _scaled_apply(scaler, features, kernel):
    return _apply(scaler(features), kernel)


class Exact(NamedTuple):
    """A solved readout: `kernel` [k, k, channels, targets] on features scaled by `scaler`, and `intercept` [targets].

    `strength` [targets] is what was chosen, `residual` the largest relative residual of the linear system left over.
    """

    scaler: Scaler
    kernel: Float[Array, "k k channels targets"]
    intercept: Float[Array, " targets"]
    strength: Float[np.ndarray, " targets"]
    residual: float

    def __call__(
        self, features: Float[AnyArray, "n height width channels"]
    ) -> Float[np.ndarray, "n targets rows columns"]:
        """Maps, k - 1 less in height and width."""
        maps = _scaled_apply(self.scaler, features, self.kernel) + self.intercept
        return np.asarray(maps).transpose(0, 3, 1, 2)


def _spatial_correlation(
    features: Float[Array, "n height width channels"], size: int
) -> Float[Array, "taps taps"]:
    """How features correlate between the taps of a k x k window, averaged over channels.

    Shift by shift: a shifted copy is as large as the features, and XLA would make all of them at once.
    """
    height, width = features.shape[1:3]
    gap = size - 1
    around = jnp.pad(features, ((0, 0), (gap, gap), (0, gap), (0, 0)))
    shifts = np.array([(i, j) for i in range(-gap, size) for j in range(size)])

    def total(shift):
        return (
            lax.dynamic_slice(around, (0, gap + shift[0], shift[1], 0), features.shape) * features
        ).sum()

    count = (height - abs(shifts[:, 0])) * (width - shifts[:, 1])
    means = lax.map(total, jnp.asarray(shifts)) / count.astype(np.float32)
    taps = np.array([(i, j) for i in range(size) for j in range(size)])
    apart = taps[:, None] - taps
    apart = np.where(apart[..., 1:] < 0, -apart, apart)
    return means[(apart[..., 0] + gap) * size + apart[..., 1]] / means[gap * size]


@functools.partial(jax.jit, static_argnames="size")
def _solve_ridge(features, goal, strengths, basis, values, size):
    """Preconditioned conjugate gradients for all columns (strength x target) at once: the system of a k x k kernel is too large to factor.

    The preconditioner is the system of features whose channel and spatial correlations are independent of each other.
    """
    count = features.shape[0] * (features.shape[1] - size + 1) * (features.shape[2] - size + 1)
    tap_basis, tap_values = jnp.linalg.eigh(_spatial_correlation(features, size))[::-1]
    spectrum = jnp.maximum(tap_values, 1e-6)[:, None] * values  # [taps, channels]
    dot = lambda a, b: (a * b).sum((0, 1, 2))

    def system(w):
        maps = _apply(features, w)
        return _adjoint(features, maps - maps.mean((0, 1, 2)), size) / count + strengths * w

    def precondition(r):
        flat = r.reshape(size * size, -1, r.shape[3])
        flat = jnp.einsum("ta,tcx,cd->adx", tap_basis, flat, basis) / (
            spectrum[..., None] + strengths
        )
        return jnp.einsum("ta,adx,cd->tcx", tap_basis, flat, basis).reshape(r.shape)

    # The target is the same for every image; taking its mean out of it takes the intercept out of the system.
    maps = jnp.broadcast_to(goal - goal.mean((0, 1)), (features.shape[0], *goal.shape))
    right = _adjoint(features, maps, size) / count
    norm = jnp.maximum(jnp.sqrt(dot(right, right)), 1e-30)

    def step(state):
        w, r, p, rz, n = state
        q = system(p)
        alpha = rz / jnp.maximum(dot(p, q), 1e-30)
        w, r = w + alpha * p, r - alpha * q
        z = precondition(r)
        new = dot(r, z)
        return w, r, z + new / jnp.maximum(rz, 1e-30) * p, new, n + 1

    residual = lambda r: jnp.sqrt(dot(r, r)) / norm
    start = precondition(right)
    state = (jnp.zeros_like(right), right, start, dot(right, start), 0)
    state = lax.while_loop(
        lambda s: (residual(s[1]).max() > _TOLERANCE) & (s[4] < _MOST_ITERATIONS), step, state
    )
    kernel = state[0]
    return kernel, residual(right - system(kernel))


def fit_exact(
    train: Float[AnyArray, "n height width channels"],
    held_out: Float[AnyArray, "m height width channels"],
    targets: Float[AnyArray, "targets side side"],
    size: int = 1,
    strengths: Sequence[float] = STRENGTHS,
) -> Exact:
    """The ridge readout with kernel `size` of each target, its strength chosen by squared error on held-out features.

    The targets are brought to the readout's own grid, corners aligned. The mean over training positions of the squared error, plus
    strength times the squared weights, is least. Raises `ValueError` if the kernel is larger than the map.
    """
    if not 1 <= size <= min(train.shape[1:3]):
        raise ValueError(f"kernel={size} does not fit {train.shape[1]}x{train.shape[2]} features")
    train = jnp.asarray(train)
    scaler = fit_scaler(train)
    scaled = scaler(train)
    goal = resize(
        jnp.asarray(targets)[..., None], (train.shape[1] - size + 1, train.shape[2] - size + 1)
    )[..., 0].transpose(1, 2, 0)
    goal = jnp.tile(goal, (1, 1, len(strengths)))  # a column for each strength and target
    columns = np.repeat(np.asarray(strengths), len(targets))
    flat = scaled.reshape(-1, train.shape[3])
    with jax.default_matmul_precision("highest"):
        values, basis = np.linalg.eigh(np.asarray(flat.T @ flat, np.float64) / len(flat))
        values = np.maximum(values, 0)
        if size == 1:
            right = np.asarray(
                _adjoint(
                    scaled, jnp.broadcast_to(goal - goal.mean((0, 1)), (len(train), *goal.shape)), 1
                )[0, 0],
                np.float64,
            )
            solution = basis @ (basis.T @ right / (values[:, None] + columns)) / len(flat)
            kernel, residual = (
                jnp.asarray(solution[None, None], jnp.float32),
                np.zeros(len(columns)),
            )
        else:
            kernel, residual = _solve_ridge(
                scaled, goal, *(jnp.asarray(a, jnp.float32) for a in (columns, basis, values)), size
            )
        intercept = goal.mean((0, 1)) - _apply(scaled, kernel).mean((0, 1, 2))
        error = jnp.square(_apply(scaler(jnp.asarray(held_out)), kernel) + intercept - goal).mean(
            (0, 1, 2)
        )
    best = np.asarray(error).reshape(len(strengths), len(targets)).argmin(0)
    chosen = best * len(targets) + np.arange(len(targets))
    return Exact(
        scaler,
        kernel[..., chosen],
        intercept[chosen],
        np.asarray(strengths)[best],
        float(residual[chosen].max()),
    )


class Sgd(NamedTuple):
    """Trained readouts of all seeds and targets: of each layer the `kernel` and BatchNorm's `scale` and `bias`, mean and variance."""

    scaler: Scaler
    layers: list[dict]
    moments: list[tuple]
    seeds: int
    targets: int

    def __call__(
        self, features: Float[AnyArray, "n height width channels"]
    ) -> Float[np.ndarray, "seeds n targets rows columns"]:
        """Maps, in height and width k - 1 less for each layer."""
        y = np.asarray(
            _read_out(self.scaler, self.layers, self.moments, features, self.seeds * self.targets)
        )
        return y.reshape(*y.shape[:3], self.seeds, self.targets).transpose(3, 0, 4, 1, 2)


def _through(layers, features, outputs, moments=None):
    """Runs every output's layers -> its map in (0, 1), and the batch's mean and variance in each layer, unless they are given."""
    y, found = features, []
    for number, layer in enumerate(layers):
        # The first layers of all outputs see the same features; after it each has channels of its own.
        z = conv(y, layer["kernel"], groups=outputs) if number else _apply(y, layer["kernel"])
        if moments:
            mean, var = moments[number]
        else:
            mean, var, count = z.mean((0, 1, 2)), z.var((0, 1, 2)), z.size // z.shape[3]
            found.append((mean, var * (count / (count - 1))))
        y = (z - mean) / jnp.sqrt(var + _BN_EPS) * layer["scale"] + layer["bias"]
        y = jax.nn.relu(y) if number < len(layers) - 1 else jax.nn.sigmoid(y)
    return y, found


@functools.partial(jax.jit, static_argnames="outputs")
def _read_out(scaler, layers, moments, features, outputs):
    return _through(layers, scaler(features), outputs, moments)[0]


def full_size_error(
    targets: Float[AnyArray, "targets size size"], side: int
) -> Callable[[Array], Array]:
    """The mean squared error at the targets' size of maps [n, side, side, ..., targets] -> [..., targets].

    Upsampling is linear, so it need not be done: |U y U' - t|^2 = <K y K, y> - 2 <y, U' t U> + |t|^2 with K = U' U is the
    same number on the small grid.
    """
    size = targets.shape[1]
    up = resize(jnp.eye(side)[None, :, :, None], (size, side))[0, :, :, 0]
    overlap = up.T @ up / size
    pull = jnp.einsum("ya,tyx,xb->abt", up, targets, up) / size**2
    square = jnp.square(targets).mean((1, 2))

    def error(maps):
        smooth = jnp.einsum("ac,ncd...t,db->nab...t", overlap, maps, overlap)
        pulled = pull.reshape(side, side, *(1,) * (maps.ndim - 4), -1)
        return (maps * (smooth - 2 * pulled)).sum((1, 2)).mean(0) + square

    return error


def _start(key, size, widths, outputs):
    """The layers of all outputs between `widths` channels: Glorot and Bengio 2010, uniform; a bias would vanish in BatchNorm."""
    layers = []
    for number, (inputs, width) in enumerate(itertools.pairwise(widths)):
        bound = (6 / (size**2 * (inputs + width))) ** 0.5
        shape = (size, size, inputs, width * outputs)
        kernel = jax.random.uniform(
            jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound
        )
        layers.append({"kernel": kernel, "scale": jnp.ones(shape[3]), "bias": jnp.zeros(shape[3])})
    return layers


@functools.partial(jax.jit, static_argnames=("size", "steps", "seeds", "hidden"))
def _train(features, targets, key, size, steps, seeds, hidden):
    outputs = seeds * len(targets)
    error = full_size_error(targets, features.shape[1] - (len(hidden) + 1) * (size - 1))

    def loss(layers, batch):
        y, moments = _through(layers, batch, outputs)
        # Every output has parameters of its own, so the sum over outputs trains each alone.
        return error(y.reshape(*y.shape[:3], seeds, len(targets))).sum(), moments

    schedule = lambda count: jnp.where(count < steps * 2 // 3, _LEARNING_RATE, _LEARNING_RATE / 10)
    optimizer = optax.chain(
        optax.add_decayed_weights(_WEIGHT_DECAY), optax.sgd(schedule, momentum=_MOMENTUM)
    )
    batch_size, (init_key, order_key) = min(_BATCH, len(features)), jax.random.split(key)
    layers = _start(init_key, size, (features.shape[3], *hidden, 1), outputs)

    def step(carry, number):
        layers, state, running = carry
        batch = features
        if batch_size < len(features):
            batch = features[
                jax.random.choice(
                    jax.random.fold_in(order_key, number),
                    len(features),
                    (batch_size,),
                    replace=False,
                )
            ]
        grads, moments = jax.grad(loss, has_aux=True)(layers, batch)
        updates, state = optimizer.update(grads, state, layers)
        running = jax.tree.map(lambda old, new: old + _BN_MOMENTUM * (new - old), running, moments)
        return (optax.apply_updates(layers, updates), state, running), None

    running = [(jnp.zeros_like(layer["bias"]), jnp.ones_like(layer["bias"])) for layer in layers]
    (layers, _, running), _ = lax.scan(
        step, (layers, optimizer.init(layers), running), jnp.arange(steps)
    )
    return layers, running


def fit_sgd(
    train: Float[AnyArray, "n height width channels"],
    targets: Float[AnyArray, "targets side side"],
    size: int = 1,
    steps: int = 540,
    seeds: int = 1,
    seed: int = 0,
    hidden: tuple[int, ...] = (),
) -> Sgd:
    """The authors' readout with kernel `size` of each target and each of `seeds` initializations.

    `hidden` are the channels of the layers before the last, each followed by BatchNorm and ReLU. The features `train` are
    standardized first. Raises `ValueError` if the kernels are larger than the map.
    """
    if size < 1 or (len(hidden) + 1) * (size - 1) >= min(train.shape[1:3]):
        times = f" {len(hidden) + 1} times" if hidden else ""
        raise ValueError(
            f"kernel={size} does not fit {train.shape[1]}x{train.shape[2]} features{times}"
        )
    train = jnp.asarray(train)
    scaler = fit_scaler(train)
    layers, moments = _train(
        scaler(train), jnp.asarray(targets), jax.random.key(seed), size, steps, seeds, hidden
    )
    return Sgd(scaler, layers, moments, seeds, len(targets))
