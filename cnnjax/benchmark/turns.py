"""Sides that take turns on networks and single convolutions."""

import contextlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence

from cnnjax.benchmark.cases import PASSES, PRODUCT
from cnnjax.benchmark.sides import BURST


class _Side:
    """The process of one side."""

    def __init__(self, side: str, what: str, name: str, batch: int, burst: float):
        self.side = side
        self.name = name
        arguments = [side, what, name, str(batch), str(burst)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cnnjax.benchmark.sides", *arguments],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def answer(self, request: str = ""):
        """Sends a request and reads one line of JSON.

        Raises `RuntimeError` if the side failed.
        """
        assert self.process.stdin and self.process.stdout  # pipes, as requested above
        # A side that has died no longer reads; it does not answer either.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(request)
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"the {self.side} side of {self.name} stopped with exit code {code}")
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(
    what: str, sides: Sequence[str], name: str, batch: int, rounds: int, *, burst: float = BURST
) -> tuple[dict, dict]:
    """Measures a network or a layer on all sides, which take turns.

    At its turn, a side repeats a pass for about `burst` seconds; training takes its own time.

    Returns each side's facts, and lists of milliseconds over rounds by (side, pass). Raises
    `RuntimeError` if a side fails or sides disagree.
    """
    workers = {side: _Side(side, what, name, batch, burst) for side in sides}
    try:
        facts = {side: worker.answer() for side, worker in workers.items()}
        _check_agreement(name, facts)
        keys = (*PASSES[what], "product") if what in PRODUCT else PASSES[what]
        times: dict[tuple[str, str], list[float]] = {
            (side, key): [] for side in sides for key in keys
        }
        for _ in range(rounds):
            for side, key in times:
                times[side, key].append(workers[side].answer(f"{key}\n"))
    finally:
        for worker in workers.values():
            worker.stop()
    return facts, times


def _check_agreement(name: str, facts: dict) -> None:
    """Raises `RuntimeError` if a side disagrees with the first.

    Numbers of parameters and sizes of results are compared.
    """
    first_side, first = next(iter(facts.items()))
    for side, own in facts.items():
        pairs = zip(own.get("sizes", ()), first.get("sizes", ()))
        alike = all(math.isclose(a, b, rel_tol=1e-2) for a, b in pairs)
        if own.get("parameters") != first.get("parameters") or not alike:
            raise RuntimeError(
                f"the sides of {name} do not compute the same: {first_side} {first}, {side} {own}"
            )


def rows_of(what: str, name: str, batch: int, flops: float, facts: dict, times: dict) -> list[dict]:
    """Makes one row for each pass and side.

    `flops` are those of a forward pass; a training step counts as three forward passes, a gradient
    as one.
    """
    products = [min(values) for (_, key), values in times.items() if key == "product"]
    # A product of n x n matrices takes 2 n^3 operations; times are in milliseconds.
    peak = 2 * PRODUCT[what] ** 3 / min(products) * 1e3
    rows = []
    for key in PASSES[what]:
        passes = 3 if key in ("step", "training") else 1
        ours = times["cnnjax", key]
        for side, own_facts in facts.items():
            values = times[side, key]
            ms = statistics.median(values)
            rate = flops * passes / ms * 1e3
            rows.append(
                {
                    "name": name,
                    "batch": batch,
                    "pass": key,
                    "side": side,
                    "ms": ms,
                    "min_ms": min(values),
                    "max_ms": max(values),
                    "images_per_s": batch / ms * 1e3,
                    "gflop_per_s": rate / 1e9,
                    "peak_gflop_per_s": peak / 1e9,
                    "utilisation": rate / peak,
                    "over_cnnjax": statistics.median(a / b for a, b in zip(values, ours)),
                    "rounds": len(values),
                    **own_facts,
                }
            )
    return rows
