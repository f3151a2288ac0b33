"""A network's outputs on a whole data set, in the same ways as training runs, and what they are worth."""
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.data.augment import normalise, views
from cnnjax.models import Network
from cnnjax.train.parallel import Parallel
from cnnjax.train.step import loss_and_errors


def _rngs() -> dict:
    """What padding='random' draws from: the same noise for every batch, other noise for each image in it."""
    return {"padding": jax.random.key(0)}


def logits(model: Network, variables, images) -> jnp.ndarray:
    """Logits in evaluation mode."""
    return model.apply(variables, images, rngs=_rngs())


@functools.cache
def features(stage: str) -> Callable:
    """A function of (model, variables, images) that gives one stage's activations: what a frozen network is used for."""
    return lambda model, variables, images: model.apply(variables, images, method="stages", last=stage, rngs=_rngs())[stage]


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
        return output(model, variables, normalise(images, *moments))
    return parallel.compile(run, replicated=2, shared=1, shares_output=True)


def batches_of(images: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Images in order, `batch_size` at a time, the last batch shorter."""
    return (images[at:at + batch_size] for at in range(0, len(images), batch_size))


def predict(parallel: Parallel, model: Network, variables, moments, batches: Iterable[np.ndarray], batch_size: int,
            output: Callable = logits) -> np.ndarray:
    """Runs a frozen network over uint8 batches of at most `batch_size` images -> `output` of every image, in order.

    `variables` and `moments` (mean, std) are replicated (`Parallel.replicate`); `batch_size` is a multiple of the devices of
    this process. `output` is `logits`, `features(stage)` or `averaged(views)`. Processes each see all batches.
    """
    run, results = compiled(parallel, model, output), []
    for images in batches:
        filled = np.zeros((batch_size, *images.shape[1:]), images.dtype)
        filled[:len(images)] = images
        results.append((run(variables, moments, parallel.share(filled)), len(images)))
        if len(results) > 1:  # one batch is computed while the last is fetched
            results[-2] = parallel.fetch_shared(results[-2][0])[:results[-2][1]]
    if results:
        results[-1] = parallel.fetch_shared(results[-1][0])[:results[-1][1]]
    return np.concatenate(results)


def score(kind: str, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The mean loss and the share of errors of logits against labels, and `top5_error` with more than ten classes."""
    losses, errors = jax.jit(loss_and_errors, static_argnums=0)(kind, outputs, labels)
    found = {"loss": float(np.asarray(losses, np.float64).mean()), "error": float(np.asarray(errors, np.float64).mean())}
    if kind == "cross_entropy" and outputs.shape[-1] > 10:
        best = np.argpartition(outputs, -5, axis=-1)[:, -5:]
        found["top5_error"] = float(np.mean((best != labels[:, None]).all(1)))
    return found
