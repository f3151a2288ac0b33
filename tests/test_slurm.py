"""Slurm for real: jobs of a cluster of one node, which is started for these tests.

Where the cluster's programs are absent the tests are skipped (Debian: slurm-wlm and munge).
"""

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
RESUMED = re.compile(r"going on from step (\d+) of")


class Cluster:
    """Commands on a cluster, in the checkout."""

    def __init__(self, environment: dict[str, str]):
        self.environment = quick.environment(environment)

    def run(self, *words: str) -> str:
        done = subprocess.run(
            words, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def describe(self, job: str) -> dict[str, str]:
        """The fields of a job, by name: JobState, ExitCode, Restarts, ..."""
        text = self.run("scontrol", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def give_time(self, job: str, minutes: int) -> bool:
        """Set a job's time limit. Slurm refuses to between a job's end and its return to the queue,
        when the job counts as finished."""
        words = ("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
        return subprocess.run(words, env=self.environment, capture_output=True).returncode == 0

    def let_time_run_out(self, job: str, read_log: Callable[[], str]) -> str:
        """Bring a job's end so near that Slurm announces it; return the step that is saved.

        Slurm looks at the time every half a minute. The job has all its time again when it is
        started anew.
        """
        before = len(STOPPED.findall(read_log()))
        hours, minutes, _ = self.describe(job)["RunTime"].split(":")
        assert self.give_time(job, 60 * int(hours) + int(minutes) + 1)
        wait_until(lambda: len(STOPPED.findall(read_log())) > before)
        wait_until(lambda: self.give_time(job, 20))
        name, step = STOPPED.findall(read_log())[-1]
        assert name in ("SIGUSR1", "SIGUSR2")
        return step

    def cancel(self, job: str) -> dict[str, str]:
        """Cancel a job and return its fields once it has ended."""
        self.run("scancel", job)
        wait_until(lambda: not self.run("squeue", "--noheader", "--jobs", job))
        return self.describe(job)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as environment:
        yield Cluster(environment)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_checkpoint(folder: pathlib.Path) -> bool:
    return any(folder.glob("checkpoints/*/manifest.json"))


def test_jobs_of_a_sweep_are_canceled_and_run_out_of_time(cluster, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    runs = tmp_path / "runs"
    long = runs / f"epochs={LONG}"
    table = runs / "sweep.md"
    told = cluster.run(
        *(sys.executable, "-m", "cnnjax.sweep", "--config", str(config), "--workdir", str(runs)),
        *("--launcher=slurm", "--jobs=2"),
        *("--slurm=timeout_min=20", "--slurm=slurm_signal_delay_s=60"),
    )
    jobs = re.findall(r"job (\d+)", told)
    assert len(jobs) == 2
    # From the beginning the table says what is unfinished.
    assert f"Unfinished: epochs={LONG}" in table.read_text()

    def read_log(job: str) -> str:
        path = runs / "jobs" / f"{job}_0_log.err"
        return path.read_text() if path.exists() else ""

    # One job trains for long. The other ends the short run, and waits.
    wait_until(lambda: has_checkpoint(long) and (runs / "epochs=1" / "results.json").exists())
    first, second = jobs
    if f"running in {long}" not in read_log(first):
        first, second = second, first
    wait_until(lambda: "waiting for 1 cells of other processes" in read_log(second))
    assert f"running in {runs / 'epochs=1'}" not in read_log(first)

    # A canceled job saves. The one that waited takes the run up where it was saved.
    ended = cluster.cancel(first)
    assert ended["JobState"] == "CANCELLED"
    assert ended["ExitCode"] != "0:0"
    ((name, step),) = STOPPED.findall(read_log(first))
    assert name == "SIGTERM"
    wait_until(lambda: RESUMED.search(read_log(second)))
    assert RESUMED.findall(read_log(second)) == [step]

    # A job whose time runs out saves, is put back into the queue, and goes on.
    step = cluster.let_time_run_out(second, lambda: read_log(second))
    wait_until(lambda: len(RESUMED.findall(read_log(second))) == 2)
    assert RESUMED.findall(read_log(second))[1] == step
    assert cluster.describe(second)["Restarts"] == "1"

    assert cluster.cancel(second)["JobState"] == "CANCELLED"
    assert table.read_text().count("Unfinished: ") == 1
    assert f"\nUnfinished: epochs={LONG}\n" in table.read_text()


def test_two_tasks_train_one_network(cluster, tmp_path):
    cluster.run(
        *("srun", "--ntasks=2", sys.executable, "-m", "cnnjax.main"),
        *("--config", "configs/lenet_digits.py", "--config.epochs=1"),
        *("--workdir", str(tmp_path), "--distributed=auto"),
    )
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["devices"] == ["cpu", "cpu"]
    assert json.loads((tmp_path / "results.json").read_text())["history"][0]["epoch"] == 1


def test_the_script_of_the_page_is_requeued_and_goes_on(cluster, tmp_path):
    """With two tasks, on a configuration that needs no download and a node without GPUs."""
    page = (ROOT / "docs" / "slurm.md").read_text()
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    changes = {
        "--gpus-per-node=1 --time=04:00:00": "--ntasks=2 --time=00:20:00",
        "srun python": f"srun {sys.executable}",
        "configs/resnet50_imagenet.py --config.data_dir=DATA": (
            f"{config} --config.epochs={LONG} --distributed=auto"
        ),
        "SHARED/run": str(tmp_path / "run"),
    }
    for old, new in changes.items():
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "script.sh").write_text(script)
    log = tmp_path / "log"
    log.touch()
    job = cluster.run(
        *("sbatch", "--parsable", "--open-mode=append", f"--output={log}"),
        str(tmp_path / "script.sh"),
    ).strip()
    wait_until(lambda: has_checkpoint(tmp_path / "run"))
    step = cluster.let_time_run_out(job, log.read_text)
    wait_until(lambda: RESUMED.search(log.read_text()))
    assert RESUMED.findall(log.read_text()) == [step]
    assert cluster.describe(job)["Restarts"] == "1"
    cluster.cancel(job)
