"""The position study on random weights: VGG-16 and ResNet-18 under five paddings.

    python -m cnnjax.main --config configs/posenet.py

The study asks whether position can be read from a network's features (docs/study.md). It takes 4 to
6 minutes on 2 idle CPU cores. The table shows how well the exact readout predicts horizontal
position (H): Spearman's rank correlation (SPC) and, in brackets, R2, means over 3 seeds, each with
12 photograph crops and one black image (29 November 2026):

    padding                         photographs         black
    zeros, VGG-16                   .86 (.70 ± .17)     .92 (.81 ± .03)
    zeros, ResNet-18                .83 (.65 ± .13)     .92 (.79 ± .01)
    any other, at most              .08 (.00)           .00 (.00)

± is the sample standard deviation of R2 over seeds and images, at most .10 for the other paddings.
"""

from cnnjax.position import defaults


def get_config():
    return defaults.get_config()
