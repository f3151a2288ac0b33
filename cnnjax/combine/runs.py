"""The training runs to combine: finding, checking and reading them."""

import glob
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import flax.traverse_util
import jax
import ml_collections
import numpy as np

from cnnjax.combine.methods import OF_ONE_RUN, SELECTING
from cnnjax.data import arrays, sources, splits
from cnnjax.runtime import files
from cnnjax.train import defaults, step
from cnnjax.train.checkpoints import Checkpoints
from cnnjax.train.data import digest_arrays
from cnnjax.train.run import (
    TrainedRun,
    build_numbers,
    build_recipe,
    open_run,
    read_recorded,
    why_unfinished,
)
from cnnjax.train.schedules import settings

Configs = dict[pathlib.Path, dict]

# The keys that must agree in all runs, besides the fields of the model.
_SHARED_KEYS = ("model", "dtype", "dataset", "pixels", "test_views")


class Member(NamedTuple):
    """A trained network in host arrays.

    Attributes:
      name: its run, or its step.
      variables: its variables.
      moments: the mean and deviation that its images are normalized by.
    """

    name: str
    variables: dict
    moments: tuple[np.ndarray, np.ndarray]


def find_runs(patterns: str | os.PathLike | Sequence[str | os.PathLike]) -> Configs:
    """Reads the configurations of training runs, by folder.

    Args:
      patterns: work directories, and patterns that match them, or a single one; other matches of a
        pattern are passed over. A run that is matched twice is listed once.

    Raises:
      ValueError: for no pattern, for a path that is not a training run, and for a pattern that
        matches none.
    """
    if isinstance(patterns, (str, os.PathLike)):
        patterns = [patterns]
    if not patterns:
        raise ValueError(f"runs={patterns!r} names no training run")
    configs: Configs = {}
    # A link or another spelling names the same run.
    resolved: set[pathlib.Path] = set()
    for name in patterns:
        pattern = os.fspath(name)
        matches = _read_matches(pattern)
        if not matches:
            raise ValueError(f"runs={pattern!r} matches no work directory of a training run")
        for path in sorted(matches):
            if path.resolve() not in resolved:
                resolved.add(path.resolve())
                configs[path] = matches[path]
    return dict(sorted(configs.items()))


def _read_matches(pattern: str) -> Configs:
    """Reads the configurations of the runs that a path names or a pattern matches."""
    path = os.path.expanduser(pattern)
    # Taken as a pattern, a folder such as dataset=cifar10[:12000] of a sweep does not match itself.
    if os.path.exists(path):
        recorded = read_recorded(pathlib.Path(path))
        if recorded is None:
            raise ValueError(
                f"runs={pattern!r} is not the work directory of a training run; quote a pattern "
                "('runs/a/*') to skip what is not one"
            )
        return {pathlib.Path(path): recorded}
    # A pattern may have such brackets, too: dataset=cifar10[:12000],seed=*.
    matches = glob.glob(path) or glob.glob(path.replace("[", "[[]"))
    configs = {}
    for name in matches:
        recorded = read_recorded(pathlib.Path(name))
        if recorded is not None:
            configs[pathlib.Path(name)] = recorded
    return configs


def share_validation(configs: Configs) -> bool:
    """Tells whether all runs held out the same images: none was trained on another's."""
    counts = {config["n_validation"] for config in configs.values()}
    return len(counts) == 1 and counts.pop() > 0


def check_runs(configs: Configs, method: str) -> None:
    """Raises `ValueError` for runs that the method cannot combine."""
    first, *others = configs
    reference = configs[first]
    takes_one = method in OF_ONE_RUN
    has_one = not others
    if takes_one != has_one:
        expected = "the checkpoints of one run" if takes_one else "at least two runs"
        raise ValueError(
            f"method={method!r} takes {expected}, and --runs matches {', '.join(map(str, configs))}"
        )
    required = set(defaults.get_config()) - set(defaults.BEFORE)
    for folder, config in configs.items():
        if missing := sorted(required - set(config)):
            raise ValueError(
                f"{folder / 'config.json'} lacks {', '.join(missing)}, which every training run has"
            )
        if config["loss"] != "cross_entropy":
            raise ValueError(
                f"{folder} has loss={config['loss']!r}; runs that are combined have one class an "
                "image, loss='cross_entropy'"
            )
    if not arrays.is_known(reference["dataset"]):
        raise ValueError(
            f"{first} has dataset={reference['dataset']!r}, which is streamed; it must be one of "
            f"{', '.join(sources.DATASETS)} or FILE.npz"
        )
    if method in SELECTING and not reference["n_validation"]:
        raise ValueError(
            f"method={method!r} chooses by validation images, and {first} held none out: "
            "n_validation=0 is not a positive number; train with --config.n_validation=N"
        )
    for folder in others:
        _check_alike(first, folder, configs, method)
    for folder in configs:
        if not (folder / "results.json").is_file():
            raise ValueError(f"{folder} {why_unfinished(folder)}, or leave it out of --runs")


def _check_alike(first: pathlib.Path, folder: pathlib.Path, configs: Configs, method: str) -> None:
    """Checks that two runs agree in the keys that a combination depends on."""
    fields = configs[first]["model_fields"] | configs[folder]["model_fields"]
    keys = [*_SHARED_KEYS, *(f"model_fields.{field}" for field in fields)]
    if method in SELECTING:
        keys.append("n_validation")
    expected = flax.traverse_util.flatten_dict(configs[first], sep=".")
    values = flax.traverse_util.flatten_dict(configs[folder], sep=".")
    for key in keys:
        if expected.get(key) == values.get(key):
            continue
        reason = ""
        if key == "n_validation":
            reason = (
                f"; method={method!r} chooses by validation images that no run was trained on, so "
                "all must hold out the same"
            )
        raise ValueError(
            f"{first} and {folder} cannot be combined: {key}={expected.get(key)!r} and "
            f"{key}={values.get(key)!r}{reason}"
        )


def check_data(configs: Configs, data: arrays.Dataset, loaded: ml_collections.ConfigDict) -> None:
    """Checks that runs were trained on the data set as it is now.

    Args:
      configs: the runs.
      data: their data set.
      loaded: the configuration that it was loaded for.

    Raises:
      ValueError: if a run's results.json records other images; the error says what changed.
    """
    now = {
        "classes": data.classes,
        "image_shape": list(data.train.images.shape[1:]),
        "n_train": len(data.train.labels),
        "digest": digest_arrays(data.train, data.validation),
    }
    for folder, config in configs.items():
        results = files.read_json(folder / "results.json")
        # The digest is in "data"; the other fields are beside it.
        recorded = results.get("data", {}) | results
        # Runs of earlier versions recorded less.
        then = {name: recorded[name] for name in now if name in recorded}
        if config["n_validation"] != loaded.n_validation:
            # Others of its images were held out.
            then.pop("n_train", None)
            then.pop("digest", None)
        if change := splits.describe_change(then, now):
            raise ValueError(
                f"the images of dataset={loaded.dataset!r}, data_dir={loaded.data_dir!r} have "
                f"changed since {folder} was trained ({change}); bring them back, or leave it out "
                "of --runs"
            )


def read_members(folder: pathlib.Path, method: str) -> tuple[list[Member], dict | None]:
    """Reads a run's network as it was scored; for a method of one run, that of every checkpoint.

    Returns:
      The members. For a method of one run also the average of parameters (ema) that the run kept,
      if it kept one.

    Raises:
      ValueError: if there are too few checkpoints.
    """
    trained = open_run(folder)
    if method not in OF_ONE_RUN:
        return [Member(str(folder), trained.variables, trained.moments)], None
    steps, states = _read_checkpoints(folder, method, trained)
    members = []
    for number, state in zip(steps, states):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        members.append(Member(f"step {number}", variables, trained.moments))
    return members, states[-1].ema


def _read_checkpoints(
    folder: pathlib.Path, method: str, trained: TrainedRun
) -> tuple[list[int], list[step.State]]:
    """Reads the steps and the states of the checkpoints that a method combines."""
    results = files.read_json(folder / "results.json")
    last = results["final"]["step"]
    absent = ValueError(f"{folder} has no whole checkpoint of its last step, {last}")
    # `Checkpoints` would create the folder.
    if not (folder / "checkpoints").is_dir():
        raise absent
    config = trained.config
    recipe = build_recipe(config, trained.model)
    numbers = build_numbers(config)
    like = jax.eval_shape(lambda: step.init(recipe, trained.image_shape, numbers))
    with Checkpoints(folder / "checkpoints", config.keep_checkpoints) as checkpoints:
        steps = checkpoints.steps()
        if last not in steps:
            raise absent
        if method == "snapshot" and config.schedule.name == "restarts":
            per_epoch = last // results["final"]["epoch"]
            steps = select_ends_of_cycles(steps, config, per_epoch, folder)
        has_average = method == "polyak" and recipe.ema
        if len(steps) < 2 and not has_average:
            raise ValueError(
                f"{folder} kept one checkpoint, and method={method!r} takes at least two: train "
                "with --config.keep_checkpoints=N and --config.checkpoint_every_steps=M"
            )
        return steps, [checkpoints.restore_step(number, like)[0] for number in steps]


def select_ends_of_cycles(
    steps: list[int], config: ml_collections.ConfigDict, per_epoch: int, folder: pathlib.Path
) -> list[int]:
    """Selects the checkpoints at the ends of the learning rate's cycles, where it is lowest.

    Args:
      steps: those of a run's checkpoints.
      config: its configuration, of schedule "restarts".
      per_epoch: the steps of an epoch.
      folder: its work directory, for the error.

    Raises:
      ValueError: if there are fewer than two.
    """
    schedule = settings(config.schedule)
    first = round(schedule["warmup_epochs"] * per_epoch)
    period = max(1, round(schedule["every"] * per_epoch))
    ends = [number for number in steps if number > first and (number - first) % period == 0]
    if len(ends) < 2:
        # The largest interval between checkpoints that meets the end of every cycle.
        interval = math.gcd(first, period)
        raise ValueError(
            f"{folder} kept the checkpoints of steps {_join(steps)}, of which at the end of a "
            f"cycle: {_join(ends) or 'none'}; method='snapshot' takes at least two: train two or "
            f"more cycles of schedule.every={schedule['every']} epochs with "
            f"--config.checkpoint_every_steps={interval} and --config.keep_checkpoints=N"
        )
    return ends


def _join(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
