"""One side of a benchmark, as a process of its own.

It is a process because XLA's flags cannot change within one. It first prints facts as a line of
JSON; then it answers each line of input, the name of a pass, with the milliseconds of one run in a
burst.

Libraries are imported late: a side must not load another's.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable

from cnnjax.benchmark import cases
from cnnjax.runtime import backend

# The length of a burst, in seconds.
BURST = 0.5
# That of a burst of training, as one call of `cnnjax.train.loop` takes.
TRAINING_BURST = 2.0


def layer_passes(side: str, case: cases.Convolution) -> tuple[dict[str, Callable], dict]:
    """Prepares the three passes of a convolution on the same numbers for every side.

    Returns, by pass, a function that runs it n times; and the mean absolute value of each result,
    which shows that sides agree.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    x = draw(case.batch, case.size, case.size, case.inputs)
    kernel = draw(case.kernel, case.kernel, case.inputs // case.groups, case.outputs)
    dy = draw(case.batch, case.output_size, case.output_size, case.outputs)
    if side == "torch":
        from cnnjax.benchmark import torch_side

        passes = torch_side.layer(case, x, kernel, dy)
    else:
        from cnnjax.benchmark import jax_side

        passes = jax_side.layer(side, case, x, kernel, dy)
    results = [np.asarray(run(1), np.float64) for run in passes.values()]
    magnitudes = [float(np.abs(result).mean()) for result in results]
    return passes, {"sizes": magnitudes}


def _network_passes(side: str, benchmark: str, name: str, batch: int):
    on_gpu = benchmark == "gpu"
    if side.startswith("torch"):
        from cnnjax.benchmark import torch_side

        device = "cuda" if on_gpu else "cpu"
        return torch_side.network(name, batch, device, compiled=side == "torch.compile")
    from cnnjax.benchmark import jax_side

    # Stock convolutions take up to 27 times as long in a loop on the CPU; nobody trains like that.
    dtype = "bfloat16" if on_gpu else "float32"
    return jax_side.network(name, batch, dtype, looped=side != "stock")


def _product(side: str, benchmark: str) -> Callable:
    if side.startswith("torch"):
        from cnnjax.benchmark import torch_side

        return torch_side.product(benchmark)
    from cnnjax.benchmark import jax_side

    return jax_side.product(benchmark)


def _start(side: str) -> contextlib.AbstractContextManager:
    """Prepares the process and returns the context in which the side runs."""
    if side.startswith("torch"):
        from cnnjax.benchmark import torch_side

        torch_side.start()
        return contextlib.nullcontext()
    if side == "stock":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = flags.replace(backend.CPU_FLAG, "")
    from cnnjax.benchmark import jax_side

    jax_side.start(side)
    return jax_side.traced(side)


# ------------------------------------------------------------------ memory


def _memory_mb(field: str) -> float | None:
    """Reads this process's memory in MB from Linux: "VmRSS" now, "VmHWM" at its peak.

    It is None where Linux, or a sandbox in its place, does not say.
    """
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return None


def _peak_memory(side: str, benchmark: str, run: Callable, before: float | None) -> float | None:
    """Measures the peak memory of a step in MB.

    On a GPU it is the allocator's highest mark; elsewhere it is the growth of the process since its
    libraries were loaded, when it had `before`.
    """
    if benchmark == "gpu":
        run(1)
        return _peak_gpu_memory(side)
    if before is None:
        return None
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    except OSError:
        return None
    run(1)
    peak = _memory_mb("VmHWM")
    return None if peak is None else peak - before


def _peak_gpu_memory(side: str) -> float:
    if side.startswith("torch"):
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20


# ------------------------------------------------------------------ the process


def _work(side: str, benchmark: str, name: str, batch: int, burst: float) -> None:
    """Prepares a side, prints its facts and answers requests."""
    before = _memory_mb("VmRSS")
    if benchmark == "layers":
        passes, facts = layer_passes(side, cases.LAYERS[name])
    elif benchmark == "compile":
        from cnnjax.benchmark import jax_side

        passes, facts = jax_side.compilation(name, batch)
    else:
        passes, facts = _network_passes(side, benchmark, name, batch)
        passes["step"](1)
        memory = _peak_memory(side, benchmark, passes["step"], before)
        facts["memory_mb"] = None if memory is None else round(memory)
    if benchmark in cases.PRODUCT:
        passes["product"] = _product(side, benchmark)
    counts = {}
    for key, run in passes.items():
        if key == "compile":
            counts[key] = 1
        else:
            seconds = TRAINING_BURST if key == "training" else burst
            counts[key] = _burst_count(run, seconds)
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        key = line.strip()
        began = time.perf_counter()
        passes[key](counts[key])
        print((time.perf_counter() - began) / counts[key] * 1e3, flush=True)


def _burst_count(run: Callable, burst: float) -> int:
    """Counts the runs that fill a burst of that many seconds, after two that are not counted."""
    run(2)
    began = time.perf_counter()
    run(1)
    seconds = time.perf_counter() - began
    return max(1, math.ceil(burst / seconds))


def main(arguments: list[str]) -> None:
    """Runs a side; `arguments` are its name, the benchmark, the case, the batch and the burst."""
    side, benchmark, name, batch, burst = arguments
    with _start(side):
        _work(side, benchmark, name, int(batch), float(burst))


if __name__ == "__main__":
    main(sys.argv[1:])
