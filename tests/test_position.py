"""The position study: targets, scores, readouts and the whole job on small images."""

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import PIL.Image
import pytest
import quick
import scipy.stats
from jax import lax

from cnnjax import nn as cnn
from cnnjax import weights
from cnnjax.data import photographs
from cnnjax.models import base, create_model
from cnnjax.models.small import SmallConvNet
from cnnjax.position import defaults, encoder, report, results, study
from cnnjax.position.encoder import encode, image_features, reachable_stages
from cnnjax.position.metrics import METRICS, by_ring, rings, scores
from cnnjax.position.readout import STRENGTHS, fit_exact, fit_sgd, full_size_error
from cnnjax.position.targets import TARGETS, target
from cnnjax.runtime import command, files, workdir
from configs import posenet
from experiments import position_tables

KINDS = defaults.get_config().data


def test_targets_are_the_official_maps():
    maps = {name: target(name, 224) for name in TARGETS}
    # The errors of the best constant, measured on the official maps at 224 pixels.
    for name, chance in {"H": 0.2510, "V": 0.2510, "G": 0.1968, "HS": 0.3174, "VS": 0.3174}.items():
        constant = np.mean(maps[name]) if name == "G" else 0.5
        assert np.abs(maps[name] - constant).mean() == pytest.approx(chance, abs=2e-3)
        assert maps[name].min() == pytest.approx(0, abs=1e-4)
        assert maps[name].max() == pytest.approx(1, abs=1e-4)
    assert np.array_equal(maps["V"], maps["H"].T)
    assert np.array_equal(maps["VS"], maps["HS"].T)
    # H grows along rows and is constant along columns.
    assert (np.diff(maps["H"], axis=1) > 0).all()
    assert np.ptp(maps["H"], axis=0).max() == 0
    # HS is constant along rows and goes through 2.5 periods down.
    assert np.ptp(maps["HS"], axis=1).max() == 0
    assert maps["HS"][0, 0] > 0.99
    assert maps["HS"][-1, 0] < 0.01
    assert np.count_nonzero(np.diff(np.sign(maps["HS"][:, 0] - 0.5))) == 5
    np.testing.assert_allclose(maps["G"], maps["G"][::-1, ::-1], atol=1e-6)
    at = np.arange(224) + 0.5
    bell = np.exp(-((at[:, None] - 112) ** 2 + (at - 112) ** 2) / (2 * (0.495 * 224) ** 2))
    np.testing.assert_allclose(maps["G"], (bell - bell.min()) / np.ptp(bell), atol=2e-3)
    with pytest.raises(ValueError, match="target='D' is not one of H, V, G, HS, VS"):
        target("D", 28)


def test_scores_are_scipys_and_the_definitions():
    goal = target("G", 12)
    rng = np.random.default_rng(0)
    predictions = np.stack(
        [
            goal + 0.1 * rng.standard_normal(goal.shape),
            np.round(2 * goal + rng.random(goal.shape)),
            1 - goal,
        ]
    )
    result = scores(predictions, goal)
    for i, prediction in enumerate(predictions):
        correlation = scipy.stats.spearmanr(prediction.ravel(), goal.ravel()).statistic
        assert result["spc"][i] == pytest.approx(correlation, abs=1e-6)
        assert result["mae"][i] == pytest.approx(np.abs(prediction - goal).mean(), abs=1e-6)
        unexplained = np.square(prediction - goal).mean() / goal.var(dtype=np.float64)
        assert result["r2"][i] == pytest.approx(1 - unexplained, abs=1e-6)
    assert result["spc"][2] == pytest.approx(-1, abs=1e-3)
    assert result["r2"][2] < 0
    # A constant map scores 0, not NaN, and so does a map that varies only by rounding errors.
    flat = scores(np.stack([np.full_like(goal, goal.mean()), goal.mean() + 4e-5 * goal]), goal)
    assert np.array_equal(flat["spc"], [0, 0])
    assert abs(flat["r2"][0]) < 1e-6
    with pytest.raises(ValueError, match="does not fit a target"):
        scores(predictions, target("H", 13))


def test_the_best_constant_is_the_median():
    assert study.best_constant(np.float32([[0, 0], [0, 1]])) == 0.25


def test_scores_of_nothing_to_score():
    """A map with NaN does not pass for a constant one."""
    goal = target("H", 4)
    broken = goal.copy()
    broken[0, 0] = np.nan
    result = scores(np.stack([broken, goal]), goal)
    for name in METRICS:
        assert np.isnan(result[name][0]) and np.isfinite(result[name][1])
    # A constant target has no variance to explain, though its mean is rounded.
    result = scores(goal[None], np.full((4, 4), 0.1, np.float32))
    assert np.isnan(result["r2"]) and result["spc"] == 0


def test_unknown_pixels_are_refused():
    with pytest.raises(ValueError, match="^pixels='imagnet' is not one of imagenet, unit"):
        encoder.normalize(jnp.zeros((1, 2, 2, 3)), "imagnet")


def features_with_position(n, seed, side=9, channels=6, noise=1.0):
    """Returns noise whose first channel also contains the column."""
    rng = np.random.default_rng(seed)
    f = rng.standard_normal((n, side, side, channels)).astype(np.float32)
    f[..., 0] = 3 * np.linspace(-1, 1, side) + noise * rng.standard_normal((n, side, side))
    return f


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7])
def test_exact_readout_is_the_ridge_solution(size):
    train = features_with_position(40, 0)
    held_out = features_with_position(3, 1)
    goals = np.stack([target("H", 9), target("G", 9)])
    side = 9 - size + 1

    def patches(features):
        """Returns standardized windows as rows, [n * side * side, size * size * 6]."""
        scaled = (features - train.mean((0, 1, 2))) / train.std((0, 1, 2))
        taps = [scaled[:, i : i + side, j : j + side] for i in range(size) for j in range(size)]
        return np.stack(taps, 3).reshape(-1, size * size * 6)

    goal = np.asarray(cnn.resize(jnp.asarray(goals)[..., None], side))[..., 0].reshape(2, -1)
    x = patches(train).astype(np.float64)
    y = np.tile(goal, 40).T.astype(np.float64)
    centered = x - x.mean(0)
    gram = centered.T @ centered / len(x)
    products = centered.T @ (y - y.mean(0)) / len(x)
    errors = []
    solutions = []
    for strength in STRENGTHS:
        weights = np.linalg.solve(gram + strength * np.eye(x.shape[1]), products)
        intercept = y.mean(0) - x.mean(0) @ weights
        solutions.append((weights, intercept))
        predicted = patches(held_out) @ weights + intercept
        errors.append(np.square(predicted - np.tile(goal, 3).T).mean(0))

    readout = fit_exact(train, held_out, goals, size)
    assert readout.residual < 1e-3
    predicted = readout(jnp.asarray(held_out))
    for t in range(2):
        # The chosen strength is the best, up to ties among strengths below the features' noise.
        chosen = STRENGTHS.index(readout.strength[t])
        assert errors[chosen][t] <= 1.01 * np.min(errors, 0)[t]
        weights, intercept = solutions[chosen]
        want = (patches(held_out) @ weights[:, t] + intercept[t]).reshape(3, side, side)
        np.testing.assert_allclose(predicted[:, t], want, atol=1e-4 if size == 1 else 5e-3)


def test_exact_readout_of_nothing_is_a_constant():
    """Noise gives a nearly constant prediction, and dead features a finite one."""
    rng = np.random.default_rng(0)

    def noise(n):
        return rng.standard_normal((n, 9, 9, 4)).astype(np.float32)

    readout = fit_exact(noise(4), noise(4), target("H", 9)[None])
    assert readout.strength[0] >= 1
    maps = readout(jnp.asarray(noise(20)))
    assert abs(scores(maps[:, 0], target("H", 9))["r2"].mean()) < 0.05
    dead = np.zeros((4, 9, 9, 3), np.float32)
    assert np.isfinite(fit_exact(dead, dead, target("H", 9)[None])(jnp.asarray(dead))).all()
    with pytest.raises(ValueError, match="size=10 of the kernel does not fit 9x9 features"):
        fit_exact(noise(2), noise(2), target("H", 9)[None], size=10)
    with pytest.raises(ValueError, match="^held_out has features of no image; expected at least"):
        fit_exact(noise(2), noise(0), target("H", 9)[None])


def test_readouts_of_float16_features_are_those_of_float32():
    """In float16, sums over positions overflow."""
    rng = np.random.default_rng(0)
    train, held_out = (300 * rng.standard_normal((2, 4, 9, 9, 3))).astype(np.float16)
    goals = target("H", 9)[None]
    wide = train.astype(np.float32)
    exact = fit_exact(train, held_out, goals)(wide)
    expected = fit_exact(wide, held_out.astype(np.float32), goals)(wide)
    np.testing.assert_allclose(exact, expected, atol=1e-5)
    sgd = fit_sgd(train, goals, steps=3)(wide)
    np.testing.assert_allclose(sgd, fit_sgd(wide, goals, steps=3)(wide), atol=1e-5)


def test_sgd_readouts_of_features_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="train has features of 4x6; expected square ones"):
        fit_sgd(np.zeros((2, 4, 6, 3), np.float32), target("H", 9)[None])


@pytest.mark.slow
@pytest.mark.parametrize("align_corners", [True, False])
def test_small_grid_loss_is_the_error_at_full_size(align_corners):
    goals = jnp.stack([jnp.asarray(target(name, 50)) for name in TARGETS])
    maps = quick.normal(0, 3, 7, 7, 5)
    upsampled = cnn.resize(maps, 50, align_corners)
    direct = jnp.square(upsampled - goals.transpose(1, 2, 0)).mean((0, 1, 2))
    np.testing.assert_allclose(full_size_error(goals, 7, align_corners)(maps), direct, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_sgd_readout_learns_from_any_seed(size):
    train = features_with_position(40, 0, noise=0.3)
    test = features_with_position(4, 1, noise=0.3)
    goals = np.stack([target("H", 9), target("V", 9)])

    def fit(seed):
        return fit_sgd(train, goals, size, steps=300, seed=seed)(jnp.asarray(test))

    maps = np.stack([fit(seed=0), fit(seed=1)])
    side = 9 - size + 1
    assert maps.shape == (2, 4, 2, side, side)
    assert 0 <= maps.min()
    assert maps.max() <= 1
    # The features show columns and not rows.
    goal = target("H", side)
    assert scores(maps[:, :, 0], goal)["spc"].min() > 0.9
    assert abs(scores(maps[:, :, 1], goal.T)["spc"]).mean() < 0.3
    assert not np.allclose(maps[0], maps[1], atol=1e-6)
    # A second fit gives the same result.
    assert np.array_equal(maps[0], fit(seed=0))


@pytest.mark.slow
def test_sgd_readouts_take_pytorchs_steps():
    """Compares three steps, the last at a tenth of the rate, and their running moments."""
    train = features_with_position(4, 0)
    goal = target("H", 9)
    start = fit_sgd(train, goal[None], steps=0)
    x = start.scaler(train)

    def forward(layer):
        z = lax.dot_general(x, layer["kernel"][0, 0], (((3,), (0,)), ((), ())))
        y = (z - z.mean()) / jnp.sqrt(z.var() + 1e-5) * layer["scale"] + layer["bias"]
        error = jnp.square(jax.nn.sigmoid(y[..., 0]) - goal).mean()
        return error, jnp.stack([z.mean(), z.var() * z.size / (z.size - 1)])

    gradient = jax.jit(jax.grad(forward, has_aux=True))
    (layer,) = start.layers
    velocity = dict.fromkeys(layer, 0.0)
    running = np.array([0.0, 1.0])
    for rate in (0.1, 0.1, 0.01):
        gradients, moments = gradient(layer)
        for name in layer:
            decayed = gradients[name] + 1e-4 * layer[name]
            velocity[name] = 0.9 * velocity[name] + decayed
        layer = {name: layer[name] - rate * velocity[name] for name in layer}
        running = 0.9 * running + 0.1 * np.asarray(moments)

    readout = fit_sgd(train, goal[None], steps=3)
    for name in layer:
        np.testing.assert_allclose(readout.layers[0][name], layer[name], rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.ravel(readout.moments[0]), running, atol=1e-5)


@pytest.mark.slow
def test_raw_features_keep_their_size_and_lose_their_mean():
    train = features_with_position(8, 0, noise=0.3)
    goals = target("H", 9)[None]
    raw = fit_sgd(train, goals, steps=20, standardize=False)
    np.testing.assert_array_equal(raw.scaler.scale, 1)
    # BatchNorm removes a mean in any case.
    shifted = fit_sgd(train + 3, goals, steps=20, standardize=False)
    np.testing.assert_allclose(shifted(train + 3), raw(train), atol=1e-3)
    # Features of another size learn at another speed.
    doubled = fit_sgd(2 * train, goals, steps=20, standardize=False)
    assert not np.allclose(doubled(2 * train), raw(train), atol=1e-3)


@pytest.mark.slow
def test_deeper_readouts_are_the_definition_and_learn():
    """Compares two hidden layers with a computation output by output."""
    train = features_with_position(40, 0, noise=0.3)
    test = features_with_position(4, 1, noise=0.3)
    goals = np.stack([target("H", 9), target("HS", 9)])
    widths = (5, 4, 1)
    readout = fit_sgd(train, goals, 3, steps=150, hidden=list(widths[:2]))
    maps = readout(jnp.asarray(test))
    assert maps.shape == (4, 2, 3, 3)
    shapes = [layer["kernel"].shape[2:] for layer in readout.layers]
    assert shapes == [(6, 10), (5, 8), (4, 2)]
    for output in (0, 1):
        y = readout.scaler(jnp.asarray(test))
        for depth, width in enumerate(widths):
            layer = readout.layers[depth]
            mean, var = readout.moments[depth]
            own = slice(output * width, (output + 1) * width)
            z = lax.conv_general_dilated(
                y,
                layer["kernel"][..., own],
                (1, 1),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            y = (z - mean[own]) / jnp.sqrt(var[own] + 1e-5)
            y = y * layer["scale"][own] + layer["bias"][own]
            y = jax.nn.sigmoid(y) if depth == 2 else jnp.maximum(y, 0)
        np.testing.assert_allclose(maps[:, output], y[..., 0], atol=1e-5)
    assert scores(maps[:, 0], target("H", 3))["spc"].min() > 0.9
    # A single value has no variance.
    single = fit_sgd(train, goals, 9, steps=2)(jnp.asarray(test[:1]))
    assert single.shape == (1, 2, 1, 1)
    with pytest.raises(ValueError, match="size=3 of the kernel does not fit 9x9 features 5 times"):
        fit_sgd(train, goals, 3, hidden=(5,) * 4)


@pytest.mark.slow
def test_stages_that_survive_without_padding():
    blocks = [f"block{i}" for i in range(1, 6)]
    layers = ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert reachable_stages(create_model("vgg16", padding="none"), 224) == blocks
    assert reachable_stages(create_model("resnet18", padding="none"), 224) == layers[:-1]
    assert reachable_stages(create_model("resnet18"), 64) == layers
    assert reachable_stages(create_model("vgg11", padding="random"), 64) == blocks


def initialize(model, size: int, last: str) -> dict:
    """Returns random variables of a network up to the stage `last`."""
    return quick.variables(model, jnp.zeros((1, size, size, 3)), method="stages", last=last)


def test_encoding_is_the_stages_resized_and_joined():
    model = create_model("vgg11")
    images = photographs.synthetic("noise", 9, 40, 0)
    variables = initialize(model, 40, "block3")
    features = encode(model, variables, images, ["block1", "block3"])
    assert features.shape == (9, 28, 28, 64 + 256)
    # The ninth image is alone in its batch.
    mean = np.float32([0.485, 0.456, 0.406])
    std = np.float32([0.229, 0.224, 0.225])
    x = (images[8:] / np.float32(255) - mean) / std
    run = jax.jit(functools.partial(model.apply, method="stages", last="block3"))
    stages = run(variables, x)
    resized = [cnn.resize(stages[stage], 28) for stage in ("block1", "block3")]
    np.testing.assert_allclose(features[8:], np.concatenate(resized, axis=3), atol=1e-4)
    assert image_features(images).shape == (9, 28, 28, 3)
    message = "stage='block3' is not a stage of this network up to 'block1'"
    for is_registered in (False, True):
        with pytest.raises(ValueError, match=message):
            encode(model, variables, images, ["block3", "block1"], is_registered=is_registered)


def test_encoding_copies_variables_to_the_device_once(monkeypatch):
    model = SmallConvNet(input_shape=(28, 28, 3), layers=((4, 1),))
    variables = jax.device_get(initialize(model, 28, "conv1"))
    images = np.zeros((9, 28, 28, 3), np.uint8)
    given = []

    def joined_stages(model, variables, images, stages, **options):
        given.append(variables)
        return [jnp.zeros((len(images), 28, 28, 4))]

    monkeypatch.setattr(encoder, "_joined_stages", joined_stages)
    encode(model, variables, images, ["conv1"])
    assert len(given) == 2
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(given))
    first, second = map(jax.tree.leaves, given)
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_images_of_a_later_call_have_noise_of_their_own():
    model = SmallConvNet(padding="random", input_shape=(28, 28, 3), layers=((4, 1),))
    variables = initialize(model.clone(padding="zeros"), 28, "conv1")
    images = np.full((16, 28, 28, 3), 90, np.uint8)
    features = encode(model, variables, images, ["conv1"])
    later = encode(model, variables, images[8:], ["conv1"], first=8)
    assert np.array_equal(later, features[8:])
    assert not np.array_equal(later, features[:8])
    # A single name is not read letter by letter.
    assert np.array_equal(features, encode(model, variables, images, "conv1"))


def test_stages_and_grids_are_checked():
    model = SmallConvNet(input_shape=(28, 28, 3), layers=((4, 1),))
    images = np.zeros((1, 28, 28, 3), np.uint8)
    for call in (
        lambda: encode(model, {}, images, []),
        lambda: encoder.encode_once("unused", model, {}, images, []),
    ):
        with pytest.raises(ValueError, match=r"^stages=\[\] names no stage$"):
            call()
    for grids, wrong in ((("corners", "shifted"), "shifted"), ("corners", "c")):
        message = f"^grids=.*: '{wrong}' is not one of corners, registered$"
        with pytest.raises(ValueError, match=message):
            encoder.encode_on_grids(model, {}, images, ["conv1"], grids)


def test_features_are_cached_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = SmallConvNet(input_shape=(28, 28, 3), layers=((4, 1),))
    variables = initialize(model, 28, "conv1")
    images = np.full((2, 28, 28, 3), 90, np.uint8)
    features = encoder.encode_once("~/features", model, variables, images, "conv1")
    assert np.array_equal(features, encode(model, variables, images, ["conv1"]))
    assert len(list((tmp_path / "features").iterdir())) == 1


@pytest.mark.slow
def test_features_are_cached_by_what_makes_them(tmp_path, monkeypatch):
    """Cached features are read, also if they were computed together with other stages."""
    model = create_model("vgg11")
    images = photographs.synthetic("noise", 3, 32, 0)
    one = ["block1"]
    two = ["block1", "block2"]
    variables = initialize(model, 32, "block2")
    first = initialize(model, 32, "block1")
    plain = encoder.encode
    runs = []

    def counted(*arguments):
        runs.append(arguments[3])
        return plain(*arguments)

    monkeypatch.setattr(encoder, "encode", counted)
    once = functools.partial(encoder.encode_once, tmp_path / "features")
    both = once(model, variables, images, two)
    assert np.array_equal(both, plain(model, variables, images, two))
    assert np.array_equal(both[..., :64], once(model, first, images, one))
    assert np.array_equal(both, once(model, variables, images, two))
    assert runs == [two]
    # Features of other weights, images, paddings, or pixel scales are computed.
    once(model, jax.tree.map(lambda leaf: 2 * leaf, first), images, one)
    once(model, variables, images[:, ::-1], one)
    once(model.clone(padding="reflect"), variables, images, one)
    once(model, variables, images, one, "unit")
    assert len(runs) == 5
    assert len(list((tmp_path / "features").iterdir())) == 6
    # A damaged file is named.
    for path in (tmp_path / "features").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match="npz is damaged: remove it"):
        once(model, variables, images, one)


# Zeros show position in it as in a VGG, with a fifth of the channels.
LAYERS = ((16, 2), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (64, 2), (64, 1))


@pytest.fixture(scope="module")
def small_config() -> Iterator[ml_collections.ConfigDict]:
    """A study of `small`, which is registered while this module is tested."""
    config = posenet.get_config()
    with config.unlocked():
        config.update(
            {
                "encoders": ("small",),
                "paddings": ("zeros", "none", "circular"),
                "image_size": 96,
                "n_train": 6,
                "n_held_out": 3,
                "n_test": 4,
                "n_noise": 2,
                "sgd_steps": 60,
                "seeds": 2,
            }
        )
    with pytest.MonkeyPatch.context() as patch:
        network = functools.partial(SmallConvNet, layers=LAYERS)
        patch.setitem(base._REGISTRY, "small", network)
        yield config


@pytest.fixture
def without_figure_files(monkeypatch):
    """For studies whose figures nobody looks at."""
    monkeypatch.setattr(files, "write_figure", lambda path, figure: None)
    for name in ("_draw_scores", "_draw_rings", "_draw_maps"):
        monkeypatch.setattr(report, name, lambda *arguments: None)


@pytest.fixture(scope="module")
def finished(small_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("position")
    record = {
        "backend": "cpu",
        "devices": ["cpu"],
        "cpus": 2,
        "python": "3",
        "platform": "Linux",
        "packages": {},
        "xla_flags": "",
        "seed": 0,
        "git_revision": None,
    }
    for name in ("config", "environment"):
        (folder / f"{name}.json").write_text(json.dumps(record))
    study.check(small_config)
    study.run(small_config, folder)
    return folder


def read_rows(folder) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.mark.slow
def test_the_job_writes_every_row(finished, small_config):
    written = json.loads((finished / "results.json").read_text())
    rows = written["rows"]
    columns = (
        "encoder",
        "weights",
        "padding",
        "stages",
        "kernel",
        "readout",
        "target",
        "data",
        "depth",
        "spc",
        "spc_std",
        "mae",
        "mae_std",
        "r2",
        "r2_std",
        "n_images",
        "n_seeds",
        "r2_median",
        "strengths",
        "fitted_to",
        "spc_by_seed",
        "r2_by_seed",
    )
    assert written["kind"] == "position"
    assert all(tuple(row) == columns for row in rows)
    subject = ("encoder", "padding", "readout", "target", "data")
    combinations = {tuple(row[key] for key in subject) for row in rows}
    settings = [
        ("posenet", "none", "exact"),
        ("posenet", "none", "sgd"),
        ("small", "zeros", "exact"),
        ("small", "zeros", "sgd"),
        ("small", "none", "exact"),
        ("small", "none", "sgd"),
        ("small", "circular", "exact"),
    ]
    assert combinations == {(*s, t, d) for s in settings for t in TARGETS for d in KINDS}
    assert len(rows) == len(combinations)
    count = {"natural": 4, "black": 1, "white": 1, "noise": 2}
    assert all(row["n_images"] == count[row["data"]] for row in rows)
    assert all(row["n_seeds"] == 2 for row in rows)
    for row in rows:
        if row["readout"] == "exact":
            assert len(row["strengths"]) == 2 and set(row["strengths"]) <= set(STRENGTHS)
        else:
            assert row["strengths"] is None


@pytest.mark.slow
def test_only_zeros_show_position_on_an_image_without_content(finished):
    for row in read_rows(finished):
        if row["data"] in ("black", "white"):
            if row["encoder"] == "small" and row["padding"] == "zeros":
                assert row["spc"] > (0.3 if row["target"] in ("HS", "VS") else 0.6), row
            else:
                assert row["spc"] == 0 and row["spc_std"] == 0, row


@pytest.mark.slow
def test_report_and_figures_are_there_and_readable(finished):
    report = (finished / "report.md").read_text()
    figures = ["spc_by_padding.png", "rings.png"]
    for name in ("posenet", "small"):
        figures += [f"maps_{name}_{kind}.png" for kind in KINDS]
    for name in figures:
        assert f"]({name})" in report
        with PIL.Image.open(finished / name) as image:
            assert min(image.size) > 100
            assert len(set(image.convert("L").tobytes())) > 10
    assert all(decision in report for decision in study.DECISIONS)
    others = ["config.json", "environment.json", "inputs.json", "maps.npz", "report.md"]
    names = sorted(path.name for path in finished.iterdir())
    assert names == sorted([*figures, "cells", *others, "results.json"])
    described = (
        "4 image(s) a seed (crops of 4 photograph(s)), 2 seed(s); readouts fitted to crops of 6 "
        "photograph(s), the ridge strength chosen on crops of 3."
    )
    assert described in report


@pytest.mark.slow
@pytest.mark.usefixtures("without_figure_files")
def test_the_same_run_gives_the_same_numbers(finished, small_config, tmp_path):
    """To the bit, for the control and one padding."""
    for name in ("config", "environment"):
        (tmp_path / f"{name}.json").write_text((finished / f"{name}.json").read_text())
    (*_, row) = read_rows(finished)
    config = small_config.copy_and_resolve_references()
    # The finished study read these stages under all its paddings.
    config.update({"seeds": 1, "paddings": ("zeros",), "stages": tuple(row["stages"])})
    study.run(config, tmp_path)
    again = sorted((tmp_path / "cells").iterdir())
    assert len(again) == 2
    for path in again:
        with np.load(path) as new, np.load(finished / "cells" / path.name) as old:
            assert new.files == old.files
            for name in set(new.files) - {"seconds"}:
                np.testing.assert_array_equal(new[name], old[name])


def test_a_study_of_before_goes_on_under_the_keys_added_since(tmp_path):
    """A study recorded before some keys existed goes on with their earlier values."""
    config = defaults.get_config()
    before = {key: value for key, value in config.items() if key not in defaults.BEFORE}
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "vgg16-zeros-0.npz").touch()
    (tmp_path / "config.json").write_text(json.dumps(before))
    config.align_corners = False
    study.adopt(config, tmp_path)
    with pytest.raises(ValueError, match="align_corners=True there, False now"):
        workdir.prepare(tmp_path, config.to_dict())
    study.adopt(defaults.get_config(), tmp_path)
    workdir.prepare(tmp_path, defaults.get_config().to_dict())


def test_a_finished_study_goes_on_with_more_seeds(tmp_path):
    config = defaults.get_config()
    (tmp_path / "cells").mkdir()
    cell = tmp_path / "cells" / "vgg16-zeros-0.npz"
    cell.write_bytes(b"measured")
    workdir.prepare(tmp_path, config.to_dict())
    (tmp_path / "results.json").write_text("{}")
    workdir.seal(tmp_path)
    # Beside another key, nothing is adopted.
    config.update(seeds=5, kernel=3)
    study.adopt(config, tmp_path)
    with pytest.raises(ValueError, match="seeds=3 there, 5 now"):
        workdir.prepare(tmp_path, config.to_dict())
    config.kernel = 1
    study.adopt(config, tmp_path)
    workdir.prepare(tmp_path, config.to_dict())
    # The points stay; the results are written anew.
    assert cell.exists() and not (tmp_path / "results.json").exists()
    workdir.check_seal(tmp_path)
    config.seeds = 3
    study.adopt(config, tmp_path)
    with pytest.raises(ValueError, match="seeds=5 there, 3 now"):
        workdir.prepare(tmp_path, config.to_dict())


@pytest.mark.slow
def test_an_interrupted_study_goes_on_from_the_files_of_its_points(
    finished, small_config, tmp_path, monkeypatch, without_figure_files
):
    """The names inside files are fixed, since earlier versions wrote the same names."""
    path = finished / "cells" / "small-circular-0.npz"
    with np.load(path) as archive:
        names = set(archive.files)
    expected = {"residual", "seconds"} | {f"strength/{name}" for name in TARGETS}
    for kind in KINDS:
        expected |= {f"maps/exact/{kind}", f"rings/H/{kind}/spc", f"rings/H/{kind}/mae"}
        for name in TARGETS:
            expected |= {f"scores/exact/{name}/{kind}/{metric}" for metric in METRICS}
    assert names == expected

    (point,) = [p for p in study.list_points(small_config) if p.file == path.name and p.seed == 0]
    results.save(tmp_path / "copy.npz", results.load(path, point, TARGETS, KINDS))
    with np.load(path) as old, np.load(tmp_path / "copy.npz") as new:
        assert all(np.array_equal(old[name], new[name]) for name in names)

    # What is left of a measurement on a disk that lost its end is named.
    whole = path.read_bytes()
    for length in (0, 30, len(whole) // 2):
        (tmp_path / "copy.npz").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="copy.npz is damaged: remove it, and the same"):
            results.load(tmp_path / "copy.npz", point, TARGETS, KINDS)
    np.savez(tmp_path / "copy.npz", spc=np.zeros(1))
    with pytest.raises(ValueError, match=r"copy.npz lacks an array \(.*\); remove it"):
        results.load(tmp_path / "copy.npz", point, TARGETS, KINDS)

    # Interrupted before its end, the study measures only the points without a file.
    folder = shutil.copytree(finished, tmp_path / "again")
    (folder / "results.json").unlink()
    (folder / "cells" / path.name).unlink()
    measured = []

    def measure(config, point, **_):
        measured.append(point)
        return results.load(path, point, TARGETS, KINDS)

    monkeypatch.setattr(study, "measure", measure)
    study.run(small_config, folder)
    assert measured == [point]
    assert read_rows(folder) == read_rows(finished)


def _scores(values: list[float]) -> results.Scores:
    r2 = np.array(values)
    return results.Scores("exact", "H", "black", spc=r2, mae=r2, r2=r2)


def test_medians_and_strengths_stand_beside_the_means(tmp_path, monkeypatch):
    """Files of earlier versions, which have no strengths, can still be read.

    A path may be a string, and `~` is the home folder.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    point = results.Point("vgg11", "random", "zeros", ("a",), 0)
    rings = np.zeros((1, study.RINGS))
    measurement = results.Measurement(
        point=point,
        scores=[_scores([0.5, -9.0, 0.7])],
        rings=[results.RingScores("H", "black", rings, rings)],
        maps=[results.Maps("exact", "black", np.zeros((1, 2, 2)))],
        residual=0.0,
        seconds=1.0,
        strengths={"H": 0.01},
    )
    results.save("~/new.npz", measurement)
    results.save(tmp_path / "old.npz", dataclasses.replace(measurement, strengths=None))
    loaded = [results.load(f"~/{name}.npz", point, ["H"], ["black"]) for name in "new old".split()]
    results.save_maps("~/maps.npz", {"H": np.eye(2)}, {}, [measurement])
    np.testing.assert_array_equal(results.MapsFile("~/maps.npz").target("H"), np.eye(2))
    (row,) = results.summarize([loaded[0], loaded[0]], 1, 1)
    assert row.r2_median == 0.5
    assert row.r2 == pytest.approx(-2.6)
    # Deviations are the sample's, over seeds and images.
    deviation = np.std([0.5, -9.0, 0.7, 0.5, -9.0, 0.7], ddof=1)
    assert [row.spc_std, row.mae_std, row.r2_std] == pytest.approx([deviation] * 3)
    assert row.strengths == [0.01, 0.01]
    (row,) = results.summarize(loaded, 1, 1)
    assert row.strengths is None


def test_differences_between_paddings_are_paired_by_seed():
    """Seeds differ much, paddings of one seed differ little."""
    measurements = []
    for padding, seed, r2 in (
        ("zeros", 0, [0.1, 0.3]),
        ("zeros", 1, [0.5, 0.5]),
        ("zeros", 2, [0.9, 0.7]),
        ("none", 0, [0.1, 0.1]),
        ("none", 1, [0.4, 0.3]),
        ("none", 2, [0.7, 0.7]),
    ):
        point = results.Point("vgg11", "random", padding, ("a",), seed)
        measurements.append(results.Measurement(point, [_scores(r2)], [], [], 0.0, 1.0))
    rows = results.summarize(measurements, 1, 1)
    assert rows[0].r2_by_seed == rows[0].spc_by_seed == pytest.approx([0.2, 0.5, 0.8])
    summary = results.Results(
        rows=rows, rings=[], chance_mae={}, ridge_residual=0.0, decisions=[], seconds=1.0
    )
    text = report._format_by_seed(summary, "black")
    assert "### SPC by seed, black images" in text
    # Student's t of 2 degrees of freedom is 4.30; the differences are -.1, -.15 and -.1.
    assert "| vgg11 | zeros | .50 ± .75 |\n" in text
    assert "| vgg11 | none - zeros | -.12 ± .07 |\n" in text
    # A single seed has no interval.
    rows = results.summarize([each for each in measurements if each.point.seed == 0], 1, 1)
    assert report._format_by_seed(dataclasses.replace(summary, rows=rows), "black") == ""


@pytest.mark.slow
@pytest.mark.usefixtures("without_figure_files")
def test_a_study_of_before_is_reported_again(finished, tmp_path):
    """Results of earlier versions have neither medians, strengths nor means by seed."""
    folder = shutil.copytree(finished, tmp_path / "old")
    report = (folder / "report.md").read_text()
    assert "## Ridge strengths" in report and "### R2 by seed" in report
    assert re.search(r"\| small \| zeros \| exact \| .*\(\.\d\d\) \|", report)
    written = json.loads((folder / "results.json").read_text())
    del written["photographs"]
    for row in written["rows"]:
        for key in ("r2_median", "strengths", "fitted_to", "spc_by_seed", "r2_by_seed"):
            del row[key]
    (folder / "results.json").write_text(json.dumps(written))
    study.report.write(folder)
    report = (folder / "report.md").read_text()
    assert "## Ridge strengths" not in report and "### R2 by seed" not in report
    assert "4 image(s) a seed, 2 seed(s)" in report
    assert re.search(r"\| small \| zeros \| exact \| [^(]* \|\n", report)


@pytest.mark.parametrize("kernel, padding, align_corners", [(1, 0, True), (3, 1, False)])
def test_the_shuffled_control_could_succeed(kernel, padding, align_corners, small_config):
    """Features that contain the shuffled targets predict them exactly."""
    config = small_config.copy_and_resolve_references()
    config.shuffled = True
    config.kernel = kernel
    config.readout_padding = padding
    config.align_corners = align_corners
    goals = study.draw_targets(config)
    assert goals.shape == (5, *(28 + 2 * padding - kernel + 1,) * 2)
    around = kernel // 2
    oracle = np.pad(goals.transpose(1, 2, 0), ((around, around), (around, around), (0, 0)))
    features = np.repeat(oracle[None], 3, 0)
    readout = fit_exact(features, features, goals, kernel, align_corners=align_corners)
    maps = study.upsample(readout(features), goals.shape[1], align_corners)
    for prediction, goal in zip(maps, goals):
        assert scores(prediction, goal)["r2"].min() > 0.999
        assert scores(prediction, goal)["spc"].min() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoders": ("vgg61",)}, "model='vgg61' is not known; did you mean vgg19"),
        ({"paddings": ("zeros", "mirror")}, "padding='mirror' is not one of zeros, none, reflect"),
        ({"sgd_paddings": ("mirror",)}, "padding='mirror' is not one of zeros, none, reflect"),
        ({"paddings": ()}, r"paddings=\(\) must name at least one"),
        ({"targets": ("H", "D")}, "targets='D' is not one of H, V, G, HS, VS"),
        (
            {"data": ("natural", "gray")},
            "data='gray' is not one of natural, shuffled_pixels, black, white, noise",
        ),
        ({"targets": ("H", "H")}, "must name at least one, each once"),
        ({"n_train": 0}, "n_train=0 is not a positive number"),
        ({"kernel": 29}, "kernel=29 is not between 1 and 28"),
        ({"paddings": ("zeros", "full"), "registered": True}, "padding='full' moves positions"),
        ({"kernel": 16, "shuffled": True}, "kernel=16 leaves a grid of 13 positions a side"),
        ({"noise": (25.0,)}, "noise=.25.0,. is not a mean and a standard deviation"),
        ({"readout_padding": -1}, "readout_padding=-1 is not a number of at least 0"),
        ({"pixels": "raw"}, "pixels='raw' is not one of imagenet, unit"),
        (
            {"fitted_to": "black"},
            "fitted_to='black' is not one of photographs, shuffled_pixels, noise",
        ),
        (
            {"stages": ("block9",)},
            "stages='block9' is not a stage that small reaches with padding='zeros' at "
            "image_size=96; it reaches conv1",
        ),
        ({"image_size": 400}, r"smaller than image_size=400"),
        (
            {"weights": "nowhere.safetensors"},
            "weights='nowhere.safetensors' is neither 'random', 'imagenet' nor a safetensors or "
            ".pth file",
        ),
        ({"photographs": "nowhere"}, "photographs='nowhere' is not a folder"),
        (
            {"encoders": ("resnet18",), "image_size": 6, "shuffled": True},
            "image_size=6 leaves nothing of any stage of resnet18 under padding='none'; take a",
        ),
        ({"encoders": ("mlp1",), "image_size": 32}, "^encoders='mlp1' has no stages$"),
        ({"image_size": 12}, "image_size=12 is not a number of pixels of at least 13"),
        ({"missing": ("fc",)}, r"missing=\('fc',\) names modules that a file of weights lacks"),
        (
            {"n_train": 1, "kernel": 28},
            "n_train=1 and kernel=28 leave the SGD readout's BatchNorm a single value",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_computed(
    small_config, change, message
):
    config = small_config.copy_and_resolve_references()
    with config.ignore_type():
        config.update(change)
    with pytest.raises(ValueError, match=message):
        study.check(config)


@pytest.mark.parametrize("moments", [(), (100.0, 20.0)])
def test_noise_has_the_moments_that_are_named(moments):
    noise = photographs.synthetic("noise", 4, 64, 0, *moments)
    mean, deviation = moments or (127.5, 64.0)
    assert np.mean(noise) == pytest.approx(mean, abs=1)
    # Clipping takes 2 of 64.
    assert np.std(noise) == pytest.approx(deviation, abs=3)
    assert np.std(noise.mean((1, 2))) < 2


@pytest.mark.slow
def test_photographs_from_a_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no image file"):
        photographs.list_photographs(tmp_path)
    for i in range(5):
        image = PIL.Image.fromarray(np.full((20 + i, 30, 3), 10 * i, np.uint8))
        image.save(tmp_path / f"{i}.png")
    paths = photographs.list_photographs(tmp_path)
    parts = photographs.split(paths, (6, 2, 2), 0)
    assert [len(part) for part in parts] == [3, 1, 1]
    assert sorted(sum(parts, [])) == paths
    # Photographs are cropped in turn.
    images = photographs.random_crops(paths, 7, 20, 0)
    assert images.shape == (7, 20, 20, 3)
    assert [int(image[0, 0, 0]) for image in images] == [0, 10, 20, 30, 40, 0, 10]
    with pytest.raises(ValueError, match=r"0.png is 20x30, smaller than size=21"):
        photographs.random_crops(paths, 7, 21, 0)
    message = "^photographs: 2 files; expected at least 3, one for each of the disjoint parts$"
    with pytest.raises(ValueError, match=message):
        photographs.split(paths[:2], (1, 1, 1), 0)
    halves = np.zeros((10, 40, 3), np.uint8)
    halves[:, 20:] = 200
    PIL.Image.fromarray(halves).save(tmp_path / "halves.png")
    # The middle 10x10 px are enlarged by two.
    (square,) = photographs.fit_squares([tmp_path / "halves.png"], 20)
    assert square.shape == (20, 20, 3)
    assert set(square[:, :6].ravel()) == {0}
    assert set(square[:, 14:].ravel()) == {200}
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8 torn")
    with pytest.raises(ValueError, match=r"torn.jpg is not a readable image"):
        photographs.image_size(tmp_path / "torn.jpg")


def save_grays(folder: pathlib.Path, count: int, side: int = 13) -> list[pathlib.Path]:
    """Saves photographs whose order shows in their gray; returns their paths."""
    folder.mkdir()
    for level in range(count):
        image = PIL.Image.fromarray(np.full((side, side), level, np.uint8))
        image.save(folder / f"{level:03}.png")
    return photographs.list_photographs(folder)


def test_photographs_are_drawn_at_random_where_there_are_more_than_crops(tmp_path):
    paths = save_grays(tmp_path / "hundred", 100)
    drawn = {count: photographs.choose(paths, count, 0) for count in (10, 40, 99)}
    assert drawn[10] == drawn[40][:10] == drawn[99][:10]
    assert len(set(drawn[99])) == 99
    # The first photographs of the order would be of the first classes.
    assert set(drawn[10]) != set(paths[:10])
    assert max(paths.index(path) for path in drawn[10]) > 50
    assert set(photographs.choose(paths, 10, 1)) != set(drawn[10])
    grays = photographs.random_crops(paths, 10, 4, 0)[:, 0, 0, 0]
    assert [paths[gray] for gray in grays] == drawn[10]


def test_photographs_are_shuffled_by_their_seed():
    paths = [pathlib.Path(f"{number:02}.jpg") for number in range(30)]
    # Studies of earlier versions drew so.
    order = np.random.default_rng(2).permutation(30)
    assert photographs.shuffle(paths, 7, 2) == [paths[number] for number in order[:7]]
    assert sorted(photographs.shuffle(paths, 99, 2)) == paths
    assert photographs.shuffle(paths, 99, 2) != paths


@pytest.mark.parametrize(
    "path, other, answer", [("a", "b", True), ("", "b", False), ("a", "", False)]
)
def test_the_packages_photographs_are_not_exchanged_for_a_folder(path, other, answer):
    assert photographs.are_exchangeable(path, other) is answer


def test_all_photographs_are_cropped_in_turn_where_there_are_no_more_than_crops(tmp_path):
    paths = save_grays(tmp_path / "three", 3)
    assert photographs.choose(paths, 3, 0) == photographs.choose(paths, 7, 1) == paths
    grays = photographs.random_crops(paths, 7, 4, 5)[:, 0, 0, 0]
    assert grays.tolist() == [0, 1, 2, 0, 1, 2, 0]
    pixels = np.arange(13 * 13 * 3, dtype=np.uint8).reshape(13, 13, 3)
    PIL.Image.fromarray(pixels).save(paths[0])
    # Places are drawn photograph by photograph.
    rng = np.random.default_rng(5)
    expected = []
    for _ in range(2):
        top, left = rng.integers(0, 10), rng.integers(0, 10)
        expected.append(pixels[top : top + 4, left : left + 4])
    assert np.array_equal(photographs.random_crops(paths[:1], 2, 4, 5), expected)


@pytest.fixture
def gray_config(tmp_path) -> ml_collections.ConfigDict:
    """A study without encoders of 30 photographs: 20 to fit to, 5 to hold out, 5 to score on."""
    save_grays(tmp_path / "grays", 30)
    config = defaults.get_config()
    config.update({"encoders": (), "image_size": 13, "photographs": str(tmp_path / "grays")})
    config.update({"n_train": 20, "n_held_out": 5, "n_test": 5})
    return config


def begin(config: ml_collections.ConfigDict, folder: pathlib.Path, *names: str) -> None:
    """Leaves the record of a study, and files named like those of its points."""
    workdir.prepare(folder, config.to_dict())
    (folder / "cells").mkdir()
    for name in names:
        (folder / "cells" / name).touch()


def test_seeds_of_a_study_draw_from_large_parts(gray_config):
    assert study.count_photographs(gray_config) == {"train": 20, "held_out": 5, "natural": 5}
    assert not study.draws(gray_config)
    gray_config.update({"n_train": 4, "n_held_out": 1, "n_test": 1})
    assert study.count_photographs(gray_config) == {"train": 4, "held_out": 1, "natural": 1}
    assert study.draws(gray_config)
    parts = study.divide_photographs(gray_config, 0)
    images = study.draw_images(gray_config, 0)
    chosen = {f"{gray:03}" for gray in images["train"][:, 0, 0, 0]}
    assert chosen < {path.stem for path in parts["train"]}
    assert chosen != {path.stem for path in parts["train"][:4]}


def test_readouts_are_fitted_to_other_images_than_photographs(gray_config):
    gray_config.update({"photographs": "", "data": ("natural", "noise", "shuffled_pixels")})
    drawn = {}
    for kind in ("photographs", "shuffled_pixels", "noise"):
        gray_config.fitted_to = kind
        study.check(gray_config)
        drawn[kind] = study.draw_images(gray_config, 1)
        names = ["train", "held_out", "natural", "shuffled_pixels", "noise"]
        assert list(drawn[kind]) == names
        # What is scored on does not depend on what is fitted to.
        for name in gray_config.data:
            assert np.array_equal(drawn[kind][name], drawn["photographs"][name])

    def sorted_pixels(images):
        return np.sort(images.reshape(len(images), -1))

    for name in ("train", "held_out"):
        crops, shuffled = drawn["photographs"][name], drawn["shuffled_pixels"][name]
        assert not np.array_equal(shuffled, crops)
        assert np.array_equal(sorted_pixels(shuffled), sorted_pixels(crops))
    # No noise image is drawn twice.
    noise = np.concatenate([drawn["noise"][name] for name in ("train", "held_out", "noise")])
    assert noise.shape == (20 + 5 + 2, 13, 13, 3)
    assert len({image.tobytes() for image in noise}) == len(noise)
    assert noise.std() == pytest.approx(64, abs=3)
    assert study.count_photographs(gray_config) == {"train": 0, "held_out": 0, "natural": 2}


def test_a_study_stopped_at_its_report_goes_on(gray_config, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **maps):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "_measure_missing", lambda *arguments: [])
    monkeypatch.setattr(study.results, "save_maps", stop)
    assert command.run(lambda: study.run(gray_config, tmp_path)) == 75
    assert (
        "run the same command again to continue after the last encoder that was read out"
        in capsys.readouterr().err
    )


def test_a_study_goes_on_with_the_photographs_that_it_was_begun_with(gray_config, tmp_path):
    folder = tmp_path / "work"
    begin(gray_config, folder, "posenet-none-0.npz")
    # Earlier versions recorded no digests.
    study.adopt(gray_config, folder)
    files.write_json(folder / "inputs.json", study.digest_inputs(gray_config))
    study.adopt(gray_config, folder)
    # The folder may be moved.
    (tmp_path / "grays").rename(tmp_path / "moved grays")
    gray_config.photographs = str(tmp_path / "moved grays")
    study.adopt(gray_config, folder)
    workdir.check_config(folder, gray_config.to_dict())
    (tmp_path / "moved grays" / "029.png").rename(tmp_path / "moved grays" / "other.png")
    message = "was begun with other files of photographs='.*grays' .*, digest .* there, .* now"
    with pytest.raises(ValueError, match=message):
        study.adopt(gray_config, folder)
    # Another folder is reported as a change of the configuration.
    gray_config.photographs = ""
    study.adopt(gray_config, folder)
    with pytest.raises(ValueError, match="photographs='.*grays' there, '' now"):
        workdir.prepare(folder, gray_config.to_dict())


def test_a_study_goes_on_with_the_weights_that_it_was_begun_with(gray_config, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"some")
    gray_config.weights = str(file)
    folder = tmp_path / "work"
    begin(gray_config, folder)
    files.write_json(folder / "inputs.json", study.digest_inputs(gray_config))
    study.adopt(gray_config, folder)
    # Of the same size.
    file.write_bytes(b"same")
    with pytest.raises(ValueError, match="was begun with other files of weights='.*weights.pth'"):
        study.adopt(gray_config, folder)


def test_a_study_that_goes_on_with_an_edited_network_says_so(gray_config, tmp_path, caplog):
    """Earlier versions recorded no digests of networks."""
    caplog.set_level("WARNING", "cnnjax")
    file = tmp_path / "own.py"
    file.write_text("# before")
    gray_config.encoders = (f"{file}:Own", "lenet")
    folder = tmp_path / "work"
    begin(gray_config, folder)
    inputs = study.digest_inputs(gray_config)
    networks = study.digest_networks(gray_config)
    assert networks.keys() == {f"{file}:Own"}
    files.write_json(folder / "inputs.json", inputs | {"networks": networks})
    study.adopt(gray_config, folder)
    assert not caplog.messages
    file.write_text("# after")
    study.adopt(gray_config, folder)
    (message,) = caplog.messages
    assert message.startswith(f"{file} has changed since the study was begun; its points may mix")
    caplog.clear()
    files.write_json(folder / "inputs.json", inputs)
    study.adopt(gray_config, folder)
    assert not caplog.messages


def test_a_study_of_the_first_photographs_does_not_go_on_with_others(gray_config, tmp_path):
    """Earlier versions took the first photographs of each part."""
    gray_config.n_train = 4
    folder = tmp_path / "work"
    begin(gray_config, folder)
    study.adopt(gray_config, folder)
    (folder / "cells" / "posenet-none-0.npz").touch()
    with pytest.raises(ValueError, match="did not draw the photographs of photographs='.*grays'"):
        study.adopt(gray_config, folder)
    # A finished study is reported as it is.
    (folder / "results.json").touch()
    study.adopt(gray_config, folder)


@pytest.mark.parametrize("counts", [(24, 6, 12), (1, 1, 1), (100, 1, 1)])
def test_embedded_photographs_divide_into_disjoint_parts(counts):
    paths = photographs.list_photographs()
    assert len(paths) == 13
    for seed in range(5):
        parts = photographs.split(paths, counts, seed)
        assert all(parts)
        assert sorted(sum(parts, [])) == sorted(paths)


@pytest.mark.parametrize("shares", [(6, 2, 5), (240, 6, 60), (48, 2, 12), (24, 1, 24)])
def test_each_part_has_a_photograph_even_if_its_share_is_tiny(shares):
    """Ends of parts that round to the same number would leave the part between them empty."""
    for count in range(3, 31):
        paths = [pathlib.Path(f"{number:02}.jpg") for number in range(count)]
        parts = photographs.split(paths, shares, 0)
        assert all(parts), count
        assert sorted(sum(parts, [])) == paths


def test_synthetic_images_are_of_three_kinds():
    """Black, white, and noise, which differs by image and by seed."""
    black, white, noise = (
        photographs.synthetic(kind, 2, 8, 0) for kind in ("black", "white", "noise")
    )
    for images in (black, white, noise):
        assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8
    assert (black == 0).all() and (white == 255).all()
    first, second = noise
    assert (first != second).mean() > 0.9
    np.testing.assert_array_equal(photographs.synthetic("noise", 2, 8, 0), noise)
    assert (photographs.synthetic("noise", 2, 8, 1) != noise).mean() > 0.9
    with pytest.raises(ValueError, match="^kind='natural' is not one of black, white, noise$"):
        photographs.synthetic("natural", 1, 8, 0)


def test_no_crops_are_cut_of_no_photographs():
    with pytest.raises(ValueError, match=r"paths=\[\]: 6 crops need at least one photograph"):
        photographs.random_crops([], 6, 8, 0)


@pytest.mark.slow
def test_imagenet_weights_on_real_photographs(data_dir):
    """With zero padding, ResNet-18 shows position, even on a black image.

    On photographs, reflection shows some position and no padding hardly any; on a black image,
    neither shows any.
    """
    counts = {"train": 24, "held_out": 8, "natural": 12}
    paths = photographs.list_photographs(data_dir / "imagenet_sample")
    parts = photographs.split(paths, tuple(counts.values()), 0)
    images = {}
    for name, part in zip(counts, parts):
        images[name] = photographs.random_crops(part, counts[name], 224, 0)
    # A black image goes through the network with the last photographs.
    black = photographs.synthetic("black", 1, 224, 0)
    images["tested"] = np.concatenate([images.pop("natural"), black])
    tested = {"natural": slice(-1), "black": slice(-1, None)}
    file = data_dir / "weights" / "resnet18_conv1-layer3_imagenet.safetensors"
    stages = ["stem", "layer1", "layer2", "layer3"]
    goal = target("H", 28)
    mean = {}
    for fill in ("zeros", "none", "reflect"):
        model = create_model("resnet18", padding=fill)
        variables = weights.load_torchvision(file, model, missing=("layer4", "fc"))
        features = {name: encode(model, variables, images[name], stages) for name in images}
        readout = fit_exact(features["train"], features["held_out"], goal[None])
        maps = readout(jnp.asarray(features["tested"]))[:, 0]
        for metric, values in scores(maps, goal).items():
            for data, part in tested.items():
                mean[fill, data, metric] = values[part].mean()
    assert mean["zeros", "natural", "spc"] > 0.5
    assert mean["zeros", "natural", "r2"] > 0.3
    assert mean["zeros", "black", "spc"] > 0.2
    assert mean["none", "natural", "r2"] < 0.1
    assert mean["reflect", "natural", "r2"] > 0.1
    assert mean["none", "black", "spc"] == 0
    assert mean["reflect", "black", "spc"] == 0


def test_rings_divide_a_map_by_the_distance_to_its_border():
    where = rings(12, 3)
    sizes = [int((where == ring).sum()) for ring in range(3)]
    assert sizes == [12**2 - 8**2, 8**2 - 4**2, 4**2]
    assert where[0, 5] == where[11, 11] == where[5, 1] == 0
    assert where[2, 2] == 1
    assert where[6, 6] == 2
    goal = target("H", 12)
    prediction = np.where(where == 1, 1 - goal, goal)[None]
    result = by_ring(prediction, goal, 3)
    np.testing.assert_allclose(result["spc"], [[1, -1, 1]], atol=1e-6)
    assert result["mae"][0, 0] == result["mae"][0, 2] == 0
    assert result["mae"][0, 1] > 0
    for size, count in ((4, 3), (5, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"count={count} is not between 1 and"):
            rings(size, count)
    assert set(rings(5, 3).ravel()) == {0, 1, 2}


def test_controls_of_the_study(small_config):
    """Mirroring adds three copies of each training crop, but none for tests."""
    config = small_config.copy_and_resolve_references()
    plain = study.draw_images(config, 0)
    config.mirrored = True
    mirrored = study.draw_images(config, 0)
    train = plain["train"]
    count = len(train)
    assert len(mirrored["train"]) == 4 * count
    assert np.array_equal(mirrored["train"][:count], train)
    assert np.array_equal(mirrored["train"][count : 2 * count], train[:, :, ::-1])
    assert np.array_equal(mirrored["train"][3 * count :], train[:, ::-1, ::-1])
    assert np.array_equal(mirrored["natural"], plain["natural"])


@pytest.mark.slow
def test_coordinates_give_the_ramps_and_nothing_else(small_config):
    """Two coordinates linearly predict H and V, but neither a Gaussian nor stripes."""
    images = study.draw_images(small_config, 0)
    features = {}
    for name in ("train", "held_out", "natural"):
        features[name] = image_features(images[name], coordinates=True)
    assert features["train"].shape == (len(images["train"]), 28, 28, 5)
    goals = np.stack([target(name, 28) for name in TARGETS])
    maps = fit_exact(features["train"], features["held_out"], goals)(features["natural"])
    r2 = [scores(maps[:, number], goal)["r2"].min() for number, goal in enumerate(goals)]
    assert min(r2[:2]) > 0.999
    assert max(r2[2:]) < 0.1


@pytest.mark.slow
def test_the_papers_tables(tmp_path, capsys, monkeypatch, standard_promotion, without_figure_files):
    """Zero padding of the readout alone shows position, as in the paper's table 4.

    A second call computes nothing again, and wrong settings are named.
    """
    # The strengths that are chosen here need fewer steps.
    monkeypatch.setattr("cnnjax.position.readout._MAX_STEPS", 60)
    arguments = [
        "readout_padding",
        "--workdir",
        str(tmp_path),
        "--seeds",
        "2",
        "--set",
        "image_size=96",
        "n_train=8",
        "n_held_out=4",
        "n_test=4",
        "sgd_steps=20",
    ]
    assert position_tables.main(arguments) == 0
    values = json.loads((tmp_path / "readout_padding.json").read_text())
    by_row = {(value["row"], value["target"], value["readout"]): value for value in values}
    assert len(by_row) == len(values) == 3 * 3 * 2
    r2 = [by_row[f"PosENet, padded by {amount}", "H", "exact"]["r2"] for amount in (0, 1, 2)]
    assert r2[0] < 0 < 0.02 < r2[1] < 0.1 < r2[2]
    assert by_row["PosENet, padded by 1", "HS", "sgd"]["paper"] == [0.148, 0.304]
    assert by_row["PosENet, padded by 1", "G", "sgd"]["paper"] == [0.205, 0.184]

    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}

    before = times()
    assert len(before) == 3
    position_tables.main(arguments)
    assert times() == before
    page = (tmp_path / "readout_padding.md").read_text()
    assert "| PosENet, padded by 2 | none | H | natural | 0.397 / 0.223 |" in page
    # The 4 crops to score on are of 3 photographs.
    assert all(
        line.endswith("| 6 / 4 / 3 | 2 |") for line in page.splitlines() if "PosENet" in line
    )
    for setting in ("`n_train`: `8`", "`photographs`: `''`", "`readout_padding`: `0`, `1`, `2`"):
        assert f"- {setting}\n" in page
    assert "`kernel`: `3`" in page and "`mirrored`" not in page
    capsys.readouterr()
    # The page of other settings stays.
    assert position_tables.main([*arguments, "n_test=5"]) == 2
    error = capsys.readouterr().err
    assert "has readout_padding.md with other settings; choose another --workdir" in error
    assert (tmp_path / "readout_padding.md").read_text() == page
    for setting, message in (
        ("n_trian=3", "n_trian is not a key of the configuration; did you mean n_train?"),
        ("n_train=three", "n_train='three' is not of the type int"),
        ("kernel=31", "kernel=31 is not between 1 and"),
    ):
        capsys.readouterr()
        assert position_tables.main([*arguments, setting]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, rows",
    [
        ("main", 3),
        ("kernels", 6),
        ("stages", 6),
        ("readout_padding", 3),
        ("encoder_padding", 2),
        ("controls", 7),
        ("depth", 6),
        ("weights", 18),
        ("photographs", 24),
    ],
)
def test_every_table_is_a_set_of_studies_that_fit(name, rows, tmp_path):
    trained = {
        encoder: (str(tmp_path / f"{encoder}.safetensors"), ())
        for encoder in ("squeezenet1_1", "mobilenet_v2", "resnet18")
    }
    for path, _ in trained.values():
        pathlib.Path(path).touch()
    options = argparse.Namespace(photographs="", weights="random", trained=trained, seeds=1, set=[])
    assert len(position_tables.TABLES[name]) == rows
    for row in position_tables.TABLES[name]:
        config = position_tables.configure(row, options)
        is_control = row.encoder in study.CONTROLS
        assert is_control or row.encoder in config.encoders
        assert is_control or row.padding in config.paddings
        for name_of_target, data in row.paper:
            assert name_of_target in config.targets
            assert data in config.data
        # Tracing is slow, so each study is checked once.
        is_first = row.padding == row.changes["paddings"][0]
        if is_first:
            study.check(config)


@pytest.mark.parametrize(
    "value, text",
    [
        (-10.43, "-10.43"),
        (10.0, "10.00"),
        (0.1, ".10"),
        (-0.5, "-.50"),
        (-0.004, ".00"),
        (1, "1.00"),
    ],
)
def test_numbers_are_printed_without_the_zero_before_the_point(value, text):
    assert study.report._decimals(value) == text


@pytest.mark.parametrize(
    "name, setting, message",
    [
        ("kernels", "kernel=1", "the rows of table 'kernels' differ in kernel, which is 1, 3, 7"),
        ("depth", "depth=2", "the rows of table 'depth' differ in depth, which is 1, 2, 3"),
        ("photographs", "n_train=8", "differ in n_train, which is 24, 96, 384"),
        ("main", "paddings=('reflect',)", "the rows of a table name their own paddings"),
        (
            "photographs",
            "depth=2",
            "needs an SGD readout, and its study has them for sgd_paddings=()",
        ),
        ("stages", "encoders=('vgg16',)", "the rows of a table name their own encoders"),
        ("kernels", "hidden=8", "hidden=8: no row of table 'kernels' has hidden layers"),
        ("main", "depth=None", "depth=None is not of the type int"),
        ("main", "depth", "--set depth is not KEY=VALUE"),
    ],
)
def test_a_setting_that_tells_rows_apart_is_refused(name, setting, message, tmp_path, capsys):
    arguments = [name, "--workdir", str(tmp_path / "new"), "--set", setting]
    assert position_tables.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name, setting",
    [("encoder_padding", "kernel=1"), ("controls", "kernel=1"), ("depth", "hidden=8")],
)
def test_a_setting_that_all_rows_share_is_allowed(name, setting):
    options = argparse.Namespace(
        photographs="", weights="random", trained={}, seeds=1, set=[setting]
    )
    position_tables.check_readouts(name, options)
    position_tables.check_overrides(name, options)


def test_settings_may_be_given_one_by_one(tmp_path, monkeypatch):
    settings = []
    monkeypatch.setattr(position_tables, "measure", lambda options: settings.extend(options.set))
    arguments = ["main", "--workdir", str(tmp_path), "--set", "kernel=1", "hidden=8"]
    assert position_tables.main([*arguments, "--set", "n_test=6"]) == 0
    assert settings == ["kernel=1", "hidden=8", "n_test=6"]


@pytest.mark.slow
def test_bad_input_of_tables_is_refused_before_the_first_study(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "run", None)
    monkeypatch.setattr(study, "check", lambda config: None)
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"no weights")
    stages = ["stages", "--trained"]
    for arguments, message in (
        (
            [*stages, "resnet18", str(file)],
            "trained=resnet18 is not an encoder of stages; expected",
        ),
        ([*stages, "vgg16", str(file)], "weights.safetensors"),
        (
            ["photographs"],
            "row 'resnet18, random, 24 photographs, zeros' needs 136 photographs, 24 of them to "
            "fit to; photographs='' has 13, 2 of them to fit to",
        ),
    ):
        assert position_tables.main([*arguments, "--workdir", str(tmp_path / "work")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_tables_keep_studies_of_drawn_photographs_apart(gray_config):
    """Earlier versions took the first photographs of each part."""
    name = position_tables.study_name(gray_config)
    # The digest of before the key `fitted_to`.
    settings = gray_config.to_dict()
    del settings["fitted_to"]
    assert name == files.digest(settings)
    gray_config.fitted_to = "noise"
    assert position_tables.study_name(gray_config) != name
    gray_config.update({"fitted_to": "photographs", "n_train": 4})
    assert position_tables.study_name(gray_config) != files.digest(settings | {"n_train": 4})


def test_the_names_of_tables_studies_stay():
    """Otherwise, the finished studies of a work directory would be measured again."""
    config = posenet.get_config()
    assert position_tables.study_name(config) == "21c78340"


def test_tables_name_studies_by_the_contents_of_their_files(gray_config, tmp_path):
    def name():
        return position_tables.study_name(gray_config, study.digest_inputs(gray_config))

    first = name()
    gray_config.photographs += "/"
    assert name() == first
    (tmp_path / "grays").rename(tmp_path / "moved grays")
    gray_config.photographs = str(tmp_path / "moved grays")
    assert name() == first
    (tmp_path / "moved grays" / "029.png").rename(tmp_path / "moved grays" / "other.png")
    assert name() != first
    names = []
    for file, content in (("a", b"some"), ("b", b"some"), ("c", b"same")):
        (tmp_path / file).write_bytes(content)
        gray_config.weights = str(tmp_path / file)
        names.append(name())
    assert names[0] == names[1] != names[2]
    # Without files of the user's, the names are those of earlier versions.
    gray_config.update({"photographs": "", "weights": "random"})
    assert name() == position_tables.study_name(gray_config)


def test_tables_of_earlier_versions_are_named_by_paths_and_still_count(gray_config, tmp_path):
    contents = study.digest_inputs(gray_config)
    name = position_tables.study_name(gray_config, contents)
    earlier = position_tables.study_name(gray_config)
    find = functools.partial(position_tables.find_folder, tmp_path, name, gray_config)
    assert find() == tmp_path / name
    (tmp_path / earlier).mkdir()
    assert find() == tmp_path / earlier
    (tmp_path / name).mkdir()
    assert find() == tmp_path / name

    settings = position_tables.study_name(gray_config, contents, any_seeds=True)
    plan = position_tables.Plan(None, gray_config, name, settings)
    check = functools.partial(position_tables.check_page, "main", tmp_path, [plan])
    for recorded in (position_tables.study_name(gray_config, any_seeds=True), settings):
        files.write_json(tmp_path / "main.json", [{"settings": recorded}])
        check()
    files.write_json(tmp_path / "main.json", [{"settings": "others"}])
    with pytest.raises(ValueError, match="has main.md with other settings"):
        check()


def test_a_row_shows_readouts_of_its_studys_depth():
    """A deeper readout chosen by `--set` is shown; a row without results is refused."""
    row = position_tables.TABLES["main"][1]
    options = argparse.Namespace(
        photographs="", weights="random", trained={}, seeds=1, set=["depth=2"]
    )
    config = position_tables.configure(row, options)
    common = {"encoder": "vgg16", "padding": "zeros", "target": "H", "data": "natural"}
    deep = common | {"readout": "sgd", "depth": 2}
    exact = common | {"readout": "exact", "depth": 1}
    (record,) = position_tables.compare(row, config, {"rows": [deep, exact]})
    assert record["readout"] == "sgd" and record["paper"] == (0.742, 0.149)
    with pytest.raises(ValueError, match="row 'VGG-16' has no results: .* of depth=2 on vgg16"):
        position_tables.compare(row, config, {"rows": [exact]})


def test_exact_readouts_predict_in_full_precision():
    """By default, accelerators take the product in TF32 or bfloat16."""
    from cnnjax import ridge
    from cnnjax.position.readout import _read_exact

    scaler = ridge.Scaler(mean=jnp.zeros(4), scale=jnp.ones(4))
    kernel = jnp.zeros((3, 3, 4, 2))
    program = jax.make_jaxpr(_read_exact)(scaler, jnp.zeros((1, 9, 9, 4)), kernel, jnp.zeros(2))
    products = [e for e in quick.equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert products
    assert {e.params["precision"] for e in products} == {(lax.Precision.HIGHEST,) * 2}


def test_sgd_readouts_of_too_few_values_for_batch_norm_are_refused():
    """One image is enough if the kernels leave several positions."""
    image = np.ones((1, 3, 3, 4), np.float32)
    goal = target("H", 9)[None]
    for train, settings in (
        (image, {"size": 3}),
        (image, {"size": 2, "hidden": (5,)}),
        (image[:0], {"size": 1}),
    ):
        message = f"^train has features of {len(train)} image.* expected train of at least 2 images"
        with pytest.raises(ValueError, match=message):
            fit_sgd(train, goal, **settings)
    assert np.isfinite(fit_sgd(image, goal, size=2, steps=1)(image)).all()
