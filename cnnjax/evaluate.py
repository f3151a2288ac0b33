"""Measure top-1 and top-5 accuracy on a folder of labeled photographs.

    python -m cnnjax.evaluate resnet50 --data_dir FOLDER [--tag imagenet1k_v2] [--weights FILE]
    python -m cnnjax.evaluate runs/mine --data_dir FOLDER

The first form scores published ImageNet weights, the second the network of a finished training
run, or of a combination that is one network. The folder gives the labels:

- FOLDER/CLASS/IMAGE with any number of folders named by the class's name or number (tench or 0);
  by name only, if any class's name is a number.

For ImageNet's classes, it may also be

- FOLDER/CLASS/IMAGE with 1,000 class folders in ImageNet's order of names (n01440764, ...), none
  of them the name or number of a class;
- FOLDER/NUMBER_IMAGE, where every file name begins with the class's number (000_tench.jpg).

Photographs are resized, cropped and normalized as the weights expect; those that are cropped
already need `--resize 224` with published weights. A run with `test_views` averages as many views
of each photograph. Photographs are decoded while the devices compute, and each batch is divided
over all devices.
"""

import argparse
import logging
import pathlib
import re
import sys
from collections.abc import Sequence

import numpy as np

from cnnjax import classifier
from cnnjax.data import splits
from cnnjax.runtime import backend, command
from cnnjax.runtime.progress import progress
from cnnjax.weights import records

_LOG = logging.getLogger("cnnjax")
_NUMBERED = re.compile(r"(\d{1,4})_.*", re.DOTALL)


# ------------------------------------------------------------------ labels


def list_imagenet(folder: pathlib.Path) -> tuple[list[pathlib.Path], np.ndarray]:
    """Lists photographs of ImageNet's classes and their labels, int32 [n].

    Raises `ValueError` if there are no photographs or a label cannot be determined.
    """
    from cnnjax.data import photographs

    classes = records.imagenet_classes()
    listing = photographs.list_folder(folder)
    if listing.folders:
        return list_classes(folder, classes, ordered=True)
    labels = []
    for path in listing.images:
        matched = _NUMBERED.fullmatch(path.name)
        if not matched or int(matched[1]) >= len(classes):
            raise ValueError(f"{path} does not begin with a class's number, 0 to 999, and _")
        labels.append(int(matched[1]))
    if not labels:
        raise ValueError(f"data_dir={str(folder)!r} has no photographs")
    if listing.others:
        _LOG.info("%s: %s", folder, photographs.describe_others(listing.others))
    return listing.images, np.array(labels, np.int32)


def list_classes(
    folder: pathlib.Path, classes: Sequence[str], ordered: bool = False
) -> tuple[list[pathlib.Path], np.ndarray]:
    """Lists photographs in class folders and their labels, int32 [n].

    Args:
      folder: the folder of class folders.
      classes: the names of the classes.
      ordered: whether folders are in the classes' order if none is named after a class and there
        is one per class.

    Raises `ValueError` if there are no photographs, or if a folder is not named after a class.
    """
    from cnnjax.data import folders

    classes = splits.class_names(classes)
    try:
        source = folders.Folder(folder)
    except ValueError as error:
        raise ValueError(f"{error}{_advise_split(folder)}") from error
    if source.passed_over:
        _LOG.info("%s: %s", folder, source.passed_over)
    names = source.classes
    is_named = any(name in classes or name.isdecimal() for name in names)
    if ordered and len(names) == len(classes) and not is_named:
        labels_by_folder = [*range(len(names))]
    else:
        labels_by_folder = [_label(name, classes) for name in names]
    files = [path for path, _ in source.files]
    return files, np.array([labels_by_folder[number] for _, number in source.files], np.int32)


def _advise_split(folder: pathlib.Path) -> str:
    """Returns a hint if a folder holds a split of class folders; otherwise ""."""
    from cnnjax.data.photographs import list_folder

    for name in ("val", "train"):
        split = folder / name
        if split.is_dir() and list_folder(split).folders:
            return f"; did you mean {split}?"
    return ""


def _label(name: str, classes: Sequence[str]) -> int:
    """Returns the class that a folder is named after.

    The folder's name may also be the class's number, unless a class has a number for a name: a
    folder "0" beside classes "1", "2" and "3" is hardly the class "1".

    Raises `ValueError` if there is no such class or more than one.
    """
    if name in classes:
        if classes.count(name) > 1:
            raise ValueError(f"data_dir: {name!r} is the name of several classes")
        return classes.index(name)
    named = f"the name of a class ({splits.name_some(classes)})"
    if any(known.isdecimal() for known in classes):
        raise ValueError(f"data_dir: the folder {name!r} is not {named}")
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise ValueError(
        f"data_dir: the folder {name!r} is neither {named} nor its number, 0 to {len(classes) - 1}"
    )


# ------------------------------------------------------------------ scores


def evaluate(
    network: classifier.Classifier,
    files: list[pathlib.Path],
    labels: np.ndarray,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Scores a network on labeled photographs.

    Args:
      network: the network.
      files: the photographs.
      labels: int32 [n], one class each.
      batch_size: the most photographs per batch, over all devices, which share it evenly; by
        default 64, rounded up to a multiple of the devices.

    Returns accuracies in percent: "top-1" and, with more than ten classes, "top-5". Raises
    `ValueError` if the devices cannot share a batch evenly.
    """
    from cnnjax.train.evaluate import score
    from cnnjax.train.parallel import Parallel

    parallel = Parallel()
    if batch_size is None:
        batch_size = parallel.round_up(64)
    if batch_size % parallel.size:
        raise ValueError(f"batch_size={batch_size} is not a multiple of {parallel.size} devices")
    outputs = []
    with progress(len(files), "photographs") as advance:
        for logits in classifier.logits(network, files, parallel, batch_size):
            outputs.append(logits)
            advance(len(logits))
    errors = score("cross_entropy", np.concatenate(outputs), labels)
    accuracies = {"top-1": 100 * (1 - errors["error"])}
    if "top5_error" in errors:
        accuracies["top-5"] = 100 * (1 - errors["top5_error"])
    return accuracies


# ------------------------------------------------------------------ the command


def _work(options: argparse.Namespace) -> None:
    backend.start()
    network = classifier.open_classifier(options)
    data_dir = options.data_dir
    if not data_dir.is_dir():
        raise ValueError(f"data_dir={str(data_dir)!r} is not a folder")
    if network.multi_label:
        raise ValueError(
            f"{network.title} is a multi-label run; expected one that gives a photograph one class"
        )
    if network.classes == records.imagenet_classes():
        files, labels = list_imagenet(data_dir)
    else:
        files, labels = list_classes(data_dir, network.classes)
    accuracies = evaluate(network, files, labels, options.batch_size)
    views = "" if network.views == 1 else f", {network.views} views of each"
    print(f"{network.title}, {len(files):,} photographs{views}")
    for name, accuracy in accuracies.items():
        line = f"{name} {accuracy:6.2f} %"
        if name in network.published:
            line += f"   published, on 50,000: {network.published[name]:.3f} %"
        print(line)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(prog="python -m cnnjax.evaluate", description=__doc__)
    classifier.add_options(parser)
    parser.add_argument(
        "--data_dir",
        type=command.path,
        required=True,
        metavar="FOLDER",
        help="the labeled photographs",
    )
    parser.add_argument(
        "--batch_size",
        type=command.whole_number(1),
        metavar="N",
        help="photographs in a batch, over all devices (default: 64, or the next number that they "
        "share evenly)",
    )
    options = parser.parse_args(arguments)
    return command.run(lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())
