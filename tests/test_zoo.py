"""The comparison with torchvision mixes no times of several machines or versions."""

import dataclasses
import types

from quick import exit_code

from experiments import zoo


def frameworks(version: str) -> zoo.Frameworks:
    """Returns stand-ins for PyTorch and torchvision, which tests do not need."""
    names = ["resnet18", "resnet34", "vgg11"]
    models = types.SimpleNamespace(list_models=lambda module: names)
    torch = types.SimpleNamespace(__version__=version, set_num_threads=lambda count: None)
    return zoo.Frameworks(torch, types.SimpleNamespace(__version__="0.28.0", models=models))


def test_times_of_two_environments_are_not_mixed(tmp_path, monkeypatch, capsys):
    """The same environment goes on with more networks; another version is refused."""
    measured = []

    def measure(point, options, shared):
        measured.append(point.model)
        return {name: 1 for name in zoo.COLUMNS if name != "model"}

    study = dataclasses.replace(zoo.STUDY, measure=measure)
    arguments = ["--workdir", str(tmp_path / "run"), "--models"]
    monkeypatch.setattr(zoo, "load_torchvision", lambda: frameworks("2.13.0"))
    assert study.main([*arguments, "resnet18"]) == 0
    assert study.main([*arguments, "resnet*"]) == 0
    assert measured == ["resnet18", "resnet34"]
    assert "torch\n2.13.0, torchvision 0.28.0" in (tmp_path / "run" / "report.md").read_text()

    monkeypatch.setattr(zoo, "load_torchvision", lambda: frameworks("2.14.0"))
    assert study.main([*arguments, "*"]) == 2
    assert "environment.torch='2.13.0' there, '2.14.0' now" in capsys.readouterr().err
    # A report alone names the versions that measured.
    assert study.main([*arguments, "resnet*"]) == 0
    assert "torch\n2.13.0, torchvision 0.28.0" in (tmp_path / "run" / "report.md").read_text()


def test_the_report_divides_as_the_pages_do():
    """Above 1, cnnjax is faster. Results, also those of earlier versions, hold the inverse."""
    result = dict.fromkeys(zoo.COLUMNS, 1)
    result |= {"model": "vgg11", "forward_ms": 10, "forward_ratio": 0.5, "step_ratio": 4}
    machine = dict.fromkeys(("threads", "processor", "torch", "torchvision", "jax", "device"), "")
    options = types.SimpleNamespace(batch=4, environment=machine)
    text = zoo.report([result], options).text
    assert text.count("| PyTorch's time / ours |") == 2
    assert text.endswith("| 10 | 2.00 | 1 | 0.25 |\n")


def test_a_batch_of_one_image_is_refused(capsys):
    """Some networks' BatchNorm would have a single value, which PyTorch refuses."""
    assert exit_code(zoo.main, ["--batch", "1"]) == 2
    assert "'1' is not a whole number of at least 2" in capsys.readouterr().err
