"""The scaler of features and the unpadded convolution that both readouts of position share."""

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax import ridge
from cnnjax.runtime.types import AnyArray


@jax.jit
def fit_scaler(features: Float[AnyArray, "n height width channels"]) -> ridge.Scaler:
    """Fits a scaler in float32 or more: in float16, sums over positions would overflow."""
    dtype = jnp.float64 if features.dtype == jnp.float64 else jnp.float32
    return ridge.fit_scaler(features.astype(dtype))


@jax.jit
def apply_scaler(scaler: ridge.Scaler, features: Float[AnyArray, "n height width channels"]):
    """Standardizes features, in the type of their scaler."""
    return scaler(features.astype(scaler.mean.dtype))


def check_kernel(features: Float[AnyArray, "n height width channels"], size: int, layers: int):
    """Raises `ValueError` if k x k kernels of as many layers do not fit the features."""
    height, width = features.shape[1:3]
    if size < 1 or layers * (size - 1) >= min(height, width):
        times = f" {layers} times" if layers > 1 else ""
        raise ValueError(f"size={size} of the kernel does not fit {height}x{width} features{times}")


def window_taps(size: int) -> list[tuple[int, int]]:
    """Lists the (row, column) offsets of a k x k window."""
    return [(i, j) for i in range(size) for j in range(size)]


@jax.custom_vjp
def convolve(
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
    # [n, height, width, k, k, columns]
    products = products.reshape(*features.shape[:3], size, size, -1)
    height = features.shape[1] - size + 1
    width = features.shape[2] - size + 1
    shifted = (products[:, i : i + height, j : j + width, i, j] for i, j in window_taps(size))
    return functools.reduce(operator.add, shifted)


def correlate(
    features: Float[Array, "n height width channels"],
    maps: Float[Array, "n _ _ columns"],
    size: int,
) -> Float[Array, "k k channels columns"]:
    """Correlates features with maps at each offset of the window.

    This is the transpose of `convolve`.
    """
    gap = size - 1
    channels = features.shape[3]
    shifted = []
    for i, j in window_taps(size):
        shifted.append(jnp.pad(maps, ((0, 0), (i, gap - i), (j, gap - j), (0, 0))))
    columns = jnp.stack(shifted, 3).reshape(-1, size * size * maps.shape[3])
    # Columns first: on CPUs, XLA computes features.T @ maps, the form that JAX would derive, at
    # half the speed.
    product = columns.T @ features.reshape(-1, channels)
    return product.reshape(size, size, maps.shape[3], channels).transpose(0, 1, 3, 2)


def _convolve_forward(features, kernel):
    return convolve(features, kernel), (features, kernel.shape[0])


def _convolve_backward(residuals, maps):
    features, size = residuals
    return None, correlate(features, maps, size)


convolve.defvjp(_convolve_forward, _convolve_backward)
