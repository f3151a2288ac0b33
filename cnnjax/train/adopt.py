"""Going on in a work directory of an earlier version, or of a slightly different configuration."""

import json
import logging
import pathlib

import ml_collections
import numpy as np

from cnnjax.runtime import workdir
from cnnjax.train import defaults
from cnnjax.train.schedules import learning_rates

_LOG = logging.getLogger("cnnjax")
EXTENDED = "extended.json"


def complete_record(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Let keys that were introduced since a run keep what was in force before.

    Args:
      config: what is to be run; it is changed where it has the keys' defaults.
      folder: the work directory, which may not exist yet.
    """
    recorded = workdir.read_record(folder, "train")
    if recorded is None:
        return
    missing = {key: value for key, value in defaults.BEFORE.items() if key not in recorded}
    if not missing:
        return
    current = defaults.get_config()
    for key, value in missing.items():
        if config[key] == current[key]:
            config[key] = value
    recorded |= missing
    # The record of a run that will be refused stays as it is.
    if _differences(recorded, config) <= {"epochs", "model"}:
        _LOG.info("%s was begun without %s: as before", folder, ", ".join(missing))
        workdir.write_json(folder / "config.json", recorded)


def extend(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Make a run go on under a configuration that would have led to the same state.

    A finished run goes on to more epochs if its learning rates so far are those of the longer run;
    extended.json then records the earlier results. A run that a damaged image ended goes on with
    `skip_damaged`. All other differences stay, and are refused later.

    Args:
      config: what is to be run.
      folder: the work directory, which may not exist yet.
    """
    recorded = workdir.read_record(folder, "train")
    if recorded is None:
        return
    if _is_longer(recorded, config) and _was_finished(folder):
        _extend(folder, recorded, config)
    # So far no image was damaged: the run would have ended there.
    is_finished = (folder / "results.json").exists()
    if _only_skips(recorded, config) and not is_finished:
        workdir.write_json(folder / "config.json", recorded | {"skip_damaged": True})
        _LOG.info("%s goes on with skip_damaged=True", folder)


def _differences(recorded: dict, config: ml_collections.ConfigDict) -> set[str]:
    """The keys in which a recorded configuration differs from the one to be run."""
    # As it will be recorded: tuples are lists.
    now = json.loads(json.dumps(config.to_dict()))
    return {key for key in recorded.keys() | now.keys() if recorded.get(key) != now.get(key)}


def _is_longer(recorded: dict, config: ml_collections.ConfigDict) -> bool:
    """Whether only epochs differ, and the rates of the shorter run begin those of the longer."""
    if _differences(recorded, config) != {"epochs"} or recorded["epochs"] >= config.epochs:
        return False
    # That does not depend on how many steps an epoch has.
    shorter = learning_rates(config.schedule, 10, recorded["epochs"])
    longer = learning_rates(config.schedule, 10, config.epochs)
    return np.array_equal(shorter, longer[: len(shorter)])


def _only_skips(recorded: dict, config: ml_collections.ConfigDict) -> bool:
    """Whether the only difference is that damaged images are passed over from now on."""
    return _differences(recorded, config) == {"skip_damaged"} and config.skip_damaged


def _was_finished(folder: pathlib.Path) -> bool:
    # The second is left where an extension was interrupted.
    return (folder / "results.json").exists() or (folder / EXTENDED).exists()


def _extend(folder: pathlib.Path, recorded: dict, config: ml_collections.ConfigDict) -> None:
    path = folder / "results.json"
    if path.exists():
        workdir.check_seal(folder)
        results = workdir.read_json(path)
        earlier = [*results.get("extended_from", []), results["final"]]
        # First of all: the seal of earlier extensions names the next file, which changes.
        workdir.unseal(folder)
        workdir.write_json(folder / EXTENDED, earlier)
        path.unlink()
    workdir.write_json(folder / "config.json", recorded | {"epochs": config.epochs})
    _LOG.info("extending the run from %d to %d epochs", recorded["epochs"], config.epochs)
