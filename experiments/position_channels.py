"""Position in the order of channels (Islam et al., ICCV 2021, arXiv 2108.07884): what survives a global average, and a permutation?

    python -m experiments.position_channels --data_dir data --workdir runs/position_channels [--seeds 3]

A CIFAR-10 image lies in a cell of a black 3x3 canvas; a small ResNet with zero padding is trained to name the cell or the object.
GAPNet ends in a 3x3 convolution whose global average is the logits; PermuteNet permutes the globally averaged channels anew in
every forward pass, in training and test, before a linear layer: what the order of channels says is lost, what their values say is not.
Then, from the frozen averages, both are read by ridge regression; and the channels of GAPNet that change most between an image and its
mirror image, |f(x) - f(mirrored x)|, are set to zero, beside as many at random. A network that is finished is not trained again.
Writes report.md, channels.json and channels.png.
"""

import functools
import itertools
import pathlib
import sys

import flax.linen as nn
import jax
import matplotlib
import numpy as np

from cnnjax.data import arrays, augment
from cnnjax.models import Network
from cnnjax.models.resnet import Block, basic
from cnnjax.nn import BatchNorm, Conv, Dense, global_avg_pool, he_normal_fan_out
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.runtime.progress import progress
from cnnjax.transfer import linear_probe
from experiments.position_canvas import BATCH, GRID, TASKS, draw
from experiments.position_training import check_counts, classify, trained

NETWORKS = ("gapnet", "permutenet")
PUBLISHED = {
    ("gapnet", "location"): "100.0"
}  # of 9 runs logged in github.com/islamamirul/PermuteNet; its other figures are not at hand
_BETA = 0.5  # the authors' Adam; they train ResNet-18 on all images for 20 epochs in batches of 48
_REMOVED, _DRAWS = (
    (0, 4, 8, 16, 24, 32, 48),
    3,
)  # channels set to zero, and draws of as many at random


class SmallResNet(Network):
    """A ResNet of four basic blocks behind a 7x7 convolution of stride 2, without a max-pool: stages `layer1` ... `layer4`.

    With `permute` the head is PermuteNet's, which draws from the random stream "dropout", else GAPNet's.
    """

    widths: tuple[int, ...] = (8, 16, 32, 64)
    permute: bool = False

    @nn.nowrap
    def walk(self, x, train):
        x = Conv(
            self.widths[0],
            7,
            2,
            padding=3,
            fill=self.padding,
            use_bias=False,
            kernel_init=he_normal_fan_out,
            name="conv1",
        )(x)
        x = nn.relu(BatchNorm(name="bn1")(x, train))
        for number, width in enumerate(self.widths, 1):
            x = Block(
                basic(width, 1 if number == 1 else 2),
                self.padding,
                self.dtype,
                self.axis_name,
                name=f"layer{number}",
            )(x, train)
            yield f"layer{number}", x
        if self.permute:
            pooled = jax.random.permutation(self.make_rng("dropout"), global_avg_pool(x), axis=1)
            yield "logits", Dense(self.num_classes, name="head")(pooled)
        else:
            yield (
                "logits",
                global_avg_pool(
                    Conv(self.num_classes, 3, padding=1, fill=self.padding, name="head")(x)
                ),
            )


@functools.partial(jax.jit, static_argnames="model")
def _pooled(model, variables, images):
    last = f"layer{len(model.widths)}"
    return global_avg_pool(
        model.apply(
            variables, augment.normalize(images, *augment.IMAGENET), method="stages", last=last
        )[last]
    )


def pooled(model: Network, variables: dict, images: np.ndarray) -> np.ndarray:
    """The last stage's global average of each uint8 image: [n, channels]."""
    return np.concatenate(
        [_pooled(model, variables, images[at : at + 200]) for at in range(0, len(images), 200)]
    )


def without(variables: dict, channels: np.ndarray) -> dict:
    """GAPNet's variables with the head blind to these channels of the last stage, which is as good as setting them to zero."""
    head = variables["params"]["head"]
    kernel = head["kernel"].at[:, :, channels].set(0)
    return variables | {"params": variables["params"] | {"head": head | {"kernel": kernel}}}


def cell(
    network: str, task: str, seed: int, data: arrays.Dataset, count: int, epochs: int, tests: int
) -> dict:
    """One network: its accuracy, what is read from its averages, and its accuracy without channels that encode position."""
    (train, train_labels), (test, labels) = (
        draw(data.train, count, 2 * seed),
        draw(data.test, tests, 2 * seed + 1),
    )
    model = SmallResNet(TASKS[task], input_shape=train.shape[1:], permute=network == "permutenet")
    *_, variables = trained(
        model, arrays.Split(train, train_labels[task]), epochs, seed, batch=BATCH, momentum=_BETA
    )
    accuracy = lambda variables: float((classify(model, variables, test) == labels[task]).mean())
    features, test_features = pooled(model, variables, train), pooled(model, variables, test)
    read = {
        name: linear_probe(features, train_labels[name], test_features, labels[name])[0]
        for name in TASKS
    }
    row = {
        "network": network,
        "task": task,
        "seed": seed,
        "accuracy": accuracy(variables),
        "read": read,
    }
    if network == "permutenet":
        return row
    change = np.abs(features - pooled(model, variables, train[:, :, ::-1])).mean(0)
    ranked = np.argsort(-change)
    orders = [
        np.random.default_rng([seed, draw_]).permutation(len(ranked)) for draw_ in range(_DRAWS)
    ]
    return row | {
        "channels": len(ranked),
        "ranked": [accuracy(without(variables, ranked[:n])) for n in _REMOVED],
        "random": [
            float(np.mean([accuracy(without(variables, order[:n])) for order in orders]))
            for n in _REMOVED
        ],
    }


def write(folder: pathlib.Path, rows: list[dict], settings: dict) -> str:
    """Writes the results, the report and the figure; returns the first table."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines, removed = [], []
    figure, axes = pyplot.subplots(
        1, len(TASKS), figsize=(9, 3.3), squeeze=False, layout="constrained"
    )
    for task, axis in zip(TASKS, axes[0]):
        for network in NETWORKS:
            mine = [row for row in rows if (row["network"], row["task"]) == (network, task)]
            found = [
                tables.spread([100 * row["accuracy"] for row in mine], 1),
                PUBLISHED.get((network, task), ""),
                *(tables.spread([100 * row["read"][name] for row in mine], 1) for name in TASKS),
            ]
            lines.append([network, task, *found, str(len(mine))])
        mine = [row for row in rows if row["network"] == "gapnet" and row["task"] == task]
        for number, (kind, label) in enumerate(
            (("ranked", "the most position-encoding"), ("random", "at random"))
        ):
            values = 100 * np.array([row[kind] for row in mine])
            axis.errorbar(
                _REMOVED,
                values.mean(0),
                tables.bar(values),
                color=f"C{number}",
                marker=".",
                capsize=2,
                label=label,
            )
            removed.append([task, label, *(tables.spread(list(column), 1) for column in values.T)])
        axis.axhline(100 / TASKS[task], color="black", lw=0.7)
        axis.set(
            title=f"GAPNet, {task}",
            xlabel=f"channels set to zero, of {mine[0]['channels']}",
            ylabel="accuracy, %",
            ylim=(0, 105),
        )
        axis.legend(fontsize=8)
    workdir.write_figure(folder / "channels.png", figure)
    pyplot.close(figure)
    table = tables.table(
        [
            "network",
            "trained for",
            "accuracy, %",
            "published",
            "location read from averages, %",
            "object",
            "n",
        ],
        lines,
    )
    ablation = tables.table(["task", "channels set to zero", *map(str, _REMOVED)], removed)
    workdir.write_json(folder / "channels.json", rows)
    workdir.write(
        folder / "report.md",
        f"""# Position in the order of channels

CIFAR-10 on a black {GRID}x{GRID} canvas; {settings["train"]:,} training and {settings["test"]:,} test images, epochs: {settings["epochs"]}.
Mean ± sample standard deviation over seeds. Chance: {100 / GRID**2:.1f} % for the location, 10 % for the object. Published: Islam et
al. 2021, with ResNet-18. "Read from averages" is ridge regression on the frozen network's globally averaged channels, in their order.

{table}
## GAPNet without channels

Accuracy, %, where the channels that change most under mirroring are set to zero, and where as many are by chance (the mean of {_DRAWS}
draws for each network).

{ablation}
![Accuracy by channels set to zero](channels.png)
""",
    )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/position_channels")
    parser.add_data_dir()
    parser.add_count("seeds", 3, "networks of each kind")
    parser.add_count("train", 4000, "training images of a network", BATCH)
    parser.add_count("epochs", 6, "of training")
    parser.add_count("test", 1000, "test images")
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        data, settings = (
            arrays.load("cifar10", options.data_dir),
            {key: getattr(options, key) for key in ("train", "epochs", "test")},
        )
        check_counts(data, options.train, options.test)
        folder, rows = workdir.prepare(options.workdir, settings), []
        wanted = list(itertools.product(NETWORKS, TASKS, range(options.seeds)))
        with progress(len(wanted), "networks") as done:
            for network, task, seed in wanted:
                path = folder / "cells" / f"{network}_{task}_{seed}.json"
                rows.append(
                    workdir.finished(path, cell, network, task, seed, data, *settings.values())
                )
                done(1)
        print(write(folder, rows, settings))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
