"""Weights and inputs that any framework can regenerate: a formula of a parameter's name and an
element's index."""

import zlib

import numpy as np


def uniform(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values in [-1, 1): the 32-bit finaliser of MurmurHash3 over crc32(key) + index *
    2654435761."""
    values = np.empty(int(np.prod(shape)), np.float32)
    # Blocks that fit a processor's cache.
    for start in range(0, values.size, 2**16):
        block = values[start : start + 2**16]
        h = np.arange(start, start + block.size, dtype=np.uint32)
        h *= np.uint32(2654435761)
        h += np.uint32(zlib.crc32(key.encode()))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h ^= h >> np.uint32(shift)
            h *= np.uint32(factor)
        block[:] = h
        block *= np.float32(2.0**-31)
        block -= np.float32(1)
    return values.reshape(shape)


def parameter(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of torchvision's parameter `key`, at the scale of a well-initialized network (He et
    al. 2015)."""
    u = uniform(key, shape)
    if key.endswith("running_var"):
        return 1.25 + 0.25 * u
    if key.endswith("bn3.weight"):
        # Small at the end of a residual branch: a deep ResNet would amplify rounding errors in
        # training mode.
        return 0.25 + 0.05 * u
    if len(shape) == 1:
        return (
            1 + 0.2 * u if key.endswith("weight") else 0.1 * u
        )  # BatchNorm's scale; any bias or running mean
    u *= np.float32(np.sqrt(6 / np.prod(shape[1:])))
    return u


def images(batch: int, size: int, key: str = "input") -> np.ndarray:
    """An input in PyTorch's layout [batch, channels, height, width]."""
    return uniform(key, (batch, 3, size, size))


def digest(key: str, values: np.ndarray) -> tuple[float, float, float]:
    """A vector in three numbers: its mean, its product with the values of the formula over sqrt(n),
    its largest magnitude."""
    values = np.asarray(values, np.float64)
    return (
        values.mean(),
        values @ uniform(key, values.shape) / np.sqrt(values.size),
        np.abs(values).max(),
    )
