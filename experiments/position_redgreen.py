"""Red/Green (Kayhan and van Gemert 2020, arXiv 2003.07064, experiment 2): is told apart by place
what differs in order?

    python -m experiments.position_redgreen --workdir runs/redgreen [--seeds 10]
        [--paddings none zeros circular full ...] [--splits own|published]

Two boxes in a 32x32 image: red left of green in its upper part is one class, green left of red in
its lower part the other. The test is on images like these, and on dissimilar ones whose rows are
exchanged: a network that learned the order is as right there, one that learned the place is wrong.
Training, validation and test images are drawn with seeds of their own. In the authors' code
(github.com/oskyhn/CNNs-Without-Borders, Exp2_Red_Green) they have one seed, so that validation and
similar test are the first of the training images, and the same for all networks: `--splits
published` does so, and its figures are what to hold theirs against. Writes report.md, redgreen.json
and redgreen.png.
"""

import functools
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from cnnjax.nn import FILLS, Conv, Dense
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.runtime.progress import progress

# Similar and dissimilar accuracy in percent as published, mean and standard deviation over 10
# seeds.
PUBLISHED = {
    "none": ((100.0, 0.0), (0.2, 0.1)),
    "zeros": ((99.8, 0.1), (8.4, 0.7)),
    "circular": ((73.7, 1.0), (73.7, 1.0)),
    "full": ((89.7, 0.5), (89.7, 0.5)),
}
_SPLITS = {
    "own": "Every network has images of its own, and those of validation and test are drawn "
    "anew, where the published figures "
    "are of training images.",
    "published": "As in the authors' code, all networks have the same images, and those of "
    "validation and of the similar test are "
    "training images.",
}
# The recipe of its code: Adadelta of rate 1 and decay 5e-5, batches of 200 in the same order in
# every epoch, at most 50 epochs; the weights of the lowest validation loss are tested, and 9 epochs
# without a lower one end the training.
_SIZE, _BOX, _TRAIN, _TEST, _BATCH, _EPOCHS, _PATIENCE, _RATE, _DECAY = (
    32,
    4,
    2000,
    1000,
    200,
    50,
    9,
    1.0,
    5e-5,
)
# The boxes' first rows, less 4 to plus 3; columns of the left one; least distance of the right one.
_TOPS = (7, 23)
_LEFT = 10
_APART = 5


class Net(nn.Module):
    """Four 3x3 convolutions without biases, the largest response of each channel, two classes."""

    padding: str

    @nn.compact
    def __call__(self, x):
        for features, stride in ((32, 1), (32, 2), (64, 2), (64, 2)):
            x = nn.relu(Conv(features, 3, stride, padding=1, fill=self.padding, use_bias=False)(x))
        return Dense(2)(x.max((1, 2)))


def draw(
    generator: np.random.Generator, count: int, dissimilar: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, 32, 32, 3] of 0 and 1, and labels, in turns: 0 where red is on the left,
    above, or below if `dissimilar`."""
    labels = np.arange(count) % 2
    rows = np.where((labels == 1) != dissimilar, _TOPS[1], _TOPS[0])[:, None] + generator.integers(
        -4, 4, (count, 2)
    )
    left = generator.integers(0, _LEFT, count)
    columns = np.stack([left, generator.integers(left + _APART, _SIZE - _BOX)], 1)
    images = np.zeros((count, _SIZE, _SIZE, 3), np.float32)
    for image, label, row, column in zip(images, labels, rows, columns):
        for side in (0, 1):  # left and right
            channel = side if label == 0 else 1 - side  # red is channel 0, green channel 1
            image[row[side] : row[side] + _BOX, column[side] : column[side] + _BOX, channel] = 1
    return images, labels


@functools.partial(jax.jit, static_argnames="padding")
def _run(padding, key, train, validation, tests):
    """Trains one network with early stopping -> its accuracies on the tests, and the epochs it
    took."""
    model, optimizer = (
        Net(padding),
        optax.chain(optax.add_decayed_weights(_DECAY), optax.adadelta(_RATE)),
    )
    init_key, noise = jax.random.split(key)
    apply = lambda params, x: model.apply({"params": params}, x, rngs={"padding": noise})
    loss = lambda params, data: optax.softmax_cross_entropy_with_integer_labels(
        apply(params, data[0]), data[1]
    ).mean()
    batches = jax.tree.map(lambda a: a.reshape(-1, _BATCH, *a.shape[1:]), train)
    params = model.init(init_key, train[0][:1])["params"]

    def step(carry, batch):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(state):
        params, opt_state, number, lowest, best, waited = state
        (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), batches)
        found = loss(params, validation)
        best = jax.tree.map(lambda new, old: jnp.where(found < lowest, new, old), params, best)
        return (
            params,
            opt_state,
            number + 1,
            jnp.minimum(found, lowest),
            best,
            jnp.where(found < lowest, 0, waited + 1),
        )

    state = (params, optimizer.init(params), 0, jnp.inf, params, 0)
    *_, number, _, best, _ = jax.lax.while_loop(
        lambda state: (state[2] < _EPOCHS) & (state[5] < _PATIENCE), epoch, state
    )
    return [(apply(best, images).argmax(1) == labels).mean() for images, labels in tests], number


def split(seed: int, splits: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels to train on, to stop by, and of the similar and the dissimilar test."""
    drawn = []
    for part in range(4):
        seeds, count = (
            ([seed, part], _TEST if part else _TRAIN) if splits == "own" else ([0, 0], _TRAIN)
        )
        drawn.append(draw(np.random.default_rng(seeds), count, dissimilar=part == 3))
    return [drawn[0], *((images[:_TEST], labels[:_TEST]) for images, labels in drawn[1:])]


def run(padding: str, seed: int, splits: str) -> dict:
    """One network, from weights of its own."""
    train, validation, *tests = jax.tree.map(jnp.asarray, split(seed, splits))
    accuracies, epochs = _run(padding, jax.random.key(seed), train, validation, tests)
    return {
        "padding": padding,
        "seed": seed,
        "similar": float(accuracies[0]),
        "dissimilar": float(accuracies[1]),
        "epochs": int(epochs),
    }


def write(folder: pathlib.Path, rows: list[dict], splits: str) -> str:
    """Writes the results, the report and the figure; returns the table."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 3, figsize=(11, 3.2), width_ratios=(1, 1, 2.5), layout="constrained"
    )
    for axis, dissimilar in zip(axes, (False, True)):
        images, labels = draw(np.random.default_rng(0), 20, dissimilar)
        first = [images[labels == label][0] for label in (0, 1)]
        axis.imshow(np.concatenate([first[0], np.ones((_SIZE, 2, 3)), first[1]], 1))
        axis.set(title="dissimilar" if dissimilar else "trained on, similar", xticks=[], yticks=[])
    lines, paddings = [], list(dict.fromkeys(row["padding"] for row in rows))
    for number, padding in enumerate(paddings):
        line = [padding]
        for shift, kind in ((-0.2, "similar"), (0.2, "dissimilar")):
            values = [100 * row[kind] for row in rows if row["padding"] == padding]
            published = PUBLISHED.get(padding)
            line += [
                tables.spread(values, 1),
                "{:.1f} ± {:.1f}".format(*published[kind == "dissimilar"]) if published else "",
            ]
            color = "C0" if kind == "similar" else "C1"
            axes[2].bar(
                number + shift,
                np.mean(values),
                0.4,
                yerr=tables.bar(values),
                color=color,
                label=None if number else kind,
            )
        lines.append(
            [
                *line,
                str(len(values)),
                f"{np.mean([row['epochs'] for row in rows if row['padding'] == padding]):.0f}",
            ]
        )
    axes[2].axhline(50, color="black", lw=0.5)
    axes[2].set_xticks(range(len(paddings)), paddings, fontsize=8)
    axes[2].set_ylabel("accuracy, %")
    axes[2].legend(fontsize=8)
    workdir.write_figure(folder / "redgreen.png", figure)
    pyplot.close(figure)
    table = tables.table(
        ["padding", "similar, %", "published", "dissimilar, %", "published", "n", "epochs"], lines
    )
    workdir.write_json(folder / "redgreen.json", rows)
    text = (
        "# Red/Green\n\nAccuracy, mean ± sample standard deviation over networks, which begin "
        "from weights of their own. "
        f"Published: Kayhan and van Gemert 2020. {_SPLITS[splits]}\n\n"
    )
    workdir.write(folder / "report.md", f"{text}{table}\n![Red/Green](redgreen.png)\n")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
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
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        options.workdir.mkdir(parents=True, exist_ok=True)
        rows = []
        with progress(options.seeds * len(options.paddings), "networks") as done:
            for padding in options.paddings:
                for seed in range(options.seeds):
                    rows.append(
                        workdir.finished(
                            options.workdir / "cells" / f"{options.splits}-{padding}-{seed}.json",
                            run,
                            padding,
                            seed,
                            options.splits,
                        )
                    )
                    done(1)
        print(write(options.workdir, rows, options.splits))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
