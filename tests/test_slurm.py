"""Slurm for real: jobs of a cluster of one node, which is started for these tests.

All jobs run at the same time, since most of the tests' time is waiting for Slurm (`record`). Where
the cluster's programs are absent the tests are skipped (Debian: slurm-wlm and munge).
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import quick
import slurm_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(slurm_cluster.missing()),
        reason="no Slurm here (Debian: apt-get install slurm-wlm munge); not found: "
        + ", ".join(slurm_cluster.missing()),
    ),
]

ROOT = pathlib.Path(__file__).parents[1]
# A run that does not end by itself, and one that ends at once. Their network sleeps in every step:
# while the tests wait for Slurm, other tests have the processors.
LONG = 3000
CONFIG = f"""
import time

import flax.linen as nn
import jax

from cnnjax.models import base
from cnnjax.train import defaults


class Sleeper(base.Network):
    input_shape: tuple[int, int, int] = (8, 8, 1)

    @nn.nowrap
    def walk(self, x, train):
        if train:
            jax.debug.callback(lambda: time.sleep(0.1))
        yield "logits", nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


base.register("sleeper", Sleeper)


def get_config():
    config = defaults.get_config()
    config.model = "sleeper"
    config.checkpoint_every_steps = 5
    return config


def sweep():
    return [{{"epochs": {LONG}}}, {{"epochs": 1}}]
"""
STOPPED = re.compile(r"stopped by (\w+) after step (\d+) of")
RESUMED = re.compile(r"resuming from step (\d+) of")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job in the queue, and the file that it logs to."""

    number: str
    log: pathlib.Path

    def read_log(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@dataclasses.dataclass(frozen=True)
class Ended:
    """What is left of a job: Slurm's fields (JobState, ExitCode, Restarts, ...) and its log."""

    fields: dict[str, str]
    log: str


class Cluster:
    """Commands on a cluster, in the checkout."""

    def __init__(self, environment: dict[str, str]):
        self.environment = quick.environment(environment)

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            words,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> str:
        process = self.start(*words)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def describe(self, job: Job) -> dict[str, str]:
        text = self.run("scontrol", "show", "job", job.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def give_time(self, job: Job, minutes: int) -> bool:
        """Set a job's time limit. Slurm refuses to between a job's end and its return to the queue,
        when the job counts as finished."""
        words = ("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
        return subprocess.run(words, env=self.environment, capture_output=True).returncode == 0

    def let_time_run_out(self, jobs: list[Job]) -> None:
        """Bring the jobs' ends so near that Slurm announces them; return when all have saved.

        Slurm looks at the time every half a minute, and ends a job unannounced if its time has run
        out by then; so three quarters of a minute are left at least. The jobs have all their time
        again when they are started anew.
        """
        stops = {}
        for job in jobs:
            stops[job] = len(STOPPED.findall(job.read_log()))
            hours, minutes, seconds = map(int, self.describe(job)["RunTime"].split(":"))
            elapsed = 3600 * hours + 60 * minutes + seconds
            assert self.give_time(job, (elapsed + 45) // 60 + 1)

        def have_time_again() -> bool:
            for job, before in list(stops.items()):
                if len(STOPPED.findall(job.read_log())) > before and self.give_time(job, 20):
                    del stops[job]
            return not stops

        wait_until(have_time_again)

    def cancel(self, job: Job) -> Ended:
        """Cancel a job and wait until it has ended."""
        self.run("scancel", job.number)
        wait_until(lambda: not self.run("squeue", "--noheader", "--jobs", job.number))
        return Ended(self.describe(job), job.read_log())


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_checkpoint(folder: pathlib.Path) -> bool:
    return any(folder.glob("checkpoints/*/manifest.json"))


def submit_script(cluster: Cluster, config: pathlib.Path, folder: pathlib.Path) -> Job:
    """Submit the page's script, with two tasks, on a configuration that needs no download and a
    node without GPUs."""
    page = (ROOT / "docs" / "slurm.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    srun = 'srun --cpus-per-task="$SLURM_CPUS_PER_TASK"'
    resources = "--gpus-per-node=1 --cpus-per-task=8 --mem=32G --time=04:00:00"
    changes = {
        resources: "--ntasks=2 --cpus-per-task=1 --time=00:20:00",
        f"{srun} \\\n    python": f"{srun} {sys.executable}",
        "configs/resnet50_imagenet.py --config.data_dir=DATA": (
            f"{config} --config.epochs={LONG} --distributed=auto"
        ),
        "SHARED/run": str(folder / "run"),
    }
    for old, new in changes.items():
        assert old in script
        script = script.replace(old, new)
    (folder / "script.sh").write_text(script)
    log = folder / "log"
    number = cluster.run(
        *("sbatch", "--parsable", "--open-mode=append", f"--output={log}"),
        str(folder / "script.sh"),
    ).strip()
    return Job(number, log)


def submit_sweep(cluster: Cluster, config: pathlib.Path, runs: pathlib.Path) -> list[Job]:
    told = cluster.run(
        *(sys.executable, "-m", "cnnjax.sweep", "--config", str(config), "--workdir", str(runs)),
        *("--launcher=slurm", "--jobs=2"),
        *("--slurm=timeout_min=20", "--slurm=slurm_signal_delay_s=120"),
        "--slurm=cpus_per_task=1",
    )
    numbers = re.findall(r"job (\d+)", told)
    return [Job(number, runs / "jobs" / f"{number}_0_log.err") for number in numbers]


@dataclasses.dataclass(frozen=True)
class Record:
    """What the jobs left.

    Attributes:
        runs: the sweep's folder.
        tables: its sweep.md, when the jobs have been submitted and at the end.
        first: the sweep's job that took the long run, and was canceled.
        second: the other, which took it up, ran out of time, and was canceled at the end.
        script: the page's script, which ran out of time, and was canceled at the end.
        tasks: the folder of the run of two tasks.
    """

    runs: pathlib.Path
    tables: tuple[str, str]
    first: Ended
    second: Ended
    script: Ended
    tasks: pathlib.Path


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Runs all jobs on one cluster, so that they wait for Slurm together."""
    folder = tmp_path_factory.mktemp("jobs")
    config = folder / "config.py"
    config.write_text(CONFIG)
    runs = folder / "runs"
    table = runs / "sweep.md"
    long = runs / f"epochs={LONG}"
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as environment:
        # A job that is started anew has nothing to compile.
        compiled = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        cluster = Cluster(environment | compiled)
        script = submit_script(cluster, config, folder)
        first, second = submit_sweep(cluster, config, runs)
        table_at_start = table.read_text()

        # One job trains for long. The other ends the short run, and waits.
        wait_until(lambda: has_checkpoint(long) and (runs / "epochs=1" / "results.json").exists())
        if f"running in {long}" not in first.read_log():
            first, second = second, first
        wait_until(lambda: "waiting for 1 run of other processes" in second.read_log())
        # The one that waited takes up the run of a canceled job.
        first_ended = cluster.cancel(first)
        wait_until(lambda: RESUMED.search(second.read_log()))

        tasks = cluster.start(
            *("srun", "--ntasks=2", sys.executable, "-m", "cnnjax.main"),
            *("--config", "configs/lenet_digits.py", "--config.model=mlp1", "--config.epochs=1"),
            *("--workdir", str(folder / "tasks"), "--distributed=auto"),
        )
        wait_until(lambda: has_checkpoint(folder / "run"))
        cluster.let_time_run_out([second, script])
        wait_until(lambda: len(RESUMED.findall(second.read_log())) == 2)
        wait_until(lambda: RESUMED.search(script.read_log()))
        output, _ = tasks.communicate(timeout=300)
        assert tasks.returncode == 0, output
        second_ended = cluster.cancel(second)
        script_ended = cluster.cancel(script)
    return Record(
        runs=runs,
        tables=(table_at_start, table.read_text()),
        first=first_ended,
        second=second_ended,
        script=script_ended,
        tasks=folder / "tasks",
    )


def test_a_canceled_job_of_a_sweep_saves_and_another_goes_on(record):
    # From the beginning the table says what is unfinished.
    assert f"Unfinished: epochs={LONG}" in record.tables[0]
    assert f"running in {record.runs / 'epochs=1'}" not in record.first.log
    assert record.first.fields["JobState"] == "CANCELLED"
    assert record.first.fields["ExitCode"] != "0:0"
    ((name, step),) = STOPPED.findall(record.first.log)
    assert name == "SIGTERM"
    assert RESUMED.findall(record.second.log)[0] == step
    assert record.second.fields["JobState"] == "CANCELLED"
    assert record.tables[1].count("Unfinished: ") == 1
    assert f"\nUnfinished: epochs={LONG}\n" in record.tables[1]


def test_a_job_of_a_sweep_whose_time_runs_out_is_requeued_and_goes_on(record):
    name, step = STOPPED.findall(record.second.log)[0]
    assert name in ("SIGUSR1", "SIGUSR2")
    assert RESUMED.findall(record.second.log)[1:] == [step]
    assert record.second.fields["Restarts"] == "1"


def test_the_script_of_the_page_is_requeued_and_goes_on(record):
    name, step = STOPPED.findall(record.script.log)[0]
    assert name in ("SIGUSR1", "SIGUSR2")
    assert RESUMED.findall(record.script.log) == [step]
    assert record.script.fields["Restarts"] == "1"


def test_two_tasks_train_one_network(record):
    environment = json.loads((record.tasks / "environment.json").read_text())
    assert environment["devices"] == ["cpu", "cpu"]
    results = json.loads((record.tasks / "results.json").read_text())
    assert results["history"][0]["epoch"] == 1
