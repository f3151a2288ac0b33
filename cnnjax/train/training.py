"""A training run in memory: its data, network and training step, and how to score it."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cnnjax import transfer, weights
from cnnjax.data import splits
from cnnjax.models import Network
from cnnjax.models.base import digest_network
from cnnjax.nn.parameters import eval_shape
from cnnjax.runtime import files, workdir
from cnnjax.runtime.paths import sha256
from cnnjax.train import evaluate, step
from cnnjax.train.data import TrainingData, open_data
from cnnjax.train.parallel import Parallel
from cnnjax.train.run import build_model, build_numbers, build_recipe
from cnnjax.train.schedules import learning_rates

_LOG = logging.getLogger("cnnjax")


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores on a split, and what they were computed from.

    Attributes:
      scores: as `cnnjax.train.evaluate.score` returns them.
      outputs: logits of all images.
      labels: their labels.
    """

    scores: dict[str, float]
    outputs: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training configuration describes, built.

    Attributes:
      config: the configuration.
      parallel: how to run steps on the devices.
      data: the data set.
      model: the network.
      recipe: what a training step is.
      numbers: its numbers.
      rates: the learning rate of every step, float32 [steps].
      steps_per_epoch: the full batches of an epoch; the remaining images are dropped.
      network_sha256: as `digest_network` returns it.
    """

    config: ml_collections.ConfigDict
    parallel: Parallel
    data: TrainingData
    model: Network
    recipe: step.Recipe
    numbers: step.Numbers
    rates: np.ndarray
    steps_per_epoch: int
    network_sha256: str | None

    def data_record(self) -> dict[str, Any]:
        """Describes the data that a run depends on, as JSON."""
        return {
            "classes": list(splits.class_names(self.data.classes)),
            "n_train": self.data.n_train,
            "n_validation": self.data.n_validation,
            "digest": self.data.digest,
        }

    def check_data(self, saved: dict[str, Any]) -> None:
        """Checks that the images are those of a checkpoint.

        Args:
          saved: the checkpoint's `data_record`; those of earlier versions hold less.

        Raises:
          ValueError: if they have changed.
        """
        if change := splits.describe_change(saved, self.data_record()):
            raise ValueError(
                f"the images of dataset={self.config.dataset!r}, "
                f"data_dir={self.config.data_dir!r} have changed since the run began ({change}); "
                "bring them back, or choose another --workdir"
            )

    def initial_state(self) -> step.State:
        """Builds the state before the first step, with `initial_weights` if there are any."""
        pretrained = None
        if self.config.initial_weights:
            pretrained = transfer.load_initial_weights(
                self.config.initial_weights, self.model, self.config.initial_parts
            )
            _LOG.info(
                "starting from %s: %s of %s parameters",
                self.config.initial_weights,
                _count_parameters(pretrained),
                _count_parameters(weights.variable_shapes(self.model)),
            )
            _warn_of_other_scale(self.config, self.data.moments[1])
        return step.init(self.recipe, self.data.image_shape, self.numbers, pretrained)

    def state_shapes(self) -> step.State:
        """Returns the shapes and types of the state, without computing it."""
        init = functools.partial(step.init, self.recipe, self.data.image_shape, self.numbers)
        # `_check_network` has traced the network with zero padding. With other padding, feature
        # maps may become too small, which raises here.
        with _name_network(self.config.model, self.model):
            return jax.eval_shape(init)

    def digest_initial_weights(self) -> str | None:
        """Hashes the file of `initial_weights`; returns None if there is none."""
        if not self.config.initial_weights:
            return None
        return sha256(transfer.weights_file(self.config.initial_weights))

    def score(self, state: step.State, split: str, views: int = 1) -> Scored | None:
        """Scores a replicated state on a split, in evaluation mode.

        Args:
          state: the state.
          split: "train", "validation" or "test".
          views: the number of views of each image to average.

        Returns:
          The scores; None if `TrainingData.evaluation` has no such split.

        Raises:
          FloatingPointError: for scores that are not finite.
        """
        pairs = self.data.evaluation(split, views)
        if pairs is None:
            return None
        # The labels are collected while the images stream through the network.
        label_batches = []

        def image_batches():
            for images, labels in pairs:
                label_batches.append(labels)
                yield images

        output_batches = evaluate.predict_batches(
            parallel=self.parallel,
            model=self.model,
            variables=state.variables_to_score(),
            moments=self.parallel.replicate(self.data.moments),
            batches=image_batches(),
            batch_size=self.config.batch_size,
            output=evaluate.averaged(views),
        )
        outputs = np.concatenate(list(output_batches))
        labels = np.concatenate(label_batches)
        scores = evaluate.score(self.config.loss, outputs, labels)
        for name, value in scores.items():
            if not np.isfinite(value):
                steps_done = int(self.parallel.fetch(state.step))
                raise FloatingPointError(
                    f"{split}_{name}={value} is not finite after step {steps_done}"
                )
        return Scored(scores=scores, outputs=outputs, labels=labels)


def build_run(config: ml_collections.ConfigDict) -> Training:
    """Opens a configuration's data and builds its network and training step.

    Raises:
      ValueError: for values of the configuration that do not fit the devices, the data or the
        network.
    """
    parallel = Parallel(config.parallel)
    if config.batch_size % (parallel.size * config.accumulate):
        raise ValueError(
            f"batch_size={config.batch_size} is not a multiple of {parallel.size} device(s) times "
            f"accumulate={config.accumulate}"
        )
    if config.mixup and config.batch_size == parallel.size * config.accumulate:
        raise ValueError(
            f"mixup={config.mixup} has no two images to mix: batch_size={config.batch_size} is one "
            f"image for each of {parallel.size} device(s) times accumulate={config.accumulate}"
        )
    data = open_data(config, parallel)
    if config.loss == "cross_entropy" and len(data.classes) < 2:
        raise ValueError(
            f"dataset={config.dataset!r} in data_dir={config.data_dir!r} has one class, "
            f"{splits.class_name(data.classes[0])!r}; loss='cross_entropy' takes at least two"
        )
    steps_per_epoch = data.n_train // config.batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {data.n_train} training images"
        )
    axis_name = parallel.axis_name if config.sync_batch_norm else None
    model = build_model(config, len(data.classes), data.image_shape, axis_name)
    _check_network(config, model)
    return Training(
        config=config,
        parallel=parallel,
        data=data,
        model=model,
        recipe=build_recipe(config, model),
        numbers=build_numbers(config),
        rates=learning_rates(config.schedule, steps_per_epoch, config.epochs),
        steps_per_epoch=steps_per_epoch,
        network_sha256=digest_network(config.model),
    )


def _count_parameters(variables: dict) -> str:
    """Counts the parameters among variables: "11,689,512"."""
    return f"{sum(leaf.size for leaf in jax.tree.leaves(variables.get('params', {}))):,}"


def _warn_of_other_scale(config: ml_collections.ConfigDict, std: np.ndarray) -> None:
    """Logs a warning if the run of the initial weights scaled its images very differently.

    Only runs and combinations record their scale; those of earlier versions do not.

    Args:
      config: the configuration.
      std: the standard deviation that pixels are divided by, [channels].
    """
    file = transfer.weights_file(config.initial_weights)
    path = file.with_name("results.json")
    is_run = any(workdir.read_record(file.parent, kind) for kind in ("train", "combine"))
    if file.name != transfer.WEIGHTS or not is_run or not path.is_file():
        return
    source_std = np.array(files.read_json(path).get("std", []))
    # The first layer does not fit images of another number of channels.
    if source_std.shape != std.shape:
        return
    differs = (std > 2 * source_std) | (source_std > 2 * std)
    if differs.any():
        channel = differs.argmax()
        _LOG.warning(
            "pixels=%r divides images by a standard deviation of %.2g, the run of "
            "initial_weights=%r by %.2g, so that its layers get inputs of another scale; use the "
            "`pixels` of that run",
            config.pixels,
            std[channel],
            config.initial_weights,
            source_std[channel],
        )


@contextlib.contextmanager
def _name_network(name: str, model: Network) -> Iterator[None]:
    """Adds the network's name and image size to a `ValueError` from its layers."""
    try:
        yield
    except ValueError as error:
        size = "x".join(map(str, model.input_shape))
        raise ValueError(f"model={name!r} on images of {size}: {error}") from error


# Cached: most runs of a sweep have the same network, and each call traces it.
@functools.lru_cache(maxsize=16)
def _output_and_variables(model: Network) -> tuple:
    """Returns the shapes of the output for one image and of the variables."""
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    # With zero padding, since only the shape of the output and the names of the variables are
    # checked, which no padding changes. `state_shapes` traces the network with its own.
    init = model.clone(padding="zeros").init_with_output
    return eval_shape(init, jax.random.key(0), image)


def _check_network(config: ml_collections.ConfigDict, model: Network) -> None:
    """Checks that the output fits the loss, and that a file can hold the weights."""
    with _name_network(config.model, model):
        output, variables = _output_and_variables(model)
    try:
        weights.torchvision_keys(variables)
    except ValueError as error:
        raise ValueError(f"model={config.model!r}: {error}") from error
    expected = [model.num_classes]
    if config.loss == "pixelwise":
        expected = [*model.input_shape[:2], model.num_classes]
    if list(output.shape[1:]) != expected:
        raise ValueError(
            f"model={config.model!r} puts out {list(output.shape[1:])} for an image; "
            f"loss={config.loss!r} accepts {expected}"
        )
