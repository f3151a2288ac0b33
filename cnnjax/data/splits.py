"""Names of classes, checks of labels, and the choice of held-out images.

The rules are the same for data sets in memory and for streamed ones.
"""

import unicodedata

import numpy as np


def class_name(name: str) -> str:
    """Returns a class's name in one Unicode form, by which it is compared.

    Archives made on macOS write an "ä" in the name of a folder as two characters.
    """
    return unicodedata.normalize("NFC", name)


def check_labels(labels: np.ndarray, count: int, source: str) -> None:
    """Checks that labels are numbers of classes.

    Args:
      labels: integers [n].
      count: the number of classes.
      source: what the labels belong to, for the error.

    Raises:
      ValueError: for labels outside 0 to `count` - 1, such as the -1 of splits without labels.
    """
    wrong = labels[(labels < 0) | (labels >= count)]
    if len(wrong):
        raise ValueError(f"{source} has the label {wrong[0]}; expected 0 to {count - 1}")


def hold_out(labels: np.ndarray, count: int) -> np.ndarray:
    """Chooses images to hold out for validation, balanced over the classes.

    All classes give equally many, or all but one image if they have fewer. The choice is always the
    same, so that runs can be compared.

    Args:
      labels: integers [n].
      count: the number of images to hold out.

    Returns:
      A mask [n].

    Raises:
      ValueError: if `count` images cannot be held out while every class keeps one to train on.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if not 0 < count <= len(labels) - len(classes):
        raise ValueError(
            f"n_validation={count} is not between 1 and {len(labels) - len(classes)}: of the "
            f"{len(labels)} training images, one of each of the {len(classes)} classes is kept"
        )
    generator = np.random.default_rng(0)
    order = generator.permutation(len(classes))
    # The classes take turns until `count` images are chosen. Turn t of a class is sorted first by
    # t and then by the class's rank in the order; a class has one turn less than images.
    turns = np.concatenate([np.arange(sizes[label] - 1) for label in order])
    ranks = np.repeat(np.arange(len(order)), sizes[order] - 1)
    chosen = np.lexsort((ranks, turns))[:count]
    shares = np.bincount(ranks[chosen], minlength=len(order))
    mask = np.zeros(len(labels), bool)
    for label, share in zip(classes[order], shares):
        members = np.flatnonzero(labels == label)
        mask[generator.permutation(members)[:share]] = True
    return mask
