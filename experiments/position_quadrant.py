"""Can a network that forgets positions tell the top left from the bottom right?

    python -m experiments.position_quadrant --workdir runs/quadrant [--photographs FOLDER]
        [--seeds 5] [--paddings zeros none ...]

After Kayhan and van Gemert 2020, arXiv 2003.07064, experiment 1. A network that keeps only each
channel's largest response over the whole map should not be able to tell the two places apart.

There are two experiments:

- The rook (the chess piece) stands at the top left of one image and at the bottom right of the
  other. One 5x5 convolution is trained to tell them apart. Of 1,000 untrained convolutions, the
  study counts those whose largest responses to the two differ.
- The quadrants: ResNet-18 with random frozen weights sees photographs of 56 pixels in two corners
  of an empty 120x120 canvas, with a border of empty pixels around the canvas. Ridge regression
  reads the place from every stage; it is trained on one half of the photographs and tested on the
  other. Empty pixels are 0, the value of zero padding, as on the authors' canvas.

Each seed has its own weights and draws `--images` photographs; if there are no more, every seed has
all of them, in other halves. Finished points are not measured again. Writes report.md,
quadrant.json, rook.png and quadrants.png.
"""

import functools
import itertools
import pathlib
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
from matplotlib.figure import Figure

from cnnjax import ridge, study
from cnnjax.data import photographs
from cnnjax.models import Network, create_model
from cnnjax.nn import FILLS, Conv, Dense, conv, uniform_fan_in
from cnnjax.position.encoder import in_batches, normalize, reachable_stages
from cnnjax.runtime import command, tables

# Accuracy on the rooks in percent, over 5 seeds with zero padding.
ROOK_PUBLISHED = 100
# Accuracy in percent by border for ResNet-18 with random frozen weights and zero padding, read off
# the paper's figure.
PUBLISHED = {0: 100.0, 16: 100.0, 32: 100.0, 64: 80.5, 128: 51.5, 256: 50.0}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
# The authors train on the rooks for 100 epochs of two batches of one image.
_STEPS = 200
_RATE = 0.1
_MOMENTUM = 0.9
_KERNELS = 1000
_PHOTOGRAPH = 56  # pixels, the side of a photograph
_CANVAS = 120  # pixels, the side of a canvas without its border
_BATCH = 8
# Strengths of the ridge penalty, relative to the mean eigenvalue of the Gram matrix.
_STRENGTHS = 10.0 ** np.arange(-4, 3)
# A rook like the one in the authors' images: 12 columns and 16 rows, as pairs of a row and its
# repetitions. Brightness is from 0 to 9.
_ROOK = (
    ([9, 9, 0, 0, 9, 9, 9, 9, 0, 0, 9, 9], 2),
    ([9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], 1),
    ([0, 5, 6, 6, 6, 6, 6, 6, 6, 6, 5, 0], 2),
    ([0, 0, 5, 9, 9, 9, 9, 9, 9, 5, 0, 0], 7),
    ([0, 5, 6, 6, 6, 6, 6, 6, 6, 6, 5, 0], 2),
    ([6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6], 2),
)


# --- Options and points ---------------------------------------------------------------------------


class Rook(NamedTuple):
    """One small network on the two images of a rook; `part` is "rook"."""

    part: str
    padding: str
    seed: int


class Quadrant(NamedTuple):
    """One encoder on canvases with a border of `border` pixels; `part` is "quadrant"."""

    part: str
    padding: str
    border: int
    seed: int


def add_options(parser):
    parser.add_workdir("runs/quadrant")
    parser.add_photographs()
    parser.add_count("images", 32, "photographs of one encoder at most, half to train on", 4)
    parser.add_count("seeds", 5, "repetitions, each with its own random weights and photographs")
    parser.add_names("paddings", FILLS, ["zeros", "none", "reflect", "replicate", "circular"])
    parser.add_argument(
        "--borders",
        nargs="+",
        type=command.whole_number(0),
        default=list(PUBLISHED),
        help="pixels (default: those published)",
    )


def load(options) -> list[pathlib.Path]:
    paths = photographs.list_photographs(options.photographs)
    if len(paths) < 4:
        raise ValueError(
            f"photographs={options.photographs!r} has {len(paths)} photographs; at least 4 are "
            "needed"
        )
    return paths


def points(options):
    seeds = range(options.seeds)
    for padding, seed in itertools.product(options.paddings, seeds):
        yield Rook("rook", padding, seed)
    for padding, border, seed in itertools.product(options.paddings, options.borders, seeds):
        yield Quadrant("quadrant", padding, border, seed)


def measure(point: Rook | Quadrant, options, paths: list[pathlib.Path]) -> dict:
    if isinstance(point, Rook):
        accuracy = train_rook(point.padding, jax.random.key(point.seed))
        differ = kernels_that_differ(point.padding, point.seed)
        return {"accuracy": float(accuracy), "differ": differ}
    return measure_quadrant(point, paths, min(options.images, len(paths)))


# --- Rook -----------------------------------------------------------------------------------------


def rooks() -> np.ndarray:
    """Draws the rook at the top left and at the bottom right of black images, [2, 32, 32, 1]."""
    rows, repetitions = zip(*_ROOK)
    rook = np.repeat(rows, repetitions, 0).astype(np.float32) / 9
    height, width = rook.shape
    images = np.zeros((2, 32, 32, 1), np.float32)
    images[0, :height, :width, 0] = rook
    images[1, -height:, -width:, 0] = rook
    return images


class RookNet(nn.Module):
    """One 5x5 convolution to one channel, a global maximum, and two classes."""

    padding: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Conv(1, 5, padding=2, fill=self.padding, use_bias=False)(x))
        return Dense(2)(x.max((1, 2)))


@functools.partial(jax.jit, static_argnames="padding")
def train_rook(padding, key):
    """Trains a network on the two images in turn; returns its accuracy on them."""
    model = RookNet(padding)
    optimizer = optax.sgd(_RATE, _MOMENTUM)
    images = jnp.asarray(rooks())
    # The padding 'random' draws its values with `fill_key`.
    init_key, fill_key = jax.random.split(key)

    def apply(params, x):
        return model.apply({"params": params}, x, rngs={"padding": fill_key})

    def loss(params, label):
        logits = apply(params, images[label][None])
        return optax.softmax_cross_entropy_with_integer_labels(logits, label[None]).mean()

    def step(carry, number):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, number % 2), state)
        return (optax.apply_updates(params, updates), state), None

    params = model.init(init_key, images)["params"]
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(_STEPS))
    return (apply(params, images).argmax(1) == jnp.arange(2)).mean()


def kernels_that_differ(padding: str, seed: int) -> float:
    """Returns the share of untrained kernels whose largest responses to the images differ."""
    kernel_key, fill_key = jax.random.split(jax.random.key(seed))
    kernels = uniform_fan_in(25)(kernel_key, (5, 5, 1, _KERNELS))
    responses = conv(jnp.asarray(rooks()), kernels, padding=2, fill=padding, key=fill_key)
    largest = nn.relu(responses).max((1, 2))
    return float((jnp.abs(largest[0] - largest[1]) > 1e-5 * largest.max()).mean())


# --- Quadrants ------------------------------------------------------------------------------------


def canvases(images: np.ndarray, border: int) -> np.ndarray:
    """Puts photographs on empty canvases, first at the top left, then at the bottom right.

    The photographs are uint8 [n, 56, 56, 3]; the canvases are [2 n, side, side, 3], normalized. The
    side is 120 pixels plus a border on each side.
    """
    content = np.asarray(normalize(jnp.asarray(images)))
    side = _CANVAS + 2 * border
    out = np.zeros((2, len(images), side, side, 3), np.float32)
    for place, start in zip(out, (border, side - border - _PHOTOGRAPH)):
        covered = slice(start, start + _PHOTOGRAPH)
        place[:, covered, covered] = content
    return out.reshape(-1, side, side, 3)


@functools.partial(jax.jit, static_argnames="model")
def initialize(model, key):
    return model.init(key, jnp.zeros((1, 64, 64, 3)))


@functools.partial(jax.jit, static_argnames=("model", "last"))
def _maxima(model, variables, x, last, key):
    maps = model.apply(variables, x, method="stages", last=last, rngs={"padding": key})
    return {stage: y.max((1, 2)) for stage, y in maps.items()}


def maxima(model: Network, variables: dict, x: np.ndarray, last: str) -> dict[str, np.ndarray]:
    """Computes each channel's largest response in every stage up to `last`, [n, channels]."""
    parts = []
    for start, count, batch in in_batches(x, _BATCH):
        part = _maxima(model, variables, batch, last, jax.random.key(start))
        parts.append({stage: np.asarray(y)[:count] for stage, y in part.items()})
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def left_out_errors(
    factors: ridge.Factors, labels: np.ndarray, strengths: np.ndarray
) -> np.ndarray:
    """Returns the squared error on left-out photographs by strength, [strengths].

    Args:
      factors: the factors of the Gram matrix of standardized features [2 n, channels]. Photograph
        number i is in rows i and n + i; both rows are left out together.
    """
    # The residuals of the fit to all rows are r = R y, where R = s (K + s I)^-1 - 1 / (2 n); the
    # second term comes from the intercept. The residuals of a fit without the rows P, at these
    # rows, are then exactly (R_PP)^-1 r_P, so nothing needs to be fitted again.
    count = len(labels)
    inverses = ridge.solve(factors, np.eye(count), strengths)
    rows = np.arange(count // 2)[:, None] + [0, count // 2]
    errors = []
    for strength, inverse in zip(strengths, inverses):
        residual = strength * inverse - 1 / count
        blocks = residual[rows[:, :, None], rows[:, None, :]]
        left_out = np.linalg.solve(blocks, (residual @ labels)[rows][..., None])
        errors.append(np.square(left_out).sum())
    return np.array(errors)


def read_out(train: np.ndarray, test: np.ndarray) -> float:
    """Returns the accuracy of ridge regression at telling `test[0]` from `test[1]`.

    The features `train` and `test` are [2, n, channels], by place and photograph. The chosen
    strength is the one that best predicts photographs left out of the training, with both places
    left out together.
    """
    count = train.shape[1]
    train = train.astype(np.float64)
    scaler = ridge.fit_scaler(train)
    x = scaler(train).reshape(2 * count, -1)
    labels = np.repeat([1.0, -1.0], count)
    factors = ridge.factor(x @ x.T)
    strengths = max(factors.values.mean(), 1e-12) * _STRENGTHS
    best = strengths[left_out_errors(factors, labels, strengths).argmin()]
    weights = x.T @ ridge.solve(factors, labels[:, None], best)[:, 0]
    is_top_left = scaler(test.astype(np.float64)) @ weights > 0
    return float((is_top_left == [[True], [False]]).mean())


def measure_quadrant(point: Quadrant, paths: list[pathlib.Path], images: int) -> dict:
    """Measures accuracy by stage, and the difference of the responses at the two places.

    The difference is relative to the mean response.
    """
    model = create_model("resnet18", padding=point.padding)
    # Drawn with zero padding, so that all paddings share weights. `initialize` uses 64 pixels,
    # which would not reach layer4 without padding.
    variables = initialize(create_model("resnet18"), jax.random.key(point.seed))
    last = reachable_stages(model, _CANVAS + 2 * point.border)[-1]
    content = []
    for path in photographs.shuffle(paths, images, point.seed):
        image = PIL.Image.fromarray(photographs.read_image(path))
        content.append(image.resize((_PHOTOGRAPH, _PHOTOGRAPH), PIL.Image.Resampling.BILINEAR))
    features = maxima(model, variables, canvases(np.stack(content), point.border), last)
    half = images // 2
    accuracy = {}
    difference = {}
    for stage, y in features.items():
        y = y.reshape(2, images, -1)
        accuracy[stage] = read_out(y[:, :half], y[:, half:])
        scale = max(np.abs(y).mean(), 1e-30)
        difference[stage] = float(np.abs(y[0] - y[1]).mean() / scale)
    return {"images": images, "accuracy": accuracy, "difference": difference}


# --- Report ---------------------------------------------------------------------------------------


def tabulate_rook(results: list[dict]) -> str:
    lines = []
    for padding in study.unique(results, "padding"):
        accuracy = 100 * study.values(results, "accuracy", padding=padding)
        differ = 100 * study.values(results, "differ", padding=padding)
        published = str(ROOK_PUBLISHED) if padding == "zeros" else ""
        spreads = [tables.spread(accuracy, 0), published, tables.spread(differ, 1)]
        lines.append([padding, *spreads, str(len(accuracy))])
    differ = "untrained kernels that respond differently, %"
    return tables.table(["padding", "trained, %", "published", differ, "n"], lines)


def draw_rook(results: list[dict]) -> Figure:
    """Draws the two images, and bars by padding."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    *image_axes, bar_axis = figure.subplots(1, 3, width_ratios=(1, 1, 2.5))
    for image_axis, image, title in zip(image_axes, rooks(), ("top left", "bottom right")):
        image_axis.imshow(image[..., 0], cmap="gray")
        image_axis.set(title=title, xticks=[], yticks=[])
    paddings = study.unique(results, "padding")
    series = {}
    for name, label in (
        ("accuracy", "trained: accuracy"),
        ("differ", "untrained: kernels that respond differently"),
    ):
        series[label] = [100 * study.values(results, name, padding=padding) for padding in paddings]
    study.draw_bars(bar_axis, series)
    bar_axis.axhline(50, color="black", lw=0.5)
    bar_axis.set_xticks(range(len(paddings)), paddings, fontsize=8)
    bar_axis.set(ylabel="%", ylim=(0, 150), yticks=(0, 50, 100))
    bar_axis.legend(fontsize=8, loc="upper left")
    return figure


def accuracies(results: list[dict], padding: str, stage: str) -> dict[int, np.ndarray]:
    """Returns the accuracies in percent by border, if the stage has a position left."""
    by_border = {}
    for result in study.select(results, padding=padding):
        if stage in result["accuracy"]:
            by_border.setdefault(result["border"], []).append(100 * result["accuracy"][stage])
    return {border: np.array(values) for border, values in by_border.items()}


def tabulate_quadrants(results: list[dict]) -> str:
    borders = study.unique(results, "border")
    published = [f"{PUBLISHED[border]:.1f}" if border in PUBLISHED else "" for border in borders]
    lines = [["zeros", "layer4, published", *published, ""]]
    for padding, stage in itertools.product(study.unique(results, "padding"), STAGES):
        measured = accuracies(results, padding, stage)
        if measured:
            cells = {border: tables.spread(values, 1) for border, values in measured.items()}
            count = max(map(len, measured.values()))
            by_border = [cells.get(border, "") for border in borders]
            lines.append([padding, stage, *by_border, str(count)])
    return tables.table(["padding", "stage", *(f"border {n}" for n in borders), "n"], lines)


def draw_quadrants(results: list[dict]) -> Figure:
    """Draws accuracy by border: a panel for each stage, a curve for each padding."""
    borders = study.unique(results, "border")
    figure = Figure(figsize=(3 * len(STAGES), 3), layout="constrained")
    axes = figure.subplots(1, len(STAGES), sharey=True)
    known = [border for border in PUBLISHED if border in borders]
    [published] = axes[-1].plot(
        [borders.index(border) for border in known],
        [PUBLISHED[border] for border in known],
        "k--",
        label="published, zeros",
    )
    for axis, stage in zip(axes, STAGES):
        for padding in study.unique(results, "padding"):
            measured = accuracies(results, padding, stage)
            if measured:
                study.draw_curve(
                    axis,
                    [borders.index(border) for border in measured],
                    list(measured.values()),
                    marker=".",
                    color=f"C{FILLS.index(padding) % 10}",
                    label=padding,
                )
        axis.axhline(50, color="black", lw=0.5)
        axis.set(title=stage, xlabel="border, pixels")
        axis.set_xticks(range(len(borders)), borders)
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(fontsize=8)
    axes[-1].legend(handles=[published], fontsize=8)
    return figure


def report(results: list[dict], options) -> study.Report:
    rook = study.select(results, part="rook")
    quadrants = study.select(results, part="quadrant")
    text = f"""# Rook and quadrants

Mean ± sample standard deviation over n seeds; chance is 50 %. Published: Kayhan and van Gemert
2020, with 2,000 photographs (here {quadrants[0]["images"]} for each seed, half of them for
training; if there are no more, the same for all seeds, in other halves). The BatchNorm of their
networks took statistics of the canvases; here it is as initialized.

## Rook

{tabulate_rook(rook)}
![rook](rook.png)

## Quadrants, % correct

A cell is empty where padding 'none' leaves nothing of a stage. The two places are 64 pixels apart,
a whole number of steps of every stage. Circular padding hides the place only where the canvas, too,
is a whole number of steps wide: 120 pixels are 15 steps of layer2, 7.5 of layer3.

{tabulate_quadrants(quadrants)}
![quadrants](quadrants.png)
"""
    figures = {"rook.png": draw_rook(rook), "quadrants.png": draw_quadrants(quadrants)}
    return study.Report(text, figures)


STUDY = study.Study(
    description=__doc__,
    results="quadrant.json",
    add_options=add_options,
    axes=("paddings", "borders", "seeds"),
    files=("photographs",),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
