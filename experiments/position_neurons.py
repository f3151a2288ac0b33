"""How many channels tell the border from the interior, and can position be read from them?

    python -m experiments.position_neurons --workdir runs/position_neurons --photographs FOLDER
        [--encoders resnet18 ...] [--trained squeezenet1_1 FILE]
        [--trained resnet18 FILE layer4 fc] ... [--paddings inside zeros ...] [--seeds 3]

After Garcia-Gasulla et al. 2023 (arXiv 2309.08048), who call a filter padding-aware if its
activations at the border differ from its other activations. Here, for each channel of a stage, the
values at the border (the middle of each outermost row and column) are compared with the values in
the middle of the map. The statistic is that of Kolmogorov and Smirnov, the largest distance between
the two distributions; the largest of the four sides counts.

The content of photographs also differs between their edges and their middles. The threshold
therefore comes from features without a border: the crops see the photograph around them (column
"inside"; photographs are scaled as in `position_patterns`). The threshold is chosen on one half of
the photographs such that 1 % of a stage's channels, and at least one channel, are beyond it, and
channels are counted on the other half. Then the halves are swapped, and the two results are
averaged. The share under "inside" is thus the rate of false positives, with which all other shares
must be compared.

The exact readout of H is fitted to the first half of the same features and scored on the second.
Each seed draws the random weights, and `--images` photographs in random order; if there are no
more, every seed has all of them, in an order of its own. Finished points are not measured again.
Writes report.md, neurons.json and neurons.png.
"""

import itertools
import sys

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from cnnjax import study
from cnnjax.data import photographs
from cnnjax.nn import resize
from cnnjax.position import patterns
from cnnjax.position.encoder import FEATURE_SIZE
from cnnjax.position.metrics import scores
from cnnjax.position.readout import fit_exact
from cnnjax.position.subjects import (
    Shared,
    Trace,
    check_fills,
    flatten,
    list_large,
    list_subjects,
    load_subjects,
    look_inside,
    subjects_of,
)
from cnnjax.position.targets import target
from cnnjax.runtime import tables

INSIDE = "inside"
# The accepted rate of false positives: channels called padding-aware without a border.
_FALSE_POSITIVES = 0.01
# The least number of photographs of a seed: one half to fit to, the other to count on.
_LEAST = 8
# Values of a result for each stage: heading, factor and digits.
COLUMNS = {"share": ("padding-aware channels, %", 100, 1), "r2": ("R2 of H", 1, 2)}


# --- Options and points ---------------------------------------------------------------------------


def add_options(parser):
    parser.add_workdir("runs/position_neurons")
    parser.add_photographs()
    parser.add_argument(
        "--encoders",
        nargs="*",
        default=["squeezenet1_1", "mobilenet_v2", "resnet18"],
        help="networks with random weights (default: squeezenet1_1 mobilenet_v2 resnet18)",
    )
    parser.add_trained()
    parser.add_names(
        "paddings",
        (INSIDE, *patterns.ALIGNED),
        [INSIDE, "zeros", "partial", "reflect", "replicate", "circular"],
    )
    parser.add_count("size", 224, "pixels of the crop")
    parser.add_count("images", 64, "photographs of one seed, at most", _LEAST)
    parser.add_count("seeds", 3, "repetitions, each with its own random weights and photographs")


def load(options) -> Shared:
    """Loads the encoders, and draws each seed's photographs in random order."""
    paths = list_large(options)
    if len(paths) < _LEAST:
        raise ValueError(
            f"photographs={options.photographs!r} has {len(paths)} photographs; at least {_LEAST} "
            "are needed"
        )
    drawn = []
    for seed in range(options.seeds):
        drawn.append(tuple(photographs.shuffle(paths, options.images, seed)))
    subjects = load_subjects(options)
    padded = [padding for padding in options.paddings if padding != INSIDE]
    check_fills(subjects, padded)
    return Shared(subjects, drawn)


def points(options):
    # The paddings of a seed follow each other, because they share the features inside the
    # photographs.
    for (name, origin), seed in itertools.product(list_subjects(options), range(options.seeds)):
        for padding in options.paddings:
            yield Trace("neurons", name, origin, padding, seed)


# --- One encoder ----------------------------------------------------------------------------------


def measure(point: Trace, options, shared: Shared) -> dict:
    """Counts padding-aware channels and reads H in every stage."""
    subject = shared.subjects[point.encoder, point.weights]
    paths = shared.paths[point.seed]
    inside = look_inside(subject, point.seed, paths)
    features = inside.features
    if point.padding != INSIDE:
        model = subject.model.clone(padding=point.padding)
        features = patterns.features(model, inside.variables, inside.crop, subject.stages)
    stages = []
    for stage in subject.stages:
        maps = features[stage]
        stages.append(
            {
                "stage": stage,
                "channels": maps.shape[3],
                "share": aware_share(maps, inside.features[stage]),
                "r2": read_position(maps),
            }
        )
    return {"images": len(paths), "stages": stages}


def aware_share(maps: np.ndarray, borderless: np.ndarray) -> float:
    """Returns the share of channels with different values at the border and in the middle.

    Args:
      maps: features of one stage, [n, height, width, channels].
      borderless: the same features without a border. The threshold for one half of the images is
        chosen on the borderless features of the other half.
    """
    half = len(maps) // 2
    first = slice(half)
    second = slice(half, None)
    shares = []
    for chosen, counted in ((first, second), (second, first)):
        threshold = np.quantile(border_statistic(borderless[chosen]), 1 - _FALSE_POSITIVES)
        shares.append((border_statistic(maps[counted]) > threshold).mean())
    return float(np.mean(shares))


def border_statistic(maps: np.ndarray) -> np.ndarray:
    """Compares each channel's values at the border with those in the middle of the map.

    Args:
      maps: [n, height, width, channels].

    Returns the largest statistic of the four sides, [channels]. The sides are the outermost rows
    and columns, without their outer quarters, where two borders meet.
    """
    rows, columns = (slice(size // 4, size - size // 4) for size in maps.shape[1:3])
    sides = [
        maps[:, 0, columns],
        maps[:, -1, columns],
        maps[:, rows, 0],
        maps[:, rows, -1],
    ]
    middle = maps[:, rows, columns]
    largest = np.zeros(maps.shape[3])
    for channel in range(maps.shape[3]):
        reference = np.sort(middle[..., channel], axis=None)
        for side in sides:
            sample = np.sort(side[..., channel], axis=None)
            largest[channel] = max(largest[channel], distance(sample, reference))
    return largest


def distance(sample: np.ndarray, reference: np.ndarray) -> float:
    """Returns the Kolmogorov-Smirnov statistic of two sorted samples.

    The statistic is the largest distance between the cumulative distributions, from 0 to 1. Between
    two values of `sample`, only the distribution of the reference grows, so the largest distance is
    at one of these values or just before it.
    """
    largest = 0.0
    for side in ("left", "right"):
        here = np.searchsorted(sample, sample, side) / len(sample)
        there = np.searchsorted(reference, sample, side) / len(reference)
        largest = max(largest, float(np.abs(here - there).max()))
    return largest


def read_position(maps: np.ndarray) -> float:
    """Returns the exact linear readout's R2 of H in a stage, median over images.

    Args:
      maps: features of one stage. The readout is fitted to the first half and scored on the
        other.
    """
    half = len(maps) // 2
    goal = target("H", FEATURE_SIZE)
    resized = np.asarray(resize(jnp.asarray(maps), FEATURE_SIZE))
    # The first half of the images fits the readout; its last quarter chooses the ridge strength.
    train, held_out, test = np.split(resized, [3 * half // 4, half])
    predicted = fit_exact(train, held_out, goal[None])(test)
    # R2 has no lower bound: one image with rare features would decide a mean.
    return float(np.median(scores(predicted[:, 0], goal)["r2"]))


# --- Report ---------------------------------------------------------------------------------------


def tabulate(results: list[dict], name: str) -> str:
    """Tabulates one column of `COLUMNS` by stage: a column for each padding."""
    _, factor, digits = COLUMNS[name]
    paddings = study.unique(results, "padding")
    lines = []
    for encoder, origin in subjects_of(results):
        records = study.select(flatten(results), encoder=encoder, weights=origin)
        for stage in study.unique(records, "stage"):
            measured = study.select(records, stage=stage)
            cells = []
            for padding in paddings:
                values = factor * study.values(measured, name, padding=padding)
                cells.append(tables.spread(values, digits))
            count = str(measured[0]["channels"])
            seeds = str(len(study.unique(measured, "seed")))
            lines.append([encoder, origin, stage, count, *cells, seeds])
    return tables.table(["encoder", "weights", "stage", "channels", *paddings, "n"], lines)


def draw(results: list[dict]) -> Figure:
    """Draws both columns by stage: a panel for each encoder and origin of its weights."""
    subjects = subjects_of(results)
    figure = Figure(figsize=(2.6 * len(subjects) + 0.6, 5), layout="constrained")
    axes = figure.subplots(len(COLUMNS), len(subjects), squeeze=False, sharex="col", sharey="row")
    for axis_row, (name, (heading, factor, _)) in zip(axes, COLUMNS.items()):
        for axis, (encoder, origin) in zip(axis_row, subjects):
            records = study.select(flatten(results), encoder=encoder, weights=origin)
            stages = study.unique(records, "stage")
            for padding in study.unique(records, "padding"):
                measured = study.select(records, padding=padding)
                curve = [factor * study.values(measured, name, stage=stage) for stage in stages]
                study.draw_curve(axis, stages, curve, marker="o", ms=3, lw=1, label=padding)
            axis.axhline(0, color="black", lw=0.5)
            axis.tick_params(axis="x", rotation=60, labelsize=7)
        axis_row[0].set_ylabel(heading)
    for axis, (encoder, origin) in zip(axes[0], subjects):
        axis.set_title(f"{encoder}, {origin}", fontsize=9)
    axes[1, 0].set_ylim(-0.2, 1)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def describe_draw(count: int, options) -> str:
    """Describes which photographs the seeds have."""
    if count < options.images:
        return "all seeds have the same photographs, divided into other halves"
    return (
        f"each seed draws {count} at random, or divides all into other halves if there are no more"
    )


def report(results: list[dict], options) -> study.Report:
    (count,) = study.unique(results, "images")
    text = f"""# Padding-aware channels

Crops of {options.size} px of {count} photographs. Mean ± sample standard deviation over n seeds of
weights, where they are random, and of photographs; {describe_draw(count, options)}.
"Inside" has no border: its column is the rate of false positives. On the half of the photographs
that a threshold was chosen on, {_FALSE_POSITIVES:.0%} of a stage's channels exceed it, and at least
one channel; on the other half, it can be more or fewer.

## Share of channels that tell the border, %

{tabulate(results, "share")}
## R2 of H, by the exact linear readout of the same stage

The median over unseen photographs.

{tabulate(results, "r2")}
![Padding-aware channels and R2 of H by stage](neurons.png)
"""
    return study.Report(text, {"neurons.png": draw(results)})


STUDY = study.Study(
    description=__doc__,
    results="neurons.json",
    add_options=add_options,
    axes=("encoders", "paddings", "seeds"),
    files=("photographs", "trained"),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
