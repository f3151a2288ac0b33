"""The position maps that a readout must produce, whatever the image shows.

Islam, Jia and Bruce, ICLR 2020 (arXiv 2001.08248). The paper prints no formula. These formulas
were fitted to the authors' 256x256 images, scaled to [0, 1]; the largest difference from them is 0
for H and V, 0.0105 for G and 0.0155 for HS and VS.
"""

import numpy as np
from jaxtyping import Float32

TARGETS = ("H", "V", "G", "HS", "VS")
# In units of the map's side, fitted to the authors' Gaussian, which is then scaled to span 0 to 1.
_SIGMA = 126.8 / 256
# Periods of the authors' stripes from one side of the map to the other.
_PERIODS = 2.5


def target(name: str, size: int) -> Float32[np.ndarray, "{size} {size}"]:
    """Returns a position map with values in [0, 1].

    - "H" grows from left to right, "V" from top to bottom.
    - "G" is a Gaussian about the center.
    - "HS" has horizontal stripes (each row is constant), "VS" vertical ones.

    Raises `ValueError` if the name is unknown or the size is below 2.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r} is not one of {', '.join(TARGETS)}")
    if size < 2:
        raise ValueError(f"size={size} is too small for a position map; expected at least 2")

    # From the image's center to a pixel's center, in units of the image's side.
    offset = (np.arange(size) - (size - 1) / 2) / size
    if name == "G":
        square = offset**2
        bell = np.exp(-(square[:, None] + square) / (2 * _SIGMA**2))
        bell -= bell.min()
        return (bell / bell.max()).astype(np.float32)

    if name in ("HS", "VS"):
        profile = 0.5 + 0.5 * np.cos(2 * np.pi * _PERIODS * (offset + 0.5))
    else:
        profile = np.linspace(0, 1, size)
    # Every row is the profile: values change from left to right.
    across = np.broadcast_to(profile, (size, size))
    return (across if name in ("H", "VS") else across.T).astype(np.float32)
