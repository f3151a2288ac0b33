"""The training report: tables and figures from the files of a work directory."""

import pathlib

import matplotlib

matplotlib.use("Agg")  # before pyplot: figures go to files, with or without a screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogFormatter

from cnnjax.data.augment import IGNORED
from cnnjax.runtime import report, tables, workdir

# Of SegNet's tutorial (Badrinarayanan et al. 2015), for the classes of CamVid; more classes begin
# again, no class is black.
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


def paint(masks: np.ndarray) -> np.ndarray:
    """Color masks uint8 [..., height, width]; pixels of no class (255) are black.

    Returns uint8 [..., height, width, 3].
    """
    return np.where(masks[..., None] == IGNORED, 0, _COLORS[masks % len(_COLORS)]).astype(np.uint8)


class _PlainLogFormatter(LogFormatter):
    """Writes 0.6 where `LogFormatter` writes 6e-01, at the same ticks.

    The default of logarithmic axes typesets powers of ten, which takes most of a figure's time.
    """

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def _curves_figure(history: list[dict]):
    """Loss, error and learning rate by epoch."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), gridspec_kw={"wspace": 0.45})
    epochs = [entry["epoch"] for entry in history]
    for axis, kind in zip(axes, ("loss", "error")):
        for name in (f"train_{kind}", f"validation_{kind}"):
            if name in history[0]:
                axis.plot(epochs, [entry[name] for entry in history], label=name.replace("_", " "))
        axis.set_ylabel(kind)
        axis.set_yscale("log" if kind == "loss" else "linear")
        axis.legend(fontsize=8)
    axes[0].yaxis.set_major_formatter(_PlainLogFormatter())
    axes[0].yaxis.set_minor_formatter(_PlainLogFormatter())
    axes[1].set_ylim(bottom=0)
    axes[2].plot(
        epochs, [entry["learning_rate"] for entry in history], color="black", drawstyle="steps-post"
    )
    axes[2].set_ylabel("learning rate")
    for axis in axes:
        axis.set_xlabel("epoch")
    return figure


def write_curves(folder: pathlib.Path, history: list[dict]) -> None:
    """Draw the curves of a run that goes on or has ended, as curves.png."""
    figure = _curves_figure(history)
    workdir.write_figure(folder / "curves.png", figure)
    plt.close(figure)


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
    return figure


def _mistakes_figure(test: dict, classes: list[str]):
    """The test images that were taken, with the most confidence, for something else."""
    columns = 9
    rows = max(1, -(-len(test["shown"]) // columns))
    # One plot holds all images, at places in inches: a plot for each takes longer.
    cell_width = 1.3
    cell_height = 1.6
    image_size = 1.1
    size = (cell_width * columns, cell_height * rows)
    figure = plt.figure(figsize=size)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    for place, (index, image) in enumerate(zip(test["shown"], test["images"])):
        row, column = divmod(place, columns)
        center = (column + 0.5) * cell_width
        bottom = (row + 1) * cell_height
        height, width = image_size * np.array(image.shape[:2]) / max(image.shape[:2])
        top = bottom - height
        edges = (center - width / 2, center + width / 2, bottom, top)
        axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, extent=edges)
        names = [classes[test[kind][index]] for kind in ("labels", "predicted")]
        title = f"{names[0]}\nas {names[1]}\n{test['confidence'][index]:.3f}"
        axis.text(center, top - 0.03, title, ha="center", va="bottom", fontsize=7)
    axis.set(xlim=(0, size[0]), ylim=(size[1], 0))
    return figure


def _scenes_figure(test: dict):
    """Draw the test images with most pixels wrong.

    The image, its mask, and the prediction stand one above the other.
    """
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


def _chosen(results: dict) -> str:
    """Say which epoch's weights were scored; older runs, which did not choose, do not say."""
    if "weights" not in results:
        return ""
    chosen = results["weights"]
    text = f" The scores are of the weights of epoch {chosen['epoch']} ({chosen['chosen_by']})."
    for final in results.get("extended_from", []):
        text += (
            f" The run was extended after {final['epoch']} epochs, when its test error was "
            f"{100 * final['test_error']:.2f} %."
        )
    return text


def _train(folder: pathlib.Path, config: dict, results: dict) -> str:
    final, history = results["final"], results["history"]
    with np.load(folder / "test.npz") as archive:
        test = dict(archive)
    write_curves(folder, history)
    figures = {}
    names = ["curves.png"]
    if config["loss"] != "sigmoid":
        figures["confusion.png"] = _confusion_figure(
            test["labels"], test["predicted"], results["classes"]
        )
        figures["mistakes.png"] = (
            _scenes_figure(test)
            if config["loss"] == "pixelwise"
            else _mistakes_figure(test, results["classes"])
        )
    names += figures
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
        f"\n{metric} of each class of the test set, "
        f"%:\n\n{tables.table(results['classes'], [scores])}"
        if scores
        else ""
    )
    measured = "measured after training, without augmentation"
    if streamed:
        # Results of earlier versions are those of the last epoch.
        epoch = results.get("weights", {}).get("epoch", final["epoch"])
        measured = f"the mean over the steps of epoch {epoch}"
    return (
        f"# {config['model']} on {config['dataset']}\n\n{results['parameters']:,} parameters, "
        f"{final['epoch']} epochs, "
        f"{final['step']:,} steps, {results['training_seconds']:,.0f} s of training.\n\n"
        + tables.table(["part", "images", "loss", "error", metric], lines)
        + by_class
        + f"\nThe training error is {measured}; the curve's is the mean over each epoch while "
        f"training. The test set was used once, at the end.{_chosen(results)}\n\n"
        + "\n\n".join(f"![{name}]({name})" for name in names)
        + "\n"
    )


def write(folder: pathlib.Path) -> None:
    """Writes report.md and its figures to a finished training run's work directory.

    Raises `ValueError` if it holds no results, or those of another kind of job.
    """
    run = report.read(folder, kind="train")
    body = _train(folder, run.config, run.results)
    workdir.write(folder / "report.md", body + report.footer(run))
