"""Trained classifiers for `predict` and `evaluate`.

They have published weights, or those of a finished run.
"""

import argparse
import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from cnnjax.runtime import backend, command
from cnnjax.runtime.paths import expand_user
from cnnjax.weights import records

if TYPE_CHECKING:
    from cnnjax.models import Network
    from cnnjax.train.parallel import Parallel


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network, and how photographs are prepared for it.

    Attributes:
      classes: the names of its classes.
      multi_label: whether a photograph may have several classes.
      read: decodes, resizes and crops a file to uint8 [height, width, channels].
      moments: the mean and standard deviation that pixels of 0 to 1 are normalized by.
      load: loads the network and its variables.
    """

    classes: tuple[str, ...]
    multi_label: bool
    read: Callable[[pathlib.Path], np.ndarray]
    moments: tuple[np.ndarray, np.ndarray]
    load: Callable[[], tuple["Network", dict]]


def published(
    name: str, *, tag: str = records.V1, path: str | None = None, resize: int | None = None
) -> Classifier:
    """Returns a network with published weights.

    Args:
      name: the network.
      tag: which of its weights.
      path: a file to read the weights from, instead of looking for them.
      resize: pixels of the shorter side, instead of the published ones.

    Raises `ValueError` if there are no such weights.
    """
    from cnnjax.data.photographs import open_rgb
    from cnnjax.weights import load_pretrained
    from cnnjax.weights.preprocessing import resize_and_crop

    record = records.find(name, tag).resized(resize)
    return Classifier(
        classes=records.imagenet_classes(),
        multi_label=False,
        read=lambda file: resize_and_crop(open_rgb(file), record),
        moments=(np.asarray(record.mean, np.float32), np.asarray(record.std, np.float32)),
        load=lambda: load_pretrained(name, tag=tag, path=path),
    )


def trained(folder: pathlib.Path) -> Classifier:
    """Returns the network of a finished training run.

    Raises `ValueError` if the folder holds no finished training run, or if the run labels pixels or
    takes images whose channels photographs do not have.
    """
    from cnnjax.data.photographs import check_channels
    from cnnjax.train.run import open_run

    run = open_run(folder)
    if run.config.loss == "pixelwise":
        raise ValueError(
            f"{folder} is a segmentation run; expected one that classifies photographs"
        )
    check_channels(run.image_shape[2], f"{folder} was trained on images")
    return Classifier(
        classes=run.classes,
        multi_label=run.multi_label,
        read=run.read,
        moments=run.moments,
        load=lambda: (run.model, run.variables),
    )


def logits(
    classifier: Classifier, files: list[pathlib.Path], parallel: "Parallel", batch_size: int
) -> Iterator[np.ndarray]:
    """Yields the logits of photographs, [batch, classes], in order.

    Args:
      classifier: the network.
      files: the photographs.
      parallel: how the network is run on the devices.
      batch_size: photographs per batch, over all devices.

    Raises `ValueError` if a file cannot be decoded, after the batches before it.
    """
    from cnnjax.train.evaluate import predict_batches

    model, variables = classifier.load()
    yield from predict_batches(
        parallel,
        model,
        parallel.replicate(variables),
        parallel.replicate(classifier.moments),
        _batches(classifier, files, batch_size),
        batch_size,
    )


def _batches(classifier: Classifier, files: list[pathlib.Path], size: int) -> Iterator[np.ndarray]:
    """Yields uint8 [size, height, width, channels]; the last batch may be shorter."""
    # Pillow decodes and resizes outside Python's lock, so threads suffice.
    with concurrent.futures.ThreadPoolExecutor(backend.cores()) as pool:
        for start in range(0, len(files), size):
            yield np.stack([*pool.map(classifier.read, files[start : start + size])])


# ------------------------------------------------------------------ the command line


def add_options(parser: command.Parser) -> None:
    """Adds the options that name a network and its weights."""
    parser.add_argument(
        "model",
        metavar="NAME_OR_RUN",
        help="a network with published weights, such as resnet50, or a run's work directory",
    )
    parser.add_argument("--tag", help=f"of published weights (default: {records.V1})")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a .pth or safetensors file (default: found or downloaded by name)",
    )
    parser.add_argument(
        "--resize",
        type=command.whole_number(1),
        metavar="PIXELS",
        help="of the shorter side, before the crop (default: as published)",
    )


def run_folder(options: argparse.Namespace) -> pathlib.Path | None:
    """Returns the work directory that the options name; None if they name a network.

    Raises `ValueError` if an option does not apply to a run, or if a path is not a folder.
    """
    folder = expand_user(options.model)
    if folder.is_dir():
        for name in ("tag", "weights", "resize"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"{name}={getattr(options, name)!r} is for published weights; {folder} is a "
                    "run, which has its own"
                )
        return folder
    if folder.name != options.model:
        raise ValueError(f"{folder} is neither a network's name nor a run's work directory")
    return None


def open_classifier(options: argparse.Namespace) -> Classifier:
    """Returns the network that the options name.

    Raises `ValueError` as `run_folder`, `trained` and `published` do.
    """
    folder = run_folder(options)
    if folder is not None:
        return trained(folder)
    return published(
        options.model,
        tag=options.tag or records.V1,
        path=options.weights,
        resize=options.resize,
    )
