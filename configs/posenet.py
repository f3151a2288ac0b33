"""The position study on random weights: VGG-16 and ResNet-18 under five paddings, against the image
alone.

    python -m cnnjax.main --config configs/posenet.py

3 min 40 s on 2 CPU cores (jaxlib 0.10.2, 21 November 2026). SPC (R2) of H with the exact readout, 3
seeds, 12 photograph crops and one black image each: VGG-16 with zeros .86 (.70) on photographs and
.92 (.81) on black; ResNet-18 .83 (.65) and .92 (.79); with every other padding at most .08 (.00) on
photographs and exactly 0 on black.
"""

from cnnjax.position import defaults


def get_config():
    return defaults.get_config()
