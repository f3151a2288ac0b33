"""The overfitting experiment: each network must learn one batch by heart."""

import functools
import json

import pytest

from cnnjax.data import arrays
from experiments import overfit


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_batch_is_learned_by_heart_or_the_network_is_named(
    data_dir, tmp_path, monkeypatch, capsys
):
    # The data set is read once for both calls.
    monkeypatch.setattr(arrays, "load", functools.cache(arrays.load))
    arguments = ["--data_dir", str(data_dir), "--models", "tutorial_net", "--workdir"]
    assert overfit.main([*arguments, str(tmp_path / "learned")]) == 0
    (result,) = json.loads((tmp_path / "learned" / "overfit.json").read_text())
    assert result["loss"] < overfit.GOAL and result["error"] == 0
    assert "| tutorial_net | 32 |" in (tmp_path / "learned" / "report.md").read_text()

    monkeypatch.setattr(overfit, "_STEPS", 2)
    assert overfit.main([*arguments, str(tmp_path / "stopped")]) == 1
    assert "error: tutorial_net: the loss is " in capsys.readouterr().err
