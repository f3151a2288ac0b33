"""Normalisation layers in PyTorch's convention."""
import flax.linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as PyTorch defines it.

    `momentum` weighs the *new* statistics (0.1, where Flax's convention is 0.9), the running variance is the unbiased one,
    and statistics are kept in float32. With `axis_name` they are those of the whole batch over all devices of that axis.
    Raises `ValueError` when training on a single value per channel, whose variance is not defined.
    """

    momentum: float = 0.1
    eps: float = 1e-5
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jnp.ndarray, train: bool = False) -> jnp.ndarray:
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        m, v = mean.value, var.value
        if train:
            axes, wide = tuple(range(x.ndim - 1)), x.astype(jnp.float32)
            count = wide.size // wide.shape[-1]
            m = wide.mean(axes)
            if self.axis_name is not None and not self.is_initializing():
                count *= jax.lax.axis_size(self.axis_name)
                m = jax.lax.pmean(m, self.axis_name)
            v = jnp.square(wide - m).mean(axes)  # two passes: E[x^2] - E[x]^2 cancels
            if self.axis_name is not None and not self.is_initializing():
                v = jax.lax.pmean(v, self.axis_name)
            if not self.is_initializing():
                if count < 2:
                    raise ValueError(f"BatchNorm cannot be trained on one value per channel, got an input of shape {x.shape}: "
                                     "use a larger batch or image")
                mean.value += self.momentum * (m - mean.value)
                var.value += self.momentum * (v * count / (count - 1) - var.value)
        factor = scale / jnp.sqrt(v + self.eps)
        return (x.astype(jnp.float32) * factor + (bias - m * factor)).astype(self.dtype)


def local_response_norm(x: jnp.ndarray, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> jnp.ndarray:
    """Divides each channel of `x` [..., channels] by (k + alpha * sum of squares over `size` neighbouring channels) ** beta.

    Defaults are those of Krizhevsky et al. 2012, section 3.3, where alpha multiplies the *sum*; PyTorch's multiplies the
    mean, so its alpha is `size` times this one. The window is centred and clipped at the first and last channel; for an
    even `size` it reaches one channel further down than up, as in PyTorch. Raises `ValueError` for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size} is not a positive number of channels")
    channels = x.shape[-1]
    squares = jnp.pad(jnp.square(x), [(0, 0)] * (x.ndim - 1) + [(size // 2, (size - 1) // 2)])
    total = sum(squares[..., i:i + channels] for i in range(size))
    return x / (k + alpha * total) ** beta
