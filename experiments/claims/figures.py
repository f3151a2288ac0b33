"""The report's figures."""

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import operations, position


def annotate(axis, values: np.ndarray, colors: np.ndarray, size: float = 7) -> None:
    """Writes each value of a map into its cell. NaN is an empty cell."""
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        # Adding 0.0 turns -0 into 0.
        text = axis.text(column, row, f"{value + 0.0:.3g}", ha="center", va="center", fontsize=size)
        text.set_color(colors[row, column])
        # Texts within the axes need no space of their own; to measure them takes seconds.
        text.set_in_layout(False)
    axis.set(xticks=[], yticks=[])


def draw_position() -> Figure:
    """Draws one image after seven layers, for every direction and fill."""
    image = position.example_images(1)[0]
    rows = ["image", *position.DIRECTIONS]
    figure = Figure(figsize=(12.6, 12), layout="constrained")
    axes = figure.subplots(len(rows), len(position.FILLS))
    for column, fill in enumerate(position.FILLS):
        for axis, label in zip(axes[:, column], rows):
            if label == "image":
                values = position.middle(image)
            else:
                values = position.demo(image, label, fill)
            axis.imshow(values, cmap="viridis", vmin=0, vmax=16)
            annotate(axis, values, np.where(values < 10, "white", "black"), size=6)
            if column == 0:
                axis.set_ylabel(label)
        axes[0, column].set_title(fill)
    figure.suptitle(
        "Seven layers that move the image by one pixel and add 1: with zero padding they count, "
        "without it they keep the image"
    )
    return figure


def draw_worked() -> Figure:
    """Draws NUS's worked convolutions as printed and as computed; wrong cells are red."""
    right = operations.worked_examples()
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots(2, len(right))
    for column, (name, values) in enumerate(right.items()):
        printed = operations.PRINTED[name]
        wrong = printed != values
        count = f"{wrong.sum()} of {wrong.size} cells wrong"
        axes[0, column].set_title(f"{name}: printed\n{count}", fontsize=10)
        axes[0, column].imshow(np.where(wrong, 0.35, 0.0), cmap="Reds", vmin=0, vmax=1)
        annotate(axes[0, column], printed, np.where(wrong, "darkred", "black"), size=11)
        axes[1, column].set_title("computed", fontsize=10)
        axes[1, column].imshow(np.zeros(values.shape), cmap="Greys", vmin=0, vmax=1)
        annotate(axes[1, column], values, np.full(values.shape, "black"), size=11)
    figure.suptitle("Three worked convolutions of NUS: two are wrong as printed")
    return figure


def draw_collapse() -> Figure:
    """Draws the difference between two linear convolutions and their composition."""
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {"none": "no padding", "circular": "circular padding", "zeros": "zero padding"}
    for axis, (fill, title) in zip(axes, titles.items()):
        error = operations.collapse_error(fill)
        shown = axis.imshow(error, cmap="Reds", vmin=0, vmax=5)
        axis.set(title=f"{title}: at most {error.max():.1g}", xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes, label="difference")
    figure.suptitle("Two 3x3 convolutions against one 5x5: equal but at a zero-padded border")
    return figure


def draw_survivors() -> Figure:
    """Draws the share of a max-pool's outputs that survive a shift of the image."""
    shifts = range(9)
    figure = Figure(figsize=(6, 3.3), layout="constrained")
    axis = figure.subplots()
    for pools, marker in ((1, "o"), (2, "s"), (3, "^")):
        shares = [100 * operations.survivors(shift, pools=pools) for shift in shifts]
        axis.plot(
            shifts, shares, marker=marker, label=f"{pools} max-pool{'s' * (pools > 1)} of 2x2"
        )
    axis.set(xlabel="shift of the image, pixels", ylabel="outputs unchanged, %", ylim=(0, 105))
    axis.set_title("Max-pooling is not invariant to translation")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


FIGURES = {
    "worked.png": draw_worked,
    "survivors.png": draw_survivors,
    "collapse.png": draw_collapse,
    "position.png": draw_position,
}
