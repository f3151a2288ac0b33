"""The position study's report, made from the files of a work directory."""

import pathlib
import re
from collections.abc import Iterable

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cnnjax.nn import FILLS
from cnnjax.position.results import MapsFile, Results, Row
from cnnjax.runtime import files, report, tables

# Colors of the targets' bars: Okabe and Ito's palette, which color-blind readers can tell apart.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")


def write(folder: pathlib.Path) -> None:
    """Writes report.md and its figures to a finished study's work directory.

    Raises `ValueError` if it holds no results, or those of another kind of job.
    """
    run = report.read(folder, kind="position")
    results = Results.from_json(run.results)
    maps = MapsFile(folder / "maps.npz")

    figures = {"spc_by_padding.png": _draw_scores(results), "rings.png": _draw_rings(results)}
    for encoder in _values(results.rows, "encoder"):
        name = files.file_label(encoder)
        for kind in _values(results.rows, "data"):
            figures[f"maps_{name}_{kind}.png"] = _draw_maps(results, maps, encoder, kind)
    for name, figure in figures.items():
        files.write_figure(folder / name, figure)

    sections = [
        "# Position read from frozen features\n",
        _format_summary(results),
        *(
            _format_scores(results, kind) + _format_by_seed(results, kind)
            for kind in _values(results.rows, "data")
        ),
        _format_strengths(results),
        _format_encoders(results),
        _format_decisions(results),
        "## Figures\n",
        "\n\n".join(f"![{name}]({name})" for name in figures) + "\n",
    ]
    files.write(folder / "report.md", "\n".join(sections) + report.footer(run))


def _values(records: Iterable, field: str) -> list:
    """Lists the different values of a field, in order of appearance."""
    return list(dict.fromkeys(getattr(record, field) for record in records))


def _select(records: Iterable, **fields) -> list:
    """Lists the records whose fields have these values."""
    chosen = []
    for record in records:
        if all(getattr(record, name) == value for name, value in fields.items()):
            chosen.append(record)
    return chosen


# ------------------------------------------------------------------ tables


def _decimals(value: float) -> str:
    """Formats two decimals without a leading zero, as papers print correlations.

    It never returns "-.00".
    """
    text = re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}")
    return ".00" if text == "-.00" else text


def _format_summary(results: Results) -> str:
    """Formats SPC and R2 of the first target, by padding and kind of image."""
    target = results.rows[0].target
    data = _values(results.rows, "data")
    lines = []
    for setting in _settings(results, readout="exact"):
        line = [setting.encoder, setting.padding]
        for kind in data:
            row = _row(results, setting, target, kind)
            line.append(f"{_decimals(row.spc)} ({_decimals(row.r2)})")
        lines.append(line)
    return (
        f"## {target}: what padding changes\n\n"
        f"Exact readout, SPC (R2) of target {target}{_describe_fit(results)}. On an image without "
        "content only a border can tell the position.\n\n"
        + tables.table(["encoder", "padding", *data], lines)
    )


def _format_scores(results: Results, kind: str) -> str:
    """Formats all scores on one kind of image."""
    targets = _values(results.rows, "target")
    first = _select(results.rows, data=kind)[0]
    chance = [f".00 / {results.chance_mae[target]:.3f} / .00" for target in targets]
    lines = [["*the best constant*", "", "", *chance]]
    for setting in _settings(results):
        rows = [_row(results, setting, target, kind) for target in targets]
        cells = [_format_score(row) for row in rows]
        lines.append([setting.encoder, setting.padding, setting.readout, *cells])
    return (
        f"\n## All targets, {kind} images\n\n"
        "SPC ± std / MAE / R2, the median R2 in brackets, as R2 has no lower bound: over "
        f"{first.n_images} image(s) a seed{_describe_images(results, kind)}, "
        f"{first.n_seeds} seed(s){_describe_fit(results)}.\n\n"
        + tables.table(["encoder", "padding", "readout", *targets], lines)
    )


def _describe_images(results: Results, kind: str) -> str:
    """Tells how many photographs images are crops of; empty for others and for older results."""
    if kind not in ("natural", "shuffled_pixels") or results.photographs is None:
        return ""
    return f" (crops of {results.photographs['natural']} photograph(s))"


def _describe_fit(results: Results) -> str:
    """Tells what readouts are fitted to; empty for older results."""
    counts = results.photographs
    if counts is None:
        return ""
    fitted_to = results.rows[0].fitted_to
    if fitted_to == "noise":
        return "; readouts fitted to noise"
    shuffled = " with shuffled pixels" if fitted_to == "shuffled_pixels" else ""
    return (
        f"; readouts fitted to crops{shuffled} of {counts['train']} photograph(s), the ridge "
        f"strength chosen on crops of {counts['held_out']}"
    )


def _format_by_seed(results: Results, kind: str) -> str:
    """Formats a score with intervals over seeds, and differences to an encoder's first padding.

    The score is R2 on the kind of images that readouts are fitted to, and SPC on others, where R2
    is extrapolation. It is empty for older results, and for a single seed.
    """
    rows = _select(results.rows, data=kind, readout="exact")
    if rows[0].r2_by_seed is None or rows[0].n_seeds < 2:
        return ""
    targets = _values(rows, "target")
    fitted_to = rows[0].fitted_to
    fitted_kind = "natural" if fitted_to == "photographs" else fitted_to
    metric = "R2" if kind == fitted_kind else "SPC"

    def by_seed(setting: Row, target: str) -> np.ndarray:
        row = _row(results, setting, target, kind)
        return np.array(row.r2_by_seed if metric == "R2" else row.spc_by_seed)

    lines = []
    for encoder in _values(rows, "encoder"):
        settings = _settings(results, encoder=encoder, readout="exact")
        for setting in settings:
            cells = [_format_interval(by_seed(setting, target)) for target in targets]
            lines.append([encoder, setting.padding, *cells])
        first = settings[0]
        for setting in settings[1:]:
            differences = [by_seed(setting, target) - by_seed(first, target) for target in targets]
            cells = [_format_interval(values) for values in differences]
            lines.append([encoder, f"{setting.padding} - {first.padding}", *cells])
    trained = ""
    if set(_values(rows, "weights")) - {"none", "random"}:
        trained = " All seeds share one checkpoint; other trainings may differ by more."
    return (
        f"\n### {metric} by seed, {kind} images\n\n"
        f"{metric} of the exact readout: mean ± half of the 95 % interval (Student's t) over "
        f"{rows[0].n_seeds} seeds, each with the mean over its images. Seeds draw from the same "
        "photographs. In lines with two paddings, the second is subtracted seed by seed: all "
        "paddings of a seed share weights and images. The intervals are not corrected for their "
        f"number.{trained}\n\n" + tables.table(["encoder", "padding", *targets], lines)
    )


def _format_interval(values: np.ndarray) -> str:
    return f"{_decimals(values.mean())} ± {_decimals(tables.half_width(values))}"


def _format_score(row: Row) -> str:
    spread = "" if row.spc_std is None else f"±{_decimals(row.spc_std)}"
    # Older results have no median.
    median = "" if row.r2_median is None else f" ({_decimals(row.r2_median)})"
    return f"{_decimals(row.spc)}{spread} / {row.mae:.3f} / {_decimals(row.r2)}{median}"


def _format_strengths(results: Results) -> str:
    """Formats the ridge strengths that the exact readout chose, seed by seed."""
    # Older results have none.
    if all(row.strengths is None for row in results.rows):
        return ""
    targets = _values(results.rows, "target")
    kind = results.rows[0].data
    lines = []
    for setting in _settings(results, readout="exact"):
        rows = [_row(results, setting, target, kind) for target in targets]
        cells = [", ".join(f"{value:g}" for value in row.strengths or ()) for row in rows]
        lines.append([setting.encoder, setting.padding, *cells])
    return (
        "\n## Ridge strengths of the exact readout\n\n"
        "Chosen on held-out images, one for each seed.\n\n"
        + tables.table(["encoder", "padding", *targets], lines)
    )


def _format_encoders(results: Results) -> str:
    lines = []
    for row in results.rows:
        stages = ", ".join(row.stages)
        lines.append(f"- {row.encoder}: {row.weights} weights, stages {stages}")
    return "\n## Encoders\n\n" + "\n".join(dict.fromkeys(lines)) + "\n"


def _format_decisions(results: Results) -> str:
    lines = [f"- {decision}" for decision in results.decisions]
    residual = f"{results.ridge_residual:.1g}"
    lines.append(f"- Largest relative residual of the ridge systems solved: {residual}.")
    return "\n## What was decided\n\n" + "\n".join(lines) + "\n"


def _settings(results: Results, **fields) -> list[Row]:
    """Lists the first row of every encoder, padding and readout."""
    first: dict[tuple, Row] = {}
    for row in _select(results.rows, **fields):
        first.setdefault((row.encoder, row.padding, row.readout), row)
    return list(first.values())


def _row(results: Results, setting: Row, target: str, kind: str) -> Row:
    """Returns a setting's row for another target and data."""
    (row,) = _select(
        results.rows,
        encoder=setting.encoder,
        padding=setting.padding,
        readout=setting.readout,
        target=target,
        data=kind,
    )
    return row


# ------------------------------------------------------------------ figures


def _draw_scores(results: Results) -> Figure:
    """Draws SPC by padding.

    There is a panel for each encoder and kind of image, with a bar for each target.
    """
    rows = _select(results.rows, readout="exact")
    # The image itself, read without an encoder.
    control = _select(rows, stages=["image"])
    encoders = [name for name in _values(rows, "encoder") if name != control[0].encoder]
    targets = _values(rows, "target")
    data = _values(rows, "data")
    height = max(1, len(encoders))
    figure = Figure(figsize=(3.6 * len(data), 2.6 * height), layout="constrained")
    axes = figure.subplots(height, len(data), sharey=True, squeeze=False)
    # A study without encoders has one line of panels, of the image alone.
    for axis_row, encoder in zip(axes, encoders or ["posenet"]):
        for axis, kind in zip(axis_row, data):
            shown = _select(rows, encoder=encoder, data=kind) if encoders else []
            groups = {}
            for fill in sorted(_values(shown, "padding"), key=FILLS.index):
                groups[fill] = _select(shown, padding=fill)
            groups["image\nalone"] = _select(control, data=kind)
            _draw_bars(axis, groups, targets)
            axis.set_title(f"{encoder}, {kind} images", fontsize=10)
        axis_row[0].set_ylabel("SPC")
    bars, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(bars, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle("Rank correlation (SPC) of a linear readout with position maps, by padding")
    return figure


def _draw_bars(axis, groups: dict[str, list[Row]], targets: list[str]) -> None:
    """Draws a group of bars for each padding, with a bar for each target."""
    width = 0.8 / len(targets)
    for number, target in enumerate(targets):
        rows = [_select(group, target=target)[0] for group in groups.values()]
        offset = (number - (len(targets) - 1) / 2) * width
        axis.bar(
            np.arange(len(groups)) + offset,
            [row.spc for row in rows],
            width,
            yerr=[row.spc_std or 0 for row in rows],
            error_kw={"lw": 0.6},
            color=_COLORS[number % len(_COLORS)],
            label=target,
        )
    # A bar of height 0 looks like a missing one.
    for position, group in enumerate(groups.values()):
        if not any(row.spc or row.spc_std for row in group):
            axis.text(position, 0.04, "0", ha="center", fontsize=8)
    axis.axhline(0, color="black", lw=0.5)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.set_ylim(-0.6, 1.05)


def _draw_rings(results: Results) -> Figure:
    """Draws the first target's error by distance to the border.

    There is a panel for each encoder and kind of image, with a line for each padding.
    """
    encoders = _values(results.rings, "encoder")
    data = _values(results.rings, "data")
    figure = Figure(figsize=(3 * len(data), 2.2 * len(encoders)))
    axes = figure.subplots(len(encoders), len(data), sharex=True, sharey=True, squeeze=False)
    colors = matplotlib.colormaps["tab20"]
    for axis_row, encoder in zip(axes, encoders):
        for axis, kind in zip(axis_row, data):
            for profile in _select(results.rings, encoder=encoder, data=kind):
                axis.plot(
                    range(1, len(profile.mae) + 1),
                    profile.mae,
                    marker=".",
                    color=colors(FILLS.index(profile.padding)),
                    label=profile.padding,
                )
            axis.set_title(f"{encoder}, {kind} images", fontsize=9)
        axis_row[0].set_ylabel(f"MAE of {results.rings[0].target}", fontsize=8)
        axis_row[0].legend(fontsize=6)
    for axis in axes[-1]:
        axis.set_xlabel("ring, from the border inwards", fontsize=8)
    figure.tight_layout()
    return figure


def _draw_maps(results: Results, maps: MapsFile, encoder: str, kind: str) -> Figure:
    """Draws the maps read from one image: targets first, then a row for each setting."""
    targets = _values(results.rows, "target")
    settings = _settings(results, encoder=encoder)
    settings.sort(key=lambda setting: (setting.readout, FILLS.index(setting.padding)))
    height = len(settings) + 1
    width = len(targets) + 1
    figure = Figure(figsize=(1.25 * width, 1.3 * height))
    # One plot holds all images, in cells of size 1: a plot for each takes longer.
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()

    def show(values: np.ndarray, row: int, column: int, **options) -> None:
        edges = (column + 0.05, column + 0.95, row + 0.95, row + 0.05)
        axis.imshow(values, extent=edges, **options)

    def write_title(text: str, column: int) -> None:
        axis.text(column + 0.5, 0, text, ha="center", va="bottom", fontsize=8)

    show(maps.image(kind), 0, 0, vmin=0, vmax=255)
    write_title(f"{kind} image", 0)
    for column, target in enumerate(targets, 1):
        show(maps.target(target), 0, column, vmin=0, vmax=1)
        write_title(f"target {target}", column)
    for row, setting in enumerate(settings, 1):
        label = f"{setting.padding}\n({setting.readout})"
        axis.text(0.5, row + 0.5, label, ha="center", va="center", fontsize=9)
        predicted = maps.predicted(encoder, setting.padding, setting.readout, kind)
        for column, values in enumerate(predicted, 1):
            show(values, row, column, vmin=0, vmax=1, interpolation="bilinear")
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_title(f"{encoder}: position read from one {kind} image", fontsize=10, pad=20)
    return figure
