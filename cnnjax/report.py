"""Reports from the files of a work directory, and from nothing else: tables in Markdown, figures in PNG."""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")  # before pyplot: figures go to files, with or without a screen
import matplotlib.pyplot as plt
import numpy as np

from cnnjax.data.augment import IGNORED
from cnnjax.runtime import tables, workdir

# Of SegNet's tutorial (Badrinarayanan et al. 2015), for the classes of CamVid; more classes begin again, no class is black.
_COLORS = np.array(
    [
        [128, 128, 128],
        [128, 0, 0],
        [192, 192, 128],
        [128, 64, 128],
        [60, 40, 222],
        [128, 128, 0],
        [192, 128, 128],
        [64, 64, 128],
        [64, 0, 128],
        [64, 64, 0],
        [0, 128, 192],
    ],
    np.uint8,
)
_ORDER = (
    "zeros",
    "partial",
    "full",
    "one-sided",
    "none",
    "reflect",
    "replicate",
    "circular",
    "mean",
    "random",
    "interpolate",
)


def _unique(rows: list[dict], *keys: str) -> list[tuple]:
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def _signed(value: float) -> str:
    """Two decimals, no leading zero, as the papers print correlations; never "-.00"."""
    return f"{value:.2f}".replace("0.", ".", 1).replace("-.00", ".00")


def _cell(row: dict) -> str:
    spread = f"±{_signed(row['spc_std'])}" if row["spc_std"] is not None else ""
    return f"{_signed(row['spc'])}{spread} / {row['mae']:.3f} / {_signed(row['r2'])}"


def paint(masks: np.ndarray) -> np.ndarray:
    """Masks uint8 [..., height, width] in colors, uint8 [..., height, width, 3]; pixels of no class (255) are black."""
    return np.where(masks[..., None] == IGNORED, 0, _COLORS[masks % len(_COLORS)]).astype(np.uint8)


def _position_tables(results: dict) -> str:
    rows = results["rows"]
    targets, data = ([key for (key,) in _unique(rows, name)] for name in ("target", "data"))
    find = {(r["encoder"], r["padding"], r["readout"], r["target"], r["data"]): r for r in rows}
    settings = _unique(rows, "encoder", "padding", "readout")
    first = targets[0]
    text = [
        f"## {first}: what padding changes\n",
        f"Exact readout, SPC (R2) of target {first}. On an image without content only a border can tell the position.\n",
    ]
    lines = []
    for encoder, fill, readout in settings:
        if readout == "exact":
            found = [find[encoder, fill, readout, first, kind] for kind in data]
            lines.append(
                [encoder, fill, *(f"{_signed(row['spc'])} ({_signed(row['r2'])})" for row in found)]
            )
    text.append(tables.table(["encoder", "padding", *data], lines))
    for kind in data:
        counted = next(row for row in rows if row["data"] == kind)
        text.append(f"\n## All targets, {kind} images\n")
        text.append(
            f"SPC ± std / MAE / R2; {counted['n_images']} image(s) a seed, {counted['n_seeds']} seed(s).\n"
        )
        chance = [
            "*the best constant*",
            "",
            "",
            *(f".00 / {results['chance_mae'][name]:.3f} / .00" for name in targets),
        ]
        lines = [
            [
                encoder,
                fill,
                readout,
                *(_cell(find[encoder, fill, readout, name, kind]) for name in targets),
            ]
            for encoder, fill, readout in settings
        ]
        text.append(tables.table(["encoder", "padding", "readout", *targets], [chance, *lines]))
    sources = dict.fromkeys(
        (row["encoder"], row["weights"], ", ".join(row["stages"])) for row in rows
    )
    text += [
        "\n## Encoders\n",
        "\n".join(
            f"- {encoder}: {weights} weights, stages {stages}"
            for encoder, weights, stages in sources
        ),
        "\n\n## What was decided\n",
        "\n".join(f"- {line}" for line in results["decisions"]),
        f"\n- Largest relative residual of the ridge systems solved: {results['ridge_residual']:.1g}.\n",
    ]
    return "\n".join(text)


def _spc_figure(results: dict):
    """Correlation by padding: a panel for each encoder and kind of image, a bar for each target."""
    rows = [row for row in results["rows"] if row["readout"] == "exact"]
    control = [row for row in rows if row["stages"] == ["image"]]
    encoders = [
        name
        for (name,) in _unique(rows, "encoder")
        if name not in {row["encoder"] for row in control}
    ] or ["posenet"]
    targets, data = ([key for (key,) in _unique(rows, name)] for name in ("target", "data"))
    figure, axes = plt.subplots(
        len(encoders),
        len(data),
        figsize=(3.6 * len(data), 2.6 * len(encoders)),
        sharey=True,
        squeeze=False,
    )
    for axis_row, encoder in zip(axes, encoders):
        for axis, kind in zip(axis_row, data):
            shown = (
                [row for row in rows if row["data"] == kind and row["encoder"] == encoder]
                if encoder != "posenet"
                else []
            )
            fills = sorted({row["padding"] for row in shown}, key=_ORDER.index)
            groups = [(fill, [row for row in shown if row["padding"] == fill]) for fill in fills]
            groups.append(("image\nalone", [row for row in control if row["data"] == kind]))
            for number, name in enumerate(targets):
                bars = [next(row for row in group if row["target"] == name) for _, group in groups]
                width = 0.8 / len(targets)
                place = np.arange(len(groups)) + (number - (len(targets) - 1) / 2) * width
                spread = [row["spc_std"] or 0 for row in bars]
                axis.bar(
                    place,
                    [row["spc"] for row in bars],
                    width,
                    yerr=spread,
                    error_kw={"lw": 0.6},
                    color=f"C{number}",
                    label=name,
                )
            axis.axhline(0, color="black", lw=0.5)
            axis.set_xticks(range(len(groups)), [fill for fill, _ in groups], fontsize=8)
            axis.set_ylim(-0.6, 1.05)
            axis.set_title(f"{encoder}, {kind} images", fontsize=10)
        axis_row[0].set_ylabel("SPC")
    axes[0, 0].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    return figure


def _rings_figure(results: dict):
    """The error of the first target by the distance to the border: a panel for each encoder and kind of image, a line for each padding."""
    rows = results["rings"]
    encoders, data = ([key for (key,) in _unique(rows, name)] for name in ("encoder", "data"))
    size = (3 * len(data), 2.2 * len(encoders))
    figure, axes = plt.subplots(
        len(encoders), len(data), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for axis_row, encoder in zip(axes, encoders):
        for axis, kind in zip(axis_row, data):
            for row in rows:
                if row["encoder"] == encoder and row["data"] == kind:
                    color = plt.get_cmap("tab20")(_ORDER.index(row["padding"]))
                    axis.plot(
                        range(1, len(row["mae"]) + 1),
                        row["mae"],
                        marker=".",
                        color=color,
                        label=row["padding"],
                    )
            axis.set_title(f"{encoder}, {kind} images", fontsize=9)
        axis_row[0].set_ylabel(f"MAE of {rows[0]['target']}", fontsize=8)
        axis_row[0].legend(fontsize=6)
    for axis in axes[-1]:
        axis.set_xlabel("ring, from the border inwards", fontsize=8)
    figure.tight_layout()
    return figure


def _maps_figure(maps, encoder: str, kind: str, targets: list[str], goals: dict[str, np.ndarray]):
    """One image's predicted maps: the targets in the first row, then a row for each padding and readout."""
    shown = sorted(
        (key for key in maps if key.startswith(f"{encoder}/") and key.endswith(f"/{kind}")),
        key=lambda key: (key.split("/")[2], _ORDER.index(key.split("/")[1])),
    )
    height, width = len(shown) + 1, len(targets) + 1
    figure, axes = plt.subplots(height, width, figsize=(1.25 * width, 1.3 * height), squeeze=False)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    axes[0, 0].imshow(maps[f"image/{kind}"], vmin=0, vmax=255)
    axes[0, 0].set_title(f"{kind} image", fontsize=8)
    for axis, name in zip(axes[0, 1:], targets):
        axis.imshow(goals[name], vmin=0, vmax=1)
        axis.set_title(f"target {name}", fontsize=8)
    for axis_row, key in zip(axes[1:], shown):
        _, fill, readout, _ = key.split("/")
        axis_row[0].text(0.5, 0.5, f"{fill}\n({readout})", ha="center", va="center", fontsize=9)
        for axis, predicted in zip(axis_row[1:], maps[key]):
            axis.imshow(predicted, vmin=0, vmax=1, interpolation="bilinear")
    figure.suptitle(f"{encoder}: position read from one {kind} image", fontsize=10)
    figure.tight_layout()
    return figure


def _position(folder: pathlib.Path, config: dict, results: dict) -> str:
    targets = [name for (name,) in _unique(results["rows"], "target")]
    with np.load(folder / "maps.npz") as archive:
        maps = dict(archive)
    figures = {"spc_by_padding.png": _spc_figure(results), "rings.png": _rings_figure(results)}
    goals = {name: maps[f"target/{name}"] for name in targets}
    for (encoder,) in _unique(results["rows"], "encoder"):
        for (kind,) in _unique(results["rows"], "data"):
            figures[f"maps_{encoder}_{kind}.png"] = _maps_figure(
                maps, encoder, kind, targets, goals
            )
    for name, figure in figures.items():
        workdir.write_figure(folder / name, figure)
        plt.close(figure)
    pictures = "\n\n".join(f"![{name}]({name})" for name in figures)
    return f"# Position read from frozen features\n\n{_position_tables(results)}\n## Figures\n\n{pictures}\n"


def _curves_figure(history: list[dict]):
    """Loss, error and learning rate by epoch."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3))
    epochs = [entry["epoch"] for entry in history]
    for axis, kind in zip(axes, ("loss", "error")):
        for name in (f"train_{kind}", f"validation_{kind}"):
            if name in history[0]:
                axis.plot(epochs, [entry[name] for entry in history], label=name.replace("_", " "))
        axis.set_ylabel(kind)
        axis.set_yscale("log" if kind == "loss" else "linear")
        axis.legend(fontsize=8)
    axes[1].set_ylim(bottom=0)
    axes[2].plot(
        epochs, [entry["learning_rate"] for entry in history], color="black", drawstyle="steps-post"
    )
    axes[2].set_ylabel("learning rate")
    for axis in axes:
        axis.set_xlabel("epoch")
    figure.tight_layout()
    return figure


def _confusion_figure(labels: np.ndarray, predicted: np.ndarray, classes: list[str]):
    """How many test images of each class (row) were taken for each class (column)."""
    if labels.ndim > 1:  # masks
        labels, predicted = (
            part[labels != IGNORED].astype(np.int64) for part in (labels, predicted)
        )
    counts = np.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2).reshape(
        len(classes), -1
    )
    figure, axis = plt.subplots(figsize=(5.5, 5.5))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if len(classes) <= 20:
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
        axis.set_yticks(range(len(classes)), classes, fontsize=8)
        for row, column in np.ndindex(counts.shape):
            shown = (
                f"{counts[row, column]}" if counts.max() < 100_000 else f"{shares[row, column]:.2f}"
            )  # of pixels there are too many
            axis.text(
                column,
                row,
                shown,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if shares[row, column] > 0.5 else "black",
            )
    figure.tight_layout()
    return figure


def _mistakes_figure(test: dict, classes: list[str]):
    """The test images that were taken, with the most confidence, for something else."""
    shown = test["shown"]
    columns = 9
    rows = max(1, -(-len(shown) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.6 * rows), squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for axis, index, image in zip(axes.ravel(), shown, test["images"]):
        axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        names = [classes[test[kind][index]] for kind in ("labels", "predicted")]
        axis.set_title(f"{names[0]}\nas {names[1]}\n{test['confidence'][index]:.3f}", fontsize=7)
    figure.tight_layout()
    return figure


def _scenes_figure(test: dict):
    """The test images with most pixels wrong: the image, its mask, and what was predicted, one above the other."""
    shown = test["shown"]
    figure, axes = plt.subplots(
        3, len(shown), figsize=(2.2 * len(shown), 5.2), squeeze=False, layout="constrained"
    )
    for column, pictures in zip(
        axes.T, zip(test["images"], paint(test["labels"][shown]), paint(test["predicted"][shown]))
    ):
        for axis, picture in zip(column, pictures):
            axis.imshow(picture)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("image", "mask", "predicted")):
        axis.set_ylabel(name)
    return figure


def _train(folder: pathlib.Path, config: dict, results: dict) -> str:
    final, history = results["final"], results["history"]
    with np.load(folder / "test.npz") as archive:
        test = dict(archive)
    figures = {"curves.png": _curves_figure(history)}
    if config["loss"] != "sigmoid":
        figures["confusion.png"] = _confusion_figure(
            test["labels"], test["predicted"], results["classes"]
        )
        figures["mistakes.png"] = (
            _scenes_figure(test)
            if config["loss"] == "pixelwise"
            else _mistakes_figure(test, results["classes"])
        )
    for name, figure in figures.items():
        workdir.write_figure(folder / name, figure)
        plt.close(figure)

    known = {"pixelwise": ("mean_iou", "mean IoU"), "sigmoid": ("mean_ap", "mean AP")}
    key, metric = known.get(config["loss"], ("top5_error", "top-5 error"))

    def line(part, count):
        error = f"{100 * final[f'{part}_error']:.2f} %"
        more = f"{100 * final[f'{part}_{key}']:.2f} %" if f"{part}_{key}" in final else ""
        return [part, count, f"{final[f'{part}_loss']:.4f}", error, more]

    lines = [line("train", f"{results['n_train']:,}")]
    if "validation_error" in final:
        # Runs of before recorded only how many were to be held out.
        count = results.get("n_validation", config["n_validation"])
        lines.append(line("validation", f"{count:,}"))
    lines.append(line("test", f"{results['n_test']:,}"))
    streamed = config["dataset"] == "folder" or config["dataset"].startswith("tfds:")
    scores = [
        "" if score is None else f"{100 * score:.2f}" for score in results.get("by_class", [])
    ]
    by_class = (
        f"\n{metric} of each class of the test set, %:\n\n{tables.table(results['classes'], [scores])}"
        if scores
        else ""
    )
    measured = (
        "the mean over the last epoch's steps"
        if streamed
        else "measured after training, without augmentation"
    )
    return (
        f"# {config['model']} on {config['dataset']}\n\n{results['parameters']:,} parameters, {final['epoch']} epochs, "
        f"{final['step']:,} steps, {results['training_seconds']:,.0f} s of training.\n\n"
        + tables.table(["part", "images", "loss", "error", metric], lines)
        + by_class
        + f"\nThe training error is {measured}; the curve's is the mean over each epoch while training. The test set was used once, at "
        "the end.\n\n" + "\n\n".join(f"![{name}]({name})" for name in figures) + "\n"
    )


_KINDS = {"position": _position, "train": _train}


def write(folder: pathlib.Path) -> None:
    """Writes report.md and its figures from the results in a work directory.

    Raises `ValueError` if it holds no results, or results of an unknown kind.
    """
    missing = [
        name
        for name in ("config.json", "environment.json", "results.json")
        if not (folder / name).is_file()
    ]
    if missing:
        raise ValueError(
            f"workdir={str(folder)!r} has no {', '.join(missing)}: there is no finished run to report on"
        )
    config, environment, results = (
        workdir.read_json(folder / f"{name}.json") for name in ("config", "environment", "results")
    )
    if results.get("kind") not in _KINDS:
        raise ValueError(
            f"kind={results.get('kind')!r} of {folder / 'results.json'} is not one of {', '.join(_KINDS)}"
        )
    body = _KINDS[results["kind"]](folder, config, results)
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    devices = ", ".join(sorted(set(environment["devices"])))
    footer = (
        f"\n## Environment\n\n{environment['backend']} ({devices}), {environment['cpus']} CPUs, "
        f"Python {environment['python']}, {packages}; XLA_FLAGS `{environment['xla_flags']}`; seed {environment['seed']}; revision "
        f"{environment['git_revision'] or 'unknown'}; {results['seconds']} s.\n\n```json\n{json.dumps(config, indent=1)}\n```\n"
    )
    workdir.write(folder / "report.md", body + footer)
