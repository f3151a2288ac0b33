"""Saves checkpoints until it is killed, for test_checkpoints.py."""

import sys

import numpy as np

from cnnjax.train.checkpoints import Checkpoints


def main(arguments: list[str]) -> int:
    """Prints each step as soon as its save has begun."""
    with Checkpoints(arguments[0]) as checkpoints:
        found = checkpoints.restore({"x": np.zeros((500, 500), np.float32)})
        start = found[0] if found else 0
        print("ready", file=sys.stderr)
        for step in range(start + 1, start + 10_000):
            checkpoints.save(step, {"x": np.full((500, 500), step, np.float32)}, {"step": step})
            print(f"step {step}", file=sys.stderr)
    return 0
