"""The position maps that a readout must produce, whatever the image shows: Islam, Jia and Bruce, ICLR 2020 (arXiv 2001.08248).

The paper prints no formula; these fit its official 256x256 maps (all scaled to [0, 1]) to within 0.01.
"""

import numpy as np
from jaxtyping import Float32

TARGETS = ("H", "V", "G", "HS", "VS")
_SIGMA = (
    126.8 / 256
)  # of the side: fitted to the official Gaussian, which is then scaled to reach 0 and 1
_PERIODS = 2.5  # of the official stripes


def target(name: str, size: int) -> Float32[np.ndarray, "{size} {size}"]:
    """The map `name` in [0, 1]; raises `ValueError` for an unknown name or a size below 2.

    H grows from left to right, V from top to bottom, G is a Gaussian about the center; HS are stripes along the vertical
    (each row is constant), VS along the horizontal.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r} is not one of {', '.join(TARGETS)}")
    if size < 2:
        raise ValueError(f"size={size} is too small for a position map; expected at least 2")
    ramp = np.linspace(0, 1, size)
    offset = (
        np.arange(size) - (size - 1) / 2
    ) / size  # of a pixel's center from the image's, in sides
    if name in ("HS", "VS"):
        ramp = 0.5 + 0.5 * np.cos(2 * np.pi * _PERIODS * (offset + 0.5))
    if name == "G":
        square = offset**2
        bell = np.exp(-(square[:, None] + square) / (2 * _SIGMA**2))
        bell -= bell.min()
        return (bell / bell.max()).astype(np.float32)
    along_columns = np.broadcast_to(ramp, (size, size))
    return (along_columns if name in ("H", "VS") else along_columns.T).astype(np.float32)
