"""The numbers: edges, one convolution step by step, unfolding, pooling, shifting, sizes.

Ids in brackets, as (A5.2), are those of the claims ledger (`experiments.claims`).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import summary
from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.nn import FILLS, avg_pool, conv, max_pool, output_size, pad
from cnnjax.nn.parameters import eval_shape
from experiments.claims.operations import MAP, convolved_size, one_channel, plane
from experiments.claims.position import SHIFT, SIZE, example_images

# Megabytes of one float32 value.
MEGABYTES = 4e-6

# ---------------------------------------------------------------------------------------------
# Edges: the Sobel pair (A39)

# UTSA EE 6973; its transpose is the second filter of the pair.
SOBEL = np.array([[-1, -2, -1], [0, 0, 0], [1, 2, 1]], np.float32)


def sobel(image: np.ndarray, fill: str = "replicate") -> dict[str, np.ndarray]:
    """Computes the derivatives of an image [height, width], each [height, width].

    "down" and "right" are the pair's responses, "magnitude" their length, and "direction" the
    angle in degrees in which the image grows brighter (0 to the right, 90 downwards).
    """
    kernel = jnp.asarray(np.stack([SOBEL, SOBEL.T], -1)[:, :, None])
    responses = np.asarray(conv(one_channel(image), kernel, padding=1, fill=fill)[0])
    down, right = np.moveaxis(responses, -1, 0)
    return {
        "down": down,
        "right": right,
        "magnitude": np.hypot(down, right),
        "direction": np.degrees(np.arctan2(down, right)),
    }


def edge(degrees: float) -> np.ndarray:
    """Draws an edge through the center of an image [33, 33], from 0 to 255.

    The image is brighter towards `degrees` (0 right, 90 down), along a logistic curve.
    """
    rows, columns = np.mgrid[:33, :33] - 16
    along = columns * np.cos(np.radians(degrees)) + rows * np.sin(np.radians(degrees))
    return (255 / (1 + np.exp(-along))).astype(np.float32)


def direction_error(degrees: float) -> float:
    """Returns the greatest error of the pair's direction on an edge, in degrees."""
    responses = sobel(edge(degrees))
    # Responses at the border, which read repeated pixels, are left out.
    inner = {name: values[2:-2, 2:-2] for name, values in responses.items()}
    strong = inner["magnitude"] > inner["magnitude"].max() / 2
    errors = (inner["direction"][strong] - degrees + 180) % 360 - 180
    return float(np.abs(errors).max())


def sobel_numbers(gray: np.ndarray) -> dict:
    """Measures the pair on edges, a photograph `gray`, noise, and a flat image."""
    vertical = sobel(edge(0))
    magnitude = sobel(gray)["magnitude"]
    threshold = np.quantile(magnitude, 0.9)
    strongest = magnitude[magnitude >= threshold]
    noise = sobel(photographs.synthetic("noise", 1, 256, 0)[0, :, :, 0])["magnitude"]
    flat = np.full((16, 16), 100, np.float32)
    flat_magnitude = {}
    for fill in ("replicate", "zeros"):
        flat_magnitude[fill] = float(sobel(flat, fill)["magnitude"].max())
    along = np.abs(vertical["down"]).max()
    across = np.abs(vertical["right"]).max()
    return {
        "greatest error of direction, degrees": max(map(direction_error, range(0, 360, 5))),
        "response along an edge, share of that across": float(along / across),
        "share of squared gradient in the strongest 10 %": float(
            (strongest**2).sum() / (magnitude**2).sum()
        ),
        "share of noise above that threshold": float((noise >= threshold).mean()),
        "flat image of 100, greatest magnitude": flat_magnitude,
    }


# ---------------------------------------------------------------------------------------------
# One convolution, step by step, and as a matrix product (A7, A40)


def worked_example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws a worked example with UTSA's sizes and random numbers.

    Returns an image [7, 7, 3] of 0 to 2 inside a ring of zeros, two filters [3, 3, 3, 2] of -1 to
    1, and biases [2].
    """
    generator = np.random.default_rng(0)
    image = np.pad(generator.integers(0, 3, (5, 5, 3)), ((1, 1), (1, 1), (0, 0)))
    kernels = generator.integers(-1, 2, (3, 3, 3, 2))
    bias = np.array([1, 0], np.float32)
    return image.astype(np.float32), kernels.astype(np.float32), bias


def steps(image: np.ndarray, kernels: np.ndarray, bias: np.ndarray, stride: int) -> list[dict]:
    """Convolves window by window.

    Each step has the window's row and column, the products [height, width, in, out] of window and
    filters, and the values [out] with the bias.
    """
    height, width = kernels.shape[:2]
    rows = range(0, image.shape[0] - height + 1, stride)
    columns = range(0, image.shape[1] - width + 1, stride)
    result = []
    for row, column in itertools.product(rows, columns):
        window = image[row : row + height, column : column + width, :, None]
        products = window * kernels
        values = products.sum((0, 1, 2)) + bias
        result.append({"row": row, "column": column, "products": products, "values": values})
    return result


def unfold(
    x: jnp.ndarray,
    kernel_size: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    fill: str = "zeros",
) -> jnp.ndarray:
    """Returns the windows of `x` [batch, height, width, in] as rows (im2col).

    The result is [batch height' width', kernel height x kernel width x in].
    """
    x = pad(x, (padding, padding), fill)
    height = output_size(x.shape[1], kernel_size[0], stride, 0)
    width = output_size(x.shape[2], kernel_size[1], stride, 0)
    taps = []
    for i, j in np.ndindex(*kernel_size):
        rows = slice(i, i + (height - 1) * stride + 1, stride)
        columns = slice(j, j + (width - 1) * stride + 1, stride)
        taps.append(x[:, rows, columns])
    return jnp.stack(taps, 3).reshape(-1, kernel_size[0] * kernel_size[1] * x.shape[3])


def product(
    x: jnp.ndarray, kernel: jnp.ndarray, stride: int = 1, padding: int = 0, fill: str = "zeros"
) -> jnp.ndarray:
    """Computes `cnnjax.nn.conv` as one matrix product [batch height' width', out]."""
    rows = unfold(x, kernel.shape[:2], stride, padding, fill)
    return jnp.dot(rows, kernel.reshape(-1, kernel.shape[3]), precision="highest")


def growth() -> list[dict]:
    """Counts the input values of VGG-16's convolutions, as they are and unfolded."""
    rows = summary.layers(create_model("vgg16"))
    result = []
    for before, layer in zip(rows, rows[1:]):
        if layer.kind != "Conv":
            continue
        image = jax.ShapeDtypeStruct(before.output, jnp.float32)
        unfolded = eval_shape(lambda x: unfold(x, (3, 3), 1, 1), image)
        size = int(np.prod(before.output))
        result.append({"shape": before.output[1:], "input": size, "unfolded": unfolded.size})
    return result


# ---------------------------------------------------------------------------------------------
# Pooling (A6, A33)

POOLS = {"max": max_pool, "average": avg_pool}
# (window, stride); the overlapping 3x3 at stride 2 is AlexNet's.
WINDOWS = {
    "stride 1": (1, 1),
    "stride 2": (1, 2),
    "2x2, stride 2": (2, 2),
    "3x3, stride 2": (3, 2),
    "2x2, stride 1": (2, 1),
    "4x4, stride 4": (4, 4),
    "4x4, stride 2": (4, 2),
}


def moved(gray: np.ndarray) -> list[dict]:
    """Measures the change of pooled maps if a photograph moves by one pixel.

    The photograph `gray` [height, width] moves to the right. "changed" is the share of values that
    differ, "difference" their RMS difference in deviations of the map, and "by the stride" the
    greatest difference if the image moves by the whole stride and the map by one position.
    """
    size = 128
    top, left = (n // 2 - size // 2 for n in gray.shape)

    def crop(shift):
        return one_channel(gray[top : top + size, left - shift : left - shift + size])

    result = []
    for pool, (name, (window, stride)) in itertools.product(POOLS, WINDOWS.items()):
        # In a window of one pixel, maximum and average are the same.
        if window == 1 and pool != "max":
            continue
        pooled = jax.jit(functools.partial(POOLS[pool], window=window, stride=stride))
        still = plane(pooled(crop(0)))
        by_one = plane(pooled(crop(1)))
        by_stride = plane(pooled(crop(stride)))
        result.append(
            {
                "pool": "none" if window == 1 else pool,
                "window": name,
                "changed": float((still != by_one).mean()),
                "difference": float(np.sqrt(((still - by_one) ** 2).mean()) / still.std()),
                "by the stride": float(np.abs(by_stride[:, 1:] - still[:, :-1]).max()),
            }
        )
    return result


# ---------------------------------------------------------------------------------------------
# The shift network (section B)


@functools.partial(jax.jit, static_argnames="fill")
def shifted(images: jnp.ndarray, fill: str, key: jnp.ndarray) -> list[jnp.ndarray]:
    """Applies seven convolutions that each take the left neighbor and add 1.

    Returns the `images` [batch, height, width] and the map after each layer. 'random' draws from
    `key`.
    """
    kernel = jnp.asarray(SHIFT)[:, :, None, None]
    maps = [images[..., None]]
    for layer in range(SIZE):
        layer_key = jax.random.fold_in(key, layer)
        maps.append(conv(maps[-1], kernel, padding=1, fill=fill, key=layer_key) + 1)
    return [y[..., 0] for y in maps]


def shift_maps(fill: str, images: np.ndarray) -> list[np.ndarray]:
    """Applies `shifted` to the central 7x7 pixels of `images` [batch, 21, 21].

    'none' gets the whole image, and the center of its output is returned.
    """
    margin = 0 if fill == "none" else SIZE
    height, width = images.shape[1:]
    inner = images[:, margin : height - margin, margin : width - margin]
    result = []
    for y in shifted(jnp.asarray(inner, jnp.float32), fill, jax.random.key(0)):
        cut = (y.shape[1] - SIZE) // 2 if fill == "none" else 0
        result.append(np.asarray(y)[:, cut : y.shape[1] - cut, cut : y.shape[2] - cut])
    return result


def shift_images() -> np.ndarray:
    """Draws 256 images of noise and, last, a constant one: [257, 21, 21].

    Each has 7x7 pixels inside a margin, which 'none' uses up.
    """
    images = example_images(257)
    images[-1] = 4
    return images


def shift_numbers(images: np.ndarray, fills: tuple[str, ...] = FILLS) -> dict[str, dict]:
    """Measures for each fill how the last map depends on image and position.

    A greatest spread of 0 means that the image is forgotten.
    """
    result = {}
    for fill in fills:
        maps = shift_maps(fill, images)[-1].astype(np.float64)
        # The last image is constant.
        middle = maps[-1, maps.shape[1] // 2].round(3)
        maps = maps[:-1]
        spread = np.ptp(maps, axis=0)
        # What the position leaves unexplained: the variance over images at one position, relative
        # to that of all values.
        unexplained = maps.var(0, ddof=1).mean() / maps.var()
        result[fill] = {
            "size": list(maps.shape[1:]),
            "explained by the position": float(1 - unexplained),
            "greatest spread": float(spread.max()),
            "pixels without spread": float((spread == 0).mean()),
            "columns told apart": len(np.unique(middle)),
            "middle row of a constant 4": middle.tolist(),
        }
    return result


# ---------------------------------------------------------------------------------------------
# Sizes (A1, A1.1)

# (layer, n, p, k, s, the printed size). AlexNet's paper (Krizhevsky et al. 2012) prints 224 pixels
# and, in figure 2, maps of 55; the lectures correct it (A14.1).
SIZES = (
    ("AlexNet as printed", 224, 0, 11, 4, 55),
    ("AlexNet in the lectures", 227, 0, 11, 4, 55),
    ("AlexNet in torchvision", 224, 2, 11, 4, 55),
    ("AlexNet, pool", 55, 0, 3, 2, 27),
    ("VGG", 224, 1, 3, 1, 224),
    ("ResNet", 224, 3, 7, 2, 112),
    ("Inception v3", 299, 0, 3, 2, 149),
    ("tutorial's Net (A11)", 32, 0, 5, 1, 28),
    ("NUS example (A5.2)", 7, 0, 3, 2, 3),
    ("UTSA example (A40)", 5, 1, 3, 2, 3),
)
# The formula is checked for every n, p, k, s in these ranges.
CASES = (range(1, 13), range(4), range(1, 8), range(1, 5))


def formula(n: int, p: int, k: int, s: int) -> float:
    return (n + 2 * p - k) / s + 1


def computed_size(n: int, p: int, k: int, s: int) -> int:
    """Returns the output size of `cnnjax.nn.conv`, or 0 if it refuses the case."""
    try:
        return convolved_size(n, k, s, p)
    except ValueError:
        return 0


def size_numbers(cases=CASES) -> dict:
    """Compares (n + 2p - k) / s + 1 with the code, in a table of cases and layers."""
    expected = {case: formula(*case) for case in itertools.product(*cases)}
    sizes = {case: computed_size(*case) for case in expected}
    fits = [case for case in expected if expected[case] >= 1]
    layers = []
    for name, *case, printed in SIZES:
        layers.append(
            {
                "layer": name,
                "case": case,
                "formula": formula(*case),
                "printed": printed,
                "computed": computed_size(*case),
            }
        )
    return {
        "cases": len(expected),
        "with an output": len(fits),
        "equal": sum(sizes[case] == expected[case] for case in fits),
        "equal when rounded down": sum(sizes[case] == int(expected[case]) for case in fits),
        "refused without output": sum(not sizes[case] for case in expected if expected[case] < 1),
        "layers": layers,
    }


# ---------------------------------------------------------------------------------------------
# All of them


def compute(gray: np.ndarray, example: tuple, fills=FILLS, cases=CASES) -> dict:
    """Computes all numbers, one entry per topic.

    `gray` [height, width] is a photograph, `example` an image, filters, and biases.
    """
    image, kernels, bias = example
    values = np.stack([step["values"] for step in steps(image, kernels, bias, 2)])
    batch = jnp.asarray(image)[None]
    filters = jnp.asarray(kernels)
    convolved = np.asarray(conv(batch, filters, stride=2)).reshape(values.shape) + bias
    dense = np.asarray(conv(batch, filters))[0, ::2, ::2].reshape(values.shape) + bias
    multiplied = np.asarray(product(batch, filters, 2)) + bias
    pooled = plane(max_pool(one_channel(MAP), 2))
    return {
        "sobel": sobel_numbers(gray),
        "steps": {
            "values": values.tolist(),
            "differs from conv": float(np.abs(values - convolved).max()),
            "differs from every second value of stride 1": float(np.abs(values - dense).max()),
        },
        "im2col": {
            "differs from conv": float(np.abs(multiplied - convolved).max()),
            "vgg16": growth(),
        },
        "pooling": {"A6": pooled.astype(int).tolist(), "one pixel": moved(gray)},
        "shift": shift_numbers(shift_images(), fills),
        "sizes": size_numbers(cases),
    }
