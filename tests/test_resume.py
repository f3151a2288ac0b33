"""Runs whose validation failed, that stopped early, or that earlier versions left unreported."""

import itertools
import json
import os
import pathlib
import re
import signal
import types

import pytest

from cnnjax.data import arrays
from cnnjax.runtime import claims, files, workdir
from cnnjax.train import data as training_data
from cnnjax.train import defaults, loop, report
from cnnjax.train.adopt import adopt_changes
from cnnjax.train.run import open_run
from cnnjax.train.training import Training

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Ten steps an epoch of a linear network on digits.
QUICK = {"model": "mlp1", "n_validation": 100, "parallel": "jit"}


def configure(**changes):
    config = defaults.get_config()
    config.update_from_flattened_dict({**QUICK, **changes})
    return config


def train(folder: pathlib.Path, **changes) -> dict:
    """Trains in this process, without a report; returns results.json."""
    config = configure(**changes)
    loop.check(config)
    loop.train(config, workdir.prepare(folder, config.to_dict()))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_a_failed_validation_costs_no_step(monkeypatch, tmp_path, caplog):
    """The epoch is validated by the next start, also for the schedule, early stop and best epoch.

    The first epoch, whose validation fails twice, stays the best one; the last one fails, too.
    """
    changes = {
        "epochs": 9,
        "early_stopping": 3,
        "schedule.name": "plateau",
        "schedule.patience": 1,
        "checkpoint_every_steps": 7,
    }
    score = Training.score
    failures = {}

    def rising(self, state, split, views=1):
        step = int(state.step)
        if split == "validation" and failures.get(step):
            failures[step] -= 1
            raise ValueError(f"a damaged image at step {step}")
        scored = score(self, state, split, views)
        if split == "validation":
            scored.scores["error"] = step / 1000
        return scored

    monkeypatch.setattr(Training, "score", rising)
    with caplog.at_level("INFO", "cnnjax"):
        whole = train(tmp_path / "whole", **changes)
    assert "training stops early, after epoch 4 of 9" in caplog.text

    advance = training_data.Resident.advance
    steps = []

    def noting(self, **given):
        state, steps_done = advance(self, **given)
        steps.extend(range(given["steps"].start, steps_done))
        return state, steps_done

    monkeypatch.setattr(training_data.Resident, "advance", noting)
    failures.update({10: 2, 40: 1})
    for step in (10, 10, 40):
        with pytest.raises(ValueError, match=f"a damaged image at step {step}"):
            train(tmp_path / "failing", **changes)
    failing = train(tmp_path / "failing", **changes)
    assert steps == list(range(40))
    for key in ("history", "final", "weights"):
        assert failing[key] == whole[key]
    assert whole["weights"]["epoch"] == 1 and len(whole["history"]) == 4
    rates = [entry["learning_rate"] for entry in whole["history"]]
    assert rates[0] > rates[-1]
    weights = [tmp_path / name / "weights.safetensors" for name in ("whole", "failing")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_disk_that_was_full_for_a_moment_costs_no_step(monkeypatch, tmp_path, caplog):
    """The end of the epoch writes a checkpoint, though none is due; the last one is repeated.

    A run that is stopped meanwhile saves, too.
    """
    has_failed = loop.Checkpoints.has_failed
    write_json = files.write_json
    full = [8, 22]
    signals = []

    def wait_and_look(self):
        self.wait()
        return has_failed(self)

    def fail_once(path, value):
        if path.parent.name in map(str, full):
            full.remove(int(path.parent.name))
            for number in signals:
                os.kill(os.getpid(), number)
            raise OSError("No space left on device")
        write_json(path, value)

    monkeypatch.setattr(loop.Checkpoints, "has_failed", wait_and_look)
    monkeypatch.setattr(files, "write_json", fail_once)
    train(tmp_path, epochs=2, n_validation=0, checkpoint_every_steps=8)
    pattern = r"a checkpoint .*: No space left on device; .*, and that of step (\d+) is written now"
    matches = [re.fullmatch(pattern, text) for text in caplog.messages]
    assert [match[1] for match in matches if match] == ["11", "22"]
    with loop.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [16, 22]

    full.append(8)
    signals.append(signal.SIGTERM)
    with pytest.raises(workdir.Interrupted, match="SIGTERM after step") as stop:
        train(tmp_path / "stopped", epochs=2, n_validation=0, checkpoint_every_steps=8)
    with loop.Checkpoints(tmp_path / "stopped" / "checkpoints") as checkpoints:
        assert f"after step {checkpoints.steps()[-1]} of 22, which is saved" in str(stop.value)
    assert not full


@pytest.mark.slow
def test_a_run_that_lost_its_claim_writes_nothing_more(tmp_path):
    train(tmp_path, epochs=1)
    # Only the results remain to be written.
    for name in ("results.json", "weights.safetensors"):
        (tmp_path / name).unlink()
    for folder in (tmp_path, tmp_path / "new"):
        with claims.claim(folder):
            # A hard link, which is replaced.
            (folder / "run.claim").unlink()
            (folder / "run.claim").write_text("another's")
            with pytest.raises(claims.Lost):
                train(folder, epochs=1)
    assert not (tmp_path / "weights.safetensors").exists()
    assert not list((tmp_path / "new" / "checkpoints").iterdir())


@pytest.mark.slow
def test_another_class_is_named_before_the_state_is_read(tmp_path):
    """Also if the run is to be extended."""
    digits = arrays.load("digits[:200]")

    def write(count):
        parts = [part._replace(labels=part.labels % count) for part in (digits.train, digits.test)]
        names = ("a", "b", "c")[:count]
        arrays.save(arrays.Dataset(parts[0], None, parts[1], names), tmp_path / "own.npz")

    changes = {"dataset": str(tmp_path / "own.npz"), "n_validation": 0}
    write(2)
    folder = tmp_path / "run"
    train(folder, epochs=1, **changes)
    write(3)
    message = "have changed since the run began .missing classes: none; additional: c"
    with pytest.raises(ValueError, match=message):
        train(folder, epochs=1, **changes)
    with pytest.raises(ValueError, match=message):
        adopt_changes(configure(epochs=2, **changes), folder)


def test_a_run_that_stopped_early_is_not_extended(tmp_path):
    config = configure(epochs=9, early_stopping=2)
    files.write_json(tmp_path / "config.json", config.to_dict())
    errors = [0.1, 0.2, 0.3]
    history = [
        {"epoch": epoch, "step": 10 * epoch, "validation_error": error}
        for epoch, error in enumerate(errors, 1)
    ]
    files.write_json(tmp_path / "results.json", {"history": history, "final": history[-1]})
    before = (tmp_path / "results.json").read_bytes()
    config.epochs = 12
    message = "epochs=12: early_stopping=2 ended the run after epoch 3 of 9, and it would take no "
    with pytest.raises(ValueError, match=f"^{message}"):
        adopt_changes(config, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
    # A run that did not stop early gets as far as its checkpoints.
    history[-1]["validation_error"] = 0.05
    files.write_json(tmp_path / "results.json", {"history": history, "final": history[-1]})
    with pytest.raises(ValueError, match="^epochs=12: there is no .*/checkpoints/30"):
        adopt_changes(config, tmp_path)


@pytest.mark.slow
def test_a_line_a_minute_tells_that_an_epoch_goes_on(monkeypatch, tmp_path, caplog):
    # A minute passes between two looks at the clock, of which there are several in a step.
    clock = types.SimpleNamespace(monotonic=itertools.count(0, 60).__next__)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop.Checkpoints, "save", lambda *arguments: None)
    with caplog.at_level("INFO", "cnnjax"):
        train(tmp_path, epochs=2, checkpoint_every_steps=1)
    pattern = r"epoch (\d)/2: step (\d+) of 10, \d+ img/s, \d:\d\d:00 left"
    lines = [match.groups() for line in caplog.messages if (match := re.fullmatch(pattern, line))]
    # The first step of each epoch begins the measurement.
    expected = itertools.product((1, 2), range(2, 11))
    assert [(int(epoch), int(step)) for epoch, step in lines] == list(expected)


def test_the_pace_is_that_since_the_last_line(monkeypatch, caplog):
    clock = types.SimpleNamespace(seconds=0.0, monotonic=lambda: clock.seconds)
    monkeypatch.setattr(loop, "time", clock)
    training = types.SimpleNamespace(
        config=configure(epochs=3, batch_size=8), steps_per_epoch=100, rates=[0.1] * 300
    )
    with caplog.at_level("INFO", "cnnjax"):
        pace = loop._Pace(training, 101)
        for clock.seconds, steps_done in ((59.0, 105), (80.0, 111), (139.0, 180), (140.0, 200)):
            pace.log(steps_done)
    # Ten steps of 8 images in 80 s, then 89 in 60 s.
    assert caplog.messages == [
        "epoch 2/3: step 11 of 100, 1 img/s, 0:25:12 left",
        "epoch 2/3: step 100 of 100, 12 img/s, 0:01:07 left",
    ]


@pytest.mark.slow
def test_a_run_whose_classes_are_numbers_is_reported(tmp_path):
    digits = arrays.load("digits[:200]")
    labels = [part._replace(labels=part.labels % 3) for part in (digits.train, digits.test)]
    arrays.save(arrays.Dataset(labels[0], None, labels[1], (0, 1, 2)), tmp_path / "own.npz")
    folder = tmp_path / "run"
    config = configure(dataset=str(tmp_path / "own.npz"), epochs=1, n_validation=0)
    loop.run(config, workdir.prepare(folder, config.to_dict()))
    text = (folder / "report.md").read_text()
    assert "numbers stand for classes" not in text
    results = json.loads((folder / "results.json").read_text())
    assert results["classes"] == ["0", "1", "2"]
    # Runs of earlier versions were left without a report.
    files.write_json(folder / "results.json", results | {"classes": [0, 1, 2]})
    (folder / "report.md").unlink()
    report.write(folder)
    assert (folder / "report.md").read_text() == text
    assert open_run(folder).classes == ("0", "1", "2")
