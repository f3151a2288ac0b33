"""Training from a configuration, to be read downwards.

Data, state, steps, evaluation, checkpoint, report. A run continues where an earlier one in its work
directory stopped, bit for bit.
"""

import contextlib
import dataclasses
import datetime
import logging
import pathlib
import signal
import time
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np

from cnnjax.runtime import claims, files, processes, signals, workdir
from cnnjax.train import report, results, schedules, step
from cnnjax.train.adopt import (
    adopt_changes,
    complete_record,
    is_equivalent,
    may_have_moved,
)
from cnnjax.train.check import check
from cnnjax.train.checkpoints import Checkpoints, NotWritten
from cnnjax.train.data import DatasetTooLarge, is_exhausted
from cnnjax.train.run import warn_if_edited
from cnnjax.train.schedules import Plateau
from cnnjax.train.training import Training, build_run

# `cnnjax.main` and `cnnjax.sweep` call these: they make this module a job.
__all__ = [
    "adopt",
    "check",
    "complete_record",
    "is_equivalent",
    "may_have_moved",
    "report",
    "run",
]

_LOG = logging.getLogger("cnnjax")
# Lines within an epoch.
_SECONDS_BETWEEN_LINES = 60.0


def adopt(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Adopts a changed configuration; failures are explained as in `run`."""
    with processes.writer_last("the record is read"):
        complete_record(config, folder)
    processes.wait_for_others("the record is complete")
    with _explain_failures(config, folder):
        adopt_changes(config, folder)


def run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Trains, scores the test set once, and writes the results and the report.

    Raises:
      workdir.Interrupted: if it was stopped; the state is saved.
      FloatingPointError: if the loss, a parameter or a score is not finite.
      MemoryError: if a batch or the data set does not fit.
      NotWritten: if a checkpoint could not be written, nor the next one.
      claims.Lost: if another process has taken the folder over.
      RuntimeError: if another process is gone.
    """
    with _explain_failures(config, folder):
        train(config, folder)
        if processes.writes():
            report.write(folder)


def train(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Does what `run` does, without the report."""
    began = time.monotonic()

    # -------------------------------------------------------------- data, network, training step
    training = build_run(config)
    parallel = training.parallel
    per_epoch = training.steps_per_epoch
    every = config.checkpoint_every_steps
    total = len(training.rates)
    history = results.History(folder)
    schedule = schedules.settings(config.schedule)
    plateau = Plateau.of(schedule) if schedule["name"] == "plateau" else None

    with (
        _collect_signals() as received,
        _explain_lost_peers(),
        Checkpoints(folder / "checkpoints", config.keep_checkpoints) as checkpoints,
    ):
        # ---------------------------------------------------------- state: new, or the last saved
        state_shapes = training.state_shapes()
        epoch_seconds = 0.0
        # Of the starts before this one, up to the checkpoint.
        earlier_seconds = 0.0
        steps_done = 0

        # Before the state is compared, in which another number of classes would show as well.
        def check_record(record: dict) -> None:
            training.check_data(record.get("data", {}))

        if restored := checkpoints.restore(state_shapes, check_record):
            steps_done, state, record = restored
            warn_if_edited(config.model, record.get("network_sha256"))
            initial_sha256 = record.get("initial_weights_sha256")
            _LOG.info("resuming from step %d of %d", steps_done, total)
            history.restore(record["history"], record["seconds"])
            if plateau:
                plateau.restore(record["plateau"])
            # The count is that of all processes; None if `skip_damaged` was not set then.
            if training.data.damaged is not None and jax.process_index() == 0:
                training.data.damaged = record["damaged"] or 0
            epoch_seconds = record.get("epoch_seconds", 0.0)
            # Checkpoints of earlier versions have the seconds of whole epochs only.
            earlier_seconds = record.get("run_seconds", record["seconds"])
        else:
            state = training.initial_state()
            initial_sha256 = training.digest_initial_weights()
        # What the weights come from besides the configuration, for checkpoints and results.
        origin = {
            "data": training.data_record(),
            "network_sha256": training.network_sha256,
            "initial_weights_sha256": initial_sha256,
        }
        _check_processes(training, origin)
        state = parallel.replicate(state)
        rates = _current_rates(training, plateau)
        constants = parallel.replicate(step.Constants(moments=training.data.moments, rates=rates))
        epoch_began = time.monotonic() - epoch_seconds
        stop_signal = 0
        pace: _Pace | None = None
        if steps_done < total:
            # On a GPU's machine, JAX without its support for GPUs computes on the CPU.
            device = jax.devices()[0].device_kind
            _LOG.info("compiling the training step for %d x %s", parallel.size, device)

        def save(epoch_seconds: float) -> None:
            """Saves the state and what has been measured so far."""
            claims.check_held(folder)
            record = {
                "history": history.entries,
                "plateau": plateau.state() if plateau else None,
                "seconds": history.seconds,
                "epoch_seconds": epoch_seconds,
                "run_seconds": earlier_seconds + time.monotonic() - began,
                "damaged": _sum_damaged(training),
                **origin,
            }
            best = history.best()
            best_step = None if best is None else best["step"]
            checkpoints.save(steps_done, parallel.fetch(state), record, best_step)

        while not _is_trained(config, history):
            # ------------------------------------------------------ steps
            epoch_end = (len(history.entries) + 1) * per_epoch
            # None are left if the run was saved because the validation of this epoch failed.
            if steps_done < epoch_end:
                # Up to the end of the epoch or to the next checkpoint; one call may take fewer.
                next_checkpoint = (steps_done // every + 1) * every
                state, steps_done = training.data.advance(
                    recipe=training.recipe,
                    numbers=training.numbers,
                    constants=constants,
                    state=state,
                    steps=range(steps_done, min(epoch_end, next_checkpoint)),
                )
                _check_finite(training, state, steps_done, rates, checkpoints)
                # The first call compiles, and starts the workers.
                if pace is None:
                    pace = _Pace(training, steps_done)
                pace.log(steps_done)

            # ------------------------------------------------------ evaluation
            is_best = False
            if steps_done == epoch_end:
                seconds = time.monotonic() - epoch_began
                try:
                    entry = _evaluate_epoch(training, state, steps_done, rates)
                except Exception:
                    # The next start validates this epoch again. Several processes could only save
                    # together, and perhaps not all have failed.
                    if jax.process_count() == 1:
                        save(seconds)
                    raise
                history.append(entry, seconds)
                if training.data.damaged is not None:
                    # The entry has the epoch's count.
                    training.data.damaged = 0
                _log_epoch(training, history, seconds)
                if plateau:
                    metrics = entry | {"validation_accuracy": 1 - entry["validation_error"]}
                    plateau.update(metrics[f"validation_{schedule['metric']}"])
                    rates = _current_rates(training, plateau)
                    constants = dataclasses.replace(constants, rates=parallel.replicate(rates))
                is_best = history.best() is entry
                epoch_began = time.monotonic()
                pace = None

            # ------------------------------------------------------ checkpoint
            # A signal may reach one process only: all must stop after the same step.
            own_signal = received[0] if received else 0
            stop_signal = max(parallel.gather(own_signal))
            # Likewise, only one of them may know that the last checkpoint failed.
            has_failed = any(parallel.gather(int(checkpoints.has_failed())))
            is_due = steps_done % every == 0 or has_failed
            if is_due or is_best or _is_trained(config, history) or stop_signal:
                save(time.monotonic() - epoch_began)
            if stop_signal:
                break

        # The last checkpoint is tried again at once. Several processes could only do so together.
        if jax.process_count() == 1:
            checkpoints.wait()
            if checkpoints.has_failed():
                save(time.monotonic() - epoch_began)

        # ---------------------------------------------------------- the weights to keep
        # A stopped run has no weights to choose yet.
        if not stop_signal:
            _log_early_stop(config, history)
            chosen = choose_weights(config, history, checkpoints)
            if chosen["step"] != steps_done:
                state, _ = checkpoints.restore_step(chosen["step"], state_shapes)
                state = parallel.replicate(state)
    # A signal may have come while the last checkpoint was written.
    if not stop_signal and received:
        stop_signal = received[0]
    if stop_signal:
        raise workdir.Interrupted(
            f"stopped by {signal.Signals(stop_signal).name} after step {steps_done} of {total}, "
            "which is saved; run the same command again to continue from there"
        )

    # -------------------------------------------------------------- final evaluation
    tested = training.score(state, "test", config.test_views)
    trained = training.score(state, "train")
    assert tested is not None
    entry = history.entries[chosen["epoch"] - 1]
    final = results.final_scores(entry, history.entries[-1], trained, tested)
    errors = (100 * final["train_error"], 100 * final["test_error"])
    _LOG.info("final: train error %.2f %%, test error %.2f %%", *errors)

    # -------------------------------------------------------------- results
    state = parallel.fetch(state)
    if not processes.writes():
        return
    claims.check_held(folder)
    results.write_weights(folder, state)
    results.write_predictions(folder, training, tested)
    results.write_results(
        folder,
        training=training,
        origin=origin,
        state=state,
        history=history,
        final=final,
        chosen=chosen,
        tested=tested,
        seconds=earlier_seconds + time.monotonic() - began,
    )


# ------------------------------------------------------------------ several processes


def _check_processes(training: Training, origin: dict) -> None:
    """Checks that all processes that compute together train the same.

    Raises:
      ValueError: if their configuration, images, network or initial weights differ.
    """
    digest = files.digest({"config": training.config.to_dict(), **origin})
    # 28 bits, which fit into an int32.
    digests = training.parallel.gather(int(digest[:7], 16))
    for process, other in enumerate(digests):
        if other != digests[0]:
            raise ValueError(
                f"process {process} of {len(digests)} has another configuration, images, network "
                "or initial weights than process 0; start all with the same command and files"
            )


# ------------------------------------------------------------------ parts of an epoch


def _current_rates(training: Training, plateau: Plateau | None) -> np.ndarray:
    """Returns the learning rate of each step, as the schedule "plateau" has it so far."""
    return training.rates * np.float32(plateau.scale if plateau else 1.0)


def _evaluate_epoch(
    training: Training, state: step.State, steps_done: int, rates: np.ndarray
) -> dict:
    """Builds the record of an epoch: means while training, and validation scores."""
    sums = {name: float(value) for name, value in training.parallel.fetch(state.totals).items()}
    entry = {
        "epoch": steps_done // training.steps_per_epoch,
        "step": steps_done,
        "learning_rate": float(rates[steps_done - 1]),
        "train_loss": sums["loss"] / sums["count"],
        "train_error": sums["errors"] / sums["count"],
    }
    damaged = _sum_damaged(training)
    if damaged is not None:
        entry["damaged"] = damaged
    validated = training.score(state, "validation")
    if validated:
        values = training.parallel.from_first_process(list(validated.scores.values()))
        entry |= {f"validation_{name}": value for name, value in zip(validated.scores, values)}
    return entry


def _sum_damaged(training: Training) -> int | None:
    """Counts the epoch's damaged images of all processes; None if none are passed over."""
    if training.data.damaged is None:
        return None
    return sum(training.parallel.gather(training.data.damaged))


def _log_epoch(training: Training, history: results.History, seconds: float) -> None:
    entry = history.entries[-1]
    remaining_epochs = training.config.epochs - entry["epoch"]
    # The mean includes compiling, and the last epoch may have been slowed by other work.
    seconds_per_epoch = min(history.seconds / entry["epoch"], seconds)
    remaining_seconds = seconds_per_epoch * remaining_epochs
    errors = [
        f"{name.replace('_', ' ')} {100 * value:.2f} %"
        for name, value in entry.items()
        if name.endswith("_error")
    ]
    if entry.get("damaged"):
        noun = "image" if entry["damaged"] == 1 else "images"
        errors.append(f"{entry['damaged']} damaged {noun} passed over")
    images = training.steps_per_epoch * training.config.batch_size
    _LOG.info(
        "epoch %d/%d: train loss %.4f, %s, rate %.3g, %s img/s, %s left",
        entry["epoch"],
        training.config.epochs,
        entry["train_loss"],
        ", ".join(errors),
        entry["learning_rate"],
        f"{images / seconds:,.0f}",
        datetime.timedelta(seconds=round(remaining_seconds)),
    )


class _Pace:
    """Measures and logs how fast an epoch's steps are taken."""

    def __init__(self, training: Training, steps_done: int):
        self._training = training
        self._restart(steps_done)

    def _restart(self, steps_done: int) -> None:
        self._first_step = steps_done
        self._began = time.monotonic()

    def log(self, steps_done: int) -> None:
        """Logs a line if the last one is a minute old."""
        seconds = time.monotonic() - self._began
        steps = steps_done - self._first_step
        if seconds < _SECONDS_BETWEEN_LINES or not steps:
            return
        per_epoch = self._training.steps_per_epoch
        config = self._training.config
        # Without validation, whose time is not known in the first epoch.
        remaining_seconds = seconds / steps * (len(self._training.rates) - steps_done)
        _LOG.info(
            "epoch %d/%d: step %d of %d, %s img/s, %s left",
            (steps_done - 1) // per_epoch + 1,
            config.epochs,
            (steps_done - 1) % per_epoch + 1,
            per_epoch,
            f"{steps * config.batch_size / seconds:,.0f}",
            datetime.timedelta(seconds=round(remaining_seconds)),
        )
        self._restart(steps_done)


def _is_trained(config: ml_collections.ConfigDict, history: results.History) -> bool:
    """Tells whether all epochs are trained and validated, or training has stopped early."""
    stops_early = results.stops_early(config.early_stopping, history.entries)
    return stops_early or len(history.entries) >= config.epochs


def _log_early_stop(config: ml_collections.ConfigDict, history: results.History) -> None:
    last = len(history.entries)
    if last < config.epochs:
        _LOG.info(
            "training stops early, after epoch %d of %d: the validation error has not fallen for "
            "%d epochs (early_stopping)",
            last,
            config.epochs,
            config.early_stopping,
        )


def choose_weights(
    config: ml_collections.ConfigDict, history: results.History, checkpoints: Checkpoints
) -> dict:
    """Chooses the epoch whose weights are kept: the best on validation, or the last."""
    last = history.entries[-1]
    best = history.best()
    chosen = last
    reason = "the end of training"
    if config.final_weights == "best" and best is not None:
        if best is last or best["step"] in checkpoints.steps():
            chosen = best
            reason = "the smallest validation error"
        else:
            _LOG.warning("the checkpoint of the best epoch is damaged: the last weights are kept")
    _LOG.info("weights of epoch %d of %d are kept", chosen["epoch"], last["epoch"])
    return {"epoch": chosen["epoch"], "step": chosen["step"], "chosen_by": reason}


def _check_finite(
    training: Training,
    state: step.State,
    steps_done: int,
    rates: np.ndarray,
    checkpoints: Checkpoints,
) -> None:
    """Raises `FloatingPointError` for a loss or a parameter that is not finite."""
    bad_step = int(training.parallel.fetch(state.bad_step))
    problem = f"the loss is not finite at step {bad_step}"
    if bad_step < 0:
        if training.parallel.fetch(step.finiteness(training.parallel)(state)):
            return
        bad_step = steps_done - 1
        problem = f"a parameter is not finite after step {steps_done}"
    advice = "there is no checkpoint yet"
    if saved := checkpoints.steps():
        advice = f"the last checkpoint is that of step {saved[-1]}, in {checkpoints.folder}"
    raise FloatingPointError(
        f"{problem} (learning rate {rates[bad_step]:g}); {advice}; lower schedule.learning_rate"
    )


# ------------------------------------------------------------------ signals and failures


@contextlib.contextmanager
def _collect_signals() -> Iterator[list[int]]:
    """Yields a list to which the first signal to stop appends its number."""
    received: list[int] = []

    def on_first(number: int) -> None:
        received.append(number)
        name = signal.Signals(number).name
        _LOG.info("%s: saving after this step or validation; Ctrl-C to stop at once", name)

    # Nothing is raised in the middle of a step: the loop looks at the list between calls.
    with signals.catch_stop_signals(lambda number, frame: None, on_first):
        yield received


@contextlib.contextmanager
def _explain_lost_peers() -> Iterator[None]:
    """Turns a failure in one of several processes into one that says how to continue."""
    try:
        yield
    except RuntimeError as error:
        # A full disk or memory or a lost claim is no sign that a process is gone.
        is_own = isinstance(error, (NotWritten, claims.Lost)) or is_exhausted(error)
        if jax.process_count() == 1 or is_own:
            raise
        first = str(error).partition("\n")[0]
        raise RuntimeError(
            f"process {jax.process_index()} of {jax.process_count()} cannot continue, most "
            f"likely because another has died ({first}); start all of them again, and the run "
            "continues from its last checkpoint"
        ) from error


@contextlib.contextmanager
def _explain_failures(config: ml_collections.ConfigDict, folder: pathlib.Path) -> Iterator[None]:
    """Turns an interruption or a failure of the machine into one that says what helps."""
    try:
        yield
    except KeyboardInterrupt as stop:
        # It came before or after the steps, where `_collect_signals` is not active.
        raise workdir.Interrupted(
            "stopped; run the same command again to continue from the last checkpoint"
        ) from stop
    except DatasetTooLarge:
        raise
    except (RuntimeError, MemoryError) as error:
        first = str(error).partition("\n")[0]
        if is_exhausted(error):
            advice = (
                f"lower it, or raise accumulate={config.accumulate}, the parts that a batch is "
                "computed in"
            )
            # A run that has started is bound to its configuration.
            if workdir.has_started(folder):
                advice += ", in another --workdir; this one continues only with its own settings"
            raise MemoryError(
                f"batch_size={config.batch_size} does not fit into memory ({first}); {advice}"
            ) from error
        # grain's message.
        if "Worker process was terminated" in first:
            raise RuntimeError(
                f"one of workers={config.workers} processes that decode images was killed, as "
                "systems do when memory or /dev/shm runs out; run the same command again to "
                "continue from the last checkpoint, with --config.workers=0 if it happens again"
            ) from error
        raise
