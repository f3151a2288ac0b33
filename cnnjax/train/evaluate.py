"""A network's outputs on a whole data set, in the same ways as training runs, and what they are worth."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Shaped, UInt8

from cnnjax.data.augment import IGNORED, normalize, views
from cnnjax.models import Network
from cnnjax.runtime.types import AnyArray
from cnnjax.train.parallel import Parallel
from cnnjax.train.step import loss_and_errors

_MASKS = 32  # masks that are scored together: their logits take many times the room of the images


def _rngs() -> dict:
    """What padding='random' draws from: the same noise for every batch, other noise for each image in it."""
    return {"padding": jax.random.key(0)}


def logits(
    model: Network, variables, images: Float[AnyArray, "batch height width channels"]
) -> Float[Array, "batch ..."]:
    """Logits in evaluation mode."""
    return model.apply(variables, images, rngs=_rngs())  # type: ignore[return-value]  # a tuple only where something is mutable


@functools.cache
def features(stage: str) -> Callable:
    """A function of (model, variables, images) that gives one stage's activations: what a frozen network is used for."""
    return lambda model, variables, images: model.apply(
        variables, images, method="stages", last=stage, rngs=_rngs()
    )[stage]


@functools.cache
def pooled(stage: str) -> Callable:
    """The same, averaged over the map: what linear probes read."""
    return lambda model, variables, images: features(stage)(model, variables, images).mean((1, 2))


@functools.cache
def averaged(count: int) -> Callable:
    """Logits as the logarithm of the mean probability over `count` views of each image (`cnnjax.data.augment.views`)."""

    def run(model, variables, images):
        size = model.input_shape[0] if count == 10 else images.shape[1]
        found = jnp.stack([logits(model, variables, view) for view in views(images, count, size)])
        return jax.nn.logsumexp(jax.nn.log_softmax(found), axis=0) - math.log(count)

    return logits if count == 1 else run


@functools.lru_cache(maxsize=64)
def compiled(parallel: Parallel, model: Network, output: Callable):
    def run(axis_name, variables, moments, images):
        return output(model, variables, normalize(images, *moments))

    return parallel.compile(run, replicated=2, shared=1, shares_output=True)


def batches_of(
    images: Shaped[np.ndarray, "n ..."], batch_size: int
) -> Iterator[Shaped[np.ndarray, "batch ..."]]:
    """Images in order, `batch_size` at a time, the last batch shorter."""
    return (images[at : at + batch_size] for at in range(0, len(images), batch_size))


def predict(
    parallel: Parallel,
    model: Network,
    variables,
    moments,
    batches: Iterable[UInt8[np.ndarray, "batch height width channels"]],
    batch_size: int,
    output: Callable = logits,
) -> Shaped[np.ndarray, "n ..."]:
    """Runs a frozen network over uint8 batches of at most `batch_size` images -> `output` of every image, in order.

    `variables` and `moments` (mean, std) are replicated (`Parallel.replicate`); `batch_size` is a multiple of the devices of
    this process. `output` is `logits`, `features(stage)` or `averaged(views)`. Processes each see all batches.
    """
    run, results = compiled(parallel, model, output), []
    for images in batches:
        filled = np.zeros((batch_size, *images.shape[1:]), images.dtype)
        filled[: len(images)] = images
        results.append((run(variables, moments, parallel.share(filled)), len(images)))
        if len(results) > 1:  # one batch is computed while the last is fetched
            results[-2] = parallel.fetch_shared(results[-2][0])[: results[-2][1]]
    if results:
        results[-1] = parallel.fetch_shared(results[-1][0])[: results[-1][1]]
    return np.concatenate(results)


def confusion(
    predicted: Integer[np.ndarray, "*pixels"], labels: Integer[np.ndarray, "*pixels"], classes: int
) -> Int[np.ndarray, "{classes} {classes}"]:
    """How many pixels of each class (row) were taken for each class (column), but for those whose label is 255."""
    counted = labels != IGNORED
    pairs = labels[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def intersection_over_union(counts: Int[np.ndarray, "classes classes"]) -> list[float | None]:
    """Of a confusion matrix, for each class the pixels right over those that are of it or were taken for it; None where there are none."""
    right, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
    return [float(r / u) if u else None for r, u in zip(right, union)]


def average_precision(
    outputs: Float[np.ndarray, "n classes"], labels: Integer[np.ndarray, "n classes"]
) -> list[float | None]:
    """For each class, the mean precision over the images that have it, ranked by `outputs`; None where all or none has it."""
    from sklearn.metrics import average_precision_score

    return [
        float(average_precision_score(label, output)) if 0 < label.sum() < len(label) else None
        for output, label in zip(outputs.T, labels.T)
    ]


def by_class(
    kind: str, outputs: Float[np.ndarray, "n *pixels classes"], labels: Integer[np.ndarray, "n ..."]
) -> list[float | None]:
    """What each class is worth by itself: its IoU where labels are masks ("pixelwise"), its average precision for "sigmoid"."""
    if kind == "pixelwise":
        return intersection_over_union(confusion(outputs.argmax(-1), labels, outputs.shape[-1]))
    return average_precision(outputs, labels)


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def score(
    kind: str, outputs: Float[np.ndarray, "n *pixels classes"], labels: Integer[np.ndarray, "n ..."]
) -> dict[str, float]:
    """The mean loss and the share of errors of logits against labels; with more than ten classes `top5_error`, of masks `mean_iou`
    and of several classes an image `mean_ap`, where they are defined."""
    size = _MASKS if kind == "pixelwise" else len(labels)
    compute = jax.jit(loss_and_errors, static_argnums=0)
    parts = [
        compute(kind, outputs[at : at + size], labels[at : at + size])
        for at in range(0, len(labels), size)
    ]
    losses, errors = (np.concatenate(part).astype(np.float64) for part in zip(*parts))
    found = {"loss": float(losses.mean()), "error": float(errors.mean())}
    if (
        kind != "cross_entropy"
        and (mean := mean_of_known(by_class(kind, outputs, labels))) is not None
    ):
        found["mean_iou" if kind == "pixelwise" else "mean_ap"] = mean
    if kind == "cross_entropy" and outputs.shape[-1] > 10:
        best = np.argpartition(outputs, -5, axis=-1)[:, -5:]
        found["top5_error"] = float(np.mean((best != labels[:, None]).all(1)))
    return found
