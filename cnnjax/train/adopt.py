"""Continue a run of an earlier version, or of a slightly different configuration."""

import logging
import os
import pathlib
from typing import Any

import ml_collections

from cnnjax import transfer
from cnnjax.models import list_models
from cnnjax.models.base import name_with_file
from cnnjax.runtime import files, processes, workdir
from cnnjax.runtime.paths import sha256
from cnnjax.train import defaults, results
from cnnjax.train.checkpoints import Checkpoints
from cnnjax.train.run import find_network
from cnnjax.train.training import build_run

_LOG = logging.getLogger("cnnjax")
# Keys that change nothing in the steps that a run has taken. `skip_damaged` may only be turned on,
# since a damaged image would have ended the run before.
_EQUIVALENT = {"checkpoint_every_steps", "skip_damaged", "workers"}
# The keys that a run may adopt after it has begun.
_ADOPTED = {"data_dir", "epochs"} | _EQUIVALENT
# Those that name files, which may have moved.
_FILES = {"data_dir", "initial_weights"}


def complete_record(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Brings a run's record up to date, if it is one of this configuration.

    Keys introduced after the run are added, with the values in effect then. A user's network gets
    the path that its file has in this configuration, if it is the same file.

    Args:
      config: the configuration to run. It is changed in place: a key that the record lacks and
        that has its default here gets the earlier value.
      folder: the work directory, which may not exist yet.
    """
    recorded = workdir.read_record(folder, "train")
    if recorded is None:
        return
    missing = {key: value for key, value in defaults.BEFORE.items() if key not in recorded}
    completed = recorded | missing
    present = find_network(recorded, folder).get("model")
    if _is_same_network(present, config.model) or _is_incomplete(present, config.model):
        completed["model"] = config.model
    if completed == recorded:
        return
    current = defaults.get_config()
    for key, value in missing.items():
        if config[key] == current[key]:
            config[key] = value
    # If the configurations differ otherwise, the run will be refused and keeps its record.
    accepted = _ADOPTED | _FILES | {"model"}
    if workdir.differences(completed, config.to_dict()) <= accepted:
        if missing:
            _LOG.info("%s was begun without %s: as before", folder, ", ".join(missing))
        files.write_json(folder / "config.json", completed)


def _is_same_network(name: object, other: object) -> bool:
    """Tells whether two names FILE.py:NAME mean one network, whatever the path of its file."""
    file, _, attribute = str(name).rpartition(":")
    other_file, _, other_attribute = str(other).rpartition(":")
    are_files = os.path.isfile(file) and os.path.isfile(other_file)
    return are_files and os.path.samefile(file, other_file) and attribute == other_attribute


def _is_incomplete(name: object, model: str) -> bool:
    """Tells whether a name is what earlier versions recorded of the network FILE.py:NAME.

    They recorded it without the file, or the file without its folder.
    """
    is_builtin = name in list_models() and name_with_file(str(name)) == name
    return not is_builtin and model.endswith((f".py:{name}", f"/{name}"))


def adopt_changes(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Adopts a configuration under which a run would have reached the same state.

    - A finished run continues for more epochs if its learning rates so far are those of the longer
      run and it can continue from its last checkpoint with the images that are there now;
      extended.json then records the earlier results.
    - A run continues with another `data_dir` if it holds the same training and validation images.
    - A run continues with another path of `initial_weights` to the same contents.
    - A run continues with `skip_damaged`, since a damaged image would have ended it before.
    - A run continues with other `workers` and `checkpoint_every_steps`, which change no result.

    All other differences stay in the record, and are refused later; more epochs are refused here,
    where the reason is known.

    Args:
      config: the configuration to run.
      folder: the work directory, which may not exist yet.

    Raises:
      OtherConfiguration: if a run cannot have more epochs: one that is not finished, or has the
        cosine schedule.
      ValueError: if `data_dir` holds other images, or if a finished run cannot be continued, also
        because it stopped early; its results stay as they are.
    """
    recorded = workdir.read_record(folder, "train")
    if recorded is None:
        return
    recorded = _take_initial_weights(folder, recorded, config)
    recorded = _take_data_dir(folder, recorded, config)
    adopted = recorded | {key: config[key] for key in _equivalent_keys(config)}
    if _has_more_epochs(adopted, config) and workdir.has_started(folder):
        _check_extension(folder, adopted["epochs"], config)
        _add_epochs(folder, adopted, config)
    elif adopted != recorded and not workdir.differences(adopted, config.to_dict()):
        files.write_json(folder / "config.json", adopted)
        changed = sorted(key for key in adopted if adopted[key] != recorded.get(key))
        _LOG.info("%s has %s now", folder, ", ".join(f"{key}={adopted[key]}" for key in changed))


def _take_initial_weights(
    folder: pathlib.Path, recorded: dict, config: ml_collections.ConfigDict
) -> dict:
    """Records the present path of `initial_weights` if it has the contents that the run began with.

    Returns the record. Nothing is written if the configurations differ otherwise, or if neither
    results nor a checkpoint have the contents' SHA-256.
    """
    differences = workdir.differences(recorded, config.to_dict())
    if "initial_weights" not in differences or not differences <= _ADOPTED | _FILES:
        return recorded
    digest = _read_origin(folder, config, "initial_weights_sha256")
    if not digest or not config.initial_weights:
        return recorded
    if sha256(transfer.weights_file(config.initial_weights)) != digest:
        return recorded
    moved = recorded | {"initial_weights": config.initial_weights}
    files.write_json(folder / "config.json", moved)
    _LOG.info(
        "%s continues with initial_weights=%r, which has the same contents",
        folder,
        config.initial_weights,
    )
    return moved


def _take_data_dir(folder: pathlib.Path, recorded: dict, config: ml_collections.ConfigDict) -> dict:
    """Records the present `data_dir` if the run's images have moved there; returns the record.

    Nothing is written if the configurations differ otherwise, or if neither results nor a
    checkpoint can tell which images they were, as in runs of earlier versions. Test images are not
    compared, since no step depends on them.

    Raises:
      ValueError: if these are other images.
    """
    differences = workdir.differences(recorded, config.to_dict())
    if "data_dir" not in differences or not differences <= _ADOPTED:
        return recorded
    images = _read_origin(folder, config, "data") or {}
    if "digest" not in images:
        return recorded
    build_run(config).check_data(images)
    moved = recorded | {"data_dir": config.data_dir}
    files.write_json(folder / "config.json", moved)
    _LOG.info(
        "%s continues with data_dir=%r, which holds the same training and validation images",
        folder,
        config.data_dir,
    )
    return moved


def _read_origin(folder: pathlib.Path, config: ml_collections.ConfigDict, key: str) -> Any:
    """Reads what the results, or else the last whole checkpoint, say under a key, such as "data".

    Returns None if neither says anything.
    """
    # The checkpoints of a finished run may have been removed.
    path = folder / "results.json"
    if path.exists():
        recorded = files.read_json(path).get(key)
        if recorded:
            return recorded
    if not (folder / "checkpoints").is_dir():
        return None
    with Checkpoints(folder / "checkpoints", config.keep_checkpoints) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            return None
        return checkpoints.record(steps[-1]).get(key)


def is_equivalent(config: ml_collections.ConfigDict, folder: pathlib.Path) -> bool:
    """Tells whether a run differs only in keys that change nothing in the steps it has taken."""
    recorded = workdir.read_record(folder, "train")
    return recorded is not None and workdir.differences(
        recorded, config.to_dict()
    ) <= _equivalent_keys(config)


def may_have_moved(config: ml_collections.ConfigDict, folder: pathlib.Path) -> bool:
    """Tells whether a run differs from this configuration only in where its files are.

    Whether they have the same contents is for `adopt_changes` to find out.
    """
    recorded = workdir.read_record(folder, "train")
    if recorded is None:
        return False
    differences = workdir.differences(recorded, config.to_dict())
    return differences <= _FILES | _equivalent_keys(config)


def _equivalent_keys(config: ml_collections.ConfigDict) -> set[str]:
    return _EQUIVALENT if config.skip_damaged else _EQUIVALENT - {"skip_damaged"}


def _has_more_epochs(recorded: dict, config: ml_collections.ConfigDict) -> bool:
    """Tells whether a run has more epochs, and differs in nothing else."""
    return (
        workdir.differences(recorded, config.to_dict()) == {"epochs"}
        and recorded["epochs"] < config.epochs
    )


def _check_extension(folder: pathlib.Path, epochs: int, config: ml_collections.ConfigDict) -> None:
    """Raises `OtherConfiguration` if a run cannot have more than its `epochs`."""
    refusal = (
        f"workdir={str(folder)!r} holds a run of another configuration (epochs={epochs} there, "
        f"{config.epochs} now); "
    )
    # Cosine's rates depend on the number of epochs.
    if config.schedule.name == "cosine":
        raise workdir.OtherConfiguration(
            f"{refusal}a run with the cosine schedule cannot be extended; choose another --workdir"
        )
    if not _was_finished(folder):
        raise workdir.OtherConfiguration(
            f"{refusal}finish it with epochs={epochs} first, or choose another --workdir"
        )


def _was_finished(folder: pathlib.Path) -> bool:
    # An interrupted extension has left the second file.
    return (folder / "results.json").exists() or (folder / results.EXTENDED).exists()


def _add_epochs(folder: pathlib.Path, recorded: dict, config: ml_collections.ConfigDict) -> None:
    """Turns a finished run into an unfinished one of more epochs.

    If this is interrupted between two files, the next call completes it.

    Raises:
      ValueError: if the run cannot continue; nothing is changed then.
    """
    path = folder / "results.json"
    if path.exists():
        workdir.check_seal(folder)
        finished = files.read_json(path)
        history = finished["history"]
        if results.stops_early(config.early_stopping, history):
            raise ValueError(
                f"epochs={config.epochs}: early_stopping={config.early_stopping} ended the run "
                f"after epoch {len(history)} of {recorded['epochs']}, and it would take no further "
                "step; train with another early_stopping in another folder"
            )
        last = folder / "checkpoints" / str(history[-1]["step"])
        if not last.is_dir():
            raise ValueError(
                f"epochs={config.epochs}: there is no {last}, from which the run of "
                f"{recorded['epochs']} epochs could continue; put it back, or train in another "
                "folder"
            )
        _check_can_continue(folder, config)
        if not processes.writes():
            return
        earlier = [*finished.get("extended_from", []), finished["final"]]
        # First of all, since the hashes include extended.json, which changes next.
        workdir.unseal(folder)
        files.write_json(folder / results.EXTENDED, earlier)
        path.unlink()
    files.write_json(folder / "config.json", recorded | {"epochs": config.epochs})
    _LOG.info("extending the run from %d to %d epochs", recorded["epochs"], config.epochs)


def _check_can_continue(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that a run can continue with the present data and devices. Raises `ValueError`."""
    training = build_run(config)
    with Checkpoints(folder / "checkpoints", config.keep_checkpoints) as checkpoints:
        # `Checkpoints.restore` would rename those that are damaged.
        steps = checkpoints.steps()
        if not steps:
            raise ValueError(
                f"epochs={config.epochs}: {folder} has no whole checkpoint from which the run "
                "could continue; train in another folder"
            )
        training.check_data(checkpoints.record(steps[-1]).get("data", {}))
        checkpoints.restore_step(steps[-1], training.state_shapes())
