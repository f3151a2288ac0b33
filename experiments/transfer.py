"""Transfer learning on CIFAR-10: ImageNet features with few labels, and halves of classes.

    python -m experiments.transfer --weights FOLDER --data_dir data --workdir runs/transfer \\
        [--studies labels halves] [--seeds 3]

labels: a network with ImageNet weights (FOLDER/NAME*.safetensors) learns from 1, 10, and 100 % of
the labels of `images` training images.

- `frozen` is the exact linear probe on the pooled last stage.
- `partly frozen` trains the last stage and a new head.
- `fine-tuned` trains everything, the head at ten times the learning rate of the rest.
- `from scratch` starts from random weights.

All methods that train take the same number of steps.

halves (Yosinski et al. 2014, arXiv 1411.1792): each seed divides the classes anew into five classes
A and five classes B. The first n layers come from a network trained on A (AnB) or B (BnB) and are
frozen or, with +, trained further; the layers above them start anew and learn B. BnB loses accuracy
if layers no longer fit each other. If AnB loses more than BnB, the cause is layers that are
specific to A.

Each network has its own work directory, and data/ contains the data sets (about 200 MB per seed).
Writes report.md, transfer.json, labels.png, and halves.png.
"""

import itertools
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cnnjax import study, transfer
from cnnjax.data import arrays
from cnnjax.models import create_model
from cnnjax.runtime import command, files, tables, workdir
from cnnjax.runtime.paths import sha256
from cnnjax.train import defaults, loop
from cnnjax.train.small import pooled_features, resize

STUDIES = ("labels", "halves")
SHARES = (0.01, 0.1, 1.0)
METHODS = ("frozen", "partly frozen", "fine-tuned", "from scratch")
LAYERS = ("conv1.*", "conv2.*", "fc1.*", "fc2.*")  # the tutorial's network without its last layer
CUTS = range(1, len(LAYERS) + 1)


class Treatment(NamedTuple):
    """What happens to the first n layers: the half that they come from, and their training."""

    origin: str
    is_frozen: bool


TREATMENTS = {
    "BnB": Treatment("B", is_frozen=True),
    "BnB+": Treatment("B", is_frozen=False),
    "AnB": Treatment("A", is_frozen=True),
    "AnB+": Treatment("A", is_frozen=False),
}
# Yosinski et al. 2014, table 1: the mean gain of AnB+ over layers 1 to 7, in percentage points on
# halves of ImageNet.
PUBLISHED = {"baseB": 1.6, "BnB+": 1.4}
LONG = "baseB, twice the epochs"  # the epochs of base and transferred network together
_BATCH = 50


# --- Options and points ---------------------------------------------------------------------------


class FewLabels(NamedTuple):
    """A network on the labels of `count` images."""

    study: str
    network: str
    count: int
    method: str
    seed: int


class Halves(NamedTuple):
    """A network on half of the classes, with `cut` layers of another; base networks have none."""

    study: str
    treatment: str
    cut: int
    seed: int


def add_options(parser):
    parser.add_workdir("runs/transfer")
    parser.add_data_dir()
    parser.add_argument(
        "--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="default: both"
    )
    parser.add_argument(
        "--weights",
        type=command.path,
        help="folder of ImageNet weights; needed by the study labels",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=("squeezenet1_1", "mobilenet_v2"),
        default=["squeezenet1_1"],
        help="study labels: networks (default: squeezenet1_1)",
    )
    parser.add_count("seeds", 3, "repetitions")
    parser.add_count(
        "images",
        5000,
        "study labels: size of the whole training set, of which 1, 10, and 100 %% are used",
        100 * _BATCH,
    )
    parser.add_count("test", 2000, "study labels: test images")
    parser.add_count("size", 64, "study labels: side of the resized images in pixels", 32)
    parser.add_count("steps", 200, "study labels: training steps of each network")
    parser.add_count("half_images", 10_000, "study halves: training images", _BATCH)
    parser.add_count("epochs", 6, "study halves: training epochs")


def points(options):
    result = []
    seeds = range(options.seeds)
    if "labels" in options.studies:
        for seed, network, share in itertools.product(seeds, options.networks, SHARES):
            count = round(share * options.images)
            result += [FewLabels("labels", network, count, method, seed) for method in METHODS]
    if "halves" in options.studies:
        for seed in seeds:
            # The base networks come first, because the others take layers from them.
            result += [Halves("halves", base, 0, seed) for base in ("baseA", "baseB", LONG)]
            for cut, treatment in itertools.product(CUTS, TREATMENTS):
                result.append(Halves("halves", treatment, cut, seed))
    return result


class Shared(NamedTuple):
    """CIFAR-10, and the files of ImageNet's weights and their SHA-256 by network."""

    data: arrays.Dataset
    files: dict[str, pathlib.Path]
    digests: dict[str, str]


def load(options) -> Shared:
    steps_per_epoch = options.images // _BATCH
    # Even 1 % of the images are whole batches.
    is_bad_size = options.images % (100 * _BATCH) or options.images > 50_000
    if is_bad_size or options.steps % steps_per_epoch:
        raise ValueError(
            f"images={options.images} and steps={options.steps} do not fit: images is a multiple "
            f"of {100 * _BATCH}, at most 50000, and steps a multiple of images / {_BATCH}, the "
            "steps of one epoch"
        )
    networks = options.networks if "labels" in options.studies else ()
    files = {network: find_weights(options.weights, network) for network in networks}
    digests = {}
    for network, file in files.items():
        digests[network] = sha256(file)
        check_digest(options, network, digests[network])
    data = arrays.load("cifar10", options.data_dir)
    arrays.check_counts(data, options.images, options.test)
    return Shared(data, files, digests)


def find_weights(folder: pathlib.Path | None, network: str) -> pathlib.Path:
    """Returns the one file of a network's weights in a folder."""
    if folder is None:
        raise ValueError(
            "weights is not given; expected the folder of ImageNet's weights, which "
            "--studies labels needs"
        )
    paths = []
    for file in sorted(folder.glob(f"{network}*")):
        if file.suffix in (".safetensors", ".pth", ".pt"):
            paths.append(file)
    if len(paths) != 1:
        raise ValueError(
            f"weights={str(folder)!r} is not a folder with one file {network}*.safetensors or "
            f".pth; it has {len(paths)}"
        )
    return paths[0]


def check_digest(options, network: str, digest: str) -> None:
    """Raises `ValueError` if finished points of a network had other weights.

    `--weights` is not part of the work directory's configuration, so that the study of halves can
    run without it.
    """
    for path in (options.workdir / "points").glob(f"study=labels,network={network},*.json"):
        recorded = files.read_json(path).get("weights_sha256", digest)
        if recorded != digest:
            raise ValueError(
                f"weights={str(options.weights)!r} has other weights of {network} than {path} was "
                f"measured with (SHA-256 {recorded[:8]} there, {digest[:8]} now); choose another "
                "--workdir"
            )


# --- Data sets ------------------------------------------------------------------------------------


def balanced(labels: np.ndarray, seed: int) -> np.ndarray:
    """Returns the numbers of all images in random order, balanced over the classes.

    In every prefix of this order, the classes are balanced as far as possible.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels), int)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    # An image's rank is its place among the images of its class. Sorted by rank, the order has the
    # first image of every class, then the second of every class, and so on.
    return order[np.argsort(rank[order], kind="stable")]


def enlarge(data: arrays.Dataset, options, seed: int) -> arrays.Dataset:
    """Draws and resizes the images for few labels.

    In every prefix of the training images, the classes are balanced as far as possible.
    """
    chosen = balanced(data.train.labels, seed)[: options.images]
    train = resize(data.train.take(chosen), options.size)
    test = resize(data.test.take(slice(options.test)), options.size)
    return arrays.Dataset(train, None, test, data.classes)


def restrict(split: arrays.Split, classes: np.ndarray) -> arrays.Split:
    """Returns the images of some classes, relabeled by the order of these classes."""
    images, labels = split.take(np.isin(split.labels, classes))
    return arrays.Split(images, np.searchsorted(classes, labels).astype(np.int32))


def divide(data: arrays.Dataset, seed: int, count: int) -> dict[str, arrays.Dataset]:
    """Returns two halves of the classes, "A" and "B", with `count` training images each."""
    order = np.random.default_rng(seed).permutation(10)
    halves = {}
    for half, members in (("A", order[:5]), ("B", order[5:])):
        classes = np.sort(members)
        train = restrict(data.train, classes)
        few = balanced(train.labels, seed)[:count]
        names = tuple(data.classes[label] for label in classes)
        test = restrict(data.test, classes)
        halves[half] = arrays.Dataset(train.take(few), None, test, names)
    return halves


def labels_file(options, data: arrays.Dataset, seed: int) -> pathlib.Path:
    """Returns the file of a seed's images for few labels; writes it if it is absent."""
    path = options.workdir.absolute() / "data" / f"labels-{seed}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        arrays.save(enlarge(data, options, seed), path)
    return path


def half_file(options, data: arrays.Dataset, half: str, seed: int) -> pathlib.Path:
    """Returns the file of one half of the classes; writes it if it is absent."""
    path = options.workdir.absolute() / "data" / f"half{half}-{seed}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        arrays.save(divide(data, seed, options.half_images)[half], path)
    return path


# --- One network ----------------------------------------------------------------------------------


def train(folder: pathlib.Path, settings: dict[str, Any]) -> float:
    """Trains a network, unless it is finished, and returns its test accuracy."""
    config = defaults.get_config()
    config.batch_size = _BATCH
    config.pixels = "imagenet"
    config.parallel = "jit"
    config.keep_checkpoints = 1
    config.checkpoint_every_steps = 100_000
    config.schedule.name = "cosine"
    config.update_from_flattened_dict(settings)
    loop.check(config)

    def adopt(config, folder):
        """Records where the network's files are now; its initial weights must be the same."""
        study.update_record(config, folder, keys=("data_dir", "dataset"))
        loop.adopt(config, folder)

    results = workdir.run_once(loop.run, config, folder, adopt)
    return 1 - results["final"]["test_error"]


def probe(network: str, file: pathlib.Path, data: arrays.Dataset) -> dict:
    """Fits the exact linear readout of a frozen network's last stage.

    Returns its test accuracy, and the strength of the ridge penalty that was chosen.
    """
    model = create_model(network, num_classes=10, input_shape=data.train.images.shape[1:])
    variables = transfer.load_initial_weights(file, model)
    features = pooled_features(model, variables, data.train.images)
    test_features = pooled_features(model, variables, data.test.images)
    accuracy, strength = transfer.linear_probe(
        features, data.train.labels, test_features, data.test.labels
    )
    return {"accuracy": accuracy, "strength": strength}


def measure_labels(point: FewLabels, options, shared: Shared) -> dict:
    """Returns the test accuracy of one network on few labels, and the digest of the weights."""
    dataset = f"{labels_file(options, shared.data, point.seed)}[:{point.count}]"
    file = shared.files[point.network]
    origin = {"weights_sha256": shared.digests[point.network]}
    if point.method == "frozen":
        return probe(point.network, file, arrays.load(dataset)) | origin
    settings = {
        "dataset": dataset,
        "model": point.network,
        "seed": point.seed,
        "epochs": options.steps * _BATCH // point.count,
        "optimizer": "adam",
        "schedule.learning_rate": 1e-3,
    }
    if point.method != "from scratch":
        settings["initial_weights"] = str(file)
    if point.method == "partly frozen":
        *lower, _, _ = transfer.stage_paths(create_model(point.network))
        settings["freeze"] = tuple(lower)
    if point.method == "fine-tuned":
        settings["rates"] = (("*", 0.1), ("logits", 1.0))
    name = f"{point.network}-{point.count}-{point.method.replace(' ', '-')}-{point.seed}"
    return {"accuracy": train(options.workdir / "labels" / name, settings)} | origin


def halves_folder(options, treatment: str, cut: int, seed: int) -> pathlib.Path:
    if treatment in TREATMENTS:
        # Such as "A2B+".
        name = treatment.replace("n", str(cut))
    elif treatment == LONG:
        name = "longB"
    else:
        # "baseA" or "baseB".
        name = treatment
    return options.workdir.absolute() / "halves" / f"{name}-{seed}"


def measure_halves(point: Halves, options, shared: Shared) -> dict:
    """Returns the test accuracy of one network on its half of the classes."""
    half = "A" if point.treatment == "baseA" else "B"
    settings = {
        "dataset": str(half_file(options, shared.data, half, point.seed)),
        "model": "tutorial_net",
        # The layers above the cut start from other weights than the base networks did.
        "seed": 2 * point.seed + (point.cut > 0),
        "epochs": 2 * options.epochs if point.treatment == LONG else options.epochs,
        "schedule.learning_rate": 0.01,
    }
    if point.cut:
        treatment = TREATMENTS[point.treatment]
        base = f"base{treatment.origin}"
        settings["initial_weights"] = str(halves_folder(options, base, 0, point.seed))
        settings["initial_parts"] = LAYERS[: point.cut]
        if treatment.is_frozen:
            settings["freeze"] = LAYERS[: point.cut]
    folder = halves_folder(options, point.treatment, point.cut, point.seed)
    return {"accuracy": train(folder, settings)}


def measure(point: FewLabels | Halves, options, shared: Shared) -> dict:
    if isinstance(point, FewLabels):
        return measure_labels(point, options, shared)
    return measure_halves(point, options, shared)


# --- Report ---------------------------------------------------------------------------------------


def accuracies(results: list[dict], **fields) -> np.ndarray:
    """Returns the accuracies of the selected results in percent, seed by seed."""
    return 100 * study.values(results, "accuracy", **fields)


def spreads(columns: list[np.ndarray], sign: str = "") -> list[str]:
    return [tables.spread(column, 1, sign) for column in columns]


def curve(axis, x, columns: list[np.ndarray], **style) -> None:
    """Draws means with sample standard deviations, and every seed as a point."""
    study.draw_curve(axis, x, columns, **style)
    for place, column in zip(x, columns):
        axis.plot([place] * len(column), column, ".", ms=3, color=style["color"], alpha=0.6)


def tabulate_labels(results: list[dict]) -> str:
    counts = sorted(study.unique(results, "count"))
    lines = []
    for network, method in itertools.product(study.unique(results, "network"), METHODS):
        columns = [
            accuracies(results, network=network, method=method, count=count) for count in counts
        ]
        lines.append([network, method, *spreads(columns), str(len(columns[0]))])
    header = ["network", "method", *(f"{count:,} labels" for count in counts), "n"]
    return tables.table(header, lines)


def draw_labels(results: list[dict]) -> Figure:
    """Draws the accuracy by number of labels, one panel per network."""
    networks = study.unique(results, "network")
    counts = sorted(study.unique(results, "count"))
    figure = Figure(figsize=(5 * len(networks), 3.6), layout="constrained")
    axes = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axis, network in zip(axes, networks):
        for number, method in enumerate(METHODS):
            columns = [
                accuracies(results, network=network, method=method, count=count) for count in counts
            ]
            curve(axis, counts, columns, color=f"C{number}", label=method)
        axis.set(xscale="log", xlabel="labeled images", title=network)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(fontsize=8)
    return figure


def report_labels(results: list[dict], options) -> study.Report:
    text = f"""## Few labels

From ImageNet to CIFAR-10 at {options.size} px: test accuracy in percent on {options.test:,} images.
A seed has training images, initial weights, and an order of its own. {options.steps} steps of
{_BATCH} images (Adam, rate 0.001 falling as a cosine) with every method; frozen is solved exactly.

{tabulate_labels(results)}
![Few labels](labels.png)

"""
    return study.Report(text, {"labels.png": draw_labels(results)})


def by_cut(results: list[dict], treatment: str) -> list[np.ndarray]:
    """Returns the accuracies of a treatment in percent, cut by cut, seed by seed."""
    return [accuracies(results, treatment=treatment, cut=cut) for cut in CUTS]


def tabulate_gains(results: list[dict]) -> str:
    """Tabulates the gain of AnB+ over controls, mean of all cuts, beside the published gain."""
    transferred = np.mean(by_cut(results, "AnB+"), 0)
    controls = {
        "baseB": accuracies(results, treatment="baseB"),
        LONG: accuracies(results, treatment=LONG),
        "BnB+": np.mean(by_cut(results, "BnB+"), 0),
    }
    lines = []
    for name, control in controls.items():
        published = f"{PUBLISHED[name]:+.1f}" if name in PUBLISHED else ""
        lines.append([name, tables.spread(transferred - control, 1, "+"), published])
    return tables.table(["over", "here", "published"], lines)


def draw_halves(results: list[dict]) -> Figure:
    """Draws the accuracy by cut, and its difference from the same seed's baseB."""
    base = accuracies(results, treatment="baseB")
    longer = accuracies(results, treatment=LONG)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    labels = ("test accuracy on B, %", "less the same seed's baseB, points")
    for axis, subtracted, label in zip(axes, (0, base), labels):
        axis.axhline(np.mean(base - subtracted), color="black", lw=0.8, label="baseB")
        axis.axhline(np.mean(longer - subtracted), color="black", lw=0.8, ls=":", label=LONG)
        for number, (name, treatment) in enumerate(TREATMENTS.items()):
            columns = [column - subtracted for column in by_cut(results, name)]
            curve(
                axis,
                np.array(CUTS) + 0.06 * (number - 1.5),
                columns,
                color="C0" if treatment.origin == "B" else "C3",
                ls="-" if treatment.is_frozen else "--",
                label=name,
            )
        axis.set(xlabel="layers taken, n", ylabel=label, xticks=list(CUTS))
    axes[0].legend(fontsize=8, ncols=2)
    return figure


def report_halves(results: list[dict], options) -> study.Report:
    base = accuracies(results, treatment="baseB")
    longer = accuracies(results, treatment=LONG)
    header = [""]
    for cut, layer in zip(CUTS, LAYERS):
        header.append(f"n = {cut} ({layer.removesuffix('.*')})")
    # The base networks have no cut, so they show the same value in every column.
    lines = []
    for name, column in (("baseB", base), (LONG, longer)):
        lines.append([name, *spreads([column] * len(CUTS))])
    differences = []
    for treatment in TREATMENTS:
        columns = by_cut(results, treatment)
        lines.append([treatment, *spreads(columns)])
        differences.append([treatment, *spreads([column - base for column in columns], "+")])
    text = f"""## Halves of the classes

The tutorial's network on five classes of CIFAR-10, {min(options.half_images, 25_000):,} training
images, {options.epochs} epochs of batches of {_BATCH} (SGD, momentum 0.9, rate 0.01 falling as a
cosine); all 5,000 test images of these classes. n = {len(base)} seeds, each with a division of its
own. The layers above the cut and the order of the images come from another seed than the base
networks'. BnB+ has seen B for twice the epochs, and AnB+ has had as many in all: a gain is one of
transfer only as far as it exceeds that of the longer training.

Test accuracy on B, %:

{tables.table(header, lines)}
Less that of the same seed's baseB, in points:

{tables.table(header, differences)}
The mean gain of AnB+ over all cuts, beside the published one (ImageNet's halves, AlexNet, layers 1
to 7), in points:

{tabulate_gains(results)}
![Halves](halves.png)

"""
    return study.Report(text, {"halves.png": draw_halves(results)})


def report(results: list[dict], options) -> study.Report:
    text = "# Transfer learning\n\nMean ± sample standard deviation over n seeds.\n\n"
    figures = {}
    for name, report_part in (("labels", report_labels), ("halves", report_halves)):
        if name in options.studies:
            part = report_part(study.select(results, study=name), options)
            text += part.text
            figures |= part.figures
    return study.Report(text, figures)


STUDY = study.Study(
    description=__doc__,
    results="transfer.json",
    add_options=add_options,
    axes=("studies", "weights", "networks", "seeds"),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
