"""Images that excite a unit, found by gradient ascent.

Source: Olah et al. 2017 (distill.pub/2017/feature-visualization), and its code, Lucid.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from cnnjax.models import Network
from cnnjax.nn import relu_rule
from cnnjax.runtime import imagenet
from cnnjax.visualize.fields import frame
from cnnjax.visualize.stages import (
    Moments,
    check_stage,
    network_input,
    receptive_field,
    stage_maps,
)

# Lucid (lucid/optvis/param/color.py): the square root of the colors' covariance on ImageNet, and
# its scale.
_COLORS = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], np.float32)
_COLORS /= np.linalg.norm(_COLORS, axis=0).max()
# Lucid's standard deviation of the first spectrum, and its Adam's learning rate.
_START = 0.01
_RATE = 0.05
# Shortest side in pixels for which `_RATE` is meant. In smaller images, fewer waves add up in a
# pixel, so the rate grows in proportion (to 0.5 for a 3x3 filter).
_RATE_SIDE = 32


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A place of a stage, in an image of `size`."""

    model: Network
    stage: str
    size: tuple[int, ...]
    place: tuple[int, ...]


def maximize(
    model: Network,
    variables: dict,
    stage: str,
    channels: Sequence[int] | Int[np.ndarray, " units"],
    steps: int = 256,
    jitter: int | None = None,
    total_variation: float = 0.02,
    seed: int = 0,
    moments: Moments = imagenet.MOMENTS,
) -> tuple[Float[np.ndarray, "units height width 3"], Float[np.ndarray, "2 units"]]:
    """Finds images that excite a unit of each channel by gradient ascent.

    An image is painted in decorrelated frequencies and colors and improved by Adam. It shows what
    the unit sees, at most the size of the publication's image.

    Args:
      model: the network.
      variables: its variables.
      stage: name of the stage.
      channels: the channels whose units are excited.
      steps: of gradient ascent.
      jitter: the most pixels by which the image is rolled, anew at each step; a quarter of the
        stage's stride unless given.
      total_variation: price of an edge from black to white across the whole image, as a share of
        the activation.
      seed: of the first image, which is noise.
      moments: mean and standard deviation that the network's images are normalized by.

    Returns the images, RGB in [0, 1], and the units' activations: for the noise, and for the
    result. Raises `ValueError` if a stage or channel is unknown, a number is out of range, or the
    stage sees the whole image.
    """
    check_stage(model, stage, channels)
    if jitter is None:
        jitter = min(receptive_field(model, stage).step) // 4
    limits = (("steps", steps, 1), ("jitter", jitter, 0), ("total_variation", total_variation, 0))
    for name, value, least in limits:
        if value < least:
            raise ValueError(f"{name}={value} is not a number of at least {least}")
    size, place, seen = frame(model, stage)
    unit = _Unit(model, stage, size, place)
    units = jnp.atleast_1d(jnp.asarray(channels))
    start, roll = jax.random.split(jax.random.key(seed))
    # Real and imaginary parts of each unit's spectrum.
    shape = (2, len(units), *_frequencies(size).shape, model.input_shape[2])
    spectrum = _START * jax.random.normal(start, shape)

    def score(spectrum):
        pixels = _paint(spectrum, size)
        return pixels, _activation(
            unit, variables, pixels, channels=units, moments=moments, rule="gradient"
        )

    _, before = score(spectrum)
    spectrum = _climb(
        unit,
        variables,
        spectrum,
        channels=units,
        moments=moments,
        keys=jax.random.split(roll, steps),
        total_variation=jnp.float32(total_variation),
        jitter=jitter,
    )
    pixels, after = score(spectrum)
    return np.asarray(pixels[:, *seen]), np.stack([before, after])


@functools.partial(jax.jit, static_argnames=("unit", "jitter"))
def _climb(unit, variables, spectrum, *, channels, moments, keys, total_variation, jitter):
    """Improves coefficients by gradient ascent.

    The objective is the activations of their images, less the price of edges.
    """
    shortest = min(unit.size)
    optimizer = optax.adam(_RATE * max(1, _RATE_SIDE / shortest))

    def worth(spectrum, shift):
        pixels = _paint(spectrum, unit.size)
        rolled = jnp.roll(pixels, shift, (1, 2))
        score = _activation(
            unit, variables, rolled, channels=channels, moments=moments, rule="redirected"
        )
        edges = sum(jnp.abs(jnp.diff(pixels, axis=axis)).sum((1, 2, 3)) for axis in (1, 2))
        # A black-to-white edge across the image adds up to 3 colors x the shortest side.
        price = total_variation * edges / (3 * shortest)
        return (score - price * jax.lax.stop_gradient(jnp.abs(score))).sum()

    def step(state, key):
        spectrum, memory = state
        shift = jax.random.randint(key, (2,), -jitter, jitter + 1)
        # Adam descends, so the gradient is negated. Negating `worth` instead would flip the signals
        # at the ReLUs, whose rule depends on their sign.
        gradient = -jax.grad(worth)(spectrum, shift)
        updates, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(spectrum, updates), memory), None

    (spectrum, _), _ = jax.lax.scan(step, (spectrum, optimizer.init(spectrum)), keys)
    return spectrum


@functools.partial(jax.jit, static_argnames=("unit", "rule"))
def _activation(unit, variables, pixels, *, channels, moments, rule):
    """Returns the activation of each image's own channel, [batch]."""
    images = network_input(unit.model, 255 * pixels, moments)
    with relu_rule(rule):
        maps = stage_maps(unit.model, variables, images, unit.stage)
    row, column = unit.place
    return maps[jnp.arange(len(channels)), row, column, channels].astype(jnp.float32)


def _paint(spectrum, size):
    """Paints RGB in [0, 1], [batch, height, width, 3], as Lucid does it.

    Args:
      spectrum: real and imaginary coefficients [2, batch, height, width // 2 + 1, channels].
      size: the images' (height, width).
    """
    frequencies = np.maximum(_frequencies(size), 1 / max(size))
    # Lucid's scale: 1 / frequency, as in photographs; the root of the number of pixels, which makes
    # the transform unitary; and a constant, 1 / 4.
    scale = np.sqrt(size[0] * size[1]) / frequencies / 4
    spectrum = spectrum * jnp.asarray(scale[:, :, None], jnp.float32)
    image = jnp.fft.irfft2(jax.lax.complex(spectrum[0], spectrum[1]), size, axes=(1, 2))
    if image.shape[-1] == 3:
        image = image @ jnp.asarray(_COLORS.T)
    return jnp.broadcast_to(jax.nn.sigmoid(image), (*image.shape[:3], 3))


def _frequencies(size):
    """Returns the modulus of each coefficient's frequency, in cycles per pixel."""
    return np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None, :])
