"""The layer table, compared with publications, XLA, gradients, and shapes."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import test_models

from cnnjax import summary
from cnnjax.inspect import receptive_field, receptive_fields, windows
from cnnjax.models import (
    Network,
    create_model,
    googlenet_2014,
    inception,
    list_models,
    mobilenet,
)
from cnnjax.models.small import SmallResNet
from cnnjax.nn import FILLS, Conv, Dense, conv, global_avg_pool, lowering, max_pool, resize
from cnnjax.nn.parameters import eval_shape
from cnnjax.weights import variable_shapes

# GFLOPS in torchvision's documentation of its weights: 1e9 multiply-adds in evaluation mode.
GIGA_MACS = {
    "alexnet": 0.714,
    "densenet121": 2.834,
    "densenet161": 7.728,
    "googlenet": 1.498,
    "inception_v3": 5.713,
    "mnasnet1_0": 0.314,
    "mobilenet_v2": 0.301,
    "resnet18": 1.814,
    "resnet50": 4.089,
    "resnet152": 11.514,
    "resnext50_32x4d": 4.230,
    "shufflenet_v2_x1_0": 0.145,
    "squeezenet1_0": 0.819,
    "squeezenet1_1": 0.349,
    "vgg11": 7.609,
    "vgg16": 15.470,
    "vgg16_bn": 15.470,
    "vgg19": 19.632,
    "wide_resnet50_2": 11.398,
}
# Networks of other depths or widths than one of the above.
SIBLINGS = {
    "densenet169",
    "densenet201",
    "mnasnet0_5",
    "mnasnet0_75",
    "mnasnet1_3",
    "resnet34",
    "resnet101",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg19_bn",
}
# Araujo, Norris and Sim 2019, "Computing receptive fields of convolutional neural networks"
# (distill.pub), table 1.
FIELDS = {"alexnet": 195, "vgg16": 212, "inception_v3": 1311}


# Several tests read the table of a network, and tracing a deep one takes seconds.
@functools.cache
def layers_of(name):
    """Returns the rows of a network's table at its own image size, in a tuple."""
    return tuple(summary.layers(create_model(name)))


def widest(table):
    return tuple(
        map(max, zip(*(layer.receptive_field for layer in table if layer.receptive_field)))
    )


def test_vgg16_layer_by_layer():
    """Compares with table 1, column D, of Simonyan and Zisserman (2014).

    Receptive fields and strides follow from the 3x3 and 2x2 windows.
    """
    expected, size, before, field, stride = [((1, 224, 224, 3), 0, 0, (1, 1), (1, 1))], 224, 3, 1, 1
    for filters, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            field += 2 * stride
            weights = 9 * before * filters
            expected.append(
                (
                    (1, size, size, filters),
                    weights + filters,
                    size**2 * weights,
                    (field, field),
                    (stride, stride),
                )
            )
            before = filters
        field, stride, size = field + stride, 2 * stride, size // 2
        expected.append(((1, size, size, filters), 0, 0, (field, field), (stride, stride)))
    for inputs, outputs in ((25088, 4096), (4096, 4096), (4096, 1000)):
        expected.append(((1, outputs), inputs * outputs + outputs, inputs * outputs, None, None))
    table = layers_of("vgg16")
    assert [
        (layer.output, layer.parameters, layer.macs, layer.receptive_field, layer.stride)
        for layer in table
    ] == expected
    assert [layer.receptive_field for layer in table if layer.name == "features.28"] == [(196, 196)]
    assert all(layer.memory == 4 * np.prod(layer.output) for layer in table)
    assert summary.totals(table)["parameters"] == 138_357_544


@pytest.mark.slow
@pytest.mark.parametrize("name", GIGA_MACS)
def test_multiply_adds_are_torchvisions(name):
    macs = summary.totals(layers_of(name))["macs"]
    assert round(macs / 1e9, 3) == GIGA_MACS[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tutorial_net", "keras_convnet", "lenet", "convnet", "zfnet", "resnet18"]
)
def test_multiply_adds_agree_with_xlas_count(name):
    """XLA counts two operations per multiply-add, and element-wise operations.

    It does not count taps on zero padding, so padding is circular here.
    """
    model = create_model(name, padding="circular")
    image = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
    with lowering("reference"):
        flops = jax.jit(model.apply).lower(variable_shapes(model), image).cost_analysis()["flops"]
    macs = summary.totals(summary.layers(model, batch=2))["macs"]
    assert 1 < flops / (2 * macs) < 1.02


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*list_models()} - SIBLINGS))
def test_every_parameter_is_in_the_table_once(name):
    model = create_model(name)
    table = layers_of(name)
    assert summary.totals(table)["parameters"] == sum(
        leaf.size for leaf in jax.tree.leaves(variable_shapes(model)["params"])
    )
    names = [layer.name for layer in table if layer.name]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", FIELDS)
def test_receptive_fields_are_the_published_ones(name):
    assert widest(layers_of(name)) == (FIELDS[name],) * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "mobilenet_v2", "shufflenet_v2_x1_0", "densenet121", "googlenet_2014"],
)
def test_a_receptive_field_is_the_least_unpadded_image_with_an_output(name):
    zeros = create_model(name, **test_models.SMALL_FIELDS.get(name, {}))
    field = widest(summary.layers(zeros))[0]
    model = zeros.clone(padding="none")
    # Parameters do not depend on the padding.
    variables = variable_shapes(zeros)

    def stages(size):
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        return eval_shape(
            lambda variables, x: model.apply(variables, x, method="stages"), variables, image
        )

    assert list(stages(field).values())[-1].shape[1:3] == (1, 1)
    with pytest.raises(ValueError, match="too small for this network"):
        stages(field - 1)


def fields_and_strides(table):
    return [(layer.name, layer.receptive_field, layer.stride) for layer in table]


def large_layers(model):
    """Returns the rows for an image that is large enough without padding."""
    return summary.layers(model, (1400, 1400, 3))


class EveryBlock(Network):
    """The layers and blocks of which AlexNet, MobileNetV2, GoogLeNet and Inception v3 consist."""

    num_classes: int = 2

    @nn.nowrap
    def walk(self, x, train):
        shared = {"fill": self.padding, "dtype": self.dtype}
        policy = {"fill": self.padding, "sampling": self.sampling}
        whole = {**policy, "dtype": self.dtype, "axis_name": self.axis_name}
        x = Conv(8, 7, 2, padding=3, name="conv", **shared)(x)
        x = max_pool(x, 3, 2, padding=1, **policy)
        x = mobilenet.InvertedResidual(8, 2, 6, name="residual1", **whole)(x, train)
        x = mobilenet.InvertedResidual(8, 1, 6, name="residual2", **whole)(x, train)
        x = googlenet_2014.Inception((2, 2, 2, 2, 2, 2), name="inception", **shared)(x)
        x = max_pool(x, 3, 2, ceil=True, **policy)
        for name in ("Mixed_5b", "Mixed_6a", "Mixed_6b", "Mixed_7a", "Mixed_7b"):
            x = inception.Block(inception.TABLE[name], name=name, **whole)(x, train)
        x = yield "blocks", x
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, fills",
    [
        (create_model("alexnet"), ("none", "reflect", "replicate", "circular", "partial")),
        # "replicate" and "circular" are padding alone, as "reflect" is.
        (EveryBlock(), ("none", "reflect", "partial")),
    ],
    ids=["alexnet", "every block"],
)
def test_fields_are_the_same_under_every_fill(model, fills):
    zeros = fields_and_strides(large_layers(model))
    for fill in fills:
        assert fields_and_strides(large_layers(model.clone(padding=fill))) == zeros, fill


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "googlenet_2014", "inception_v3"])
def test_fields_are_the_same_without_padding(name):
    # They do not depend on the image's size either.
    zeros = fields_and_strides(layers_of(name))
    assert fields_and_strides(large_layers(create_model(name, padding="none"))) == zeros


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, stage, layer",
    [("resnet18", "layer2", "layer2.1.bn2"), ("zfnet", "conv2", "conv2"), ("lenet5", "c3", "c3")],
)
def test_a_gradient_reaches_exactly_the_receptive_field(name, stage, layer):
    """The gradient of a central output covers exactly its receptive field.

    A pixel belongs to the field if it has a gradient in any of 4 images. The field of the next
    output is a stride away.
    """
    row = {layer.name: layer for layer in layers_of(name)}[layer]
    model = create_model(name)
    size = 2 * row.receptive_field[0]
    # There are several images, since a max-pool passes the gradient to one pixel of a window.
    x = quick.normal(1, 4, size, size, model.input_shape[2])
    variables = quick.variables(model, x, method="stages", last=stage)

    def run(x):
        return model.apply(variables, x, method="stages", last=stage)[stage]

    center = jax.eval_shape(run, x).shape[1] // 2
    gradient = jax.jit(jax.grad(lambda x, at: run(x)[:, at].sum()))
    first, second = (
        np.flatnonzero(jnp.any(gradient(x, at) != 0, (0, 2, 3))) for at in (center, center + 1)
    )
    assert (first[-1] - first[0] + 1, second[0] - first[0]) == (
        row.receptive_field[0],
        row.stride[0],
    )


@pytest.mark.slow
def test_batch_dtype_size_and_padding_take_effect():
    table = summary.layers(
        create_model("vgg11", padding="none", dtype=jnp.bfloat16), (256, 192, 3), batch=3
    )
    by_name = {layer.name: layer for layer in table}
    assert by_name["features.0"].output == (3, 254, 190, 64)
    assert by_name["features.0"].memory == 2 * 3 * 254 * 190 * 64
    assert by_name["features.0"].macs == 3 * 254 * 190 * 64 * 27


@pytest.mark.slow
def test_layers_that_run_in_training_only_are_counted_last():
    table = layers_of("googlenet_2014")
    assert [layer.name for layer in table if layer.output is None] == [
        f"aux{n}.{part}" for n in (1, 2) for part in ("conv", "fc1", "fc2")
    ]
    assert all(layer.macs == layer.memory == 0 for layer in table if layer.output is None)


class Twice(Network):
    """One 1x1 convolution on the image, and again on every second position of its map."""

    num_classes: int = 2
    input_shape: tuple[int, int, int] = (8, 8, 3)

    @nn.nowrap
    def walk(self, x, train):
        conv = Conv(3, 1, name="conv")
        x = yield "first", conv(x)
        x = yield "second", conv(x[:, ::2, ::2])
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


def test_a_layer_that_runs_twice_has_two_rows_and_one_set_of_parameters():
    table = summary.layers(Twice())
    rows = [layer for layer in table if layer.name == "conv"]
    assert [row.output for row in rows] == [(1, 8, 8, 3), (1, 4, 4, 3)]
    assert [row.macs for row in rows] == [9 * 64, 9 * 16]
    assert [row.parameters for row in rows] == [12, 0]
    assert summary.totals(table)["parameters"] == 12 + 8


class Upsampled(Network):
    """A convolution of stride 2 and a transposed convolution of 3x3, stride 2."""

    num_classes: int = 2
    input_shape: tuple[int, int, int] = (8, 8, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = yield "conv", Conv(4, 3, 2, padding=1, name="conv")(x)
        x = yield "up", nn.ConvTranspose(5, (3, 3), (2, 2), name="up")(x)
        x = yield "last", Conv(6, 1, name="last")(x)
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


def test_a_transposed_convolution():
    """Its kernel is used at every position of its input, and its field is not followed."""
    table = summary.layers(Upsampled(), batch=2)
    rows = {layer.name: layer for layer in table}
    assert rows["up"].output == (2, 8, 8, 5)
    assert [rows[name].macs for name in ("conv", "up", "last", "fc")] == [
        2 * 4 * 4 * (9 * 3 * 4),
        2 * 4 * 4 * (9 * 4 * 5),
        2 * 8 * 8 * (5 * 6),
        2 * 6 * 2,
    ]
    assert rows["conv"].receptive_field == (3, 3)
    assert rows["up"].receptive_field is rows["last"].receptive_field is None
    assert "2x8x8x5" in summary.render(table)
    with pytest.raises(ValueError, match="stage='up' is upsampled by a transposed convolution"):
        receptive_field(Upsampled(), "up")


@pytest.mark.parametrize(
    "rearrange",
    [
        pytest.param(lambda x: resize(x, (16, 12)), id="resize"),
        pytest.param(lambda x: x.repeat(2, 1).repeat(2, 2), id="repeat"),
        pytest.param(
            lambda x: x.reshape(-1, 4, 2, 4, 2, 3).swapaxes(2, 3).reshape(-1, 4, 4, 12),
            id="space to depth",
        ),
        pytest.param(lambda x: x.swapaxes(1, 2), id="transpose"),
        pytest.param(lambda x: x[:, :, ::-1], id="mirror"),
        pytest.param(lambda x: x[:, np.array([1, 0, 3, 2, 5, 4, 7, 6])], id="rows by number"),
        pytest.param(lambda x: jnp.cumsum(x, 1), id="running sum"),
        pytest.param(
            lambda x: jnp.zeros((1, 16, 16, 3)).at[:, ::2, ::2].set(x), id="zeros between"
        ),
    ],
)
def test_the_field_of_a_rearranged_map_is_not_followed(rearrange):
    class Rearranged(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            x = yield "conv", Conv(4, 3, 2, padding=1, name="conv")(rearrange(x))
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    with pytest.raises(ValueError, match="stage='conv' is resized or rearranged"):
        receptive_field(Rearranged(), "conv")
    with pytest.raises(ValueError, match="a layer, conv, whose map is resized or rearranged"):
        windows(Rearranged())
    rows = {layer.name: layer for layer in summary.layers(Rearranged())}
    assert rows["conv"].receptive_field is rows["conv"].stride is None


@pytest.mark.parametrize(
    "loop",
    [
        pytest.param(lambda f, x: jax.lax.fori_loop(0, 3, lambda _, x: f(x), x), id="scan"),
        pytest.param(lambda f, x: jax.lax.while_loop(lambda x: x.sum() < 9, f, x), id="while"),
        pytest.param(lambda f, x: jax.lax.cond(x.sum() < 9, f, lambda x: x, x), id="cond"),
    ],
)
def test_the_field_behind_a_loop_or_a_branch_is_not_followed(loop):
    class Looped(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            x = yield "conv", Conv(3, 3, padding=1, name="conv")(x)
            kernel = jnp.ones((3, 3, 3, 3))
            x = yield "looped", loop(functools.partial(conv, kernel=kernel, padding=1), x)
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    assert receptive_field(Looped(), "conv").size() == (3, 3)
    with pytest.raises(ValueError, match="stage='looped' is computed in a loop or a branch"):
        receptive_field(Looped(), "looped")
    with pytest.raises(ValueError, match="model=Looped passes maps to a .* of jax"):
        windows(Looped())
    assert [layer.macs for layer in summary.layers(Looped())] == [0, 8 * 8 * 9 * 9, 3 * 2]


def test_layers_in_a_loop_are_refused():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Conv(3, 3, padding=1, name="conv")(x), None

    class Scanned(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            blocks = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=4)
            x, _ = blocks(name="blocks")(x, None)
            x = yield "blocks", x
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    with pytest.raises(ValueError, match="model=Scanned runs blocks.conv in a scan of jax"):
        summary.layers(Scanned())


def test_a_dense_layer_on_a_map_keeps_its_field():
    class Mixed(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            x = Conv(4, 3, 2, padding=1, name="conv")(x)
            x = yield "mix", Dense(5, name="own")(nn.Dense(6, name="flax")(x))
            x = yield "rows", jnp.einsum("nhwc,hk->nwck", x, jnp.ones((4, 4)))
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    assert receptive_field(Mixed(), "mix") == receptive_field(Upsampled(), "conv")
    with pytest.raises(ValueError, match="stage='rows' sees the whole image"):
        receptive_field(Mixed(), "rows")


@pytest.mark.parametrize(
    "middle, message",
    [
        (lambda: nn.GroupNorm(2, name="norm"), "a window of 3x3 on a map that sees the whole"),
        (lambda: Conv(4, 3, dilation=2, name="dilated"), "a window of dilation 2; expected 1"),
    ],
)
def test_windows_that_cannot_be_followed_are_refused(middle, message):
    class Refused(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            x = Conv(4, 3, 2, padding=2, name="first")(x)
            x = Conv(4, 3, 2, padding=1, name="last")(middle()(x))
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    with pytest.raises(ValueError, match=f"model=Refused has {message}"):
        windows(Refused())


def test_borders_and_shuffled_channels_do_not_change_a_field():
    class Shuffled(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            x = Conv(4, 5, 2, padding=(1, 2), fill=self.padding, name="conv")(x)
            x = x.reshape(*x.shape[:3], 2, 2).swapaxes(3, 4).reshape(x.shape)
            x = yield "shuffled", x
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    field = receptive_field(Shuffled(), "shuffled")
    assert (field.low, field.high, field.step) == ((-1, -2), (3, 2), (2, 2))
    for fill in ("reflect", "symmetric", "replicate", "circular"):
        assert receptive_field(Shuffled(padding=fill), "shuffled") == field, fill


@pytest.mark.parametrize("fill", ["symmetric", "replicate", "circular"])
@pytest.mark.parametrize("size", [1, 2])
def test_borders_as_large_as_the_map_do_not_move_a_field(fill, size):
    """`jnp.pad` joins three equal parts, or wider borders and the map."""

    class Small(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            x = yield "conv", Conv(4, 2 * size + 1, padding=size, fill=self.padding, name="conv")(x)
            amount = 2 * size if fill == "replicate" else size
            x = yield "wide", Conv(4, 2 * amount + 1, padding=amount, fill=fill, name="wide")(x)
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    model = Small(padding=fill, input_shape=(size, size, 3))
    (conv, _), (wide, _) = receptive_fields(model, ("conv", "wide"))
    assert (conv.low, conv.high) == ((-size, -size), (size, size))
    reach = size + (2 * size if fill == "replicate" else size)
    assert (wide.low, wide.high) == ((-reach, -reach), (reach, reach))


@pytest.mark.parametrize("size", [1, 8])
def test_a_map_that_is_stretched_to_its_border_has_no_field(size):
    class Stretched(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            x = yield "bare", Conv(4, 1, 2, name="bare")(x)
            x = yield "conv", Conv(4, 3, padding=1, fill=self.padding, name="conv")(x)
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    model = Stretched(padding="interpolate", input_shape=(size, size, 3))
    assert receptive_field(model, "bare").step == (2, 2)
    with pytest.raises(ValueError, match="stage='conv' is stretched by padding='interpolate'"):
        receptive_field(model, "conv")


def test_operations_without_outputs_or_axes_do_not_change_a_field():
    class Printed(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            x = Conv(4, 3, 2, padding=1, name="conv")(x)
            jax.debug.print("mean {}", x.mean())
            x = yield "conv", jax.lax.reduce_precision(x, 8, 7)
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    assert receptive_field(Printed(), "conv") == receptive_field(Upsampled(), "conv")
    assert [layer.name for layer in summary.layers(Printed())] == ["", "conv", "fc"]
    assert [window.name for window in windows(Printed())] == ["conv"]


def test_the_field_of_a_dilated_pool():
    class Dilated(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            x = yield (
                "pool",
                jax.lax.reduce_window(
                    x,
                    -np.inf,
                    jax.lax.max,
                    window_dimensions=(1, 3, 2, 1),
                    window_strides=(1, 2, 1, 1),
                    padding=((0, 0), (2, 2), (0, 0), (0, 0)),
                    window_dilation=(1, 2, 3, 1),
                ),
            )
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    field = receptive_field(Dilated(), "pool")
    assert (field.low, field.high, field.step) == ((-2, 0), (2, 3), (2, 1))


def test_a_map_joined_with_a_larger_constant():
    """The field is that of the map, wherever the constant stands."""

    class Framed(Upsampled):
        @nn.nowrap
        def walk(self, x, train):
            x = jnp.concatenate([jnp.zeros((len(x), 9, 8, 3)), x], 1)
            x = yield "framed", x
            yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))

    assert receptive_field(Framed(), "framed").low == (-9, 0)


def test_a_network_that_draws_in_evaluation_has_a_table_and_fields():
    model = SmallResNet(5, widths=(4, 8), permute=True, input_shape=(16, 16, 3))
    rows = {layer.name: layer for layer in summary.layers(model)}
    assert rows["head"].output == (1, 5)
    plain = model.clone(permute=False)
    assert receptive_field(model, "layer2") == receptive_field(plain, "layer2")


def test_fields_of_a_list_of_stages_and_of_no_stage():
    model = Twice()
    assert receptive_fields(model, ["first", "second"]) == receptive_fields(
        model, ("first", "second"), input_shape=[8, 8, 3]
    )
    for stage in ("logits", "", "third"):
        with pytest.raises(ValueError, match=f"={stage!r} is not a stage of this network"):
            receptive_field(model, stage)
    with pytest.raises(ValueError, match="stage='second' is not a stage .* up to 'first'"):
        receptive_fields(model, ("second", "first"))
    with pytest.raises(ValueError, match="stages=.. names no stage"):
        receptive_fields(model, ())
    # A single name is not read letter by letter.
    assert receptive_fields(model, "first") == receptive_fields(model, ["first"])


class TooDeep(Network):
    """A network without an output at its own image size."""

    input_shape: tuple[int, int, int] = (4, 4, 3)

    @nn.nowrap
    def walk(self, x, train):
        yield "pool", max_pool(x, 5)


def test_the_input_is_named_in_an_error_only_if_it_is_given(capsys):
    network = f"{__name__}:TooDeep"
    assert summary.main([network]) == 2
    assert capsys.readouterr().err.startswith("error: a 5x5 pool with padding='zeros' has no")
    assert summary.main([network, "--input=3"]) == 2
    assert capsys.readouterr().err.startswith("error: input=3x3: a 5x5 pool with padding='zeros'")


def test_the_three_formats_hold_the_same_table(capsys):
    written = {}
    for style in ("text", "markdown", "json"):
        summary.main(["tutorial_net", "--batch", "2", "--format", style])
        written[style] = capsys.readouterr().out
    table = json.loads(written["json"])
    assert table["totals"] == {
        "parameters": 62_006,
        "memory": sum(layer["memory"] for layer in table["layers"]),
        "macs": 2 * 651_720,
    }
    assert written["text"].splitlines()[3].split() == [
        "conv1",
        "Conv",
        "2x28x28x6",
        "456",
        "36.8",
        "705,600",
        "5",
        "1",
    ]
    assert (
        "| conv1 | Conv | 2x28x28x6 | 456 | 36.8 | 705,600 | 5 | 1 |"
        in written["markdown"].splitlines()
    )
    assert (
        len(table["layers"])
        == len(written["text"].splitlines()) - 4
        == len(written["markdown"].splitlines()) - 3
    )


@pytest.mark.slow
@pytest.mark.parametrize("fill", FILLS)
def test_every_fill_has_a_table(fill, capsys):
    """Random padding needs no key; fills that read the whole map have zeros' sizes.

    Stretched maps have no receptive field.
    """
    assert summary.main(["lenet", "--padding", fill, "--format", "json"]) == 0
    table = json.loads(capsys.readouterr().out)
    rows = {layer["name"]: layer for layer in table["layers"]}
    size = {"none": 26, "full": 30}.get(fill, 28)
    assert rows["conv1"]["output"] == [1, size, size, 50]
    stretched = fill == "interpolate"
    assert rows["conv2"]["receptive_field"] == (None if stretched else [8, 8])
    assert rows["conv2"]["stride"] == (None if stretched else [2, 2])
