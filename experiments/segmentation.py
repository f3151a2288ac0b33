"""Does a network without padding segment worse, and where in the image?

    python -m experiments.segmentation --data_dir data --workdir runs/segmentation [--seeds 3] \\
        [--paddings zeros none ...] [--weights FILE]

The lecture shows the mean IoU of a VGG trained from scratch on PASCAL VOC 2012, without and with
zero padding (after Islam, Jia, and Bruce, ICLR 2020, arXiv 2001.08248, table 5b). Here a small
fully convolutional network (`cnnjax.models.fcn`) is trained from scratch on CamVid's 367 road
scenes at 240x180 px and tested on 233 scenes. With --weights, a file of SqueezeNet 1.1's ImageNet
weights, the first five layers of SqueezeNet are fine-tuned instead. Every pixel counts: pixels that
the maps of 'none' do not reach take the scores of the nearest position.

Each network has its own work directory. Writes report.md, segmentation.json, rings.png, and
scenes.png.
"""

import itertools
import pathlib
import sys
from typing import NamedTuple

import ml_collections
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cnnjax import study, weights
from cnnjax.data import arrays, sources
from cnnjax.models import create_model, fcn
from cnnjax.nn import FILLS
from cnnjax.position import metrics
from cnnjax.runtime import command, tables, workdir
from cnnjax.train import defaults, evaluate, loop
from cnnjax.train import report as pictures

LECTURE = {"none": 12.3, "zeros": 23.1}  # mean IoU in percent
ALONE = "*position alone*"
_RING = 10  # pixels, the width of a ring
_SHOWN = (20, 80, 140, 200)  # test scenes in the figure
_SQUEEZED = ("conv1", "fire3", "fire5")  # under 'none', later stages are empty at 240x180


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    padding: str
    seed: int


def add_options(parser):
    parser.add_workdir("runs/segmentation")
    parser.add_data_dir("camvid/")
    parser.add_count("seeds", 3, "networks per padding")
    parser.add_count("epochs", 16, "training epochs")
    # 'interpolate' stretches maps: their scores have no known place in the image.
    fills = [fill for fill in FILLS if fill != "interpolate"]
    parser.add_names("paddings", fills, ["zeros", "none", "reflect", "circular"])
    parser.add_argument(
        "--weights",
        type=command.path,
        help="a safetensors or .pth file of SqueezeNet 1.1; default: trained from scratch",
    )


def points(options):
    return itertools.starmap(Point, itertools.product(options.paddings, range(options.seeds)))


def load(options) -> arrays.Dataset:
    data = arrays.load("camvid", options.data_dir)
    if options.weights:
        read_encoder(options.weights)
    for point in points(options):
        config = configure(options, point)
        if options.weights:
            # The encoder's own file is written only after the work directory is checked.
            config.initial_weights = str(options.weights)
        loop.check(config)
    return data


# --- One network ----------------------------------------------------------------------------------


def configure(options, point: Point) -> ml_collections.ConfigDict:
    """Returns the configuration of one network."""
    config = defaults.get_config()
    config.model = "fcn"
    config.model_fields = ml_collections.ConfigDict({"padding": point.padding})
    config.dataset = "camvid"
    config.data_dir = options.data_dir
    config.loss = "pixelwise"
    config.augment.flip = True
    config.batch_size = 8
    config.epochs = options.epochs
    config.seed = point.seed
    config.optimizer = "adamw"
    config.weight_decay = 1e-4
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.004
    if options.weights:
        config.model_fields.update(encoder="squeezenet1_1", scored=_SQUEEZED)
        config.schedule.learning_rate = 0.001
        config.pixels = "imagenet"
        config.initial_weights = str(encoder_file(options))
    return config.lock()


def encoder_file(options) -> pathlib.Path:
    return options.workdir.absolute() / "encoder.safetensors"


def read_encoder(file: pathlib.Path) -> dict:
    """Returns, as variables, the layers of SqueezeNet 1.1 that the network has.

    Raises `ValueError` if the file does not fit.
    """
    model = create_model("fcn", encoder="squeezenet1_1", scored=_SQUEEZED)
    needed = weights.variable_shapes(model)["params"]
    whole = weights.load_torchvision(file, model.backbone())["params"]
    return {"params": {name: whole[name] for name in whole if name in needed}}


def ring_of(height: int, width: int) -> np.ndarray:
    """Returns the number of each pixel's ring, counted from the border, [height, width]."""
    return metrics.border_distance(height, width) // _RING


def reached(config: ml_collections.ConfigDict, shape: tuple[int, int, int]) -> np.ndarray:
    """Tells which pixels the deepest map reaches without padding, bool [height, width]."""
    model = create_model(config.model, **{**config.model_fields, "padding": "none"})
    deepest = fcn.grids(model.backbone(), shape, model.scored)[-1]
    inside = []
    for size, places in zip(shape, deepest):
        pixels = np.arange(size)
        inside.append((pixels >= places[0]) & (pixels <= places[-1]))
    return np.logical_and.outer(*inside)


def score(predicted: np.ndarray, labels: np.ndarray, inside: np.ndarray) -> dict:
    """Returns the mean IoU of predicted masks: of the whole images, by class, and by place.

    `predicted` and `labels` are [n, height, width]; `inside` [height, width] is the part of the
    image that is scored separately.
    """
    count = len(sources.CamVid.classes)
    rings = ring_of(*labels.shape[1:])

    def iou(pixels):
        counts = evaluate.confusion(predicted[:, pixels], labels[:, pixels], count)
        return evaluate.intersection_over_union(counts)

    by_class = iou(rings >= 0)
    by_ring = [evaluate.mean_of_known(iou(rings == ring)) for ring in range(rings.max() + 1)]
    return {
        "miou": evaluate.mean_of_known(by_class),
        "by_class": by_class,
        "by_ring": by_ring,
        "inside": evaluate.mean_of_known(iou(inside)),
        "outside": evaluate.mean_of_known(iou(~inside)),
    }


def prior(split: arrays.Split) -> np.ndarray:
    """Returns the most frequent class of each pixel: the best guess from position alone."""
    counts = [(split.labels == number).sum(0) for number in range(len(sources.CamVid.classes))]
    return np.argmax(counts, 0).astype(np.uint8)


def predictions_file(options, padding: str, seed: int) -> pathlib.Path:
    return options.workdir / f"{padding},seed={seed}" / "test.npz"


def measure(point: Point, options, data: arrays.Dataset) -> dict:
    """Trains one network and scores its masks on the test scenes."""
    config = configure(options, point)
    if options.weights and not encoder_file(options).exists():
        weights.save_torchvision(read_encoder(options.weights), encoder_file(options))
    file = predictions_file(options, point.padding, point.seed)
    workdir.run_once(loop.run, config, file.parent, study.update_record)
    inside = reached(config, data.test.images.shape[1:])
    with np.load(file) as arrays_of_run:
        return score(arrays_of_run["predicted"], data.test.labels, inside)


# --- Report ---------------------------------------------------------------------------------------


def judge(results: list[dict]) -> str:
    """Compares the measured difference between zeros and none with the lecture's difference."""
    by_seed = {}
    for padding in LECTURE:
        chosen = study.select(results, padding=padding)
        by_seed[padding] = {result["seed"]: 100 * result["miou"] for result in chosen}
    seeds = by_seed["zeros"].keys() & by_seed["none"].keys()
    gains = [by_seed["zeros"][seed] - by_seed["none"][seed] for seed in seeds]
    if len(gains) < 2:
        return "Two seeds of zeros and of none are needed to judge the lecture's direction.\n"
    verdicts = {1: "confirmed", 0: "undecided", -1: "not confirmed: the other way round"}
    return (
        f"Zero padding gains {tables.interval(gains, 1)} points over no padding (95 % interval of "
        f"the mean over {len(gains)} pairs of a seed); the lecture's figures differ by "
        f"{LECTURE['zeros'] - LECTURE['none']:.1f} points on other data. Its direction is "
        f"{verdicts[tables.direction(gains)]}.\n"
    )


def percent(values) -> str:
    """Returns mean ± standard deviation in percent of the known values."""
    known = [100 * value for value in values if value is not None]
    return tables.spread(known, 1) if known else ""


def tabulate(groups: dict[str, list[dict]], share_inside: float) -> str:
    lines = []
    for name, results in groups.items():
        line = [name, str(LECTURE.get(name, ""))]
        for part in ("miou", "inside", "outside"):
            line.append(percent([result[part] for result in results]))
        for ring in (0, -1):
            line.append(percent([result["by_ring"][ring] for result in results]))
        lines.append([*line, str(len(results))])
    inner = f"inner {100 * share_inside:.0f} %"
    header = ["padding", "lecture (VOC)", "mIoU", inner, "rest", f"outermost {_RING} px", "center"]
    return tables.table([*header, "n"], lines)


def tabulate_classes(groups: dict[str, list[dict]]) -> str:
    lines = []
    for name, results in groups.items():
        by_class = zip(*(result["by_class"] for result in results))
        lines.append([name, *map(percent, by_class)])
    return tables.table(["padding", *sources.CamVid.classes], lines)


def draw_rings(groups: dict[str, list[dict]]) -> Figure:
    """Draws the mean IoU by the distance to the border."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, results in groups.items():
        values = 100 * np.array([result["by_ring"] for result in results], float)
        distance = (np.arange(values.shape[1]) + 0.5) * _RING
        if name == ALONE:
            axis.plot(distance, values[0], "k:", label="position alone")
            continue
        label = f"{name} (n={len(values)})"
        study.draw_curve(axis, distance, values.T, marker=".", label=label)
    axis.set(xlabel="distance to the border, pixels", ylabel="mean IoU of the ring, %")
    axis.set_ylim(0, None)
    axis.legend(fontsize=8)
    return figure


def draw_scenes(options, test: arrays.Split) -> Figure:
    """Draws a few test scenes, their masks, and what the networks of seed 0 predict."""
    rows = {"image": test.images[list(_SHOWN)], "mask": pictures.paint(test.labels[list(_SHOWN)])}
    for padding in options.paddings:
        with np.load(predictions_file(options, padding, 0)) as arrays_of_run:
            rows[padding] = pictures.paint(arrays_of_run["predicted"][list(_SHOWN)])
    figure = Figure(figsize=(2.4 * len(_SHOWN), 1.85 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(_SHOWN))
    for line, (name, scenes) in zip(axes, rows.items()):
        line[0].set_ylabel(name)
        for axis, scene in zip(line, scenes):
            axis.imshow(scene)
            axis.set(xticks=[], yticks=[])
    colors = pictures.paint(np.arange(len(sources.CamVid.classes))) / 255
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in colors]
    figure.legend(handles, sources.CamVid.classes, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def report(results: list[dict], options) -> study.Report:
    data = arrays.load("camvid", options.data_dir)
    labels = data.test.labels
    config = configure(options, Point(options.paddings[0], 0))
    inside = reached(config, data.test.images.shape[1:])
    groups = {}
    for padding in options.paddings:
        groups[padding] = study.select(results, padding=padding)
    alone = np.broadcast_to(prior(data.train), labels.shape)
    groups[ALONE] = [score(alone, labels, inside)]
    encoder = "SqueezeNet 1.1, fine-tuned" if options.weights else "a small network from scratch"
    text = f"""# Segmentation of CamVid by padding

Mean IoU in percent ({encoder}, {options.epochs} epochs, {len(labels)} test scenes of 240x180), mean
± sample standard deviation over seeds of weights and order. The inner part is what the deepest map
without padding reaches; beyond it that map's nearest scores are taken. *Position alone* is the most
frequent class at each pixel of the training masks.

{tabulate(groups, inside.mean())}
{judge(results)}
IoU of each class:

{tabulate_classes(groups)}
![Mean IoU by ring](rings.png)

![Scenes](scenes.png)
"""
    figures = {"rings.png": draw_rings(groups), "scenes.png": draw_scenes(options, data.test)}
    return study.Report(text, figures)


STUDY = study.Study(
    description=__doc__,
    results="segmentation.json",
    add_options=add_options,
    axes=("paddings", "seeds"),
    files=("weights",),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
