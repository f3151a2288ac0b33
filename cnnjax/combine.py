"""Combines trained networks: ensembles average what networks answer; soups and Polyak averages
average their parameters.

    python -m cnnjax.combine --runs 'runs/a/*' --method greedy --workdir FOLDER

`--runs` matches work directories of finished training runs: several, or for snapshot and polyak one
that kept several checkpoints. Writes results.json and report.md; the test set is scored once, at
the end.
"""

import functools
import glob
import logging
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import scipy.special

from cnnjax import transfer, weights
from cnnjax.data import arrays, augment
from cnnjax.models import Network
from cnnjax.nn import BatchNorm
from cnnjax.nn.sums import channel_sum, squared_deviation
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.train import defaults, evaluate, step
from cnnjax.train.checkpoints import Checkpoints
from cnnjax.train.parallel import Parallel
from cnnjax.train.run import build_model, build_numbers, build_recipe, open_run

_LOG = logging.getLogger("cnnjax")
METHODS = {
    "best": "the run of the highest validation accuracy, the baseline",
    "ensemble": "the mean of all runs' probabilities",
    "ensemble-logits": "the mean of all runs' logits",
    "uniform": "the average of all runs' parameters",
    "greedy": "the average of those that, from the best run down, do not make it worse",
    "learned": "the average with coefficients learned on the validation images, one a run",
    "learned-by-layer": "the same, one a run and layer",
    "snapshot": "the mean of the probabilities of one run's checkpoints, with "
    "schedule.name=restarts those at the cycles' ends",
    "polyak": "the average of one run's checkpoints, or the one that it kept itself (ema_decay)",
}
_SELECTING = ("best", "greedy", "learned", "learned-by-layer")
_ENSEMBLES = ("ensemble", "ensemble-logits", "snapshot")
_OF_ONE_RUN = ("snapshot", "polyak")
_SAME = (
    "model",
    "dtype",
    "dataset",
    "pixels",
    "test_views",
)  # what runs agree in, besides the fields of the model
_LEARNED_STEPS = 200


# ------------------------------------------------------------------ on parameter trees


def _layer(path) -> str:
    """The name of the module that a parameter belongs to."""
    return ".".join(key.key for key in path[:-1])


def average(trees: Sequence, weights: Sequence[float] | dict[str, Sequence[float]]):
    """The sum of trees of arrays times `weights` [trees], or those of each layer by its name;
    computed in float64."""

    def one(path, *leaves):
        share = weights[_layer(path)] if isinstance(weights, dict) else weights
        return np.tensordot(np.asarray(share, np.float64), np.stack(leaves), 1).astype(
            leaves[0].dtype
        )

    return jax.tree_util.tree_map_with_path(one, *trees)


def greedy(accuracies: Sequence[float], accuracy: Callable[[list[int]], float]) -> list[int]:
    """Chooses a soup's ingredients -> their numbers, in the order in which they were added.

    `accuracies` [models] are their own on validation images, `accuracy(numbers)` is that of the
    average of some. From the best model down, one is kept if the average does not get worse:
    Wortsman et al. 2022 (arXiv 2203.05482), recipe 1.
    """
    kept: list[int] = []
    reached = -np.inf
    for number in sorted(
        range(len(accuracies)), key=lambda number: -accuracies[number]
    ):  # of equals the first comes first
        found = accuracy([*kept, number])
        if found >= reached:
            kept, reached = [*kept, number], found
    return kept


def learned(
    loss: Callable, trees: Sequence, batches: Iterable, by_layer: bool = False, rate: float = 0.05
) -> dict[str, list[float]]:
    """Learns the weights of an average by Adam on `loss(tree, batch)`, a step for each batch ->
    weights [trees] of each layer by name.

    They are a softmax: positive, with sum 1, and without `by_layer` the same in all layers.
    Wortsman et al. 2022, appendix I, and the rate of their code; the temperature that they learn
    beside them changes no prediction and is left out.
    """
    layers = sorted({_layer(path) for path, _ in jax.tree_util.tree_leaves_with_path(trees[0])})
    row = {layer: number if by_layer else 0 for number, layer in enumerate(layers)}
    optimizer = optax.adam(rate)

    def mixed(scores, stacked):
        weights = jax.nn.softmax(scores)
        one = lambda path, leaves: jnp.tensordot(
            weights[row[_layer(path)]], leaves, 1, precision="highest"
        )
        return jax.tree_util.tree_map_with_path(one, stacked)

    @jax.jit
    def update(scores, state, stacked, batch):
        gradient = jax.grad(lambda scores: loss(mixed(scores, stacked), batch))(scores)
        changes, state = optimizer.update(gradient, state)
        return scores + changes, state

    stacked = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *trees))
    scores = jnp.zeros((len(set(row.values())), len(trees)))
    state = optimizer.init(scores)
    for batch in batches:
        scores, state = update(scores, state, stacked, batch)
    weights = scipy.special.softmax(np.asarray(scores, np.float64), axis=1)
    return {layer: weights[row[layer]].tolist() for layer in layers}


# ------------------------------------------------------------------ on networks


@functools.cache
def member_logits(output: Callable = evaluate.logits) -> Callable:
    """All members' `output` in one program, for `evaluate.predict`.

    A function of (model, variables stacked [members, ...], images [members, batch, height, width,
    channels], normalized as each member has it) -> [batch, members, classes].
    """

    def run(model, variables, images):
        # One member after the other: on 2 CPU cores three to five of them take 3.0 to 5.6 single
        # passes, in the memory of one. vmap, which makes grouped convolutions of them, takes
        # between 0.6 (three ResNet-18 on 32x32) and 9.3 passes (five LeNets).
        return jax.lax.map(lambda member: output(model, *member), (variables, images)).swapaxes(
            0, 1
        )

    return run


def ensemble_logits(logits: np.ndarray, mean_of: str = "probabilities") -> np.ndarray:
    """Members' logits [..., members, classes] -> the logarithm of their mean probability [...,
    classes], or the mean of "logits"."""
    if mean_of == "logits":
        return logits.mean(-2)
    return scipy.special.logsumexp(scipy.special.log_softmax(logits, axis=-1), axis=-2) - math.log(
        logits.shape[-2]
    )


def _in_training_mode(model: Network, variables, images) -> jnp.ndarray:
    """Logits with the batch's own statistics; dropout is the same for every batch."""
    rngs = {"dropout": jax.random.key(0), "padding": jax.random.key(0)}
    return model.apply(
        variables, images, train=True, mutable=["batch_stats", "auxiliary"], rngs=rngs
    )[0]


def _input_moments(model: Network, variables, images) -> dict:
    """What every BatchNorm is given in training mode: by path its mean and variance [1, channels]
    and the number of values [1]."""
    found = {}

    def note(call, arguments, options, context):
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            x = arguments[0].astype(jnp.float32)
            count = x.size // x.shape[-1]
            mean = channel_sum(x) / count
            found[context.module.path] = (
                mean[None],
                (squared_deviation(x, mean) / count)[None],
                jnp.full(1, count),
            )
        return call(*arguments, **options)

    with nn.intercept_methods(note):
        _in_training_mode(model, variables, images)
    return found


def reestimate_statistics(
    parallel: Parallel, model: Network, variables, moments, images: np.ndarray, batch_size: int
) -> dict:
    """BatchNorm's statistics over uint8 training images in random order, which averaged parameters
    need anew -> `batch_stats`.

    The mean and the unbiased variance over all whole batches, each of them normalized by its own
    statistics on the way (Izmailov et al. 2018, arXiv 1803.05407, section 3.2). `variables` and
    `moments` (mean, std) are host arrays.
    """
    if not variables["batch_stats"]:
        return {}
    pooled: dict[tuple[str, ...], np.ndarray] = {}
    run = evaluate.compiled(parallel, model, _input_moments)
    placed, whole = (
        parallel.replicate((variables, moments)),
        images[: len(images) // batch_size * batch_size],
    )
    parts = [
        parallel.fetch_shared(run(*placed, parallel.share(batch)))
        for batch in evaluate.batches_of(whole, batch_size)
    ]
    for path in parts[0]:
        mean, var, count = (
            np.concatenate(found).astype(np.float64)
            for found in zip(*(part[path] for part in parts))
        )
        center, total = mean.mean(0), count.sum()  # all parts are of one size
        spread = (var + np.square(mean - center)).mean(0) * total / (total - 1)
        pooled |= {
            (*path, "mean"): center.astype(np.float32),
            (*path, "var"): spread.astype(np.float32),
        }
    return flax.traverse_util.unflatten_dict(pooled)


# ------------------------------------------------------------------ runs


class Member(NamedTuple):
    """A trained network in host arrays: its variables, and the moments (mean, std) that its images
    are normalized by."""

    name: str
    variables: dict
    moments: tuple[np.ndarray, np.ndarray]


def _find(patterns: Sequence[str]) -> dict[pathlib.Path, dict]:
    """The training runs among the folders that match -> their configurations. Raises `ValueError`
    if there are none."""
    paths = sorted(
        {pathlib.Path(name) / "config.json" for pattern in patterns for name in glob.glob(pattern)}
    )
    # Fields of a model are hashed, as lists cannot be.
    tuples = lambda found: {
        key: tuple(value) if isinstance(value, list) else value for key, value in found.items()
    }
    configs = {
        path.parent: workdir.read_json(path, object_hook=tuples) for path in paths if path.is_file()
    }
    configs = {
        folder: config
        for folder, config in configs.items()
        if isinstance(config, dict) and config.get("kind") == "train"
    }
    if not configs:
        raise ValueError(f"runs={' '.join(patterns)!r} matches no work directory of a training run")
    return configs


def _validated(configs: dict[pathlib.Path, dict]) -> bool:
    """Whether all runs held out the same images, so that none was trained on another's."""
    return (
        len(found := {config["n_validation"] for config in configs.values()}) == 1
        and found.pop() > 0
    )


def _check(configs: dict[pathlib.Path, dict], method: str) -> None:
    """Raises `ValueError`, in one line, for runs that the method cannot combine."""
    (first, known), *others = configs.items()
    if (method in _OF_ONE_RUN) == bool(others):
        wanted = "the checkpoints of one run" if others else "at least two runs"
        raise ValueError(
            f"method={method!r} takes {wanted}, and --runs matches {', '.join(map(str, configs))}"
        )
    for folder, config in configs.items():
        if lacking := sorted(set(defaults.get_config()) - set(defaults.BEFORE) - set(config)):
            raise ValueError(
                f"{folder / 'config.json'} lacks {', '.join(lacking)}, which every training run has"
            )
    if not arrays.is_known(known["dataset"]):
        raise ValueError(
            f"{first} has dataset={known['dataset']!r}, which is streamed; it must be one of "
            f"{', '.join(arrays.DATASETS)}"
        )
    if method in _SELECTING and not known["n_validation"]:
        raise ValueError(
            f"method={method!r} chooses by validation images, and {first} held none out: "
            "n_validation=0 is not a positive "
            "number; train with --config.n_validation=N"
        )
    for folder, config in others:
        fields = [f"model_fields.{key}" for key in known["model_fields"] | config["model_fields"]]
        for key in (*_SAME, *fields, *(("n_validation",) if method in _SELECTING else ())):
            mine, theirs = (
                flax.traverse_util.flatten_dict(found, sep=".").get(key)
                for found in (known, config)
            )
            if mine != theirs:
                why = (
                    f"; method={method!r} chooses by validation images that no run was trained "
                    "on, so all must hold out the same"
                    if key == "n_validation"
                    else ""
                )
                raise ValueError(
                    f"{first} and {folder} cannot be combined: {key}={mine!r} and "
                    f"{key}={theirs!r}{why}"
                )
    for folder in configs:
        if not (folder / "results.json").is_file():
            raise ValueError(
                f"{folder} is not finished, for it has no results.json: run its own command "
                "again, or leave it out of --runs"
            )


def _read(
    folder: pathlib.Path, config: ml_collections.ConfigDict, method: str
) -> tuple[list[Member], dict | None]:
    """Read a run's network as it was scored; for a method of one run, that of every checkpoint.

    Returns:
      The members, and the average of parameters (ema) that a method of one run finds.

    Raises:
      ValueError: if there are too few checkpoints.
    """
    trained = open_run(folder)
    if method not in _OF_ONE_RUN:
        return [Member(str(folder), trained.variables, trained.moments)], None
    recipe = build_recipe(config, trained.model)
    numbers = build_numbers(config)
    like = jax.eval_shape(lambda: step.init(recipe, trained.image_shape, numbers))
    results = workdir.read_json(folder / "results.json")
    last = results["final"]["step"]
    with Checkpoints(folder / "checkpoints", config.keep_checkpoints) as checkpoints:
        steps = checkpoints.steps()
        if last not in steps:
            raise ValueError(f"{folder} has no whole checkpoint of its last step, {last}")
        if method == "snapshot" and config.schedule.name == "restarts":
            # Checkpoints from the middle of a cycle have a high rate.
            per_epoch = last // results["final"]["epoch"]
            first = round(config.schedule.warmup_epochs * per_epoch)
            period = round(config.schedule.every * per_epoch)
            steps = [at for at in steps if at > first and (at - first) % period == 0]
        has_average = method == "polyak" and recipe.ema
        if len(steps) < 2 and not has_average:
            raise ValueError(
                f"{folder} kept one checkpoint, and method={method!r} takes at least two: train "
                "with --config.keep_checkpoints=N and --config.checkpoint_every_steps=M"
            )
        states = [checkpoints.restore_step(at, like)[1] for at in steps]
    members = []
    for at, state in zip(steps, states):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        members.append(Member(f"step {at}", variables, trained.moments))
    return members, states[-1].ema


# ------------------------------------------------------------------ a method, from its members to
# its report


class _Kitchen:
    """The members of a combination, what runs them and what scores them."""

    def __init__(self, config: ml_collections.ConfigDict, members: list[Member]):
        self.config = config
        self.members = members
        self.data = arrays.load(config.dataset, config.data_dir, config.n_validation)
        self.parallel = Parallel(config.parallel)
        shape = self.data.train.images.shape[1:]
        axis_name = self.parallel.axis_name if config.sync_batch_norm else None
        self.model = build_model(config, len(self.data.classes), shape, axis_name)
        variables, (mean, std) = jax.tree.map(
            lambda *leaves: np.stack(leaves), *(member[1:] for member in members)
        )
        # With these axes images [batch, ...] leave their normalization as [members, batch, ...].
        self.all = Member("all", variables, (mean[:, None, None, None], std[:, None, None, None]))

    def logits(self, member: Member, images: np.ndarray, output: Callable) -> np.ndarray:
        parallel, size = self.parallel, self.config.batch_size
        variables, moments = parallel.replicate((member.variables, member.moments))
        return evaluate.predict(
            parallel,
            self.model,
            variables,
            moments,
            evaluate.batches_of(images, size),
            size,
            output,
        )

    def average(self, numbers: Sequence[int], weights=None, params=None) -> Member:
        """Some members' average, by default the uniform one, or `params` in its place, with
        statistics of its own."""
        used, uniform = (
            [self.members[number] for number in numbers],
            [1 / len(numbers)] * len(numbers),
        )
        if len(used) == 1 and params is None:
            return used[0]
        if params is None:
            params = average([member.variables["params"] for member in used], weights or uniform)
        variables, moments = (
            used[-1].variables | {"params": params},
            average([member.moments for member in used], uniform),
        )
        images = self.data.train.images[
            np.random.default_rng(0).permutation(len(self.data.train.images))
        ]
        found = reestimate_statistics(
            self.parallel,
            self.model,
            variables,
            moments,
            images,
            self.config.batch_size,
        )
        return Member("average", variables | {"batch_stats": found}, moments)

    def evaluate(
        self, chosen: Member | None, name: str, mean_of: str, output: Callable = evaluate.logits
    ) -> tuple[list[dict], dict]:
        """The scores of all members on a split, and that of the chosen average or, where there is
        none, of the members' ensemble."""
        split = getattr(self.data, name)
        score = lambda logits: evaluate.score(self.config.loss, logits, split.labels)
        logits = self.logits(self.all, split.images, member_logits(output))
        combined = (
            self.logits(chosen, split.images, output)
            if chosen
            else ensemble_logits(logits, mean_of)
        )
        return [score(logits[:, number]) for number in range(len(self.members))], score(combined)

    def learn(self, by_layer: bool) -> dict[str, list[float]]:
        """The coefficients that the validation images teach."""
        model, split, (_, variables, moments) = (
            self.model.clone(axis_name=None),
            self.data.validation,
            self.members[0],
        )
        assert split is not None  # `_check` refuses runs that held out nothing

        def loss(params, batch):
            # A mixture's statistics are not known before it is chosen, so BatchNorm takes those of
            # the batch.
            apply = _in_training_mode if variables["batch_stats"] else evaluate.logits
            logits = apply(
                model, variables | {"params": params}, augment.normalize(batch[0], *moments)
            )
            return step.loss_and_errors(self.config.loss, logits, batch[1])[0].mean()

        generator, size = (
            np.random.default_rng(0),
            min(self.config.batch_size, len(split.labels)),
        )
        chosen = (
            generator.choice(len(split.labels), size, replace=False) for _ in range(_LEARNED_STEPS)
        )
        return learned(
            loss,
            [member.variables["params"] for member in self.members],
            ((split.images[few], split.labels[few]) for few in chosen),
            by_layer,
        )

    def seconds_per_image(self, member: Member, output: Callable) -> float:
        """The shortest of three passes over a few batches, once all is compiled."""
        images, seconds = self.data.train.images[: 4 * self.config.batch_size], []
        for _ in range(4):
            began = time.monotonic()
            self.logits(member, images, output)
            seconds.append(time.monotonic() - began)
        return min(seconds[1:]) / len(images)


def _choose(
    kitchen: _Kitchen, method: str, ema: dict | None
) -> tuple[list[str], dict | None, Member | None]:
    """The ingredients' names, the coefficients that were learned, and the average; None where there
    is none."""
    everyone, validation = list(range(len(kitchen.members))), kitchen.data.validation
    ingredients, coefficients = everyone, None

    def accuracy(numbers):
        logits = kitchen.logits(kitchen.average(numbers), validation.images, evaluate.logits)
        return float(np.mean(logits.argmax(-1) == validation.labels))

    if method == "polyak" and ema is not None:
        return (
            [f"ema_decay={kitchen.config.ema_decay}"],
            None,
            kitchen.average(everyone, params=ema),
        )
    if method in ("best", "greedy"):
        accuracies = [accuracy([number]) for number in everyone]
        ingredients = (
            greedy(accuracies, accuracy) if method == "greedy" else [int(np.argmax(accuracies))]
        )
    elif method.startswith("learned"):
        coefficients = kitchen.learn(method == "learned-by-layer")
    average = None if method in _ENSEMBLES else kitchen.average(ingredients, coefficients)
    return [kitchen.members[number].name for number in ingredients], coefficients, average


def _report(results: dict) -> str:
    """The runs, their mean, spread and best, and beside them the combination, as Markdown."""
    percent = lambda found: f"{100 * found:.2f}" if found is not None else ""
    errors = lambda row: [
        percent(row[split] and row[split]["error"]) for split in ("validation", "test")
    ]
    individual = results["individual"]
    lines = [[row["name"], *errors(row), "1"] for row in individual]
    for what in ("mean", "std"):
        lines.append(
            [
                f"*{what}*",
                *(percent(results[f"{what}_error"][split]) for split in ("validation", "test")),
                "",
            ]
        )
    lines += [
        ["*best on validation*", *errors(row), "1"]
        for row in individual
        if row["name"] == results["best"]
    ]
    lines.append([f"**{results['method']}**", *errors(results), str(results["forward_passes"])])
    ratio = results["seconds_per_image"]["ratio"]
    return (
        f"# {results['method']}: {METHODS[results['method']]}\n\nErrors in percent; std is the "
        "sample standard deviation.\n\n"
        + tables.table(["network", "validation error", "test error", "forward passes"], lines)
        + f"\nIngredients: {', '.join(results['ingredients'])}. An image takes {ratio:.2f} times "
        "as long as with one network. The test set was used once, at the end.\n"
    )


def run(patterns: Sequence[str], method: str, folder: pathlib.Path) -> None:
    """Combines the training runs that match, and writes results.json and report.md. Raises
    `ValueError` for runs that do not combine."""
    began, configs = time.monotonic(), _find(patterns)
    _check(configs, method)
    members: list[Member] = []
    ema = None
    for path, config in configs.items():
        config = ml_collections.ConfigDict(defaults.BEFORE | config)
        more, ema = _read(path, config, method)
        members += more
    folder = workdir.prepare(
        folder, {"kind": "combine", "method": method, "runs": [str(path) for path in configs]}
    )
    first = next(iter(configs.values()))
    kitchen = _Kitchen(ml_collections.ConfigDict(defaults.BEFORE | first), members)
    ingredients, coefficients, chosen = _choose(kitchen, method, ema)
    names, mean_of = (
        [member.name for member in members],
        "logits" if method == "ensemble-logits" else "probabilities",
    )
    single, whole = (
        kitchen.seconds_per_image(*which)
        for which in (
            (members[0], evaluate.logits),
            (chosen, evaluate.logits) if chosen else (kitchen.all, member_logits()),
        )
    )
    validation = (
        kitchen.evaluate(chosen, "validation", mean_of)
        if _validated(configs)
        else ([None] * len(names), None)
    )
    test = kitchen.evaluate(chosen, "test", mean_of, evaluate.averaged(kitchen.config.test_views))
    errors = {
        split: [row["error"] for row in rows if row]
        for split, rows in (("validation", validation[0]), ("test", test[0]))
    }
    results: dict[str, Any] = {
        "kind": "combine",
        "method": method,
        "runs": [str(path) for path in configs],
        "ingredients": ingredients,
        "coefficients": coefficients,
        "validation": validation[1],
        "test": test[1],
        "individual": [
            {"name": name, "validation": mine, "test": tested}
            for name, mine, tested in zip(names, validation[0], test[0])
        ],
        "mean_error": {
            split: float(np.mean(found)) if found else None for split, found in errors.items()
        },
        "std_error": {
            split: float(np.std(found, ddof=1)) if len(found) > 1 else None
            for split, found in errors.items()
        },
        "best": names[int(np.argmin(errors["validation"]))] if errors["validation"] else None,
        "forward_passes": 1 if chosen else len(names),
        "seconds_per_image": {"single": single, "combined": whole, "ratio": whole / single},
        "seconds": round(time.monotonic() - began, 1),
    }
    if chosen:
        weights.save_torchvision(chosen.variables, folder / transfer.WEIGHTS)
    workdir.write_json(folder / "results.json", results)
    workdir.write(folder / "report.md", _report(results))
    _LOG.info(
        "%s: test error %.2f %%, of the runs alone %.2f %%: see %s",
        method,
        100 * test[1]["error"],
        100 * results["mean_error"]["test"],
        folder / "report.md",
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line -> the exit code (`cnnjax.runtime.command.run`)."""
    methods = "\n".join(f"  {name:18}{text}" for name, text in METHODS.items())
    parser = command.Parser(
        prog="python -m cnnjax.combine", description=__doc__, epilog=f"methods:\n{methods}"
    )
    parser.add_argument(
        "--runs",
        required=True,
        nargs="+",
        metavar="FOLDER",
        help="work directories, or patterns that match them",
    )
    parser.add_argument(
        "--method", required=True, choices=METHODS, metavar="METHOD", help="one of those below"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=pathlib.Path,
        metavar="FOLDER",
        help="where the results are written",
    )
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        run(options.runs, options.method, options.workdir)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
