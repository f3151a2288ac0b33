"""The tables of Islam, Jia and Bruce (ICLR 2020): how much position do CNNs hold?

    python -m experiments.position_tables [main kernels depth stages readout_padding
        encoder_padding controls weights photographs] --workdir runs/tables [--photographs FOLDER]
        [--weights random|imagenet] [--trained NAME FILE [MODULE ...]] [--seeds 5]
        [--set KEY=VALUE ...]

Without names, the command makes all tables. The paper's numbers (arXiv 2001.08248) stand beside the
measured ones. Each table consists of several studies: runs of configs/posenet.py with a few keys
changed. Finished studies are not run again, and the features of an encoder are cached in
`features/` for the other studies. `--set` changes a key of configs/posenet.py for all studies; keys
that distinguish the rows of a table are refused.

The paper's networks have ImageNet weights. Here, weights are random unless an option says
otherwise. The table `weights` compares random and ImageNet weights, and `photographs` fits the
readout to 24, 96 and 384 photographs. ImageNet weights come from PyTorch's cache, the Hugging Face
hub, or torchvision's server. For the networks named by `--trained`, they come from a safetensors or
.pth file with torchvision's names, followed by the modules that the file lacks. Writes NAME.md and
NAME.json, and replaces them only if their settings were the same, the number of seeds aside.
"""

import argparse
import collections
import functools
import itertools
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import ml_collections

from cnnjax.data import photographs
from cnnjax.position import study as position_study
from cnnjax.position.targets import TARGETS
from cnnjax.runtime import backend, command, configuration, files, tables, workdir
from cnnjax.study import select, unique
from configs import posenet

READOUTS = ("sgd", "exact")

# SPC (Spearman's rank correlation) and MAE (mean absolute error), as printed in the paper.

# Table 1: lines H, V, G, HS, VS; columns of these kinds of images.
_KINDS = ("natural", "black", "white", "noise")
_POSENET = """
     .012/.251  .0/.251   .0/.251   .001/.251
     .131/.248  .0/.251   .0/.251   .053/.250
    -.001/.233  .0/.186   .0/.186  -.034/.214
    -.001/.712 -.055/.704 .0/.704   .023/.710
     .006/.723  .081/.709 .081/.709 .018/.714"""
_VGG16 = """
    .742/.149 .751/.164 .873/.157 .591/.173
    .816/.129 .846/.146 .927/.138 .771/.150
    .814/.109 .842/.123 .898/.116 .762/.129
    .405/.556 .532/.583 .576/.574 .375/.573
    .374/.567 .538/.575 .437/.578 .526/.566"""
_RESNET152 = """
    .933/.084 .987/.080 .994/.078 .973/.077
    .951/.083 .978/.069 .979/.072 .968/.074
    .936/.070 .953/.068 .964/.064 .971/.055
    .534/.528 .566/.518 .562/.515 .471/.530
    .520/.537 .574/.523 .593/.514 .523/.545"""
# The other tables are on photographs only; their cells are H, G and HS, or H and G.
# Tables 2a and 2b: PosENet (the image alone) and VGG-16, by layers and kernel of the readout.
_DEPTHS = {
    1: (".012/.251 -.001/.233 -.001/.712", ".742/.149 .814/.109 .405/.556"),
    2: (".056/.250 .067/.187 -.006/.628", ".797/.128 .828/.105 .483/.538"),
    3: (".055/.250 .126/.186 .003/.628", ".830/.117 .835/.104 .491/.540"),
}
_KERNELS = {
    1: (".013/.251 .017/.188 -.004/.628", ".542/.196 .724/.127 .317/.576"),
    3: (".012/.251 -.001/.233 -.001/.723", ".742/.149 .814/.109 .405/.556"),
    7: (".060/.250 .068/.187 .002/.628", ".828/.120 .816/.111 .487/.532"),
}
# Table 3: one block of VGG-16, or all blocks.
_STAGES = {
    "f1": (("block1",), ".101/.249 .241/.182"),
    "f2": (("block2",), ".344/.225 .404/.168"),
    "f3": (("block3",), ".472/.203 .588/.146"),
    "f4": (("block4",), ".610/.181 .653/.138"),
    "f5": (("block5",), ".657/.177 .693/.135"),
    "all": ((), ".742/.149 .814/.109"),
}
# Table 4, first rows: zeros around an image with pixels from 0 to 1.
_READOUT_PADDINGS = {
    0: ".012/.251 -.001/.233 -.001/.712",
    1: ".274/.239 .205/.184 .148/.608",
    2: ".397/.223 .380/.177 .214/.595",
}
# Table 4, last rows: VGG-16 with and without padding.
_ENCODER_PADDINGS = {
    "zeros": ".742/.149 .814/.109 .405/.556",
    "none": ".381/.223 .359/.174 .011/.628",
}


# --- Tables ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      label: the name of the row.
      changes: the changes of its study to configs/posenet.py.
      paper: the published SPC and MAE by target and data.
      encoder, padding: the part of the study's results that the row shows.
    """

    label: str
    changes: dict
    paper: dict[tuple[str, str], tuple[float, float]]
    encoder: str = "vgg16"
    padding: str = "zeros"


def published(
    text: str, targets: tuple[str, ...], data: tuple[str, ...]
) -> dict[tuple[str, str], tuple[float, float]]:
    """Reads cells "SPC/MAE", ordered by target, then by data."""
    scores = {}
    for key, cell in zip(itertools.product(targets, data), text.split(), strict=True):
        spc, mae = cell.split("/")
        scores[key] = (float(spc), float(mae))
    return scores


def changes(
    encoders: tuple[str, ...] = ("vgg16",), paddings: tuple[str, ...] = ("zeros",), **keys
) -> dict:
    """Returns a study's changes: both readouts, by default with a 3x3 kernel."""
    common = {"encoders": encoders, "paddings": paddings, "sgd_paddings": paddings, "kernel": 3}
    return common | keys


def main_rows() -> Iterator[Row]:
    # Every study also reads the image alone, which is the paper's PosENet. So the first two rows
    # share a study, and `changes(())` below is a study without any network.
    for label, changed, text, encoder, padding in (
        ("PosENet", changes(), _POSENET, "posenet", "none"),
        ("VGG-16", changes(), _VGG16, "vgg16", "zeros"),
        ("ResNet-152", changes(("resnet152",)), _RESNET152, "resnet152", "zeros"),
    ):
        yield Row(label, changed, published(text, TARGETS, _KINDS), encoder, padding)


def photograph_row(
    label: str,
    text: str,
    changed: dict,
    targets: tuple[str, ...] = ("H", "G", "HS"),
    encoder: str = "vgg16",
    padding: str = "zeros",
) -> Row:
    """Returns a row of a published table that is on photographs only."""
    data = ("natural",)
    changed = changed | {"targets": targets, "data": data}
    return Row(label, changed, published(text, targets, data), encoder, padding)


def readout_rows(name: str, changed: dict, cells: tuple[str, str]) -> Iterator[Row]:
    """Yields the rows of PosENet and VGG-16 with one readout."""
    posenet, vgg16 = cells
    yield photograph_row(f"PosENet, {name}", posenet, changed, encoder="posenet", padding="none")
    yield photograph_row(f"VGG-16, {name}", vgg16, changed)


def depth_rows() -> Iterator[Row]:
    for depth, cells in _DEPTHS.items():
        yield from readout_rows(f"layers: {depth}", changes(depth=depth), cells)


def kernel_rows() -> Iterator[Row]:
    for kernel, cells in _KERNELS.items():
        yield from readout_rows(f"{kernel}x{kernel}", changes(kernel=kernel), cells)


def stage_rows() -> Iterator[Row]:
    for name, (stages, text) in _STAGES.items():
        yield photograph_row(f"VGG-16, {name}", text, changes(stages=stages), ("H", "G"))


def readout_padding_rows() -> Iterator[Row]:
    for amount, text in _READOUT_PADDINGS.items():
        label = f"PosENet, padded by {amount}"
        changed = changes((), readout_padding=amount, pixels="unit")
        yield photograph_row(label, text, changed, encoder="posenet", padding="none")


def encoder_padding_rows() -> Iterator[Row]:
    changed = changes(paddings=tuple(_ENCODER_PADDINGS))
    for padding, text in _ENCODER_PADDINGS.items():
        yield photograph_row(f"VGG-16, {padding}", text, changed, padding=padding)


# The following tables are not in the paper.


def control_rows() -> Iterator[Row]:
    data = ("natural", "black")
    changed = changes((), coordinates=True, targets=TARGETS, data=data, kernel=1)
    yield Row("image and coordinates", changed, {}, "coordinates", "none")
    paddings = ("zeros", "none")
    for label, keys in (
        ("as it is", {}),
        ("mirrored photographs", {"mirrored": True}),
        ("shuffled targets", {"shuffled": True}),
    ):
        changed = changes(paddings=paddings, targets=("H", "V", "G"), data=data, kernel=1, **keys)
        for padding in paddings:
            yield Row(f"VGG-16, {padding}, {label}", changed, {}, padding=padding)


def weight_rows() -> Iterator[Row]:
    encoders = ("squeezenet1_1", "mobilenet_v2", "resnet18")
    paddings = ("zeros", "none", "reflect")
    grid = itertools.product(encoders, ("random", "imagenet"), paddings)
    for encoder, origin, padding in grid:
        changed = changes(
            (encoder,),
            paddings,
            targets=("H", "V", "G"),
            data=("natural", "black", "white"),
            weights=origin,
        )
        yield Row(f"{encoder}, {origin}, {padding}", changed, {}, encoder, padding)


def photographs_rows() -> Iterator[Row]:
    paddings = ("zeros", "none", "reflect", "circular")
    grid = itertools.product((24, 96, 384), ("random", "imagenet"), paddings)
    for count, origin, padding in grid:
        changed = changes(
            ("resnet18",),
            paddings,
            targets=("H", "G"),
            data=("natural", "black"),
            weights=origin,
            kernel=1,
            sgd_paddings=(),
            n_train=count,
            n_held_out=64,
            n_test=48,
        )
        label = f"resnet18, {origin}, {count} photographs, {padding}"
        yield Row(label, changed, {}, "resnet18", padding)


TABLES = {
    "main": list(main_rows()),
    "depth": list(depth_rows()),
    "kernels": list(kernel_rows()),
    "stages": list(stage_rows()),
    "readout_padding": list(readout_padding_rows()),
    "encoder_padding": list(encoder_padding_rows()),
    "controls": list(control_rows()),
    "weights": list(weight_rows()),
    "photographs": list(photographs_rows()),
}


# --- Configurations -------------------------------------------------------------------------------


def configure(row: Row, options: argparse.Namespace) -> ml_collections.ConfigDict:
    """Returns the configuration of a row's study.

    Raises `ValueError` if `--set` names an unknown key or a value of another type.
    """
    config = posenet.get_config()
    config.photographs = options.photographs
    config.weights = options.weights
    config.seeds = options.seeds
    for key, value in row.changes.items():
        config[key] = value
    # A row's study has at most one network. `--trained` replaces its weights, unless the row is
    # about random ones.
    name = next(iter(config.encoders), None)
    if row.changes.get("weights") != "random" and name in options.trained:
        config.weights, config.missing = options.trained[name]
    for setting in options.set:
        if "=" not in setting:
            raise ValueError(f"--set {setting} is not KEY=VALUE")
        settings = configuration.parse_overrides(config, [f"--config.{setting}"])
        config = configuration.override(config, settings)
    return config.lock()


def check_readouts(name: str, options: argparse.Namespace) -> None:
    """Raises `ValueError` if the rows' readouts do not fit their depth or `hidden`."""
    configs = [configure(row, options) for row in TABLES[name]]
    for row, config in zip(TABLES[name], configs):
        has_sgd = row.encoder in position_study.CONTROLS or row.padding in config.sgd_paddings
        if config.depth > 1 and not has_sgd:
            raise ValueError(
                f"depth={config.depth} of row {row.label!r} needs an SGD readout, and its study "
                f"has them for sgd_paddings={tuple(config.sgd_paddings)}"
            )
    if configs[0].hidden and all(config.depth == 1 for config in configs):
        raise ValueError(
            f"hidden={configs[0].hidden}: no row of table {name!r} has hidden layers, for which "
            "depth is above 1"
        )


def check_overrides(name: str, options: argparse.Namespace) -> None:
    """Raises `ValueError` if `--set` changes a key that distinguishes a table's rows."""
    unset = argparse.Namespace(**vars(options))
    unset.set = []
    configs = [configure(row, unset) for row in TABLES[name]]
    for setting in options.set:
        key = setting.partition("=")[0]
        # A row shows one encoder under one padding, so its study must have both.
        if key in ("encoders", "paddings"):
            raise ValueError(f"--set {setting}: the rows of a table name their own {key}")
        values = list(dict.fromkeys(config[key] for config in configs))
        if len(values) > 1:
            raise ValueError(
                f"--set {setting}: the rows of table {name!r} differ in {key}, which is "
                f"{', '.join(map(repr, values))}; --set takes keys that all rows share"
            )


def check_trained(trained: set[str], tables: list[str]) -> None:
    """Raises `ValueError` if `--trained` names an encoder that is in none of the tables."""
    encoders = set()
    for row in itertools.chain(*(TABLES[name] for name in tables)):
        encoders.update(row.changes["encoders"])
    unknown = sorted(trained - encoders)
    if unknown:
        raise ValueError(
            f"trained={unknown[0]} is not an encoder of {', '.join(tables)}; expected one of "
            f"{', '.join(sorted(encoders)) or 'none'}"
        )


def check_photographs(row: Row, config: ml_collections.ConfigDict) -> None:
    """Raises `ValueError` if a row is fitted to fewer photographs than it names."""
    if config.fitted_to == "noise":
        raise ValueError(f"fitted_to='noise': row {row.label!r} is to be fitted to photographs")
    count = position_study.count_photographs(config)["train"]
    if count < config.n_train:
        paths, _ = photographs.find_photographs(config.photographs)
        needed = config.n_train + config.n_held_out + config.n_test
        raise ValueError(
            f"row {row.label!r} needs {needed} photographs, {config.n_train} of them to fit to; "
            f"photographs={config.photographs!r} has {len(paths)}, {count} of them to fit to"
        )


def check_weights(configs: list[ml_collections.ConfigDict]) -> None:
    """Loads each file of weights once; raises `ValueError` if one does not fit its network."""
    checked = set()
    for config in configs:
        key = (config.encoders, config.weights, config.missing, config.stages)
        if key not in checked:
            position_study.check_weights(config)
            checked.add(key)


def study_name(
    config: ml_collections.ConfigDict,
    contents: dict[str, str] | None = None,
    any_seeds: bool = False,
) -> str:
    """Returns the name of a study's folder: a digest of its configuration.

    Args:
      config: the study's configuration.
      contents: digests of its files (`position_study.digest_inputs`), which count instead of their
        paths; None for the name that earlier versions gave.
      any_seeds: whether the name is the same for every number of seeds.
    """
    settings = configuration.without_later(config.to_dict())
    if any_seeds:
        del settings["seeds"]
    for key, digest in (contents or {}).items():
        # The photographs that packages carry have no path.
        if settings[key]:
            settings[key] = digest
    # Earlier versions took the first photographs of each part; their studies are measured again.
    if position_study.draws(config):
        settings["photographs_drawn"] = "at random"
    return files.digest(settings)


def find_folder(parent: pathlib.Path, name: str, config: ml_collections.ConfigDict) -> pathlib.Path:
    """Returns a study's folder, which an earlier version may have named by its files' paths."""
    folder = parent / name
    earlier = parent / study_name(config)
    if earlier.exists() and not folder.exists():
        return earlier
    return folder


class Plan(NamedTuple):
    """A row of a table, and the study that it shows.

    Attributes:
      row: the row.
      config: the study's configuration.
      name: the study's name.
      name_for_any_seeds: its name for any number of seeds.
    """

    row: Row
    config: ml_collections.ConfigDict
    name: str
    name_for_any_seeds: str


def check_page(name: str, folder: pathlib.Path, plans: list[Plan]) -> None:
    """Raises `ValueError` if the folder has a table's page of other settings."""
    path = folder / f"{name}.json"
    if not path.exists():
        return
    # Records of earlier versions do not name their settings.
    earlier = {record.get("settings") for record in files.read_json(path)} - {None}
    settings = [plan.name_for_any_seeds for plan in plans]
    by_paths = [study_name(plan.config, any_seeds=True) for plan in plans]
    if not earlier <= {*settings, *by_paths}:
        raise ValueError(
            f"workdir={str(folder)!r} has {name}.md with other settings; choose another --workdir, "
            f"or move {name}.md and {name}.json"
        )


# --- Report ---------------------------------------------------------------------------------------


def targets_and_data(records: list[dict]) -> list[tuple[str, str]]:
    """Returns the pairs of target and kind of images, in order."""
    return list(dict.fromkeys((record["target"], record["data"]) for record in records))


def compare(row: Row, config: ml_collections.ConfigDict, results: dict) -> list[dict]:
    """Returns the records of a study that a row shows, with its label and the paper's scores.

    Raises `ValueError` if the study has none.
    """
    shown = select(results["rows"], encoder=row.encoder, padding=row.padding, depth=config.depth)
    if not shown:
        raise ValueError(
            f"row {row.label!r} has no results: its study measured no readout of "
            f"depth={config.depth} on {row.encoder} with padding {row.padding!r}"
        )
    records = []
    for target, data in targets_and_data(shown):
        paper = row.paper.get((target, data))
        if paper and target in ("HS", "VS"):
            # The paper's stripes span -1 to 1, these 0 to 1.
            spc, mae = paper
            paper = (spc, mae / 2)
        added = {"row": row.label, "paper": paper, "photographs": results.get("photographs")}
        for readout in READOUTS:
            for record in select(shown, target=target, data=data, readout=readout):
                records.append(record | added)
    return records


def tabulate(records: list[dict]) -> str:
    """Makes a table: a line for each row, target and kind of images."""
    lines = []
    for row in unique(records, "row"):
        shown = select(records, row=row)
        for target, data in targets_and_data(shown):
            measured = select(shown, target=target, data=data)
            cells = dict.fromkeys(READOUTS, "")
            for record in measured:
                spread = f"{record['spc']:.3f}"
                if record["spc_std"] is not None:
                    spread += f" ± {record['spc_std']:.3f}"
                cells[record["readout"]] = f"{spread} / {record['mae']:.3f} / {record['r2']:.2f}"
            first = measured[0]
            paper = ""
            if first["paper"]:
                paper = "{:.3f} / {:.3f}".format(*first["paper"])
            weights = pathlib.Path(first["weights"]).name
            # Results of earlier versions do not count the photographs.
            counts = (first["photographs"] or {}).values()
            cropped = " / ".join(map(str, counts))
            seeds = str(first["n_seeds"])
            lines.append([row, weights, target, data, paper, *cells.values(), cropped, seeds])
    header = ["row", "weights", "target", "data", "paper: SPC / MAE"]
    header += [f"{name}: SPC ± std / MAE / R2" for name in ("SGD", "exact")]
    return tables.table([*header, "photographs", "seeds"], lines)


def describe_settings(configs: list[ml_collections.ConfigDict]) -> str:
    """Lists the photographs, the crops and what differs from configs/posenet.py."""
    usual = posenet.get_config()
    values = collections.defaultdict(list)
    for config in configs:
        for key, value in config.items():
            if value not in values[key]:
                values[key].append(value)
    lines = []
    for key, chosen in values.items():
        if key in ("photographs", "n_train", "n_held_out", "n_test") or chosen != [usual[key]]:
            lines.append(f"- `{key}`: {', '.join(f'`{value!r}`' for value in chosen)}")
    return "\n".join(lines)


def write_table(
    name: str,
    folder: pathlib.Path,
    records: list[dict],
    configs: list[ml_collections.ConfigDict],
) -> None:
    """Writes a table's records and its page, and prints the table."""
    table = tabulate(records)
    text = f"""# {name}

Std is over images and seeds together. Stripes span 0 to 1, for which the paper's errors are halved.
SPC is blind to amplitude: read it beside R2, the share of variance explained. Images are crops of
as many photographs as the table says: to fit to / to choose the ridge strength on / to score on.

{table}
The studies behind the rows have these keys of configs/posenet.py:

{describe_settings(configs)}
"""
    files.write_json(folder / f"{name}.json", records)
    files.write(folder / f"{name}.md", text)
    print(table)


# --- Running the studies --------------------------------------------------------------------------


def plan_tables(options: argparse.Namespace) -> dict[str, list[Plan]]:
    """Plans the rows of each table, and checks all that can be checked before the first study."""
    names = options.tables if options.tables else list(TABLES)
    check_trained(set(options.trained), names)
    for name in names:
        check_readouts(name, options)
        check_overrides(name, options)
    plans: dict[str, list[Plan]] = {}
    checked = set()
    # A file of weights may be large, so each is hashed once.
    digest_files = functools.cache(position_study.digest_files)
    for name in names:
        plans[name] = []
        for row in TABLES[name]:
            config = configure(row, options)
            # Rows share studies, even across tables.
            digest = files.digest(config.to_dict())
            if digest not in checked:
                position_study.check(config)
                checked.add(digest)
            contents = digest_files(config.photographs, config.weights)
            plans[name].append(
                Plan(
                    row=row,
                    config=config,
                    name=study_name(config, contents),
                    name_for_any_seeds=study_name(config, contents, any_seeds=True),
                )
            )
        check_page(name, options.workdir, plans[name])
    for plan in plans.get("photographs", ()):
        check_photographs(plan.row, plan.config)
    check_weights([plan.config for plan in itertools.chain(*plans.values())])
    return plans


def measure(options: argparse.Namespace) -> None:
    """Runs the studies of the tables, and writes each table as soon as it is complete."""
    backend.start()
    plans_by_table = plan_tables(options)
    run = functools.partial(position_study.run, memory=options.workdir / "features")
    results: dict[str, dict] = {}
    for name, plans in plans_by_table.items():
        records = []
        for plan in plans:
            if plan.name not in results:
                folder = find_folder(options.workdir, plan.name, plan.config)
                results[plan.name] = workdir.run_once(
                    run, plan.config, folder, position_study.adopt
                )
            for record in compare(plan.row, plan.config, results[plan.name]):
                records.append(record | {"settings": plan.name_for_any_seeds})
        write_table(name, options.workdir, records, [plan.config for plan in plans])


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(prog="python -m experiments.position_tables", description=__doc__)
    parser.add_argument("tables", nargs="*", choices=TABLES, help="default: all")
    parser.add_workdir("runs/tables")
    parser.add_photographs()
    parser.add_argument(
        "--weights",
        default="random",
        choices=("random", "imagenet"),
        help="weights of the rows that do not name their own (default: %(default)s)",
    )
    parser.add_trained()
    parser.add_count("seeds", 5, "repetitions, each with its own weights, photographs and crops")
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="keys of configs/posenet.py to change in every study",
    )
    options = parser.parse_args(arguments)
    return command.run(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
