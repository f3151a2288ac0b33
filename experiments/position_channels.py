"""Position in the order of channels: what survives a global average, and a permutation?

    python -m experiments.position_channels --data_dir data --workdir runs/position_channels
        [--seeds 3]

After Islam et al., ICCV 2021, arXiv 2108.07884. A CIFAR-10 image lies in one cell of a black canvas
of 3x3 cells, and a small ResNet with zero padding is trained to name the cell or the object. It has
two versions. GAPNet ends in a 3x3 convolution whose global average is the logits. PermuteNet
permutes the averaged channels anew in every forward pass, in training and test, before a linear
layer. This loses the order of the channels, but not their values.

Then ridge regression reads the cell and the object from the frozen averages. Finally, the channels
of GAPNet that change most between an image and its mirror image are set to zero and, for
comparison, as many random channels. Finished networks are not trained again. Writes report.md,
channels.json and channels.png.
"""

import itertools
import sys
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cnnjax import study
from cnnjax.data import arrays
from cnnjax.models.small import SmallResNet
from cnnjax.position.canvas import GRID, TASKS
from cnnjax.position.canvas import draw as draw_canvases
from cnnjax.runtime import tables
from cnnjax.train.small import classify, pooled_features, train_epochs
from cnnjax.transfer import linear_probe

NETWORKS = ("gapnet", "permutenet")
# From 9 runs logged in github.com/islamamirul/PermuteNet; its other figures are not at hand.
PUBLISHED = {("gapnet", "location"): "100.0"}
# The authors' Adam; they train ResNet-18 on all images for 20 epochs in batches of 48.
_MOMENTUM = 0.5
_BATCH = 50
_REMOVED = (0, 4, 8, 16, 24, 32, 48)  # numbers of channels set to zero
_DRAWS = 3  # random choices of as many channels
_ORDERS = {"ranked": "the most position-encoding", "random": "at random"}


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    network: str
    task: str
    seed: int


def add_options(parser):
    parser.add_workdir("runs/position_channels")
    parser.add_data_dir()
    parser.add_count("seeds", 3, "networks of each kind")
    parser.add_count("train", 4000, "training images of a network", _BATCH)
    parser.add_count("epochs", 6, "training epochs")
    parser.add_count("test", 1000, "test images")


def load(options) -> arrays.Dataset:
    data = arrays.load("cifar10", options.data_dir)
    arrays.check_counts(data, options.train, options.test)
    return data


def points(options):
    return itertools.starmap(Point, itertools.product(NETWORKS, TASKS, range(options.seeds)))


# --- One network ----------------------------------------------------------------------------------


def without(variables: dict, channels: np.ndarray) -> dict:
    """Returns GAPNet's variables with a head that does not read these channels of the last stage.

    The logits are the same as with these channels set to zero.
    """
    head = variables["params"]["head"]
    kernel = head["kernel"].at[:, :, channels].set(0)
    return variables | {"params": variables["params"] | {"head": head | {"kernel": kernel}}}


def rank(features: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Orders channels by how much mirroring changes them, the most first.

    `features` and `mirrored` are the averaged channels f(x) and f(mirrored x), [n, channels]. The
    change is the mean of |f(x) - f(mirrored x)| over the images.
    """
    change = np.abs(features - mirrored).mean(0)
    return np.argsort(-change)


def measure(point: Point, options, data: arrays.Dataset) -> dict:
    """Trains one network; measures its accuracy whole, by readouts, and without channels."""
    network, task, seed = point
    # Training and test draw with different seeds.
    train, train_labels = draw_canvases(data.train, options.train, 2 * seed)
    test, labels = draw_canvases(data.test, options.test, 2 * seed + 1)
    permute = network == "permutenet"
    model = SmallResNet(TASKS[task], input_shape=train.shape[1:], permute=permute)
    *_, variables = train_epochs(
        model,
        arrays.Split(train, train_labels[task]),
        options.epochs,
        seed,
        batch_size=_BATCH,
        momentum=_MOMENTUM,
    )

    def accuracy(variables):
        return float((classify(model, variables, test) == labels[task]).mean())

    features = pooled_features(model, variables, train)
    test_features = pooled_features(model, variables, test)
    result = {"accuracy": accuracy(variables)}
    for name in TASKS:
        read, _ = linear_probe(features, train_labels[name], test_features, labels[name])
        result[f"read_{name}"] = read
    if permute:
        return result

    ranked = rank(features, pooled_features(model, variables, train[:, :, ::-1]))
    generators = [np.random.default_rng([seed, number]) for number in range(_DRAWS)]
    orders = [generator.permutation(len(ranked)) for generator in generators]
    result |= {"channels": len(ranked), "ranked": [], "random": []}
    for count in _REMOVED:
        result["ranked"].append(accuracy(without(variables, ranked[:count])))
        drawn = [accuracy(without(variables, order[:count])) for order in orders]
        result["random"].append(float(np.mean(drawn)))
    return result


# --- Report ---------------------------------------------------------------------------------------


def accuracy_table(results: list[dict]) -> str:
    lines = []
    for task, network in itertools.product(TASKS, NETWORKS):
        measured = study.select(results, network=network, task=task)
        read = [study.values(measured, f"read_{name}") for name in TASKS]
        lines.append(
            [
                network,
                task,
                tables.spread(100 * study.values(measured, "accuracy"), 1),
                PUBLISHED.get((network, task), ""),
                *(tables.spread(100 * accuracies, 1) for accuracies in read),
                str(len(measured)),
            ]
        )
    header = ["network", "trained for", "accuracy, %", "published"]
    return tables.table([*header, "location read from averages, %", "object", "n"], lines)


def ablation_table(results: list[dict]) -> str:
    lines = []
    for task, (order, text) in itertools.product(TASKS, _ORDERS.items()):
        accuracies = 100 * study.values(results, order, network="gapnet", task=task)
        lines.append([task, text, *(tables.spread(column, 1) for column in accuracies.T)])
    return tables.table(["task", "channels set to zero", *map(str, _REMOVED)], lines)


def draw_ablation(results: list[dict]) -> Figure:
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    axes = figure.subplots(1, len(TASKS), squeeze=False)[0]
    for task, axis in zip(TASKS, axes):
        measured = study.select(results, network="gapnet", task=task)
        for order, text in _ORDERS.items():
            accuracies = 100 * study.values(measured, order)
            study.draw_curve(axis, _REMOVED, accuracies.T, marker=".", label=text)
        axis.axhline(100 / TASKS[task], color="black", lw=0.7)
        axis.set(
            title=f"GAPNet, {task}",
            xlabel=f"channels set to zero, of {measured[0]['channels']}",
            ylabel="accuracy, %",
            ylim=(0, 105),
        )
        axis.legend(fontsize=8)
    return figure


def report(results: list[dict], options) -> study.Report:
    text = f"""# Position in the order of channels

CIFAR-10 on a black {GRID}x{GRID} canvas; {options.train:,} training and {options.test:,} test
images, {options.epochs} epochs. Mean ± sample standard deviation over seeds. Chance is
{100 / GRID**2:.1f} % for the location and 10 % for the object. Published: Islam et al. 2021, with
ResNet-18. "Read from averages" is ridge regression on the frozen network's globally averaged
channels, in their order.

{accuracy_table(results)}
## GAPNet without channels

Accuracy, %, with the channels set to zero that change most under mirroring, and with as many
random channels (mean of {_DRAWS} draws per network).

{ablation_table(results)}
![Accuracy by channels set to zero](channels.png)
"""
    return study.Report(text, {"channels.png": draw_ablation(results)})


STUDY = study.Study(
    description=__doc__,
    results="channels.json",
    add_options=add_options,
    axes=("seeds",),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
