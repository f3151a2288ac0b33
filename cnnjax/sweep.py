"""Sweeps: a configuration's `sweep()` says which settings to run; each is a work directory, and one table holds them all.

    python -m cnnjax.sweep --config configs/lenet_mnist.py --workdir runs/lenet_sweep [--config.KEY=VALUE ...]

What is finished is not run again, what was stopped goes on. Cells that differ in seeds and numbers only share one compilation,
since they run in one process. Any number of processes may work at one sweep: each takes cells that no other is at. With
`--launcher=slurm --jobs=8` so many are submitted to Slurm (by submitit), with `--launcher=local` started here. Writes sweep.json and
sweep.md: mean, sample standard deviation, n and 95 % interval (Student's t) of the final errors over the seeds of each cell.
"""

import copy
import importlib.util
import logging
import os
import pathlib
import re
import subprocess
import sys
from collections import defaultdict

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from cnnjax import main
from cnnjax.runtime import tables, workdir

_LAUNCHER = flags.DEFINE_enum(
    "launcher", None, ["slurm", "local"], "Hands the sweep to jobs of its own, and ends."
)
_JOBS = flags.DEFINE_integer("jobs", 1, "How many jobs the launcher starts.", lower_bound=1)
_SLURM = flags.DEFINE_multi_string(
    "slurm",
    [],
    "A parameter of submitit's for every job, such as --slurm=slurm_partition=gpu or "
    "--slurm=timeout_min=60; may be repeated.",
)
_LOG = logging.getLogger("cnnjax")
_METRICS = ("train_error", "validation_error", "test_error")


def _cells(path: str) -> list[dict]:
    """The overrides that a configuration file's `sweep()` lists. Raises `ValueError` if it has none, or one twice."""
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"config={path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise ValueError(
            f"config={path!r} has no sweep(): define one that returns a list of overrides, such as [{{'seed': 0}}, "
            "{'seed': 1}]"
        )
    cells = [dict(cell) for cell in module.sweep()]
    if not cells or len({_name(cell) for cell in cells}) < len(cells):
        raise ValueError(
            f"sweep() of config={path!r} must list at least one cell, each once; it lists {len(cells)}"
        )
    return cells


def _name(cell: dict) -> str:
    return (
        ",".join(f"{key}={value}" for key, value in cell.items()).replace("/", "_").replace(" ", "")
        or "default"
    )


def _config(config: ml_collections.ConfigDict, cell: dict) -> ml_collections.ConfigDict:
    changed = copy.deepcopy(config)
    try:
        changed.update_from_flattened_dict(cell)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"sweep() sets {cell}, which does not fit the configuration: {' '.join(str(error).split())}"
        ) from error
    return changed


def _interval(values: list[float]) -> dict:
    """Mean, sample standard deviation, n and the half-width of the mean's 95 % interval; the last needs two values."""
    n = len(values)
    std = float(np.std(values, ddof=1)) if n > 1 else None
    return {
        "mean": float(np.mean(values)),
        "std": std,
        "n": n,
        "half_width": tables.half_width(values) if n > 1 else None,
    }


def summarize(folder: pathlib.Path, cells: list[dict]) -> None:
    """Writes sweep.json and sweep.md from the cells' results on the disk; cells that differ in their seed only make one row."""
    groups = defaultdict(list)
    for cell in cells:
        groups[_name({key: value for key, value in cell.items() if key != "seed"})].append(
            folder / _name(cell)
        )
    rows = []
    for name, folders in groups.items():
        done = [
            workdir.read_json(path)["final"]
            for place in folders
            if (path := place / "results.json").exists()
        ]
        failed = [
            workdir.read_json(path)["error"]
            for place in folders
            if (path := place / "failure.json").exists()
        ]
        row = {"cell": name, "failed": failed}
        measured = [metric for metric in _METRICS if done and metric in done[0]]
        rows.append(
            row | {metric: _interval([final[metric] for final in done]) for metric in measured}
        )
    workdir.write_json(folder / "sweep.json", {"kind": "sweep", "rows": rows})

    def show(found):
        if found is None:
            return ""
        spread = (
            f" ± {100 * found['half_width']:.2f} (std {100 * found['std']:.2f})"
            if found["n"] > 1
            else ""
        )
        return f"{100 * found['mean']:.2f}{spread}, n={found['n']}"

    metrics = [metric for metric in _METRICS if any(metric in row for row in rows)]
    lines = [
        [row["cell"], *(show(row.get(metric)) for metric in metrics), str(len(row["failed"]) or "")]
        for row in rows
    ]
    text = "Final errors in percent: mean ± half-width of its 95 % interval (sample standard deviation), n.\n\n"
    workdir.write(
        folder / "sweep.md",
        text
        + tables.table(
            ["cell", *(metric.replace("_", " ") for metric in metrics), "failed"], lines
        ),
    )


def launch(folder: pathlib.Path) -> None:
    """Starts jobs that each run this same command without its launcher."""
    import submitit

    mine = "|".join(("launcher", "jobs", "slurm"))
    own = re.sub(f"\0--?({mine})(=|\0)[^\0]*", "", "\0" + "\0".join(sys.argv[1:])).split("\0")[
        1:
    ]  # --jobs=8 and --jobs 8
    executor = submitit.AutoExecutor(folder / "jobs", cluster=_LAUNCHER.value)
    try:
        executor.update_parameters(
            name="cnnjax-sweep",
            **{"timeout_min": 24 * 60}
            | {
                key: int(value) if value.isdecimal() else value
                for key, _, value in (text.partition("=") for text in _SLURM.value)
            },
        )
    except NameError as error:
        raise ValueError(f"slurm={_SLURM.value}: {' '.join(str(error).split())}") from error
    command = [sys.executable, "-m", "cnnjax.sweep", *own]
    jobs = [
        executor.submit(subprocess.run, command, check=True, cwd=os.getcwd())
        for _ in range(_JOBS.value)
    ]
    _LOG.info(
        "started %s; their output is in %s",
        ", ".join(f"job {job.job_id}" for job in jobs),
        folder / "jobs",
    )


def sweep(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Runs every cell that is not done. A cell whose loss is not finite counts as done, and as failed."""
    if config.kind != "train":
        raise ValueError(
            f"kind={config.kind!r} of the configuration is not 'train', the only kind that is swept"
        )
    cells = _cells(config_flags.get_config_filename(flags.FLAGS["config"]))
    configs = [_config(config, cell) for cell in cells]
    if _LAUNCHER.value:
        return launch(folder)
    for cell, changed in zip(cells, configs):
        place = folder / _name(cell)
        if any(
            (place / name).exists() for name in ("results.json", "failure.json")
        ):  # main.run refuses the others
            workdir.check_config(place, changed.to_dict())
            workdir.check_seal(place)
    for number, (cell, changed) in enumerate(zip(cells, configs), 1):
        place = folder / _name(cell)
        if not (place / "results.json").exists() and not (place / "failure.json").exists():
            _LOG.info("cell %d of %d: %s", number, len(cells), _name(cell))
            try:
                main.run(changed, place)
            except workdir.Claimed as error:
                _LOG.info("cell %s is left out: %s", _name(cell), error)
            except ArithmeticError as error:
                _LOG.warning("cell %s failed: %s", _name(cell), error)
                workdir.write_json(place / "failure.json", {"error": str(error)})
        summarize(folder, cells)
    _LOG.info("finished: see %s", folder / "sweep.md")


if __name__ == "__main__":
    main.leave(main.main(sys.argv, sweep))
