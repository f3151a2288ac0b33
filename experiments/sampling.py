"""Does a shift change the class that a network gives? Sampling crossed with padding.

    python -m experiments.sampling --data_dir data --workdir runs/sampling
        [--seeds 5] [--samplings stride ...] [--paddings zeros ...] [--networks convnet resnet]

Networks are trained on the middle 24x24 of the 32x32 px of CIFAR-10 images under each sampling and
padding: "convnet" has three convolutions and two max-pools, "resnet" a 7x7 convolution and three
residual blocks. Both have a stride of 8 in total, which divides 24 px without remainder. "resnet18"
has a stride of 32, so its images are enlarged to 43x43 px and their middle has 32x32 px; its last
maps are of one pixel, which `reflect` cannot pad. Networks of one seed start from the same weights
and see the same batches; only their sampling and padding differ.

A trained network then sees pairs of shifted versions of one image. Consistency is the share of
pairs that get the same class (Zhang 2019, arXiv 1904.11486). The pairs are two circular shifts by
any number of pixels in each direction, or two windows of the size of the middle, as in random
crops. Before and after training, the exact linear readout reads horizontal position (H) from
all stages together. Finished networks are not trained again. Writes report.md, sampling.json and
sampling.png.
"""

import itertools
import sys
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cnnjax import study
from cnnjax.data import arrays
from cnnjax.models import Network, create_model
from cnnjax.models.fcn import SceneNet
from cnnjax.models.small import SmallResNet
from cnnjax.nn import FILLS, SAMPLINGS
from cnnjax.position.encoder import FEATURE_SIZE, encode, stage_shapes
from cnnjax.position.metrics import scores
from cnnjax.position.readout import fit_exact
from cnnjax.position.targets import target
from cnnjax.runtime import tables
from cnnjax.train.small import classify, resize, train_epochs

# The side of a window over that of its image.
_SHARE = 24 / 32
# Numbers of test images to fit the readout to, to choose its strength on, and to score it on.
_PROBE = (64, 16, 48)
_BATCH = 100
NETWORKS = {
    "convnet": SceneNet(num_classes=10, input_shape=(24, 24, 3), blocks=((16,), (32,), (64,))),
    "resnet": SmallResNet(num_classes=10, input_shape=(24, 24, 3), widths=(16, 32, 64)),
    "resnet18": create_model("resnet18", num_classes=10, input_shape=(32, 32, 3)),
}


class Column(NamedTuple):
    """A column of the tables: a field of the results, and how it is shown."""

    field: str
    heading: str
    factor: int
    digits: int


COLUMNS = (
    Column("accuracy", "accuracy, %", factor=100, digits=1),
    Column("circular", "consistency, circular shifts, %", factor=100, digits=1),
    Column("crops", "consistency, two crops, %", factor=100, digits=1),
    Column("before", "R2 of H, random weights", factor=1, digits=2),
    Column("after", "R2 of H, trained", factor=1, digits=2),
)


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    network: str
    sampling: str
    padding: str
    seed: int


def add_options(parser):
    parser.add_workdir("runs/sampling")
    parser.add_data_dir()
    parser.add_names("networks", NETWORKS, ["convnet", "resnet"])
    parser.add_names("samplings", SAMPLINGS, ["stride", "blur", "aps"])
    parser.add_names("paddings", FILLS, ["zeros", "symmetric", "reflect", "circular", "partial"])
    parser.add_count("seeds", 5, "networks of each kind")
    parser.add_count("train", 5000, "training images of a network", _BATCH)
    parser.add_count("epochs", 3, "training epochs")
    parser.add_count("test", 1000, "test images")


def load(options) -> arrays.Dataset:
    """Loads CIFAR-10, and checks that every network has an output."""
    data = arrays.load("cifar10", options.data_dir)
    arrays.check_counts(data, options.train, options.test)
    for point in points(options):
        model = build(point)
        stage_shapes(model, window(model))
    return data


def points(options):
    grid = itertools.product(
        range(options.seeds), options.networks, options.samplings, options.paddings
    )
    for seed, network, sampling, padding in grid:
        yield Point(network, sampling, padding, seed)


# --- One network ----------------------------------------------------------------------------------


def build(point: Point) -> Network:
    return NETWORKS[point.network].clone(sampling=point.sampling, padding=point.padding)


def window(model: Network) -> int:
    """Returns the side of a network's images, in pixels."""
    return model.input_shape[0]


def enlarge(split: arrays.Split, size: int) -> arrays.Split:
    """Resizes images so that a window of `size` pixels a side shows the same share of each."""
    side = round(size / _SHARE)
    if side == split.images.shape[1]:
        return split
    return resize(split, side)


def middle(images: np.ndarray, size: int) -> np.ndarray:
    """Cuts the middle window out of each image."""
    start = (images.shape[1] - size) // 2
    return images[:, start : start + size, start : start + size]


def circular_shifts(images: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Shifts each image's middle window circularly, by its own rows and columns."""
    shifts = generator.integers(0, size, (len(images), 2))
    shifted = [np.roll(image, shift, (0, 1)) for image, shift in zip(middle(images, size), shifts)]
    return np.stack(shifted)


def random_crops(images: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Cuts a window out of each image at a random place."""
    places = generator.integers(0, images.shape[1] - size + 1, (len(images), 2))
    windows = [
        image[top : top + size, left : left + size] for image, (top, left) in zip(images, places)
    ]
    return np.stack(windows)


def consistency(model: Network, variables: dict, images: np.ndarray, move, seed: int) -> float:
    """Returns the share of images that get the same class after two random moves."""
    generator = np.random.default_rng(seed)
    first = classify(model, variables, move(images, window(model), generator))
    second = classify(model, variables, move(images, window(model), generator))
    return float((first == second).mean())


def position(model: Network, variables: dict, images: np.ndarray) -> float:
    """Returns R2 of H by the exact linear readout of all stages, on unseen images."""
    goal = target("H", FEATURE_SIZE)
    features = encode(model, variables, images, list(stage_shapes(model, window(model))))
    train, held_out, test = np.split(features, np.cumsum(_PROBE)[:-1])
    predicted = fit_exact(train, held_out, goal[None])(test)
    return float(scores(predicted[:, 0], goal)["r2"].mean())


def measure(point: Point, options, data: arrays.Dataset) -> dict:
    """Trains a network on images chosen by its seed, and tests it."""
    model = build(point)
    size = window(model)
    train = enlarge(data.train.draw(options.train, point.seed), size)
    train = arrays.Split(middle(train.images, size), train.labels)
    test = enlarge(data.test.take(slice(options.test)), size)
    probed = enlarge(data.test.take(slice(-sum(_PROBE), None)), size)
    probed = middle(probed.images, size)
    # The first variables are the initial ones, the last ones are trained.
    epochs = train_epochs(model, train, options.epochs, point.seed, batch_size=_BATCH)
    before = position(model, next(epochs), probed)
    *_, variables = epochs
    predicted = classify(model, variables, middle(test.images, size))
    return {
        "accuracy": float((predicted == test.labels).mean()),
        "circular": consistency(model, variables, test.images, circular_shifts, point.seed),
        "crops": consistency(model, variables, test.images, random_crops, point.seed),
        "before": before,
        "after": position(model, variables, probed),
    }


# --- Report ---------------------------------------------------------------------------------------


def tabulate(results: list[dict]) -> str:
    headings = [column.heading for column in COLUMNS]
    lines = []
    names = ("network", "sampling", "padding")
    for group in itertools.product(*(study.unique(results, name) for name in names)):
        fields = dict(zip(names, group))
        cells = []
        for column in COLUMNS:
            values = column.factor * study.values(results, column.field, **fields)
            cells.append(tables.interval(values, column.digits))
        lines.append([*group, *cells, str(len(study.select(results, **fields)))])
    return tables.table([*names, *headings, "n"], lines)


def tabulate_differences(results: list[dict], varied: str = "sampling") -> str:
    """Tabulates differences between all pairs of samplings or paddings, paired by seed.

    Args:
      results: the networks' results.
      varied: what the networks of a pair differ in, "sampling" or "padding".
    """
    # What the networks of a pair share.
    shared = "padding" if varied == "sampling" else "sampling"
    headings = [column.heading for column in COLUMNS]
    pairs = list(itertools.combinations(study.unique(results, varied), 2))
    seeds = str(len(study.unique(results, "seed")))
    lines = []
    groups = itertools.product(
        study.unique(results, "network"), study.unique(results, shared), pairs
    )
    for network, shared_name, (first, second) in groups:
        fields = {"network": network, shared: shared_name}
        cells = []
        for column in COLUMNS:
            first_values = study.values(results, column.field, **fields, **{varied: first})
            second_values = study.values(results, column.field, **fields, **{varied: second})
            differences = column.factor * (second_values - first_values)
            cells.append(tables.interval(differences, column.digits, "+"))
        lines.append([network, shared_name, f"{second} - {first}", *cells, seeds])
    return tables.table(["network", shared, varied, *headings, "n"], lines)


def draw(results: list[dict]) -> Figure:
    """Draws consistency and position by padding: a row for each network."""
    networks = study.unique(results, "network")
    paddings = study.unique(results, "padding")
    figure = Figure(figsize=(11, 2.6 * len(networks)), layout="constrained")
    shown = [column for column in COLUMNS if column.field in ("circular", "crops", "after")]
    axes = figure.subplots(len(networks), len(shown), squeeze=False)
    for network, row in zip(networks, axes):
        for axis, column in zip(row, shown):
            series = {}
            for sampling in study.unique(results, "sampling"):
                fields = {"network": network, "sampling": sampling}
                series[sampling] = [
                    column.factor * study.values(results, column.field, padding=padding, **fields)
                    for padding in paddings
                ]
            study.draw_bars(axis, series)
            axis.set_xticks(range(len(paddings)), paddings, fontsize=8)
            axis.set_title(f"{network}: {column.heading}", fontsize=9)
            if column.factor == 100:
                axis.set_ylim(0, 102)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def report(results: list[dict], options) -> study.Report:
    text = f"""# Sampling and padding

Networks on CIFAR-10, {options.train:,} training images, {options.epochs} epochs. Mean ± half
of the 95 % interval over n seeds, which draw the weights, the training images and their order, and
the shifts. Consistency: the share of {options.test:,} test images whose class two random shifts
leave the same. The test images, and those that H is read from, are the same for all seeds. The
figure's bars are standard deviations.

{tabulate(results)}
Differences between two samplings, paired by seed:

{tabulate_differences(results)}
Differences between two paddings, paired by seed:

{tabulate_differences(results, "padding")}
![Consistency and position](sampling.png)
"""
    return study.Report(text, {"sampling.png": draw(results)})


STUDY = study.Study(
    description=__doc__,
    results="sampling.json",
    add_options=add_options,
    axes=("networks", "samplings", "paddings", "seeds"),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
