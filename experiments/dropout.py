"""Does dropout make a network's units redundant?

    python -m experiments.dropout --data_dir data --workdir runs/dropout [--seeds 3] [--epochs 5]

The UTSA lecture (EE 6973) says that dropout forces a network to have a redundant representation. To
test this, three-layer perceptrons learn MNIST with and without dropout of 0.5. Then a growing share
of the units of a hidden layer is removed at random, `removals` times, and each network is tested in
two ways: as it is, and with its readout (the last layer) refitted to the remaining units by ridge
regression on 10,000 training images. The second test shows what the units contain, whatever the
original readout expects of them. Nothing is rescaled for the removed units.

The same command continues an interrupted call. Writes report.md, dropout.json and dropout.png.
"""

import functools
import itertools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from cnnjax import ridge, study, transfer, weights
from cnnjax.data import arrays, augment
from cnnjax.models import Network, create_model
from cnnjax.runtime import tables, workdir
from cnnjax.train import defaults, evaluate, loop

SETTINGS = {
    "model": "mlp3",
    "dataset": "mnist",
    "schedule.name": "cosine",
    "schedule.learning_rate": 0.05,
}
RATES = (0.0, 0.5)  # dropout rates; the lectures use 0.5
SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # shares of units removed
WAYS = {
    "fc1": "units of the first layer removed",
    "fc2": "units of the second layer removed",
    "refitted": "units of the second layer removed, readout refitted",
}
_FITTED = 10_000  # training images that a readout is refitted to
_STRENGTH = 1e-3  # ridge strength of that fit, relative to the mean square of the units


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    dropout: float
    seed: int


def add_options(parser):
    parser.add_data_dir("MNIST's files")
    parser.add_workdir("runs/dropout")
    parser.add_count("seeds", 3, "networks with, and as many without dropout")
    parser.add_count("epochs", 5, "training epochs")
    parser.add_count("removals", 5, "random choices of the removed units")


def points(options):
    for seed, rate in itertools.product(range(options.seeds), RATES):
        yield Point(rate, seed)


def configure(point: Point, options) -> ml_collections.ConfigDict:
    """Returns the configuration of one network."""
    config = defaults.get_config()
    config.update_from_flattened_dict(SETTINGS)
    config.update(data_dir=options.data_dir, epochs=options.epochs, seed=point.seed)
    config.model_fields.dropout = point.dropout
    loop.check(config)
    return config


# --- One network ----------------------------------------------------------------------------------


def masks(units: int, removals: int, share: float, seed: int) -> np.ndarray:
    """Draws masks of the units that stay: 0 and 1, float32 [removals, units].

    A removal with a larger share removes the same units and further ones.
    """
    generators = [np.random.default_rng([seed, number]) for number in range(removals)]
    # ranks[r, u] is the place of unit u in removal r: the first `share` of the places is removed.
    ranks = np.stack([generator.permutation(units) for generator in generators])
    return (ranks >= round(share * units)).astype(np.float32)


def without(params: dict, layer: str, kept: jnp.ndarray) -> dict:
    """Returns a perceptron's parameters in which nothing reads the removed units of a layer.

    `kept` [units] is 0 for a removed unit and 1 for others.
    """
    # The layer after "fc1" is "fc2", and so on.
    reader = f"fc{int(layer[2:]) + 1}"
    kernel = params[reader]["kernel"] * kept[:, None]
    return params | {reader: params[reader] | {"kernel": kernel}}


@functools.partial(jax.jit, static_argnums=(0, 1))
def accuracies(
    model: Network,
    layer: str,
    params: dict,
    kept: jnp.ndarray,
    images: jnp.ndarray,
    labels: jnp.ndarray,
) -> jnp.ndarray:
    """Returns the accuracy on normalized images under each mask `kept` [removals, units]."""

    def accuracy(mask):
        variables = {"params": without(params, layer, mask)}
        return (evaluate.logits(model, variables, images).argmax(-1) == labels).mean()

    return jax.vmap(accuracy)(kept)


@functools.partial(jax.jit, static_argnums=0)
def second_layer(model: Network, params: dict, images: jnp.ndarray) -> jnp.ndarray:
    """Returns the activations that the readout reads, [n, units].

    They are the logits of a network whose readout is the identity.
    """
    units = len(params["fc3"]["kernel"])
    identity = {"kernel": jnp.eye(units), "bias": jnp.zeros(units)}
    variables = {"params": params | {"fc3": identity}}
    return evaluate.logits(model.clone(num_classes=units), variables, images)


def refitted(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    kept: np.ndarray,
) -> list[float]:
    """Returns the test accuracy of ridge regression on the units of each mask.

    The activations `train` and `test` are [n, units], the masks `kept` [removals, units].
    """
    mean = train.mean(0)
    x = train - mean
    targets = np.eye(10, dtype=np.float32)[labels]
    base = targets.mean(0)
    # The Gram matrix of the remaining units is a block of that of all units, computed once.
    gram = np.float64(x.T @ x)
    products = np.float64(x.T @ (targets - base))
    results = []
    for units in map(np.flatnonzero, kept):
        part = gram[np.ix_(units, units)]
        strength = _STRENGTH * np.trace(part) / len(part)
        kernel = ridge.solve(ridge.factor(part), products[units], strength)
        outputs = (test[:, units] - mean[units]) @ kernel.astype(np.float32) + base
        results.append(float((outputs.argmax(1) == test_labels).mean()))
    return results


def measure(point: Point, options) -> dict:
    """Trains one network; returns its errors and its accuracies [shares, removals]."""
    config = configure(point, options)
    folder = options.workdir / study.label(point)
    final = workdir.run_once(loop.run, config, folder, study.update_record)["final"]

    data = arrays.load(config.dataset, config.data_dir)
    model = create_model(
        config.model,
        num_classes=len(data.classes),
        input_shape=data.train.images.shape[1:],
        **config.model_fields,
    )
    params = weights.load_torchvision(folder / transfer.WEIGHTS, model)["params"]
    moments = arrays.normalization(data.train.images)
    train = augment.normalize(jnp.asarray(data.train.images[:_FITTED]), *moments)
    test = augment.normalize(jnp.asarray(data.test.images), *moments)

    result = {"train_error": final["train_error"], "test_error": final["test_error"]}
    layer_masks = {}
    for layer in ("fc1", "fc2"):
        units = len(params[layer]["bias"])
        layer_masks[layer] = [masks(units, options.removals, share, point.seed) for share in SHARES]
        measured = []
        for kept in layer_masks[layer]:
            measured.append(accuracies(model, layer, params, kept, test, data.test.labels))
        result[layer] = np.stack(measured).tolist()
    refitted_accuracies = refitted(
        np.asarray(second_layer(model, params, train)),
        data.train.labels[:_FITTED],
        np.asarray(second_layer(model, params, test)),
        data.test.labels,
        np.concatenate(layer_masks["fc2"]),
    )
    shape = (len(SHARES), options.removals)
    return result | {"refitted": np.reshape(refitted_accuracies, shape).tolist()}


# --- Report ---------------------------------------------------------------------------------------


def means(results: list[dict], way: str, rate: float) -> np.ndarray:
    """Returns accuracies in percent, the mean of the removals, [seeds, shares]."""
    return 100 * study.values(results, way, dropout=rate).mean(-1)


def losses(results: list[dict], way: str, rate: float) -> np.ndarray:
    """Returns how many points of accuracy removing units costs, [seeds, shares]."""
    accuracy = means(results, way, rate)
    return accuracy[:, :1] - accuracy


def saved(results: list[dict], way: str) -> np.ndarray:
    """Returns the points that dropout saves: the loss without it minus the loss with it.

    The array is [seeds, shares].
    """
    return losses(results, way, RATES[0]) - losses(results, way, RATES[1])


def tabulate(results: list[dict]) -> str:
    lines = []
    for (way, text), (number, share) in itertools.product(WAYS.items(), enumerate(SHARES)):
        accuracy = [means(results, way, rate)[:, number] for rate in RATES]
        columns = [*accuracy, saved(results, way)[:, number]]
        spreads = [tables.spread(column, 2) for column in columns]
        count = len(columns[0])
        bounds = ""
        if count > 1:
            half = tables.half_width(columns[2])
            bounds = f"{columns[2].mean() - half:.2f} to {columns[2].mean() + half:.2f}"
        lines.append([text, f"{share:.0%}", *spreads, bounds, str(count)])
    header = ["way", "removed", "without dropout, %", f"dropout {RATES[1]:g}, %"]
    return tables.table([*header, "saved by dropout, points", "95 % interval", "n"], lines)


def verdict(results: list[dict]) -> str:
    """Judges the claim at half of the units, which dropout removed too, and at nine tenths.

    "D10" is its identifier in the ledger of claims (`experiments.claims`).
    """
    sentences = []
    for (way, text), share in itertools.product(WAYS.items(), (0.5, 0.9)):
        number = SHARES.index(share)
        gains = saved(results, way)[:, number]
        cost_without = losses(results, way, RATES[0])[:, number].mean()
        cost_with = losses(results, way, RATES[1])[:, number].mean()
        sentence = f"- D10, {text}, {share:.0%}: it costs {cost_without:.2f} points without and "
        sentence += f"{cost_with:.2f} with dropout"
        if len(gains) > 1:
            if gains.mean() >= 0:
                comparison = "less"
                difference = tables.spread(gains, 2)
            else:
                comparison = "more"
                difference = tables.spread(-gains, 2)
            sentence += f", {difference} {comparison} (n={len(gains)}): that units are made "
            sentence += f"redundant {tables.judge(gains)}"
        sentences.append(f"{sentence}.\n")
    return "".join(sentences)


def draw(results: list[dict]) -> Figure:
    """Draws the error by the share of units removed, with the range over seeds and removals."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    removed = 100 * np.array(SHARES)
    for axis, (way, text) in zip(axes, WAYS.items()):
        for rate in RATES:
            errors = 100 - 100 * study.values(results, way, dropout=rate)
            # [seeds, shares, removals] -> [shares, seeds x removals]
            errors = errors.transpose(1, 0, 2).reshape(len(SHARES), -1)
            label = f"trained with dropout {rate:g}" if rate else "without"
            (line,) = axis.plot(removed, errors.mean(1), ".-", label=label)
            color = line.get_color()
            axis.fill_between(removed, errors.min(1), errors.max(1), alpha=0.2, color=color)
        axis.set(xlabel="units removed, %", yscale="log")
        axis.set_title(text, fontsize=9)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("test error, %: mean and range")
    axes[0].legend()
    return figure


def report(results: list[dict], options) -> study.Report:
    errors = [100 * study.values(results, "train_error", dropout=rate) for rate in RATES]
    spreads = [tables.spread(error, 2) for error in errors]
    text = f"""# Dropout's redundancy

{SETTINGS["model"]} on {SETTINGS["dataset"]}, {options.epochs} epochs; mean ± sample standard
deviation over seeds of the test accuracy, itself the mean over {options.removals} random removals.
The loss is the accuracy of the whole network minus that without the removed units. What
dropout saves is the loss without it minus the loss with it, for networks of one seed; its 95 %
interval is paired by seed (Student's t). A refitted readout shows what the
remaining units contain, whatever the original readout expects. Training error: {spreads[0]} %
without and {spreads[1]} % with dropout.

{tabulate(results)}
{verdict(results)}
![Error as units are removed](dropout.png)
"""
    return study.Report(text, {"dropout.png": draw(results)})


STUDY = study.Study(
    description=__doc__,
    results="dropout.json",
    add_options=add_options,
    axes=("seeds",),
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
