"""The authors' readout of position: a convolution, BatchNorm and a sigmoid, trained by SGD."""

import functools
import itertools
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
from cnnjax.position.convolution import apply_scaler, check_kernel, convolve, fit_scaler
from cnnjax.runtime.types import AnyArray

# The authors' code: SGD, learning rate 0.1 cut to a tenth at epoch 10 of 15, batches of 32.
_LEARNING_RATE = 0.1
_MOMENTUM = 0.9
_WEIGHT_DECAY = 1e-4
_BATCH = 32
_BN_MOMENTUM = 0.1
_BN_EPS = 1e-5


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
    return _forward(layers, apply_scaler(scaler, features), moments)[0]


def fit_sgd(
    train: Float[AnyArray, "n height width channels"],
    targets: Float[AnyArray, "targets side side"],
    size: int = 1,
    steps: int = 540,
    seed: int = 0,
    hidden: Sequence[int] = (),
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

    Raises `ValueError` if the kernels are larger than the map, the map is not square, or BatchNorm
    gets fewer than two values.
    """
    check_kernel(train, size, layers=len(hidden) + 1)
    height, width = train.shape[1:3]
    if height != width:
        raise ValueError(f"train has features of {height}x{width}; expected square ones")
    side = height - (len(hidden) + 1) * (size - 1)
    if len(train) * side**2 < 2:
        raise ValueError(
            f"train has features of {len(train)} image(s), of which kernels of size={size} leave "
            f"{side}x{side} positions, too few for BatchNorm; expected train of at least 2 images"
        )
    train = jnp.asarray(train)
    scaler = fit_scaler(train)
    if not standardize:
        scaler = scaler._replace(scale=jnp.ones_like(scaler.scale))
    layers, moments = _train(
        apply_scaler(scaler, train),
        jnp.asarray(targets),
        jax.random.key(seed),
        size=size,
        steps=steps,
        hidden=tuple(hidden),
        align_corners=align_corners,
    )
    return Sgd(scaler=scaler, layers=layers, moments=moments)


@functools.partial(jax.jit, static_argnames=("size", "steps", "hidden", "align_corners"))
def _train(features, targets, key, *, size, steps, hidden, align_corners):
    """Trains the layers of all outputs; returns them and their running moments."""
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
        # Two thirds of the steps, as the authors' epoch 10 of 15.
        return jnp.where(step < steps * 2 // 3, _LEARNING_RATE, _LEARNING_RATE / 10)

    def draw_batch(step):
        if batch_size == len(features):
            return features
        step_key = jax.random.fold_in(order_key, step)
        chosen = jax.random.choice(step_key, len(features), (batch_size,), replace=False)
        return features[chosen]

    def average(running, new):
        return running + _BN_MOMENTUM * (new - running)

    optimizer = optax.chain(
        optax.add_decayed_weights(_WEIGHT_DECAY),
        optax.sgd(learning_rate, momentum=_MOMENTUM),
    )

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
    batch_moments = []
    for number, layer in enumerate(layers):
        if number == 0:
            # All outputs read the same features; after this layer, each has its own channels.
            x = convolve(x, layer["kernel"])
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
            batch_moments.append((mean, var * (count / (count - 1))))
        x = (x - mean) / jnp.sqrt(var + _BN_EPS) * layer["scale"] + layer["bias"]
        is_last = number == len(layers) - 1
        x = jax.nn.sigmoid(x) if is_last else jax.nn.relu(x)
    return x, batch_moments


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
    # `overlap` is K / size and `pull` is U' t U / size^2, since the error is a mean over size^2
    # pixels.
    overlap = up.T @ up / size
    pull = jnp.einsum("ya,tyx,xb->abt", up, targets, up) / size**2
    square = jnp.square(targets).mean((1, 2))

    def error(maps):
        smooth = jnp.einsum("ac,ncdt,db->nabt", overlap, maps, overlap)
        return (maps * (smooth - 2 * pull)).sum((1, 2)).mean(0) + square

    return error
