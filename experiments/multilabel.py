"""Which of CamVid's eleven classes appear in a scene? Multi-label classification.

    python -m experiments.multilabel --data_dir data --workdir runs/multilabel \\
        [--weights squeezenet1_1=FILE mobilenet_v2=FILE] [--seeds 3]

A class appears in a scene if it has at least 50 pixels of the mask. The study compares two kinds of
methods: a small network trained from scratch with the sigmoid loss, and logistic regression on the
pooled last stage of frozen networks. The frozen networks have ImageNet weights (torchvision's
names, from the files in --weights) or random weights.

The score is the average precision of each class on 233 test scenes. A random ranking scores the
prevalence of the class. A class counts if at least ten scenes of each part (training and test) show
it and at least ten do not. The mean leaves out the other classes. For the trained network, a seed
draws the weights and the order of the images. For a frozen network, it draws a bootstrap of the
training scenes and the random weights. Writes report.md, multilabel.json, and multilabel.png.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from cnnjax import ridge, study, transfer
from cnnjax.data import arrays
from cnnjax.models import create_model
from cnnjax.runtime import tables, workdir
from cnnjax.train import defaults, evaluate, loop
from cnnjax.train.small import pooled_features

_BATCH = 16
_INVERSE_PENALTY = 0.01  # scikit-learn's C, on standardized features; not tuned
# A class counts if this many scenes of each part show it, and this many lack it.
_LEAST = 10
BASELINE = "prevalence"
SCRATCH = "scene_net, trained from scratch"


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    """A method and a repetition; `weights` is "scratch", "imagenet", or "random"."""

    network: str
    weights: str
    seed: int

    def method(self) -> str:
        if self.weights == "scratch":
            return SCRATCH
        return f"{self.network}, {self.weights}, frozen"


def named_file(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL=FILE")
    return name, file


def add_options(parser):
    parser.add_workdir("runs/multilabel")
    parser.add_data_dir("camvid/")
    parser.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        default=[],
        type=named_file,
        metavar="MODEL=FILE",
        help="frozen networks and the files of their ImageNet weights",
    )
    parser.add_count("seeds", 3, "repetitions")
    parser.add_count("epochs", 12, "training epochs of the network trained from scratch")


def points(options):
    seeds = range(options.seeds)
    result = [Point("scene_net", "scratch", seed) for seed in seeds]
    for name, _ in options.weights:
        for kind in ("imagenet", "random"):
            result += [Point(name, kind, seed) for seed in seeds]
    return result


class Shared(NamedTuple):
    """The scenes, and the features of both parts by network, file, and seed, computed once."""

    data: arrays.Dataset
    features: Callable[[str, str | None, int], list[np.ndarray]]


def counted_classes(data: arrays.Dataset) -> np.ndarray:
    """Returns the indices of classes that enough scenes show, and enough scenes lack."""
    scenes = []
    for split in (data.train, data.test):
        scenes += [split.labels.sum(0), (1 - split.labels).sum(0)]
    counted = np.flatnonzero(np.min(scenes, axis=0) >= _LEAST)
    if not len(counted):
        raise ValueError(
            f"dataset='camvid_scenes' has no class that {_LEAST} scenes show and {_LEAST} lack"
        )
    return counted


def load(options) -> Shared:
    for name, file in options.weights:
        transfer.weights_file(file, f"weights={name}")
        model = create_model(name)
        # Every network has the stage "logits"; the features need another one.
        if len(transfer.stage_paths(model)) < 2:
            raise ValueError(
                f"weights={name}={file}: {name} has no stages whose features could be read"
            )
        # A file of another network is refused now, not after the training from scratch.
        transfer.load_initial_weights(file, model)
    loop.check(configure(options, 0))
    data = arrays.load("camvid_scenes", options.data_dir)
    # Without a class that counts, this refuses the data before anything is trained.
    counted_classes(data)

    @functools.cache
    def of_both_parts(name, file, seed):
        return [features(name, file, seed, split.images) for split in (data.train, data.test)]

    return Shared(data, of_both_parts)


# --- One repetition of one method -----------------------------------------------------------------


def configure(options, seed: int) -> ml_collections.ConfigDict:
    """Returns the configuration of the network that is trained from scratch."""
    config = defaults.get_config()
    config.model = "scene_net"
    config.dataset = "camvid_scenes"
    config.data_dir = options.data_dir
    config.loss = "sigmoid"
    config.augment.flip = True
    config.batch_size = 8
    config.epochs = options.epochs
    config.seed = seed
    config.optimizer = "adamw"
    config.weight_decay = 1e-4
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.002
    return config.lock()


def features(name: str, file: str | None, seed: int, images: np.ndarray) -> np.ndarray:
    """Returns the pooled last stage [n, channels] of a frozen network.

    The weights come from `file`, or are random if `file` is None.
    """
    model = create_model(name)
    if file:
        variables = transfer.load_initial_weights(file, model)
    else:
        blank = jnp.zeros((1, *model.input_shape))
        variables = jax.jit(model.init)(jax.random.key(seed), blank)
    return pooled_features(model, variables, images, _BATCH)


def regress(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """Fits each class to a bootstrap of the training features; returns test scores [n, classes]."""
    # Imported here, since it takes a second, and a wrong argument should be named at once.
    import sklearn.linear_model

    chosen = np.random.default_rng(seed).integers(0, len(train), len(train))
    train, labels = train[chosen], labels[chosen]
    scaler = ridge.fit_scaler(train)
    scores = np.zeros((len(test), labels.shape[1]))
    for number, label in enumerate(labels.T):
        # If every scene of the sample shows a class, or none does, its score stays constant.
        if 0 < label.sum() < len(label):
            model = sklearn.linear_model.LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000)
            model.fit(scaler(train), label)
            scores[:, number] = model.decision_function(scaler(test))
    return scores


def measure(point: Point, options, shared: Shared) -> dict:
    """Returns the average precision of each class on the test scenes."""
    if point.weights == "scratch":
        folder = options.workdir / f"scene_net,seed={point.seed}"
        config = configure(options, point.seed)
        result = workdir.run_once(loop.run, config, folder, study.update_record)
        return {"method": point.method(), "ap": result["by_class"]}
    file = None
    weights_seed = point.seed
    if point.weights == "imagenet":
        # These weights are the same in all repetitions, so their features are computed once.
        file = dict(options.weights)[point.network]
        weights_seed = 0
    train, test = shared.features(point.network, file, weights_seed)
    scores = regress(train, shared.data.train.labels, test, point.seed)
    ap = evaluate.average_precision(scores, shared.data.test.labels)
    return {"method": point.method(), "ap": ap}


# --- Report ---------------------------------------------------------------------------------------


def precision_by_method(results: list[dict], counted: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the average precision of the counted classes, [seeds, classes], by method."""
    by_method = {}
    for method in study.unique(results, "method"):
        rows = study.select(results, method=method)
        # Classes that do not count may have no precision, None, which becomes NaN here.
        precisions = np.array([row["ap"] for row in rows], float)
        by_method[method] = precisions[:, counted]
    return by_method


def tabulate(by_method: dict, prevalence: np.ndarray, names: list[str]) -> str:
    chance = [f"{100 * value:.1f}" for value in (prevalence.mean(), *prevalence)]
    lines = [[BASELINE, *chance, ""]]
    for method, values in by_method.items():
        percent = 100 * values
        cells = [tables.spread(column, 1) for column in (percent.mean(1), *percent.T)]
        lines.append([method, *cells, str(len(values))])
    return tables.table(["method", "mean AP", *names, "n"], lines)


def draw(by_method: dict, prevalence: np.ndarray, names: list[str]) -> Figure:
    """Draws the average precision of each class, method by method, above the prevalence."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axis = figure.subplots()
    series = {}
    for method, values in by_method.items():
        series[f"{method} (n={len(values)})"] = list(100 * values.T)
    study.draw_bars(axis, series)
    left = np.arange(len(names)) - 0.45
    right = np.arange(len(names)) + 0.45
    axis.hlines(100 * prevalence, left, right, color="black", lw=1, label=BASELINE)
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="average precision on the test, %", ylim=(0, 100))
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    return figure


def report(results: list[dict], options) -> study.Report:
    data = arrays.load("camvid_scenes", options.data_dir)
    counted = counted_classes(data)
    names = [data.classes[number] for number in counted]
    prevalence = data.test.labels.mean(0)[counted]
    by_method = precision_by_method(results, counted)
    left_out = ", ".join(name for name in data.classes if name not in names)
    if left_out:
        left_out = f"Left out, because too few scenes of a part show or lack them: {left_out}."
    else:
        left_out = "All classes count."
    text = f"""# Which classes appear in a scene

Average precision in percent on {len(data.test.images)} test scenes of CamVid, mean ± sample
standard deviation over seeds; {len(data.train.images)} training scenes, {options.epochs} epochs
from scratch. A frozen network is fitted to a bootstrap of the training scenes, with about 63 % of
them, which is a handicap beside the network from scratch, which has all of them.
{left_out}

{tabulate(by_method, prevalence, names)}
![Average precision](multilabel.png)
"""
    return study.Report(text, {"multilabel.png": draw(by_method, prevalence, names)})


STUDY = study.Study(
    description=__doc__,
    results="multilabel.json",
    add_options=add_options,
    axes=("seeds",),
    files=("weights",),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
