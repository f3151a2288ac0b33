"""Does training add or remove position, and does padding matter for the task?

    python -m experiments.position_training --data_dir data --workdir runs/position_training
        [--seeds 3] [--epochs 8] [--paddings zeros ...] [--network resnet18] [--enlarge 2]
        [--photographs [FOLDER]]

A network is trained under each fill (kind of padding), and position is read from its features as it
learns. By default, the network is a ConvNet of four convolutions. Networks of one seed start from
the same weights and see the same batches; only their padding differs. They are trained on the
middle 24x24 px of CIFAR-10 images, so that a shift by 4 px in both directions brings in real pixels
and nothing has to be filled in. `--enlarge 2` makes 2x2 pixels of each pixel, for networks that
reduce such a small image too far.

At epochs 0, 1, 2, 5 and the last, the exact readout reads H and V from each stage, on test images
and on a black image. With `--photographs`, the pattern that the padding leaves in each stage is
measured at the same epochs, as in `position_patterns`. CIFAR-10's images are too small to show what
lies beyond a crop, so this measurement uses photographs, scaled to the crop and the pixels that the
network needs around it. Each seed draws 24 of them; if there are no more, all seeds have the same.

Finished networks are not trained again. Writes report.md, training.json and training.png.
"""

import itertools
import math
import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cnnjax import study
from cnnjax.data import arrays, photographs
from cnnjax.models import Network, create_model
from cnnjax.models.small import SmallConvNet
from cnnjax.nn import FILLS
from cnnjax.position import patterns
from cnnjax.position.encoder import FEATURE_SIZE, encode, image_features, stage_shapes
from cnnjax.position.metrics import scores
from cnnjax.position.readout import fit_exact
from cnnjax.position.targets import target
from cnnjax.runtime import tables
from cnnjax.train.small import classify, train_epochs

# Pixels: the side of a window, and its shift.
_SIZE = 24
_SHIFT = 4
_TARGETS = ("H", "V")
# Epochs at which networks are probed, besides the last one.
_EPOCHS = (0, 1, 2, 5)
# Numbers of test images to fit the readout to, to choose its strength on, and to score it on.
_PROBE = (64, 16, 48)
# Largest number of photographs per seed for measuring patterns.
_PHOTOGRAPHS = 24
_BATCH = 100


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    """A network, or the image itself without any network.

    `part` is "network" or "image"; the image has neither padding nor seed.
    """

    part: str
    padding: str
    seed: int


def add_options(parser):
    parser.add_workdir("runs/position_training")
    parser.add_data_dir()
    parser.add_argument(
        "--network",
        default="",
        metavar="NAME",
        help="name of a registered network (default: a ConvNet of four convolutions)",
    )
    parser.add_count("enlarge", 1, "factor by which height and width are enlarged")
    parser.add_names(
        "paddings", FILLS, ["zeros", "partial", "none", "reflect", "replicate", "circular"]
    )
    parser.add_count("seeds", 3, "networks per padding")
    parser.add_count("train", 10_000, "training images of a network", _BATCH)
    parser.add_count("epochs", 8, "training epochs")
    parser.add_count("test", 4000, "test images")
    # Work directories that were begun before this option existed continue with None.
    parser.add_argument(
        "--photographs",
        nargs="?",
        const="",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="measure patterns of the padding, too, in a folder's photographs; without FOLDER, in "
        "those included in scikit-image and scikit-learn",
    )


class Shared(NamedTuple):
    """CIFAR-10, and photographs if patterns are measured."""

    data: arrays.Dataset
    paths: list[pathlib.Path]


def load(options) -> Shared:
    """Loads CIFAR-10, and checks that every network has an output."""
    data = arrays.load("cifar10", options.data_dir)
    arrays.check_counts(data, options.train, options.test)
    for padding in options.paddings:
        build(padding, options)
    paths = []
    if options.photographs is not None:
        paths = photographs.list_photographs(options.photographs)
        photographs.check_sizes(paths, _SIZE, f"the crops of {_SIZE} px")
        if len(paths) < 2:
            raise ValueError(
                f"photographs={options.photographs!r} has 1 photograph; at least 2 are needed"
            )
    return Shared(data, paths)


def points(options):
    yield Point("image", "", 0)
    for seed, padding in itertools.product(range(options.seeds), options.paddings):
        yield Point("network", padding, seed)


# --- One network ----------------------------------------------------------------------------------


def build(padding: str, options) -> Network:
    """Builds the network; raises `ValueError` if nothing is left of the images in it."""
    size = options.enlarge * _SIZE
    shape = (size, size, 3)
    if options.network:
        model = create_model(options.network, num_classes=10, padding=padding, input_shape=shape)
    else:
        model = SmallConvNet(padding=padding, input_shape=shape)
    if not stage_shapes(model, size):
        raise ValueError(f"network={options.network!r} has no stages whose maps could be read")
    return model


def windows(images: np.ndarray, enlarge: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts windows of 24x24 px out of images of 32x32.

    Returns the middle windows [n, 24, 24, 3], and windows shifted by 4 px in both directions,
    towards each corner [4, n, 24, 24, 3]. Every pixel of both becomes `enlarge` x `enlarge` pixels.
    """

    def cut(top, left):
        window = images[:, top : top + _SIZE, left : left + _SIZE]
        return window.repeat(enlarge, 1).repeat(enlarge, 2)

    corners = itertools.product((0, 2 * _SHIFT), repeat=2)
    return cut(_SHIFT, _SHIFT), np.stack([cut(*corner) for corner in corners])


def probe(model: Network | None, variables: dict, images: np.ndarray) -> list[dict]:
    """Fits the exact readout of H and V to every stage, and to all together.

    Args:
      model: a frozen network; None reads the image itself.
      variables: its variables.
      images: test images, uint8 [n, height, width, 3].

    Returns stage, target, data ("natural" or "black"), SPC and R2 of each readout.
    """
    black = np.zeros((1, *images.shape[1:]), np.uint8)
    everything = np.concatenate([images[: sum(_PROBE)], black])
    if model is None:
        features = {"image": image_features(everything)}
    else:
        shapes = stage_shapes(model, images.shape[1])
        joined = encode(model, variables, everything, list(shapes))
        ends = np.cumsum([shape[3] for shape in shapes.values()])
        features = dict(zip(shapes, np.split(joined, ends[:-1], -1)))
        features["all"] = joined
    goals = np.stack([target(name, FEATURE_SIZE) for name in _TARGETS])
    rows = []
    for stage, maps in features.items():
        # The black image comes after the test images.
        train, held_out, natural, black_maps = np.split(maps, np.cumsum(_PROBE))
        readout = fit_exact(train, held_out, goals)
        for data, part in (("natural", natural), ("black", black_maps)):
            predicted = readout(part)
            for number, name in enumerate(_TARGETS):
                scored = scores(predicted[:, number], goals[number])
                means = {key: float(scored[key].mean()) for key in ("spc", "r2")}
                rows.append({"stage": stage, "target": name, "data": data} | means)
    return rows


def draw_photographs(
    model: Network, paths: list[pathlib.Path], seed: int, enlarge: int
) -> np.ndarray:
    """Draws a seed's photographs: the crops and the pixels needed around them.

    If there are no more than a seed takes, all seeds have the same.

    Returns uint8 [n, side, side, 3]; every pixel becomes `enlarge` x `enlarge` pixels, as in
    `windows`.
    """
    size = enlarge * _SIZE
    stages = list(stage_shapes(model, size))
    # A multiple of the common margin also fits all stages; this multiple cuts no enlarged pixel.
    margin = math.lcm(patterns.common_margin(model, stages, size), enlarge)
    side = _SIZE + 2 * margin // enlarge
    squares = photographs.fit_squares(photographs.shuffle(paths, _PHOTOGRAPHS, seed), side)
    return squares.repeat(enlarge, 1).repeat(enlarge, 2)


def trace(model: Network, variables: dict, context: np.ndarray, size: int) -> list[dict]:
    """Measures the pattern that the padding leaves in every stage.

    Args:
      context: photographs around the crops, uint8 [n, side, side, 3].
      size: side of the crops in pixels.

    Returns the stage, and the measures of `patterns.Strength` that are reported.
    """
    stages = list(stage_shapes(model, size))
    start = (context.shape[1] - size) // 2
    crops = context[:, start : start + size, start : start + size]
    padded = patterns.features(model, variables, crops, stages)
    inside = patterns.features_inside(model, variables, context, size, stages)
    rows = []
    for stage in stages:
        strength = patterns.strength(padded[stage], inside[stage])
        rows.append({"stage": stage, "mae": strength.mae, "shared": strength.shared})
    return rows


def score_shifts(
    model: Network, variables: dict, middle: np.ndarray, shifted: np.ndarray, labels: np.ndarray
) -> dict:
    """Scores a network on unshifted and on shifted windows of the same test images.

    Args:
      middle: unshifted windows, uint8 [n, height, width, 3].
      shifted: windows by shift, uint8 [shifts, n, height, width, 3].
      labels: the classes [n].

    Returns the accuracy on both, and the share of shifted windows that get the same class as the
    unshifted one.
    """
    unshifted_classes = classify(model, variables, middle)
    shifted_classes = np.stack([classify(model, variables, images) for images in shifted])
    return {
        "accuracy": float((unshifted_classes == labels).mean()),
        "shifted": float((shifted_classes == labels).mean()),
        "agreement": float((shifted_classes == unshifted_classes).mean()),
    }


def measure(point: Point, options, shared: Shared) -> dict:
    """Trains a network on images chosen by its seed, probes it during training, and tests it."""
    data = shared.data
    middle, shifted = windows(data.test.images, options.enlarge)
    if point.part == "image":
        return {"probes": probe(None, {}, middle)}
    model = build(point.padding, options)
    whole, labels = data.train.draw(options.train, point.seed)
    images, _ = windows(whole, options.enlarge)
    train = arrays.Split(images, labels)
    # A generator of their own, so that the probed images depend only on the seed.
    generator = np.random.default_rng(point.seed)
    probed = middle[generator.permutation(len(middle))[: sum(_PROBE)]]
    context = None
    # The other fills move positions, so their maps have no counterpart inside the photographs.
    if shared.paths and point.padding in patterns.ALIGNED:
        context = draw_photographs(model, shared.paths, point.seed, options.enlarge)
    probes = []
    traces = []
    epochs = train_epochs(model, train, options.epochs, point.seed, batch_size=_BATCH)
    for epoch, variables in enumerate(epochs):
        if epoch in _EPOCHS or epoch == options.epochs:
            probes += [{"epoch": epoch} | row for row in probe(model, variables, probed)]
            if context is not None:
                rows = trace(model, variables, context, middle.shape[1])
                traces += [{"epoch": epoch} | row for row in rows]
    # The loop ends with the variables of the last epoch, which are tested.
    count = options.test
    result = score_shifts(
        model, variables, middle[:count], shifted[:, :count], data.test.labels[:count]
    )
    return result | {"probes": probes, "patterns": traces}


# --- Report ---------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A field of probes or patterns that is followed over the epochs, by stage.

    Attributes:
      title: what is measured, in the titles of the figure's panels.
      kind: "probes" or "patterns".
      name: the field with the measurement.
      fields: the values of other fields that select one measurement of each stage and epoch.
    """

    title: str
    kind: str
    name: str
    fields: dict


READ = Curve("test images", "probes", "r2", {"target": "H", "data": "natural"})
READ_BLACK = Curve("a black image", "probes", "r2", {"target": "H", "data": "black"})
CHANGE = Curve("change", "patterns", "mae", {})
SHARED = Curve("shared change", "patterns", "shared", {})


def by_seed(results: list[dict], padding: str, kind: str, name: str, **fields) -> np.ndarray:
    """Returns one measurement of every network with a padding, [seeds].

    Args:
      kind: "probes" or "patterns", among which `fields` select one of each network.
      name: the measurement's field.
    """
    values = []
    for result in study.select(results, padding=padding):
        (row,) = study.select(result[kind], **fields)
        values.append(row[name])
    return np.array(values)


def traced(results: list[dict]) -> list[dict]:
    """Returns the networks whose patterns were measured."""
    # Results of earlier versions have no such field.
    return [result for result in results if result.get("patterns")]


def tabulate_networks(results: list[dict], epochs: list[int], options) -> str:
    """Makes the table of accuracy and of the position in all stages together."""
    readouts = [("H", "natural"), ("V", "natural"), ("H", "black")]
    lines = []
    for padding in study.unique(results, "padding"):
        line = [padding]
        for key in ("accuracy", "shifted", "agreement"):
            line.append(tables.spread(100 * study.values(results, key, padding=padding), 1))
        for (name, data), epoch in itertools.product(readouts, (0, epochs[-1])):
            fields = {"epoch": epoch, "stage": "all", "target": name, "data": data}
            values = by_seed(results, padding, "probes", "r2", **fields)
            line.append(tables.spread(values, 2))
        lines.append([*line, str(len(study.select(results, padding=padding)))])
    header = [
        "padding",
        "accuracy, %",
        f"shifted by {_SHIFT * options.enlarge} px",
        "same answer",
        "R2 of H, untrained",
        "trained",
        "R2 of V, untrained",
        "trained",
        "H on black, untrained",
        "trained",
        "n",
    ]
    return tables.table(header, lines)


def tabulate_differences(results: list[dict], last: int, options) -> str:
    """Tabulates the difference of each padding from the first one, paired by seed."""
    first, *others = study.unique(results, "padding")
    read = {"epoch": last, "stage": "all", "data": "natural"}
    seeds = str(len(study.unique(results, "seed")))
    lines = []
    for padding in others:
        line = [f"{padding} - {first}"]
        for key in ("accuracy", "shifted", "agreement"):
            here = study.values(results, key, padding=padding)
            there = study.values(results, key, padding=first)
            line.append(tables.interval(100 * (here - there), 1, "+"))
        for name in _TARGETS:
            here = by_seed(results, padding, "probes", "r2", target=name, **read)
            there = by_seed(results, first, "probes", "r2", target=name, **read)
            line.append(tables.interval(here - there, 2, "+"))
        lines.append([*line, seeds])
    header = [
        "padding",
        "accuracy, %",
        f"shifted by {_SHIFT * options.enlarge} px",
        "same answer",
        "R2 of H, trained",
        "R2 of V, trained",
        "n",
    ]
    return tables.table(header, lines)


def tabulate_training(results: list[dict], last: int) -> str:
    """Tabulates the change of position in all stages by training, paired by network."""
    readouts = [("H", "natural"), ("V", "natural"), ("H", "black")]
    seeds = str(len(study.unique(results, "seed")))
    lines = []
    for padding in study.unique(results, "padding"):
        line = [padding]
        for name, data in readouts:
            read = {"stage": "all", "target": name, "data": data}
            after = by_seed(results, padding, "probes", "r2", epoch=last, **read)
            before = by_seed(results, padding, "probes", "r2", epoch=0, **read)
            line.append(tables.interval(after - before, 2, "+"))
        lines.append([*line, seeds])
    return tables.table(["padding", "R2 of H", "R2 of V", "H on black", "n"], lines)


def tabulate_stages(results: list[dict], epochs: list[int], curve: Curve) -> str:
    """Makes the table of one curve by padding, stage and epoch."""
    stages = study.unique(results[0][curve.kind], "stage")
    lines = []
    for padding, stage in itertools.product(study.unique(results, "padding"), stages):
        line = [padding, stage]
        for epoch in epochs:
            fields = {"epoch": epoch, "stage": stage, **curve.fields}
            values = by_seed(results, padding, curve.kind, curve.name, **fields)
            line.append(tables.spread(values, 2))
        lines.append(line)
    return tables.table(["padding", "stage", *(f"epoch {epoch}" for epoch in epochs)], lines)


def draw_curve(axis, results: list[dict], *, epochs: list[int], stage: str, curve: Curve, colors):
    """Draws the curve of every padding in one stage, with its sample standard deviation."""
    for padding in study.unique(results, "padding"):
        values = []
        for epoch in epochs:
            fields = {"epoch": epoch, "stage": stage, **curve.fields}
            values.append(by_seed(results, padding, curve.kind, curve.name, **fields))
        mean = np.mean(values, 1)
        spread = tables.bar(np.transpose(values))
        color = colors[padding]
        axis.plot(epochs, mean, ".-", color=color, label=padding)
        axis.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.2, lw=0)
    axis.axhline(0, color="black", lw=0.5)
    axis.set_title(f"{stage}, {curve.title}", fontsize=9)


def draw(results: list[dict], epochs: list[int], stages: list[str]) -> Figure:
    """Draws the curves over the epochs: a column for each stage, a row for each curve."""
    curves = [READ, READ_BLACK]
    if traced(results):
        curves.append(SHARED)
    size = (2.6 * len(stages), 2.5 * len(curves))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(curves), len(stages), sharex=True, sharey="row")
    colors = {name: f"C{number}" for number, name in enumerate(study.unique(results, "padding"))}
    for curve, axis_row in zip(curves, axes):
        shown = traced(results) if curve.kind == "patterns" else results
        for axis, stage in zip(axis_row, stages):
            # Patterns are measured only in single stages.
            if curve.kind == "patterns" and stage == "all":
                axis.set_axis_off()
            else:
                draw_curve(axis, shown, epochs=epochs, stage=stage, curve=curve, colors=colors)
            axis.set_xlabel("epoch")
            axis.label_outer()
        if curve.kind == "probes":
            axis_row[0].set(ylabel="R2 of H", ylim=(-0.6, 1))
    if traced(results):
        axes[-1, 0].set(ylabel="shared change", ylim=(-0.1, 1))
        # The column "all" has no panel of patterns, so its lowest panel carries the label.
        axes[-2, -1].set_xlabel("epoch")
        axes[-2, -1].tick_params(labelbottom=True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def describe_patterns(results: list[dict], epochs: list[int], options) -> str:
    """Makes the report's section of patterns."""
    networks = traced(results)
    if not networks and options.photographs is None:
        return "Patterns of the padding were not measured: `--photographs` was not given.\n"
    if not networks:
        return "Patterns of the padding were not measured: all fills here move positions.\n"
    return f"""## Pattern of the padding by stage and epoch

What padding does to photographs' features, without any readout (`position_patterns`). Change is the
mean absolute difference that it makes, relative to the features; the shared change is the part of
its energy that all photographs have in common, from 0 to 1. Fills that move positions have none.
Each seed draws {_PHOTOGRAPHS} photographs; if there are no more, all seeds have the same.

Change:

{tabulate_stages(networks, epochs, CHANGE)}
Shared change:

{tabulate_stages(networks, epochs, SHARED)}"""


def report(results: list[dict], options) -> study.Report:
    (image,) = study.select(results, part="image")
    networks = study.select(results, part="network")
    probes = networks[0]["probes"]
    stages = study.unique(probes, "stage")
    epochs = sorted(study.unique(probes, "epoch"))
    size = options.enlarge * _SIZE
    enlarged = ""
    if options.enlarge > 1:
        enlarged = f" (24x24 px, each made {options.enlarge}x{options.enlarge})"
    of_image = study.select(image["probes"], data="natural")
    alone = ", ".join(f"{row['target']} {row['r2']:.2f}" for row in of_image)
    text = f"""# Position before and after training

{options.network or "Four convolutions"}, CIFAR-10, {options.train:,} training images of
{size}x{size} px{enlarged}, {options.epochs} epochs; mean ± sample standard deviation over seeds. R2
is the share of the variance of H (left to right) and V (top to bottom) that the exact readout
explains: of all stages together on unseen test images, and on a black one. Read from the image
itself it is: {alone}. "Same answer" is the share of shifted images that are given the class of the
unshifted one.

{tabulate_networks(networks, epochs, options)}
## Differences

Mean ± half of the 95 % interval (Student's t), not corrected for the number of intervals. Between
two networks of one seed, which share weights and batches:

{tabulate_differences(networks, epochs[-1], options)}
What training adds to a network's R2:

{tabulate_training(networks, epochs[-1])}
## R2 of H by stage and epoch

{tabulate_stages(networks, epochs, READ)}
{describe_patterns(networks, epochs, options)}
![R2 of H while a network is trained](training.png)
"""
    return study.Report(text, {"training.png": draw(networks, epochs, stages)})


STUDY = study.Study(
    description=__doc__,
    results="training.json",
    add_options=add_options,
    axes=("paddings", "seeds"),
    files=("photographs",),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
