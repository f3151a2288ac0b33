"""The lectures' and historic networks, compared with publications and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from quick import normal

from cnnjax.models import create_model
from cnnjax.models.googlenet_2014 import Inception, NaiveInception
from cnnjax.models.lenet import CODES, CONNECTIONS
from cnnjax.nn.parameters import eval_shape
from cnnjax.weights import torchvision_keys, variable_shapes

# Numbers of parameters per module: published, or sums over published layers.
PARAMETERS = {
    "mlp1": {"fc1": 30_730},
    "mlp3": {"fc1": 3072 * 512 + 512, "fc2": 512 * 512 + 512, "fc3": 5_130},
    "lenet": {"conv1": 500, "conv2": 45_100, "linear1": 490_100, "linear2": 1_010},
    "lenet5": {"c1": 156, "s2": 12, "c3": 1_516, "s4": 32, "c5": 48_120, "f6": 10_164},
    "tutorial_net": {"conv1": 456, "conv2": 2_416, "fc1": 48_120, "fc2": 10_164, "fc3": 850},
    "keras_convnet": {
        "conv1": 896,
        "conv2": 18_496,
        "conv3": 73_856,
        "conv4": 147_584,
        "fc1": 3_211_776,
        "fc2": 513,
    },
    "convnet": {
        "conv1a": 1_792,
        "conv1b": 36_928,
        "conv2a": 73_856,
        "conv2b": 147_584,
        "conv3a": 295_168,
        "conv3b": 590_080,
        "conv4a": 1_180_160,
        "linear1": 8_392_704,
        "linear2": 16_781_312,
        "linear3": 40_970,
    },
    "alexnet_2012": {
        "conv1": 34_944,
        "conv2": 614_656,
        "conv3": 885_120,
        "conv4": 1_327_488,
        "conv5": 884_992,
        "fc6": 37_752_832,
        "fc7": 16_781_312,
        "fc8": 4_097_000,
    },
    "zfnet": {
        "conv1": 14_208,
        "conv2": 614_656,
        "conv3": 1_180_160,
        "conv4": 4_719_616,
        "conv5": 4_719_104,
        "fc6": 75_501_568,
        "fc7": 16_781_312,
        "fc8": 4_097_000,
    },
}
TOTALS = {
    "mlp1": 30_730,
    "mlp3": 1_841_162,
    "lenet": 536_710,
    "lenet5": 60_000,
    "tutorial_net": 62_006,
    "keras_convnet": 3_453_121,
    "convnet": 27_540_554,
    "convnet_512x2": 29_900_362,
    "alexnet_2012": 62_378_344,
    "zfnet": 107_627_624,
    "googlenet_2014": 13_378_280,
}
# Height (= width) and channels of the stages at the publication's image size.
STAGES = {
    "mlp1": {},
    "mlp3": {},
    "lenet": {"conv1": (28, 50), "conv2": (14, 100)},
    "lenet5": {"c1": (28, 6), "c3": (10, 16), "c5": (1, 120)},
    "tutorial_net": {"conv1": (28, 6), "conv2": (10, 16)},
    "keras_convnet": {
        "conv1": (148, 32),
        "conv2": (72, 64),
        "conv3": (34, 128),
        "conv4": (15, 128),
    },
    "convnet": {"block1": (32, 64), "block2": (16, 128), "block3": (8, 256), "block4": (4, 512)},
    "convnet_512x2": {
        "block1": (32, 64),
        "block2": (16, 128),
        "block3": (8, 256),
        "block4": (4, 512),
    },
    "alexnet_2012": {"conv1": (55, 96), "conv2": (27, 256), "conv5": (13, 256)},
    "zfnet": {"conv1": (110, 96), "conv2": (26, 256), "conv5": (13, 512)},
    "googlenet_2014": {
        "conv1": (112, 64),
        "conv3": (56, 192),
        "inception3b": (28, 480),
        "inception4e": (14, 832),
        "inception5b": (7, 1024),
    },
}
# The smallest images for which every layer has an output, if the published size trains slowly.
SMALL = {"alexnet_2012": 67, "zfnet": 64, "googlenet_2014": 79, "keras_convnet": 46}


# The two ConvNets differ in one convolution of the last block.
COMPUTED = sorted({*TOTALS} - {"convnet_512x2"})


def counts(variables) -> dict[str, int]:
    return {
        name: sum(leaf.size for leaf in jax.tree.leaves(module))
        for name, module in variables["params"].items()
    }


def images(name, number=2):
    height, _, channels = create_model(name).input_shape
    size = SMALL.get(name, height)
    return normal(1, number, size, size, channels)


@pytest.mark.parametrize("name", TOTALS)
def test_parameters(name):
    variables = variable_shapes(create_model(name))
    assert list(variables) == ["params"]
    assert sum(counts(variables).values()) == TOTALS[name]
    if name in PARAMETERS:
        assert counts(variables) == PARAMETERS[name]


@pytest.mark.parametrize("name", STAGES)
def test_stages(name):
    model = create_model(name)
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    stages = eval_shape(
        lambda variables, x: model.apply(variables, x, method="stages"),
        variable_shapes(model),
        image,
    )
    assert {stage: (y.shape[1], y.shape[3]) for stage, y in stages.items()} == STAGES[name]
    assert list(stages) == list(STAGES[name])


@pytest.mark.slow
def test_torchs_names_of_the_tutorial_net():
    keys = set(torchvision_keys(variable_shapes(create_model("tutorial_net"))))
    assert keys == {
        f"{layer}.{leaf}"
        for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")
        for leaf in ("weight", "bias")
    }


def test_lenet5_connections_are_table_1():
    """Compares with table 1 of LeCun et al. (1998), section II.B.

    Six maps read three neighboring maps, six read four, three read two pairs, and one reads all.
    """
    expected = [{i, (i + 1) % 6, (i + 2) % 6} for i in range(6)] + [
        {(i + j) % 6 for j in range(4)} for i in range(6)
    ]
    expected += [{0, 1, 3, 4}, {1, 2, 4, 5}, {0, 2, 3, 5}, set(range(6))]
    assert [set(np.flatnonzero(column)) for column in CONNECTIONS.T] == expected


@pytest.mark.slow
def test_lenet5_equals_numpy():
    model = create_model("lenet5")
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
    variables = jax.jit(model.init)(quick.key(0), image)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def squash(x):
        return 1.7159 * np.tanh(2 / 3 * x)

    def subsample(x, layer):
        blocks = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3])
        return squash(blocks.sum((2, 4)) * layer["scale"] + layer["bias"])

    def correlate(x, plane):
        height, width = x.shape[1] - 4, x.shape[2] - 4
        return sum(
            plane[i, j] * x[:, i : i + height, j : j + width] for i in range(5) for j in range(5)
        )

    x = np.stack(
        [
            squash(correlate(image[..., 0], p["c1"]["kernel"][..., 0, k]) + p["c1"]["bias"][k])
            for k in range(6)
        ],
        -1,
    )
    x = subsample(x, p["s2"])
    planes = {
        pair: p["c3"]["kernel"][..., number]
        for number, pair in enumerate(zip(*np.nonzero(CONNECTIONS)))
    }
    x = np.stack(
        [
            squash(
                sum(
                    correlate(x[..., i], plane)
                    for (i, target), plane in planes.items()
                    if target == k
                )
                + p["c3"]["bias"][k]
            )
            for k in range(16)
        ],
        -1,
    )
    x = subsample(x, p["s4"])
    x = squash(np.einsum("nijc,ijco->no", x, p["c5"]["kernel"]) + p["c5"]["bias"])
    x = squash(x @ p["f6"]["kernel"] + p["f6"]["bias"])
    distances = np.square(x[:, None] - CODES).sum(-1)
    logits = jax.jit(model.apply)(variables, image)
    np.testing.assert_allclose(logits, -distances, rtol=1e-5)
    linear = create_model("lenet5", output="linear")
    assert sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(linear)["params"])) == 60_850


@pytest.mark.parametrize(
    "padding, sizes", [("zeros", (28, 10, 1)), ("none", (28, 10, 1)), ("full", (36, 22, 15))]
)
def test_full_padding_pads_every_convolution_of_lenet5(padding, sizes):
    model = create_model("lenet5", padding=padding)
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    shapes = variable_shapes(model)
    stages = eval_shape(lambda v, x: model.apply(v, x, method="stages", last="c5"), shapes, image)
    assert tuple(y.shape[1] for y in stages.values()) == sizes


def test_lenet5s_codes_are_ten_different_digits():
    assert CODES.shape == (10, 84) and set(np.unique(CODES)) == {-1, 1}
    assert min(np.sum(CODES[i] != CODES[j]) for i in range(10) for j in range(i)) >= 5
    assert CODES[0].reshape(12, 7)[0].tolist() == [-1, -1, 1, 1, 1, -1, -1]
    np.testing.assert_array_equal(CODES[0].reshape(12, 7), CODES[0].reshape(12, 7)[:, ::-1])


@pytest.mark.slow
def test_lenet5_starts_as_published():
    """Weights are uniform within 2.4 / fan-in (LeCun et al. 1998, appendix A).

    The fan-in of a map of C3 is 75, 100, or 150.
    """
    init = jax.jit(create_model("lenet5").init)
    params = init(quick.key(0), jnp.zeros((1, 32, 32, 1)))["params"]
    c3 = 25 * CONNECTIONS.sum(0)[np.nonzero(CONNECTIONS)[1]]
    scaled = {
        name: np.asarray(params[name]["kernel"]) * fan_in
        for name, fan_in in (("c1", 25), ("c3", c3), ("c5", 400), ("f6", 120))
    }
    for name, values in scaled.items():
        assert np.abs(values).max() <= 2.4 * (1 + 1e-6), name
        np.testing.assert_allclose(values.std(), 2.4 / np.sqrt(3), rtol=0.1, err_msg=name)
    # Each connection's weights fill the range for their own fan-in.
    assert np.abs(scaled["c3"]).max((0, 1)).min() > 1.8


@pytest.mark.slow
def test_tutorial_net_equals_numpy():
    model = create_model("tutorial_net")
    x = images("tutorial_net")
    variables = quick.variables(model)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    y = np.asarray(x, np.float64)
    for name in ("conv1", "conv2"):
        patches = np.lib.stride_tricks.sliding_window_view(y, (5, 5), (1, 2))
        y = np.maximum(
            np.einsum("nhwcij,ijco->nhwo", patches, p[name]["kernel"]) + p[name]["bias"], 0
        )
        y = y.reshape(2, y.shape[1] // 2, 2, y.shape[2] // 2, 2, -1).max((2, 4))
    y = y.transpose(0, 3, 1, 2).reshape(2, 400)
    for name in ("fc1", "fc2"):
        y = np.maximum(y @ p[name]["kernel"] + p[name]["bias"], 0)
    logits = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(logits, y @ p["fc3"]["kernel"] + p["fc3"]["bias"], atol=1e-5)


@pytest.mark.slow
def test_alexnets_groups_halve_what_convolutions_2_4_and_5_see():
    one, two = (
        counts(variable_shapes(create_model("alexnet_2012", groups=groups))) for groups in (1, 2)
    )
    assert {name for name in one if one[name] != two[name]} == {"conv2", "conv4", "conv5"}
    assert all(
        two[name] - bias == (one[name] - bias) // 2
        for name, bias in (("conv2", 256), ("conv4", 384), ("conv5", 256))
    )
    assert sum(two.values()) == 60_965_224


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, biased", [("alexnet_2012", {"conv2", "conv4", "conv5", "fc6", "fc7"}), ("zfnet", set())]
)
def test_alexnet_starts_as_published(name, biased):
    # Optimized: drawing millions of numbers costs more than compiling.
    init = quick.optimized(create_model(name, num_classes=7).init)
    params = jax.device_get(init(quick.key(0), images(name)))["params"]
    assert {layer for layer in params if np.all(params[layer]["bias"] == 1)} == biased
    assert all(np.all(params[layer]["bias"] == 0) for layer in params if layer not in biased)
    for layer in params:
        np.testing.assert_allclose(
            [params[layer]["kernel"].mean(), params[layer]["kernel"].std()],
            [0, 0.01],
            atol=2e-4,
            err_msg=layer,
        )


@pytest.mark.slow
def test_inception_is_its_branches_side_by_side():
    x = normal(0, 1, 12, 12, 8)
    module = NaiveInception((3, 4, 5))
    y, variables = jax.jit(module.init_with_output)(quick.key(1), x)
    assert y.shape == (1, 12, 12, 3 + 4 + 5 + 8)
    one = variables["params"]["branch1"]
    np.testing.assert_allclose(
        y[..., :3], np.maximum(x @ one["kernel"][0, 0] + one["bias"], 0), atol=1e-5
    )
    np.testing.assert_array_equal(y[:, 5, 6, 12:], x[:, 4:7, 5:8].max((1, 2)))
    unpadded = NaiveInception((3, 4, 5), fill="none")
    assert jax.eval_shape(unpadded.apply, variables, x).shape == (1, 8, 8, 20)
    reduced = Inception((3, 2, 4, 2, 5, 6))
    y, _ = jax.eval_shape(reduced.init_with_output, jax.random.key(1), x)
    assert y.shape == (1, 12, 12, 3 + 4 + 5 + 6)


@pytest.mark.slow
def test_auxiliary_logits_appear_in_training_only():
    model, rngs = create_model("googlenet_2014", num_classes=5), {"dropout": jax.random.key(1)}

    def sown(train):
        return jax.eval_shape(
            lambda variables, x: model.apply(
                variables, x, train=train, mutable=["auxiliary"], rngs=rngs
            )[1],
            variable_shapes(model),
            jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32),
        )

    assert sown(False) == {}
    assert jax.tree.map(lambda head: head.shape, sown(True)["auxiliary"]) == {
        "aux1": {"logits": (2, 5)},
        "aux2": {"logits": (2, 5)},
    }
    without = variable_shapes(create_model("googlenet_2014", aux_logits=False))
    assert sum(counts(without).values()) == 6_998_552


@pytest.mark.slow
@pytest.mark.parametrize("name, fields", [("mlp3", {"dropout": 0.5}), ("alexnet_2012", {})])
def test_dropout_acts_in_training_only(name, fields):
    model, x = create_model(name, **fields), images(name)
    variables = quick.variables(model, x)
    first, second = ({"dropout": jax.random.key(seed)} for seed in (1, 2))
    run = jax.jit(model.apply, static_argnames="train")
    assert np.array_equal(run(variables, x, rngs=first), run(variables, x, rngs=second))
    assert not np.array_equal(
        run(variables, x, train=True, rngs=first), run(variables, x, train=True, rngs=second)
    )


def test_wrong_fields():
    for message, call in {
        "output='softmax' is not one of rbf, linear": lambda: create_model(
            "lenet5", output="softmax"
        ),
        "num_classes=11 is more than the 10 digits that have a code; use output='linear'": lambda: (
            create_model("lenet5", num_classes=11)
        ),
        "groups=3 is not 1 or 2": lambda: create_model("alexnet_2012", groups=3),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert create_model("lenet5", num_classes=11, output="linear").num_classes == 11
