"""Training in several processes: losses as in one, no waiting for dead ones."""

import itertools
import json
import pathlib
import re
import signal
import socket
import time

import forked
import numpy as np
import PIL.Image
import pytest
import quick

pytestmark = pytest.mark.slow

TRAIN = [
    "cnnjax.main",
    "--config",
    "configs/lenet_digits.py",
    "--config.model=mlp1",
    "--config.checkpoint_every_steps=5",
    "--config.n_validation=100",
]


def start(count: int, folder: pathlib.Path, *arguments: str) -> list[forked.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        forked.Popen(
            *TRAIN,
            "--workdir",
            folder,
            f"--distributed=localhost:{port},{count},{index}",
            *arguments,
            flags=quick.FLAGS,
        )
        for index in range(count)
    ]


def alone(folder: pathlib.Path, *arguments: str) -> dict:
    done = forked.run(*TRAIN, "--workdir", folder, *arguments, flags=quick.FLAGS)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def test_several_processes_train_as_one(tmp_path):
    """Four processes reach the losses of one, and only one of them writes files.

    A convolutional network is trained by two processes in test_train.py.
    """
    count, arguments = 4, ["--config.epochs=2"]
    one = alone(tmp_path / "one", *arguments)
    several = tmp_path / "several"
    processes = start(count, several, *arguments)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, errors
    results = json.loads((several / "results.json").read_text())
    for epoch, of_one in zip(results["history"], one["history"], strict=True):
        for metric in ("train_loss", "validation_loss"):
            np.testing.assert_allclose(epoch[metric], of_one[metric], rtol=1e-4)
    assert json.loads((several / "environment.json").read_text())["devices"] == ["cpu"] * count
    assert (several / "report.md").exists()
    assert not list(several.glob("*.claim"))
    assert not list(several.glob("*.partial"))


def test_two_processes_share_each_batch_of_a_folder(tmp_path):
    """Both read ahead and take the same number of steps before they wait for each other."""
    generator = np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "val"), "ab", range(20)):
        path = tmp_path / split / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(generator.integers(0, 256, (12, 12, 3), np.uint8)).save(path)
    arguments = [
        "--config.dataset=folder",
        f"--config.data_dir={tmp_path}",
        "--config.n_validation=0",
        "--config.image_size=8",
        "--config.resize=10",
        "--config.workers=0",
        "--config.batch_size=2",
        "--config.epochs=2",
        "--config.checkpoint_every_steps=13",
    ]
    one = alone(tmp_path / "one", *arguments)
    processes = start(2, tmp_path / "two", *arguments)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    for epoch, of_one in zip(results["history"], one["history"], strict=True):
        assert epoch["step"] == of_one["step"]
        np.testing.assert_allclose(epoch["train_loss"], of_one["train_loss"], rtol=1e-4)


def test_one_that_is_killed_stops_the_others_and_the_run_goes_on_with_fewer(tmp_path):
    first, second = start(2, tmp_path, "--config.epochs=3000")
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("checkpoints/*/manifest.json")):
        assert time.monotonic() < deadline and first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 1 and "Traceback" not in error
    assert re.search(
        r"error: process 0 of 2 cannot continue, most likely because another has died \(.*\); "
        r"start all of them again",
        error.splitlines()[-1],
    ), error
    # One process goes on from the checkpoint of two.
    again = forked.Popen(*TRAIN, "--workdir", tmp_path, "--config.epochs=3000", flags=quick.FLAGS)
    assert any("resuming from step" in line for line in again.stderr)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    assert again.returncode == 75


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path):
    processes = start(2, tmp_path, "--config.epochs=3000")
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("checkpoints/*/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], errors
    steps = {
        re.search(r"stopped by SIGTERM after step (\d+) of", error).group(1) for error in errors
    }
    assert len(steps) == 1 and (tmp_path / "checkpoints" / steps.pop() / "manifest.json").exists()


@pytest.mark.parametrize("given", ["here", "localhost:1234,2,2", "localhost:1234,2"])
def test_a_wrong_address_is_one_line(given, tmp_path):
    done = forked.run(*TRAIN, "--workdir", tmp_path, f"--distributed={given}")
    assert done.returncode == 2 and done.stderr == (
        f"error: distributed={given!r} is neither 'auto' nor HOST:PORT,PROCESSES,INDEX with an "
        "INDEX below PROCESSES\n"
    )


def test_no_cluster_is_one_line(tmp_path):
    done = forked.run(*TRAIN, "--workdir", tmp_path, "--distributed=auto")
    assert done.returncode == 2 and done.stderr == (
        "error: distributed='auto' found no cluster (Slurm, Cloud TPU, GKE, Open MPI); give "
        "HOST:PORT,PROCESSES,INDEX\n"
    )
