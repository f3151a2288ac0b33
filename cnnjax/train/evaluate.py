"""Run a network over a whole data set, in the same ways as training runs, and score its outputs."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Shaped, UInt8

from cnnjax.data import splits
from cnnjax.data.augment import normalize, views
from cnnjax.inspect.trace import apply
from cnnjax.models import Network
from cnnjax.runtime.types import AnyArray
from cnnjax.train.parallel import Parallel
from cnnjax.train.step import loss_and_errors

# Masks that are scored together. Their logits take many times the memory of the images.
_MASKS = 32


# ------------------------------------------------------------------ outputs of a frozen network


def logits(
    model: Network, variables, images: Float[AnyArray, "batch height width channels"]
) -> Float[Array, "batch ..."]:
    """Computes logits in evaluation mode."""
    # A tuple is returned only where a collection is mutable.
    return apply(model, variables, images)  # type: ignore[return-value]


@functools.cache
def averaged(count: int) -> Callable:
    """Returns a function of (model, variables, images) that averages over views of each image.

    It computes the logarithm of the mean probability.

    Args:
      count: the number of views, as in `cnnjax.data.augment.views`.
    """
    if count == 1:
        return logits

    def compute(model, variables, images):
        height, width = images.shape[1:3]
        if count == 10:
            # Images have a margin around the network's input, which the corners lie in.
            height, width = model.input_shape[:2]
        outputs = [logits(model, variables, view) for view in views(images, count, (height, width))]
        log_probabilities = jax.nn.log_softmax(jnp.stack(outputs))
        return jax.nn.logsumexp(log_probabilities, axis=0) - math.log(count)

    return compute


@functools.lru_cache(maxsize=64)
def compiled(parallel: Parallel, model: Network, output: Callable) -> Callable:
    """Compiles a function of (variables, moments, images) that normalizes images for `output`."""

    def compute(axis_name, variables, moments, images):
        return output(model, variables, normalize(images, *moments))

    return parallel.compile(compute, replicated=2, shared=1, shares_output=True)


def batches_of(
    images: Shaped[np.ndarray, "n ..."], batch_size: int
) -> Iterator[Shaped[np.ndarray, "batch ..."]]:
    """Divides images into batches, in order; the last one may be shorter."""
    return (images[at : at + batch_size] for at in range(0, len(images), batch_size))


def predict_batches(
    parallel: Parallel,
    model: Network,
    variables,
    moments,
    *,
    batches: Iterable[UInt8[np.ndarray, "batch height width channels"]],
    batch_size: int,
    output: Callable = logits,
) -> Iterator[Shaped[np.ndarray, "batch ..."]]:
    """Runs a frozen network over images, batch by batch.

    Args:
      parallel: how to run it on the devices; each process gets all batches.
      model: the network.
      variables: its variables, replicated by `Parallel.replicate`.
      moments: the mean and standard deviation that images are normalized by, replicated.
      batches: uint8 images, at most `batch_size` in a batch.
      batch_size: a multiple of the devices of this process.
      output: what to compute, such as `logits` or `averaged(views)`.

    Yields:
      The output of every batch, in order.

    Raises:
      ValueError: if `batches` raises it, after the output of the batches before.
    """
    compute = compiled(parallel, model, output)
    pending: tuple | None = None

    def fetch(output, count):
        return parallel.fetch_shared(output)[:count]

    failure: ValueError | None = None
    try:
        for images in batches:
            # Batches of one size share one compilation: a shorter one is filled up with zeros.
            filled = np.zeros((batch_size, *images.shape[1:]), images.dtype)
            filled[: len(images)] = images
            dispatched = (compute(variables, moments, parallel.share(filled)), len(images))
            # One batch is computed while the one before is fetched.
            if pending is not None:
                yield fetch(*pending)
            pending = dispatched
    except ValueError as error:
        # A file cannot be decoded. The batch before it is still to be yielded.
        failure = error
    if pending is not None:
        yield fetch(*pending)
    if failure is not None:
        raise failure


def class_probabilities(
    logits: Float[AnyArray, "*images classes"], multi_label: bool
) -> Float[np.ndarray, "*images classes"]:
    """Turns logits into probabilities.

    Args:
      logits: along the last axis, those of the classes.
      multi_label: whether an image may have several classes, as with loss="sigmoid".
    """
    activation = jax.nn.sigmoid if multi_label else jax.nn.softmax
    return np.asarray(activation(jnp.asarray(logits)))


# ------------------------------------------------------------------ scores


def confusion(
    predicted: Integer[np.ndarray, "*pixels"], labels: Integer[np.ndarray, "*pixels"], classes: int
) -> Int[np.ndarray, "{classes} {classes}"]:
    """Counts the images or pixels of each class (row) that are predicted as each class (column).

    Pixels of masks whose label is 255 are left out.
    """
    if labels.ndim > 1:
        counted = labels != splits.IGNORED
        labels = labels[counted]
        predicted = predicted[counted]
    pairs = labels.astype(np.int64) * classes + predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def intersection_over_union(counts: Int[np.ndarray, "classes classes"]) -> list[float | None]:
    """Computes each class's intersection over union from a confusion matrix.

    It is None for a class that no pixel has or is predicted as.
    """
    intersections = np.diag(counts)
    unions = counts.sum(0) + counts.sum(1) - intersections
    return [float(i / u) if u else None for i, u in zip(intersections, unions)]


def recall(counts: Int[np.ndarray, "classes classes"]) -> list[float | None]:
    """Computes the share of each class's images that are predicted as it, from a confusion matrix.

    It is None for a class without images.
    """
    sizes = counts.sum(1)
    return [float(i / size) if size else None for i, size in zip(np.diag(counts), sizes)]


def average_precision(
    outputs: Float[np.ndarray, "n classes"], labels: Integer[np.ndarray, "n classes"]
) -> list[float | None]:
    """Computes each class's average precision, with images ranked by `outputs`.

    It is None for a class that all images have, or no image.
    """
    from sklearn.metrics import average_precision_score

    precisions: list[float | None] = []
    for output, label in zip(outputs.T, labels.T):
        precision: float | None = None
        # It is undefined for a class that all images have, or no image.
        if 0 < label.sum() < len(label):
            precision = float(average_precision_score(label, output))
        precisions.append(precision)
    return precisions


def by_class(
    kind: str, outputs: Float[np.ndarray, "n *pixels classes"], labels: Integer[np.ndarray, "n ..."]
) -> list[float | None]:
    """Scores each class by its recall.

    For masks ("pixelwise") the score is the IoU, and for "sigmoid" the average precision.
    """
    if kind == "sigmoid":
        return average_precision(outputs, labels)
    counts = confusion(outputs.argmax(-1), labels, outputs.shape[-1])
    return recall(counts) if kind == "cross_entropy" else intersection_over_union(counts)


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Averages the values that are not None; returns None if all are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def score(
    kind: str, outputs: Float[np.ndarray, "n *pixels classes"], labels: Integer[np.ndarray, "n ..."]
) -> dict[str, float]:
    """Scores logits against labels.

    Args:
      kind: the loss, one of `cnnjax.train.step.LOSSES`.
      outputs: the logits.
      labels: as in `cnnjax.train.step.loss_and_errors`.

    Returns:
      The mean `loss` and the share of errors, `error`; with more than ten classes `top5_error`;
      for masks `mean_iou` and for several classes per image `mean_ap`, where they are defined.

    Raises:
      ValueError: for labels that belong to no class.
    """
    splits.check_labels(labels, outputs.shape[-1], "the split to score", loss=kind)
    size = _MASKS if kind == "pixelwise" else len(labels)
    compute = jax.jit(loss_and_errors, static_argnums=0)
    parts = [
        compute(kind, outputs[at : at + size], labels[at : at + size])
        for at in range(0, len(labels), size)
    ]
    losses = np.concatenate([loss for loss, _ in parts]).astype(np.float64)
    errors = np.concatenate([error for _, error in parts]).astype(np.float64)
    scores = {"loss": float(losses.mean()), "error": float(errors.mean())}
    if kind == "cross_entropy":
        if outputs.shape[-1] > 10:
            top5 = np.argpartition(outputs, -5, axis=-1)[:, -5:]
            is_missed = (top5 != labels[:, None]).all(1)
            scores["top5_error"] = float(np.mean(is_missed))
        return scores
    mean = mean_of_known(by_class(kind, outputs, labels))
    if mean is not None:
        scores["mean_iou" if kind == "pixelwise" else "mean_ap"] = mean
    return scores
