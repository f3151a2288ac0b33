"""Ensembles against soups, and dropout's redundancy.

Small cases are compared with brute force; whole experiments run on digits.
"""

import argparse
import functools
import itertools
import json
import pathlib

import flax.linen as nn
import numpy as np
import pytest
import scipy.stats

from cnnjax.combine import combination
from cnnjax.data import arrays
from cnnjax.models import Network, base
from cnnjax.models.mlp import MLP
from cnnjax.nn import Dense
from cnnjax.runtime import tables
from cnnjax.train import defaults, loop
from experiments import dropout, ensemble_vs_soup

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Linear(Network):
    """A single linear layer, which compiles quickly."""

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (8, 8, 1)

    @nn.nowrap
    def walk(self, x, train):
        yield "logits", Dense(self.num_classes, name="fc")(x.reshape(len(x), -1))


@pytest.fixture
def quick(monkeypatch):
    """Restricts training runs to one device and skips their figures."""

    def on_one_device(default=defaults.get_config):
        config = default()
        config.parallel = "jit"
        return config

    monkeypatch.setattr(defaults, "get_config", on_one_device)
    monkeypatch.setattr(loop.report, "write", lambda folder: None)
    monkeypatch.setitem(base._REGISTRY, "linear", Linear)
    monkeypatch.setitem(base._REGISTRY, "mlp3", functools.partial(MLP, hidden=(64, 64)))


# ------------------------------------------------------------------ ensembles against soups


@pytest.mark.slow
def test_ensembles_against_soups_from_the_command_line(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ensemble_vs_soup, "DATASET", "digits")
    monkeypatch.setattr(ensemble_vs_soup, "EMA_DECAY", 0.5)
    monkeypatch.setattr(combination, "_LEARNED_STEPS", 5)
    sizes = "--members 4 --train 640 --validation 100 --start_epochs 2 --epochs 1 --repetitions 1"
    command = ["--workdir", str(tmp_path), "--model", "linear", *sizes.split()]
    assert ensemble_vs_soup.main(command) == 0, capsys.readouterr().err
    place = tmp_path / "repetition0"

    def read(*parts):
        return json.loads(place.joinpath(*parts).read_text())

    def of_group(group):
        return [read(group, run.name, "results.json") for run in sorted((place / group).iterdir())]

    def errors(group):
        return [results["final"]["test_error"] for results in of_group(group)]

    results = json.loads((tmp_path / "ensemble_vs_soup.json").read_text())
    assert {result["repetition"] for result in results} == {0}
    rows = {(result["group"], result["method"]): result for result in results}
    assert len(rows) == len(results) == 16
    for group in ("fine-tuned", "independent"):
        mean = 100 - 100 * np.mean(errors(group))
        assert rows[group, "single, mean"]["accuracy"] == pytest.approx(mean)
    assert len(errors("fine-tuned")) == 4
    assert len(errors("independent")) == 2
    # A run that averages its parameters reports the test error of the average.
    assert rows["start", "polyak"]["accuracy"] == pytest.approx(100 - 100 * errors("start")[0])

    alone = {"restarts": ("independent", "single, mean"), "start": ("start", "last iterate")}
    for (group, method), row in rows.items():
        single = rows[alone.get(group, (group, "single, mean"))]
        assert row["gain"] == pytest.approx(row["accuracy"] - single["accuracy"])
        passes = {
            "ensemble": 4 if group == "fine-tuned" else 2,
            "ensemble-logits": 4,
            "snapshot": 3,
        }
        assert row["passes"] == passes.get(method, 1)
        epochs = {
            "fine-tuned": 3 if "single" in method else 6,
            "independent": 3 if "single" in method else 6,
            "restarts": 3,
            "start": 2,
        }
        assert row["epochs"] == epochs[group]
    snapshots = read("combined", "restarts", "snapshot", "results.json")["ingredients"]
    assert snapshots == ["step 10", "step 20", "step 30"]
    # Fine-tuned networks begin with the trained parameters of `start`, independent ones do not.
    first = {}
    for group in ("start", "fine-tuned", "independent"):
        first[group] = [results["history"][0]["train_loss"] for results in of_group(group)]
    assert max(first["fine-tuned"]) < min(first["start"] + first["independent"])
    report = (tmp_path / "report.md").read_text()
    assert "D7" in report and "D8" in report
    assert (tmp_path / "ensemble_vs_soup.png").stat().st_size > 1000

    # Finished runs are not repeated, and other settings are refused.
    monkeypatch.setattr(loop, "run", pytest.fail)
    monkeypatch.setattr(ensemble_vs_soup.combine, "run", pytest.fail)
    assert ensemble_vs_soup.main(command) == 0
    capsys.readouterr()
    assert ensemble_vs_soup.main([*command, "--epochs", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: workdir=")
    assert (tmp_path / "report.md").read_text() == report


@pytest.mark.slow
def test_wrong_arguments_of_soups_are_named(tmp_path, capsys):
    command = ["--workdir", str(tmp_path / "out")]
    assert ensemble_vs_soup.main([*command, "--train", "49000"]) == 2
    message = "error: train=49000 and validation=2000 are more than CIFAR-10's 50000"
    assert message in capsys.readouterr().err
    assert ensemble_vs_soup.main([*command, "--model", "tutorial"]) == 2
    assert "model='tutorial' is not known" in capsys.readouterr().err
    assert ensemble_vs_soup.main([*command, "--start_epochs", "2"]) == 2
    assert "error: start_epochs=2 is less than epochs=3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_members_differ_and_seeds_are_not_used_twice(quick):
    options = argparse.Namespace(
        model="tutorial_net",
        train=1000,
        validation=100,
        members=8,
        start_epochs=2,
        epochs=1,
        data_dir="data",
    )
    folder = pathlib.Path("runs")
    plans = [ensemble_vs_soup.plan(folder, options, repetition) for repetition in (0, 1)]
    tuned = [config for place, config in plans[0].items() if place.parent.name == "fine-tuned"]
    assert len({(config.schedule.learning_rate, config.augment.flip) for config in tuned}) == 8
    seeds = [config.seed for runs in plans for config in runs.values()]
    assert len(set(seeds)) == len(seeds) == 2 * (1 + 8 + 4 + 1)


def test_intervals_and_judgments():
    values = [1.0, 2.0, 4.0]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert tables.half_width(values) == pytest.approx((high - low) / 2)
    assert tables.deviation(values) == pytest.approx(np.sqrt(7 / 3))
    assert tables.deviation([1.0]) is None and tables.deviation(np.array([])) is None
    assert tables.judge([1.0, 1.1, 1.2]) == "holds"
    assert tables.judge([-1.0, -1.1, -1.2]) == "does not hold"
    assert tables.judge([-1.0, 1.0, 2.0]) == "is not decided by n=3"
    assert tables.judge([5.0]) == "is not decided by n=1"


@pytest.mark.slow
def test_the_part_of_cifar10_is_its_beginning(data_dir):
    """Compares with the binary file: a label, then the red, green, and blue planes."""
    data = arrays.load("cifar10[:3]", data_dir)
    file = data_dir / "cifar-10-batches-bin" / "data_batch_1.bin"
    records = np.frombuffer(file.read_bytes()[: 3 * 3073], np.uint8).reshape(3, 3073)
    images = records[:, 1:].reshape(3, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(data.train.labels, records[:, 0])
    np.testing.assert_array_equal(data.train.images, images)
    assert len(data.test.labels) == 10_000


# ------------------------------------------------------------------ dropout


def test_removals_are_nested():
    # Shape: [shares, removals, units].
    masks = np.stack([dropout.masks(50, 4, share, seed=1) for share in (0.0, 0.3, 0.5, 1.0)])
    assert masks.sum(-1).tolist() == [[50] * 4, [35] * 4, [25] * 4, [0] * 4]
    assert (np.diff(masks, axis=0) <= 0).all() and len(np.unique(masks[1], axis=0)) == 4


def test_what_dropout_saves_or_costs_has_no_sign():
    """With dropout, removing units costs 10 points more or less than without."""
    for cost, words in ((0.3, "10.00 ± 0.00 more"), (0.1, "10.00 ± 0.00 less")):
        results = []
        for seed, rate in itertools.product(range(2), dropout.RATES):
            left = 1 - (cost if rate else 0.2)
            curve = [[1.0]] + [[left]] * (len(dropout.SHARES) - 1)
            results.append({"dropout": rate, "seed": seed} | dict.fromkeys(dropout.WAYS, curve))
        lines = dropout.verdict(results).splitlines()
        start = "- D10, units of the first layer removed, 50%: it costs 20.00 points without and"
        assert lines[0].startswith(f"{start} {100 * cost:.2f} with dropout, {words} (n=2)")


def test_what_dropout_saves_has_a_paired_interval():
    """Without dropout, removing units costs 20 and 21 points; with it, 10."""
    results = []
    for seed, rate in itertools.product(range(2), dropout.RATES):
        left = 0.9 if rate else 0.8 - 0.01 * seed
        curve = [[1.0]] + [[left]] * (len(dropout.SHARES) - 1)
        results.append({"dropout": rate, "seed": seed} | dict.fromkeys(dropout.WAYS, curve))
    # Student's t with one degree of freedom: 12.706 * 0.7071 / sqrt(2) = 6.35.
    row = "| 79.50 ± 0.71 | 90.00 ± 0.00 | 10.50 ± 0.71 | 4.15 to 16.85 | 2 |"
    assert row in dropout.tabulate(results)
    of_one_seed = [result for result in results if result["seed"] == 0]
    assert "| 10.00 |  | 1 |" in dropout.tabulate(of_one_seed)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_a_removed_unit_is_silent(layer):
    """Compares with a perceptron in NumPy that multiplies its activations by the mask."""
    generator = np.random.default_rng(0)
    model = MLP(num_classes=3, input_shape=(2, 2, 1), hidden=(6, 5))
    shapes = {"fc1": (4, 6), "fc2": (6, 5), "fc3": (5, 3)}
    params = {
        name: {
            "kernel": generator.normal(size=shape).astype(np.float32),
            "bias": generator.normal(size=shape[1]).astype(np.float32),
        }
        for name, shape in shapes.items()
    }
    images, labels = (
        generator.normal(size=(40, 2, 2, 1)).astype(np.float32),
        generator.integers(0, 3, 40),
    )
    masks = dropout.masks(shapes[layer][1], 3, 0.5, seed=0)
    expected, activations = [], []
    for mask in masks:
        x = images.reshape(40, 4)
        for name in ("fc1", "fc2"):
            x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0) * (
                mask if name == layer else 1
            )
        activations.append(x)
        expected.append(
            ((x @ params["fc3"]["kernel"] + params["fc3"]["bias"]).argmax(1) == labels).mean()
        )
    np.testing.assert_allclose(
        dropout.accuracies(model, layer, params, masks, images, labels), expected, rtol=1e-6
    )
    silent = dropout.second_layer(model, dropout.without(params, layer, masks[0]), images)
    np.testing.assert_allclose(
        silent * (masks[0] if layer == "fc2" else 1), activations[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_the_refitted_readout_is_the_least_squares_of_what_is_left(monkeypatch):
    monkeypatch.setattr(dropout, "_STRENGTH", 0.0)
    generator = np.random.default_rng(0)
    train, test = (generator.normal(size=(count, 12)).astype(np.float32) for count in (300, 200))
    teacher = generator.normal(size=(12, 10))
    labels, test_labels = ((x @ teacher).argmax(1) for x in (train, test))
    masks = dropout.masks(12, 2, 0.5, seed=0)
    expected = []
    for mask in masks:
        remaining = [np.c_[x[:, mask > 0], np.ones(len(x))] for x in (train, test)]
        solution = np.linalg.lstsq(remaining[0], np.eye(10)[labels], rcond=None)[0]
        expected.append(((remaining[1] @ solution).argmax(1) == test_labels).mean())
    # Nearly equal classes may be decided differently, for two of the 200 test images at most.
    assert dropout.refitted(train, labels, test, test_labels, masks) == pytest.approx(
        expected, abs=0.011
    )


@pytest.mark.slow
def test_dropout_from_the_command_line(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(dropout.SETTINGS, "dataset", "digits")
    command = ["--workdir", str(tmp_path), "--seeds", "2", "--epochs", "4", "--removals", "2"]
    assert dropout.main(command) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "dropout.json").read_text())
    assert [(row["dropout"], row["seed"]) for row in rows] == [
        (0.0, 0),
        (0.5, 0),
        (0.0, 1),
        (0.5, 1),
    ]
    for row in rows:
        for way in ("fc1", "fc2"):
            # The first share removes nothing.
            assert row[way][0] == pytest.approx([1 - row["test_error"]] * 2)
        assert {np.shape(row[way]) for way in dropout.WAYS} == {(len(dropout.SHARES), 2)}
        assert np.mean(row["fc2"][-1]) < np.mean(row["fc2"][0])
    report = (tmp_path / "report.md").read_text()
    assert report.count("D10") == 6 and (tmp_path / "dropout.png").stat().st_size > 1000
    monkeypatch.setattr(loop, "run", pytest.fail)
    assert dropout.main(command) == 0 and (tmp_path / "report.md").read_text() == report
    assert (
        dropout.main([*command, "--epochs", "5"]) == 2
        and "error: workdir=" in capsys.readouterr().err
    )
