"""The subject of a command: a network, its variables and stages, and photographs."""

import argparse
import difflib
import functools
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from cnnjax import weights
from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.runtime import command, figures, imagenet
from cnnjax.runtime.progress import progress
from cnnjax.runtime.types import AnyArray
from cnnjax.train.run import TrainedRun, open_run
from cnnjax.visualize.stages import check_stage, network_input, stage_channels

_BATCH = 16
# The most classes that an error lists by name.
_LISTED = 20
# Commands that look at no maps.
_WITHOUT_STAGES = ("filters", "occlusion", "saliency")


def spread(items: Sequence, count: int) -> list:
    """Picks `count` of the items, evenly spread, or all if there are fewer."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[place] for place in np.unique(places.round().astype(int))]


def find_class(label: str, names: Sequence[str], count: int) -> int:
    """Returns the number of a class that is given by its name or its number.

    A name comes before a number, since classes may be named by numbers.

    Args:
      label: the name or the number.
      names: the classes' names; empty if they are not known.
      count: the number of classes.

    Raises `ValueError` if there is no such class, or several have the name.
    """
    named = [number for number, name in enumerate(names) if name == label]
    if len(named) == 1:
        return named[0]
    if named:
        raise ValueError(
            f"label={label!r} is the name of classes {', '.join(map(str, named))}; give a number"
        )
    if label.isdecimal() and int(label) < count:
        return int(label)
    accepted = f"expected a number from 0 to {count - 1}"
    if not names:
        accepted += ", since the classes' names are not known"
    elif len(names) <= _LISTED:
        accepted += f", or one of {', '.join(names)}"
    near = difflib.get_close_matches(label, names, n=3)
    if near:
        accepted += f"; did you mean {' or '.join(near)}?"
    raise ValueError(f"label={label!r} is neither the name nor the number of a class; {accepted}")


class Subject:
    """A command's network, from its options, with its photographs."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.run: TrainedRun | None = None
        if options.run is None:
            self.name = options.model
            self.model = _create_model(options)
            self.moments = imagenet.MOMENTS
            self.classes = _class_names(self.model, options.weights)
            # A softmax of one logit would be 1.
            self.multi_label = self.model.num_classes == 1
        else:
            self._open_run(options.run)
        # Filters and maximized images are shown like photographs, in gray or in color.
        photographs.check_channels(self.model.input_shape[2], f"{self.name} takes images")
        self.stages = options.stages or list(stage_channels(self.model))
        if not self.stages and options.command not in _WITHOUT_STAGES:
            raise ValueError(f"model={self.name!r} has no stages, and so no maps to look at")
        for stage in self.stages:
            check_stage(self.model, stage, options.channels or ())
        self.label = None
        if options.label is not None:
            self.label = find_class(options.label, self.classes, self.model.num_classes)
        if options.images is not None:
            found = photographs.list_photographs(options.photographs)
            self.paths = spread(found, options.images or len(found))
        if self.run is None:
            variables = _variables(self.model, options)
        else:
            variables = self.run.variables
        # Weights of files are NumPy arrays, which every call would copy.
        self.variables = jax.device_put(variables)

    def _open_run(self, folder):
        run = open_run(folder)
        self.run = run
        self.name = run.config.model
        self.model = run.model
        if self.options.padding is not None:
            self.model = self.model.clone(padding=self.options.padding)
        if self.options.sampling is not None:
            self.model = self.model.clone(sampling=self.options.sampling)
        if self.options.every_layer:
            self.model = _with_every_layer(self.model, self.name)
        self.classes = run.classes
        self.moments = run.moments
        self.multi_label = run.multi_label

    def photograph_name(self, path: pathlib.Path) -> str:
        """Returns a photograph's path below its folder, by which the results name it."""
        folder = self.options.photographs
        return path.relative_to(folder).as_posix() if folder else path.name

    def explained(self, probabilities: Float[np.ndarray, "n classes"]) -> Int[np.ndarray, " n"]:
        """Returns the class to explain for each image: `--label`, or the predicted class."""
        if self.label is None:
            return probabilities.argmax(1)
        return np.full(len(probabilities), self.label)

    def class_name(self, label: int) -> str:
        """Returns a class's name for a figure, or its number if it is not known."""
        if not self.classes:
            return f"class {label}"
        return self._class_labels[label]

    @functools.cached_property
    def _class_labels(self) -> list[str]:
        return figures.label_classes(self.classes)

    def read(
        self, paths: Sequence[pathlib.Path], times: int = 1
    ) -> UInt8[np.ndarray, "n height width 3"]:
        """Reads photographs, scaled and cut to `times` the network's image size.

        Those of a training run are prepared as the run's test images, gray if these are gray.
        """
        height, width, _ = self.model.input_shape
        images = []
        for path in paths:
            if self.run is None:
                image = photographs.fit(path, times * height, times * width)
            else:
                image = self.run.read(path, times)
            images.append(np.broadcast_to(image, (*image.shape[:2], 3)))
        return np.stack(images)

    def batches(self) -> Iterator[np.ndarray]:
        """Yields batches of the photographs, uint8."""
        with progress(len(self.paths), "photographs") as advance:
            for start in range(0, len(self.paths), _BATCH):
                paths = self.paths[start : start + _BATCH]
                yield self.read(paths)
                advance(len(paths))

    def photographs(self) -> np.ndarray:
        """Reads all photographs."""
        return np.concatenate(list(self.batches()))

    def input(self, images: np.ndarray) -> AnyArray:
        """Normalizes photographs as the network was trained."""
        return network_input(self.model, jnp.asarray(images), self.moments)

    def channels(self, stage: str, count: int) -> list[int]:
        """Returns the channels asked for, or `count` evenly spread ones."""
        return self.options.channels or spread(range(stage_channels(self.model)[stage]), count)


def _create_model(options):
    fields = weights.fields_for(options.model, options.weights)
    if options.every_layer:
        fields = {"every_layer": True, **fields}
    return create_model(options.model, **command.policies(options), **fields)


def _class_names(model, source):
    """Returns the classes' names if the weights are published ones; else an empty tuple."""
    is_published = source == "imagenet" or weights.of_file(source) is not None
    names = weights.imagenet_classes()
    return names if is_published and model.num_classes == len(names) else ()


def _with_every_layer(model, name):
    if not hasattr(model, "every_layer"):
        raise ValueError(f"every_layer=True is not a field of {name}; it is one of a VGG")
    return model.clone(every_layer=True)


@functools.partial(jax.jit, static_argnames="model")
def _draw(model):
    """Draws the variables of a network."""
    image = jnp.zeros((1, *model.input_shape))
    return model.init(jax.random.key(0), image)


def _variables(model, options):
    if options.weights == "random":
        # Deep networks have no pixel left under `none`. So all are drawn under `zeros`, except
        # those whose shapes depend on the padding.
        padded = model.clone(padding="zeros")
        if model.padding in ("none", "full"):
            if weights.variable_shapes(model) != weights.variable_shapes(padded):
                return _draw(model)
        return _draw(padded)
    file = weights.fetch(options.model) if options.weights == "imagenet" else options.weights
    return weights.load_torchvision(file, model, options.missing)
