"""What does combining networks cost, and what does it gain? Ensembles against soups.

    python -m experiments.ensemble_vs_soup --data_dir data --workdir runs/ensemble_vs_soup \\
        [--repetitions 3] [--train 10000]

After UBC CPSC 532S, lecture 6. An ensemble averages predictions, a soup averages weights. Each
repetition uses the same `train` images of CIFAR-10 and its own seeds, and trains:

- one start, at a constant learning rate, with a moving average of its parameters;
- `members` networks fine-tuned from that average, with different rates, flipping, and order;
- half as many independent networks, trained for as long;
- one network with a restarting learning rate, trained for as long, with snapshots.

`cnnjax.combine` then combines them. The same command continues an interrupted call. Writes
report.md, ensemble_vs_soup.json, and ensemble_vs_soup.png.
"""

import pathlib
import sys
from typing import NamedTuple

import ml_collections
import numpy as np
from matplotlib.figure import Figure

from cnnjax import combine, study
from cnnjax.runtime import files, tables, workdir
from cnnjax.train import defaults, loop

# The published images are in random order, so the first ones are a fair sample.
DATASET = "cifar10"
# Settings of all networks. The rate applies to the start, the independent networks, and the
# restarts.
SETTINGS = {
    "model": "tutorial_net",
    "batch_size": 64,
    "weight_decay": 5e-4,
    "augment.flip": True,
    "schedule.learning_rate": 0.02,
}
# Learning rates of fine-tuning. The members take these rates in turn: the first four with flipping,
# the next four without, and so on.
RATES = (0.02, 0.014, 0.01, 0.007)
EMA_DECAY = 0.99  # the average is over about a hundred steps
SINGLE = "single, mean"
LAST = "last iterate"
# Methods by group of networks. In each group, the first method is the baseline of the others.
METHODS = {
    "fine-tuned": (
        SINGLE,
        "best",
        "ensemble",
        "ensemble-logits",
        "uniform",
        "greedy",
        "learned",
        "learned-by-layer",
    ),
    "independent": (SINGLE, "best", "ensemble", "uniform", "greedy"),
    "restarts": ("snapshot",),
    "start": (LAST, "polyak"),
}
SOUPS = ("uniform", "greedy", "learned", "learned-by-layer")


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    group: str
    method: str
    repetition: int


def add_options(parser):
    parser.add_data_dir()
    parser.add_workdir("runs/ensemble_vs_soup")
    parser.add_argument(
        "--model",
        default=SETTINGS["model"],
        help="a registered network for 32x32 images (default: %(default)s)",
    )
    parser.add_count("repetitions", 3, "repetitions of the whole study, each with its own seeds")
    parser.add_count("members", 8, "networks that are fine-tuned", 4)
    parser.add_count("train", 10_000, "training images", SETTINGS["batch_size"])
    parser.add_count("validation", 2_000, "validation images, by which methods choose", 10)
    parser.add_count("start_epochs", 9, "epochs of the common start")
    parser.add_count("epochs", 3, "epochs of fine-tuning, and of one learning-rate cycle")


def points(options):
    if options.train + options.validation > 50_000:
        raise ValueError(
            f"train={options.train} and validation={options.validation} are more than CIFAR-10's "
            "50000 training images"
        )
    if options.start_epochs < options.epochs:
        raise ValueError(
            f"start_epochs={options.start_epochs} is less than epochs={options.epochs}: the "
            "network that restarts trains for the sum, and needs two cycles of `epochs`"
        )
    # Only the start, which comes first, can be checked now: the others need its weights.
    start, *_ = plan(folder_of(options, 0), options, 0).values()
    loop.check(start)
    result = []
    for repetition in range(options.repetitions):
        for group, methods in METHODS.items():
            result += [Point(group, method, repetition) for method in methods]
    return result


# --- Training -------------------------------------------------------------------------------------


def folder_of(options, repetition: int) -> pathlib.Path:
    return options.workdir.absolute() / f"repetition{repetition}"


def plan(
    folder: pathlib.Path, options, repetition: int
) -> dict[pathlib.Path, ml_collections.ConfigDict]:
    """Returns the configurations of a repetition's networks, in order, by work directory."""
    whole = options.start_epochs + options.epochs
    shared = SETTINGS | {
        "dataset": f"{DATASET}[:{options.train + options.validation}]",
        "data_dir": options.data_dir,
        "n_validation": options.validation,
        "final_weights": "last",
        "model": options.model,
        "epochs": whole,
    }
    start = shared | {
        "epochs": options.start_epochs,
        "ema_decay": EMA_DECAY,
        "schedule.name": "constant",
    }
    independent = shared | {"schedule.name": "cosine"}
    fine_tuned = independent | {
        "epochs": options.epochs,
        "initial_weights": str(folder / "start" / "00"),
        "initial_parts": ("*",),
    }
    # A checkpoint at the end of each cycle is a snapshot.
    restarts = shared | {
        "schedule.name": "restarts",
        "schedule.every": options.epochs,
        "keep_checkpoints": whole,
        "checkpoint_every_steps": options.train // SETTINGS["batch_size"] * options.epochs,
    }
    configs = {}

    def add(group: str, number: int, settings: dict) -> None:
        config = defaults.get_config()
        config.update_from_flattened_dict(settings)
        # The networks are numbered in the order of these calls, so each has its own seed.
        config.seed = 1000 * repetition + len(configs)
        configs[folder / group / f"{number:02}"] = config

    add("start", 0, start)
    for number in range(options.members):
        varied = {
            "schedule.learning_rate": RATES[number % len(RATES)],
            "augment.flip": number // len(RATES) % 2 == 0,
        }
        add("fine-tuned", number, fine_tuned | varied)
    for number in range(options.members // 2):
        add("independent", number, independent)
    add("restarts", 0, restarts)
    return configs


def train(group: str, options, repetition: int) -> None:
    """Trains the unfinished networks of a group, and their start if it is unfinished."""
    for folder, config in plan(folder_of(options, repetition), options, repetition).items():
        if folder.parent.name in ("start", group):
            loop.check(config)
            workdir.run_once(loop.run, config, folder, study.update_record)


# --- Combining ------------------------------------------------------------------------------------


def combined(group: str, method: str, options, repetition: int) -> dict:
    """Returns what `cnnjax.combine` measures; trains and combines whatever is not finished."""
    folder = folder_of(options, repetition)
    place = folder / "combined" / group / method
    if not (place / "results.json").exists():
        train(group, options, repetition)
        combine.run([str(folder / group / "*")], method, place)
    return files.read_json(place / "results.json")


def single_accuracy(group: str, options, repetition: int) -> float:
    """Returns the accuracy that a group's methods are compared with, in percent.

    This baseline is the mean of the group's single networks; for snapshots, the mean of the
    independent networks; and for the moving average, the last iterate of the same run.
    """
    if group == "restarts":
        group = "independent"
    # Each method's result also has the errors of the single networks, so any method will do. The
    # baseline itself is not combined.
    method = METHODS[group][1]
    results = combined(group, method, options, repetition)
    if group == "start":
        # Its ingredients are the checkpoints of one run.
        error = results["individual"][-1]["test"]["error"]
    else:
        error = results["mean_error"]["test"]
    return 100 * (1 - error)


def training_epochs(point: Point, options) -> int:
    """Returns the epochs of all networks that a method needs."""
    whole = options.start_epochs + options.epochs
    if point.group == "start":
        return options.start_epochs
    if point.method in (SINGLE, "snapshot"):
        return whole
    if point.group == "independent":
        return options.members // 2 * whole
    return options.start_epochs + options.members * options.epochs


def measure(point: Point, options) -> dict:
    """Returns the accuracy of one method in percent, its gain in points, and its costs."""
    single = single_accuracy(point.group, options, point.repetition)
    result = {"epochs": training_epochs(point, options)}
    if point.method in (SINGLE, LAST):
        alone = {"accuracy": single, "gain": 0.0, "passes": 1, "ratio": 1.0, "ingredients": 1}
        return result | alone
    results = combined(point.group, point.method, options, point.repetition)
    accuracy = 100 * (1 - results["test"]["error"])
    return result | {
        "accuracy": accuracy,
        "gain": accuracy - single,
        "passes": results["forward_passes"],
        "ratio": results["seconds_per_image"]["ratio"],
        "ingredients": len(results["ingredients"]),
    }


# --- Report ---------------------------------------------------------------------------------------


def tabulate(results: list[dict]) -> str:
    lines = []
    for group, methods in METHODS.items():
        for method in methods:
            column = {
                name: study.values(results, name, group=group, method=method)
                for name in ("epochs", "passes", "ratio", "ingredients", "accuracy", "gain")
            }
            gain = "" if method in (SINGLE, LAST) else tables.spread(column["gain"], 2)
            lines.append(
                [
                    group,
                    method,
                    f"{column['epochs'].mean():.0f}",
                    f"{column['passes'].mean():.0f}",
                    f"{np.median(column['ratio']):.2f}",
                    f"{column['ingredients'].mean():.1f}",
                    tables.spread(column["accuracy"], 2),
                    gain,
                    str(len(column["accuracy"])),
                ]
            )
    header = ["networks", "method", "training epochs", "forward passes", "time of an image"]
    header += ["ingredients", "accuracy, %", "gain, points", "n"]
    return tables.table(header, lines)


def gain_sentences(results: list[dict], options) -> list[str]:
    """Judges the lecture's statements on ensembles, snapshots, and averages.

    "D7.1" is a claim's identifier in the ledger (`experiments.claims`), and so are those below.
    """

    def gain(group, method):
        return study.values(results, "gain", group=group, method=method)

    ensemble = gain("independent", "ensemble")
    snapshot = gain("restarts", "snapshot")
    polyak = gain("start", "polyak")
    count = study.values(results, "passes", method="snapshot").mean()
    verb = "is" if 1 <= ensemble.mean() <= 3 else "is not"
    return [
        f'D7.1, "ensembling independent models gains about 2 %": {options.members // 2} gain '
        f"{tables.spread(ensemble, 2)} points. That they gain {tables.judge(ensemble)}; the mean "
        f"{verb} between 1 and 3.",
        f'D7.2, "snapshots of one run are a cheaper ensemble": {count:.0f} of one run gain '
        f"{tables.spread(snapshot, 2)} points over one independent network of the same length; a "
        f"gain {tables.judge(snapshot)}.",
        f'D7.3, "Polyak averages improve on the last iterate": {tables.spread(polyak, 2)} points: '
        f"{tables.judge(polyak)}.",
    ]


def cost_sentence(results: list[dict], options) -> str:
    """Judges the lecture's statement that soups cost O(1) and ensembles O(k)."""

    def ratio(method):
        return np.median(study.values(results, "ratio", group="fine-tuned", method=method))

    def passes(method):
        return study.values(results, "passes", group="fine-tuned", method=method).mean()

    ratios = [ratio(method) for method in SOUPS]
    constant = all(passes(method) == 1 for method in ("best", *SOUPS))
    linear = passes("ensemble") == options.members
    return (
        f"D8, costs: soups take {'one forward pass' if constant else 'several forward passes'} and "
        f"{min(ratios):.2f} to {max(ratios):.2f} times one network's time, the ensemble "
        f"{passes('ensemble'):.0f} passes and {ratio('ensemble'):.2f} times: O(1) against O(k) "
        f"{'holds' if constant and linear else 'does not hold'}."
    )


def accuracy_sentences(results: list[dict], options) -> list[str]:
    """Judges the accuracy of soups, and whether they need a common start."""

    def accuracy(group, method):
        return study.values(results, "accuracy", group=group, method=method)

    greedy = accuracy("fine-tuned", "greedy")
    over_best = greedy - accuracy("fine-tuned", "best")
    over_soup = accuracy("fine-tuned", "ensemble") - greedy
    strangers = accuracy("independent", "uniform")
    ingredients = study.values(results, "ingredients", group="independent", method="greedy").mean()
    return [
        f"D8, accuracy: the greedy soup has {tables.spread(over_best, 2)} points over the best on "
        f"validation: that it is better {tables.judge(over_best)}. The ensemble has "
        f"{tables.spread(over_soup, 2)} points over the greedy soup: that it is better "
        f"{tables.judge(over_soup)}.",
        "Soups need a common start: the average of independent networks has "
        f"{tables.spread(strangers, 2)} % of the test set right (one of ten classes by chance: "
        f"10 %), and the greedy soup keeps {ingredients:.1f} of {options.members // 2} of them.",
    ]


def draw(results: list[dict]) -> Figure:
    """Draws the accuracy of every method, and its time per image."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    singles = []
    for group, methods in METHODS.items():
        if methods[0] in (SINGLE, LAST):
            alone = study.values(results, "accuracy", group=group, method=methods[0])
            singles.append(alone.mean())
    # Start of the axis; a soup of networks that do not fit together is far below.
    least = min(singles) - 2
    names = []
    for number, (group, methods) in enumerate(METHODS.items()):
        color = f"C{number}"
        for method in methods:
            place = len(names)
            names.append(f"{group}: {method}")
            accuracy = study.values(results, "accuracy", group=group, method=method)
            mean = accuracy.mean()
            if mean < least:
                text = f"← {tables.spread(accuracy, 2)} %"
                left.text(least + 0.1, place, text, va="center", color=color)
            else:
                left.plot(accuracy, [place] * len(accuracy), ".", color=color, alpha=0.4)
                bar = tables.bar(accuracy)
                left.errorbar(mean, place, xerr=bar, fmt="o", color=color, capsize=3)
            ratio = study.values(results, "ratio", group=group, method=method)
            right.barh(place, np.median(ratio), color=color)
    left.set(xlabel="test accuracy, %: mean, standard deviation, repetitions", xlim=(least, None))
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    right.set(xlabel="time of an image, single networks = 1")
    return figure


def report(results: list[dict], options) -> study.Report:
    sentences = [
        *gain_sentences(results, options),
        cost_sentence(results, options),
        *accuracy_sentences(results, options),
    ]
    verdicts = "".join(f"- {sentence}\n" for sentence in sentences)
    text = f"""# Ensembles against soups

{options.model} on CIFAR-10: {options.train:,} training, {options.validation:,} validation, and
10,000 test images; {options.members} networks fine-tuned for {options.epochs} epochs from a start
of {options.start_epochs}, {options.members // 2} independent ones of
{options.start_epochs + options.epochs}, and snapshots every {options.epochs} epochs. Mean ± sample
standard deviation over repetitions, each with a start of its own; the time of an image is the
median, in units of one network's. Gains are over the mean of the single networks; for snapshots,
over the independent ones; for the moving average (polyak), over the last iterate of its own run.
"Holds" means that the mean's 95 % interval agrees.

{tabulate(results)}
{verdicts}
![Accuracy and cost](ensemble_vs_soup.png)
"""
    return study.Report(text, {"ensemble_vs_soup.png": draw(results)})


STUDY = study.Study(
    description=__doc__,
    results="ensemble_vs_soup.json",
    add_options=add_options,
    axes=("repetitions",),
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
