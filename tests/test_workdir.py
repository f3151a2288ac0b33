import json
import pathlib

import matplotlib.figure
import pytest

from cnnjax import report, workdir


@pytest.mark.parametrize("write", [lambda path: workdir.write(path, "new"), lambda path: workdir.write_json(path, {"a": 1}),
                                   lambda path: workdir.write_figure(path, matplotlib.figure.Figure((1, 1)))])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_file_appears_whole_or_not_at_all(write, error, tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_text("old")
    whole = pathlib.Path.write_bytes

    def fails_half_way(self, content):
        whole(self, content[:len(content) // 2])
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(pathlib.Path, "write_bytes", fails_half_way)
        write(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("kept", "old")]
    write(path)
    assert path.read_bytes()[:3] != b"old" and len(list(tmp_path.iterdir())) == 1


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        workdir.write_json(tmp_path / "a.json", {"spc": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_directory_belongs_to_one_configuration(tmp_path):
    config = {"seed": 0, "paddings": ("zeros", "none"), "nested": {"a": 1}}
    folder = workdir.prepare(tmp_path / "new" / "run", config)
    assert workdir.prepare(folder, config) == folder
    assert json.loads((folder / "environment.json").read_text())["seed"] == 0
    (folder / "results.json").write_text("{}")
    (folder / "environment.json").write_text("what made the results")
    assert workdir.prepare(folder, config) == folder and (folder / "environment.json").read_text() == "what made the results"
    for change, message in (({"seed": 1}, "seed=0 there, 1 now"), ({"paddings": ("zeros",)}, r"paddings=\['zeros', 'none'\] there, \['zeros'\] now"),
                            ({"nested": {"a": 2}}, "nested.a=1 there, 2 now"), ({"extra": 3}, "extra=None there, 3 now")):
        with pytest.raises(ValueError, match=f"holds a run of another configuration \\({message}\\); choose another --workdir"):
            workdir.prepare(folder, config | change)
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(config))
    (folder / "config.json").write_text("{ torn")
    with pytest.raises(ValueError, match="holds a config.json that is not JSON"):
        workdir.prepare(folder, config)


def test_a_report_needs_results(tmp_path):
    with pytest.raises(ValueError, match="has no config.json, environment.json, results.json: there is no finished run to report on"):
        report.write(tmp_path)
    for name in ("config", "environment"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "results.json").write_text('{"kind": "dance"}')
    with pytest.raises(ValueError, match="kind='dance' of .*results.json is not one of position"):
        report.write(tmp_path)
