"""Does dropout make a network's units redundant? (UTSA EE 6973; UBC CPSC 532S: "forces the network to have a redundant representation")

    python -m experiments.dropout --data_dir data --workdir runs/dropout [--seeds 3] [--epochs 5]

Three-layer perceptrons learn MNIST with and without dropout of 0.5. Then a growing share of a hidden layer's units is removed, at
random and `removals` times, and the test set is read again: as the network is, and with the readout fitted anew to the units that
are left (ridge regression on 10,000 training images), which tells what they hold from what the readout is used to. Nothing is
scaled up for what is removed. A call goes on where an earlier one stopped. Writes report.md, dropout.json and dropout.png.
"""

import argparse
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib
import ml_collections
import numpy as np

from cnnjax import transfer, weights
from cnnjax.data import arrays, augment
from cnnjax.models import Network, create_model
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.train import defaults, evaluate, loop

SETTINGS = {
    "model": "mlp3",
    "dataset": "mnist",
    "schedule.name": "cosine",
    "schedule.learning_rate": 0.05,
}
RATES = (0.0, 0.5)  # of dropout; the lectures' is 0.5
SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # of the units, removed
WAYS = {
    "fc1": "units of the first layer removed",
    "fc2": "units of the second layer removed",
    "refitted": "the same, readout fitted anew",
}
_FITTED, _STRENGTH = (
    10_000,
    1e-3,
)  # training images of a new readout; its ridge, of the units' mean square


def masks(units: int, removals: int, share: float, seed: int) -> np.ndarray:
    """Which units stay, float32 [removals, units]; of one removal, larger shares remove the same units and more."""
    order = np.stack(
        [np.random.default_rng([seed, number]).permutation(units) for number in range(removals)]
    )
    return (order >= round(share * units)).astype(np.float32)


def without(params: dict, layer: str, kept: jnp.ndarray) -> dict:
    """Parameters of a perceptron in which nothing reads the removed units of a hidden layer; `kept` [units] of 0 and 1."""
    reader = f"fc{int(layer[2:]) + 1}"
    return params | {reader: params[reader] | {"kernel": params[reader]["kernel"] * kept[:, None]}}


@functools.partial(jax.jit, static_argnums=(0, 1))
def accuracies(
    model: Network,
    layer: str,
    params: dict,
    kept: jnp.ndarray,
    images: jnp.ndarray,
    labels: jnp.ndarray,
) -> jnp.ndarray:
    """The accuracy on normalized images with each of the masks `kept` [removals, units] -> [removals]."""
    run = lambda mask: (
        evaluate.logits(model, {"params": without(params, layer, mask)}, images).argmax(-1)
        == labels
    ).mean()
    return jax.vmap(run)(kept)


@functools.partial(jax.jit, static_argnums=0)
def second_layer(model: Network, params: dict, images: jnp.ndarray) -> jnp.ndarray:
    """The activations [n, units] that the readout reads: the logits of a network whose readout passes on what it is given."""
    units = len(params["fc3"]["kernel"])
    readout = {"kernel": jnp.eye(units), "bias": jnp.zeros(units)}
    return evaluate.logits(
        model.clone(num_classes=units), {"params": params | {"fc3": readout}}, images
    )


def refitted(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    kept: np.ndarray,
) -> list[float]:
    """The test accuracy of ridge regression on what each of the masks `kept` [removals, units] leaves of activations [n, units]."""
    x, mean, goal = train - train.mean(0), train.mean(0), np.eye(10, dtype=np.float32)[labels]
    gram, products, found = np.float64(x.T @ x), np.float64(x.T @ (goal - goal.mean(0))), []
    for units in map(np.flatnonzero, kept):
        part = gram[np.ix_(units, units)]
        w = np.linalg.solve(
            part + _STRENGTH * np.trace(part) / len(part) * np.eye(len(part)), products[units]
        )
        outputs = (test[:, units] - mean[units]) @ w.astype(np.float32) + goal.mean(0)
        found.append(float((outputs.argmax(1) == test_labels).mean()))
    return found


def measure(
    folder: pathlib.Path, config: ml_collections.ConfigDict, removals: int
) -> dict[str, list[list[float]]]:
    """Accuracies by way, share and removal of the trained network in a work directory."""
    data = arrays.load(config.dataset, config.data_dir)
    model = create_model(
        config.model,
        num_classes=len(data.classes),
        input_shape=data.train.images.shape[1:],
        **config.model_fields,
    )
    params = weights.load_torchvision(folder / transfer.WEIGHTS, model)["params"]
    moments = arrays.normalization(data.train.images)
    train, test = (
        augment.normalize(jnp.asarray(images), *moments)
        for images in (data.train.images[:_FITTED], data.test.images)
    )
    units = {layer: len(params[layer]["bias"]) for layer in ("fc1", "fc2")}
    kept = {
        layer: [masks(units[layer], removals, share, config.seed) for share in SHARES]
        for layer in units
    }
    found = {
        layer: [
            accuracies(model, layer, params, some, test, data.test.labels).tolist()
            for some in kept[layer]
        ]
        for layer in units
    }
    read, readable = (np.asarray(second_layer(model, params, images)) for images in (train, test))
    again = refitted(
        read, data.train.labels[:_FITTED], readable, data.test.labels, np.concatenate(kept["fc2"])
    )
    return found | {"refitted": np.reshape(again, (len(SHARES), removals)).tolist()}


def cell(folder: pathlib.Path, options: argparse.Namespace, dropout: float, seed: int) -> dict:
    """One network, trained and measured unless that is done -> its row."""
    config = defaults.get_config()
    config.update_from_flattened_dict(
        SETTINGS | {"data_dir": options.data_dir, "epochs": options.epochs, "seed": seed}
    )
    config.model_fields.dropout = dropout
    loop.check(config)
    place = folder / f"dropout={dropout:g},seed={seed}"
    final = workdir.completed(loop.run, config, place)["final"]
    return {
        "dropout": dropout,
        "seed": seed,
        "train_error": final["train_error"],
        "test_error": final["test_error"],
        "accuracy": workdir.finished(
            place / "removal.json", measure, place, config, options.removals
        ),
    }


def losses(rows: list[dict], way: str, rate: float) -> np.ndarray:
    """The points of accuracy that removing units costs, the mean of the removals [seeds, shares]."""
    found = 100 * np.array(
        [np.mean(row["accuracy"][way], 1) for row in rows if row["dropout"] == rate]
    )
    return found[:, :1] - found


def saved(rows: list[dict], way: str) -> np.ndarray:
    """How much less that is for networks trained with dropout, seed by seed [seeds, shares]."""
    return losses(rows, way, RATES[0]) - losses(rows, way, RATES[1])


def verdict(rows: list[dict]) -> str:
    """What the 95 % intervals (Student's t) of what is saved say at half of the units, which dropout removed too, and at nine tenths."""
    sentences = []
    for way, text in WAYS.items():
        for number in (SHARES.index(0.5), SHARES.index(0.9)):
            values, costs = (
                saved(rows, way)[:, number],
                [losses(rows, way, rate)[:, number].mean() for rate in RATES],
            )
            line = f"{text}, {SHARES[number]:.0%}: it costs {costs[0]:.2f} points without and {costs[1]:.2f} with dropout"
            if len(values) > 1:
                half = tables.half_width(values)
                word = (
                    "holds"
                    if values.mean() > half
                    else "does not hold"
                    if values.mean() < -half
                    else "is not decided"
                )
                line += f", {tables.spread(values, 2)} less (n={len(values)}): that units are made redundant {word}"
            sentences.append(f"- D10, {line}.\n")
    return "".join(sentences)


def draw(rows: list[dict]):
    """The error by the share of units removed, with the range over seeds and removals."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
    for axis, (way, text) in zip(axes, WAYS.items()):
        for rate in RATES:
            found = 100 - 100 * np.array(
                [row["accuracy"][way] for row in rows if row["dropout"] == rate]
            )  # [seeds, shares, removals]
            found = found.transpose(1, 0, 2).reshape(len(SHARES), -1)
            (line,) = axis.plot(
                100 * np.array(SHARES),
                found.mean(1),
                ".-",
                label=f"trained with dropout {rate:g}" if rate else "without",
            )
            axis.fill_between(
                100 * np.array(SHARES),
                found.min(1),
                found.max(1),
                alpha=0.2,
                color=line.get_color(),
            )
        axis.set(title=text, xlabel="units removed, %", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("test error, %: mean and range")
    axes[0].legend()
    return figure


def write(folder: pathlib.Path, options: argparse.Namespace, rows: list[dict]) -> str:
    """Writes the results, the report and the figure; returns the table and the verdict."""
    figure = draw(rows)
    workdir.write_figure(folder / "dropout.png", figure)
    matplotlib.pyplot.close(figure)

    show = functools.partial(tables.spread, digits=2)
    lines = []
    for way, text in WAYS.items():
        for number, share in enumerate(SHARES):
            found = [
                [
                    100 * np.mean(row["accuracy"][way][number])
                    for row in rows
                    if row["dropout"] == rate
                ]
                for rate in RATES
            ]
            lines.append(
                [
                    text,
                    f"{share:.0%}",
                    *map(show, found),
                    show(saved(rows, way)[:, number]),
                    str(len(found[0])),
                ]
            )
    table = tables.table(
        [
            "way",
            "removed",
            "without dropout, %",
            f"dropout {RATES[1]:g}, %",
            "saved by dropout, points",
            "n",
        ],
        lines,
    )
    errors = {
        rate: show([100 * row["train_error"] for row in rows if row["dropout"] == rate])
        for rate in RATES
    }
    workdir.write_json(folder / "dropout.json", {"shares": SHARES, "rows": rows})
    text = (
        f"# Dropout's redundancy\n\n{SETTINGS['model']} on {SETTINGS['dataset']}, {options.epochs} epochs; mean ± sample standard "
        f"deviation over seeds of the test accuracy, itself the mean over {options.removals} random removals. What is saved is how "
        "much less the removal costs with dropout, each network against itself with all units. Where the readout is fitted anew, the "
        "units are judged and not what the readout is used to. "
        f"Training error: {errors[0.0]} % without and {errors[RATES[1]]} % with dropout.\n\n"
    )
    workdir.write(
        folder / "report.md",
        f"{text}{table}\n{verdict(rows)}\n![Error as units are removed](dropout.png)\n",
    )
    return f"{table}\n{verdict(rows)}"


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_data_dir("MNIST's files")
    parser.add_workdir("runs/dropout")
    parser.add_count("seeds", 3, "networks with, and as many without dropout")
    parser.add_count("epochs", 5, "of training")
    parser.add_count("removals", 5, "random choices of the removed units")
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        folder = workdir.prepare(
            options.workdir,
            {
                "kind": "dropout",
                "settings": SETTINGS,
                "rates": RATES,
                "shares": SHARES,
                "epochs": options.epochs,
                "removals": options.removals,
            },
        )
        rows = [
            cell(folder, options, rate, seed) for seed in range(options.seeds) for rate in RATES
        ]
        print(write(folder, options, rows))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
