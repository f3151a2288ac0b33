"""The pictures' numbers, compared with closed forms and brute force."""

import argparse
import json
import os
import shutil
import threading
import types

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import PIL.Image
import pytest
import quick

from cnnjax import classifier, predict, summary, visualize
from cnnjax.data import photographs
from cnnjax.models import Network, create_model
from cnnjax.models.small import SmallConvNet, SmallResNet
from cnnjax.nn import FILLS, Conv, Dense, global_avg_pool, max_pool, relu, relu_rule
from cnnjax.runtime import files, workdir
from cnnjax.train.run import open_run
from cnnjax.visualize import __main__ as options
from cnnjax.visualize import commands, figures, gradients, occluders, stages, subject
from cnnjax.weights import load_torchvision, save_torchvision

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Chain(Network):
    """Two 1x1 convolutions with ReLUs, and a max-pool of the whole image.

    The stages are `hidden`, `output`, and `pooled`.
    """

    num_classes: int = 1
    input_shape: tuple[int, int, int] = (2, 2, 1)

    @nn.nowrap
    def walk(self, x, train):
        x = relu(Conv(3, 1, use_bias=False, name="first")(x))
        x = yield "hidden", x
        x = relu(Conv(1, 1, use_bias=False, name="second")(x))
        x = yield "output", x
        x = max_pool(x, 2)
        x = yield "pooled", x
        yield "logits", global_avg_pool(x)


CHAIN = {
    "params": {
        "first": {"kernel": jnp.array([2.0, -1.0, 1.0]).reshape(1, 1, 1, 3)},
        "second": {"kernel": jnp.array([3.0, 5.0, -4.0]).reshape(1, 1, 3, 1)},
    }
}


class Pooled(Network):
    """A convolution, a ReLU (stage `maps`), global average pooling and a linear layer."""

    num_classes: int = 4
    input_shape: tuple[int, int, int] = (8, 6, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = relu(Conv(5, 3, padding=1, fill=self.padding, name="conv")(x))
        x = yield "maps", x
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


class Linear(Network):
    """One linear layer on all pixels, without stages."""

    num_classes: int = 2
    input_shape: tuple[int, int, int] = (12, 15, 1)

    @nn.nowrap
    def walk(self, x, train):
        yield "logits", Dense(self.num_classes, use_bias=False, name="fc")(x.reshape(len(x), -1))


class Vectors(Network):
    """A convolution (stage `maps`) and a dense layer (stage `hidden`), whose output is no map."""

    num_classes: int = 3
    input_shape: tuple[int, int, int] = (8, 8, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = yield "maps", jnp.tanh(Conv(4, 3, padding=1, name="conv")(x))
        x = yield "hidden", jnp.tanh(Dense(5, name="linear")(x.reshape(len(x), -1)))
        yield "logits", Dense(self.num_classes, name="fc")(x)


class Stack(Network):
    """A chain of 3x3 convolutions of one channel (stage `last`)."""

    num_classes: int = 1
    input_shape: tuple[int, int, int] = (41, 41, 1)
    depth: int = 10

    @nn.nowrap
    def walk(self, x, train):
        for number in range(self.depth):
            x = Conv(1, 3, padding=1, fill=self.padding, use_bias=False, name=f"conv{number}")(x)
        x = yield "last", x
        yield "logits", global_avg_pool(x)


class Gated(Network):
    """A convolution (stage `conv`) whose channels are weighted by their means (stage `maps`)."""

    num_classes: int = 2
    input_shape: tuple[int, int, int] = (8, 12, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = yield "conv", Conv(4, 3, 2, padding=1, fill=self.padding, name="conv")(x)
        gates = nn.sigmoid(Dense(4, name="gates")(global_avg_pool(x)))
        x = yield "maps", x * gates[:, None, None]
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


@pytest.fixture(scope="module")
def squeezenet(data_dir):
    model = create_model("squeezenet1_1")
    return model, load_torchvision(
        data_dir / "weights" / "squeezenet1_1_imagenet.safetensors", model
    )


def read(folder, count):
    paths = photographs.list_photographs(folder)[: 500 // count * count : 500 // count]
    return np.stack([photographs.read_image(path) for path in paths])


@pytest.mark.parametrize(
    "rule, expected",
    [
        # The hidden units are 2, -1, and 1. The ReLU blocks the second, which is negative.
        ("gradient", 3 * 2 - 4 * 1),
        # The signal of the third unit is negative and is blocked.
        ("deconvnet", 3 * 2 + 5 * -1),
        # Both units are blocked.
        ("guided", 3 * 2),
    ],
)
def test_rules_by_hand(rule, expected):
    """The signal reaches only the pixel of the largest output."""
    image = jnp.array([[0.5, 0.25], [1.0, 0.0]])[None, :, :, None]
    for stage in ("output", "pooled"):
        signal = visualize.saliency(Chain(), CHAIN, image, stage, 0, rule)
        assert np.array_equal(signal[0, :, :, 0], [[0, 0], [expected, 0]])


def test_each_image_may_have_its_own_channel():
    image = jnp.array([[0.5, 0.25], [1.0, 0.0]])[None, :, :, None]
    signals = visualize.saliency(
        Chain(), CHAIN, jnp.concatenate([image, -image]), "hidden", np.array([2, 1]), "gradient"
    )
    assert np.array_equal(signals[..., 0], [[[0, 0], [1, 0]], [[0, 0], [-1, 0]]])


# Up to the last stage, VGG-16 has 13 ReLUs, ResNet-18 1 + 16, SqueezeNet 1 + 8 * 2, and MobileNetV2
# 1 + 1 + 16 * 2. The other numbers follow from the publications.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, count",
    [
        ("vgg16", 13),
        ("vgg16_bn", 13),
        ("resnet18", 17),
        ("squeezenet1_1", 17),
        ("mobilenet_v2", 34),
        ("alexnet", 5),
        ("alexnet_2012", 5),
        ("googlenet", 57),
        ("tutorial_net", 2),
        ("lenet", 2),
        ("lenet5", 0),
    ],
)
def test_every_relu_up_to_the_last_stage_follows_the_rule(name, count):
    model = create_model(name)
    stage = list(visualize.stage_channels(model))[-1]
    own, _ = gradients._relus(model, stage)
    assert own == count


def test_the_gradient_is_back_even_after_an_error_and_a_rule_is_never_another_threads():
    seen = []
    negated = jax.grad(lambda x: -relu(x))
    one = jnp.float32(1)
    with pytest.raises(ZeroDivisionError):
        with relu_rule("deconvnet"):
            with relu_rule("guided"):
                assert jax.grad(lambda x: relu(x) * jnp.float32(2))(-one) == 0
                assert negated(one) == 0
                thread = threading.Thread(target=lambda: seen.append(negated(one)))
                thread.start()
                thread.join()
            assert jax.grad(relu)(-one) == 1
            raise ZeroDivisionError
    assert jax.grad(relu)(-one) == 0 and negated(one) == -1
    assert seen == [-1]


@pytest.mark.slow
def test_forward_mode_reaches_relu():
    assert jax.jvp(relu, (jnp.float32(2),), (jnp.float32(3),)) == (2, 3)
    assert jax.jvp(relu, (jnp.float32(-2),), (jnp.float32(3),)) == (0, 0)


@pytest.mark.slow
def test_a_rule_does_not_stay_in_compiled_code():
    """One network is differentiated under two rules in turn, and then under none."""
    image = jnp.array([[0.5, 0.25], [1.0, 0.0]])[None, :, :, None]
    sums = [
        float(visualize.saliency(Chain(), CHAIN, image, "output", 0, rule).sum())
        for rule in ("deconvnet", "gradient", "deconvnet")
    ]
    assert sums == [1, 2, 1]
    assert jax.grad(lambda x: Chain().apply(CHAIN, x).sum())(image)[0, 1, 0, 0] == 2


@pytest.mark.slow
def test_a_rule_about_relus_needs_relus():
    model = create_model("lenet5")
    variables, image = quick.variables(model), jnp.ones((1, 32, 32, 1))
    assert jnp.any(visualize.saliency(model, variables, image, "c3", 0, "gradient") != 0)
    # A second call fails like the first.
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match="rule='guided' is about cnnjax.nn.relu, and this network has none up to stage "
            "'c3'",
        ):
            visualize.saliency(model, variables, image, "c3", 0, "guided")


def test_rules_refuse_networks_that_also_call_the_relu_of_jax():
    class Mixed(Chain):
        @nn.nowrap
        def walk(self, x, train):
            x = yield "own", relu(Conv(3, 1, name="first")(x))
            x = yield "both", nn.relu(Conv(1, 1, name="second")(x))
            yield "logits", global_avg_pool(x)

    model = Mixed()
    variables, image = quick.variables(model), jnp.ones((1, 2, 2, 1))
    assert visualize.saliency(model, variables, image, "own", 0, "guided").shape == image.shape
    message = "up to stage 'both' this network also calls jax.nn.relu"
    with pytest.raises(ValueError, match=message):
        visualize.saliency(model, variables, image, "both", 0, "guided")


def test_the_gradient_of_a_class_score_is_the_weight_of_a_linear_network():
    """Simonyan et al. 2013, section 3: the score of a linear network is its weights times x."""
    model = Linear()
    variables = quick.variables(model)
    kernel = np.asarray(variables["params"]["fc"]["kernel"]).reshape(12, 15, 1, 2)
    images = quick.normal(1, 2, *model.input_shape)
    signals = visualize.saliency(model, variables, images, "logits", [1, 0], "gradient")
    np.testing.assert_array_equal(signals, [kernel[..., 1], kernel[..., 0]])
    with pytest.raises(ValueError, match=r"classes=\[2\] are not all between 0 and 1"):
        visualize.saliency(model, variables, images, "logits", 2, "gradient")


def test_rules_for_a_class_score_need_relus():
    model = Chain()
    image = jnp.array([[0.5, 0.25], [1.0, 0.0]])[None, :, :, None]
    guided = visualize.saliency(model, CHAIN, image, "logits", 0, "guided")
    signal = visualize.saliency(model, CHAIN, image, "logits", 0, "gradient")
    # As in `test_rules_by_hand`: the logit is the largest output.
    assert guided[0, 1, 0, 0] == 3 * 2 and signal[0, 1, 0, 0] == 3 * 2 - 4 * 1
    with pytest.raises(ValueError, match="has none up to stage 'logits'"):
        visualize.saliency(Linear(), {}, jnp.ones((1, 12, 15, 1)), "logits", 0, "guided")


def test_grad_cam_is_class_activation_mapping_behind_global_average_pooling():
    """Behind global average pooling, Grad-CAM is CAM (Selvaraju et al. 2017, 3.1).

    CAM weights the maps by the linear layer; the sum is divided by the number of positions.
    """
    model = Pooled()
    variables = quick.variables(model)
    images = quick.normal(1, 3, *model.input_shape)
    classes = np.array([2, 0, 3])
    maps = np.asarray(visualize.activations(model, variables, images, "maps"))
    weights = np.asarray(variables["params"]["fc"]["kernel"])[:, classes]
    expected = np.maximum(np.einsum("nhwk,kn->nhw", maps, weights) / (8 * 6), 0)
    assert expected.max() > 0
    np.testing.assert_allclose(
        visualize.grad_cam(model, variables, images, "maps", classes), expected, atol=1e-6
    )


def test_grad_cam_sums_maps_of_16_bits_in_32():
    """In bfloat16, 256 + 1 is 256; so are the 257 channels here, each of which adds 1."""

    class Wide(Network):
        num_classes: int = 1
        input_shape: tuple[int, int, int] = (1, 1, 1)

        @nn.nowrap
        def walk(self, x, train):
            x = yield "maps", jnp.broadcast_to(x, (*x.shape[:3], 257)).astype(self.dtype)
            yield "logits", x.sum((1, 2, 3))[:, None]

    heat = visualize.grad_cam(Wide(dtype=jnp.bfloat16), {}, jnp.ones((1, 1, 1, 1)), "maps", 0)
    assert heat.dtype == jnp.float32
    assert heat.item() == 257


def test_grad_cam_takes_one_class_for_all_images():
    model = Pooled()
    variables = quick.variables(model)
    images = quick.normal(1, 3, *model.input_shape)
    np.testing.assert_array_equal(
        visualize.grad_cam(model, variables, images, "maps", 2),
        visualize.grad_cam(model, variables, images, "maps", np.array([2, 2, 2])),
    )


def test_images_of_another_rank_or_of_integers_are_refused(monkeypatch):
    # Users' programs run without the checks of types that the tests turn on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    image = jnp.ones((1, 2, 2, 1))
    message = r"^an image of shape \(1, 2, 2, 1\) is not \[height, width, channels\], without"
    with pytest.raises(ValueError, match=message):
        visualize.occlusion(Chain(), CHAIN, image, 1, 1)
    with pytest.raises(ValueError, match="^x has dtype int32; convert it to a floating-point type"):
        visualize.saliency(Chain(), CHAIN, image.astype(jnp.int32), "hidden", 0, "gradient")


@pytest.mark.slow
def test_grad_cam_through_layers_that_are_not_linear():
    model = create_model("lenet")
    variables = quick.variables(model)
    image = quick.normal(1, 1, *model.input_shape)
    params = variables["params"]

    def logit(maps):
        x = maps.reshape(7, 2, 7, 2, 100).max((1, 3)).transpose(2, 0, 1).reshape(-1)
        x = jnp.maximum(x @ params["linear1"]["kernel"] + params["linear1"]["bias"], 0)
        return x @ params["linear2"]["kernel"][:, 7] + params["linear2"]["bias"][7]

    maps = visualize.activations(model, variables, image, "conv2")[0]
    expected = jnp.maximum((jax.grad(logit)(maps).mean((0, 1)) * maps).sum(-1), 0)
    assert expected.max() > 1e-4
    np.testing.assert_allclose(
        visualize.grad_cam(model, variables, image, "conv2", [7])[0], expected, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("name, stage", [("resnet18", "layer1"), ("squeezenet1_1", "fire3")])
def test_a_network_given_its_own_map_is_the_network(name, stage):
    model = create_model(name, num_classes=7)
    image = quick.normal(0, 1, 48, 48, 3)
    variables = quick.variables(model)

    # The variables are an argument; as constants, they would be copied into the program.
    @jax.jit
    def logits(variables, image):
        maps = model.apply(variables, image, method="stages", last=stage)[stage]
        head = lambda y: model.apply(variables, 0 * image, replace={stage: lambda _: y})
        return model.apply(variables, image), head(maps), head(2 * maps)

    whole, joined, changed = logits(variables, image)
    np.testing.assert_allclose(joined, whole, rtol=1e-5, atol=1e-5)
    # Another map changes the logits.
    assert jnp.abs(changed - whole).max() > 0.1 * jnp.abs(whole).max() > 0


def test_occlusion_copies_variables_to_the_device_once(monkeypatch):
    given = []

    def logits(model, variables, image, **places):
        given.extend(jax.tree.leaves(variables))
        return np.zeros((16, 2))

    monkeypatch.setattr(occluders, "_occluded_logits", logits)
    variables = {"params": {"fc": {"kernel": np.zeros((12 * 15, 2), np.float32)}}}
    visualize.occlusion(Linear(), variables, jnp.ones((12, 15, 1)), 4, 2)
    # Batches of 16 of 5 x 7 squares.
    assert len(given) == 3 and isinstance(given[0], jax.Array)
    assert all(leaf is given[0] for leaf in given)


def test_occlusion_finds_the_region_that_a_linear_network_reads():
    model = Linear()
    kernel = np.zeros((12, 15, 2), np.float32)
    kernel[4:6, 9:11, 1] = 1
    variables = {"params": {"fc": {"kernel": jnp.asarray(kernel.reshape(-1, 2))}}}
    image = jax.random.uniform(jax.random.key(0), (12, 15, 1), minval=1.0, maxval=2.0)
    logits = visualize.occlusion(model, variables, image, 4, 2, -1.0)
    # The last column's squares are flush with the border, one pixel after those before.
    lefts = (0, 2, 4, 6, 8, 10, 11)
    assert logits.shape == (5, 7, 2) and not logits[..., 0].any()
    for i, j in np.ndindex(5, 7):
        hidden = np.array(image[:, :, 0])
        hidden[2 * i : 2 * i + 4, lefts[j] : lefts[j] + 4] = -1
        np.testing.assert_allclose(logits[i, j, 1], hidden[4:6, 9:11].sum(), rtol=1e-6)
    i, j = np.nonzero(logits[..., 1] == logits[..., 1].min())
    # Squares from rows 2 and 4, column 8, hide the whole region: the sum is four times -1.
    assert sorted(zip(i, j)) == [
        (1, 4),
        (2, 4),
    ]


@pytest.mark.slow
def test_effective_field_of_equal_weights_is_the_trinomial_that_tends_to_a_gaussian():
    """n convolutions of equal weights give the n-fold convolution of a box.

    Its variance is 2/3 n per axis (Luo et al. 2016, section 2.1).
    """
    model = Stack()
    variables = {
        "params": {f"conv{number}": {"kernel": jnp.ones((3, 3, 1, 1)) / 9} for number in range(10)}
    }
    field = visualize.effective_receptive_field(model, variables, jnp.zeros((2, 41, 41, 1)), "last")
    row = np.ones(1)
    for _ in range(10):
        row = np.convolve(row, np.ones(3))
    expected = np.zeros((41, 41))
    expected[10:31, 10:31] = np.outer(row, row) / row.max() ** 2
    np.testing.assert_allclose(field, expected, atol=1e-6)
    # A Gaussian falls to 4.55 % at a radius of sqrt(2 ln 22) standard deviations.
    gaussian = np.sqrt(np.pi * 2 * np.log(1 / 0.0455) * 20 / 3)
    assert (
        visualize.effective_size(field) == pytest.approx(gaussian, rel=0.05)
        and visualize.effective_size(field) < 21
    )


def test_the_effective_size_does_not_depend_on_the_scale_of_the_field():
    # The last pixel has 4 % of the largest.
    field = np.array([[1.0, 0.5], [0.05, 0.04]])
    assert visualize.effective_size(field) == visualize.effective_size(10 * field) == 3**0.5
    assert visualize.effective_size(0 * field) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, layer",
    [("conv1", "features.0"), ("fire3", "features.4.expand3x3"), ("fire5", "features.7.expand3x3")],
)
def test_effective_fields_lie_inside_theoretical_ones(squeezenet, data_dir, stage, layer):
    model, variables = squeezenet
    field = visualize.receptive_field(model, stage)
    row = {row.name: row for row in summary.layers(model)}[layer]
    assert (field.size(), field.step) == (row.receptive_field, row.stride)
    x = visualize.network_input(
        model, jnp.asarray(read(data_dir / "imagenet_sample", 4)[:, :128, :128])
    )
    effective = visualize.effective_receptive_field(model, variables, x, stage)
    rows, columns = np.nonzero(effective)
    center = visualize.activations(model, variables, x, stage).shape[1] // 2
    for axis, at in enumerate((rows, columns)):
        start = field.low[axis] + field.step[axis] * center
        assert at.min() >= start and at.max() < start + field.size()[axis]
    assert effective.max() == 1 and rows.max() - rows.min() + 1 > 0.8 * field.size()[0]
    assert visualize.effective_size(effective) <= field.size()[0] * (1 if stage == "conv1" else 0.9)


# Block 1 of the lecture's network has two 3x3 convolutions at stride 1, so two positions see a
# border. Four do if the padding is on one side only or as wide as the kernels. If maps are
# stretched, all do.
BORDER = dict.fromkeys(FILLS, 2) | {"none": 0, "full": 4, "one-sided": 4, "interpolate": None}


@pytest.mark.slow
@pytest.mark.parametrize("fill", FILLS)
def test_equivariance_error_by_padding(fill):
    model = create_model("convnet", padding=fill)
    images = quick.normal(1, 2, 25, 27, 3)
    error = visualize.equivariance_error(model, quick.variables(model), images, "block1")
    assert len(error) == {"none": 10, "full": 14}.get(fill, 12)
    assert (error[: BORDER[fill]] > 0.01).all()
    assert fill == "interpolate" or (error[BORDER[fill] :] < 1e-6).all()


def test_a_stage_that_only_larger_images_reach_is_compared():
    """Without padding, nothing is left of an image of the publication's 8 pixels."""
    model = SmallConvNet(padding="none", input_shape=(8, 8, 3), layers=((2, 2), (2, 2), (2, 2)))
    variables = quick.variables(model.clone(padding="zeros"))
    error = visualize.equivariance_error(model, variables, quick.normal(0, 1, 40, 40, 3), "conv3")
    assert (error < 1e-5).all()


@pytest.mark.slow
def test_circular_padding_is_equivariant_to_circular_shifts():
    model = create_model("convnet", padding="circular")
    variables = quick.variables(model)
    period = quick.normal(1, 1, 32, 32, 3)
    # The two windows of this image are circular shifts of each other.
    images = jnp.pad(period, ((0, 0), (0, 4), (0, 4), (0, 0)), mode="wrap")
    assert (visualize.equivariance_error(model, variables, images, "block3") < 1e-5).all()
    zeros = visualize.equivariance_error(model.clone(padding="zeros"), variables, images, "block3")
    assert zeros[0] > 0.01


@pytest.mark.slow
def test_a_patch_is_all_that_its_unit_sees(squeezenet, data_dir):
    """A patch alone, in the smallest image without a border, gives the activation."""
    model, variables = squeezenet
    images = read(data_dir / "imagenet_sample", 4)
    x = visualize.network_input(model, jnp.asarray(images))
    field = visualize.receptive_field(model, "fire5")
    size, at, seen = visualize.frame(model, "fire5")
    assert all(
        low + step * (i - 1) < 0 <= low + step * i
        for low, step, i in zip(field.low, field.step, at)
    ) and size == (63, 63)
    values, places = visualize.peaks(model, variables, x, "fire5")
    maps = np.asarray(visualize.activations(model, variables, x, "fire5"))
    inner = np.argwhere(((places >= 5) & (places < 22)).all(2) & (values > 1))[:20]
    assert len(inner) == 20
    patches = figures.patches(
        np.asarray(x)[inner[:, 0]], places[inner[:, 0], inner[:, 1]], field, np.nan
    )
    alone = np.zeros((20, *size, 3), np.float32)
    alone[:, *seen] = patches
    again = np.asarray(visualize.activations(model, variables, jnp.asarray(alone), "fire5"))[
        :, at[0], at[1]
    ]
    for (image, channel), place, found in zip(inner, places[inner[:, 0], inner[:, 1]], again):
        assert (
            values[image, channel]
            == maps[image, ..., channel].max()
            == maps[image, place[0], place[1], channel]
        )
        assert found[channel] == pytest.approx(values[image, channel], rel=1e-4)
    corner = figures.patches(images[:1], np.array([[0, 0]]), field, 7)[0]
    low = -field.low[0]
    assert (corner[:low] == 7).all() and np.array_equal(
        corner[low:, low:], images[0, : 63 - low, : 63 - low]
    )


@pytest.mark.slow
def test_maximizing_a_linear_filter_nears_its_bound(squeezenet):
    """The best image for a filter has pixels of 0 or 1, by the sign of the weight."""
    model, variables = squeezenet
    name, kernel = visualize.first_filters(model, variables)
    assert name == "features.0" and kernel.shape == (3, 3, 3, 64)
    ends = np.asarray(
        visualize.network_input(
            model, jnp.asarray([0, 255])[:, None, None, None] * jnp.ones((1, 1, 1, 3), int)
        )
    )
    bound = (
        np.maximum(*(kernel * end[0, 0, :, None] for end in ends)).sum((0, 1, 2))
        + variables["params"]["features.0"]["bias"]
    )
    images, (before, after) = visualize.maximize(
        model, variables, "conv1", range(64), total_variation=0.0
    )
    assert images.shape == (64, 3, 3, 3) and images.min() >= 0 and images.max() <= 1
    assert (
        (before == 0).any()
        and (after <= bound + 1e-4).all()
        and (after > bound / 2).all()
        and (after / bound).mean() > 0.9
    )
    rolled, (_, worse) = visualize.maximize(
        model, variables, "conv1", range(64), total_variation=0.0, jitter=1
    )
    # With jitter, an image must excite the filter at several offsets, and so excites it less.
    assert (worse / bound).mean() < (after / bound).mean()
    assert np.ptp(rolled, axis=(1, 2)).mean() < 0.8 * np.ptp(images, axis=(1, 2)).mean()


@pytest.mark.slow
def test_maximizing_beats_the_best_photograph_patch(squeezenet, data_dir):
    model, variables = squeezenet
    # The second and the third channel are silent on noise.
    channels = [0, 51, 85, 127]
    x = visualize.network_input(model, jnp.asarray(read(data_dir / "imagenet_sample", 50)))
    best = visualize.peaks(model, variables, x, "fire3")[0].max(0)[channels]
    images, (before, after) = visualize.maximize(model, variables, "fire3", channels, steps=100)
    assert (before == 0).any() and (after > 1.1 * best).all() and (best > before).all()
    # The returned images give the measured activations, and have the pixels of a photograph's
    # patch.
    x = visualize.network_input(model, 255 * jnp.asarray(images))
    at = visualize.frame(model, "fire3")[1]
    size = visualize.frame(model, "fire3")[0]
    whole = jnp.zeros((4, *size, 3)).at[:, *visualize.frame(model, "fire3")[2]].set(x)
    again = visualize.activations(model, variables, whole, "fire3")[
        jnp.arange(4), at[0], at[1], jnp.array(channels)
    ]
    np.testing.assert_allclose(again, after, rtol=1e-4)
    smooth, same = (
        visualize.maximize(model, variables, "fire3", channels, steps=100, **options)[0]
        for options in ({"total_variation": 0.2}, {"seed": 0})
    )
    roughness = lambda images: np.abs(np.diff(images, axis=1)).mean()
    assert np.array_equal(same, images) and roughness(smooth) < 0.8 * roughness(images)


@pytest.mark.slow
def test_a_unit_that_sees_more_than_the_image_is_the_central_one():
    model = create_model("resnet18")
    size, at, seen = visualize.frame(model, "layer4")
    assert visualize.receptive_field(model, "layer4").size() == (435, 435)
    assert (size, at, seen) == ((224, 224), (3, 3), (slice(None), slice(None)))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m, v, x: visualize.activations(m, v, x, "conv9"),
            "stage='conv9' is not a stage of this network; its stages are conv1, conv2",
        ),
        (lambda m, v, x: visualize.receptive_field(m, ""), "stage='' is not a stage"),
        (
            lambda m, v, x: visualize.saliency(m, v, x, "conv1", 6, "guided"),
            "channel=6 is not between 0 and 5, the channels of stage conv1",
        ),
        (
            lambda m, v, x: visualize.saliency(m, v, x, "conv1", [0, -1], "guided"),
            "channel=-1 is not between",
        ),
        (
            lambda m, v, x: visualize.saliency(m, v, x, "conv1", 0, "redirected"),
            "rule='redirected' is not one of gradient, deconvnet, guided",
        ),
        (
            lambda m, v, x: visualize.grad_cam(m, v, x, "conv1", [0, 10]),
            r"classes=\[0, 10\] are not all between 0 and 9",
        ),
        (
            lambda m, v, x: visualize.occlusion(m, v, x[0], 33, 1),
            "size=33 of the square is not between 1 and 32",
        ),
        (
            lambda m, v, x: visualize.occlusion(m, v, x[0], 8, 0),
            "stride=0 is not a positive number",
        ),
        (
            lambda m, v, x: visualize.maximize(m, v, "conv1", [0], steps=0),
            "steps=0 is not a number of at least 1",
        ),
        (
            lambda m, v, x: visualize.maximize(m, v, "conv1", [0], total_variation=-0.1),
            "total_variation=-0.1 is not a number of at least 0",
        ),
        (
            lambda m, v, x: visualize.maximize(m, v, "conv1", [0], jitter=-1),
            "jitter=-1 is not a number of at least 0",
        ),
        (
            lambda m, v, x: visualize.equivariance_error(m, v, x[:, :6, :6], "conv1"),
            "images of 6x6 leave no two positions of stage='conv1'",
        ),
        (
            lambda m, v, x: visualize.first_filters(create_model("mlp1"), v),
            "the network has no convolution",
        ),
        (
            lambda m, v, x: visualize.first_filters(m, {"params": {}}),
            "the weights do not hold conv1, whose filters are to be shown",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    model = create_model("tutorial_net")
    with pytest.raises(ValueError, match=message):
        call(model, quick.variables(model), jnp.ones((2, 32, 32, 3)))


def test_a_stage_without_maps_is_named_and_left_out_of_all_stages(tmp_path):
    model = Vectors()
    assert visualize.stage_channels(model) == {"maps": 4}
    message = r"stage='hidden' yields an array of shape \(1, 5\) for one image; expected .*: maps$"
    with pytest.raises(ValueError, match=message):
        visualize.peaks(model, {}, jnp.ones((1, 8, 8, 3)), "hidden")
    arguments = ["maximise", "--model", f"{__name__}:Vectors", "--weights", "random"]
    arguments += ["--workdir", str(tmp_path)]
    assert subject.Subject(options._parse(arguments)).stages == ["maps"]
    with pytest.raises(ValueError, match=message):
        subject.Subject(options._parse([*arguments, "--stages", "hidden"]))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, v, x: visualize.receptive_field(m, "maps"),
        lambda m, v, x: visualize.frame(m, "maps"),
        lambda m, v, x: visualize.equivariance_error(m, v, x, "maps"),
        lambda m, v, x: visualize.maximize(m, v, "maps", [0], jitter=1),
    ],
)
def test_a_stage_that_sees_the_whole_image_is_named(call):
    with pytest.raises(ValueError, match="stage='maps' sees the whole image, as after GroupNorm"):
        call(Gated(), {}, jnp.ones((2, 8, 12, 3)))


def test_a_network_that_draws_in_evaluation_draws_the_same_each_time():
    model = SmallResNet(5, widths=(4, 8), permute=True, input_shape=(16, 16, 3))
    assert visualize.stage_channels(model) == {"layer1": 4, "layer2": 8}
    variables = quick.variables(model)
    x = quick.normal(0, 2, 16, 16, 3)
    one, again = (stages.logits(model, variables, x) for _ in range(2))
    assert one.shape == (2, 5) and np.array_equal(one, again)


def test_only_errors_about_variables_are_blamed_on_the_weights(monkeypatch):
    def fail(subject):
        raise flax.errors.InvalidRngError("needs PRNG")

    monkeypatch.setitem(commands.COMMANDS, "filters", fail)
    given = argparse.Namespace(command="filters", run=None, weights="random")
    with pytest.raises(flax.errors.InvalidRngError, match="^needs PRNG"):
        options._look(types.SimpleNamespace(options=given))


def test_maps_lie_at_the_centers_of_fields_or_are_spread_evenly():
    # A 3x3 convolution of padding 1 is centered on pixel 0 first.
    first, steps = stages.map_grid(Pooled(), "maps")
    assert (*first, *steps) == (0, 0, 1, 1)
    # Of 8x12 pixels, each of 4x6 positions has 2x2.
    first, steps = stages.map_grid(Gated(), "maps")
    assert (*first, *steps) == (0.5, 0.5, 2, 2)
    # A stretched map has neither.
    message = "stage='maps' is stretched by padding='interpolate', and its field is not followed"
    with pytest.raises(ValueError, match=message):
        stages.map_grid(Pooled(padding="interpolate"), "maps")


class Labels(Network):
    """A score of each pixel from one convolution (stage `maps`)."""

    num_classes: int = 2
    input_shape: tuple[int, int, int] = (8, 8, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = yield "maps", Conv(5, 3, padding=1, name="conv")(x)
        yield "logits", Conv(self.num_classes, 1, name="score")(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, variables, x: visualize.occlusion(model, variables, x[0], 4, 2),
        lambda model, variables, x: visualize.grad_cam(model, variables, x, "maps", [0, 1]),
        stages.logits,
    ],
)
def test_a_network_that_labels_pixels_has_no_class_to_explain(call):
    model = Labels()
    with pytest.raises(ValueError, match="Labels labels pixels; expected a network that classif"):
        call(model, quick.variables(model), jnp.ones((2, 8, 8, 3)))


def test_photographs_of_subfolders_keep_their_folder_in_the_results(folder, tmp_path):
    photograph = next(folder.iterdir())
    names = [f"a/1{photograph.suffix}", f"b/1{photograph.suffix}", f"c{photograph.suffix}"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(photograph, tmp_path / name)
    arguments = ["activations", "--model", "lenet", "--weights", "random", "--stages", "conv1"]
    arguments += ["--images", "3", "--photographs", str(tmp_path), "--workdir", "unused"]
    of_folder = subject.Subject(options._parse(arguments))
    _, results = commands.maps(of_folder)
    assert [row["photograph"] for row in results["maps"]] == names
    strongest = commands._strongest(of_folder, "conv1", [0], 3)
    (row,) = commands._with_names(of_folder, strongest)
    assert sorted(row["photographs"]) == names


COMMANDS = {
    "filters": [],
    "activations": ["--images", "2", "--stages", "conv1", "fire5"],
    "maximise": ["--stages", "conv1", "fire3", "--channels", "3", "4", "--steps", "20"],
    "patches": ["--stage", "fire3", "--channels", "3", "4"],
    "occlusion": ["--images", "2", "--size", "96", "--stride", "64"],
    "grad-cam": ["--images", "2", "--stage", "fire9"],
    "saliency": ["--images", "2", "--label", "287"],
    "field": ["--images", "2", "--stages", "fire3"],
    "equivariance": ["--images", "1", "--stages", "fire3"],
    "levels": ["--stages", "conv1", "fire3", "--channels", "3", "--steps", "2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four of scikit-image's photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for path in photographs.list_photographs("")[:4]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def known(data_dir, tmp_path_factory):
    """Four photographs of the ImageNet sample, whose names begin with their classes."""
    folder = tmp_path_factory.mktemp("known")
    for number in ("000", "200", "400", "798"):
        shutil.copy(next((data_dir / "imagenet_sample").glob(f"{number}_*")), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, data_dir, known, tmp_path, monkeypatch):
    assert COMMANDS.keys() == commands.COMMANDS.keys() == options._COMMANDS.keys()
    arguments = [
        command,
        "--model",
        "squeezenet1_1",
        "--weights",
        str(data_dir / "weights" / "squeezenet1_1_imagenet.safetensors"),
        "--workdir",
        str(tmp_path / "run"),
        *COMMANDS[command],
    ]
    if command not in ("filters", "maximise"):
        arguments += ["--photographs", str(known)]
    # Each fill is compiled, so only three are run here; all are tested above.
    monkeypatch.setattr(commands, "FILLS", ("zeros", "none", "mean"))
    assert visualize.main(arguments) == 0
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == sorted(
        ["config.json", "environment.json", f"{command}.png", "results.json"]
    )
    picture = photographs.read_image(run / f"{command}.png")
    assert min(picture.shape[:2]) > 150 and picture.std() > 10
    results = json.loads((run / "results.json").read_text())
    assert results["kind"] == json.loads((run / "config.json").read_text())["command"] == command
    check = {
        "filters": lambda r: r["shape"] == [3, 3, 3, 64] and len(r["norms"]) == 64,
        "activations": lambda r: (
            [(m["photograph"][:3], m["stage"], m["shape"]) for m in r["maps"]]
            == [
                (name, stage, shape)
                for name in ("000", "798")
                for stage, shape in (("conv1", [111, 111, 64]), ("fire5", [27, 27, 256]))
            ]
        ),
        "maximise": lambda r: (
            [u["channel"] for u in r["units"]] == [3, 4] * 2
            and all(u["maximized"] > u["noise"] for u in r["units"])
        ),
        "patches": lambda r: (
            len(r["channels"]) == 2
            and all(
                len(c["photographs"]) == 4 and sorted(c["activations"])[::-1] == c["activations"]
                for c in r["channels"]
            )
        ),
        "occlusion": lambda r: (
            [p["class"] for p in r["photographs"]] == [0, 798]
            and np.shape(r["photographs"][0]["hidden"]) == (3, 3)
        ),
        "grad-cam": lambda r: (
            [p["class"] for p in r["photographs"]] == [0, 798]
            and np.max(r["photographs"][0]["map"]) > 0
        ),
        "saliency": lambda r: (
            [(p["class"], p["probability"] < 0.5) for p in r["photographs"]] == [(287, True)] * 2
        ),
        "field": lambda r: (
            r["stages"][0]["theoretical"] == [23, 23] and 5 < r["stages"][0]["effective"] < 23
        ),
        "equivariance": lambda r: (
            {e["padding"]: e["error"][0] > 0.01 for e in r["errors"]}
            == {"zeros": True, "none": False, "mean": True}
        ),
        "levels": lambda r: (
            [(u["stage"], u["channel"], len(u["photographs"])) for u in r["units"]]
            == [("conv1", 3, 1), ("fire3", 3, 1)]
        ),
    }[command]
    assert check(results), results


@pytest.mark.slow
def test_a_network_of_one_channel(folder, tmp_path):
    arguments = ["levels", "--model", "lenet", "--weights", "random", "--photographs", str(folder)]
    arguments += ["--steps", "2", "--channels", "0", "--workdir", str(tmp_path)]
    # Each stage is a program to compile.
    assert subject.Subject(options._parse(arguments)).stages == ["conv1", "conv2"]
    assert visualize.main([*arguments, "--stages", "conv2"]) == 0
    units = json.loads((tmp_path / "results.json").read_text())["units"]
    assert [unit["stage"] for unit in units] == ["conv2"]


def compare_shifts(folder, monkeypatch, fails):
    """Runs `equivariance` on LeNet, where a function of (padding, stage) says what fails."""

    def error(model, variables, images, stage):
        if fails(model.padding, stage):
            raise ValueError(f"the image is too small under {model.padding!r}")
        return np.array([0.5, 0.25, 0.0])

    monkeypatch.setattr(commands, "equivariance_error", error)
    arguments = ["equivariance", "--model", "lenet", "--weights", "random"]
    arguments += ["--photographs", str(folder), "--images", "1", "--workdir", "unused"]
    return commands.equivariance(subject.Subject(options._parse(arguments)))


def test_curves_of_any_stage_are_named_and_what_is_left_out_is_said(folder, monkeypatch, caplog):
    fails = {("none", "conv1"), ("none", "conv2"), ("full", "conv2")}
    figure, results = compare_shifts(folder, monkeypatch, lambda *where: where in fails)
    assert [axis.get_title() for axis in figure.axes] == ["conv1", "conv2"]
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {*FILLS} - {"none"}
    rows = results["errors"]
    assert [(row["stage"], row["padding"]) for row in rows] == [
        (stage, fill) for stage in ("conv1", "conv2") for fill in FILLS
    ]
    for row in rows:
        if (row["padding"], row["stage"]) in fails:
            assert row["error"] is None and "too small under" in row["reason"]
        else:
            assert [*row["error"]] == [0.5, 0.25, 0]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "stage='conv1': left out none (the image is too small under 'none')",
        "stage='conv2': left out none, full (the image is too small under 'none')",
    ]


def test_a_stage_without_any_curve_has_no_panel(folder, monkeypatch):
    figure, results = compare_shifts(folder, monkeypatch, lambda fill, stage: stage == "conv2")
    assert [axis.get_title() for axis in figure.axes] == ["conv1"]
    assert len(results["errors"]) == 2 * len(FILLS)
    message = "^no stage can be compared under any padding: the image is too small under 'zeros'"
    with pytest.raises(ValueError, match=message):
        compare_shifts(folder, monkeypatch, lambda fill, stage: True)


@pytest.mark.parametrize(
    "command",
    [
        ["maximise"],
        ["patches", "--stage", "maps"],
        ["levels"],
        ["field"],
        ["equivariance"],
    ],
)
def test_a_stage_without_a_known_field_is_refused_before_anything_is_computed(
    command, folder, tmp_path, monkeypatch, capsys
):
    def fail(*arguments, **options):
        raise AssertionError("too late")

    monkeypatch.setattr(subject.Subject, "read", fail)
    monkeypatch.setattr(commands, "maximize", fail)
    arguments = [*command, "--model", f"{__name__}:Gated", "--weights", "random"]
    if command != ["maximise"]:
        arguments += ["--photographs", str(folder)]
    code, error = refused([*arguments, "--workdir", str(tmp_path)], capsys)
    assert code == 2 and error.startswith("error: stage='maps' sees the whole image"), error


def test_rows_whose_rule_is_about_relus_are_left_out_without_them(folder, monkeypatch, caplog):
    arguments = ["--model", f"{__name__}:Vectors", "--weights", "random", "--photographs"]
    arguments += [str(folder), "--images", "1", "--channels", "0", "--workdir", "unused"]
    line = (
        "left out: {}, since rule='{}' is about cnnjax.nn.relu, and this network has none up to "
        "stage 'maps'"
    )
    patches = subject.Subject(options._parse(["patches", "--stage", "maps", *arguments]))
    figure, _ = commands.top_patches(patches)
    assert [axis.get_ylabel() for axis in figure.axes] == ["photographs"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        line.format("deconvnet, guided", "deconvnet")
    ]
    caplog.clear()
    monkeypatch.setattr(
        commands, "maximize", lambda *a, channels, **k: (np.ones((1, 3, 3, 3)), np.ones((2, 1)))
    )
    figure, _ = commands.levels(subject.Subject(options._parse(["levels", *arguments])))
    assert [axis.get_ylabel() for axis in figure.axes] == ["maximized", "best patch"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        line.format("guided", "guided")
    ]


def test_maps_are_drawn_from_minimum_to_maximum_and_silent_means_zero(folder, monkeypatch):
    """The channels are negative, of both signs, 0, and constant."""
    ramp = np.arange(9, dtype=np.float32).reshape(3, 3)
    channels = np.stack([ramp - 10, ramp - 4, 0 * ramp, 0 * ramp - 1], -1)
    drawn = []
    monkeypatch.setattr(commands, "activations", lambda *arguments: channels[None])
    monkeypatch.setattr(commands, "mosaic", lambda images: drawn.append(images) or images[0])
    arguments = ["activations", "--model", f"{__name__}:Vectors", "--weights", "random"]
    arguments += ["--photographs", str(folder), "--images", "1", "--workdir", "unused"]
    _, results = commands.maps(subject.Subject(options._parse(arguments)))
    (row,) = results["maps"]
    assert row["silent_channels"] == 1
    np.testing.assert_array_equal(row["max"], [-2, 4, 0, -1])
    expected = [ramp / 8, ramp / 8, 0 * ramp, 0 * ramp]
    np.testing.assert_allclose(drawn[0], expected)


@pytest.mark.parametrize(
    "label, names, expected",
    [
        ("bee", ["ant", "bee", "cat"], 1),
        ("2", ["ant", "bee", "cat"], 2),
        ("2", [], 2),
        # A class that is named by a number.
        ("2", ["0", "2", "1"], 1),
        ("crane", ["crane", "heron", "crane"], "is the name of classes 0, 2; give a number"),
        (
            "be",
            ["ant", "bee", "cat"],
            "label='be' is neither the name nor the number of a class; expected a number from 0 to "
            "2, or one of ant, bee, cat; did you mean bee",
        ),
        ("3", [], "label='3' is neither .*; expected a number from 0 to 2, since"),
        ("-1", [], "label='-1' is neither"),
    ],
)
def test_a_class_is_given_by_its_name_or_its_number(label, names, expected):
    if isinstance(expected, int):
        assert subject.find_class(label, names, 3) == expected
        return
    with pytest.raises(ValueError, match=expected):
        subject.find_class(label, names, 3)


@pytest.mark.parametrize("command", ["occlusion", "saliency"])
def test_a_network_without_stages_explains_a_class(command, folder, tmp_path):
    arguments = [command, "--model", f"{__name__}:Linear", "--weights", "random", "--images", "2"]
    arguments += ["--photographs", str(folder), "--label", "1", "--workdir", str(tmp_path)]
    assert visualize.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["photographs"]
    assert [row["class"] for row in rows] == [1, 1]
    assert json.loads((tmp_path / "config.json").read_text())["label"] == "1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Writes a training run's folder that `cnnjax.train.run.open_run` can read."""
    folder = tmp_path_factory.mktemp("run")
    model = create_model("lenet", num_classes=3, input_shape=(20, 20, 1), padding="reflect")
    config = {"kind": "train", "model": "lenet", "model_fields": {"padding": "reflect"}}
    results = {
        "classes": ["ant", "bee", "cat"],
        "image_shape": [20, 20, 1],
        "mean": [0.25],
        "std": [0.5],
    }
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "results.json", results)
    save_torchvision(quick.variables(model), folder / "weights.safetensors")
    workdir.seal(folder)
    return folder


@pytest.mark.slow
def test_a_training_run_gives_network_classes_size_and_normalization(run, folder, tmp_path):
    command = ["activations", "--images", "1", "--photographs", str(folder)]
    visualize.main([*command, "--run", str(run), "--workdir", str(tmp_path)])
    (row, *_) = json.loads((tmp_path / "results.json").read_text())["maps"]
    reopened = open_run(run)
    assert reopened.model.padding == "reflect"
    image = reopened.read(photographs.list_photographs(folder)[0])
    assert image.shape == (20, 20, 1)
    x = (image[None] / 255 - 0.25) / 0.5
    maps = visualize.activations(reopened.model, reopened.variables, jnp.float32(x), "conv1")
    np.testing.assert_allclose(row["mean"], maps[0].mean((0, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_classes_of_a_run_have_names(run, folder, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(commands, "_show_photograph", lambda *arguments: titles.append(arguments))
    command = ["grad-cam", "--stage", "conv2", "--images", "1", "--photographs", str(folder)]
    visualize.main([*command, "--run", str(run), "--workdir", str(tmp_path)])
    (photograph,) = json.loads((tmp_path / "results.json").read_text())["photographs"]
    name = ["ant", "bee", "cat"][photograph["class"]]
    assert f"\n{name}: {photograph['probability']:.2f}" in titles[0][2]


def change_run(folder, copy, **config):
    """Copies a run's folder and changes its configuration."""
    shutil.copytree(folder, copy)
    workdir.unseal(copy)
    record = json.loads((copy / "config.json").read_text())
    files.write_json(copy / "config.json", record | config)
    return copy


@pytest.mark.parametrize("loss", ["cross_entropy", "sigmoid"])
def test_a_run_is_shown_as_predict_reads_and_judges_it(loss, run, folder, tmp_path):
    """Photographs become gray and are cropped as in the run, whose loss gives probabilities."""
    changed = change_run(run, tmp_path / "run", loss=loss, dataset="folder", resize=30)
    arguments = ["grad-cam", "--run", str(changed), "--stage", "conv2", "--workdir", "unused"]
    arguments += ["--photographs", str(folder), "--images", "2"]
    of_run = subject.Subject(options._parse(arguments))
    network = classifier.trained(changed)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(of_run.variables))
    images = of_run.photographs()
    expected = np.stack([network.read(path) for path in of_run.paths])
    np.testing.assert_array_equal(images, np.repeat(expected, 3, 3))
    assert of_run.read(of_run.paths[:1], times=2).shape == (1, 40, 40, 3)

    _, numbers = commands.class_maps(of_run)
    probabilities = [*predict.probabilities(network, of_run.paths)]
    for row, of_classes in zip(numbers["photographs"], probabilities, strict=True):
        assert row["class"] == of_classes.argmax()
        np.testing.assert_allclose(row["probability"], of_classes.max(), rtol=1e-5)

    labeled = subject.Subject(options._parse([*arguments, "--label", "cat"]))
    _, numbers = commands.class_maps(labeled)
    for row, of_classes in zip(numbers["photographs"], probabilities, strict=True):
        assert row["class"] == 2
        np.testing.assert_allclose(row["probability"], of_classes[2], rtol=1e-5)


def test_published_weights_have_imagenets_classes(monkeypatch, tmp_path):
    monkeypatch.setattr(subject, "_variables", lambda *_: {})
    for source, name in (
        ("imagenet", "Persian cat"),
        (str(tmp_path / "squeezenet1_1-b8a52dc0.pth"), "Persian cat"),
        ("other.safetensors", "class 283"),
        ("random", "class 283"),
    ):
        arguments = ["filters", "--model", "squeezenet1_1", "--weights", source]
        arguments += ["--workdir", "unused"]
        assert subject.Subject(options._parse(arguments)).class_name(283) == name


@pytest.mark.parametrize(
    "side, given, expected",
    [
        (224, [], (48, 16)),
        (224, ["--size", "96"], (96, 16)),
        (28, [], (6, 2)),
        (8, [], (2, 1)),
        (2, ["--stride", "3"], (1, 3)),
    ],
)
def test_the_square_is_in_proportion_to_the_image(side, given, expected):
    arguments = ["occlusion", "--model", "lenet", "--weights", "random", "--workdir", "unused"]
    parsed = options._parse([*arguments, *given])
    options._set_square(parsed, (side, side + 1, 3))
    assert (parsed.size, parsed.stride) == expected


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["none", "full", "random"])
def test_fills_are_visualized(fill, run, folder, tmp_path):
    """These change the size of maps, or draw numbers.

    `equivariance_error` is tested under all fills above.
    """
    arguments = ["field", "--stages", "conv2", "--images", "1", "--photographs", str(folder)]
    arguments += ["--run", str(run), "--padding", fill, "--workdir", str(tmp_path)]
    assert visualize.main(arguments) == 0
    (stage,) = json.loads((tmp_path / "results.json").read_text())["stages"]
    # Fills that read the whole map add little to the 8x8 pixels around the central unit.
    assert stage["theoretical"] == [8, 8] and 5 < stage["effective"] <= 8


def refused(arguments: list[str], capsys) -> tuple[int, str]:
    """Returns the exit code and standard error of the command."""
    capsys.readouterr()
    return quick.exit_code(visualize.main, arguments), capsys.readouterr().err


GOOD = {"--model": "lenet", "--weights": "random", "--workdir": "WORK"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, changed, message",
    [
        ("activations", {"--model": "lenett"}, "model='lenett' is not known; did you mean lenet"),
        (
            "activations",
            {"--stages": "conv9"},
            "stage='conv9' is not a stage of this network; its stages are conv1, conv2",
        ),
        (
            "activations",
            {"--channels": "50"},
            "channel=50 is not between 0 and 49, the channels of stage conv1",
        ),
        (
            "activations",
            {"--channels": "-1"},
            "argument --channels: '-1' is not a whole number of at least 0",
        ),
        (
            "activations",
            {"--images": "0"},
            "argument --images: '0' is not a whole number of at least 1",
        ),
        ("activations", {"--photographs": "WORK"}, "holds no image file"),
        ("activations", {"--photographs": "nowhere"}, "photographs='nowhere' is not a folder"),
        ("activations", {"--padding": "mirror"}, "padding='mirror' is not one of zeros, none"),
        (
            "activations",
            {"--weights": "nothing.safetensors"},
            "weights='nothing.safetensors' is not a file",
        ),
        ("activations", {"--weights": None}, "the following arguments are required: --weights"),
        ("activations", {"--model": "mlp1"}, "model='mlp1' has no stages"),
        ("occlusion", {"--label": "ten"}, "label='ten' is neither the name nor the number of a"),
        (
            "field",
            {"--padding": "interpolate"},
            "stage='conv1' is stretched by padding='interpolate'",
        ),
        ("activations", {"--workdir": "FILE/run"}, "cannot be written to: Not a directory"),
        ("patches", {}, "the following arguments are required: --stage"),
        (
            "levels",
            {"--total_variation": "nan"},
            "argument --total_variation: 'nan' is not a number of at least 0",
        ),
        (
            "levels",
            {"--stages": "conv1 conv1 conv2 conv2"},
            "stages=conv1, conv1, conv2, conv2 are more than three",
        ),
        ("occlusion", {"--size": "29"}, "size=29 of the square is not between 1 and 28"),
        ("dance", {}, "invalid choice: 'dance'"),
        (
            "filters",
            {"--run": "WORK"},
            "--run names the network and its weights; leave out --model",
        ),
        (
            "filters",
            {"--run": "WORK", "--model": None, "--weights": None},
            "is not a finished training run: it has no config.json",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, changed, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "work").mkdir()
    arguments = [command]
    for name, value in {**GOOD, **changed}.items():
        if value is not None:
            value = value.replace("WORK", str(tmp_path / "work")).replace(
                "FILE", str(tmp_path / "file")
            )
            arguments += [name, *value.split()]
    code, error = refused(arguments, capsys)
    # A log line says how many photographs were read.
    lines = [line for line in error.splitlines() if " photographs, " not in line]
    assert code == 2 and len(lines) == 1 and message in lines[0], error
    assert not list((tmp_path / "work").glob("*.png"))


def test_a_run_on_images_that_are_no_photographs_is_refused(folder, tmp_path, capsys):
    model = create_model("lenet", num_classes=3, input_shape=(8, 8, 4))
    run = tmp_path / "run"
    run.mkdir()
    facts = {"classes": ["a", "b", "c"], "image_shape": [8, 8, 4], "mean": [0] * 4, "std": [1] * 4}
    files.write_json(run / "config.json", {"kind": "train", "model": "lenet"})
    files.write_json(run / "results.json", facts)
    save_torchvision(quick.variables(model), run / "weights.safetensors")
    options = ["--run", str(run), "--workdir", str(tmp_path / "work")]
    # Filters and maximized images are shown like photographs.
    for command in (["filters"], ["maximise"], ["activations", "--photographs", str(folder)]):
        code, message = refused([*command, *options], capsys)
        assert code == 2
        expected = "lenet takes images of 4 channels; photographs have 3, or 1 in gray"
        assert message == f"error: {expected}\n"


def test_a_refused_command_leaves_no_folder(folder, tmp_path, capsys):
    work = tmp_path / "a" / "b"
    arguments = ["--model", "lenet", "--weights", "random", "--photographs", str(folder)]
    square = ["--size", "48", "--workdir", str(work)]
    code, error = refused(["occlusion", *arguments, *square], capsys)
    assert code == 2 and "size=48 of the square is not between 1 and 28" in error
    assert not list(tmp_path.iterdir())


def test_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photographs").mkdir()
    PIL.Image.new("RGB", (30, 30)).save(tmp_path / "photographs" / "a.png")
    save_torchvision(quick.variables(create_model("lenet")), tmp_path / "a.safetensors")
    arguments = ["--model", "lenet", "--weights", "~/a.safetensors", "--workdir", "~/run"]
    command = ["activations", "--stages", "conv1", "--photographs", "~/photographs"]
    assert visualize.main([*command, *arguments]) == 0
    assert (tmp_path / "run" / "activations.png").exists()


# ------------------------------------------------------------------ odd images

ODD = {
    "1x1.png": lambda path: PIL.Image.new("RGB", (1, 1), "red").save(path),
    "gray and alpha.png": lambda path: PIL.Image.new("LA", (9, 7), (200, 100)).save(path),
    "palette.png": lambda path: PIL.Image.new("P", (9, 7)).save(path, transparency=0),
    "cmyk.jpg": lambda path: PIL.Image.new("CMYK", (9, 7), (0, 99, 9, 9)).save(path),
    "bits.png": lambda path: PIL.Image.fromarray(np.zeros((9, 7), np.uint16)).save(path),
    "empty.jpg": lambda path: path.touch(),
    "animated.png": lambda path: PIL.Image.new("P", (9, 7)).save(
        path, "GIF", save_all=True, append_images=[PIL.Image.new("P", (9, 7), 1)]
    ),
    "animated.gif": lambda path: PIL.Image.new("P", (9, 7)).save(path),
    "folder.jpg": lambda path: path.mkdir(),
    # A name that is not UTF-8, and one that matplotlib would read as a formula.
    os.fsdecode(b"caf\xe9.png"): lambda path: PIL.Image.new("RGB", (9, 7)).save(path),
    "a$b_$c.png": lambda path: PIL.Image.new("RGB", (9, 7)).save(path),
    # "Cat" in Chinese and as an emoji, which matplotlib's font lacks.
    "\u732b\U0001f408 1.png": lambda path: PIL.Image.new("RGB", (9, 7)).save(path),
}
REFUSED = {
    "bits.png": "bits.png is not a readable image: pixels of more than 8 bits",
    "empty.jpg": "empty.jpg is not a readable image: cannot identify image file",
    "animated.png": "animated.png is not a readable image: cannot identify image file",
    "animated.gif": "holds no image file; expected .jpg",
    "folder.jpg": "holds no image file; expected .jpg",
}


def test_a_title_keeps_its_lines_and_what_the_font_has():
    figure, ((axis,),) = figures.grid(1, 1)
    figures.set_title(axis, "\u732b caf\xe9 $1\ncat: 0.52", fontsize=7)
    assert axis.get_title() == "? caf\xe9 $1\ncat: 0.52"


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("name", ODD)
def test_odd_images(name, tmp_path, capsys):
    """An odd image gives a picture, or one clear line and no folder."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    ODD[name](folder / name)
    command = ["activations", "--model", "lenet", "--weights", "random", "--stages", "conv1"]
    paths = ["--photographs", str(folder), "--workdir", str(tmp_path / "run")]
    code, error = refused([*command, *paths], capsys)
    lines = [line for line in error.splitlines() if " photographs, " not in line]
    if name not in REFUSED:
        assert code == 0 and not lines and (tmp_path / "run" / "activations.png").exists()
        return
    assert code == 2 and len(lines) == 1 and REFUSED[name] in lines[0], error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_weights_that_lack_what_a_command_needs(data_dir, folder, tmp_path, capsys):
    """A file without the last modules serves only earlier stages."""
    path = str(data_dir / "weights" / "resnet18_conv1-layer3_imagenet.safetensors")
    common = [
        "--model",
        "resnet18",
        "--weights",
        path,
        "--photographs",
        str(folder),
        "--images",
        "1",
    ]
    for arguments, message in (
        (["--workdir", str(tmp_path / "a")], "not in the file: fc.bias (1000,)"),
        (
            ["--workdir", str(tmp_path / "a"), "--missing", "layer4", "fc"],
            "do not hold all that grad-cam needs",
        ),
    ):
        code, error = refused(["grad-cam", *common, "--stage", "layer1", *arguments], capsys)
        assert code == 2 and message in error
    visualize.main(
        [
            "activations",
            *common,
            "--stages",
            "layer3",
            "--missing",
            "layer4",
            "fc",
            "--workdir",
            str(tmp_path / "b"),
        ]
    )
    assert (tmp_path / "b" / "activations.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["none", "full"])
def test_random_weights_fit_the_padding(padding):
    """A dense layer on a flattened map has another shape under these two."""
    network = create_model("lenet", padding=padding)
    options = argparse.Namespace(model="lenet", weights="random")
    variables = subject._variables(network, options)
    network.apply(variables, jnp.ones((1, *network.input_shape)))


def test_first_filters_of_a_network_without_room_for_none():
    network = create_model("resnet50", padding="none")
    variables = {"params": {"conv1": {"kernel": np.ones((7, 7, 3, 64))}}}
    name, filters = stages.first_filters(network, variables)
    assert name == "conv1" and filters.shape == (7, 7, 3, 64)


@pytest.mark.slow
def test_a_work_directory_is_one_configurations(tmp_path, capsys):
    arguments = ["filters", "--model", "lenet", "--weights", "random", "--workdir", str(tmp_path)]
    visualize.main(arguments)
    visualize.main(arguments)
    code, error = refused([*arguments, "--padding", "none"], capsys)
    assert (
        code == 2
        and "holds a run of another configuration (padding='zeros' there, 'none' now)" in error
    )
