"""Load a classifier for `predict` and `evaluate`, from published weights or a run."""

import argparse
import concurrent.futures
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from cnnjax.runtime import command, host, imagenet
from cnnjax.runtime.paths import expand_user
from cnnjax.weights import records

if TYPE_CHECKING:
    from cnnjax.models import Network
    from cnnjax.train.parallel import Parallel

_LOG = logging.getLogger("cnnjax")


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network, and how photographs are prepared for it.

    Attributes:
      title: what a report calls it: its weights or its run.
      published: its published accuracies in percent, by name; {} if there are none.
      classes: the names of its classes.
      multi_label: whether a photograph may have several classes.
      views: the number of views of a photograph to average (`cnnjax.data.augment.views`).
      read: decodes, resizes and crops a file to uint8 [height, width, channels].
      moments: the mean and standard deviation that pixels of 0 to 1 are normalized by.
      load: loads the network and its variables.
    """

    title: str
    published: dict[str, float]
    classes: tuple[str, ...]
    multi_label: bool
    views: int
    read: Callable[[pathlib.Path], np.ndarray]
    moments: tuple[np.ndarray, np.ndarray]
    load: Callable[[], tuple["Network", dict]]


def published(
    name: str, *, tag: str | None = None, path: str | None = None, resize: int | None = None
) -> Classifier:
    """Returns a network with published weights, or with weights of the user's for ImageNet.

    Args:
      name: the network.
      tag: which of its weights; by default those in the file, or V1 if the file is not a published
        one.
      path: a file to read the weights from, instead of looking for them. Photographs are prepared
        as the published weights of `tag` expect them.
      resize: length of the shorter side before the crop, in pixels; by default as published.

    Raises `ValueError` if there are no such weights, or if the file has those of another tag.
    """
    from cnnjax.data.photographs import open_rgb
    from cnnjax.weights.preprocessing import resize_and_crop

    record, is_published = _find_record(name, tag, path)
    resized = record.resized(resize)
    accuracies = {}
    if is_published:
        accuracies = {"top-1": record.top1, "top-5": record.top5}
    return Classifier(
        title=f"{record.network} {record.tag if is_published else path}",
        published=accuracies,
        classes=records.imagenet_classes(),
        multi_label=False,
        views=1,
        read=lambda file: resize_and_crop(open_rgb(file), resized),
        moments=imagenet.MOMENTS,
        load=lambda: _load(name, record.tag, path),
    )


def _load(name: str, tag: str, path: str | None) -> tuple["Network", dict]:
    """Loads a network and its weights; arguments as `published`."""
    from cnnjax import weights
    from cnnjax.models import create_model

    model = create_model(name, **weights.fields_for(name, "imagenet" if path is None else path))
    file = weights.fetch(name, tag) if path is None else path
    return model, weights.load_torchvision(file, model)


def _find_record(name: str, tag: str | None, path: str | None) -> tuple[records.Record, bool]:
    """Returns the record whose preprocessing applies, and whether the weights are published ones.

    Arguments as `published`.
    """
    record = records.find(name, tag or records.V1)
    if path is None:
        return record, True
    # A file of another network is refused when it is loaded.
    file_record = records.of_file(path)
    if file_record is None or file_record.network != record.network:
        return record, False
    if tag is not None:
        records.check_tag(record, path, "weights")
    return file_record, True


def trained(folder: pathlib.Path) -> Classifier:
    """Returns the network of a finished training run, with as many views as it was tested with.

    Raises `ValueError` if `open_run` refuses the folder, or if the run labels pixels or takes
    images whose channels photographs do not have.
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
        title=str(folder),
        published={},
        classes=run.classes,
        multi_label=run.multi_label,
        views=run.config.test_views,
        read=functools.partial(run.read, views=run.config.test_views),
        moments=run.moments,
        load=lambda: (run.model, run.variables),
    )


def logits(
    classifier: Classifier,
    files: list[pathlib.Path],
    parallel: "Parallel",
    batch_size: int,
    damaged: set[pathlib.Path] | None = None,
) -> Iterator[np.ndarray]:
    """Yields the logits of photographs, [batch, classes], in order.

    With several views of a photograph, they are the logarithms of its mean probabilities.

    Args:
      classifier: the network.
      files: the photographs.
      parallel: how the network is run on the devices.
      batch_size: the most photographs per batch, over all devices, which share it evenly.
      damaged: a set to which files that cannot be decoded are added. They are logged and left out;
        once a row is yielded, the set has all such files before its photograph. None refuses them.

    Raises `ValueError` before anything is computed if a file is not an image, and, after the
    batches before it, if an image cannot be decoded completely. With `damaged`, it is only raised
    after these batches, and only if a file cannot be read.
    """
    from cnnjax.train.evaluate import averaged, predict_batches

    if damaged is None:
        _check_headers(files)
    # Batches are filled up to their size: a few photographs would be computed as a full batch.
    batch_size = min(batch_size, parallel.round_up(max(1, len(files))))
    model, variables = classifier.load()
    yield from predict_batches(
        parallel,
        model,
        parallel.replicate(variables),
        parallel.replicate(classifier.moments),
        batches=_batches(classifier, files, batch_size, damaged),
        batch_size=batch_size,
        output=averaged(classifier.views),
    )


def _check_headers(files: list[pathlib.Path]) -> None:
    """Raises `ValueError` if the header of a file is not that of an image."""
    from cnnjax.data.photographs import image_size

    # On a remote file system, files are opened faster several at a time.
    with concurrent.futures.ThreadPoolExecutor(host.cores()) as pool:
        for _ in pool.map(image_size, files):
            pass


def _batches(
    classifier: Classifier,
    files: list[pathlib.Path],
    size: int,
    damaged: set[pathlib.Path] | None,
) -> Iterator[np.ndarray]:
    """Yields uint8 [at most size, height, width, channels]; `damaged` as in `logits`."""
    from cnnjax.data.photographs import Damaged

    def read(file: pathlib.Path) -> np.ndarray | Damaged:
        try:
            return classifier.read(file)
        except Damaged as error:
            return error

    # Pillow decodes and resizes outside Python's lock, so threads suffice.
    with concurrent.futures.ThreadPoolExecutor(host.cores()) as pool:
        for start in range(0, len(files), size):
            batch = files[start : start + size]
            images = []
            for file, image in zip(batch, pool.map(read, batch)):
                if not isinstance(image, Damaged):
                    images.append(image)
                elif damaged is None:
                    raise image
                else:
                    _LOG.warning("passed over: %s", image)
                    damaged.add(file)
            if images:
                yield np.stack(images)


# ------------------------------------------------------------------ the command line


def add_options(parser: command.Parser) -> None:
    """Adds the options that name a network and its weights."""
    parser.add_argument(
        "model",
        metavar="NAME_OR_RUN",
        help="a network with published weights, such as resnet50, or a run's work directory",
    )
    parser.add_argument(
        "--tag",
        help=f"which published weights to use (default: those in FILE, or {records.V1})",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a .pth or safetensors file (default: found or downloaded by name)",
    )
    parser.add_argument(
        "--resize",
        type=command.whole_number(1),
        metavar="PIXELS",
        help="length of the shorter side before the crop, in pixels (default: as published)",
    )


def run_folder(options: argparse.Namespace) -> pathlib.Path | None:
    """Returns the work directory that the options name; None if they name a network.

    Raises `ValueError` if an option does not apply to a run, or if a path is empty or not
    a folder.
    """
    if not options.model:
        raise ValueError("model='' is not a path")
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
        try:
            return trained(folder)
        except ValueError as error:
            if options.model not in {record.network for record in records.list_weights()}:
                raise
            raise ValueError(
                f"{error}; a folder of this name is taken before the network {options.model}"
            ) from error
    try:
        records.find(options.model)
    except ValueError as error:
        raise ValueError(f"there is no folder {options.model!r}, and {error}") from error
    return published(
        options.model,
        tag=options.tag,
        path=options.weights,
        resize=options.resize,
    )
