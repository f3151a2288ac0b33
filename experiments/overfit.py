"""Every family of networks overfits one batch: eight CIFAR-10 images, learned by heart.

    python -m experiments.overfit --workdir runs/overfit [--data_dir data] [--models resnet18 vgg11 ...]

A network that cannot bring the loss of one batch to zero has a gradient, an initialization or a loss that is wrong. Adam at a
constant rate, in training mode, without dropout, until the loss is below 0.001. Writes overfit.json and report.md.
"""

import inspect
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.data import arrays
from cnnjax.models import base, create_model, list_models
from cnnjax.runtime import backend, command, tables, workdir
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
# Image sizes where 64 does not leave something of every layer, auxiliary classifiers included.
_SIZES = {"alexnet_2012": 67, "googlenet_2014": 79, "inception_v3": 299}
GOAL = 1e-3


def overfit(
    name: str, images: np.ndarray, labels: np.ndarray, rate: float = 3e-4, steps: int = 1000
) -> dict:
    """Trains a network on one batch until its loss is below `GOAL` -> the steps it took, and the last loss and error."""
    rates = [
        field
        for field in ("dropout", "dropout_aux")
        if field in inspect.signature(base._REGISTRY[name]).parameters
    ]
    height = create_model(name).input_shape[0]
    size = _SIZES.get(name, min(height, 64))
    model = create_model(
        name, num_classes=10, input_shape=(size, size, 3), **dict.fromkeys(rates, 0.0)
    )
    images = np.asarray(jax.image.resize(images, (len(images), size, size, 3), "nearest"))
    parallel, recipe, numbers = (
        Parallel("jit"),
        step.Recipe(model, optimizer="adam"),
        step.Numbers(seed=0),
    )
    state, take = (
        step.init(recipe, model.input_shape, numbers),
        step.streamed_step(parallel, recipe),
    )
    moments, table = arrays.normalization(images), jnp.full(steps, rate)
    for _ in range(steps):
        state = take(state, moments, table, images, labels, np.int32(1), numbers)
        if (loss := float(state.totals["loss"]) / len(images)) < GOAL:
            break
    return {
        "model": name,
        "size": size,
        "steps": int(state.step),
        "loss": loss,
        "error": float(state.totals["errors"]) / len(images),
    }


def write(folder: pathlib.Path, rows: list[dict]) -> str:
    """Writes the results and the report; returns the table."""
    workdir.write_json(folder / "overfit.json", rows)
    lines = [
        [
            row["model"],
            str(row["size"]),
            str(row["steps"]),
            f"{row['loss']:.1e}",
            f"{row['error']:.3f}",
        ]
        for row in rows
    ]
    table = tables.table(["network", "image size", "steps", "loss", "error"], lines)
    text = f"# One batch learned by heart\n\nEight CIFAR-10 images; the goal is a loss below {GOAL}.\n\n"
    workdir.write(folder / "report.md", text + table)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
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
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        data = arrays.load("cifar10", options.data_dir)
        options.workdir.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in options.models:
            rows.append(overfit(name, data.train.images[:8], data.train.labels[:8]))
            print(write(options.workdir, rows).splitlines()[-1], flush=True)
        if missed := [row["model"] for row in rows if row["loss"] >= GOAL]:
            raise RuntimeError(f"not overfitted: {', '.join(missed)}")

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
