"""Segmentation and multiple labels: CamVid, the network, scores, experiments."""

import argparse
import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import quick
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cnnjax import transfer, weights
from cnnjax.data import arrays, augment, sources, splits
from cnnjax.models import Network, base, create_model, fcn
from cnnjax.nn import Conv, Dense, global_avg_pool, max_pool
from cnnjax.nn.parameters import eval_shape
from cnnjax.runtime import workdir
from cnnjax.train import defaults, evaluate, loop, training
from cnnjax.train.parallel import Parallel
from cnnjax.train.training import build_run
from cnnjax.weights import variable_shapes
from experiments import multilabel, segmentation

SIZE = (24, 32)


class Small(Network):
    """Two stages at strides 2 and 4."""

    input_shape: tuple[int, int, int] = (*SIZE, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = nn.relu(Conv(8, 3, 2, padding=1, fill=self.padding, name="conv1")(x))
        yield "block2", x
        x = nn.relu(
            Conv(8, 3, padding=1, fill=self.padding, name="conv2")(
                max_pool(x, 2, fill=self.padding)
            )
        )
        yield "block3", x
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(base._REGISTRY, "scene_net", Small)
    return {"encoder": "scene_net", "scored": ("block2", "block3"), "input_shape": (*SIZE, 3)}


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """Writes a CamVid of a few small scenes; returns the data folder.

    A scene is bright above a random height (sky), dark below (building), and void at the left.
    """
    generator = np.random.default_rng(0)
    counts = (16, 8, 4)
    for part, count in zip(("train", "test", "val"), counts):
        for number in range(count):
            mask = np.zeros(SIZE, np.uint8)
            mask[generator.integers(0, SIZE[0] + 1) :] = 1
            image = np.where(mask[..., None] == 0, 200, 50) + generator.integers(0, 30, (*SIZE, 3))
            mask[:, 0] = 11
            for folder, suffix, content in ((part, "png", image), (f"{part}annot", "png", mask)):
                place = tmp_path / "data" / "camvid" / folder
                place.mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(content.astype(np.uint8)).save(place / f"{number:03}.{suffix}")
    for name in ("camvid", "camvid_scenes"):
        monkeypatch.setitem(
            sources.DATASETS, name, sources.CamVid(arrays.loss_of(name), SIZE, counts)
        )
    return tmp_path / "data"


# ------------------------------------------------------------------ data


@pytest.mark.slow
def test_camvid_is_what_was_published(data_dir):
    camvid = arrays.load("camvid", str(data_dir), 101)
    assert [len(split.images) for split in (camvid.train, camvid.validation, camvid.test)] == [
        367,
        101,
        233,
    ]
    for split in (camvid.train, camvid.validation, camvid.test):
        assert (
            split.images.shape[1:] == (180, 240, 3) and split.labels.shape == split.images.shape[:3]
        )
        assert np.unique(split.labels).tolist() == [*range(11), splits.IGNORED]
    # Sky is above road in every scene.
    rows = np.arange(180)[:, None]
    for mask in camvid.test.labels:
        sky, road = mask == 0, mask == 3
        if sky.any() and road.any():
            assert (
                np.broadcast_to(rows, mask.shape)[sky].mean()
                < np.broadcast_to(rows, mask.shape)[road].mean()
            )
    scenes = arrays.load("camvid_scenes", str(data_dir))
    assert scenes.validation is None and (scenes.test.images == camvid.test.images).all()
    pixels = np.stack(
        [[(mask == number).sum() for number in range(11)] for mask in camvid.test.labels]
    )
    assert (scenes.test.labels == (pixels >= 50)).all() and scenes.test.labels.shape == (233, 11)


@pytest.mark.slow
def test_files_that_are_not_as_published_are_named(scenes):
    with pytest.raises(
        ValueError,
        match="n_validation=3 is not 0 or 4, the validation images that camvid has of its own",
    ):
        arrays.load("camvid", str(scenes), 3)
    mask = scenes / "camvid" / "testannot" / "003.png"
    PIL.Image.fromarray(np.full(SIZE, 12, np.uint8)).save(mask)
    with pytest.raises(
        ValueError,
        match=r"003.png is a mask of uint8 \[24, 32\] up to 12; expected uint8 \[24, 32\] up to 11",
    ):
        arrays.load("camvid", str(scenes))
    mask.write_bytes(b"no image")
    with pytest.raises(ValueError, match="003.png is not a readable image"):
        arrays.load("camvid", str(scenes))
    mask.unlink()
    with pytest.raises(
        ValueError, match="holds 8 images in test and 7 masks in testannot; expected 8 of either"
    ):
        arrays.load("camvid", str(scenes))
    with pytest.raises(ValueError, match="holds 0 images in train"):
        arrays.load("camvid", str(scenes / "nowhere"))


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["zeros", "reflect"])
def test_masks_move_with_their_images(fill):
    masks = np.random.default_rng(0).integers(1, 200, (6, 9, 12)).astype(np.uint8)
    keys = jax.random.split(jax.random.key(1), 6)
    images = np.asarray(
        augment.augment(keys, jnp.asarray(masks)[..., None], flip=True, crop=3, fill=fill)
    )[..., 0]
    moved = np.asarray(
        augment.augment_masks(
            keys, jnp.asarray(masks), flip=True, crop=3, fill=fill, cutout=2, colour=0.1
        )
    )
    assert (moved != masks).any() and (np.where(moved == splits.IGNORED, 0, moved) == images).all()
    assert (moved == splits.IGNORED).any() == (fill == "zeros")


# ------------------------------------------------------------------ the network


def test_place_is_exact_on_planes_and_takes_the_nearest_beyond():
    known, to = (
        (np.array([3.0, 7.0, 11.0]), np.array([1.0, 3.0, 5.0, 7.0])),
        (np.arange(16), np.arange(10)),
    )
    plane = lambda rows, columns: jnp.asarray(2 * rows[:, None] - 3 * columns + 1, jnp.float32)[
        None, :, :, None
    ]
    nearest = plane(np.clip(to[0], 3, 11), np.clip(to[1], 1, 7))
    np.testing.assert_allclose(fcn.place(plane(*known), known, to), nearest, atol=1e-4)


def test_place_interpolates_in_full_precision():
    """By default, accelerators take the product in TF32 or bfloat16."""
    lines = (np.arange(3.0), np.arange(4.0))
    program = jax.make_jaxpr(lambda x: fcn.place(x, lines, lines))(jnp.zeros((1, 3, 4, 2)))
    products = [e for e in quick.equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert [e.params["precision"] for e in products] == [(jax.lax.Precision.HIGHEST,) * 2] * 2


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["zeros", "none", "reflect", "circular"])
def test_grids_are_the_centers_of_what_the_positions_see(padding, small):
    """The pixels with a gradient form a box around the place that `grids` returns.

    The position is one that sees no border.
    """
    encoder = create_model("scene_net", padding=padding)
    # With positive weights, every ReLU passes its gradient.
    variables = jax.tree.map(np.abs, jax.device_get(quick.variables(encoder)))
    for stage, (rows, columns) in zip(
        ("block2", "block3"), fcn.grids(encoder, (*SIZE, 3), ("block2", "block3"))
    ):

        def stage_map(x, stage=stage):
            return encoder.apply(variables, x, method="stages", last=stage)[stage]

        run = jax.jit(jax.grad(lambda x, stage_map=stage_map: stage_map(x)[0, 2, 3].sum()))
        noise = quick.normal(1, 1, *SIZE, 3)
        assert jax.eval_shape(stage_map, noise).shape[1:3] == (len(rows), len(columns))
        reached = np.zeros(SIZE, bool)
        # The max-pool passes the gradient to one of four positions; four flips reach all of them.
        for axis in (1, 2, 1, 2):
            noise = np.flip(noise, axis)
            reached |= np.asarray(run(noise))[0].any(-1)
        seen = [np.flatnonzero(reached.any(axis)) for axis in (1, 0)]
        assert (
            abs((seen[0][0] + seen[0][-1]) / 2 - rows[2]) <= 1
            and abs((seen[1][0] + seen[1][-1]) / 2 - columns[3]) <= 1
        )


@pytest.mark.slow
def test_grids_of_the_scene_network():
    """Compares with places computed by hand.

    With padding, the first 3x3 convolution at stride 2 sees pixels 2i-1 ... 2i+1. Without padding,
    each convolution begins one position later.
    """
    for padding, first in (("zeros", (1, 3, 7)), ("none", (10, 28, 48))):
        encoder = create_model("scene_net", padding=padding)
        grids = fcn.grids(encoder, (180, 240, 3), ("block2", "block3", "block4"))
        for (rows, columns), start, step in zip(grids, first, (4, 8, 16)):
            assert (rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0]) == (
                start,
                start,
                step,
                step,
            )
    assert grids[-1][0][-1] <= 179 - 48 and len(grids[-1][0]) == 6


def test_scores_of_stretched_maps_are_refused():
    encoder = create_model("scene_net", padding="interpolate")
    with pytest.raises(ValueError, match="stage='block2' is stretched by padding='interpolate'"):
        fcn.grids(encoder, (*SIZE, 3), ("block2", "block3"))


@pytest.mark.slow
def test_scores_lie_where_the_image_is(small):
    """Without padding, inner scores move with an image moved by the stride."""
    model = create_model("fcn", num_classes=3, padding="none", **small)
    x = quick.normal(0, 1, *SIZE, 3)
    variables = quick.variables(model, x)
    apply = jax.jit(model.apply)
    y, moved = (np.asarray(apply(variables, image)) for image in (x, np.roll(x, 4, 2)))
    assert y.shape == (1, *SIZE, 3)
    rows, columns = fcn.grids(model.backbone(), (*SIZE, 3), ("block3",))[0]
    # Pixels farther out have the scores of the grid's edge.
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (
        6,
        14,
        6,
        22,
    )
    np.testing.assert_allclose(moved[:, :, 11:22], y[:, :, 7:18], atol=1e-5)
    assert np.abs(moved[:, :, 5:11] - y[:, :, 1:7]).max() > 1e-3


@pytest.mark.slow
def test_stages_and_names_are_the_encoders(small):
    model = create_model("fcn", num_classes=3, **small)
    encoder = Small()
    x = quick.normal(0, 1, *SIZE, 3)
    variables = quick.variables(model, x)
    names = ["conv1", "conv2", "score.block2", "score.block3"]
    assert sorted(variables["params"]) == names

    @jax.jit
    def stages(variables):
        theirs = encoder.apply(variables, x, method="stages", last="block3")
        ours = model.apply(variables, x, method="stages")
        return ours, theirs

    ours, theirs = stages(variables)
    assert list(ours) == list(theirs)
    assert all((ours[name] == theirs[name]).all() for name in ours)
    for scored in (("block3", "block2"), ("block9",)):
        with pytest.raises(
            ValueError, match="are not stages of scene_net, in their order; they are block2, block3"
        ):
            jax.eval_shape(
                create_model("fcn", **{**small, "scored": scored}).init, jax.random.key(0), x
            )


@pytest.mark.parametrize(
    "encoder",
    [
        "googlenet",
        pytest.param("googlenet_2014", marks=pytest.mark.slow),
        pytest.param("inception_v3", marks=pytest.mark.slow),
    ],
)
def test_an_encoder_has_no_auxiliary_classifiers(encoder):
    """Their networks are scored at stages beyond them, in training too."""
    last = "Mixed_7c" if encoder == "inception_v3" else "inception4e"
    shape = (96, 96, 3)
    model = create_model("fcn", num_classes=2, encoder=encoder, scored=(last,), input_shape=shape)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    init = functools.partial(model.init_with_output, train=True)
    scores, variables = eval_shape(init, jax.random.key(0), image)
    assert scores.shape == (1, 96, 96, 2)
    assert not [name for name in variables["params"] if name.lower().startswith("aux")]


def test_the_network_starts_and_trains_on_several_devices():
    """The places of its stages are found in evaluation, without the axis of devices."""
    shape = (*SIZE, 3)
    model = create_model("fcn", num_classes=3, axis_name="devices", input_shape=shape)
    images = jax.ShapeDtypeStruct((4, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def scores(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("devices")), "out_specs": P("devices")}
    on_devices = jax.shard_map(scores, mesh=mesh, **specs)
    assert jax.eval_shape(on_devices, variables, images).shape == (4, *SIZE, 3)


class Normed(Network):
    """A convolution and a normalization over the whole image."""

    input_shape: tuple[int, int, int] = (*SIZE, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = yield "block2", nn.GroupNorm(2, name="norm")(Conv(4, 3, 2, padding=1, name="conv")(x))
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


def test_a_stage_that_sees_the_whole_image_cannot_be_scored(monkeypatch):
    monkeypatch.setitem(base._REGISTRY, "scene_net", Normed)
    model = create_model("fcn", scored=("block2",), input_shape=(*SIZE, 3))
    with pytest.raises(ValueError, match="stage='block2' sees the whole image"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))


@pytest.mark.parametrize("name", ["scene_net", "convnet"])
def test_every_convolution_of_a_block_is_built(name):
    model = create_model(name, blocks=((2,), (2,) * 5), input_shape=(16, 16, 3))
    convolutions = [key for key in variable_shapes(model)["params"] if key.startswith("conv")]
    assert convolutions == ["conv1a", "conv2a", "conv2b", "conv2c", "conv2d", "conv2e"]


def test_the_first_block_of_the_scene_network_has_stride_2_whatever_its_length():
    model = create_model("scene_net", blocks=((2, 2, 2), (2, 2), (2,)), input_shape=(16, 16, 3))
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    for sampling in ("stride", "blur"):
        run = functools.partial(model.clone(sampling=sampling).apply, method="stages")
        stages = eval_shape(run, variable_shapes(model), image)
        sizes = {name: y.shape[1] for name, y in stages.items() if name != "logits"}
        assert sizes == {"block1": 8, "block2": 4, "block3": 2}


def test_place_is_exact_in_float64():
    known = (np.arange(4.0), np.arange(4.0))
    to = (np.array([0.1]), np.array([0.7]))
    rows, columns = np.indices((4, 4))
    with jax.enable_x64(True):
        (value,) = fcn.place(
            jnp.asarray((rows + columns)[None, :, :, None], float), known, to
        ).ravel()
        assert abs(value - 0.8) < 1e-15


# ------------------------------------------------------------------ scores


@pytest.mark.slow
def test_scores_are_their_definitions(standard_promotion):
    counts = evaluate.confusion(np.array([[0, 0, 1, 2]]), np.array([[0, 1, 1, 255]]), 4)
    assert counts.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    # As the class of an image, 255 counts.
    assert evaluate.confusion(np.array([1]), np.array([255]), 256)[255, 1] == 1
    assert evaluate.intersection_over_union(counts) == [1 / 2, 1 / 2, None, None]
    outputs, labels = (
        np.array([[4.0, 0, 1], [3, 0, 1], [2, 0, 1], [1, 0, 1]]),
        np.array([[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 1]]),
    )
    # Class 0 is right at ranks 1 and 3 of four: (1 + 2/3) / 2. Class 1 is in all images and has no
    # score. Class 2 has equal outputs, and so the prevalence as its score.
    assert evaluate.average_precision(outputs, labels) == [
        pytest.approx(5 / 6),
        None,
        pytest.approx(1 / 4),
    ]
    scores = evaluate.score("sigmoid", outputs.astype(np.float32), labels)
    assert scores["mean_ap"] == pytest.approx((5 / 6 + 1 / 4) / 2)
    masks = np.eye(3, dtype=np.float32)[np.array([[[0, 1], [2, 0]]])]
    assert evaluate.score("pixelwise", 9 * masks, np.array([[[0, 1], [1, 255]]]))[
        "mean_iou"
    ] == pytest.approx((1 + 1 / 2 + 0) / 3)
    # The labels have the ranks 1, 5, and 6 of eleven.
    ascending = np.tile(np.arange(11, dtype=np.float32), (3, 1))
    scores = evaluate.score("cross_entropy", ascending, np.array([10, 6, 5]))
    assert scores["error"] == pytest.approx(2 / 3)
    assert scores["top5_error"] == pytest.approx(1 / 3)


# ------------------------------------------------------------------ the engine


def configure(scenes, **changes):
    config = defaults.get_config()
    config.data_dir, config.dataset, config.model, config.loss, config.batch_size = (
        str(scenes),
        "camvid",
        "fcn",
        "pixelwise",
        8,
    )
    config.parallel = "jit"
    config.update(changes)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"loss": "sigmoid"},
            "loss='sigmoid' does not fit the labels of dataset='camvid', which are for "
            "loss='pixelwise'",
        ),
        (
            {"dataset": "digits"},
            "loss='pixelwise' does not fit the labels of dataset='digits', which are for "
            "loss='cross_entropy'",
        ),
        ({"dataset": "tfds:x"}, "which are for loss='cross_entropy'"),
        ({"loss": "hinge"}, "loss='hinge' is not one of cross_entropy, sigmoid, pixelwise"),
        ({"test_views": 2}, "test_views=2 averages the probabilities of classes"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(changes, message, scenes, small):
    with pytest.raises(ValueError, match=message):
        loop.check(configure(scenes, **changes))


@pytest.mark.slow
def test_an_output_that_does_not_fit_the_loss_is_refused(scenes, small, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"model='scene_net' puts out \[11\] for an image; "
        r"loss='pixelwise' accepts \[24, 32, 11\]",
    ):
        build_run(configure(scenes, model="scene_net"))


# ------------------------------------------------------------------ the experiments


def test_rings_and_the_part_that_is_reached():
    rings = segmentation.ring_of(180, 240)
    assert (
        rings[0, 0] == rings[9, 120] == 0
        and rings[10, 120] == 1
        and rings[90, 120] == 8 == rings.max()
    )
    options = argparse.Namespace(weights=None, data_dir="", epochs=1)
    config = segmentation.configure(options, segmentation.Point("zeros", 0))
    # By hand: rows 48 to 128 and columns 48 to 176.
    inside = segmentation.reached(config, (180, 240, 3))
    assert (
        inside.sum() == 81 * 129
        and inside[48, 48]
        and inside[128, 176]
        and not inside[47].any()
        and not inside[:, 177].any()
    )


def test_masks_are_scored_by_place_and_class():
    """Masks of two classes are right 10 pixels away from the border, and swapped outside."""
    inside = np.zeros((40, 60), bool)
    inside[10:-10, 10:-10] = True
    labels = np.zeros((2, 40, 60), np.uint8)
    labels[:, :, 30:] = 1
    scores = segmentation.score(np.where(inside, labels, 1 - labels), labels, inside)
    assert scores["inside"] == 1
    assert scores["outside"] == 0
    assert scores["by_ring"] == [0, 1]
    # Each class is right on 400 pixels, and belongs to 1,200 in the mask and as many in the other.
    assert scores["by_class"][:2] == [400 / 2000] * 2
    assert set(scores["by_class"][2:]) == {None}
    assert scores["miou"] == 400 / 2000


def test_the_verdict_follows_the_numbers():
    rows = lambda zeros, none: [
        {"padding": padding, "seed": seed, "miou": value}
        for padding, values in (("zeros", zeros), ("none", none))
        for seed, value in enumerate(values)
    ]
    assert "gains 10.0 ± " in segmentation.judge(rows((0.3, 0.31, 0.32), (0.2, 0.21, 0.22)))
    for zeros, none, verdict in (
        ((0.3, 0.31, 0.33), (0.2, 0.21, 0.22), "confirmed."),
        ((0.2, 0.3), (0.21, 0.28), "undecided."),
        ((0.2, 0.21, 0.22), (0.3, 0.31, 0.33), "the other way round."),
        ((0.2,), (0.3,), "Two seeds"),
    ):
        assert verdict in segmentation.judge(rows(zeros, none))


@pytest.mark.slow
def test_the_segmentation_experiment(scenes, small, tmp_path, monkeypatch, standard_promotion):
    """Networks learn bright sky above dark buildings, as their runs and report say."""
    monkeypatch.setitem(
        base._REGISTRY, "fcn", functools.partial(fcn.FCN, scored=("block2", "block3"))
    )
    for name, value in (("_RING", 4), ("_SHOWN", (1, 5))):
        monkeypatch.setattr(segmentation, name, value)
    monkeypatch.setattr(training, "Parallel", lambda way: Parallel("jit"))
    arguments = [
        "--workdir",
        str(tmp_path),
        "--data_dir",
        str(scenes),
        "--seeds",
        "1",
        "--epochs",
        "30",
        "--paddings",
        "none",
    ]
    assert segmentation.main(arguments) == 0
    rows = json.loads((tmp_path / "segmentation.json").read_text())
    assert [(row["padding"], row["seed"]) for row in rows] == [("none", 0)]
    data = arrays.load("camvid", str(scenes))
    labels = data.test.labels
    alone = np.broadcast_to(segmentation.prior(data.train), labels.shape)
    everywhere = np.ones(labels.shape[1:], bool)
    for row in rows:
        results = json.loads((tmp_path / f"none,seed={row['seed']}" / "results.json").read_text())
        assert (
            row["miou"] == pytest.approx(results["final"]["test_mean_iou"])
            and row["miou"] > segmentation.score(alone, labels, everywhere)["miou"]
        )
        assert results["by_class"] == row["by_class"] and len(row["by_ring"]) == 3
        # The void border does not count.
        assert results["final"]["test_error"] < 0.15
        assert "| sky | building |" in (tmp_path / "none,seed=0" / "report.md").read_text()
    report = (tmp_path / "report.md").read_text()
    assert "| none | 12.3 |" in report and "Two seeds of zeros and of none are needed" in report
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("rings.png", "scenes.png"))


@pytest.mark.slow
def test_the_multilabel_experiment(scenes, small, tmp_path, monkeypatch, standard_promotion):
    monkeypatch.setattr(training, "Parallel", lambda way: Parallel("jit"))
    monkeypatch.setattr(multilabel, "_LEAST", 1)
    file = tmp_path / "weights.safetensors"
    drawn = quick.variables(create_model("scene_net"), jnp.zeros((1, *SIZE, 3)))
    weights.save_torchvision(drawn, file)
    arguments = [
        "--workdir",
        str(tmp_path / "run"),
        "--data_dir",
        str(scenes),
        "--seeds",
        "2",
        "--epochs",
        "2",
    ]
    assert (
        multilabel.main([*arguments, "--weights", "scene_net=nowhere"]) == 2
        and not (tmp_path / "run").exists()
    )
    assert multilabel.main([*arguments, "--weights", f"scene_net={file}"]) == 0
    rows = json.loads((tmp_path / "run" / "multilabel.json").read_text())
    assert len(rows) == 6
    trained = json.loads((tmp_path / "run" / "scene_net,seed=0" / "results.json").read_text())
    assert trained["by_class"] == rows[0]["ap"] and "test_mean_ap" in trained["final"]
    report = (tmp_path / "run" / "report.md").read_text()
    counted = report.partition("| mean AP | ")[2].partition(" | n |")[0].split(" | ")
    assert counted and set(counted) <= {"sky", "building"}
    assert "| prevalence |" in report and "Left out, because too few scenes of a part" in report
    assert (tmp_path / "run" / "multilabel.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "given, message",
    [
        (["squeezenet1_1"], "argument --weights: 'squeezenet1_1' is not MODEL=FILE"),
        (["=FILE"], "argument --weights: '=FILE' is not MODEL=FILE"),
        (["scene_net=nowhere"], "weights=scene_net='nowhere' is neither a safetensors or .pth"),
        (["scene_net=FILE"], "'FILE' is not a readable safetensors or .pth file"),
        (["mlp3=FILE"], "mlp3 has no stages whose features could be read"),
        (["mlp3=FILE", "--weights", "scene_net=FILE"], "mlp3 has no stages whose features"),
        (["scene_net=FILE", "scene_net=FILE"], "seed=0 is asked for 2 times; name each once"),
    ],
)
def test_wrong_weights_of_multilabel_are_named(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("FILE").touch()
    arguments = ["--workdir", str(tmp_path / "run"), "--weights", *given]
    assert quick.exit_code(multilabel.main, arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "counted, sentence",
    [
        ([0], "Left out, because too few scenes of a part show or lack them: car."),
        ([0, 1], "All"),
    ],
)
def test_the_report_names_the_classes_that_are_left_out(counted, sentence, monkeypatch):
    part = arrays.Split(np.zeros((4, 1, 1, 3), np.uint8), np.eye(2)[[0, 1, 0, 1]])
    data = arrays.Dataset(part, None, part, ("sky", "car"))
    monkeypatch.setattr(arrays, "load", lambda *arguments: data)
    monkeypatch.setattr(multilabel, "counted_classes", lambda data: np.array(counted))
    results = [{"method": multilabel.SCRATCH, "ap": [0.5, 0.25]}]
    text = multilabel.report(results, argparse.Namespace(data_dir="", epochs=1)).text
    assert sentence in text and ": ." not in text


@pytest.mark.slow
def test_pooled_features_rank_what_they_know():
    labels = np.random.default_rng(0).integers(0, 2, (80, 3))
    # Class 2 is in every scene and so has no score.
    labels[:, 2] = 1
    x = labels + np.random.default_rng(1).normal(0, 0.1, labels.shape)
    scores = multilabel.regress(x[:40], labels[:40], x[40:], 0)
    assert evaluate.average_precision(scores, labels[40:]) == [
        pytest.approx(1),
        pytest.approx(1),
        None,
    ]


@pytest.mark.slow
def test_the_encoders_weights_are_kept(data_dir, tmp_path):
    file = data_dir / "weights" / "squeezenet1_1_imagenet.safetensors"
    encoder_file = tmp_path / "encoder.safetensors"
    weights.save_torchvision(segmentation.read_encoder(file), encoder_file)
    model = create_model(
        "fcn", num_classes=11, encoder="squeezenet1_1", scored=segmentation._SQUEEZED
    )
    loaded = transfer.load_initial_weights(encoder_file, model)["params"]
    whole = transfer.load_initial_weights(file, create_model("squeezenet1_1"))["params"]
    assert sorted(loaded) == sorted(f"features.{number}" for number in (0, 3, 4, 6, 7))
    assert all(
        jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), loaded[name], whole[name]))
        for name in loaded
    )


def test_an_encoder_is_written_by_the_first_measurement(scenes, tmp_path, monkeypatch):
    """A refused call changes no file; a later measurement keeps the encoder."""
    monkeypatch.setattr(segmentation, "read_encoder", lambda file: {"params": {}})
    written = []
    monkeypatch.setattr(weights, "save_torchvision", lambda _, file: written.append(file))
    monkeypatch.setattr(workdir, "run_once", lambda *arguments: {})
    monkeypatch.setattr(segmentation, "reached", lambda config, shape: None)
    monkeypatch.setattr(segmentation, "score", lambda *arguments: {})
    file = tmp_path / "weights.safetensors"
    file.touch()
    folder = tmp_path / "run"
    options = argparse.Namespace(
        data_dir=str(scenes), workdir=folder, weights=file, paddings=["none"], seeds=1, epochs=1
    )
    data = segmentation.load(options)
    assert not written and not folder.exists()

    point = segmentation.Point("none", 0)
    predictions = segmentation.predictions_file(options, *point)
    predictions.parent.mkdir(parents=True)
    np.savez(predictions, predicted=data.test.labels)
    segmentation.measure(point, options, data)
    assert written == [folder / "encoder.safetensors"]
    written[0].touch()
    segmentation.measure(point, options, data)
    assert len(written) == 1
