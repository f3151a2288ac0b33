"""Normalization layers in PyTorch's convention."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cnnjax.nn.geometry import check_floating
from cnnjax.nn.parameters import parameter
from cnnjax.nn.sums import channel_sum, scale_and_shift, squared_deviation
from cnnjax.runtime.types import AnyArray


class BatchNorm(nn.Module):
    """Normalizes each channel over all other axes, as PyTorch does.

    The running variance is the unbiased one. An empty batch leaves running statistics unchanged.

    Attributes:
      momentum: weight of the *new* statistics (0.1, where Flax's convention is 0.9).
      eps: added to the variance.
      axis_name: device axis; statistics are taken over the whole batch of its devices.
      dtype: type of the output. Parameters and running statistics are float32.

    Raises `ValueError` if it is trained on a single value per channel, which has no variance, its
    input does not have a floating-point type, or a parameter has another shape than the input
    needs.
    """

    momentum: float = 0.1
    eps: float = 1e-5
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "*batch channels"], train: bool = False
    ) -> Float[AnyArray, "*batch channels"]:
        check_floating(x)
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = parameter(self, "scale", nn.initializers.ones, shape)
        bias = parameter(self, "bias", nn.initializers.zeros, shape)
        wide = x.astype(jnp.float64 if jnp.result_type(x) == jnp.float64 else jnp.float32)
        axis_name = None if self.is_initializing() else self.axis_name
        # In evaluation, the layer may run outside the device axis.
        count = _count(x, axis_name) if train else 0
        if _is_at_least(count, 1):
            batch_mean, batch_var = _statistics(wide, count, axis_name)
            if not self.is_initializing():
                self._update(mean, var, batch_mean, batch_var, count, x.shape)
        else:
            batch_mean = mean.value.astype(wide.dtype)
            batch_var = var.value.astype(wide.dtype)
        factor = scale.astype(wide.dtype) / jnp.sqrt(batch_var + self.eps)
        y = scale_and_shift(wide, batch_mean, factor, bias.astype(wide.dtype))
        return y.astype(self.dtype)

    def _update(self, mean, var, batch_mean, batch_var, count, shape):
        if not _is_at_least(count, 2):
            raise ValueError(
                "BatchNorm cannot be trained on one value per channel, got an input of shape "
                f"{shape}: use a larger batch or image"
            )
        values = jnp.asarray(count, batch_var.dtype)
        unbiased = batch_var * values / (values - 1)
        mean.value += self.momentum * (batch_mean.astype(jnp.float32) - mean.value)
        var.value += self.momentum * (unbiased.astype(jnp.float32) - var.value)


def _count(x, axis_name):
    """Counts the values of a channel over all devices.

    With a symbolic batch, the count is symbolic.
    """
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    return math.prod(x.shape[:-1]) * devices


def _is_at_least(count, bound: int) -> bool:
    """Compares a count with a bound.

    A symbolic count, as in `jax.export`, is taken to be large enough.
    """
    return not isinstance(count, int) or count >= bound


def _statistics(x, count, axis_name) -> tuple[Array, Array]:
    """Returns each channel's mean and biased variance over all devices of the axis."""
    values = jnp.asarray(count, x.dtype)

    def over_devices(total):
        return (total if axis_name is None else lax.psum(total, axis_name)) / values

    mean = over_devices(channel_sum(x))
    # A second pass, since E[x^2] - E[x]^2 loses digits by cancellation.
    return mean, over_devices(squared_deviation(x, mean))


def local_response_norm(
    x: Float[AnyArray, "*batch channels"],
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
) -> Float[AnyArray, "*batch channels"]:
    """Divides each channel by a power of its neighbors' summed squares.

    The divisor is (k + alpha * sum of squares over `size` neighbors) ** beta. Defaults are those of
    Krizhevsky et al. 2012, section 3.3, where alpha multiplies the *sum*. PyTorch's multiplies the
    mean, so its alpha is `size` times this one. The window of channels is centered and clipped at
    the first and last channel; for an even `size` it reaches one channel further down than up, as
    in PyTorch.

    Raises `ValueError` if `size` is below 1 or `x` does not have a floating-point type.
    """
    check_floating(x)
    if size < 1:
        raise ValueError(f"size={size} is not a positive number of channels")
    channels = x.shape[-1]
    # The square of 256 is more than float16 holds.
    wide = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
    squares = jnp.pad(jnp.square(wide), [(0, 0)] * (x.ndim - 1) + [(size // 2, (size - 1) // 2)])
    total = sum(squares[..., start : start + channels] for start in range(size))
    return (wide / (k + alpha * total) ** beta).astype(jnp.result_type(x))
