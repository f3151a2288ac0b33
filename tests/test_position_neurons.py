"""Padding-aware channels: the statistic, hand-made channels, and the report."""

import argparse
import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import scipy.stats

from cnnjax import weights
from cnnjax.data import photographs
from cnnjax.models import base
from cnnjax.nn import Conv, conv
from cnnjax.position import patterns
from experiments import position_neurons as study


class Small(base.Network):
    """Two stages of random channels, at strides 2 and 4."""

    @nn.nowrap
    def walk(self, x, train):
        layer = functools.partial(Conv, 8, 3, stride=2, padding=1, fill=self.padding)
        x = nn.relu(layer(name="a")(x))
        yield "a", x
        x = nn.relu(layer(name="b")(x))
        yield "b", x
        yield "logits", x.mean((1, 2))


def noise(shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32) + 1


@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_the_statistic_is_scipy_s_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    sample = np.sort(rng.integers(0, levels, 40))
    for reference in (
        np.sort(rng.integers(0, levels, 170)),
        np.sort(rng.integers(0, 2 * levels, 170)),
    ):
        expected = scipy.stats.ks_2samp(sample, reference).statistic
        assert study.distance(sample, reference) == pytest.approx(expected, abs=1e-12)
    assert study.distance(sample, sample + levels) == 1
    assert study.distance(sample, sample) == 0


@pytest.mark.parametrize("padding", ["zeros", "none", "circular"])
def test_a_channel_that_reads_beyond_the_border_is_found_under_zeros_alone(padding):
    """Three channels copy the pixel at the window's center, left of it, and below it."""
    kernel = np.zeros((3, 3, 1, 3), np.float32)
    kernel[1, 1, 0, 0] = 1
    kernel[1, 0, 0, 1] = 1
    kernel[2, 1, 0, 2] = 1
    maps = np.asarray(conv(noise((20, 24, 24, 1)), kernel, padding=1, fill=padding))
    statistic = study.border_statistic(maps)
    assert statistic[0] < 0.15
    if padding == "zeros":
        # All pixels are above 1, and beyond the border there are zeros.
        assert statistic[1:].tolist() == [1, 1]
    else:
        assert max(statistic[1:]) < 0.15


def test_all_four_sides_count_and_the_corners_do_not():
    for side in ((0, slice(None)), (-1, slice(None)), (slice(None), 0), (slice(None), -1)):
        maps = noise((6, 16, 16, 1))
        maps[:, *side] += 5
        assert study.border_statistic(maps)[0] == 1
    maps = noise((6, 16, 16, 1))
    maps[:, :3, :3] += 5
    assert study.border_statistic(maps)[0] < 0.3


def test_h_is_read_where_a_channel_shows_it():
    maps = noise((16, 12, 12, 2))
    assert study.read_position(maps) < 0.2
    maps[..., 1] += 10 * np.linspace(0, 1, 12, dtype=np.float32)
    assert study.read_position(maps) > 0.8


def test_features_without_a_border_have_few_aware_channels_and_zeros_have_many():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 1, 200)).astype(np.float32)
    image = noise((40, 26, 26, 1), seed=1)
    borderless = np.asarray(conv(image, kernel))
    cut = image[:, 1:-1, 1:-1]
    padded = {
        fill: np.asarray(conv(cut, kernel, padding=1, fill=fill)) for fill in ("zeros", "circular")
    }
    assert study.aware_share(borderless, borderless) < 0.05
    assert study.aware_share(padded["circular"], borderless) < 0.05
    assert study.aware_share(padded["zeros"], borderless) > 0.95


@pytest.mark.parametrize("channels, beyond", [(16, 1), (99, 1), (300, 3)])
def test_one_percent_of_channels_but_at_least_one_exceeds_its_own_threshold(channels, beyond):
    half = noise((8, 16, 16, channels))
    # Equal halves: the threshold is counted on what it was chosen on.
    maps = np.concatenate([half, half])
    assert study.aware_share(maps, maps) == pytest.approx(beyond / channels)


@pytest.mark.slow
def test_channels_are_counted_for_random_and_trained_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(base._REGISTRY, "small", Small)
    compiled = jax.jit(patterns._stages.__wrapped__, static_argnames=("model", "stages"))
    monkeypatch.setattr(patterns, "_stages", compiled)
    file = tmp_path / "small.safetensors"
    weights.save_torchvision(quick.variables(Small(), jnp.zeros((1, 32, 32, 3))), file)
    arguments = [
        "--workdir",
        str(tmp_path / "run"),
        "--encoders",
        "small",
        "--trained",
        "small",
        str(file),
        "--size",
        "64",
        "--images",
        "20",
        "--paddings",
        "inside",
        "zeros",
    ]
    assert study.main([*arguments, "--seeds", "1"]) == 0
    results = json.loads((tmp_path / "run" / "neurons.json").read_text())
    assert [(row["weights"], row["padding"]) for row in results] == [
        ("random", "inside"),
        ("random", "zeros"),
        ("trained", "inside"),
        ("trained", "zeros"),
    ]
    for inside, zeros in (results[:2], results[2:]):
        assert [stage["stage"] for stage in zeros["stages"]] == ["a", "b"]
        assert zeros["stages"][1]["share"] > inside["stages"][1]["share"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| small | random | b | 8 | " in report
    assert (tmp_path / "run" / "neurons.png").stat().st_size > 1000
    few = tmp_path / "few"
    few.mkdir()
    for path in photographs.list_photographs("")[:7]:
        (few / path.name).symlink_to(path)
    arguments += ["--workdir", str(tmp_path / "other")]
    refused = [*arguments, "--seeds", "1", "--photographs", str(few)]
    assert quick.exit_code(study.main, refused) == 2
    assert (
        f"photographs='{few}' has 7 photographs; at least 8 are needed" in capsys.readouterr().err
    )
    reflected = [*arguments, "--size", "2", "--paddings", "zeros", "reflect", "--seeds", "1"]
    assert quick.exit_code(study.main, [*reflected, "--workdir", str(tmp_path / "new")]) == 2
    assert "reflect" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    large = [*arguments, "--size", "5000"]
    assert quick.exit_code(study.main, large) == 2
    assert "astronaut.png is 512x512, smaller than size=5000" in capsys.readouterr().err


def test_the_report_says_whether_seeds_draw_photographs():
    options = argparse.Namespace(images=64)
    assert "all seeds have the same photographs" in study.describe_draw(13, options)
    assert "each seed draws 64 at random" in study.describe_draw(64, options)


def test_seeds_may_share_photographs(monkeypatch):
    """Each seed draws from all photographs, so seeds may outnumber disjoint pairs."""
    paths = [pathlib.Path(f"{number}.jpg") for number in range(13)]
    monkeypatch.setattr(photographs, "list_photographs", lambda folder: paths)
    monkeypatch.setattr(photographs, "check_sizes", lambda *arguments: None)
    options = argparse.Namespace(
        photographs="", size=64, images=10, seeds=7, encoders=[], trained={}
    )
    options.paddings = ["inside"]
    shared = study.load(options)
    assert [len(drawn) for drawn in shared.paths] == [10] * 7
    assert len(set(shared.paths)) == 7
