"""Every model fulfills one contract; for outputs, see test_torchvision.py."""

import functools
import math
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import quick
import test_lectures
import test_torchvision

from cnnjax import weights
from cnnjax.inspect.trace import follow, trace
from cnnjax.models import (
    create_model,
    googlenet,
    googlenet_2014,
    inception,
    list_models,
    mnasnet,
    mobilenet,
    resnet,
    shufflenet,
)
from cnnjax.models.lenet import LeNet5
from cnnjax.models.small import SmallConvNet, SmallResNet
from cnnjax.nn import FILLS, BatchNorm, lowering, parameters
from cnnjax.nn.parameters import eval_shape

# Published numbers of parameters: torchvision's if it has the network.
PARAMETERS = {
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg11_lrn": 132_863_336,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg16_c": 133_638_952,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "alexnet": 61_100_840,
    "squeezenet1_0": 1_248_424,
    "squeezenet1_1": 1_235_496,
    "googlenet": 13_004_888,
    "inception_v3": 27_161_264,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "mobilenet_v2": 3_504_872,
    "mnasnet0_5": 2_218_512,
    "mnasnet0_75": 3_170_208,
    "mnasnet1_0": 4_383_312,
    "mnasnet1_3": 6_282_256,
    "shufflenet_v2_x0_5": 1_366_792,
    "shufflenet_v2_x1_0": 2_278_604,
    "shufflenet_v2_x1_5": 3_503_624,
    "shufflenet_v2_x2_0": 7_393_996,
    "speedrun": 1_972_792,
    "scene_net": 272_952,
    "resnext50_32x4d": 25_028_904,
    "wide_resnet50_2": 68_883_240,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}

# One network for each `walk` and kind of block. The others run the same code with other sizes:
# squeezenet1_0 is squeezenet1_1, and convnet_512x2 is convnet, with another table.
KINDS = sorted(
    {*test_torchvision.KINDS, "fcn", "speedrun", "scene_net", "vgg11_lrn", "vgg16_c"}
    | set(test_lectures.TOTALS)
)
for _sibling in ("squeezenet1_0", "convnet_512x2"):
    KINDS.remove(_sibling)

# Fields of networks with the same layers at a smaller size, for tests that trace or compile each
# layer: one or two layers per block instead of up to 24 equal ones, and an eighth of a VGG's
# filters, which leaves a quarter of its parameters. ResNet-18 stays whole.
SMALL_FIELDS = {
    "densenet121": {"depths": (2, 1, 1, 1)},
    "resnet50": {"depths": (2, 1, 1, 1)},
    # Its blocks without a projection are those of resnet50. Its narrower groups are convolved
    # several at once, the others one by one.
    "resnext50_32x4d": {
        "depths": (1, 1, 1, 1),
        "block": functools.partial(resnet.bottleneck, inner=2, groups=8),
    },
    "vgg11": {"blocks": ((8,), (16,), (32, 32), (64, 64), (64, 64))},
    "vgg11_bn": {"blocks": ((8,), (16,), (32, 32), (64, 64), (64, 64))},
    "vgg11_lrn": {"blocks": ((8, "LRN"), (16,), (32, 32), (64, 64), (64, 64))},
    "vgg16_c": {
        "blocks": ((8, 8), (16, 16), (32, 32, (32, 1)), (64, 64, (64, 1)), (64, 64, (64, 1)))
    },
}


# The classifiers' last layers; other networks of `PARAMETERS` have "fc".
HEADS = {
    "alexnet": {"classifier.6"},
    "densenet121": {"classifier"},
    "googlenet": {"fc", "aux1", "aux2"},
    "inception_v3": {"fc", "AuxLogits"},
    "mnasnet0_5": {"classifier.1"},
    "mobilenet_v2": {"classifier.1"},
    "squeezenet1_0": {"classifier.1"},
    "squeezenet1_1": {"classifier.1"},
    "vgg11": {"classifier.6"},
    "vgg11_bn": {"classifier.6"},
    "vgg11_lrn": {"classifier.6"},
    "vgg16_c": {"classifier.6"},
}


def _some(table, *blocks):
    return {block: table[block] for block in blocks}


# Tables with one block of each kind. Those of other networks repeat it with other numbers.
_GOOGLENET_BLOCKS = ("inception3b", "inception4a", "inception4d", "inception4e", "inception5b")
_INCEPTION_BLOCKS = ("Mixed_5d", "Mixed_6a", "Mixed_6e", "Mixed_7a", "Mixed_7c")
SHALLOW = {
    "googlenet": (googlenet, "TABLE", _some(googlenet.TABLE, *_GOOGLENET_BLOCKS)),
    "googlenet_2014": (googlenet_2014, "TABLE", _some(googlenet_2014.TABLE, *_GOOGLENET_BLOCKS)),
    "inception_v3": (inception, "TABLE", _some(inception.TABLE, *_INCEPTION_BLOCKS)),
    # Both expansions, both strides, kernels of 3 and 5, blocks with and without a skip.
    "mnasnet0_5": (mnasnet, "TABLE", ((24, 3, 2, 3, 2), (40, 5, 2, 3, 1), (80, 5, 2, 6, 1))),
    "mobilenet_v2": (mobilenet, "TABLE", ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2))),
    "shufflenet_v2_x0_5": (shufflenet, "DEPTHS", (2, 1, 1)),
}


def shallow(name, monkeypatch):
    """Returns a network of 7 classes, with fewer blocks if it is in `SHALLOW`."""
    if name in SHALLOW:
        monkeypatch.setattr(*SHALLOW[name])
    return create_model(name, num_classes=7, **SMALL_FIELDS.get(name, {}))


def test_every_model_is_under_contract():
    """Each model is tested here, in test_lectures.py, or in test_segmentation.py."""
    assert set(list_models()) == set(PARAMETERS) | set(test_lectures.TOTALS) | {"fcn"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name):
    variables = weights.variable_shapes(create_model(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == PARAMETERS[name]


def flat_shapes(variables) -> dict[str, tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*PARAMETERS} & {*KINDS, "squeezenet1_0"}))
def test_head_and_stages(name):
    """`num_classes` changes only the classifiers' last layers, and each stage has a lower
    resolution than the one before."""
    small = create_model(name, num_classes=7)
    x = jax.ShapeDtypeStruct((2, *small.input_shape), jnp.float32)
    # One trace gives the stages, the logits and the variables.
    run = functools.partial(small.init_with_output, method="_run", train=False, last="logits")
    stages, variables = eval_shape(run, jax.random.key(0), x)
    whole = flat_shapes(weights.variable_shapes(create_model(name)))
    seven = flat_shapes(variables)
    assert whole.keys() == seven.keys()
    changed = {path.split("/")[1] for path in whole if whole[path] != seven[path]}
    assert changed == HEADS.get(name, {"fc"})
    logits = stages.pop("logits")
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    sizes = [x.shape[1], *(y.shape[1] for y in stages.values())]
    first = {"vgg": 1, "alexnet": 4}.get(name.split("1")[0], 2)
    assert all(
        round(before / after) in ((first,) if at == 0 else (2, 4))
        for at, (before, after) in enumerate(zip(sizes, sizes[1:]))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["densenet121", "fcn", "googlenet", "lenet5", "mobilenet_v2", "resnet18", "speedrun"],
)
def test_shapes_are_those_of_the_initialization(name, monkeypatch):
    """`eval_shape` leaves out the random numbers of parameters and the forms for the CPU.

    These networks have every layer that makes parameters: `Conv`, `Dense`, `BatchNorm`, and those
    of LeNet-5.
    """
    model = shallow(name, monkeypatch)
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    initialize = functools.partial(model.init_with_output, jax.random.key(0))
    assert eval_shape(initialize, image) == jax.eval_shape(initialize, image)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_stage_is_taken_back(name, monkeypatch):
    """If all stages are replaced, each is computed from the one before as replaced."""
    model = shallow(name, monkeypatch)
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    # `weights.variable_shapes` would remember those of fewer blocks.
    variables = eval_shape(model.init, jax.random.key(0), image)
    maps = eval_shape(lambda v, x: model.apply(v, x, method="stages"), variables, image)

    def outputs(image, replacements, variables):
        computed = []

        def replace_by(replacement):
            return lambda y: computed.append(y) or replacement

        replace = dict(zip(maps, map(replace_by, replacements)))
        logits = model.apply(variables, image, replace=replace)
        return [*computed, logits]

    program = trace(outputs, image, list(maps.values()), variables)
    # Of each value, the numbers of the maps that reach it: 0 is the image, 1 the first stage.
    inputs = [{number} for number in range(len(maps) + 1)]
    inputs += [set()] * (len(program.invars) - len(inputs))
    union = lambda _, operands: set().union(*(reached or () for reached in operands))
    for number, reached in enumerate(follow(program, inputs, union)):
        assert number in reached and (0 not in reached or number == 0), number


def test_a_unit_is_taken_out():
    """Zeroing a unit of a stage equals zeroing the weights that read it."""
    model = create_model("lenet")
    variables = quick.variables(model)
    image = quick.normal(1, 2, *model.input_shape)
    replace = {"conv1": lambda y: y.at[..., 3].set(0)}
    without = jax.jit(functools.partial(model.apply, replace=replace))(variables, image)
    kernel = variables["params"]["conv2"]["kernel"]
    variables["params"]["conv2"]["kernel"] = kernel.at[:, :, 3].set(0)
    np.testing.assert_allclose(without, jax.jit(model.apply)(variables, image), atol=1e-5)
    replace = {"conv1": jnp.zeros_like}
    run = jax.jit(functools.partial(model.apply, method="stages", replace=replace))
    assert not run(variables, image)["conv1"].any()
    with pytest.raises(ValueError, match="replace='conv9' is not a stage of this network up to"):
        model.apply(variables, image, replace={"conv9": jnp.zeros_like})


def assert_every_parameter_receives_a_finite_gradient(model, x, heads=1):
    """The model has 7 classes; `heads` counts its auxiliary classifiers, too."""
    variables = quick.variables(model, x)
    params = variables.pop("params")

    def loss(params):
        logits, new = model.apply(
            {"params": params, **variables},
            x,
            train=True,
            rngs={"dropout": jax.random.key(2)},
            mutable=["batch_stats", "auxiliary"],
        )
        outputs = [logits, *jax.tree.leaves(new.get("auxiliary", {}))]
        assert [output.shape for output in outputs] == heads * [(len(x), 7)]
        return sum(jnp.square(output).sum() for output in outputs)

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    test_torchvision.assert_gradients(grads)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vgg11_lrn",
        "vgg16_c",
        "alexnet",
        "squeezenet1_1",
        *sorted({*test_torchvision.DEEP} - {"inception_v3"}),
        *test_lectures.COMPUTED,
    ],
)
def test_every_parameter_receives_a_finite_gradient(name, monkeypatch):
    """The gradients of other networks are checked in test_torchvision.py."""
    model = shallow(name, monkeypatch)
    x = (
        test_lectures.images(name)
        if name in test_lectures.TOTALS
        else quick.normal(1, 2, 64, 64, 3)
    )
    heads = 3 if name.startswith("googlenet") else 1
    assert_every_parameter_receives_a_finite_gradient(model, x, heads)


@pytest.fixture
def small_inception_v3(monkeypatch):
    return shallow("inception_v3", monkeypatch)


@pytest.mark.slow
def test_every_parameter_of_inception_v3_receives_a_finite_gradient(small_inception_v3):
    """The auxiliary classifier needs images of 299 pixels."""
    x = quick.normal(1, 2, 299, 299, 3)
    assert_every_parameter_receives_a_finite_gradient(small_inception_v3, x, heads=2)


def assert_compiled_equals_eager(model, x):
    """Compares the logits of one image with the compiled ones of two, which are not the same."""
    variables = quick.variables(model, x)
    logits = jax.jit(model.apply)(variables, x)
    largest = np.abs(logits).max()
    assert np.isfinite(logits).all() and np.abs(logits[0] - logits[1]).max() > 1e-3 * largest
    eager = model.apply(variables, x[:1])
    np.testing.assert_allclose(eager, logits[:1], rtol=0, atol=1e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "fcn", "lenet5", "speedrun", "vgg11_lrn"])
def test_compiled_equals_eager_whatever_the_batch(name):
    """Eager execution on one image equals compiled execution on two images.

    These networks have the operations that those of test_torchvision.py lack.
    """
    model = create_model(name, num_classes=7, **SMALL_FIELDS.get(name, {}))
    height, width, channels = model.input_shape
    size = test_lectures.SMALL.get(name, height if name in test_lectures.TOTALS else 64)
    x = quick.normal(1, 2, size, size, channels)
    assert_compiled_equals_eager(model, x)


@pytest.mark.slow
def test_inception_v3_compiled_equals_eager(small_inception_v3):
    x = quick.normal(1, 2, 139, 139, 3)
    assert_compiled_equals_eager(small_inception_v3.clone(aux_logits=False), x)


# Networks treat only `none` and `full` themselves; `reflect` needs the largest maps, and some
# layers refuse `one-sided`.
DEMANDING = ("none", "full", "zeros", "reflect", "one-sided")


# Fills that put no zeros around a map, not even to compute others from them.
WITHOUT_ZEROS = ("none", "reflect", "replicate", "circular", "symmetric", "interpolate")


# Networks without a padded convolution or pool.
UNPADDED = {"mlp1", "mlp3", "lenet5", "tutorial_net", "keras_convnet"}


def count_zeros(program):
    """Counts operations that put zeros, or a border that never wins, above or left of a map.

    What a pool of PyTorch's ceil_mode lacks comes after the map.
    """
    count = 0
    for equation in quick.equations(program):
        kind, options = equation.primitive.name, equation.params
        widths = []
        if kind == "conv_general_dilated":
            widths = options["padding"]
        elif kind.startswith("reduce_window"):
            widths = options["padding"][1:3]
        elif kind == "pad" and equation.outvars[0].aval.ndim == 4:
            widths = options["padding_config"][1:3]
        count += any(low > 0 for low, *_ in widths)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*KINDS} - {"fcn"}))
def test_fills_reach_every_layer_and_bfloat16_every_stage(name, monkeypatch):
    """Every network has logits under every fill, in float32; stages are bfloat16.

    Stages have the shapes of zero padding, except with the fills "none" and "full". Three networks
    are tested under all fills, the others under the most demanding ones. A layer that dropped the
    fill would put zeros around its map under those of `WITHOUT_ZEROS`.
    """
    fills = DEMANDING
    # The other networks' layers draw the noise; this one also calls a convolution itself.
    if name == "lenet5":
        fills = (*DEMANDING, "random")
    if name in ("densenet121", "resnet18", "squeezenet1_1"):
        fills = (*DEMANDING, *sorted({*FILLS} - {*DEMANDING}))
    network = shallow(name, monkeypatch).clone(dtype=jnp.bfloat16)
    traced = functools.partial(jax.make_jaxpr, return_shape=True)
    stages = {}
    for fill in fills:
        model = network.clone(padding=fill)
        # Without padding, DenseNet-201 needs an image of this size.
        size = 4000 if fill == "none" else model.input_shape[0]
        x = jax.ShapeDtypeStruct((2, size, size, model.input_shape[2]), jnp.float32)
        whole = {"method": "_run", "train": False, "last": "logits"}
        is_counted = fill in ("zeros", *WITHOUT_ZEROS)
        # Plain lax operations state their padding, and take less time to trace.
        form = "reference" if is_counted or fill in DEMANDING else "auto"
        # One initialization, with its random numbers, is enough to see that it can be traced.
        with lowering(form), parameters._SHAPES_ONLY(fill != "zeros"):
            # Other fills have the parameters of zero padding.
            if fill in ("zeros", "none", "full"):
                run = functools.partial(model.init_with_output, **whole)
                program, (maps, variables) = traced(run)(jax.random.key(0), x)
            else:
                rngs = {"padding": jax.random.key(0)}
                run = functools.partial(model.apply, **whole, rngs=rngs)
                program, maps = traced(run)(variables, x)
        if is_counted:
            has_zeros = fill == "zeros" and name not in UNPADDED
            assert (count_zeros(program.jaxpr) > 0) == has_zeros, fill
        assert maps.pop("logits").shape == (2, 7) and {
            leaf.dtype for leaf in jax.tree.leaves(variables)
        } == {jnp.dtype(jnp.float32)}
        assert {stage.dtype for stage in maps.values()} <= {jnp.dtype(jnp.bfloat16)}
        stages[fill] = {stage: y.shape for stage, y in maps.items()}
        if fill not in ("none", "full"):
            assert stages[fill] == stages["zeros"]
    assert list(stages["none"]) == list(stages["full"]) == list(stages["zeros"])


@pytest.mark.parametrize(
    "name, size, shapes",
    [
        (
            "vgg16",
            64,
            {
                "block1": (64, 64),
                "block2": (32, 128),
                "block3": (16, 256),
                "block4": (8, 512),
                "block5": (4, 512),
            },
        ),
        (
            "vgg11_lrn",
            64,
            {
                "block1": (64, 64),
                "block2": (32, 128),
                "block3": (16, 256),
                "block4": (8, 512),
                "block5": (4, 512),
            },
        ),
        ("alexnet", 224, {"conv1": (55, 64), "conv2": (27, 192), "conv5": (13, 256)}),
        (
            "squeezenet1_0",
            224,
            {"conv1": (109, 96), "fire4": (54, 256), "fire8": (27, 512), "fire9": (13, 512)},
        ),
        (
            "squeezenet1_1",
            224,
            {"conv1": (111, 64), "fire3": (55, 128), "fire5": (27, 256), "fire9": (13, 512)},
        ),
        (
            "densenet121",
            224,
            {
                "stem": (112, 64),
                "denseblock1": (56, 256),
                "denseblock2": (28, 512),
                "denseblock3": (14, 1024),
                "denseblock4": (7, 1024),
            },
        ),
        (
            "mobilenet_v2",
            224,
            {
                "stage1": (112, 16),
                "stage2": (56, 24),
                "stage3": (28, 32),
                "stage4": (14, 96),
                "stage5": (7, 320),
            },
        ),
        (
            "mnasnet1_0",
            224,
            {
                "stage1": (112, 16),
                "stage2": (56, 24),
                "stage3": (28, 40),
                "stage4": (14, 96),
                "stage5": (7, 320),
            },
        ),
        (
            "shufflenet_v2_x1_0",
            224,
            {"conv1": (112, 24), "stage2": (28, 116), "stage3": (14, 232), "stage4": (7, 464)},
        ),
        (
            "googlenet",
            224,
            {
                "conv1": (112, 64),
                "conv3": (56, 192),
                "inception3b": (28, 480),
                "inception4e": (14, 832),
                "inception5b": (7, 1024),
            },
        ),
        (
            "inception_v3",
            299,
            {
                "Conv2d_2b_3x3": (147, 64),
                "Conv2d_4a_3x3": (71, 192),
                "Mixed_5d": (35, 288),
                "Mixed_6e": (17, 768),
                "Mixed_7c": (8, 2048),
            },
        ),
        (
            "resnext50_32x4d",
            64,
            {
                "stem": (32, 64),
                "layer1": (16, 256),
                "layer2": (8, 512),
                "layer3": (4, 1024),
                "layer4": (2, 2048),
            },
        ),
        (
            "resnet18",
            64,
            {
                "stem": (32, 64),
                "layer1": (16, 64),
                "layer2": (8, 128),
                "layer3": (4, 256),
                "layer4": (2, 512),
            },
        ),
        (
            "resnet50",
            64,
            {
                "stem": (32, 64),
                "layer1": (16, 256),
                "layer2": (8, 512),
                "layer3": (4, 1024),
                "layer4": (2, 2048),
            },
        ),
    ],
)
def test_stages_have_their_names_sizes_and_channels(name, size, shapes):
    model = create_model(name)
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = weights.variable_shapes(model)
    stages = eval_shape(lambda v, x: model.apply(v, x, method="stages"), variables, x)
    assert list(stages) == list(shapes)
    assert {stage: (y.shape[1], y.shape[3]) for stage, y in stages.items()} == shapes


def test_stages_up_to_one_are_computed_without_later_parameters():
    model = create_model("vgg11")
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = quick.variables(model, x, method="stages", last="block3")
    assert len(variables["params"]) == 4
    stages = eval_shape(
        lambda v, x: model.apply(v, x, method="stages", last="block3"), variables, x
    )
    assert list(stages) == ["block1", "block2", "block3"]


@pytest.mark.slow
def test_the_stages_of_a_vgg_by_layer():
    """Stages have the literature's names, and a block's last layer equals the block."""
    model = create_model("vgg16", every_layer=True)
    image = quick.normal(0, 1, 32, 32, 3)
    variables = quick.variables(model, image, method="stages", last="conv2_2")
    layers, blocks = (
        jax.jit(functools.partial(m.apply, method="stages", last=last))(variables, image)
        for m, last in ((model, "conv2_2"), (create_model("vgg16"), "block2"))
    )
    assert list(layers) == ["conv1_1", "conv1_2", "conv2_1", "conv2_2"]
    assert np.array_equal(layers["conv1_2"], blocks["block1"]) and np.array_equal(
        layers["conv2_2"], blocks["block2"]
    )
    every = eval_shape(
        functools.partial(model.apply, method="stages"), weights.variable_shapes(model), image
    )
    assert [name for name in every if name.startswith("conv5")] == [
        "conv5_1",
        "conv5_2",
        "conv5_3",
    ] and len(every) == 13


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("vgg16", 224), ("resnet18", 435), ("resnet50", 427)])
def test_without_padding_maps_shrink_to_the_last_pixel(name, size):
    """ResNet-18 and -50 need at least 435 and 427 pixels; VGG-16 ends at 2x2 for 224."""
    model = create_model(name, padding="none")
    shapes = lambda size: eval_shape(
        lambda v, x: model.apply(v, x, method="stages"),
        weights.variable_shapes(model),
        jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
    )
    last = list(shapes(size).values())[-1]
    assert last.shape[1] == (2 if name == "vgg16" else 1)
    if name != "vgg16":
        with pytest.raises(ValueError, match="too small for this network"):
            shapes(size - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, last",
    [
        ("resnet18", "layer2"),
        ("resnet50", "layer2"),
        ("mobilenet_v2", "stage3"),
        ("shufflenet_v2_x0_5", "stage2"),
    ],
)
def test_a_cropped_skip_is_centered_on_its_branch(name, last):
    """Without padding, features shift with the image if the strides divide the shift."""
    model = create_model(name, padding="none")
    image = quick.normal(0, 1, 127, 127, 3)
    variables = quick.variables(create_model(name), image, method="stages", last=last)
    # The variables are an argument; as constants, they would be copied into the program.
    run = jax.jit(lambda variables, x: model.apply(variables, x, method="stages", last=last)[last])
    whole, part = run(variables, image), run(variables, image[:, 8:, 8:])
    np.testing.assert_allclose(
        whole[:, 1:, 1:][:, : part.shape[1], : part.shape[2]],
        part,
        atol=1e-4 * float(jnp.abs(part).max()),
    )


@pytest.mark.slow
def test_only_fills_of_zeros_make_a_constant_image_vary():
    """A layer that did not receive the fill would show.

    That every network's layers receive it is tested above, without a compilation, and
    test_nn.py has all fills of one convolution. These fills are computed in different ways.
    """
    x = jnp.full((1, 80, 80, 3), 0.7)
    # Parameters do not depend on the fill.
    options = {"method": "stages", "last": "layer2"}
    variables = quick.variables(create_model("resnet18"), x, **options)
    rngs = {"padding": jax.random.key(1)}
    varies = {}
    for fill in ("zeros", "partial", "reflect", "mean", "random"):
        model = create_model("resnet18", padding=fill)
        # The variables are an argument; as constants, they would be copied into the program.
        y = jax.jit(functools.partial(model.apply, **options, rngs=rngs))(variables, x)["layer2"]
        varies[fill] = np.ptp(y, axis=(1, 2)).max() / np.abs(y).max()
    assert varies["zeros"] > 0.1 and varies["partial"] > 0.1
    assert varies["reflect"] < 1e-5
    assert varies["mean"] < 1e-4 and varies["random"] < 1e-4


@pytest.mark.parametrize(
    "name, size",
    [("Mixed_5b", 27), ("Mixed_6a", 14), ("Mixed_6b", 19), ("Mixed_7a", 12), ("Mixed_7b", 27)],
)
def test_blocks_of_inception_v3_shrink_to_the_smallest_branch_without_padding(name, size):
    """A map of 31 pixels; with zeros it keeps them, or at stride 2 has 15."""
    x = jax.ShapeDtypeStruct((1, 31, 31, 64), jnp.float32)
    sizes = []
    for fill in ("none", "zeros"):
        fields = {"dtype": jnp.float32, "axis_name": None}
        block = inception.Block(inception.TABLE[name], fill, "stride", **fields)
        run = functools.partial(block.init_with_output, train=False)
        y, _ = jax.eval_shape(run, jax.random.key(0), x)
        sizes.append(y.shape[1])
    assert sizes == [size, 15 if name in ("Mixed_6a", "Mixed_7a") else 31]


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", [("lenet5", (32, 32, 1)), ("resnet18", (64, 64, 3))])
def test_bfloat16_computes_near_float32_with_float32_parameters(name, shape):
    """The types of other networks' stages and parameters are tested above."""
    x = quick.normal(1, 2, *shape)
    models = create_model(name), create_model(name, dtype=jnp.bfloat16)
    variables = quick.variables(models[0])
    exact, half = (jax.jit(model.apply)(variables, x) for model in models)
    assert {
        leaf.dtype for leaf in (half, *jax.tree.leaves(weights.variable_shapes(models[1])))
    } == {jnp.dtype(jnp.float32)}
    assert 1e-5 < float(jnp.abs(half - exact).max() / jnp.abs(exact).max()) < 0.1


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("vgg16", {"num_classes": 2.5}, "num_classes=2.5 is not of the type int"),
        ("vgg16", {"num_classes": math.nan}, "num_classes=nan is not of the type int"),
        ("densenet121", {"growth": 0}, "growth=0 is not a positive number"),
        ("mnasnet1_0", {"width": -1.0}, "width=-1.0 is not a positive number"),
        ("speedrun", {"width": -64}, "width=-64 is not a positive number"),
        ("shufflenet_v2_x0_5", {"last": 0}, "last=0 is not a positive number"),
        ("densenet121", {"growth": 12.5}, "growth=12.5 is not of the type int"),
        ("mnasnet1_0", {"width": math.inf}, "width=inf is not of the type float"),
        ("vgg16", {"dropout": math.nan}, "dropout=nan is not of the type float"),
        ("vgg16", {"dropout": 1.5}, "dropout=1.5 is not a number of at least 0 and below 1"),
        ("vgg16", {"dropout": 1}, "dropout=1 is not a number of at least 0 and below 1"),
        ("googlenet", {"dropout_aux": -0.5}, "dropout_aux=-0.5 is not a number of at least 0"),
        ("mlp1", {"hidden": (0,)}, "hidden=(0,) are not all positive numbers"),
        ("mlp1", {"hidden": [8, -3]}, "hidden=(8, -3) are not all positive numbers"),
        ("resnet18", {"depths": (2, 2, 2, -1)}, "depths=(2, 2, 2, -1) are not all positive"),
        ("lenet", {"input_shape": (0, 8, 1)}, "input_shape=(0, 8, 1) are not all positive"),
        ("lenet", {"dtype": "int8"}, "dtype='int8' is not a floating-point type"),
        ("lenet", {"dtype": "flaot32"}, "dtype='flaot32' is not a floating-point type"),
        ("shufflenet_v2_x0_5", {"widths": (48, 97, 192)}, "widths=(48, 97, 192) are not all even"),
        ("resnet18", {"block": "basic"}, "block='basic' is not of the type Callable"),
        (
            "alexnet_2012",
            {"convolutions": (96,)},
            "convolutions=(96,) is not of the type tuple[tup",
        ),
        ("zfnet", {"convolutions": [[96, 7, 2]]}, "convolutions=((96, 7, 2),) is not of the type"),
        ("vgg11", {"blocks": ((64, "lrn"),)}, "blocks has (64, 'lrn'), which is not a tuple of"),
        ("vgg11", {"blocks": (64, 64)}, "blocks has 64, which is not a tuple of layers"),
        ("vgg11", {"blocks": ((64, (64, 0)),)}, "blocks has (64, (64, 0)), which is not a tuple"),
    ],
)
def test_fields_that_make_no_network_are_named(name, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model(name, **fields)


def test_a_network_checks_its_fields_however_it_is_made():
    model = create_model("mlp1")
    for fields in ({"num_classes": 2.5}, {"num_classes": math.nan}, {"dropout": math.nan}):
        with pytest.raises(ValueError, match="is not a"):
            model.clone(**fields)
    with pytest.raises(ValueError, match="num_classes=10 is not a positive number of classes"):
        LeNet5(num_classes="10")


@pytest.mark.parametrize("name, stage", [("googlenet", "conv1"), ("inception_v3", "Conv2d_2b_3x3")])
def test_only_images_of_three_channels_are_converted(name, stage):
    """Gray ones would be broadcast to three channels."""
    model = create_model(name, transform_input=True)
    initialize = functools.partial(model.init, method="stages", last=stage)
    key = jax.random.key(0)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(initialize, key, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    with pytest.raises(ValueError, match=r"shape \(1, 32, 32, 1\) does not have the 3 channels"):
        jax.eval_shape(initialize, key, jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32))


def test_images_that_do_not_fit_are_refused(monkeypatch):
    # Users' programs run without the checks of types that the tests turn on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = create_model("lenet")
    variables = quick.variables(model)
    with pytest.raises(ValueError, match="x has dtype uint8; convert it to a floating-point type"):
        model.apply(variables, np.zeros((1, 28, 28, 1), np.uint8))
    with pytest.raises(ValueError, match="shape .28, 28, 1. is not .batch, height"):
        model.apply(variables, np.zeros((28, 28, 1), np.float32))
    with pytest.raises(ValueError, match="^an input of type list is not an array, .batch, height"):
        model.apply(variables, [[[[0.0]]]])
    message = r"parameter conv1/kernel has the shape \(3, 3, 1, 50\), and this input .* channels"
    with pytest.raises(ValueError, match=message):
        model.apply(variables, np.zeros((1, 28, 28, 3), np.float32))
    message = "parameter linear1/kernel has the shape .* or another size than the network was init"
    with pytest.raises(ValueError, match=message):
        model.apply(variables, np.zeros((1, 32, 32, 1), np.float32))


@pytest.mark.parametrize(
    "model", [SmallConvNet(), SmallResNet(widths=(4, 8)), SmallResNet(widths=(4, 8), permute=True)]
)
def test_small_networks_have_the_type_and_the_devices_of_their_fields(model):
    model = model.clone(dtype=jnp.bfloat16, axis_name="devices")
    axes = set()

    def record(call, arguments, options, context):
        if isinstance(context.module, BatchNorm):
            axes.add(context.module.axis_name)
        return call(*arguments, **options)

    def run(image):
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        with nn.intercept_methods(record):
            maps, _ = model.init_with_output(rngs, image, False, "logits", method="_run")
        return maps

    maps = jax.eval_shape(run, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert {y.dtype for y in maps.values()} == {jnp.dtype(jnp.bfloat16)}
    assert axes == ({"devices"} if isinstance(model, SmallResNet) else set())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", "float16", "float64", np.float32])
def test_a_network_computes_in_every_type_of_floating_point(dtype):
    """All layers but the parameters, which are float32."""
    model = create_model("lenet", dtype=dtype)
    run = functools.partial(model.init_with_output, method="_run", train=False, last="logits")
    x = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    with jax.enable_x64(True):
        maps, variables = jax.eval_shape(run, jax.random.key(0), x)
    assert {stage.dtype for stage in maps.values()} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


def test_listing_and_wrong_names():
    assert list_models("*vgg*") == sorted(name for name in list_models() if "vgg" in name) != []
    for message, call in {
        "model='vgg61' is not known; did you mean vgg19 or vgg16 or vgg13": lambda: create_model(
            "vgg61"
        ),
        "model='zzz' is not known; known models: .*, or FILE.py:NAME$": lambda: create_model("zzz"),
        "model='my_nets.py' is not known; expected my_nets.py:NAME$": lambda: create_model(
            "my_nets.py"
        ),
        "fill='zeros' is not a field of vgg16; it accepts num_classes, padding": lambda: (
            create_model("vgg16", fill="zeros")
        ),
        "padding='mirror' is not one of zeros, none": lambda: create_model(
            "vgg16", padding="mirror"
        ),
        "num_classes=0 is not a positive number": lambda: create_model("vgg16", num_classes=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(
        ValueError,
        match="last='conv9' is not a stage of this network; its stages are block1, block2",
    ):
        jax.eval_shape(
            lambda x: create_model("vgg11").init(
                jax.random.key(0), x, method="stages", last="conv9"
            ),
            jnp.ones((1, 32, 32, 3)),
        )
