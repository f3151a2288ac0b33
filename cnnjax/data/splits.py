"""Splits of a data set: images, labels, names of classes, and the choice of held-out images.

The rules are the same for data sets in memory and for streamed ones.
"""

import collections
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_LOG = logging.getLogger("cnnjax")
# The label of pixels that losses and scores ignore.
IGNORED = 255
# The number of classes that a message names.
_NAMED = 10


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
      images: uint8 [n, height, width, channels].
      labels: int32 [n]; for several classes per image, int32 [n, classes] of 0 and 1; for masks,
        uint8 [n, height, width] with 255 for pixels of no class.
    """

    images: np.ndarray
    labels: np.ndarray

    def take(self, numbers: slice | np.ndarray) -> "Split":
        """Returns some images and their labels, by a slice, a mask, or their numbers."""
        return Split(self.images[numbers], self.labels[numbers])

    def draw(self, count: int, seed: int) -> "Split":
        """Returns at most `count` images and their labels in a seed's random order."""
        return self.take(np.random.default_rng(seed).permutation(len(self.labels))[:count])


def class_name(name: str | int) -> str:
    """Returns a class's name in one Unicode form, by which it is compared.

    Archives made on macOS write an "ä" in the name of a folder as two characters. Classes of a
    user's file may be numbers.
    """
    return unicodedata.normalize("NFC", str(name))


def class_names(names: Sequence[str | int]) -> tuple[str, ...]:
    """Returns the names of classes as text, in the form of `class_name`."""
    return tuple(class_name(name) for name in names)


def describe_classes(expected: Sequence[str], actual: Sequence[str]) -> str:
    """Describes how classes differ from those expected; returns "" if they do not."""
    expected = class_names(expected)
    actual = class_names(actual)
    if actual == expected:
        return ""
    missing = sorted(set(expected) - set(actual))
    additional = sorted(set(actual) - set(expected))
    if not missing and not additional:
        return "the classes are in another order"
    return f"missing classes: {name_some(missing)}; additional: {name_some(additional)}"


def name_some(classes: Sequence[str]) -> str:
    """Lists the first classes by name, and counts the others."""
    named = ", ".join(classes[:_NAMED]) or "none"
    others = len(classes) - _NAMED
    return f"{named} and {others:,} more" if others > 0 else named


def describe_change(then: Mapping, now: Mapping) -> str:
    """Describes the first difference of two records of a data set; returns "" if there is none.

    Args:
      then: values by name, such as `n_train` and, as a list of names, `classes`.
      now: the values to compare them with, of these names at least.
    """
    for name, value in then.items():
        if name == "classes":
            change = describe_classes(value, now[name])
        else:
            change = "" if value == now[name] else f"{name}={value} then, {now[name]} now"
        if change:
            return change
    return ""


def check_labels(labels: np.ndarray, count: int, source: str, loss: str = "cross_entropy") -> None:
    """Checks that labels are classes.

    Args:
      labels: integers [n]; for "sigmoid" [n, classes], 0 or 1 for each class; for "pixelwise" [n,
        height, width], where pixels may be `IGNORED`.
      count: the number of classes.
      source: what the labels belong to, for the error.
      loss: what the labels are for, one of `cnnjax.train.step.LOSSES`.

    Raises:
      ValueError: for labels outside 0 to `count` - 1, such as the -1 of splits without labels.
    """
    labels = labels.ravel()
    if loss == "pixelwise":
        labels = labels[labels != IGNORED]
    if loss == "sigmoid":
        # A class is in an image or not.
        count = 2
    wrong = labels[(labels < 0) | (labels >= count)]
    if len(wrong):
        raise ValueError(f"{source} has the label {wrong[0]}; expected 0 to {count - 1}")


def hold_out(labels: np.ndarray, count: int) -> np.ndarray:
    """Chooses images to hold out for validation, balanced over the classes.

    All classes give equally many, or all but one image if they have fewer; a warning is logged if
    more than half of a class is taken. The choice is always the same, so that runs can be compared.

    Args:
      labels: integers [n]. With several classes per image, [n, ...]: all images then count as one
        class.
      count: the number of images to hold out.

    Returns:
      A mask [n].

    Raises:
      ValueError: if `count` images cannot be held out while every class keeps one to train on.
    """
    if labels.ndim > 1:
        labels = np.zeros(len(labels), np.int32)
    classes, sizes = np.unique(labels, return_counts=True)
    if len(labels) == len(classes):
        raise ValueError(
            f"n_validation={count}: no training image can be held out, since no class has more "
            "than one"
        )
    if not 0 < count <= len(labels) - len(classes):
        kept = f"one of each of the {len(classes)} classes" if len(classes) > 1 else "one"
        raise ValueError(
            f"n_validation={count} is not between 1 and {len(labels) - len(classes)}: of the "
            f"{len(labels)} training images, {kept} is kept"
        )
    generator = np.random.default_rng(0)
    order = generator.permutation(len(classes)).tolist()
    shares = [0] * len(classes)
    # The classes take turns, one image each, until `count` images are chosen; each keeps its last.
    turns = collections.deque(number for number in order if sizes[number] > 1)
    for _ in range(count):
        number = turns.popleft()
        shares[number] += 1
        if shares[number] < sizes[number] - 1:
            turns.append(number)
    losing = [(size, share) for size, share in zip(sizes, shares) if 2 * share > size]
    if losing and len(classes) > 1:
        size, share = min(losing)
        _LOG.warning(
            "n_validation=%d holds out more than half of the training images of %d of %d classes, "
            "such as %d of %d",
            count,
            len(losing),
            len(classes),
            share,
            size,
        )
    mask = np.zeros(len(labels), bool)
    for number in order:
        members = np.flatnonzero(labels == classes[number])
        mask[generator.permutation(members)[: shares[number]]] = True
    return mask
