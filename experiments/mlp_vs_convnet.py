"""The lectures' networks on their data, beside what the lectures print: perceptrons against convolutional networks.

    python -m experiments.mlp_vs_convnet --workdir runs/mlp_vs_convnet --config.data_dir=FOLDER [--networks mlp1_cifar10 ...]

Runs the sweep over seeds of each network's configuration in configs/, and goes on where an earlier call stopped; further
arguments, such as --config.epochs=2, are given to every sweep. Writes report.md, comparison.json and curves.png of whatever is
finished. The perceptrons and LeNet take minutes per seed on two CPU cores, the ConvNet an hour.
"""

import contextlib
import json
import pathlib
import subprocess
import sys

import matplotlib
import numpy as np

from cnnjax.runtime import command, tables, workdir

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Training and test error in percent that the lecture prints (NUS, lectures 1 to 5); it has no such figures for the tutorial's network.
CLAIMS = {
    "mlp1_cifar10": (59, 65),
    "mlp3_cifar10": (0, 46),
    "convnet_cifar10": (0, 20),
    "lenet_mnist": (0, 0.78),
    "tutorial_cifar10": (None, None),
}
_HEADER = [
    "configuration",
    "parameters",
    "epochs",
    "train error, lecture",
    "measured",
    "test error, lecture",
    "measured",
    "n",
    "failed",
    "minutes a run",
]


def collect(folder: pathlib.Path) -> list[dict]:
    """The results of the runs in a sweep's folder that are finished."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]


def failures(folder: pathlib.Path) -> list[str]:
    """What the runs that failed in a sweep's folder said."""
    return [json.loads(path.read_text())["error"] for path in sorted(folder.glob("*/failure.json"))]


def compare(folder: pathlib.Path) -> list[dict]:
    """One row per network that has a finished or a failed run under `folder`; errors in percent."""
    rows = []
    for name, claim in CLAIMS.items():
        runs, failed = collect(folder / name), failures(folder / name)
        if not runs and not failed:
            continue
        row = {"network": name, "n": len(runs), "failed": failed}
        if runs:
            row |= {
                "parameters": runs[0]["parameters"],
                "epochs": runs[0]["final"]["epoch"],
                "minutes": float(np.mean([run["training_seconds"] for run in runs]) / 60),
                "curve": np.mean(
                    [[100 * entry["train_error"] for entry in run["history"]] for run in runs], 0
                ).tolist(),
            }
        for split, claimed in zip(("train", "test"), claim):
            errors = [100 * run["final"][f"{split}_error"] for run in runs]
            row[split] = {
                "claimed": claimed,
                "mean": float(np.mean(errors)) if runs else None,
                "std": float(np.std(errors, ddof=1)) if len(runs) > 1 else None,
            }
        rows.append(row)
    return rows


def write(folder: pathlib.Path, rows: list[dict]) -> str:
    """Writes the report and returns its table."""

    def shown(found):
        return (
            ""
            if found["mean"] is None
            else f"{found['mean']:.2f}" + ("" if found["std"] is None else f" ± {found['std']:.2f}")
        )

    claimed = lambda found: "" if found["claimed"] is None else f"{found['claimed']:g}"
    lines = [
        [
            row["network"],
            f"{row['parameters']:,}" if row["n"] else "",
            str(row.get("epochs", "")),
            *(
                cell
                for split in ("train", "test")
                for cell in (claimed(row[split]), shown(row[split]))
            ),
            str(row["n"]),
            str(len(row["failed"]) or ""),
            f"{row['minutes']:.1f}" if row["n"] else "",
        ]
        for row in rows
    ]
    table = tables.table(_HEADER, lines)
    told = "".join(f"\n{row['network']}: {error}\n" for row in rows for error in row["failed"][:1])
    workdir.write_json(folder / "comparison.json", rows)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for row in rows:
        if row["n"]:
            axes.plot(
                range(1, row["epochs"] + 1), row["curve"], label=f"{row['network']} (n={row['n']})"
            )
    axes.set(
        xlabel="epoch",
        ylabel="error on the epoch's training images, %",
        yscale="symlog",
        ylim=(0, 100),
    )
    axes.legend()
    workdir.write_figure(folder / "curves.png", figure)
    pyplot.close(figure)
    text = (
        "# Perceptrons against convolutional networks\n\nErrors in percent, mean ± sample standard deviation over seeds; the test set "
        "is scored once, at the end.\n\n"
    )
    workdir.write(folder / "report.md", f"{text}{table}{told}\n![Training errors](curves.png)\n")
    return table


def _run(words: list[str]) -> int:
    """Runs a command to its end, also through Ctrl-C, which it receives as well and is left the time to save at."""
    process = subprocess.Popen(words, cwd=ROOT)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/mlp_vs_convnet")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=CLAIMS,
        default=list(CLAIMS),
        help="configurations to run (default: all)",
    )
    options, more = parser.parse_known_args(arguments)
    folder = options.workdir.absolute()
    try:
        for name in options.networks:
            words = [
                sys.executable,
                "-m",
                "cnnjax.sweep",
                "--config",
                f"configs/{name}.py",
                "--workdir",
                str(folder / name),
                *more,
            ]
            if code := _run(words):
                return code  # the sweep has said why
        return 0
    finally:
        if rows := compare(folder):
            print(write(folder, rows))


if __name__ == "__main__":
    sys.exit(main())
