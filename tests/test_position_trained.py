"""Position in trained networks: canvases, channels, moved content, training."""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import quick

from cnnjax.data import arrays, augment
from cnnjax.models import base
from cnnjax.models.small import SmallConvNet
from cnnjax.nn import global_avg_pool
from cnnjax.nn.conv import conv
from cnnjax.position import canvas as canvases
from cnnjax.runtime import imagenet
from cnnjax.train.small import pooled_features
from experiments import position_canvas, position_channels, position_shift, position_training


@pytest.fixture(scope="module", autouse=True)
def a_small_cifar():
    """CIFAR-10 is read once for all tests here, which use its first 1,000 images."""
    load = arrays.load

    def first(split):
        return arrays.Split(split.images[:1000], split.labels[:1000])

    @functools.cache
    def load_first(name, data_dir):
        data = load(name, data_dir)
        return dataclasses.replace(data, train=first(data.train), test=first(data.test))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "load", load_first)
        yield


@pytest.fixture(scope="module")
def cifar(a_small_cifar, data_dir):
    return arrays.load("cifar10", str(data_dir))


def _init(model, **options):
    return quick.variables(model, jnp.zeros((1, *model.input_shape)), **options)


# ------------------------------------------------------------------ canvases


@pytest.mark.parametrize("canvas", canvases.CANVASES)
def test_an_image_fills_its_cell_and_nothing_else(canvas):
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    for number, placed in enumerate(canvases.place(images, np.arange(9), canvas)):
        top, left = number // 3 * 32, number % 3 * 32
        assert np.array_equal(placed[top : top + 32, left : left + 32], images[number])
        rest = np.ones((96, 96), bool)
        rest[top : top + 32, left : left + 32] = False
        assert np.array_equal(np.unique(placed[rest], axis=0), [canvases.CANVASES[canvas]])


def test_wrong_cells_counts_and_canvases_are_refused():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    for cell in (-1, 9):
        message = f"^cells: {cell} is not the number of a cell, 0 to 8"
        with pytest.raises(ValueError, match=message):
            canvases.place(images, np.array([0, cell]))
    split = arrays.Split(images, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="^count=3 is not from 0 to 2, the split's images"):
        canvases.draw(split, 3, 0)
    with pytest.raises(ValueError, match="^canvas='red' is not one of black, white, mean"):
        canvases.draw(split, 2, 0, "red")


def test_circular_padding_cannot_tell_the_cell():
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    x = canvases.place(np.repeat(image, 9, 0), np.arange(9)).astype(np.float32) / 255
    logits = {}
    for fill in ("circular", "zeros"):
        model = SmallConvNet(9, fill, input_shape=x.shape[1:], layers=position_canvas.LAYERS)
        logits[fill] = np.asarray(jax.jit(model.apply)(_init(model), x))
    assert np.ptp(logits["circular"], 0).max() < 1e-5 < 1e-3 < np.ptp(logits["zeros"], 0).max()


def test_training_and_test_canvases_are_drawn_from_the_seed(cifar):
    (images, labels), (again, _), (other, _) = (
        canvases.draw(cifar.train, 300, seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(images, again) and not np.array_equal(images, other)
    assert set(labels["location"]) == set(range(9)) and set(labels["object"]) == set(range(10))


# ------------------------------------------------------------------ channels


def test_permutation_hides_the_order_of_channels_and_nothing_else():
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = position_channels.SmallResNet(9, input_shape=(32, 32, 3), widths=(4, 8), permute=True)
    variables, run = (
        _init(model),
        jax.jit(lambda variables, key: model.apply(variables, x, rngs={"dropout": key})),
    )
    drawn = [run(variables, jax.random.key(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.allclose(drawn[0], drawn[2], atol=1e-3)
    head = variables["params"]["head"]
    same = variables | {
        "params": variables["params"]
        | {"head": head | {"kernel": jnp.broadcast_to(head["kernel"][:1], (8, 9))}}
    }
    np.testing.assert_allclose(
        run(same, jax.random.key(0)), run(same, jax.random.key(1)), atol=1e-5
    )


def test_channels_that_change_most_under_mirroring_come_first():
    """The second channel's changes would cancel in a mean."""
    features = np.array([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0]])
    mirrored = np.array([[1.0, 9.0, 5.0], [1.0, 1.0, 5.0]])
    assert position_channels.rank(features, mirrored).tolist() == [1, 2, 0]


def test_a_blind_head_is_a_channel_set_to_zero():
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = position_channels.SmallResNet(9, input_shape=(32, 32, 3), widths=(4, 8))
    variables, gone = _init(model), np.array([1, 5])
    features = jax.jit(lambda v: model.apply(v, x, method="stages", last="layer2"))(variables)[
        "layer2"
    ]
    head = variables["params"]["head"]
    expected = (
        global_avg_pool(conv(features.at[..., gone].set(0), head["kernel"], padding=1))
        + head["bias"]
    )
    logits = jax.jit(model.apply)(position_channels.without(variables, gone), x)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_features_are_the_pooled_last_stage():
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    model = position_channels.SmallResNet(9, input_shape=(32, 32, 3), widths=(4, 8))
    variables = _init(model)
    x = augment.normalize(images, *imagenet.MOMENTS)
    stages = jax.jit(lambda v: model.apply(v, x, method="stages", last="layer2"))(variables)
    variables["params"].pop("head")
    pooled = pooled_features(model, variables, images, batch_size=2)
    np.testing.assert_allclose(pooled, global_avg_pool(stages["layer2"]), atol=1e-5)


# ------------------------------------------------------------------ moved content


@pytest.mark.parametrize("kind", position_shift.KINDS)
@pytest.mark.parametrize(("frame", "scene"), [(1, 0), (0, 1), (0.3, -0.2)])
def test_slopes_tell_the_frame_from_the_scene(kind, frame, scene):
    size, shifts = position_shift._SIZE, np.array(position_shift._SHIFTS)
    place = np.broadcast_to(np.arange(size), (len(shifts), size, size))
    maps = 0.4 + (frame * place + scene * (place + shifts[:, None, None])) / (size - 1)
    if kind == "object":
        # Values beside the object do not count.
        inside = (place + shifts[:, None, None] >= size - 64) & (
            place + shifts[:, None, None] < size
        )
        rows = np.arange(size)[:, None]
        maps = np.where(inside & (rows >= 64) & (rows < 128), maps, 9.0)
    np.testing.assert_allclose(position_shift.slopes(maps, kind), (frame, scene), atol=1e-9)


@pytest.mark.slow
def test_content_moves_to_the_left_under_a_fixed_frame(tmp_path):
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 330, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    scenes = position_shift.scenes(tmp_path / "a.png")
    windows, objects = scenes["photograph"], scenes["object"]
    assert np.array_equal(windows[1:, :, :-32], windows[:-1, :, 32:])
    for number, shift in enumerate(position_shift._SHIFTS):
        left = 128 - shift
        assert np.array_equal(objects[number, 64:128, left : left + 64], windows[0, 64:128, 64:128])
        assert (objects[number] == 128).all(-1).sum() >= 192**2 - 64**2
    PIL.Image.fromarray(np.zeros((192, 319, 3), np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="192x319, smaller than 192x320"):
        position_shift.scenes(tmp_path / "b.png")


@pytest.mark.parametrize("count", [13, 130])
def test_the_largest_batch_does_not_grow_with_the_photographs(monkeypatch, count):
    batches = []

    def encode(model, variables, images, stages, first):
        batches.append((first, len(images)))
        return images

    def blank(number):
        return np.zeros((number, 1, 1, 3), np.uint8)

    def follow(readout, kind, path, maps):
        return kind, path, len(maps)

    moved = dict.fromkeys(position_shift.KINDS, blank(5))
    crops = lambda part, number, size, seed: blank(number)
    monkeypatch.setattr(position_shift.photographs, "random_crops", crops)
    monkeypatch.setattr(position_shift, "scenes", lambda path: moved)
    monkeypatch.setattr(position_shift, "random_encoder", lambda *arguments: (None, {}, ()))
    monkeypatch.setattr(position_shift, "encode", encode)
    monkeypatch.setattr(position_shift, "fit_exact", lambda *arguments: "readout")
    monkeypatch.setattr(position_shift, "follow", follow)
    paths = [pathlib.Path(f"{number:03}.jpg") for number in range(count)]
    *_, test = position_shift.photographs.split(paths, position_shift._PARTS, 0)
    point = position_shift.Point("resnet18", "zeros", 0)
    followed = position_shift.measure(point, None, paths)["scenes"]
    assert followed == [(*scene, 5) for scene in itertools.product(position_shift.KINDS, test)]
    # The photographs that packages carry are encoded together, as they always were: 24 images to
    # fit to, 6 to hold out, and 5 photographs in 5 windows of 2 kinds.
    assert batches[0] == (0, 80)
    numbers, sizes = zip(*batches)
    assert max(sizes) == 80
    # Images of all batches are numbered, so that each has noise of its own under "random".
    assert list(numbers) == [0, *np.cumsum(sizes)[:-1]]


def test_moved_photographs_are_checked_by_their_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(position_shift.photographs, "read_image", pytest.fail)
    options = argparse.Namespace(photographs=str(tmp_path))
    for name in "ab":
        PIL.Image.new("RGB", (320, 192)).save(tmp_path / f"{name}.png")
    message = "^photographs: 2 files; expected at least 3, one for each of the disjoint parts$"
    with pytest.raises(ValueError, match=message):
        position_shift.load(options)
    PIL.Image.new("RGB", (320, 192)).save(tmp_path / "c.png")
    assert len(position_shift.load(options)) == 3
    PIL.Image.new("RGB", (319, 192)).save(tmp_path / "d.png")
    with pytest.raises(ValueError, match="d.png is 192x319, smaller than 192x320"):
        position_shift.load(options)


@pytest.mark.parametrize("count, is_drawn", [(13, False), (100, True)])
def test_the_study_knows_whether_photographs_are_drawn(monkeypatch, count, is_drawn):
    paths = [pathlib.Path(f"{number}.jpg") for number in range(count)]
    monkeypatch.setattr(position_shift.photographs, "find_photographs", lambda folder: (paths, ""))
    point = position_shift.Point("resnet18", "zeros", 1)
    options = argparse.Namespace(photographs="")
    assert position_shift.STUDY.draws(point, options) == is_drawn


@pytest.mark.slow
def test_every_encoder_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(
        base._REGISTRY, "resnet18", functools.partial(SmallConvNet, layers=((16, 2),) * 5)
    )
    arguments = [
        "--workdir",
        str(tmp_path),
        "--seeds",
        "1",
        "--encoders",
        "resnet18",
        "--paddings",
        "zeros",
    ]
    assert position_shift.main(arguments) == 0
    (row,) = json.loads((tmp_path / "shift.json").read_text())
    assert [scene["kind"] for scene in row["scenes"]] == ["photograph"] * 5 + ["object"] * 5
    frame, scene = (
        np.mean([slopes[key] for slopes in row["scenes"][:5]]) for key in ("frame", "scene")
    )
    # With zeros, position follows the frame.
    assert abs(scene) < frame / 2
    assert (
        "| resnet18 | zeros | photograph | " in (tmp_path / "report.md").read_text()
        and (tmp_path / "shift.png").stat().st_size > 1000
    )


# ------------------------------------------------------------------ training


def test_shifted_windows_show_what_lies_beside_the_middle():
    rows, columns = np.mgrid[:32, :32]
    image = np.stack([rows, columns, 0 * rows], -1)[None].astype(np.uint8)
    middle, shifted = position_training.windows(image, 1)
    assert middle.shape == (1, 24, 24, 3) and middle[0, 0, 0].tolist() == [4, 4, 0]
    assert shifted[:, 0, 0, 0, :2].tolist() == [[0, 0], [0, 8], [8, 0], [8, 8]]
    for small, large in zip((middle, shifted), position_training.windows(image, 2)):
        assert all(
            np.array_equal(small, large[..., top::2, left::2, :])
            for top in (0, 1)
            for left in (0, 1)
        )


def save_photographs(folder, *levels):
    """Saves a gray photograph of each level; returns their paths."""
    folder.mkdir()
    for level in levels:
        pixels = np.full((30, 40 + level, 3), level, np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{level:03}.png")
    return sorted(folder.iterdir())


def test_photographs_have_the_margin_that_a_network_needs(tmp_path):
    # conv2 sees 2 px on each side, and its stride is 2.
    model = SmallConvNet(input_shape=(72, 72, 3), layers=((8, 1), (16, 2)))
    paths = save_photographs(tmp_path / "photographs", 10, 20, 30)
    context = position_training.draw_photographs(model, paths, 0, 3)
    # The margin of 6 px is a multiple of the needed 2 px and of enlarged pixels of 3 px.
    assert context.shape == (3, 72 + 12, 72 + 12, 3)
    assert sorted(context[:, 0, 0, 0]) == [10, 20, 30]
    np.testing.assert_array_equal(context[:, ::3, ::3].repeat(3, 1).repeat(3, 2), context)
    drawn = [position_training.draw_photographs(model, paths, seed, 3) for seed in range(5)]
    assert len({tuple(images[:, 0, 0, 0]) for images in drawn}) > 1


def test_zeros_leave_a_pattern_and_a_border_that_goes_on_as_the_photograph_leaves_none():
    model = SmallConvNet(input_shape=(24, 24, 3), layers=((4, 1), (8, 2)))
    variables = quick.variables(model)
    # Replication continues a constant photograph. Two nearly equal ones share the zeros' pattern.
    context = np.full((2, 28, 28, 3), 90, np.uint8)
    context[1] += 1
    rows = {}
    for padding in ("zeros", "replicate"):
        rows[padding] = position_training.trace(
            model.clone(padding=padding), variables, context, 24
        )
        assert [row["stage"] for row in rows[padding]] == ["conv1", "conv2"]
    for zeros, replicate in zip(rows["zeros"], rows["replicate"]):
        assert zeros["mae"] > 0.01
        assert zeros["shared"] == pytest.approx(1, abs=0.01)
        assert replicate["mae"] < 1e-6


def network_of(padding, seed, **fields):
    """Returns the result of a network with one stage; its R2 rises with the seed."""
    probes = []
    for epoch, stage, name, data in itertools.product(
        (0, 1), ("conv1", "all"), ("H", "V"), ("natural", "black")
    ):
        row = {"epoch": epoch, "stage": stage, "target": name, "data": data}
        probes.append(row | {"spc": 0.5, "r2": 0.2 + 0.1 * seed + 0.3 * epoch})
    scores = {"accuracy": 0.5, "shifted": 0.4, "agreement": 0.6, "probes": probes}
    return {"part": "network", "padding": padding, "seed": seed} | scores | fields


def test_patterns_stand_beside_the_readout_and_results_without_them_are_reported():
    image = {"part": "image", "padding": "", "seed": 0}
    image["probes"] = [{"target": "H", "data": "natural", "r2": 0.0}]
    options = argparse.Namespace(network="", enlarge=1, train=100, epochs=1, photographs=None)
    before = [image, *(network_of("zeros", seed) for seed in (0, 1))]
    text, figures = position_training.report(before, options)
    assert "were not measured: `--photographs` was not given." in text
    assert len(figures["training.png"].axes) == 4
    options.photographs = ""
    moving = [image, *(network_of("none", seed, patterns=[]) for seed in (0, 1))]
    text, _ = position_training.report(moving, options)
    assert "were not measured: all fills here move positions." in text

    traces = []
    for epoch in (0, 1):
        row = {"epoch": epoch, "stage": "conv1", "mae": 0.1 + epoch, "shared": 0.6 - 0.2 * epoch}
        traces.append(row)
    results = [image]
    for seed in (0, 1):
        results.append(network_of("zeros", seed, patterns=traces))
        results.append(network_of("none", seed, patterns=[]))
    text, figures = position_training.report(results, options)
    assert "| zeros | conv1 | 0.25 ± 0.07 | 0.55 ± 0.07 |" in text
    assert "| zeros | conv1 | 0.10 ± 0.00 | 1.10 ± 0.00 |" in text
    assert "| zeros | conv1 | 0.60 ± 0.00 | 0.40 ± 0.00 |" in text
    assert text.count("| none | conv1 |") == 1
    assert len(figures["training.png"].axes) == 6


def test_differences_between_paddings_and_by_training_are_paired():
    results = []
    for seed in (0, 1, 2):
        # Seeds differ by far more than paddings do: 2, 3 and 4 points.
        accuracy = 0.3 + 0.2 * seed
        results.append(network_of("zeros", seed, accuracy=accuracy))
        higher = accuracy + 0.02 + 0.01 * seed
        results.append(network_of("reflect", seed, accuracy=higher, agreement=0.5))
    options = argparse.Namespace(enlarge=2)
    text = position_training.tabulate_differences(results, 1, options)
    assert "| padding | accuracy, % | shifted by 8 px | same answer |" in text
    # 2.48 is half of Student's interval of three differences whose deviation is 1.
    line = "| reflect - zeros | +3.0 ± 2.5 | +0.0 ± 0.0 | -10.0 ± 0.0 | +0.00 ± 0.00 |"
    assert line in text
    text = position_training.tabulate_training(results, 1)
    assert "| zeros | +0.30 ± 0.00 | +0.30 ± 0.00 | +0.30 ± 0.00 | 3 |" in text


def run(module, *arguments, **changes):
    """Returns an experiment's exit code; `changes` replace names of its module to make it small."""
    with mock.patch.multiple(module, **changes):
        return quick.exit_code(module.main, [str(argument) for argument in arguments])


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_run_probes_tests_reports_and_goes_on_where_it_stopped(tmp_path, data_dir):
    small = functools.partial(SmallConvNet, layers=((8, 1), (16, 2)))
    changes = {"_PROBE": (16, 4, 8), "SmallConvNet": small}
    arguments = [
        *("--workdir", tmp_path, "--data_dir", data_dir, "--train", 200, "--epochs", 1),
        *("--test", 200, "--paddings", "zeros", "none", "--seeds"),
    ]
    assert run(position_training, *arguments, 1, **changes) == 0
    results = json.loads((tmp_path / "training.json").read_text())
    image, zeros, none = results
    assert image["part"] == "image" and {row["stage"] for row in image["probes"]} == {"image"}
    assert {entry["epoch"] for entry in zeros["probes"]} == {0, 1}
    assert len(zeros["probes"]) == 2 * 3 * 2 * 2
    spc = lambda row: [entry["spc"] for entry in row["probes"] if entry["data"] == "black"]
    # On a black image, only zeros show the position.
    assert np.mean(spc(zeros)) > 0.2
    assert set(spc(none)) == {0}
    assert "| zeros | " in (tmp_path / "report.md").read_text()
    assert (tmp_path / "training.png").stat().st_size > 1000

    # Finished networks are not probed again, which would fail here. The same holds for networks of
    # an earlier version that measured no patterns.
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("photographs") is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path / "points").glob("part=network*"):
        point = json.loads(path.read_text())
        assert point.pop("patterns") == []
        path.write_text(json.dumps(point))
    changes["probe"] = None
    assert run(position_training, *arguments, 1, **changes) == 0
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        run(position_training, *arguments, 2, **changes)


def test_shifted_windows_are_compared_with_the_labels_and_with_the_middle(monkeypatch):
    """The network names the value of a window's first pixel."""
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[1, 4, 4] = 1
    images[:, (0, 0, 8, 8), (0, 8, 0, 8)] = 1
    images[0, 8, 8] = 0
    split = arrays.Split(images, np.zeros(2, np.int32))
    data = arrays.Dataset(train=split, validation=None, test=split, classes=())
    for name in ("build", "probe"):
        monkeypatch.setattr(position_training, name, lambda *arguments: [])
    monkeypatch.setattr(position_training, "train_epochs", lambda *arguments, **options: [{}])
    classify = lambda model, variables, windows: windows[:, 0, 0, 0]
    monkeypatch.setattr(position_training, "classify", classify)
    options = argparse.Namespace(enlarge=1, train=2, epochs=0, test=2)
    point = position_training.Point("network", "zeros", 0)
    result = position_training.measure(point, options, position_training.Shared(data, []))
    assert result["accuracy"] == 1 / 2
    assert result["shifted"] == 1 / 8
    assert result["agreement"] == 5 / 8


# Networks for CIFAR-10; without padding, the second has no output.
TINY = """
import functools
from cnnjax.models import base
from cnnjax.models.small import SmallConvNet
base.register("tiny", functools.partial(SmallConvNet, layers=((8, 6), (16, 6))))
base.register("narrow", functools.partial(SmallConvNet, layers=((8, 12), (16, 1))))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@mock.patch.dict(base._REGISTRY)
@mock.patch.dict(base._FILES)
def test_a_registered_network_is_probed_in_its_stages(tmp_path, data_dir, capsys):
    path = tmp_path / "networks.py"
    path.write_text(TINY)

    def probe(network, workdir, *arguments):
        given = ("--data_dir", data_dir, "--train", 200, "--epochs", 1, "--test", 200)
        given += ("--seeds", 1, "--network", f"{path}:{network}", "--workdir", workdir)
        return run(position_training, *given, *arguments, _PROBE=(16, 4, 8))

    photographs = tmp_path / "photographs"
    save_photographs(photographs, 10, 20)
    patterns = ("--photographs", photographs)
    assert probe("tiny", tmp_path / "a", "--paddings", "random", "none", *patterns) == 0
    _, network, unpadded = json.loads((tmp_path / "a" / "training.json").read_text())
    assert {entry["stage"] for entry in network["probes"]} == {"conv1", "conv2", "all"}
    traces = [(row["epoch"], row["stage"]) for row in network["patterns"]]
    assert traces == [(0, "conv1"), (0, "conv2"), (1, "conv1"), (1, "conv2")]
    assert all(row["mae"] > 0 for row in network["patterns"])
    assert unpadded["patterns"] == []
    text = (tmp_path / "a" / "report.md").read_text()
    assert "tiny" in text
    assert "Shared change:" in text

    assert probe("narrow", tmp_path / "c", "--paddings", "none", "--enlarge", 2) == 0
    assert "48x48 px (24x24 px, each made 2x2)" in (tmp_path / "c" / "report.md").read_text()
    assert probe("narrow", tmp_path / "b", "--paddings", "zeros", "none") == 2
    assert "the image is too small for this network" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()

    (photographs / "020.png").unlink()
    assert probe("narrow", tmp_path / "b", "--paddings", "zeros", *patterns) == 2
    assert "' has 1 photograph; at least 2 are needed" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_canvas_networks_are_reported(tmp_path, data_dir):
    arguments = [
        *("--data_dir", data_dir, "--seeds", 1, "--train", 50, 50, "--epochs", 1, 1),
        *("--test", 100, "--paddings", "zeros", "--canvases", "mean", "--workdir", tmp_path),
    ]
    assert run(position_canvas, *arguments, LAYERS=((8, 2), (16, 2))) == 0
    rows = json.loads((tmp_path / "canvas.json").read_text())
    assert [(row["task"], row["canvas"]) for row in rows] == [
        ("location", "mean"),
        ("object", "mean"),
    ]
    assert "| zeros | " in (tmp_path / "report.md").read_text()
    assert (tmp_path / "canvas.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_channel_networks_are_reported(tmp_path, data_dir):
    arguments = [
        *("--workdir", tmp_path, "--data_dir", data_dir, "--seeds", 1),
        *("--train", 100, "--epochs", 1, "--test", 100),
    ]
    changes = {
        "SmallResNet": functools.partial(position_channels.SmallResNet, widths=(4, 8)),
        "_REMOVED": (0, 8),
        "NETWORKS": ("gapnet",),
        "TASKS": {"location": 9},
    }
    assert run(position_channels, *arguments, **changes) == 0
    (row,) = json.loads((tmp_path / "channels.json").read_text())
    # With no channel or all channels removed, their order does not matter.
    assert row["ranked"] == pytest.approx(row["random"])
    assert row["ranked"][0] == row["accuracy"]
    assert "| gapnet | location | " in (tmp_path / "report.md").read_text()
    assert (tmp_path / "channels.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [position_training, position_canvas, position_channels, position_shift]
)
def test_bad_input_is_one_line_and_exit_code_2(script, tmp_path, data_dir, capsys):
    """There are 1,000 training and 1,000 test images here."""
    assert quick.exit_code(script.main, ["--workdir", str(tmp_path), "--seeds", "0"]) == 2
    error = "argument --seeds: '0' is not a whole number of at least 1\n"
    assert capsys.readouterr().err.endswith(f": error: {error}")
    # Canvases take two numbers of training images.
    train = ["1000"] * (2 if script is position_canvas else 1)
    wrong = ["--data_dir", str(data_dir), "--train", *train, "--test", "1001"]
    error = "test=1001 is more than the 1000 images of that part"
    if script is position_shift:
        wrong, error = ["--photographs", "absent"], "photographs='absent' is not a folder"
    assert script.main(["--workdir", str(tmp_path), *wrong]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"
    assert not (tmp_path / "config.json").exists()
