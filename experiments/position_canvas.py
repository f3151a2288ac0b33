"""An image somewhere on a canvas (Islam et al. 2021, arXiv 2101.12322): where is it, and what is it, under each padding?

    python -m experiments.position_canvas --data_dir data --workdir runs/position_canvas [--seeds 3] [--paddings zeros ...]

A CIFAR-10 image lies in one of the 3x3 cells of a 96x96 canvas that is black, white or of CIFAR-10's mean color. A network of four
strided convolutions and a global average is trained to name the cell, or, on the first canvas only, the object. Convolution and
average alone cannot tell the cell: what is found beyond chance is told by the border. A cell of the table that is finished is not
computed again. Writes report.md, canvas.json and canvas.png.
"""

import itertools
import pathlib
import sys

import matplotlib
import numpy as np

from cnnjax.data import arrays, augment
from cnnjax.nn import FILLS
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.runtime.progress import progress
from experiments.position_training import Net, check_counts, classify, trained

GRID, _SIDE = 3, 32  # cells along a side, and an image's pixels
# The normalization takes this color to 0, the value of zero padding, up to rounding.
CANVASES = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "mean": tuple(round(255 * value) for value in augment.IMAGENET[0]),
}
LAYERS = (
    (8, 2),
    (16, 2),
    (32, 2),
    (64, 2),
)  # the steps of 32 px between cells are a multiple of the stride of 16
TASKS = {"location": GRID**2, "object": 10}
BATCH = 50


def place(images: np.ndarray, cells: np.ndarray, canvas: str = "black") -> np.ndarray:
    """Lays images [n, 32, 32, 3] in their cells, counted from 0 row by row -> uint8 [n, 96, 96, 3]."""
    out = np.empty((len(images), GRID, _SIDE, GRID, _SIDE, 3), np.uint8)
    out[:] = np.uint8(CANVASES[canvas])
    out[np.arange(len(images)), cells // GRID, :, cells % GRID] = images
    return out.reshape(len(images), GRID * _SIDE, GRID * _SIDE, 3)


def draw(
    split: arrays.Split, count: int, seed: int, canvas: str = "black"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`count` images of a split, each in a cell by chance -> the canvases, and the labels of each task."""
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(split.labels))[:count]
    cells = generator.integers(0, GRID**2, count).astype(np.int32)
    return place(split.images[chosen], cells, canvas), {
        "location": cells,
        "object": split.labels[chosen],
    }


def cell(
    task: str,
    canvas: str,
    padding: str,
    seed: int,
    data: arrays.Dataset,
    count: int,
    epochs: int,
    tests: int,
) -> dict:
    """The test accuracy of one network on one task; training and test images, and their cells, are those of the seed."""
    images, labels = draw(data.train, count, 2 * seed, canvas)
    model = Net(TASKS[task], padding, input_shape=images.shape[1:], layers=LAYERS)
    *_, variables = trained(model, arrays.Split(images, labels[task]), epochs, seed, batch=BATCH)
    images, labels = draw(data.test, tests, 2 * seed + 1, canvas)
    accuracy = float((classify(model, variables, images) == labels[task]).mean())
    return {"task": task, "canvas": canvas, "padding": padding, "seed": seed, "accuracy": accuracy}


def write(folder: pathlib.Path, rows: list[dict], settings: dict) -> str:
    """Writes the results, the report and the figure; returns the table."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    paddings = list(dict.fromkeys(row["padding"] for row in rows))
    columns = list(dict.fromkeys((row["task"], row["canvas"]) for row in rows))
    figure, axis = pyplot.subplots(figsize=(1.5 + 1.4 * len(paddings), 3.5), layout="constrained")
    lines = [[padding] for padding in paddings]
    for number, column in enumerate(columns):
        for at, padding in enumerate(paddings):
            values = [
                100 * row["accuracy"]
                for row in rows
                if (row["task"], row["canvas"], row["padding"]) == (*column, padding)
            ]
            lines[at].append(tables.spread(values, 1))
            axis.bar(
                at + 0.8 * (number + 0.5) / len(columns) - 0.4,
                np.mean(values),
                0.8 / len(columns),
                color=f"C{number}",
                yerr=tables.bar(values),
                label=None if at else f"{column[0]}, {column[1]} canvas",
            )
    for chance, style in ((100 / GRID**2, "-"), (10, ":")):
        axis.axhline(chance, color="black", lw=0.7, ls=style)
    axis.set(ylabel="accuracy, %", ylim=(0, 105))
    axis.set_xticks(range(len(paddings)), paddings)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    workdir.write_figure(folder / "canvas.png", figure)
    pyplot.close(figure)
    seeds = len({row["seed"] for row in rows})
    table = tables.table(
        ["padding", *(f"{task}, {canvas}, %" for task, canvas in columns), "n"],
        [[*line, str(seeds)] for line in lines],
    )
    workdir.write_json(folder / "canvas.json", rows)
    learned = " ".join(
        f"The {task} was learned from {count:,} images in {epochs} epoch(s)."
        for task, count, epochs in zip(TASKS, settings["train"], settings["epochs"])
    )
    workdir.write(
        folder / "report.md",
        f"""# An image on a canvas

Test accuracy on {settings["test"]:,} images, mean ± sample standard deviation over seeds. {learned}
Chance is {100 / GRID**2:.1f} % for the location (the solid line), 10 % for the object (dotted). Under circular padding the network's answer
cannot depend on the cell. Islam et al. publish that zero padding injects the most position of the common paddings; their network
is another, and so are its figures.

{table}
![Accuracy by padding](canvas.png)
""",
    )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/position_canvas")
    parser.add_data_dir()
    parser.add_argument(
        "--paddings",
        nargs="+",
        choices=FILLS,
        default=["zeros", "none", "reflect", "replicate", "circular"],
    )
    parser.add_argument("--canvases", nargs="+", choices=CANVASES, default=list(CANVASES))
    parser.add_count("seeds", 3, "networks per cell of the table")
    for name, least, default in (("train", BATCH, [2000, 5000]), ("epochs", 1, [6, 6])):
        parser.add_argument(
            f"--{name}",
            nargs=2,
            type=command.whole(least),
            default=default,
            help="for the location and for the object (default: %(default)s)",
        )
    parser.add_count("test", 2000, "test images")
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        data, settings = (
            arrays.load("cifar10", options.data_dir),
            {key: getattr(options, key) for key in ("train", "epochs", "test")},
        )
        check_counts(data, max(options.train), options.test)
        folder, rows = workdir.prepare(options.workdir, settings), []
        columns = [
            *(("location", canvas) for canvas in options.canvases),
            ("object", options.canvases[0]),
        ]
        wanted = list(itertools.product(columns, options.paddings, range(options.seeds)))
        with progress(len(wanted), "networks") as done:
            for (task, canvas), padding, seed in wanted:
                train, epochs = (
                    values[list(TASKS).index(task)] for values in (options.train, options.epochs)
                )
                path = folder / "cells" / f"{task}_{canvas}_{padding}_{seed}.json"
                rows.append(
                    workdir.finished(
                        path, cell, task, canvas, padding, seed, data, train, epochs, options.test
                    )
                )
                done(1)
        print(write(folder, rows, settings))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
