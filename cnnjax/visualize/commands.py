"""The commands: each computes its numbers and draws its figure.

A command takes a `Subject` and returns (figure, numbers for results.json).
"""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cnnjax.nn import FILLS
from cnnjax.runtime.progress import progress
from cnnjax.runtime.types import AnyArray
from cnnjax.train.evaluate import class_probabilities
from cnnjax.visualize.ascent import maximize
from cnnjax.visualize.borders import equivariance_error
from cnnjax.visualize.class_maps import grad_cam
from cnnjax.visualize.fields import effective_receptive_field, effective_size
from cnnjax.visualize.figures import grid, mosaic, overlay, patches, set_title, signals_to_rgb
from cnnjax.visualize.gradients import saliency
from cnnjax.visualize.occluders import occlusion
from cnnjax.visualize.stages import (
    activations,
    first_filters,
    logits,
    map_grid,
    peaks,
    receptive_field,
    stage_channels,
)
from cnnjax.visualize.subject import Subject, spread

_FLOOR = 1e-7  # what a logarithmic axis shows for an error of 0
_TINY = 1e-12
_COLORS = 10  # of matplotlib's cycle


def filters(subject: Subject):
    """Shows the kernels of the first convolution."""
    name, kernel = first_filters(subject.model, subject.variables)
    kernels = kernel.transpose(3, 0, 1, 2)
    height, width = kernel.shape[:2]
    figure, ((axis,),) = grid(1, 1, 6.0)
    axis.imshow(mosaic(signals_to_rgb(kernels)))
    axis.set_title(f"{subject.name}: the {len(kernels)} filters of {name}, {height}x{width}")
    norms = np.linalg.norm(kernels.reshape(len(kernels), -1), axis=1)
    return figure, {"layer": name, "shape": kernel.shape, "norms": norms}


def maps(subject: Subject):
    """Shows maps of stages on photographs."""
    images = subject.photographs()
    figure, axes = grid(len(images), 1 + len(subject.stages), 3.2)
    numbers = []
    for row, image, path in zip(axes, images, subject.paths):
        row[0].imshow(image)
        set_title(row[0], path.stem, fontsize=8)
        x = subject.input(image[None])
        for axis, stage in zip(row[1:], subject.stages):
            (stage_map,) = activations(subject.model, subject.variables, x, stage)
            stage_map = np.asarray(stage_map, np.float32)
            shown = stage_map.transpose(2, 0, 1)[subject.channels(stage, 36)]
            strongest = np.maximum(shown.max((1, 2), keepdims=True), _TINY)
            axis.imshow(mosaic(shown / strongest), cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{stage}: {len(shown)} of {stage_map.shape[2]} channels", fontsize=8)
            largest = stage_map.max((0, 1))
            numbers.append(
                {
                    "photograph": subject.photograph_name(path),
                    "stage": stage,
                    "shape": stage_map.shape,
                    "mean": stage_map.mean((0, 1)),
                    "max": largest,
                    "silent_channels": (largest <= 0).sum(),
                }
            )
    return figure, {"maps": numbers}


def maximized(subject: Subject):
    """Shows images that excite channels most."""
    figure, axes = grid(1, len(subject.stages), 4.0)
    numbers = []
    for axis, stage in zip(axes[0], subject.stages):
        images, units = _maximized(subject, stage, subject.channels(stage, 16))
        numbers += units
        axis.imshow(mosaic(images))
        count = stage_channels(subject.model)[stage]
        axis.set_title(f"{stage}: {len(images)} of {count} channels", fontsize=9)
    return figure, {"units": numbers}


def _maximized(subject, stage, channels):
    images, scores = maximize(
        subject.model,
        subject.variables,
        stage=stage,
        channels=channels,
        steps=subject.options.steps,
        jitter=subject.options.jitter,
        total_variation=subject.options.total_variation,
        moments=subject.moments,
    )
    units = []
    for channel, before, after in zip(channels, *scores):
        units.append({"stage": stage, "channel": channel, "noise": before, "maximized": after})
    return images, units


def top_patches(subject: Subject):
    """Shows the nine patches that excite each channel most, and their deconvolution."""
    (stage,) = subject.stages
    rules = ("deconvnet", "guided")
    strongest = _strongest(subject, stage, subject.channels(stage, 6), 9)
    figure, axes = grid(1 + len(rules), len(strongest), 2.6)
    for column, units in zip(axes.T, strongest):
        for axis, shown in zip(column, _seen_and_signals(subject, units, rules)):
            axis.imshow(mosaic(shown))
        column[0].set_title(f"{stage}, channel {units['channel']}", fontsize=9)
    for axis, label in zip(axes[:, 0], ("photographs", *rules)):
        axis.set_ylabel(label)
    return figure, {"channels": _with_names(subject, strongest)}


def _strongest(subject, stage, channels, count):
    """Finds, for each channel, the photographs that excite it most.

    Each comes with the place of its strongest unit.
    """
    batch_peaks = []
    for batch in subject.batches():
        batch_peaks.append(peaks(subject.model, subject.variables, subject.input(batch), stage))
    values, places = (np.concatenate(parts) for parts in zip(*batch_peaks))
    best = np.argsort(-values, axis=0, kind="stable")[:count]
    rows = []
    for channel in channels:
        photographs = best[:, channel]
        rows.append(
            {
                "stage": stage,
                "channel": channel,
                "photographs": photographs,
                "activations": values[photographs, channel],
                "places": places[photographs, channel],
            }
        )
    return rows


def _seen_and_signals(subject, units, rules):
    """Returns what a channel's strongest units see, then what each rule sends back.

    All are RGB in [0, 1].
    """
    stage = units["stage"]
    places = units["places"]
    field = receptive_field(subject.model, stage)
    images = subject.read([subject.paths[i] for i in units["photographs"]])
    x = subject.input(images)
    rows = [patches(images / np.float32(255), places, field, 1.0)]
    for rule in rules:
        signals = saliency(subject.model, subject.variables, x, stage, units["channel"], rule)
        rows.append(signals_to_rgb(patches(np.asarray(signals), places, field, 0.0)))
    return rows


def _with_names(subject, rows):
    """Returns the rows with the photographs' names in place of their numbers."""
    named = []
    for row in rows:
        names = [subject.photograph_name(subject.paths[i]) for i in row["photographs"]]
        named.append(row | {"photographs": names})
    return named


def occluded(subject: Subject):
    """Shows the predicted class's probability while a gray square hides parts."""
    size = subject.options.size
    stride = subject.options.stride
    images = subject.photographs()
    figure, axes = grid(2, len(images), 2.8)
    numbers = []
    with progress(len(images), "photographs hidden bit by bit") as advance:
        for column, image, path in zip(axes.T, images, subject.paths):
            x = subject.input(image[None])
            (probability,) = _probabilities(subject, logits(subject.model, subject.variables, x))
            label = int(probability.argmax())
            hidden = occlusion(subject.model, subject.variables, x[0], size, stride)
            shares = _probabilities(subject, hidden)[..., label]
            name = subject.class_name(label)
            _show_photograph(column[0], image, f"{path.stem}\n{name}: {probability[label]:.2f}")
            center = (size - 1) / 2
            first = (center, center)
            heat = overlay(column[1], image, shares, first, (stride, stride), vmin=0, vmax=1)
            set_title(column[1], f"{name} with a square hidden there", fontsize=7)
            numbers.append(
                {
                    "photograph": subject.photograph_name(path),
                    "class": label,
                    "probability": probability[label],
                    "hidden": shares,
                }
            )
            advance(1)
    figure.colorbar(heat, ax=axes[1], shrink=0.8)
    return figure, {"photographs": numbers}


def class_maps(subject: Subject):
    """Shows image regions that support the predicted class."""
    (stage,) = subject.stages
    images = subject.photographs()
    x = subject.input(images)
    probabilities = _probabilities(subject, logits(subject.model, subject.variables, x))
    labels = probabilities.argmax(1)
    heat = np.asarray(grad_cam(subject.model, subject.variables, x, stage, labels))
    first, steps = map_grid(subject.model, stage)
    figure, axes = grid(2, len(images), 2.4)
    numbers = []
    for number, (column, path) in enumerate(zip(axes.T, subject.paths)):
        label = int(labels[number])
        probability = probabilities[number, label]
        title = f"{path.stem}\n{subject.class_name(label)}: {probability:.2f}"
        _show_photograph(column[0], images[number], title)
        overlay(column[1], images[number], heat[number], first, steps)
        column[1].set_title(f"Grad-CAM, {stage}", fontsize=7)
        numbers.append(
            {
                "photograph": subject.photograph_name(path),
                "class": label,
                "probability": probability,
                "map": heat[number],
            }
        )
    return figure, {"photographs": numbers}


def _show_photograph(axis, image, title):
    axis.imshow(image)
    set_title(axis, title, fontsize=7)


def _probabilities(
    subject: Subject, logits: Float[AnyArray, "*images classes"]
) -> Float[np.ndarray, "*images classes"]:
    return class_probabilities(logits, subject.multi_label)


def fields(subject: Subject):
    """Shows effective receptive fields against theoretical ones."""
    x = subject.input(subject.photographs())
    figure, axes = grid(1, len(subject.stages), 3.2)
    numbers = []
    for axis, stage in zip(axes[0], subject.stages):
        effective = effective_receptive_field(subject.model, subject.variables, x, stage)
        side = effective_size(effective)
        field = receptive_field(subject.model, stage)
        height, width = field.size()
        rows, columns = activations(subject.model, subject.variables, x[:1], stage).shape[1:3]
        top, left = field.shifted((rows // 2, columns // 2)).low
        axis.imshow(effective, cmap="gray", vmin=0, vmax=1)
        # imshow puts pixel centers on whole numbers: a box from pixel `left` on begins at
        # left - 0.5.
        axis.add_patch(_square(left - 0.5, top - 0.5, width, height, "red"))
        axis.add_patch(
            _square(
                left + (width - side - 1) / 2, top + (height - side - 1) / 2, side, side, "orange"
            )
        )
        margin = 0.05 * height
        axis.set_xlim(left - 0.5 - margin, left + width - 0.5 + margin)
        axis.set_ylim(top + height - 0.5 + margin, top - 0.5 - margin)
        theoretical = f"{stage}: theoretical {height}x{width} (red)"
        axis.set_title(f"{theoretical},\neffective {side:.1f} (orange)", fontsize=8)
        numbers.append({"stage": stage, "theoretical": field.size(), "effective": side})
    return figure, {"stages": numbers}


def _square(left, top, width, height, color):
    return Rectangle((left, top), width, height, fill=False, color=color)


def equivariance(subject: Subject):
    """Shows the error of shifted features by distance to the border, by padding.

    Raises `ValueError` if one padding is asked for.
    """
    if subject.options.padding is not None:
        raise ValueError(
            f"padding={subject.options.padding!r}: equivariance compares all paddings; leave it out"
        )
    # Without padding, little is left of an image of the usual size.
    x = subject.input(subject.read(subject.paths, times=2))
    stages = subject.stages
    figure = Figure(figsize=(3.6 * len(stages), 3.6), layout="constrained")
    axes = figure.subplots(1, len(stages), squeeze=False, sharey=True)
    numbers = []
    with progress(len(FILLS) * len(stages), "stages compared") as advance:
        for axis, stage in zip(axes[0], stages):
            stride = receptive_field(subject.model, stage).step[0]
            for number, fill in enumerate(FILLS):
                advance(1)
                row = {"stage": stage, "padding": fill}
                model = subject.model.clone(padding=fill)
                try:
                    error = equivariance_error(model, subject.variables, x, stage)
                except ValueError as reason:
                    # Without padding, deep stages may vanish.
                    numbers.append(row | {"error": None, "reason": str(reason)})
                    continue
                pixels = stride * np.arange(len(error))
                axis.plot(
                    pixels,
                    np.maximum(error, _FLOOR),
                    marker=".",
                    markersize=4,
                    label=fill,
                    color=f"C{number}",
                    linestyle="-" if number < _COLORS else "--",
                )
                numbers.append(row | {"pixels": pixels, "error": error})
            axis.set(yscale="log", xlabel="distance to the border (pixels)", title=stage)
    axes[0, 0].set_ylabel(f"relative error of shifted features (at least {_FLOOR:g})")
    axes[0, -1].legend(fontsize=8)
    return figure, {"images": x.shape, "errors": numbers}


def levels(subject: Subject):
    """Shows low-, mid- and high-level features.

    They are three stages and what excites their channels.
    """
    stages = subject.options.stages
    if not stages:
        stages = spread(subject.stages, 3)
    if len(stages) > 3:
        raise ValueError(f"stages={', '.join(stages)} are more than three: low, mid and high level")
    names = {1: ("one",), 2: ("low", "high"), 3: ("low", "mid", "high")}[len(stages)]
    figure, axes = grid(3, len(stages), 4.0)
    numbers = []
    for column, stage, level in zip(axes.T, stages, names):
        channels = subject.channels(stage, 16)
        images, units = _maximized(subject, stage, channels)
        strongest = _strongest(subject, stage, channels, 1)
        pairs = [_seen_and_signals(subject, row, ("guided",)) for row in strongest]
        seen, signals = (np.concatenate(parts) for parts in zip(*pairs))
        for axis, shown in zip(column, (images, seen, signals)):
            axis.imshow(mosaic(shown))
        count = stage_channels(subject.model)[stage]
        title = f"{level} level: {stage}, {len(channels)} of {count} channels"
        column[0].set_title(title, fontsize=10)
        for unit, row in zip(units, _with_names(subject, strongest)):
            numbers.append(unit | row)
    for axis, label in zip(axes[:, 0], ("maximized", "best patch", "guided backpropagation")):
        axis.set_ylabel(label)
    return figure, {"units": numbers}


COMMANDS = {
    "filters": filters,
    "activations": maps,
    "maximise": maximized,
    "patches": top_patches,
    "occlusion": occluded,
    "grad-cam": class_maps,
    "field": fields,
    "equivariance": equivariance,
    "levels": levels,
}
