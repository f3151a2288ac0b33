"""Sampling: the operation, its authors' outputs, and every network with it."""

import argparse
import functools
import itertools
import json
import pathlib

import flax.traverse_util
import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import test_lectures
import test_models
from quick import normal

from cnnjax import load_pretrained, main, summary, weights
from cnnjax.data import arrays
from cnnjax.inspect import layers, receptive_field
from cnnjax.models import create_model, list_models
from cnnjax.models.resnet import Block, basic, bottleneck
from cnnjax.models.small import SmallConvNet, SmallResNet
from cnnjax.nn import FILLS, SAMPLINGS, avg_pool, lowering, max_pool, parameters, sample
from experiments import sampling as study

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "sampling.npz")
SAMPLED = tuple(sampling for sampling in SAMPLINGS if sampling != "stride")
# Fills that NumPy has, too, with its names for them.
MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "symmetric": "symmetric",
    "replicate": "edge",
    "circular": "wrap",
}


def all_shifts(x):
    """Returns the circular shifts of one image, row by row, as a batch."""
    shifts = np.ndindex(*x.shape[1:3])
    return np.concatenate([np.roll(x, shift, (1, 2)) for shift in shifts])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def samples(x, stride, sampling, fills):
    """Returns a map's sample under each fill."""
    return {fill: sample(x, stride, sampling=sampling, fill=fill) for fill in fills}


# --- The operation --------------------------------------------------------------------------------


@pytest.mark.parametrize("taps, sampling", [(3, "blur"), (5, "blur5")])
def test_the_filter_is_the_authors(taps, sampling):
    x = formula.uniform("filter", (2, 3, 9, 8)).transpose(0, 2, 3, 1)
    borders = {
        "reflect": "reflect",
        "replicate": "replicate",
        "zeros": "zero",
        "circular": "circular",
    }
    for fill, y in samples(x, 2, sampling, tuple(borders)).items():
        theirs = GOLDEN[f"{taps}/{borders[fill]}"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(y, theirs, atol=1e-6)


@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
def test_the_filter_is_a_binomial_convolution(stride):
    x = normal(0, 1, 7, 6, 1)
    rows, columns = stride if isinstance(stride, tuple) else (stride, stride)
    row_weights = [1 / 4, 1 / 2, 1 / 4] if rows > 1 else [0, 1, 0]
    kernel = np.outer(row_weights, [1 / 4, 1 / 2, 1 / 4])
    for fill, y in samples(x, stride, "blur", tuple(MODES)).items():
        padded = np.pad(x[0, :, :, 0], 1, MODES[fill])
        dense = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
        expected = np.einsum("hwij,ij->hw", dense, kernel)[::rows, ::columns]
        np.testing.assert_allclose(y[0, :, :, 0], expected, atol=1e-6)


def test_a_constant_stays_constant_where_the_border_is_not_invented():
    x = np.full((1, 7, 6, 2), 3.0, np.float32)

    @jax.jit
    def sampled(x):
        maps = {}
        for fill, sampling in itertools.product(FILLS, SAMPLED):
            maps[fill, sampling] = sample(x, 2, sampling=sampling, fill=fill)
        return maps

    for (fill, sampling), y in sampled(x).items():
        lost = {"blur": 2, "blur5": 4}.get(sampling, 0) if fill == "none" else 0
        assert y.shape == (1, (7 - lost + 1) // 2, (6 - lost + 1) // 2, 2)
        has_zeros = fill in ("zeros", "full", "one-sided") and sampling != "aps"
        assert bool(np.allclose(y, 3)) == (not has_zeros), (fill, sampling)


def test_adaptive_sampling_keeps_the_grid_of_largest_norm():
    x = np.zeros((3, 4, 6, 2), np.float32)
    x[0, 1::2, ::2] = 1
    # This grid has a larger sum and a smaller norm.
    x[0, ::2, 1::2] = 0.9
    # One channel decides for both.
    x[1, 1::2, 1::2, 0] = -2
    x[1, ::2, ::2, 1] = 1
    # Among grids of equal norm, the first is kept.
    x[2] = 1
    x[2, :, :, 1] = np.arange(6) // 2
    y = jax.jit(lambda x: sample(x, 2, sampling="aps"))(x)
    np.testing.assert_array_equal(y[0], x[0, 1::2, ::2])
    np.testing.assert_array_equal(y[1], x[1, 1::2, 1::2])
    np.testing.assert_array_equal(y[2], x[2, ::2, ::2])


def test_a_skip_keeps_the_grid_of_its_branch():
    x, branch = np.asarray(normal(0, 4, 6, 6, 3)), np.asarray(normal(1, 4, 6, 6, 5))
    y = jax.jit(lambda x, branch: sample(x, 2, sampling="aps", like=branch))(x, branch)
    for one, its_branch, sampled in zip(x, branch, y):
        grids = list(np.ndindex(2, 2))
        norms = [np.linalg.norm(its_branch[row::2, column::2]) for row, column in grids]
        row, column = grids[int(np.argmax(norms))]
        np.testing.assert_array_equal(sampled, one[row::2, column::2])


def test_a_map_that_the_stride_does_not_divide_is_followed_by_its_first_rows():
    x = np.zeros((1, 5, 4, 1), np.float32)
    x[0, 1::2] = 1
    y = sample(x, 2, sampling="aps")
    assert y.shape == (1, 3, 2, 1)
    np.testing.assert_array_equal(y[0, :, 0, 0], [1, 1, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "pool, window, stride, padding, options",
    [
        (max_pool, 2, 2, 0, {}),
        (max_pool, 3, 2, 1, {}),
        (max_pool, 3, 2, 0, {"ceil": True}),
        (max_pool, 2, (2, 1), 0, {}),
        (avg_pool, 2, 2, 0, {}),
        (avg_pool, 5, 3, 0, {}),
        (avg_pool, 2, 2, 1, {}),
        (avg_pool, 3, 2, 1, {}),
    ],
)
def test_pools_have_the_size_that_the_stride_gives(pool, window, stride, padding, options):
    """Two maps' heights and widths leave every remainder that a stride can leave."""
    fills = sorted({*FILLS} - {"none"})

    def pooled(x):
        maps = {}
        for fill, sampling in itertools.product(fills, SAMPLINGS):
            policy = {"fill": fill, "sampling": sampling}
            maps[fill, sampling] = pool(x, window, stride, padding, **options, **policy)
        return maps

    for size in (9, 10):
        x = jax.ShapeDtypeStruct((1, size, size + 1, 2), jnp.float32)
        maps = jax.eval_shape(pooled, x)
        for (fill, sampling), y in maps.items():
            assert y.shape == maps[fill, "stride"].shape, (size, fill, sampling)


def test_pools_by_their_definition():
    x = normal(0, 2, 6, 8, 3)
    wrapped = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), "wrap")
    windows = np.lib.stride_tricks.sliding_window_view(wrapped, (2, 2), (1, 2))

    @functools.partial(jax.jit, static_argnums=3)
    def pooled(x, maxima, means, sampling):
        policy = {"sampling": sampling, "fill": "circular"}
        pools = [max_pool(x, 2, **policy), avg_pool(x, 2, **policy)]
        return pools, [sample(maxima, 2, **policy), sample(means, 2, **policy)]

    for sampling in SAMPLED:
        means = windows.mean((-1, -2)) if sampling == "aps" else x
        pools, definitions = pooled(x, windows.max((-1, -2)), means, sampling)
        for pool, definition in zip(pools, definitions):
            np.testing.assert_allclose(pool, definition, atol=1e-6)


def test_filtered_means_count_what_is_inside():
    """Zeros outside of the map do not count: the mean of a constant is the constant."""
    x = np.full((1, 6, 6, 2), 3.0, np.float32)
    for fill in ("partial", "random"):
        policy = {"sampling": "blur", "fill": fill}
        means = jax.jit(lambda x, policy=policy: avg_pool(x, 2, 2, 1, **policy))(x)
        np.testing.assert_allclose(means, np.full((1, 4, 4, 2), 3.0), rtol=1e-6)


@pytest.mark.parametrize("fill", ["partial", "random"])
def test_a_filter_that_reaches_no_pixel_gives_zero(fill):
    # The filter of the first window covers positions -3 to -1.
    means = avg_pool(jnp.ones((1, 8, 8, 1)), 4, 2, 2, fill=fill, sampling="blur")
    expected = np.pad(np.ones((4, 4), np.float32), ((1, 0), (1, 0)))
    np.testing.assert_allclose(means[0, :, :, 0], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["zeros", "partial", "reflect", "circular"])
def test_a_filter_is_centered_on_its_window(fill):
    """Windows of 2p + 1 values with padding p are centered on every s-th position of the map.

    So is the filter, and an axis of stride 1 stays as it is.
    """
    x = normal(0, 1, 8, 9, 2)
    for sampling in ("blur", "blur5"):
        policy = {"fill": fill, "sampling": sampling}
        for window, stride, padding in ((3, 2, 1), (5, 2, 2), (3, (2, 1), 1), ((3, 1), 2, (1, 0))):
            means = avg_pool(x, window, stride, padding, **policy)
            np.testing.assert_array_equal(means, sample(x, stride, **policy))


def test_wrong_words_and_small_maps():
    words = "sampling='mirror' is not one of stride, blur, blur5, aps"
    x = normal(0, 1, 4, 4, 1)
    calls = [
        lambda: create_model("lenet", sampling="mirror"),
        lambda: sample(x, 2, sampling="mirror"),
        lambda: max_pool(x, 2, sampling="mirror"),
        lambda: avg_pool(x, 2, sampling="mirror"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match="5 taps with padding='none' has no output on a 4x4 map"):
        sample(x, 2, sampling="blur5", fill="none")
    with pytest.raises(ValueError, match="padding='reflect' cannot pad a 2x2 map by 2x2"):
        sample(x[:, :2, :2], 2, sampling="blur5", fill="reflect")


def test_the_axis_that_is_not_strided_may_be_smaller_than_the_filter():
    x = normal(0, 1, 10, 2, 3)
    y = sample(x, (2, 1), sampling="blur", fill="none")
    padded = np.asarray(x)[:, :9]
    expected = padded[:, 0:7:2] / 4 + padded[:, 1:8:2] / 2 + padded[:, 2:9:2] / 4
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    assert sample(x, (2, 1), sampling="blur").shape == (1, 5, 2, 3)


# --- Networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["blur", "aps"])
@pytest.mark.parametrize("kind, make", [("basic", basic), ("bottleneck", bottleneck)])
def test_a_residual_block_is_the_authors(kind, make, sampling):
    block = Block(
        make(4, 2),
        fill="circular",
        sampling=sampling,
        dtype=jnp.float32,
        axis_name=None,
    )
    x = formula.uniform("block", (3, 8, 8, 8)).transpose(0, 2, 3, 1)
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, False), x)
    # The formula's parameters by torchvision's names and layout.
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    flat = {}
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        key = ".".join((*path[1:-1], names.get(path[-1], path[-1])))
        order = (3, 2, 0, 1) if len(leaf.shape) == 4 else (0,)
        values = formula.parameter(key, tuple(leaf.shape[axis] for axis in order))
        flat[path] = values.transpose(np.argsort(order))
    y = jax.jit(block.apply, static_argnums=2)(flax.traverse_util.unflatten_dict(flat), x, False)
    theirs = GOLDEN[f"{sampling}/{kind}"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(y, theirs, atol=2e-5 * np.abs(theirs).max())


def stages_and_logits(model, variables, x):
    return model.apply(variables, x, False, "logits", method="_run")


def outputs(model, shape):
    """Returns the shapes of stages and logits, those of parameters, and whether layers stride."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    run = functools.partial(model.init_with_output, method="_run", train=False, last="logits")
    # Plain lax operations state their strides. Random numbers take time to trace.
    with lowering("reference"), parameters._SHAPES_ONLY(True):
        program, (maps, variables) = jax.make_jaxpr(run, return_shape=True)(jax.random.key(0), x)
    strides = {
        step
        for equation in quick.equations(program.jaxpr)
        if equation.primitive.name.startswith(("conv_general_dilated", "reduce_window"))
        for step in equation.params["window_strides"]
    }
    sizes = jax.tree.map(lambda leaf: leaf.shape, dict(maps))
    return sizes, jax.tree.map(lambda leaf: leaf.shape, variables), bool(strides - {1})


def check_outputs(name, model, sizes, samplings):
    for size in sizes:
        shape = (2, size, size, model.input_shape[2])
        *published, has_strides = outputs(model, shape)
        assert has_strides == (not name.startswith("mlp"))
        for sampling in samplings:
            *sampled, has_strides = outputs(model.clone(sampling=sampling), shape)
            assert sampled == published and not has_strides, (sampling, size)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "lenet5", "mlp1"])
def test_shapes_and_parameters_are_those_of_the_stride(name):
    size = create_model(name).input_shape[0]
    model = create_model(name, num_classes=7, **test_models.SMALL_FIELDS.get(name, {}))
    check_outputs(name, model, (size,), ("blur", "aps"))


@pytest.mark.slow
@pytest.mark.parametrize("name", test_models.KINDS)
def test_shapes_and_parameters_of_every_kind_of_network(name, monkeypatch):
    size = create_model(name).input_shape[0]
    # Networks that flatten their last map have one size.
    sizes = (size,) if name in test_lectures.TOTALS else (size + 21,)
    check_outputs(name, test_models.shallow(name, monkeypatch), sizes, ("aps",))


def test_parameters_of_blocks_of_one_width_depend_on_no_policy_and_no_size():
    """A strided block projects its skip even if the channels and the map's size stay."""

    def parameters(sampling, padding, size):
        model = SmallResNet(widths=(8, 8), sampling=sampling, padding=padding)
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), image)
        return flax.traverse_util.flatten_dict(shapes)

    published = parameters("stride", "zeros", 48)
    assert ("params", "layer2", "downsample.0", "kernel") in published
    for sampling in SAMPLINGS:
        for padding, size in (("zeros", 48), ("zeros", 2), ("none", 48), ("full", 48)):
            assert parameters(sampling, padding, size) == published, (sampling, padding, size)


def test_every_network_accepts_every_sampling():
    for name in list_models():
        for sampling in SAMPLINGS:
            assert create_model(name, sampling=sampling).sampling == sampling


def variables_of(model):
    """Returns random variables for images of 16x16 pixels."""
    return quick.variables(model, jnp.zeros((1, 16, 16, 3)))


@pytest.mark.parametrize(
    "network", [SmallConvNet(layers=((8, 2), (8, 2), (8, 2))), SmallResNet(widths=(4, 4, 4, 4))]
)
def test_adaptive_sampling_under_circular_padding_ignores_every_circular_shift(network):
    """Logits are equal; a stage's map is the same up to a circular shift."""
    x = all_shifts(normal(0, 1, 16, 16, 3))
    model = network.clone(padding="circular", sampling="aps")
    variables = variables_of(model)
    maps = jax.jit(stages_and_logits, static_argnums=0)(model, variables, x)
    logits = maps.pop("logits")
    np.testing.assert_allclose(logits, logits[:1].repeat(256, 0), atol=1e-5)
    for stage, y in maps.items():
        y = np.asarray(y)
        rolled = all_shifts(y[:1])
        distances = np.abs(y[:, None] - rolled[None]).max((2, 3, 4)).min(1)
        assert distances.max() < 1e-5 * np.abs(y).max(), stage
    logits = np.asarray(jax.jit(model.clone(padding="zeros").apply)(variables, x))
    assert logits.std(0).max() > 1e-3 * np.abs(logits).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "densenet121", "shufflenet_v2_x0_5"])
def test_adaptive_sampling_makes_published_networks_ignore_circular_shifts(name):
    fields = {"num_classes": 7, "padding": "circular", "sampling": "aps"}
    model = create_model(name, **fields, **test_models.SMALL_FIELDS.get(name, {}))
    x = normal(0, 1, 64, 64, 3)
    shifts = [(0, 0), (1, 0), (0, 1), (3, 7), (17, 30), (63, 32)]
    batch = np.concatenate([np.roll(x, shift, (1, 2)) for shift in shifts])
    variables = quick.variables(model, x)
    logits = np.asarray(jax.jit(model.apply)(variables, batch))
    largest = np.abs(logits).max()
    np.testing.assert_allclose(logits, logits[:1].repeat(len(shifts), 0), atol=1e-4 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["blur", "aps"])
def test_both_lowerings_agree_and_gradients_are_finite(sampling):
    model = SmallConvNet(layers=((4, 2), (6, 2)), padding="partial", sampling=sampling)
    variables = variables_of(model)
    x = normal(0, 3, 15, 18, 3)

    def loss(params, form):
        with lowering(form):
            logits = model.apply({"params": params}, x, train=True)
        return jnp.square(logits).sum(), logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, logits), gradients = run(variables["params"], "cpu")
    (_, plain_logits), plain_gradients = run(variables["params"], "reference")
    np.testing.assert_allclose(logits, plain_logits, atol=1e-5)
    np.testing.assert_allclose(logits, jax.jit(model.apply)(variables, x), atol=1e-5)
    for gradient, plain in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients)):
        assert np.isfinite(gradient).all()
        assert np.any(np.asarray(gradient) != 0)
        np.testing.assert_allclose(gradient, plain, atol=1e-4 * np.abs(plain).max())


def test_only_a_dense_layer_on_a_flattened_map_depends_on_sampling_and_only_without_padding():
    """The filter of `blur` loses its border there."""

    def shapes(sampling, padding):
        model = create_model("lenet", sampling=sampling, padding=padding)
        flat = flax.traverse_util.flatten_dict(weights.variable_shapes(model))
        return {path: leaf.shape for path, leaf in flat.items()}

    assert shapes("blur", "zeros") == shapes("stride", "zeros")
    blurred = shapes("blur", "none")
    strided = shapes("stride", "none")
    different = [path for path in strided if blurred[path] != strided[path]]
    assert different == [("params", "linear1", "kernel")]


def test_torchvisions_weights_load_under_every_sampling(tmp_path):
    model = create_model("squeezenet1_1")
    variables = quick.variables(model)
    path = tmp_path / "weights.safetensors"
    weights.save_torchvision(variables, path)
    for sampling in SAMPLED:
        model, loaded = load_pretrained("squeezenet1_1", path=path, sampling=sampling)
        assert model.sampling == sampling
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded["params"], variables["params"]))


def test_commands_take_it(tmp_path, capsys):
    training = ["--config", "configs/lenet_digits.py", "--workdir", str(tmp_path / "run")]
    refused = {
        summary.main: ["lenet", "--sampling", "mirror"],
        main.main: [*training, "--config.model_fields.sampling=mirror"],
    }
    for command, arguments in refused.items():
        assert quick.exit_code(command, arguments) == 2
        assert "sampling='mirror' is not one of stride" in capsys.readouterr().err
    arguments = ["squeezenet1_1", "--format", "json"]
    assert quick.exit_code(summary.main, [*arguments, "--sampling", "aps"]) == 0
    dense = json.loads(capsys.readouterr().out)
    assert quick.exit_code(summary.main, arguments) == 0
    strided = json.loads(capsys.readouterr().out)
    # The first convolution has stride 2; `aps` computes it at every position.
    assert dense["layers"][1]["macs"] == 4 * strided["layers"][1]["macs"]
    assert dense["totals"]["parameters"] == strided["totals"]["parameters"]


def test_tables_count_dense_convolutions_and_fields_see_filters():
    model = SmallConvNet()
    tables = {}
    for sampling in SAMPLINGS:
        tables[sampling] = {row.name: row for row in layers(model.clone(sampling=sampling))}
    # Convolution 2 has stride 2 and an input of 24x24; 3 one of 12x12; 4 is not strided.
    macs = {"stride": 12 * 12 * 9 * 16 * 32, "blur": 24 * 24 * 9 * 16 * 32}
    macs |= {"blur5": macs["blur"], "aps": macs["blur"]}
    for sampling, table in tables.items():
        assert table["conv2"].macs == macs[sampling]
        assert table["conv4"].macs == tables["stride"]["conv4"].macs
    fields = {}
    for sampling in SAMPLINGS:
        fields[sampling] = receptive_field(model.clone(sampling=sampling), "conv2")
    assert {field.step for field in fields.values()} == {(2, 2)}
    # Two 3x3 windows. A filter adds its taps on both sides, a choice of grids a pixel on one.
    spans = {name: (field.low[0], field.high[0]) for name, field in fields.items()}
    assert spans == {"stride": (-2, 2), "blur": (-3, 3), "blur5": (-4, 4), "aps": (-2, 3)}


# --- The study ------------------------------------------------------------------------------------


def test_the_study_moves_images_as_it_says():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 32, 32, 3), np.uint8)
    middles = study.middle(images, 24)
    np.testing.assert_array_equal(middles, images[:, 4:28, 4:28])
    for shifted, middle in zip(study.circular_shifts(images, 24, generator), middles):
        matches = [np.array_equal(shifted, other) for other in all_shifts(middle[None])]
        assert sum(matches) == 1
    for window, whole in zip(study.random_crops(images, 24, generator), images):
        places = np.ndindex(9, 9)
        assert sum(np.array_equal(window, whole[i : i + 24, j : j + 24]) for i, j in places) == 1


def test_the_study_enlarges_images_for_a_larger_window():
    photographs = arrays.Split(np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3)), None)
    assert study.enlarge(photographs, 24) is photographs
    # As for a window of 24 px, three quarters of each side are seen.
    assert study.enlarge(photographs, 32).images.shape == (10, 43, 43, 3)


def test_the_study_refuses_a_padding_that_small_maps_cannot_have(tmp_path, capsys, monkeypatch):
    split = arrays.Split(np.zeros((1000, 32, 32, 3), np.uint8), np.zeros(1000, np.int32))
    data = arrays.Dataset(split, None, split, tuple("0123456789"))
    monkeypatch.setattr(study.arrays, "load", lambda name, data_dir: data)
    arguments = ["--workdir", str(tmp_path / "run"), "--train", "1000"]
    arguments += ["--networks", "resnet18", "--paddings", "zeros", "reflect"]
    assert study.main(arguments) == 2
    assert "reflect" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_study_finds_adaptive_sampling_consistent():
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    variables = None
    shares = {}
    for sampling in ("aps", "stride"):
        model = study.build(study.Point("convnet", sampling, "circular", 0))
        if variables is None:
            variables = quick.variables(model, jnp.zeros((1, 24, 24, 3)))
        shares[sampling] = study.consistency(model, variables, images, study.circular_shifts, 0)
    assert shares["aps"] == 1 > shares["stride"]


def test_the_study_reports_every_column():
    results = []
    for sampling, seed in itertools.product(("stride", "aps"), range(3)):
        point = study.Point("convnet", sampling, "zeros", seed)
        row = {column.field: 0.5 + 0.1 * seed for column in study.COLUMNS} | {"circular": 1.0}
        results.append(point._asdict() | row)
    table = study.tabulate(results)
    # Student's t of 2 degrees of freedom is 4.303; the deviation is 10, of n = 3.
    cells = ["60.0 ± 24.8", "100.0 ± 0.0", "60.0 ± 24.8", "0.60 ± 0.25", "0.60 ± 0.25", "3"]
    assert "| convnet | aps | zeros | " + " | ".join(cells) + " |" in table
    assert len(study.draw(results).axes) == 3
    text = study.report(results, argparse.Namespace(train=5000, epochs=3, test=100)).text
    assert "figure's bars are standard deviations" in " ".join(text.split())
    # Paired by seed, a difference that all seeds share has no spread.
    for row in results:
        if row["sampling"] == "aps":
            row["accuracy"] -= 0.05
    cells = ["-5.0 ± 0.0", "+0.0 ± 0.0", "+0.0 ± 0.0", "+0.00 ± 0.00", "+0.00 ± 0.00", "3"]
    line = "| convnet | zeros | aps - stride | " + " | ".join(cells) + " |"
    assert line in study.tabulate_differences(results)
    for row in results:
        if row["sampling"] == "aps":
            row.update(sampling="stride", padding="circular")
    line = "| convnet | stride | circular - zeros | " + " | ".join(cells) + " |"
    assert line in study.tabulate_differences(results, "padding")


@pytest.mark.parametrize("varied", ["sampling", "padding"])
def test_the_study_reports_every_pair_of_samplings_and_of_paddings(varied):
    names = {"sampling": ["stride", "blur", "aps"], "padding": ["zeros", "circular", "partial"]}
    first, second, third = names[varied]
    results = []
    for step, name in enumerate(names[varied]):
        point = study.Point("convnet", "stride", "zeros", 0)._replace(**{varied: name})
        # 0, 10 and 40 points of accuracy, so that all differences differ.
        row = {column.field: 0.5 for column in study.COLUMNS} | {"accuracy": 0.1 * step**2}
        results.append(point._asdict() | row)
    table = study.tabulate_differences(results, varied)
    assert f" | {second} - {first} | +10.0 | " in table
    assert f" | {third} - {first} | +40.0 | " in table
    assert f" | {third} - {second} | +30.0 | " in table
    assert len(table.splitlines()) == 2 + 3


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_study_trains_tests_and_reports(data_dir, tmp_path):
    """Trained or not, adaptive sampling with circular padding ignores circular shifts."""
    arguments = ["--workdir", str(tmp_path), "--data_dir", str(data_dir)]
    arguments += ["--networks", "convnet", "--samplings", "aps", "--paddings", "circular"]
    arguments += ["--seeds", "1", "--train", "256", "--epochs", "1", "--test", "128"]
    assert study.main(arguments) == 0
    (result,) = json.loads((tmp_path / "sampling.json").read_text())
    assert result["circular"] == 1 > result["crops"] > 0
    assert 0 < result["accuracy"] < 0.6 and max(result["before"], result["after"]) < 0.5
    assert "| convnet | aps | circular |" in (tmp_path / "report.md").read_text()
