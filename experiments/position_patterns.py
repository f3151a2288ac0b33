"""What does padding do to the features? A study without any readout.

    python -m experiments.position_patterns --workdir runs/patterns [--photographs FOLDER]
        [--encoders resnet18 ...] [--trained squeezenet1_1 FILE]
        [--trained resnet18 FILE layer4 fc] ...

The first part measures the pattern that padding leaves in the features. The features of a crop,
minus those of the same pixels inside the whole photograph, show the effect of the padding: how
strong it is, how much of it all photographs share, and how far it reaches.

The weights are random, or come from a safetensors file; on the command line, the file is followed
by the modules that it lacks, and only the stages before those modules are compared. Photographs
smaller than the crop are refused. Other photographs are scaled, up if need be, and cut to the size
that a network needs around the crop. Each seed has its own random weights and photographs, drawn
at random.

The second part is arithmetic without images: the image sizes that every strided layer reads to the
same distance on both sides, and a map of how often each pixel is read. Finished points are not
measured again. Writes report.md, patterns.json, patterns.png, distances.png and reads.png.
"""

import itertools
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from matplotlib.figure import Figure

from cnnjax import study
from cnnjax.data import photographs
from cnnjax.inspect import Window, receptive_field, windows
from cnnjax.models import create_model
from cnnjax.nn import output_size
from cnnjax.position import patterns
from cnnjax.position.subjects import (
    Shared,
    Subject,
    Trace,
    check_fills,
    flatten,
    list_large,
    list_subjects,
    load_subjects,
    look_inside,
    subjects_of,
)
from cnnjax.runtime import tables

PADDINGS = ("zeros", "partial", "reflect", "replicate", "circular")
READ_BY = ("resnet18", "vgg16", "mobilenet_v2")
SIZES = range(193, 257)
SHOWN = (224, 225)
_READ_FILLS = ("zeros", "none", "partial", "reflect", "replicate", "circular", "full")
# The figure of reads is smoothed over this many pixels, because a stride of 2 reads every second
# pixel more often.
_SMOOTH = 9
# Patterns with more positions per side are not stored.
_LARGEST_MAP = 28
# The figure shows the last stage with this many distances to the border (14 positions per side).
_DRAWN_DISTANCES = 7


# --- Options and points ---------------------------------------------------------------------------


class Windows(NamedTuple):
    """A point of the second part: how often a network reads each pixel; `part` is "reads"."""

    part: str
    network: str


def add_options(parser):
    parser.add_workdir("runs/patterns")
    parser.add_photographs()
    parser.add_argument(
        "--encoders",
        nargs="*",
        default=["squeezenet1_1", "mobilenet_v2", "resnet18"],
        help="networks with random weights (default: squeezenet1_1 mobilenet_v2 resnet18)",
    )
    parser.add_trained()
    parser.add_names("paddings", patterns.ALIGNED, PADDINGS)
    parser.add_count("size", 224, "pixels of the crop")
    parser.add_count("images", 12, "photographs of one seed, at most", 2)
    parser.add_count("seeds", 3, "repetitions, each with its own random weights and photographs")


def draws(point: Trace | Windows, options) -> bool:
    """Tells whether a point's seed has more photographs than it needs, and draws from them."""
    if isinstance(point, Windows):
        return False
    paths, _ = photographs.find_photographs(options.photographs)
    parts = photographs.split(paths, (1,) * options.seeds, 0)
    return photographs.is_random_choice(parts, (options.images,) * options.seeds)


def points(options):
    # The paddings of a seed follow each other, because they share the photographs and their
    # features.
    grid = itertools.product(list_subjects(options), range(options.seeds), options.paddings)
    for (name, origin), seed, padding in grid:
        yield Trace("patterns", name, origin, padding, seed)
    for name in READ_BY:
        yield Windows("reads", name)


def load(options) -> Shared:
    subjects = load_subjects(options)
    check_fills(subjects, options.paddings)
    return Shared(subjects, divide_photographs(options))


def divide_photographs(options) -> list[tuple[pathlib.Path, ...]]:
    """Divides the photographs into disjoint parts, one for each seed."""
    paths = list_large(options)
    if len(paths) < options.seeds:
        raise ValueError(
            f"seeds={options.seeds} needs at least {options.seeds} photographs, one for each; "
            f"photographs={options.photographs!r} has {len(paths)}"
        )
    parts = photographs.split(paths, (1,) * options.seeds, 0)
    chosen = []
    for seed, part in enumerate(parts):
        chosen.append(tuple(photographs.choose(part, options.images, seed)))
    if min(map(len, chosen)) < 2:
        raise ValueError(
            f"images={options.images} and seeds={options.seeds} leave a seed fewer than 2 of "
            f"{len(paths)} photographs"
        )
    return chosen


def measure(point: Trace | Windows, options, shared: Shared) -> dict:
    if isinstance(point, Windows):
        return count_reads(point.network)
    paths = shared.paths[point.seed]
    subject = shared.subjects[point.encoder, point.weights]
    return {"images": len(paths), "stages": traces(subject, point.padding, point.seed, paths)}


# --- Patterns -------------------------------------------------------------------------------------


def traces(
    subject: Subject, padding: str, seed: int, paths: tuple[pathlib.Path, ...]
) -> list[dict]:
    """Measures the trace of a padding in each stage."""
    inside = look_inside(subject, seed, paths)
    model = subject.model.clone(padding=padding)
    padded = patterns.features(model, inside.variables, inside.crop, subject.stages)
    results = []
    for stage in subject.stages:
        strength = patterns.strength(padded[stage], inside.features[stage])
        small = len(strength.pattern) <= _LARGEST_MAP
        results.append(
            strength._asdict()
            | {
                "stage": stage,
                "step": receptive_field(subject.model, stage).step[0],
                "profile": strength.profile.tolist(),
                "pattern": strength.pattern.tolist() if small else None,
            }
        )
    return results


# --- Reads ----------------------------------------------------------------------------------------


def unpadded(chain: tuple[Window, ...], size: int) -> tuple[Window, ...]:
    """Returns the first windows of a chain, until nothing is left without padding."""
    for number, window in enumerate(chain):
        size = output_size(size, window.kernel, window.stride, 0)
        if size < 1:
            return chain[:number]
    return chain


def reads(chain: tuple[Window, ...], size: int, fill: str) -> np.ndarray:
    """Counts how often each pixel is read, [size, size]; without padding, until nothing is left."""
    if fill == "none":
        chain = unpadded(chain, size)
    return patterns.reads(chain, size, fill)


def count_reads(network: str) -> dict:
    """Counts a network's unread rows by image size, and measures asymmetry by size and fill."""
    chain = windows(create_model(network))
    asymmetry = {}
    for size in SHOWN:
        by_fill = {fill: patterns.asymmetry(reads(chain, size, fill)) for fill in _READ_FILLS}
        asymmetry[str(size)] = by_fill
    return {
        "unread": {str(size): patterns.unread(chain, size) for size in SIZES},
        "asymmetry": asymmetry,
    }


# --- Report ---------------------------------------------------------------------------------------


def tabulate_patterns(results: list[dict]) -> str:
    lines = []
    for encoder, origin in subjects_of(results):
        records = study.select(flatten(results), encoder=encoder, weights=origin)
        grid = itertools.product(study.unique(records, "stage"), study.unique(records, "padding"))
        for stage, padding in grid:
            measured = study.select(records, stage=stage, padding=padding)
            line = [encoder, origin, stage, padding]
            for name in ("mae", "snr", "shared"):
                line.append(tables.spread(study.values(measured, name), 3))
            lines.append([*line, str(len(measured))])
    header = ["encoder", "weights", "stage", "padding", "MAE", "SNR", "shared", "n"]
    return tables.table(header, lines)


def shown_stage(records: list[dict]) -> list[dict]:
    """Returns the records of the last stage whose map is large enough to draw.

    If no map is, these are the records of the last of the largest maps.
    """
    most = max(len(record["profile"]) for record in records)
    least = min(most, _DRAWN_DISTANCES)
    large = [record for record in records if len(record["profile"]) >= least]
    return study.select(records, stage=study.unique(large, "stage")[-1])


def draw_patterns(results: list[dict]) -> Figure:
    """Draws the patterns: a row for each encoder, a panel for each padding."""
    subjects = subjects_of(results)
    paddings = study.unique(results, "padding")
    size = (2 * len(paddings) + 0.5, 2.2 * len(subjects))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(subjects), len(paddings), squeeze=False)
    for axis_row, (encoder, origin) in zip(axes, subjects):
        records = study.select(flatten(results), encoder=encoder, weights=origin)
        # Patterns of large maps are not kept.
        records = [record for record in records if record["pattern"] is not None]
        if not records:
            axis_row[0].set_title(f"{encoder} {origin}: all maps are too large", fontsize=8)
            continue
        records = shown_stage(records)
        means = [study.values(records, "pattern", padding=name).mean(0) for name in paddings]
        for axis, padding, mean in zip(axis_row, paddings, means):
            image = axis.imshow(mean, vmin=0, vmax=np.max(means), cmap="magma")
            axis.set(title=padding, xticks=[], yticks=[])
        figure.colorbar(image, ax=axis_row)
        axis_row[0].set_ylabel(f"{encoder} {origin}\n{records[0]['stage']}", fontsize=8)
    return figure


def draw_distances(results: list[dict]) -> Figure:
    """Draws the difference by the distance to the border: a panel for each encoder."""
    subjects = subjects_of(results)
    figure = Figure(figsize=(3.6 * len(subjects), 3.4), layout="constrained")
    axes = figure.subplots(1, len(subjects), squeeze=False, sharey=True)[0]
    for axis, (encoder, origin) in zip(axes, subjects):
        records = shown_stage(study.select(flatten(results), encoder=encoder, weights=origin))
        for padding in study.unique(records, "padding"):
            profile = study.values(records, "profile", padding=padding).mean(0)
            pixels = records[0]["step"] * np.arange(len(profile))
            axis.plot(pixels, profile, marker=".", label=padding)
        axis.set(
            title=f"{encoder} {origin}, {records[0]['stage']}",
            xlabel="distance to the border, pixels",
            yscale="log",
        )
    axes[0].set_ylabel("rms difference / rms feature")
    axes[-1].legend(fontsize=8)
    return figure


def tabulate_sizes(results: list[dict]) -> str:
    lines = []
    for result in results:
        # The number of unread rows by size and by strided window.
        unread = result["unread"]
        even = [size for size, by_window in unread.items() if not any(by_window.values())]
        n_windows = len(unread[str(SHOWN[0])])
        line = [result["network"], str(n_windows), ", ".join(even)]
        for size in SHOWN:
            uneven = [window for window, count in unread[str(size)].items() if count]
            line.append(", ".join(uneven) or "none")
        lines.append(line)
    sizes = f"sizes {SIZES[0]} to {SIZES[-1]} that all of them read evenly"
    header = ["network", "strided windows", sizes, *(f"uneven at {size}" for size in SHOWN)]
    return tables.table(header, lines)


def tabulate_asymmetry(results: list[dict]) -> str:
    lines = []
    for result in results:
        for size, by_fill in result["asymmetry"].items():
            percents = [f"{100 * by_fill[fill]:.2f}" for fill in _READ_FILLS]
            lines.append([result["network"], size, *percents])
    return tables.table(["network", "size", *_READ_FILLS], lines)


def draw_reads(network: str) -> Figure:
    """Draws how often a network reads each pixel: a row for each size, a panel for each fill."""
    chain = windows(create_model(network))
    figure = Figure(figsize=(2 * len(_READ_FILLS) + 0.5, 4.4), layout="constrained")
    axes = figure.subplots(len(SHOWN), len(_READ_FILLS))
    for axis_row, size in zip(axes, SHOWN):
        for axis, fill in zip(axis_row, _READ_FILLS):
            smooth = scipy.ndimage.uniform_filter(reads(chain, size, fill), _SMOOTH)
            image = axis.imshow(smooth, vmin=0, vmax=2)
            axis.set(title=f"{fill}, {size}", xticks=[], yticks=[])
    label = f"reads of a pixel by {network} / average,\naveraged over {_SMOOTH}x{_SMOOTH} pixels"
    figure.colorbar(image, ax=axes, label=label)
    return figure


def report(results: list[dict], options) -> study.Report:
    traced = study.select(results, part="patterns")
    networks = study.select(results, part="reads")
    count = min(study.unique(traced, "images"))
    # The mean of n values without a pattern is normal with deviation 1 / sqrt(n); its mean absolute
    # value is sqrt(2 / pi), about 0.8, of that.
    without_pattern = 0.8 / count**0.5
    text = f"""# What padding does without a readout

## Patterns

Mean ± sample standard deviation over n seeds of photographs, and of weights where they are random;
{count} photographs or more each. MAE is the mean absolute difference that the padding makes,
relative to the features. SNR is its mean over photographs, absolute, over its standard deviation
(with no pattern at all {without_pattern:.2f}). Shared is the part of its energy that all
photographs have in common, from 0 to 1.

{tabulate_patterns(traced)}
![patterns](patterns.png)

![distances](distances.png)

## Blind spots

A strided window reads a size evenly if it leaves no row and column at the far side unread. The
second table shows the asymmetry: the percentage of reads that differs between the left and the
right half. Skip connections are left out. Without padding, so are the first window that does not
fit its map and all windows after it.

{tabulate_sizes(networks)}
{tabulate_asymmetry(networks)}
![reads](reads.png)
"""
    figures = {
        "patterns.png": draw_patterns(traced),
        "distances.png": draw_distances(traced),
        "reads.png": draw_reads(READ_BY[0]),
    }
    return study.Report(text, figures)


STUDY = study.Study(
    description=__doc__,
    results="patterns.json",
    add_options=add_options,
    axes=("encoders", "paddings"),
    files=("photographs", "trained"),
    load=load,
    points=points,
    measure=measure,
    report=report,
    draws=draws,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
