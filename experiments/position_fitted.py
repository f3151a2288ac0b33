"""Does "position cannot be read" hold for other images, more images, and a hidden layer?

    python -m experiments.position_fitted --workdir runs/position_fitted
        [--photographs FOLDER] [--seeds 3] [--paddings zeros ...] [--encoders resnet18 ...]
        [--energy]

The position study fits a linear readout of horizontal position (H) to 24 crops of photographs. Here
a readout is fitted to photographs, to the same photographs with their pixels shuffled, or to noise
images, and is scored on unseen images of the same kind. The encoders have random weights. If there
are more photographs than images to fit to, each seed draws photographs at random; a seed's smaller
draw is part of its larger one.

A nonlinear readout has one hidden layer. All stages are resized to one grid, in one of two ways:

- "corners", as in the position study and the authors' code, aligns the corners of all stages,
  although the stages cover different parts of the image.
- "registered" samples all stages at the same pixels.

With `--energy`, H and the map G, a bump in the center, are also read from the local energy of the
features, by a linear readout of squared differences between neighbors. Such a readout sees where
resizing averages more.

The last table shows how a border changes the output of one random convolution of noise. Finished
points are not computed again. Writes report.md, fitted.json and fitted.png.
"""

import itertools
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from cnnjax import study
from cnnjax.data import photographs
from cnnjax.nn import conv, relu
from cnnjax.position.encoder import (
    FEATURE_SIZE,
    GRIDS,
    encode_on_grids,
    normalize,
    random_encoder,
)
from cnnjax.position.metrics import scores
from cnnjax.position.patterns import ALIGNED
from cnnjax.position.readout import fit_exact, fit_sgd
from cnnjax.position.targets import target
from cnnjax.runtime import command, tables

_SIZE = 224
_HELD_OUT = 32
_TEST = 32
ENCODERS = ("resnet18", "vgg11", "vgg16")
IMAGES = ("photographs", "shuffled", "noise")
ENERGY_TARGETS = ("H", "G")
# No padding, and the fills that keep every position where it is, as registered stages need.
PADDINGS = ("none", *ALIGNED)


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    encoder: str
    padding: str
    images: str
    seed: int


def add_options(parser):
    parser.add_workdir("runs/position_fitted")
    parser.add_photographs()
    parser.add_count("seeds", 3, "repetitions, each with its own weights, photographs and crops")
    parser.add_names(
        "paddings", PADDINGS, ["zeros", "none", "reflect", "replicate", "circular", "random"]
    )
    parser.add_names("encoders", ENCODERS, ["resnet18"])
    parser.add_names("images", IMAGES)
    parser.add_argument(
        "--counts",
        nargs="+",
        type=command.whole_number(2),
        default=[24, 96, 256],
        help="numbers of images to fit to; the nonlinear readout uses the largest "
        "(default: 24 96 256)",
    )
    parser.add_count(
        "hidden", 64, "hidden channels of the nonlinear readout; 0 leaves it out", least=0
    )
    parser.add_count("steps", 300, "SGD steps of the nonlinear readout")
    # Work directories that were begun before this option existed continue with None.
    parser.add_argument(
        "--energy",
        action="store_true",
        default=None,
        help="read H and G from the local energy of the features, too",
    )


def load(options) -> list[pathlib.Path]:
    """Lists the photographs, none for noise alone.

    Raises `ValueError` if they are too few or one is too small.
    """
    if len(set(options.counts)) < len(options.counts):
        raise ValueError(f"counts={options.counts} must name each number once")
    if set(options.images) == {"noise"}:
        return []
    paths = photographs.list_photographs(options.photographs)
    # Too few are refused here.
    photographs.split(paths, image_counts(options), 0)
    photographs.check_sizes(paths, _SIZE, f"the crops of {_SIZE} px")
    return paths


def image_counts(options) -> tuple[int, int, int]:
    """Lists the numbers of images to fit to, to hold out, and to test on."""
    return max(options.counts), _HELD_OUT, _TEST


def draws(point: Point, options) -> bool:
    """Tells whether a point has more photographs than it needs, and draws from them."""
    if point.images == "noise":
        return False
    paths, _ = photographs.find_photographs(options.photographs)
    parts = photographs.split(paths, image_counts(options), 0)
    return photographs.is_random_choice(parts, (min(options.counts), _HELD_OUT, _TEST))


def points(options):
    seeds = range(options.seeds)
    grid = itertools.product(options.encoders, options.paddings, options.images, seeds)
    return itertools.starmap(Point, grid)


# --- One encoder on one kind of images ------------------------------------------------------------


def measure(point: Point, options, paths: list[pathlib.Path]) -> dict:
    """Fits readouts of H to images of one kind, and scores them on unseen images of that kind."""
    counts = image_counts(options)
    most = counts[0]
    # Noise alone comes without photographs.
    parts: list[list[pathlib.Path]] = [[], [], []]
    if paths:
        parts = photographs.split(paths, counts, point.seed)
    features = encode_grids(point, np.concatenate(draw_images(point, parts, counts)))
    n_photographs = [min(len(part), count) for part, count in zip(parts, counts)]
    goal = target("H", FEATURE_SIZE)
    readouts = []
    energies = []
    for grid, joined in features.items():
        train, held_out, test = np.split(joined, [most, most + _HELD_OUT])
        if options.energy:
            energies += read_energy(grid, train, held_out, test)
        for n_fitted in options.counts:
            chosen = train[choose_images(point, n_fitted, n_photographs[0])]
            readout = fit_exact(chosen, held_out, goal[None])
            readouts.append(scored("linear", grid, n_fitted, readout(test)))
        if options.hidden:
            nonlinear = fit_sgd(
                train,
                goal[None],
                steps=options.steps,
                seed=point.seed,
                hidden=(options.hidden,),
            )
            readouts.append(scored("nonlinear", grid, most, nonlinear(test)))
    result = {
        "readouts": readouts,
        "photographs": n_photographs,
        "border": border(point.padding, point.seed),
    }
    return result | ({"energies": energies} if options.energy else {})


def choose_images(point: Point, count: int, available: int) -> slice | list[int]:
    """Chooses which images to fit to.

    The first `available` images are crops of different photographs. If fewer are needed, they are
    drawn at random; a seed's smaller draw is part of its larger one.
    """
    if point.images == "noise" or count >= available:
        return slice(count)
    return photographs.choose(range(available), count, point.seed)


def draw_images(
    point: Point, parts: list[list[pathlib.Path]], counts: tuple[int, ...]
) -> list[np.ndarray]:
    """Draws images to fit to, to choose the penalty on, and to test on, all of one kind."""
    images = []
    for number, (part, count) in enumerate(zip(parts, counts)):
        seed = len(counts) * point.seed + number
        if point.images == "noise":
            drawn = photographs.synthetic("noise", count, _SIZE, seed)
        else:
            drawn = photographs.random_crops(part, count, _SIZE, seed)
        if point.images == "shuffled":
            drawn = photographs.shuffle_pixels(drawn, seed)
        images.append(drawn)
    return images


def scored(readout: str, grid: str, count: int, maps: np.ndarray) -> dict:
    """Scores predictions [n, 1, 28, 28] of H on the readout's own grid."""
    metrics = scores(maps[:, 0], target("H", FEATURE_SIZE))
    return {
        "readout": readout,
        "grid": grid,
        "count": count,
        "r2": float(metrics["r2"].mean()),
        "median_r2": float(np.median(metrics["r2"])),
        "spc": float(metrics["spc"].mean()),
    }


def local_energy(features: np.ndarray) -> np.ndarray:
    """Sums the squared differences to the neighbors below and to the right.

    From [n, side, side, channels] to [n, side - 1, side - 1, channels]: no place lacks a neighbor.
    """
    here = features[:, :-1, :-1]
    below = features[:, 1:, :-1] - here
    right = features[:, :-1, 1:] - here
    return below**2 + right**2


def read_energy(grid: str, train: np.ndarray, held_out: np.ndarray, test: np.ndarray) -> list[dict]:
    """Scores linear readouts of H and G, fitted to the local energy of features."""
    goals = np.stack([target(name, FEATURE_SIZE - 1) for name in ENERGY_TARGETS])
    readout = fit_exact(local_energy(train), local_energy(held_out), goals)
    maps = readout(local_energy(test))
    rows = []
    for number, name in enumerate(ENERGY_TARGETS):
        metrics = scores(maps[:, number], goals[number])
        row = {"grid": grid, "target": name, "count": len(train)}
        rows.append(row | {"median_r2": float(np.median(metrics["r2"]))})
    return rows


def encode_grids(point: Point, images: np.ndarray) -> dict[str, np.ndarray]:
    """Encodes images with random weights.

    Returns the joined stages [n, 28, 28, channels] by grid.
    """
    model, variables, stages = random_encoder(point.encoder, point.padding, _SIZE, point.seed)
    return encode_on_grids(model, variables, images, stages, GRIDS)


# --- What a border does to noise ------------------------------------------------------------------


def border(padding: str, seed: int) -> dict:
    """Compares first column and interior of a random 3x3 convolution of noise.

    Returns means over 64 channels. `variance` is the share by which the variance of the column is
    above or below that of the interior. `before` and `after` are the distances between the means of
    column and interior, before and after the ReLU, in units of the interior's standard deviation.
    """
    images = normalize(photographs.synthetic("noise", 64, 64, seed))
    kernel_key, fill_key = jax.random.split(jax.random.key(seed))
    kernel = jax.nn.initializers.he_normal()(kernel_key, (3, 3, 3, 64))
    maps = conv(images, kernel, padding=1, fill=padding, key=fill_key)
    variance, before = _first_column(maps)
    _, after = _first_column(relu(maps))
    return {"variance": variance, "before": before, "after": after}


def _first_column(maps) -> tuple[float, float]:
    """Returns the change of variance, and the distance of means in standard deviations."""
    # A corner belongs to two borders, so rows near the top and the bottom are left out.
    rows = np.asarray(maps, np.float64)[:, 8:-8]
    column = rows[:, :, 0]
    interior = rows[:, :, 8:-8]
    spread = interior.std((0, 1, 2))
    change = np.abs(column.var((0, 1)) / spread**2 - 1)
    shift = np.abs(column.mean((0, 1)) - interior.mean((0, 1, 2))) / spread
    return float(change.mean()), float(shift.mean())


# --- Report ---------------------------------------------------------------------------------------


def rows_of(results: list[dict], part: str, point_fields: dict, **fields) -> list[dict]:
    """Returns rows of "readouts" or "energies" with the values `fields`.

    They are those of points with the values `point_fields`.
    """
    rows = []
    for result in study.select(results, **point_fields):
        rows += study.select(result[part], **fields)
    return rows


def tabulate(results: list[dict]) -> str:
    """Tabulates R2 of H: a line for each readout, a column for each padding.

    R2 is the median over test images: it has no lower bound, and single images whose features have
    rare values fall far below 0.
    """
    paddings = study.unique(results, "padding")
    kinds = results[0]["readouts"]
    seeds = str(len(study.unique(results, "seed")))
    lines = []
    grid = itertools.product(
        study.unique(results, "encoder"), study.unique(results, "images"), kinds
    )
    for encoder, images, kind in grid:
        fields = {name: kind[name] for name in ("readout", "grid", "count")}
        cells = []
        for padding in paddings:
            point_fields = {"encoder": encoder, "images": images, "padding": padding}
            rows = rows_of(results, "readouts", point_fields, **fields)
            cells.append(tables.spread(study.values(rows, "median_r2"), 2))
        label = [encoder, images, str(kind["count"]), kind["readout"], kind["grid"]]
        lines.append([*label, *cells, seeds])
    header = ["encoder", "fitted to", "images", "readout", "grid", *paddings, "n"]
    return tables.table(header, lines)


def tabulate_energies(results: list[dict]) -> str:
    """Tabulates R2 of readouts of the local energy; empty if none was measured."""
    if "energies" not in results[0]:
        return ""
    paddings = study.unique(results, "padding")
    lines = []
    grid = itertools.product(
        study.unique(results, "encoder"), study.unique(results, "images"), results[0]["energies"]
    )
    for encoder, images, kind in grid:
        fields = {name: kind[name] for name in ("grid", "target")}
        cells = []
        for padding in paddings:
            point_fields = {"encoder": encoder, "images": images, "padding": padding}
            rows = rows_of(results, "energies", point_fields, **fields)
            cells.append(tables.spread(study.values(rows, "median_r2"), 2))
        label = [encoder, images, str(kind["count"]), kind["target"], kind["grid"]]
        lines.append([*label, *cells, str(len(study.unique(results, "seed")))])
    header = ["encoder", "fitted to", "images", "target", "grid", *paddings, "n"]
    return (
        "\nR2 of a linear readout of the local energy, the squared differences between neighbors "
        "on the grid.\n\n" + tables.table(header, lines)
    )


def tabulate_borders(results: list[dict]) -> str:
    lines = []
    for padding in study.unique(results, "padding"):
        by_seed = {row["seed"]: row["border"] for row in study.select(results, padding=padding)}
        borders = list(by_seed.values())
        cells = [
            tables.spread(study.values(borders, name), 3)
            for name in ("variance", "before", "after")
        ]
        lines.append([padding, *cells, str(len(borders))])
    header = ["padding", "change of variance", "of mean before ReLU", "after ReLU", "n"]
    return tables.table(header, lines)


def draw(results: list[dict]) -> Figure:
    """Draws R2 of the linear readout: a panel for each encoder and kind of images."""
    encoders = study.unique(results, "encoder")
    kinds = study.unique(results, "images")
    paddings = study.unique(results, "padding")
    counts = sorted({row["count"] for row in results[0]["readouts"]})
    size = (3.2 * len(kinds) + 0.8, 2.6 * len(encoders) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(encoders), len(kinds), squeeze=False, sharex=True, sharey=True)
    for axis, (encoder, images) in zip(axes.flat, itertools.product(encoders, kinds)):
        for padding in paddings:
            point_fields = {"encoder": encoder, "images": images, "padding": padding}
            curve = []
            for count in counts:
                fields = {"readout": "linear", "grid": "corners", "count": count}
                rows = rows_of(results, "readouts", point_fields, **fields)
                curve.append(study.values(rows, "median_r2"))
            study.draw_curve(axis, counts, curve, marker="o", ms=3, lw=1, label=padding)
        axis.axhline(0, color="black", lw=0.5)
        axis.set_xscale("log")
        axis.set_xticks(counts, counts)
        axis.minorticks_off()
        axis.set(title=f"{encoder}, fitted to {images}", ylim=(-0.15, 1))
    for axis in axes[-1]:
        axis.set_xlabel("images fitted to")
    for axis in axes[:, 0]:
        axis.set_ylabel("R2 of H, median")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def describe_photographs(results: list[dict]) -> str:
    """Tells how many photographs the images are cropped from; empty if all images are noise."""
    # Results of earlier versions do not count them.
    of_photographs = [result for result in results if result["images"] != "noise"]
    if not of_photographs or "photographs" not in of_photographs[0]:
        return ""
    fitted, held_out, test = of_photographs[0]["photographs"]
    return (
        f"\nThe images are crops: those to fit to of at most {fitted} photograph(s), the held-out "
        f"ones of {held_out}, the unseen ones of {test}."
    )


def report(results: list[dict], options) -> study.Report:
    text = f"""# What a readout of H can be fitted to

Encoders with random weights, images of {_SIZE} px. R2 of H, the median over {_TEST} unseen images
of the kind that the readout was fitted to, on the readout's grid of {FEATURE_SIZE}x{FEATURE_SIZE};
mean ± sample standard deviation over n seeds of weights and images. The linear readout is the exact
one, its penalty chosen on {_HELD_OUT} held-out images. "Corners" aligns the corners of all stages;
"registered" samples all stages at the same pixels.{describe_photographs(results)}

{tabulate(results)}{tabulate_energies(results)}
![R2 of H by the number of images](fitted.png)

What the border does to noise images behind one random 3x3 convolution: by what share the variance
of the first column differs from the interior's, and how far its mean is from the interior's, in the
interior's standard deviations; means over 64 channels.

{tabulate_borders(results)}"""
    return study.Report(text, {"fitted.png": draw(results)})


STUDY = study.Study(
    description=__doc__,
    results="fitted.json",
    add_options=add_options,
    axes=("paddings", "encoders", "images", "seeds"),
    files=("photographs",),
    load=load,
    points=points,
    measure=measure,
    report=report,
    draws=draws,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
