"""A user's own networks: registered in a configuration, or named by their file."""

import importlib
import json
import os
import pathlib
import sys
from unittest import mock

import flax.linen as nn
import forked
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import quick

from cnnjax import evaluate, main, predict, visualize
from cnnjax.models import base, create_model
from cnnjax.runtime import files, source, workdir
from cnnjax.train import adopt, defaults
from cnnjax.train.run import digest_network, open_run, read_config
from cnnjax.weights import save_torchvision

# A configuration file that registers a network of two layers with fields of its own.
OWN = """
import flax.linen as nn
from cnnjax.models import base
from cnnjax.nn import Conv
from cnnjax.train import defaults


class Own(base.Network):
    width: int = 3
    dropout: float = 0.0
    input_shape: tuple[int, int, int] = (8, 8, 1)

    @nn.nowrap
    def walk(self, x, train):
        x = nn.relu(Conv(self.width, (3, 3), padding=1, fill=self.padding, name="conv1")(x))
        x = yield "block1", x
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        yield "logits", nn.Dense(self.num_classes, name="fc")(x)


def narrow(**fields):
    return Own(width=2, **fields)


def of_colors(**fields):
    return Own(input_shape=(16, 16, 3), **fields)


base.register("own_NUMBER", Own)


def get_config():
    config = defaults.get_config()
    config.model = "own_NUMBER"
    config.epochs = 1
    return config


def sweep():
    return [{"model_fields.width": width} for width in (1, 2)]
"""


@pytest.fixture
def own(tmp_path, request, monkeypatch):
    """Writes a file that registers a network by a unique name; returns (path, name)."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.setattr(base, "_FILES", dict(base._FILES))
    name = f"own_{request.node.name}"
    path = tmp_path / "own.py"
    path.write_text(OWN.replace("own_NUMBER", name))
    return path, name


def run(module: str, *arguments, code: int = 0) -> str:
    """Runs a command, checks its exit code, and returns its output."""
    done = forked.run(module, *arguments, flags=quick.FLAGS)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_configuration_that_registers_a_network(own, tmp_path):
    """The network is trained and swept; commands open the run by its record alone."""
    path, name = own
    folder = tmp_path / "run"
    arguments = ["--config", path, "--config.model_fields.dropout=0.2", "--workdir"]
    run("cnnjax.main", *arguments, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == f"{path}:{name}"
    assert config["model_fields"] == {"padding": "zeros", "dropout": 0.2}
    # Older records have the name without the file; they belong to the same run.
    (folder / "config.json").write_text(json.dumps(config | {"model": name}))
    run("cnnjax.main", *arguments, folder)

    run("cnnjax.sweep", "--config", path, "--workdir", tmp_path / "runs")
    rows = json.loads((tmp_path / "runs" / "sweep.json").read_text())["rows"]
    assert [row["cell"] for row in rows] == ["model_fields.width=1", "model_fields.width=2"]
    assert "conv1" in run("cnnjax.summary", config["model"])

    other = tmp_path / "other"
    run("cnnjax.main", *arguments, other, "--config.seed=1")
    runs = ["--runs", folder, other, "--method", "uniform"]
    run("cnnjax.combine", *runs, "--workdir", tmp_path / "soup")
    photograph = tmp_path / "photographs" / "a.png"
    photograph.parent.mkdir()
    PIL.Image.new("L", (8, 8), 200).save(photograph)
    run("cnnjax.predict", folder, photograph)
    weights = tmp_path / "soup" / "weights.safetensors"
    fields = ["--photographs", photograph.parent, "--stages", "block1"]
    run("cnnjax.visualize", "field", "--run", folder, *fields, "--workdir", tmp_path / "a")
    # Without the run, the network has the default number of classes from its file.
    with_weights = ["filters", "--model", config["model"], "--weights", weights]
    printed = run("cnnjax.visualize", *with_weights, "--workdir", tmp_path / "b", code=2)
    assert "of another shape: fc.weight is (10, 3)" in printed
    # The project is moved: file and run keep their places to each other.
    moved = tmp_path / "moved"
    moved.mkdir()
    for member in (path, folder):
        member.rename(moved / member.name)
    run("cnnjax.predict", moved / "run", photograph)
    printed = run("cnnjax.main", "--config", moved / path.name, *arguments[2:], moved / "run")
    assert "holds the finished run" in printed


@pytest.mark.slow
def test_the_study_reads_a_network_by_its_file(own, tmp_path):
    path, _ = own
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(3):
        PIL.Image.new("RGB", (24, 24), (80 * number, 9, 9)).save(photographs / f"{number}.png")
    changes = {
        "encoders": (f"{path}:of_colors",),
        "photographs": photographs,
        "image_size": 16,
        "paddings": ("zeros",),
        "sgd_paddings": (),
        "data": ("natural",),
        "n_train": 1,
        "n_held_out": 1,
        "n_test": 1,
        "seeds": 1,
        "sgd_steps": 1,
    }
    given = [f"--config.{key}={value}" for key, value in changes.items()]
    folder = tmp_path / "run"
    run("cnnjax.main", "--config", "configs/posenet.py", *given, "--workdir", folder)
    (cell,) = (folder / "cells").glob("own.py:of_colors-*-zeros-0.npz")
    (network,) = json.loads((folder / "inputs.json").read_text())["networks"]
    assert network == f"{path}:of_colors"
    (picture,) = folder.glob("maps_own.py:of_colors-*_natural.png")
    assert f"![{picture.name}]({picture.name})" in (folder / "report.md").read_text()


def test_a_network_is_recorded_with_its_folder(own, tmp_path, monkeypatch):
    """The file's folder is recorded, so a run opens from anywhere.

    A run whose record lacks the folder still goes on.
    """
    path, name = own
    monkeypatch.chdir(tmp_path)
    config = defaults.get_config()
    config.model = f"{path.name}:{name}"
    config = main.name_model_file(config)
    assert config.model == f"{path}:{name}"
    for recorded in (config.model, f"{path.name}:{name}", name):
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"model": recorded}))
        adopt.complete_record(config, tmp_path)
        workdir.check_config(tmp_path, config.to_dict())
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"model": "a.py:other"}))
    adopt.complete_record(config, tmp_path)
    with pytest.raises(ValueError, match="model='a.py:other' there"):
        workdir.check_config(tmp_path, config.to_dict())
    # A network of the user's is not the one of this package with the same name.
    config.model = f"{path}:lenet"
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"model": "lenet"}))
    adopt.complete_record(config, tmp_path)
    with pytest.raises(ValueError, match="model='lenet' there"):
        workdir.check_config(tmp_path, config.to_dict())


def test_a_file_that_was_edited_after_the_run_is_reported(own, tmp_path, caplog):
    """Records of earlier versions have no digest to compare the file with."""
    path, _ = own
    model = f"{path}:Own"
    run = tmp_path / "run"
    run.mkdir()
    results = {"classes": ["a", "b"], "image_shape": [8, 8, 1], "mean": [0.5], "std": [0.5]}
    recorded = results | {"network_sha256": digest_network(model)}
    files.write_json(run / "config.json", {"kind": "train", "model": model, "model_fields": {}})
    files.write_json(run / "results.json", recorded)
    save_torchvision(
        quick.variables(create_model(model, num_classes=2)), run / "weights.safetensors"
    )
    caplog.set_level("WARNING", "cnnjax")
    open_run(run)
    path.write_text(path.read_text().replace("dropout: float = 0.0", "dropout: float = 0.5"))
    assert not caplog.messages
    # A command may open many runs of this network; it says so once.
    open_run(run)
    open_run(run)
    (message,) = caplog.messages
    assert message.startswith(f"{path} has changed since the run was trained")
    caplog.clear()
    files.write_json(run / "results.json", results)
    open_run(run)
    assert not caplog.messages
    assert digest_network("lenet") is None and digest_network("nets.own:Own") is None


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion", "without_figures")
def test_a_run_goes_on_with_an_edited_file_and_says_so(own, tmp_path, capfd):
    path, _ = own
    run = tmp_path / "run"
    arguments = ["--config", str(path), "--config.batch_size=1400", "--config.parallel=jit"]
    arguments += ["--workdir", str(run)]
    assert main.main(arguments) == 0
    first = json.loads((run / "results.json").read_text())["network_sha256"]
    # As if it had been killed after its last checkpoint.
    (run / "results.json").unlink()
    path.write_text(path.read_text() + "# edited\n")
    assert "has changed since the run was trained" not in capfd.readouterr().err
    assert main.main(arguments) == 0
    assert f"{path} has changed since the run was trained" in capfd.readouterr().err
    second = json.loads((run / "results.json").read_text())["network_sha256"]
    assert first != second == digest_network(f"{path}:Own")


def test_a_moved_project_finds_its_network(own, tmp_path, monkeypatch):
    """The run's record has the file's earlier path, which ends like the present one."""
    path, name = own
    project = tmp_path / "project"
    run = project / "runs" / "a"
    run.mkdir(parents=True)
    (project / "nets").mkdir()
    path.rename(project / "nets" / "own.py")
    config = defaults.get_config()
    config.model = f"{project}/nets/own.py:{name}"
    config.epochs = 3
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    assert read_config(run).model == config.model

    moved = tmp_path / "moved"
    project.rename(moved)
    run = moved / "runs" / "a"
    present = f"{moved}/nets/own.py:{name}"
    assert read_config(run).model == present
    # Another configuration leaves the record as it is.
    before = (run / "config.json").read_text()
    config.model = present
    config.seed = 1
    adopt.complete_record(config, run)
    assert (run / "config.json").read_text() == before
    # The move comes with a damaged image, which is passed over from now on.
    config.update(seed=0, skip_damaged=True)
    adopt.complete_record(config, run)
    assert adopt.is_equivalent(config, run)
    (run / "config.json").write_text(before)
    config.skip_damaged = False
    adopt.complete_record(config, run)
    assert json.loads((run / "config.json").read_text())["model"] == present
    workdir.check_config(run, config.to_dict())

    # The run alone was moved: the file is looked for from the current folder, too.
    run.rename(tmp_path / "copied")
    moved.rename(tmp_path / "again")
    assert read_config(tmp_path / "copied").model == present
    monkeypatch.chdir(tmp_path / "again")
    assert read_config(tmp_path / "copied").model == f"{tmp_path}/again/nets/own.py:{name}"
    # There, the bare name is not enough.
    monkeypatch.chdir(tmp_path / "again" / "nets")
    assert read_config(tmp_path / "copied").model == present


def test_a_moved_network_is_spelled_as_in_the_configuration(own, tmp_path):
    """Its record is that of the configuration, through whatever folder the run is opened."""
    path, name = own
    project = tmp_path / "project"
    run = project / "runs" / "a"
    run.mkdir(parents=True)
    path.rename(project / "own.py")
    (tmp_path / "link").symlink_to(project)
    config = defaults.get_config()
    config.model = f"{project}/own.py:{name}"
    gone = config.to_dict() | {"model": f"/gone/own.py:{name}"}
    for folder in (tmp_path / "link" / "runs" / "a", project / "runs" / ".." / "runs" / "a"):
        (run / "config.json").write_text(json.dumps(gone))
        adopt.complete_record(config, folder)
        workdir.check_config(folder, config.to_dict())
    (run / "config.json").write_text(json.dumps(gone))
    assert read_config(project / "runs" / ".." / "runs" / "a").model == config.model
    # Another file of that name is another network, and the record stays.
    (tmp_path / "own.py").touch()
    config.model = f"{tmp_path}/own.py:{name}"
    adopt.complete_record(config, run)
    assert json.loads((run / "config.json").read_text()) == json.loads(json.dumps(gone))


def test_the_bare_name_of_a_moved_network_is_looked_for_nearby_only(tmp_path):
    """A file in the home folder or in /tmp may well be another project's.

    The farthest folder is that of a project whose sweep has the run.
    """
    run = tmp_path / "project" / "runs" / "sweep" / "a"
    run.mkdir(parents=True)
    recorded = {"kind": "train", "model": "/gone/own.py:Own"}
    (run / "config.json").write_text(json.dumps(recorded))
    (tmp_path / "own.py").touch()
    assert read_config(run).model == recorded["model"]
    (tmp_path / "project" / "own.py").touch()
    assert read_config(run).model == f"{tmp_path}/project/own.py:Own"


def test_a_network_recorded_in_a_folder_that_cannot_be_read_is_gone(tmp_path, monkeypatch):
    """The run comes from another user's machine, and is opened in that user's folder here."""
    recorded = {"kind": "train", "model": "/locked/nets/own.py:Own"}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    stat = os.stat

    def refuse(path, *arguments, **options):
        if str(path).endswith("nets/own.py"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert read_config(tmp_path).model == recorded["model"]


def test_the_default_folder_does_not_depend_on_where_a_network_is(tmp_path, monkeypatch):
    """Earlier versions put the network's folder into the name; their folders are still used."""
    monkeypatch.chdir(pathlib.Path(__file__).parents[1])
    parser = main.build_parser("cnnjax.main", "")

    def default_folder(model):
        arguments = ["--config", "configs/lenet_digits.py", f"--config.model={model}"]
        options, config = main.parse(parser, arguments)
        keys = config.to_dict()
        # A key of later versions, which hashed the changed keys alone.
        del keys["clip_norm"]
        return options.workdir, f"lenet_digits-{files.digest(keys)}"

    folder, earlier = default_folder(tmp_path / "old" / "own.py:Own")
    assert folder == default_folder(tmp_path / "new" / "own.py:Own")[0]
    assert folder != default_folder(tmp_path / "old" / "own.py:Other")[0]
    assert folder.name != earlier
    is_dir = pathlib.Path.is_dir
    monkeypatch.setattr(pathlib.Path, "is_dir", lambda path: path.name == earlier or is_dir(path))
    assert default_folder(tmp_path / "old" / "own.py:Own")[0].name == earlier


def test_the_nearest_file_of_a_moved_network_is_logged_once(own, tmp_path, monkeypatch, caplog):
    """A project of the same shape is the current folder; the run's own comes first."""
    _, name = own
    for project in ("mine", "other"):
        (tmp_path / project / "nets").mkdir(parents=True)
        (tmp_path / project / "nets" / "own.py").touch()
    run = tmp_path / "mine" / "runs" / "a"
    run.mkdir(parents=True)
    recorded = {"kind": "train", "model": f"/gone/project/nets/own.py:{name}"}
    (run / "config.json").write_text(json.dumps(recorded))
    monkeypatch.chdir(tmp_path / "other")
    caplog.set_level("WARNING", "cnnjax")
    for _ in range(2):
        assert read_config(run).model == f"{tmp_path}/mine/nets/own.py:{name}"
    (message,) = caplog.messages
    assert message.startswith("there is no /gone/project/nets/own.py any more")
    assert message.endswith(f"{tmp_path}/mine/nets/own.py")


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion", "without_figures")
@pytest.mark.parametrize("fill", ["none", "random"])
def test_fills_are_trained(fill, own, tmp_path):
    """Runs the whole command for one step, without drawing figures.

    One fill changes the size of maps, the other draws numbers. The derivatives of all are tested
    in test_lowering.py, and "zeros" is what other runs have.
    """
    path, _ = own
    changes = {"model_fields.padding": fill, "batch_size": 1400, "parallel": "jit"}
    given = [f"--config.{key}={value}" for key, value in changes.items()]
    run = tmp_path / "run"
    assert main.main(["--config", str(path), *given, "--workdir", str(run)]) == 0
    model = open_run(run).model
    assert (type(model).__name__, model.padding) == ("Own", fill)
    test_error = json.loads((run / "results.json").read_text())["final"]["test_error"]
    with np.load(run / "test.npz") as saved:
        assert test_error == pytest.approx((saved["labels"] != saved["predicted"]).mean())


def test_visualize_takes_a_file_and_its_weights(own, tmp_path):
    path, _ = own
    model = f"{path}:of_colors"
    save_torchvision(quick.variables(create_model(model)), tmp_path / "a.safetensors")
    arguments = ["--model", model, "--weights", str(tmp_path / "a.safetensors")]
    assert visualize.main(["filters", *arguments, "--workdir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["shape"] == [3, 3, 3, 3]


def test_published_weights_are_those_of_registered_networks(own, capsys):
    path, _ = own
    model = f"{path}:Own"
    for command, arguments in ((evaluate, ["--data_dir", "data"]), (predict, ["a.jpg"])):
        assert command.main([model, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and model in line


def test_a_network_by_its_file(own):
    path, name = own
    for model in (f"{path}:Own", f"{path}:{name}"):
        network = create_model(model, width=5, num_classes=7)
        assert type(network).__name__ == "Own"
        assert (network.width, network.num_classes, network.dropout) == (5, 7, 0.0)
    assert create_model(f"{path}:narrow", dropout=0.5) == create_model(name, width=2, dropout=0.5)
    assert create_model("cnnjax.models.lenet:LeNet") == create_model("lenet")
    # jax caches compiled functions by class, so every call must return the same class.
    assert type(create_model(f"{path}:Own")) is type(create_model(f"{path}:Own"))


@pytest.mark.slow
def test_home_in_the_name_of_a_file(own, monkeypatch):
    path, _ = own
    monkeypatch.setenv("HOME", str(path.parent))
    assert create_model("~/own.py:Own", width=5).width == 5


def test_a_tilde_in_the_name_of_a_file_that_is_not_there():
    message = "^model='~own.py:Net': there is no Python file '.*/~own.py'$"
    with pytest.raises(ValueError, match=message):
        create_model("~own.py:Net")


class Endless(base.Network):
    """A network whose walk never yields logits."""

    @nn.nowrap
    def walk(self, x, train):
        yield "stem", x


class Returning(base.Network):
    """A network whose walk returns logits instead of yielding them."""

    @nn.nowrap
    def walk(self, x, train):
        return x.mean((1, 2))


def test_a_walk_without_logits_is_named():
    image = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match="walk of Endless ends without yielding .'logits', logits"):
        Endless().apply({}, image)
    assert list(Endless().apply({}, image, last="stem", method="stages")) == ["stem"]
    with pytest.raises(ValueError, match="walk of Returning returns a .*; it is to yield its sta"):
        Returning().apply({}, image)


def test_what_a_file_lacks_is_named(own):
    path, name = own
    with pytest.raises(ValueError, match="own.py has no network 'Owner'"):
        create_model(f"{path}:Owner")
    with pytest.raises(ValueError, match="size=1 is not a field of .*:Own; it accepts num_classes"):
        create_model(f"{path}:Own", size=1)
    with pytest.raises(ValueError, match="cannot be built: .*unexpected keyword argument 'size'"):
        create_model(f"{path}:narrow", size=1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\nclass Net(:", "broken_module.py', line 2: SyntaxError: "),
        (
            "x = 1\n\nclass Net(Nothing): ...",
            "broken_module.py', line 3: NameError: name 'Nothing'",
        ),
        (
            "import nowhere_at_all",
            "broken_module.py', line 1: ModuleNotFoundError: No module named",
        ),
    ],
)
def test_an_error_in_a_module_is_one_line_with_its_place(text, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module.py").write_text(text)
    with pytest.raises(ValueError, match="model='broken_module:Net': .*" + message) as error:
        create_model("broken_module:Net")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", [".nets", "", "nets."])
def test_a_place_that_no_module_can_have_is_named(place):
    with pytest.raises(ValueError, match=f"{place!r} is not the name of a module"):
        create_model(f"{place}:Net")


@pytest.mark.slow
def test_a_name_belongs_to_one_file(own, tmp_path, monkeypatch):
    path, name = own
    monkeypatch.syspath_prepend(tmp_path)
    source.import_file(path)
    # An import under the module's name runs the file again.
    with mock.patch.dict(sys.modules):
        module = importlib.import_module("own")
    assert pathlib.Path(module.__file__) == path
    assert type(create_model(name)) is module.Own
    other = tmp_path / "other.py"
    other.write_text(f"from cnnjax.models import base, lenet\nbase.register({name!r}, lenet.LeNet)")
    with pytest.raises(ValueError, match=f"other.py', line 2: .* {name!r} is registered twice"):
        source.import_file(other)
    with pytest.raises(ValueError, match="'lenet' is registered twice"):
        base.register("lenet", module.Own)
    with pytest.raises(ValueError, match="has a colon"):
        base.register("own:net", module.Own)
