"""The command line as a user meets it."""
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "cnnjax.main"]
SMALL = ["--config", "configs/posenet.py", "--config.encoders=('vgg11',)", "--config.paddings=('zeros',)", "--config.sgd_paddings=()",
         "--config.image_size=64", "--config.n_train=4", "--config.n_held_out=2", "--config.n_test=2", "--config.seeds=1",
         "--config.sgd_steps=5"]


def run(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, **options)


def test_a_run_leaves_its_record(tmp_path):
    done = run(*SMALL, "--workdir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert config["encoders"] == ["vgg11"] and config["image_size"] == 64
    assert {"packages", "devices", "xla_flags", "seed", "git_revision"} <= set(environment) and environment["packages"]["jax"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["kind"] == "position"
    assert (tmp_path / "run" / "report.md").stat().st_size > 1000
    # The same directory is not another run's, and the same run may be made again.
    other = run(*SMALL, "--config.seed=1", "--workdir", tmp_path / "run")
    assert other.returncode == 2 and "holds a run of another configuration (seed=0 there, 1 now); choose another --workdir" in other.stderr


@pytest.mark.parametrize("arguments, message", [
    ([], "--config is missing; name a configuration file"),
    (["--config", "configs/nothing.py"], "config='configs/nothing.py' is not a file"),
    (["--config", "configs/posenet.py", "--config.encodrs=('vgg16',)"], "--config has no such key: 'encodrs' Did you mean \"encoders\""),
    (["--config", "configs/posenet.py", "--config.seeds=many"], "many"),
    (["--config", "configs/posenet.py", "--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    (["--config", "configs/posenet.py", "surplus"], "unexpected argument 'surplus'"),
    (["--config", "configs/posenet.py", "--config.kind=dance"], "kind='dance' of the configuration is not one of position"),
    (["--config", "configs/posenet.py", "--config.encoders=('vgg61',)"], "model='vgg61' is not known; did you mean vgg19"),
    (["--config", "configs/posenet.py", "--config.paddings=('mirror',)"], "padding='mirror' is not one of zeros, none"),
    (["--config", "configs/posenet.py", "--config.targets=('D',)"], "targets='D' is not one of H, V, G, HS, VS"),
    (["--config", "configs/posenet.py", "--config.photographs=EMPTY"], "holds no image file"),
    (["--config", "configs/posenet.py", "--workdir=FILE/run"], "cannot be written to: Not a directory"),
])
def test_bad_input_is_one_clear_line(arguments, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    arguments = [a.replace("EMPTY", str(tmp_path / "empty")).replace("FILE", str(tmp_path / "file")) for a in arguments]
    before = sorted(ROOT.glob("runs/*"))
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr
    assert sorted(ROOT.glob("runs/*")) == before


def test_interrupted_in_the_middle_leaves_no_half_written_file(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen([*COMMAND, *SMALL, "--config.seeds=200", "--workdir", str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in what a shell runs in the background
    deadline = time.monotonic() + 120
    while not (folder / "environment.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.splitlines()[-1].startswith("interrupted:") and "Traceback" not in error
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "environment.json"]
    assert all(json.loads(path.read_text()) for path in folder.iterdir())


def test_import_and_help_do_not_start_jax():
    code = "import sys, cnnjax, cnnjax.main; print('jax' in sys.modules, 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False False\n"
