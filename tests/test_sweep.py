"""Sweeps: every run once, resumed after a kill, one table."""

import dataclasses
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types

import forked
import numpy as np
import pytest
import quick
import scipy.stats

from cnnjax import sweep
from cnnjax.data import arrays
from cnnjax.runtime import configuration, files, jobs, workdir
from cnnjax.train import adopt, defaults, loop
from cnnjax.train.run import read_config

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = quick.environment()


def write_config(folder: pathlib.Path, body: str) -> str:
    """Write a configuration file with a `sweep()` and return its path."""
    path = folder / "swept.py"
    imports = "from configs.lenet_digits import get_config\nfrom cnnjax.train import defaults\n\n"
    path.write_text(imports + body + "\n")
    return str(path)


def read_rows(folder: pathlib.Path) -> list[dict]:
    return json.loads((folder / "sweep.json").read_text())["rows"]


def test_a_sweep_survives_being_killed_and_fills_one_table(tmp_path):
    """Six runs: two learning rates, of which one is far too large, and three seeds."""
    axes = "{'schedule.learning_rate': (0.1, 1e9), 'seed': range(3)}"
    config = write_config(tmp_path, f"def sweep():\n    return defaults.product({axes})")
    runs = tmp_path / "runs"
    arguments = [
        "cnnjax.sweep",
        "--config",
        config,
        "--config.model=mlp3",
        "--config.epochs=2",
        "--workdir",
        str(runs),
    ]
    process = forked.Popen(*arguments, flags=quick.FLAGS)
    assert any("run 2 of 6" in line for line in process.stderr)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = runs / "schedule.learning_rate=0.1,seed=0" / "results.json"
    written = first.stat().st_mtime_ns

    done = forked.run(*arguments, flags=quick.FLAGS)
    assert done.returncode == 1
    assert "error: 3 of 6 runs failed: see " in done.stderr.splitlines()[-1]
    assert first.stat().st_mtime_ns == written
    assert "run 1 of 6" not in done.stderr
    assert "run 6 of 6" in done.stderr

    good, bad = read_rows(runs)
    errors = []
    for seed in range(3):
        results = runs / f"schedule.learning_rate=0.1,seed={seed}" / "results.json"
        errors.append(json.loads(results.read_text())["final"]["test_error"])
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(errors), scale=scipy.stats.sem(errors))
    assert good["test_error"]["mean"] == pytest.approx(np.mean(errors))
    assert good["test_error"]["n"] == 3
    assert good["test_error"]["half_width"] == pytest.approx((high - low) / 2)
    assert len(set(errors)) > 1
    assert len(bad["failed"]) == 3
    assert "not finite" in bad["failed"][0]
    assert "test_error" not in bad
    table = (runs / "sweep.md").read_text()
    assert "learning_rate=0.1" in table
    failed = "\nFailed, schedule.learning_rate=1000000000.0,seed=2: the loss is not finite at step"
    assert failed in table


def test_workers_share_a_sweep(tmp_path):
    """Two jobs of the local launcher: every run is done by one of them, once."""
    # The jobs are processes of their own, which read the configuration.
    config = write_config(
        tmp_path,
        "import quick\n"
        "quick.without_figures()\n"
        "def sweep():\n    return [{'seed': seed} for seed in range(3)]",
    )
    runs = tmp_path / "runs"
    done = forked.run(
        *("cnnjax.sweep", "--config", config, "--workdir", runs),
        *("--config.model=mlp1", "--config.epochs=1", "--launcher=local", "--jobs", 2),
        flags=quick.FLAGS,
    )
    assert done.returncode == 0 and "started job" in done.stderr, done.stderr
    # The jobs, which are starting, do not see this edit.
    edited = pathlib.Path(config).read_text().replace("'seed'", "'epochs'")
    files.write(pathlib.Path(config), edited)
    deadline = time.monotonic() + 240
    while len(outputs := list((runs / "jobs").glob("*_result.pkl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    logs = [path.read_text() for path in (runs / "jobs").glob("*.err")]
    assert len(outputs) == len(logs) == 2
    for seed in range(3):
        told = f"running in {runs / f'seed={seed}'}"
        assert sum(log.count(told) for log in logs) == 1
        assert (runs / f"seed={seed}" / "results.json").exists()
    (row,) = read_rows(runs)
    assert row["test_error"]["n"] == 3


# ------------------------------------------------------------------ runs without training


@pytest.fixture
def run_sweep(tmp_path, monkeypatch):
    """Runs a sweep of four seeds that only write results; returns its exit code.

    `train` is called with the configuration and the folder first; `changes` are options.
    """
    config = write_config(
        tmp_path, "def sweep():\n    return [{'seed': seed} for seed in range(4)]"
    )
    monkeypatch.setattr(sweep, "_POLLING_SECONDS", 0.05)

    def run(train=lambda config, folder: None, *changes: str) -> int:
        def write_results(config, folder):
            train(config, folder)
            files.write_json(folder / "results.json", {"final": {"test_error": 0.25}})
            files.write(folder / "report.md", "")

        monkeypatch.setattr(loop, "run", write_results)
        return sweep.main(["--config", config, "--workdir", str(tmp_path / "runs"), *changes])

    return run


@pytest.mark.parametrize(
    "error", [MemoryError("batch_size=128 does not fit"), FloatingPointError("not finite")]
)
def test_a_run_that_fails_is_counted_and_the_sweep_goes_on(error, run_sweep, tmp_path, capfd):
    def train(config, folder):
        if config.seed == 1:
            raise error

    assert run_sweep(train) == 1
    (row,) = read_rows(tmp_path / "runs")
    assert row["failed"] == [f"seed=1: {error}"]
    assert row["unfinished"] == []
    assert row["test_error"]["n"] == 3
    table = (tmp_path / "runs" / "sweep.md").read_text()
    assert "| setting | test error | failed | unfinished |" in table
    assert "| default | 25.00 ± 0.00 (std 0.00), n=3 | 1 |  |" in table
    assert f"\nFailed, seed=1: {error}\n" in table
    told = capfd.readouterr().err
    assert told.splitlines()[-1].startswith("error: 1 of 4 runs failed")
    # The failure is a result: it is not tried again, and the exit code stays.
    assert run_sweep() == 1


def test_a_run_that_is_refused_is_named_and_the_sweep_goes_on(run_sweep, tmp_path, capfd):
    def refuse(config, folder):
        raise ValueError("batch_size=9999 is more than the 1437 training images")

    assert run_sweep(refuse) == 2
    told = capfd.readouterr().err.splitlines()
    assert told[-1].startswith("error: every run was refused; seed=0: batch_size=9999 is more than")
    assert not (tmp_path / "runs").exists()

    def refuse_one(config, folder):
        if config.seed == 1:
            refuse(config, folder)

    assert run_sweep(refuse_one) == 1
    (row,) = read_rows(tmp_path / "runs")
    assert row["failed"] == ["seed=1: batch_size=9999 is more than the 1437 training images"]
    assert row["test_error"]["n"] == 3 and row["unfinished"] == []
    told = capfd.readouterr().err
    assert "run seed=1 is left out: batch_size=9999" in told
    assert told.splitlines()[-1].startswith("error: 1 of 4 runs failed")
    # The next call, perhaps with other data, tries it again.
    assert run_sweep() == 0


def test_a_sweep_with_a_started_run_of_another_configuration_is_refused(
    run_sweep, tmp_path, monkeypatch, capfd
):
    """No run starts, or the folder would hold runs of both configurations."""
    ran = []

    def stop(config, folder):
        (folder / "metrics.jsonl").touch()
        raise workdir.Interrupted("stopped by SIGTERM")

    def train(config, folder):
        ran.append(config.seed)

    assert run_sweep(stop) == 75
    assert run_sweep(train, "--config.momentum=0.5") == 2
    message = "another configuration (momentum=0.9 there, 0.5 now); choose another --workdir"
    assert message in capfd.readouterr().err.splitlines()[-1]
    # Another process may begin a run after the runs were checked.
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "check", lambda runs, overrides: None)
        assert run_sweep(train, "--config.momentum=0.5") == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert ran == []
    assert run_sweep(train) == 0
    assert ran == [0, 1, 2, 3]


def test_runs_that_another_configuration_finishes_meanwhile_end_the_sweep(
    run_sweep, tmp_path, capfd
):
    """A second sweep was started at the same time, and no table mixes the results of both."""
    other = tmp_path / "runs" / "seed=1"

    def train(config, folder):
        if config.seed == 0:
            workdir.prepare(other, config.to_dict() | {"seed": 1, "momentum": 0.5})
            files.write_json(other / "results.json", {"final": {"test_error": 0.75}})
            files.write(other / "report.md", "")

    assert run_sweep(train) == 2
    message = "another configuration (momentum=0.5 there, 0.9 now); choose another --workdir"
    assert message in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs" / "sweep.json").exists()


def test_a_started_run_goes_on_with_skip_damaged(run_sweep, tmp_path):
    """Like `workers`, it changes no result so far."""

    def find_damage(config, folder):
        (folder / "metrics.jsonl").touch()
        raise ValueError("image 3 is damaged")

    assert run_sweep(find_damage) == 2
    assert run_sweep(lambda config, folder: None, "--config.skip_damaged=True") == 0
    record = json.loads((tmp_path / "runs" / "seed=3" / "config.json").read_text())
    assert record["skip_damaged"]


def test_a_sweep_with_finished_runs_goes_on_with_skip_damaged(run_sweep, tmp_path):
    """No image of a finished run was damaged, or the error would have ended it."""

    def find_damage(config, folder):
        if config.seed > 0:
            (folder / "metrics.jsonl").touch()
            raise ValueError("image 3 is damaged")

    assert run_sweep(find_damage) == 1
    assert run_sweep(lambda config, folder: None, "--config.skip_damaged=True") == 0
    (row,) = read_rows(tmp_path / "runs")
    assert row["test_error"]["n"] == 4 and row["failed"] == []
    # Images may have been passed over since.
    assert run_sweep() == 2


def test_a_table_that_is_refused_does_not_hide_that_the_sweep_was_stopped(run_sweep, monkeypatch):
    def refuse(*given):
        raise ValueError("other images")

    def stop(config, folder):
        raise workdir.Interrupted("stopped by SIGTERM")

    monkeypatch.setattr(sweep, "write_table", refuse)
    assert run_sweep(stop) == 75


def test_a_sweep_goes_on_with_other_workers(run_sweep, tmp_path):
    """So do finished and started runs: the number changes no result."""

    def stop(config, folder):
        if config.seed == 1:
            (folder / "metrics.jsonl").touch()
            raise workdir.Interrupted("stopped by SIGTERM")

    assert run_sweep(stop) == 75
    assert run_sweep(lambda config, folder: None, "--config.workers=0") == 0
    for seed, workers in ((0, 2), (1, 0)):
        record = (tmp_path / "runs" / f"seed={seed}" / "config.json").read_text()
        assert json.loads(record)["workers"] == workers


def test_a_sweep_goes_on_with_its_images_in_another_folder(run_sweep, tmp_path, monkeypatch, capfd):
    """So do finished and started runs; other images are refused, and nothing is changed."""
    checked = []
    run = types.SimpleNamespace(check_data=checked.append)
    monkeypatch.setattr(adopt, "build_run", lambda config: run)
    monkeypatch.setattr(adopt, "_read_origin", lambda folder, config, key: {"digest": "0a1b"})

    def stop(config, folder):
        if config.seed == 1:
            (folder / "metrics.jsonl").touch()
            raise workdir.Interrupted("stopped by SIGTERM")

    assert run_sweep(stop) == 75
    assert run_sweep(lambda config, folder: None, "--config.data_dir=/elsewhere") == 0
    # Those of the two runs that had begun.
    assert checked == 2 * [{"digest": "0a1b"}]
    (row,) = read_rows(tmp_path / "runs")
    assert row["test_error"]["n"] == 4
    records = [tmp_path / "runs" / f"seed={seed}" / "config.json" for seed in range(4)]
    for record in records:
        assert json.loads(record.read_text())["data_dir"] == "/elsewhere"

    def refuse(images):
        raise ValueError("the images have changed")

    run.check_data = refuse
    before = [record.read_bytes() for record in records]
    capfd.readouterr()
    assert run_sweep(lambda config, folder: None, "--config.data_dir=/third") == 2
    assert capfd.readouterr().err.endswith("error: the images have changed\n")
    assert [record.read_bytes() for record in records] == before


@pytest.mark.parametrize("part, use", [("train", "trained"), ("test", "tested")])
@pytest.mark.usefixtures("standard_promotion", "without_figures")
def test_runs_on_different_images_are_not_averaged(part, use, tmp_path, capfd):
    """Some images are overwritten after the first run, and a second one reads others."""
    digits = arrays.load("digits[:200]")
    images, labels = getattr(digits, part)
    turned = dataclasses.replace(digits, **{part: arrays.Split(images[:, ::-1], labels)})
    file = tmp_path / "own.npz"
    options = {"dataset": file, "model": "mlp1", "epochs": 1, "batch_size": 100, "parallel": "jit"}

    def run(count: int) -> int:
        folder = tmp_path / str(count)
        folder.mkdir(exist_ok=True)
        body = f"def sweep():\n    return [{{'seed': seed}} for seed in range({count})]"
        given = ["--config", write_config(folder, body), "--workdir", str(tmp_path / "runs")]
        return sweep.main([*given, *(f"--config.{key}={value}" for key, value in options.items())])

    arrays.save(digits, file)
    assert run(1) == 0
    arrays.save(turned, file)
    message = f"error: seed=0 and seed=1 were {use} with different contents of dataset="
    # The second time, before any run is started.
    for is_started in (True, False):
        capfd.readouterr()
        assert run(2) == 2
        told = capfd.readouterr().err
        assert told.splitlines()[-1].startswith(message)
        assert ("running in" in told) == is_started
    (row,) = read_rows(tmp_path / "runs")
    assert row["test_error"]["n"] == 1


def finished_runs(folder: pathlib.Path, *results: dict) -> list[sweep.Run]:
    """Writes results of seeds 0, 1, ..."""
    runs = []
    for seed, content in enumerate(results):
        run = sweep.Run({"seed": seed}, defaults.get_config(), folder / f"seed={seed}")
        run.folder.mkdir()
        files.write_json(run.results, content)
        runs.append(run)
    return runs


def test_other_initial_weights_are_refused_and_other_networks_warned_of(tmp_path, caplog):
    """Results of earlier versions, here those of seed 1, do not have what is compared."""
    caplog.set_level("WARNING", "cnnjax")
    one = {"network_sha256": "n1", "initial_weights_sha256": "w1"}
    runs = finished_runs(
        tmp_path, one, {}, one | {"network_sha256": "n2"}, one | {"initial_weights_sha256": "w2"}
    )
    for _ in range(2):
        sweep.check_files(runs[:3])
    (message,) = caplog.messages
    assert message.startswith("seed=0 and seed=2 were trained with different contents of model=")
    with pytest.raises(ValueError, match="^seed=0 and seed=3 .* contents of initial_weights="):
        sweep.check_files(runs)
    # Runs may start from different weights on purpose.
    runs[3].config.initial_weights = "other.safetensors"
    sweep.check_files(runs)


def test_errors_on_different_test_images_are_not_averaged(tmp_path):
    """Results of earlier versions, here those of seed 1, have the number of test images only."""
    one = {"n_test": 360, "test_digest": "t1"}
    others = [one | {"test_digest": "t2"}, {"n_test": 359}]
    runs = finished_runs(tmp_path, one, {"n_test": 360}, *others)
    sweep.check_files(runs[:2])
    for run in runs[2:]:
        message = f"^seed=0 and {run.name} were tested with different contents of dataset='digits',"
        with pytest.raises(ValueError, match=message):
            sweep.check_files([*runs[:2], run])
    # Runs may be tested on different images on purpose.
    runs[2].config.dataset = "mnist"
    runs[3].config.data_dir = "elsewhere"
    sweep.check_files(runs)


def test_errors_that_only_some_runs_have_are_not_averaged(tmp_path):
    runs = finished_runs(
        tmp_path,
        {"final": {"test_error": 0.25, "validation_error": 0.5}},
        {"final": {"test_error": 0.75}},
    )
    for order in (runs, runs[::-1]):
        (row,) = sweep.summarize_settings(order)
        assert row["test_error"]["mean"] == 0.5 and "validation_error" not in row


def test_a_refused_run_that_another_machine_finishes_has_not_failed(run_sweep, tmp_path):
    def refuse_and_finish(config, folder):
        if config.seed == 1:
            files.write_json(folder / "results.json", {"final": {"test_error": 0.25}})
            files.write(folder / "report.md", "")
            raise ValueError("its data are not here")

    assert run_sweep(refuse_and_finish) == 0
    (row,) = read_rows(tmp_path / "runs")
    assert row["failed"] == []
    assert row["test_error"]["n"] == 4


def test_a_run_with_results_has_not_failed(run_sweep, tmp_path, monkeypatch):
    """A failed run may be started again by itself."""
    assert run_sweep() == 0
    failure = tmp_path / "runs" / "seed=1" / "failure.json"
    failure.write_text('{"error": "not finite"}')
    assert run_sweep() == 0
    assert read_rows(tmp_path / "runs")[0]["failed"] == []
    # When a run is finished, the failure of an earlier call is no longer there.
    (failure.parent / "report.md").unlink()
    monkeypatch.setattr(sweep.single, "run", lambda config, folder: None)
    assert run_sweep() == 0
    assert not failure.exists()


def test_a_failed_run_that_was_run_again_by_itself_and_stopped_goes_on(run_sweep, tmp_path):
    def diverge(config, folder):
        if config.seed == 1:
            raise FloatingPointError("the loss is not finite")

    def stop(config, folder):
        (folder / "metrics.jsonl").touch()
        raise workdir.Interrupted

    assert run_sweep(diverge) == 1
    folder = tmp_path / "runs" / "seed=1"
    with pytest.raises(workdir.Interrupted):
        workdir.run_once(stop, read_config(folder), folder)
    assert run_sweep() == 0
    assert read_rows(tmp_path / "runs")[0]["test_error"]["n"] == 4


def test_a_run_that_was_stopped_before_its_report_is_taken_up(run_sweep, tmp_path, monkeypatch):
    assert run_sweep() == 0
    report = tmp_path / "runs" / "seed=2" / "report.md"
    report.unlink()
    taken_up = []
    monkeypatch.setattr(sweep, "start_run", lambda run: taken_up.append(run.name))
    assert run_sweep() == 0
    assert taken_up == ["seed=2"]


def test_a_run_that_another_job_leaves_is_taken_up(run_sweep, tmp_path, capfd):
    """A job on another machine holds a run, and is cancelled while this one waits for it."""
    left = tmp_path / "runs" / "seed=2"
    left.mkdir(parents=True)
    claim = left / "run.claim"
    claim.write_text(json.dumps({"host": "elsewhere", "process": 1}))
    ran = []

    def cancel():
        # Two minutes go by without a sign of life.
        deadline = time.monotonic() + 60
        while len(ran) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        (row,) = read_rows(tmp_path / "runs")
        unfinished.extend(row["unfinished"])
        os.utime(claim, (time.time() - 130,) * 2)

    unfinished: list[str] = []
    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    assert run_sweep(lambda config, folder: ran.append(config.seed)) == 0
    thread.join()
    assert ran == [0, 1, 3, 2]
    told = capfd.readouterr().err
    assert "run seed=2 is left for later: workdir=" in told
    assert "waiting for 1 run of other processes" in told
    assert "seed=2" in unfinished
    (row,) = read_rows(tmp_path / "runs")
    assert row["test_error"]["n"] == 4
    assert row["unfinished"] == []


@pytest.mark.usefixtures("handlers")
def test_a_sweep_that_is_stopped_while_it_waits_says_what_is_unfinished(
    run_sweep, tmp_path, monkeypatch
):
    left = tmp_path / "runs" / "seed=2"
    left.mkdir(parents=True)
    (left / "run.claim").write_text(json.dumps({"host": platform.node(), "process": os.getpid()}))
    ran = []
    # Elsewhere it would stop in the middle of whatever runs, such as opening a file.
    stop = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(sweep, "time", types.SimpleNamespace(sleep=stop))
    assert run_sweep(lambda config, folder: ran.append(config.seed)) == 75
    assert ran == [0, 1, 3]
    assert "\nUnfinished: seed=2\n" in (tmp_path / "runs" / "sweep.md").read_text()


def test_a_sweep_that_is_stopped_in_its_first_run_says_what_is_unfinished(run_sweep, tmp_path):
    def stop(config, folder):
        raise workdir.Interrupted("stopped by SIGTERM")

    assert run_sweep(stop) == 75
    (row,) = read_rows(tmp_path / "runs")
    assert row["unfinished"] == [f"seed={seed}" for seed in range(4)]


def test_a_sweep_that_is_stopped_before_its_first_run_has_no_table(
    run_sweep, tmp_path, monkeypatch, capfd
):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "finish_runs", stop)
    assert run_sweep() == 75
    told = capfd.readouterr().err.splitlines()
    assert told[-1] == "stopped; run the same command again to continue the sweep"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "body, message",
    [
        ("", "has no sweep(): define one"),
        ("def sweep(): return []", "lists no run; expected at least one"),
        (
            "def sweep(): return [{'seed': 0}, {'seed': 1}, {'seed': 1}]",
            "lists seed=1 more than once; expected each run once",
        ),
        ("def sweep(): return [{'sede': 1}]", "sets {'sede': 1}, which does not fit"),
        ("def sweep(): return [{'sede': 1}]", "sede is not a key of the configuration; did you"),
        ("def sweep(): return [{'seed': 'x'}]", "seed='x' is not of the type int"),
        ("def sweep(): return [{'seed': -1}]", "seed=-1 is not a number of at least 0"),
        ("def sweep(): return [{'seed': one}]", "line 4: NameError: name 'one' is not defined"),
    ],
)
def test_a_bad_sweep_is_named(tmp_path, body, message, capfd):
    config = write_config(tmp_path, body)
    assert sweep.main(["--config", config, "--workdir", str(tmp_path / "runs")]) == 2
    told = capfd.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "runs").exists()


def test_a_key_that_one_schedule_of_a_sweep_reads_is_no_mistake(tmp_path):
    runs = []
    for name in ("step", "cosine"):
        config = defaults.get_config()
        config.dataset = "digits"
        config.schedule.update({"name": name, "every": 5, "min_lr": 0.1})
        runs.append(sweep.Run({"schedule.name": name}, config, tmp_path / name))
    sweep.check(runs, ["schedule.name", "schedule.every"])
    with pytest.raises(ValueError, match="^schedule.min_lr=0.1: schedule.name='step' reads none"):
        sweep.check(runs, ["schedule.min_lr"])
    # Earlier versions began sweeps with such keys.
    workdir.prepare(runs[0].folder, runs[0].config.to_dict())
    (runs[0].folder / "metrics.jsonl").touch()
    sweep.check(runs, ["schedule.min_lr"])


def test_jobs_read_the_runs_as_they_were_submitted(tmp_path):
    """Names of runs, and so their folders, tell tuples from lists."""
    fields = {"model_fields.tuple": (1, (2, 3)), "model_fields.list": [1, 2]}
    overrides = fields | {"seed": np.int64(1), "schedule.learning_rate": 0.25}
    config = configuration.override(defaults.get_config(), overrides)
    run = sweep.Run(overrides, config, tmp_path / sweep.name_of(overrides))
    (read,) = sweep.read_written_runs(sweep.write_runs([run], tmp_path / "jobs"), tmp_path)
    assert read.config.to_dict() == run.config.to_dict()
    assert read.config.model_fields.tuple == (1, (2, 3))
    assert (read.name, read.folder) == (run.name, run.folder)
    assert "tuple=(1,(2,3)),model_fields.list=[1,2],seed=1," in read.name

    files.write_json(tmp_path / "sweep.json", {"kind": "sweep", "rows": []})
    with pytest.raises(ValueError, match="is not a file that a launcher of sweeps wrote"):
        sweep.read_written_runs(tmp_path / "sweep.json", tmp_path)


@pytest.mark.parametrize("options", [["--debug", "--jobs=2"], []])
def test_a_launcher_submits_this_command_and_needs_no_device(options, tmp_path, monkeypatch):
    config = write_config(tmp_path, "def sweep():\n    return [{'seed': 0}]")
    submitted = []
    monkeypatch.setattr(jobs, "build_executor", lambda folder, **settings: settings)
    monkeypatch.setattr(jobs, "submit", lambda *job: submitted.append(job) or ["7"])
    # A login node may have none.
    monkeypatch.setattr(sweep.backend, "reach_devices", lambda: pytest.fail("devices are reached"))
    arguments = ["--config", config, "--workdir", str(tmp_path / "runs"), "--config.epochs=1"]
    arguments += ["--launcher=slurm", "--slurm=mem_gb=8", *options]
    assert sweep.main(arguments) == 0
    ((executor, words, count),) = submitted
    assert executor == {"cluster": "slurm", "settings": ["mem_gb=8"]}
    assert count == (2 if options else 1)
    assert ("--debug" in words) == bool(options)
    (run,) = sweep.read_written_runs(
        pathlib.Path(words[words.index("--runs") + 1]), tmp_path / "runs"
    )
    assert (run.name, run.config.epochs) == ("seed=0", 1)
    assert not any(word.startswith("--config.") for word in words)


def test_one_value_has_no_spread():
    assert sweep.summarize([0.25]) == {"mean": 0.25, "std": None, "n": 1, "half_width": None}


# ------------------------------------------------------------------ jobs

# Ends as a run does that is stopped or whose time is over; the second time it is finished.
STOPPED_ONCE = """
import os, pathlib, signal, sys, time
record = pathlib.Path("saved")
def save(number, frame):
    record.write_text(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, save)
if not record.exists():
    pathlib.Path("process").write_text(str(os.getpid()))
    pathlib.Path("started").touch()
    time.sleep(60)
pathlib.Path("finished").touch()
"""


def wait_for(path: pathlib.Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_is_requeued_when_its_time_is_over(tmp_path):
    """submitit's signal reaches the command, which saves; the job that follows goes on."""
    submitted = textwrap.dedent(
        f"""
        import submitit, sys
        from cnnjax.runtime import jobs
        executor = submitit.LocalExecutor({str(tmp_path / "jobs")!r})
        executor.update_parameters(timeout_min=6 / 60, signal_delay_s=3)
        words = [sys.executable, "-c", {STOPPED_ONCE!r}]
        print(executor.submit(jobs.CommandJob(words, {str(tmp_path)!r})).result())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", submitted],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\n"
    assert (tmp_path / "saved").read_text() == "SIGUSR2"
    assert (tmp_path / "finished").exists()


def test_a_checkpoint_waits_until_the_command_has_saved(tmp_path):
    job = jobs.CommandJob([sys.executable, "-c", STOPPED_ONCE], str(tmp_path))
    job.process = subprocess.Popen(job.words, cwd=tmp_path)
    wait_for(tmp_path / "started")
    submission = job.checkpoint()
    assert (tmp_path / "saved").read_text() == "SIGUSR2"
    assert job.process.wait() == 75
    assert submission.function.words == job.words
    # The submission that goes on from there.
    assert submission.function() == 0
    assert (tmp_path / "finished").exists()


def test_a_local_job_is_stopped_by_its_number(tmp_path, monkeypatch):
    """`kill NUMBER`, which reaches submitit's process, also reaches the command, which saves."""
    # Imported here, since every worker of the tests collects this module.
    import submitit

    # The job is a process of its own, which imports cnnjax from the current folder.
    monkeypatch.chdir(ROOT)
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=5)
    words = [sys.executable, "-c", STOPPED_ONCE]
    job = executor.submit(jobs.CommandJob(words, str(tmp_path)))
    wait_for(tmp_path / "started")
    os.kill(int(job.job_id), signal.SIGTERM)
    wait_for(tmp_path / "saved")
    # This waits for the job to end.
    assert "ended with exit code 75" in str(job.exception())
    assert (tmp_path / "saved").read_text() == "SIGTERM"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "process").read_text()), 0)


def test_a_command_ends_with_its_job(tmp_path):
    """A job that Ctrl-C ends leaves no command behind."""
    job = jobs.CommandJob([sys.executable, "-c", STOPPED_ONCE], str(tmp_path))
    main_thread = threading.main_thread().ident

    def interrupt():
        wait_for(tmp_path / "started")
        signal.pthread_kill(main_thread, signal.SIGINT)

    on_sigterm = signal.getsignal(signal.SIGTERM)
    # A shell lets commands in the background ignore Ctrl-C.
    on_sigint = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            job()
    finally:
        signal.signal(signal.SIGINT, on_sigint)
        thread.join()
    # After Ctrl-C in a terminal, which reaches the command as well, SIGTERM would not let it save.
    assert (tmp_path / "saved").read_text() == "SIGUSR2"
    assert job.process.poll() == 75
    assert signal.getsignal(signal.SIGTERM) == on_sigterm


def test_a_job_whose_command_fails_has_failed(tmp_path):
    job = jobs.CommandJob([sys.executable, "-c", "raise SystemExit(3)"], str(tmp_path))
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        job()


def test_local_jobs_have_no_time_limit(tmp_path, monkeypatch):
    """submitit would start a job six times at most."""
    # Imported here, since every worker of the tests collects this module.
    import submitit

    limits = []

    def submit(executor, job):
        limits.append(executor.parameters["timeout_min"])
        return types.SimpleNamespace(job_id="1")

    monkeypatch.setattr(submitit.AutoExecutor, "submit", submit)
    for settings in ([], ["timeout_min=60"]):
        executor = jobs.build_executor(tmp_path, cluster="local", settings=settings)
        jobs.submit(executor, ["true"], 1)
    minutes_of_a_year = 365 * 24 * 60
    assert limits[0] > 10 * minutes_of_a_year
    assert limits[1] == 60


def test_tasks_of_slurm_jobs_get_the_cpus_that_are_asked_for(tmp_path, monkeypatch):
    """srun does not inherit them from the batch script."""
    import submitit

    given = []

    def submit(executor, job):
        given.append(executor.parameters.get("srun_args"))
        return types.SimpleNamespace(job_id="1")

    monkeypatch.setattr(submitit.AutoExecutor, "submit", submit)
    # Slurm need not be installed.
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", lambda executor: 1)
    own = "slurm_srun_args=['--cpu-bind=cores']"
    for settings in ([], ["cpus_per_task=8"], ["slurm_cpus_per_task=4"], ["cpus_per_task=8", own]):
        executor = jobs.build_executor(tmp_path, cluster="slurm", settings=settings)
        jobs.submit(executor, ["true"], 1)
    assert given == [None, ["--cpus-per-task=8"], ["--cpus-per-task=4"], ["--cpu-bind=cores"]]


@pytest.mark.parametrize("devices", ["3", None])
def test_local_jobs_see_the_gpus_of_the_command(devices, tmp_path, monkeypatch):
    import submitit

    submitted = []

    def submit(executor, job):
        submitted.append(job)
        return types.SimpleNamespace(job_id="1")

    monkeypatch.setattr(submitit.AutoExecutor, "submit", submit)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    program = f"import os; assert os.environ.get('CUDA_VISIBLE_DEVICES') == {devices!r}"
    words = [sys.executable, "-c", program]
    for settings in ([], ["gpus_per_node=1"], ["local_gpus_per_node=1"]):
        executor = jobs.build_executor(tmp_path, cluster="local", settings=settings)
        jobs.submit(executor, words, 1)
    own, *asking = submitted
    # submitit sets this in a job that asks for no GPUs.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert own() == 0
    # submitit chooses the GPUs of a job that asks for some.
    assert all(job.words == words for job in asking)


def test_a_parameter_that_submitit_does_not_have_is_named(tmp_path):
    with pytest.raises(ValueError, match="slurm=.'slurm_partitoin=gpu'.: .*slurm_partitoin"):
        jobs.build_executor(tmp_path, cluster="local", settings=["slurm_partitoin=gpu"])


@pytest.mark.parametrize(
    "setting, message",
    [
        ("timeout_min", "slurm='timeout_min' is not KEY=VALUE, such as timeout_min=60"),
        ("timeout_min=2h", 'Parameter "timeout_min" expected type .*2h'),
        ("timeout_min=1:30:00", 'Parameter "timeout_min" expected type .*1:30:00'),
    ],
)
def test_a_value_that_submitit_does_not_take_is_named(setting, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jobs.build_executor(tmp_path, cluster="local", settings=[setting])


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_what_submitit_raises_of_a_value_is_one_line(error, tmp_path, monkeypatch):
    # Imported here, since every worker of the tests collects this module.
    import submitit

    def refuse(executor, **parameters):
        raise error("mem_gb\nis odd")

    monkeypatch.setattr(submitit.AutoExecutor, "update_parameters", refuse)
    with pytest.raises(ValueError, match=r"^slurm=\['mem_gb=x'\]: mem_gb is odd$"):
        jobs.build_executor(tmp_path, cluster="local", settings=["mem_gb=x"])


@pytest.mark.parametrize(
    "setting, value",
    [
        ("timeout_min=60", 60),
        ("mem_gb=1.5", 1.5),
        ("stderr_to_stdout=True", True),
        ("slurm_partition=gpu", "gpu"),
        ("slurm_time=1-12:00:00", "1-12:00:00"),
        ("slurm_comment=a=b", "a=b"),
        ("slurm_comment={['a']}", "{['a']}"),
    ],
)
def test_settings_are_literals_or_text(setting, value):
    assert jobs._parse_setting(setting) == (setting.partition("=")[0], value)
