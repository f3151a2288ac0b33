"""The five likeliest classes of photographs.

    python -m cnnjax.predict resnet50 photo.jpg ... [--tag imagenet1k_v2] [--weights FILE]
    python -m cnnjax.predict runs/mine photo.jpg ...

The first form uses published ImageNet weights, found on this machine or downloaded; the second the
network of a finished training run. Photographs are prepared as the network was trained.
"""

import argparse
import pathlib
import sys

import numpy as np

from cnnjax.runtime import backend, command
from cnnjax.weights import records

_BATCH = 32
_SHOWN = 5


def published(
    name: str,
    photographs: list[pathlib.Path],
    *,
    tag: str = records.V1,
    path: str | None = None,
    resize: int | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classifies photographs by published weights.

    - `path`: a file to read the weights from, instead of looking for them.
    - `resize`: pixels of the shorter side, instead of the published ones.

    Returns probabilities [n, 1000] and the classes' names.
    """
    from cnnjax.weights import load_pretrained, preprocess

    record = records.find(name, tag).resized(resize)
    images = np.stack([preprocess(photograph, record) for photograph in photographs])
    model, variables = load_pretrained(name, tag=tag, path=path)
    return probabilities(model, variables, images), records.imagenet_classes()


def probabilities(model, variables: dict, images: np.ndarray) -> np.ndarray:
    """Returns the classes' probabilities [n, classes] of normalized images."""
    import jax

    from cnnjax.train.evaluate import logits

    # Batches of one size, so that one program is compiled.
    size = min(len(images), _BATCH)
    found = []
    apply = jax.jit(lambda variables, batch: jax.nn.softmax(logits(model, variables, batch)))
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        filled = np.zeros((size, *images.shape[1:]), np.float32)
        filled[: len(batch)] = batch
        found.append(np.asarray(apply(variables, filled))[: len(batch)])
    return np.concatenate(found)


def _work(options: argparse.Namespace) -> None:
    backend.start()
    found, classes = published(
        options.model,
        options.photographs,
        tag=options.tag,
        path=options.weights,
        resize=options.resize,
    )
    for photograph, row in zip(options.photographs, found):
        print(photograph)
        for number in np.argsort(-row, kind="stable")[:_SHOWN]:
            print(f"  {100 * row[number]:6.2f} %  {classes[number]}")


def main(arguments: list[str] | None = None) -> int:
    """The command line -> the exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(prog="python -m cnnjax.predict", description=__doc__)
    parser.add_argument("model", metavar="NAME_OR_RUN", help="a network, or a run's work directory")
    parser.add_argument("photographs", nargs="+", type=pathlib.Path, metavar="PHOTO")
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
