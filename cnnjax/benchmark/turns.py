"""Sides that take turns: networks and single convolutions in cnnjax, in jax's own operations and in PyTorch."""

import json
import math
import statistics
import subprocess
import sys

from cnnjax.benchmark.sides import PASSES, PRODUCT, SIDES


def measure(
    what: str, sides: tuple[str, ...], name: str, batch: int, rounds: int
) -> tuple[dict, dict]:
    """Facts of each side, and its milliseconds (side, pass) -> list over rounds. Raises `RuntimeError` if sides disagree or fail."""
    workers = {
        side: subprocess.Popen(
            [sys.executable, "-m", "cnnjax.benchmark.sides", side, what, name, str(batch)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for side in sides
    }

    def answer(side, request=""):
        worker = workers[side]
        assert worker.stdin and worker.stdout  # pipes, as they were asked for
        worker.stdin.write(request)
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"the {side} side of {name} stopped with exit code {worker.wait()}")
        return json.loads(line)

    try:
        facts = {side: answer(side) for side in sides}
        first = facts[sides[0]]
        for side, found in facts.items():
            if found.get("parameters") != first.get("parameters") or any(
                not math.isclose(a, b, rel_tol=1e-2)
                for a, b in zip(found.get("sizes", ()), first.get("sizes", ()))
            ):
                raise RuntimeError(
                    f"the sides of {name} do not compute the same: {sides[0]} {first}, {side} {found}"
                )
        times: dict[tuple[str, str], list[float]] = {
            (side, key): [] for side in sides for key in (*PASSES[what], "product")
        }
        for _ in range(rounds):
            for side, key in times:
                times[side, key].append(answer(side, f"{key}\n"))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    return facts, times


def rows_of(what: str, name: str, batch: int, flops: float, facts: dict, times: dict) -> list[dict]:
    """One row for each pass and side. `flops` are those of a forward pass; a training step is three of them, a gradient one."""
    peak = (
        2
        * PRODUCT[what] ** 3
        / min(min(values) for (_, key), values in times.items() if key == "product")
        * 1e3
    )
    rows = []
    for key in PASSES[what]:
        ours = times[SIDES[what][0], key]
        for side in facts:
            found = times[side, key]
            ms = statistics.median(found)
            rate = flops * (3 if key in ("step", "training") else 1) / ms * 1e3
            rows.append(
                {
                    "name": name,
                    "batch": batch,
                    "pass": key,
                    "side": side,
                    "ms": ms,
                    "min_ms": min(found),
                    "max_ms": max(found),
                    "images_per_s": batch / ms * 1e3,
                    "gflop_per_s": rate / 1e9,
                    "peak_gflop_per_s": peak / 1e9,
                    "utilisation": rate / peak,
                    "over_cnnjax": statistics.median(a / b for a, b in zip(found, ours)),
                    "rounds": len(found),
                    **facts[side],
                }
            )
    return rows
