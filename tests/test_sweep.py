"""Sweeps: every cell once, resumed after a kill, one table."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats

from cnnjax import sweep

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "cnnjax.sweep"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def test_a_sweep_survives_being_killed_and_fills_one_table(tmp_path):
    """Six cells: two learning rates and three seeds, of which one rate is far too large."""
    config = tmp_path / "swept.py"
    config.write_text(
        "from configs.lenet_digits import get_config\nfrom cnnjax.train import defaults\n\n"
        "def sweep():\n    return defaults.product({'schedule.learning_rate': (0.1, 1e9), 'seed': range(3)})\n"
    )
    arguments = [
        *COMMAND,
        "--config",
        str(config),
        "--config.epochs=2",
        "--workdir",
        str(tmp_path / "runs"),
    ]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    assert any("cell 2 of 6" in line for line in process.stderr)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = tmp_path / "runs" / "schedule.learning_rate=0.1,seed=0" / "results.json"
    written = first.stat().st_mtime_ns
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        first.stat().st_mtime_ns == written
        and "cell 1 of 6" not in done.stderr
        and "cell 6 of 6" in done.stderr
    )
    good, bad = json.loads((tmp_path / "runs" / "sweep.json").read_text())["rows"]
    errors = [
        json.loads(
            (
                tmp_path / "runs" / f"schedule.learning_rate=0.1,seed={seed}" / "results.json"
            ).read_text()
        )["final"]["test_error"]
        for seed in range(3)
    ]
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(errors), scale=scipy.stats.sem(errors))
    assert (
        good["test_error"]["mean"] == pytest.approx(np.mean(errors))
        and good["test_error"]["n"] == 3
    )
    assert (
        good["test_error"]["half_width"] == pytest.approx((high - low) / 2) and len(set(errors)) > 1
    )
    assert len(bad["failed"]) == 3 and "not finite" in bad["failed"][0] and "test_error" not in bad
    assert "learning_rate=0.1" in (tmp_path / "runs" / "sweep.md").read_text()


def test_workers_share_a_sweep(tmp_path):
    """Two jobs of the local launcher: every cell is run by one of them, once."""
    config = tmp_path / "swept.py"
    config.write_text(
        "from configs.lenet_digits import get_config\n\ndef sweep():\n    return [{'seed': seed} for seed in range(4)]\n"
    )
    arguments = [
        *COMMAND,
        "--config",
        str(config),
        "--config.epochs=2",
        "--launcher=local",
        "--jobs",
        "2",
        "--workdir",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "started job" in done.stderr, done.stderr
    deadline = time.monotonic() + 240
    while len(outputs := list((tmp_path / "runs" / "jobs").glob("*_result.pkl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    logs = [path.read_text() for path in (tmp_path / "runs" / "jobs").glob("*.err")]
    assert len(outputs) == len(logs) == 2
    for seed in range(4):
        assert (
            sum(log.count(f"running in {tmp_path / 'runs' / f'seed={seed}'}") for log in logs) == 1
        )
        assert (tmp_path / "runs" / f"seed={seed}" / "results.json").exists()
    assert (
        json.loads((tmp_path / "runs" / "sweep.json").read_text())["rows"][0]["test_error"]["n"]
        == 4
    )


@pytest.mark.parametrize(
    "body, message",
    [
        ("", "has no sweep(): define one"),
        ("def sweep(): return []", "must list at least one cell"),
        ("def sweep(): return [{'seed': 1}, {'seed': 1}]", "each once"),
        ("def sweep(): return [{'sede': 1}]", "sets {'sede': 1}, which does not fit"),
    ],
)
def test_a_bad_sweep_is_named(tmp_path, body, message):
    config = tmp_path / "swept.py"
    config.write_text(f"from configs.lenet_digits import get_config\n\n{body}\n")
    done = subprocess.run(
        [*COMMAND, "--config", str(config), "--workdir", str(tmp_path / "runs")],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )


def test_one_value_has_no_spread():
    assert sweep._interval([0.25]) == {"mean": 0.25, "std": None, "n": 1, "half_width": None}
