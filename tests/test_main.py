"""The command line as a user meets it."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import forked
import pytest
import quick

from cnnjax import main
from cnnjax.runtime import command, configuration, files

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
    "--config",
    "configs/posenet.py",
    "--config.encoders=('vgg11',)",
    "--config.stages=('block1','block2')",
    "--config.paddings=('zeros',)",
    "--config.sgd_paddings=()",
    "--config.targets=('H',)",
    "--config.data=('natural',)",
    "--config.image_size=64",
    "--config.n_train=4",
    "--config.n_held_out=2",
    "--config.n_test=2",
    "--config.seeds=1",
    "--config.sgd_steps=5",
]
# Importing jax takes seconds, so these commands import it only when they compute.
COMMANDS = (
    "cnnjax.main",
    "cnnjax.sweep",
    "cnnjax.combine",
    "cnnjax.summary",
    "cnnjax.predict",
    "cnnjax.evaluate",
    "cnnjax.weights",
    "cnnjax.visualize",
    "cnnjax.benchmark",
    "experiments.mlp_vs_convnet",
    "experiments.claims",
)


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    arguments = ("cnnjax.main", *SMALL, "--workdir", tmp_path / "run")
    done = forked.run(*arguments, flags=quick.FLAGS)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert config["encoders"] == ["vgg11"] and config["image_size"] == 64
    assert {"packages", "devices", "xla_flags", "seed", "git_revision"} <= set(
        environment
    ) and environment["packages"]["jax"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["kind"] == "position"
    assert (tmp_path / "run" / "report.md").stat().st_size > 1000
    # A run of another configuration is refused in this directory.
    other = forked.run(*arguments, "--config.seed=1")
    assert (
        other.returncode == 2
        and "holds a run of another configuration (seed=0 there, 1 now); choose another --workdir"
        in other.stderr
    )


def test_a_tilde_is_the_home_folder_and_may_begin_a_name(monkeypatch):
    """No user is called photo.jpg, so "~photo.jpg" is a file name."""
    monkeypatch.setenv("HOME", "/home/me")
    assert command.path("~/photo.jpg") == pathlib.Path("/home/me/photo.jpg")
    assert command.path("~photo.jpg") == pathlib.Path("~photo.jpg")


def test_a_package_that_is_not_installed_is_named(capsys):
    def work():
        raise ModuleNotFoundError("No module named 'grain'", name="grain")

    assert command.run(work) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "error: grain is not installed; in a checkout of cnnjax, pip install '.[all]' installs"
    )
    assert error.count("\n") == 1


def test_output_that_nobody_reads_ends_a_command_quietly():
    """The reading end of the pipe is closed, as after `| head`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    print_much = "print('line ' * 100_000)"
    program = f"from cnnjax.runtime import command; exit(command.run(lambda: {print_much}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (command.UNREAD, b"")


@pytest.mark.parametrize("closed", [1, 2])
def test_a_command_without_an_output_works(closed):
    """As after `>&-` or `2>&-` in a shell: Python has no such stream."""
    program = "from cnnjax.runtime import command; exit(command.run(lambda: print('done')))"
    shell = ["sh", "-c", f'exec "$0" -c "$1" {closed}>&-', sys.executable, program]
    assert subprocess.run(shell, cwd=ROOT).returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("output", ["stdout", "stderr"])
def test_an_output_on_a_full_disk_is_one_error(output):
    """Nothing can be said on standard error itself, and a log that is lost is no failure."""
    work = {"stdout": "print('done')", "stderr": "logging.getLogger('cnnjax').info('done')"}
    program = f"""
import logging
from cnnjax.runtime import command
exit(command.run(lambda: {work[output]}))
"""
    # As a user's Python, which tries to write at its end what it has kept.
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, output: full}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, text=True, **outputs
        )
    if output == "stderr":
        assert (done.returncode, done.stdout) == (0, "")
    else:
        assert done.returncode == 1
        assert done.stderr == "error: standard output: [Errno 28] No space left on device\n"


def test_a_full_disk_elsewhere_is_not_said_of_standard_output(capfd):
    def write():
        print("done")
        raise OSError(errno.ENOSPC, "No space left on device")

    assert command.run(write) == 1
    assert capfd.readouterr() == ("done\n", "error: [Errno 28] No space left on device\n")


def test_an_interrupted_command_keeps_its_exit_code_if_nobody_reads_its_errors():
    """As after Ctrl-C in `command 2>&1 | tee log`, which ends tee, too."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    program = """
from cnnjax.runtime import command, workdir
def work():
    raise workdir.Interrupted("stopped")
exit(command.run(work))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=write_end)
    os.close(write_end)
    assert done.returncode == command.RESUMABLE


@pytest.mark.parametrize(
    "encoding, printed",
    [
        # A UTF-8 locale is strict, while the C locale accepts every name.
        ("utf-8:strict", [b"caf\xe9.jpg", "café ± 猫".encode(), "é".encode() + b"\xff"]),
        ("ascii", [b"caf\xe9.jpg", rb"caf\xe9 \xb1 \u732b", rb"\xe9" + b"\xff"]),
    ],
)
def test_names_that_an_encoding_lacks_are_printed(encoding, printed):
    """Bytes that are not UTF-8 are printed as they are, also after another such character."""
    names = [os.fsdecode(b"caf\xe9.jpg"), "café ± 猫", os.fsdecode("é".encode() + b"\xff")]
    print_names = f"[print(name) for name in {names!a}]"
    program = f"from cnnjax.runtime import command; exit(command.run(lambda: {print_names}))"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines() == printed


def test_a_pipe_to_a_dead_process_is_an_error(capsys):
    def work():
        raise BrokenPipeError(32, "Broken pipe")

    assert command.run(work) == 1
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"


def test_only_training_is_distributed(capsys, monkeypatch):
    """Every process of a position study would measure everything and write the same files."""
    monkeypatch.setattr(main.processes, "join", pytest.fail)
    assert main.main(["--config", "configs/posenet.py", "--distributed=auto"]) == 2
    assert capsys.readouterr().err == (
        "error: distributed='auto' is for training; this configuration is of kind='position'\n"
    )


def test_keys_that_a_run_may_change_do_not_name_its_folder(tmp_path, monkeypatch):
    # Imported here: most tests of this file need no training.
    from cnnjax.train import adopt

    # Folders of runs with another `checkpoint_every_steps` have always been named after it.
    assert main._UNNAMED_KEYS == adopt._EQUIVALENT - {"checkpoint_every_steps"}
    config = str(ROOT / "configs" / "lenet_digits.py")
    monkeypatch.chdir(tmp_path)
    parser = main.build_parser("cnnjax.main", "")

    def folder(*changes):
        options, _ = main.parse(parser, ["--config", config, *changes])
        return str(options.workdir)

    changed = ("--config.workers=0", "--config.skip_damaged=True")
    assert folder() == folder(*changed) == "runs/lenet_digits"
    other = folder("--config.seed=1")
    assert other != "runs/lenet_digits"
    assert other == folder("--config.seed=1", *changed) != folder("--config.seed=2", *changed)
    # Folders of earlier versions, which hashed all keys that they had.
    keys = configuration.load(config).to_dict()
    del keys["clip_norm"]
    assert files.digest(keys | {"seed": 1}) == "19299e38"
    for arguments, changes in (
        (changed, {"workers": 0, "skip_damaged": True}),
        (("--config.seed=1", *changed), {"seed": 1}),
    ):
        earlier = f"runs/lenet_digits-{files.digest(keys | changes)}"
        pathlib.Path(earlier).mkdir(parents=True)
        assert folder(*arguments) == earlier
    assert folder() == "runs/lenet_digits"


def test_the_default_folder_is_named_after_the_changed_keys_alone(tmp_path, monkeypatch):
    """Keys of a later version leave it as it is, and so do values that are the file's own."""
    monkeypatch.chdir(tmp_path)
    parser = main.build_parser("cnnjax.main", "")

    def folder(more, *changes):
        # Python caches the module of a path.
        path = tmp_path / f"with {len(more)} more" / "own.py"
        path.parent.mkdir(exist_ok=True)
        lines = [
            "import ml_collections",
            "def get_config():",
            f"    return ml_collections.ConfigDict({{'seed': 0, 'model': 'a', **{more!r}}})",
        ]
        path.write_text("\n".join(lines))
        options, _ = main.parse(parser, ["--config", str(path), *changes])
        return str(options.workdir)

    changes = ("--config.seed=1", "--config.model=b")
    named = folder({}, *changes)
    assert named == f"runs/own-{files.digest({'seed': 1, 'model': 'b'})}"
    assert folder({"later": {"key": 0.0}}, *changes) == named
    assert folder({"later": {"key": 0.0}}, *changes, "--config.later.key=0.5") != named
    assert folder({}, "--config.seed=0") == "runs/own"


@pytest.mark.slow
def test_debug_shows_the_traceback():
    done = forked.run(
        "cnnjax.main", "--config", "configs/posenet.py", "--config.seeds=0", "--debug"
    )
    assert (
        done.returncode == 1
        and "Traceback" in done.stderr
        and "seeds=0 is not a positive number" in done.stderr
    )


@pytest.mark.slow
def test_interrupted_in_the_middle_goes_on_from_there(tmp_path):
    """After an interrupt, files are complete and finished cells are kept."""
    folder, cells = tmp_path / "run", tmp_path / "run" / "cells"
    process = forked.Popen(
        "cnnjax.main", *SMALL, "--config.seeds=5", "--workdir", folder, flags=quick.FLAGS
    )
    deadline = time.monotonic() + 240
    while not (cells / "vgg11-zeros-0.npz").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (
        process.returncode == 75
        and error.splitlines()[-1].startswith("stopped; run the same command again to continue")
        and "Traceback" not in error
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "cells",
        "config.json",
        "environment.json",
        "inputs.json",
    ]
    before = {path: path.stat().st_mtime_ns for path in cells.iterdir()}
    assert {path.name for path in before} >= {"posenet-none-0.npz", "vgg11-zeros-0.npz"} and len(
        before
    ) < 10
    done = forked.run(
        "cnnjax.main", *SMALL, "--config.seeds=5", "--workdir", folder, flags=quick.FLAGS
    )
    assert done.returncode == 0, done.stderr
    assert len(list(cells.iterdir())) == 10 and before == {
        path: path.stat().st_mtime_ns for path in before
    }
    assert {
        row["n_seeds"] for row in json.loads((folder / "results.json").read_text())["rows"]
    } == {5}


def test_importing_the_package_loads_neither_jax_nor_matplotlib():
    code = (
        "import sys, cnnjax, cnnjax.main; print('jax' in sys.modules, 'matplotlib' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        == "False False\n"
    )


@pytest.mark.slow
def test_modules_of_the_package_are_there_at_their_first_use():
    code = (
        "import sys, cnnjax\n"
        "cnnjax.weights.find, cnnjax.nn.lowering, cnnjax.models.Network, cnnjax.inspect.layers\n"
        "cnnjax.visualize.occlusion, cnnjax.transfer, cnnjax.combine, cnnjax.study\n"
        "cnnjax.position.targets, cnnjax.data.arrays, cnnjax.train.schedules\n"
        "assert not hasattr(cnnjax, 'nowhere')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_comes_without_jax(name):
    code = f"""
import runpy, sys
sys.argv = ["{name}", "--help"]
try:
    runpy.run_module("{name}", run_name="__main__")
except SystemExit as end:
    sys.exit(end.code or "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m {name}")
