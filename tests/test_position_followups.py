"""Padding without a trained readout: quadrants, patterns, and blind spots."""

import argparse
import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import PIL.Image
import pytest
import quick
from quick import exit_code

from cnnjax import weights
from cnnjax.data import photographs
from cnnjax.inspect import Window, receptive_fields, windows
from cnnjax.models import base, create_model
from cnnjax.models.mobilenet import MobileNetV2
from cnnjax.nn import Conv, max_pool
from cnnjax.position import encoder, patterns, subjects
from cnnjax.position.encoder import normalize, registered, stage_shapes
from experiments import position_patterns, position_quadrant


class Tiny(base.Network):
    """Three stages at strides 1, 2, and 4, named like a ResNet's last stages."""

    # Whether the images are rounded.
    whole: bool = False

    @nn.nowrap
    def walk(self, x, train):
        conv = functools.partial(Conv, 4, 3, padding=1, fill=self.padding, use_bias=False)
        x = jnp.round(x) if self.whole else x
        x = nn.relu(conv(name="a")(x))
        yield "layer2", x
        x = nn.relu(conv(stride=2, name="b")(x))
        yield "layer3", x
        x = nn.relu(conv(name="c")(max_pool(x, 3, 2, padding=1, fill=self.padding)))
        yield "layer4", x
        yield "logits", x.mean((1, 2))


STAGES = ["layer2", "layer3", "layer4"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(base._REGISTRY, "tiny", Tiny)
    monkeypatch.setitem(base._REGISTRY, "resnet18", Tiny)
    monkeypatch.setattr(
        patterns,
        "_stages",
        jax.jit(patterns._stages.__wrapped__, static_argnames=("model", "stages")),
    )
    monkeypatch.setattr(
        position_quadrant,
        "_maxima",
        jax.jit(position_quadrant._maxima.__wrapped__, static_argnames=("model", "last")),
    )
    return lambda **fields: create_model("tiny", **fields)


def images(side, seed=0, count=3):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def variables_of(model, side=32):
    image = jnp.zeros((1, side, side, 3))
    drawn = quick.variables(model.clone(padding="zeros"), image)
    # With kernels of 1 and -1 and whole images, float32 computes exactly.
    return jax.tree.map(np.sign, jax.device_get(drawn)) if model.whole else drawn


def differences(model, variables, context, size, fill):
    crop = context[:, (context.shape[1] - size) // 2 :][:, :size]
    crop = crop[:, :, (context.shape[2] - size) // 2 :][:, :, :size]
    inside = patterns.features_inside(model, variables, context, size, STAGES)
    padded = patterns.features(model.clone(padding=fill), variables, crop, STAGES)
    return {stage: padded[stage] - inside[stage] for stage in STAGES}


def test_the_difference_is_exactly_zero_out_of_reach_of_the_border(tiny):
    model = tiny(whole=True)
    variables, size = variables_of(model), 40
    least = patterns.margin(model, "layer4", size)
    # layer4 sees 8 pixels on each side, and its stride is 4.
    assert least == 8
    # layer2 alone needs 1 pixel, layer3 with its stride of 2 needs 2.
    common = [patterns.common_margin(model, STAGES[:count], size) for count in (1, 2, 3)]
    assert common == [1, 2, 8]
    delta = differences(model, variables, images(size + 2 * least), size, "zeros")
    for stage, d in delta.items():
        field = receptive_fields(model, (stage,))[0][0]
        positions = np.arange(d.shape[1]) * field.step[0]
        free = np.flatnonzero((positions + field.low[0] >= 0) & (positions + field.high[0] < size))
        assert np.array_equal(np.unique(d[:, free[0] : free[-1] + 1, free[0] : free[-1] + 1]), [0])
        # At the border, the features differ.
        assert d[:, 0].any() and d[:, :, 0].any() and 0 < free[0]
    with pytest.raises(
        ValueError,
        match="context of 58x58 about a crop of size=40 does not fit stage='layer4'; expected a "
        "square with a "
        "margin of at least 8, a multiple of 4",
    ):
        patterns.features_inside(model, variables, images(58), size, ["layer4"])


def test_the_difference_is_zero_where_the_padding_is_what_surrounds_the_crop(tiny):
    model, size = tiny(whole=True), 24
    variables = variables_of(model)
    # Tiles continue a crop in the same way as circular padding.
    tiled = np.tile(images(size), (1, 3, 3, 1))
    for d in differences(model, variables, tiled, size, "circular").values():
        assert not d.any()
    assert differences(model, variables, tiled, size, "zeros")["layer2"].any()
    # These three fills continue a constant image unchanged.
    flat = np.full((2, 48, 48, 3), 90, np.uint8)
    for fill in ("reflect", "replicate", "circular"):
        assert not differences(model, variables, flat, size, fill)["layer4"].any()
    assert differences(model, variables, flat, size, "zeros")["layer4"].any()


def rms(strength):
    return np.sqrt(np.square(strength.pattern).mean())


def test_strength_finds_what_was_put_in():
    rng = np.random.default_rng(0)
    inside = rng.standard_normal((400, 9, 9, 5)).astype(np.float32)
    pattern = np.zeros((9, 9, 5), np.float32)
    pattern[0] = 2.0
    noise = rng.standard_normal(inside.shape).astype(np.float32)
    pure = patterns.strength(inside + pattern + 1e-6 * noise, inside)
    assert pure.shared == pytest.approx(1, abs=1e-5) and rms(pure) == pytest.approx(2 / 3, rel=1e-2)
    assert pure.mae == pytest.approx(2 / 9 / np.sqrt(2 / np.pi), rel=1e-2)
    assert (
        pure.pattern[0] == pytest.approx(np.full(9, 2.0), rel=1e-2)
        and pure.pattern[1:].max() < 1e-3
    )
    assert (
        pure.profile[0] == pytest.approx(2 * np.sqrt(9 / 32), rel=1e-2)
        and pure.profile[1:].max() < 1e-3
    )
    nothing = patterns.strength(inside[:10] + noise[:10], inside[:10])
    assert abs(nothing.shared) < 0.02 and nothing.snr == pytest.approx(0.8 / np.sqrt(10), rel=0.1)
    # The noise has as much energy as the pattern.
    half = patterns.strength(inside + pattern + 2 / 3 * noise, inside)
    assert half.shared == pytest.approx(0.5, abs=0.01)
    shrunk = patterns.strength(1e-25 * (inside + pattern), 1e-25 * inside)
    assert rms(shrunk) == pytest.approx(2 / 3, rel=1e-2)
    assert patterns.strength(inside, inside)[:3] == (0, 0, 0)
    with pytest.raises(ValueError, match="of 2 images or more"):
        patterns.strength(inside[:1], inside[:1])


def matrix(window, n, fill):
    """Returns how often each of n cells enters each output of a window on one axis."""
    padding = {"none": 0, "full": window.kernel - 1}.get(fill, window.padding)
    rows = []
    for start in range(-padding, n + padding - window.kernel + 1, window.stride):
        row = np.zeros(n)
        for at in range(start, start + window.kernel):
            source = {
                "reflect": abs(at) if at < n else 2 * (n - 1) - at,
                "replicate": min(max(at, 0), n - 1),
                "circular": at % n,
            }.get(fill, at)
            if 0 <= source < n:
                row[source] += 1
        taps = row.sum() if fill == "partial" else window.kernel
        rows.append(row / taps)
    return np.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fill", ["zeros", "none", "reflect", "replicate", "circular", "partial", "full"]
)
def test_reads_are_counted_right(fill):
    chain = (
        Window("a", 5, 2, 2),
        Window("b", 3, 1, 1),
        Window("c", 3, 2, 1),
    )
    for size in (21, 22):
        n = size
        product = np.eye(size)
        for window in chain:
            product = matrix(window, n, fill) @ product
            n = len(product)
        ways = product.sum(0)
        counts = np.outer(ways, ways)
        np.testing.assert_allclose(
            patterns.reads(chain, size, fill), counts / counts.mean(), rtol=1e-4, atol=1e-5
        )
        is_symmetric = np.allclose(ways, ways[::-1])
        assert (patterns.asymmetry(np.outer(ways, ways)) < 1e-6) == is_symmetric
    assert patterns.asymmetry(np.array([[2.0, 0]])) == 1
    with pytest.raises(ValueError, match="fill='random' depends on the image"):
        patterns.reads(chain, 21, "random")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, stages",
    [
        ("resnet18", {"stem": 1, "layer3": 14}),
        ("vgg11", {"block3": 6}),
        ("mobilenet_v2", {"stage3": 7}),
    ],
)
def test_windows_are_those_of_the_networks(name, stages):
    model = create_model(name)
    chain = windows(model)
    shapes = stage_shapes(model, 90, list(stages)[-1])
    for stage, count in stages.items():
        step, low, high, n = 1, 0, 0, 90
        for window in chain[:count]:
            low, high = (
                low - window.padding * step,
                high + (window.kernel - 1 - window.padding) * step,
            )
            step *= window.stride
            n = (n + 2 * window.padding - window.kernel) // window.stride + 1
        field = receptive_fields(model, (stage,))[0][0]
        assert (field.step[0], field.low[0], field.high[0], shapes[stage][1]) == (
            step,
            low,
            high,
            n,
        ), stage


@pytest.mark.slow
def test_sizes_that_are_read_evenly():
    even = {}
    for name in ("resnet18", "resnet50", "mobilenet_v2", "vgg16"):
        chain = windows(create_model(name))
        unread = {size: patterns.unread(chain, size) for size in range(193, 257)}
        even[name] = [size for size in unread if not any(unread[size].values())]
    assert even == {
        "resnet18": [193, 225],
        "resnet50": [193, 225],
        "mobilenet_v2": [193, 225],
        "vgg16": [224, 256],
    }
    # Alsallakh et al. 2021: 224 is uneven at every down-sampling layer.
    chain = windows(create_model("resnet18"))
    assert list(patterns.unread(chain, 224).values()) == [1] * 5
    assert isinstance(create_model("mobilenet_v2"), MobileNetV2)
    with pytest.raises(ValueError, match="size=1 is too small: nothing is left of it after pool1"):
        patterns.unread(windows(create_model("vgg16")), 1)
    alexnet = windows(create_model("alexnet"))
    assert [window[1:] for window in alexnet] == [
        (11, 4, 2, False),
        (3, 2, 0, True),
        (5, 1, 2, False),
        (3, 2, 0, True),
        (3, 1, 1, False),
        (3, 1, 1, False),
        (3, 1, 1, False),
        (3, 2, 0, True),
    ]
    with pytest.raises(ValueError, match="model=GoogLeNet2014 has a window, pool1, with unequal"):
        windows(create_model("googlenet_2014"))


def test_windows_side_by_side_form_no_chain():
    with pytest.raises(ValueError, match="model=Beside has windows side by side, b and a"):
        windows(Beside())


def test_stages_out_of_order_are_named(tiny):
    model = tiny()
    message = "stage='layer3' is not a stage of this network up to 'layer2'"
    with pytest.raises(ValueError, match=message):
        patterns.features(model, variables_of(model), images(32), ["layer3", "layer2"])


def test_one_stage_may_stand_alone_and_no_stage_is_refused(tiny):
    model = tiny()
    variables = variables_of(model)
    alone = patterns.features(model, variables, images(32), "layer2")
    listed = patterns.features(model, variables, images(32), ["layer2"])
    np.testing.assert_array_equal(alone["layer2"], listed["layer2"])
    assert patterns.common_margin(model, "layer4", 40) == 8
    for call in (
        lambda: patterns.features(model, variables, images(32), []),
        lambda: patterns.features_inside(model, variables, images(56), 40, []),
        lambda: patterns.common_margin(model, [], 40),
    ):
        with pytest.raises(ValueError, match=r"^stages=\[\] names no stage$"):
            call()


def test_images_that_are_not_uint8_are_refused(tiny, monkeypatch):
    """Floats of 0 to 1 would be divided by 255 once more."""
    # Users' programs run without the checks of types that the tests turn on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = tiny()
    variables = variables_of(model)
    floats = images(32).astype(np.float32) / np.float32(255)
    for call in (
        lambda x: patterns.features(model, variables, x, "layer2"),
        lambda x: patterns.features_inside(model, variables, x, 24, "layer2"),
        lambda x: encoder.encode(model, variables, x, "layer2"),
        lambda x: encoder.encode_once("unused", model, variables, x, "layer2"),
        lambda x: encoder.encode_on_grids(model, variables, x, "layer2", encoder.GRIDS),
        encoder.image_features,
    ):
        message = r"^images are float32 \[3, 32, 32, 3\]; expected uint8 \[n, height, width, 3\]$"
        with pytest.raises(ValueError, match=message):
            call(floats)
        with pytest.raises(ValueError, match=r"^images are uint8 \[32, 32, 3\]; expected"):
            call(images(32)[0])


def test_unequal_strides_are_refused():
    class Wide(base.Network):
        @nn.nowrap
        def walk(self, x, train):
            x = yield "wide", Conv(4, 3, (1, 2), padding=1, name="a")(x)
            yield "logits", x.mean((1, 2))

    model = Wide(input_shape=(16, 16, 3))
    message = "stage='wide' has a stride of 1 down and 2 to the right; expected equal ones"
    with pytest.raises(ValueError, match=message):
        patterns.margin(model, "wide", 16)
    with pytest.raises(ValueError, match="stage='wide' has a receptive field that differs"):
        registered(model, ("wide",), 16)


def test_a_network_without_a_margin_shows_whole_crops(tmp_path):
    """Crops are as large as the photographs that they are cut out of."""
    paths = []
    for number, image in enumerate(images(32, count=2)):
        paths.append(tmp_path / f"{number}.png")
        PIL.Image.fromarray(image).save(paths[-1])
    subject = subjects.Subject("tutorial_net", 32, None, ())
    assert subject.margin == 0
    inside = subjects.look_inside(subject, 0, tuple(paths))
    np.testing.assert_array_equal(inside.crop, images(32, count=2))


class Beside(base.Network):
    """A network with two windows, of 3 and of 5 pixels, side by side."""

    input_shape: tuple[int, int, int] = (16, 16, 1)

    @nn.nowrap
    def walk(self, x, train):
        small = Conv(1, 3, padding=1, name="a")(x)
        large = Conv(1, 5, padding=2, name="b")(x)
        yield "logits", (small + large).mean((1, 2))


@pytest.mark.slow
def test_full_and_circular_hide_the_rook_from_every_kernel(standard_promotion):
    train = jax.jit(position_quadrant.train_rook.__wrapped__, static_argnames="padding")
    assert train("zeros", jax.random.key(0)) == 1  # published: 100 %
    shares = {
        fill: position_quadrant.kernels_that_differ(fill, 0)
        for fill in ("zeros", "none", "full", "circular")
    }
    assert shares["none"] > shares["zeros"] > 0.1 and shares["full"] == shares["circular"] == 0


@pytest.mark.slow
def test_quadrants_and_their_readout(tiny):
    content = images(56, count=4)
    for border in (5, 0):
        canvases = position_quadrant.canvases(content, border)
        assert canvases.shape == (8, 120 + 2 * border, 120 + 2 * border, 3)
        at = [slice(border, border + 56), slice(border + 64, border + 120)]
        for place in (0, 1):
            np.testing.assert_array_equal(
                canvases[4 * place : 4 * place + 4, at[place], at[place]],
                np.asarray(normalize(jnp.asarray(content))),
            )
            assert np.count_nonzero(canvases[4 * place]) <= content[0].size
    model = tiny(whole=True)
    variables = variables_of(model)
    maxima = {}
    for fill in ("zeros", "circular"):
        padded = model.clone(padding=fill)
        maxima[fill] = position_quadrant.maxima(padded, variables, canvases, "layer4")["layer4"]
        assert maxima[fill].shape == (8, 4)
    # Circular padding hides the content's place, since 120 pixels are a multiple of the stride.
    np.testing.assert_array_equal(maxima["circular"][:4], maxima["circular"][4:])
    assert (maxima["zeros"][:4] != maxima["zeros"][4:]).any()

    rng = np.random.default_rng(0)
    both = np.tile(rng.standard_normal((1, 40, 30)), (2, 1, 1))
    assert position_quadrant.read_out(both[:, :20], both[:, 20:]) == 0.5
    separated = both + 0.6 * np.array([1, -1])[:, None, None] * rng.standard_normal(30)
    assert position_quadrant.read_out(separated[:, :20], separated[:, 20:]) > 0.9


@pytest.mark.slow
def test_leaving_photographs_out_is_done_exactly(monkeypatch):
    """The closed form equals solving without each photograph in turn."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 6, 4)) + np.array([0.3, -0.3])[:, None, None]
    errors = []
    z = (x.reshape(12, 4) - x.reshape(12, 4).mean(0)) / x.reshape(12, 4).std(0)
    y = np.repeat([1.0, -1.0], 6)
    mean = np.maximum(np.linalg.eigvalsh(z @ z.T), 0).mean()
    for strength in position_quadrant._STRENGTHS:
        error = 0
        for i in range(6):
            rest = np.setdiff1d(np.arange(12), [i, i + 6])
            center = z[rest].mean(0)
            w = np.linalg.solve(
                (z[rest] - center).T @ (z[rest] - center) + strength * mean * np.eye(4),
                (z[rest] - center).T @ y[rest],
            )
            error += np.square((z[[i, i + 6]] - center) @ w - y[[i, i + 6]]).sum()
        errors.append(error)
    computed = []
    left_out_errors = position_quadrant.left_out_errors

    def record(*arguments):
        computed.append(left_out_errors(*arguments))
        return computed[-1]

    monkeypatch.setattr(position_quadrant, "left_out_errors", record)
    position_quadrant.read_out(x, x)
    np.testing.assert_allclose(computed, [errors], rtol=1e-8)


@pytest.mark.slow
def test_the_quadrants_go_on_where_they_stopped(
    tiny, tmp_path, monkeypatch, standard_promotion, capsys
):
    monkeypatch.setattr(position_quadrant, "STAGES", STAGES)
    monkeypatch.setattr(position_quadrant, "train_rook", lambda padding, key: 1.0)
    command = [
        "--workdir",
        str(tmp_path),
        "--images",
        "8",
        "--borders",
        "0",
        "--paddings",
        "zeros",
        "--seeds",
    ]
    position_quadrant.main([*command, "1"])
    finished = tmp_path / "points" / "part=quadrant,padding=zeros,border=0,seed=0.json"
    changed = json.loads(finished.read_text())
    changed["accuracy"]["layer4"] = 0.125
    finished.write_text(json.dumps(changed))
    position_quadrant.main([*command, "2"])
    results = json.loads((tmp_path / "quadrant.json").read_text())
    assert [(result["part"], result["seed"]) for result in results] == [
        ("rook", 0),
        ("rook", 1),
        ("quadrant", 0),
        ("quadrant", 1),
    ]
    assert results[2]["accuracy"]["layer4"] == 0.125
    assert results[3]["accuracy"].keys() == results[2]["accuracy"].keys()
    assert "layer4, published | 100.0" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "quadrants.png").stat().st_size > 1000
    for wrong, message in (
        (["--images", "3"], "'3' is not a whole number of at least 4"),
        (["--images", "10"], "another configuration"),
    ):
        assert exit_code(position_quadrant.main, [*command, "1", *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("sides, shown", [((56, 14, 7), "1"), ((56, 28), "1"), ((56,), None)])
def test_the_figure_of_patterns_shows_the_last_stage_that_is_neither_small_nor_too_large(
    sides, shown
):
    stages = []
    for number, side in enumerate(sides):
        pattern = np.ones((side, side)).tolist() if side <= 28 else None
        profile = [1.0] * (side // 2)
        stages.append({"stage": str(number), "step": 1, "pattern": pattern, "profile": profile})
    result = {"part": "patterns", "encoder": "net", "weights": "random", "padding": "zeros"}
    figure = position_patterns.draw_patterns([result | {"seed": 0, "stages": stages}])
    position_patterns.draw_distances([result | {"seed": 0, "stages": stages}])
    axis = figure.axes[0]
    if shown is None:
        assert axis.get_title() == "net random: all maps are too large"
    else:
        assert axis.get_ylabel() == f"net random\n{shown}"


def test_each_seed_s_photographs_are_drawn_at_random(monkeypatch):
    paths = [pathlib.Path(f"{number:03}.jpg") for number in range(300)]
    monkeypatch.setattr(position_patterns, "list_large", lambda options: paths)
    options = argparse.Namespace(images=12, seeds=3)
    parts = position_patterns.divide_photographs(options)
    chosen = set().union(*parts)
    assert [len(part) for part in parts] == [12] * 3
    assert len(chosen) == 36
    # The first twelve of each part would be among the first 60 or so.
    assert sum(path in paths[100:] for path in chosen) > 12
    options = argparse.Namespace(images=100, seeds=3)
    assert position_patterns.divide_photographs(options) == [
        tuple(part) for part in photographs.split(paths, (1, 1, 1), 0)
    ]
    options = argparse.Namespace(images=12, seeds=301, photographs="few")
    message = "^seeds=301 needs at least 301 photographs, one for each; photographs='few' has 300$"
    with pytest.raises(ValueError, match=message):
        position_patterns.divide_photographs(options)


@pytest.mark.parametrize("images, is_drawn", [(100, False), (12, True)])
def test_the_study_knows_whether_photographs_are_drawn(monkeypatch, images, is_drawn):
    paths = [pathlib.Path(f"{number:03}.jpg") for number in range(300)]
    found = lambda folder: (paths, "")
    monkeypatch.setattr(position_patterns.photographs, "find_photographs", found)
    options = argparse.Namespace(photographs="", images=images, seeds=3)
    draws = position_patterns.STUDY.draws
    trace = position_patterns.Trace("patterns", "resnet18", "random", "zeros", 2)
    assert draws(trace, options) == is_drawn
    # These points have no images.
    assert not draws(position_patterns.Windows("reads", "resnet18"), options)


@pytest.mark.slow
def test_the_patterns_are_reported_for_random_and_trained_weights(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(position_patterns, "READ_BY", ("tiny",))
    monkeypatch.setattr(position_patterns, "SIZES", range(24, 28))
    monkeypatch.setattr(position_patterns, "SHOWN", (24, 25))
    monkeypatch.setattr(position_patterns, "_READ_FILLS", ("zeros", "none"))
    file = tmp_path / "tiny.safetensors"
    model = tiny()
    held = variables_of(model)
    held["params"].pop("c")
    weights.save_torchvision(held, file)
    command = [
        "--workdir",
        str(tmp_path / "run"),
        "--encoders",
        "tiny",
        "--size",
        "48",
        "--images",
        "3",
        "--seeds",
        "2",
        "--paddings",
        "zeros",
        "--trained",
        "tiny",
        str(file),
    ]
    position_patterns.main([*command, "c"])
    results = json.loads((tmp_path / "run" / "patterns.json").read_text())
    # A work directory of an earlier version lacks this, and is refused.
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["photographs_drawn"] == "at random"
    traced = [result for result in results if result["part"] == "patterns"]
    assert [(result["weights"], result["seed"], result["padding"]) for result in traced] == [
        (origin, seed, "zeros") for origin in ("random", "trained") for seed in (0, 1)
    ]
    for result in traced:
        # Only the stages before the absent module are compared.
        assert [stage["stage"] for stage in result["stages"]] == ["layer2", "layer3"]
        profile = result["stages"][1]["profile"]
        assert profile[0] > 0.01
        assert max(profile[2:]) < 1e-5
    [reads] = [result for result in results if result["part"] == "reads"]
    # Both strided windows read 25 pixels evenly: 25 + 2 - 3 and 13 + 2 - 3 are even.
    assert reads["unread"]["25"] == {"b": 0, "pool1": 0}
    assert reads["unread"]["24"] == {"b": 1, "pool1": 1}
    assert reads["asymmetry"]["25"]["zeros"] < 1e-6 < reads["asymmetry"]["24"]["zeros"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| tiny | trained | layer3 | zeros | " in report
    assert "| tiny | 2 | 25 | b, pool1 | none |" in report
    for name in ("patterns.png", "distances.png", "reads.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    command = ["--workdir", str(tmp_path / "other"), *command[2:]]
    for wrong, message in (
        (["--seeds", "7"], "leave a seed fewer than 2 of 13"),
        (["--trained", "tiny"], "trained=tiny names no file"),
        (["--size", "1", "--paddings", "zeros", "reflect"], "reflect"),
    ):
        assert exit_code(position_patterns.main, [*command, "c", *wrong]) == 2
        assert message in capsys.readouterr().err
