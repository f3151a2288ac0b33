"""Convolution, pooling and padding: algebra and comparison with the native operations."""

import functools
import math
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import quick
from quick import normal

from cnnjax import nn as cnn
from cnnjax.models.densenet import DenseLayer
from cnnjax.nn.cpu import conv as cpu_conv
from cnnjax.nn.cpu import grouped
from cnnjax.nn.cpu.barrier import materialize
from cnnjax.nn.cpu.conv import input_gradient, kernel_gradient, packed_outputs
from cnnjax.nn.cpu.sums import channel_sums, sum_products
from cnnjax.nn.geometry import Window, pair
from cnnjax.nn.padding import center, pad

FILL_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "symmetric": "symmetric",
    "replicate": "edge",
    "circular": "wrap",
}


def native_conv(x, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Convolves as JAX does by itself, with the gradients that JAX derives."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=stride,
        padding=[(amount, amount) for amount in padding],
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def padded_rows(size, amount, fill):
    """Returns the positions that NumPy pads a row with; those of zeros are out of bounds."""
    mode = FILL_MODES.get(fill, "constant")
    options = {"constant_values": size} if mode == "constant" else {}
    return np.pad(np.arange(size), 0 if fill == "none" else amount, mode, **options)


def numpy_conv(x, kernel, stride, padding, dilation=1, groups=1, fill="zeros"):
    """Convolves tap by tap in float64, an image whose rows and columns NumPy has padded.

    Returns the output and, for `cotangent`, the gradients of image and kernel.
    """
    height, width = x.shape[1:3]
    rows = padded_rows(height, padding, fill)
    columns = padded_rows(width, padding, fill)
    # Positions out of bounds read one more row or column, of zeros.
    framed = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 1), (0, 1), (0, 0)))
    padded = framed[:, rows][:, :, columns]
    by_group = lambda a: a.reshape(*a.shape[:3], groups, -1)
    weights = by_group(np.asarray(kernel, np.float64))
    sizes = (len(rows), len(columns))
    reach = [dilation * (taps - 1) for taps in kernel.shape[:2]]
    last = [(size - far - 1) // stride * stride for size, far in zip(sizes, reach)]
    views = {}
    for tap in np.ndindex(*kernel.shape[:2]):
        starts = [dilation * at for at in tap]
        views[tap] = tuple(slice(at, at + end + 1, stride) for at, end in zip(starts, last))

    ratio = 1
    if fill == "partial":
        inside = np.outer(rows < height, columns < width)
        ratio = len(views) / sum(inside[view] for view in views.values())[..., None, None]
    y = ratio * sum(
        np.einsum("nhwgi,igo->nhwgo", by_group(padded[:, *view]), weights[tap])
        for tap, view in views.items()
    )
    dy = ratio * by_group(np.asarray(cotangent(*y.shape[:3], kernel.shape[3]), np.float64))

    dweights = np.empty_like(weights)
    dpadded = np.zeros_like(padded)
    for tap, view in views.items():
        dweights[tap] = np.einsum("nhwgi,nhwgo->igo", by_group(padded[:, *view]), dy)
        dview = np.einsum("nhwgo,igo->nhwgi", dy, weights[tap])
        dpadded[:, *view] += dview.reshape(*dview.shape[:3], -1)
    drows = np.zeros((len(x), height + 1, *dpadded.shape[2:]))
    np.add.at(drows, (slice(None), rows), dpadded)
    dframed = np.zeros_like(framed)
    np.add.at(dframed, (slice(None), slice(None), columns), drows)
    return y.reshape(*y.shape[:3], -1), dframed[:, :-1, :-1], dweights.reshape(kernel.shape)


def cotangent(*shape):
    return normal(2, *shape)


def value_and_gradients(function, *arguments):
    """Returns a function's value and, for `cotangent`, its gradients."""
    y, vjp = jax.vjp(function, *arguments)
    return y, *vjp(cotangent(*y.shape))


def assert_alike(ours, theirs, case=""):
    for got, expected in zip(ours, theirs, strict=True):
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol, err_msg=case)


def assert_native(ours, theirs, x, kernel):
    """Compares values and gradients of two functions."""
    both = jax.jit(lambda *args: [value_and_gradients(f, *args) for f in (ours, theirs)])
    assert_alike(*both(x, kernel))


# Groups, dilation and fill.
POLICIES = [
    (1, 1, "zeros"),
    (1, 1, "partial"),
    (1, 1, "reflect"),
    (1, 2, "zeros"),
    (2, 1, "circular"),
    (4, 1, "zeros"),
    (2, 2, "none"),
    (4, 3, "replicate"),
]
CASES = [(k, s, POLICIES) for k in (1, 2, 3, 5) for s in (1, 2, 3)]
# First layers have kernels of these sizes.
CASES += [(7, 2, POLICIES), (11, 4, POLICIES[:1])]
# A depthwise kernel of this size has more taps than are summed in one pass.
CASES += [(7, 1, [(2, 1, "circular"), (4, 1, "zeros")])]


@pytest.mark.slow
@pytest.mark.parametrize("kernel_size, stride, policies", CASES)
def test_conv_and_its_gradients_equal_numpys(kernel_size, stride, policies):
    arguments, options = {}, {}
    for policy in policies:
        groups, dilation, fill = policy
        size = dilation * (kernel_size - 1) + 1 + 2 * stride + 1
        x = normal(0, 2, size, size + 1, 4)
        kernel = normal(1, kernel_size, kernel_size, 4 // groups, 8)
        arguments[policy] = (x, kernel)
        options[policy] = {
            "stride": stride,
            "padding": min(kernel_size // 2, size // 2),
            "dilation": dilation,
            "groups": groups,
            "fill": fill,
        }

    # One program for all of them: each would take longer to compile by itself.
    @jax.jit
    def ours(arguments):
        results = []
        for policy in policies:
            convolve = functools.partial(cnn.conv, **options[policy])
            results.append(value_and_gradients(convolve, *arguments[policy]))
        return results

    for policy, results in zip(policies, ours(arguments)):
        assert_alike(results, numpy_conv(*arguments[policy], **options[policy]), str(policy))


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, kernel_size, stride, fill",
    [
        (1, 3, 1, "zeros"),
        (2, 3, 1, "zeros"),
        (2, 3, 2, "zeros"),
        (4, 5, 1, "partial"),
        (3, 4, 1, "full"),
        (3, 7, 2, "zeros"),
    ],
)
def test_windows_larger_than_the_map(size, kernel_size, stride, fill):
    """Their padding is an operation of its own, in gradients too."""
    padding = kernel_size - 1 if fill == "full" else kernel_size // 2
    x, kernel = normal(0, 3, size, size, 5), normal(1, kernel_size, kernel_size, 5, 20)
    options = {"stride": stride, "padding": padding, "fill": fill}
    ours = jax.jit(functools.partial(value_and_gradients, functools.partial(cnn.conv, **options)))
    assert_alike(ours(x, kernel), numpy_conv(x, kernel, **options))


@pytest.mark.parametrize(
    "kernel_size, stride, padding, dilation",
    [
        ((3, 2), (2, 1), (1, 0), (1, 1)),
        ((2, 5), (1, 3), (0, 2), (1, 1)),
        ((3, 1), (3, 2), (0, 2), (1, 1)),
        ((4, 3), (2, 3), (3, 4), (1, 1)),
        ((3, 3), (2, 1), (2, 1), (1, 2)),
        # More planes than an input gradient has convolutions for.
        ((7, 6), (5, 4), (3, 2), (1, 1)),
        ((3, 4), (6, 3), (0, 3), (1, 1)),
        ((1, 1), (5, 5), (4, 3), (1, 1)),
        # Rows that are too wide for a matrix product.
        ((1, 9), (1, 2), (0, 4), (1, 1)),
    ],
)
def test_gradients_where_height_and_width_are_not_alike(kernel_size, stride, padding, dilation):
    x, kernel = normal(0, 2, 9, 12, 4), normal(1, *kernel_size, 4, 6)
    ours = functools.partial(cnn.conv, stride=stride, padding=padding, dilation=dilation)
    theirs = functools.partial(native_conv, stride=stride, padding=padding, dilation=dilation)
    assert_native(ours, theirs, x, kernel)


def operations_of(function, *shapes):
    """Lists the operations of a function of float32 arrays."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return list(quick.equations(jax.make_jaxpr(function)(*arguments).jaxpr))


def largest_size(operations):
    return max(output.aval.size for operation in operations for output in operation.outvars)


def test_the_input_gradient_of_patches_is_one_convolution():
    x_shape = (8, 224, 224, 3)
    operations = operations_of(
        lambda kernel, dy: input_gradient(x_shape, kernel, Window((16, 16)), dy),
        (16, 16, 3, 768),
        (8, 14, 14, 768),
    )
    names = [operation.primitive.name for operation in operations]
    assert names.count("conv_general_dilated") == 1
    assert largest_size(operations) <= math.prod(x_shape)


@pytest.mark.parametrize("width", [3, 51])
def test_kernel_gradients_take_little_more_memory_than_the_map(width):
    x_shape = (32, 1, 16000, 64)
    dy_shape = (32, 1, (16000 - width) // 2 + 1, 64)
    operations = operations_of(
        lambda x, dy: kernel_gradient(x, (1, width, 64, 64), Window((1, 2)), dy), x_shape, dy_shape
    )
    assert largest_size(operations) <= 4 * math.prod(x_shape)


@pytest.mark.parametrize(
    "width, channels, features, padding, together",
    [
        (12, 3, 6, 0, 4),
        (12, 1, 20, 1, 4),
        (13, 2, 5, 1, 1),
        (14, 3, 8, 1, 2),
        (12, 3, 64, 1, 2),
        (12, 5, 16, 1, 2),
        (12, 5, 17, 1, 1),
    ],
)
def test_convolutions_of_few_channels_are_the_same(width, channels, features, padding, together):
    """Neighbors are computed together, and the kernel's gradient comes from its patches."""
    width += 2 - 2 * padding  # so that the output's width is `width`
    x, kernel = normal(0, 2, 7, width, channels), normal(1, 3, 3, channels, features)
    assert packed_outputs(x, kernel.shape, Window(padding=(padding, padding))) == together
    ours = functools.partial(cnn.conv, padding=padding)
    assert_native(ours, functools.partial(native_conv, padding=(padding, padding)), x, kernel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel_size, stride, dilation, outputs",
    [(3, 1, 1, 8), (4, 2, 1, 8), (5, 3, 1, 8), (2, 1, 2, 8), (3, 1, 1, 3)],
)
def test_kernel_gradients_of_large_maps_are_the_same(
    monkeypatch, kernel_size, stride, dilation, outputs
):
    """A transposition in two steps changes nothing, also under vmap and in a loop."""
    x, kernel = normal(0, 3, 2, 14, 13, 4), normal(1, kernel_size, kernel_size, 4, outputs)
    window = Window((stride, stride), (1, 1), (dilation, dilation))

    def gradients(large):
        """Differentiates the sum of squares of the output."""
        monkeypatch.setattr(cpu_conv, "LARGE", large)

        def gradient(x):
            y = cnn.conv(x, kernel, stride=stride, dilation=dilation, padding=1)
            return cpu_conv.kernel_gradient(x, kernel.shape, window, 2 * y)

        looped = jax.jit(lambda: jax.lax.map(gradient, x))()
        return jax.jit(gradient)(x[0]), jax.jit(jax.vmap(gradient))(x), looped

    for one, other in zip(gradients(large=x.size + 1), gradients(large=0)):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(one).max())


@pytest.mark.parametrize("dilation, channels", [(1, 8), (2, 32)])
def test_groups_of_large_maps_are_computed_in_smaller_blocks(monkeypatch, dilation, channels):
    monkeypatch.setattr(grouped, "_WORTH_PACKING", 0)
    x, kernel = normal(0, 2, 6, 10, 32), normal(1, 3, 3, 4, 32)
    ours = functools.partial(cnn.conv, groups=8, dilation=dilation)
    native = functools.partial(native_conv, groups=8, dilation=(dilation, dilation))
    assert_native(ours, native, x, kernel)
    text = jax.jit(ours).lower(x, kernel).as_text()
    assert f"tensor<3x3x{channels}x{channels}xf32>" in text


POOLS = [
    (window, stride, padding, 11, 14)
    for window in (2, 3)
    for stride in (1, 2, 3)
    for padding in (0, 1)
]
POOLS += [(1, 1, 0, 11, 14), (1, 3, 0, 11, 14), (5, 2, 1, 11, 14)]
TILES = [(2, 2, 0, 12, 14), (3, 3, 0, 12, 15), (2, 2, 1, 12, 14), (4, 4, 0, 4, 8)]


OBLONG = [
    ((3, 2), (1, 3), (0, 1), 11, 14),
    ((2, 3), (3, 2), (1, 0), 12, 13),
    ((5, 1), (2, 1), (2, 0), 11, 7),
]


@pytest.mark.slow
@pytest.mark.parametrize("window, stride, padding, height, width", POOLS + TILES + OBLONG)
def test_max_pool_is_the_native_one_bit_for_bit(window, stride, padding, height, width):
    size, step, (down, across) = (pair(value, "value", 0) for value in (window, stride, padding))
    noise = np.asarray(normal(0, 2, height, width, 3))
    x = np.maximum(np.round(2 * noise), 0)  # many ties, as after a ReLU
    native = lambda x: jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        window_dimensions=(1, *size, 1),
        window_strides=(1, *step, 1),
        padding=((0, 0), (down, down), (across, across), (0, 0)),
    )
    ours = functools.partial(cnn.max_pool, window=window, stride=stride, padding=padding)
    both = jax.jit(lambda x: [value_and_gradients(pool, x) for pool in (ours, native)])
    for got, want in zip(*both(x), strict=True):
        assert np.array_equal(got, want)
    # Where a window has no maximum, the gradient goes where the native one goes.
    x[:, ::3, 1::4] = np.nan
    for got, want in zip(*both(x), strict=True):
        assert np.array_equal(got, want, equal_nan=True)


def windows(a, size, stride):
    """Stacks what each tap of the windows reads."""
    height, width = ((length - size) // stride * stride + 1 for length in a.shape[1:3])
    return np.stack(
        [
            a[:, row : row + height : stride, column : column + width : stride]
            for row, column in np.ndindex(size, size)
        ]
    )


@pytest.mark.parametrize(
    "fill", ["zeros", "none", "reflect", "symmetric", "replicate", "circular", "partial"]
)
def test_pools_pad_as_numpy_does(fill):
    x = normal(0, 1, 6, 7, 2)
    amount = 0 if fill == "none" else 1
    widths = ((0, 0), (amount, amount), (amount, amount), (0, 0))
    mode = FILL_MODES.get(fill, "constant")
    lowest = {"constant_values": -np.inf} if mode == "constant" else {}
    largest = windows(np.pad(x, widths, mode=mode, **lowest), 3, 2)
    pools = (cnn.max_pool, cnn.avg_pool)
    found_max, found_mean = jax.jit(lambda x: [pool(x, 3, 2, 1, fill=fill) for pool in pools])(x)
    assert np.array_equal(found_max, largest.max(0))

    mean = windows(np.pad(x, widths, mode=mode), 3, 2).mean(0)
    if fill == "partial":
        mean = mean / windows(np.pad(np.ones_like(x), widths), 3, 2).mean(0)
    np.testing.assert_allclose(found_mean, mean, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "window, stride, padding", [(3, 2, 0), (3, 2, 1), (2, 2, 0), (2, 3, 1), (3, 1, 1), (5, 4, 2)]
)
@pytest.mark.parametrize("height, width", [(2, 3), (7, 8), (9, 10), (11, 13)])
def test_max_pool_completes_the_last_window_as_pytorch_does(height, width, window, stride, padding):
    """Windows are counted with the quotient rounded up.

    One that begins beyond the image and its border is dropped.
    """
    x = np.asarray(normal(0, 2, height, width, 3)) - 10  # a zero in the added cells would win
    pool = functools.partial(cnn.max_pool, window=window, stride=stride, padding=padding, ceil=True)
    y = np.asarray(jax.jit(pool)(x))
    for size, outputs in zip((height, width), y.shape[1:3]):
        count = -(-(size + 2 * padding - window) // stride) + 1
        assert outputs == count - ((count - 1) * stride >= size + padding)
    for i, j in np.ndindex(*y.shape[1:3]):
        top, left = i * stride - padding, j * stride - padding
        values = x[:, max(0, top) : top + window, max(0, left) : left + window]
        assert np.array_equal(y[:, i, j], values.max((1, 2)))
    for fill in ("reflect", "symmetric", "replicate", "circular"):
        if min(height, width) > padding + 1:
            assert jax.eval_shape(functools.partial(pool, fill=fill), x).shape == y.shape


@pytest.mark.parametrize("height, width", [(2, 3), (7, 8), (7, 13)])
def test_without_padding_no_window_is_completed(height, width):
    x = normal(0, 2, height, width, 3)
    completed = lambda x: cnn.max_pool(x, 2, 2, 1, ceil=True, fill="none")
    both = jax.jit(lambda x: (completed(x), cnn.max_pool(x, 2, 2)))
    assert np.array_equal(*both(x))


def test_branches_are_joined_about_their_centers():
    x = normal(0, 1, 7, 9, 2)
    parts = [x, x[:, 1:-1], x[:, 2:-2, 1:-1]]
    smallest = np.tile(x[:, 2:-2, 1:-1], (1, 1, 1, 3))
    join = jax.jit(cnn.concatenate, static_argnums=1)
    np.testing.assert_array_equal(join(parts, "none"), smallest)
    framed = [
        x,
        np.pad(parts[1], ((0, 0), (1, 1), (0, 0), (0, 0))),
        np.pad(parts[2], ((0, 0), (2, 2), (1, 1), (0, 0))),
    ]
    np.testing.assert_array_equal(join(parts, "full"), np.concatenate(framed, 3))


def test_a_map_of_the_right_size_is_centered_without_an_operation():
    x = normal(0, 1, 7, 9, 2)
    assert center(x, 7, 9) is x
    wide = jax.make_jaxpr(lambda x: center(x, 7, 5))(x)
    assert [equation.primitive.name for equation in wide.eqns] == ["slice"]


@pytest.mark.parametrize("shape", [(1, 3, 3, 5), (6, 4, 5, 3), (16, 2, 2, 7), (8, 4)])
def test_channel_sums(shape):
    x, y = normal(0, *shape), normal(1, *shape)
    wide = np.asarray(x, np.float64)
    axes = tuple(range(len(shape) - 1))
    one, both = jax.jit(lambda x, y: (sum_products(x), sum_products(x, y)))(x, y)
    np.testing.assert_allclose(one, wide.sum(axes), atol=1e-5)
    np.testing.assert_allclose(both, (wide * np.asarray(y)).sum(axes), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 3, 5), (5, 4, 3, 2)])
def test_sums_of_an_odd_batch_are_one_reduction(shape):
    """Its rows are divided into parts; as a matrix product, it would write each map first."""
    sums = lambda x, y: channel_sums([x, x * y])
    names = [operation.primitive.name for operation in operations_of(sums, shape, shape)]
    assert names.count("reduce") == 1
    x, y = normal(0, *shape), normal(1, *shape)
    wide = np.asarray(x, np.float64)
    expected = [wide.sum((0, 1, 2)), (wide * np.asarray(y)).sum((0, 1, 2))]
    np.testing.assert_allclose(jax.jit(sums)(x, y), expected, atol=1e-5)


def test_the_bias_of_a_single_vector_has_a_gradient():
    """Dense takes an input without a batch, whose number of features eight may divide."""
    layer, x = cnn.Dense(8), normal(0, 3)
    variables = quick.variables(layer, x)
    gradient = jax.jit(jax.grad(lambda params: layer.apply({"params": params}, x).sum()))
    assert np.array_equal(gradient(variables["params"])["bias"], np.ones(8))


class Named(nn.Module):
    """A convolution, a normalization and a dense layer of given initializers."""

    initializer: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x):
        x = cnn.Conv(4, 3, kernel_init=self.initializer, bias_init=self.initializer)(x)
        x = cnn.BatchNorm(name="norm")(x).mean((1, 2))
        return cnn.Dense(3, kernel_init=self.initializer, bias_init=self.initializer, name="fc")(x)


def test_initializers_are_traced_for_new_parameters_alone():
    drawn = []

    def initializer(key, shape, dtype):
        drawn.append(shape)
        return jnp.ones(shape, dtype)

    model, x = Named(initializer), normal(0, 2, 5, 5, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert drawn == [(3, 3, 3, 4), (4,), (4, 3), (3,)]
    jax.eval_shape(model.apply, variables, x)
    assert len(drawn) == 4


@pytest.mark.parametrize("layer, name", [("Conv_0", "kernel"), ("norm", "scale"), ("fc", "bias")])
def test_a_parameter_of_another_shape_is_named(layer, name):
    model, x = Named(), normal(0, 2, 5, 5, 3)
    variables = quick.variables(model, x)
    variables["params"][layer][name] = np.ones(7, np.float32)
    message = f"the parameter {layer}/{name} has the shape .7,., and this input needs .*: it has"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, variables, x)


def test_partitioned_parameters_are_unboxed():
    """Flax's initializers with names of axes, for meshes of devices."""
    model = Named(nn.with_partitioning(nn.initializers.ones, ()))
    x = normal(0, 2, 5, 5, 3)
    variables = model.init(quick.key(0), x)
    assert isinstance(variables["params"]["fc"]["kernel"], nn.Partitioned)
    plain = Named().apply(nn.meta.unbox(variables), x)
    np.testing.assert_array_equal(model.apply(variables, x), plain)


def test_a_fill_without_a_case_is_refused(monkeypatch):
    monkeypatch.setattr("cnnjax.nn.padding.FILLS", (*cnn.FILLS, "odd"))
    with pytest.raises(ValueError, match="fill='odd' is in FILLS, but `pad` has no case for it"):
        pad(jnp.ones((1, 4, 4, 1)), (1, 1), "odd")


def test_fills_are_what_the_documentation_shows():
    row = jnp.asarray([1.0, 2, 3, 4]).reshape(1, 1, 4, 1)
    shown = {
        "zeros": "00123400",
        "none": "1234",
        "reflect": "32123432",
        "symmetric": "21123443",
        "replicate": "11123444",
        "circular": "34123412",
        "partial": "00123400",
        "mean": "22123422",
        "interpolate": "11122334",
        "full": "00123400",
        "one-sided": "00001234",
    }
    assert {*shown, "random"} == {*cnn.FILLS}
    padded = jax.jit(lambda row: {fill: cnn.pad(row, (0, 2), fill) for fill in shown})(row)
    padded = {fill: np.asarray(values).ravel() for fill, values in padded.items()}
    for fill, digits in shown.items():
        assert "".join(str(int(v)) for v in padded[fill]) == digits
    assert padded["mean"][0] == 2.5
    np.testing.assert_allclose(padded["interpolate"], np.linspace(1, 4, 8), rtol=1e-6)


def test_symmetric_is_replicate_where_one_pixel_is_added():
    x = normal(0, 2, 5, 6, 3)
    both = lambda x, amount: [cnn.pad(x, amount, fill) for fill in ("symmetric", "replicate")]
    pad = jax.jit(both, static_argnums=1)
    assert np.array_equal(*pad(x, (1, 1)))
    assert not np.array_equal(*pad(x, (2, 2)))
    assert pad(x, (5, 6))[0].shape == (2, 15, 18, 3)
    with pytest.raises(ValueError, match="'symmetric' cannot pad a 5x6 map by 6x1"):
        cnn.pad(x, (6, 1), "symmetric")


def test_mean_and_interpolate_keep_a_constant_and_commute_with_mirrors():
    x, kernel = normal(0, 2, 8, 9, 2), normal(1, 3, 3, 2, 4)
    for fill in ("mean", "interpolate"):
        convolve = jax.jit(functools.partial(cnn.conv, padding=1, fill=fill))
        constant = convolve(jnp.ones_like(x), kernel)
        assert float(jnp.ptp(constant, axis=(1, 2)).max()) < 1e-5
        mirrored = convolve(np.flip(x, (1, 2)), np.flip(kernel, (0, 1)))
        np.testing.assert_allclose(mirrored, np.flip(convolve(x, kernel), (1, 2)), atol=1e-5)
        pad = jax.jit(lambda x, fill=fill: cnn.pad(x, (1, 2), fill))
        np.testing.assert_allclose(pad(x + 3), np.asarray(pad(x)) + 3, atol=1e-5)
        if fill == "mean":
            assert np.array_equal(pad(x)[:, 1:-1, 2:-2], x)


def test_random_draws_a_border_of_the_maps_own_moments():
    x = 5 + 2 * normal(0, 2, 64, 64, 3)
    pad = jax.jit(lambda key: cnn.pad(x, (40, 40), "random", key=key))
    draw = lambda seed: np.asarray(pad(jax.random.key(seed)))
    padded, other = draw(0), draw(1)
    assert np.array_equal(padded, draw(0))
    assert np.array_equal(padded[:, 40:-40, 40:-40], x)
    assert not np.any(np.all(padded[:, :40] == other[:, :40], axis=-1))
    assert not np.any(padded[0, :40] == padded[1, :40])
    border = np.concatenate([padded[:, :40].reshape(-1, 3), padded[:, -40:].reshape(-1, 3)])
    np.testing.assert_allclose(border.mean(0), 5, atol=0.1)
    np.testing.assert_allclose(border.std(0), 2, atol=0.1)
    with pytest.raises(ValueError, match="padding='random' draws noise: a network needs rngs="):
        cnn.pad(x, (1, 1), "random")


def test_random_padding_of_a_constant_map_has_a_gradient():
    """As of a map of one pixel, deep in a network on small images."""
    x = np.full((2, 1, 1, 3), 0.5, np.float32)
    padded = lambda x: cnn.pad(x, (1, 1), "random", key=jax.random.key(0))
    np.testing.assert_array_equal(padded(x), np.full((2, 3, 3, 3), 0.5))
    # The mean of one pixel is the pixel, so it is copied to all nine places.
    np.testing.assert_allclose(jax.grad(lambda x: padded(x).sum())(x), np.full_like(x, 9))


def test_random_padding_of_a_layer_needs_a_key():
    x = 5 + 2 * normal(0, 2, 9, 9, 3)
    layer = cnn.Conv(4, 3, padding=1, fill="random")
    variables = quick.variables(layer, x)
    apply = jax.jit(layer.apply)
    one, other = (apply(variables, x, rngs={"padding": jax.random.key(seed)}) for seed in (0, 1))
    assert np.array_equal(one[:, 1:-1, 1:-1], other[:, 1:-1, 1:-1])
    assert not np.array_equal(one, other)
    with pytest.raises(ValueError, match="padding='random' draws noise"):
        layer.apply(variables, x)


def test_full_brings_every_weight_to_every_pixel():
    """Kayhan and van Gemert's demand: responses to a pixel are the same wherever it is.

    Sums and maxima of a map then do not depend on the place.
    """
    kernel = normal(1, 3, 5, 2, 4)
    x = normal(0, 1, 8, 9, 2)
    for dilation in (1, 2):
        options = {"kernel": kernel, "dilation": dilation, "padding": 0, "fill": "full"}
        convolve = jax.jit(lambda x, options=options: cnn.conv(x, **options))
        y = np.asarray(convolve(x))
        assert y.shape[1:3] == (8 + dilation * 2, 9 + dilation * 4)
        np.testing.assert_allclose(y.sum((1, 2)), np.einsum("nhwc,ijck->nk", x, kernel), atol=1e-4)
        responses = []
        for row, column in ((0, 0), (3, 4), (7, 8)):
            pixel = np.zeros((1, 8, 9, 2), np.float32)
            pixel[0, row, column] = 1
            responses.append(np.sort(np.ravel(convolve(pixel))))
        for response in responses[1:]:
            assert np.array_equal(response, responses[0])


def test_one_sided_is_zeros_moved_by_the_amount():
    x, kernel = normal(0, 2, 8, 9, 2), normal(1, 3, 3, 2, 4)
    fills = ("one-sided", "zeros")
    convolve = lambda x, kernel: [cnn.conv(x, kernel, padding=1, fill=fill) for fill in fills]
    one, both = map(np.asarray, jax.jit(convolve)(x, kernel))
    assert one.shape == both.shape
    np.testing.assert_allclose(one[:, 1:, 1:], both[:, :-1, :-1], atol=1e-5)
    pool = jax.jit(lambda x: [cnn.max_pool(x, 3, 1, 1, fill=fill) for fill in fills])
    one, both = map(np.asarray, pool(x))
    assert np.array_equal(one[:, 1:, 1:], both[:, :-1, :-1])


def test_circular_convolution_commutes_with_roll():
    x, kernel = normal(0, 1, 8, 9, 2), normal(1, 3, 3, 2, 4)
    roll = lambda a: np.roll(a, (3, 5), (1, 2))
    conv = jax.jit(lambda a: cnn.conv(a, kernel, padding=1, fill="circular"))
    np.testing.assert_allclose(conv(roll(x)), roll(conv(x)), atol=1e-5)


@pytest.mark.parametrize("fill", cnn.FILLS)
def test_which_fills_show_the_border_of_a_constant_image(fill):
    ones, kernel = jnp.ones((1, 6, 6, 1)), normal(0, 3, 3, 1, 1)
    conv = jax.jit(functools.partial(cnn.conv, padding=1, fill=fill, key=jax.random.key(0)))
    assert (np.ptp(conv(ones, kernel)) > 0.1) == (fill in ("zeros", "partial", "full", "one-sided"))
    box = jnp.ones((3, 3, 1, 1))  # partial convolution hides it only from a mean
    assert (np.ptp(conv(ones, box)) > 1e-6) == (fill in ("zeros", "full", "one-sided"))


# 'interpolate' has no grid, 'full' and 'one-sided' have another.
@pytest.mark.parametrize("fill", sorted({*cnn.FILLS} - {"interpolate", "full", "one-sided"}))
def test_padding_does_not_move_the_sampling_grid(fill):
    x = np.asarray(normal(0, 1, 12, 12, 1))
    identity = jnp.asarray(np.eye(9, dtype=np.float32)[4].reshape(3, 3, 1, 1))
    options = {"stride": 2, "padding": 1, "fill": fill, "key": jax.random.key(0)}
    y = jax.jit(lambda x: cnn.conv(x, identity, **options))(x)
    inner = x[:, 1::2, 1::2][:, :5, :5] if fill == "none" else x[:, ::2, ::2]
    if fill == "partial":
        ratio = y / inner
        assert np.isclose(ratio[0, 1:, 1:], 1).all()
        assert np.isclose(ratio[0, 0, 0, 0], 9 / 4)
    else:
        np.testing.assert_array_equal(y, inner)


def test_seven_shift_layers_count_columns():
    """The lectures' demonstration that zero padding writes the position.

    One channel, a weight on the left neighbor, bias 1.
    """
    x = normal(0, 1, 7, 7, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 0].set(1)
    layer = jax.jit(lambda x: cnn.conv(x, kernel, padding=1) + 1)
    y = x
    for _ in range(7):
        y = layer(y)
    np.testing.assert_array_equal(y[0, :, :, 0], np.tile(np.arange(1.0, 8), (7, 1)))


def test_adaptive_pool_averages_pytorchs_bins():
    x = normal(0, 2, 10, 7, 3)
    y = jax.jit(lambda x: cnn.adaptive_avg_pool(x, (4, 3)))(x)
    for i, j in np.ndindex(4, 3):
        rows = slice(i * 10 // 4, -(-(i + 1) * 10 // 4))
        columns = slice(j * 7 // 3, -(-(j + 1) * 7 // 3))
        mean = np.asarray(x)[:, rows, columns].mean((1, 2))
        np.testing.assert_allclose(y[:, i, j], mean, atol=1e-6)
    widened = jax.eval_shape(lambda x: cnn.adaptive_avg_pool(x, 7), x[:, :1, :1])
    assert widened.shape == (2, 7, 7, 3)


def test_adaptive_pools_average_in_full_precision():
    """By default, accelerators take the product in TF32 or bfloat16."""
    operations = operations_of(lambda x: cnn.adaptive_avg_pool(x, 3), (2, 10, 7, 3))
    products = [o for o in operations if o.primitive.name == "dot_general"]
    assert products
    assert {o.params["precision"] for o in products} == {(jax.lax.Precision.HIGHEST,) * 2}


def test_flatten_has_pytorchs_order():
    x = np.arange(24.0, dtype=np.float32).reshape(1, 2, 3, 4)
    assert list(cnn.flatten(x)[0, :7]) == [0, 4, 8, 12, 16, 20, 1]


def test_resize_is_pytorchs_with_and_without_aligned_corners():
    x = jnp.asarray([0.0, 3, 6]).reshape(1, 1, 3, 1)
    resize = jax.jit(cnn.resize, static_argnums=(1, 2))
    np.testing.assert_allclose(np.ravel(resize(x, (1, 5))), [0, 1.5, 3, 4.5, 6])
    unaligned = resize(x, (1, 5), False)
    np.testing.assert_allclose(np.ravel(unaligned), [0, 1.2, 3, 4.8, 6], rtol=1e-6)
    # A constant stays one, to the last bit.
    for align_corners in (True, False):
        constant = resize(jnp.full((1, 5, 5, 1), 0.1), (28, 28), align_corners)
        assert np.ptp(constant) == 0


def test_batch_norm_keeps_pytorchs_running_statistics():
    x = 3 * normal(0, 4, 2, 3, 5) + 1
    layer = cnn.BatchNorm()
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    train = jax.jit(functools.partial(layer.apply, train=True, mutable=["batch_stats"]))
    y, new = train(variables, x)
    flat = np.asarray(x).reshape(-1, 5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        new["batch_stats"]["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5
    )
    np.testing.assert_allclose(
        np.asarray(y).reshape(-1, 5), (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), atol=1e-5
    )
    with pytest.raises(ValueError, match="one value per channel"):
        train(variables, x[:1, :1, :1])


def test_batch_norm_has_the_gradient_of_its_formula():
    """Also of the running statistics, which nothing in training differentiates."""
    x, weight = 3 * normal(0, 4, 5, 3, 6) + 1, normal(1, 4, 5, 3, 6)
    layer = cnn.BatchNorm()
    variables = {
        "params": {"scale": normal(2, 6) + 2, "bias": normal(3, 6)},
        "batch_stats": {"mean": jnp.zeros(6), "var": jnp.ones(6)},
    }

    def loss(params, x):
        y, new = layer.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
        mean, var = new["batch_stats"]["mean"], new["batch_stats"]["var"]
        return (y * weight).sum() + 7 * jnp.cos(mean).sum() + 5 * jnp.sin(var).sum()

    def formula(params, x):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        y = (x - mean) / jnp.sqrt(var + 1e-5) * params["scale"] + params["bias"]
        running_mean = 0.1 * mean
        running_var = 0.9 + 0.1 * var * 60 / 59
        return (y * weight).sum() + 7 * jnp.cos(running_mean).sum() + 5 * jnp.sin(running_var).sum()

    ours, want = (
        jax.jit(jax.value_and_grad(function, (0, 1)))(variables["params"], x)
        for function in (loss, formula)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, want)


def test_batch_norm_of_one_vector_has_a_gradient():
    """Without an axis of a batch, as inside `jax.vmap`; eight channels look like eight parts."""
    x, weights = normal(0, 8), normal(1, 8)
    layer = cnn.BatchNorm()
    variables = {
        "params": {"scale": normal(2, 8), "bias": normal(3, 8)},
        "batch_stats": {"mean": normal(4, 8), "var": np.full(8, 2.0, np.float32)},
    }

    def loss(params, x):
        return (weights * layer.apply(variables | {"params": params}, x)).sum()

    params, dx = jax.grad(loss, (0, 1))(variables["params"], x)
    factor = 1 / np.sqrt(2 + layer.eps)
    normalized = (x - variables["batch_stats"]["mean"]) * factor
    np.testing.assert_allclose(params["bias"], weights, rtol=1e-6)
    np.testing.assert_allclose(params["scale"], weights * normalized, rtol=1e-5)
    np.testing.assert_allclose(dx, weights * variables["params"]["scale"] * factor, rtol=1e-5)


def test_batch_norm_in_evaluation_needs_no_device_axis():
    x = normal(0, 2, 3, 3, 4)
    variables = cnn.BatchNorm().init(jax.random.key(0), x)
    alone = cnn.BatchNorm().apply(variables, x)
    assert np.array_equal(cnn.BatchNorm(axis_name="devices").apply(variables, x), alone)


@pytest.mark.slow
def test_batch_norm_over_devices_is_that_of_the_whole_batch():
    x, weight = 3 * normal(0, 8, 5, 3, 6) + 1, normal(1, 8, 5, 3, 6)
    variables = cnn.BatchNorm().init(jax.random.key(0), x)

    def gradients(x, weight, axis_name=None):
        layer = cnn.BatchNorm(axis_name=axis_name)

        def loss(params, x):
            y, new = layer.apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            )
            return (y * weight).sum(), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    (dparams, dx), (y, new) = jax.jit(gradients)(x, weight)
    parts = lambda a: a.reshape(4, 2, 5, 3, 6)
    on_device = functools.partial(gradients, axis_name="devices")
    on_devices = jax.jit(jax.vmap(on_device, axis_name="devices"))
    (all_dparams, all_dx), (all_y, all_new) = on_devices(parts(x), parts(weight))
    np.testing.assert_allclose(all_y, parts(y), atol=1e-5)
    np.testing.assert_allclose(all_dx, parts(dx), atol=1e-5)
    for name, whole in dparams.items():
        np.testing.assert_allclose(all_dparams[name].sum(0), whole, rtol=1e-4, atol=1e-4)
    for name, whole in new["batch_stats"].items():
        each = all_new["batch_stats"][name]
        np.testing.assert_allclose(each, np.broadcast_to(whole, each.shape), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_local_response_norm_is_the_papers_formula(size):
    x = normal(0, 2, 3, 3, 8)
    want = np.empty_like(x)
    for c in range(8):
        low, high = max(0, c - size // 2), min(8, c + (size - 1) // 2 + 1)
        want[..., c] = x[..., c] / (2 + 1e-1 * np.square(x[..., low:high]).sum(-1)) ** 0.75
    found = jax.jit(lambda x: cnn.local_response_norm(x, size, alpha=1e-1))(x)
    np.testing.assert_allclose(found, want, rtol=1e-5)


class Small(nn.Module):
    """Every kind of layer whose gradient the CPU backend makes slow by default."""

    @nn.compact
    def __call__(self, x):
        x = cnn.Conv(8, 3, padding=1)(x)
        x = cnn.max_pool(nn.relu(x), 3, 2, padding=1)
        x = cnn.Conv(8, 3, stride=2, padding=1, groups=2)(x)
        x = cnn.Conv(8, 3, padding=1, groups=8)(nn.relu(x))
        return cnn.Dense(3)(cnn.Conv(4, 1)(x).mean((1, 2)))


def assert_fast(program):
    convolutions = [line for line in program.splitlines() if " convolution(" in line]
    assert convolutions
    for line in convolutions:
        assert "dim_labels=b01f_01io->b01f" in line and "feature_group_count" not in line


@pytest.mark.slow
@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the guard is on the CPU backend's fast path"
)
@pytest.mark.parametrize("in_scan", [False, True])
def test_compiled_training_step_has_only_fast_operations(in_scan):
    model, x = Small(), normal(0, 4, 16, 16, 3)
    params = quick.variables(model, x)

    def step(params, _):
        loss, grads = jax.value_and_grad(lambda p: jnp.square(model.apply(p, x)).mean())(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    def run(params):
        if in_scan:
            return jax.lax.scan(step, params, None, length=3)
        return step(params, None)

    text = quick.readable(run).lower(params).compile().as_text()
    assert_fast(text)
    assert "select-and-scatter" not in text


@pytest.mark.slow
@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the guard is on the CPU backend's fast path"
)
@pytest.mark.parametrize(
    "shape, outputs, kernel_size, stride, fill",
    [
        ((4, 1, 1, 32), 32, 3, 1, "zeros"),
        ((4, 2, 2, 32), 32, 3, 1, "zeros"),
        ((4, 2, 2, 32), 24, 3, 1, "zeros"),
        ((4, 2, 2, 32), 32, 3, 2, "zeros"),
        ((4, 4, 4, 32), 32, 5, 1, "zeros"),
        ((4, 2, 2, 32), 32, 3, 1, "one-sided"),
        ((100, 24, 24, 32), 32, 3, 1, "full"),
        ((100, 24, 24, 32), 24, 3, 1, "full"),
        ((100, 24, 24, 32), 24, 3, 1, "none"),
    ],
)
def test_windows_larger_than_the_map_are_fast(shape, outputs, kernel_size, stride, fill):
    """XLA exchanges image and kernel if the kernel is larger.

    In the kernel gradients of full padding, the output gradient is such a kernel. With fewer
    outputs than inputs, the image takes the kernel's place.
    """
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = jax.ShapeDtypeStruct((kernel_size, kernel_size, 32, outputs), jnp.float32)
    convolve = functools.partial(cnn.conv, stride=stride, padding=kernel_size // 2, fill=fill)

    def step(x, kernel, dy):
        y, vjp = jax.vjp(convolve, x, kernel)
        return y, vjp(dy)

    dy = jax.eval_shape(convolve, x, kernel)
    assert_fast(quick.readable(step).lower(x, kernel, dy).compile().as_text())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends are left alone")
def test_a_materialized_value_stays_one_and_is_itself():
    """The compiler keeps the call and copies nothing; vmap and gradients change nothing."""
    x = normal(0, 4, 3).at[0, 0].set(jnp.nan)
    program = quick.optimized(lambda x: (materialize(x) + 1, materialize(x + 1) * 2))
    compiled = program.lower(x).compile().as_text()
    assert compiled.count(" call(") == 2
    assert " copy(" not in compiled
    for value in (x, x[1:], x.astype(jnp.bfloat16), jnp.zeros((0, 3))):
        same = np.asarray(quick.optimized(materialize)(value), np.float32)
        np.testing.assert_array_equal(same, np.asarray(value, np.float32))
    np.testing.assert_array_equal(quick.optimized(jax.vmap(materialize))(x), x)
    gradient = quick.optimized(jax.grad(lambda x: (materialize(x) * x).sum()))
    np.testing.assert_array_equal(gradient(x[1:]), 2 * x[1:])


class DenseBlock(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = DenseLayer(4, dropout=0.0, fill="zeros", dtype=jnp.float32, axis_name=None)(x, True)
        return x


def most_operands(depth):
    """Counts what the fused operation with the most operands reads in a block's gradient."""
    model, x = DenseBlock(depth), normal(0, 2, 8, 8, 8)
    variables = quick.variables(model, x)

    def loss(params, x):
        return model.apply({**variables, "params": params}, x, mutable="batch_stats")[0].sum()

    gradients = quick.readable(jax.grad(loss, argnums=(0, 1)))
    program = gradients.lower(variables["params"], x).compile().as_text()
    operands = [text.count("%") for text in re.findall(r" fusion\(([^)]*)\)", program)]
    assert max(operands) > 0
    return max(operands)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends are left alone")
def test_a_deeper_dense_block_has_no_larger_operations():
    """Sums of many layers' gradients fused into one operation would compute each layer's anew."""
    assert most_operands(3) == most_operands(6)


def test_a_step_in_scan_equals_a_loop():
    model, x = Small(), normal(0, 4, 16, 16, 3)
    params = quick.variables(model, x)
    gradient = jax.grad(lambda params: jnp.square(model.apply(params, x)).mean())
    step = lambda params: jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient(params))

    @jax.jit
    def scan(params):
        return jax.lax.scan(lambda params, _: (step(params), None), params, None, length=3)[0]

    one_step = jax.jit(step)
    looped = params
    for _ in range(3):
        looped = one_step(looped)
    for a, b in zip(jax.tree.leaves(scan(params)), jax.tree.leaves(looped)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_wrong_arguments_name_themselves():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 4))
    wrong_calls = {
        "^fill='mirror' is not one of zeros, none, reflect": lambda: cnn.conv(
            x, kernel, padding=1, fill="mirror"
        ),
        "stride=0 is not an integer": lambda: cnn.conv(x, kernel, stride=0),
        "does not fit an input of shape": lambda: cnn.conv(x, kernel, groups=2),
        "no output on a 4x4 map": lambda: cnn.conv(x, jnp.ones((5, 5, 2, 4)), fill="none"),
        "cannot pad a 1x1 map by 1x1": lambda: cnn.pad(x[:, :1, :1], (1, 1), "reflect"),
        "a 5x5 pool with padding='zeros' has no output": lambda: cnn.max_pool(x, 5),
        "size=0 is not a positive number of channels": lambda: cnn.local_response_norm(x, 0),
        "padding=.2, 2. is more than half of the window, .3, 3.": lambda: cnn.max_pool(x, 3, 1, 2),
        "padding=.0, 2. is more than half of the window, .2, 3.": lambda: cnn.avg_pool(
            x, (2, 3), padding=(0, 2)
        ),
        "padding=.1, 1., all on one side, is as large as the window": lambda: cnn.max_pool(
            x, 2, padding=1, fill="one-sided"
        ),
        "features=0 is not a positive number": lambda: cnn.Conv(0, 3).init(jax.random.key(0), x),
        "groups=0 is not a positive number": lambda: cnn.Conv(8, 3, groups=0).init(
            jax.random.key(0), x
        ),
        "groups=4 does not divide the 2 channels of the input and the 8": lambda: cnn.Conv(
            8, 3, groups=4
        ).init(jax.random.key(0), x),
        "amount=-1 is not an integer, or a pair": lambda: cnn.pad(x, -1, "zeros"),
        "features=-3 is not a positive number": lambda: cnn.Dense(-3).init(jax.random.key(0), x),
        "fan_in=0 is not a positive number of inputs": lambda: cnn.Dense(3).init(
            jax.random.key(0), x[..., :0]
        ),
    }
    for message, call in wrong_calls.items():
        with pytest.raises(ValueError, match=message):
            call()


def calls_with(x):
    """Lists calls of the operations that take a map."""
    return [
        lambda: cnn.resize(x, 8),
        lambda: cnn.max_pool(x, 2),
        lambda: cnn.avg_pool(x, 2),
        lambda: cnn.adaptive_avg_pool(x, 2),
        lambda: cnn.global_avg_pool(x),
        lambda: cnn.flatten(x),
        lambda: cnn.sample(x, 2, sampling="blur"),
        lambda: cnn.pad(x, (1, 1), "mean"),
        lambda: cnn.conv(x, jnp.ones((3, 3, x.shape[-1], 4))),
        lambda: cnn.Conv(4, 3).init(jax.random.key(0), x),
    ]


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_maps_of_integers_are_refused(dtype, monkeypatch):
    # Users' programs run without the checks of types that the tests turn on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x = jnp.full((1, 4, 4, 2), 200).astype(dtype)
    key = jax.random.key(0)
    calls = [
        *calls_with(x),
        lambda: cnn.local_response_norm(x),
        lambda: cnn.Dense(4).init(key, x),
        lambda: cnn.BatchNorm().init(key, x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"^x has dtype {dtype}; convert it to a floating"):
            call()


def test_a_list_in_place_of_an_array_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    key = jax.random.key(0)
    calls = [
        cnn.local_response_norm,
        lambda x: cnn.Dense(4).init(key, x),
        lambda x: cnn.BatchNorm().init(key, x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="^x has type list; expected a floating-point array"):
            call([[1.0, 2.0]])
    with pytest.raises(ValueError, match="an input of type list is not an array, .batch, height"):
        cnn.flatten([[1.0, 2.0]])


def test_an_image_without_a_batch_axis_is_refused(monkeypatch):
    """Its height would be taken for the batch."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for call in calls_with(jnp.zeros((32, 32, 4))):
        with pytest.raises(ValueError, match=r"shape \(32, 32, 4\) is not \[batch, height, width"):
            call()


@pytest.mark.parametrize("form", ["reference", "cpu"])
def test_a_kernel_of_another_type_is_refused(form):
    """Depthwise, one form returned float32 and the other raised a `TypeError`."""
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 1, 2))
    message = "a kernel of dtype float32 does not fit an input of dtype bfloat16"
    with cnn.lowering(form), pytest.raises(ValueError, match=message):
        cnn.conv(x, kernel, groups=2)


def test_one_amount_pads_rows_and_columns_alike():
    x = normal(0, 1, 5, 6, 2)
    assert np.array_equal(cnn.pad(x, 2, "reflect"), cnn.pad(x, (2, 2), "reflect"))


@pytest.mark.parametrize("form", ["reference", "cpu"])
@pytest.mark.parametrize("fill", ["zeros", "partial"])
def test_averages_of_narrow_types_are_summed_in_float32(form, fill):
    """The sum of a window is more than float16 holds, and bfloat16 would lose its digits."""
    x = 10_000 + 100 * normal(0, 1, 6, 6, 3)

    @jax.jit
    def pools(x):
        return cnn.avg_pool(x, 3, 2, 1, fill=fill), cnn.adaptive_avg_pool(x, 4)

    with cnn.lowering(form):
        for dtype in (jnp.float16, jnp.bfloat16):
            narrow = x.astype(dtype)
            for mean, exact in zip(pools(narrow), pools(narrow.astype(jnp.float32))):
                assert mean.dtype == dtype
                assert np.array_equal(mean, exact.astype(dtype))


def test_means_of_numpys_bfloat16_are_summed_in_float32():
    """NumPy's own sum of ones in bfloat16 stops at 256."""
    x = np.full((1, 100, 100, 1), 3, jnp.bfloat16)
    assert cnn.global_avg_pool(x).item() == 3
    assert cnn.adaptive_avg_pool(x, 1).item() == 3
    for fill in ("mean", "random"):
        border = cnn.pad(x, 1, fill, key=jax.random.key(0))[:, 0]
        np.testing.assert_array_equal(border, np.full_like(border, 3))


def test_many_taps_in_bfloat16_are_summed_in_float32():
    """In bfloat16, adding ones one by one stops at 256."""
    x = jnp.ones((1, 17, 17, 2), jnp.bfloat16)
    with cnn.lowering("cpu"):
        y = cnn.conv(x, x.reshape(17, 17, 1, 2), groups=2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.ravel(), np.full(2, 17 * 17, jnp.bfloat16))


def test_maps_of_numpys_float64_are_taken_as_float32():
    """As everywhere in JAX, unless jax_enable_x64 is set. A warning would fail the test."""
    x = np.random.default_rng(0).standard_normal((1, 5, 5, 2))
    kernel = np.ones((3, 3, 2, 3))
    norm = cnn.BatchNorm()
    statistics = norm.init(jax.random.key(0), x)
    calls = {
        "BatchNorm": lambda x: norm.apply(statistics, x),
        "conv, partial": lambda x: cnn.conv(x, kernel.astype(x.dtype), padding=1, fill="partial"),
        "local_response_norm": cnn.local_response_norm,
        "resize": lambda x: cnn.resize(x, 7),
        "pad, mean": lambda x: cnn.pad(x, 1, "mean"),
        "pad, random": lambda x: cnn.pad(x, 1, "random", key=jax.random.key(0)),
    }
    for name, call in calls.items():
        y = call(x)
        assert jnp.result_type(y) == jnp.float32, name
        np.testing.assert_array_equal(y, call(x.astype(np.float32)), err_msg=name)


def test_adaptive_pools_have_the_digits_of_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((1, 9, 9, 2))
        y = cnn.adaptive_avg_pool(jnp.asarray(x), 3)
    means = x.reshape(1, 3, 3, 3, 3, 2).mean((2, 4))
    np.testing.assert_allclose(y, means, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float16, 1e-3), (jnp.bfloat16, 2e-2)])
def test_local_response_norm_in_16_bits_is_near_float32(dtype, tolerance):
    """The square of the larger value is more than float16 holds."""
    x = jnp.array([300.0, 1.0], dtype)
    found = cnn.local_response_norm(x)
    assert found.dtype == dtype
    exact = cnn.local_response_norm(x.astype(jnp.float32))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=tolerance)


@pytest.mark.parametrize("window, stride, count", [(2, 2, 8), (3, 2, 18)])
def test_max_pool_is_differentiable_in_bfloat16(window, stride, count):
    x = normal(0, 1, 4, 4, 2).astype(jnp.bfloat16)
    if window > stride:
        x = normal(0, 1, 7, 7, 2).astype(jnp.bfloat16)
    pool = lambda x: cnn.max_pool(x, window, stride).astype(jnp.float32)
    grad = jax.jit(jax.grad(lambda x: pool(x).sum()))(x)
    assert grad.dtype == jnp.bfloat16
    # The counts of windows are small enough to be exact.
    assert float(grad.astype(jnp.float32).sum()) == count


@pytest.mark.parametrize("pool", [cnn.max_pool, cnn.avg_pool])
def test_a_large_window_has_few_operations(pool):
    """A slice for each of its values would take too long to compile."""
    passes = functools.partial(value_and_gradients, functools.partial(pool, window=32, stride=2))
    x = normal(0, 1, 36, 33, 2)
    compiled = jax.jit(passes)
    with cnn.lowering("reference"):
        expected = compiled(x)
    with cnn.lowering("cpu"):
        assert len(operations_of(passes, x.shape)) <= 100
        assert_alike(compiled(x), expected)
