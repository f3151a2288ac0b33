"""The five likeliest classes of photographs.

    python -m cnnjax.predict resnet50 photo.jpg ... [--tag imagenet1k_v2] [--weights FILE]
    python -m cnnjax.predict runs/mine photo.jpg folder ...

The first form uses published ImageNet weights, found on this machine or downloaded; the second the
network of a finished training run. Photographs are prepared as the network was trained.
"""

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cnnjax.runtime import backend, command
from cnnjax.weights import records

if TYPE_CHECKING:
    from cnnjax.models import Network

_BATCH = 32
_SHOWN = 5


class Task(NamedTuple):
    """Photographs, and the network that is to classify them."""

    model: "Network"
    variables: dict
    images: np.ndarray  # float32 [n, height, width, channels], normalized
    classes: tuple[str, ...]
    activation: str = "softmax"  # or "sigmoid", where a photograph has several classes


def published(
    name: str,
    photographs: list[pathlib.Path],
    *,
    tag: str = records.V1,
    path: str | None = None,
    resize: int | None = None,
) -> Task:
    """Prepares photographs for a network with published weights.

    - `path`: a file to read the weights from, instead of looking for them.
    - `resize`: pixels of the shorter side, instead of the published ones.
    """
    from cnnjax.weights import load_pretrained, preprocess

    record = records.find(name, tag).resized(resize)
    images = [preprocess(photograph, record) for photograph in photographs]
    model, variables = load_pretrained(name, tag=tag, path=path)
    return Task(model, variables, np.stack(images), records.imagenet_classes())


def trained(folder: pathlib.Path, photographs: list[pathlib.Path]) -> Task:
    """Prepares photographs for the network of a finished training run.

    Raises `ValueError` if it is none, or if it labels pixels instead of photographs.
    """
    from cnnjax.data.photographs import open_rgb
    from cnnjax.data.stream import center
    from cnnjax.train.run import open_run

    run = open_run(folder)
    if run.config.loss == "pixelwise":
        raise ValueError(f"{folder} is a run that labels every pixel; expected one of photographs")
    height, _, channels = run.image_shape
    images = []
    for photograph in photographs:
        image = center(open_rgb(photograph.expanduser()), height, run.resize)
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32)
        images.append((pixels.reshape(run.image_shape) / 255 - run.mean) / run.std)
    activation = "sigmoid" if run.config.loss == "sigmoid" else "softmax"
    return Task(run.model, run.variables, np.stack(images), run.classes, activation)


def probabilities(task: Task) -> np.ndarray:
    """Returns the probabilities [n, classes] of the classes."""
    import jax

    from cnnjax.train.evaluate import logits

    activation = getattr(jax.nn, task.activation)

    @jax.jit
    def compute(variables, batch):
        return activation(logits(task.model, variables, batch))

    # The last batch is filled up, so that one program is compiled.
    size = min(len(task.images), _BATCH)
    variables = jax.device_put(task.variables)
    found = []
    for start in range(0, len(task.images), size):
        batch = task.images[start : start + size]
        filled = np.zeros((size, *batch.shape[1:]), np.float32)
        filled[: len(batch)] = batch
        found.append(np.asarray(compute(variables, filled))[: len(batch)])
    return np.concatenate(found)


def _list_images(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """Lists files, and the images in folders."""
    from cnnjax.data.photographs import list_photographs

    found = []
    for path in paths:
        found += list_photographs(path) if path.is_dir() else [path]
    return found


def _work(options: argparse.Namespace) -> None:
    images = _list_images(options.photographs)
    backend.start()
    folder = pathlib.Path(options.model).expanduser()
    if folder.is_dir():
        if options.weights or options.resize:
            raise ValueError("weights and resize are those of the run; leave out the options")
        task = trained(folder, images)
    elif folder.name != options.model:
        raise ValueError(f"{folder} is neither a network's name nor a run's work directory")
    else:
        task = published(
            options.model,
            images,
            tag=options.tag,
            path=options.weights,
            resize=options.resize,
        )
    for photograph, row in zip(images, probabilities(task)):
        print(photograph)
        for number in np.argsort(-row, kind="stable")[:_SHOWN]:
            print(f"  {100 * row[number]:6.2f} %  {task.classes[number]}")


def main(arguments: list[str] | None = None) -> int:
    """The command line -> the exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(prog="python -m cnnjax.predict", description=__doc__)
    parser.add_argument("model", metavar="NAME_OR_RUN", help="a network, or a run's work directory")
    parser.add_argument(
        "photographs",
        nargs="+",
        type=command.path,
        metavar="PHOTO",
        help="an image file, or a folder of them",
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
    options = parser.parse_args(arguments)
    return command.run(lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())
