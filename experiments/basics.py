"""The lectures' basics as pictures and numbers: edges, one convolution step by step, unfolding, pooling, shifting, sizes.

    python -m experiments.basics --workdir runs/basics [--photograph camera]

writes one figure per topic, `basics.json` with the numbers and `report.md` with a sentence beside each figure: in about half a
minute on two CPU cores. The layers are those of `cnnjax.nn`; ids in brackets, as (D13), are those of the claims ledger.
"""

import functools
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cnnjax import summary
from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.nn import FILLS, avg_pool, conv, max_pool, output_size, pad
from cnnjax.runtime import backend, command, tables, workdir

SOBEL = np.array(
    [[-1, -2, -1], [0, 0, 0], [1, 2, 1]], np.float32
)  # UTSA EE 6973 (D13), with its transpose
# NUS CS5242, lecture 8: a map to be pooled (A6); then the responses printed for stride 1 and stride 2 (A5).
MAP = np.array(
    [
        [3, 3, 0, 1, 1, 1],
        [7, 2, 1, 1, 5, 2],
        [7, 9, 1, 0, 5, 6],
        [5, 6, 1, 0, 3, 2],
        [9, 7, 0, 0, 0, 0],
        [4, 7, 0, 0, 0, 1],
    ],
    np.float32,
)
POOLED = np.array([[7, 1, 5], [9, 1, 6], [9, 0, 1]])  # what is printed for its 2x2 max-pool
PRINTED = {
    1: np.array([[6, 5, 7, 5], [6, 10, 13, 7], [11, 5, 2, 4], [8, 11, 10, 7]]),
    2: np.array([[6, 5, 7], [6, 10, 13], [11, 5, 2]]),
}
SHIFT = np.array(
    [[0, 0, 0], [1, 0, 0], [0, 0, 0]], np.float32
)  # UBC CPSC 532S, lecture 6 (section B); its bias is 1
_LAYERS = _WIDTH = 7
_MB = 4e-6  # of a float32
POOLS = {"max": max_pool, "average": avg_pool}
WINDOWS = {
    "stride 1": (1, 1),
    "stride 2": (1, 2),
    "2x2, stride 2": (2, 2),
    "3x3, stride 2": (3, 2),
    "2x2, stride 1": (2, 1),
    "4x4, stride 4": (4, 4),
    "4x4, stride 2": (4, 2),
}  # (window, stride); the overlapping 3x3, stride 2 is AlexNet's
# (what, n, p, k, s, the size that its source prints): first layers of the publications and the lectures' examples.
# AlexNet's paper (Krizhevsky et al. 2012) prints 224 pixels and, in figure 2, maps of 55; the lectures put it right (A14).
SIZES = (
    ("AlexNet as printed", 224, 0, 11, 4, 55),
    ("AlexNet in the lectures", 227, 0, 11, 4, 55),
    ("AlexNet in torchvision", 224, 2, 11, 4, 55),
    ("AlexNet, pool", 55, 0, 3, 2, 27),
    ("VGG", 224, 1, 3, 1, 224),
    ("ResNet", 224, 3, 7, 2, 112),
    ("Inception v3", 299, 0, 3, 2, 149),
    ("tutorial's Net (A11)", 32, 0, 5, 1, 28),
    ("NUS example (A5)", 7, 0, 3, 2, 3),
    ("UTSA example (D14)", 5, 1, 3, 2, 3),
)
_CASES = (
    range(1, 13),
    range(4),
    range(1, 8),
    range(1, 5),
)  # every n, p, k, s that the formula is checked over


def plane(image) -> jnp.ndarray:
    """One map [height, width] as a batch [1, height, width, 1]."""
    return jnp.asarray(image, jnp.float32)[None, :, :, None]


# --- Numbers -------------------------------------------------------------------------------------------------------------


def sobel(image: np.ndarray, fill: str = "replicate") -> dict[str, np.ndarray]:
    """Derivatives of `image` [height, width] downwards and to the right, their magnitude, and the direction in degrees in which it
    grows brighter (0 to the right, 90 downwards): each [height, width]."""
    kernel = jnp.asarray(np.stack([SOBEL, SOBEL.T], -1)[:, :, None])
    down, right = np.moveaxis(
        np.asarray(conv(plane(image), kernel, padding=1, fill=fill)[0]), -1, 0
    )
    return {
        "down": down,
        "right": right,
        "magnitude": np.hypot(down, right),
        "direction": np.degrees(np.arctan2(down, right)),
    }


def edge(degrees: float, size: int = 33, softness: float = 1.0) -> np.ndarray:
    """An edge [size, size] through the center from 0 to 255, brighter towards `degrees` (0 right, 90 down), `softness` pixels soft."""
    rows, columns = np.mgrid[:size, :size] - size // 2
    along = columns * np.cos(np.radians(degrees)) + rows * np.sin(np.radians(degrees))
    return (255 / (1 + np.exp(-along / softness))).astype(np.float32)


def sobel_numbers(gray: np.ndarray) -> dict:
    """How exact the direction is, what each filter misses, how a photograph [height, width] compares with noise, what zeros add."""
    errors, flat = [], np.full((16, 16), 100, np.float32)
    for degrees in range(0, 360, 5):
        found = {
            name: values[2:-2, 2:-2] for name, values in sobel(edge(degrees)).items()
        }  # without the border's repeated pixels
        strong = found["magnitude"] > found["magnitude"].max() / 2
        errors.append(np.abs((found["direction"][strong] - degrees + 180) % 360 - 180).max())
    vertical = sobel(edge(0))
    magnitude, noise = (
        sobel(gray)["magnitude"],
        sobel(photographs.synthetic("noise", 1, 256, 0)[0, :, :, 0])["magnitude"],
    )
    threshold = np.quantile(magnitude, 0.9)
    return {
        "greatest error of direction, degrees": float(max(errors)),
        "response along an edge, share of that across": float(
            np.abs(vertical["down"]).max() / np.abs(vertical["right"]).max()
        ),
        "share of squared gradient in the strongest 10 %": float(
            (magnitude[magnitude >= threshold] ** 2).sum() / (magnitude**2).sum()
        ),
        "share of noise above that threshold": float((noise >= threshold).mean()),
        "flat image of 100, greatest magnitude": {
            fill: float(sobel(flat, fill)["magnitude"].max()) for fill in ("replicate", "zeros")
        },
    }


def worked_example(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image [7, 7, 3] of 0 to 2 inside a ring of zeros, two filters [3, 3, 3, 2] of -1 to 1 and biases [2]: D14's sizes, own numbers."""
    generator = np.random.default_rng(seed)
    image = np.pad(generator.integers(0, 3, (5, 5, 3)), ((1, 1), (1, 1), (0, 0)))
    return (
        image.astype(np.float32),
        generator.integers(-1, 2, (3, 3, 3, 2)).astype(np.float32),
        np.array([1, 0], np.float32),
    )


def steps(image: np.ndarray, kernels: np.ndarray, bias: np.ndarray, stride: int) -> list[dict]:
    """A convolution window by window: row, column, products [height, width, in, out] of window and filters, values [out] with the bias."""
    height, width = kernels.shape[:2]
    found = []
    for row, column in itertools.product(
        range(0, image.shape[0] - height + 1, stride), range(0, image.shape[1] - width + 1, stride)
    ):
        products = image[row : row + height, column : column + width, :, None] * kernels
        found.append(
            {
                "row": row,
                "column": column,
                "products": products,
                "values": products.sum((0, 1, 2)) + bias,
            }
        )
    return found


def unfold(
    x: jnp.ndarray,
    kernel_size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    fill: str = "zeros",
) -> jnp.ndarray:
    """The windows of `x` [batch, height, width, in] as rows [batch height' width', kernel height x width x in]: im2col."""
    x = pad(x, (padding, padding), fill)
    height, width = (
        output_size(x.shape[axis + 1], kernel_size[axis], stride, 0) for axis in (0, 1)
    )
    taps = [
        x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
        for i, j in np.ndindex(*kernel_size)
    ]
    return jnp.stack(taps, 3).reshape(-1, kernel_size[0] * kernel_size[1] * x.shape[3])


def product(
    x: jnp.ndarray, kernel: jnp.ndarray, stride: int = 1, padding: int = 0, fill: str = "zeros"
) -> jnp.ndarray:
    """`cnnjax.nn.conv` as one matrix product: [batch height' width', out]."""
    return jnp.dot(
        unfold(x, kernel.shape[:2], stride, padding, fill),
        kernel.reshape(-1, kernel.shape[3]),
        precision="highest",
    )


def growth() -> list[dict]:
    """Values that the input of each of VGG-16's 3x3 convolutions has, as it is and unfolded, for one image."""
    rows, found = summary.layers(create_model("vgg16")), []
    for before, layer in zip(rows, rows[1:]):
        if layer.kind == "Conv":
            unfolded = jax.eval_shape(
                lambda x: unfold(x, (3, 3), 1, 1), jax.ShapeDtypeStruct(before.output, jnp.float32)
            )
            found.append(
                {
                    "shape": before.output[1:],
                    "input": int(np.prod(before.output)),
                    "unfolded": unfolded.size,
                }
            )
    return found


def moved(gray: np.ndarray) -> list[dict]:
    """What one pixel to the right changes in a photograph's [height, width] pooled maps: the share of values that differ, their RMS
    difference in standard deviations of the map, and what is left of it if the image moves by the whole stride and the map by one."""
    size, found = 128, []
    top, left = (n // 2 - size // 2 for n in gray.shape)
    crop = lambda by: plane(gray[top : top + size, left - by : left - by + size])
    for (pool, function), (name, (window, stride)) in itertools.product(
        POOLS.items(), WINDOWS.items()
    ):
        if window == 1 and pool != "max":  # a window of one pixel: maximum and average are the same
            continue
        pooled = jax.jit(functools.partial(function, window=window, stride=stride))
        still, one, whole = (np.asarray(pooled(crop(by)))[0, :, :, 0] for by in (0, 1, stride))
        found.append(
            {
                "pool": "none" if window == 1 else pool,
                "window": name,
                "changed": float((still != one).mean()),
                "difference": float(np.sqrt(((still - one) ** 2).mean()) / still.std()),
                "by the stride": float(np.abs(whole[:, 1:] - still[:, :-1]).max()),
            }
        )
    return found


@functools.partial(jax.jit, static_argnames="fill")
def shifted(images: jnp.ndarray, fill: str, key: jnp.ndarray) -> list[jnp.ndarray]:
    """`images` [batch, height, width] and what each of seven convolutions, which take the left neighbor and add 1, makes of them.

    `key` is what the fill 'random' draws from.
    """
    maps = [images[..., None]]
    for layer in range(_LAYERS):
        maps.append(
            conv(
                maps[-1],
                jnp.asarray(SHIFT)[:, :, None, None],
                padding=1,
                fill=fill,
                key=jax.random.fold_in(key, layer),
            )
            + 1
        )
    return [y[..., 0] for y in maps]


def shift_maps(fill: str, images: np.ndarray) -> list[np.ndarray]:
    """`shifted` of the central 7x7 pixels of `images` [batch, 21, 21]; of all under 'none', the center of what that leaves."""
    margin = 0 if fill == "none" else _LAYERS
    inner = images[:, margin : images.shape[1] - margin, margin : images.shape[2] - margin]
    maps = [
        np.asarray(y) for y in shifted(jnp.asarray(inner, jnp.float32), fill, jax.random.key(0))
    ]
    center = [(y.shape[1] - _WIDTH) // 2 if fill == "none" else 0 for y in maps]
    return [y[:, n : y.shape[1] - n, n : y.shape[2] - n] for n, y in zip(center, maps)]


def shift_images() -> np.ndarray:
    """256 images of noise and, last, a constant one: [257, 21, 21], 7x7 pixels with the margin that 'none' uses up."""
    images = np.random.default_rng(0).integers(0, 10, (257, *(_WIDTH + 2 * _LAYERS,) * 2))
    images[-1] = 4
    return images


def shift_numbers(images: np.ndarray) -> dict[str, dict]:
    """For every fill: the share of variance over `images` (as `shift_images` has them) that the position explains, the greatest spread
    of a pixel over them (0: the image is forgotten), and what the constant image's middle row becomes."""
    found = {}
    for fill in FILLS:
        maps = shift_maps(fill, images)[-1].astype(np.float64)
        middle, maps = maps[-1, maps.shape[1] // 2].round(3), maps[:-1]
        share = 1 - maps.var(0, ddof=1).mean() / maps.var()
        found[fill] = {
            "size": list(maps.shape[1:]),
            "explained by the position": float(share),
            "greatest spread": float(np.ptp(maps, axis=0).max()),
            "pixels without spread": float((np.ptp(maps, axis=0) == 0).mean()),
            "columns told apart": len(np.unique(middle)),
            "middle row of a constant 4": middle.tolist(),
        }
    return found


def computed_size(n: int, p: int, k: int, s: int) -> int:
    """The number of positions that `cnnjax.nn.conv` puts out along an axis, 0 where it refuses to."""
    try:
        return jax.eval_shape(
            lambda x: conv(x, jnp.zeros((k, k, 1, 1)), stride=s, padding=p), jnp.zeros((1, n, n, 1))
        ).shape[1]
    except ValueError:
        return 0


def size_numbers() -> dict:
    """(n + 2p - k) / s + 1 against the code, over a table of cases and on published layers."""
    formula = {(n, p, k, s): (n + 2 * p - k) / s + 1 for n, p, k, s in itertools.product(*_CASES)}
    sizes = {case: computed_size(*case) for case in formula}
    fits = [case for case in formula if formula[case] >= 1]
    layers = [
        {
            "layer": name,
            "case": case,
            "formula": (case[0] + 2 * case[1] - case[2]) / case[3] + 1,
            "printed": printed,
            "computed": computed_size(*case),
        }
        for name, *case, printed in SIZES
    ]
    return {
        "cases": len(formula),
        "with an output": len(fits),
        "equal": sum(sizes[case] == formula[case] for case in fits),
        "equal when rounded down": sum(sizes[case] == int(formula[case]) for case in fits),
        "refused without output": sum(not sizes[case] for case in formula if formula[case] < 1),
        "layers": layers,
    }


# --- Figures -------------------------------------------------------------------------------------------------------------


def cells(axis, values, title: str = "", size: float = 8, **colors) -> None:
    """Draws a map [rows, columns] with its numbers; NaN is an empty cell, `size` 0 leaves the numbers out."""
    values = np.asarray(values, float)
    image = axis.imshow(values, **{"cmap": "Blues"} | colors)
    dark = image.to_rgba(values)[..., :3] @ (0.3, 0.6, 0.1) < 0.5
    for (row, column), value in np.ndenumerate(values):
        if size and not np.isnan(value):
            color = "white" if dark[row, column] else "black"
            axis.text(
                column,
                row,
                f"{value + 0.0:.3g}",
                ha="center",
                va="center",
                fontsize=size,
                color=color,
            )
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def outline(axis, row: int, column: int, size: int, color: str = "red") -> None:
    """Draws a window's frame over a map."""
    axis.add_patch(
        Rectangle((column - 0.5, row - 0.5), size, size, fill=False, edgecolor=color, lw=2)
    )


def draw_sobel(gray: np.ndarray) -> Figure:
    """A photograph [height, width], both derivatives, magnitude, direction, and the border that zeros make into an edge."""
    found, border = sobel(gray), sobel(gray, "zeros")["magnitude"]
    most = np.quantile(found["magnitude"], 0.99)
    signed, positive = (
        {"cmap": "RdBu_r", "vmin": -most, "vmax": most},
        {"cmap": "gray", "vmin": 0, "vmax": most},
    )
    strong = np.where(found["magnitude"] > most / 4, found["direction"], np.nan)
    panels = (
        ("photograph", gray, {"cmap": "gray"}),
        ("-1 -2 -1 / 0 0 0 / 1 2 1 (red: brighter downwards)", found["down"], signed),
        ("its transpose (red: brighter to the right)", found["right"], signed),
        ("magnitude", found["magnitude"], positive),
        (
            "direction of growing brightness, at strong edges",
            strong,
            {"cmap": "hsv", "vmin": -180, "vmax": 180, "interpolation": "nearest"},
        ),
        (
            "magnitude, padded with zeros: lower right corner",
            border[-64:, -64:],
            positive | {"cmap": "inferno"},
        ),
    )
    figure = Figure(figsize=(11.5, 7.8), layout="constrained")
    for axis, (title, values, colors) in zip(figure.subplots(2, 3).ravel(), panels):
        image = axis.imshow(values, **colors)
        axis.set(xticks=[], yticks=[], facecolor="black")
        axis.set_title(title, fontsize=10)
        if colors["cmap"] == "hsv":
            bar = figure.colorbar(
                image,
                ax=axis,
                ticks=(-180, -90, 0, 90, 180),
                location="bottom",
                aspect=40,
                pad=0.02,
            )
            bar.ax.set_xticklabels(["left", "up", "right", "down", "left"], fontsize=8)
    return figure


def draw_steps(image: np.ndarray, kernels: np.ndarray, bias: np.ndarray, stride: int) -> Figure:
    """A row of panels per window: the channels with the window's frame, the products with each filter, the maps as far as they are."""
    found, channels, filters = steps(image, kernels, bias, stride), image.shape[2], kernels.shape[3]
    values = np.stack([step["values"] for step in found])
    maps = np.full(
        (
            filters,
            *(output_size(image.shape[axis], kernels.shape[axis], stride, 0) for axis in (0, 1)),
        ),
        np.nan,
    )
    figure = Figure(figsize=(19, 2 * (len(found) + 1)))
    axes = figure.subplots(len(found) + 1, channels + filters * (channels + 1))
    signed, result = (
        {"cmap": "PiYG", "vmin": -4, "vmax": 4},
        {"cmap": "Oranges", "vmin": values.min(), "vmax": 2 * values.max()},
    )
    for number, line in enumerate(axes, -1):
        step = found[max(number, 0)]
        line[0].set_ylabel(f"window {number + 1}" if number >= 0 else "", fontsize=9)
        for channel in range(channels):
            cells(
                line[channel],
                image[:, :, channel],
                "" if number >= 0 else f"input, channel {channel}",
                7,
                vmax=8,
            )
            if number >= 0:
                outline(line[channel], step["row"], step["column"], kernels.shape[0])
        for f, row in enumerate(line[channels:].reshape(filters, channels + 1)):
            for channel, axis in enumerate(row[:-1]):
                if number < 0:
                    cells(
                        axis,
                        kernels[:, :, channel, f],
                        f"filter {f}, channel {channel}",
                        9,
                        **signed,
                    )
                else:
                    part = step["products"][:, :, channel, f]
                    cells(axis, part, f"products: sum {part.sum():g}", 9, **signed)
            if number < 0:
                row[-1].set_axis_off()
                row[-1].text(0.5, 0.5, f"bias {bias[f]:g}", ha="center", va="center", fontsize=11)
            else:
                maps[f].flat[number] = step["values"][f]
                cells(row[-1], maps[f], f"with bias: {step['values'][f]:g}", 9, **result)
                outline(row[-1], *np.unravel_index(number, maps[f].shape), 1)
    return figure


def draw_unfolded(image: np.ndarray, kernels: np.ndarray, bias: np.ndarray, stride: int) -> Figure:
    """The worked convolution as a matrix product, and what unfolding costs in VGG-16."""
    rows, columns = (
        np.asarray(unfold(jnp.asarray(image)[None], kernels.shape[:2], stride)),
        kernels.reshape(-1, kernels.shape[3]),
    )
    figure = Figure(figsize=(14, 9.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    axes = upper.subplots(1, 3, width_ratios=(27, 3, 3))
    title = f"unfolded input, {rows.shape[0]} x {rows.shape[1]}: a window per row, its 3 x 3 cells of 3 channels one after another"
    cells(axes[0], rows, title, vmax=6, aspect="auto")
    cells(
        axes[1],
        columns,
        f"filters, {columns.shape[0]} x {columns.shape[1]}",
        cmap="PiYG",
        vmin=-4,
        vmax=4,
        aspect="auto",
    )
    cells(
        axes[2],
        rows @ columns + bias,
        f"product + bias ({bias[0]:g}, {bias[1]:g})",
        9,
        cmap="Oranges",
        vmax=40,
        aspect="auto",
    )
    axes[0].set_ylabel("window")
    for at in range(
        kernels.shape[2] * kernels.shape[1], rows.shape[1], kernels.shape[2] * kernels.shape[1]
    ):
        axes[0].axvline(at - 0.5, color="red", lw=1)  # between the rows of a window
        axes[1].axhline(at - 0.5, color="red", lw=1)
    axis, found = lower.subplots(), growth()
    for shift, kind in ((-0.2, "input"), (0.2, "unfolded")):
        bars = axis.bar(
            np.arange(len(found)) + shift, [_MB * row[kind] for row in found], 0.4, label=kind
        )
        axis.bar_label(bars, fmt="%.3g", fontsize=7)
    axis.set_xticks(
        range(len(found)),
        ["x".join(map(str, row["shape"])) for row in found],
        fontsize=8,
        rotation=20,
    )
    axis.set(
        ylabel="MB in float32, one image",
        yscale="log",
        title="What VGG-16's 13 convolutions read, as it is and unfolded",
    )
    axis.legend()
    return figure


def draw_pooling(found: list[dict]) -> Figure:
    """The lecture's 6x6 map under four pools, two windows framed, and what one pixel changes in a photograph's."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    for line, (pool, function) in zip(upper.subplots(2, 5), POOLS.items()):
        for axis, (window, stride) in zip(line, ((1, 1), (2, 2), (3, 3), (2, 1), (3, 1))):
            kind = "overlapping" if stride < window else "not overlapping"
            title = (
                "the map, two windows framed"
                if window == 1
                else f"{pool}, {window}x{window}, stride {stride}\n{kind}"
            )
            cells(axis, function(plane(MAP), window, stride)[0, :, :, 0], title, vmin=0, vmax=12)
            if window < 3:  # two 2x2 windows, and where their results are
                outline(axis, 0, 0, 3 - window)
                outline(axis, 0, 2 // stride, 3 - window, "orange")
    for axis, (key, label) in zip(
        lower.subplots(1, 2),
        (
            ("changed", "share of values that differ"),
            ("difference", "RMS difference / deviation of the map"),
        ),
    ):
        names = [f"{row['pool'].replace('none', 'no pooling')}, {row['window']}" for row in found]
        colors = [{"none": "gray", "max": "C0", "average": "C1"}[row["pool"]] for row in found]
        axis.bar_label(
            axis.barh(names[::-1], [row[key] for row in found][::-1], color=colors[::-1]),
            fmt="%.2f",
            fontsize=8,
            padding=2,
        )
        axis.tick_params(labelsize=8)
        axis.set_title(f"photograph moved by one pixel: {label}", fontsize=10)
        axis.margins(x=0.12)
    return figure


def draw_shift(images: np.ndarray) -> Figure:
    """For every fill, a row: noise and what 1, 2, 4 and 7 layers make of it, and what 7 make of other noise and of a constant image."""
    panels = {
        "noise": (0, 0),
        "1 layer": (0, 1),
        "2 layers": (0, 2),
        "4 layers": (0, 4),
        "7 layers": (0, 7),
        "7 layers, other noise": (1, 7),
        "7 layers, constant 4": (-1, 7),
    }
    figure = Figure(figsize=(2.1 * len(panels), 2.1 * len(FILLS)))
    for fill, line in zip(
        FILLS,
        figure.subplots(len(FILLS), len(panels), gridspec_kw={"wspace": 0.05, "hspace": 0.05}),
    ):
        maps = [y.round(1) for y in shift_maps(fill, images)]
        for axis, (title, (image, layers)) in zip(line, panels.items()):
            after = maps[layers][image]
            size = (
                0
                if len(after) > 12
                else 8
                if len(after) == _WIDTH and (after == after.round()).all()
                else 6
            )
            cells(
                axis,
                after,
                title if fill == FILLS[0] else "",
                size,
                cmap="viridis_r",
                vmin=0,
                vmax=16,
            )
        line[0].set_ylabel(fill, fontsize=11)
    return figure


def draw_sizes(kernel: int = 3) -> Figure:
    """The computed output size for every input size and stride; color: the pixels at the end that no window reads."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    sizes, strides = range(3, 17), range(1, 5)
    for axis, padding in zip(figure.subplots(2, 1), (0, 1)):
        unread = np.array([[(n + 2 * padding - kernel) % s for n in sizes] for s in strides])
        axis.imshow(unread, cmap="Oranges", vmin=0, vmax=5, aspect="auto")
        for (i, s), (j, n) in itertools.product(enumerate(strides), enumerate(sizes)):
            note = f"\n({(n + 2 * padding - kernel) / s + 1:.2f})" if unread[i, j] else ""
            axis.text(
                j,
                i,
                f"{computed_size(n, padding, kernel, s)}{note}",
                ha="center",
                va="center",
                fontsize=8,
            )
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_yticks(range(len(strides)), strides)
        axis.set(xlabel="n", ylabel="stride")
        axis.set_title(
            f"{kernel}x{kernel} windows, p = {padding}: number of positions; colored where the formula (in brackets) is no "
            "integer",
            fontsize=10,
        )
    return figure


# --- The report ----------------------------------------------------------------------------------------------------------


def compute(gray: np.ndarray) -> dict:
    """All numbers, one entry per topic; `gray` [height, width] is the photograph."""
    image, kernels, bias = worked_example()
    values = np.stack([step["values"] for step in steps(image, kernels, bias, 2)])
    batch, filters = jnp.asarray(image)[None], jnp.asarray(kernels)
    convolved = np.asarray(conv(batch, filters, stride=2)).reshape(values.shape) + bias
    dense = np.asarray(conv(batch, filters))[0, ::2, ::2].reshape(values.shape) + bias
    return {
        "sobel": sobel_numbers(gray),
        "steps": {
            "values": values.tolist(),
            "differs from conv": float(np.abs(values - convolved).max()),
            "differs from every second value of stride 1": float(np.abs(values - dense).max()),
            "A5, every second value of the map printed for stride 1": PRINTED[1][::2, ::2].tolist(),
            "A5, printed for stride 2": PRINTED[2].tolist(),
            "A5, that is the corner of the map for stride 1": bool(
                np.array_equal(PRINTED[1][:3, :3], PRINTED[2])
            ),
        },
        "im2col": {
            "differs from conv": float(
                np.abs(np.asarray(product(batch, filters, 2)) + bias - convolved).max()
            ),
            "vgg16": growth(),
        },
        "pooling": {
            "A6": np.asarray(max_pool(plane(MAP), 2))[0, :, :, 0].astype(int).tolist(),
            "one pixel": moved(gray),
        },
        "shift": shift_numbers(shift_images()),
        "sizes": size_numbers(),
    }


def _verdict(row: dict) -> str:
    """What a row of `shift_numbers` says about the network."""
    if row["columns told apart"] == 1 or row["pixels without spread"] == 0:
        return "does not know it: every pixel varies from image to image"
    counts = f"tells {row['columns told apart']} of {row['size'][1]} columns apart"
    if row["greatest spread"] == 0:
        return f"has forgotten the image, {counts}"
    return f"{counts}, but holds the image in {1 - row['pixels without spread']:.0%} of its pixels"


def sentences(found: dict, name: str) -> list[tuple[str, str, str]]:
    """(title, figure, what it shows) of every topic, from the numbers; `name` is the photograph's."""
    edges, step, vgg, sizes = (
        found["sobel"],
        found["steps"],
        found["im2col"]["vgg16"],
        found["sizes"],
    )
    flat, zeros = edges["flat image of 100, greatest magnitude"], found["shift"]["zeros"]
    megabytes = lambda key, rows=vgg: f"{_MB * sum(row[key] for row in rows):.3g} MB"
    pools = {(row["pool"], row["window"]): row for row in found["pooling"]["one pixel"]}
    moves = tables.table(
        ["pool", "window", "values that differ", "RMS difference / deviation of the map"],
        [
            [row["pool"], row["window"], f"{row['changed']:.0%}", f"{row['difference']:.2f}"]
            for row in pools.values()
        ],
    )
    still, most, mean = (
        pools[key]["difference"]
        for key in (("none", "stride 1"), ("max", "2x2, stride 2"), ("average", "2x2, stride 2"))
    )
    holds = lambda truth: "holds" if truth else "does not hold"
    shifts = tables.table(
        [
            "fill",
            "variance explained by the position",
            "greatest spread of a pixel over images",
            "middle row of a constant 4",
            "the network",
        ],
        [
            [
                fill,
                f"{row['explained by the position']:.2f}".replace("-0.00", "0.00"),
                f"{row['greatest spread']:.3g}",
                " ".join(f"{value:g}" for value in row["middle row of a constant 4"]),
                _verdict(row),
            ]
            for fill, row in found["shift"].items()
        ],
    )
    layers = tables.table(
        ["layer", "n, p, k, s", "formula", "printed", "computed"],
        [
            [
                row["layer"],
                ", ".join(map(str, row["case"])),
                f"{row['formula']:g}",
                str(row["printed"]),
                str(row["computed"]),
            ]
            for row in sizes["layers"]
        ],
    )
    unequal = (
        ", ".join(row["layer"] for row in sizes["layers"] if row["printed"] != row["computed"])
        or "none"
    )
    return [
        (
            "Edges: the Sobel pair (D13)",
            "sobel.png",
            f"The pair finds the edges of '{name}' (the strongest tenth of the pixels has "
            f"{edges['share of squared gradient in the strongest 10 %']:.0%} of the squared gradient) and their directions, right to "
            f"{edges['greatest error of direction, degrees']:.1f} degrees on synthetic edges all around. The claim holds for the pair only: "
            f"a vertical edge gives the first filter {edges['response along an edge, share of that across']:.0%} of what it gives the second. "
            f"And not edges alone answer: of noise (deviation 64) {edges['share of noise above that threshold']:.0%} of the pixels are above "
            f"the photograph's threshold, and a flat image of 100 gets an edge of up to {flat['zeros']:.0f} along its border if padded "
            f"with zeros ({flat['replicate']:.0f} if its border is repeated).",
        ),
        (
            "One convolution, step by step (D14, A5)",
            "steps.png",
            "Nine windows, two filters: each value is the sum of 27 products and a bias; the nine steps differ from `cnnjax.nn.conv` by "
            f"{step['differs from conv']:g}. The sizes are the lecture's (7x7x3 with its padding, two 3x3x3 filters, stride 2), the numbers "
            "are not: its input is not at hand, so one was drawn, and its first value "
            f"({step['values'][0][0]:g}) says nothing about the lecture's (9): D14 is neither confirmed nor denied here. Stride 2 takes "
            f"every second value of stride 1 (they differ by {step['differs from every second value of stride 1']:g}). If A5's 7x7 image "
            f"began with its 6x6 one, that would be {step['A5, every second value of the map printed for stride 1']}, but printed is "
            f"{step['A5, printed for stride 2']}"
            + (
                ", the corner of the map for stride 1"
                if step["A5, that is the corner of the map for stride 1"]
                else ""
            )
            + ": A5 does not hold for one image, at most for two unrelated ones.",
        ),
        (
            "The same as one matrix product: im2col (A7)",
            "im2col.png",
            f"Windows as rows times filters as columns: A7 {holds(found['im2col']['differs from conv'] < 1e-4)} (greatest difference from the "
            f"convolution {found['im2col']['differs from conv']:g}). Its price is memory: one image's {megabytes('input', vgg[:1])} before "
            f"VGG-16's first convolution become {megabytes('unfolded', vgg[:1])}, the {megabytes('input', vgg[1:2])} before the second "
            f"{megabytes('unfolded', vgg[1:2])}, and the {megabytes('input')} before all thirteen {megabytes('unfolded')}.",
        ),
        (
            "Pooling (A6)",
            "pooling.png",
            f"2x2 max-pooling turns the lecture's map into {found['pooling']['A6']}: A6 {holds(found['pooling']['A6'] == POOLED.tolist())}. "
            f"That pooling makes features invariant to small shifts, as is often said, {holds(max(most, mean) < 0.01)} of one small pool: "
            f"when a photograph moves by one pixel, its pixels change by {still:.2f} of their standard deviation, its 2x2 maxima by "
            f"{most:.2f}, its 2x2 averages by {mean:.2f}. Moved by the whole stride, every map moves by one cell (greatest difference "
            f"{max(row['by the stride'] for row in pools.values()):g}).\n\n{moves}",
        ),
        (
            "The shift network (section B)",
            "shift.png",
            "Seven layers that take the left neighbor and add 1, on 256 noise images and on a constant one, their central 7x7 pixels "
            "('none' uses up a margin around them, 'full' makes 21x21 of them). That zeros make the network forget the image and know the "
            f"column {holds(zeros['greatest spread'] == 0 and zeros['middle row of a constant 4'] == list(range(1, 8)))}; what each fill "
            f"does (in the figure, maps too large for numbers are colors only):\n\n{shifts}",
        ),
        (
            "Sizes: (n + 2p - k) / s + 1 (A1)",
            "sizes.png",
            f"Of {sizes['with an output']} cases with an output the code agrees with the formula as it stands in {sizes['equal']} and "
            f"rounded down in {sizes['equal when rounded down']}: without rounding it {holds(sizes['equal'] == sizes['with an output'])}, "
            f"with it {holds(sizes['equal when rounded down'] == sizes['with an output'])}. {sizes['refused without output']} of the other "
            f"{sizes['cases'] - sizes['with an output']} cases raise an error. Published layers; not as printed: {unequal}.\n\n{layers}",
        ),
    ]


def write(folder: pathlib.Path, found: dict, gray: np.ndarray, name: str) -> None:
    """Writes every figure, basics.json and report.md."""
    example = (*worked_example(), 2)
    figures = {
        "sobel.png": draw_sobel(gray),
        "steps.png": draw_steps(*example),
        "im2col.png": draw_unfolded(*example),
        "pooling.png": draw_pooling(found["pooling"]["one pixel"]),
        "shift.png": draw_shift(shift_images()),
        "sizes.png": draw_sizes(),
    }
    for file, figure in figures.items():
        workdir.write_figure(folder / file, figure)
    workdir.write_json(folder / "basics.json", found)
    parts = [
        f"## {title}\n\n![{title}]({file})\n\n{text}\n"
        for title, file, text in sentences(found, name)
    ]
    workdir.write(folder / "report.md", "# The lectures' basics\n\n" + "\n".join(parts))


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/basics")
    known = {path.stem: path for path in photographs.list_photographs()}
    parser.add_argument(
        "--photograph",
        choices=known,
        default="camera",
        help="of those inside scikit-image and scikit-learn",
    )
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        folder = workdir.prepare(options.workdir, {"photograph": options.photograph})
        gray = photographs.read_image(known[options.photograph]).astype(np.float32).mean(2)
        write(folder, compute(gray), gray, options.photograph)
        print(f"6 figures: see {folder / 'report.md'}")

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
