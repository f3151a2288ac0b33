"""Check that every family of networks can learn one batch by heart.

    python -m experiments.overfit --workdir runs/overfit [--data_dir data] [--models resnet18 ...]

A network that cannot bring the loss of eight CIFAR-10 images to zero has a wrong gradient, a wrong
initialization, or a wrong loss. Each network is trained with Adam at a constant learning rate, in
training mode and without dropout, until the loss is below 0.001. If a network does not reach this
goal, the command ends with an error. Writes overfit.json and report.md.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import study
from cnnjax.data import arrays
from cnnjax.models import Network, create_model, list_models
from cnnjax.runtime import tables
from cnnjax.train import step
from cnnjax.train.parallel import Parallel

FAMILIES = (
    "mlp3",
    "lenet5",
    "lenet",
    "tutorial_net",
    "keras_convnet",
    "convnet",
    "alexnet_2012",
    "zfnet",
    "alexnet",
    "vgg11",
    "vgg11_bn",
    "resnet18",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "googlenet_2014",
    "googlenet",
    "inception_v3",
    "squeezenet1_1",
    "densenet121",
    "shufflenet_v2_x0_5",
    "mobilenet_v2",
    "mnasnet0_5",
)
# 64 px are enough for most networks. These need more, or they lose a layer or an auxiliary head.
_SIZES = {"alexnet_2012": 67, "googlenet_2014": 79, "inception_v3": 299}
GOAL = 1e-3
_COUNT = 8  # images
_RATE = 3e-4
_STEPS = 1000


class Point(NamedTuple):
    model: str


def add_options(parser):
    parser.add_workdir("runs/overfit")
    parser.add_data_dir()
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list_models(),
        default=FAMILIES,
        metavar="MODEL",
        help="default: one of each family",
    )


def points(options):
    return [Point(name) for name in options.models]


def load(options) -> arrays.Split:
    """Returns the batch."""
    return arrays.load("cifar10", options.data_dir).train.take(slice(_COUNT))


def without_dropout(name: str) -> Network:
    """Builds a network without dropout, for ten classes and images of at most 64 px.

    The networks in `_SIZES` get larger images.
    """
    published = create_model(name)
    size = _SIZES.get(name, min(published.input_shape[0], 64))
    fields = [field for field in ("dropout", "dropout_aux") if hasattr(published, field)]
    rates = dict.fromkeys(fields, 0.0)
    return create_model(name, num_classes=10, input_shape=(size, size, 3), **rates)


def measure(point: Point, options, batch: arrays.Split) -> dict:
    """Trains one network until it reaches the goal, or for 1,000 steps."""
    model = without_dropout(point.model)
    shape = (_COUNT, *model.input_shape)
    images = np.asarray(jax.image.resize(batch.images, shape, "nearest"))
    recipe = step.Recipe(model, optimizer="adam")
    numbers = step.Numbers(seed=0)
    moments = arrays.normalization(images)
    constants = step.Constants(moments=moments, rates=jnp.full(_STEPS, _RATE))

    state = step.init(recipe, model.input_shape, numbers)
    take_step = step.streamed_step(Parallel("jit"), recipe)
    # An epoch is one step, so the state's totals are those of the last step.
    steps_per_epoch = np.int32(1)
    for _ in range(_STEPS):
        state = take_step(state, constants, (images, batch.labels), numbers, steps_per_epoch)
        loss = float(state.totals["loss"]) / _COUNT
        if loss < GOAL:
            break
    else:
        raise RuntimeError(f"{point.model}: the loss is {loss:.1e} after {_STEPS} steps")
    error = float(state.totals["errors"]) / _COUNT
    return {"size": shape[1], "steps": int(state.step), "loss": loss, "error": error}


def report(results: list[dict], options) -> study.Report:
    lines = []
    for result in results:
        numbers = [f"{result['loss']:.1e}", f"{result['error']:.3f}"]
        lines.append([result["model"], str(result["size"]), str(result["steps"]), *numbers])
    table = tables.table(["network", "image size", "steps", "loss", "error"], lines)
    text = f"""# One batch learned by heart

Eight CIFAR-10 images; the goal is a loss below {GOAL}.

{table}"""
    return study.Report(text, {})


STUDY = study.Study(
    description=__doc__,
    results="overfit.json",
    add_options=add_options,
    axes=("models",),
    load=load,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
