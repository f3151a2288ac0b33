"""UBC's demonstration that a convolution with zero padding can count its columns."""

import jax.numpy as jnp
import numpy as np

from cnnjax.nn import conv
from experiments.claims.ledger import Section, Verdict, judge

POSITION = Section("The convolution that learns where it is")

# The demonstration is repeated with each of these fills.
FILLS = ("zeros", "none", "reflect", "replicate", "circular", "partial")
# Quarter turns of the filter.
DIRECTIONS = {"from the left": 0, "from the bottom": 1, "from the right": 2, "from the top": 3}
# The lecture's image is 7x7 pixels, and its network has seven layers.
SIZE = 7
# The filter of lecture 6 of UBC CPSC 532S takes the left neighbor; its bias is 1.
SHIFT = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 0]], np.float32)
EXPECTED = np.tile(np.arange(1, SIZE + 1), (SIZE, 1))

# The lecture's image, and the maps after layers 1, 2, and 7 as printed on its slides.
PRINTED_IMAGE = np.array(
    [
        [23, 25, 67, 89, 13, 64, 35],
        [74, 15, 46, 67, 64, 36, 14],
        [67, 14, 46, 86, 75, 43, 16],
        [67, 69, 69, 74, 34, 56, 15],
        [46, 37, 95, 72, 27, 35, 45],
        [15, 26, 28, 16, 48, 89, 12],
        [23, 11, 46, 78, 18, 23, 12],
    ]
)
PRINTED_LAYERS = {
    1: np.array(
        [
            [1, 24, 26, 68, 90, 14, 65],
            [1, 75, 16, 47, 68, 65, 37],
            [1, 68, 15, 47, 87, 76, 44],
            [1, 68, 70, 70, 75, 35, 57],
            [1, 47, 38, 96, 73, 28, 36],
            [1, 16, 27, 29, 17, 49, 90],
            [1, 24, 12, 47, 79, 19, 24],
        ]
    ),
    2: np.array(
        [
            [1, 2, 25, 27, 69, 91, 15],
            [1, 2, 76, 17, 48, 69, 66],
            [1, 2, 69, 16, 48, 88, 77],
            [1, 2, 69, 71, 71, 76, 36],
            [1, 2, 48, 39, 97, 74, 29],
            [1, 2, 17, 28, 30, 18, 50],
            [1, 2, 25, 13, 48, 80, 20],
        ]
    ),
    7: EXPECTED,
}


def count_columns(
    images: np.ndarray, layers: int, direction: str = "from the left", fill: str = "zeros"
) -> np.ndarray:
    """Applies `layers` 3x3 convolutions that move the images by one pixel and add 1.

    The images may be one matrix [height, width] or several [..., height, width].
    """
    kernel = np.rot90(SHIFT, DIRECTIONS[direction])
    weights = jnp.asarray(kernel)[:, :, None, None]
    y = jnp.asarray(images, jnp.float32).reshape(-1, *images.shape[-2:], 1)
    for _ in range(layers):
        y = conv(y, weights, padding=1, fill=fill) + 1
    return np.asarray(y).reshape(*images.shape[:-2], *y.shape[1:3])


def example_images(number: int = 5) -> np.ndarray:
    """Draws images with a margin of seven pixels, which only the fill 'none' uses up."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 10, (number, 3 * SIZE, 3 * SIZE)).astype(np.float32)


def middle(images: np.ndarray) -> np.ndarray:
    """Returns the central 7x7 pixels of example images."""
    return images[..., SIZE:-SIZE, SIZE:-SIZE]


def demo(images: np.ndarray, direction: str, fill: str) -> np.ndarray:
    """Returns the central 7x7 pixels of example images after seven layers."""
    return count_columns(images if fill == "none" else middle(images), SIZE, direction, fill)


@POSITION.claim(
    "B1",
    "UBC",
    "Weight [0 0 0; 1 0 0; 0 0 0], bias 1, zero padding: after layer 1 the first column is 1, "
    "after layer 2 the first two are 1 2, after layer 7 every row is 1 2 3 4 5 6 7, whatever the "
    "image",
)
def counting() -> Verdict:
    holds = True
    for layers in (1, 2, 7):
        y = count_columns(middle(example_images()), layers)
        holds &= bool((y[..., :layers] == EXPECTED[:, :layers]).all())
    wide = count_columns(example_images(1)[0], SIZE)
    everywhere = np.array_equal(wide[0], np.arange(1, wide.shape[1] + 1))
    rows = {layers: count_columns(PRINTED_IMAGE, layers)[0].tolist() for layers in (1, 2, 7)}
    return judge(
        holds and everywhere,
        {"first row of the lecture's image after layers": rows},
        as_read=holds,
        note="for images seven columns wide; in a wider one the first seven columns are counted "
        "and the others still hold the image",
    )


@POSITION.claim("B4", "UBC", "The printed outputs of layers 1, 2, and 7 for the printed 7x7 image")
def printed_numbers() -> Verdict:
    right = {}
    for layers, printed in PRINTED_LAYERS.items():
        right[layers] = np.array_equal(count_columns(PRINTED_IMAGE, layers), printed)
    layers = {n: count_columns(PRINTED_IMAGE, n).astype(int).tolist() for n in PRINTED_LAYERS}
    return judge(all(right.values()), {"equal, by layer": right, "layers": layers})


@POSITION.claim(
    "B2",
    "UBC",
    "With the filter turned (0 1 0 in its first row), the network counts from another side",
)
def other_sides() -> Verdict:
    holds = True
    for direction, turns in DIRECTIONS.items():
        turned = np.rot90(demo(example_images(), direction, "zeros"), -turns, axes=(1, 2))
        holds &= bool((turned == EXPECTED).all())
    top = demo(example_images(1)[0], "from the top", "zeros")
    return judge(holds, {"from the top, first column": top[:, 0].tolist()}, note="from all four")


@POSITION.claim(
    "B3", "UBC", 'Convolution can "learn" to encode positional information when padding is used'
)
def without_zeros() -> Verdict:
    least = {}
    greatest = {}
    for fill in FILLS:
        spreads = []
        for direction in DIRECTIONS:
            spreads.append(np.ptp(demo(example_images(), direction, fill), axis=0))
        least[fill] = float(np.min(spreads))
        greatest[fill] = float(np.max(spreads))
    fails = all(least[fill] > 0 for fill in ("reflect", "replicate", "circular", "none"))
    return judge(
        fails and greatest["zeros"] == 0,
        {"least spread of a pixel over five images": least, "greatest": greatest},
        note="this network does, with zeros. With reflect, replicate, circular, or no padding, its "
        "every pixel still depends on the image, but other networks learn places without padding, "
        "too (docs/position.md); partial convolution pads with zeros too and counts, faster at "
        "other borders",
    )
