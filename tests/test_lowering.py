"""Every operation's fast and plain form, under JAX's transformations and modes."""

import functools
import gc
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cnnjax import nn as cnn
from cnnjax.models import create_model
from cnnjax.nn.cpu import depthwise
from cnnjax.nn.cpu.sums import squared_deviation
from cnnjax.weights import variable_shapes

# Zeros are the convolution's default, as in "plain".
OTHER_FILLS = {
    f"fill {fill}": {"padding": 1, "fill": fill} for fill in cnn.FILLS if fill != "zeros"
}
CONVOLUTIONS = {
    "plain": {"padding": 1},
    "strided": {"padding": 1, "stride": 2},
    "dilated": {"padding": 2, "dilation": 2},
    "strided and dilated": {"padding": (1, 2), "stride": (2, 1), "dilation": 2},
    "grouped": {"padding": 1, "groups": 2},
    "depthwise": {"padding": 1, "groups": 4},
    "strided depthwise": {"padding": 1, "stride": 2, "groups": 4},
    **OTHER_FILLS,
}


def draw(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def norm_values(x, scale, bias, train):
    """Returns the output of BatchNorm and, in training, its new statistics."""
    zeros = jnp.zeros(x.shape[-1], jnp.float32)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": zeros + 0.5, "var": zeros + 2},
    }
    layer = cnn.BatchNorm(dtype=x.dtype)
    if not train:
        return layer.apply(variables, x)
    y, new = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    return y, new["batch_stats"]


def pools(fills):
    """Returns a table of pools under some fills, as `operations` does."""
    table = {}
    for fill in fills:
        for pool in (cnn.max_pool, cnn.avg_pool):
            call = functools.partial(pool, window=3, stride=2, padding=1, fill=fill)
            table[f"{pool.__name__}, fill {fill}"] = (call, [(3, 6, 7, 2)])
    return table


def operations():
    """Returns a table of functions with the shapes of their arguments, batch first."""
    # Pools treat these fills differently. Other fills are padding alone, as under "reflect", which
    # the convolutions have in the table.
    table = pools(("zeros", "none", "partial", "one-sided", "reflect", "random"))
    key = jax.random.key(0)
    for name, options in CONVOLUTIONS.items():
        kernel = (3, 2, 4 // options.get("groups", 1), 8)
        convolve = functools.partial(cnn.conv, key=key, **options)
        table[f"conv, {name}"] = (convolve, [(4, 7, 6, 4), kernel])
    table["conv, few channels"] = (
        functools.partial(cnn.conv, padding=1),
        [(3, 6, 8, 1), (3, 3, 1, 20)],
    )
    table["conv, 1x1"] = (cnn.conv, [(3, 4, 5, 4), (1, 1, 4, 20)])
    table["conv, 1x1, fewer outputs"] = (cnn.conv, [(3, 4, 5, 20), (1, 1, 20, 4)])
    # More padding than the kernel reaches, and less.
    for name, options in {
        "padded": {"padding": (3, 1)},
        "dilated": {"padding": (1, 4), "dilation": (2, 3)},
        "unpadded": {},
    }.items():
        convolve = functools.partial(cnn.conv, **options)
        table[f"conv, fewer outputs, {name}"] = (convolve, [(3, 6, 7, 5), (3, 2, 5, 4)])
    table["conv, small map"] = (
        functools.partial(cnn.conv, padding=1),
        [(3, 2, 2, 4), (3, 3, 4, 20)],
    )
    table["max_pool, tiles"] = (lambda x: cnn.max_pool(x, 2), [(3, 4, 6, 2)])
    table["max_pool, gaps"] = (lambda x: cnn.max_pool(x, 2, 3), [(3, 8, 7, 2)])
    table["concatenate"] = (
        lambda x: cnn.concatenate([x, 2 * x[..., :1]], "zeros"),
        [(3, 4, 5, 2)],
    )
    table["max_pool, ceil"] = (lambda x: cnn.max_pool(x, 3, 2, ceil=True), [(3, 6, 6, 2)])
    table["adaptive_avg_pool"] = (lambda x: cnn.adaptive_avg_pool(x, (2, 3)), [(3, 5, 4, 2)])
    table["global_avg_pool"] = (cnn.global_avg_pool, [(3, 5, 4, 2)])
    table["flatten"] = (cnn.flatten, [(3, 5, 4, 2)])
    table["resize"] = (lambda x: cnn.resize(x, (7, 3)), [(3, 5, 4, 2)])
    table["local_response_norm"] = (
        lambda x: cnn.local_response_norm(x, alpha=0.1),
        [(3, 5, 4, 6)],
    )
    for train in (True, False):
        call = functools.partial(norm_values, train=train)
        table[f"BatchNorm, train={train}"] = (call, [(4, 5, 4, 6), (6,), (6,)])
    table["Dense"] = (
        lambda x, kernel, bias: cnn.Dense(5, dtype=x.dtype).apply(
            {"params": {"kernel": kernel, "bias": bias}}, x
        ),
        [(3, 4), (4, 5), (5,)],
    )
    return table


OPERATIONS = operations()


def derivatives(function):
    """Returns a function for value, tangent, gradient, and the gradient's tangent."""

    def everything(*arguments):
        directions = [jnp.cos(3 * argument) for argument in arguments]

        def loss(*arguments):
            leaves = jax.tree.leaves(function(*arguments))
            return sum(jnp.sin(leaf + 0.1).sum() for leaf in leaves)

        gradient = jax.grad(loss, tuple(range(len(arguments))))
        value, tangent = jax.jvp(function, tuple(arguments), tuple(directions))
        gradients, second = jax.jvp(gradient, tuple(arguments), tuple(directions))
        return {
            "value": value,
            "tangent": tangent,
            "gradients": gradients,
            "second": second,
        }

    return everything


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name.startswith("BatchNorm")])
def test_a_plain_sum_has_second_derivatives(name):
    """The derivative of a plain sum in the output is constant; only the images have a tangent."""
    function, shapes = OPERATIONS[name]
    x, *parameters = (draw(seed, *shape) for seed, shape in enumerate(shapes))
    gradient = jax.grad(lambda x: jax.tree.leaves(function(x, *parameters))[0].sum())

    results = []
    for form in ("cpu", "reference"):
        with cnn.lowering(form):
            results.append(jax.jvp(gradient, (x,), (jnp.cos(3 * x),)))
    assert_close(*results)


def assert_close(one, other, relative=1e-4):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * scale)


# Convolutions under these fills differ from those under "reflect" by NumPy's mode of padding alone.
PADDED_ALIKE = {f"conv, fill {fill}" for fill in ("replicate", "circular", "symmetric")}


def test_transposes_hold_no_tracer():
    """JAX's check of leaks finds a tracer in the closure of a function."""

    def loss(x, bias):
        return jnp.sin(squared_deviation(cnn.add_bias(x, bias), bias)).sum()

    x = draw(0, 4, 3, 3, 2)
    # The check collects garbage for every trace, which takes long among a whole suite's objects.
    gc.freeze()
    try:
        with jax.checking_leaks(), cnn.lowering("cpu"):
            jax.jit(jax.grad(loss, (0, 1))).trace(x, jnp.ones(2))
    finally:
        gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in PADDED_ALIKE])
def test_both_forms_have_the_same_values_and_derivatives(name):
    """Neither form relies on the promotion of ranks."""
    function, shapes = OPERATIONS[name]
    arguments = [draw(seed, *shape) for seed, shape in enumerate(shapes)]

    @jax.jit
    def in_both_forms(*arguments):
        results = {}
        for form in ("cpu", "reference"):
            with cnn.lowering(form):
                results[form] = derivatives(function)(*arguments)
        return results

    with jax.numpy_rank_promotion("raise"):
        results = in_both_forms(*arguments)
    for part, plain in results["reference"].items():
        assert_close(results["cpu"][part], plain)


@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_bfloat16_is_kept_and_no_rank_is_promoted(form):
    """Under every fill, too; only BatchNorm's statistics are float32."""
    for name, (function, shapes) in {**OPERATIONS, **pools(cnn.FILLS)}.items():
        arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        with cnn.lowering(form), jax.numpy_rank_promotion("raise"):
            output, *_ = jax.tree.leaves(jax.eval_shape(function, *arguments))
        assert output.dtype == jnp.bfloat16, name


# Padding with "random" draws other numbers in another type.
LAYERS = [
    name
    for name in OPERATIONS
    if name.startswith(("conv,", "Dense", "BatchNorm"))
    and name not in {*PADDED_ALIKE, "conv, fill random"}
]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYERS, "add_bias"])
def test_gradients_in_bfloat16_are_nearly_those_in_float32(name):
    """Kernels and biases have gradients that are sums over some ten thousand positions."""
    function, shapes = OPERATIONS.get(name, (cnn.add_bias, [(4, 7, 6, 4), (4,)]))
    rounded = [
        draw(seed, *shape, dtype=jnp.bfloat16)
        for seed, shape in enumerate([(256, *shapes[0][1:]), *shapes[1:]])
    ]

    @jax.jit
    def gradients(*arguments):
        y, vjp = jax.vjp(function, *arguments)
        dy = lambda leaf: draw(9, *leaf.shape, dtype=jnp.bfloat16).astype(leaf.dtype)
        return vjp(jax.tree.map(dy, y))

    for form in ("cpu", "reference"):
        with cnn.lowering(form):
            exact = gradients(*(argument.astype(jnp.float32) for argument in rounded))
            for gradient, expected in zip(gradients(*rounded), exact, strict=True):
                assert gradient.dtype == jnp.bfloat16
                error = np.linalg.norm(gradient.astype(jnp.float32) - expected)
                assert error <= 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_sums_in_bfloat16_keep_small_numbers(form):
    """In bfloat16, 256 + 1 is 256."""
    dy = jnp.ones((8, 4, 4, 2), jnp.bfloat16).at[0].set(256)
    x = jnp.ones_like(dy)
    depthwise = functools.partial(cnn.conv, padding=1, groups=2)
    with cnn.lowering(form):
        _, vjp = jax.vjp(depthwise, x, jnp.ones((3, 3, 1, 2), jnp.bfloat16))
        sums = [vjp(dy)[1][1, 1, 0]]
        _, vjp = jax.vjp(cnn.add_bias, x, x[0, 0, 0])
        sums.append(vjp(dy)[1])
    for total in sums:
        np.testing.assert_allclose(total.astype(jnp.float32), 16 * (256 + 7), rtol=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel_size", "options"),
    [
        ((3, 3), {"padding": 1}),
        ((3, 5), {"padding": (1, 4), "stride": (2, 1)}),
        ((4, 2), {"padding": (3, 0), "stride": 3}),
        ((3, 3), {"padding": 2, "dilation": (1, 2)}),
        ((1, 1), {"padding": (0, 2), "stride": (1, 3)}),
    ],
)
def test_a_large_depthwise_convolution_is_the_small_one(kernel_size, options, monkeypatch):
    """Large maps are convolved in pieces, and only pieces at the border are padded."""
    monkeypatch.setattr(depthwise, "LARGE", 2**14)
    x = draw(0, 2, 18, 15, 32)
    kernel = draw(1, *kernel_size, 1, 32)

    def passes(x, kernel):
        y, vjp = jax.vjp(functools.partial(cnn.conv, groups=32, **options), x, kernel)
        return y, *vjp(jnp.cos(y))

    with cnn.lowering("cpu"):
        lowered = jax.jit(passes).lower(x, kernel)
        text = lowered.as_text()
        y, dx, dkernel = lowered.compile()(x, kernel)
        # A single image is too small to be cut into pieces.
        small = jax.jit(passes)
        own = [small(x[i : i + 1], kernel) for i in range(len(x))]
    padded = re.findall(r"stablehlo.pad .*-> tensor<([0-9x]+)xf32>", text)
    sizes = [math.prod(map(int, shape.split("x"))) for shape in padded]
    assert sizes and max(sizes) < x.size
    assert_close((y, dx), [jnp.concatenate(arrays) for arrays in list(zip(*own))[:2]])
    assert_close(dkernel, sum(gradients[2] for gradients in own))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 6},
        {"padding": (5, 6), "stride": (1, 2), "dilation": (2, 1)},
        {"padding": 6, "stride": (3, 2)},
    ],
)
def test_a_depthwise_kernel_of_many_taps_is_a_loop_over_its_rows(options):
    """None of the three passes has an operation for each of the 13 x 11 taps.

    Only the input gradient under strides does: its kernels, one for each plane, are short.
    """
    x = draw(0, 2, 26, 15, 4)
    kernel = draw(1, 13, 11, 1, 8)

    def passes(x, kernel):
        y, vjp = jax.vjp(functools.partial(cnn.conv, groups=4, **options), x, kernel)
        return y, *vjp(jnp.cos(y))

    results = {}
    for form in ("reference", "cpu"):
        with cnn.lowering(form):
            lowered = jax.jit(passes).lower(x, kernel)
            results[form] = lowered.compile()(x, kernel)
    assert lowered.as_text().count("stablehlo.multiply") < 2 * 13 * 11
    assert_close(results["cpu"], results["reference"])


def test_a_form_is_part_of_jits_cache_key():
    """A function is traced once per form, so each call computes in the current form."""
    traces = []

    @jax.jit
    def pool(x):
        traces.append(None)
        return cnn.max_pool(x, 2)

    x = draw(0, 1, 4, 4, 1)
    text = {}
    for form in ("cpu", "reference", "cpu", "reference"):
        with cnn.lowering(form):
            pool(x)
            pool(x)
            text[form] = pool.lower(x).as_text()
    assert len(traces) == 2
    assert "reduce_window" in text["reference"] and "reduce_window" not in text["cpu"]
    with pytest.raises(ValueError, match="lowering='fast' is not one of auto, reference, cpu"):
        cnn.lowering("fast")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in PADDED_ALIKE])
def test_float64_is_computed_in_float64(name):
    """Forward and reverse derivatives agree to more digits than float32 has."""
    function, shapes = OPERATIONS[name]
    statistics = name.startswith("BatchNorm, train=True")
    with jax.enable_x64(True), cnn.lowering("cpu"):
        arguments = [draw(seed, *shape, dtype=np.float64) for seed, shape in enumerate(shapes)]
        directions = [draw(seed + 9, *shape, dtype=np.float64) for seed, shape in enumerate(shapes)]

        @jax.jit
        def pairings(arguments, directions):
            output = (lambda *args: function(*args)[0]) if statistics else function
            y, tangent = jax.jvp(output, tuple(arguments), tuple(directions))
            _, vjp = jax.vjp(output, *arguments)
            weights = jnp.cos(2 * y)
            pairs = zip(vjp(weights), directions)
            return y, (weights * tangent).sum(), sum((a * b).sum() for a, b in pairs)

        y, forward, reverse = pairings(arguments, directions)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(forward, reverse, rtol=1e-11)


@pytest.mark.slow
def test_parameters_and_statistics_stay_float32_under_x64():
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = cnn.Conv(4, 3, kernel_init=nn.initializers.he_normal(), dtype=x.dtype)(x)
            x = cnn.BatchNorm(dtype=x.dtype)(x, train=True)
            return cnn.Dense(2, bias_init=nn.initializers.zeros, dtype=x.dtype)(x)

    with jax.enable_x64(True):
        for dtype in (np.float32, np.float64):
            x = draw(0, 2, 5, 5, 3, dtype=dtype)
            variables = Layers().init(jax.random.key(0), x)
            y, new = Layers().apply(variables, x, mutable=["batch_stats"])
            variables_and_statistics = jax.tree.leaves((variables, new))
            assert y.dtype == dtype and {leaf.dtype for leaf in variables_and_statistics} == {
                np.dtype(np.float32)
            }


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_empty_batch_has_an_empty_output_and_no_gradient(name):
    function, shapes = OPERATIONS[name]
    empty = draw(0, 0, *shapes[0][1:])
    arguments = [empty, *(draw(seed, *shape) for seed, shape in enumerate(shapes[1:]))]

    @jax.jit
    def in_both_forms(*arguments):
        results = []
        for form in ("cpu", "reference"):
            with cnn.lowering(form):
                y, vjp = jax.vjp(function, *arguments)
                results.append((y, vjp(jax.tree.map(jnp.ones_like, y))))
        return results

    for y, gradients in in_both_forms(*arguments):
        assert jax.tree.leaves(y)[0].shape[0] == 0
        assert [gradient.shape for gradient in gradients] == [a.shape for a in arguments]
        assert not any(np.any(gradient != 0) for gradient in gradients)


@pytest.mark.slow
def test_an_empty_batch_leaves_running_statistics_alone():
    layer = cnn.BatchNorm()
    variables = layer.init(jax.random.key(0), draw(0, 2, 3, 3, 4))
    _, new = layer.apply(variables, draw(0, 0, 3, 3, 4), train=True, mutable=["batch_stats"])
    assert jax.tree.all(jax.tree.map(np.array_equal, new["batch_stats"], variables["batch_stats"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_programs_are_exported_for_every_batch_size(name):
    function, shapes = OPERATIONS[name]
    (batch,) = jax.export.symbolic_shape("batch")

    def gradients(*arguments):
        y, vjp = jax.vjp(function, *arguments)
        return y, vjp(jax.tree.map(jnp.ones_like, y))

    first = jax.ShapeDtypeStruct((batch, *shapes[0][1:]), jnp.float32)
    others = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[1:]]
    with cnn.lowering("cpu"):
        exported = jax.export.export(jax.jit(gradients))(first, *others)
    compared = (
        "conv, plain",
        "conv, depthwise",
        "BatchNorm, train=True",
        "max_pool, tiles",
        "max_pool, ceil",
        "concatenate",
    )
    # For the other operations, an export without an error is the check.
    if name not in compared:
        return
    arguments = [draw(seed, *shape) for seed, shape in enumerate(shapes)]
    assert_close(exported.call(*arguments), jax.jit(gradients)(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["jax_debug_infs", "jax_debug_nans"])
def test_no_infinity_or_nan_is_met(flag):
    """Without jit, JAX's debug mode checks every intermediate result."""
    options = {"jax_debug_infs": jax.debug_infs, "jax_debug_nans": jax.debug_nans}[flag]
    x = draw(0, 2, 5, 5, 2)
    with options(True), cnn.lowering("cpu"):
        convolve = functools.partial(cnn.conv, padding=1)
        y, vjp = jax.vjp(convolve, x, draw(1, 3, 3, 2, 3))
        vjp(y)
        y, vjp = jax.vjp(functools.partial(norm_values, train=True), x, draw(1, 2), draw(2, 2))
        vjp(y)
        # The mode would have raised an error.
        with pytest.raises(FloatingPointError, match="encountered in "):
            jnp.log(jnp.zeros(2)) - jnp.log(jnp.zeros(2))


@pytest.mark.parametrize("form", ["cpu", "reference"])
@pytest.mark.parametrize("flag", [jax.debug_infs, jax.debug_nans])
def test_no_infinity_of_a_border_is_met(flag, form):
    """The debug mode also checks the values that a pool saves for its gradient."""
    x = draw(0, 2, 6, 6, 2)
    with flag(True), cnn.lowering(form):
        for options in ({"padding": 1}, {"padding": 1, "fill": "one-sided"}, {"ceil": True}):
            pool = functools.partial(cnn.max_pool, window=3, stride=2, **options)
            y, tangent = jax.jvp(pool, (x,), (jnp.ones_like(x),))
            assert np.isfinite(y).all() and (tangent == 1).all()
            assert jax.grad(lambda x, pool=pool: pool(x).sum())(x).sum() == y.size


# ------------------------------------------------------------------ a network, transformed


class Small(nn.Module):
    """A network of every kind of layer that has custom derivatives."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = cnn.Conv(8, 3, padding=1)(x)
        x = nn.relu(cnn.BatchNorm(axis_name=self.axis_name)(x, train=True))
        x = cnn.max_pool(x, 3, 2, padding=1)
        x = cnn.Conv(8, 3, stride=2, padding=1, groups=2)(x)
        x = cnn.Conv(8, 3, padding=1, groups=8)(x)
        x = cnn.local_response_norm(x)
        return cnn.Dense(3)(cnn.flatten(cnn.avg_pool(x, 2)))


@pytest.fixture(scope="module")
def case():
    """Returns a loss of a batch, images, parameters, and the loss's gradient."""
    images = draw(0, 8, 8, 8, 2)
    variables = quick.variables(Small(), images)

    def loss(params, images, axis_name=None):
        y, new = Small(axis_name).apply(
            variables | {"params": params}, images, mutable=["batch_stats"]
        )
        return jnp.square(y).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(new)) * 0

    gradient = jax.jit(jax.grad(loss))(variables["params"], images)
    return loss, images, variables["params"], gradient


def over_devices(loss):
    """Returns a function that computes the gradient of the sum of the devices' losses.

    BatchNorm's statistics are those of all images.
    """

    def gradient(params, images):
        return jax.grad(lambda params: jax.lax.psum(loss(params, images, "data"), "data"))(params)

    return gradient


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_shard_map_with_its_checks(case, form):
    loss, images, params, gradient = case
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    step = jax.shard_map(over_devices(loss), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with cnn.lowering(form):
        assert_close(jax.jit(step)(params, images), gradient)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_automatic_partitioning(case, form):
    """Divides the plain gradient among the devices that hold the images."""
    loss, images, params, gradient = case
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    divided = jax.device_put(images, NamedSharding(mesh, P("data")))
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    with cnn.lowering(form):
        assert_close(jax.jit(jax.grad(loss))(everywhere, divided), gradient)


@pytest.mark.slow
def test_pmap(case):
    loss, images, params, gradient = case

    def step(params, images):
        own = jax.grad(loss)(params, images, "data")
        return jax.lax.psum(own, "data")

    parts = images.reshape(4, 2, *images.shape[1:])
    each = jax.pmap(step, axis_name="data", in_axes=(None, 0))(params, parts)
    assert_close(jax.tree.map(lambda leaf: leaf[0], each), gradient)


@pytest.mark.slow
def test_checkpoint_and_scan(case):
    loss, images, params, gradient = case

    def looped(params):
        def body(total, images):
            return total + jax.checkpoint(loss)(params, images), None

        return jax.lax.scan(body, 0.0, images[None])[0]

    assert_close(jax.jit(jax.grad(looped))(params), gradient)


@pytest.mark.slow
def test_vmap_over_networks_and_images(case):
    """Maps the gradient over two networks, and differentiates a sum over two batches."""
    loss, images, params, gradient = case
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    each = jax.jit(jax.vmap(jax.grad(loss), (0, None)))(two, images)
    assert_close(each, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), gradient))

    def both(params):
        return jax.vmap(loss, (None, 0))(params, jnp.stack([images, images])).sum()

    assert_close(jax.jit(jax.grad(both))(params), jax.tree.map(lambda leaf: 2 * leaf, gradient))


@pytest.mark.slow
def test_products_with_the_hessian(case):
    """Three orders of differentiation give the same Hessian-vector product.

    The slopes by `jvp` and `linearize` equal the gradient times the direction.
    """
    loss, images, params, gradient = case
    scalar = lambda params: loss(params, images)
    direction = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), params)

    def dot(one, other):
        return sum((a * b).sum() for a, b in zip(*map(jax.tree.leaves, (one, other))))

    @jax.jit
    def products(params):
        derivative = lambda params: jax.jvp(scalar, (params,), (direction,))[1]
        _, linear = jax.linearize(scalar, params)
        return {
            "slopes": (derivative(params), linear(direction)),
            "forward over reverse": jax.jvp(jax.grad(scalar), (params,), (direction,))[1],
            "reverse over forward": jax.grad(derivative)(params),
            "reverse over reverse": jax.grad(lambda p: dot(jax.grad(scalar)(p), direction))(params),
        }

    results = products(params)
    for slope in results["slopes"]:
        np.testing.assert_allclose(slope, dot(gradient, direction), rtol=1e-4)
    assert_close(results["forward over reverse"], results["reverse over reverse"])
    assert_close(results["reverse over forward"], results["reverse over reverse"])


@pytest.mark.slow
def test_the_hessian_is_that_of_the_plain_form(case):
    """In `jax.hessian`, tangents have a batch axis and primal values have none."""
    loss, images, params, _ = case

    def scaled(factors):
        return loss(jax.tree.map(lambda leaf: factors.prod() * leaf, params), images * factors[0])

    fast = jax.jit(jax.hessian(scaled))(jnp.ones(2))
    with cnn.lowering("reference"):
        assert_close(fast, jax.jit(jax.hessian(scaled))(jnp.ones(2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lenet5", "mlp1", "tutorial_net"])
def test_networks_take_any_batch(name):
    """Traces training for an empty and a symbolic batch without rank promotion."""
    model = create_model(name)
    rngs = {"dropout": jax.random.key(0), "padding": jax.random.key(1)}

    def gradients(variables, images):
        def loss(params):
            logits, _ = model.apply(
                variables | {"params": params}, images, train=True, mutable=True, rngs=rngs
            )
            return jnp.square(logits).sum()

        return jax.grad(loss)(variables["params"])

    (batch,) = jax.export.symbolic_shape("batch")
    with jax.numpy_rank_promotion("raise"):
        variables = variable_shapes(model)
        for count in (0, batch):
            images = jax.ShapeDtypeStruct((count, *model.input_shape), jnp.float32)
            traced = jax.jit(gradients).trace(variables, images)
            assert jax.tree.structure(traced.out_info) == jax.tree.structure(variables["params"])
