r"""Run the settings that a configuration's `sweep()` lists, and put their results into one table.

    python -m cnnjax.sweep --config configs/lenet_mnist.py --workdir runs/lenet_sweep \
        [--config.KEY=VALUE ...]

Each run of the sweep has its own work directory. A finished run is not repeated, and a stopped one
continues. Runs that differ only in their seed, or in numbers such as the learning rate, share one
compilation. Any number of processes may work on one sweep. Each takes an unfinished run that no
other process holds; if there is none, it waits, and takes over runs that others abandon.
`--launcher=slurm --jobs=3` submits three such processes to Slurm; `--launcher=local` starts them on
this machine. They run what the configuration file listed when they were submitted.

Writes sweep.json and sweep.md: for each setting, the mean, sample standard deviation, n and 95 %
interval (Student's t) of the final errors over its seeds. A run fails if its numbers are no longer
finite, if its batch does not fit into memory, or if it does not fit its data (a batch larger than
the data set). The other runs continue; the exit code is then 1, and the table has the reason. If
every run is refused, the exit code is 2, and no table is written.
"""

import argparse
import contextlib
import dataclasses
import logging
import pathlib
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection

import ml_collections

from cnnjax import main as single
from cnnjax.runtime import backend, claims, command, configuration, files, jobs, source, workdir

_LOG = logging.getLogger("cnnjax")
_METRICS = ("train_error", "validation_error", "test_error")
# What results record of the files that a run read, and the keys that name these files. Results of
# earlier versions have the number of test images, but no digest.
_FILES = {
    "data": ("dataset", "data_dir", "n_validation"),
    "n_test": ("dataset", "data_dir"),
    "test_digest": ("dataset", "data_dir"),
    "initial_weights_sha256": ("initial_weights",),
    "network_sha256": ("model",),
}
# Those of the test images; the others are what a run was trained with.
_TESTED = ("n_test", "test_digest")
# Seconds between two attempts to start the runs that other processes hold. The first pause doubles
# up to the longest.
_FIRST_PAUSE = 0.25
_POLLING_SECONDS = 5.0


# ------------------------------------------------------------------ runs


@dataclasses.dataclass
class Run:
    """One run of a sweep: what it overrides, its configuration and its work directory."""

    overrides: dict
    config: ml_collections.ConfigDict
    folder: pathlib.Path
    # Whether it is finished and known to be of this configuration.
    is_checked: bool = False
    # Whether a warning about its network's file has been logged.
    is_warned_of: bool = False
    # Why it cannot start with its data or in its folder. Its folder does not record this, so the
    # next call tries it again.
    refusal: str = ""

    @property
    def name(self) -> str:
        return name_of(self.overrides)

    @property
    def results(self) -> pathlib.Path:
        return self.folder / "results.json"

    @property
    def failure(self) -> pathlib.Path:
        return self.folder / workdir.FAILURE

    @property
    def has_failed(self) -> bool:
        # Earlier versions kept failure.json when a failed run was later run on its own and
        # finished.
        return self.failure.exists() and not self.results.exists()

    @property
    def is_done(self) -> bool:
        # The report is written last: a run that stopped before it is not done, and its next start
        # writes it.
        is_finished = self.results.exists() and (self.folder / "report.md").exists()
        return is_finished or self.has_failed

    @property
    def is_refused(self) -> bool:
        # Another machine may have finished it since.
        return bool(self.refusal) and not self.is_done


def name_of(overrides: dict) -> str:
    """Names a run, and its folder, by its overrides: "seed=0,batch_size=64"."""
    text = ",".join(f"{key}={value}" for key, value in overrides.items())
    return text.replace("/", "_").replace(" ", "") or "default"


def read_runs(path: str, config: ml_collections.ConfigDict, folder: pathlib.Path) -> list[Run]:
    """Reads the runs that the `sweep()` of a configuration file lists.

    Args:
        path: the configuration file.
        config: its configuration, which each run changes.
        folder: the work directory of the sweep.

    Raises:
        ValueError: if there is no `sweep()`, if it lists no run or one run twice, or if a run
            does not fit the configuration.
    """
    module = source.import_file(path)
    if not hasattr(module, "sweep"):
        raise ValueError(
            f"config={path!r} has no sweep(): define one that returns a list of overrides, such as "
            "[{'seed': 0}, {'seed': 1}]"
        )
    with source.running(path):
        settings = [dict(overrides) for overrides in module.sweep()]
    if not settings:
        raise ValueError(f"sweep() of config={path!r} lists no run; expected at least one")
    names = [name_of(overrides) for overrides in settings]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"sweep() of config={path!r} lists {repeated[0]} more than once; expected each run once"
        )
    runs = []
    for overrides in settings:
        try:
            run_config = single.name_model_file(configuration.override(config, overrides))
        except ValueError as error:
            raise ValueError(
                f"sweep() sets {overrides}, which does not fit the configuration: {error}"
            ) from error
        runs.append(Run(overrides, run_config, folder / name_of(overrides)))
    return runs


def write_runs(runs: list[Run], folder: pathlib.Path) -> pathlib.Path:
    """Writes the runs to a file that `read_written_runs` reads, and returns its path."""
    records = []
    for run in runs:
        # Names are made of these texts, which tell tuples from lists, unlike JSON.
        texts = {key: str(value) for key, value in run.overrides.items()}
        records.append({"overrides": texts, "config": run.config.to_dict()})
    path = folder / f"runs-{files.digest(records)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"kind": "runs", "runs": records})
    return path


def read_written_runs(path: pathlib.Path, folder: pathlib.Path) -> list[Run]:
    """Reads the runs that `write_runs` wrote.

    Args:
        path: the file.
        folder: the work directory of the sweep.

    Raises:
        ValueError: if it is another file.
    """
    record = files.read_json(path, object_hook=_with_tuples)
    if not isinstance(record, dict) or record.get("kind") != "runs":
        raise ValueError(f"runs={str(path)!r} is not a file that a launcher of sweeps wrote")
    runs = []
    for entry in record["runs"]:
        config = ml_collections.ConfigDict(entry["config"])
        runs.append(Run(entry["overrides"], config, folder / name_of(entry["overrides"])))
    return runs


def _with_tuples(record: dict) -> dict:
    return {key: configuration.to_tuples(value) for key, value in record.items()}


def check(runs: list[Run], overrides: Collection[str] = ()) -> None:
    """Raises `ValueError` if a run cannot start, or its folder holds another or a damaged run.

    All runs are checked before any starts. If only some are of another configuration, the table
    would otherwise mix both. `overrides` are the keys that the command line sets; those that the
    schedule of some run reads may be unread by others, and a sweep that has started keeps its keys.
    A run with the schedule "constant" refuses them all the same: set them in `sweep()`.
    """
    # Imported when needed: it takes long, and `--help` does without.
    from cnnjax.train import schedules

    has_started = any(workdir.has_started(run.folder) for run in runs)
    is_read: set[str] = set()
    for run in runs:
        if "schedule" in run.config:
            keys = schedules.KEYS.get(run.config.schedule.name, ())
            is_read |= {f"schedule.{key}" for key in keys}
    overrides = () if has_started else set(overrides) - is_read
    for run in runs:
        single.job_of(run.config).check(run.config, run.folder, overrides)
        check_record(run)
        if run.is_done:
            workdir.check_seal(run.folder)
    check_files(runs)


def check_record(run: Run) -> None:
    """Checks that a run's folder, if it has been started, is of the run's configuration.

    If the run's data set or initial weights have moved, its record gets the present path.

    Raises:
        workdir.OtherConfiguration: if it is of another one.
        claims.Claimed: if its files have moved and another process holds it.
        ValueError: if its config.json is not JSON, or if `data_dir` holds other images.
    """
    # Read first: another process may finish the run while its record is checked.
    is_done = run.is_done
    is_recorded = (run.folder / "config.json").exists()
    if run.is_checked or not (is_recorded and workdir.has_started(run.folder)):
        return
    job = single.job_of(run.config)
    job.complete_record(run.config, run.folder)
    # Keys such as `workers` may differ, as they change no result.
    if not job.is_equivalent(run.config, run.folder):
        if job.may_have_moved(run.config, run.folder):
            with claims.claim(run.folder):
                job.adopt(run.config, run.folder)
        workdir.check_config(run.folder, run.config.to_dict())
    run.is_checked = is_done


# ------------------------------------------------------------------ starting them


def finish_runs(runs: list[Run], folder: pathlib.Path) -> None:
    """Starts every run that is not done, and waits for those that other processes hold.

    If another process stops, its run is taken over. So all runs are done or refused when this
    returns.

    Args:
        runs: all runs of the sweep.
        folder: the work directory of the sweep.

    Raises:
        workdir.OtherConfiguration: if another process has begun or finished a run with another
            configuration.
        ValueError: as `check_files`.
    """
    numbers = {run.name: number for number, run in enumerate(runs, 1)}
    pending = [run for run in runs if not run.is_done]
    # The first round takes what is free. Further rounds try the other runs again, without logging.
    is_first_round = True
    # A test shortens `_POLLING_SECONDS` to less than the first pause.
    pause = min(_FIRST_PAUSE, _POLLING_SECONDS)
    while pending:
        claimed = []
        for run in pending:
            if run.is_done:
                continue
            if is_first_round:
                _LOG.info("run %d of %d: %s", numbers[run.name], len(runs), run.name)
            try:
                _start_or_refuse(run)
            except claims.Claimed as error:
                claimed.append(run)
                if is_first_round:
                    _LOG.info("run %s is left for later: %s", run.name, error)
                continue
            if not run.refusal:
                write_table(folder, runs)
        if claimed and is_first_round:
            write_table(folder, runs)
            noun = "run" if len(claimed) == 1 else "runs"
            _LOG.info("waiting for %d %s of other processes", len(claimed), noun)
        if claimed:
            time.sleep(pause)
            pause = min(2 * pause, _POLLING_SECONDS)
        is_first_round = False
        pending = claimed


def _start_or_refuse(run: Run) -> None:
    """Starts one run; if it is refused, notes the reason in the run.

    Raises:
        claims.Claimed: if another process holds it.
        workdir.OtherConfiguration: if its folder holds a run of another configuration.
    """
    try:
        start_run(run)
    # Both are `ValueError`s that are no refusal.
    except (claims.Claimed, workdir.OtherConfiguration):
        raise
    except (ValueError, FileNotFoundError) as error:
        _LOG.warning("run %s is left out: %s", run.name, error)
        run.refusal = str(error)


def start_run(run: Run) -> None:
    """Starts or continues one run; if it fails, records the reason.

    Raises:
        claims.Claimed: if another process holds it.
    """
    try:
        single.run(run.config, run.folder)
    except (ArithmeticError, MemoryError) as error:
        _LOG.warning("run %s failed: %s", run.name, error)
        files.write_json(run.failure, {"error": str(error)})
    else:
        run.failure.unlink(missing_ok=True)


def launch(options: argparse.Namespace, runs: list[Run]) -> None:
    """Starts jobs that each finish the runs as they are now.

    The configuration file may be edited while jobs wait. They still import it, since networks may
    be registered there.
    """
    folder = options.workdir / "jobs"
    executor = jobs.build_executor(folder, cluster=options.launcher, settings=options.slurm)
    words = [sys.executable, "-m", "cnnjax.sweep"]
    words += ["--config", options.config, "--workdir", str(options.workdir)]
    words += ["--runs", str(write_runs(runs, folder))]
    if options.debug:
        words.append("--debug")
    names = jobs.submit(executor, words, options.jobs or 1)
    # Written even if no job ever runs: it lists the unfinished runs.
    write_table(options.workdir, runs)
    started = ", ".join(f"job {name}" for name in names)
    _LOG.info("started %s; their output is in %s", started, folder)


# ------------------------------------------------------------------ the table


def check_files(runs: list[Run]) -> None:
    """Checks that finished runs of the same files have read the same contents.

    Another network is only warned of, since an edit of its file may change nothing. Results of
    earlier versions do not tell all that was read, and are accepted.

    Raises:
        ValueError: if two runs have read other images or initial weights.
    """
    # The first run that read some files, and what it recorded of their contents.
    first_reads: dict[tuple, tuple[Run, object]] = {}
    for run in runs:
        results = files.read_json(run.results) if run.results.exists() else {}
        for name, keys in _FILES.items():
            if results.get(name) is None:
                continue
            contents = results[name]
            file_names = (name, *(run.config[key] for key in keys))
            first_run, first_contents = first_reads.setdefault(file_names, (run, contents))
            if contents == first_contents:
                continue
            use = "tested" if name in _TESTED else "trained"
            difference = (
                f"{first_run.name} and {run.name} were {use} with different contents of "
                + ", ".join(f"{key}={run.config[key]!r}" for key in keys)
            )
            if name != "network_sha256":
                raise ValueError(
                    f"{difference}; remove the folders of runs with the contents that are not "
                    "wanted, or choose another --workdir"
                )
            # A table is written after every run.
            if not run.is_warned_of:
                _LOG.warning("%s; their networks may differ", difference)
                run.is_warned_of = True


def summarize(values: list[float]) -> dict:
    """Computes mean, sample standard deviation, n and half-width of the 95 % interval.

    For a single value `std` and `half_width` are None.
    """
    # Imported when needed: --help does not wait for NumPy.
    import numpy as np

    from cnnjax.runtime import tables

    n = len(values)
    return {
        "mean": float(np.mean(values)),
        "std": tables.deviation(values),
        "n": n,
        "half_width": tables.half_width(values) if n > 1 else None,
    }


def summarize_settings(runs: list[Run]) -> list[dict]:
    """Summarizes each setting in one row: all runs that differ in their seed only."""
    groups = defaultdict(list)
    for run in runs:
        shared = {key: value for key, value in run.overrides.items() if key != "seed"}
        groups[name_of(shared)].append(run)
    rows = []
    for name, members in groups.items():
        finals = []
        # "cell" is what earlier versions call a setting, for those who read sweep.json.
        row: dict = {"cell": name, "failed": [], "unfinished": []}
        for run in members:
            if run.is_refused:
                row["failed"].append(f"{run.name}: {run.refusal}")
            elif run.results.exists():
                finals.append(files.read_json(run.results)["final"])
            elif run.has_failed:
                reason = files.read_json(run.failure)["error"]
                row["failed"].append(f"{run.name}: {reason}")
            else:
                row["unfinished"].append(run.name)
        for metric in _METRICS:
            values = [final[metric] for final in finals if metric in final]
            # A metric that only some of the runs have is left out.
            if values and len(values) == len(finals):
                row[metric] = summarize(values)
        rows.append(row)
    return rows


def write_table(folder: pathlib.Path, runs: list[Run]) -> None:
    """Writes sweep.json and sweep.md from the results that the runs' folders hold.

    Args:
        folder: the work directory of the sweep.
        runs: its runs.

    Raises:
        workdir.OtherConfiguration: if another process has finished a run with another
            configuration, whose results the table would mix with those of this one.
        ValueError: as `check_files`.
    """
    for run in runs:
        if run.is_done:
            check_record(run)
    check_files(runs)

    rows = summarize_settings(runs)
    files.write_json(folder / "sweep.json", {"kind": "sweep", "rows": rows})
    files.write(folder / "sweep.md", _format_table(rows))


def _format_table(rows: list[dict]) -> str:
    """Formats the rows of a sweep as Markdown, with the runs that are failed or unfinished."""
    # Imported when needed: --help does not wait for NumPy.
    from cnnjax.runtime import tables

    metrics = [metric for metric in _METRICS if any(metric in row for row in rows)]
    header = ["setting", *(metric.replace("_", " ") for metric in metrics), "failed", "unfinished"]
    lines = []
    notes = ""
    for row in rows:
        counts = []
        for key in ("failed", "unfinished"):
            count = len(row[key])
            counts.append(str(count) if count else "")
        lines.append([row["cell"], *(_format(row.get(metric)) for metric in metrics), *counts])
        for reason in row["failed"]:
            notes += f"\nFailed, {reason}\n"
        for name in row["unfinished"]:
            notes += f"\nUnfinished: {name}\n"
    text = (
        "Final errors in percent: mean ± half-width of its 95 % interval "
        "(sample standard deviation), n.\n\n"
    )
    return text + tables.table(header, lines) + notes


def _format(summary: dict | None) -> str:
    """Formats a summary in percent: "1.25 ± 0.31 (std 0.12), n=3"."""
    if summary is None:
        return ""
    text = f"{100 * summary['mean']:.2f}"
    if summary["n"] > 1:
        text += f" ± {100 * summary['half_width']:.2f} (std {100 * summary['std']:.2f})"
    return f"{text}, n={summary['n']}"


# ------------------------------------------------------------------ the command line


def sweep(options: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    """Runs or launches the sweep of a configuration. Raises `RuntimeError` if a run failed."""
    if config.get("kind") != "train":
        raise ValueError(
            f"kind={config.get('kind')!r} of the configuration is not 'train', the only kind that "
            "is swept"
        )
    for name in ("jobs", "slurm"):
        if getattr(options, name) and not options.launcher:
            raise ValueError(
                f"{name}={getattr(options, name)} is for jobs, which --launcher=slurm or "
                "--launcher=local starts"
            )
    if options.runs:
        runs = read_written_runs(options.runs, options.workdir)
    else:
        runs = read_runs(options.config, config, options.workdir)
    _check_overrides(options, runs)
    # Jobs may run on machines with other devices.
    if not options.launcher:
        backend.reach_devices()
    check(runs, options.overrides)
    if options.launcher:
        launch(options, runs)
        return
    try:
        finish_runs(runs, options.workdir)
    except (workdir.Interrupted, KeyboardInterrupt) as stop:
        # A refusal of the table must not hide that the sweep was stopped; the next call repeats it.
        # Before the first run has begun, there is no folder to write it to.
        with contextlib.suppress(ValueError, OSError):
            write_table(options.workdir, runs)
        if isinstance(stop, workdir.Interrupted):
            raise
        raise workdir.Interrupted(
            "stopped; run the same command again to continue the sweep"
        ) from stop
    if all(run.is_refused for run in runs):
        raise ValueError(f"every run was refused; {runs[0].name}: {runs[0].refusal}")
    write_table(options.workdir, runs)
    failed = [run for run in runs if run.has_failed or run.is_refused]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(runs)} runs failed: see {options.workdir / 'sweep.md'}"
        )
    _LOG.info("finished: see %s", options.workdir / "sweep.md")


def _check_overrides(options: argparse.Namespace, runs: list[Run]) -> None:
    """Raises `ValueError` for a key of the command line that a run would silently replace."""
    for key in options.overrides:
        if options.runs:
            raise ValueError(
                f"--config.{key} has no effect beside --runs, whose file has the configurations"
            )
        if any(key in run.overrides for run in runs):
            raise ValueError(
                f"--config.{key} has no effect where sweep() of config={options.config!r} sets "
                f"{key}; change it there"
            )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code (`cnnjax.runtime.command.run`)."""
    if arguments is None:
        arguments = sys.argv[1:]
    parser = single.build_parser("cnnjax.sweep", __doc__)
    parser.add_argument(
        "--launcher", choices=("slurm", "local"), help="submit the sweep as jobs and exit"
    )
    parser.add_argument(
        "--jobs",
        type=command.whole_number(1),
        help="number of jobs that the launcher starts (default: 1)",
    )
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a submitit parameter for every job, such as slurm_partition=gpu or "
        "timeout_min=60; may be repeated",
    )
    parser.add_argument(
        "--runs",
        type=command.path,
        metavar="FILE",
        help="for jobs: the runs that a launcher wrote, in place of those of the configuration",
    )
    return single.run_command(parser, arguments, sweep)


if __name__ == "__main__":
    single.leave(main())
