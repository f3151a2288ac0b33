"""The tables of Islam, Jia and Bruce (ICLR 2020, arXiv 2001.08248), each by one command, beside the
paper's numbers.

    python -m experiments.position_tables [main kernels depth stages readout_padding
        encoder_padding controls weights photographs] --workdir runs/tables [--photographs FOLDER]
        [--weights random|imagenet] [--trained NAME FILE [MODULE ...]] [--seeds 5]
        [--set KEY=VALUE ...]

All of them, if none is named. A table is a handful of studies (configs/posenet.py with a few keys
changed); those that are finished are not run again, and what an encoder gave is kept in `features/`
for the others. `--set` changes any key of that configuration for all of them. The paper's networks
have ImageNet weights; without any at hand the encoders have random ones, which is a question of its
own: `weights` puts both side by side, and `photographs` gives the readout 24, 96 and 384 of them to
be fitted to. ImageNet weights come from the Hugging Face hub, or for the networks named by
`--trained` from a safetensors file with torchvision's names, followed by the modules that it is
known to lack. Writes NAME.md and NAME.json.
"""

import argparse
import ast
import functools
import itertools
import pathlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import ml_collections

from cnnjax.position import study
from cnnjax.runtime import backend, command, tables, workdir
from configs import posenet


class Row(NamedTuple):
    """A line of a table: a study's keys, the row of its results that is shown, and what the paper
    prints for it, by target and data."""

    label: str
    changes: dict
    encoder: str
    padding: str
    paper: dict[tuple[str, str], tuple[float, float]]


def _grid(targets: str, data: str, text: str) -> dict[tuple[str, str], tuple[float, float]]:
    """The paper's "SPC/MAE" by target and data, read line by line: a line for each target."""
    return {
        (target, kind): tuple(map(float, cell.split("/")))
        for target, line in zip(targets.split(), text.strip().splitlines())
        for kind, cell in zip(data.split(), line.split())
    }


_ALL, _DATA = "H V G HS VS", "natural black white noise"


def _study(encoder: str = "vgg16", paddings: tuple[str, ...] = ("zeros",), **keys) -> dict:
    """A study's keys: one encoder, or none for the image alone, under these paddings with both
    readouts; a 3x3 readout unless told."""
    return {
        "encoders": (encoder,) if encoder else (),
        "paddings": paddings,
        "sgd_paddings": paddings,
        "kernel": 3,
    } | keys


def _natural(targets: str, text: str, **keys) -> tuple[dict, dict]:
    """A study on photographs only, and the paper's cells for it."""
    return {"targets": tuple(targets.split()), "data": ("natural",)} | keys, _grid(
        targets, "natural", text.replace(" ", "\n")
    )


def _rows() -> Iterator[tuple[str, Row]]:
    for label, encoder, shown, padding, text in (  # table 1
        (
            "PosENet",
            "vgg16",
            "posenet",
            "none",
            """
                .012/.251 .0/.251 .0/.251 .001/.251
                .131/.248 .0/.251 .0/.251 .053/.250
                -.001/.233 .0/.186 .0/.186 -.034/.214
                -.001/.712 -.055/.704 .0/.704 .023/.710
                .006/.723 .081/.709 .081/.709 .018/.714""",
        ),
        (
            "VGG-16",
            "vgg16",
            "vgg16",
            "zeros",
            """
                .742/.149 .751/.164 .873/.157 .591/.173
                .816/.129 .846/.146 .927/.138 .771/.150
                .814/.109 .842/.123 .898/.116 .762/.129
                .405/.556 .532/.583 .576/.574 .375/.573
                .374/.567 .538/.575 .437/.578 .526/.566""",
        ),
        (
            "ResNet-152",
            "resnet152",
            "resnet152",
            "zeros",
            """
                .933/.084 .987/.080 .994/.078 .973/.077
                .951/.083 .978/.069 .979/.072 .968/.074
                .936/.070 .953/.068 .964/.064 .971/.055
                .534/.528 .566/.518 .562/.515 .471/.530
                .520/.537 .574/.523 .593/.514 .523/.545""",
        ),
    ):
        yield "main", Row(label, _study(encoder), shown, padding, _grid(_ALL, _DATA, text))
    for table, key, value, shown, alone, vgg in (  # tables 2a and 2b
        (
            "depth",
            "depth",
            1,
            "layers: 1",
            ".012/.251 -.001/.233 -.001/.712",
            ".742/.149 .814/.109 .405/.556",
        ),
        (
            "depth",
            "depth",
            2,
            "layers: 2",
            ".056/.250 .067/.187 -.006/.628",
            ".797/.128 .828/.105 .483/.538",
        ),
        (
            "depth",
            "depth",
            3,
            "layers: 3",
            ".055/.250 .126/.186 .003/.628",
            ".830/.117 .835/.104 .491/.540",
        ),
        (
            "kernels",
            "kernel",
            1,
            "1x1",
            ".013/.251 .017/.188 -.004/.628",
            ".542/.196 .724/.127 .317/.576",
        ),
        (
            "kernels",
            "kernel",
            3,
            "3x3",
            ".012/.251 -.001/.233 -.001/.723",
            ".742/.149 .814/.109 .405/.556",
        ),
        (
            "kernels",
            "kernel",
            7,
            "7x7",
            ".060/.250 .068/.187 .002/.628",
            ".828/.120 .816/.111 .487/.532",
        ),
    ):
        for label, encoder, padding, text in (
            ("PosENet", "posenet", "none", alone),
            ("VGG-16", "vgg16", "zeros", vgg),
        ):
            keys, paper = _natural("H G HS", text, **{key: value})
            yield table, Row(f"{label}, {shown}", _study(**keys), encoder, padding, paper)
    for label, stages, text in (  # table 3
        ("f1", ("block1",), ".101/.249 .241/.182"),
        ("f2", ("block2",), ".344/.225 .404/.168"),
        ("f3", ("block3",), ".472/.203 .588/.146"),
        ("f4", ("block4",), ".610/.181 .653/.138"),
        ("f5", ("block5",), ".657/.177 .693/.135"),
        ("all", (), ".742/.149 .814/.109"),
    ):
        keys, paper = _natural("H G", text, stages=stages)
        yield "stages", Row(f"VGG-16, {label}", _study(**keys), "vgg16", "zeros", paper)
    for amount, text in (  # table 4, its first rows: on pixels from 0 to 1
        (0, ".012/.251 -.001/.233 -.001/.712"),
        (1, ".274/.239 .205/.184 .148/.608"),
        (2, ".397/.223 .380/.177 .214/.595"),
    ):
        keys, paper = _natural("H G HS", text, readout_padding=amount, pixels="unit")
        yield (
            "readout_padding",
            Row(f"PosENet, padded by {amount}", _study("", **keys), "posenet", "none", paper),
        )
    for padding, text in (
        ("zeros", ".742/.149 .814/.109 .405/.556"),
        ("none", ".381/.223 .359/.174 .011/.628"),
    ):  # its last rows
        keys, paper = _natural("H G HS", text)
        yield (
            "encoder_padding",
            Row(
                f"VGG-16, {padding}",
                _study(paddings=("zeros", "none"), **keys),
                "vgg16",
                padding,
                paper,
            ),
        )
    keys = {"coordinates": True, "targets": _ALL.split(), "data": ("natural", "black"), "kernel": 1}
    yield "controls", Row("image and coordinates", _study("", **keys), "coordinates", "none", {})
    for label, keys in (
        ("as it is", {}),
        ("mirrored photographs", {"mirrored": True}),
        ("shuffled targets", {"shuffled": True}),
    ):
        keys |= {"targets": ("H", "V", "G"), "data": ("natural", "black"), "kernel": 1}
        for padding in ("zeros", "none"):  # not in the paper
            yield (
                "controls",
                Row(
                    f"VGG-16, {padding}, {label}",
                    _study(paddings=("zeros", "none"), **keys),
                    "vgg16",
                    padding,
                    {},
                ),
            )
    for name, origin, padding in itertools.product(
        ("squeezenet1_1", "mobilenet_v2", "resnet18"),
        ("random", "imagenet"),
        ("zeros", "none", "reflect"),
    ):  # not in the paper, but for VGG-16
        keys = {
            "targets": ("H", "V", "G"),
            "data": ("natural", "black", "white"),
            "weights": origin,
        }
        yield (
            "weights",
            Row(
                f"{name}, {origin}, {padding}",
                _study(name, ("zeros", "none", "reflect"), **keys),
                name,
                padding,
                {},
            ),
        )
    fills = ("zeros", "none", "reflect", "circular")
    for count, origin, padding in itertools.product(
        (24, 96, 384), ("random", "imagenet"), fills
    ):  # not in the paper
        keys = {
            "targets": ("H", "G"),
            "data": ("natural", "black"),
            "weights": origin,
            "kernel": 1,
            "sgd_paddings": (),
            "n_train": count,
            "n_held_out": 64,
            "n_test": 48,
        }
        label = f"resnet18, {origin}, {count} photographs, {padding}"
        yield "photographs", Row(label, _study("resnet18", fills, **keys), "resnet18", padding, {})


TABLES = defaultdict(list)
for _name, _row in _rows():
    TABLES[_name].append(_row)


def configure(row: Row, options: argparse.Namespace) -> ml_collections.ConfigDict:
    """The configuration of a row's study. Raises `ValueError` for a key that it does not have or a
    value of another type."""
    config = posenet.get_config()
    config.photographs, config.weights, config.seeds = (
        options.photographs,
        options.weights,
        options.seeds,
    )
    for key, value in row.changes.items():
        config[key] = value
    name = next(iter(config.encoders), None)
    if row.changes.get("weights") != "random" and name in options.trained:
        config.weights, config.missing = options.trained[name]
    for setting in options.set:
        key, _, text = setting.partition("=")
        if key not in config:
            raise ValueError(
                f"--set {setting}: {key!r} is not a key of configs/posenet.py; it has "
                f"{', '.join(sorted(config))}"
            )
        try:
            config[key] = text if isinstance(config[key], str) else ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(
                f"--set {setting}: {text!r} is not a value for {key}, which is {config[key]!r}"
            ) from error
    return config.lock()


def tabulate(rows: list[Row], found: list[dict]) -> tuple[str, list[dict]]:
    """The table beside the paper's numbers, as text and as values."""
    lines, values = [], []
    for row, result in zip(rows, found):
        mine = [
            entry
            for entry in result["rows"]
            if (entry["encoder"], entry["padding"]) == (row.encoder, row.padding)
        ]
        for target, data in dict.fromkeys((entry["target"], entry["data"]) for entry in mine):
            paper = row.paper.get((target, data))
            if paper and target in ("HS", "VS"):
                paper = (
                    paper[0],
                    paper[1] / 2,
                )  # the paper's stripes reach from -1 to 1, ours from 0
            cells = []
            for readout in ("sgd", "exact"):
                kind = target, data, readout, row.changes.get("depth", 1)
                entry = next(
                    (e for e in mine if (e["target"], e["data"], e["readout"], e["depth"]) == kind),
                    None,
                )
                if entry is None:
                    cells.append("")
                    continue
                cells.append(
                    f"{entry['spc']:.3f} ± {entry['spc_std'] or 0:.3f} / {entry['mae']:.3f} / "
                    f"{entry['r2']:.2f}"
                )
                values.append(entry | {"row": row.label, "paper": paper})
            printed = f"{paper[0]:.3f} / {paper[1]:.3f}" if paper else ""
            lines.append(
                [
                    row.label,
                    pathlib.Path(mine[0]["weights"]).name,
                    target,
                    data,
                    printed,
                    *cells,
                    str(mine[0]["n_seeds"]),
                ]
            )
    header = [
        "row",
        "weights",
        "target",
        "data",
        "paper: SPC / MAE",
        "SGD: SPC ± std / MAE / R2",
        "exact: SPC ± std / MAE / R2",
        "seeds",
    ]
    return tables.table(header, lines), values


def write(name: str, options: argparse.Namespace, table: str, values: list[dict]) -> str:
    """Writes a table's values and its page; returns the table."""
    workdir.write_json(options.workdir / f"{name}.json", values)
    text = (
        f"# {name}\n\nStd is over images and seeds together; stripes span 0 to 1, for which the "
        "paper's errors are halved. SPC is "
        "blind to amplitude: read R2, the share of variance explained, beside it.\n\n"
    )
    workdir.write(options.workdir / f"{name}.md", text + table)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_argument("tables", nargs="*", choices=TABLES, help="default: all")
    parser.add_workdir("runs/tables")
    parser.add_photographs()
    parser.add_argument(
        "--weights",
        default="random",
        choices=("random", "imagenet"),
        help="where a row names none (default: %(default)s)",
    )
    parser.add_trained()
    parser.add_count("seeds", 5, "of weights, photographs and crops")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="changes to every study's configuration",
    )
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        encoders = {
            name for row in itertools.chain(*TABLES.values()) for name in row.changes["encoders"]
        }
        if unread := sorted(set(options.trained) - encoders):
            raise ValueError(
                f"trained={unread[0]} is not an encoder of the tables, which are "
                f"{', '.join(sorted(encoders))}"
            )
        studies = {
            name: [configure(row, options) for row in TABLES[name]]
            for name in options.tables or TABLES
        }
        different = {
            workdir.digest(config.to_dict()): config
            for config in itertools.chain(*studies.values())
        }  # rows share studies
        for config in different.values():
            study.check(config)
        run = functools.partial(study.run, memory=options.workdir / "features")
        result = functools.cache(
            lambda key: workdir.completed(run, different[key], options.workdir / key)
        )
        for name, configs in studies.items():
            found = [result(workdir.digest(config.to_dict())) for config in configs]
            print(write(name, options, *tabulate(TABLES[name], found)))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
