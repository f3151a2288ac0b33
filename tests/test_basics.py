"""The lectures' basics: right numbers in the figures and in the report."""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import scipy.ndimage
from PIL import Image

from cnnjax import summary
from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.nn import FILLS, avg_pool, conv, max_pool
from cnnjax.runtime import workdir
from experiments.basics import __main__ as basics
from experiments.basics import numbers, report
from experiments.claims.operations import MAP, one_channel, plane

FIGURES = ["im2col.png", "pooling.png", "shift.png", "sizes.png", "sobel.png", "steps.png"]
ROWS, COLUMNS = np.mgrid[:16, :16]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs the experiment with few windows, fills, and sizes; returns its folder."""
    folder = tmp_path_factory.mktemp("basics") / "new"
    workdir.prepare(folder, {"photograph": "camera"})
    path = next(path for path in photographs.list_photographs() if path.stem == "camera")
    image, kernels, bias = numbers.worked_example()
    with pytest.MonkeyPatch.context() as patch:
        # The figure and the report need it, and each would trace VGG-16.
        patch.setattr(numbers, "growth", functools.cache(numbers.growth))
        basics.run(
            folder,
            "camera",
            path,
            # Two of the three channels, with the filters for them.
            (image[:3, :5, :2], kernels[:, :, :2], bias),
            fills=("zeros", "circular", "full"),
            cases=((1, 4, 5), (0, 1), (3, 4), (1, 2)),
        )
    return folder


@pytest.mark.parametrize(
    "brighter, direction",
    [
        (COLUMNS > 7, 0),
        (ROWS + COLUMNS > 15, 45),
        (ROWS > 7, 90),
        (ROWS > COLUMNS, 135),
        (COLUMNS < 8, 180),
        (ROWS < 8, -90),
    ],
)
def test_sobel_tells_the_direction_of_an_edge(brighter, direction):
    edges = {
        name: values[2:-2, 2:-2]
        for name, values in numbers.sobel(np.where(brighter, 200, 50)).items()
    }
    assert edges["magnitude"].max() >= 4 * 150
    strong = edges["magnitude"] == edges["magnitude"].max()
    np.testing.assert_allclose(
        (edges["direction"][strong] - direction + 180) % 360 - 180, 0, atol=1e-3
    )
    far = (
        np.abs(
            scipy.ndimage.distance_transform_edt(brighter)
            + scipy.ndimage.distance_transform_edt(~brighter)
        )[2:-2, 2:-2]
        > 2
    )
    assert far.any() and not edges["magnitude"][far].any()


@pytest.mark.slow
def test_sobel_is_scipys_and_the_edges_point_where_they_say():
    image = np.random.default_rng(0).normal(size=(9, 11))
    edges = numbers.sobel(image)
    for name, axis in (("down", 0), ("right", 1)):
        np.testing.assert_allclose(
            edges[name], scipy.ndimage.sobel(image, axis, mode="nearest"), atol=1e-5
        )
    for degrees, darkest in (
        (0, np.s_[:, 0]),
        (90, np.s_[0]),
        (180, np.s_[:, -1]),
        (270, np.s_[-1]),
    ):
        assert numbers.edge(degrees)[darkest].max() < 1 < 254 < numbers.edge(degrees).max()


@pytest.mark.parametrize("stride", [1, 2])
def test_steps_are_the_convolution(stride):
    generator = np.random.default_rng(1)
    image, kernels, bias = (
        generator.normal(size=(6, 7, 2)),
        generator.normal(size=(3, 2, 2, 3)),
        generator.normal(size=3),
    )
    steps = numbers.steps(image, kernels, bias, stride)
    size = (range(0, 4, stride), range(0, 6, stride))
    assert [(step["row"], step["column"]) for step in steps] == [
        (row, column) for row in size[0] for column in size[1]
    ]
    y = conv(
        jnp.asarray(image[None], jnp.float32), jnp.asarray(kernels, jnp.float32), stride=stride
    )[0].reshape(-1, 3) + bias.astype(np.float32)
    np.testing.assert_allclose([step["values"] for step in steps], y, atol=1e-5)
    step = steps[-1]
    assert (
        step["products"][1, 0, 1, 2]
        == image[step["row"] + 1, step["column"], 1] * kernels[1, 0, 1, 2]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "stride, padding, size, fill",
    [
        (1, 0, (3, 3), "zeros"),
        (1, 1, (3, 3), "zeros"),
        (2, 0, (3, 3), "zeros"),
        (2, 1, (2, 4), "zeros"),
        (3, 2, (3, 2), "zeros"),
        (2, 2, (3, 3), "reflect"),
    ],
)
def test_im2col_is_the_convolution(stride, padding, size, fill):
    x = quick.normal(0, 2, 9, 8, 3)
    kernel = quick.normal(1, *size, 3, 5)
    y = conv(x, kernel, stride=stride, padding=padding, fill=fill)
    product = jax.jit(lambda x, kernel: numbers.product(x, kernel, stride, padding, fill))
    np.testing.assert_allclose(product(x, kernel).reshape(y.shape), y, atol=1e-5)
    rows = jax.eval_shape(lambda x: numbers.unfold(x, size, stride, padding, fill), x)
    assert rows.shape == (y.size // 5, size[0] * size[1] * 3)


def test_growth_counts_what_every_product_reads():
    """A layer's unfolded matrix has one value per multiply-add of one output channel."""
    layers = [layer for layer in summary.layers(create_model("vgg16")) if layer.kind == "Conv"]
    assert [row["unfolded"] for row in numbers.growth()] == [
        layer.macs // layer.output[-1] for layer in layers
    ]
    assert numbers.growth()[1] == {
        "shape": (224, 224, 64),
        "input": 224 * 224 * 64,
        "unfolded": 9 * 224 * 224 * 64,
    }


@pytest.mark.parametrize("function, reduce", [(max_pool, np.max), (avg_pool, np.mean)])
@pytest.mark.parametrize("window, stride", [(2, 2), (3, 3), (2, 1), (3, 2)])
def test_pooling_is_numpys(function, reduce, window, stride):
    windows = np.lib.stride_tricks.sliding_window_view(MAP, (window, window))[::stride, ::stride]
    np.testing.assert_allclose(
        plane(function(one_channel(MAP), window, stride)),
        reduce(windows, (2, 3)),
        rtol=1e-6,
    )


@pytest.mark.slow
def test_one_pixel_on_a_ramp_is_one_step():
    """On a ramp, a shift by one pixel changes each pooled value by 1.

    A shift by the stride changes none.
    """
    columns = np.arange(128)
    for row in numbers.moved(np.tile(np.arange(150.0), (140, 1))):
        window, stride = numbers.WINDOWS[row["window"]]
        assert row["changed"] == 1 and row["by the stride"] == 0
        assert row["difference"] == pytest.approx(
            1 / columns[: 128 - window + 1 : stride].std(), rel=1e-4
        )


@pytest.mark.slow
def test_zeros_count_columns_layer_by_layer():
    """With zero padding, each layer overwrites one more image column with its number."""
    images = numbers.shift_images()
    inner = images[:, 7:-7, 7:-7]
    for layer, y in enumerate(numbers.shift_maps("zeros", images)):
        np.testing.assert_array_equal(
            y[:, :, :layer], np.broadcast_to(np.arange(1, layer + 1), (257, 7, layer))
        )
        np.testing.assert_array_equal(y[:, :, layer:], inner[:, :, : 7 - layer] + layer)


@pytest.mark.slow
def test_other_fills_move_the_image():
    """Circular padding and no padding only shift the image by one column per layer."""
    images = numbers.shift_images()
    assert (images[-1] == 4).all() and len(np.unique(images[0])) > 5
    for layer, (circular, none) in enumerate(
        zip(numbers.shift_maps("circular", images), numbers.shift_maps("none", images))
    ):
        np.testing.assert_array_equal(circular, np.roll(images[:, 7:-7, 7:-7], layer, 2) + layer)
        np.testing.assert_array_equal(none, images[:, 7:-7, 7 - layer : 14 - layer] + layer)
        # The last image is constant, and so is its output: it shows no position.
        assert np.ptp(circular[-1]) == 0


@pytest.mark.slow
def test_which_fills_know_the_position():
    """Only zeros, partial, and one-sided padding replace the image by the position."""
    results = numbers.shift_numbers(numbers.shift_images())
    assert list(results) == list(FILLS)
    forgotten = [fill for fill in FILLS if results[fill]["greatest spread"] == 0]
    assert forgotten == ["zeros", "partial", "one-sided"]
    assert all(
        results[fill]["explained by the position"] == 1 and results[fill]["columns told apart"] > 1
        for fill in forgotten
    )
    neither = [fill for fill in FILLS if fill not in (*forgotten, "full")]
    assert all(
        abs(results[fill]["explained by the position"]) < 0.05
        and results[fill]["columns told apart"] == 1
        for fill in neither
    )
    assert results["full"]["pixels without spread"] == pytest.approx(1 - 49 / 441)
    assert results["zeros"]["middle row of a constant 4"] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
def test_sizes_are_the_number_of_windows():
    for case in [
        (7, 0, 3, 2),
        (224, 0, 11, 4),
        (5, 1, 3, 2),
        (3, 2, 7, 3),
        (2, 0, 3, 1),
        (1, 0, 5, 2),
    ]:
        n, p, k, s = case
        assert numbers.computed_size(*case) == len(range(0, n + 2 * p - k + 1, s))


@pytest.mark.slow
def test_every_file_is_there_and_the_report_names_every_figure(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        [*FIGURES, "basics.json", "config.json", "environment.json", "report.md"]
    )
    text = (finished / "report.md").read_text()
    for name in FIGURES:
        assert text.count(f"]({name})\n\n") == 1
        with Image.open(finished / name) as figure:
            assert min(figure.size) > 400 and len(figure.convert("RGB").getcolors(2**24)) > 100
    computed = json.loads((finished / "basics.json").read_text())
    assert list(computed) == ["sobel", "steps", "im2col", "pooling", "shift", "sizes"]
    assert (
        computed["sobel"]["greatest error of direction, degrees"]
        < 1
        < computed["sobel"]["flat image of 100, greatest magnitude"]["zeros"]
    )
    assert computed["sobel"]["flat image of 100, greatest magnitude"] == {
        "replicate": 0,
        "zeros": pytest.approx(300 * 2**0.5),
    }
    assert (
        computed["steps"]["differs from conv"] < 1e-5
        and computed["im2col"]["differs from conv"] < 1e-5
    )
    assert computed["steps"]["differs from every second value of stride 1"] < 1e-5
    assert computed["pooling"]["A6"] == [[7, 1, 5], [9, 1, 6], [9, 0, 1]]
    assert (
        computed["sizes"]["cases"],
        computed["sizes"]["with an output"],
        computed["sizes"]["equal when rounded down"],
    ) == (24, 18, 18)
    assert computed["sizes"]["equal"] == 14 and computed["sizes"]["refused without output"] == 6


@pytest.mark.slow
def test_the_report_says_so_where_a_claim_does_not_hold(finished):
    computed = json.loads((finished / "basics.json").read_text())
    text = report.render(computed, "camera")
    for sentence in (
        "A6 holds",
        "A7 holds",
        "know the column holds",
        "as is often said, does not hold",
        "without rounding it does not hold, with it holds",
        "not as printed: AlexNet as printed.",
    ):
        assert sentence in text
    false = copy.deepcopy(computed)
    false["pooling"]["A6"][0][0] = 8
    false["im2col"]["differs from conv"] = 1.0
    false["shift"]["zeros"]["middle row of a constant 4"][0] = 2.0
    false["sizes"]["equal when rounded down"] -= 1
    text = report.render(false, "camera")
    for sentence in (
        "A6 does not hold",
        "A7 does not hold",
        "know the column does not hold",
        "with it does not hold",
    ):
        assert sentence in text


@pytest.mark.slow
def test_errors_name_what_is_wrong(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--workdir", str(tmp_path / "file" / "new")], "cannot be written to: Not a directory"),
        (
            ["--workdir", str(tmp_path), "--photograph", "nobody"],
            "invalid choice: 'nobody' (choose from",
        ),
        (
            ["--workdir", str(finished), "--photograph", "coins"],
            "photograph='camera' there, 'coins' now",
        ),
    ):
        assert quick.exit_code(basics.main, arguments) == 2
        assert message in capsys.readouterr().err


def test_photographs_that_cannot_be_listed_are_one_line(tmp_path, monkeypatch, capsys):
    def fail():
        raise ValueError("scikit-image has no photographs")

    monkeypatch.setattr(photographs, "list_photographs", fail)
    assert quick.exit_code(basics.main, ["--workdir", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "error: scikit-image has no photographs\n"
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    assert [path.stem for path in photographs.list_photographs()] == list(photographs.EMBEDDED)
