"""The position study on random weights: VGG-16 and ResNet-18 under five paddings.

    python -m cnnjax.main --config configs/posenet.py

3 min 40 s on 2 CPU cores (jaxlib 0.10.2, 21 November 2026). SPC (R2) of H with the exact readout,
mean over 3 seeds of 12 photograph crops and one black image each:

    padding                         photographs   black
    zeros, VGG-16                   .86 (.70)     .92 (.81)
    zeros, ResNet-18                .83 (.65)     .92 (.79)
    any other, at most              .08 (.00)     0
"""

from cnnjax.position import defaults


def get_config():
    return defaults.get_config()
