"""Do the lectures' perceptrons and ConvNets reach the errors that are printed?

    python -m experiments.mlp_vs_convnet --workdir runs/mlp_vs_convnet \\
        --config.data_dir=FOLDER [--networks mlp1_cifar10 ...] [--config.KEY=VALUE ...]

For each network, runs the sweep over seeds of its configuration in configs/, and compares the
errors with those that the lectures print. Every --config.KEY=VALUE, such as --config.epochs=2, is
passed on to every sweep. The perceptrons and LeNet take minutes per seed on two CPU cores, the
ConvNet an hour.

The same command continues an interrupted call. Writes report.md, comparison.json, and curves.png of
all finished runs.
"""

import pathlib
import signal
import subprocess
import sys

import numpy as np
from matplotlib.figure import Figure

from cnnjax.runtime import command, files, signals, tables, workdir

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Training and test errors in percent, as the lecture prints them (NUS CS5242, lecture 8). The
# tutorial prints no errors for its network.
CLAIMS = {
    "mlp1_cifar10": (59, 65),
    "mlp3_cifar10": (0, 46),
    "convnet_cifar10": (0, 20),
    "lenet_mnist": (0, 0.78),
    "tutorial_cifar10": (None, None),
}


# --- Training -------------------------------------------------------------------------------------


def bind(folder: pathlib.Path) -> None:
    """Records in the work directory that it is this command's.

    It is not claimed while the sweeps run, which several processes may share.

    Raises `ValueError` if the folder holds something else, such as a training run.
    """
    record = {"command": "mlp_vs_convnet"}
    # Nothing is computed in this process, which must not take the sweeps' devices.
    with workdir.prepared(folder, record, computes=False, unrecorded="comparison.json"):
        pass


def run_sweep(name: str, folder: pathlib.Path, arguments: list[str]) -> int:
    """Runs the sweep of one configuration in its own process; returns the exit code.

    The sweep gets the signals that stop this process, and saves. If a signal ended it, the code is
    a shell's: 128 and the number of the signal.
    """
    words = [sys.executable, "-m", "cnnjax.sweep", "--config", f"configs/{name}.py"]
    process = subprocess.Popen([*words, "--workdir", str(folder), *arguments], cwd=ROOT)
    is_stopped = False

    def forward(number, frame):
        nonlocal is_stopped
        is_stopped = True
        # Ctrl-C also reaches the sweep. Its second SIGINT would end it before it has saved.
        if number != signal.SIGINT:
            process.send_signal(number)

    with signals.catch_stop_signals(forward):
        code = process.wait()
    # The code is -N if signal N ended the process.
    if code < 0:
        return 128 - code
    # The sweep may have ended at the same moment: the next one must not begin.
    if is_stopped and code in (0, 1):
        return command.RESUMABLE
    return code


# --- Results --------------------------------------------------------------------------------------


def read_failures(folder: pathlib.Path) -> list[str]:
    """Returns the reasons for which runs of a sweep failed, or were refused, from its table."""
    table = folder / "sweep.json"
    if not table.exists():
        return []
    return [reason for row in files.read_json(table)["rows"] for reason in row["failed"]]


def compare(folder: pathlib.Path) -> list[dict]:
    """Returns a row for each network with a finished or failed run; errors in percent."""
    rows = []
    for name, printed in CLAIMS.items():
        paths = sorted((folder / name).glob("*/results.json"))
        runs = [files.read_json(path) for path in paths]
        failed = read_failures(folder / name)
        if not runs and not failed:
            continue
        row = {"network": name, "n": len(runs), "failed": failed}
        if runs:
            row |= describe(runs)
        for split, claimed in zip(("train", "test"), printed):
            errors = [100 * run["final"][f"{split}_error"] for run in runs]
            row[split] = {"claimed": claimed, "errors": errors}
        rows.append(row)
    return rows


def describe(runs: list[dict]) -> dict:
    """Summarizes the runs of one network: size, epochs, mean time, and mean learning curve.

    Runs that stop early have fewer epochs than others: "epochs" and "fewest_epochs" are those of
    the longest and the shortest run, and the curve's mean of an epoch is over the runs that reached
    it.
    """
    curves = []
    for run in runs:
        curves.append([100 * epoch["train_error"] for epoch in run["history"]])
    epochs = [len(curve) for curve in curves]
    return {
        "parameters": runs[0]["parameters"],
        "epochs": max(epochs),
        "fewest_epochs": min(epochs),
        "minutes": float(np.mean([run["training_seconds"] for run in runs]) / 60),
        "curve": [float(np.mean(errors)) for errors in by_epoch(curves)],
    }


def by_epoch(curves: list[list[float]]) -> list[list[float]]:
    """Returns, for each epoch, the values of the curves that reach it."""
    longest = max(len(curve) for curve in curves)
    values = []
    for epoch in range(longest):
        values.append([curve[epoch] for curve in curves if epoch < len(curve)])
    return values


# --- Report ---------------------------------------------------------------------------------------


def show_claimed(error: dict) -> str:
    if error["claimed"] is None:
        return ""
    return f"{error['claimed']:g}"


def show_measured(error: dict) -> str:
    if not error["errors"]:
        return ""
    return tables.spread(error["errors"], 2)


def tabulate(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        parameters = ""
        epochs = ""
        minutes = ""
        if row["n"]:
            parameters = f"{row['parameters']:,}"
            epochs = str(row["epochs"])
            if row["fewest_epochs"] < row["epochs"]:
                epochs = f"{row['fewest_epochs']} to {epochs}"
            minutes = f"{row['minutes']:.1f}"
        errors = []
        for split in ("train", "test"):
            errors += [show_claimed(row[split]), show_measured(row[split])]
        failed = ""
        if row["failed"]:
            failed = str(len(row["failed"]))
        lines.append([row["network"], parameters, epochs, *errors, str(row["n"]), failed, minutes])
    header = ["configuration", "parameters", "epochs", "train error, lecture", "measured"]
    header += ["test error, lecture", "measured", "n", "failed", "minutes a run"]
    return tables.table(header, lines)


def draw(rows: list[dict]) -> Figure:
    """Draws the learning curves."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for row in rows:
        if row["n"]:
            epochs = range(1, row["epochs"] + 1)
            axes.plot(epochs, row["curve"], label=f"{row['network']} (n={row['n']})")
    axes.set(xlabel="epoch", ylabel="error on the epoch's training images, %")
    axes.set(yscale="symlog", ylim=(0, 100))
    axes.legend()
    return figure


def write_report(folder: pathlib.Path, rows: list[dict]) -> None:
    table = tabulate(rows)
    failures = ""
    for row in rows:
        if row["failed"]:
            failures += f"\n{row['network']}: {row['failed'][0]}\n"
    text = f"""# Perceptrons against convolutional networks

Errors in percent, mean ± sample standard deviation over seeds; the test set is scored once, at the
end.

{table}{failures}
![Training errors](curves.png)
"""
    files.write_json(folder / "comparison.json", rows)
    files.write_figure(folder / "curves.png", draw(rows))
    files.write(folder / "report.md", text)
    print(table)


def report(folder: pathlib.Path) -> None:
    """Writes and prints the comparison of all finished runs."""
    rows = compare(folder)
    if rows:
        write_report(folder, rows)


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(
        prog="python -m experiments.mlp_vs_convnet",
        description=__doc__,
        epilog="Every --config.KEY=VALUE is passed on to every sweep.",
    )
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
    code = command.run(lambda: bind(folder))
    if code:
        return code
    for name in options.networks:
        # A sweep that ends with an error has already printed the reason. If only some of its runs
        # have failed, with the code 1, the next network is trained all the same.
        result = run_sweep(name, folder / name, more)
        code = max(code, result)
        # Runs that the sweep refuses to average must not be averaged here.
        if result == 2:
            return result
        if result not in (0, 1):
            break
    # The report is written after failures, too, because it names them.
    report_code = command.run(lambda: report(folder))
    if report_code:
        return report_code
    return code


if __name__ == "__main__":
    sys.exit(main())
