"""Does a network learn the order of two boxes, or their place? The Red/Green experiment.

    python -m experiments.position_redgreen --workdir runs/redgreen [--seeds 10]
        [--paddings none zeros circular full ...] [--splits own|published]

After Kayhan and van Gemert 2020, arXiv 2003.07064, experiment 2. A 32x32 image shows two boxes. In
one class, red is left of green, in the upper part; in the other class, green is left of red, in the
lower part. The test uses similar images, and dissimilar images whose rows are exchanged. On
dissimilar images, a network that learned the order is equally right, and a network that learned the
place is wrong.

Training, validation and test images are drawn with separate seeds. In the authors' code
(github.com/oskyhn/CNNs-Without-Borders, Exp2_Red_Green) they share one seed: the validation images
and the similar test images are the first training images, and all networks have the same images.
`--splits published` does the same; compare its figures with the authors'. Writes report.md,
redgreen.json and redgreen.png.
"""

import functools
import itertools
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from cnnjax import study
from cnnjax.nn import FILLS, Conv, Dense, relu
from cnnjax.runtime import tables

# Published accuracy on similar and dissimilar images in percent, mean and standard deviation over
# 10 seeds.
PUBLISHED = {
    "none": ((100.0, 0.0), (0.2, 0.1)),
    "zeros": ((99.8, 0.1), (8.4, 0.7)),
    "circular": ((73.7, 1.0), (73.7, 1.0)),
    "full": ((89.7, 0.5), (89.7, 0.5)),
}
KINDS = ("similar", "dissimilar")
_SPLITS = {
    "own": "Every seed draws its own images, which all paddings share. Validation and test images "
    "are drawn separately; in the authors' code, those of validation and of the similar test are "
    "training images.",
    "published": "As in the authors' code, all networks have the same images, and those of "
    "validation and of the similar test are training images.",
}

# Sides of an image and of a box, in pixels.
_SIZE = 32
_BOX = 4
# Numbers of training images, and of images for the validation and for each test.
_TRAIN = 2000
_TEST = 1000
# First rows of high and low boxes, to which -4 to 3 are added.
_TOPS = (7, 23)
# The first column of the left box is below this.
_LEFT = 10
# The right box begins at least this many columns after the left one.
_APART = 5

# The recipe of the authors' code: Adadelta, with batches in the same order in every epoch. The
# weights with the lowest validation loss are tested; training ends after _PATIENCE epochs without a
# lower loss.
_BATCH = 200
_EPOCHS = 50
_PATIENCE = 9
_RATE = 1.0
_DECAY = 5e-5


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    splits: str
    padding: str
    seed: int


def add_options(parser):
    parser.add_workdir("runs/redgreen")
    parser.add_count("seeds", 10, "networks per padding")
    parser.add_argument(
        "--paddings",
        nargs="+",
        choices=FILLS,
        default=list(PUBLISHED),
        help="default: those published",
    )
    parser.add_argument(
        "--splits",
        choices=_SPLITS,
        default="own",
        help="images of validation and test (default: own)",
    )


def points(options):
    for padding, seed in itertools.product(options.paddings, range(options.seeds)):
        yield Point(options.splits, padding, seed)


# --- Images ---------------------------------------------------------------------------------------


def draw_images(
    generator: np.random.Generator, count: int, dissimilar: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draws images of both classes in alternation.

    Returns images [count, 32, 32, 3] of 0 and 1, and labels. The label is 0 if red is on the left.
    Such boxes are in the upper part, or in the lower part if `dissimilar`.
    """
    labels = np.arange(count) % 2
    # Class 1 is in the lower part; in dissimilar images, the parts are exchanged.
    is_low = (labels == 1) != dissimilar
    tops = np.where(is_low, _TOPS[1], _TOPS[0])
    rows = tops[:, None] + generator.integers(-4, 4, (count, 2))
    left = generator.integers(0, _LEFT, count)
    right = generator.integers(left + _APART, _SIZE - _BOX)
    images = np.zeros((count, _SIZE, _SIZE, 3), np.float32)
    for number, label in enumerate(labels):
        # Red is channel 0, green is channel 1.
        for side, column in enumerate((left[number], right[number])):
            channel = side if label == 0 else 1 - side
            row = rows[number, side]
            images[number, row : row + _BOX, column : column + _BOX, channel] = 1
    return images, labels


def first_images(part: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns as many images and labels as a test has."""
    images, labels = part
    return images[:_TEST], labels[:_TEST]


def draw_parts(seed: int, splits: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draws images and labels for training, validation, similar and dissimilar test."""
    if splits == "published":
        # With one seed for all, validation and similar test are the first training images.
        train = draw_images(np.random.default_rng([0, 0]), _TRAIN)
        dissimilar = draw_images(np.random.default_rng([0, 0]), _TRAIN, dissimilar=True)
        return [train, first_images(train), first_images(train), first_images(dissimilar)]
    train = draw_images(np.random.default_rng([seed, 0]), _TRAIN)
    validation = draw_images(np.random.default_rng([seed, 1]), _TEST)
    similar = draw_images(np.random.default_rng([seed, 2]), _TEST)
    dissimilar = draw_images(np.random.default_rng([seed, 3]), _TEST, dissimilar=True)
    return [train, validation, similar, dissimilar]


# --- One network ----------------------------------------------------------------------------------


class Net(nn.Module):
    """Four 3x3 convolutions without biases, a global maximum, and two classes."""

    padding: str

    @nn.compact
    def __call__(self, x):
        for features, stride in ((32, 1), (32, 2), (64, 2), (64, 2)):
            x = Conv(features, 3, stride, padding=1, fill=self.padding, use_bias=False)(x)
            x = relu(x)
        return Dense(2)(x.max((1, 2)))


class Training(NamedTuple):
    """The state of training with early stopping, carried from epoch to epoch."""

    params: dict
    opt_state: optax.OptState
    epoch: jax.Array | int
    lowest: jax.Array | float
    best: dict
    waited: jax.Array | int


@functools.partial(jax.jit, static_argnames="padding")
def train_and_test(padding, key, train, validation, tests):
    """Trains one network with early stopping.

    Args:
      train, validation, tests: images and labels of each.

    Returns the accuracies on the tests, and the number of epochs.
    """
    model = Net(padding)
    # The padding 'random' draws its values with `fill_key`.
    init_key, fill_key = jax.random.split(key)

    def apply(params, images):
        return model.apply({"params": params}, images, rngs={"padding": fill_key})

    def loss(params, data):
        images, labels = data
        losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels)
        return losses.mean()

    images, _ = train
    params = model.init(init_key, images[:1])["params"]
    best, epochs = minimize(loss, params, train, validation)
    accuracies = [(apply(best, images).argmax(1) == labels).mean() for images, labels in tests]
    return accuracies, epochs


def minimize(loss, params, train, validation) -> tuple[dict, jax.Array]:
    """Minimizes a loss on batches of the training images, with early stopping.

    Args:
      loss: a function of (params, (images, labels)).
      params: the initial parameters.
      train, validation: images and labels of each.

    Returns the parameters with the lowest loss on `validation`, and the number of epochs.
    """
    optimizer = optax.chain(optax.add_decayed_weights(_DECAY), optax.adadelta(_RATE))
    batches = jax.tree.map(lambda a: a.reshape(-1, _BATCH, *a.shape[1:]), train)

    def take_step(carry, batch):
        params, opt_state = carry
        gradients = jax.grad(loss)(params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def take_epoch(state):
        carry = (state.params, state.opt_state)
        (params, opt_state), _ = jax.lax.scan(take_step, carry, batches)
        new = loss(params, validation)
        is_lower = new < state.lowest
        choose = lambda mine, other: jnp.where(is_lower, mine, other)
        return Training(
            params=params,
            opt_state=opt_state,
            epoch=state.epoch + 1,
            lowest=jnp.minimum(new, state.lowest),
            best=jax.tree.map(choose, params, state.best),
            waited=jnp.where(is_lower, 0, state.waited + 1),
        )

    def goes_on(state):
        return (state.epoch < _EPOCHS) & (state.waited < _PATIENCE)

    start = Training(
        params=params,
        opt_state=optimizer.init(params),
        epoch=0,
        lowest=jnp.inf,
        best=params,
        waited=0,
    )
    end = jax.lax.while_loop(goes_on, take_epoch, start)
    return end.best, end.epoch


def measure(point: Point, options) -> dict:
    """Trains one network from its own initial weights, and tests it."""
    parts = draw_parts(point.seed, point.splits)
    train, validation, *tests = jax.tree.map(jnp.asarray, parts)
    key = jax.random.key(point.seed)
    accuracies, epochs = train_and_test(point.padding, key, train, validation, tests)
    return {
        "similar": float(accuracies[0]),
        "dissimilar": float(accuracies[1]),
        "epochs": int(epochs),
    }


# --- Report ---------------------------------------------------------------------------------------


def percentages(results: list[dict], kind: str, padding: str) -> np.ndarray:
    return 100 * study.values(results, kind, padding=padding)


def tabulate(results: list[dict]) -> str:
    lines = []
    for padding in study.unique(results, "padding"):
        line = [padding]
        for number, kind in enumerate(KINDS):
            published = ""
            if padding in PUBLISHED:
                mean, deviation = PUBLISHED[padding][number]
                published = f"{mean:.1f} ± {deviation:.1f}"
            line += [tables.spread(percentages(results, kind, padding), 1), published]
        epochs = study.values(results, "epochs", padding=padding)
        lines.append([*line, str(len(epochs)), f"{epochs.mean():.0f}"])
    header = ["padding", "similar, %", "published", "dissimilar, %", "published", "n", "epochs"]
    return tables.table(header, lines)


def draw(results: list[dict]) -> Figure:
    """Draws both classes of both kinds of images, and the accuracies."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    *examples, bars = figure.subplots(1, 3, width_ratios=(1, 1, 2.5))
    titles = {"trained on, similar": False, "dissimilar": True}
    for axis, (title, dissimilar) in zip(examples, titles.items()):
        images, labels = draw_images(np.random.default_rng(0), 20, dissimilar)
        gap = np.ones((_SIZE, 2, 3))
        pair = [images[labels == 0][0], gap, images[labels == 1][0]]
        axis.imshow(np.concatenate(pair, 1))
        axis.set(title=title, xticks=[], yticks=[])
    paddings = study.unique(results, "padding")
    series = {}
    for kind in KINDS:
        series[kind] = [percentages(results, kind, padding) for padding in paddings]
    study.draw_bars(bars, series)
    bars.axhline(50, color="black", lw=0.5)
    bars.set_xticks(range(len(paddings)), paddings, fontsize=8)
    bars.set_ylabel("accuracy, %")
    bars.legend(fontsize=8)
    return figure


def report(results: list[dict], options) -> study.Report:
    text = f"""# Red/Green

Accuracy, mean ± sample standard deviation over n seeds, each with initial weights of its own, which
all paddings share. Published: Kayhan and van Gemert 2020. {_SPLITS[options.splits]}

{tabulate(results)}
![Red/Green](redgreen.png)
"""
    return study.Report(text, {"redgreen.png": draw(results)})


STUDY = study.Study(
    description=__doc__,
    results="redgreen.json",
    add_options=add_options,
    axes=("paddings", "seeds", "splits"),
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
