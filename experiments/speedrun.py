"""CIFAR-10 to 94 % as fast as possible: many training runs, beside the public records.

    python -m experiments.speedrun --workdir runs/speedrun --data_dir FOLDER [--runs 200] \\
        [--epochs 8 ...]

A run is one call of one compiled program, which computes whitening filters from the training
images, trains for all epochs with augmentation, and tests on six views of each image. Every number
of the recipe in configs/speedrun_cifar10.py is an option. Runs compute in bfloat16, or in float32
on a CPU. The time of a run is the time of its call; the data are on the device by then, and
compilation is timed separately.

The same command makes the runs that are missing. Writes report.md, speedrun.json, speedrun.png, and
one file per run in runs/.
"""

import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import scipy.stats
from matplotlib.figure import Figure

from cnnjax.data import arrays
from cnnjax.data.augment import augment, normalize
from cnnjax.models import Network, create_model
from cnnjax.models.speedrun import whitening_filters
from cnnjax.runtime import backend, command, configuration, files, host, tables, workdir
from cnnjax.runtime.progress import progress
from cnnjax.runtime.report import describe_environments
from cnnjax.train.step import epoch_order, loss_and_errors
from configs import speedrun_cifar10

TARGET = 94.0  # accuracy in percent on the test images


class Record(NamedTuple):
    """Accuracy in percent, its standard deviation (None if not stated), and seconds per run."""

    accuracy: float
    std: float | None
    runs: int
    seconds: float


# Public records, measured on one A100.
RECORDS = {
    "hiverge/cifar10-speedrun": Record(94.01, 0.13, 2000, 2.015),
    "KellerJordan/cifar10-airbench, airbench94_muon": Record(94.01, None, 200, 2.59),
}
_WHITENED = 5000  # images that whitening filters are computed from, as in the record
# Purposes of random keys.
_AUGMENT = 0
_FLIP = 1


# --- Optimizer ------------------------------------------------------------------------------------


def _group(path, _) -> str:
    """Names how a parameter is trained."""
    module = path[-2].key
    name = path[-1].key
    if module == "whiten":
        return "whiten" if name == "bias" else "frozen"
    if name == "kernel":
        return "head" if module == "fc" else "filters"
    # BatchNorm's scales stay 1.
    return {"bias": "biases", "scale": "frozen"}[name]


def _as_matrices(filters):
    """Tells Muon to read filters [height, width, in, out] as matrices [height width in, out]."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3), filters)


def _renormalized(updates, params):
    """Makes each update first rescale its filters, then change them.

    All filters of a layer together, [height, width, in, out], get the norm sqrt(out), as if each
    had the norm 1.
    """

    def renormalized(update, kernel):
        factor = kernel.shape[3] ** 0.5 / jnp.linalg.norm(kernel.ravel())
        # optax adds the result to the kernel, which becomes factor * kernel + update.
        return update + kernel * (factor - 1)

    return jax.tree.map(renormalized, updates, params)


def _optimizer(config, steps: int, whiten_steps: int) -> optax.GradientTransformation:
    """Makes Muon for filters, and SGD with Nesterov's momentum for the rest.

    Learning rates fall linearly to 0 in `steps`; the rate of the first layer's bias, in
    `whiten_steps`.
    """

    def sgd(peak, duration):
        # The decay is later multiplied by the learning rate. Divided by the peak of this rate, it
        # is weight_decay times the batch size at the peak, whatever the peak is.
        decay = config.weight_decay * config.batch_size / peak
        return optax.chain(
            optax.add_decayed_weights(decay),
            optax.trace(config.momentum, nesterov=True),
            optax.scale_by_learning_rate(optax.linear_schedule(peak, 0, duration)),
        )

    def group_names(params):
        return jax.tree_util.tree_map_with_path(_group, params)

    filters = optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=3, beta=config.filter_momentum, weight_dimension_numbers=_as_matrices
        ),
        optax.scale_by_learning_rate(optax.linear_schedule(config.filter_rate, 0, steps)),
        optax.stateless(_renormalized),
    )
    groups = {
        "filters": filters,
        "biases": sgd(config.bias_rate, steps),
        "head": sgd(config.head_rate, steps),
        "whiten": sgd(config.bias_rate, whiten_steps),
        "frozen": optax.set_to_zero(),
    }
    return optax.partition(groups, group_names)


# --- One run --------------------------------------------------------------------------------------


def _initial_variables(model: Network, images, moments, key) -> dict:
    """Draws the variables; the first layer gets whitening filters of the first images."""
    variables = model.init(key, jnp.zeros((1, *model.input_shape)))
    filters = whitening_filters(normalize(images[:_WHITENED], *moments))
    whiten = variables["params"]["whiten"] | {"kernel": filters}
    return variables | {"params": variables["params"] | {"whiten": whiten}}


def _training_views(config, images, mirrored, moments, number, key):
    """Crops, mirrors, and normalizes the images of step `number`.

    `mirrored` selects the images whose first view is mirrored.
    """
    step_key = jax.random.fold_in(jax.random.fold_in(key, _AUGMENT), number)
    keys = jax.random.split(step_key, config.batch_size)
    images = normalize(augment(keys, images, crop=config.crop, fill="reflect"), *moments)
    # Alternating flip, as in airbench: `mirrored` decides in the first epoch; each further epoch
    # mirrors the images that the one before did not.
    epoch = number // (config.n_train // config.batch_size)
    flip = mirrored ^ (epoch % 2 == 1)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def _views(images):
    """Returns six views of normalized images, and their weights.

    The views are the unchanged images, the images shifted by a pixel towards two opposite corners,
    and the mirror images of all three.
    """
    size = images.shape[1]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = [images, padded[:, :size, :size], padded[:, 2:, 2:]]
    mirrored = [view[:, :, ::-1] for view in shifted]
    # The unchanged images and their mirror images count twice as much as the others.
    weights = (0.25, 0.125, 0.125, 0.25, 0.125, 0.125)
    return shifted + mirrored, weights


def _test_batch(n_test: int, most: int) -> int:
    """Returns the largest number of images up to `most` that divides the test set.

    So all batches have the same shape.
    """
    return max(size for size in range(1, most + 1) if n_test % size == 0)


def _test(config, model: Network, variables: dict, test, moments) -> tuple:
    """Returns the shares of correct test images with six views, and with one view."""

    def right(batch):
        images, labels = batch
        views, weights = _views(normalize(images, *moments))
        logits = jax.lax.map(functools.partial(model.apply, variables), jnp.stack(views))
        averaged = jnp.tensordot(jnp.asarray(weights), logits, 1)
        six_views = (averaged.argmax(1) == labels).mean()
        one_view = (logits[0].argmax(1) == labels).mean()
        return six_views, one_view

    size = _test_batch(config.n_test, config.batch_size)
    batches = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), test)
    six_views, one_view = jax.lax.map(right, batches)
    return six_views.mean(), one_view.mean()


@functools.partial(jax.jit, static_argnames="config")
def train_and_test(config, train, test, moments, seed):
    """Trains and tests one network: a whole run.

    `train` and `test` are uint8 images and labels. Returns the share of test images that are
    classified correctly with six views, the share with one view, and the loss of every step.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = create_model("speedrun", width=config.width, dtype=dtype)
    images, labels = train
    size = config.batch_size
    per_epoch = config.n_train // size
    optimizer = _optimizer(config, config.epochs * per_epoch, config.whiten_epochs * per_epoch)
    key = jax.random.key(seed)
    variables = _initial_variables(model, images, moments, key)
    mirrored = jax.random.bernoulli(jax.random.fold_in(key, _FLIP), shape=(config.n_train,))

    def step(carry, batch):
        """Takes one step; `batch` is its number and the numbers of its images."""
        params, stats, opt_state = carry
        number, chosen = batch
        views = _training_views(config, images[chosen], mirrored[chosen], moments, number, key)

        def loss(params):
            logits, new_state = model.apply(
                {"params": params, "batch_stats": stats}, views, train=True, mutable=["batch_stats"]
            )
            losses, _ = loss_and_errors(
                "cross_entropy", logits, labels[chosen], config.label_smoothing
            )
            return losses.sum(), new_state["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), value / size

    def order(epoch):
        return epoch_order(config.n_train, epoch, seed)[: per_epoch * size]

    # The images of all steps: the order of each epoch, cut into batches.
    numbers = jnp.arange(config.epochs * per_epoch)
    orders = jax.lax.map(order, jnp.arange(config.epochs)).reshape(-1, size)
    params = variables["params"]
    carry = (params, variables["batch_stats"], optimizer.init(params))
    (params, stats, _), losses = jax.lax.scan(step, carry, (numbers, orders))
    six_views, one_view = _test(
        config, model, {"params": params, "batch_stats": stats}, test, moments
    )
    return six_views, one_view, losses


# --- All runs -------------------------------------------------------------------------------------


def check(config) -> None:
    """Raises `ValueError`, naming the key, its value, and what is accepted."""
    for key in (
        "epochs",
        "batch_size",
        "width",
        "whiten_epochs",
        "n_test",
        "filter_rate",
        "bias_rate",
        "head_rate",
    ):
        if not 0 < config[key] < math.inf:
            raise ValueError(f"{key}={config[key]} is not a positive number")
    for key in ("label_smoothing", "momentum", "filter_momentum"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"{key}={config[key]} is not between 0 and 1, 1 excluded")
    for key in ("weight_decay", "crop"):
        configuration.check_least(key, config[key], 0)
    if not config.batch_size <= config.n_train <= 50_000 or config.n_test > 10_000:
        raise ValueError(
            f"n_train={config.n_train} and n_test={config.n_test} do not fit: CIFAR-10 has 50,000 "
            f"training images, of which a batch takes batch_size={config.batch_size}, and 10,000 "
            "test images"
        )


class Program:
    """The compiled run, and its data on the device; it is compiled for the first run."""

    def __init__(self, config, data: arrays.Dataset):
        self._config = ml_collections.FrozenConfigDict(config)
        train = tuple(part[: config.n_train] for part in data.train)
        test = tuple(part[: config.n_test] for part in data.test)
        moments = arrays.normalization(data.train.images)
        self._arguments = jax.device_put((train, test, moments))

    @functools.cached_property
    def _compiled(self) -> tuple[Callable, float]:
        """Returns the compiled program, and its compilation time in seconds."""
        began = time.perf_counter()
        compiled = train_and_test.lower(self._config, *self._arguments, 0).compile()
        return compiled, time.perf_counter() - began

    def run(self, seed: int) -> dict:
        """Makes one run; returns accuracies in percent, seconds, and the epochs' losses."""
        compiled, compile_seconds = self._compiled
        began = time.perf_counter()
        outputs = jax.block_until_ready(compiled(*self._arguments, seed))
        seconds = time.perf_counter() - began
        six_views, one_view, losses = outputs
        epochs = np.asarray(losses, np.float64).reshape(self._config.epochs, -1).mean(1)
        return {
            "seed": seed,
            "accuracy": 100 * float(six_views),
            "one_view": 100 * float(one_view),
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "losses": epochs.tolist(),
        }


def run_all(config, data: arrays.Dataset, runs: int, folder: pathlib.Path) -> list[dict]:
    """Makes the runs that a work directory lacks, and returns all runs."""
    program = Program(config, data)
    rows = []
    try:
        with progress(runs, "runs") as advance:
            for path in run_files(folder, runs):
                rows.append(files.read_or_compute(path, program.run, int(path.stem)))
                advance(1)
    except KeyboardInterrupt as stop:
        raise workdir.Interrupted(
            "stopped; run the same command again to continue after the last finished run"
        ) from stop
    return rows


def run_files(folder: pathlib.Path, runs: int) -> list[pathlib.Path]:
    """Lists the files of the runs, which are named by their seeds."""
    return [folder / "runs" / f"{seed}.json" for seed in range(runs)]


# --- Report ---------------------------------------------------------------------------------------


def summarize(rows: list[dict]) -> dict[str, Any]:
    """Returns the statistics of all runs.

    These are the mean accuracy, the sample standard deviation, half of the mean's 95 % interval,
    the one-sided t-test of a mean above the target, and times in seconds. There is no test for a
    single run, or if all runs are equal.
    """
    accuracies = np.array([row["accuracy"] for row in rows])
    seconds = [row["seconds"] for row in rows]
    statistics = {
        "n": len(rows),
        "mean": float(accuracies.mean()),
        "one_view": float(np.mean([row["one_view"] for row in rows])),
        "std": None,
        "half_width": None,
        "t": None,
        "p": None,
        "seconds": float(np.median(seconds)),
        "seconds_range": [min(seconds), max(seconds)],
        "compile_seconds": rows[0]["compile_seconds"],
    }
    std = float(accuracies.std(ddof=1)) if len(rows) > 1 else 0.0
    if std > 0:
        test = scipy.stats.ttest_1samp(accuracies, TARGET, alternative="greater")
        statistics["std"] = std
        statistics["half_width"] = tables.half_width(accuracies)
        statistics["t"] = float(test.statistic)
        statistics["p"] = float(test.pvalue)
    return statistics


def tabulate(statistics: dict[str, Any], device: str) -> str:
    """Tabulates these runs beside the records."""
    own = Record(
        accuracy=statistics["mean"],
        std=statistics["std"],
        runs=statistics["n"],
        seconds=statistics["seconds"],
    )
    lines = [["cnnjax", device, *format_record(own)]]
    for name, record in RECORDS.items():
        lines.append([name, "A100", *format_record(record)])
    return tables.table(["", "device", "accuracy, %", "n", "seconds a run"], lines)


def format_record(record: Record) -> list[str]:
    accuracy = f"{record.accuracy:.2f}"
    if record.std is not None:
        accuracy += f" ± {record.std:.2f}"
    return [accuracy, f"{record.runs:,}", f"{record.seconds:.2f}"]


def describe_test(statistics: dict[str, Any]) -> str:
    if statistics["t"] is None:
        return "One run, or runs alike, have no t-test."
    return (
        f"The mean is {statistics['mean']:.3f} ± {statistics['half_width']:.3f} (95 % interval); "
        f"that it is above {TARGET:g}: t = {statistics['t']:.2f}, one-sided "
        f"p = {statistics['p']:.3g}."
    )


def draw(config, rows: list[dict]) -> Figure:
    """Draws the losses of all runs, and the histogram of their accuracies."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = np.array([row["losses"] for row in rows])
    epochs = np.arange(1, config.epochs + 1)
    left.plot(epochs, losses.T, ".-", color="C0", alpha=max(0.05, 1 / len(rows)))
    left.set(xlabel="epoch", ylabel="training loss (smoothed labels)")
    left.xaxis.get_major_locator().set_params(integer=True)
    accuracies = [row["accuracy"] for row in rows]
    mean = np.mean(accuracies)
    right.hist(accuracies, bins=min(30, 5 + len(rows) // 5))
    right.axvline(TARGET, color="black", lw=1, ls="--", label=f"{TARGET:g} %")
    right.axvline(mean, color="C1", label=f"mean {mean:.2f} %")
    right.set(xlabel="test accuracy, six views, %", ylabel=f"runs of {len(rows)}")
    right.yaxis.get_major_locator().set_params(integer=True)
    right.legend(fontsize=8)
    return figure


def write(folder: pathlib.Path, config, rows: list[dict]) -> str:
    """Writes the report, the results, and the figure, and returns the table."""
    statistics = summarize(rows)
    device = jax.devices()[0].device_kind
    table = tabulate(statistics, device)
    least, most = statistics["seconds_range"]
    text = f"""# CIFAR-10, as fast as possible

{config.epochs} epochs of {config.n_train:,} images in batches of {config.batch_size:,}, width
{config.width}, {config.n_test:,} test images. Accuracy on six views, mean ± sample standard
deviation over seeds; seconds: the median of whole runs, test included, compilation apart.

{table}
{describe_test(statistics)} On one view: {statistics["one_view"]:.2f} %. Fastest and slowest run:
{least:.2f} and {most:.2f} s; compilation: {statistics["compile_seconds"]:.1f} s.

![Losses and accuracies](speedrun.png)
{describe_environments(workdir.read_environments(folder))}"""
    results = statistics | {"device": device, "target": TARGET, "runs": rows}
    files.write_json(folder / "speedrun.json", results)
    files.write_figure(folder / "speedrun.png", draw(config, rows))
    files.write(folder / "report.md", text)
    return table


def main(arguments: list[str] | None = None) -> int:
    config = speedrun_cifar10.get_config()
    parser = command.Parser(prog="python -m experiments.speedrun", description=__doc__)
    parser.add_workdir("runs/speedrun")
    parser.add_data_dir()
    parser.add_count("runs", 200, "training runs, with seeds 0, 1, 2, ...")
    for key, value in config.items():
        parser.add_argument(
            f"--{key}", type=type(value), default=value, help="default: %(default)s"
        )
    options = parser.parse_args(arguments)
    config.update({key: getattr(options, key) for key in config})

    def work():
        check(config)
        data = arrays.load("cifar10", options.data_dir)
        backend.start()
        # Times of different machines or versions of jax are not mixed.
        machine = host.machine()
        # The device is recorded twice: earlier work directories name nothing else of the machine.
        settings = config.to_dict() | {"device": machine["device"], "environment": machine}
        is_missing = not all(path.exists() for path in run_files(options.workdir, options.runs))
        with workdir.prepared(options.workdir, settings, is_missing) as folder:
            rows = run_all(config, data, options.runs, folder)
            print(write(folder, config, rows))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
