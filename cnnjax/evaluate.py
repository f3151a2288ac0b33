"""Top-1 and top-5 accuracy of published ImageNet weights on a folder of labeled photographs.

    python -m cnnjax.evaluate resnet50 --data_dir FOLDER [--tag imagenet1k_v2] [--weights FILE]

Labels come from the folder:

- FOLDER/CLASS/IMAGE with 1,000 class folders in ImageNet's order of names (n01440764, ...);
- FOLDER/CLASS/IMAGE with any number of folders named by the class's number or name (0 or tench);
- FOLDER/NUMBER_IMAGE, where every file name begins with the class's number (000_tench.jpg).

Photographs are resized, cropped and normalized as the weights expect; those that are cropped
already need `--resize 224`. They are decoded while the devices compute, and each batch is divided
over all devices.
"""

import argparse
import concurrent.futures
import logging
import pathlib
import re
import sys
from collections.abc import Iterator

import numpy as np

from cnnjax.runtime import backend, command
from cnnjax.runtime.progress import progress
from cnnjax.weights import Record, records

_LOG = logging.getLogger("cnnjax")
_NUMBERED = re.compile(r"(\d{1,4})_.*", re.DOTALL)


def _folder_labels(folders: list[str]) -> list[int]:
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


def list_labeled(folder: pathlib.Path) -> tuple[list[pathlib.Path], np.ndarray]:
    """Lists a validation folder's photographs and their labels, int32 [n].

    Raises `ValueError` if there are none or a label cannot be told.
    """
    from cnnjax.data import photographs, stream

    if not folder.is_dir():
        raise ValueError(f"data_dir={str(folder)!r} is not a folder")
    listing = photographs.list_folder(folder)
    if listing.folders:
        source = stream.Folder(folder)
        if source.passed_over:
            _LOG.info("%s: %s", folder, source.passed_over)
        of_folder = _folder_labels(list(source.classes))
        files = [path for path, _ in source.files]
        labels = [of_folder[number] for _, number in source.files]
        return files, np.array(labels, np.int32)
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


def _batches(files: list[pathlib.Path], record: Record, size: int) -> Iterator[np.ndarray]:
    """Yields uint8 [size, crop, crop, 3]; the last batch may be shorter."""
    from cnnjax.data import photographs
    from cnnjax.weights.preprocessing import resize_and_crop

    def read(path: pathlib.Path) -> np.ndarray:
        return resize_and_crop(photographs.open_rgb(path), record)

    # Pillow decodes and resizes outside Python's lock, so threads suffice.
    with (
        concurrent.futures.ThreadPoolExecutor(backend.cores()) as pool,
        progress(len(files), "photographs") as advance,
    ):
        for start in range(0, len(files), size):
            images = list(pool.map(read, files[start : start + size]))
            yield np.stack(images)
            advance(len(images))


def evaluate(
    name: str,
    folder: pathlib.Path,
    *,
    tag: str = records.V1,
    path: str | None = None,
    resize: int | None = None,
    batch_size: int = 64,
) -> dict:
    """Scores published weights on a folder of labeled photographs.

    - `path`: a file to read the weights from, instead of looking for them.
    - `resize`: pixels of the shorter side, instead of the published ones.
    - `batch_size`: photographs that all devices take together.

    Returns {"n": photographs, "top1": percent, "top5": percent}.
    """
    from cnnjax.train.evaluate import predict, score
    from cnnjax.train.parallel import Parallel
    from cnnjax.weights import load_pretrained

    record = records.find(name, tag).resized(resize)
    files, labels = list_labeled(folder)
    parallel = Parallel()
    if batch_size % parallel.size:
        raise ValueError(f"batch_size={batch_size} is not a multiple of {parallel.size} devices")
    model, variables = load_pretrained(name, tag=tag, path=path)
    moments = (np.asarray(record.mean, np.float32), np.asarray(record.std, np.float32))
    logits = predict(
        parallel,
        model,
        parallel.replicate(variables),
        parallel.replicate(moments),
        _batches(files, record, batch_size),
        batch_size,
    )
    found = score("cross_entropy", logits, labels)
    return {
        "n": len(files),
        "top1": 100 * (1 - found["error"]),
        "top5": 100 * (1 - found["top5_error"]),
    }


def _work(options: argparse.Namespace) -> None:
    if pathlib.Path(options.model).expanduser().is_dir():
        raise ValueError(
            f"model={options.model!r} is a folder; expected a network with published weights (the "
            "test scores of a training run are in its report.md)"
        )
    record = records.find(options.model, options.tag)
    backend.start()
    found = evaluate(
        options.model,
        options.data_dir.expanduser(),
        tag=options.tag,
        path=options.weights,
        resize=options.resize,
        batch_size=options.batch_size,
    )
    print(f"{record.network} {record.tag}, {found['n']:,} photographs")
    print(f"top-1 {found['top1']:6.2f} %   published, on 50,000: {record.top1:.3f} %")
    print(f"top-5 {found['top5']:6.2f} %   published, on 50,000: {record.top5:.3f} %")


def main(arguments: list[str] | None = None) -> int:
    """The command line -> the exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(prog="python -m cnnjax.evaluate", description=__doc__)
    parser.add_argument("model", help="a network with published weights, such as resnet50")
    parser.add_argument(
        "--data_dir",
        type=pathlib.Path,
        required=True,
        metavar="FOLDER",
        help="the validation photographs",
    )
    parser.add_argument("--tag", default=records.V1, help="default: %(default)s")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a .pth or safetensors file (default: found or downloaded by name)",
    )
    parser.add_argument(
        "--resize",
        type=command.whole(1),
        metavar="PIXELS",
        help="of the shorter side, before the crop (default: as published)",
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
