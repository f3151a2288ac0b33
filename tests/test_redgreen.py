"""The Red/Green experiment: its images are what it says, and its report holds what was run."""
import json

import numpy as np
import pytest
from quick import exit_code

from experiments import position_redgreen


@pytest.mark.parametrize("dissimilar", [False, True])
def test_order_and_rows(dissimilar):
    images, labels = position_redgreen.draw(np.random.default_rng(0), 300, dissimilar)
    assert images.sum((1, 2)).tolist() == [[16, 16, 0]] * 300 and 100 < labels.sum() < 200
    for image, label in zip(images, labels):
        red, green = (np.argwhere(image[..., channel]).mean(0) for channel in (0, 1))
        assert (red[1] < green[1]) == (label == 0)
        middle = 7 if (label == 0) != dissimilar else 23
        assert max(abs(red[0] + 0.5 - middle), abs(green[0] + 0.5 - middle)) <= 4


def test_splits():
    """Own images differ; published ones are training images, and the dissimilar ones those with other rows."""
    train, *others = ([image.tobytes() for image in images] for images, _ in position_redgreen.split(3, "own"))
    assert all(len(set(other) - set(train)) > 900 for other in others) and len(set(others[0]) & set(others[1])) < 100
    (train, labels), (validation, _), (similar, similar_labels), (dissimilar, dissimilar_labels) = position_redgreen.split(3, "published")
    assert np.array_equal(validation, train[:1000]) and np.array_equal(similar, validation) and len(train) == 2000
    assert np.array_equal(similar_labels, labels[:1000]) and np.array_equal(dissimilar_labels, similar_labels)
    moved = np.where(similar_labels == 1, -16, 16)
    assert all(np.array_equal(np.roll(image, move, 0), other) for image, move, other in zip(similar, moved, dissimilar))


def test_the_experiment_reports_every_network(tmp_path, monkeypatch, standard_promotion):
    for name, value in {"_TRAIN": 400, "_TEST": 100, "_EPOCHS": 2}.items():
        monkeypatch.setattr(position_redgreen, name, value)
    position_redgreen.main(["--workdir", str(tmp_path), "--seeds", "2", "--paddings", "zeros", "random", "--splits", "published"])
    rows = json.loads((tmp_path / "redgreen.json").read_text())
    assert [(row["padding"], row["seed"], row["epochs"]) for row in rows] == [(p, s, 2) for p in ("zeros", "random") for s in (0, 1)]
    assert all(0 <= row[kind] <= 1 for row in rows for kind in ("similar", "dissimilar"))
    report = (tmp_path / "report.md").read_text()
    assert "| zeros | " in report and "of the similar test are training images" in report and "99.8 ± 0.1" in report and (tmp_path / "redgreen.png").stat().st_size > 1000
    assert exit_code(position_redgreen.main, ["--seeds", "0"]) == 2
