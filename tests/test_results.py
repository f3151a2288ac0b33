"""Predictions that a training run writes, from outputs made by hand."""

import types

import numpy as np
import pytest

from cnnjax.data.splits import IGNORED
from cnnjax.train import evaluate, report, results
from cnnjax.train.training import Scored


def written(folder, loss: str, outputs: np.ndarray, labels: np.ndarray) -> dict:
    """Returns the arrays in test.npz. The pixel of test image n is n."""

    def test_images(numbers):
        return np.uint8(numbers).reshape(-1, 1, 1, 1)

    training = types.SimpleNamespace(
        config=types.SimpleNamespace(loss=loss),
        data=types.SimpleNamespace(test_images=test_images),
    )
    results.write_predictions(folder, training, Scored({}, outputs, labels))
    with np.load(folder / "test.npz") as archive:
        return dict(archive)


def test_the_most_confident_mistakes_are_shown_first(tmp_path):
    """Confidence is the largest softmax probability, whatever is added to an image's logits."""
    probabilities = np.array(
        [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.4, 0.3, 0.3], [0.05, 0.05, 0.9], [0.1, 0.8, 0.1]]
    )
    shifts = np.array([0, 1000, -1000, 5, 0])
    outputs = np.float32(np.log(probabilities) + shifts[:, None])
    # Image 4 alone is right, and more confident than two of the mistakes.
    test = written(tmp_path, "cross_entropy", outputs, np.array([2, 0, 1, 0, 1]))
    np.testing.assert_allclose(test["confidence"], [0.6, 0.7, 0.4, 0.9, 0.8], rtol=1e-3)
    assert test["predicted"].tolist() == [0, 1, 0, 2, 1]
    assert test["labels"].tolist() == [2, 0, 1, 0, 1]
    assert test["shown"].tolist() == [3, 1, 0, 2]
    assert test["images"].ravel().tolist() == [3, 1, 0, 2]


def test_masks_with_most_wrong_pixels_are_shown_first(tmp_path):
    """Pixels without a label are not wrong."""
    labels = np.zeros((4, 2, 3), np.uint8)
    labels[0, 0, 0] = 1  # one wrong pixel
    labels[2] = 1  # six
    labels[3, 0] = 1  # three
    labels[1] = IGNORED
    # All pixels are predicted as class 0.
    outputs = np.zeros((4, 2, 3, 2), np.float32)
    outputs[..., 0] = 1
    test = written(tmp_path, "pixelwise", outputs, labels)
    assert test["shown"].tolist() == [2, 3, 0, 1]
    assert test["images"].ravel().tolist() == [2, 3, 0, 1]
    assert test["predicted"].dtype == np.uint8 and not test["predicted"].any()
    assert "confidence" not in test


@pytest.mark.parametrize("loss, most", [("cross_entropy", 36), ("pixelwise", 6)])
def test_the_report_shows_a_limited_number_of_images(loss, most, tmp_path):
    shape = (50, 2, 2) if loss == "pixelwise" else (50,)
    outputs = np.zeros((*shape, 2), np.float32)
    test = written(tmp_path, loss, outputs, np.ones(shape, np.uint8))
    assert len(test["shown"]) == len(test["images"]) == most


def test_no_image_is_shown_without_a_mistake(tmp_path):
    test = written(tmp_path, "cross_entropy", np.eye(3, dtype=np.float32), np.arange(3))
    assert test["shown"].size == 0 and len(test["images"]) == 0


def test_outputs_of_several_classes_per_image_are_written(tmp_path):
    outputs = np.float32([[1, -2], [3, 4]])
    test = written(tmp_path, "sigmoid", outputs, np.array([[1, 0], [1, 1]]))
    assert sorted(test) == ["labels", "outputs"]
    np.testing.assert_array_equal(test["outputs"], outputs)


def test_a_class_that_is_never_recognized_is_seen():
    outputs = np.eye(3, dtype=np.float32)[[0, 0, 0, 0]]
    recall = evaluate.by_class("cross_entropy", outputs, np.array([0, 0, 0, 1]))
    assert recall == [1.0, 0.0, None]
    config = {"loss": "cross_entropy"}
    text = report._class_table(config, {"classes": ["cat", "dog", "cow"], "by_class": recall})
    assert "recall of each class" in text and "| 100.00 | 0.00 |  |" in text
    # Of many classes, the ten worst.
    scores = np.arange(30, 0, -1) / 100
    many = {"classes": [f"class {n}" for n in range(30)], "by_class": [*scores[:-1], None]}
    text = report._class_table(config, many)
    assert "recall of the 10 worst classes" in text
    assert "| class 28 | class 27 |" in text and "class 18" not in text and "class 29" not in text


@pytest.mark.parametrize("change", [{}, {"label_smoothing": 0.1}, {"mixup": 0.2}])
def test_a_training_loss_of_other_labels_is_named(change):
    config = {"dataset": "digits", "label_smoothing": 0.0, "mixup": 0.0} | change
    text = report._describe_training_loss(config)
    assert bool(text) == bool(change)
    assert "curve" not in report._describe_training_loss(config | {"dataset": "folder"})
