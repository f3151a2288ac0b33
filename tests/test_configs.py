"""Every training configuration is accepted, and AlexNet's 2012 recipe trains."""

import ast
import importlib
import json
import os
import pathlib
import re
import signal
import threading
import time
import types

import forked
import ml_collections
import numpy as np
import PIL.Image
import pytest
import quick

from cnnjax import main, sweep
from cnnjax.runtime import configuration, files, workdir
from cnnjax.train import defaults, loop
from cnnjax.train.data import Streamed
from cnnjax.train.parallel import Parallel
from experiments import mlp_vs_convnet

ROOT = pathlib.Path(__file__).resolve().parents[1]
TRAINING = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if "from cnnjax.train import defaults" in path.read_text()
)


def test_the_lectures_networks_have_configurations():
    assert set(TRAINING) >= {*mlp_vs_convnet.CLAIMS, "alexnet_imagenet", "resnet50_imagenet"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_a_configuration_fits_the_engine(name, tmp_path):
    file = ROOT / "configs" / f"{name}.py"
    assert f"python -m cnnjax.main --config configs/{name}.py" in ast.get_docstring(
        ast.parse(file.read_text())
    )
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    loop.check(config)
    assert {
        "model",
        "dataset",
        "data_dir",
        "epochs",
        "batch_size",
        "seed",
        "checkpoint_every_steps",
    } <= set(config)
    if hasattr(module, "sweep"):
        sweep.check(sweep.read_runs(str(file), config, tmp_path))


def test_a_configuration_imports_no_other():
    """A copy of its file works in any folder."""
    for path in (ROOT / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] != "configs", path


NUMPY = """
import numpy as np
from cnnjax.train import defaults

def get_config():
    config = defaults.get_config()
    config.model_fields.width = np.int64(3)
    config.schedule.epochs = (np.int64(1), np.float32(1.5))
    config.seed = config.get_oneway_ref("batch_size")
    return config
"""


def test_numpys_scalars_become_numbers(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(NUMPY)
    config = configuration.load(str(file))
    changes = {"epochs": np.int32(4), "rates": (("fc", np.float64(0.5)),), "batch_size": np.int8(9)}
    changed = configuration.override(config, changes)
    for copy, epochs, batch_size in ((config, 10, 128), (changed, 4, 9)):
        recorded = json.loads(json.dumps(copy.to_dict()))
        assert (recorded["epochs"], recorded["batch_size"]) == (epochs, batch_size)
        assert recorded["schedule"]["epochs"] == [1, 1.5]
        assert recorded["model_fields"]["width"] == 3
        # References are still followed.
        assert copy.seed == batch_size
    assert changed.rates == (("fc", 0.5),)


def test_a_value_that_the_record_cannot_hold_is_refused(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(NUMPY.replace("np.int64(3)", "{3}"))
    message = r"model_fields.width=\{3\} is not a string, a number, or a tuple of them"
    with pytest.raises(ValueError, match=message):
        configuration.load(str(file))
    config = defaults.get_config()
    for value in ({"conv1"}, (b"conv1",), (1, (2j,)), np.zeros(2)):
        with pytest.raises(ValueError, match="freeze=.* is not a string, a number, or a tuple of"):
            configuration.override(config, {"freeze": value})
    config.freeze = ({"conv1"},)
    with pytest.raises(ValueError, match="freeze=.* is not a string, a number, or a tuple of"):
        loop.check(config)


LOCKED = """
import ml_collections
from cnnjax.train import defaults

def get_config():
    config = defaults.get_config()
    return LOCKED
"""


@pytest.mark.parametrize("locked", ["config.lock()", "ml_collections.FrozenConfigDict(config)"])
def test_a_locked_configuration_can_be_changed(locked, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(LOCKED.replace("LOCKED", locked))
    config = configuration.load(str(file))
    changes = {"model_fields.width": 3, "schedule.learning_rate": 0.5, "epochs": 4}
    changed = configuration.override(config, changes)
    assert changed.model_fields.width == 3 and changed.schedule.learning_rate == 0.5
    assert changed.epochs == 4 and changed.rates == config.rates == ()


@pytest.mark.parametrize(
    "line, key",
    [
        ("config.data_dir = ml_collections.config_dict.required_placeholder(str)", "data_dir"),
        (
            "config.augment.add = ml_collections.config_dict.required_placeholder(int)",
            "augment.add",
        ),
    ],
)
def test_a_required_placeholder_is_named(line, key, tmp_path, capsys):
    file = tmp_path / "own.py"
    file.write_text(LOCKED.replace("return LOCKED", f"{line}\n    return config"))
    message = f"config='{file}': {key} is a required placeholder; give it a value in get_config()"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        configuration.load(str(file))
    assert main.main(["--config", str(file), "--help"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_text_that_is_no_literal_stays_text():
    """`ast.literal_eval` raises several kinds of errors for it."""
    config = defaults.get_config()
    for text in ("conv1", "a b", "{['conv1']}", "(" * 300, "-" * 3_000 + "1"):
        (value,) = configuration.parse_overrides(config, [f"--config.freeze={text}"]).values()
        assert value == (text,)
    parsed = configuration.parse_overrides(config, ["--config.schedule.learning_rate=inf"])
    assert parsed == {"schedule.learning_rate": np.inf}


def test_a_tuple_that_is_no_literal_is_no_element_of_a_tuple_of_numbers():
    """`nan` is no literal of Python."""
    config = ml_collections.ConfigDict({"noise": (127.5, 64.0)})
    cases = (("(nan, 1)", "(nan, 1)"), ("1-2", ("1-2",)), ("(1)", (1,)), ("(1, 2)", (1, 2)))
    for text, value in cases:
        changes = configuration.parse_overrides(config, [f"--config.noise={text}"])
        assert changes == {"noise": value}
    with pytest.raises(ValueError, match=r"^noise='\(nan, 1\)' is not of the type tuple$"):
        configuration.override(config, {"noise": "(nan, 1)"})


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Creates a folder of two classes, reddish and bluish noise; no image is square."""
    root, generator = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for channel, name in ((0, "red"), (2, "blue")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (44 + number, 60, 3), np.uint8)
                pixels[..., channel] += 120
                PIL.Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.mark.slow
def test_the_recipe_of_2012_runs_from_end_to_end(colors, tmp_path):
    """Trains a small network with every part of the recipe.

    The parts are held-out images for the plateau rule, mean-subtracted pixels, shifted colors, and
    a test on ten crops.
    """
    done = forked.run(
        "cnnjax.main",
        "--config",
        "configs/alexnet_imagenet.py",
        f"--config.data_dir={colors}",
        "--config.model=tutorial_net",
        "--config.image_size=32",
        "--config.resize=40",
        "--config.n_validation=8",
        "--config.batch_size=8",
        "--config.epochs=4",
        "--config.workers=0",
        "--config.schedule.learning_rate=1e-4",
        "--config.schedule.patience=0",
        "--config.schedule.threshold=0.999",
        "--config.schedule.metric=loss",
        "--workdir",
        tmp_path,
        flags=quick.FLAGS,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    # No loss improves by a factor of a thousand, so the first stays the best. Each later epoch
    # divides the rate by ten, but not below 1e-5.
    assert [entry["learning_rate"] for entry in results["history"]] == pytest.approx(
        [1e-4, 1e-4, 1e-5, 1e-5]
    )
    assert (
        results["n_train"] == 24
        and results["n_test"] == 12
        and results["classes"] == ["blue", "red"]
    )
    assert {"validation_loss", "validation_error"} <= results["history"][0].keys() and results[
        "final"
    ]["test_error"] < 0.5
    with np.load(tmp_path / "test.npz") as saved:
        assert (
            len(saved["labels"]) == 12
            and saved["images"].shape[0] == (saved["labels"] != saved["predicted"]).sum()
        )


def test_splits_of_other_classes_are_refused(colors, tmp_path):
    (tmp_path / "train").symlink_to(colors / "train")
    (tmp_path / "val" / "red").mkdir(parents=True)
    (tmp_path / "val" / "red" / "0.png").write_bytes(
        (colors / "val" / "red" / "0.png").read_bytes()
    )
    config = importlib.import_module("configs.resnet50_imagenet").get_config()
    config.data_dir = str(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"the test split has other classes than the training split \(missing classes: blue; "
        r"additional: none\); expected the same",
    ):
        Streamed(config, Parallel("jit"))


def test_runs_that_stop_early_are_averaged_where_they_are():
    """An epoch's mean is over the runs that reached it."""
    runs = []
    for errors in ([0.5, 0.4, 0.3], [0.7]):
        history = [{"train_error": error} for error in errors]
        final = {"epoch": len(errors), "train_error": errors[-1], "test_error": 0.5}
        run = {"parameters": 1, "training_seconds": 60, "final": final, "history": history}
        runs.append(run)
    described = mlp_vs_convnet.describe(runs)
    assert described["curve"] == pytest.approx([60, 40, 30])
    row = {"network": "mlp1_cifar10", "n": 2, "failed": []} | described
    row |= dict.fromkeys(("train", "test"), {"claimed": None, "errors": [1.0]})
    assert "| mlp1_cifar10 | 1 | 1 to 3 |" in mlp_vs_convnet.tabulate([row])
    mlp_vs_convnet.draw([row])


def test_the_comparison_has_the_failures_of_the_sweeps_table(tmp_path):
    """A run that failed may have been run again by itself; one may have been refused."""
    folder = tmp_path / "lenet_mnist"
    config = importlib.import_module("configs.lenet_mnist").get_config()
    swept = [sweep.Run({"seed": n}, config, folder / f"seed={n}") for n in range(3)]
    final = {"epoch": 1, "train_error": 0.5, "test_error": 0.5}
    run = {"parameters": 1, "training_seconds": 60, "final": final, "history": [final]}
    for failed in swept[:2]:
        failed.folder.mkdir(parents=True)
        failed.failure.write_text('{"error": "the loss is not finite at step 3"}')
    swept[0].results.write_text(json.dumps(run))
    swept[2].refusal = "batch_size=100 is more than the 50 images"
    sweep.write_table(folder, swept)
    (row,) = mlp_vs_convnet.compare(tmp_path)
    assert row["n"] == 1 and row["failed"] == [
        "seed=1: the loss is not finite at step 3",
        "seed=2: batch_size=100 is more than the 50 images",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion", "without_figures")
def test_the_comparison_tells_of_runs_and_of_failures(tmp_path, monkeypatch, capfd):
    """Trains a perceptron; a second call trains nothing and reports a failed seed.

    The first call's sweep runs in this process.
    """

    def run_sweep(name: str, folder: pathlib.Path, arguments: list[str]) -> int:
        config = f"configs/{name}.py"
        return sweep.main(["--config", config, "--workdir", str(folder), *arguments])

    arguments = [
        "--workdir",
        str(tmp_path),
        "--networks",
        "mlp1_cifar10",
        "--config.dataset=digits",
        "--config.epochs=2",
        # The tests' own process has eight devices.
        "--config.parallel=jit",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(mlp_vs_convnet, "run_sweep", run_sweep)
        assert mlp_vs_convnet.main(arguments) == 0
    (row,) = json.loads((tmp_path / "comparison.json").read_text())
    assert (
        row["n"] == 5 and row["epochs"] == 2 and row["parameters"] == 650 and len(row["curve"]) == 2
    )
    errors = [
        100 * json.loads(path.read_text())["final"]["test_error"]
        for path in tmp_path.glob("mlp1_cifar10/*/results.json")
    ]
    assert row["test"]["claimed"] == 65 and sorted(row["test"]["errors"]) == sorted(errors)
    spread = f"{np.mean(errors):.2f} ± {np.std(errors, ddof=1):.2f}"
    assert f"| 65 | {spread} | 5 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    # As a run that fails leaves it.
    failed = tmp_path / "mlp1_cifar10" / "seed=1"
    for name in ("results.json", "manifest.json"):
        (failed / name).unlink()
    (failed / "failure.json").write_text('{"error": "the loss is not finite at step 3"}')
    capfd.readouterr()
    assert mlp_vs_convnet.main(arguments) == 1
    assert "epoch" not in capfd.readouterr().err
    text = (tmp_path / "report.md").read_text()
    assert (
        "| mlp1_cifar10 | 650 | 2 | 59 | " in text
        and "mlp1_cifar10: seed=1: the loss is not finite at step 3" in text
    )


def test_a_network_with_a_failed_run_does_not_keep_the_next_from_training(tmp_path, monkeypatch):
    """A sweep ends with 1 if some runs failed, and with others if it cannot go on."""
    codes = {"mlp1_cifar10": 1, "mlp3_cifar10": 0, "lenet_mnist": 75, "tutorial_cifar10": 0}
    trained = []

    def run_sweep(name, folder, arguments):
        trained.append(name)
        return codes[name]

    monkeypatch.setattr(mlp_vs_convnet, "run_sweep", run_sweep)
    assert mlp_vs_convnet.main(["--workdir", str(tmp_path), "--networks", *codes]) == 75
    assert trained == ["mlp1_cifar10", "mlp3_cifar10", "lenet_mnist"]


# Ends at SIGTERM, or with 3 after five seconds.
SAVING = """#!/bin/sh
trap 'exit CODE' TERM
touch begun
for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 0.5; done
exit 3
"""


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("code", [75, 0])
def test_a_signal_reaches_the_sweep(code, tmp_path, monkeypatch):
    """The sweep saves and ends with 75, or has just finished."""
    program = tmp_path / "program"
    program.write_text(SAVING.replace("CODE", str(code)))
    program.chmod(0o755)
    monkeypatch.setattr(mlp_vs_convnet.sys, "executable", str(program))
    monkeypatch.setattr(mlp_vs_convnet, "ROOT", tmp_path)
    # The test's process must outlive the signal in any case.
    signal.signal(signal.SIGTERM, lambda *arguments: None)

    def stop():
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        assert mlp_vs_convnet.run_sweep("mlp1_cifar10", tmp_path / "sweep", []) == 75
    finally:
        thread.join()


def test_the_comparison_takes_no_folder_of_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlp_vs_convnet, "run_sweep", pytest.fail)
    arguments = ["--workdir", str(tmp_path), "--networks", "mlp1_cifar10"]
    workdir.prepare(tmp_path, {"kind": "train"}, computes=False)
    (tmp_path / "report.md").write_text("a training run's")
    assert mlp_vs_convnet.main(arguments) == 2
    message = f"error: workdir='{tmp_path}' holds a training run; choose another --workdir\n"
    assert capsys.readouterr().err.endswith(message)
    (tmp_path / "config.json").unlink()
    assert mlp_vs_convnet.main(arguments) == 2
    assert "holds report.md of something else" in capsys.readouterr().err
    # An earlier version left no record beside its results.
    (tmp_path / "comparison.json").touch()
    monkeypatch.setattr(mlp_vs_convnet, "run_sweep", lambda *arguments: 0)
    assert mlp_vs_convnet.main(arguments) == 0
    assert files.read_json(tmp_path / "config.json") == {"command": "mlp_vs_convnet"}
    assert mlp_vs_convnet.main(arguments) == 0


def test_a_sweep_that_a_signal_ends_fails(tmp_path, monkeypatch):
    """Popen returns the number of the signal as a negative one, which `max` would drop."""
    killed = types.SimpleNamespace(wait=lambda: -signal.SIGKILL)
    started = []

    def start(words, cwd):
        started.append(words)
        return killed

    monkeypatch.setattr(mlp_vs_convnet, "subprocess", types.SimpleNamespace(Popen=start))
    networks = ["mlp1_cifar10", "mlp3_cifar10"]
    assert mlp_vs_convnet.main(["--workdir", str(tmp_path), "--networks", *networks]) == 128 + 9
    # The next network is not trained.
    assert len(started) == 1
