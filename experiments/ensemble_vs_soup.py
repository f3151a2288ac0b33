"""Ensembles against soups (UBC CPSC 532S, lecture 6): what it costs to combine networks, and what it gives.

    python -m experiments.ensemble_vs_soup --data_dir data --workdir runs/ensemble_vs_soup [--repetitions 3] [--train 10000]

Each repetition trains, on the same `train` images of CIFAR-10 and with seeds of its own: one start, at a constant rate, with a moving
average of its parameters; `members` networks fine-tuned from that average, which differ in rate, flipping and order; half as many
independent ones of the same length; and one of the same length whose rate restarts, with snapshots. `cnnjax.combine` then combines
them. A call goes on where an earlier one stopped. Writes report.md, ensemble_vs_soup.json and ensemble_vs_soup.png.
"""

import argparse
import dataclasses
import functools
import json
import logging
import pathlib
import sys

import matplotlib
import ml_collections
import numpy as np

from cnnjax import combine
from cnnjax.data import arrays
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.train import defaults, loop

_LOG = logging.getLogger("cnnjax")
# What all networks share. The rate is that of the start, the independent networks and the restarts.
SETTINGS = {
    "model": "tutorial_net",
    "batch_size": 64,
    "weight_decay": 5e-4,
    "augment.flip": True,
    "schedule.learning_rate": 0.02,
}
RATES = (
    0.02,
    0.014,
    0.01,
    0.007,
)  # of fine-tuning: the members take them in turn, the first ones with flipping, the next without
EMA_DECAY = 0.99  # the average is over about a hundred steps
METHODS = {
    "fine-tuned": (
        "best",
        "ensemble",
        "ensemble-logits",
        "uniform",
        "greedy",
        "learned",
        "learned-by-layer",
    ),
    "independent": ("best", "ensemble", "uniform", "greedy"),
    "restarts": ("snapshot",),
    "start": ("polyak",),
}
_FIELDS = (
    "model",
    "train",
    "validation",
    "members",
    "start_epochs",
    "epochs",
)  # options that a work directory belongs to


_read = functools.cache(arrays.DATASETS["cifar10"].read)  # dozens of runs read it


@dataclasses.dataclass(frozen=True)
class Part:
    """The first training images of CIFAR-10, which is published in random order, and the whole test set."""

    count: int
    classes: tuple[str, ...] = arrays.DATASETS["cifar10"].classes

    def read(self, data_dir: pathlib.Path) -> tuple[arrays.Split, arrays.Split]:
        train, test = _read(data_dir)
        return arrays.Split(train.images[: self.count], train.labels[: self.count]), test


def plan(
    folder: pathlib.Path, options: argparse.Namespace, repetition: int
) -> dict[pathlib.Path, ml_collections.ConfigDict]:
    """One repetition's training runs, in order, by their work directories."""
    count = options.train + options.validation
    arrays.DATASETS[f"cifar10-{count}"] = Part(count)
    whole = options.start_epochs + options.epochs
    shared = SETTINGS | {
        "dataset": f"cifar10-{count}",
        "data_dir": options.data_dir,
        "n_validation": options.validation,
        "model": options.model,
        "epochs": whole,
    }
    cosine, runs = shared | {"schedule.name": "cosine"}, {}

    def add(group: str, number: int, settings: dict) -> None:
        config = defaults.get_config()
        config.update_from_flattened_dict(settings | {"seed": 1000 * repetition + len(runs)})
        runs[folder / group / f"{number:02}"] = config

    add(
        "start",
        0,
        shared
        | {"epochs": options.start_epochs, "ema_decay": EMA_DECAY, "schedule.name": "constant"},
    )
    for number in range(options.members):
        add(
            "fine-tuned",
            number,
            cosine
            | {
                "initial_weights": str(folder / "start" / "00"),
                "initial_parts": ("*",),
                "epochs": options.epochs,
                "schedule.learning_rate": RATES[number % len(RATES)],
                "augment.flip": number // len(RATES) % 2 == 0,
            },
        )
    for number in range(options.members // 2):
        add("independent", number, cosine)
    add(
        "restarts",
        0,
        shared
        | {
            "schedule.name": "restarts",
            "schedule.every": options.epochs,
            "keep_checkpoints": whole,
            "checkpoint_every_steps": options.train // SETTINGS["batch_size"] * options.epochs,
        },
    )
    return runs


def repeat(folder: pathlib.Path, options: argparse.Namespace, repetition: int) -> None:
    """Trains and combines what is not yet trained and combined."""
    for place, config in plan(folder, options, repetition).items():
        _LOG.info("repetition %d: %s", repetition, place.relative_to(folder))
        loop.check(config)
        workdir.completed(loop.run, config, place)
    for group, methods in METHODS.items():
        for method in methods:
            if not (folder / "combined" / group / method / "results.json").exists():
                combine.run(
                    [str(folder / group / "*")], method, folder / "combined" / group / method
                )


def collect(folder: pathlib.Path, options: argparse.Namespace) -> list[dict]:
    """One repetition's rows; accuracies in percent, and gains in points over the mean of the single networks that a method stands
    beside: its own, for snapshots the independent ones, and for the moving average the last iterate of its run."""
    read = lambda group, method: json.loads(
        (folder / "combined" / group / method / "results.json").read_text()
    )
    accuracy = lambda error: 100 * (1 - error)
    whole, rows, singles = options.start_epochs + options.epochs, [], {}
    for group, epochs in (
        ("fine-tuned", whole),
        ("independent", whole),
        ("start", options.start_epochs),
    ):
        found = read(group, METHODS[group][0])
        # Of the start, whose checkpoints are of one run, the last is what the average is compared with.
        singles[group] = accuracy(
            found["individual"][-1]["test"]["error"]
            if group == "start"
            else found["mean_error"]["test"]
        )
        rows.append(
            {
                "group": group,
                "method": "last iterate" if group == "start" else "single, mean",
                "accuracy": singles[group],
                "gain": 0.0,
                "epochs": epochs,
                "passes": 1,
                "ratio": 1.0,
                "ingredients": 1,
            }
        )
    training = {
        "fine-tuned": options.start_epochs + options.members * options.epochs,
        "independent": options.members // 2 * whole,
        "restarts": whole,
        "start": options.start_epochs,
    }
    for group, methods in METHODS.items():
        for method in methods:
            found = read(group, method)
            reached = accuracy(found["test"]["error"])
            rows.append(
                {
                    "group": group,
                    "method": method,
                    "accuracy": reached,
                    "gain": reached - singles.get(group, singles["independent"]),
                    "epochs": training[group],
                    "passes": found["forward_passes"],
                    "ratio": found["seconds_per_image"]["ratio"],
                    "ingredients": len(found["ingredients"]),
                }
            )
    return sorted(rows, key=lambda row: list(METHODS).index(row["group"]))


def summary(values: list[float]) -> dict:
    """Mean, median, n and, from two values on, the sample standard deviation and the ends of the mean's 95 % interval (Student's t)."""
    mean, n, half = float(np.mean(values)), len(values), tables.half_width(values)
    std = float(np.std(values, ddof=1)) if n > 1 else None
    return {
        "mean": mean,
        "median": float(np.median(values)),
        "std": std,
        "n": n,
        "low": mean - half,
        "high": mean + half,
    }


def show(found: dict) -> str:
    return f"{found['mean']:.2f}" + ("" if found["std"] is None else f" ± {found['std']:.2f}")


def judge(found: dict) -> str:
    """What the 95 % interval says of "the mean is more than zero"."""
    return (
        "holds"
        if found["low"] > 0
        else "does not hold"
        if found["high"] < 0
        else f"is not decided by n={found['n']}"
    )


def verdicts(of: dict, options: argparse.Namespace) -> list[str]:
    """Sentences on the lecture's statements; `of[group, method]` are the rows of all repetitions, "gain" and the like summarized."""
    gain, ratio, passes = (
        lambda group, method, key=key: of[group, method][key] for key in ("gain", "ratio", "passes")
    )
    independent, soups = (
        gain("independent", "ensemble"),
        ("uniform", "greedy", "learned", "learned-by-layer"),
    )
    about = "is" if 1 <= independent["mean"] <= 3 else "is not"
    costs = {
        name: [ratio("fine-tuned", name)["median"], passes("fine-tuned", name)["mean"]]
        for name in ("best", *soups, "ensemble")
    }
    constant = all(passes == 1 for name, (_, passes) in costs.items() if name != "ensemble")
    over_best = summary(
        [
            a - b
            for a, b in zip(
                of["fine-tuned", "greedy"]["values"], of["fine-tuned", "best"]["values"]
            )
        ]
    )
    over_soup = summary(
        [
            a - b
            for a, b in zip(
                of["fine-tuned", "ensemble"]["values"], of["fine-tuned", "greedy"]["values"]
            )
        ]
    )
    return [
        f'D7, "ensembling independent models gains about 2 %": {options.members // 2} gain {show(independent)} points. That they gain '
        f"{judge(independent)}; the mean {about} between 1 and 3.",
        f'D7, "snapshots of one run are a cheaper ensemble": {passes("restarts", "snapshot")["mean"]:.0f} of one run gain '
        f"{show(gain('restarts', 'snapshot'))} points over one independent network of the same length; a gain "
        f"{judge(gain('restarts', 'snapshot'))}.",
        f'D7, "Polyak averages improve on the last iterate": {show(gain("start", "polyak"))} points: {judge(gain("start", "polyak"))}.',
        f"D8, costs: soups take {'one forward pass' if constant else 'several forward passes'} and "
        f"{min(costs[name][0] for name in soups):.2f} to {max(costs[name][0] for name in soups):.2f} times one network's time, the "
        f"ensemble {costs['ensemble'][1]:.0f} passes and {costs['ensemble'][0]:.2f} times: O(1) against O(k) "
        f"{'holds' if constant and costs['ensemble'][1] == options.members else 'does not hold'}.",
        f"D8, accuracy: the greedy soup has {show(over_best)} points over the best on validation: that it is better {judge(over_best)}. "
        f"The ensemble has {show(over_soup)} points over the greedy soup: that it is better {judge(over_soup)}.",
        f"Soups need a common start: the average of independent networks has {show(of['independent', 'uniform']['accuracy'])} % of the "
        f"test set right (one of ten classes by chance: 10 %), and the greedy soup keeps "
        f"{of['independent', 'greedy']['ingredients']['mean']:.1f} of {options.members // 2} of them.",
    ]


def draw(of: dict):
    """Accuracy of every method, with each repetition, and the time that an image takes with it."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2, figsize=(10, 5.5), sharey=True, width_ratios=(2, 1), layout="constrained"
    )
    least = (
        min(
            found["accuracy"]["mean"]
            for (_, method), found in of.items()
            if method.startswith(("single", "last"))
        )
        - 2
    )
    colors = dict(zip(METHODS, ("C0", "C1", "C2", "C3")))
    for place, ((group, _), found) in enumerate(of.items()):
        if found["accuracy"]["mean"] < least:
            axes[0].text(
                least + 0.1,
                place,
                f"← {show(found['accuracy'])} %",
                va="center",
                color=colors[group],
            )
        else:
            axes[0].plot(
                found["values"],
                [place] * len(found["values"]),
                ".",
                color=colors[group],
                alpha=0.4,
            )
            axes[0].errorbar(
                found["accuracy"]["mean"],
                place,
                xerr=found["accuracy"]["std"],
                fmt="o",
                color=colors[group],
                capsize=3,
            )
        axes[1].barh(place, found["ratio"]["median"], color=colors[group])
    axes[0].set(
        xlabel="test accuracy, %: mean, standard deviation, repetitions", xlim=(least, None)
    )
    axes[0].set_yticks(range(len(of)), [f"{group}: {method}" for group, method in of])
    axes[0].invert_yaxis()
    axes[0].grid(axis="x", alpha=0.3)
    axes[1].set(xlabel="time of an image, single networks = 1")
    return figure


def write(folder: pathlib.Path, options: argparse.Namespace, repetitions: list[list[dict]]) -> str:
    """Writes the results, the report and the figure; returns the table and the verdicts."""
    of = {}
    for rows in zip(*repetitions):
        found = {
            key: summary([row[key] for row in rows])
            for key in ("accuracy", "gain", "epochs", "passes", "ratio", "ingredients")
        }
        of[rows[0]["group"], rows[0]["method"]] = found | {
            "values": [row["accuracy"] for row in rows]
        }
    figure = draw(of)
    workdir.write_figure(folder / "ensemble_vs_soup.png", figure)
    matplotlib.pyplot.close(figure)
    baseline = lambda method: method.startswith(("single", "last"))
    lines = [
        [
            group,
            method,
            f"{found['epochs']['mean']:.0f}",
            f"{found['passes']['mean']:.0f}",
            f"{found['ratio']['median']:.2f}",
            f"{found['ingredients']['mean']:.1f}",
            show(found["accuracy"]),
            "" if baseline(method) else show(found["gain"]),
            str(len(repetitions)),
        ]
        for (group, method), found in of.items()
    ]
    header = [
        "networks",
        "method",
        "training epochs",
        "forward passes",
        "time of an image",
        "ingredients",
        "accuracy, %",
        "gain, points",
        "n",
    ]
    told = "\n".join(f"- {sentence}" for sentence in verdicts(of, options)) + "\n"
    table = tables.table(header, lines)
    workdir.write_json(
        folder / "ensemble_vs_soup.json",
        {
            "options": {key: getattr(options, key) for key in _FIELDS},
            "repetitions": repetitions,
            "verdicts": verdicts(of, options),
        },
    )
    text = (
        f"# Ensembles against soups\n\n{options.model} on CIFAR-10: {options.train:,} training, {options.validation:,} validation and "
        f"10,000 test images; {options.members} networks fine-tuned for {options.epochs} epochs from a start of "
        f"{options.start_epochs}, {options.members // 2} independent ones of {options.start_epochs + options.epochs}, and snapshots "
        f"every {options.epochs} epochs. Mean ± sample standard deviation over repetitions, each with a start of its own; the time of "
        "an image is the median, in units of one network's. Gains are over the mean of the single networks, of snapshots over the "
        'independent ones, of the moving average (polyak) over the last iterate of its own run. "Holds" is said where the mean\'s '
        "95 % interval agrees.\n\n"
    )
    workdir.write(
        folder / "report.md", f"{text}{table}\n{told}\n![Accuracy and cost](ensemble_vs_soup.png)\n"
    )
    return f"{table}\n{told}"


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_data_dir()
    parser.add_workdir("runs/ensemble_vs_soup")
    parser.add_argument(
        "--model",
        default=SETTINGS["model"],
        help="a registered network for 32x32 images (default: %(default)s)",
    )
    parser.add_count("repetitions", 3, "how often all is done, with other seeds")
    parser.add_count("members", 8, "networks that are fine-tuned", 4)
    parser.add_count("train", 10_000, "training images", SETTINGS["batch_size"])
    parser.add_count("validation", 2_000, "images that methods choose by", 10)
    parser.add_count("start_epochs", 9, "epochs of the common start")
    parser.add_count("epochs", 3, "epochs of fine-tuning, and of a cycle")
    options = parser.parse_args(arguments)

    def work():
        if options.train + options.validation > 50_000:
            raise ValueError(
                f"train={options.train} and validation={options.validation} are more than CIFAR-10's 50000 training images"
            )
        folder = options.workdir.absolute()
        loop.check(
            next(iter(plan(folder, options, 0).values()))
        )  # the others begin with its parameters
        backend.start()
        workdir.prepare(
            folder,
            {
                "kind": "ensemble_vs_soup",
                "settings": SETTINGS,
                "rates": RATES,
                "ema_decay": EMA_DECAY,
                **{key: getattr(options, key) for key in _FIELDS},
            },
        )
        for repetition in range(options.repetitions):
            repeat(folder / f"repetition{repetition}", options, repetition)
        print(
            write(
                folder,
                options,
                [
                    collect(folder / f"repetition{number}", options)
                    for number in range(options.repetitions)
                ],
            )
        )

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
