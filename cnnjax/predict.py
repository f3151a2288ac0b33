"""Print the five most likely classes of photographs.

    python -m cnnjax.predict resnet50 photo.jpg ... [--tag imagenet1k_v2] [--weights FILE]
    python -m cnnjax.predict runs/mine photo.jpg folder ... [--csv]

The first form uses published ImageNet weights, found on this machine or downloaded; the second the
network of a finished training run, or of a combination that is one network. Photographs are
prepared as the network was trained; a run with `test_views` averages as many views of each.
"""

import argparse
import csv
import logging
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

from cnnjax import classifier
from cnnjax.runtime import backend, command

_LOG = logging.getLogger("cnnjax")
_BATCH = 32
_SHOWN = 5


def probabilities(
    network: classifier.Classifier,
    files: list[pathlib.Path],
    damaged: set[pathlib.Path] | None = None,
) -> Iterator[np.ndarray]:
    """Yields the probabilities [classes] of each photograph, in order.

    Arguments and errors are those of `classifier.logits`.
    """
    from cnnjax.train.evaluate import class_probabilities
    from cnnjax.train.parallel import Parallel

    for logits in classifier.logits(network, files, Parallel("jit"), _BATCH, damaged):
        yield from class_probabilities(logits, network.multi_label)


def _list_images(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """Lists files, and the images in folders.

    Raises `ValueError` for a path that does not exist, such as an address on the web.
    """
    from cnnjax.data.photographs import list_photographs

    found = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"PHOTO={str(path)!r} is neither an image file nor a folder of them")
        found += list_photographs(path, "PHOTO") if path.is_dir() else [path]
    return found


def _predict(
    network: classifier.Classifier,
    files: list[pathlib.Path],
    damaged: set[pathlib.Path] | None,
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    """Yields each photograph with its probabilities [classes]; arguments as `classifier.logits`.

    Raises `ValueError` as `classifier.logits`; the error of a damaged file names the option.
    """
    from cnnjax.data.photographs import Damaged

    intact = (file for file in files if not damaged or file not in damaged)
    try:
        # The row comes first: with it, the damaged files before it are known.
        for row, file in zip(probabilities(network, files, damaged), intact):
            yield file, row
    except Damaged as error:
        raise ValueError(f"{error}; --skip_damaged leaves it out") from error


def _work(options: argparse.Namespace) -> None:
    backend.start()
    network = classifier.open_classifier(options)
    files = _list_images(options.photographs)
    damaged: set[pathlib.Path] | None = set() if options.skip_damaged else None
    table = csv.writer(sys.stdout, lineterminator="\n")
    if options.csv:
        table.writerow(["file", "rank", "class", "probability"])
    for file, row in _predict(network, files, damaged):
        if not options.csv:
            print(file)
        for rank, number in enumerate(np.argsort(-row, kind="stable")[:_SHOWN], 1):
            if options.csv:
                table.writerow([file, rank, network.classes[number], f"{row[number]:.6f}"])
            else:
                print(f"  {100 * row[number]:6.2f} %  {network.classes[number]}")
        sys.stdout.flush()
    if damaged:
        noun = "image" if len(damaged) == 1 else "images"
        _LOG.warning("%d damaged %s passed over", len(damaged), noun)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(prog="python -m cnnjax.predict", description=__doc__)
    classifier.add_options(parser)
    parser.add_argument(
        "--skip_damaged",
        action="store_true",
        help="leave out images that cannot be decoded, and name them (default: stop at the first)",
    )
    parser.add_argument(
        "--csv",
        action="store_true",
        help="print a table with the columns file, rank, class and probability (from 0 to 1)",
    )
    parser.add_argument(
        "photographs",
        nargs="+",
        type=command.path,
        metavar="PHOTO",
        help="an image file, or a folder of them",
    )
    options = parser.parse_args(arguments)
    return command.run(lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())
