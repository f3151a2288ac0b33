"""Machine faults: a command ends with one clear line and loses nothing.

A run that goes on afterwards ends with the same bits as one without a fault.
"""

import functools
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import PIL.Image
import pytest
import quick

from cnnjax import combine, main
from cnnjax.models import create_model
from cnnjax.runtime import claims, workdir
from cnnjax.train import step
from cnnjax.train.adopt import _EQUIVALENT
from cnnjax.train.checkpoints import Checkpoints, _leaves

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]
ROOT = pathlib.Path(__file__).parents[1]
TRAIN = (
    "--config=configs/lenet_digits.py",
    "--config.model=mlp1",
    "--config.epochs=3",
    "--config.n_validation=100",
    "--config.parallel=jit",
    "--config.checkpoint_every_steps=8",
)
STEPS = 30  # three epochs of 1337 // 128

# The cases of one line run at the same time, each in a process forked from one that has imported
# everything but computed nothing. The code in `beforehand` causes the fault.
DRIVER = """
import json, os, signal, sys, tempfile, traceback
# What a shell runs in the background, or nohup runs, inherits what is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_DFL)
import deep_calls, imported, quick
from cnnjax import combine, main, sweep
from cnnjax.runtime import claims, files, workdir
from cnnjax.train import data, loop, report, results
from cnnjax.train import evaluate, step
quick.without_figures()
commands = {"main": main.main, "sweep": sweep.main, "combine": combine.main,
            "mount": lambda arguments: os.execvp("mount", ["mount", *arguments])}

def begin(command, arguments, beforehand):
    errors = tempfile.TemporaryFile("w+")
    if child := os.fork():
        return child, errors
    os.dup2(errors.fileno(), 2)
    try:
        exec(beforehand, globals())
        code = deep_calls.call(commands[command], arguments=arguments)
    except BaseException:
        traceback.print_exc()
        code = 99
    main.leave(code)

for line in sys.stdin:
    found = []
    for child, errors in [begin(*case) for case in json.loads(line)]:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        found.append((code, errors.read()))
    print(json.dumps(found), flush=True)
"""
# Replaces a function: its nth call first sends signals to its own process.
SIGNAL = """
import signal, time
def at(owner, name, *numbers, nth=1):
    whole, calls = getattr(owner, name), []
    def signaled(*arguments, **options):
        calls.append(name)
        if len(calls) == nth:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.05)
        return whole(*arguments, **options)
    setattr(owner, name, signaled)
"""


class Machine:
    """Runs commands, in a mount namespace of their own where the system allows one.

    In such a namespace, a test can mount a disk that is full or read-only.
    """

    def __init__(self, folder: pathlib.Path):
        apart = ["unshare", "--map-root-user", "--mount"]
        self.mounts = (
            bool(shutil.which("unshare"))
            and not subprocess.run(
                [*apart, "mount", "-t", "tmpfs", "none", folder], capture_output=True
            ).returncode
        )
        environment = {
            # `run_here` has the same compiler settings, so its results are equal bit for bit.
            # DRIVER imports tests/imported.py.
            **quick.environment(os.environ | {"PYTHONPATH": str(ROOT / "tests")}),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.process = subprocess.Popen(
            [*(apart if self.mounts else ()), sys.executable, "-c", DRIVER],
            cwd=ROOT,
            text=True,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, *cases: tuple) -> list[tuple[int, str]]:
        """Runs cases of (command, arguments, code to run beforehand) at the same time.

        Returns their exit codes and standard errors.
        """
        self.process.stdin.write(
            json.dumps(
                [
                    [command, [*map(str, arguments)], "".join(rest)]
                    for command, arguments, *rest in cases
                ]
            )
            + "\n"
        )
        self.process.stdin.flush()
        return [tuple(found) for found in json.loads(self.process.stdout.readline())]

    def train(self, folder: pathlib.Path, beforehand: str = "", *more: str) -> tuple[int, str]:
        return self.run(("main", (*TRAIN, *more, "--workdir", folder), beforehand))[0]

    def mount(self, *arguments) -> None:
        assert self.run(("mount", arguments)) == [(0, "")]

    def seen(self, path: pathlib.Path) -> pathlib.Path:
        """Returns a path of the namespace as this process can open it."""
        return pathlib.Path(f"/proc/{self.process.pid}/root{path}")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("machine"))
    yield machine
    machine.process.communicate()


@pytest.fixture
def disk(machine, tmp_path):
    """Mounts a disk of 4 MiB; returns its path."""
    if not machine.mounts:
        pytest.skip(
            "this system lets no process have mounts of its own (unshare --map-root-user "
            "--mount), and so no small disk"
        )
    machine.mount("-t", "tmpfs", "-o", "size=4m", "none", tmp_path)
    return tmp_path


@functools.cache
def like():
    """Returns the structure of a run's state."""
    return jax.eval_shape(
        lambda: step.init(
            step.Recipe(create_model("mlp1", input_shape=(8, 8, 1)), augment=()),
            (8, 8, 1),
            step.Numbers(0),
        )
    )


def contents(restored: tuple) -> tuple[int, dict[str, bytes], dict]:
    """Returns a restored checkpoint's step, arrays as bytes, and record."""
    at, state, saved_record = restored
    arrays = {name: np.asarray(leaf).tobytes() for name, leaf in _leaves(state).items()}
    return at, arrays, saved_record


def record(folder: pathlib.Path) -> dict:
    """Returns every result of a finished run, for a comparison bit for bit."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        at, arrays, saved_record = contents(checkpoints.restore(like()))
    results = json.loads((folder / "results.json").read_text())
    assert (
        at == STEPS
        and [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        == results["history"]
    )
    with np.load(folder / "test.npz") as test:
        return {
            "history": saved_record["history"],
            "results": {key: value for key, value in results.items() if "seconds" not in key},
            "weights": (folder / "weights.safetensors").read_bytes(),
            "test": {name: test[name].tobytes() for name in test},
            "state": arrays,
        }


def line(errors: str) -> str:
    """Returns the one line that is not a log line; log lines begin with the time."""
    (error_line,) = [line for line in errors.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    return error_line


def left_over(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in (".claim", ".partial")]


@pytest.fixture(scope="module")
def finished(machine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, errors = machine.train(folder)
    assert code == 0, errors
    return folder


@pytest.fixture(scope="module")
def stopped(machine, tmp_path_factory):
    """Trains a run that is stopped after one epoch; returns its folder."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    code, errors = machine.train(folder, SIGNAL + 'at(evaluate, "predict_batches", signal.SIGTERM)')
    assert (
        code == 75
        and "SIGTERM after step 10 of 30" in line(errors)
        and len(list((folder / "checkpoints").iterdir())) == 2
    )
    return folder


def test_twice_from_the_beginning_is_the_same_to_the_bit(machine, finished, tmp_path):
    assert machine.train(tmp_path)[0] == 0
    assert record(tmp_path) == record(finished)


# ------------------------------------------------------------------ disks

# Replaces a function: it first waits for a checkpoint in progress and then fills the disk.
FULL = """
import threading
def full(owner, name, when=lambda *arguments: True):
    whole = getattr(owner, name)
    def filled(*arguments, **options):
        if when(*arguments):
            for thread in threading.enumerate():
                if "_seal" in thread.name:
                    thread.join()
            with open("{}/ballast", "ab", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        return whole(*arguments, **options)
    setattr(owner, name, filled)
def full_at(file):
    full(files, "write", lambda path, content: path.name == file)
"""
NO_SPACE = "No space left on device"


def test_a_full_disk_is_told_and_costs_nothing_that_was_done(machine, finished, disk):
    """Fills the disk at each place where one run writes; the run goes on each time."""
    folder, outside = disk / "run", machine.seen(disk) / "run"
    for where, message, reached in (
        ('full(claims, "claim")', f"workdir='{folder}' cannot be written to: {NO_SPACE}", None),
        ('full(workdir, "prepare")', f"workdir='{folder}' cannot be written to: {NO_SPACE}", None),
        ('full_at("environment.json")', f"{NO_SPACE}: '{folder}/environment.json'", None),
        (
            'full(loop.Checkpoints, "save")',
            f"a checkpoint could not be written to {folder}/checkpoints: ",
            None,
        ),
        ('full_at("metrics.jsonl")', f"{NO_SPACE}: '{folder}/metrics.jsonl'", None),
        ('full(results, "write_events")', f"{NO_SPACE}: '{folder}/tensorboard'", 8),
        (
            'full(loop.Checkpoints, "save", lambda _, step, *rest: step > 16)',
            f"written to {folder}/checkpoints: ",
            8,
        ),
        (
            'full(results.weights, "save_torchvision")',
            f"{folder}/weights.safetensors could not be written",
            16,
        ),
        ('full_at("test.npz")', f"{NO_SPACE}: '{folder}/test.npz'", STEPS),
        ('full_at("results.json")', f"{NO_SPACE}: '{folder}/results.json'", STEPS),
        ('full(files, "write_figure")', f"{NO_SPACE}: '{folder}/curves.png'", STEPS),
        ('full_at("report.md")', f"{NO_SPACE}: '{folder}/report.md'", "finished"),
    ):
        code, errors = machine.train(folder, FULL.format(disk) + where)
        assert (
            code == (2 if "workdir=" in message else 1)
            # The first checkpoint that fails is in a line of the log: metrics.jsonl ends the run.
            and message in errors
            and NO_SPACE in line(errors)
        ), errors
        resuming = {None: "", "finished": "holds the finished run"}.get(
            reached, f"resuming from step {reached} of {STEPS}\n"
        )
        assert resuming in errors and ("resuming" in errors) == isinstance(reached, int), errors
        assert not left_over(outside)
        (outside.parent / "ballast").unlink()
    code, errors = machine.train(folder)
    assert code == 0 and "holds the finished run" in errors
    assert record(outside) == record(finished)
    (outside / "results.json").unlink()
    assert machine.train(folder)[0] == 0 and record(outside) == record(finished)


def test_a_disk_that_can_only_be_read(machine, finished, disk):
    """A disk becomes read-only during a run: commands are refused until it is writable.

    Runs on a read-only disk can still be combined in a folder elsewhere.
    """
    folder, outside_path, refused = (
        disk / "run",
        machine.seen(disk) / "run",
        "cannot be written to: Read-only file system",
    )
    turns = f"""
import subprocess
write = files.write
def turned(path, content):
    if path.name == "results.json":
        subprocess.run(["mount", "-o", "remount,ro", "{disk}"], check=True)
    write(path, content)
files.write = turned
"""
    code, errors = machine.train(folder, turns)
    assert (
        code == 1
        and line(errors) == f"error: [Errno 30] Read-only file system: '{folder}/results.json'"
    )
    assert [
        (code, refused in line(errors))
        for code, errors in machine.run(
            ("main", (*TRAIN, "--workdir", folder)),
            ("main", (*TRAIN, "--workdir", disk / "other")),
            ("sweep", (*TRAIN, "--workdir", disk / "swept")),
        )
    ] == [(2, True)] * 3
    machine.mount("-o", "remount,rw", disk)
    code, errors = machine.train(folder)
    assert (
        code == 0
        and f"resuming from step {STEPS} of {STEPS}" in errors
        and record(outside_path) == record(finished)
    )
    machine.mount("-o", "remount,ro", disk)
    elsewhere = finished.parent / "combined"
    (again, again_error), (inside, inside_error), (outside, _) = machine.run(
        ("main", (*TRAIN, "--workdir", folder)),
        *(
            ("combine", ("--runs", folder, "--method", "polyak", "--workdir", place))
            for place in (disk / "combined", elsewhere)
        ),
    )
    assert again == inside == 2 and refused in line(again_error) and refused in line(inside_error)
    assert outside == 0 and json.loads((elsewhere / "results.json").read_text())["individual"][-1][
        "test"
    ] == {
        name.removeprefix("test_"): value
        for name, value in record(finished)["results"]["final"].items()
        if name.startswith("test_")
    }


# ------------------------------------------------------------------ flipped bits


@pytest.fixture
def run_here(without_figures):
    """Returns a function that runs the command here and returns its error or None."""

    def run(config: dict, folder: pathlib.Path):
        try:
            main.run(ml_collections.ConfigDict(config), folder)
        except (ValueError, RuntimeError, OSError) as error:
            return error

    return run


def flip(path: pathlib.Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def configuration(folder: pathlib.Path) -> dict:
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in json.loads((folder / "config.json").read_text()).items()
    }


def test_a_flipped_bit_in_a_run_under_way(stopped, finished, run_here, tmp_path):
    """Flips a bit in each file in turn: the run is refused or reaches the same end.

    Of each checkpoint it is one file, since test_checkpoints.py damages every file. A damaged
    metrics.jsonl is rewritten from the checkpoint, which contains the same entries and has a hash.
    """
    generator, folder, config, want = (
        random.Random(0),
        tmp_path / "run",
        configuration(stopped),
        record(finished),
    )
    names = [
        path.relative_to(stopped)
        for path in sorted(stopped.rglob("*"))
        if path.is_file() and path.stat().st_size
    ]
    assert {"config.json", "environment.json", "metrics.jsonl"} < {
        str(name) for name in names
    } and len(names) > 20
    saved = {
        at: [name for name in names if name.is_relative_to(f"checkpoints/{at}")] for at in (8, 10)
    }
    others = [name for name in names if not name.is_relative_to("checkpoints")]
    assert len(names) == sum(map(len, [others, *saved.values()]))
    for name in [*others, *map(generator.choice, saved.values())]:
        shutil.copytree(stopped, folder)
        flip(folder / name, generator)
        error = run_here(config, folder)
        if name.name == "config.json":
            assert isinstance(error, ValueError) and f"workdir={str(folder)!r} holds a" in str(
                error
            )
        else:
            assert error is None and record(folder) == want, name
        shutil.rmtree(folder)
    shutil.copytree(stopped, folder)
    whole = (folder / "config.json").read_bytes()
    refused = 0
    for _ in range(100):
        flip(folder / "config.json", generator)
        if _changes_no_result(whole, (folder / "config.json").read_bytes()):
            (folder / "config.json").write_bytes(whole)
            continue
        refused += 1
        error = run_here(config, folder)
        assert (
            isinstance(error, ValueError)
            and "\n" not in str(error)
            and f"workdir={str(folder)!r} holds a" in str(error)
        )
        (folder / "config.json").write_bytes(whole)
    assert refused > 90


def _changes_no_result(before: bytes, after: bytes) -> bool:
    """Tells whether two records differ only in keys that a run may change, such as `workers`."""
    try:
        old, new = json.loads(before), json.loads(after)
    except ValueError:
        return False
    return {key for key in old | new if old.get(key) != new.get(key)} <= _EQUIVALENT


def test_a_flipped_bit_in_a_finished_run(finished, run_here, tmp_path):
    """Flips bits in each file: changed numbers are neither reported nor combined."""
    generator, folder, config, want = (
        random.Random(1),
        tmp_path / "run",
        configuration(finished),
        record(finished),
    )
    names = [path.name for path in sorted(finished.iterdir()) if path.is_file()]
    sealed = {
        "environment.json",
        "manifest.json",
        "metrics.jsonl",
        "results.json",
        "test.npz",
        "weights.safetensors",
    }
    redrawn = {"report.md", "curves.png", "confusion.png", "mistakes.png"}
    assert set(names) == sealed | redrawn | {"config.json"}
    shutil.copytree(finished, folder)
    # Figures are drawn as this process draws them.
    assert run_here(config, folder) is None
    for name in names:
        for _ in range(5):
            before = (folder / name).read_bytes()
            flip(folder / name, generator)
            error = run_here(config, folder)
            if name in redrawn:
                assert error is None and (folder / name).read_bytes() == before
                continue
            assert isinstance(error, ValueError) and "\n" not in str(error), name
            assert (
                name == "manifest.json"
                or str(folder / name) in str(error)
                or name == "config.json"
                and str(folder) in str(error)
            )
            (folder / name).write_bytes(before)
    assert run_here(config, folder) is None
    # As the error says, removing results.json evaluates the run again.
    flip(folder / "weights.safetensors", generator)
    (folder / "results.json").unlink()
    assert run_here(config, folder) is None and record(folder) == want
    flip(
        next(path for path in (folder / "checkpoints" / str(STEPS)).rglob("*") if path.is_file()),
        generator,
    )
    with pytest.raises(ValueError, match=f"has no whole checkpoint of its last step, {STEPS}"):
        combine.run([str(folder)], "polyak", tmp_path / "combined")
    # With the last checkpoint damaged, the run goes on from the one before.
    (folder / "results.json").unlink()
    assert run_here(config, folder) is None and record(folder) == want


def test_a_claim_that_cannot_be_read_is_one(tmp_path):
    """An unreadable claim file counts as a claim until it is too old."""
    for content in (b"", b"\xff", b"{}", b"[]"):
        (tmp_path / "run.claim").write_bytes(content)
        with (
            pytest.raises(claims.Claimed, match="in use by another process, whose claim cannot be"),
            claims.claim(tmp_path),
        ):
            pass
    os.utime(tmp_path / "run.claim", (time.time() - 130,) * 2)
    with claims.claim(tmp_path):
        assert json.loads((tmp_path / "run.claim").read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------- other configurations, processes and clocks


def test_a_combination_in_anothers_place_is_refused(finished, tmp_path, capsys):
    folder = tmp_path / "combined"
    workdir.prepare(folder, {"kind": "combine", "method": "snapshot", "runs": [str(finished)]})
    (folder / "results.json").write_text("{}")
    code = combine.main(["--runs", str(finished), "--method", "polyak", "--workdir", str(folder)])
    assert code == 2 and (folder / "results.json").read_text() == "{}"
    error = line(capsys.readouterr().err)
    assert "another configuration (method='snapshot' there, 'polyak' now)" in error


def test_a_combination_in_a_place_that_is_in_use_is_refused(finished, tmp_path, capsys):
    folder = tmp_path / "combined"
    with claims.claim(folder):
        code = combine.main(
            ["--runs", str(finished), "--method", "polyak", "--workdir", str(folder)]
        )
    assert code == 2 and "combined' is in use by process" in line(capsys.readouterr().err)
    assert not (folder / "config.json").exists()


def test_a_sweep_of_another_configuration_or_with_damaged_runs_is_refused(
    machine, finished, tmp_path
):
    """Finished runs are checked, too, before anything is computed."""
    swept = tmp_path / "swept.py"
    swept.write_text(
        "from configs.lenet_digits import get_config\n\ndef sweep():\n    return [{'seed': 0}]\n"
    )
    given = (f"--config={swept}", *TRAIN[1:], "--workdir", tmp_path / "runs")
    shutil.copytree(finished, tmp_path / "runs" / "seed=0")
    results = tmp_path / "runs" / "seed=0" / "results.json"
    ((code, errors),) = machine.run(("sweep", given))
    assert code == 0, errors
    ((code, errors),) = machine.run(("sweep", (*given, "--config.epochs=2")))
    assert code == 2 and "holds a run of another configuration (epochs=3 there, 2 now)" in line(
        errors
    )
    results.write_text(results.read_text().replace('"test_error": 0', '"test_error": 1'))
    ((code, errors),) = machine.run(("sweep", given))
    assert code == 2 and f"{results} is not as it was written" in line(errors)


def test_of_runs_started_at_once_one_works(machine, finished, tmp_path):
    """Starts two equal runs and, a moment later, a different one in one folder.

    One of the equal runs works, the others are refused, and config.json is the working run's.
    """
    slow = (
        "import time\ntrain = loop.run\ntime.sleep(max({} - time.time(), 0))\n"
        "loop.run = lambda *arguments: (time.sleep(3), train(*arguments))\n"
    )
    at = time.time() + 0.5
    *same, (code, errors) = machine.run(
        *(
            ("main", (*TRAIN, *more, "--workdir", tmp_path), slow.format(when))
            for when, more in ((at, ()), (at, ()), (at + 1.5, ("--config.momentum=0.5",)))
        )
    )
    assert sorted(code for code, _ in same) == [0, 2] and code == 2
    for error in (errors, max(same)[1]):
        assert re.match(
            rf"error: workdir='{tmp_path}' is in use by process \d+ on .*; "
            "wait for it, or choose another --workdir",
            line(error),
        )
    assert not left_over(tmp_path) and record(tmp_path) == record(finished)
    assert configuration(tmp_path)["momentum"] == 0.9


def test_a_clock_that_was_set_back(stopped, finished, run_here, tmp_path, monkeypatch):
    """The clock goes back a day for a stopped run, and an hour while another works."""
    folder, seconds, nanoseconds = tmp_path / "run", time.time, time.time_ns
    shutil.copytree(stopped, folder)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: seconds() - 86400)
        patch.setattr(time, "time_ns", lambda: nanoseconds() - 86400 * 10**9)
        assert run_here(configuration(stopped), folder) is None
    assert record(folder) == record(finished)
    monkeypatch.setattr(claims, "_RENEWAL_SECONDS", 0.05)
    with claims.claim(tmp_path):
        os.utime(tmp_path / "run.claim", (seconds() + 3600,) * 2)
        with pytest.raises(claims.Claimed):
            claims.claim(tmp_path).__enter__()
        # The claim is renewed with the new clock's time.
        deadline = time.monotonic() + 30
        while abs((tmp_path / "run.claim").stat().st_mtime - seconds()) > 60:
            assert time.monotonic() < deadline
            time.sleep(0.02)


# ------------------------------------------------------------------ signals


def test_signals_outside_of_the_steps(machine, finished, tmp_path):
    """Stops one run at many places: it goes on each time, to the same results."""
    for where, message, log in (
        (
            'at(data.arrays, "load", signal.SIGTERM)',
            "stopped; run the same command again to continue from the last checkpoint",
            "running in",
        ),
        (
            'at(step, "resident_steps", signal.SIGINT)',
            "stopped by SIGINT after step 1 of 30, which is saved",
            "running in",
        ),
        # Slurm and submitit announce a time limit with SIGUSR1 or SIGUSR2.
        (
            'at(step, "resident_steps", signal.SIGUSR1)',
            "stopped by SIGUSR1 after step 2 of 30, which is saved",
            "from step 1 of 30",
        ),
        (
            'at(step, "resident_steps", signal.SIGUSR2)',
            "stopped by SIGUSR2 after step 3 of 30, which is saved",
            "from step 2 of 30",
        ),
        (
            'at(evaluate, "predict_batches", signal.SIGTERM)',
            "stopped by SIGTERM after step 10 of 30",
            "from step 3 of 30",
        ),
        (
            'at(evaluate, "predict_batches", signal.SIGINT, nth=2)',
            "stopped by SIGINT after step 30 of 30",
            "from step 10 of 30",
        ),
        (
            'at(evaluate, "predict_batches", signal.SIGTERM)',
            "stopped; run the same command again to continue",
            "from step 30 of 30",
        ),
        (
            'at(files, "write_figure", signal.SIGINT)',
            "stopped; run the same command again to continue",
            "from step 30 of 30",
        ),
        (
            'at(files, "write_figure", signal.SIGTERM)',
            "interrupted: what was finished is whole",
            "holds the finished run",
        ),
    ):
        code, errors = machine.train(tmp_path, SIGNAL + where)
        assert (
            code == (130 if "interrupted" in message else 75)
            and message in line(errors)
            and log in errors
        ), errors
        assert not left_over(tmp_path)
    assert machine.train(tmp_path)[0] == 0
    assert record(tmp_path) == record(finished)


@pytest.mark.parametrize(
    "first, second", [("SIGTERM", "SIGTERM"), ("SIGUSR2", "SIGTERM"), ("SIGHUP", "SIGHUP")]
)
def test_a_signal_that_the_system_repeats_changes_nothing(first, second, machine, tmp_path):
    """Slurm sends SIGTERM twice to a job that is canceled or out of time.

    SIGHUP comes from a closed terminal and from its shell.
    """
    repeated = f'at(step, "resident_steps", signal.{first}, signal.{second}, signal.SIGTERM)'
    code, errors = machine.train(tmp_path, SIGNAL + repeated)
    assert code == 75, errors
    assert f"stopped by {first} after step 1 of 30, which is saved" in line(errors)


def test_a_second_signal_ends_at_once(machine, finished, tmp_path):
    """A second signal ends a run at once, even if XLA or a handler is busy.

    The XLA call is once in a training step and once outside of one. In the third run, the first
    signal is still being handled.
    """
    long = """
import jax, signal, threading, time
def signals():
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
def advance(self, **arguments):
    threading.Thread(target=signals).start()
    add = lambda i, x: jax.numpy.sin(x + i)
    jax.jit(lambda: jax.lax.fori_loop(0, 2**31 - 1, add, 0.0))().block_until_ready()
data.Resident.advance = advance
"""
    outside = long.replace("data.Resident.advance", "report.write").replace(
        "advance(self, **arguments)", "advance(folder)"
    )
    stubborn = (
        SIGNAL
        + """
def write(folder):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
report.write = write
"""
    )
    copies = [shutil.copytree(finished, tmp_path / name) for name in ("one", "two")]
    began = time.monotonic()
    (code, errors), (also, _), (other, _) = machine.run(
        ("main", (*TRAIN, "--workdir", tmp_path / "run"), long),
        ("main", (*TRAIN, "--workdir", copies[0]), SIGNAL + outside),
        ("main", (*TRAIN, "--workdir", copies[1]), stubborn),
    )
    assert (
        code == also == 130
        and "SIGTERM: saving after this step or validation; Ctrl-C to stop at once" in errors
        and other == 143
    )
    assert time.monotonic() - began < 30


# ------------------------------------------------------------------ memory


def test_a_batch_that_does_not_fit(machine, tmp_path):
    limited = """
import functools, resource
from cnnjax.models import base, mlp
base.register("wide", functools.partial(mlp.MLP, hidden=(100_000,)))
advance = data.Resident.advance
def limited(*arguments, **options):
    most = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 300 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return advance(*arguments, **options)
data.Resident.advance = limited
"""
    code, errors = machine.train(
        tmp_path, limited, "--config.model=wide", "--config.batch_size=1024"
    )
    assert code == 1 and re.match(
        r"error: batch_size=1024 does not fit into memory \(RESOURCE_EXHAUSTED: .*\); "
        r"lower it, or raise accumulate=1,",
        line(errors),
    ), errors
    assert not left_over(tmp_path)


def test_a_killed_worker_ends_the_run(machine, tmp_path):
    """The system kills a process when memory runs out: the run ends with an error."""
    generator = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(4):
            PIL.Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(
                tmp_path / name / f"{number}.png"
            )
    model = """
import functools, multiprocessing, signal
from cnnjax.models import base, mlp
base.register("small", functools.partial(mlp.MLP, hidden=(4,)))
"""
    killing = (
        model
        + """
advance, calls = data.Streamed.advance, []
def killed(*arguments, **options):
    if len(calls) == 2:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    calls.append(0)
    return advance(*arguments, **options)
data.Streamed.advance = killed
"""
    )
    more = (
        "--config.dataset=folder",
        f"--config.data_dir={tmp_path}",
        "--config.model=small",
        "--config.image_size=32",
        "--config.resize=32",
        "--config.workers=1",
        "--config.n_validation=0",
        "--config.batch_size=4",
        "--config.epochs=50",
        "--config.schedule.learning_rate=0.001",
    )
    began = time.monotonic()
    code, errors = machine.train(tmp_path / "run", killing, *more)
    assert (
        code == 1
        and "error: one of workers=1 processes that decode images was killed" in errors
        and "continue from the last checkpoint, with --config.workers=0 if it happens again"
        in errors
        and "Traceback" not in errors
    ), errors
    assert time.monotonic() - began < 120 and not left_over(tmp_path)
