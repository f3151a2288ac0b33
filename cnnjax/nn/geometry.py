"""Sizes and positions of windows on a map."""

import numpy as np
from jaxtyping import Int

Both = int | tuple[int, int]  # the same for height and width, or a pair with one for each


def pair(value: Both, name: str, least: int) -> tuple[int, int]:
    """A (height, width) pair from an integer or a pair; raises `ValueError` below `least`."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or any(not isinstance(v, (int, np.integer)) or v < least for v in both):
        raise ValueError(
            f"{name}={value!r} is not an integer, or a pair of integers, of at least {least}"
        )
    return both


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """The number of output positions along one axis: floor((n + 2p - d(k - 1) - 1) / s) + 1."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def valid_counts(
    size: int, kernel: int, stride: int, padding: int, dilation: int = 1
) -> Int[np.ndarray, " positions"]:
    """How many of a window's `kernel` taps lie inside the image, for each output position along one axis."""
    starts = np.arange(output_size(size, kernel, stride, padding, dilation)) * stride - padding
    taps = starts[:, None] + np.arange(kernel) * dilation
    return ((taps >= 0) & (taps < size)).sum(1)
