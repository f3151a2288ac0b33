"""Transfer learning on CIFAR-10: from ImageNet with few labels, and between halves of the classes (Yosinski et al. 2014, arXiv 1411.1792).

    python -m experiments.transfer --weights FOLDER --data_dir data --workdir runs/transfer [--studies labels halves] [--seeds 3]

labels: a network with ImageNet's weights (FOLDER/NAME*.safetensors) on 1, 10 and 100 % of the labels of `images` training images.
`frozen` is the exact linear probe on its pooled last stage, `partly frozen` trains that stage and a new head, `fine-tuned` trains
everything, the head at ten times the rate of the rest, `from scratch` starts from random weights; all take as many steps.
halves: five classes, A, and the other five, B, of every seed's own choice. The first n layers of a network trained on A (AnB) or B
(BnB) are taken and frozen, or, with +, trained on; what is above them starts anew and learns B. The drop of BnB is that of
layers which no longer fit each other, what AnB loses beyond it is that of layers which are special to A.

Each network is a run of the ordinary engine in a work directory of its own, and what is finished is not run again. Writes report.md,
transfer.json, labels.png and halves.png.
"""

import itertools
import logging
import pathlib
import sys
from typing import NamedTuple

import jax
import matplotlib.pyplot as pyplot
import numpy as np

from cnnjax import transfer
from cnnjax.data import arrays, augment
from cnnjax.models import create_model
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.train import defaults, evaluate, loop
from cnnjax.train.parallel import Parallel
from cnnjax.weights import variable_shapes

SHARES = (0.01, 0.1, 1.0)
METHODS = ("frozen", "partly frozen", "fine-tuned", "from scratch")
LAYERS = ("conv1.*", "conv2.*", "fc1.*", "fc2.*")  # of the tutorial's network, below its last layer
TREATMENTS = ("BnB", "BnB+", "AnB", "AnB+")
# Yosinski et al. 2014, table 1: the mean gain of AnB+ over layers 1 to 7, in percent points of ImageNet's halves.
PUBLISHED = {"baseB": 1.6, "BnB+": 1.4}
LONG = "baseB, twice the epochs"  # as many as base and transferred network take together
_BATCH = 50


class Memory(NamedTuple):
    """A data set for the engine that is in memory already."""

    train: arrays.Split
    test: arrays.Split
    classes: tuple[str, ...]

    def read(self, data_dir):
        return self.train, self.test


def balanced(labels: np.ndarray, seed: int) -> np.ndarray:
    """The numbers of all images in random order, but with every class as often as the next among the first of them, however many."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels), int)
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        rank[mine] = np.arange(len(mine))
    return order[np.argsort(rank[order], kind="stable")]


def resize(split: arrays.Split, size: int) -> arrays.Split:
    """Images of `size` pixels a side, uint8, bilinear."""
    run = jax.jit(
        lambda x: (
            jax.image.resize(x.astype(np.float32), (len(x), size, size, 3), "bilinear")
            .round()
            .astype(np.uint8)
        )
    )
    return arrays.Split(
        np.concatenate([np.asarray(run(part)) for part in np.array_split(split.images, 10)]),
        split.labels,
    )


def train(
    folder: pathlib.Path, name: str, source: Memory, seed: int, epochs: int, **settings
) -> float:
    """Runs the engine on a data set in memory, unless it has been -> the test accuracy."""
    config = defaults.get_config()
    arrays.DATASETS[name] = source
    config.update(
        dataset=name,
        seed=seed,
        epochs=epochs,
        batch_size=_BATCH,
        pixels="imagenet",
        parallel="jit",
        keep_checkpoints=1,
        checkpoint_every_steps=100_000,
    )
    config.schedule.name = "cosine"
    config.update_from_flattened_dict(settings)
    loop.check(config)
    return 1 - workdir.completed(loop.run, config, folder)["final"]["test_error"]


# ------------------------------------------------------------------ ImageNet's features with few labels


def probe(network: str, file: pathlib.Path, source: Memory) -> dict:
    """The exact linear readout of a frozen network's last stage: its test accuracy, and the strength chosen."""
    model = create_model(network, num_classes=10, input_shape=source.train.images.shape[1:])
    last, parallel = list(transfer.stage_paths(model))[-2], Parallel("jit")
    fresh = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), variable_shapes(model)
    )  # the head, which is not used
    variables = transfer.merge(fresh, transfer.take(file, model))
    placed = parallel.replicate((variables, augment.IMAGENET))
    features = [
        evaluate.predict(
            parallel,
            model,
            *placed,
            evaluate.batches_of(split.images, 100),
            100,
            evaluate.pooled(last),
        )
        for split in (source.train, source.test)
    ]
    accuracy, strength = transfer.linear_probe(
        features[0], source.train.labels, features[1], source.test.labels
    )
    return {"accuracy": accuracy, "strength": strength}


def labels(options, data: arrays.Dataset) -> list[dict]:
    """The study of few labels: one row for each network, share of the labels, method and seed."""
    rows, test = (
        [],
        resize(
            arrays.Split(data.test.images[: options.test], data.test.labels[: options.test]),
            options.size,
        ),
    )
    for seed in range(options.seeds):
        chosen = balanced(data.train.labels, seed)[: options.images]
        pool = resize(
            arrays.Split(data.train.images[chosen], data.train.labels[chosen]), options.size
        )
        for network in options.networks:
            file, stages = options.files[network], list(transfer.stage_paths(create_model(network)))
            taken = {"model": network, "initial_weights": str(file)}
            settings = {
                "partly frozen": taken | {"freeze": tuple(stages[:-2])},
                "fine-tuned": taken | {"rates": (("*", 0.1), ("logits", 1.0))},
                "from scratch": {"model": network},
            }
            for share in SHARES:
                count = round(share * options.images)
                source = Memory(
                    arrays.Split(pool.images[:count], pool.labels[:count]), test, data.classes
                )
                for method in METHODS:
                    place = (
                        options.workdir
                        / "labels"
                        / f"{network}-{count}-{method.replace(' ', '-')}-{seed}"
                    )
                    if method == "frozen":
                        accuracy = workdir.finished(
                            place.with_suffix(".json"), probe, network, file, source
                        )["accuracy"]
                    else:
                        accuracy = train(
                            place,
                            f"cifar10-{options.size}px-{count}-{seed}",
                            source,
                            seed,
                            options.steps * _BATCH // count,
                            optimizer="adam",
                            **{"schedule.learning_rate": 1e-3},
                            **settings[method],
                        )
                    rows.append(
                        {
                            "network": network,
                            "count": count,
                            "method": method,
                            "seed": seed,
                            "accuracy": accuracy,
                        }
                    )
                    print(*rows[-1].values(), flush=True)
    return rows


# ------------------------------------------------------------------ halves of the classes


def divide(data: arrays.Dataset, seed: int, count: int) -> dict[str, Memory]:
    """The classes in two halves by the seed, "A" and "B", each with `count` training images and labels of 0 to 4."""
    order, found = np.random.default_rng(seed).permutation(10), {}
    for half, classes in (("A", np.sort(order[:5])), ("B", np.sort(order[5:]))):
        splits = []
        for split in (data.train, data.test):
            mine = np.flatnonzero(np.isin(split.labels, classes))
            splits.append(
                arrays.Split(
                    split.images[mine],
                    np.searchsorted(classes, split.labels[mine]).astype(np.int32),
                )
            )
        few = balanced(splits[0].labels, seed)[:count]
        found[half] = Memory(
            arrays.Split(*(part[few] for part in splits[0])),
            splits[1],
            tuple(data.classes[label] for label in classes),
        )
    return found


def halves(options, data: arrays.Dataset) -> list[dict]:
    """Yosinski's study: one row for each treatment, cut n and seed; accuracy on B. The base networks are the cut 0."""
    rows, folder = [], options.workdir / "halves"
    for seed in range(options.seeds):
        sources, base = (
            divide(data, seed, options.half_images),
            {half: folder / f"base{half}-{seed}" for half in "AB"},
        )
        # (treatment, n): the folder, the seed of what starts anew, and what is set; base networks come first.
        cells = {(f"base{half}", 0): (base[half], 2 * seed, {}) for half in "AB"}
        cells[LONG, 0] = folder / f"longB-{seed}", 2 * seed, {}
        for cut, treatment in itertools.product(range(1, len(LAYERS) + 1), TREATMENTS):
            taken = {"initial_weights": str(base[treatment[0]]), "initial_parts": LAYERS[:cut]}
            frozen = {} if treatment.endswith("+") else {"freeze": LAYERS[:cut]}
            cells[treatment, cut] = (
                folder / f"{treatment.replace('n', str(cut))}-{seed}",
                2 * seed + 1,
                taken | frozen,
            )
        for (treatment, cut), (place, start, settings) in cells.items():
            half = "A" if treatment == "baseA" else "B"
            accuracy = train(
                place,
                f"cifar10-{half}-{seed}",
                sources[half],
                start,
                options.epochs * (1 + (treatment == LONG)),
                model="tutorial_net",
                **{"schedule.learning_rate": 0.01},
                **settings,
            )
            rows.append({"treatment": treatment, "cut": cut, "seed": seed, "accuracy": accuracy})
            print(*rows[-1].values(), flush=True)
    return rows


# ------------------------------------------------------------------ report


def values(rows: list[dict], key: str = "accuracy", **which) -> np.ndarray:
    """A number of the rows that have these values, in percent, seed by seed."""
    return 100 * np.array(
        [row[key] for row in rows if all(row[name] == value for name, value in which.items())]
    )


def shown(found: np.ndarray, sign: str = "") -> str:
    return tables.spread(found, 1, sign)


def curve(axis, x, found: list[np.ndarray], **style) -> None:
    """Means with their sample standard deviations, and every seed as a point."""
    axis.errorbar(x, [f.mean() for f in found], list(map(tables.bar, found)), capsize=2, **style)
    for place, f in zip(x, found):
        axis.plot([place] * len(f), f, ".", ms=3, color=style["color"], alpha=0.6)


def write_labels(folder: pathlib.Path, rows: list[dict], options) -> str:
    """The study of few labels -> its section, and its figure."""
    networks, counts = (
        list(dict.fromkeys(row["network"] for row in rows)),
        sorted({row["count"] for row in rows}),
    )
    figure, axes = pyplot.subplots(
        1,
        len(networks),
        figsize=(5 * len(networks), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    lines = []
    for axis, network in zip(axes[0], networks):
        for number, method in enumerate(METHODS):
            found = [values(rows, network=network, method=method, count=count) for count in counts]
            lines.append([network, method, *map(shown, found), str(len(found[0]))])
            curve(axis, counts, found, color=f"C{number}", label=method)
        axis.set(xscale="log", xlabel="labeled images", title=network)
    axes[0, 0].set_ylabel("test accuracy, %")
    axes[0, 0].legend(fontsize=8)
    workdir.write_figure(folder / "labels.png", figure)
    pyplot.close(figure)
    header = ["network", "method", *(f"{count:,} labels" for count in counts), "n"]
    return (
        f"## Few labels\n\nFrom ImageNet to CIFAR-10 at {options.size} px: test accuracy in percent on {options.test:,} images. A seed "
        f"has training images, initial weights and an order of its own. {options.steps} steps of {_BATCH} images (Adam, rate 0.001 "
        "falling as a cosine) whatever the method; frozen is solved exactly.\n\n"
        + tables.table(header, lines)
        + "\n![Few labels](labels.png)\n\n"
    )


def write_halves(folder: pathlib.Path, rows: list[dict], options) -> str:
    """Yosinski's study -> its section, and its figure."""
    cuts, base, longer = (
        range(1, len(LAYERS) + 1),
        values(rows, treatment="baseB"),
        values(rows, treatment=LONG),
    )
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    lines, differences = (
        [["baseB", *[shown(base)] * len(cuts)], [LONG, *[shown(longer)] * len(cuts)]],
        [],
    )
    for axis, less in zip(axes, (0, base)):
        axis.axhline(np.mean(base - less), color="black", lw=0.8, label="baseB")
        axis.axhline(np.mean(longer - less), color="black", lw=0.8, ls=":", label=LONG)
    for number, treatment in enumerate(TREATMENTS):
        found = [values(rows, treatment=treatment, cut=cut) for cut in cuts]
        style = {
            "color": "C0" if treatment[0] == "B" else "C3",
            "ls": "--" if treatment.endswith("+") else "-",
            "label": treatment,
        }
        shift = 0.06 * (number - 1.5)
        curve(axes[0], [cut + shift for cut in cuts], found, **style)
        curve(axes[1], [cut + shift for cut in cuts], [f - base for f in found], **style)
        lines.append([treatment, *map(shown, found)])
        differences.append([treatment, *(shown(f - base, "+") for f in found)])
    for axis, label in zip(axes, ("test accuracy on B, %", "less the same seed's baseB, points")):
        axis.set(xlabel="layers taken, n", ylabel=label, xticks=list(cuts))
    axes[0].legend(fontsize=8, ncols=2)
    workdir.write_figure(folder / "halves.png", figure)
    pyplot.close(figure)
    header = ["", *(f"n = {cut} ({layer.removesuffix('.*')})" for cut, layer in zip(cuts, LAYERS))]
    tuned = np.mean([values(rows, treatment="AnB+", cut=cut) for cut in cuts], 0)
    controls = {
        "baseB": base,
        LONG: longer,
        "BnB+": np.mean([values(rows, treatment="BnB+", cut=cut) for cut in cuts], 0),
    }
    published = {name: f"{gain:+.1f}" for name, gain in PUBLISHED.items()}
    gains = [
        [name, shown(tuned - control, "+"), published.get(name, "")]
        for name, control in controls.items()
    ]
    half = min(options.half_images, 25_000)
    return (
        f"## Halves of the classes\n\nThe tutorial's network on five classes of CIFAR-10, {half:,} training images, "
        f"{options.epochs} epochs of batches of {_BATCH} (SGD, momentum 0.9, rate 0.01 falling as a cosine); all 5,000 "
        f"test images of these classes. n = {len(base)} seeds, each with a division of its own. The layers "
        "above the cut and the order of the images come from another seed than the base networks'. BnB+ has seen B for "
        "twice the epochs, and AnB+ has had as many in all: a gain is one of transfer only as far as it exceeds that of the longer "
        "training.\n\nTest accuracy on B, %:\n\n"
        + tables.table(header, lines)
        + "\nLess that of the same seed's baseB, in points:\n\n"
        + tables.table(header, differences)
        + "\nThe mean gain of AnB+ over all cuts, beside the published one (ImageNet's halves, AlexNet, layers 1 to 7), in points:\n\n"
        + tables.table(["over", "here", "published"], gains)
        + "\n![Halves](halves.png)\n\n"
    )


STUDIES = {"labels": (labels, write_labels), "halves": (halves, write_halves)}


def _check(options) -> None:
    """Raises `ValueError` for what does not fit, and finds the weights."""
    epoch = options.images // _BATCH  # in steps
    if options.images % (100 * _BATCH) or options.images > 50_000 or options.steps % max(epoch, 1):
        raise ValueError(
            f"images={options.images} and steps={options.steps} do not fit: images is a multiple of {100 * _BATCH} of at most "
            f"50000, and steps one of images / {_BATCH}, the steps of an epoch"
        )
    options.files = {}
    for network in options.networks if "labels" in options.studies else ():
        suffixes = (".safetensors", ".pth", ".pt")
        files = sorted(options.weights.glob(f"{network}*")) if options.weights else []
        found = [file for file in files if file.suffix in suffixes]
        if len(found) != 1:
            raise ValueError(
                f"weights={str(options.weights)!r} is not a folder with one file "
                f"{network}*.safetensors or .pth; it has {len(found)}"
            )
        options.files[network] = found[0]


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/transfer")
    parser.add_data_dir()
    parser.add_argument(
        "--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="default: both"
    )
    parser.add_argument(
        "--weights", type=pathlib.Path, help="the folder of ImageNet's weights, which labels needs"
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=("squeezenet1_1", "mobilenet_v2"),
        default=["squeezenet1_1"],
        help="of labels (default: squeezenet1_1)",
    )
    parser.add_count("seeds", 3, "repetitions")
    parser.add_count(
        "images", 5000, "of labels: training images that are 100 percent", 100 * _BATCH
    )
    parser.add_count("test", 2000, "of labels: test images")
    parser.add_count("size", 64, "of labels: pixels that images are resized to", 32)
    parser.add_count("steps", 200, "of labels: training steps of every run")
    parser.add_count("half_images", 10_000, "of halves: training images", _BATCH)
    parser.add_count("epochs", 6, "of halves")
    options = parser.parse_args(arguments)

    def work():
        _check(options)
        backend.start()
        data = arrays.load("cifar10", options.data_dir)
        logging.getLogger("cnnjax").setLevel(
            logging.WARNING
        )  # the epochs of every run are in its own folder
        sizes = {
            name: getattr(options, name)
            for name in ("images", "test", "size", "steps", "half_images", "epochs")
        }
        workdir.prepare(options.workdir, {"kind": "transfer"} | sizes)
        rows = {study: STUDIES[study][0](options, data) for study in options.studies}
        workdir.write_json(options.workdir / "transfer.json", rows)
        text = "".join(
            STUDIES[study][1](options.workdir, found, options) for study, found in rows.items()
        )
        workdir.write(
            options.workdir / "report.md",
            "# Transfer learning\n\nMean ± sample standard deviation over n seeds.\n\n" + text,
        )
        print(text)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
