"""Does training add or remove position, and does padding matter for the task? A small ConvNet under
each fill, probed as it learns.

    python -m experiments.position_training --data_dir data --workdir runs/position_training
        [--seeds 3] [--epochs 8] [--paddings zeros ...] [--network resnet18] [--enlarge 2]

The network has four convolutions unless another is named. Those of one seed start from the same
weights and see the same batches; only their padding differs. They are trained on the middle 24x24
px of CIFAR-10, so that a shift by 4 px in both directions brings in real pixels and needs no
filling; `--enlarge 2` makes 2x2 pixels of each, for networks that leave too little of so small an
image. At epochs 0, 1, 2, 5 and the last the exact readout finds H and V in each stage, on test
images and on a black one. A cell that is finished is not computed again. Writes report.md,
training.json and training.png.
"""

import functools
import itertools
import pathlib
import sys
from collections.abc import Iterator

import flax.linen as nn
import jax
import matplotlib
import numpy as np

from cnnjax.data import arrays, augment
from cnnjax.models import Network, create_model
from cnnjax.nn import FILLS, Conv, Dense, global_avg_pool, he_normal_fan_out
from cnnjax.position.encoder import FEATURE_SIZE, encode, image_features, stage_shapes
from cnnjax.position.metrics import scores
from cnnjax.position.readout import fit_exact
from cnnjax.position.targets import target
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.runtime.progress import progress
from cnnjax.train import step
from cnnjax.train.parallel import Parallel

_SIZE, _SHIFT, _TARGETS = 24, 4, ("H", "V")
_EPOCHS = (0, 1, 2, 5)  # probed besides the last
_PROBE = (
    64,
    16,
    48,
)  # test images that the readout is fitted to, chooses its strength on and is scored on
_RATE, _BATCH, _TEST_BATCH = 2e-3, 100, 200


class Net(Network):
    """3x3 convolutions of (features, stride), stages `conv1`, `conv2`, ..., and a linear layer on
    their global average."""

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (_SIZE, _SIZE, 3)
    layers: tuple[tuple[int, int], ...] = ((16, 1), (32, 2), (32, 2), (64, 1))

    @nn.nowrap
    def walk(self, x, train):
        for number, (features, stride) in enumerate(self.layers, 1):
            x = nn.relu(
                Conv(
                    features,
                    3,
                    stride,
                    padding=1,
                    fill=self.padding,
                    kernel_init=he_normal_fan_out,
                    name=f"conv{number}",
                )(x)
            )
            yield f"conv{number}", x
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


def trained(
    model: Network,
    data: arrays.Split,
    epochs: int,
    seed: int,
    rate: float = _RATE,
    batch: int = _BATCH,
    momentum: float = 0.9,
) -> Iterator[dict]:
    """Trains with Adam, its rate falling to 0 in a straight line: yields the variables before the
    first and after every epoch.

    They are there until the next are asked for, which take over their memory.
    """
    recipe, numbers = step.Recipe(model, "adam"), step.Numbers(seed=seed, momentum=momentum)
    steps = len(data.labels) // batch
    run, rates = (
        step.resident_steps(Parallel("jit"), recipe, batch),
        np.linspace(rate, 0, epochs * steps, dtype=np.float32),
    )
    state, data = step.init(recipe, data.images.shape[1:], numbers), jax.device_put(tuple(data))
    for epoch in range(epochs + 1):
        yield {"params": state.params, "batch_stats": state.batch_stats}
        if epoch < epochs:
            constants = step.Constants(moments=augment.IMAGENET, rates=rates)
            order = step.epoch_order(len(data[1]), epoch, seed)
            images = step.Images(images=data[0], labels=data[1], order=order)
            state = run(state, constants, images, numbers, (epoch + 1) * steps)


@functools.partial(jax.jit, static_argnames="model")
def _classes(model, variables, images, key):
    return model.apply(
        variables,
        augment.normalize(images, *augment.IMAGENET),
        rngs={"padding": key, "dropout": key},
    ).argmax(1)


def classify(model: Network, variables: dict, images: np.ndarray) -> np.ndarray:
    """The class of each uint8 image; every batch has random numbers of its own, for networks that
    draw some."""
    starts = range(0, len(images), _TEST_BATCH)
    return np.concatenate(
        [
            _classes(model, variables, images[at : at + _TEST_BATCH], jax.random.key(at))
            for at in starts
        ]
    )


def windows(images: np.ndarray, enlarge: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """32x32 images -> their middles [n, 24, 24, 3], and these shifted by 4 px in both directions,
    to each corner [4, n, 24, 24, 3].

    Every pixel of both becomes `enlarge` x `enlarge`.
    """
    at = lambda top, left: (
        images[:, top : top + _SIZE, left : left + _SIZE].repeat(enlarge, 1).repeat(enlarge, 2)
    )
    return at(_SHIFT, _SHIFT), np.stack(
        [at(top, left) for top in (0, 2 * _SHIFT) for left in (0, 2 * _SHIFT)]
    )


def probe(model: Network | None, variables: dict, images: np.ndarray) -> list[dict]:
    """What the exact readout finds of H and V in every stage of a frozen network, and in all
    together; None is the image itself."""
    everything = np.concatenate([images[: sum(_PROBE)], np.zeros((1, *images.shape[1:]), np.uint8)])
    if model is None:
        named = {"image": image_features(everything)}
    else:
        shapes = stage_shapes(model, images.shape[1])
        joined = encode(model, variables, everything, list(shapes))
        ends = np.cumsum([shape[3] for shape in shapes.values()])[:-1]
        named = dict(zip(shapes, np.split(joined, ends, -1))) | {"all": joined}
    goals = np.stack([target(name, FEATURE_SIZE) for name in _TARGETS])
    rows = []
    for stage, features in named.items():
        train, held_out, natural, black = np.split(features, np.cumsum(_PROBE))
        readout = fit_exact(train, held_out, goals)
        for data, part in (("natural", natural), ("black", black)):
            predicted = readout(part)
            for number, name in enumerate(_TARGETS):
                found = scores(predicted[:, number], goals[number])
                rows.append(
                    {"stage": stage, "target": name, "data": data}
                    | {key: float(found[key].mean()) for key in ("spc", "r2")}
                )
    return rows


def network(name: str, padding: str, size: int) -> Network:
    """The network of four layers or a registered one, for images of `size`. Raises `ValueError` if
    nothing is left of them in it."""
    shape = (size, size, 3)
    model = (
        create_model(name, num_classes=10, padding=padding, input_shape=shape)
        if name
        else Net(padding=padding, input_shape=shape)
    )
    stage_shapes(model, size)
    return model


def cell(
    model: Network,
    seed: int,
    data: arrays.Dataset,
    count: int,
    epochs: int,
    tests: int,
    enlarge: int,
) -> dict:
    """One network: trained on `count` images of its seed's choice, probed on its way, tested in
    place and shifted."""
    chosen = np.random.default_rng(seed).permutation(len(data.train.labels))[:count]
    train = arrays.Split(windows(data.train.images[chosen], enlarge)[0], data.train.labels[chosen])
    middle, shifted = windows(data.test.images, enlarge)
    probed = np.random.default_rng(seed).permutation(len(middle))[: sum(_PROBE)]
    probes = []
    for epoch, variables in enumerate(trained(model, train, epochs, seed)):
        if epoch in _EPOCHS or epoch == epochs:
            probes += [{"epoch": epoch} | row for row in probe(model, variables, middle[probed])]
    there, moved = (
        classify(model, variables, middle[:tests]),
        np.stack([classify(model, variables, part[:tests]) for part in shifted]),
    )
    labels = data.test.labels[:tests]
    return {
        "padding": model.padding,
        "seed": seed,
        "accuracy": float((there == labels).mean()),
        "shifted": float((moved == labels).mean()),
        "agreement": float((moved == there).mean()),
        "probes": probes,
    }


def write(
    folder: pathlib.Path, rows: list[dict], name: str, train: int, enlarge: int, image: list[dict]
) -> str:
    """Writes the results, the report and the figure; returns the first table."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    paddings = list(dict.fromkeys(row["padding"] for row in rows))
    stages = list(dict.fromkeys(entry["stage"] for entry in rows[0]["probes"]))
    epochs = sorted({entry["epoch"] for entry in rows[0]["probes"]})

    def r2(padding, **keys):
        """One value for each seed."""
        return [
            entry["r2"]
            for row in rows
            if row["padding"] == padding
            for entry in row["probes"]
            if keys.items() <= entry.items()
        ]

    final = []
    for padding in paddings:
        mine = [row for row in rows if row["padding"] == padding]
        final.append(
            [
                padding,
                *(
                    tables.spread([100 * row[key] for row in mine], 1)
                    for key in ("accuracy", "shifted", "agreement")
                ),
                *(
                    tables.spread(
                        r2(padding, epoch=epoch, stage="all", target=name, data="natural"), 2
                    )
                    for name in _TARGETS
                    for epoch in (0, epochs[-1])
                ),
                *(
                    tables.spread(
                        r2(padding, epoch=epoch, stage="all", target="H", data="black"), 2
                    )
                    for epoch in (0, epochs[-1])
                ),
                str(len(mine)),
            ]
        )
    header = [
        "padding",
        "accuracy, %",
        f"shifted by {_SHIFT * enlarge} px",
        "same answer",
        "R2 of H, untrained",
        "trained",
        "R2 of V, untrained",
        "trained",
        "H on black, untrained",
        "trained",
        "n",
    ]
    table = tables.table(header, final)
    lines = [
        [
            padding,
            stage,
            *(
                tables.spread(r2(padding, epoch=epoch, stage=stage, target="H", data="natural"), 2)
                for epoch in epochs
            ),
        ]
        for padding in paddings
        for stage in stages
    ]
    by_stage = tables.table(["padding", "stage", *(f"epoch {epoch}" for epoch in epochs)], lines)

    figure, axes = pyplot.subplots(
        2,
        len(stages),
        figsize=(2.6 * len(stages), 5),
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for axis_row, data in zip(axes, ("natural", "black")):
        for axis, stage in zip(axis_row, stages):
            for number, padding in enumerate(paddings):
                values = np.array(
                    [
                        r2(padding, epoch=epoch, stage=stage, target="H", data=data)
                        for epoch in epochs
                    ]
                )
                mean, std = values.mean(1), tables.bar(values.T)
                axis.plot(epochs, mean, ".-", color=f"C{number}", label=padding)
                axis.fill_between(
                    epochs, mean - std, mean + std, color=f"C{number}", alpha=0.2, lw=0
                )
            axis.axhline(0, color="black", lw=0.5)
            axis.set_title(
                f"{stage}, {'test images' if data == 'natural' else 'a black image'}", fontsize=9
            )
        axis_row[0].set(ylabel="R2 of H", ylim=(-0.6, 1))
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    workdir.write_figure(folder / "training.png", figure)
    pyplot.close(figure)
    workdir.write_json(folder / "training.json", {"rows": rows, "image": image})
    size, enlarged = (
        enlarge * _SIZE,
        f" (24x24 px, each made {enlarge}x{enlarge})" if enlarge > 1 else "",
    )
    alone = ", ".join(
        f"{row['target']} {row['r2']:.2f}" for row in image if row["data"] == "natural"
    )
    workdir.write(
        folder / "report.md",
        f"""# Position before and after training

{name}, CIFAR-10, {train:,} training images of {size}x{size} px{enlarged}, {epochs[-1]} epochs;
mean ± sample standard deviation over seeds. R2 is the share of the variance of H (left to right)
and V (top to bottom) that the exact readout explains: of all stages together on unseen test images,
and on a black one. Read from the image itself it is: {alone}. "Same answer" is the share of shifted
images that are given the class of the unshifted one.

{table}
## R2 of H by stage and epoch

{by_stage}
![R2 of H while a network is trained](training.png)
""",
    )
    return table


def check_counts(data: arrays.Dataset, train: int, test: int) -> None:
    """Raises `ValueError` where more images are asked for than there are."""
    for name, count, split in (("train", train, data.train), ("test", test, data.test)):
        if count > len(split.labels):
            raise ValueError(
                f"{name}={count} is more than the {len(split.labels)} images of that part"
            )


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/position_training")
    parser.add_data_dir()
    parser.add_argument(
        "--network",
        default="",
        metavar="NAME",
        help="a registered one (default: one of four convolutions)",
    )
    parser.add_count("enlarge", 1, "pixels that each pixel becomes, in both directions")
    parser.add_argument(
        "--paddings",
        nargs="+",
        choices=FILLS,
        default=["zeros", "partial", "none", "reflect", "replicate", "circular"],
    )
    parser.add_count("seeds", 3, "networks per padding")
    parser.add_count("train", 10_000, "training images of a network", _BATCH)
    parser.add_count("epochs", 8, "of training")
    parser.add_count("test", 4000, "test images")
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        data = arrays.load("cifar10", options.data_dir)
        settings = {key: getattr(options, key) for key in ("train", "epochs", "test", "enlarge")}
        check_counts(data, options.train, options.test)
        models = [
            network(options.network, padding, options.enlarge * _SIZE)
            for padding in options.paddings
        ]
        folder, rows = workdir.prepare(options.workdir, {"network": options.network} | settings), []
        with progress(options.seeds * len(options.paddings), "networks") as done:
            for seed, model in itertools.product(range(options.seeds), models):
                path = folder / "cells" / f"{model.padding}_{seed}.json"
                rows.append(workdir.finished(path, cell, model, seed, data, *settings.values()))
                done(1)
        image = probe(None, {}, windows(data.test.images, options.enlarge)[0])
        print(
            write(
                folder,
                rows,
                options.network or "Four convolutions",
                options.train,
                options.enlarge,
                image,
            )
        )

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
