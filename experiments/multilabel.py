"""Multi-label classification: which of CamVid's eleven classes appear in a scene, each by a sigmoid of its own?

    python -m experiments.multilabel --data_dir data --workdir runs/multilabel [--weights squeezenet1_1=FILE mobilenet_v2=FILE] [--seeds 3]

A class appears where it has at least 50 pixels of the mask. Compared are a small network trained from scratch under the sigmoid loss,
and logistic regression on the pooled last stage of frozen networks, with ImageNet weights (torchvision's names, from the files in
--weights) and without. The score is the average precision of each class on 233 test scenes; a ranking by chance has the class's
prevalence. Classes that fewer than ten scenes of a part show, or lack, say little and are left out of the mean. Seeds are of weights
and order for what is trained from scratch, and of a bootstrap of the training scenes (and of random weights) for frozen networks.
Writes report.md, multilabel.json and multilabel.png.
"""

import functools
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib
import ml_collections
import numpy as np
import sklearn.linear_model

from cnnjax import transfer
from cnnjax.data import arrays, augment
from cnnjax.models import create_model
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.train import defaults, evaluate, loop
from cnnjax.train.parallel import Parallel

_BATCH = 16
_STRENGTH = 0.01  # the inverse of the ridge penalty, on standardized features; it was not tuned
_LEAST = 10  # scenes of either part that have a class, and that have it not, for it to be counted
_BASELINE, _SCRATCH = "prevalence", "scene_net, trained from scratch"


def configure(options, seed: int) -> ml_collections.ConfigDict:
    """The configuration of a small network that is trained from scratch."""
    config = defaults.get_config()
    config.model, config.dataset, config.data_dir, config.loss = (
        "scene_net",
        "camvid_scenes",
        options.data_dir,
        "sigmoid",
    )
    config.augment.flip, config.batch_size, config.epochs, config.seed = (
        True,
        8,
        options.epochs,
        seed,
    )
    config.optimizer, config.weight_decay, config.schedule.name, config.schedule.learning_rate = (
        "adamw",
        1e-4,
        "cosine",
        0.002,
    )
    return config.lock()


def features(name: str, file: str | None, seed: int, parts: list[np.ndarray]) -> list[np.ndarray]:
    """The pooled last stage of a network with a file's weights, or with random ones, for each array of images: [n, channels]."""
    model, parallel = create_model(name), Parallel("jit")
    random = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *model.input_shape)))
    variables = parallel.replicate(
        transfer.merge(random, transfer.take(file, model) if file else {})
    )
    moments = parallel.replicate(augment.IMAGENET)
    stage = list(transfer.stage_paths(model))[-2]  # the last is "logits"
    return [
        evaluate.predict(
            parallel,
            model,
            variables,
            moments,
            evaluate.batches_of(images, _BATCH),
            _BATCH,
            evaluate.pooled(stage),
        )
        for images in parts
    ]


def regress(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """Logistic regression of every class on a bootstrap sample of the training features -> scores of the test [n, classes]."""
    chosen = np.random.default_rng(seed).integers(0, len(train), len(train))
    train, labels = train[chosen], labels[chosen]
    mean, std = train.mean(0), train.std(0)
    std = np.where(std > 1e-6 * std.max(), std, np.inf)  # a constant feature says nothing
    scores = np.zeros((len(test), labels.shape[1]))
    for number, label in enumerate(labels.T):
        if 0 < label.sum() < len(label):  # else its score is a constant
            model = sklearn.linear_model.LogisticRegression(C=_STRENGTH, max_iter=1000).fit(
                (train - mean) / std, label
            )
            scores[:, number] = model.decision_function((test - mean) / std)
    return scores


def _figure(
    folder: pathlib.Path, found: dict[str, np.ndarray], prevalence: np.ndarray, names: list[str]
) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 3.8), layout="constrained")
    width = 0.8 / len(found)
    for number, (method, values) in enumerate(found.items()):
        at = np.arange(len(names)) + (number - (len(found) - 1) / 2) * width
        axis.bar(
            at,
            100 * values.mean(0),
            width,
            yerr=100 * tables.bar(values),
            error_kw={"lw": 0.8},
            label=f"{method} (n={len(values)})",
        )
    for number, value in enumerate(prevalence):
        axis.plot(
            [number - 0.45, number + 0.45],
            [100 * value] * 2,
            color="black",
            lw=1,
            label=None if number else _BASELINE,
        )
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="average precision on the test, %", ylim=(0, 100))
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    workdir.write_figure(folder / "multilabel.png", figure)
    pyplot.close(figure)


def write(options, data: arrays.Dataset, rows: list[dict]) -> str:
    """Writes the results, the report and the figure; returns the table."""
    shares = [split.labels.mean(0) for split in (data.train, data.test)]
    found = [
        np.minimum(split.labels.sum(0), (1 - split.labels).sum(0))
        for split in (data.train, data.test)
    ]
    told = np.flatnonzero(np.minimum(*found) >= _LEAST)
    if not len(told):
        raise ValueError(
            f"dataset='camvid_scenes' of data_dir={options.data_dir!r} has no class that {_LEAST} scenes show and "
            f"{_LEAST} lack"
        )
    names, prevalence = [data.classes[number] for number in told], shares[1][told]
    found = {
        method: np.array(
            [[row["ap"][number] for number in told] for row in rows if row["method"] == method]
        )
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    cell = lambda values: tables.spread(100 * np.asarray(values), 1)
    lines = [[_BASELINE, cell([prevalence.mean()]), *(cell([value]) for value in prevalence), ""]]
    lines += [
        [method, cell(values.mean(1)), *map(cell, values.T), str(len(values))]
        for method, values in found.items()
    ]
    table = tables.table(["method", "mean AP", *names, "n"], lines)
    workdir.write_json(
        options.workdir / "multilabel.json",
        {
            "classes": list(data.classes),
            "counted": names,
            "rows": rows,
            "prevalence": {part: share.tolist() for part, share in zip(("train", "test"), shares)},
        },
    )
    _figure(options.workdir, found, prevalence, names)
    left_out = ", ".join(name for name in data.classes if name not in names)
    text = (
        f"# Which classes appear in a scene\n\nAverage precision in percent on {len(data.test.images)} test scenes of CamVid, mean ± "
        f"sample standard deviation over seeds; {len(data.train.images)} training scenes, {options.epochs} epochs from scratch. Left "
        f"out, because hardly a scene of a part lacks, or shows, them: {left_out}.\n\n{table}\n![Average precision](multilabel.png)\n"
    )
    workdir.write(options.workdir / "report.md", text)
    return table


def _work(options) -> None:
    configs, files = (
        [configure(options, seed) for seed in range(options.seeds)],
        dict(options.weights),
    )
    for name, file in files.items():
        transfer.weights_file(file)
        create_model(name)
    loop.check(configs[0])
    data, rows = arrays.load("camvid_scenes", options.data_dir), []
    folder = workdir.prepare(
        options.workdir, {"data_dir": options.data_dir, "weights": files, "epochs": options.epochs}
    )
    backend.start()
    for seed, config in enumerate(configs):
        found = workdir.completed(loop.run, config, folder / f"scene_net,seed={seed}")
        rows.append({"method": _SCRATCH, "seed": seed, "ap": found["by_class"]})
    read = functools.cache(
        lambda name, file, seed: features(name, file, seed, [data.train.images, data.test.images])
    )

    def frozen(name, file, kind, seed):
        train, test = read(name, file, 0) if kind == "imagenet" else read(name, None, seed)
        return evaluate.average_precision(
            regress(train, data.train.labels, test, seed), data.test.labels
        )

    for (name, file), kind, seed in itertools.product(
        files.items(), ("imagenet", "random"), range(options.seeds)
    ):
        path = folder / f"{name},{kind},seed={seed}.json"
        rows.append(
            {
                "method": f"{name}, {kind}, frozen",
                "seed": seed,
                "ap": workdir.finished(path, frozen, name, file, kind, seed),
            }
        )
    print(write(options, data, rows))


def _named_file(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    return name, file


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/multilabel")
    parser.add_data_dir("camvid/")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        type=_named_file,
        metavar="MODEL=FILE",
        help="networks whose features are read",
    )
    parser.add_count("seeds", 3, "repetitions")
    parser.add_count("epochs", 12, "of the network trained from scratch")
    options = parser.parse_args(arguments)
    return command.run(lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())
