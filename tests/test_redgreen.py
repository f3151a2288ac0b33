"""The Red/Green experiment: images as described, and results in the report."""

import json

import numpy as np
import pytest
import quick

from experiments import position_redgreen

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dissimilar", [False, True])
def test_order_and_rows(dissimilar):
    """Images have every place of the authors' code, and no other."""
    images, labels = position_redgreen.draw_images(np.random.default_rng(0), 4000, dissimilar)
    assert images.sum((1, 2)).tolist() == [[16, 16, 0]] * 4000 and labels.tolist() == [0, 1] * 2000
    seen = {0: set(), 1: set()}
    for image, label in zip(images, labels):
        (red_top, red_left), (green_top, green_left) = (
            np.argwhere(image[..., channel])[0] for channel in (0, 1)
        )
        left, right = sorted((red_left, green_left))
        assert (red_left < green_left) == (label == 0) and right - left >= 5
        seen[label] |= {
            ("left", left),
            ("right", right),
            ("apart", right - left),
            ("top", red_top),
            ("top", green_top),
        }
    for label, places in seen.items():
        top = 3 if (label == 0) != dissimilar else 19
        ranges = {"left": (0, 10), "right": (5, 28), "apart": (5, 28), "top": (top, top + 8)}
        assert places == {
            (what, value) for what, (low, high) in ranges.items() for value in range(low, high)
        }


def test_splits():
    """`own` test images are new; `published` ones are training images.

    The published dissimilar test has the same images with moved rows.
    """
    train, *others = (
        [image.tobytes() for image in images]
        for images, _ in position_redgreen.draw_parts(3, "own")
    )
    # Training uses 2,000 of some 24,000 different images.
    assert (
        all(len(set(other) - set(train)) > 850 for other in others)
        and len(set(others[0]) & set(others[1])) < 100
    )
    (train, labels), (validation, _), (similar, similar_labels), (dissimilar, dissimilar_labels) = (
        position_redgreen.draw_parts(3, "published")
    )
    assert np.array_equal(train, position_redgreen.draw_parts(4, "published")[0][0])
    assert (
        np.array_equal(validation, train[:1000])
        and np.array_equal(similar, validation)
        and len(train) == 2000
    )
    assert np.array_equal(similar_labels, labels[:1000]) and np.array_equal(
        dissimilar_labels, similar_labels
    )
    moved = np.where(similar_labels == 1, -16, 16)
    assert all(
        np.array_equal(np.roll(image, move, 0), other)
        for image, move, other in zip(similar, moved, dissimilar)
    )


@pytest.mark.usefixtures("standard_promotion")
def test_the_experiment_reports_every_network(tmp_path, monkeypatch):
    for name, value in {"_TRAIN": 100, "_TEST": 50, "_BATCH": 50, "_EPOCHS": 2}.items():
        monkeypatch.setattr(position_redgreen, name, value)
    arguments = ["--workdir", str(tmp_path), "--seeds", "2", "--paddings", "zeros", "random"]
    assert position_redgreen.main([*arguments, "--splits", "published"]) == 0
    rows = json.loads((tmp_path / "redgreen.json").read_text())
    assert [(row["padding"], row["seed"], row["epochs"]) for row in rows] == [
        (p, s, 2) for p in ("zeros", "random") for s in (0, 1)
    ]
    # Each test has 50 images, of which one is two percent.
    percents = np.array([[100 * row[kind] for kind in ("similar", "dissimilar")] for row in rows])
    np.testing.assert_allclose(percents, 2 * (percents / 2).round(), atol=1e-4)
    report = (tmp_path / "report.md").read_text()
    assert "| zeros | " in report
    assert "the similar test are training images" in report
    assert "99.8 ± 0.1" in report
    assert (tmp_path / "redgreen.png").stat().st_size > 1000
    assert quick.exit_code(position_redgreen.main, ["--seeds", "0"]) == 2
