"""Benchmarks in which every side is measured in the same run.

    python -m cnnjax.benchmark {cpu,gpu,layers,study,seeds,input} [--workdir FOLDER] [--rounds 9]
        [--only NAME ...] [--configurations 64] [--photographs FOLDER]

cpu     forward pass, training step (one call) and training (many steps in one call, where the
        side can: cnnjax) of five networks: cnnjax, the same networks on jax's own operations and
        gradients under the default XLA flags (stock), and PyTorch with channels last, eager and
        through torch.compile, which needs a C++ compiler
gpu     the same of large networks in bfloat16: cnnjax, PyTorch with autocast, eager and through
        torch.compile
layers  forward, input gradient and kernel gradient of the convolutions that networks are made of:
        cnnjax, stock, PyTorch, on the CPU
study   all readouts on features that are computed once, against one readout at a time with the
        encoder in every step
seeds   many seeds and learning rates of LeNet in one program, against one after the other
input   images a second that streams decode from JPEGs of 500 x 375, with several numbers of worker
        processes, against Pillow in a loop, PyTorch's DataLoader (where it is installed) and
        ResNet-50's training step on this device

The first three need PyTorch and torchvision. Each of their sides is a process of its own, since
the flags of a process cannot be changed; the processes take turns, so that a drift of the
machine's speed meets all of them. Inputs are random numbers, except those of `input`. Writes
report.md and benchmark.json.
"""

import importlib.metadata
import os
import pathlib
import shutil
import sys

from cnnjax.benchmark.cases import LAYERS, NETWORKS, SIDES
from cnnjax.data import photographs
from cnnjax.runtime import backend, command, tables, workdir

WHAT = ("cpu", "gpu", "layers", "study", "seeds", "input")
_LECTURE_EPOCH = "9 s on a GTX 1080 Ti"  # the ConvNet's, 50,000 images, as the lecture has it


def check(what: str, only: list[str]) -> None:
    """Checks arguments, and that every side can be measured: one side's numbers say nothing.

    Raises `ValueError`.
    """
    names = LAYERS if what == "layers" else NETWORKS.get(what, ())
    for name in only:
        if name not in names:
            choices = ", ".join(names) or f"nothing: {what} has no parts to choose from"
            raise ValueError(f"only={name!r} is not one of {choices}")
    if what not in SIDES:
        return
    try:
        import torch
        import torchvision  # noqa: F401  (its networks are built in the sides' processes)
    except (ImportError, RuntimeError) as error:  # RuntimeError: builds that do not fit each other
        raise ValueError(
            f"{what} compares with PyTorch, which cannot be imported ({error}): "
            "pip install torch torchvision"
        ) from error
    compiler = os.environ.get("CXX", "g++")
    if what == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"cpu compares with torch.compile, which needs a C++ compiler; {compiler!r} is not "
            "found: install g++, or set CXX"
        )
    if what == "gpu":
        import jax

        if jax.default_backend() != "gpu" or not torch.cuda.is_available():
            raise ValueError(
                f"gpu needs a GPU that both sides see: jax runs on {jax.default_backend()!r}, "
                f"torch.cuda.is_available() is {torch.cuda.is_available()}"
            )


# ------------------------------------------------------------------ tables


def _networks_table(rows: list[dict]) -> str:
    headings = [
        "network",
        "batch",
        "parameters",
        "pass",
        "side",
        "ms",
        "range",
        "over cnnjax",
        "img/s",
        "GFLOP/s",
        "of peak, %",
        "step's memory, MB",
        "compiled in, s",
    ]
    return tables.table(headings, [_network_cells(row) for row in rows])


def _network_cells(row: dict) -> list[str]:
    return [
        row["name"],
        str(row["batch"]),
        f"{row['parameters']:,}",
        row["pass"],
        row["side"],
        f"{row['ms']:.2f}",
        f"{row['min_ms']:.2f} to {row['max_ms']:.2f}",
        f"{row['over_cnnjax']:.2f}",
        f"{row['images_per_s']:,.0f}",
        f"{row['gflop_per_s']:,.0f}",
        f"{100 * row['utilisation']:.0f}",
        "" if row["memory_mb"] is None else f"{row['memory_mb']:,}",
        f"{row['compile_s']:.1f}",
    ]


def _layers_table(rows: list[dict]) -> str:
    """Makes a table with a line for each pass of a layer and a column for each side."""
    sides = SIDES["layers"]
    headings = [
        "convolution",
        "pass",
        *(f"{side}, ms" for side in sides),
        *(f"{side} / cnnjax" for side in sides[1:]),
        "GFLOP/s",
        "of peak, %",
    ]
    lines = []
    for start in range(0, len(rows), len(sides)):
        ours, *others = rows[start : start + len(sides)]
        lines.append(
            [
                ours["name"],
                ours["pass"],
                *(f"{row['ms']:.3f}" for row in (ours, *others)),
                *(f"{row['over_cnnjax']:.2f}" for row in others),
                f"{ours['gflop_per_s']:,.0f}",
                f"{100 * ours['utilisation']:.0f}",
            ]
        )
    return tables.table(headings, lines)


# ------------------------------------------------------------------ benchmarks


def compare_sides(what: str, rounds: int, only: list[str], save) -> None:
    """Measures networks or layers one by one, and saves the table after each."""
    from cnnjax.benchmark import turns

    cases = LAYERS if what == "layers" else NETWORKS[what]
    rows: list[dict] = []
    for name in only or cases:
        batch = LAYERS[name].batch if what == "layers" else NETWORKS[what][name]
        facts, times = turns.measure(what, SIDES[what], name, batch, rounds)
        rows += turns.rows_of(
            what=what,
            name=name,
            batch=batch,
            flops=_forward_flops(what, name, batch),
            facts=facts,
            times=times,
        )
        make_table = _layers_table if what == "layers" else _networks_table
        save(f"{_explain(what, rounds, rows)}\n\n{make_table(rows)}", rows)


def _forward_flops(what: str, name: str, batch: int) -> float:
    if what == "layers":
        return LAYERS[name].flops
    from cnnjax import summary
    from cnnjax.models import create_model

    table = summary.layers(create_model(name), batch=batch)
    return 2.0 * summary.totals(table)["macs"]


def _explain(what: str, rounds: int, rows: list[dict]) -> str:
    """Says how the rows of a table were measured."""
    import torch

    peaks = [row["peak_gflop_per_s"] for row in rows]
    text = (
        f"Median of {rounds} interleaved bursts, jaxlib {importlib.metadata.version('jaxlib')}, "
        f"PyTorch {torch.__version__}; a ratio above 1 means that cnnjax is faster. Peak: the "
        "fastest product of two large matrices on any side, "
        f"{min(peaks):,.0f} to {max(peaks):,.0f} GFLOP/s."
    )
    if what != "layers":
        text += " Operations: two per multiply-add of a kernel, a step three forward passes."
    for row in rows:
        if what == "gpu" and row["name"] == "convnet" and row["pass"] == "training":
            text += (
                f" The ConvNet's epoch, {row['side']}: {50_000 / row['images_per_s']:.2f} s "
                f"(in the lecture {_LECTURE_EPOCH})."
            )
    return text


def run_study(rounds: int, save) -> None:
    """Measures all readouts of the position study together against one at a time."""
    from cnnjax.benchmark import programs

    results = programs.study(rounds)
    seconds = results["seconds"]
    together = (
        f"{seconds['encode all']:.2f} (encoder, once) + {seconds['train all']:.2f} (all targets)"
    )
    one_target = (
        f"{results['steps']} x {seconds['encode a batch']:.2f} "
        f"(encoder, {results['batch']} images) + {seconds['train one']:.2f} (one target)"
    )
    table = tables.table(
        ["way", "arithmetic", "seconds"],
        [
            ["together", together, f"{results['together_s']:.1f}"],
            [
                "authors'",
                f"{results['targets']} x ({one_target})",
                f"{results['authors_way_s']:,.0f}",
            ],
        ],
    )
    save(
        f"{results['encoder']}, {results['images']} photographs of {results['size']} px, "
        f"{results['targets']} targets, {results['steps']} steps, one padding, one seed; medians "
        f"of {rounds} rounds.\n\n{table}\nThe authors' way takes {results['ratio']:,.0f} times as "
        "long; its sum is extrapolated from the parts measured.\n",
        results,
    )


def run_seeds(rounds: int, configurations: int, save) -> None:
    """Measures a training step of many networks in one program and one after the other."""
    from cnnjax.benchmark import programs

    rows = programs.seeds(rounds, configurations)
    lines = [
        [
            row["way"],
            f"{row['ms']:.1f}",
            f"{row['min_ms']:.1f} to {row['max_ms']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['compile_s']:.1f}",
        ]
        for row in rows
    ]
    table = tables.table(["way", "ms for all", "range", "faster by", "compiled in, s"], lines)
    save(
        f"A training step of {configurations} LeNets (seed x learning rate), batch "
        f"{rows[0]['batch']}; median of {rounds} rounds.\n\n{table}",
        rows,
    )


def run_input(rounds: int, folder: str, save) -> None:
    """Measures how fast images are read; saves the table after each round."""
    from cnnjax.benchmark import decoding

    headings = ["crops", "way", "processes", "img/s", "range", "to the loop", "to the step"]
    for results in decoding.measure(folder, rounds):
        lines = [
            [
                row["mode"],
                row["way"],
                str(row["workers"]),
                f"{row['images_per_s']:,.0f}",
                f"{row['min']:,.0f} to {row['max']:,.0f}",
                f"{row['over_loop']:.2f}",
                f"{row['over_step']:.2f}",
            ]
            for row in results["rows"]
        ]
        save(
            f"JPEGs of {decoding.MEAN_PIXELS:,} pixels and {results['kilobytes']} kB, made of "
            f"{results['photographs']} photographs, as crops of {decoding.SIZE} px; ResNet-50's "
            f"training step takes {results['step_images_per_s']:,.1f} img/s in batches of "
            f"{results['step_batch']}. Median of {results['rounds']} rounds; ratios are of img/s "
            f"in the same round.\n\n{tables.table(headings, lines)}",
            results,
        )


# ------------------------------------------------------------------ the command


def _work(options, folder: pathlib.Path) -> None:
    check(options.what, options.only)
    if options.what == "input":
        photographs.list_photographs(options.photographs)
    backend.start()
    folder.mkdir(parents=True, exist_ok=True)
    device = backend.describe()

    def save(text, results):
        first = ", ".join(device["devices"][:1])
        title = f"# Benchmark: {options.what}\n\n{first}, {device['cpus']} CPU cores. "
        record = {"what": options.what, "environment": device, "results": results}
        workdir.write(folder / "report.md", title + text)
        workdir.write_json(folder / "benchmark.json", record)

    if options.what in SIDES:
        compare_sides(options.what, options.rounds, options.only, save)
    elif options.what == "study":
        run_study(options.rounds, save)
    elif options.what == "input":
        run_input(options.rounds, options.photographs, save)
    else:
        run_seeds(options.rounds, options.configurations, save)
    print((folder / "report.md").read_text())


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(prog="python -m cnnjax.benchmark", description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument(
        "--workdir", type=command.path, help="where to write (default: runs/benchmark_WHAT)"
    )
    parser.add_count("rounds", 9, "turns of each side")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="networks or layers (default: all)"
    )
    parser.add_count("configurations", 64, "of seeds; 4 suffice on a CPU")
    parser.add_photographs()
    options = parser.parse_args(arguments)
    if options.what in ("cpu", "layers"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # also where there is a GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share the device
    folder = options.workdir or pathlib.Path("runs") / f"benchmark_{options.what}"
    return command.run(lambda: _work(options, folder))


if __name__ == "__main__":
    sys.exit(main())
