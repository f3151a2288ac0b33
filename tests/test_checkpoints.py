"""Checkpoints are restored bit for bit or not at all."""

import json
import pathlib
import random
import re
import resource
import signal
import time

import forked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

from cnnjax.runtime import files, processes
from cnnjax.train import defaults, loop, results
from cnnjax.train.checkpoints import Checkpoints, NotWritten

pytestmark = pytest.mark.usefixtures("standard_promotion")


def a_state(value: int) -> dict:
    params = {
        "features.0": {
            "kernel": jnp.full((3, 3, 1, 2), value / 3),
            "bias": jnp.full(2, value, jnp.bfloat16),
        }
    }
    return {
        "params": params,
        "opt_state": optax.adam(0.1).init(params),
        "ema": None,
        "batch_stats": {},
        "step": jnp.int32(value),
        "seed": jnp.uint32(2**32 - 1 - value),
    }


def assert_equal(found, want):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_last_ones_and_the_best_come_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/checkpoints", keep=2) as checkpoints:  # a relative path
        assert checkpoints.restore(a_state(0)) is None
        for step in range(1, 7):
            checkpoints.save(
                step,
                a_state(step),
                {"history": [{"loss": 0.1 + step}]},
                best=None if step < 2 else 2,
            )
        # A step that was already saved is not overwritten.
        checkpoints.save(6, a_state(99), {})
        assert checkpoints.steps() == [2, 5, 6]
    with Checkpoints("runs/checkpoints", keep=2) as checkpoints:
        step, state, record = checkpoints.restore(a_state(0))
        assert step == 6 and record == {"history": [{"loss": 6.1}]}
        assert_equal(state, a_state(6))
        assert_equal(checkpoints.restore_step(2, a_state(0))[0], a_state(2))


def test_the_best_is_kept_after_a_resume_until_another_is_better(tmp_path):
    for steps in ((1, 2), (3, 4), (5, 6)):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.restore(a_state(0))
            for step in steps:
                checkpoints.save(step, a_state(step), {}, best=min(step, 2))
    assert checkpoints.steps() == [2, 5, 6]
    with Checkpoints(tmp_path) as checkpoints:
        for step in (7, 8, 9):
            checkpoints.save(step, a_state(step), {}, best=7)
        assert checkpoints.steps() == [7, 8, 9]


def test_the_best_epoch_is_the_first_of_equal_ones(history):
    history.entries[2]["validation_error"] = history.entries[0]["validation_error"]
    assert history.best() is history.entries[0]


def test_a_kill_before_the_manifest_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    """The last one and the best one, also if the new one would replace both."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, a_state(step), {}, best=1)
    with monkeypatch.context() as patch:
        wait = lambda self, step, best: self._manager.wait_until_finished()
        patch.setattr(Checkpoints, "_seal", wait)
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(4, a_state(4), {}, best=4)
    assert (tmp_path / "4").is_dir()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        step, state, _ = checkpoints.restore(a_state(0))
        assert step == 3
        assert_equal(state, a_state(3))
        checkpoints.save(4, a_state(4), {}, best=4)
        assert checkpoints.steps() == [3, 4]


def test_files_of_other_programs_are_no_damage(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {})
    for name in (".DS_Store", "1/.DS_Store", "1/state/._manifest.ocdbt"):
        (tmp_path / name).write_bytes(b"Mac")
    with Checkpoints(tmp_path) as checkpoints:
        step, state, _ = checkpoints.restore(a_state(0))
        assert step == 1
        assert_equal(state, a_state(1))


def test_what_was_saved_may_be_changed_at_once(tmp_path):
    """A state may be donated, and a record changed, as soon as `save` returns."""
    increase = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, record = jnp.zeros((1000, 1000)), {"history": []}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 10):
            x = increase(x)
            checkpoints.save(step, {"x": x}, record)
            record["history"].append({"step": step})
        for step in checkpoints.steps():
            state, restored_record = checkpoints.restore_step(step, {"x": x})
            assert (state["x"] == step).all() and restored_record == {
                "history": [{"step": number} for number in range(1, step)]
            }


def files_of(folder: pathlib.Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, harm):
    """Damages each file in turn: the checkpoint before is restored instead."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, a_state(1), {"epoch": 1})
        checkpoints.save(2, a_state(2), {"epoch": 2})
    names = [name for name in files_of(tmp_path / "2") if (tmp_path / "2" / name).stat().st_size]
    assert len(names) > 5
    for name in names:
        path = tmp_path / "2" / name
        content = path.read_bytes()
        if harm == "flip":
            path.write_bytes(
                content[: len(content) // 2]
                + bytes([content[len(content) // 2] ^ 4])
                + content[len(content) // 2 + 1 :]
            )
        elif harm == "truncate":
            path.write_bytes(content[:-2])
        else:
            path.unlink()
        caplog.clear()
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            step, state, record = checkpoints.restore(a_state(0))
            assert step == 1 and record == {"epoch": 1}, name
            assert_equal(state, a_state(1))
            assert (
                "checkpoint" in caplog.text
                and str(tmp_path / "2") in caplog.text
                and "damaged" in caplog.text
            )
            (aside,) = tmp_path.glob("damaged-2-*")
        (aside / name).write_bytes(content)
        aside.rename(tmp_path / "2")
    # With all files mended, the latest checkpoint is restored.
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(a_state(0))[0] == 2


def test_nothing_starts_again_in_silence(tmp_path):
    """If every checkpoint is damaged, `restore` raises instead of starting anew."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {})
    (tmp_path / "1" / "manifest.json").write_text("{}")
    for _ in range(2):
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(ValueError, match="every checkpoint in .* is damaged"),
        ):
            checkpoints.restore(a_state(0))


def test_a_record_that_is_refused_changes_nothing(tmp_path):
    """It is read before the state, and before a damaged checkpoint is put aside."""
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, a_state(step), {"epoch": step})
    (tmp_path / "2" / "manifest.json").write_text("{}")

    def refuse(record):
        raise ValueError(f"of epoch {record['epoch']}")

    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="of epoch 1"):
            checkpoints.restore({"of": jnp.zeros(3)}, refuse)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
        assert checkpoints.restore(a_state(0), lambda record: None)[0] == 1


def test_a_first_checkpoint_that_was_not_finished_is_none(tmp_path, caplog, monkeypatch):
    """A kill before the manifest is written leaves nothing that could be lost.

    Of several processes, one puts the folder aside while the others wait.
    """
    waits = []

    def wait(point):
        waits.append((point, (tmp_path / "1").exists()))

    monkeypatch.setattr(processes, "wait_for_others", wait)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {})
    (tmp_path / "1" / "manifest.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(a_state(0)) is None
        assert "no checkpoint was ever written to its end" in caplog.text
        assert waits == [
            ("a damaged checkpoint is read", True),
            ("a damaged checkpoint is put aside", False),
        ]
        checkpoints.save(1, a_state(1), {})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(a_state(0))[0] == 1


def test_a_process_that_is_gone_is_told_from_a_full_disk(tmp_path, monkeypatch):
    """jaxlib and tensorstore raise `ValueError` for them."""

    def lose(*arguments, **options):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    def fill(*arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(multihost_utils, "process_allgather", lose)
    wait = lambda *arguments, **options: multihost_utils.assert_equal(np.int32(1))
    for fail, kind, message in (
        (wait, RuntimeError, "Connection reset"),
        (fill, NotWritten, "No space"),
    ):
        with pytest.raises(RuntimeError, match=message) as raised:
            with Checkpoints(tmp_path) as checkpoints:
                monkeypatch.setattr(checkpoints._manager, "save", fail)
                checkpoints.save(1, a_state(1), {})
        assert raised.type is kind


@pytest.mark.slow
def test_another_models_checkpoint_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), {})
        other = a_state(1)
        other["params"]["features.0"]["kernel"] = jnp.zeros((3, 3, 1, 4))
        with pytest.raises(
            ValueError,
            match=r"holds \[3, 3, 1, 2, 'float32'\] for .*kernel.*, "
            r"where \[3, 3, 1, 4, 'float32'\]",
        ):
            checkpoints.restore(other)


@pytest.mark.slow
def test_a_full_disk_is_told_and_harms_nothing(tmp_path, caplog):
    """Simulates a full disk by a limit on file sizes: writes fail in the same way."""
    state = {"x": jax.random.normal(jax.random.key(0), (1000, 1000))}
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = f"could not be written to {tmp_path}.*the earlier ones are whole"

    def save_on_a_full_disk(checkpoints, step):
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
        try:
            checkpoints.save(step, state, {})
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert checkpoints.has_failed()

    with pytest.raises(NotWritten, match=message), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        save_on_a_full_disk(checkpoints, 2)
        # The other checkpoints can still be listed.
        assert checkpoints.steps() == [1]
        # The disk was full for a moment.
        checkpoints.save(3, state, {})
        assert not checkpoints.has_failed() and checkpoints.steps() == [1, 3]
        assert re.search(f"{message}, and that of step 3 is written now", caplog.messages[-1])
        # It is full for longer.
        save_on_a_full_disk(checkpoints, 4)
        save_on_a_full_disk(checkpoints, 5)
    with pytest.raises(FloatingPointError), Checkpoints(tmp_path) as checkpoints:
        save_on_a_full_disk(checkpoints, 4)
        raise FloatingPointError
    assert re.search(message, caplog.messages[-1])
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, _ = checkpoints.restore(state)
        assert step == 3
        assert_equal(restored, state)


def test_of_several_processes_one_that_cannot_write_does_not_try_again(tmp_path, monkeypatch):
    """The others wait for it, or have not failed."""

    def fail(*arguments, **options):
        raise OSError("No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_json", fail)
            checkpoints.save(1, a_state(1), {})
            checkpoints.wait()
            patch.setattr(jax, "process_count", lambda: 2)
            patch.setattr(checkpoints._manager, "save", fail)
            for step in (2, 3):
                with pytest.raises(NotWritten, match="No space left on device"):
                    checkpoints.save(step, a_state(step), {})
        assert checkpoints.steps() == []


@pytest.fixture
def history(tmp_path):
    """Returns the history of three epochs; the first has the smallest error."""
    history = results.History(tmp_path)
    history.entries = [
        {"epoch": step, "step": step, "validation_error": step / 10} for step in (1, 2, 3)
    ]
    return history


@pytest.mark.parametrize("harmed, chosen", [(1, 3), (2, 1)])
def test_the_best_checkpoint_is_used_unless_it_is_damaged(
    history, tmp_path, caplog, harmed, chosen
):
    """Only a damaged best checkpoint matters: the last weights replace it."""
    config = defaults.get_config()
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        for entry in history.entries:
            step = entry["step"]
            checkpoints.save(step, a_state(step), {}, best=1)
    for path in (tmp_path / "checkpoints" / str(harmed)).rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            path.write_bytes(path.read_bytes()[:-2])
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        weights = loop.choose_weights(config, history, checkpoints)
        assert weights["step"] == chosen
        assert_equal(checkpoints.restore_step(chosen, a_state(0))[0], a_state(chosen))
    warning = "the checkpoint of the best epoch is damaged: the last weights are kept"
    assert (warning in caplog.text) == (harmed == 1)
    reasons = {1: "the smallest validation error", 3: "the end of training"}
    assert weights["chosen_by"] == reasons[chosen]


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path):
    generator, reached = random.Random(0), 0
    for _ in range(6):
        writer = forked.Popen("checkpoint_writer", tmp_path)
        assert any(line == "ready\n" for line in writer.stderr)
        time.sleep(generator.uniform(0.05, 0.6))
        writer.send_signal(signal.SIGKILL)
        errors = writer.communicate()[1]
        assert writer.returncode == -signal.SIGKILL, errors
        # A line may be cut off by the end.
        begun = [int(step) for step in re.findall(r"^step (\d+)\n", errors, re.MULTILINE)]
        with Checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore({"x": np.zeros((500, 500), np.float32)})
        # A save begins only after the one before it is complete.
        if begun[1:]:
            assert restored[0] >= begun[-1] - 1 >= reached
        if restored:
            reached, state, record = restored
            assert (state["x"] == reached).all() and record == {"step": reached}
            assert json.loads((tmp_path / str(reached) / "manifest.json").read_text())
    assert reached > 6
