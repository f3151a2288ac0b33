"""CIFAR-10 to 94 % as fast as can be: many whole training runs, each one call to the device, beside the public records.

    python -m experiments.speedrun --workdir runs/speedrun --data_dir FOLDER [--runs 200] [--epochs 8 ...]

A run is one compiled program: whitening filters from the training images, all epochs with their augmentation, and the test on six
views of each image. The recipe, whose every number is an option, is that of configs/speedrun_cifar10.py; the computation is in bfloat16,
on a CPU in float32. Writes report.md, speedrun.json, speedrun.png and one file a run in runs/; called again, it makes the runs that
are missing. The time of a run is that of its call, with the data on the device and compilation apart.
"""

import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib
import ml_collections
import numpy as np
import optax
import scipy.stats

from cnnjax.data import arrays
from cnnjax.data.augment import augment, normalize
from cnnjax.models import create_model
from cnnjax.models.speedrun import whitening_filters
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.runtime.progress import progress
from cnnjax.train.step import epoch_order, loss_and_errors
from configs import speedrun_cifar10

TARGET = 94.0  # percent of the test images
# Public records on one A100: accuracy in percent, its standard deviation where it is stated, runs, seconds a run.
RECORDS = {
    "hiverge/cifar10-speedrun": (94.01, 0.13, 2000, 2.015),
    "KellerJordan/cifar10-airbench, airbench94_muon": (94.01, None, 200, 2.59),
}
_WHITENED = 5000  # images whose patches are whitened, as in the record
_AUGMENT, _FLIP = range(2)  # what a random number is for


def _group(path, _) -> str:
    """How a parameter is trained."""
    module, name = path[-2].key, path[-1].key
    if module == "whiten":
        return "whiten" if name == "bias" else "frozen"
    return {"kernel": "head" if module == "fc" else "filters", "bias": "biases", "scale": "frozen"}[
        name
    ]


def _as_matrices(filters):
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3), filters)


def _renormalized(updates, params):
    """Gives every filter bank the norm of one with unit filters before the update is added."""
    return jax.tree.map(
        lambda update, p: update + p * (p.shape[3] ** 0.5 / jnp.linalg.norm(p.ravel()) - 1),
        updates,
        params,
    )


def _optimizer(config, steps: int, whiten_steps: int) -> optax.GradientTransformation:
    """Muon for filters, Nesterov's SGD for the rest; rates fall linearly to 0, that of the first layer's bias earlier."""

    def sgd(rate, steps):
        return optax.chain(
            optax.add_decayed_weights(config.weight_decay * config.batch_size / rate),
            optax.trace(config.momentum, nesterov=True),
            optax.scale_by_learning_rate(optax.linear_schedule(rate, 0, steps)),
        )

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
    return optax.partition(groups, functools.partial(jax.tree_util.tree_map_with_path, _group))


def _views(images):
    """Six views of normalized images, and their weights: as they are, shifted by a pixel to either corner, and all mirrored."""
    size = images.shape[1]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = [images, padded[:, :size, :size], padded[:, 2:, 2:]]
    return shifted + [view[:, :, ::-1] for view in shifted], (0.25, 0.125, 0.125) * 2


@functools.partial(jax.jit, static_argnames="config")
def train_and_test(config, train, test, moments, seed):
    """A whole run on uint8 images and labels -> the share of test images right on six views, on one, and the loss of every step."""
    model = create_model(
        "speedrun",
        width=config.width,
        dtype=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16,
    )
    size, per_epoch = config.batch_size, config.n_train // config.batch_size
    optimizer = _optimizer(config, config.epochs * per_epoch, config.whiten_epochs * per_epoch)
    key = jax.random.key(seed)
    variables = model.init(key, jnp.zeros((1, *model.input_shape)))
    params = variables["params"]
    params |= {
        "whiten": params["whiten"]
        | {"kernel": whitening_filters(normalize(train[0][:_WHITENED], *moments))}
    }
    mirrored = jax.random.bernoulli(jax.random.fold_in(key, _FLIP), shape=(config.n_train,))

    def step(carry, batch):
        (params, stats, state), (number, chosen) = carry, batch
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, _AUGMENT), number), size)
        images = normalize(
            augment(keys, train[0][chosen], crop=config.crop, fill="reflect"), *moments
        )
        # An image's first view is mirrored by chance, and from then on every second one is.
        flip = mirrored[chosen] ^ (number // per_epoch % 2 == 1)
        images = jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)

        def loss(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return loss_and_errors(
                "cross_entropy", logits, train[1][chosen], config.label_smoothing
            )[0].sum(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), stats, state), value / size

    orders = jax.lax.map(
        lambda epoch: epoch_order(config.n_train, epoch, seed)[: per_epoch * size],
        jnp.arange(config.epochs),
    )
    batches = jnp.arange(config.epochs * per_epoch), orders.reshape(-1, size)
    (params, stats, _), losses = jax.lax.scan(
        step, (params, variables["batch_stats"], optimizer.init(params)), batches
    )

    def right(batch):
        images, labels = batch
        views, weights = _views(normalize(images, *moments))
        logits = jax.lax.map(
            functools.partial(model.apply, {"params": params, "batch_stats": stats}),
            jnp.stack(views),
        )
        return [
            (found.argmax(1) == labels).mean()
            for found in (jnp.tensordot(jnp.asarray(weights), logits, 1), logits[0])
        ]

    parts = np.gcd(config.n_test, size)  # images at a time, all batches alike
    shares = jax.lax.map(right, jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]), test))
    return *(share.mean() for share in shares), losses


def check(config, runs: int) -> None:
    """Raises `ValueError`, naming the key, its value and what is accepted."""
    if runs < 1:
        raise ValueError(f"runs={runs} is not a positive number")
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
        if config[key] <= 0:
            raise ValueError(f"{key}={config[key]} is not a positive number")
    for key in ("label_smoothing", "momentum", "filter_momentum"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"{key}={config[key]} is not between 0 and 1, 1 excluded")
    for key in ("weight_decay", "crop"):
        if config[key] < 0:
            raise ValueError(f"{key}={config[key]} is not a number of at least 0")
    if not config.batch_size <= config.n_train <= 50_000 or config.n_test > 10_000:
        raise ValueError(
            f"n_train={config.n_train} and n_test={config.n_test} do not fit: CIFAR-10 has 50,000 training images, of which a "
            f"batch takes batch_size={config.batch_size}, and 10,000 test images"
        )


def run_all(config, data, runs: int, folder: pathlib.Path) -> list[dict]:
    """Makes the runs that are missing in a work directory -> all of them."""
    moments = arrays.normalization(data.train.images)
    arguments = jax.device_put(
        (
            tuple(x[: config.n_train] for x in data.train),
            tuple(x[: config.n_test] for x in data.test),
            moments,
        )
    )
    (folder / "runs").mkdir(exist_ok=True)
    paths, compiled = [folder / "runs" / f"{seed}.json" for seed in range(runs)], None
    with progress(runs, "runs") as done:
        for seed, path in enumerate(paths):
            if not path.exists():
                if compiled is None:
                    began = time.perf_counter()
                    compiled = train_and_test.lower(
                        ml_collections.FrozenConfigDict(config), *arguments, seed
                    ).compile()
                    compile_seconds = time.perf_counter() - began
                began = time.perf_counter()
                six, one, losses = jax.block_until_ready(compiled(*arguments, seed))
                seconds = time.perf_counter() - began
                epochs = np.asarray(losses, np.float64).reshape(config.epochs, -1).mean(1)
                workdir.write_json(
                    path,
                    {
                        "seed": seed,
                        "accuracy": 100 * float(six),
                        "one_view": 100 * float(one),
                        "seconds": seconds,
                        "compile_seconds": compile_seconds,
                        "losses": epochs.tolist(),
                    },
                )
            done(1)
    return [json.loads(path.read_text()) for path in paths]


def summarize(rows: list[dict]) -> dict:
    """Mean, sample standard deviation, 95 % interval of the mean, and the t-test of a mean above the target (one-sided)."""
    values, n = np.array([row["accuracy"] for row in rows]), len(rows)
    found = {
        "n": n,
        "mean": float(values.mean()),
        "one_view": float(np.mean([row["one_view"] for row in rows])),
        "std": None,
        "half_width": None,
        "t": None,
        "p": None,
        "seconds": float(np.median([row["seconds"] for row in rows])),
        "seconds_range": [min(row["seconds"] for row in rows), max(row["seconds"] for row in rows)],
        "compile_seconds": rows[0]["compile_seconds"],
    }
    if n > 1 and (std := float(values.std(ddof=1))) > 0:
        test = scipy.stats.ttest_1samp(values, TARGET, alternative="greater")
        found |= {
            "std": std,
            "half_width": tables.half_width(values),
            "t": float(test.statistic),
            "p": float(test.pvalue),
        }
    return found


def write(folder: pathlib.Path, config, rows: list[dict]) -> str:
    """Writes the report, the results and the figure; returns the table."""
    found, device = summarize(rows), jax.devices()[0].device_kind
    workdir.write_json(
        folder / "speedrun.json", found | {"device": device, "target": TARGET, "runs": rows}
    )
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    losses = np.array([row["losses"] for row in rows])
    left.plot(
        np.arange(1, config.epochs + 1), losses.T, ".-", color="C0", alpha=max(0.05, 1 / len(rows))
    )
    left.set(xlabel="epoch", ylabel="training loss (smoothed labels)")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.hist([row["accuracy"] for row in rows], bins=min(30, 5 + len(rows) // 5))
    right.axvline(TARGET, color="black", lw=1, ls="--", label=f"{TARGET:g} %")
    right.axvline(found["mean"], color="C1", label=f"mean {found['mean']:.2f} %")
    right.set(xlabel="test accuracy, six views, %", ylabel=f"runs of {len(rows)}")
    right.yaxis.get_major_locator().set_params(integer=True)
    right.legend(fontsize=8)
    workdir.write_figure(folder / "speedrun.png", figure)
    pyplot.close(figure)
    spread = lambda std: "" if std is None else f" ± {std:.2f}"
    lines = [
        [
            "cnnjax",
            device,
            f"{found['mean']:.2f}{spread(found['std'])}",
            str(found["n"]),
            f"{found['seconds']:.2f}",
        ]
    ]
    lines += [
        [name, "A100", f"{mean:.2f}{spread(std)}", f"{n:,}", f"{seconds:.2f}"]
        for name, (mean, std, n, seconds) in RECORDS.items()
    ]
    table = tables.table(["", "device", "accuracy, %", "n", "seconds a run"], lines)
    least, most = found["seconds_range"]
    test = (
        "One run, or runs alike, have no t-test."
        if found["t"] is None
        else (
            f"The mean is {found['mean']:.3f} ± {found['half_width']:.3f} (95 % interval); that it is above {TARGET:g}: t = {found['t']:.2f}, "
            f"one-sided p = {found['p']:.3g}."
        )
    )
    text = (
        f"# CIFAR-10, as fast as can be\n\n{config.epochs} epochs of {config.n_train:,} images in batches of {config.batch_size:,}, "
        f"width {config.width}, {config.n_test:,} test images. Accuracy on six views, mean ± sample standard deviation over seeds; "
        "seconds: the median of whole runs, test included, compilation apart.\n\n"
    )
    more = (
        f"\n{test} On one view: {found['one_view']:.2f} %. Fastest and slowest run: {least:.2f} and {most:.2f} s; compilation: "
        f"{found['compile_seconds']:.1f} s.\n\n![Losses and accuracies](speedrun.png)\n"
    )
    workdir.write(folder / "report.md", text + table + more)
    return table


def main(arguments: list[str] | None = None) -> int:
    config = speedrun_cifar10.get_config()
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/speedrun")
    parser.add_data_dir()
    parser.add_count("runs", 200, "runs, of the seeds from 0")
    for key, value in config.items():
        parser.add_argument(
            f"--{key}", type=type(value), default=value, help="default: %(default)s"
        )
    options = parser.parse_args(arguments)

    def work():
        config.update({key: getattr(options, key) for key in config})
        check(config, options.runs)
        data = arrays.load("cifar10", options.data_dir)
        backend.start()
        workdir.prepare(
            options.workdir, config.to_dict() | {"device": jax.devices()[0].device_kind}
        )
        print(write(options.workdir, config, run_all(config, data, options.runs, options.workdir)))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
