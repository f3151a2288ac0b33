"""A combination of trained networks, from its members to its report."""

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from cnnjax import transfer, weights
from cnnjax.combine.averages import average, ensemble_logits, greedy, learned
from cnnjax.combine.methods import AVERAGES, ENSEMBLES, METHODS
from cnnjax.combine.networks import (
    logits_in_training_mode,
    member_logits,
    reestimate_statistics,
)
from cnnjax.combine.runs import (
    Configs,
    Member,
    check_data,
    check_runs,
    find_runs,
    read_members,
    share_validation,
)
from cnnjax.data import arrays, augment
from cnnjax.models import Network
from cnnjax.models.base import digest_network
from cnnjax.runtime import files, tables, workdir
from cnnjax.runtime.paths import expand_user
from cnnjax.train import evaluate, step
from cnnjax.train.parallel import Parallel
from cnnjax.train.run import build_model, complete

_LOG = logging.getLogger("cnnjax")
_LEARNED_STEPS = 200


def run(
    runs: str | os.PathLike | Sequence[str | os.PathLike],
    method: str,
    folder: str | os.PathLike,
    data_dir: str | None = None,
) -> None:
    """Combines training runs, and writes results.json and report.md.

    Methods that make one network write its weights, too, and `open_run` opens the folder. The test
    set is scored once, at the end.

    Args:
      runs: folders, or patterns that match them, or a single one; `~` is expanded.
      method: "best", "ensemble", "ensemble-logits", "uniform", "greedy", "learned",
        "learned-by-layer", "snapshot" or "polyak" (see docs/combine.md).
      folder: the work directory; `~` is expanded.
      data_dir: the folder of the runs' data set, if it has moved since they were trained.

    Raises:
      ValueError: for an unknown method, for no runs, for runs that the method cannot combine, and
        for a work directory that another process is using.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    began = time.monotonic()

    # ------------------------------------------------------------- members
    configs = find_runs(runs)
    check_runs(configs, method)
    # Before the work directory is made, since the data may be missing.
    networks, ema = _read_networks(configs, method, data_dir)
    names = [str(path) for path in configs]
    record = {"kind": "combine", "method": method, "runs": names}
    with workdir.prepared(expand_user(folder), record) as folder:
        # --------------------------------------------------------- the combination
        choice = choose(networks, method, ema)

        # --------------------------------------------------------- scores
        score = functools.partial(
            networks.score,
            choice.average,
            mean_of="logits" if method == "ensemble-logits" else "probabilities",
        )
        validation = Scores([None] * len(networks.members), None)
        if share_validation(configs):
            validation = score(split="validation")
        test = score(split="test", output=evaluate.averaged(networks.config.test_views))

        # --------------------------------------------------------- results
        results = {
            "kind": "combine",
            "method": method,
            "runs": names,
            "ingredients": choice.ingredients,
            "coefficients": choice.coefficients,
            **_summarize(networks.members, validation, test),
            "forward_passes": 1 if choice.average else len(networks.members),
            "seconds_per_image": _time(networks, choice.average),
            "seconds": round(time.monotonic() - began, 1),
        }
        if choice.average:
            results |= networks.describe(choice.average)
            weights.save_torchvision(choice.average.variables, folder / transfer.WEIGHTS)
        files.write_json(folder / "results.json", results)
        files.write(folder / "report.md", _report(results))
        _LOG.info(
            "%s: test error %.2f %%, of the runs alone %.2f %%: see %s",
            method,
            100 * results["test"]["error"],
            100 * results["mean_error"]["test"],
            folder / "report.md",
        )


def _read_networks(
    configs: Configs, method: str, data_dir: str | None
) -> tuple["Networks", dict | None]:
    """Reads the runs' networks and data, and checks that the method can combine them.

    Returns the networks, and the average of parameters (ema) that a single run kept.

    Raises `ValueError` as `check_data`, `read_members`, `transfer.check_statistics` and
    `_check_frozen`.
    """
    first = complete(next(iter(configs.values())))
    if data_dir is not None:
        first.data_dir = data_dir
        # A file of the user's has its own path.
        if first.dataset.endswith(".npz"):
            first.dataset = os.path.join(data_dir, os.path.basename(first.dataset))
    data = arrays.load(first.dataset, first.data_dir, first.n_validation)
    check_data(configs, data, first)
    members: list[Member] = []
    ema = None
    for path in configs:
        run_members, ema = read_members(path, method)
        members += run_members
    networks = Networks(first, members, data)
    if method in AVERAGES:
        transfer.check_statistics(networks.model, f"method={method!r}")
        _check_frozen(networks.model, configs, method)
    return networks, ema


def _check_frozen(model: Network, configs: Configs, method: str) -> None:
    """Checks that all runs froze the same BatchNorms, whose statistics the average keeps."""
    freeze = {folder: tuple(complete(config).freeze) for folder, config in configs.items()}
    frozen = {}
    for folder, parts in freeze.items():
        paths = transfer.select(model, parts, "freeze")
        frozen[folder] = {path for path in paths if path[0] == "batch_stats"}
    first, *others = configs
    for folder in others:
        if frozen[folder] != frozen[first]:
            raise ValueError(
                f"{first} and {folder} cannot be combined: freeze={freeze[first]!r} and "
                f"freeze={freeze[folder]!r}; method={method!r} keeps the statistics of frozen "
                "BatchNorms, so all must freeze the same ones"
            )


# ------------------------------------------------------------------ the members' networks


class Scores(NamedTuple):
    """The scores of all members and of their combination; None without such a split."""

    members: list[dict | None]
    combined: dict | None


class Networks:
    """The members of a combination, with the data and the network to score them.

    Attributes:
      config: the configuration of the first run. All agree in what a combination depends on.
      members: the networks to combine.
      data: the data set of all runs.
      parallel: how networks run on the devices.
      batch_size: the number of images of a batch, a multiple of the devices.
      model: the network that all members share.
      frozen: the paths of the frozen variables.
      all: all members in one, their variables and moments stacked [members, ...]; for
        `member_logits`.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, members: list[Member], data: arrays.Dataset
    ):
        self.config = config
        self.members = members
        self.data = data
        self.parallel = Parallel(config.parallel)
        # The runs may have been trained on another number of devices, which divides a batch.
        self.batch_size = self.parallel.round_up(config.batch_size)
        shape = self.data.train.images.shape[1:]
        axis_name = self.parallel.axis_name if config.sync_batch_norm else None
        self.model = build_model(config, len(self.data.classes), shape, axis_name)
        # `_check_frozen` refuses averages of runs that froze other statistics.
        self.frozen = transfer.select(self.model, tuple(config.freeze), "freeze")
        trees = [(member.variables, member.moments) for member in members]
        variables, (mean, std) = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
        # These axes make normalization turn images [batch, ...] into [members, batch, ...].
        moments = (mean[:, None, None, None], std[:, None, None, None])
        self.all = Member("all", variables, moments)

    def logits(self, member: Member, images: np.ndarray, output: Callable) -> np.ndarray:
        """Computes a member's outputs, or those of `self.all` by `member_logits`."""
        variables, moments = self.parallel.replicate((member.variables, member.moments))
        outputs = evaluate.predict_batches(
            parallel=self.parallel,
            model=self.model,
            variables=variables,
            moments=moments,
            batches=evaluate.batches_of(images, self.batch_size),
            batch_size=self.batch_size,
            output=output,
        )
        return np.concatenate([*outputs])

    def average(self, numbers: Sequence[int], weights=None, params=None) -> Member:
        """Averages some members, with BatchNorm statistics estimated for the average.

        Args:
          numbers: the members' numbers. A single member is returned as it is.
          weights: as in `averages.average`; all the same by default.
          params: parameters in place of the members' average.
        """
        members = [self.members[number] for number in numbers]
        uniform = [1 / len(members)] * len(members)
        if weights is None:
            weights = uniform
        if params is None:
            if len(members) == 1:
                return members[0]
            trees = [member.variables["params"] for member in members]
            params = average(trees, weights)
        # Frozen BatchNorms keep the last member's statistics.
        variables = members[-1].variables | {"params": params}
        moments = average([member.moments for member in members], uniform)
        # In random order, since each batch is normalized by its own statistics.
        images = self.data.train.images
        order = np.random.default_rng(0).permutation(len(images))
        statistics = reestimate_statistics(
            parallel=self.parallel,
            model=self.model,
            variables=variables,
            moments=moments,
            images=images[order],
            batch_size=self.batch_size,
            frozen=self.frozen,
        )
        return Member("average", variables | {"batch_stats": statistics}, moments)

    def accuracy(self, numbers: Sequence[int]) -> float:
        """Computes the accuracy of some members' average on the validation images."""
        split = self.data.validation
        # `check_runs` refuses runs without validation images for methods that ask for this.
        assert split is not None
        logits = self.logits(self.average(numbers), split.images, evaluate.logits)
        return float(np.mean(logits.argmax(-1) == split.labels))

    def score(
        self,
        averaged: Member | None,
        split: str,
        mean_of: str,
        output: Callable = evaluate.logits,
    ) -> Scores:
        """Scores all members and their combination.

        Args:
          averaged: the network that is the combination; None for the ensemble of all members.
          split: "validation" or "test".
          mean_of: as in `ensemble_logits`.
          output: what to compute with a network, as in `evaluate.predict_batches`.
        """
        images, labels = getattr(self.data, split)
        # [batch, members, classes]
        logits = self.logits(self.all, images, member_logits(output))
        if averaged is None:
            combined = ensemble_logits(logits, mean_of)
        else:
            combined = self.logits(averaged, images, output)
        score = lambda logits: evaluate.score(self.config.loss, logits, labels)
        members: list[dict | None] = []
        for number in range(len(self.members)):
            members.append(score(logits[:, number]))
        return Scores(members, score(combined))

    def describe(self, member: Member) -> dict[str, Any]:
        """Returns what `open_run` needs to open a network of the members' kind."""
        mean, std = member.moments
        return {
            "config": self.config.to_dict(),
            "classes": list(self.data.classes),
            "image_shape": list(self.data.train.images.shape[1:]),
            "mean": mean.tolist(),
            "std": std.tolist(),
            "network_sha256": digest_network(self.config.model),
        }

    def learn(self, by_layer: bool) -> dict[str, list[float]]:
        """Learns the coefficients of an average on the validation images."""
        model = self.model.clone(axis_name=None)
        variables = self.members[0].variables
        moments = self.members[0].moments
        # The average changes with every step, and its statistics are not known: BatchNorm uses
        # those of the batch, unless it is frozen.
        apply = evaluate.logits
        if variables["batch_stats"]:
            apply = functools.partial(logits_in_training_mode, frozen=self.frozen)

        def loss(params, batch):
            images, labels = batch
            normalized = augment.normalize(images, *moments)
            logits = apply(model, variables | {"params": params}, normalized)
            losses, _ = step.loss_and_errors(self.config.loss, logits, labels)
            return losses.mean()

        def draw_batches():
            split = self.data.validation
            assert split is not None
            generator = np.random.default_rng(0)
            size = min(self.config.batch_size, len(split.labels))
            for _ in range(_LEARNED_STEPS):
                drawn = generator.choice(len(split.labels), size, replace=False)
                yield split.images[drawn], split.labels[drawn]

        params = [member.variables["params"] for member in self.members]
        return learned(loss, params, draw_batches(), by_layer)

    def seconds_per_image(self, member: Member, output: Callable) -> float:
        """Times the shortest of three passes over a few batches, after one that compiles."""
        images = self.data.train.images[: 4 * self.config.batch_size]
        seconds = []
        for _ in range(4):
            began = time.monotonic()
            self.logits(member, images, output)
            seconds.append(time.monotonic() - began)
        return min(seconds[1:]) / len(images)


# ------------------------------------------------------------------ methods


class Choice(NamedTuple):
    """What a method makes of the members.

    Attributes:
      ingredients: the names of the members that are combined.
      coefficients: the learned coefficients, by layer; None if the method learns none.
      average: the network that is the combination; None for an ensemble.
    """

    ingredients: list[str]
    coefficients: dict | None
    average: Member | None


def choose(networks: Networks, method: str, ema: dict | None) -> Choice:
    """Chooses a method's ingredients, and averages them if the method makes one network.

    Args:
      networks: the members.
      method: one of `METHODS`.
      ema: the average of parameters that a single run kept.
    """
    all_members = list(range(len(networks.members)))
    if method == "polyak" and ema is not None:
        name = f"ema_decay={networks.config.ema_decay}"
        return Choice([name], None, networks.average(all_members, params=ema))
    ingredients = all_members
    coefficients = None
    if method in ("best", "greedy"):
        accuracies = [networks.accuracy([number]) for number in all_members]
        if method == "greedy":
            ingredients = greedy(accuracies, networks.accuracy)
        else:
            ingredients = [int(np.argmax(accuracies))]
    elif method.startswith("learned"):
        coefficients = networks.learn(method == "learned-by-layer")
    averaged = None
    if method not in ENSEMBLES:
        averaged = networks.average(ingredients, coefficients)
    names = [networks.members[number].name for number in ingredients]
    return Choice(names, coefficients, averaged)


def _time(networks: Networks, averaged: Member | None) -> dict[str, float]:
    """Times one member and the combination."""
    single = networks.seconds_per_image(networks.members[0], evaluate.logits)
    if averaged is None:
        combined = networks.seconds_per_image(networks.all, member_logits(evaluate.logits))
    else:
        combined = networks.seconds_per_image(averaged, evaluate.logits)
    return {"single": single, "combined": combined, "ratio": combined / single}


# ------------------------------------------------------------------ results


def _summarize(members: Sequence[Member], validation: Scores, test: Scores) -> dict[str, Any]:
    """Collects the members' scores, their mean, spread and best, and the combination's."""
    individual: list[dict[str, Any]] = []
    for member, on_validation, on_test in zip(members, validation.members, test.members):
        individual.append({"name": member.name, "validation": on_validation, "test": on_test})
    errors = {}
    for split in ("validation", "test"):
        errors[split] = [row[split]["error"] for row in individual if row[split]]
    best = None
    if errors["validation"]:
        best = members[int(np.argmin(errors["validation"]))].name
    return {
        "validation": validation.combined,
        "test": test.combined,
        "individual": individual,
        "mean_error": {split: evaluate.mean_of_known(values) for split, values in errors.items()},
        "std_error": {split: tables.deviation(values) for split, values in errors.items()},
        "best": best,
    }


def _report(results: dict) -> str:
    """Formats the errors of the members and of their combination as Markdown."""

    def errors(row):
        cells = []
        for split in ("validation", "test"):
            error = row[split]["error"] if row[split] else None
            cells.append(_percent(error))
        return cells

    individual = results["individual"]
    lines = [[row["name"], *errors(row), "1"] for row in individual]
    for statistic in ("mean", "std"):
        by_split = results[f"{statistic}_error"]
        values = [_percent(by_split["validation"]), _percent(by_split["test"])]
        lines.append([f"*{statistic}*", *values, ""])
    for row in individual:
        if row["name"] == results["best"]:
            lines.append(["*best on validation*", *errors(row), "1"])
    method = results["method"]
    lines.append([f"**{method}**", *errors(results), str(results["forward_passes"])])
    columns = ["network", "validation error", "test error", "forward passes"]
    return (
        f"# {method}: {METHODS[method]}\n\n"
        "Errors in percent; std is the sample standard deviation.\n\n"
        f"{tables.table(columns, lines)}\n"
        f"Ingredients: {', '.join(results['ingredients'])}. An image takes "
        f"{results['seconds_per_image']['ratio']:.2f} times as long as with one network. The test "
        "set was used once, at the end.\n"
    )


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2f}"
