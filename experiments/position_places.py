"""Is an object that was learned at one place of a canvas recognized at all others?

    python -m experiments.position_places --data_dir data --workdir runs/position_places
        [--seeds 5] [--places center corner] [--samplings stride ...] [--paddings zeros ...]

After Biscione and Bowers 2020 (arXiv 2011.11757) and Szabo and Horvath 2021 (arXiv 2112.09195).
MNIST's digits, reduced to 12x12 px, lie on a black canvas of 28x28 px. A network of three
convolutions and a max-pool, with a stride of 4 in total, sees its training digits at one place
only: the center of the canvas or its top left corner. It is tested on other digits at 9x9 places, 2
px apart. Every second place is a whole number of strides away from the trained one, and the
outermost places touch the border.

Under circular padding, a network cannot tell places apart that are whole strides apart, so their
accuracies are equal; with the sampling 'aps', this holds for any two places. Networks of one seed
start from the same weights and see the same digits. Finished networks are not trained again. Writes
report.md, places.json and places.png.
"""

import itertools
import sys
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cnnjax import study
from cnnjax.data import arrays
from cnnjax.models import Network
from cnnjax.models.fcn import SceneNet
from cnnjax.nn import FILLS, SAMPLINGS
from cnnjax.position.encoder import stage_shapes
from cnnjax.runtime import tables
from cnnjax.train.small import classify, train_epochs

# Pixels: the sides of a digit and of the canvas, the steps between places, the network's stride.
_DIGIT = 12
_CANVAS = 28
_STEP = 2
_STRIDE = 4
_BATCH = 50
# Places are counted in steps from the top left, along each axis.
PLACES = (_CANVAS - _DIGIT) // _STEP + 1
TRAINED = {"center": (PLACES // 2, PLACES // 2), "corner": (0, 0)}
MODEL = SceneNet(num_classes=10, input_shape=(_CANVAS, _CANVAS, 3), blocks=((16,), (32, 64)))


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    """A network; `place` is where its training digits lie."""

    place: str
    sampling: str
    padding: str
    seed: int


def add_options(parser):
    parser.add_workdir("runs/position_places")
    parser.add_data_dir("MNIST's files")
    parser.add_names("places", TRAINED)
    parser.add_names("samplings", SAMPLINGS, ["stride", "blur", "aps"])
    parser.add_names("paddings", FILLS, ["zeros", "none", "reflect", "circular", "partial"])
    parser.add_count("seeds", 5, "networks of each kind")
    parser.add_count("train", 4000, "training digits of a network", _BATCH)
    parser.add_count("epochs", 6, "training epochs")
    parser.add_count("test", 400, "test digits")


def load(options) -> arrays.Dataset:
    """Loads MNIST, and checks that every network has an output."""
    data = arrays.load("mnist", options.data_dir)
    arrays.check_counts(data, options.train, options.test)
    for model in {build(point) for point in points(options)}:
        stage_shapes(model, _CANVAS)
    return data


def points(options):
    grid = itertools.product(
        range(options.seeds), options.places, options.samplings, options.paddings
    )
    for seed, place, sampling, padding in grid:
        yield Point(place, sampling, padding, seed)


# --- One network ----------------------------------------------------------------------------------


def build(point: Point) -> Network:
    return MODEL.clone(sampling=point.sampling, padding=point.padding)


def reduce(images: np.ndarray) -> np.ndarray:
    """Averages 2x2 px of the middle 24x24 px of images [n, 28, 28, 1].

    Returns digits [n, 12, 12, 1]. The margin of 2 px that is cut off contains 0.3 % of the ink.
    """
    middle = images[:, 2:26, 2:26].astype(np.float32)
    squares = middle.reshape(len(images), _DIGIT, 2, _DIGIT, 2, 1)
    return np.round(squares.mean((2, 4))).astype(np.uint8)


def lay(digits: np.ndarray, row: int, column: int) -> np.ndarray:
    """Places all digits [n, 12, 12, 1] at one place of canvases [n, 28, 28, 3]."""
    canvases = np.zeros((len(digits), _CANVAS, _CANVAS, 3), np.uint8)
    top = row * _STEP
    left = column * _STEP
    canvases[:, top : top + _DIGIT, left : left + _DIGIT] = digits
    return canvases


def accuracy_map(
    model: Network, variables: dict, digits: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Returns the accuracy [9, 9] with all digits at one place, for every place."""
    accuracies = np.empty((PLACES, PLACES))
    for place in np.ndindex(PLACES, PLACES):
        predicted = classify(model, variables, lay(digits, *place))
        accuracies[place] = (predicted == labels).mean()
    return accuracies


def measure(point: Point, options, data: arrays.Dataset) -> dict:
    """Trains a network on digits of its seed's choice at one place, and tests it at all."""
    model = build(point)
    images, labels = data.train.draw(options.train, point.seed)
    train = arrays.Split(lay(reduce(images), *TRAINED[point.place]), labels)
    *_, variables = train_epochs(model, train, options.epochs, point.seed, batch_size=_BATCH)
    digits = reduce(data.test.images[: options.test])
    accuracies = accuracy_map(model, variables, digits, data.test.labels[: options.test])
    return {"accuracies": accuracies.tolist()}


# --- Report ---------------------------------------------------------------------------------------


def is_inside(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Tells which places do not lie at the border of the canvas."""
    return (np.minimum(rows, columns) > 0) & (np.maximum(rows, columns) < PLACES - 1)


def kinds_of_places(trained: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns masks [9, 9] of kinds of places, without the trained place.

    Places whole strides away from the trained place can differ from it only by their distances to
    the borders; the inner ones among them differ the least. Other inner places also differ by the
    phase of the stride.
    """
    rows, columns = np.indices((PLACES, PLACES))
    inside = is_inside(rows, columns)
    steps_per_stride = _STRIDE // _STEP
    whole_rows = (rows - trained[0]) % steps_per_stride == 0
    whole_columns = (columns - trained[1]) % steps_per_stride == 0
    whole = whole_rows & whole_columns
    elsewhere = np.ones_like(inside)
    elsewhere[trained] = False
    return {
        "elsewhere": elsewhere,
        "whole strides away, inside": elsewhere & whole & inside,
        "whole strides away, border": elsewhere & whole & ~inside,
        "other places, inside": elsewhere & ~whole & inside,
    }


def half_strides(trained: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns masks [9, 9] of the inner places between strides along one axis only.

    Along this axis, they are an odd number of half strides away from the trained place; along the
    other axis, a whole number of strides.
    """
    rows, columns = np.indices((PLACES, PLACES))
    inside = is_inside(rows, columns)
    steps_per_stride = _STRIDE // _STEP
    off_rows = (rows - trained[0]) % steps_per_stride != 0
    off_columns = (columns - trained[1]) % steps_per_stride != 0
    return {
        "half a stride up or down": inside & off_rows & ~off_columns,
        "half a stride to the side": inside & off_columns & ~off_rows,
    }


def summarize(result: dict) -> dict[str, float]:
    """Returns the statistics of a network's map in percent, by heading."""
    accuracies = 100 * np.array(result["accuracies"])
    trained = TRAINED[result["place"]]
    numbers = {"where trained": accuracies[trained]}
    for kind, mask in kinds_of_places(trained).items():
        numbers[kind] = accuracies[mask].mean()
    numbers["lowest"] = accuracies.min()
    numbers["deviation over places"] = accuracies.std()
    return numbers


def groups_of(results: list[dict]):
    """Yields the fields of each group of networks that differ only in their seed."""
    names = ("place", "sampling", "padding")
    for group in itertools.product(*(study.unique(results, name) for name in names)):
        yield dict(zip(names, group))


def tabulate(results: list[dict]) -> str:
    headings = list(summarize(results[0]))
    lines = []
    for fields in groups_of(results):
        numbers = [summarize(result) for result in study.select(results, **fields)]
        cells = [tables.spread(study.values(numbers, name), 1) for name in headings]
        lines.append([*fields.values(), *cells, str(len(numbers))])
    return tables.table(["trained at", "sampling", "padding", *headings, "n"], lines)


def tabulate_differences(results: list[dict], varied: str, kind: str) -> str:
    """Tabulates differences between all pairs of samplings or paddings, paired by seed.

    Args:
      varied: what the networks of a pair differ in, "sampling" or "padding".
      kind: the places that are compared, as in `summarize`.
    """
    # What the networks of a pair share.
    shared = "padding" if varied == "sampling" else "sampling"
    pairs = list(itertools.combinations(study.unique(results, varied), 2))
    lines = []
    for place, shared_name in itertools.product(
        study.unique(results, "place"), study.unique(results, shared)
    ):
        line = [place, shared_name]
        by_name = {}
        for name in study.unique(results, varied):
            fields = {"place": place, shared: shared_name, varied: name}
            networks = study.select(results, **fields)
            by_name[name] = np.array([summarize(network)[kind] for network in networks])
        for first, second in pairs:
            line.append(tables.interval(by_name[second] - by_name[first], 1, "+"))
        lines.append(line)
    headings = [f"{second} - {first}" for first, second in pairs]
    return tables.table(["trained at", shared, *headings], lines)


def tabulate_half_strides(results: list[dict]) -> str:
    """Tabulates what half a stride costs along each axis, paired by seed."""
    lines = []
    for fields in groups_of(results):
        trained = TRAINED[fields["place"]]
        maps = 100 * study.values(results, "accuracies", **fields)
        line = list(fields.values())
        for mask in half_strides(trained).values():
            losses = maps[:, *trained] - maps[:, mask].mean(1)
            line.append(tables.interval(losses, 1))
        lines.append([*line, str(len(maps))])
    masks = half_strides(TRAINED["center"])
    return tables.table(["trained at", "sampling", "padding", *masks, "n"], lines)


def draw(results: list[dict]) -> Figure:
    """Draws the maps: a row for each place and sampling, a column for each padding."""
    paddings = study.unique(results, "padding")
    rows = list(
        itertools.product(study.unique(results, "place"), study.unique(results, "sampling"))
    )
    size = (1.6 * len(paddings) + 1.2, 1.6 * len(rows) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(paddings), squeeze=False)
    means = {}
    for fields in groups_of(results):
        maps = 100 * study.values(results, "accuracies", **fields)
        means[tuple(fields.values())] = maps.mean(0)
    lowest = min(mean.min() for mean in means.values())
    for axis_row, (place, sampling) in zip(axes, rows):
        axis_row[0].set_ylabel(f"{place}, {sampling}")
        for axis, padding in zip(axis_row, paddings):
            image = axis.imshow(means[place, sampling, padding], vmin=lowest, vmax=100)
            row, column = TRAINED[place]
            axis.plot(column, row, marker="x", color="red")
            axis.set(xticks=[], yticks=[])
    for axis, padding in zip(axes[0], paddings):
        axis.set_title(padding)
    figure.colorbar(image, ax=axes, label="accuracy, %", shrink=0.6)
    return figure


def report(results: list[dict], options) -> study.Report:
    text = f"""# Accuracy by place

MNIST's digits at {PLACES}x{PLACES} places of a canvas; networks trained at one of them on
{options.train:,} digits, {options.epochs} epochs. Accuracy in percent on {options.test:,} test
digits, the same at every place; mean ± sample standard deviation over n seeds, of weights, digits
and their order. "Lowest" and "deviation over places" are those of a network's own map.

{tabulate(results)}
## Differences

Points of accuracy between two networks of one seed: mean ± half of the 95 % interval (Student's t).
Intervals are not corrected for their number.

Between samplings, elsewhere:

{tabulate_differences(results, "sampling", "elsewhere")}
Between samplings, at other places, inside:

{tabulate_differences(results, "sampling", "other places, inside")}
Between paddings, whole strides away at the border:

{tabulate_differences(results, "padding", "whole strides away, border")}
Points that inner places lose to the trained one if they are half a stride off along one axis:

{tabulate_half_strides(results)}
![Accuracy by place; a cross marks the trained one](places.png)
"""
    return study.Report(text, {"places.png": draw(results)})


STUDY = study.Study(
    description=__doc__,
    results="places.json",
    add_options=add_options,
    axes=("places", "samplings", "paddings", "seeds"),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
