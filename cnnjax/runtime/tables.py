"""Tables in Markdown, and the spread of repeated measurements."""

import math
from collections.abc import Sequence

import numpy as np


def table(header: list[str], lines: list[list[str]]) -> str:
    """Formats a table in Markdown."""
    rule = ["---"] * len(header)
    rows = ["| " + " | ".join(line) + " |" for line in [header, rule, *lines]]
    return "\n".join(rows) + "\n"


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Formats mean ± sample standard deviation; one value has no deviation.

    With `sign` "+", positive means have a sign, too.
    """
    text = f"{np.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" ± {deviation(values):.{digits}f}"
    return text


def deviation(values: Sequence[float] | np.ndarray) -> float | None:
    """Computes the sample standard deviation; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1))


def bar(values) -> np.ndarray:
    """Computes an error bar's half length, the standard deviation; 0 for one value."""
    if len(values) > 1:
        return np.std(values, axis=0, ddof=1)
    return np.zeros_like(np.asarray(values)[0])


def half_width(values: Sequence[float] | np.ndarray) -> float:
    """Computes half of the mean's 95 % interval (Student's t); infinite for one value."""
    # Imported when needed: scipy.stats takes longer to import than everything else here.
    import scipy.stats

    n = len(values)
    if n == 1:
        return math.inf
    return float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


def direction(values: Sequence[float]) -> int:
    """Tells the sign of the mean, 1 or -1; 0 if its 95 % interval contains zero."""
    mean = np.mean(values)
    return 0 if abs(mean) <= half_width(values) else int(np.sign(mean))


def judge(values: Sequence[float]) -> str:
    """Judges by the mean's 95 % interval whether values are more than zero."""
    verdicts = {1: "holds", 0: f"is not decided by n={len(values)}", -1: "does not hold"}
    return verdicts[direction(values)]


def interval(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Formats the mean ± half of its 95 % interval; one value has no interval.

    For differences paired by seed, it is the paired interval. With `sign` "+", positive means have
    a sign, too.
    """
    text = f"{np.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" ± {half_width(values):.{digits}f}"
    return text
