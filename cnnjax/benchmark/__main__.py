"""Benchmark cnnjax against stock Flax layers, PyTorch and oneDNN, all in the same run.

    python -m cnnjax.benchmark {cpu,gpu,layers,compile,study,seeds,input} [--workdir FOLDER]
        [--rounds 9] [--only NAME ...] [--sides SIDE ...] [--configurations 64]
        [--photographs FOLDER]

cpu     forward pass, training step (one call) and training (many steps in one call, where the
        side can: cnnjax) of five networks: cnnjax, the same networks on jax's own operations and
        gradients under the default XLA flags (stock), and PyTorch with channels last, eager and
        through torch.compile, which needs a C++ compiler
gpu     the same of large networks in bfloat16: cnnjax, PyTorch with autocast, eager and through
        torch.compile
layers  forward, input gradient and kernel gradient of the convolutions that networks are made of:
        cnnjax, stock, PyTorch, on the CPU
compile seconds that tracing and compiling the training step of a network takes: cnnjax, stock, on
        the CPU
study   all readouts on features that are computed once, against one readout at a time with the
        encoder in every step
seeds   many seeds and learning rates of LeNet in one program, against one after the other
input   images per second that streams decode from JPEGs of 500 x 375, with several numbers of
        worker processes, against Pillow in a loop, PyTorch's DataLoader (where it is installed) and
        ResNet-50's training step on this device

Each side of the first four is a process of its own, since the flags of a process cannot be changed;
the processes take turns, so that changes in the machine's speed affect all sides alike. `--sides`
chooses the sides. `torch` and `torch.compile` need PyTorch and torchvision. `cpu` and `layers` have
one more side, which is measured only if it is named: oneDNN, which is cnnjax with the convolutions
of that library. The environment variable ONEDNN_LIBRARY names the library's file (libdnnl.so.3).
Under `cpu` and `compile`, `--only` takes every network; those that are not measured by default get
batches of 8. Inputs are random numbers, except those of `study` and `input`, which take
`--photographs`. Writes report.md and benchmark.json. A folder belongs to one set of options: the
same command measures anew, and another is refused.
"""

import importlib.metadata
import os
import pathlib
import shutil
import statistics
import sys

from cnnjax.benchmark.cases import (
    BATCH,
    LAYERS,
    MORE_SIDES,
    NETWORKS,
    ONEDNN_LIBRARY,
    SIDES,
    SPECIFICATIONS,
)
from cnnjax.data import photographs
from cnnjax.runtime import backend, command, files, host, tables, workdir

WHAT = ("cpu", "gpu", "layers", "compile", "study", "seeds", "input")
# Options that only these benchmarks use.
_USED_BY = {"configurations": ("seeds",), "photographs": ("study", "input")}
_CONFIGURATIONS = 64
_LECTURE_EPOCH = "9 s on a GTX 1080 Ti"  # the ConvNet's, 50,000 images, as the lecture states


def check(what: str, only: list[str], sides: list[str]) -> None:
    """Checks the arguments, and that every side can be measured.

    One side's numbers alone would say nothing. `sides` is empty if nothing is compared.

    Raises `ValueError` if a check fails.
    """
    names = _choices(what)
    for name in only:
        if name not in names:
            choices = ", ".join(names) or f"nothing: {what} has no parts to choose from"
            raise ValueError(f"only={name!r} is not one of {choices}")
    known = (*SIDES.get(what, ()), *MORE_SIDES.get(what, ()))
    for side in sides:
        if side not in known:
            choices = ", ".join(known) or f"nothing: {what} has no sides to choose from"
            raise ValueError(f"sides={side!r} is not one of {choices}")
    if sides and (sides[0] != "cnnjax" or len(sides) == 1 or len(set(sides)) < len(sides)):
        raise ValueError(
            f"sides={sides}: cnnjax comes first, and others are compared with it, each named once"
        )
    if what in ("cpu", "compile"):
        for name in only:
            _check_logits(name)
    if "oneDNN" in sides:
        _check_library(os.environ.get(ONEDNN_LIBRARY, ""))
    if any(side.startswith("torch") for side in sides):
        _check_torch(what, only)
    compiler = os.environ.get("CXX", "g++")
    if "torch.compile" in sides and what == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"cpu compares with torch.compile, which needs a C++ compiler; {compiler!r} is not "
            "found: install g++, or set CXX"
        )


def check_unused(options) -> None:
    """Raises `ValueError` if the chosen benchmark does not use an option that is set."""
    for name, benchmarks in _USED_BY.items():
        value = getattr(options, name)
        if value and options.what not in benchmarks:
            users = " and ".join(benchmarks)
            raise ValueError(f"{name}={value!r} is not used by {options.what}, only by {users}")


def _choices(what: str) -> tuple[str, ...]:
    """Lists the layers or networks that can be measured.

    Those measured by default come first.
    """
    if what == "layers":
        return tuple(LAYERS)
    if what in ("cpu", "compile"):
        from cnnjax.models import list_models

        return tuple(dict.fromkeys((*NETWORKS["cpu"], *list_models())))
    return tuple(NETWORKS.get(what, ()))


def _check_logits(name: str) -> None:
    """Raises `ValueError` if a network does not classify images: training needs a loss."""
    import jax

    from cnnjax.models import create_model
    from cnnjax.nn.parameters import eval_shape

    model = create_model(name)
    image = jax.ShapeDtypeStruct((1, *model.input_shape), "float32")
    logits, _ = eval_shape(model.init_with_output, jax.random.key(0), image)
    if logits.shape != (1, model.num_classes):
        raise ValueError(
            f"only={name!r} has outputs of shape {logits.shape[1:]}; expected a network with a "
            "logit for each class"
        )


def _check_torch(what: str, only: list[str]) -> None:
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: builds that do not fit each other
        raise ValueError(
            f"{what} compares with PyTorch, which cannot be imported ({error}): "
            "pip install torch torchvision"
        ) from error
    if what == "cpu":
        for name in only:
            if name not in SPECIFICATIONS and not hasattr(torchvision.models, name):
                raise ValueError(
                    f"only={name!r}: torchvision has no such network; --sides cnnjax stock "
                    "measures it"
                )
    if what == "gpu":
        import jax

        if jax.default_backend() != "gpu" or not torch.cuda.is_available():
            raise ValueError(
                f"gpu needs a GPU that both sides see: jax runs on {jax.default_backend()!r}, "
                f"torch.cuda.is_available() is {torch.cuda.is_available()}"
            )


def _check_library(path: str) -> None:
    from cnnjax.benchmark import onednn

    if not path:
        raise ValueError(f"oneDNN needs {ONEDNN_LIBRARY}, the path of libdnnl.so.3; it is not set")
    try:
        onednn.load(path)
    except OSError as error:
        raise ValueError(
            f"{ONEDNN_LIBRARY}={path!r} cannot be loaded as oneDNN: {error}"
        ) from error


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
    sides = tuple(dict.fromkeys(row["side"] for row in rows))
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


def compare_sides(what: str, rounds: int, only: list[str], sides: list[str], save) -> None:
    """Measures networks or layers one by one, and saves the table after each."""
    from cnnjax.benchmark import turns

    cases = LAYERS if what == "layers" else NETWORKS[what]
    rows: list[dict] = []
    for name in only or cases:
        batch = LAYERS[name].batch if what == "layers" else NETWORKS[what].get(name, BATCH)
        facts, times = turns.measure(what, sides, name, batch, rounds)
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
    from cnnjax.inspect import layers, totals
    from cnnjax.models import create_model

    table = layers(create_model(name), batch=batch)
    return 2.0 * totals(table)["macs"]


def _explain(what: str, rounds: int, rows: list[dict]) -> str:
    """Describes how the rows of a table were measured."""
    versions = f"jaxlib {importlib.metadata.version('jaxlib')}"
    if any(row["side"].startswith("torch") for row in rows):
        versions += f", PyTorch {importlib.metadata.version('torch')}"
    peaks = [row["peak_gflop_per_s"] for row in rows]
    text = (
        f"Median of {rounds} interleaved bursts, {versions}; a ratio above 1 means that cnnjax is "
        "faster. Peak: the fastest product of two large matrices on any side, "
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


def compare_compilation(rounds: int, only: list[str], sides: list[str], save) -> None:
    """Measures how long networks take to compile, and saves the table after each."""
    from cnnjax.benchmark import turns

    ours, *others = sides
    headings = [
        "network",
        "batch",
        *(f"{side}, s" for side in sides),
        *(f"{ours} / {side}" for side in others),
    ]
    rows: list[dict] = []
    lines = []
    for name in only or NETWORKS["cpu"]:
        batch = NETWORKS["cpu"].get(name, BATCH)
        _, times = turns.measure("compile", sides, name, batch, rounds)
        seconds = {side: statistics.median(times[side, "compile"]) / 1e3 for side in sides}
        ratios = {side: seconds[ours] / seconds[side] for side in others}
        rows.append({"name": name, "batch": batch, "seconds": seconds, "rounds": rounds})
        lines.append(
            [
                name,
                str(batch),
                *(f"{value:.1f}" for value in seconds.values()),
                *(f"{value:.2f}" for value in ratios.values()),
            ]
        )
        save(
            f"Seconds to trace and compile a training step, without a cache; median of {rounds} "
            f"rounds, jaxlib {importlib.metadata.version('jaxlib')}.\n\n"
            f"{tables.table(headings, lines)}",
            rows,
        )


def run_study(rounds: int, folder: str, save) -> None:
    """Measures all readouts of the position study together against one at a time."""
    from cnnjax.benchmark import programs

    results = programs.study(rounds, folder)
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
        f"{results['encoder']}, {results['images']} crops of {results['size']} px from "
        f"{results['photographs']} photographs, "
        f"{results['targets']} targets, {results['steps']} steps, one padding, one seed; medians "
        f"of {rounds} rounds.\n\n{table}\nThe authors' way takes {results['ratio']:,.0f} times as "
        "long; its sum is extrapolated from the parts measured.\n",
        results,
    )


def run_seeds(rounds: int, configurations: int, save) -> None:
    """Measures a training step of many networks in one program and one by one."""
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
    """Measures how fast images are read, and saves the table after each round."""
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
    sides = options.sides or [*SIDES.get(options.what, ())]
    check(options.what, options.only, sides)
    check_unused(options)
    if options.what in _USED_BY["photographs"]:
        photographs.find_photographs(options.photographs)
    backend.start()
    record = {
        "command": "benchmark",
        "what": options.what,
        "rounds": options.rounds,
        "only": options.only,
        "sides": sides,
        "configurations": options.configurations,
        "photographs": options.photographs,
    }
    with workdir.prepared(folder, record, unrecorded="benchmark.json"):
        _measure(options, sides, folder)
    print((folder / "report.md").read_text())


def _measure(options, sides: list[str], folder: pathlib.Path) -> None:
    """Measures, and writes report.md and benchmark.json."""
    device = host.describe()

    def save(text, results):
        first = ", ".join(device["devices"][:1])
        title = f"# Benchmark: {options.what}\n\n{first}, {device['cpus']} CPU cores. "
        record = {"what": options.what, "environment": device, "results": results}
        files.write(folder / "report.md", title + text)
        files.write_json(folder / "benchmark.json", record)

    if options.what == "compile":
        compare_compilation(options.rounds, options.only, sides, save)
    elif options.what in SIDES:
        compare_sides(options.what, options.rounds, options.only, sides, save)
    elif options.what == "study":
        run_study(options.rounds, options.photographs, save)
    elif options.what == "input":
        run_input(options.rounds, options.photographs, save)
    else:
        run_seeds(options.rounds, options.configurations or _CONFIGURATIONS, save)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(prog="python -m cnnjax.benchmark", description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument(
        "--workdir",
        type=command.path,
        help="where to write (default: runs/benchmark_WHAT, with a digest of changed options)",
    )
    parser.add_count("rounds", 9, "times that each side is measured")
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="networks or layers (default: the benchmark's own)",
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        action="extend",
        default=[],
        metavar="SIDE",
        help="cnnjax and what it is compared with (default: all but oneDNN)",
    )
    parser.add_argument(
        "--configurations",
        type=command.whole_number(1),
        help="configurations that `seeds` trains; 4 are enough on a CPU "
        f"(default: {_CONFIGURATIONS})",
    )
    parser.add_photographs()
    options = parser.parse_args(arguments)
    if options.what in ("cpu", "layers", "compile"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # also where there is a GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share the device
    folder = options.workdir or _default_folder(parser, options)
    return command.run(lambda: _work(options, folder))


def _default_folder(parser: command.Parser, options) -> pathlib.Path:
    """Returns runs/benchmark_WHAT, with a digest of the options that are not the defaults."""
    names = ("rounds", "only", "sides", "configurations", "photographs")
    values = {name: getattr(options, name) for name in names}
    changed = {name: value for name, value in values.items() if value != parser.get_default(name)}
    suffix = f"-{files.digest(changed)}" if changed else ""
    return pathlib.Path("runs", f"benchmark_{options.what}{suffix}")


if __name__ == "__main__":
    sys.exit(main())
