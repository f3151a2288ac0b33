"""Rook and quadrants (Kayhan and van Gemert 2020, arXiv 2003.07064, experiment 1): at the top left
or at the bottom right?

    python -m experiments.position_quadrant --workdir runs/quadrant [--photographs FOLDER]
        [--seeds 5] [--paddings zeros none ...]

A network that takes each channel's largest response over the whole map should not be able to tell.
The rook: one trained 5x5 convolution on two images, and how many of 1,000 untrained ones respond
differently to the two. The quadrants: ResNet-18 with random frozen weights on photographs of 56
pixels in two corners of an empty 120x120 canvas, with a border of empty pixels around; every stage
is read by ridge regression, trained on one half of the photographs and tested on the other. Empty
is 0, the value of zero padding, and the authors' canvas too. Each seed has weights and photographs
of its own. Finished cells are not computed again. Writes report.md, results.json, rook.png and
quadrants.png.
"""

import functools
import itertools
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
from matplotlib.figure import Figure

from cnnjax.data import photographs
from cnnjax.models import Network, create_model
from cnnjax.nn import FILLS, Conv, Dense, conv, uniform_fan_in
from cnnjax.position.encoder import in_batches, normalize, reachable_stages
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.runtime.progress import progress

ROOK_PUBLISHED = 100  # % over 5 seeds, zero padding
# Accuracy in percent by border, ResNet-18 with random frozen weights and zero padding, as read off
# the paper's figure.
PUBLISHED = {0: 100.0, 16: 100.0, 32: 100.0, 64: 80.5, 128: 51.5, 256: 50.0}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
_STEPS, _RATE, _MOMENTUM = (
    200,
    0.1,
    0.9,
)  # the authors' rook: 100 epochs of two batches of one image
_KERNELS = 1000
_PHOTOGRAPH, _CANVAS, _BATCH = 56, 120, 8
_STRENGTHS = tuple(
    10.0**power for power in range(-4, 3)
)  # of the ridge, relative to the mean eigenvalue
# A rook as on the authors' images: 12 columns, 16 rows, touching the border.
_ROOK = (
    np.repeat(
        [
            [9, 9, 0, 0, 9, 9, 9, 9, 0, 0, 9, 9],
            [9] * 12,
            [0, 5] + [6] * 8 + [5, 0],
            [0, 0, 5] + [9] * 6 + [5, 0, 0],
            [0, 5] + [6] * 8 + [5, 0],
            [6] * 12,
        ],
        (2, 1, 2, 7, 2, 2),
        0,
    ).astype(np.float32)
    / 9
)


def rooks() -> np.ndarray:
    """The rook at the top left and at the bottom right of a black image, [2, 32, 32, 1]."""
    height, width = _ROOK.shape
    images = np.zeros((2, 32, 32, 1), np.float32)
    images[0, :height, :width, 0] = images[1, -height:, -width:, 0] = _ROOK
    return images


class RookNet(nn.Module):
    """One 5x5 convolution to one channel, its largest response, two classes."""

    padding: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Conv(1, 5, padding=2, fill=self.padding, use_bias=False)(x))
        return Dense(2)(x.max((1, 2)))


@functools.partial(jax.jit, static_argnames="padding")
def _train_rook(padding, key):
    """Trains on the two rooks in turn -> the accuracy on them."""
    model, optimizer, images = RookNet(padding), optax.sgd(_RATE, _MOMENTUM), jnp.asarray(rooks())
    init_key, noise = jax.random.split(key)
    apply = lambda params, x: model.apply({"params": params}, x, rngs={"padding": noise})
    params = model.init(init_key, images)["params"]

    def step(carry, number):
        params, state = carry
        label = number % 2
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
            apply(p, images[label][None]), label[None]
        ).mean()
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(_STEPS))
    return (apply(params, images).argmax(1) == jnp.arange(2)).mean()


def kernels_that_differ(padding: str, seed: int) -> float:
    """The share of untrained kernels whose largest response is not the same for the two rooks."""
    kernel_key, noise = jax.random.split(jax.random.key(seed))
    kernels = uniform_fan_in(25)(kernel_key, (5, 5, 1, _KERNELS))
    found = nn.relu(conv(jnp.asarray(rooks()), kernels, padding=2, fill=padding, key=noise)).max(
        (1, 2)
    )
    return float((jnp.abs(found[0] - found[1]) > 1e-5 * found.max()).mean())


def canvases(images: np.ndarray, border: int) -> np.ndarray:
    """Photographs uint8 [n, 56, 56, 3], normalized, at the top left of empty canvases and then at
    the bottom right: [2 n, side, side, 3].

    The side is 120 pixels and a border on each side.
    """
    content, side = np.asarray(normalize(jnp.asarray(images))), _CANVAS + 2 * border
    out = np.zeros((2, len(images), side, side, 3), np.float32)
    for place, start in zip(out, (border, side - border - _PHOTOGRAPH)):
        place[:, start : start + _PHOTOGRAPH, start : start + _PHOTOGRAPH] = content
    return out.reshape(-1, *out.shape[2:])


@functools.partial(jax.jit, static_argnames=("model", "last"))
def _largest(model, variables, x, last, key):
    return {
        name: y.max((1, 2))
        for name, y in model.apply(
            variables, x, method="stages", last=last, rngs={"padding": key}
        ).items()
    }


def largest(model: Network, variables: dict, x: np.ndarray, last: str) -> dict[str, np.ndarray]:
    """Each channel's largest response in every stage up to `last`, [2, n, channels]: first the
    canvases with the content top left."""
    found = []
    for start, count, batch in in_batches(x, _BATCH):
        maps = _largest(model, variables, batch, last, jax.random.key(start))
        found.append({name: np.asarray(y)[:count] for name, y in maps.items()})
    return {
        name: np.concatenate([part[name] for part in found]).reshape(2, len(x) // 2, -1)
        for name in found[0]
    }


def read_out(train: np.ndarray, test: np.ndarray) -> float:
    """The accuracy of ridge regression that tells the first half of `test` [2, n, channels] from
    the second.

    The strength is the one with which photographs left out of the training, at both places
    together, are predicted best: exactly, from the one solution for all.
    """
    count = train.shape[1]
    train, test = (x.reshape(-1, x.shape[2]).astype(np.float64) for x in (train, test))
    mean, std = train.mean(0), train.std(0)
    scale = np.where(std > 1e-6 * std.max(), std, np.inf)  # a constant channel says nothing
    z, goal = (train - mean) / scale, np.repeat([1.0, -1.0], count)
    values, basis = np.linalg.eigh(z @ z.T)
    values = np.maximum(values, 0)
    pairs = np.arange(count)[:, None] + [0, count]

    def left_out(strength):
        residual = (
            np.eye(2 * count) - (basis * (values / (values + strength))) @ basis.T - 1 / (2 * count)
        )
        return np.square(
            np.linalg.solve(
                residual[pairs[:, :, None], pairs[:, None]], (residual @ goal)[pairs][..., None]
            )
        ).sum()

    strength = min(max(values.mean(), 1e-12) * np.array(_STRENGTHS), key=left_out)
    predicted = (test - mean) / scale @ (z.T @ (basis @ (basis.T @ goal / (values + strength))))
    return float(((predicted > 0) == np.repeat([True, False], len(test) // 2)).mean())


@functools.cache
def _weights(seed: int) -> dict:
    return jax.jit(create_model("resnet18").init)(jax.random.key(seed), jnp.zeros((1, 64, 64, 3)))


def cell(padding: str, border: int, seed: int, paths: list[pathlib.Path], images: int) -> dict:
    """One encoder: accuracy by stage, and how much the responses differ between the two places,
    relative to their mean."""
    model = create_model("resnet18", padding=padding)
    stages = reachable_stages(model, _CANVAS + 2 * border)
    chosen = np.random.default_rng(seed).permutation(len(paths))[:images]
    size = (_PHOTOGRAPH, _PHOTOGRAPH)
    content = [
        PIL.Image.fromarray(photographs.read_image(paths[i])).resize(
            size, PIL.Image.Resampling.BILINEAR
        )
        for i in chosen
    ]
    found = largest(model, _weights(seed), canvases(np.stack(content), border), stages[-1])
    half = images // 2
    return {
        "padding": padding,
        "border": border,
        "seed": seed,
        "images": images,
        "accuracy": {stage: read_out(y[:, :half], y[:, half:]) for stage, y in found.items()},
        "difference": {
            stage: float(np.abs(y[0] - y[1]).mean() / max(np.abs(y).mean(), 1e-30))
            for stage, y in found.items()
        },
    }


def write(folder: pathlib.Path, rook: list[dict], cells: list[dict]) -> str:
    """Writes the results, the report and the figures; returns the tables."""
    paddings, borders = (
        list(dict.fromkeys(row[key] for row in cells)) for key in ("padding", "border")
    )
    lines = []
    for padding in paddings:
        accuracy, differ = (
            [100 * row[key] for row in rook if row["padding"] == padding]
            for key in ("accuracy", "differ")
        )
        lines.append(
            [
                padding,
                tables.spread(accuracy, 0),
                str(ROOK_PUBLISHED) if padding == "zeros" else "",
                tables.spread(differ, 1),
                str(len(accuracy)),
            ]
        )
    sections = [
        tables.table(
            [
                "padding",
                "trained, %",
                "published",
                "untrained kernels that respond differently, %",
                "n",
            ],
            lines,
        )
    ]
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 2.5))
    for axis, image, title in zip(axes, rooks(), ("top left", "bottom right")):
        axis.imshow(image[..., 0], cmap="gray")
        axis.set(title=title, xticks=[], yticks=[])
    for shift, key, label in (
        (-0.2, "accuracy", "trained: accuracy"),
        (0.2, "differ", "untrained: kernels that respond differently"),
    ):
        values = [
            [100 * row[key] for row in rook if row["padding"] == padding] for padding in paddings
        ]
        axes[2].bar(
            np.arange(len(paddings)) + shift,
            list(map(np.mean, values)),
            0.4,
            yerr=list(map(tables.bar, values)),
            label=label,
        )
    axes[2].axhline(50, color="black", lw=0.5)
    axes[2].set_xticks(range(len(paddings)), paddings, fontsize=8)
    axes[2].set(ylabel="%", ylim=(0, 150), yticks=(0, 50, 100))
    axes[2].legend(fontsize=8, loc="upper left")
    workdir.write_figure(folder / "rook.png", figure)

    figure = Figure(figsize=(3 * len(STAGES), 3), layout="constrained")
    axes = figure.subplots(1, len(STAGES), sharey=True)
    lines = [
        [
            "zeros",
            "layer4, published",
            *(f"{PUBLISHED[border]:.1f}" if border in PUBLISHED else "" for border in borders),
            "",
        ]
    ]
    axes[-1].plot(
        [borders.index(b) for b in PUBLISHED if b in borders],
        [PUBLISHED[b] for b in PUBLISHED if b in borders],
        "k--",
        label="published, zeros",
    )
    for axis, stage in zip(axes, STAGES):
        for padding in paddings:
            at = [
                [
                    100 * row["accuracy"][stage]
                    for row in cells
                    if (row["padding"], row["border"]) == (padding, border)
                    and stage in row["accuracy"]
                ]
                for border in borders
            ]
            if any(at):
                lines.append(
                    [
                        padding,
                        stage,
                        *(tables.spread(v, 1) if v else "" for v in at),
                        str(max(map(len, at))),
                    ]
                )
                where = [number for number, values in enumerate(at) if values]
                axis.errorbar(
                    where,
                    [np.mean(at[i]) for i in where],
                    [tables.bar(at[i]) for i in where],
                    marker=".",
                    capsize=2,
                    color=f"C{FILLS.index(padding) % 10}",
                    label=padding,
                )
        axis.axhline(50, color="black", lw=0.5)
        axis.set(title=stage, xlabel="border, pixels")
        axis.set_xticks(range(len(borders)), borders)
    lines[1:] = sorted(lines[1:], key=lambda line: paddings.index(line[0]))
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(fontsize=8)
    axes[-1].legend(*([entry[:1] for entry in axes[-1].get_legend_handles_labels()]), fontsize=8)
    workdir.write_figure(folder / "quadrants.png", figure)
    sections.append(
        tables.table(["padding", "stage", *(f"border {border}" for border in borders), "n"], lines)
    )
    workdir.write_json(folder / "results.json", {"rook": rook, "quadrants": cells})
    text = (
        "# Rook and quadrants\n\nMean ± sample standard deviation over n seeds; chance is 50 %. "
        "Published: Kayhan and van Gemert 2020, "
        f"with 2,000 photographs (here {cells[0]['images']} of each seed, half of them to train "
        "on), whose networks' "
        "BatchNorm took statistics of the canvases, while these are as initialized.\n\n## Rook\n\n"
        f"{sections[0]}\n![rook](rook.png)\n\n## Quadrants, % correct\n\n"
        "A cell is empty where padding 'none' leaves nothing of a stage. The two places are 64 "
        "pixels apart, a whole number of steps "
        "of every stage. Circular padding hides the place only where the canvas is a whole "
        "number of steps wide too: 120 pixels are 15 "
        f"steps of layer2, 7.5 of layer3.\n\n{sections[1]}\n![quadrants](quadrants.png)\n"
    )
    workdir.write(folder / "report.md", text)
    return "\n".join(sections)


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/quadrant")
    parser.add_photographs()
    parser.add_count("images", 32, "photographs of one cell at most, half to train on", 4)
    parser.add_count("seeds", 5, "of weights and photographs")
    parser.add_argument(
        "--paddings",
        nargs="+",
        choices=FILLS,
        default=["zeros", "none", "reflect", "replicate", "circular"],
    )
    parser.add_argument(
        "--borders",
        nargs="+",
        type=command.whole(0),
        default=list(PUBLISHED),
        help="pixels (default: those published)",
    )
    options = parser.parse_args(arguments)

    def work():
        paths = photographs.list_photographs(options.photographs)
        images = min(options.images, len(paths))
        if images < 4:
            raise ValueError(
                f"photographs={options.photographs!r} has {images} photographs; at least 4 are "
                "needed"
            )
        folder = workdir.prepare(
            options.workdir, {"photographs": options.photographs, "images": images}
        )
        backend.start()
        rook = [
            {
                "padding": padding,
                "seed": seed,
                "accuracy": float(_train_rook(padding, jax.random.key(seed))),
                "differ": kernels_that_differ(padding, seed),
            }
            for padding in options.paddings
            for seed in range(options.seeds)
        ]
        cells, wanted = (
            [],
            list(itertools.product(options.paddings, options.borders, range(options.seeds))),
        )
        with progress(len(wanted), "encoders") as done:
            for padding, border, seed in wanted:
                cells.append(
                    workdir.finished(
                        folder / f"{padding}-{border}-{seed}.json",
                        cell,
                        padding,
                        border,
                        seed,
                        paths,
                        images,
                    )
                )
                done(1)
        print(write(folder, rook, cells))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
