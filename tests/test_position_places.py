"""Accuracy by place: positions of digits, equal places, and the report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from cnnjax.data import augment
from cnnjax.runtime import imagenet
from experiments import position_places as study
from experiments.position_places import PLACES, Point


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(study, "MODEL", study.MODEL.clone(blocks=((4,), (8,))))


def digits(count):
    return np.random.default_rng(0).integers(0, 256, (count, 12, 12, 1), np.uint8)


def test_digits_are_averaged_and_laid_where_they_should_be():
    images = np.zeros((1, 28, 28, 1), np.uint8)
    images[0, 2:4, 4:6, 0] = [[10, 20], [30, 40]]
    images[0, 0] = 255
    reduced = study.reduce(images)
    assert reduced.shape == (1, 12, 12, 1)
    assert reduced[0, 0, 1, 0] == 25
    assert np.count_nonzero(reduced) == 1
    for row, column in [(0, 0), (3, 8), (PLACES - 1, PLACES - 1)]:
        canvas = study.lay(digits(2), row, column)
        inside = canvas[:, 2 * row : 2 * row + 12, 2 * column : 2 * column + 12]
        np.testing.assert_array_equal(inside, np.broadcast_to(digits(2), inside.shape))
        assert canvas.shape == (2, 28, 28, 3)
        assert canvas.sum(dtype=int) == 3 * digits(2).sum(dtype=int)


def test_kinds_of_places_are_counted_from_the_trained_one():
    kinds = study.kinds_of_places((4, 4))
    counts = {kind: int(mask.sum()) for kind, mask in kinds.items()}
    # Of 7x7 inner places, 3x3 are whole strides from the center, and one of these is the center.
    assert counts == {
        "elsewhere": 80,
        "whole strides away, inside": 8,
        "whole strides away, border": 16,
        "other places, inside": 40,
    }
    assert kinds["whole strides away, inside"][2, 6]
    assert kinds["whole strides away, border"][0, 4]
    assert not any(mask[4, 4] for mask in kinds.values())
    at_corner = study.kinds_of_places((0, 0))
    assert [int(mask.sum()) for mask in at_corner.values()] == [80, 9, 15, 40]


@pytest.mark.parametrize(
    ("sampling", "padding", "equal"),
    [
        ("aps", "circular", "everywhere"),
        ("stride", "circular", "whole strides"),
        ("stride", "zeros", "nowhere"),
    ],
)
def test_what_padding_and_sampling_make_equal(small, sampling, padding, equal):
    """With circular padding, `aps` makes all places equal, and `stride` whole strides."""
    model = study.build(Point("center", sampling, padding, 0))
    variables = quick.variables(model, jnp.zeros((1, 28, 28, 3)))
    images = digits(40)
    canvases = study.lay(images, 4, 4)
    # Random weights would give all digits one class, so the mean logits are subtracted.
    logits = jax.jit(model.apply)(variables, augment.normalize(canvases, *imagenet.MOMENTS))
    head = variables["params"]["fc"]
    head["bias"] = head["bias"] - logits.mean(0)
    # With the answers at the center as labels, accuracy is agreement with the center.
    labels = study.classify(model, variables, canvases)
    assert len(set(labels)) > 2
    agreement = study.accuracy_map(model, variables, images, labels)
    whole = agreement[::2, ::2]
    assert agreement[4, 4] == 1
    assert (agreement == 1).all() == (equal == "everywhere")
    assert (whole == 1).all() == (equal != "nowhere")


def test_the_report_summarizes_each_network_s_map():
    rows = []
    for seed in (0, 1):
        accuracies = np.full((PLACES, PLACES), 0.5)
        accuracies[0] = 0.25
        accuracies[4, 4] = 0.8 + 0.1 * seed
        point = Point("center", "stride", "zeros", seed)
        rows.append(point._asdict() | {"accuracies": accuracies.tolist()})
    numbers = study.summarize(rows[0])
    assert numbers["where trained"] == pytest.approx(80)
    # 9 of 80 places at 25 %, and 5 of the 16 at the border and whole strides away.
    assert numbers["elsewhere"] == pytest.approx(50 - 25 * 9 / 80)
    assert numbers["whole strides away, border"] == pytest.approx(50 - 25 * 5 / 16)
    assert numbers["lowest"] == 25
    assert numbers["deviation over places"] == pytest.approx(100 * np.std(rows[0]["accuracies"]))
    line = "| center | stride | zeros | 85.0 ± 7.1 | 47.2 ± 0.0 | 50.0 ± 0.0 | 42.2 ± 0.0 |"
    assert line in study.tabulate(rows)


def result_of(sampling, padding, seed, accuracies):
    point = Point("center", sampling, padding, seed)
    return point._asdict() | {"accuracies": accuracies.tolist()}


def test_differences_are_paired_by_seed():
    rows = []
    for seed in (0, 1, 2):
        for number, padding in enumerate(("zeros", "reflect")):
            # Seeds differ by far more than paddings do: 2, 3 and 4 points.
            accuracy = 0.3 + 0.2 * seed + number * (0.02 + 0.01 * seed)
            rows.append(result_of("stride", padding, seed, np.full((PLACES, PLACES), accuracy)))
        # Another sampling changes nothing.
        rows.append(result_of("blur", "zeros", seed, np.full((PLACES, PLACES), 0.3 + 0.2 * seed)))
        rows.append(result_of("blur", "reflect", seed, np.full((PLACES, PLACES), 0.5)))
    text = study.tabulate_differences(rows, "padding", "whole strides away, border")
    # 2.48 is half of Student's interval of three differences whose deviation is 1.
    assert "| trained at | sampling | reflect - zeros |" in text
    assert "| center | stride | +3.0 ± 2.5 |" in text
    text = study.tabulate_differences(rows, "sampling", "elsewhere")
    assert "| trained at | padding | blur - stride |" in text
    assert "| center | zeros | +0.0 ± 0.0 |" in text


def test_half_a_stride_is_counted_along_one_axis():
    up, aside = study.half_strides((4, 4)).values()
    # Rows 1, 3, 5 and 7 of the inner columns 2, 4 and 6.
    assert up.sum() == 12
    assert up[[1, 3, 5, 7]][:, [2, 4, 6]].all()
    np.testing.assert_array_equal(aside, up.T)
    accuracies = np.full((PLACES, PLACES), 0.9)
    accuracies[1::2] -= 0.25
    accuracies[:, 1::2] -= 0.0625
    rows = [result_of("stride", "circular", seed, accuracies - 0.1 * seed) for seed in (0, 1)]
    assert "| center | stride | circular | 25.0 ± 0.0 | 6.2 ± 0.0 | 2 |" in (
        study.tabulate_half_strides(rows)
    )


@pytest.mark.slow
def test_networks_are_trained_at_one_place_and_reported(
    small, tmp_path, data_dir, standard_promotion
):
    arguments = [
        "--workdir",
        str(tmp_path),
        "--data_dir",
        str(data_dir),
        "--seeds",
        "1",
        "--places",
        "corner",
        "--samplings",
        "stride",
        "--paddings",
        "circular",
    ]
    assert study.main([*arguments, "--train", "200", "--epochs", "4", "--test", "100"]) == 0
    (row,) = json.loads((tmp_path / "places.json").read_text())
    accuracies = np.array(row["accuracies"])
    assert accuracies.shape == (PLACES, PLACES)
    # Moving a digit by whole strides only shifts the maps circularly.
    assert len(set(accuracies[::2, ::2].ravel())) == 1
    assert "| corner | stride | circular | " in (tmp_path / "report.md").read_text()
    assert (tmp_path / "places.png").stat().st_size > 1000


def test_bad_input_is_refused_before_anything_is_written(tmp_path, data_dir, capsys):
    arguments = ["--workdir", str(tmp_path / "run"), "--data_dir", str(data_dir)]
    assert study.main([*arguments, "--test", "10001"]) == 2
    assert "test=10001 is more than the 10000 images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
