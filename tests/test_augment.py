"""Augmentation: what each kind does to an image, pixel by pixel."""

import itertools

import jax
import numpy as np
import pytest

from cnnjax.data import augment as augmentation

COUNT = 1000


def distinct(height: int, width: int) -> np.ndarray:
    """Returns an image [height, width, 3] whose values all differ and are above 0."""
    return np.arange(1, 3 * height * width + 1, dtype=np.uint8).reshape(height, width, 3)


def augmented(image: np.ndarray, **settings) -> np.ndarray:
    """Returns `COUNT` results for one image, each with its own key."""
    keys = jax.random.split(jax.random.key(0), COUNT)
    return np.asarray(augmentation.augment(keys, np.stack([image] * COUNT), **settings))


def matches(results: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Returns the index of the candidate that each result equals."""
    equal = (results[:, None] == candidates).all((2, 3, 4))
    assert (equal.sum(1) == 1).all()
    return equal.argmax(1)


def test_half_of_the_images_are_mirrored():
    image = distinct(5, 6)
    is_mirrored = matches(augmented(image, flip=True), np.stack([image, image[:, ::-1]]))
    assert 0.45 < is_mirrored.mean() < 0.55


@pytest.mark.parametrize("fill, mode", [("zeros", "constant"), ("reflect", "reflect")])
def test_a_crop_is_any_window_of_the_padded_image(fill, mode):
    image = distinct(5, 6)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode=mode)
    windows = [
        padded[top : top + 5, left : left + 6]
        for top, left in itertools.product(range(5), repeat=2)
    ]
    counts = np.bincount(matches(augmented(image, crop=2, fill=fill), np.stack(windows)))
    # Each window is expected 40 times; a binomial count is below 15 once in 100,000.
    assert len(counts) == 25 and counts.min() >= 15


@pytest.mark.parametrize("size", [2, 3])
def test_cutout_blackens_one_square_whose_center_is_anywhere(size):
    """Squares are cut off at the border, black before the image is normalized."""
    image = distinct(5, 6)
    candidates = []
    for row, column in itertools.product(range(5), range(6)):
        blackened = image.copy()
        top, left = row - size // 2, column - size // 2
        blackened[max(top, 0) : top + size, max(left, 0) : left + size] = 0
        candidates.append(blackened)
    counts = np.bincount(matches(augmented(image, cutout=size), np.stack(candidates)))
    # Each center is expected 33 times.
    assert len(counts) == 30 and counts.min() >= 10


def test_a_color_shift_is_one_for_an_image_along_the_principal_components():
    """The covariance of shifts is that of Krizhevsky et al. 2012, section 4.1.

    Amounts are normal with a standard deviation of 0.1 times each eigenvalue, for RGB in [0, 1].
    """
    image = np.full((4, 5, 3), 128, np.uint8) + distinct(4, 5) // 4
    shifts = augmented(image, colour=0.1) - image
    shift = shifts[:, :1, :1]
    np.testing.assert_allclose(shifts, np.broadcast_to(shift, shifts.shape), atol=1e-4)
    eigenvalues = np.array([0.2175, 0.0188, 0.0045])
    eigenvectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    amounts = shift[:, 0, 0] / 255 @ np.linalg.inv(eigenvectors).T / (0.1 * eigenvalues)
    # Standard normal numbers: the spread of 1,000 has a standard error of .022.
    assert np.abs(amounts.mean(0)).max() < 0.13
    np.testing.assert_allclose(np.cov(amounts.T), np.eye(3), atol=0.15)
    # Sums stay between black and white.
    clipped = augmented(np.uint8([[[1, 1, 1], [254, 254, 254]]]), colour=0.1)
    assert clipped.min() == 0 and clipped.max() == 255


def test_without_settings_images_keep_their_values():
    results = augmented(distinct(5, 6))
    assert results.dtype == np.float32 and (results == distinct(5, 6)).all()


def test_views_are_corners_the_center_and_their_mirror_images():
    x = np.float32(np.stack([distinct(6, 7), distinct(6, 7)[::-1]]))
    center = x[:, 1:5, 1:5]
    corners = [x[:, :4, :4], x[:, :4, 3:], x[:, 2:, :4], x[:, 2:, 3:]]
    crops = [*corners, center]
    expected = {
        1: [center],
        2: [center, center[:, :, ::-1]],
        10: [*crops, *(crop[:, :, ::-1] for crop in crops)],
    }
    for count, views in expected.items():
        np.testing.assert_array_equal(augmentation.views(jax.device_put(x), count, (4, 4)), views)


def test_wrong_views_are_named():
    x = jax.numpy.zeros((2, 6, 7, 3))
    with pytest.raises(ValueError, match="count=5 is not one of 1, 2, 10"):
        augmentation.views(x, 5, (4, 4))
    for size in ((7, 4), (4, 8)):
        with pytest.raises(ValueError, match="are larger than the images, 6x7"):
            augmentation.views(x, 2, size)


def test_an_unknown_fill_is_named():
    keys = jax.random.split(jax.random.key(0), 1)
    for call, images in (
        (augmentation.augment, distinct(5, 6)[None]),
        (augmentation.augment_masks, distinct(5, 6)[None, :, :, 0]),
    ):
        with pytest.raises(ValueError, match="fill='replicate' is not one of zeros, reflect"):
            call(keys, images, crop=4, fill="replicate")
