"""The frame of a study: resumable points, one work directory, one report."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import textwrap
from typing import NamedTuple

import matplotlib
import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure
from quick import exit_code

from cnnjax import study
from cnnjax.runtime import claims, files, workdir
from cnnjax.runtime.command import Parser
from cnnjax.train import defaults
from experiments import position_neurons, probe, sampling


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Returns the study in the docstring of `cnnjax.study`, as its file has it, as a module."""
    _, text = pathlib.Path(study.__file__).read_text().split("one file in `experiments/`:\n\n")
    text = text.partition("\n'''\n")[0]
    path = tmp_path_factory.mktemp("example") / "blur.py"
    path.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location("blur", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path):
    return json.loads(path.read_text())


def test_the_example_writes_a_table_and_a_figure(example, tmp_path, capsys):
    assert example.main(["--workdir", str(tmp_path), "--seeds", "2"]) == 0
    results = read(tmp_path / "blur.json")
    assert [(row["fill"], row["seed"]) for row in results] == [
        (fill, seed) for fill in ("zeros", "reflect", "circular") for seed in (0, 1)
    ]
    # The mean of noise from 0 to 1 is about 0.5, and its mean distance from that is 0.25.
    assert all(0.15 < row["error"] < 0.35 for row in results)
    text = (tmp_path / "report.md").read_text()
    errors = [row["error"] for row in results[:2]]
    assert f"| zeros | {np.mean(errors):.3f} ± {np.std(errors, ddof=1):.3f} | 2 |" in text
    assert text in capsys.readouterr().out
    assert (tmp_path / "blur.png").stat().st_size > 1000


def test_the_folder_of_another_study_is_refused(example, tmp_path, capsys):
    """Both studies have the same options and points."""
    command = ["--workdir", str(tmp_path), "--seeds", "1"]
    assert example.main(command) == 0
    record = read(tmp_path / "config.json")
    other = dataclasses.replace(example.STUDY, results="sharp.json")
    assert other.main(command) == 2
    message = "holds a run of another configuration (study='blur' there, 'sharp' now); choose"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sharp.json").exists()
    # An earlier version did not record the study.
    del record["study"]
    files.write_json(tmp_path / "config.json", record)
    assert example.main(command) == 0
    # Its name is recorded with the next point.
    assert example.main([*command[:-1], "2"]) == 0
    assert other.main(command) == 2


def test_colors_of_figures_can_be_told_apart(example, tmp_path):
    """Lines and bars have Petroff's colors (arXiv 2107.02270), and matplotlib's own return."""

    def report(results, options):
        figure = Figure()
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color="C0", lw=20)
        axis.bar([2], [1], color="C1")
        return example.report(results, options)._replace(figures={"colors.png": figure})

    before = matplotlib.rcParams["axes.prop_cycle"]
    again = dataclasses.replace(example.STUDY, report=report)
    assert again.main(["--workdir", str(tmp_path), "--seeds", "1"]) == 0
    with PIL.Image.open(tmp_path / "colors.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(image.width * image.height)}
    assert {(0x3F, 0x90, 0xDA), (0xFF, 0xA9, 0x0E)} <= colors
    assert matplotlib.rcParams["axes.prop_cycle"] == before


def test_a_later_call_measures_only_new_points(example, tmp_path):
    command = ["--workdir", str(tmp_path), "--seeds"]
    assert example.main([*command, "1"]) == 0
    first = read(tmp_path / "blur.json")
    measured = []

    def measure(point, options):
        measured.append(point)
        return example.measure(point, options)

    again = dataclasses.replace(example.STUDY, measure=measure)
    assert again.main([*command, "2"]) == 0
    assert measured == [example.Point(fill, 1) for fill in example.FILLS]
    assert study.select(read(tmp_path / "blur.json"), seed=0) == first


def test_an_interrupted_call_goes_on_where_it_stopped(example, tmp_path, capsys):
    command = ["--workdir", str(tmp_path / "a"), "--seeds", "2"]

    def stop(point, options):
        if point.seed == 1:
            raise KeyboardInterrupt
        return example.measure(point, options)

    assert dataclasses.replace(example.STUDY, measure=stop).main(command) == 75
    assert (
        "run the same command again to continue after the last finished point"
        in capsys.readouterr().err
    )
    assert [path.name for path in (tmp_path / "a" / "points").iterdir()] == [
        "fill=zeros,seed=0.json"
    ]
    assert not (tmp_path / "a" / "report.md").exists()
    assert example.main(command) == 0
    assert example.main(["--workdir", str(tmp_path / "b"), "--seeds", "2"]) == 0
    assert read(tmp_path / "a" / "blur.json") == read(tmp_path / "b" / "blur.json")


def test_a_work_directory_belongs_to_its_options(example, tmp_path, capsys):
    command = ["--workdir", str(tmp_path), "--seeds", "1"]
    assert example.main(command) == 0
    assert example.main([*command, "--size", "8"]) == 2
    assert "another configuration (size=16 there, 8 now)" in capsys.readouterr().err


def test_a_folder_that_was_bound_to_an_axis_takes_more_points(example, tmp_path, capsys):
    """Earlier versions recorded options that choose points, such as the number of seeds."""
    bound = dataclasses.replace(example.STUDY, axes=())
    command = ["--workdir", str(tmp_path), "--seeds"]
    assert bound.main([*command, "1"]) == 0
    assert read(tmp_path / "config.json")["seeds"] == 1
    assert bound.main([*command, "2"]) == 2
    assert example.main([*command, "2"]) == 0
    assert len(read(tmp_path / "blur.json")) == 6
    # All other options still bind it.
    assert example.main([*command, "2", "--size", "8"]) == 2
    assert "another configuration (size=16 there, 8 now)" in capsys.readouterr().err


@pytest.mark.parametrize("study_, axis", [(position_neurons, "seeds"), (probe, "repeats")])
def test_the_number_of_repetitions_is_an_axis(study_, axis):
    assert axis in study_.STUDY.axes


def test_the_work_directory_is_checked_before_anything_is_loaded(example, tmp_path):
    command = ["--workdir", str(tmp_path), "--seeds", "1"]
    assert example.main(command) == 0
    loading = dataclasses.replace(example.STUDY, load=pytest.fail)
    assert loading.main([*command, "--size", "8"]) == 2


def test_a_call_that_measures_nothing_loads_nothing(example, tmp_path):
    command = ["--workdir", str(tmp_path), "--seeds", "1"]
    assert example.main(command) == 0
    report = (tmp_path / "report.md").read_text()
    loading = dataclasses.replace(example.STUDY, load=pytest.fail)
    assert loading.main(command) == 0
    assert (tmp_path / "report.md").read_text() == report


def test_a_call_stopped_at_its_report_goes_on_from_its_points(example, tmp_path):
    command = ["--workdir", str(tmp_path), "--seeds", "1"]

    def stop(results, options):
        raise KeyboardInterrupt

    assert dataclasses.replace(example.STUDY, report=stop).main(command) == 75
    assert dataclasses.replace(example.STUDY, measure=pytest.fail).main(command) == 0


def test_a_second_process_is_refused(example, tmp_path, capsys):
    with claims.claim(tmp_path):
        assert example.main(["--workdir", str(tmp_path), "--seeds", "1"]) == 2
    assert "in use by process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_report_names_the_environment_that_measured(example, tmp_path, monkeypatch):
    """A call that measures nothing keeps the record; one that measures more adds its own."""
    command = ["--workdir", str(tmp_path), "--seeds"]
    assert example.main([*command, "1"]) == 0
    environment = (tmp_path / "environment.json").read_text()
    revision = read(tmp_path / "environment.json")["git_revision"]
    report = (tmp_path / "report.md").read_text()
    _, _, section = report.partition("## Environment\n")
    assert "numpy" in section and f"revision {revision or 'unknown'}.\n" in section

    monkeypatch.setattr(workdir, "_git_revision", lambda: "a later one")
    assert example.main([*command, "1"]) == 0
    assert (tmp_path / "environment.json").read_text() == environment
    assert (tmp_path / "report.md").read_text() == report
    assert example.main([*command, "2"]) == 0
    _, _, section = (tmp_path / "report.md").read_text().partition("## Environment\n")
    last, earlier = section.split("An earlier start of the run: ")
    assert "revision a later one." in last and f"revision {revision or 'unknown'}.\n" in earlier


def test_photographs_of_other_names_or_sizes_are_refused(example, tmp_path, capsys):
    """One more photograph would divide them in another way."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"some pixels")

    def add_options(parser):
        example.add_options(parser)
        parser.add_photographs()

    changed = dataclasses.replace(example.STUDY, add_options=add_options, files=("photographs",))
    place = tmp_path / "run"
    command = ["--workdir", str(place), "--photographs", str(folder), "--seeds"]
    assert changed.main([*command, "1"]) == 0
    assert changed.main([*command, "2"]) == 0
    (folder / "b.png").write_bytes(b"others")
    capsys.readouterr()
    assert changed.main([*command, "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "(contents.photographs='1 file(s), digest " in line and "there, '2 file(s), " in line
    # A report alone reads no photographs.
    record = read(place / "config.json")
    assert changed.main([*command, "2"]) == 0
    assert read(place / "config.json") == record

    # The work directory of an earlier version has no such record, and gets one.
    contents = record.pop("contents")
    (place / "config.json").write_text(json.dumps(record))
    assert changed.main([*command, "3"]) == 0
    assert contents != read(place / "config.json")["contents"]
    (folder / "b.png").write_bytes(b"of another size")
    assert changed.main([*command, "4"]) == 2


def test_a_report_alone_needs_no_photographs(example, tmp_path, capsys):
    def add_options(parser):
        example.add_options(parser)
        parser.add_photographs()

    changed = dataclasses.replace(example.STUDY, add_options=add_options, files=("photographs",))
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"some pixels")
    place = tmp_path / "run"

    def run(seeds, photographs=folder):
        command = ["--workdir", str(place), "--seeds", str(seeds)]
        return changed.main([*command, "--photographs", str(photographs)])

    assert run(1) == 0
    record = (place / "config.json").read_bytes()
    (folder / "a.png").unlink()
    for _ in range(2):
        (place / "report.md").unlink()
        assert run(1) == 0 and (place / "report.md").exists()
        assert (place / "config.json").read_bytes() == record
        if folder.exists():
            folder.rmdir()
    capsys.readouterr()
    for seeds, photographs in ((2, folder), (1, tmp_path / "mistyped")):
        assert run(seeds, photographs) == 2
        message = f"error: photographs={str(photographs)!r} is not a folder\n"
        assert capsys.readouterr().err == message


def test_files_may_be_elsewhere_if_their_contents_are_the_same(example, tmp_path, capsys):
    def add_options(parser):
        example.add_options(parser)
        parser.add_photographs()
        parser.add_argument("--weights")
        parser.add_trained()

    files = ("photographs", "weights", "trained")
    changed = dataclasses.replace(example.STUDY, add_options=add_options, files=files)

    def run(folder, missing, seeds):
        command = ["--workdir", str(tmp_path / "run"), "--seeds", str(seeds)]
        command += ["--photographs", str(folder / "photographs"), "--weights", str(folder / "file")]
        return changed.main([*command, "--trained", "resnet18", str(folder / "file"), missing])

    for name, content in (("old", b"weights"), ("new", b"weights"), ("other", b"WEIGHTS")):
        (tmp_path / name / "photographs").mkdir(parents=True)
        (tmp_path / name / "photographs" / "a.png").write_bytes(b"some pixels")
        (tmp_path / name / "file").write_bytes(content)
    assert run(tmp_path / "old", "fc", 1) == 0
    assert run(tmp_path / "new", "fc", 2) == 0
    assert read(tmp_path / "run" / "config.json")["weights"] == str(tmp_path / "old" / "file")
    capsys.readouterr()
    assert run(tmp_path / "other", "fc", 3) == 2
    assert "contents.resnet18='SHA-256 " in capsys.readouterr().err
    assert run(tmp_path / "new", "layer4", 3) == 2
    assert "['fc']] there, " in capsys.readouterr().err


def test_a_file_of_weights_that_is_missing_later_is_named(example, tmp_path, capsys):
    def add_options(parser):
        example.add_options(parser)
        parser.add_argument("--weights")
        parser.add_trained()

    declared = ("weights", "trained")
    changed = dataclasses.replace(example.STUDY, add_options=add_options, files=declared)
    file = tmp_path / "file"
    file.write_bytes(b"weights")

    def run(seeds, **files):
        command = ["--workdir", str(tmp_path / "run"), "--seeds", str(seeds)]
        names = {"weights": file, "resnet18": file} | files
        command += ["--weights", str(names["weights"])]
        return changed.main([*command, "--trained", "resnet18", str(names["resnet18"])])

    assert run(1) == 0
    capsys.readouterr()
    for seeds, name in ((2, "weights"), (2, "resnet18"), (1, "weights")):
        assert run(seeds, **{name: tmp_path / "mistyped"}) == 2
        (line,) = capsys.readouterr().err.splitlines()
        wrong = f"{name}={str(tmp_path / 'mistyped')!r} is neither a file of weights nor"
        assert line == f"error: {wrong} a finished training run"
    file.unlink()
    # A report alone needs no weights.
    assert run(1) == 0
    assert run(2) == 2
    # A name that never was a file's is none that is missing.
    command = ["--workdir", str(tmp_path / "named"), "--weights", "random", "--seeds"]
    assert changed.main([*command, "1"]) == changed.main([*command, "2"]) == 0


def test_photographs_that_are_drawn_do_not_join_the_first_ones(example, tmp_path, capsys):
    """Earlier versions took the first photographs of each part, and recorded nothing of it."""

    def add_options(parser):
        example.add_options(parser)
        parser.add_photographs()

    draws = lambda point, options: point.seed > 0
    changed = dataclasses.replace(
        example.STUDY, add_options=add_options, files=("photographs",), draws=draws
    )
    command = ["--workdir", str(tmp_path), "--seeds"]
    assert changed.main([*command, "1"]) == 0
    record = read(tmp_path / "config.json")
    assert record.pop("photographs_drawn") == "at random"
    (tmp_path / "config.json").write_text(json.dumps(record))
    # A report of what is there needs no photographs.
    assert changed.main([*command, "1"]) == 0
    assert changed.main([*command, "2"]) == 2
    message = "begun by a version that took the first of photographs='', which are drawn at random"
    assert message in capsys.readouterr().err
    assert read(tmp_path / "config.json") == record
    # Points without photographs are measured, and leave the record as it was begun.
    (tmp_path / "points" / "fill=zeros,seed=0.json").unlink()
    assert changed.main([*command, "1"]) == 0
    assert read(tmp_path / "config.json") == record


def test_files_of_weights_are_told_apart_by_their_bytes(tmp_path):
    file, run = tmp_path / "a.safetensors", tmp_path / "run"
    run.mkdir()
    for path in (file, run / "weights.safetensors"):
        path.write_bytes(b"weights")

    def contents(settings):
        paths = study._list_files(settings, tuple(settings))
        return study._digest_contents(paths, needs_photographs=True)

    (digest,) = contents({"weights": file}).values()
    assert contents({"weights": [("a", str(run)), ("b", "absent")]}) == {"a": digest, "b": "absent"}
    assert contents({"trained": {"a": (str(file), ("fc",))}}) == {"a": digest}
    file.write_bytes(b"WEIGHTS")
    assert contents({"weights": file}) != {"weights": digest}
    assert contents({"weights": None, "photographs": None}) == {}


def test_studies_declare_the_options_that_name_files():
    declared = []
    for path in (pathlib.Path(__file__).parents[1] / "experiments").glob("*.py"):
        if "study.Study(" in path.read_text():
            frame = importlib.import_module(f"experiments.{path.stem}").STUDY
            parser = Parser()
            frame.add_options(parser)
            names = {action.dest for action in parser._actions}
            names &= {"photographs", "weights", "trained"}
            assert names - set(frame.axes) == set(frame.files), path
            declared += frame.files
    assert {"photographs", "weights", "trained"} == set(declared)


def test_a_network_of_a_study_may_find_its_files_elsewhere(tmp_path):
    """Other spellings of the data's folder, and a moved study, are no other configuration."""
    trained = defaults.get_config()
    trained.initial_weights = "/old/run/start"
    folder = tmp_path / "run"
    results = {"final": 1}

    def train(config, folder):
        files.write_json(folder / "results.json", results)

    workdir.run_once(train, trained, folder, study.update_record)
    # Earlier versions did not record all keys.
    record = read(folder / "config.json")
    del record["clip_norm"]
    files.write_json(folder / "config.json", record)
    trained.update(initial_weights="/new/run/start", data_dir="/new/data")
    assert workdir.run_once(pytest.fail, trained, folder, study.update_record) == results
    assert read(folder / "config.json")["data_dir"] == "/new/data"
    # The directory of a study whose weights may change is not bound to their contents.
    trained.initial_weights = "/other"
    with pytest.raises(ValueError, match="initial_weights='/new/run/start' there, '/other' now"):
        adopt = functools.partial(study.update_record, keys=("data_dir", "dataset"))
        workdir.run_once(pytest.fail, trained, folder, adopt)
    # A refused call leaves the record as it was.
    trained.epochs += 1
    with pytest.raises(ValueError, match="another configuration"):
        workdir.run_once(pytest.fail, trained, folder, study.update_record)
    assert read(folder / "config.json")["initial_weights"] == "/new/run/start"


def test_errors_are_one_line_and_nothing_is_written(example, tmp_path, capsys):
    def load(options):
        raise ValueError("size=16 is odd")

    assert dataclasses.replace(example.STUDY, load=load).main(["--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: size=16 is odd\n"
    assert not list(tmp_path.iterdir())
    assert exit_code(example.main, ["--seeds", "0"]) == 2
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err


def test_a_refused_measurement_leaves_no_folder(example, tmp_path):
    def measure(point, options):
        raise ValueError("a.jpg is not a readable image")

    refusing = dataclasses.replace(example.STUDY, measure=measure)
    assert refusing.main(["--workdir", str(tmp_path / "a" / "b"), "--seeds", "1"]) == 2
    assert not list(tmp_path.iterdir())


def test_help_shows_the_docstring(example, capsys):
    assert exit_code(example.main, ["--help"]) == 0
    assert example.__doc__ in capsys.readouterr().out


def test_what_is_loaded_is_shared_by_all_points(example, tmp_path):
    shared = []

    def measure(point, options, loaded):
        shared.append(loaded)
        return example.measure(point, options)

    changed = dataclasses.replace(example.STUDY, load=lambda options: object(), measure=measure)
    assert changed.main(["--workdir", str(tmp_path), "--seeds", "1"]) == 0
    assert len(shared) == 3 and len(set(shared)) == 1


class Point(NamedTuple):
    name: str
    rate: float
    seed: int


def test_points_are_named_by_their_fields():
    assert study.label(Point("a", 0.50, 3)) == "name=a,rate=0.5,seed=3"


def test_close_numbers_name_different_files():
    """In six digits, the second point would read the first one's result."""
    rates = (0.1234567, 0.1234568, np.float64(1 / 3), 1e-7, 2.0)
    assert [study.label(Point("a", rate, 3)).split(",")[1] for rate in rates] == [
        "rate=0.1234567",
        "rate=0.1234568",
        "rate=0.3333333333333333",
        "rate=1e-07",
        "rate=2",
    ]


def test_a_network_of_a_file_names_files():
    first, second = (study.label(Point(f"{folder}/own.py:Own", 0.5, 3)) for folder in ("a", "/b"))
    for text in (first, second):
        assert re.fullmatch(r"name=own\.py:Own-[0-9a-f]{8},rate=0\.5,seed=3", text)
    assert first != second


def test_an_edited_network_of_finished_points_is_named(example, tmp_path, capfd):
    """Points of the network before and after would be averaged."""
    file = tmp_path / "own.py"
    file.write_text("# before")
    place = tmp_path / "run"
    changed = dataclasses.replace(
        example.STUDY,
        points=lambda options: [Point(f"{file}:Own", 0.5, n) for n in range(options.seeds)],
        measure=lambda point, options: {"error": 1.0},
        report=lambda results, options: study.Report("", {}),
    )
    command = ["--workdir", str(place), "--seeds"]
    assert changed.main([*command, "2"]) == 0
    assert changed.main([*command, "3"]) == 0
    assert "has changed" not in capfd.readouterr().err

    file.write_text("# after")
    assert changed.main([*command, "4"]) == 0
    message = f"{file} has changed since points were measured; the results may mix two networks"
    assert capfd.readouterr().err.count(message) == 1

    # A report needs no network, and earlier versions recorded no digests.
    file.unlink()
    assert changed.main([*command, "4"]) == 0
    file.write_text("# again")
    for path in (place / "points").iterdir():
        result = read(path)
        del result["network_sha256"]
        files.write_json(path, result)
    assert changed.main([*command, "4"]) == 0
    assert "has changed" not in capfd.readouterr().err


def test_results_are_selected_by_their_fields():
    results = [
        {"name": "a", "seed": 0, "scores": [1, 2]},
        {"name": "b", "seed": 0, "scores": [3, 4]},
        {"name": "a", "seed": 1, "scores": [5, 6]},
    ]
    assert study.select(results, name="a") == [results[0], results[2]]
    assert study.unique(results, "name") == ["a", "b"]
    assert study.values(results, "scores", name="a").tolist() == [[1, 2], [5, 6]]
    assert study.values(results, "seed", name="b", seed=0).tolist() == [0]


def test_a_point_asked_for_twice_is_refused(tmp_path, capsys):
    """Such a point would count twice in every mean and make intervals too small."""
    done = sampling.main(["--networks", "convnet", "convnet", "--workdir", str(tmp_path / "run")])
    assert done == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(",padding=zeros,seed=0 is asked for 2 times; name each once")
    assert not (tmp_path / "run").exists()
