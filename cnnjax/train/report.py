"""The training report: tables and figures from the files of a work directory."""

import math
import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from cnnjax.data import splits
from cnnjax.runtime import files, report, tables
from cnnjax.runtime.figures import label_classes
from cnnjax.train import evaluate
from cnnjax.train.data import is_streamed

# The most classes that tables and figures name, and the number of worst ones named otherwise.
_MOST_CLASSES = 20
_WORST_CLASSES = 10
# The colors of CamVid's classes in SegNet's tutorial (Badrinarayanan et al. 2015). Further classes
# begin with the first color again; pixels of no class are black.
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
    """Colors masks uint8 [..., height, width]; pixels of no class (255) are black.

    Returns:
      uint8 [..., height, width, 3].
    """
    return np.where(masks[..., None] == splits.IGNORED, 0, _COLORS[masks % len(_COLORS)]).astype(
        np.uint8
    )


class _PlainLogFormatter(LogFormatter):
    """Writes 0.6 where `LogFormatter` writes 6e-01, at the same ticks.

    The default of logarithmic axes typesets powers of ten, which takes most of a figure's time.
    """

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def _curves_figure(history: list[dict]) -> Figure:
    """Draws loss, error and learning rate by epoch."""
    figure = Figure(figsize=(12, 3))
    axes = figure.subplots(1, 3, gridspec_kw={"wspace": 0.45})
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
    """Draws the curves of a run, finished or not, as curves.png."""
    files.write_figure(folder / "curves.png", _curves_figure(history))


def _confusion_figure(labels: np.ndarray, predicted: np.ndarray, classes: list[str]) -> Figure:
    """Draws the confusion matrix of the test set: rows are labels, columns predictions."""
    counts = evaluate.confusion(predicted, labels, len(classes))
    figure = Figure(figsize=(5.5, 5.5))
    axis = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if len(classes) <= _MOST_CLASSES:
        # A name may hold "$", which would begin a formula.
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8, parse_math=False)
        axis.set_yticks(range(len(classes)), classes, fontsize=8, parse_math=False)
        # Counts of pixels are too long for the cells, which then hold the row's shares.
        are_short = counts.max() < 100_000
        for row, column in np.ndindex(counts.shape):
            share = shares[row, column]
            axis.text(
                column,
                row,
                f"{counts[row, column]}" if are_short else f"{share:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share > 0.5 else "black",
            )
    return figure


def _mistakes_figure(test: dict, classes: list[str]) -> Figure:
    """Draws the wrongly classified test images with the highest confidence."""
    columns = 9
    rows = max(1, math.ceil(len(test["shown"]) / columns))
    # One plot holds all images, at positions in inches: drawing one plot for each takes longer.
    cell_width = 1.3
    cell_height = 1.6
    image_size = 1.1
    size = (cell_width * columns, cell_height * rows)
    figure = Figure(figsize=size)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    for place, (index, image) in enumerate(zip(test["shown"], test["images"])):
        row, column = divmod(place, columns)
        center = (column + 0.5) * cell_width
        bottom = (row + 1) * cell_height
        longer_side = max(image.shape[:2])
        height = image_size * image.shape[0] / longer_side
        width = image_size * image.shape[1] / longer_side
        top = bottom - height
        edges = (center - width / 2, center + width / 2, bottom, top)
        # Only three channels are colors; others are drawn as their mean, in gray.
        picture = image if image.shape[-1] == 3 else image.mean(-1)
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=edges)
        label = classes[test["labels"][index]]
        predicted = classes[test["predicted"][index]]
        title = f"{label}\nas {predicted}\n{test['confidence'][index]:.3f}"
        axis.text(center, top - 0.03, title, ha="center", va="bottom", fontsize=7, parse_math=False)
    axis.set(xlim=(0, size[0]), ylim=(size[1], 0))
    return figure


def _scenes_figure(test: dict) -> Figure:
    """Draws the test images with most wrong pixels: image, mask, prediction."""
    shown = test["shown"]
    figure = Figure(figsize=(2.2 * len(shown), 5.2), layout="constrained")
    axes = figure.subplots(3, len(shown), squeeze=False)
    rows = (test["images"], paint(test["labels"][shown]), paint(test["predicted"][shown]))
    for row_axes, pictures in zip(axes, rows):
        for axis, picture in zip(row_axes, pictures):
            axis.imshow(picture)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("image", "mask", "predicted")):
        axis.set_ylabel(name)
    return figure


def _describe_test(results: dict) -> str:
    """Says how often the test set was used: of an extended run, at the end of each part."""
    if "extended_from" not in results:
        return " The test set was used once, at the end."
    sentences = [
        f" The run was extended after {final['epoch']} epochs, when its test error was "
        f"{100 * final['test_error']:.2f} %."
        for final in results["extended_from"]
    ]
    return "".join(sentences)


def _describe_weights(results: dict) -> str:
    """Says which epoch's weights were scored; empty for older runs without the choice."""
    if "weights" not in results:
        return ""
    chosen = results["weights"]
    return f" The scores are of the weights of epoch {chosen['epoch']} ({chosen['chosen_by']})."


def _write_figures(folder: pathlib.Path, config: dict, results: dict) -> list[str]:
    """Draws the figures of a report and returns the names of their files."""
    with np.load(folder / "test.npz") as archive:
        test = dict(archive)
    write_curves(folder, results["history"])
    classes = label_classes(results["classes"])
    figures = {}
    if config["loss"] != "sigmoid":
        figures["confusion.png"] = _confusion_figure(test["labels"], test["predicted"], classes)
    if config["loss"] == "pixelwise":
        figures["mistakes.png"] = _scenes_figure(test)
    elif config["loss"] == "cross_entropy":
        figures["mistakes.png"] = _mistakes_figure(test, classes)
    for name, figure in figures.items():
        files.write_figure(folder / name, figure)
    return ["curves.png", *figures]


# The metric beside loss and error, by loss: its key in results.json, and its name.
_METRICS = {
    "cross_entropy": ("top5_error", "top-5 error"),
    "pixelwise": ("mean_iou", "mean IoU"),
    "sigmoid": ("mean_ap", "mean AP"),
}


def _scores_table(config: dict, results: dict) -> str:
    """Formats the scores on the training, validation and test images as Markdown."""
    final = results["final"]
    key, metric = _METRICS[config["loss"]]
    counts = {"train": results["n_train"]}
    if "validation_error" in final:
        # Earlier versions recorded only how many images to hold out.
        counts["validation"] = results.get("n_validation", config["n_validation"])
    counts["test"] = results["n_test"]
    lines = []
    for part, count in counts.items():
        loss = f"{final[f'{part}_loss']:.4f}"
        error = f"{100 * final[f'{part}_error']:.2f} %"
        value = ""
        if f"{part}_{key}" in final:
            value = f"{100 * final[f'{part}_{key}']:.2f} %"
        lines.append([part, f"{count:,}", loss, error, value])
    return tables.table(["part", "images", "loss", "error", metric], lines)


def _class_table(config: dict, results: dict) -> str:
    """Formats the metric of each class as Markdown; empty if there is none.

    Of more than 20 classes, the ten with the lowest values are listed.
    """
    # Results of earlier versions have none for "cross_entropy".
    if not results.get("by_class"):
        return ""
    _, metric = _METRICS[config["loss"]]
    if config["loss"] == "cross_entropy":
        metric = "recall"
    scores = list(zip(results["classes"], results["by_class"]))
    which = "each class"
    if len(scores) > _MOST_CLASSES:
        known = [(name, score) for name, score in scores if score is not None]
        scores = sorted(known, key=lambda pair: pair[1])[:_WORST_CLASSES]
        which = f"the {len(scores)} worst classes"
    cells = ["" if score is None else f"{100 * score:.2f}" for _, score in scores]
    table = tables.table([name for name, _ in scores], [cells])
    return f"\n{metric} of {which} of the test set, %:\n\n{table}"


def _describe_training_error(config: dict, results: dict) -> str:
    """Says how the training error in the table was measured."""
    if not is_streamed(config):
        return "measured after training, without augmentation"
    # Results of earlier versions are those of the last epoch.
    epoch = results.get("weights", {}).get("epoch", results["final"]["epoch"])
    return f"the mean over the steps of epoch {epoch}"


def _describe_training_loss(config: dict) -> str:
    """Says if the training loss is of other labels than those of scores; empty if it is not."""
    if not (config["label_smoothing"] or config["mixup"]):
        return ""
    where = "The training loss" if is_streamed(config) else "The curve of the training loss"
    sentence = f" {where} is that of smoothed or mixed labels, and the other losses are not."
    if config["mixup"]:
        sentence += " Errors while training are those of mixed images."
    return sentence


def _describe_labels(config: dict, results: dict) -> str:
    """Lists the classes that the figures show by number; empty if all have their names."""
    # The figures of several classes per image show none.
    if config["loss"] == "sigmoid":
        return ""
    classes = results["classes"]
    pairs = zip(label_classes(classes), classes)
    numbered = [f"{label} = {name}" for label, name in pairs if label != name]
    if not numbered:
        return ""
    return f"In the figures, numbers stand for classes: {', '.join(numbered)}.\n\n"


def _body(config: dict, results: dict, figures: list[str]) -> str:
    final = results["final"]
    images = [f"![{name}]({name})" for name in figures]
    parts = [
        f"# {config['model']} on {config['dataset']}\n\n",
        f"{results['parameters']:,} parameters, {final['epoch']} epochs, {final['step']:,} steps, ",
        f"{results['training_seconds']:,.0f} s of training.\n\n",
        _scores_table(config, results),
        _class_table(config, results),
        f"\nThe training error is {_describe_training_error(config, results)}; ",
        "the curve's is the mean over each epoch while training.",
        _describe_training_loss(config),
        _describe_test(results),
        _describe_weights(results),
        "\n\n",
        _describe_labels(config, results),
        "\n\n".join(images),
        "\n",
    ]
    return "".join(parts)


def write(folder: pathlib.Path) -> None:
    """Writes report.md and its figures to a finished training run's work directory.

    Raises:
      ValueError: if it holds no results, or those of another kind of job.
    """
    run = report.read(folder, kind="train")
    # Earlier versions recorded the numbers of a user's file as numbers.
    run.results["classes"] = splits.class_names(run.results["classes"])
    figures = _write_figures(folder, run.config, run.results)
    body = _body(run.config, run.results, figures)
    files.write(folder / "report.md", body + report.footer(run))
