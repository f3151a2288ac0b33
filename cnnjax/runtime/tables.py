"""Tables in Markdown, and the spread of repeated measurements."""

import math

import numpy as np
import scipy.stats


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return (
        "\n".join(
            "| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]
        )
        + "\n"
    )


def spread(values, digits: int, sign: str = "") -> str:
    """Mean ± sample standard deviation; of one value itself. `sign` "+" shows it of positive means too."""
    return f"{np.mean(values):{sign}.{digits}f}" + (
        f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    )


def bar(values) -> np.ndarray:
    """An error bar's half: the sample standard deviation over the first axis, 0 of one value."""
    return np.std(values, 0, ddof=1) if len(values) > 1 else 0 * np.asarray(values)[0]


def half_width(values) -> float:
    """Half of the 95 % interval of the mean (Student's t); infinite for one value."""
    n = len(values)
    return (
        float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        if n > 1
        else math.inf
    )
