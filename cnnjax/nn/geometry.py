"""Sizes and positions of windows on a map, checks of the map itself, and its type for sums."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from cnnjax.runtime.types import AnyArray

Both = int | tuple[int, int]  # one number for height and width, or a (height, width) pair


@dataclasses.dataclass(frozen=True)
class Window:
    """How a kernel moves over a map, as (height, width) pairs.

    Attributes:
      stride: positions from one output to the next.
      padding: zeros on each side.
      dilation: positions from one tap of the kernel to the next.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output_shape(self, x_shape: tuple, kernel_size: tuple) -> tuple[int, int]:
        """Returns the height and width of the output for a map of shape `x_shape`, NHWC."""
        height, width = map(
            output_size, x_shape[1:3], kernel_size, self.stride, self.padding, self.dilation
        )
        return height, width

    def valid_taps(
        self, x_shape: tuple, kernel_size: tuple
    ) -> Int[np.ndarray, "height_out width_out"]:
        """Counts the taps of each window that lie inside a map of shape `x_shape`, NHWC."""
        rows, columns = map(
            valid_counts, x_shape[1:3], kernel_size, self.stride, self.padding, self.dilation
        )
        return np.multiply.outer(rows, columns)


def pair(value: Both, name: str, least: int) -> tuple[int, int]:
    """Returns a (height, width) pair for an integer or a pair.

    Raises `ValueError` if it is neither, or a number is below `least`.
    """
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or any(not isinstance(v, (int, np.integer)) or v < least for v in both):
        raise ValueError(
            f"{name}={value!r} is not an integer, or a pair of integers, of at least {least}"
        )
    return both


def check_map(x: AnyArray) -> None:
    """Raises `ValueError` if `x` is not a floating-point array [batch, height, width, channels].

    An image without a batch axis would be treated along the wrong axes.
    """
    if not hasattr(x, "ndim"):
        raise ValueError(
            f"an input of type {type(x).__name__} is not an array, [batch, height, width, channels]"
        )
    if x.ndim != 4:
        raise ValueError(f"an input of shape {x.shape} is not [batch, height, width, channels]")
    check_floating(x)


def check_floating(x: AnyArray) -> None:
    """Raises `ValueError` if `x` is not an array of a floating-point type.

    Means and fractions of integers would be cut off, and sums of uint8 wrap around.
    """
    if not hasattr(x, "dtype"):
        raise ValueError(f"x has type {type(x).__name__}; expected a floating-point array")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x has dtype {x.dtype}; convert it to a floating-point type, for example with "
            "x.astype('float32')"
        )


def widen(x: AnyArray) -> AnyArray:
    """Returns a map in float32 if its type has fewer bits.

    A sum in float16 overflows above 65,504, and one in bfloat16 has two digits: 256 + 1 is 256.
    """
    return jnp.asarray(x, jnp.float32 if jnp.finfo(x.dtype).bits < 32 else None)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Counts the output positions along one axis.

    They are floor((n + 2p - d(k - 1) - 1) / s) + 1.
    """
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def valid_counts(
    size: int, kernel: int, stride: int, padding: int, dilation: int = 1
) -> Int[np.ndarray, " positions"]:
    """Counts, for each output along one axis, the taps that lie inside the image."""
    starts = np.arange(output_size(size, kernel, stride, padding, dilation)) * stride - padding
    positions = starts[:, None] + np.arange(kernel) * dilation
    return ((positions >= 0) & (positions < size)).sum(1)
