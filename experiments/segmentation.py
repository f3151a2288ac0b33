"""Semantic segmentation under every fill: does a network without padding segment worse, and where in the image?

    python -m experiments.segmentation --data_dir data --workdir runs/segmentation [--seeds 3] [--paddings zeros none ...] [--weights FILE]

The lecture shows, after Islam, Jia and Bruce (ICLR 2020, arXiv 2001.08248, table 5b), the mean IoU of a VGG trained from scratch on
PASCAL VOC 2012 without and with zero padding. Here a small fully convolutional network (`cnnjax.models.fcn`) is trained from scratch
on CamVid's 367 road scenes at 240x180 and tested on 233; with --weights, a file of SqueezeNet 1.1's ImageNet weights, its first five
layers are fine-tuned. Every pixel counts: those that the maps of 'none' do not reach take the scores of the nearest position. Each
network is a work directory of its own. Writes report.md, segmentation.json, rings.png and scenes.png.
"""

import pathlib
import sys

import matplotlib
import ml_collections
import numpy as np

from cnnjax import report, weights
from cnnjax.data import arrays
from cnnjax.models import create_model, fcn
from cnnjax.nn import FILLS
from cnnjax.position import metrics
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.train import defaults, evaluate, loop

LECTURE = {"none": 12.3, "zeros": 23.1}  # mean IoU in percent
_RING = 10  # pixels, the width of a ring
_SHOWN = (20, 80, 140, 200)  # test scenes in the figure
_SQUEEZED = ("conv1", "fire3", "fire5")  # under 'none' nothing is left of later stages at 240x180


def configure(options, padding: str, seed: int) -> ml_collections.ConfigDict:
    """The configuration of one network."""
    config = defaults.get_config()
    fields = {"encoder": "squeezenet1_1", "scored": _SQUEEZED} if options.weights else {}
    config.model, config.model_fields = (
        "fcn",
        ml_collections.ConfigDict({"padding": padding, **fields}),
    )
    config.dataset, config.data_dir, config.loss = "camvid", options.data_dir, "pixelwise"
    config.augment.flip, config.batch_size, config.epochs, config.seed = (
        True,
        8,
        options.epochs,
        seed,
    )
    config.optimizer, config.weight_decay, config.schedule.name = "adamw", 1e-4, "cosine"
    config.schedule.learning_rate = 0.001 if options.weights else 0.004
    if options.weights:
        config.pixels, config.initial_weights = (
            "imagenet",
            str(options.workdir.absolute() / "encoder.safetensors"),
        )
    return config.lock()


def keep_encoder(file: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the layers of SqueezeNet 1.1 that the network has, out of the whole network's weights."""
    model = create_model("fcn", encoder="squeezenet1_1", scored=_SQUEEZED)
    needed, held = (
        weights.variable_shapes(model)["params"],
        weights.load_torchvision(file, model.backbone())["params"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    weights.save_torchvision(
        {"params": {name: held[name] for name in held if name in needed}},
        folder / "encoder.safetensors",
    )


def ring_of(height: int, width: int) -> np.ndarray:
    """The number of each pixel's ring, [height, width], counted from the border."""
    return metrics.border_distance(height, width) // _RING


def reached(config: ml_collections.ConfigDict, shape: tuple[int, int, int]) -> np.ndarray:
    """Whether the deepest map of the network under 'none' reaches a pixel, or it is filled in, [height, width]."""
    model = create_model(config.model, **{**config.model_fields, "padding": "none"})
    deepest = fcn.grids(model.backbone(), shape, model.scored)[-1]
    inside = [(np.arange(n) >= at[0]) & (np.arange(n) <= at[-1]) for n, at in zip(shape, deepest)]
    return np.logical_and.outer(*inside)


def measure(predicted: np.ndarray, labels: np.ndarray, inside: np.ndarray) -> dict:
    """Mean IoU of the whole test set, of each ring, inside and outside of a part of the image, and each class's IoU."""
    classes, rings = len(arrays.CamVid.classes), ring_of(*labels.shape[1:])
    iou = lambda where: evaluate.intersection_over_union(
        evaluate.confusion(predicted[:, where], labels[:, where], classes)
    )
    by_class, by_ring = (
        iou(rings >= 0),
        [evaluate.mean_of_known(iou(rings == ring)) for ring in range(rings.max() + 1)],
    )
    return {
        "miou": evaluate.mean_of_known(by_class),
        "by_class": by_class,
        "by_ring": by_ring,
        "inside": evaluate.mean_of_known(iou(inside)),
        "outside": evaluate.mean_of_known(iou(~inside)),
    }


def prior(split: arrays.Split) -> np.ndarray:
    """The most frequent class at every pixel of the masks: all that position alone can say, [height, width]."""
    return np.argmax(
        [(split.labels == number).sum(0) for number in range(len(arrays.CamVid.classes))], 0
    ).astype(np.uint8)


def judge(rows: list[dict]) -> str:
    """What the measured difference between zeros and none says of the lecture's."""
    found = {
        padding: {row["seed"]: 100 * row["miou"] for row in rows if row["padding"] == padding}
        for padding in LECTURE
    }
    gains = [
        found["zeros"][seed] - found["none"][seed]
        for seed in found["zeros"].keys() & found["none"].keys()
    ]
    if len(gains) < 2:
        return "Two seeds of zeros and of none are needed to judge the lecture's direction.\n"
    half = tables.half_width(gains)
    verdict = (
        "undecided"
        if abs(np.mean(gains)) <= half
        else "confirmed"
        if np.mean(gains) > 0
        else "not confirmed: the other way round"
    )
    return (
        f"Zero padding gains {np.mean(gains):.1f} ± {half:.1f} points over no padding (95 % interval of the mean over {len(gains)} "
        f"pairs of a seed); the lecture's figures differ by {LECTURE['zeros'] - LECTURE['none']:.1f} points on other data. Its "
        f"direction is {verdict}.\n"
    )


def _figures(
    folder: pathlib.Path,
    rows: list[dict],
    alone: dict,
    test: arrays.Split,
    shown: dict[str, np.ndarray],
) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    at = (np.arange(len(alone["by_ring"])) + 0.5) * _RING
    for padding in shown:
        values = 100 * np.array(
            [row["by_ring"] for row in rows if row["padding"] == padding], float
        )
        axis.errorbar(
            at,
            values.mean(0),
            tables.bar(values),
            capsize=2,
            marker="o",
            markersize=3,
            label=f"{padding} (n={len(values)})",
        )
    axis.plot(at, 100 * np.array(alone["by_ring"], float), "k:", label="position alone")
    axis.set(
        xlabel="distance to the border, pixels", ylabel="mean IoU of the ring, %", ylim=(0, None)
    )
    axis.legend(fontsize=8)
    workdir.write_figure(folder / "rings.png", figure)
    pyplot.close(figure)
    lines = {"image": test.images[list(_SHOWN)], "mask": report.paint(test.labels[list(_SHOWN)])}
    lines |= {padding: report.paint(masks) for padding, masks in shown.items()}
    figure, axes = pyplot.subplots(
        len(lines),
        len(_SHOWN),
        figsize=(2.4 * len(_SHOWN), 1.85 * len(lines)),
        layout="constrained",
    )
    for line, (name, pictures) in zip(axes, lines.items()):
        line[0].set_ylabel(name)
        for axis, picture in zip(line, pictures):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
    colors = report.paint(np.arange(len(arrays.CamVid.classes))) / 255
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors]
    figure.legend(handles, arrays.CamVid.classes, loc="outside lower center", ncols=6, fontsize=8)
    workdir.write_figure(folder / "scenes.png", figure)
    pyplot.close(figure)


def write(
    options,
    config: ml_collections.ConfigDict,
    data: arrays.Dataset,
    predictions: dict[tuple[str, int], np.ndarray],
) -> str:
    """Measures the predictions of all networks, writes the results, the report and the figures; returns the table."""
    inside, labels = reached(config, data.test.images.shape[1:]), data.test.labels
    alone = measure(np.broadcast_to(prior(data.train), labels.shape), labels, inside)
    rows = [
        {"padding": padding, "seed": seed} | measure(found, labels, inside)
        for (padding, seed), found in predictions.items()
    ]
    workdir.write_json(
        options.workdir / "segmentation.json",
        {"rows": rows, "position alone": alone, "lecture": LECTURE},
    )
    _figures(
        options.workdir,
        rows,
        alone,
        data.test,
        {padding: predictions[padding, 0][list(_SHOWN)] for padding in options.paddings},
    )

    def cell(values):
        known = [100 * value for value in values if value is not None]
        return tables.spread(known, 1) if known else ""

    lines, per_class = [], []
    for padding, mine in [
        *((p, [row for row in rows if row["padding"] == p]) for p in options.paddings),
        ("*position alone*", [alone]),
    ]:
        rings = [[row["by_ring"][ring] for row in mine] for ring in (0, len(alone["by_ring"]) - 1)]
        lines.append(
            [
                padding,
                f"{LECTURE[padding]}" if padding in LECTURE else "",
                cell([row["miou"] for row in mine]),
                *(cell([row[part] for row in mine]) for part in ("inside", "outside")),
                *map(cell, rings),
                str(len(mine)),
            ]
        )
        per_class.append(
            [padding, *(cell(values) for values in zip(*(row["by_class"] for row in mine)))]
        )
    table = tables.table(
        [
            "padding",
            "lecture (VOC)",
            "mIoU",
            f"inner {100 * inside.mean():.0f} %",
            "rest",
            f"outermost {_RING} px",
            "center",
            "n",
        ],
        lines,
    )
    encoder = "SqueezeNet 1.1, fine-tuned" if options.weights else "a small network from scratch"
    text = (
        f"# Segmentation of CamVid by padding\n\nMean IoU in percent ({encoder}, {options.epochs} epochs, {len(labels)} test scenes of "
        "240x180), mean ± sample standard deviation over seeds of weights and order. The inner part is what the deepest map without "
        "padding reaches; beyond it that map's nearest scores are taken. *Position alone* is the most frequent class at each pixel of "
        f"the training masks.\n\n{table}\n{judge(rows)}\nIoU of each class:\n\n"
        f"{tables.table(['padding', *data.classes], per_class)}\n![Mean IoU by ring](rings.png)\n\n![Scenes](scenes.png)\n"
    )
    workdir.write(options.workdir / "report.md", text)
    return table


def _work(options) -> None:
    configs = {
        (padding, seed): configure(options, padding, seed)
        for padding in options.paddings
        for seed in range(options.seeds)
    }
    data = arrays.load("camvid", options.data_dir)
    if options.weights:
        keep_encoder(options.weights, options.workdir)
    for config in configs.values():
        loop.check(config)
    backend.start()
    predictions = {}
    for (padding, seed), config in configs.items():
        folder = options.workdir / f"{padding},seed={seed}"
        workdir.completed(loop.run, config, folder)
        with np.load(folder / "test.npz") as kept:
            predictions[padding, seed] = kept["predicted"]
    print(write(options, config, data, predictions))


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/segmentation")
    parser.add_data_dir("camvid/")
    parser.add_count("seeds", 3, "networks per padding")
    parser.add_count("epochs", 16, "of training")
    parser.add_argument(
        "--paddings",
        nargs="+",
        choices=FILLS,
        default=["zeros", "none", "reflect", "circular"],
        help="default: zeros none reflect circular",
    )
    parser.add_argument(
        "--weights",
        type=pathlib.Path,
        help="a safetensors or .pth file of SqueezeNet 1.1; default: trained from scratch",
    )
    options = parser.parse_args(arguments)
    return command.run(lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())
