"""Readouts fitted to other images: two grids, shuffled pixels, noise, the report."""

import argparse
import functools
import json

import flax.linen as nn
import jax
import numpy as np
import PIL.Image
import pytest
from quick import exit_code

from cnnjax.data import photographs
from cnnjax.models import base
from cnnjax.models.small import SmallConvNet
from cnnjax.nn import Conv
from cnnjax.position import encoder
from cnnjax.position.targets import target
from experiments import position_fitted
from experiments.position_fitted import Point


class Averages(base.Network):
    """Two stages of averages without padding: 3 pixels at stride 2, 11 at stride 4."""

    @nn.nowrap
    def walk(self, x, train):
        mean = functools.partial(Conv, 1, use_bias=False, kernel_init=nn.initializers.ones)
        x = mean(3, stride=2, name="a")(x) / 27
        yield "a", x
        x = mean(5, stride=2, name="b")(x) / 25
        yield "b", x
        yield "logits", x.mean((1, 2))


def test_registered_stages_show_the_same_pixels(monkeypatch):
    monkeypatch.setitem(base._REGISTRY, "averages", Averages)
    monkeypatch.setattr(encoder, "normalize", lambda images, pixels: images / 255)
    # On a ramp from left to right, the average over a window is the pixel at its center.
    ramp = np.broadcast_to(np.arange(224, dtype=np.uint8)[:, None], (1, 224, 224, 3))
    features_by_grid = position_fitted.encode_grids(Point("averages", "none", "noise", 0), ramp)
    pixels = {grid: features[0, 0] * 255 for grid, features in features_by_grid.items()}
    np.testing.assert_allclose(pixels["registered"][:, 0], pixels["registered"][:, 1], atol=0.01)
    # Centers of the second stage: 5, 9, ..., 217, as it begins 4 pixels after the first.
    np.testing.assert_allclose(pixels["registered"][:, 1], np.linspace(5, 217, 28), atol=0.01)
    np.testing.assert_allclose(pixels["corners"][:, 0], np.linspace(1, 221, 28), atol=0.01)
    np.testing.assert_allclose(pixels["corners"][:, 1], np.linspace(5, 217, 28), atol=0.01)


def test_registered_stages_may_need_images_larger_than_the_publication_s(monkeypatch):
    monkeypatch.setattr(encoder, "normalize", lambda images, pixels: images / 255)
    # Its own image of 8 pixels leaves no position of the stage "b", which sees 11.
    model = Averages(input_shape=(8, 8, 3))
    ramp = np.broadcast_to(np.arange(224, dtype=np.uint8)[:, None], (1, 224, 224, 3))
    variables = Averages().init(jax.random.key(0), ramp.astype(np.float32))
    features = encoder.encode(model, variables, ramp, ("a", "b"), is_registered=True)
    np.testing.assert_allclose(255 * features[0, 0, :, 1], np.linspace(5, 217, 28), atol=0.01)
    np.testing.assert_allclose(features[..., 0], features[..., 1], atol=1e-4)


def test_stages_that_share_one_pixel_are_named(caplog):
    """The second stage has a single position in images of its window, 11 pixels."""
    encoder.registered(Averages(), ("a", "b"), 15)
    assert not caplog.records
    matrices = encoder.registered(Averages(), ("a", "b"), 11)
    assert "its stages at 11 px share a single pixel" in caplog.text
    assert all((matrix == matrix[0]).all() for matrix in matrices)


def test_fewer_images_than_photographs_are_nested_random_choices():
    chosen = {}
    for seed in (0, 1):
        point = Point("resnet18", "zeros", "photographs", seed)
        for count in (24, 96):
            chosen[seed, count] = position_fitted.choose_images(point, count, 200)
    assert chosen[0, 24] == chosen[0, 96][:24]
    assert len(set(chosen[0, 96])) == 96
    assert max(chosen[0, 24]) > 96
    assert set(chosen[0, 24]) != set(chosen[1, 24])
    # Where there are no more photographs than images, and for noise, the first images are taken.
    assert position_fitted.choose_images(point, 200, 200) == slice(200)
    assert position_fitted.choose_images(point._replace(images="noise"), 24, 200) == slice(24)


@pytest.mark.parametrize(
    "counts, images, is_drawn",
    [([24, 4], "shuffled", False), ([24, 3], "shuffled", True), ([24, 3], "noise", False)],
)
def test_the_study_knows_whether_photographs_are_drawn(counts, images, is_drawn):
    """Of 13 photographs, 4 are there to fit to."""
    point = Point("resnet18", "zeros", images, 0)
    options = argparse.Namespace(photographs="", counts=counts)
    assert position_fitted.STUDY.draws(point, options) == is_drawn


def test_shuffling_moves_whole_pixels_of_one_image():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    shuffled = photographs.shuffle_pixels(images, seed=1)
    assert not np.array_equal(shuffled, images)
    for before, after in zip(images, shuffled):
        pixels = sorted(map(tuple, before.reshape(-1, 3).tolist()))
        assert sorted(map(tuple, after.reshape(-1, 3).tolist())) == pixels


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["replicate", "random", "circular"])
def test_only_a_copied_border_of_noise_has_another_mean(padding):
    """Copied neighbors change the variance, which a ReLU turns into a mean.

    Independent noise of the same moments ('random') and a wrapped border have the interior's
    moments.
    """
    differences = position_fitted.border(padding, seed=0)
    assert differences["before"] < 0.02
    assert (differences["variance"] > 0.1) == (padding == "replicate")
    assert (differences["after"] > 0.04) == (padding == "replicate")


def test_zeros_have_another_mean_before_the_relu():
    differences = position_fitted.border("zeros", seed=0)
    # After normalization, noise about 127.5 is not centered on 0; a third of the window is zeros.
    assert differences["variance"] == pytest.approx(1 / 3, abs=0.05)
    assert differences["before"] > 0.08


def _tiny(monkeypatch):
    layers = ((16, 2),) * 5
    monkeypatch.setitem(base._REGISTRY, "resnet18", functools.partial(SmallConvNet, layers=layers))
    monkeypatch.setattr(position_fitted, "_HELD_OUT", 4)
    monkeypatch.setattr(position_fitted, "_TEST", 4)


@pytest.mark.slow
def test_every_readout_is_reported(tmp_path, monkeypatch):
    _tiny(monkeypatch)
    command = ["--workdir", str(tmp_path), "--seeds", "1", "--images", "shuffled", "noise"]
    command += ["--paddings", "zeros", "--counts", "4", "8", "--hidden", "2", "--steps", "2"]
    command += ["--energy"]
    assert position_fitted.main(command) == 0
    shuffled, noise = json.loads((tmp_path / "fitted.json").read_text())
    assert (shuffled["images"], noise["images"]) == ("shuffled", "noise")
    labels = [(row["readout"], row["grid"], row["count"]) for row in noise["readouts"]]
    assert labels == [
        (readout, grid, count)
        for grid in position_fitted.GRIDS
        for readout, count in (("linear", 4), ("linear", 8), ("nonlinear", 8))
    ]
    # With zeros, even noise shows the position.
    assert all(row["r2"] > 0.03 for row in noise["readouts"] if row["readout"] == "linear")
    text = (tmp_path / "report.md").read_text()
    assert "| resnet18 | noise | 8 | nonlinear | registered | " in text
    assert "| resnet18 | noise | 8 | G | registered | " in text
    assert shuffled["photographs"] == [6, 4, 3]
    described = (
        "those to fit to of at most 6 photograph(s), the held-out ones of 4, the unseen ones"
    )
    assert described in text.replace("\n", " ")
    assert (tmp_path / "fitted.png").stat().st_size > 1000


def test_the_energy_of_features_tells_where_they_were_averaged():
    """As where resizing averages more positions: here in the middle, so G is read, but not H."""
    rng = np.random.default_rng(0)
    spread = 2 - target("G", 28)[..., None]
    parts = [spread * rng.standard_normal((n, 28, 28, 40)).astype(np.float32) for n in (8, 4, 4)]
    h, g = position_fitted.read_energy("corners", *parts)
    assert (h["target"], g["target"], g["count"]) == ("H", "G", 8)
    assert h["median_r2"] < 0.02 and g["median_r2"] > 0.3
    # Without a difference between places, nothing is read.
    parts = [part / spread for part in parts]
    h, g = position_fitted.read_energy("corners", *parts)
    assert max(h["median_r2"], g["median_r2"]) < 0.02


def test_local_energy_is_that_of_a_ramp():
    ramp = np.arange(5.0)[:, None] * 3 + np.arange(5.0) * 2
    energy = position_fitted.local_energy(ramp[None, ..., None])
    assert energy.shape == (1, 4, 4, 1) and (energy == 9 + 4).all()


def test_bad_counts_and_photographs_are_refused_before_anything_is_written(tmp_path, capsys):
    folder = tmp_path / "work"
    small = tmp_path / "small"
    small.mkdir()
    for name in "ab":
        PIL.Image.new("RGB", (300, 200)).save(small / f"{name}.png")
    few = ["--photographs", str(small)]
    assert position_fitted.main(["--workdir", str(folder), *few]) == 2
    message = "photographs: 2 files; expected at least 3, one for each of the disjoint parts"
    assert capsys.readouterr().err == f"error: {message}\n"
    PIL.Image.new("RGB", (300, 200)).save(small / "c.png")
    for wrong, message in (
        (["--counts", "24", "24"], "counts=[24, 24] must name each number once"),
        (["--photographs", "absent"], "photographs='absent' is not a folder"),
        (
            ["--photographs", str(small)],
            f"photographs: {small}/a.png is 200x300, smaller than the crops of 224 px",
        ),
    ):
        assert position_fitted.main(["--workdir", str(folder), *wrong]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    wrong = ["--workdir", str(folder), "--counts", "24", "1"]
    assert exit_code(position_fitted.main, wrong) == 2
    message = "argument --counts: '1' is not a whole number of at least 2\n"
    assert capsys.readouterr().err.endswith(message)
    assert not folder.exists()


def test_noise_needs_no_photographs(tmp_path, monkeypatch):
    """One photograph, which is too small as well, would be refused otherwise."""
    PIL.Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    options = argparse.Namespace(
        photographs=str(tmp_path), counts=[4], images=["noise"], hidden=0, energy=None
    )
    paths = position_fitted.load(options)
    assert paths == []
    monkeypatch.setattr(
        position_fitted,
        "encode_grids",
        lambda point, images: {"corners": images[:, :28, :28, :1] / 255},
    )
    monkeypatch.setattr(position_fitted, "_SIZE", 28)
    monkeypatch.setattr(position_fitted, "border", lambda padding, seed: {})
    result = position_fitted.measure(Point("resnet18", "zeros", "noise", 0), options, paths)
    assert [row["count"] for row in result["readouts"]] == [4]
    assert result["photographs"] == [0, 0, 0]
