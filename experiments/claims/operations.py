"""Claims about single operations: sizes, padding, pooling, worked examples."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
import scipy.signal
import scipy.stats

from cnnjax import summary
from cnnjax.data import published, sources
from cnnjax.models import create_model
from cnnjax.models.mlp import MLP
from cnnjax.nn import Conv, Dense, avg_pool, conv, local_response_norm, max_pool
from cnnjax.nn.parameters import eval_shape
from cnnjax.weights import variable_shapes
from experiments.claims.ledger import Section, Verdict, every, is_above, judge, not_computed

OPERATIONS = Section("Operations: sizes, padding, pooling, worked examples")

# ---------------------------------------------------------------------------------------------
# Helpers: shapes without computation, and operations on images of one channel.


@functools.cache
def layers(name: str, **fields) -> tuple[summary.Layer, ...]:
    """Returns a network's layers, the input first; `fields` go to the model."""
    return tuple(summary.layers(create_model(name, **fields)))


def output_shape(function, *shape: int) -> tuple[int, ...]:
    """Returns the output shape of a function for an array of `shape`."""
    return eval_shape(function, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def parameter_count(module: nn.Module, *shape: int) -> int:
    """Returns the number of parameters of a module for inputs of `shape`."""
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = eval_shape(module.init, jax.random.key(0), image)
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def module_shape(module: nn.Module, *shape: int) -> tuple[int, ...]:
    """Returns the output shape of a module for inputs of `shape`."""
    return output_shape(lambda x: module.init_with_output(jax.random.key(0), x)[0], *shape)


@functools.cache
def convolved_size(size: int, kernel: int, stride: int, padding: int) -> int:
    weights = jnp.zeros((kernel, kernel, 1, 1))
    return output_shape(
        lambda x: conv(x, weights, stride=stride, padding=padding), 1, size, size, 1
    )[1]


def pooled_size(size: int, window: int, stride: int) -> int:
    return output_shape(lambda x: max_pool(x, window, stride), 1, size, size, 1)[1]


def one_channel(image) -> jnp.ndarray:
    """Returns a matrix [height, width] as a map [1, height, width, 1]."""
    return jnp.asarray(image, jnp.float32)[None, :, :, None]


def plane(y) -> np.ndarray:
    """Returns a map [1, height, width, 1] as a matrix [height, width]."""
    return np.asarray(y[0, :, :, 0])


def filtered(
    image, kernel, *, stride: int = 1, padding: int = 0, fill: str = "zeros"
) -> np.ndarray:
    """Returns a one-channel convolution as integers, for the worked examples."""
    weights = jnp.asarray(kernel, jnp.float32)[:, :, None, None]
    y = conv(one_channel(image), weights, stride=stride, padding=padding, fill=fill)
    return plane(y).round().astype(int)


# ---------------------------------------------------------------------------------------------
# Output sizes and parameter counts


@functools.cache
def convolution_sizes() -> dict[str, int]:
    """Compares sizes of outputs with the formula: counts the cases, and those that are equal."""
    counts = {"cases": 0, "equal": 0, "equal when rounded down": 0}
    for n, p, f, s in itertools.product((5, 6, 7, 16, 32), range(4), (1, 3, 5, 7), (1, 2, 3, 4)):
        if n + 2 * p < f:
            continue
        size = convolved_size(n, f, s, p)
        formula = (n + 2 * p - f) / s + 1
        counts["cases"] += 1
        counts["equal"] += size == formula
        counts["equal when rounded down"] += size == math.floor(formula)
    return counts


@OPERATIONS.claim("A1", "NUS", "A convolution has floor((n + 2p - f) / s + 1) output positions")
def convolution_size() -> Verdict:
    counts = convolution_sizes()
    return judge(counts["equal when rounded down"] == counts["cases"], counts)


@OPERATIONS.claim("A1.1", "Inha UTSA", "A convolution has (N + 2P - F) / S + 1 output positions")
def unrounded_convolution_size() -> Verdict:
    counts = convolution_sizes()
    return judge(
        counts["equal"] == counts["cases"],
        counts,
        as_read=counts["equal when rounded down"] == counts["cases"],
        note="rounded down where S does not divide N + 2P - F, as NUS prints it",
    )


@OPERATIONS.claim(
    "A2", "NUS", "5x5 filters need 2 rings of padding, 7x7 filters 3, to keep the size"
)
def rings_of_padding() -> Verdict:
    rings = {}
    for f in (5, 7):
        rings[f"{f}x{f}"] = next(p for p in range(9) if convolved_size(32, f, 1, p) == 32)
    return judge(rings == {"5x5": 2, "7x7": 3}, {"rings": rings})


@OPERATIONS.claim(
    "A3", "Inha", "Ten 5x5 filters, stride 1, pad 2, on 32x32x3: output 32x32x10, 760 parameters"
)
def ten_filters() -> Verdict:
    layer = Conv(10, 5, padding=2)
    shape = module_shape(layer, 1, 32, 32, 3)[1:]
    size = parameter_count(layer, 1, 32, 32, 3)
    holds = shape == (32, 32, 10) and size == 760
    return judge(holds, {"output": shape, "parameters": size})


@OPERATIONS.claim(
    "A26", "Inha", "3x3, stride 1, pad 1 keeps a 7x7 input at 7x7 and a 4x4 input at 4x4"
)
def sizes_kept() -> Verdict:
    sizes = {n: convolved_size(n, 3, 1, 1) for n in (7, 4)}
    return judge(sizes == {7: 7, 4: 4}, {"output sizes": sizes})


@OPERATIONS.claim("A27", "Inha", "A fully connected layer reads a 32x32x3 image as 3072 values")
def flattened_image() -> Verdict:
    perceptron = create_model("mlp1")
    kernel = variable_shapes(perceptron)["params"]["fc1"]["kernel"]
    holds = perceptron.input_shape == (32, 32, 3) and kernel.shape[0] == 3072
    return judge(holds, {"image": perceptron.input_shape, "inputs": kernel.shape[0]})


@OPERATIONS.claim("A13", "WPI", "A convolution has ((m n d) + 1) k parameters")
def convolution_parameters() -> Verdict:
    cases = list(itertools.product((1, 3, 5), (1, 3, 7), (1, 3, 16), (4, 10)))
    different = 0
    for m, n, d, k in cases:
        different += parameter_count(Conv(k, (m, n)), 1, 9, 9, d) != (m * n * d + 1) * k
    return judge(different == 0, {"cases": len(cases), "cases that differ": different})


@OPERATIONS.claim("A4", "Inha", "Pooling gives (W - F) / S + 1 positions and has no parameters")
def pooling_size() -> Verdict:
    cases = list(itertools.product((4, 6, 13, 27, 55), (2, 3), (1, 2, 3)))
    exact = sum(pooled_size(w, f, s) == (w - f) / s + 1 for w, f, s in cases)
    floored = sum(pooled_size(w, f, s) == (w - f) // s + 1 for w, f, s in cases)
    parameters = sum(row.parameters for row in layers("vgg16") if row.kind == "max-pool")
    return judge(
        exact == len(cases) and not parameters,
        {"cases": len(cases), "equal": exact, "equal when rounded down": floored},
        as_read=floored == len(cases) and not parameters,
        note="rounded down where S does not divide W - F, as for convolutions",
    )


@OPERATIONS.claim(
    "A4.1", "Inha", "A convolutional layer needs two hyperparameters, the extent F and the stride S"
)
def hyperparameters() -> Verdict:
    outputs = {}
    for filters, padding in itertools.product((4, 8), (0, 1)):
        layer = Conv(filters, 3, stride=2, padding=padding)
        outputs[f"{filters} filters, padding {padding}"] = module_shape(layer, 1, 7, 7, 3)[1:]
    return judge(
        len(set(outputs.values())) == 1,
        {"outputs of 3x3 at stride 2 on 7x7x3": outputs},
        note="four, with the number of filters and the padding; the slide is about pooling, which "
        "needs these two",
    )


@OPERATIONS.claim("A36", "NUS", "Pooling of size p turns n x n maps into n/p x n/p maps")
def pooled_by_its_size() -> Verdict:
    sizes = {}
    for n, p in ((6, 2), (6, 3), (7, 2), (8, 3)):
        sizes[f"{n} by {p}"] = pooled_size(n, p, p)
    exact = all(sizes[f"{n} by {p}"] == n / p for n, p in ((6, 2), (6, 3), (7, 2), (8, 3)))
    divisible = sizes["6 by 2"] == 3 and sizes["6 by 3"] == 2
    return judge(
        exact, sizes, as_read=divisible, note="if p divides n; otherwise the result is rounded down"
    )


@OPERATIONS.claim(
    "A8", "UTSA", "A 3-layer perceptron with D = 1024 inputs has about 3 D^2 + D = 3e6 parameters"
)
def perceptron_parameters() -> Verdict:
    d = 1024
    image = (1, 32, 32, 1)
    three = parameter_count(MLP(hidden=(d,) * 3, num_classes=1), *image)
    readings = {
        "3 D^2 + D": 3 * d**2 + d,
        "three hidden layers and one output, no biases": three - 3 * d - 1,
        "the same with biases": three,
        "two hidden layers and D outputs": parameter_count(
            MLP(hidden=(d,) * 2, num_classes=d), *image
        ),
        "two hidden layers and one output": parameter_count(
            MLP(hidden=(d,) * 2, num_classes=1), *image
        ),
    }
    exact = readings["three hidden layers and one output, no biases"] == 3 * d**2 + d
    return judge(
        len(set(readings.values())) == 1,
        readings,
        as_read=exact,
        note="exactly, for three hidden layers of D units, one output, and no biases; a network "
        "with two hidden layers and one output has two thirds of that",
    )


# ---------------------------------------------------------------------------------------------
# Data sets


@OPERATIONS.claim("A45", "UTSA", "An MNIST image has D = 32x32 = 1024 values")
def mnist_pixels() -> Verdict:
    height, width = sources.DATASETS["mnist"].size
    padded = create_model("lenet5").input_shape[0]
    return judge(
        height * width == 1024,
        {"MNIST": height * width, "LeNet-5's padded input": padded**2},
        note=f"{height}x{width} = {height * width}; 32x32 is the padded input of LeNet-5",
    )


@OPERATIONS.claim("A46.1", "NUS", "MNIST: 10 classes, 50,000 training and 10,000 test images")
def mnist_counts() -> Verdict:
    train, test = sources.DATASETS["mnist"].counts
    classes = len(sources.DATASETS["mnist"].classes)
    return judge(
        (classes, train, test) == (10, 50_000, 10_000),
        {"classes": classes, "training": train, "test": test},
        note=f"{train:,} training images; 50,000 remain if 10,000 are held out for validation",
    )


def cifar_shape() -> tuple[int, ...]:
    """Returns the shape of an image, as the reader of CIFAR-10's files makes it of 3,072 bytes."""
    return published.from_planes(np.zeros((1, 3072), np.uint8)).shape[1:]


@OPERATIONS.claim(
    "A46.2", "NUS", "CIFAR-10: 10 classes, 50,000 training and 10,000 test images of 3x32x32"
)
def cifar_counts() -> Verdict:
    train, test = sources.DATASETS["cifar10"].counts
    classes = len(sources.DATASETS["cifar10"].classes)
    shape = cifar_shape()
    holds = (classes, train, test) == (10, 50_000, 10_000) and shape == (32, 32, 3)
    return judge(holds, {"classes": classes, "training": train, "test": test, "image": shape})


@OPERATIONS.claim(
    "A46.3",
    "WPI",
    "CIFAR-10's classes: airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck; "
    "its images are 3x32x32",
)
def cifar_classes() -> Verdict:
    classes = " ".join(sources.DATASETS["cifar10"].classes)
    printed = "airplane automobile bird cat deer dog frog horse ship truck"
    shape = cifar_shape()
    holds = classes == printed and shape == (32, 32, 3)
    return judge(holds, {"classes": classes, "image": shape})


# ---------------------------------------------------------------------------------------------
# The worked examples of NUS: one image, two filters, stride 1 and 2

IMAGE = np.array(
    [
        [3, 2, 3, 3, 3, 1],
        [0, 1, 3, 3, 1, 2],
        [2, 2, 0, 0, 2, 0],
        [3, 0, 1, 3, 3, 0],
        [2, 3, 2, 0, 0, 1],
        [2, 2, 2, 3, 1, 0],
    ]
)
# The 7x7 image is the same one with a seventh column and row.
LARGER_IMAGE = np.vstack([np.column_stack([IMAGE, [2, 1, 0, 3, 1, 1]]), [0, 2, 1, 1, 3, 3, 1]])
FILTER = np.array([[0, 1, 0], [0, 0, 0], [1, 1, 2]])
LARGER_FILTER = np.array(
    [[1, 2, 1, 1, 2], [0, 0, 1, 0, 1], [0, 1, 0, 0, 1], [1, 1, 1, 2, 1], [1, 2, 1, 1, 2]]
)
PRINTED = {
    "3x3, stride 1": np.array([[6, 5, 7, 5], [6, 10, 13, 7], [11, 5, 2, 4], [8, 11, 10, 7]]),
    "3x3, stride 2": np.array([[6, 5, 7], [6, 10, 13], [11, 5, 2]]),
    "5x5, padded": np.array(
        [
            [2, 7, 10, 8, 8, 3],
            [9, 6, 5, 7, 5, 3],
            [3, 6, 10, 13, 7, 5],
            [10, 11, 5, 2, 4, 1],
            [9, 8, 11, 10, 7, 1],
            [2, 3, 2, 0, 0, 1],
        ]
    ),
}


def worked_examples() -> dict[str, np.ndarray]:
    """Returns the right map for each of NUS's worked convolutions."""
    return {
        "3x3, stride 1": filtered(IMAGE, FILTER),
        "3x3, stride 2": filtered(LARGER_IMAGE, FILTER, stride=2),
        "5x5, padded": filtered(IMAGE, LARGER_FILTER, padding=2),
    }


@OPERATIONS.claim("A5.1", "NUS", "The worked 3x3 convolution of the 6x6 image, stride 1")
def worked_convolution() -> Verdict:
    right = worked_examples()["3x3, stride 1"]
    holds = np.array_equal(right, PRINTED["3x3, stride 1"])
    return judge(holds, {"map": right.tolist()})


@OPERATIONS.claim("A5.2", "NUS", "The worked 3x3 convolution of the 7x7 image, stride 2")
def worked_stride() -> Verdict:
    right = worked_examples()["3x3, stride 2"]
    printed = PRINTED["3x3, stride 2"]
    corner = filtered(LARGER_IMAGE, FILTER)[:3, :3]
    is_corner = np.array_equal(printed, corner)
    return judge(
        np.array_equal(right, printed),
        {"right": right.tolist(), "printed": printed.tolist(), "printed is the corner": is_corner},
        note=f"{right.tolist()}; the printed map is the top left corner of the map at stride 1",
    )


@OPERATIONS.claim(
    "A5.3", "NUS", "The worked 5x5 convolution of the 6x6 image with two rings of zeros"
)
def worked_padding() -> Verdict:
    right = worked_examples()["5x5, padded"]
    printed = PRINTED["5x5, padded"]
    smaller = filtered(IMAGE, FILTER, padding=1)
    return judge(
        np.array_equal(right, printed),
        {
            "right": right.tolist(),
            "printed": printed.tolist(),
            "printed is the 3x3 filter with one ring": np.array_equal(printed, smaller),
        },
        note=f"{right.tolist()}; the printed map is that of the 3x3 filter with one ring of zeros. "
        "The slide's text has only zeros as the input, so the 6x6 image of an earlier slide is "
        "taken, which gives the printed map",
    )


# NUS CS5242, lecture 8: a map, and its 2x2 max-pool as printed.
MAP = np.array(
    [
        [3, 3, 0, 1, 1, 1],
        [7, 2, 1, 1, 5, 2],
        [7, 9, 1, 0, 5, 6],
        [5, 6, 1, 0, 3, 2],
        [9, 7, 0, 0, 0, 0],
        [4, 7, 0, 0, 0, 1],
    ],
    np.float32,
)
POOLED = np.array([[7, 1, 5], [9, 1, 6], [9, 0, 1]])


@OPERATIONS.claim(
    "A6", "NUS", "2x2 max-pooling turns the 6x6 example map into [7 1 5; 9 1 6; 9 0 1]"
)
def worked_pooling() -> Verdict:
    pooled = plane(max_pool(one_channel(MAP), 2)).astype(int).tolist()
    return judge(pooled == POOLED.tolist(), {"pooled": pooled})


# ---------------------------------------------------------------------------------------------
# The worked convolution layer of UTSA: 7x7x3 padded input, stride 2, bias 1. Weights that meet zero
# pixels do not matter, and the slide's text does not show all of them; they are 0 here.

WORKED_INPUT = np.zeros((7, 7, 3))
WORKED_INPUT[1:6, 1:6, 0] = [
    [2, 0, 1, 1, 0],
    [2, 1, 2, 2, 1],
    [2, 0, 0, 1, 2],
    [1, 1, 2, 2, 1],
    [0, 1, 0, 2, 2],
]
WORKED_INPUT[1:6, 1:6, 1] = [
    [1, 2, 1, 1, 2],
    [1, 2, 1, 2, 0],
    [2, 0, 1, 2, 2],
    [2, 2, 2, 1, 0],
    [0, 1, 0, 2, 2],
]
WORKED_INPUT[1:6, 1:6, 2] = [
    [0, 0, 2, 0, 0],
    [1, 1, 1, 0, 2],
    [2, 1, 1, 2, 1],
    [0, 2, 1, 1, 0],
    [0, 0, 2, 1, 2],
]
# The products (pixel, weight) by channel as printed; None is a printed 0. The second channel's text
# lacks one of its zeros.
PRINTED_PRODUCTS = (
    ((2, 1), (1, 1), None, (1, 1), (2, 1), None, (2, 1), (1, 1), None),
    (None, None, None, (2, 1), None, None, (1, -1), None, None),
    (None, None, None, (2, -1), (1, 1), None, (1, -1), None, None),
)
PRINTED_SUMS = [9, 1, -2]
PRINTED_OUTPUT = 9


@OPERATIONS.claim(
    "A40",
    "UTSA",
    "The printed products of pixels and weights are 9, 1, and -2 in three channels, with bias 1 in "
    "all 9",
)
def worked_layer() -> Verdict:
    row, column = 1, 2
    window = WORKED_INPUT[2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
    sums = []
    has_pixels = True
    weights = np.zeros((3, 3, 3))
    for channel, products in enumerate(PRINTED_PRODUCTS):
        for place, product in enumerate(products):
            if product is not None:
                pixel, weight = product
                has_pixels &= bool(window[:, :, channel].flat[place] == pixel)
                weights[:, :, channel].flat[place] = weight
        y = filtered(WORKED_INPUT[:, :, channel], weights[:, :, channel], stride=2)
        sums.append(int(y[row, column]))
    image = jnp.asarray(WORKED_INPUT, jnp.float32)[None]
    y = conv(image, jnp.asarray(weights, jnp.float32)[..., None], stride=2)
    whole = int(y[0, row, column, 0]) + 1
    return judge(
        has_pixels and sums == PRINTED_SUMS and whole == PRINTED_OUTPUT,
        {"sums by channel": sums, "with bias": whole, "position": [row, column]},
        note="with the printed pixels at row 1, column 2 of the output, and the weights of the "
        "printed products. The printed filters are not checked, nor the two further outputs, 2 and "
        "0: the slide's text lacks weights",
    )


# ---------------------------------------------------------------------------------------------
# Convolution as an operation


@OPERATIONS.claim(
    "A7", "NUS", "A convolution is a matrix product of vectorized filters and patches"
)
def matrix_product() -> Verdict:
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(x, np.float64), (3, 3), (1, 2))
    # im2col: [batch, height, width, in, 3, 3] becomes one row of 3 x 3 x in values per window.
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 27)
    product = patches @ np.asarray(kernel, np.float64).reshape(27, 5)
    difference = float(np.abs(np.asarray(conv(x, kernel)).reshape(-1, 5) - product).max())
    return judge(difference < 1e-4, {"greatest difference": difference})


@OPERATIONS.claim("A7.1", "NUS", "A convolutional layer defines a linear operator")
def linear_operator() -> Verdict:
    x, y = np.random.default_rng(0).normal(size=(2, 1, 9, 8, 3)).astype(np.float32)
    difference = {}
    for use_bias in (False, True):
        layer = Conv(5, 3, padding=1, use_bias=use_bias, bias_init=nn.initializers.ones)
        variables = layer.init(jax.random.key(0), x)
        combined = layer.apply(variables, 2 * x - 3 * y)
        apart = 2 * layer.apply(variables, x) - 3 * layer.apply(variables, y)
        name = "with a bias of 1" if use_bias else "without bias"
        difference[name] = float(jnp.abs(combined - apart).max())
    return judge(
        max(difference.values()) < 1e-4,
        {"greatest difference of f(2x - 3y) and 2 f(x) - 3 f(y)": difference},
        as_read=difference["without bias"] < 1e-4,
        note="without its bias; with one, the layer is affine",
    )


@OPERATIONS.claim(
    "A37", "UTSA", "Convolution is the sum of f[n] g[x - n]; a convolutional layer is one"
)
def flipped() -> Verdict:
    image = np.arange(25.0).reshape(5, 5) % 7
    layer = filtered(image, FILTER)
    convolution = scipy.signal.convolve2d(image, FILTER, mode="valid").round().astype(int)
    correlation = scipy.signal.correlate2d(image, FILTER, mode="valid").round().astype(int)
    is_correlation = np.array_equal(layer, correlation)
    return judge(
        np.array_equal(layer, convolution),
        {
            "layer": layer[0].tolist(),
            "convolution as defined": convolution[0].tolist(),
            "cross-correlation": correlation[0].tolist(),
            "layer is the cross-correlation": is_correlation,
        },
        as_read=is_correlation,
        note="with the filter flipped: the definition is right, but a convolutional layer, as the "
        "lecture's worked one (A40), does not flip its filter; it computes the cross-correlation",
    )


@OPERATIONS.claim("A38", "UTSA", "Convolution is commutative: f * g = g * f")
def commutative() -> Verdict:
    f, g = IMAGE, FILTER
    one = scipy.signal.convolve2d(f, g)
    other = scipy.signal.convolve2d(g, f)
    # A layer with the flipped filter, and 2 pixels of padding, computes the same full convolution.
    ours = filtered(f, g[::-1, ::-1], padding=2)
    holds = np.array_equal(one, other) and np.array_equal(one, ours)
    return judge(holds, {"f * g, first row": one[0].tolist()})


@OPERATIONS.claim(
    "A39", "UTSA", "The Sobel pair [-1 -2 -1; 0 0 0; 1 2 1] and its transpose find edges"
)
def sobel() -> Verdict:
    rows = np.array([[-1, -2, -1], [0, 0, 0], [1, 2, 1]])
    columns = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    image = np.zeros((8, 8))
    # A vertical edge.
    image[:, 4:] = 1
    responses = {}
    for name, picture in (("vertical edge", image), ("horizontal edge", image.T)):
        for kind, kernel in (("rows", rows), ("columns", columns)):
            responses[f"{name}, {kind}"] = int(np.abs(filtered(picture, kernel)).max())
    holds = np.array_equal(columns, rows.T) and responses == {
        "vertical edge, rows": 0,
        "vertical edge, columns": 4,
        "horizontal edge, rows": 4,
        "horizontal edge, columns": 0,
    }
    return judge(holds, responses, note="each of the two finds the edges of one direction")


def dense_map(x: jnp.ndarray) -> np.ndarray:
    """Returns the output of a random dense layer for an image [1, 12, 12, 1], as [12, 12]."""
    dense = Dense(144)
    variables = dense.init(jax.random.key(2), x.reshape(1, -1))
    return np.asarray(dense.apply(variables, x.reshape(1, -1))).reshape(12, 12)


def closest_shift(x: jnp.ndarray, moved: jnp.ndarray) -> float:
    """Compares a dense layer's outputs for an image and the moved image, read as maps.

    Returns their greatest difference under the shift that brings the maps closest.
    """
    before = dense_map(x)
    after = dense_map(moved)
    distances = []
    for shift in np.ndindex(12, 12):
        distances.append(np.abs(np.roll(before, shift, (0, 1)) - after).max())
    return float(min(distances))


@OPERATIONS.claim(
    "A24",
    "UBC",
    "A fully connected layer is neither invariant nor equivariant; a convolution is "
    "translation-equivariant",
)
def equivariance() -> Verdict:
    x = jax.random.normal(jax.random.key(0), (1, 12, 12, 1))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 1))
    moved = jnp.roll(x, (2, 3), (1, 2))

    # No shift of the dense layer's output comes near the output for the moved image.
    closest = closest_shift(x, moved)
    # Nor is the output for a mirrored or turned image the same, or mirrored or turned.
    image = np.asarray(x[0, :, :, 0])
    still = dense_map(x)
    others = {}
    for name, transform in (("mirror image", np.fliplr), ("quarter turn", np.rot90)):
        after = dense_map(one_channel(transform(image)))
        changes = [np.abs(after - before).max() for before in (still, transform(still))]
        others[name] = float(min(changes))

    difference = {}
    for fill in ("circular", "zeros"):
        still = conv(x, kernel, padding=1, fill=fill)
        shifted = conv(moved, kernel, padding=1, fill=fill)
        difference[fill] = np.abs(plane(jnp.roll(still, (2, 3), (1, 2)) - shifted))
    # Pixels at the border of the image, before or after the move.
    border = np.ones((12, 12), bool)
    border[1:-1, 1:-1] = False
    border |= np.roll(border, (2, 3), (0, 1))
    inside = float(difference["zeros"][~border].max())
    outside = float(difference["zeros"][border].max())
    circular = float(difference["circular"].max())

    exact = min(closest, *others.values()) > 0.1 and max(circular, inside) < 1e-5
    return judge(
        exact and outside < 1e-5,
        {
            "dense, to the nearest shift": closest,
            "dense, to the same or transformed output": others,
            "circular": circular,
            "zeros, inside": inside,
            "zeros, at the border": outside,
        },
        as_read=exact,
        note="the convolution exactly with circular padding, with zeros only away from the border; "
        "the fully connected layer shown with a shift, a mirror image, and a quarter turn",
    )


@OPERATIONS.claim("A24.1", "UBC", "A convolution is not invariant to any transformation")
def no_invariance() -> Verdict:
    x = jax.random.normal(jax.random.key(0), (1, 12, 12, 1))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 1))
    transformed = {
        "shift": jnp.roll(x, 1, 1),
        "mirror image": x[:, :, ::-1],
        "quarter turn": jnp.rot90(x, axes=(1, 2)),
        "contrast": 2 * x,
    }
    still = conv(x, kernel, padding=1)
    changes = {}
    for name, image in transformed.items():
        changes[name] = float(jnp.abs(conv(image, kernel, padding=1) - still).max())
    return judge(
        min(changes.values()) > 0.1,
        {"greatest change of the output": changes},
        note="shown with a random filter; special filters have invariances, such as one of zeros",
    )


# ---------------------------------------------------------------------------------------------
# Inputs of several channels


@OPERATIONS.claim(
    "A28",
    "NUS",
    "One 3x3x3 filter (27 weights) with padding 1 turns a 3x5x5 input into one 5x5 map",
)
def one_map() -> Verdict:
    layer = Conv(1, 3, padding=1, use_bias=False)
    weights = parameter_count(layer, 1, 5, 5, 3)
    shape = module_shape(layer, 1, 5, 5, 3)
    return judge(weights == 27 and shape == (1, 5, 5, 1), {"weights": weights, "output": shape})


@OPERATIONS.claim("A28.2", "NUS", "An N-D filter on an N-D input gives a 1-D activation map")
def one_dimensional_map() -> Verdict:
    shapes = {}
    for channels in (3, 4):
        layer = Conv(1, 3, padding=1, use_bias=False)
        shapes[f"{channels} channels"] = module_shape(layer, 1, 5, 5, channels)[1:]
    return judge(
        False,
        {"output": shapes},
        as_read=set(shapes.values()) == {(5, 5, 1)},
        note="if N and 1 count channels: the result is one map with two dimensions, the 5x5 tensor "
        "that the lecture draws",
    )


@OPERATIONS.claim(
    "A28.3", "NUS", "PyTorch's Conv2d(2, 5, kernel_size=3, padding=1) takes a 1x2x6x6 tensor"
)
def lab_convolution() -> Verdict:
    layer = Conv(5, 3, padding=1)
    shape = module_shape(layer, 1, 6, 6, 2)
    size = parameter_count(layer, 1, 6, 6, 2)
    return judge(
        shape == (1, 6, 6, 5) and size == 95,
        {"output": shape, "parameters": size},
        note="the output, which is not printed, is 1x5x6x6; the layer has 95 parameters",
    )


@OPERATIONS.claim(
    "A29",
    "NUS",
    "Four filters on a 3x28x28 input: filters 4x3x3x3, output 4x28x28; F filters give F maps",
)
def several_maps() -> Verdict:
    layer = Conv(4, 3, padding=1, use_bias=False)
    weights = parameter_count(layer, 1, 28, 28, 3)
    shape = module_shape(layer, 1, 28, 28, 3)
    holds = weights == 4 * 3 * 3 * 3 and shape == (1, 28, 28, 4)
    return judge(holds, {"weights": weights, "output": shape})


@OPERATIONS.claim(
    "A30", "NUS", "Four filters for a 1x128x128 input are a 4x28x28 tensor; the output is 4x128x128"
)
def filters_of_one_channel() -> Verdict:
    layer = Conv(4, 3, padding=1, use_bias=False)
    image = jax.ShapeDtypeStruct((1, 128, 128, 1), jnp.float32)
    kernel = eval_shape(layer.init, jax.random.key(0), image)["params"]["kernel"]
    rows, columns, inputs, filters = kernel.shape
    ours = (filters, inputs, rows, columns)
    shape = module_shape(layer, 1, 128, 128, 1)
    return judge(
        ours == (4, 28, 28),
        {"filters": ours, "output": shape},
        note="the output is right; the filters are a 4x1x3x3 tensor",
    )


@OPERATIONS.claim("A28.1", "NUS", "The worked sum of the three-channel example is 5")
def worked_sum() -> Verdict:
    return not_computed("two of the three channels of its input and filter are not printed")


# ---------------------------------------------------------------------------------------------
# Depth


@OPERATIONS.claim(
    "A31",
    "NUS",
    "Without a nonlinearity between them, stacked convolutions collapse into a single one",
)
def collapse() -> Verdict:
    errors = {fill: float(collapse_error(fill).max()) for fill in ("none", "circular", "zeros")}
    inside = float(collapse_error("zeros")[1:-1, 1:-1].max())
    exact = max(errors["none"], errors["circular"], inside) < 1e-4
    # What float32 rounds away differs from one processor to another.
    shown = {fill: round(error, 4) for fill, error in errors.items()}
    return judge(
        exact and errors["zeros"] < 1e-4,
        {
            "greatest difference, to four decimals": shown,
            "zeros, away from the border": round(inside, 4),
        },
        as_read=exact,
        note="exactly without padding and with circular padding; with zero padding the two differ "
        "where the second filter reaches over the border, because the first map was cut there",
    )


def collapse_error(fill: str) -> np.ndarray:
    """Compares two 3x3 convolutions with the 5x5 convolution of the composed filter.

    Returns the absolute difference [height, width].
    """
    image = np.asarray(jax.random.normal(jax.random.key(0), (12, 12)))
    first = np.asarray(jax.random.normal(jax.random.key(1), (3, 3)))
    second = np.asarray(jax.random.normal(jax.random.key(2), (3, 3)))
    composed = scipy.signal.convolve2d(first, second)

    def layer(x, kernel):
        weights = jnp.asarray(kernel, jnp.float32)[:, :, None, None]
        return conv(x, weights, padding=len(kernel) // 2, fill=fill)

    two = layer(layer(one_channel(image), first), second)
    one = layer(one_channel(image), composed)
    return np.abs(plane(two) - plane(one))


@OPERATIONS.claim(
    "A32", "NUS", "Without padding, maps shrink to 1x1 quickly when layers are stacked"
)
def shrinking() -> Verdict:
    stacks = {}
    for size in (28, 32, 224):
        for kernel in (3, 5, 7):
            count = 0
            left = size
            while left >= kernel:
                left = convolved_size(left, kernel, 1, 0)
                count += 1
            stacks[f"{kernel}x{kernel} from {size}"] = {"layers": count, "pixels left": left}
    small = stacks["3x3 from 28"]
    large = stacks["3x3 from 224"]
    left = small["pixels left"]
    return judge(
        False,
        stacks,
        as_read=small == {"layers": 13, "pixels left": 2},
        note=f"from 28 pixels, {small['layers']} layers of 3x3 leave {left}x{left}, where no "
        f"further one fits; from 224, {large['layers']} layers fit. Pooling and strides shrink "
        "maps far sooner",
    )


# ---------------------------------------------------------------------------------------------
# Pooling


@functools.cache
def smooth_image() -> np.ndarray:
    """Draws an image [64, 64] as smooth as a feature map: noise averaged over 5x5 pixels."""
    noise = jax.random.normal(jax.random.key(0), (1, 68, 68, 1))
    return plane(avg_pool(noise, 5, 1))


def survivors(shift: int, *, pools: int = 1) -> float:
    """Returns the share of max-pool outputs that survive a shift by `shift` pixels."""
    image = smooth_image()
    x = one_channel(image)
    moved = one_channel(np.roll(image, shift, 1))
    for _ in range(pools):
        x = max_pool(x, 2)
        moved = max_pool(moved, 2)
    return float((plane(x) == plane(moved)).mean())


@OPERATIONS.claim("A33", "NUS", "Max-pooling creates global invariance to translation")
def global_invariance() -> Verdict:
    shares = {shift: survivors(shift) for shift in (1, 2, 4, 8)}
    return judge(
        min(shares.values()) == 1,
        {"share of 2x2 outputs unchanged, by shift": shares},
        note="of the outputs of a 2x2 max-pool on a smooth random image, "
        f"{100 * shares[1]:.0f} % keep their value when the image moves by one pixel, and none "
        "when it moves by two or more; only a maximum over the whole map is invariant, as long as "
        "no content leaves it",
    )


@OPERATIONS.claim("A34", "NUS", "Max-pooling gives local invariance to small deformations")
def local_invariance() -> Verdict:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(30, 64, 64))
    images = scipy.ndimage.uniform_filter(noise, (0, 5, 5), mode="wrap")
    moved = {
        "shift": np.roll(images, 1, 2),
        "deformation": np.stack([deformed(image, generator) for image in images]),
    }
    changes = {}
    is_damped = {}
    for name, others in moved.items():
        pixels = relative_change(images, others)
        pooled = relative_change(pooled_maps(images), pooled_maps(others))
        changes[name] = {"pixels": float(pixels.mean()), "pooled": float(pooled.mean())}
        gains = pixels - pooled
        half = scipy.stats.t.ppf(0.975, len(gains) - 1) * scipy.stats.sem(gains)
        is_damped[name] = is_above(float(gains.mean()), 0, float(half))
    shift, bent = changes["shift"], changes["deformation"]
    return judge(
        max(shift["pooled"], bent["pooled"]) < 1e-3,
        {"images": len(images), "mean change, in standard deviations": changes},
        as_read=every(*is_damped.values()),
        note="in part: a shift by one pixel changes smooth random images by "
        f"{shift['pixels']:.2f} of their deviation and their 2x2 max-pools by "
        f"{shift['pooled']:.2f}; smooth deformations by up to one pixel change both "
        f"almost alike ({bent['pixels']:.3f} and {bent['pooled']:.3f})",
    )


def deformed(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Moves each pixel of an image by up to one pixel, neighbors by nearly the same."""
    noise = generator.normal(size=(2, *image.shape))
    shifts = scipy.ndimage.gaussian_filter(noise, (0, 4, 4), mode="wrap")
    shifts /= np.hypot(*shifts).max()
    places = np.indices(image.shape) + shifts
    return scipy.ndimage.map_coordinates(image, places, mode="grid-wrap")


def pooled_maps(images: np.ndarray) -> np.ndarray:
    """Returns the 2x2 max-pools of images [n, height, width]."""
    return np.asarray(max_pool(jnp.asarray(images, jnp.float32)[..., None], 2))[..., 0]


def relative_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Returns the mean change of each map [n, height, width], in its standard deviations."""
    return np.abs(before - after).mean((1, 2)) / before.std((1, 2))


@OPERATIONS.claim(
    "A41", "UTSA", "Pooling works on every activation map by itself and makes it smaller"
)
def channel_by_channel() -> Verdict:
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    together = np.asarray(max_pool(x, 2))
    apart = np.concatenate([max_pool(x[..., i : i + 1], 2) for i in range(3)], axis=3)
    return judge(np.array_equal(together, apart), {"output": together.shape})


@OPERATIONS.claim(
    "A35", "NUS", "Halving the map and doubling the channels keeps the computation under control"
)
def controlled_computation() -> Verdict:
    macs: dict[str, int] = {}
    for row in layers("vgg16"):
        if row.kind == "Conv":
            size = f"{row.output[1]} px"
            macs[size] = macs.get(size, 0) + row.macs
    # The layers of a block share a key, so the last one overwrites the others. It reads as many
    # channels as it writes; the first does not.
    last_of_block = {}
    for row in layers("vgg16"):
        if row.kind == "Conv":
            last_of_block[f"{row.output[1]} px, {row.output[3]} channels"] = row.macs
    first_four = list(last_of_block.values())[:4]
    constant = len(set(first_four)) == 1
    return judge(
        constant,
        {
            "multiply-adds of VGG-16's convolutions by map size": macs,
            "of a block's last one": last_of_block,
        },
        note="a 3x3 convolution inside each of VGG-16's first four blocks costs the same 1.85 G "
        "multiply-adds; in the fifth, where channels no longer double, a quarter",
    )


# ---------------------------------------------------------------------------------------------
# Normalization and dropout


@OPERATIONS.claim(
    "A42",
    "UBC",
    "Contrast normalization, as in AlexNet, gives the same response at low and high contrast",
)
def contrast() -> Verdict:
    x = 50 * jax.nn.relu(jax.random.normal(jax.random.key(0), (1, 8, 8, 96)))
    ratio = jnp.abs(local_response_norm(2 * x)).sum() / jnp.abs(local_response_norm(x)).sum()

    # Local contrast normalization, the older layer, subtracts a window's mean from its center and
    # divides by the window's deviation.
    def local_contrast(x):
        mean = avg_pool(x, 3, 1)
        deviation = jnp.sqrt(avg_pool(x**2, 3, 1) - mean**2)
        return (x[:, 1:-1, 1:-1] - mean) / deviation

    image = one_channel(10 + np.random.default_rng(0).normal(size=(12, 12)))
    same = float(jnp.abs(local_contrast(2 * image) - local_contrast(image)).max())
    return judge(
        abs(float(ratio) - 1) < 0.05,
        {
            "AlexNet's LRN, twice the contrast over once": float(ratio),
            "local contrast, difference": same,
        },
        as_read=same < 1e-2,
        note="for local contrast normalization (mean and deviation of a window); AlexNet's layer "
        f"is local response normalization, where twice the contrast gives {float(ratio):.2f} times "
        "the response",
    )


@OPERATIONS.claim("A43", "UTSA", "Dropout sets random units to zero in the forward pass")
def dropout() -> Verdict:
    x = jnp.ones((1, 10_000))
    layer = nn.Dropout(0.5, deterministic=False)
    y = np.asarray(layer.apply({}, x, rngs={"dropout": jax.random.key(0)}))
    zero = float((y == 0).mean())
    largest = float(y.max())
    return judge(
        abs(zero - 0.5) < 0.02,
        {"share of zeros at rate 0.5": zero, "value of the units that stay": largest},
        note="in training; the units that stay are multiplied by 2, so that nothing changes at "
        "test time",
    )
