"""What do MobileNetV2's ImageNet features know about CIFAR-10?

    python -m experiments.probe --weights FILE --data_dir data --workdir runs/probe [--repeats 3]

A linear probe is fitted to the 1280 pooled features and compared with the same probe on untrained
features. FILE contains torchvision's MobileNetV2; its classifier is not used. Images are resized to
`size` pixels. The probe is ridge regression, with its strength chosen on a held-out fifth of the
training images; the test set is used once per probe. Every repetition has its own training images.
Writes report.md and probe.json.
"""

import functools
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import study, weights
from cnnjax.data import arrays
from cnnjax.models import Network, create_model
from cnnjax.runtime import command, imagenet, tables
from cnnjax.runtime.progress import progress
from cnnjax.train import evaluate
from cnnjax.train.parallel import Parallel
from cnnjax.transfer import linear_probe

_BATCH = 128
_FEATURES = 1280


class Point(NamedTuple):
    weights: str
    repetition: int


def add_options(parser):
    parser.add_argument(
        "--weights",
        type=command.path,
        required=True,
        help="a safetensors or .pth file with torchvision's names",
    )
    parser.add_data_dir()
    parser.add_workdir("runs/probe")
    parser.add_count("train", 10_000, "training images of one probe", 50)
    parser.add_count("test", 10_000, "test images")
    parser.add_count("size", 96, "pixels that images are resized to")
    parser.add_count("repeats", 3, "probes, each on other training images")


def points(options):
    return itertools.starmap(
        Point, itertools.product(("ImageNet", "untrained"), range(options.repeats))
    )


class Shared(NamedTuple):
    """The images of all probes, and their features [n, 1280] by origin of the weights.

    `features` returns those of the training and of the test images, which are computed once.
    """

    train: arrays.Split
    test: arrays.Split
    features: Callable[[str], tuple[np.ndarray, np.ndarray]]


def load(options) -> Shared:
    """Loads the networks and the images that all probes share."""
    networks = {"ImageNet": open_features(options.weights), "untrained": open_features(None)}
    data = arrays.load("cifar10", options.data_dir)
    count = options.train * options.repeats
    n_train = len(data.train.images)
    n_test = len(data.test.images)
    if count > n_train or options.test > n_test:
        raise ValueError(
            f"train={options.train} times repeats={options.repeats} and test={options.test} do not "
            f"fit: CIFAR-10 has {n_train} training and {n_test} test images"
        )
    train = data.train.draw(count, 0)
    test = data.test.take(slice(options.test))

    @functools.cache
    def features(name):
        network = networks[name]
        of_train = extract(*network, train.images, options.size)
        return of_train, extract(*network, test.images, options.size)

    return Shared(train, test, features)


def open_features(path: pathlib.Path | None) -> tuple[Network, dict]:
    """Returns MobileNetV2 with pooled features as logits; without a file, it is untrained."""
    model = create_model("mobilenet_v2", num_classes=_FEATURES)
    if path is None:
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *model.input_shape)))
    else:
        variables = weights.load_torchvision(path, model, missing="classifier")
    identity = {"kernel": jnp.eye(_FEATURES), "bias": jnp.zeros(_FEATURES)}
    return model, variables | {"params": variables["params"] | {"classifier.1": identity}}


# Cached, because `evaluate.compiled` compiles a program for each function object.
@functools.cache
def on_resized(size: int) -> Callable:
    """Returns a function of (model, variables, images) that resizes the images first."""

    def compute(model, variables, images):
        images = jax.image.resize(images, (len(images), size, size, 3), "bilinear")
        return model.apply(variables, images)

    return compute


def extract(model: Network, variables: dict, images: np.ndarray, size: int) -> np.ndarray:
    """Returns the features [n, 1280] of uint8 images, resized to `size` pixels."""
    parallel = Parallel()
    variables, moments = parallel.replicate((variables, imagenet.MOMENTS))
    with progress(len(images), "images") as advance:

        def batches():
            for batch in evaluate.batches_of(images, _BATCH):
                yield batch
                advance(len(batch))

        features = evaluate.predict_batches(
            parallel,
            model,
            variables,
            moments,
            batches=batches(),
            batch_size=_BATCH,
            output=on_resized(size),
        )
        return np.concatenate(list(features))


def measure(point: Point, options, shared: Shared) -> dict:
    """Fits and scores the probe of one repetition."""
    start = point.repetition * options.train
    part = slice(start, start + options.train)
    train, test = shared.features(point.weights)
    accuracy, strength = linear_probe(
        train[part], shared.train.labels[part], test, shared.test.labels
    )
    return {"accuracy": accuracy, "strength": strength}


def report(results: list[dict], options) -> study.Report:
    lines = []
    for name in study.unique(results, "weights"):
        accuracy = study.values(results, "accuracy", weights=name)
        strengths = study.values(results, "strength", weights=name)
        chosen = ", ".join(f"{strength:g}" for strength in strengths)
        lines.append([name, tables.spread(100 * accuracy, 2), str(len(accuracy)), chosen])
    table = tables.table(["weights", "mean ± std", "n", "strengths chosen"], lines)
    text = f"""# A linear probe on MobileNetV2's features

CIFAR-10 at {options.size} px, {options.train:,} training and {options.test:,} test images; accuracy
in percent, over disjoint sets of training images.

{table}"""
    return study.Report(text, {})


STUDY = study.Study(
    description=__doc__,
    results="probe.json",
    add_options=add_options,
    axes=("repeats",),
    files=("weights",),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
