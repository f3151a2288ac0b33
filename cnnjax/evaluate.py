"""Top-1 and top-5 accuracy on a folder of labeled photographs.

    python -m cnnjax.evaluate resnet50 --data_dir FOLDER [--tag imagenet1k_v2] [--weights FILE]
    python -m cnnjax.evaluate runs/mine --data_dir FOLDER

The first form scores published ImageNet weights, the second the network of a finished training
run. Labels come from the folder. For a run, it has

- FOLDER/CLASS/IMAGE with folders named as the run's classes, all of them or some.

For ImageNet's classes, it has one of

- FOLDER/CLASS/IMAGE with 1,000 class folders in ImageNet's order of names (n01440764, ...);
- FOLDER/CLASS/IMAGE with any number of folders named by the class's number or name (0 or tench);
- FOLDER/NUMBER_IMAGE, where every file name begins with the class's number (000_tench.jpg).

Photographs are resized, cropped and normalized as the weights expect; those that are cropped
already need `--resize 224` with published weights. They are decoded while the devices compute, and
each batch is divided over all devices.
"""

import argparse
import logging
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import numpy as np

from cnnjax import classifier
from cnnjax.runtime import backend, command
from cnnjax.runtime.progress import progress
from cnnjax.weights import records

_LOG = logging.getLogger("cnnjax")
_NUMBERED = re.compile(r"(\d{1,4})_.*", re.DOTALL)
_NAMED = 10  # classes in an error


# ------------------------------------------------------------------ labels


def list_imagenet(folder: pathlib.Path) -> tuple[list[pathlib.Path], np.ndarray]:
    """Lists photographs of ImageNet's classes and their labels, int32 [n].

    Raises `ValueError` if there are none or a label cannot be told.
    """
    from cnnjax.data import photographs

    _check_folder(folder)
    listing = photographs.list_folder(folder)
    if listing.folders:
        return _list_folders(folder, _imagenet_labels)
    labels = []
    for path in listing.images:
        matched = _NUMBERED.fullmatch(path.name)
        if not matched or int(matched[1]) >= len(records.imagenet_classes()):
            raise ValueError(f"{path} does not begin with a class's number, 0 to 999, and _")
        labels.append(int(matched[1]))
    if not labels:
        raise ValueError(f"data_dir={str(folder)!r} has no photographs")
    if listing.others:
        _LOG.info("%s: %s", folder, photographs.describe_others(listing.others))
    return listing.images, np.array(labels, np.int32)


def list_classes(
    folder: pathlib.Path, classes: Sequence[str]
) -> tuple[list[pathlib.Path], np.ndarray]:
    """Lists photographs in folders named as the classes, and their labels, int32 [n].

    Raises `ValueError` if there are none, or for a folder that is no class's.
    """

    def labels(names):
        for name in names:
            if name not in classes:
                more = ", ..." if len(classes) > _NAMED else ""
                raise ValueError(
                    f"data_dir: the folder {name!r} is not one of the run's classes: "
                    f"{', '.join(classes[:_NAMED])}{more}"
                )
        return [classes.index(name) for name in names]

    _check_folder(folder)
    return _list_folders(folder, labels)


def _check_folder(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"data_dir={str(folder)!r} is not a folder")


def _list_folders(
    folder: pathlib.Path, labels: Callable[[list[str]], list[int]]
) -> tuple[list[pathlib.Path], np.ndarray]:
    """Lists the photographs in class folders; `labels` are those of the folders' names."""
    from cnnjax.data import stream

    source = stream.Folder(folder)
    if source.passed_over:
        _LOG.info("%s: %s", folder, source.passed_over)
    of_folder = labels([*source.classes])
    files = [path for path, _ in source.files]
    return files, np.array([of_folder[number] for _, number in source.files], np.int32)


def _imagenet_labels(folders: list[str]) -> list[int]:
    """Returns the class of each of a data set's folders, which come in the order of their names.

    Raises `ValueError` for a name that is no class's.
    """
    classes = records.imagenet_classes()
    if len(folders) == len(classes) and not all(name.isdecimal() for name in folders):
        return list(range(len(folders)))
    labels = []
    for name in folders:
        if name.isdecimal() and int(name) < len(classes):
            labels.append(int(name))
        elif name in classes:
            labels.append(classes.index(name))
        else:
            raise ValueError(
                f"data_dir: the folder {name!r} is neither a class's number, 0 to 999, nor its "
                f"name; other names are understood where there are 1,000 folders, not "
                f"{len(folders)}"
            )
    return labels


# ------------------------------------------------------------------ scores


def evaluate(
    network: classifier.Classifier,
    files: list[pathlib.Path],
    labels: np.ndarray,
    batch_size: int = 64,
) -> dict[str, float]:
    """Scores a network on labeled photographs.

    - `labels`: int32 [n], one class each.
    - `batch_size`: photographs that all devices take together.

    Returns accuracies in percent: "top-1" and, with more than ten classes, "top-5".
    """
    from cnnjax.train.evaluate import score
    from cnnjax.train.parallel import Parallel

    parallel = Parallel()
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
    data_dir = options.data_dir.expanduser()
    run = classifier.run_folder(options)
    backend.start()
    network = classifier.open_classifier(options)
    if network.several:
        raise ValueError(
            f"{run} is a run whose photographs have several classes; expected one of one class each"
        )
    if run is None:
        record = records.find(options.model, options.tag or records.V1)
        title = f"{record.network} {record.tag}"
        published = {"top-1": record.top1, "top-5": record.top5}
        files, labels = list_imagenet(data_dir)
    else:
        title = str(run)
        published = {}
        files, labels = list_classes(data_dir, network.classes)
    accuracies = evaluate(network, files, labels, options.batch_size)
    print(f"{title}, {len(files):,} photographs")
    for name, accuracy in accuracies.items():
        line = f"{name} {accuracy:6.2f} %"
        if name in published:
            line += f"   published, on 50,000: {published[name]:.3f} %"
        print(line)


def main(arguments: list[str] | None = None) -> int:
    """The command line -> the exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(prog="python -m cnnjax.evaluate", description=__doc__)
    classifier.add_options(parser)
    parser.add_argument(
        "--data_dir",
        type=pathlib.Path,
        required=True,
        metavar="FOLDER",
        help="the labeled photographs",
    )
    parser.add_argument(
        "--batch_size",
        type=command.whole(1),
        default=64,
        metavar="N",
        help="photographs in a batch, over all devices (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    return command.run(lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())
