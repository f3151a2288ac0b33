"""An image somewhere on a canvas: where is it, and what is it, under each padding?

    python -m experiments.position_canvas --data_dir data --workdir runs/position_canvas
        [--seeds 3] [--paddings zeros ...]

After Islam et al. 2021, arXiv 2101.12322. A CIFAR-10 image lies in one of the 3x3 cells of a 96x96
canvas that is black, white or of ImageNet's mean color, which normalization turns into zero. A
network of four strided convolutions and a global average is trained to name the cell or, on the
first canvas only, the object. Convolutions and a global average alone cannot tell the cell, so
accuracy above chance comes from the border.
Finished networks are not trained again. Writes report.md, canvas.json and canvas.png.
"""

import itertools
import sys
from typing import NamedTuple

from matplotlib.figure import Figure

from cnnjax import study
from cnnjax.data import arrays
from cnnjax.models.small import SmallConvNet
from cnnjax.nn import FILLS
from cnnjax.position.canvas import CANVASES, GRID, TASKS
from cnnjax.position.canvas import draw as draw_canvases
from cnnjax.runtime import command, tables
from cnnjax.train.small import classify, train_epochs

# The cells are 32 px apart, a multiple of the stride of 16.
LAYERS = ((8, 2), (16, 2), (32, 2), (64, 2))
_BATCH = 50


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    task: str
    canvas: str
    padding: str
    seed: int


def add_options(parser):
    parser.add_workdir("runs/position_canvas")
    parser.add_data_dir()
    parser.add_names("paddings", FILLS, ["zeros", "none", "reflect", "replicate", "circular"])
    parser.add_names("canvases", CANVASES)
    parser.add_count("seeds", 3, "networks per task, canvas, and padding")
    parser.add_argument(
        "--train",
        nargs=2,
        type=command.whole_number(_BATCH),
        default=[2000, 5000],
        help="training images of the two tasks, location and object (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        nargs=2,
        type=command.whole_number(1),
        default=[6, 6],
        help="training epochs of the two tasks (default: %(default)s)",
    )
    parser.add_count("test", 2000, "test images")


def load(options) -> arrays.Dataset:
    data = arrays.load("cifar10", options.data_dir)
    arrays.check_counts(data, max(options.train), options.test)
    return data


def points(options):
    columns = [("location", canvas) for canvas in options.canvases]
    columns.append(("object", options.canvases[0]))
    grid = itertools.product(columns, options.paddings, range(options.seeds))
    for (task, canvas), padding, seed in grid:
        yield Point(task, canvas, padding, seed)


# --- One network ----------------------------------------------------------------------------------


def measure(point: Point, options, data: arrays.Dataset) -> dict:
    """Trains one network on one task; the seed chooses images and cells of training and test."""
    # --train and --epochs have one value for each task, in the order of TASKS.
    number = list(TASKS).index(point.task)
    # Training and test draw with different seeds.
    train_seed = 2 * point.seed
    test_seed = 2 * point.seed + 1
    images, labels = draw_canvases(data.train, options.train[number], train_seed, point.canvas)
    model = SmallConvNet(
        TASKS[point.task], point.padding, input_shape=images.shape[1:], layers=LAYERS
    )
    split = arrays.Split(images, labels[point.task])
    epochs = options.epochs[number]
    *_, variables = train_epochs(model, split, epochs, point.seed, batch_size=_BATCH)
    images, labels = draw_canvases(data.test, options.test, test_seed, point.canvas)
    correct = classify(model, variables, images) == labels[point.task]
    return {"accuracy": float(correct.mean())}


# --- Report ---------------------------------------------------------------------------------------


def columns(results: list[dict]) -> list[tuple[str, str]]:
    """Returns the pairs of task and canvas, in order."""
    return list(dict.fromkeys((result["task"], result["canvas"]) for result in results))


def accuracies(results: list[dict], column: tuple[str, str], padding: str):
    """Returns the accuracies of one task, canvas and padding in percent, by seed."""
    task, canvas = column
    return 100 * study.values(results, "accuracy", task=task, canvas=canvas, padding=padding)


def tabulate(results: list[dict]) -> str:
    seeds = str(len(study.unique(results, "seed")))
    lines = []
    for padding in study.unique(results, "padding"):
        by_column = [accuracies(results, column, padding) for column in columns(results)]
        lines.append([padding, *(tables.spread(values, 1) for values in by_column), seeds])
    names = [f"{task}, {canvas}, %" for task, canvas in columns(results)]
    return tables.table(["padding", *names, "n"], lines)


def draw_bars(results: list[dict]) -> Figure:
    paddings = study.unique(results, "padding")
    figure = Figure(figsize=(1.5 + 1.4 * len(paddings), 3.5), layout="constrained")
    axis = figure.subplots()
    series = {}
    for column in columns(results):
        label = f"{column[0]}, {column[1]} canvas"
        series[label] = [accuracies(results, column, padding) for padding in paddings]
    study.draw_bars(axis, series)
    for chance, style in ((100 / GRID**2, "-"), (10, ":")):
        axis.axhline(chance, color="black", lw=0.7, ls=style)
    axis.set(ylabel="accuracy, %", ylim=(0, 105))
    axis.set_xticks(range(len(paddings)), paddings)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def report(results: list[dict], options) -> study.Report:
    learned = [
        f"The {task} was learned from {count:,} images in {epochs} epoch(s)."
        for task, count, epochs in zip(TASKS, options.train, options.epochs)
    ]
    text = f"""# An image on a canvas

Test accuracy on {options.test:,} images, mean ± sample standard deviation over seeds.
{" ".join(learned)}
Chance is {100 / GRID**2:.1f} % for the location (the solid line) and 10 % for the object (dotted).
Under circular padding the network's answer cannot depend on the cell. Islam et al. publish that
zero padding injects the most position of the common paddings; their network and figures differ.

{tabulate(results)}
![Accuracy by padding](canvas.png)
"""
    return study.Report(text, {"canvas.png": draw_bars(results)})


STUDY = study.Study(
    description=__doc__,
    results="canvas.json",
    add_options=add_options,
    axes=("paddings", "canvases", "seeds"),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
