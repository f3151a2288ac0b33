"""The commands: each computes its numbers and draws its figure.

A command takes a `Subject` and returns (figure, numbers for results.json).
"""

import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cnnjax.inspect import Field
from cnnjax.nn import FILLS, linear_interpolation
from cnnjax.runtime.progress import progress
from cnnjax.runtime.types import AnyArray
from cnnjax.train.evaluate import class_probabilities
from cnnjax.visualize.ascent import maximize
from cnnjax.visualize.borders import equivariance_error
from cnnjax.visualize.class_maps import grad_cam
from cnnjax.visualize.fields import effective_receptive_field, effective_size
from cnnjax.visualize.figures import grid, mosaic, overlay, patches, set_title, signals_to_rgb
from cnnjax.visualize.gradients import check_relus, saliency
from cnnjax.visualize.occluders import corners, occlusion
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

_LOG = logging.getLogger("cnnjax")

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
            # Each channel from its minimum, black, to its maximum, white.
            shown = shown - shown.min((1, 2), keepdims=True)
            largest = np.maximum(shown.max((1, 2), keepdims=True), _TINY)
            axis.imshow(mosaic(shown / largest), cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{stage}: {len(shown)} of {stage_map.shape[2]} channels", fontsize=8)
            numbers.append(
                {
                    "photograph": subject.photograph_name(path),
                    "stage": stage,
                    "shape": stage_map.shape,
                    "mean": stage_map.mean((0, 1)),
                    "max": stage_map.max((0, 1)),
                    "silent_channels": (stage_map == 0).all((0, 1)).sum(),
                }
            )
    return figure, {"maps": numbers}


def maximized(subject: Subject):
    """Shows images that excite channels most."""
    _find_fields(subject, subject.stages)
    figure, axes = grid(1, len(subject.stages), 4.0)
    numbers = []
    for axis, stage in zip(axes[0], subject.stages):
        images, units = _maximized(subject, stage, subject.channels(stage, 16))
        numbers += units
        axis.imshow(mosaic(images))
        count = stage_channels(subject.model)[stage]
        axis.set_title(f"{stage}: {len(images)} of {count} channels", fontsize=9)
    return figure, {"units": numbers}


def _find_fields(subject: Subject, stages: Sequence[str]) -> dict[str, Field]:
    """Finds the receptive fields of stages.

    A command that needs them calls this first: it raises `ValueError` before anything is computed.
    """
    return {stage: receptive_field(subject.model, stage) for stage in stages}


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
    field = _find_fields(subject, [stage])[stage]
    rules = _usable_rules(subject, [stage], ("deconvnet", "guided"))
    strongest = _strongest(subject, stage, subject.channels(stage, 6), 9)
    figure, axes = grid(1 + len(rules), len(strongest), 2.6)
    for column, units in zip(axes.T, strongest):
        for axis, shown in zip(column, _seen_and_signals(subject, units, field, rules)):
            axis.imshow(mosaic(shown))
        column[0].set_title(f"{stage}, channel {units['channel']}", fontsize=9)
    for axis, label in zip(axes[:, 0], ("photographs", *rules)):
        axis.set_ylabel(label)
    return figure, {"channels": _with_names(subject, strongest)}


def _usable_rules(subject, stages, rules):
    """Returns the rules, or none, with a line of log, if ReLUs up to a stage do not follow them."""
    try:
        for stage in stages:
            check_relus(subject.model, stage, rules[0])
    except ValueError as error:
        _LOG.warning("left out: %s, since %s", ", ".join(rules), error)
        return ()
    return rules


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


def _seen_and_signals(subject, units, field, rules):
    """Returns what a channel's strongest units see, then what each rule sends back.

    All are RGB in [0, 1].
    """
    stage = units["stage"]
    places = units["places"]
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
    """Shows the probability of the explained class while a gray square hides parts."""
    size = subject.options.size
    stride = subject.options.stride
    # A value for each pixel, since the last squares are closer together than the others.
    to_rows, to_columns = (
        linear_interpolation(np.arange(side), corners(side, size, stride) + (size - 1) / 2)
        for side in subject.model.input_shape[:2]
    )
    images = subject.photographs()
    figure, axes = grid(2, len(images), 2.8)
    numbers = []
    with progress(len(images), "photographs hidden bit by bit") as advance:
        for column, image, path in zip(axes.T, images, subject.paths):
            x = subject.input(image[None])
            probabilities = _probabilities(subject, logits(subject.model, subject.variables, x))
            (row,) = _show_photographs(subject, column[:1], image[None], [path], probabilities)
            label = row["class"]
            hidden = occlusion(subject.model, subject.variables, x[0], size, stride)
            shares = _probabilities(subject, hidden)[..., label]
            by_pixel = to_rows @ shares @ to_columns.T
            heat = overlay(column[1], image, by_pixel, (0, 0), (1, 1), vmin=0, vmax=1)
            name = subject.class_name(label)
            set_title(column[1], f"{name} with a square hidden there", fontsize=7)
            numbers.append(row | {"hidden": shares})
            advance(1)
    figure.colorbar(heat, ax=axes[1], shrink=0.8)
    return figure, {"photographs": numbers}


def class_maps(subject: Subject):
    """Shows image regions that support the explained class."""
    (stage,) = subject.stages
    first, steps = map_grid(subject.model, stage)
    images = subject.photographs()
    x = subject.input(images)
    probabilities = _probabilities(subject, logits(subject.model, subject.variables, x))
    labels = subject.explained(probabilities)
    heat = np.asarray(grad_cam(subject.model, subject.variables, x, stage, labels))
    figure, axes = grid(2, len(images), 2.4)
    rows = _show_photographs(subject, axes[0], images, subject.paths, probabilities)
    for axis, image, image_heat in zip(axes[1], images, heat):
        overlay(axis, image, image_heat, first, steps)
        axis.set_title(f"Grad-CAM, {stage}", fontsize=7)
    numbers = [row | {"map": image_heat} for row, image_heat in zip(rows, heat)]
    return figure, {"photographs": numbers}


def pixel_gradients(subject: Subject):
    """Shows the pixels whose change moves the score of the explained class most."""
    images = subject.photographs()
    x = subject.input(images)
    probabilities = _probabilities(subject, logits(subject.model, subject.variables, x))
    labels = subject.explained(probabilities)
    signals = saliency(subject.model, subject.variables, x, "logits", labels, "gradient")
    # The largest over the colors (Simonyan et al. 2013, section 3.1).
    strength = np.abs(np.asarray(signals, np.float32)).max(3)
    figure, axes = grid(2, len(images), 2.4)
    rows = _show_photographs(subject, axes[0], images, subject.paths, probabilities)
    for axis, image_strength in zip(axes[1], strength):
        # A few strong pixels would leave the others black.
        white = max(np.quantile(image_strength, 0.995), _TINY)
        axis.imshow(image_strength, cmap="gray", vmin=0, vmax=white)
        axis.set_title("largest absolute gradient over colors", fontsize=7)
    return figure, {"photographs": rows}


def _show_photographs(subject, axes, images, paths, probabilities):
    """Shows photographs, each with the class to explain; returns their rows for results.json."""
    rows = []
    for axis, image, path, of_classes in zip(axes, images, paths, probabilities):
        (label,) = subject.explained(of_classes[None]).tolist()
        name = subject.class_name(label)
        _show_photograph(axis, image, f"{path.stem}\n{name}: {of_classes[label]:.2f}")
        photograph = subject.photograph_name(path)
        rows.append({"photograph": photograph, "class": label, "probability": of_classes[label]})
    return rows


def _show_photograph(axis, image, title):
    axis.imshow(image)
    set_title(axis, title, fontsize=7)


def _probabilities(
    subject: Subject, logits: Float[AnyArray, "*images classes"]
) -> Float[np.ndarray, "*images classes"]:
    return class_probabilities(logits, subject.multi_label)


def fields(subject: Subject):
    """Shows effective receptive fields against theoretical ones."""
    receptive_fields = _find_fields(subject, subject.stages)
    x = subject.input(subject.photographs())
    figure, axes = grid(1, len(subject.stages), 3.2)
    numbers = []
    for axis, stage in zip(axes[0], subject.stages):
        effective = effective_receptive_field(subject.model, subject.variables, x, stage)
        side = effective_size(effective)
        field = receptive_fields[stage]
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
    # No fill changes the stride, and with zeros no map is too small.
    padded = subject.model.clone(padding="zeros")
    strides = {stage: receptive_field(padded, stage).step[0] for stage in subject.stages}
    # Without padding, little is left of an image of the usual size.
    x = subject.input(subject.read(subject.paths, times=2))
    rows = _compare_shifts(subject, x, strides)
    curves = [row for row in rows if row["error"] is not None]
    left_out = [row for row in rows if row["error"] is None]
    if not curves:
        raise ValueError(f"no stage can be compared under any padding: {left_out[0]['reason']}")
    for stage in strides:
        of_stage = [row for row in left_out if row["stage"] == stage]
        if of_stage:
            fills = ", ".join(row["padding"] for row in of_stage)
            _LOG.warning("stage=%r: left out %s (%s)", stage, fills, of_stage[0]["reason"])
    return _draw_errors(curves), {"images": x.shape, "errors": rows}


def _compare_shifts(subject, x, strides) -> list[dict]:
    """Measures the errors of shifted features in each stage, under each fill.

    A row without an error has the reason.
    """
    rows = []
    with progress(len(FILLS) * len(strides), "stages compared") as advance:
        for stage, stride in strides.items():
            for fill in FILLS:
                advance(1)
                row = {"stage": stage, "padding": fill}
                model = subject.model.clone(padding=fill)
                try:
                    error = equivariance_error(model, subject.variables, x, stage)
                except ValueError as reason:
                    # Without padding, deep stages may vanish.
                    rows.append(row | {"error": None, "reason": str(reason)})
                    continue
                rows.append(row | {"pixels": stride * np.arange(len(error)), "error": error})
    return rows


def _draw_errors(rows: list[dict]) -> Figure:
    """Draws the errors of each stage by distance to the border, a curve for each fill."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    # Room for the legend.
    figure = Figure(figsize=(3.6 * len(stages) + 1.2, 3.6), layout="constrained")
    axes = figure.subplots(1, len(stages), squeeze=False, sharey=True)
    # A fill may be missing in some stages, so the legend is that of all.
    lines = {}
    for axis, stage in zip(axes[0], stages):
        for row in rows:
            if row["stage"] != stage:
                continue
            fill = row["padding"]
            number = FILLS.index(fill)
            (lines[fill],) = axis.plot(
                row["pixels"],
                np.maximum(row["error"], _FLOOR),
                marker=".",
                markersize=4,
                color=f"C{number}",
                linestyle="-" if number < _COLORS else "--",
            )
        axis.set(yscale="log", xlabel="distance to the border (pixels)", title=stage)
    axes[0, 0].set_ylabel(f"relative error of shifted features (at least {_FLOOR:g})")
    figure.legend(list(lines.values()), list(lines), loc="outside right upper", fontsize=8)
    return figure


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
    fields_by_stage = _find_fields(subject, stages)
    rules = _usable_rules(subject, stages, ("guided",))
    figure, axes = grid(2 + len(rules), len(stages), 4.0)
    numbers = []
    for column, stage, level in zip(axes.T, stages, names):
        channels = subject.channels(stage, 16)
        images, units = _maximized(subject, stage, channels)
        strongest = _strongest(subject, stage, channels, 1)
        field = fields_by_stage[stage]
        parts = [_seen_and_signals(subject, row, field, rules) for row in strongest]
        seen_and_signals = [np.concatenate(of_channels) for of_channels in zip(*parts)]
        for axis, shown in zip(column, (images, *seen_and_signals)):
            axis.imshow(mosaic(shown))
        count = stage_channels(subject.model)[stage]
        title = f"{level} level: {stage}, {len(channels)} of {count} channels"
        column[0].set_title(title, fontsize=10)
        for unit, row in zip(units, _with_names(subject, strongest)):
            numbers.append(unit | row)
    labels = ("maximized", "best patch", "guided backpropagation")
    for axis, label in zip(axes[:, 0], labels):
        axis.set_ylabel(label)
    return figure, {"units": numbers}


COMMANDS = {
    "filters": filters,
    "activations": maps,
    "maximise": maximized,
    "patches": top_patches,
    "occlusion": occluded,
    "grad-cam": class_maps,
    "saliency": pixel_gradients,
    "field": fields,
    "equivariance": equivariance,
    "levels": levels,
}
