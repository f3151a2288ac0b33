"""The figures, one per topic."""

import itertools

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cnnjax.nn import FILLS, output_size
from experiments.basics import numbers
from experiments.claims.figures import annotate
from experiments.claims.operations import MAP, one_channel, plane
from experiments.claims.position import SIZE

# Colors of maps with positive and negative numbers.
SIGNED = {"cmap": "PiYG", "vmin": -4, "vmax": 4}


def draw_cells(axis, values, title: str = "", size: float = 8, **colors) -> None:
    """Draws a map [rows, columns] with its numbers.

    NaN is an empty cell; `size` 0 leaves the numbers out.
    """
    values = np.asarray(values, float)
    colors.setdefault("cmap", "Blues")
    image = axis.imshow(values, **colors)
    # Numbers on dark cells are white. The weights of red, green and blue give their brightness.
    brightness = image.to_rgba(values)[..., :3] @ (0.3, 0.6, 0.1)
    if size:
        annotate(axis, values, np.where(brightness < 0.5, "white", "black"), size)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def outline(axis, row: int, column: int, size: int, color: str = "red") -> None:
    """Draws a window's frame over a map."""
    corner = (column - 0.5, row - 0.5)
    axis.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=color, lw=2))


# --- Edges ----------------------------------------------------------------------------------------


def draw_sobel(gray: np.ndarray) -> Figure:
    """Draws a photograph's Sobel responses, and the false edge of zero padding."""
    responses = numbers.sobel(gray)
    border = numbers.sobel(gray, "zeros")["magnitude"]
    most = np.quantile(responses["magnitude"], 0.99)
    signed = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
    positive = {"cmap": "gray", "vmin": 0, "vmax": most}
    angles = {"cmap": "hsv", "vmin": -180, "vmax": 180, "interpolation": "nearest"}
    strong = np.where(responses["magnitude"] > most / 4, responses["direction"], np.nan)
    panels = (
        ("photograph", gray, {"cmap": "gray"}),
        ("-1 -2 -1 / 0 0 0 / 1 2 1 (red: brighter downwards)", responses["down"], signed),
        ("its transpose (red: brighter to the right)", responses["right"], signed),
        ("magnitude", responses["magnitude"], positive),
        ("direction of growing brightness, at strong edges", strong, angles),
        ("padded with zeros: lower right corner", border[-64:, -64:], positive),
    )
    figure = Figure(figsize=(11.5, 7.8), layout="constrained")
    for axis, (title, values, colors) in zip(figure.subplots(2, 3).ravel(), panels):
        image = axis.imshow(values, **colors)
        axis.set(xticks=[], yticks=[], facecolor="black")
        axis.set_title(title, fontsize=10)
        if colors is angles:
            ticks = (-180, -90, 0, 90, 180)
            place = {"location": "bottom", "aspect": 40, "pad": 0.02}
            bar = figure.colorbar(image, ax=axis, ticks=ticks, **place)
            bar.ax.set_xticklabels(["left", "up", "right", "down", "left"], fontsize=8)
    return figure


# --- Convolution ----------------------------------------------------------------------------------


def draw_operands(axes, image: np.ndarray, kernels: np.ndarray, bias: np.ndarray) -> None:
    """Draws in a row the channels of the input, then those of each filter, and its bias."""
    channels, filters = kernels.shape[2:]
    for channel in range(channels):
        draw_cells(axes[channel], image[:, :, channel], f"input, channel {channel}", 7, vmax=8)
    for number, panels in enumerate(axes[channels:].reshape(filters, channels + 1)):
        for channel in range(channels):
            title = f"filter {number}, channel {channel}"
            draw_cells(panels[channel], kernels[:, :, channel, number], title, 9, **SIGNED)
        panels[-1].set_axis_off()
        text = f"bias {bias[number]:g}"
        panels[-1].text(0.5, 0.5, text, ha="center", va="center", fontsize=11)


def draw_steps(image: np.ndarray, kernels: np.ndarray, bias: np.ndarray, stride: int) -> Figure:
    """Draws one row per window: its frame on each channel, products, maps so far."""
    windows = numbers.steps(image, kernels, bias, stride)
    channels = image.shape[2]
    filters = kernels.shape[3]
    values = np.stack([step["values"] for step in windows])
    size = [output_size(image.shape[axis], kernels.shape[axis], stride, 0) for axis in (0, 1)]
    maps = np.full((filters, *size), np.nan)
    result = {"cmap": "Oranges", "vmin": values.min(), "vmax": 2 * values.max()}

    figure = Figure(figsize=(19, 2 * (len(windows) + 1)))
    # Columns: the channels of the input; then, for each filter, its channels and its map.
    axes = figure.subplots(len(windows) + 1, channels + filters * (channels + 1))
    # The first row shows the input and the filters, each further row one window.
    draw_operands(axes[0], image, kernels, bias)
    for index, (step, line) in enumerate(zip(windows, axes[1:])):
        line[0].set_ylabel(f"window {index + 1}", fontsize=9)
        for channel in range(channels):
            draw_cells(line[channel], image[:, :, channel], "", 7, vmax=8)
            outline(line[channel], step["row"], step["column"], kernels.shape[0])
        for number, panels in enumerate(line[channels:].reshape(filters, channels + 1)):
            for channel in range(channels):
                part = step["products"][:, :, channel, number]
                draw_cells(panels[channel], part, f"products: sum {part.sum():g}", 9, **SIGNED)
            value = step["values"][number]
            maps[number].flat[index] = value
            draw_cells(panels[-1], maps[number], f"with bias: {value:g}", 9, **result)
            outline(panels[-1], *np.unravel_index(index, maps[number].shape), 1)
    return figure


def draw_unfolded(image: np.ndarray, kernels: np.ndarray, bias: np.ndarray, stride: int) -> Figure:
    """Draws the worked convolution as a matrix product, and its memory cost in VGG-16."""
    figure = Figure(figsize=(14, 9.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    draw_product(upper.subplots(1, 3, width_ratios=(27, 3, 3)), image, kernels, bias, stride)
    draw_growth(lower.subplots())
    return figure


def draw_product(axes, image, kernels, bias, stride: int) -> None:
    """Draws the unfolded input, the filters as columns, and their product."""
    rows = np.asarray(numbers.unfold(jnp.asarray(image)[None], kernels.shape[:2], stride))
    columns = kernels.reshape(-1, kernels.shape[3])
    height, width = rows.shape
    title = f"unfolded input, {height} x {width}: a window per row, its 3 x 3 cells of 3 channels"
    draw_cells(axes[0], rows, title, vmax=6, aspect="auto")
    axes[0].set_ylabel("window")
    title = f"filters, {columns.shape[0]} x {columns.shape[1]}"
    draw_cells(axes[1], columns, title, **SIGNED, aspect="auto")
    title = f"product + bias ({bias[0]:g}, {bias[1]:g})"
    draw_cells(axes[2], rows @ columns + bias, title, 9, cmap="Oranges", vmax=40, aspect="auto")
    # Lines between the rows of a window.
    cells_in_a_row = kernels.shape[1] * kernels.shape[2]
    for place in range(cells_in_a_row, width, cells_in_a_row):
        axes[0].axvline(place - 0.5, color="red", lw=1)
        axes[1].axhline(place - 0.5, color="red", lw=1)


def draw_growth(axis) -> None:
    """Draws the input of each of VGG-16's convolutions, as it is and unfolded."""
    layers = numbers.growth()
    places = np.arange(len(layers))
    for shift, kind in ((-0.2, "input"), (0.2, "unfolded")):
        megabytes = [numbers.MEGABYTES * row[kind] for row in layers]
        bars = axis.bar(places + shift, megabytes, 0.4, label=kind)
        axis.bar_label(bars, fmt="%.3g", fontsize=7)
    names = ["x".join(map(str, row["shape"])) for row in layers]
    axis.set_xticks(places, names, fontsize=8, rotation=20)
    axis.set(ylabel="MB in float32, one image", yscale="log")
    axis.set_title("What VGG-16's 13 convolutions read, as it is and unfolded")
    axis.legend()


# --- Pooling --------------------------------------------------------------------------------------


def draw_pooling(rows: list[dict]) -> Figure:
    """Draws the lecture's map under pools, and the effect of a shift by one pixel."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    for line, pool in zip(upper.subplots(2, 5), numbers.POOLS):
        for axis, (window, stride) in zip(line, ((1, 1), (2, 2), (3, 3), (2, 1), (3, 1))):
            draw_pool(axis, pool, window, stride)
    labels = {
        "changed": "share of values that differ",
        "difference": "RMS difference / deviation of the map",
    }
    for axis, (key, label) in zip(lower.subplots(1, 2), labels.items()):
        draw_bars(axis, rows[::-1], key)
        axis.set_title(f"photograph moved by one pixel: {label}", fontsize=10)
    return figure


def draw_pool(axis, pool: str, window: int, stride: int) -> None:
    """Draws the lecture's map after one pool; a window of 1 shows the map itself."""
    kind = "overlapping" if stride < window else "not overlapping"
    title = f"{pool}, {window}x{window}, stride {stride}\n{kind}"
    if window == 1:
        title = "the map, two windows framed"
    pooled = numbers.POOLS[pool](one_channel(MAP), window, stride)
    draw_cells(axis, plane(pooled), title, vmin=0, vmax=12)
    # The frames are two 2x2 windows on the map itself, and their results on maps pooled by 2x2.
    if window <= 2:
        side = 2 if window == 1 else 1
        # The second window begins at column 2 of the map.
        second = 2 // stride
        outline(axis, 0, 0, side)
        outline(axis, 0, second, side, "orange")


def draw_bars(axis, rows: list[dict], key: str) -> None:
    """Draws a bar with the value `key` of each row."""
    colors = {"none": "gray", "max": "C0", "average": "C1"}
    names = [f"{row['pool'].replace('none', 'no pooling')}, {row['window']}" for row in rows]
    values = [row[key] for row in rows]
    bars = axis.barh(names, values, color=[colors[row["pool"]] for row in rows])
    axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.12)


# --- Shift and sizes ------------------------------------------------------------------------------

# Panels by title: the number of the image, where -1 is the constant one, and the number of layers.
PANELS = {
    "noise": (0, 0),
    "1 layer": (0, 1),
    "2 layers": (0, 2),
    "4 layers": (0, 4),
    "7 layers": (0, 7),
    "7 layers, other noise": (1, 7),
    "7 layers, constant 4": (-1, 7),
}


def font_size(values: np.ndarray) -> float:
    """Returns the font size for a map's numbers; 0 for a map too large for numbers."""
    if len(values) > 12:
        return 0
    whole = (values == values.round()).all()
    return 8 if len(values) == SIZE and whole else 6


def draw_shift(images: np.ndarray, fills: tuple[str, ...] = FILLS) -> Figure:
    """Draws noise and the shift network's maps after 1, 2, 4, and 7 layers, by fill."""
    figure = Figure(figsize=(2.1 * len(PANELS), 2.1 * len(fills)))
    spaces = {"wspace": 0.05, "hspace": 0.05}
    axes = figure.subplots(len(fills), len(PANELS), gridspec_kw=spaces, squeeze=False)
    for fill, line in zip(fills, axes):
        maps = [y.round(1) for y in numbers.shift_maps(fill, images)]
        for axis, (title, (image, layers)) in zip(line, PANELS.items()):
            values = maps[layers][image]
            heading = title if fill == fills[0] else ""
            colors = {"cmap": "viridis_r", "vmin": 0, "vmax": 16}
            draw_cells(axis, values, heading, font_size(values), **colors)
        line[0].set_ylabel(fill, fontsize=11)
    return figure


def draw_sizes() -> Figure:
    """Draws the output size of 3x3 windows by input size and stride.

    Colors show the number of pixels that no window reads.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    sizes = range(3, 17)
    strides = range(1, 5)
    for axis, padding in zip(figure.subplots(2, 1), (0, 1)):
        rest = np.array(sizes)[None] + 2 * padding - 3
        unread = rest % np.array(strides)[:, None]
        axis.imshow(unread, cmap="Oranges", vmin=0, vmax=5, aspect="auto")
        for (row, s), (column, n) in itertools.product(enumerate(strides), enumerate(sizes)):
            text = f"{numbers.computed_size(n, padding, 3, s)}"
            if unread[row, column]:
                text += f"\n({numbers.formula(n, padding, 3, s):.2f})"
            axis.text(column, row, text, ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_yticks(range(len(strides)), strides)
        axis.set(xlabel="n", ylabel="stride")
        title = f"3x3 windows, p = {padding}: number of positions"
        axis.set_title(
            f"{title}; colored where the formula (in brackets) is no integer", fontsize=10
        )
    return figure
