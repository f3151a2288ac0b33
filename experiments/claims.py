"""The ledger: what five lectures on convolutional networks state about them, computed from this library's modules and judged.

    python -m experiments.claims --workdir runs/claims

writes `report.md`, `claims.json` and the figure of section B, `position.png`: in under a minute on two CPU cores. Lectures: WPI CS 539,
UBC CPSC 532S (lecture 6), UTSA EE 6973, NUS CS5242 (lecture 8), Inha. A claim "holds", "holds under a stated reading" (its
source leaves something open, or is right only in one sense: the note says in which), or is "wrong" (the note has the right value).
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import summary
from cnnjax.models import Network, create_model
from cnnjax.models.googlenet_2014 import Inception, NaiveInception
from cnnjax.models.mlp import MLP
from cnnjax.nn import Conv, Dense, conv, local_response_norm, max_pool
from cnnjax.runtime import backend, command, workdir
from cnnjax.weights import variable_shapes

FILLS = (
    "zeros",
    "none",
    "reflect",
    "replicate",
    "circular",
    "partial",
)  # those that the lectures' section on padding is held against
HOLDS, READING, WRONG = "holds", "holds under a stated reading", "wrong"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one claim; `computed` holds the numbers that the judgment rests on."""

    id: str
    source: str
    claim: str
    judgment: str
    note: str
    computed: dict


_CLAIMS: list[Callable[[], Finding]] = []


def claim(id: str, source: str, text: str):
    """Registers a check, which returns (does it hold as it stands, does it hold under the noted reading, note, computed numbers)."""

    def register(check):
        def find():
            literally, as_read, note, computed = check()
            return Finding(
                id,
                source,
                text,
                HOLDS if literally else READING if as_read else WRONG,
                note,
                computed,
            )

        _CLAIMS.append(find)
        return find

    return register


def table(name: str, **fields) -> list[summary.Layer]:
    """A network's rows without the input's; further fields go to the model."""
    return summary.layers(create_model(name, **fields))[1:]


def parameters(name: str, **fields) -> int:
    return summary.totals(table(name, **fields))["parameters"]


def by_module(name: str) -> dict[str, int]:
    """The parameters of each layer."""
    return {layer.name: layer.parameters for layer in table(name) if layer.parameters}


def tree_size(module: nn.Module, *shape: int) -> int:
    variables = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def output_shape(function: Callable, *shape: int) -> tuple[int, ...]:
    return jax.eval_shape(function, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def convolved_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return output_shape(
        lambda x: conv(x, jnp.zeros((kernel, kernel, 1, 1)), stride=stride, padding=padding),
        1,
        size,
        size,
        1,
    )[1]


def pooled_size(size: int, window: int, stride: int) -> int:
    return output_shape(lambda x: max_pool(x, window, stride), 1, size, size, 1)[1]


def one_channel(image) -> jnp.ndarray:
    return jnp.asarray(image, jnp.float32)[None, :, :, None]


def plane(y) -> np.ndarray:
    return np.asarray(y[0, :, :, 0])


class Stack(Network):
    """Convolutions of the given sizes, one after another, padded to keep the size."""

    sizes: tuple[int, ...] = (3, 3, 3)
    width: int = 64
    input_shape: tuple[int, int, int] = (32, 32, 64)

    @nn.nowrap
    def walk(self, x, train):
        for number, size in enumerate(self.sizes, 1):
            x = nn.relu(
                Conv(self.width, size, padding=size // 2, fill=self.padding, name=f"conv{number}")(
                    x
                )
            )
        yield "logits", x


# --- A. Exact arithmetic -------------------------------------------------------------------------------------------------


@claim("A1", "NUS, Inha, UTSA", "A convolution's output has floor((n + 2p - f) / s + 1) positions")
def _():
    cases = [
        (n, p, f, s)
        for n, p, f, s in itertools.product((5, 6, 7, 16, 32), range(4), (1, 3, 5, 7), (1, 2, 3, 4))
        if n + 2 * p >= f
    ]
    wrong = sum(
        convolved_size(n, f, s, p) != math.floor((n + 2 * p - f) / s + 1) for n, p, f, s in cases
    )
    return wrong == 0, False, "", {"cases": len(cases), "cases that differ": wrong}


@claim("A2", "NUS", "5x5 filters want 2 rings of padding and 7x7 filters 3 to keep the size")
def _():
    rings = {
        f"{f}x{f}": next(p for p in range(9) if convolved_size(32, f, 1, p) == 32) for f in (5, 7)
    }
    return rings == {"5x5": 2, "7x7": 3}, False, "", {"rings": rings}


@claim(
    "A3", "Inha", "Ten 5x5 filters, stride 1, pad 2, on 32x32x3: output 32x32x10, 760 parameters"
)
def _():
    layer = Conv(10, 5, padding=2)
    shape = output_shape(lambda x: layer.init_with_output(jax.random.key(0), x)[0], 1, 32, 32, 3)
    size = tree_size(layer, 1, 32, 32, 3)
    return (
        shape[1:] == (32, 32, 10) and size == 760,
        False,
        "",
        {"output": shape[1:], "parameters": size},
    )


@claim("A4", "Inha", "Pooling gives (W - F) / S + 1 positions and has no parameters")
def _():
    cases = list(itertools.product((4, 6, 13, 27, 55), (2, 3), (1, 2, 3)))
    sizes = {case: pooled_size(*case) for case in cases}
    literal = sum(size == (w - f) / s + 1 for (w, f, s), size in sizes.items())
    floored = sum(size == (w - f) // s + 1 for (w, f, s), size in sizes.items())
    pools = [layer.parameters for layer in table("vgg16") if layer.kind == "max-pool"]
    return (
        literal == len(cases) and not any(pools),
        floored == len(cases) and not any(pools),
        "rounded down where S does not divide W - F, as for convolutions",
        {
            "cases": len(cases),
            "equal": literal,
            "equal when rounded down": floored,
            "parameters of VGG-16's five pools": sum(pools),
        },
    )


@claim(
    "A5",
    "NUS",
    "The filter 010/000/112 turns the 6x6 example into [6 5 7 5; 6 10 13 7; 11 5 2 4; 8 11 10 7] and the 7x7 example, "
    "at stride 2, into [6 5 7; 6 10 13; 11 5 2]",
)
def _():
    kernel = np.array([[0, 1, 0], [0, 0, 0], [1, 1, 2]], np.float32)
    printed = {
        1: np.array([[6, 5, 7, 5], [6, 10, 13, 7], [11, 5, 2, 4], [8, 11, 10, 7]]),
        2: np.array([[6, 5, 7], [6, 10, 13], [11, 5, 2]]),
    }

    def respond(image, stride):
        return plane(conv(one_channel(image), jnp.asarray(kernel)[:, :, None, None], stride=stride))

    def image_of(size, stride):
        """The smallest image that the filter turns into the printed map."""
        columns = [
            respond(np.eye(size * size)[i].reshape(size, size), stride).ravel()
            for i in range(size * size)
        ]
        return (np.linalg.pinv(np.stack(columns, 1)) @ printed[stride].ravel()).reshape(size, size)

    six, seven = image_of(6, 1), image_of(7, 2)
    possible = all(
        np.allclose(respond(image, stride), printed[stride], atol=1e-4)
        for image, stride in ((six, 1), (seven, 2))
    )
    corner = respond(np.pad(six, (0, 1)), 2)[:2, :2].round().astype(int)
    same = np.array_equal(corner, printed[2][:2, :2])
    return (
        possible and same,
        possible,
        "as responses of two unrelated images, which the source's text does not give (each map is the response of some image); if "
        f"the 7x7 image began with the 6x6 one, stride 2 would begin {corner.tolist()} and not {printed[2][:2, :2].tolist()}: the "
        "printed stride-2 map is the corner of the stride-1 map",
        {"stride 2 on the 6x6 image": corner.tolist()},
    )


@claim("A6", "NUS", "2x2 max-pooling turns the 6x6 map into [7 1 5; 9 1 6; 9 0 1]")
def _():
    image = [
        [3, 3, 0, 1, 1, 1],
        [7, 2, 1, 1, 5, 2],
        [7, 9, 1, 0, 5, 6],
        [5, 6, 1, 0, 3, 2],
        [9, 7, 0, 0, 0, 0],
        [4, 7, 0, 0, 0, 1],
    ]
    pooled = plane(max_pool(one_channel(image), 2)).astype(int).tolist()
    return pooled == [[7, 1, 5], [9, 1, 6], [9, 0, 1]], False, "", {"pooled": pooled}


@claim("A7", "NUS", "A convolution is a matrix-matrix product of vectorized filters and patches")
def _():
    x, kernel = (
        jax.random.normal(jax.random.key(0), (2, 9, 8, 3)),
        jax.random.normal(jax.random.key(1), (3, 3, 3, 5)),
    )
    patches = np.lib.stride_tricks.sliding_window_view(
        np.asarray(x, np.float64), (3, 3), (1, 2)
    ).transpose(0, 1, 2, 4, 5, 3)
    product = patches.reshape(-1, 27) @ np.asarray(kernel, np.float64).reshape(27, 5)
    difference = float(np.abs(np.asarray(conv(x, kernel)).reshape(-1, 5) - product).max())
    return difference < 1e-4, False, "", {"greatest difference": difference}


@claim(
    "A8",
    "UTSA",
    "A 3-layer perceptron on D = 1024 inputs has about 3 D^2 + D, that is 3e6, parameters",
)
def _():
    d = 1024
    readings = {
        "three hidden layers and one output, no biases": tree_size(
            MLP(hidden=(d,) * 3, num_classes=1), 1, 32, 32, 1
        )
        - 3 * d
        - 1,
        "the same with biases": tree_size(MLP(hidden=(d,) * 3, num_classes=1), 1, 32, 32, 1),
        "two hidden layers and D outputs": tree_size(
            MLP(hidden=(d,) * 2, num_classes=d), 1, 32, 32, 1
        ),
        "two hidden layers and one output": tree_size(
            MLP(hidden=(d,) * 2, num_classes=1), 1, 32, 32, 1
        ),
    }
    return (
        len(set(readings.values())) == 1,
        readings["three hidden layers and one output, no biases"] == 3 * d**2 + d,
        "exactly, for three hidden layers of D units, one output and no biases; two hidden layers and one output have two thirds",
        {"3 D^2 + D": 3 * d**2 + d, **readings},
    )


@claim("A9", "NUS", "LeNet on MNIST has 500 + 45,100 + 490,100 + 1,010 = 536,710 parameters")
def _():
    counts = by_module("lenet")
    total = sum(counts.values())
    return (
        list(counts.values()) == [500, 45_100, 490_100, 1_010] and total == 536_710,
        False,
        "",
        {**counts, "total": total},
    )


@claim(
    "A10.1",
    "NUS",
    "VGG for CIFAR: blocks of 38 K, 221 K and 885 K parameters, linear layers of 25.2 M",
)
def _():
    counts = by_module("convnet")
    sizes = {
        part: sum(count for name, count in counts.items() if name.startswith(part))
        for part in ("conv1", "conv2", "conv3", "linear")
    }
    sums = list(sizes.values())
    return (
        [math.floor(n / 1e3) for n in sums[:3]] == [38, 221, 885]
        and round(sums[3] / 1e6, 1) == 25.2,
        False,
        "linear layers of 4096, 4096 and 10 on 2 x 2 x 512 values, which four pools leave; 38,720 is cut to 38 K, not rounded",
        sizes,
    )


@claim("A10.2", "NUS", "VGG for CIFAR has 30 M parameters in total")
def _():
    one, two = parameters("convnet"), parameters("convnet_512x2")
    depth = {
        name: sum(layer.kind in ("Conv", "Dense") for layer in table(name))
        for name in ("convnet", "convnet_512x2")
    }
    return (
        round(one / 1e6) == 30,
        round(two / 1e6) == 30,
        f"with two 512-channel convolutions in the fourth block, as it is printed (11 layers: {two / 1e6:.1f} M); with the one that is "
        f"drawn, which makes the ten layers of its name, it has {one / 1e6:.1f} M",
        {"one convolution": one, "two convolutions": two, "layers": depth},
    )


@claim("A10.3", "NUS", "The fourth block's second convolution is 512x216x3x3")
def _():
    kernels = {
        name: variable_shapes(create_model("convnet_512x2"))["params"][name]["kernel"].shape
        for name in ("conv4a", "conv4b")
    }
    second = kernels["conv4b"]
    return (
        second == (3, 3, 216, 512),
        False,
        f"{second[3]}x{second[2]}x3x3; the first is 512x256x3x3",
        kernels,
    )


@claim(
    "A11", "WPI", "The tutorial's Net is 6-16-120-84-10 on 32x32x3, and flattens 16 * 5 * 5 values"
)
def _():
    params = variable_shapes(create_model("tutorial_net"))["params"]
    widths = [params[name]["kernel"].shape[-1] for name in ("conv1", "conv2", "fc1", "fc2", "fc3")]
    flat = params["fc1"]["kernel"].shape[0]
    holds = widths == [6, 16, 120, 84, 10] and flat == 16 * 5 * 5
    return holds, False, "", {"widths": widths, "flattened": flat}


@claim(
    "A12",
    "WPI",
    "The Keras ConvNet on 150x150x3: 896, 18,496, 73,856, 147,584, 3,211,776 and 513 parameters, 3,453,121 in total; "
    "maps of 148, 74, 72, 36, 34, 17, 15 and 7 pixels, 6272 values flattened",
)
def _():
    rows = table("keras_convnet")
    counts = [layer.parameters for layer in rows if layer.parameters]
    sizes = [layer.output[1] for layer in rows if len(layer.output) == 4]
    flat = math.prod(next(layer for layer in reversed(rows) if len(layer.output) == 4).output)
    holds = (
        counts == [896, 18_496, 73_856, 147_584, 3_211_776, 513]
        and sizes == [148, 74, 72, 36, 34, 17, 15, 7]
        and flat == 6272
        and sum(counts) == 3_453_121
    )
    return (
        holds,
        False,
        "",
        {"parameters": counts, "total": sum(counts), "sizes": sizes, "flattened": flat},
    )


@claim("A13", "WPI", "A convolution has ((m n d) + 1) k parameters")
def _():
    cases = list(itertools.product((1, 3, 5), (1, 3, 7), (1, 3, 16), (4, 10)))
    wrong = sum(
        tree_size(Conv(k, (m, n)), 1, 9, 9, d) != (m * n * d + 1) * k for m, n, d, k in cases
    )
    return wrong == 0, False, "", {"cases": len(cases), "cases that differ": wrong}


@claim(
    "A14.1",
    "UBC, UTSA, NUS",
    "AlexNet: 227x227x3, 55x55x96 with 35 K parameters, 27x27x96, 27x27x256, 13x13x256, 13x13x384 twice, "
    "13x13x256, 6x6x256, 4096, 4096, 1000",
)
def _():
    rows = summary.layers(create_model("alexnet_2012"))
    shapes = ["x".join(map(str, layer.output[1:])) for layer in rows]
    first = rows[1].parameters
    printed = "227x227x3 55x55x96 27x27x96 27x27x256 13x13x256 13x13x384 13x13x384 13x13x256 6x6x256 4096 4096 1000"
    holds = " ".join(shapes) == printed and round(first / 1e3) == 35
    return (
        holds,
        False,
        "",
        {"shapes": " ".join(shapes), "parameters of the first convolution": first},
    )


@claim("A14.2", "UBC", "AlexNet normalizes (LRN) after pools 1 and 2")
def _():
    model, x = (
        create_model("alexnet_2012"),
        1000 * jax.random.normal(jax.random.key(0), (1, 67, 67, 3)),
    )  # large enough for LRN to act
    variables = model.init(jax.random.key(1), x, method="stages", last="conv2")
    maps = model.apply(variables, x, method="stages", last="conv2")
    kernel, bias = variables["params"]["conv2"]["kernel"], variables["params"]["conv2"]["bias"]
    before = {
        "pool, then LRN": local_response_norm(max_pool(maps["conv1"], 3, 2)),
        "LRN, then pool": max_pool(local_response_norm(maps["conv1"]), 3, 2),
    }
    difference = {
        order: float(jnp.abs(nn.relu(conv(y, kernel, padding=2) + bias) - maps["conv2"]).max())
        for order, y in before.items()
    }
    return (
        False,
        difference["pool, then LRN"] < 1e-4 < difference["LRN, then pool"],
        "in the lectures' (and Caffe's) network, `alexnet_2012` here; the publication (section 3.5) normalizes before it pools",
        {"greatest difference in convolution 2": difference},
    )


@claim("A14.3", "UBC, UTSA, NUS", "AlexNet has 62 M parameters")
def _():
    whole, split = parameters("alexnet_2012"), parameters("alexnet_2012", groups=2)
    return (
        round(split / 1e6) == 62,
        round(whole / 1e6) == 62,
        f"without the two groups; as published, with convolutions 2, 4 and 5 split over two GPUs, it has {split / 1e6:.1f} M",
        {
            "one group": whole,
            "two groups": split,
            "torchvision's one-column form": parameters("alexnet"),
        },
    )


@claim(
    "A15.1",
    "UBC",
    "ZFNet is AlexNet with CONV1 7x7/2 for 11x11/4 and 512, 1024 and 512 filters in CONV3, 4 and 5",
)
def _():
    def convolutions(name):
        params = variable_shapes(create_model(name))["params"]
        return {f"conv{n}": params[f"conv{n}"]["kernel"].shape for n in range(1, 6)}

    zfnet, alexnet = convolutions("zfnet"), convolutions("alexnet_2012")
    strides = {
        name: [layer.stride[0] for layer in table(name) if layer.kind == "Conv"]
        for name in ("zfnet", "alexnet_2012")
    }
    printed = table(
        "alexnet_2012",
        convolutions=(
            (96, 7, 2, 0),
            (256, 5, 1, 2),
            (512, 3, 1, 1),
            (1024, 3, 1, 1),
            (512, 3, 1, 1),
        ),
    )
    literal = [row.output[1:3] for row in printed if row.kind == "Conv"][-1]
    changed = (
        zfnet["conv1"][:2] == (7, 7)
        and strides["zfnet"][0] == 2
        and [zfnet[f"conv{n}"][3] for n in (3, 4, 5)] == [512, 1024, 512]
    )
    return (
        changed and literal == (13, 13),
        changed,
        "with convolution 2 at stride 2 as well, as in figure 3 of Zeiler and Fergus: AlexNet changed only as printed has "
        f"{literal[0]}x{literal[1]} maps at convolution 5, not 13x13",
        {
            "zfnet": zfnet,
            "alexnet_2012": alexnet,
            "strides in pixels": strides,
            "map of convolution 5, changed as printed": literal,
        },
    )


@claim("A15.2", "UTSA", "ZFNet's CONV4 has 1025 filters")
def _():
    filters = variable_shapes(create_model("zfnet"))["params"]["conv4"]["bias"].size
    return (
        filters == 1025,
        False,
        f"{filters}, as the publication (section 4.3) and UBC have it",
        {"filters": filters},
    )


@claim("A16.1", "WPI, UBC, UTSA, Inha", "VGG-16 has 138 M parameters")
def _():
    total = parameters("vgg16")
    return round(total / 1e6) == 138, False, "", {"parameters": total}


@claim("A16.2", "UBC", "VGG-16 keeps 24 M activations, 96 MB, per image in the forward pass")
def _():
    rows = summary.layers(create_model("vgg16"))
    values = {
        kind: sum(math.prod(layer.output) for layer in rows if layer.kind == kind)
        for kind in ("input", "Conv", "max-pool", "Dense")
    }
    total = sum(values.values())
    rectified = total + values["Conv"] + values["Dense"] - 1000
    return (
        round(total / 1e6) == 24,
        round(rectified / 1e6) == 24,
        f"{total / 1e6:.1f} M values, {4 * total / 1e6:.0f} MB in float32, are all that the table's rows put out, input included; "
        f"{rectified / 1e6:.1f} M if every ReLU's output is kept beside its input",
        {**values, "total": total, "bytes": 4 * total, "with ReLUs kept apart": rectified},
    )


@claim("A16.3", "WPI, UBC", "VGG-16's first CONV3-128 has 3 * 3 * 64 * 64 weights")
def _():
    weights = variable_shapes(create_model("vgg16"))["params"]["features.5"]["kernel"].size
    return (
        weights == 3 * 3 * 64 * 64,
        False,
        f"3 * 3 * 64 * 128 = {weights:,}",
        {"weights": weights},
    )


@claim(
    "A17",
    "UTSA",
    "VGG's configurations A, A-LRN, B, C, D, E have 11, 11, 13, 16, 16 and 19 weight layers",
)
def _():
    names = {
        "A": "vgg11",
        "A-LRN": "vgg11_lrn",
        "B": "vgg13",
        "C": "vgg16_c",
        "D": "vgg16",
        "E": "vgg19",
    }
    depth = {column: len(by_module(name)) for column, name in names.items()}
    return list(depth.values()) == [11, 11, 13, 16, 16, 19], False, "", depth


@claim(
    "A18",
    "UBC",
    "Three stacked 3x3 convolutions see a 7x7 field with fewer parameters and more non-linearities than one 7x7 one",
)
def _():
    three, one = (summary.layers(Stack(sizes=sizes)) for sizes in ((3, 3, 3), (7,)))
    fields = [rows[-1].receptive_field for rows in (three, one)]
    counts = [summary.totals(rows)["parameters"] for rows in (three, one)]
    depth = [len(rows) - 1 for rows in (three, one)]
    return (
        fields[0] == fields[1] == (7, 7) and counts[0] < counts[1] and depth[0] > depth[1],
        False,
        "",
        {"fields": fields, "parameters at 64 channels": counts, "non-linearities": depth},
    )


@claim("A19.1", "UBC, NUS", "GoogLeNet has 22 layers")
def _():
    names = [layer.name for layer in table("googlenet_2014", aux_logits=False) if layer.parameters]
    modules = {name.split(".")[0] for name in names if name.startswith("inception")}
    depth = sum(not name.startswith("inception") for name in names) + 2 * len(modules)
    return (
        len(names) == 22,
        depth == 22,
        "with parameters, along the deepest path: two in each of the nine modules",
        {"depth": depth, "with parameters in all": len(names)},
    )


@claim("A19.2", "UBC", "GoogLeNet has no hidden fully connected layers")
def _():
    main, full = (
        sum(
            leaf.ndim == 2
            for leaf in jax.tree.leaves(
                variable_shapes(create_model("googlenet_2014", aux_logits=aux))
            )
        )
        for aux in (False, True)
    )
    return (
        full == 1,
        main == 1,
        "in the network that is used; each of the two auxiliary heads, used in training only, has a hidden layer of 1024 units",
        {"linear layers without auxiliary heads": main, "with": full},
    )


@claim("A19.3", "UBC", "GoogLeNet has 5 M parameters")
def _():
    main, full = parameters("googlenet_2014", aux_logits=False), parameters("googlenet_2014")
    convolutions = main - by_module("googlenet_2014")["fc"]
    return (
        round(main / 1e6) == 5,
        round(convolutions / 1e6) == 5,
        f"{main / 1e6:.1f} M without auxiliary heads, {full / 1e6:.1f} M with; the convolutions alone have {convolutions / 1e6:.1f} M",
        {"without auxiliary heads": main, "with": full, "convolutions": convolutions},
    )


@claim("A19.4", "UBC, NUS", "GoogLeNet has 12 times fewer parameters than AlexNet")
def _():
    alexnet = parameters("alexnet_2012")
    main, full = (alexnet / parameters("googlenet_2014", aux_logits=aux) for aux in (False, True))
    return (
        round(main) == 12,
        round(full) == 12,
        f"{main:.1f} times without auxiliary heads, {full:.1f} times with them; 12 is the ratio of the printed 62 M and 5 M",
        {"without auxiliary heads": main, "with": full},
    )


def inception(module: nn.Module) -> tuple[tuple[int, ...], int]:
    """Output shape and multiply-adds of an Inception module on 28x28x256."""
    shape = output_shape(lambda x: module.init_with_output(jax.random.key(0), x)[0], 1, 28, 28, 256)
    return shape[1:], summary.totals(summary.layers(module, (28, 28, 256)))["macs"]


@claim(
    "A20.1",
    "UBC",
    "The naive Inception module on 28x28x256 (128 1x1, 192 3x3, 96 5x5, pooling) puts out the channels of all its "
    "branches, more than it takes in",
)
def _():
    shape, macs = inception(NaiveInception((128, 192, 96)))
    holds = shape == (28, 28, 128 + 192 + 96 + 256)
    return (
        holds,
        False,
        f"{shape[2]} channels, {macs / 1e6:.0f} M multiply-adds",
        {"output": shape, "multiply-adds": macs},
    )


@claim("A20.2", "UBC", "1x1 bottlenecks save about 60 % of the naive Inception module's operations")
def _():
    naive = inception(NaiveInception((128, 192, 96)))[1]
    macs = {
        width: inception(Inception((128, width, 192, width, 96, width)))[1]
        for width in (64, 80, 96)
    }
    saved = {width: 1 - count / naive for width, count in macs.items()}
    twice = macs[64] + 28 * 28 * 192 * 9 * 64
    return (
        0.55 < saved[64] < 0.65,
        False,
        f"{saved[64]:.0%} with bottlenecks of 64 channels: {naive / 1e6:.0f} M multiply-adds become {macs[64] / 1e6:.0f} M; "
        f"{twice / 1e6:.0f} M, {1 - twice / naive:.0%} less, is what results if the 3x3 convolution is counted twice; 80 channels "
        f"would save {saved[80]:.0%}",
        {"naive": naive, "with bottlenecks of": macs, "saved": saved},
    )


@claim(
    "A21.1",
    "Inha, NUS",
    "ResNet: a stem, pairs of 3x3 convolutions, channels that double where the stride does, and FC-1000 alone",
)
def _():
    rows = table("resnet34")
    stages = {
        name: (layer.output[3], layer.stride[0])
        for name in ("layer1", "layer2", "layer3", "layer4")
        for layer in rows
        if layer.name == f"{name}.0.conv2"
    }
    params = variable_shapes(create_model("resnet34"))["params"]
    kernels = {
        params[block][name]["kernel"].shape[:2]
        for block in params
        if block.startswith("layer")
        for name in ("conv1", "conv2")
    }
    linear = [layer.output for layer in rows if layer.kind == "Dense"]
    holds = (
        kernels == {(3, 3)}
        and list(stages.values()) == [(64, 4), (128, 8), (256, 16), (512, 32)]
        and linear == [(1, 1000)]
    )
    return (
        holds,
        False,
        "shown on ResNet-34; from 50 layers on the pairs become bottlenecks",
        {"channels and stride": stages, "kernels": sorted(kernels), "linear": linear},
    )


@claim("A21.2", "NUS", "ResNet-152 has 60 M parameters")
def _():
    total = parameters("resnet152")
    return round(total / 1e6) == 60, False, "", {"parameters": total}


@claim(
    "A22",
    "Inha",
    "torchvision's networks, with torchvision's parameter counts, auxiliary heads included",
)
def _():
    printed = {
        "resnet18": 11_689_512,
        "alexnet": 61_100_840,
        "vgg16": 138_357_544,
        "squeezenet1_0": 1_248_424,
        "densenet161": 28_681_000,
        "inception_v3": 27_161_264,
        "googlenet": 13_004_888,
        "shufflenet_v2_x1_0": 2_278_604,
        "mobilenet_v2": 3_504_872,
        "resnext50_32x4d": 25_028_904,
        "wide_resnet50_2": 68_883_240,
        "mnasnet1_0": 4_383_312,
    }
    counts = {name: parameters(name) for name in printed}
    return counts == printed, False, "", counts


@claim(
    "A23",
    "WPI",
    "Most memory is in the early convolutions, most parameters are in the late fully connected layers",
)
def _():
    rows = table("vgg16")
    total = summary.totals(rows)
    early = (
        sum(layer.memory for layer in rows if layer.kind == "Conv" and layer.stride[0] <= 2)
        / total["memory"]
    )
    late = sum(layer.parameters for layer in rows if layer.kind == "Dense") / total["parameters"]
    return (
        early > 0.5 and late > 0.5,
        False,
        "in VGG-16",
        {
            "memory in the first four of 13 convolutions": early,
            "parameters in the fully connected layers": late,
        },
    )


@claim(
    "A24",
    "UBC",
    "A fully connected layer is neither invariant nor equivariant to translation; a convolution is equivariant",
)
def _():
    x, kernel = (
        jax.random.normal(jax.random.key(0), (1, 12, 12, 1)),
        jax.random.normal(jax.random.key(1), (3, 3, 1, 1)),
    )
    moved = jnp.roll(x, (2, 3), (1, 2))
    dense = Dense(144)
    variables = dense.init(jax.random.key(2), x.reshape(1, -1))
    before, after = (
        np.asarray(dense.apply(variables, image.reshape(1, -1))).reshape(12, 12)
        for image in (x, moved)
    )
    closest = min(
        float(np.abs(np.roll(before, (i, j), (0, 1)) - after).max())
        for i in range(12)
        for j in range(12)
    )
    difference = {}
    for fill in ("circular", "zeros"):
        still, shifted = (conv(image, kernel, padding=1, fill=fill) for image in (x, moved))
        difference[fill] = np.abs(plane(jnp.roll(still, (2, 3), (1, 2)) - shifted))
    border = np.ones((12, 12), bool)
    border[1:-1, 1:-1] = False  # of the moved image, and of the image before it moved
    border |= np.roll(border, (2, 3), (0, 1))
    inside, outside = (
        float(difference["zeros"][~border].max()),
        float(difference["zeros"][border].max()),
    )
    circular = float(difference["circular"].max())
    exact = closest > 0.1 and max(circular, inside) < 1e-5
    return (
        exact and outside < 1e-5,
        exact,
        "exactly so with circular padding, and with zeros away from the border only",
        {
            "dense, to the nearest shift": closest,
            "circular": circular,
            "zeros, inside": inside,
            "zeros, at the border": outside,
        },
    )


# --- B. The constructive position demo -----------------------------------------------------------------------------------

DIRECTIONS = {
    "from the left": 0,
    "from the bottom": 1,
    "from the right": 2,
    "from the top": 3,
}  # quarter turns of the filter
_SIZE = 7


def count_columns(
    image: np.ndarray, layers: int, direction: str = "from the left", fill: str = "zeros"
) -> np.ndarray:
    """`layers` one-channel 3x3 convolutions that each move the image by one pixel and add 1."""
    kernel = np.rot90(
        np.array([[0, 0, 0], [1, 0, 0], [0, 0, 0]], np.float32), DIRECTIONS[direction]
    )
    y = one_channel(image)
    for _ in range(layers):
        y = conv(y, jnp.asarray(kernel)[:, :, None, None], padding=1, fill=fill) + 1
    return plane(y)


def example_images(number: int = 5) -> np.ndarray:
    """Images with a margin of seven pixels, which only the network without padding uses up."""
    return (
        np.random.default_rng(0).integers(0, 10, (number, 3 * _SIZE, 3 * _SIZE)).astype(np.float32)
    )


def demo(image: np.ndarray, direction: str, fill: str) -> np.ndarray:
    """What seven layers make of the image's central 7x7 pixels."""
    return count_columns(
        image if fill == "none" else image[_SIZE:-_SIZE, _SIZE:-_SIZE], _SIZE, direction, fill
    )


@claim(
    "B1",
    "UBC",
    "Weight [0 0 0; 1 0 0; 0 0 0], bias 1, zero padding, any image: after layer 1 the first column is 1, after layer 2 the "
    "first two are 1 2, after layer 7 every row is 1 2 3 4 5 6 7",
)
def _():
    images = example_images()[:, _SIZE:-_SIZE, _SIZE:-_SIZE]
    first = [count_columns(image, depth)[:, :depth] for depth in (1, 2, 7) for image in images]
    holds = all(
        np.array_equal(columns, np.tile(np.arange(1, columns.shape[1] + 1), (7, 1)))
        for columns in first
    )
    wide = count_columns(example_images(1)[0], 7)
    return (
        holds and np.array_equal(wide, np.tile(np.arange(1, wide.shape[1] + 1), (len(wide), 1))),
        holds,
        "for images seven columns wide; of a wider one the first seven columns are counted and the others still hold the image",
        {
            "images": len(images),
            "first row after layers 1, 2, 7": [
                count_columns(images[0], depth)[0].tolist() for depth in (1, 2, 7)
            ],
        },
    )


@claim("B2", "UBC", "The same counts from each of the four sides")
def _():
    rows = {
        direction: [demo(image, direction, "zeros") for image in example_images()]
        for direction in DIRECTIONS
    }
    expected = np.tile(np.arange(1, 8), (7, 1))
    holds = all(
        np.array_equal(np.rot90(y, -DIRECTIONS[direction]), expected)
        for direction, maps in rows.items()
        for y in maps
    )
    return (
        holds,
        False,
        "with the filter turned",
        {direction: maps[0][[0, -1]].tolist() for direction, maps in rows.items()},
    )


@claim("B3", "UBC", "Without zero padding (reflect, replicate, circular, none) it fails")
def _():
    def spreads(fill):
        """Of every pixel over the images, for every direction."""
        images = example_images()
        return np.stack(
            [
                np.ptp([demo(image, direction, fill) for image in images], axis=0)
                for direction in DIRECTIONS
            ]
        )

    least, greatest = (
        {fill: float(side(spreads(fill))) for fill in FILLS} for side in (np.min, np.max)
    )
    fails = all(least[fill] > 0 for fill in ("reflect", "replicate", "circular", "none"))
    return (
        fails and greatest["zeros"] == 0,
        False,
        "every pixel still depends on the image; partial convolution pads with zeros too and counts, faster along the other borders",
        {"least spread of a pixel over five images": least, "greatest": greatest},
    )


# --- The report ----------------------------------------------------------------------------------------------------------


def findings() -> list[Finding]:
    """Every claim, computed and judged, in the order of the lectures' ledger."""
    return [find() for find in _CLAIMS]


def draw():
    """A figure of what seven layers make of one image, for every direction and fill."""
    from matplotlib.figure import Figure

    image = example_images(1)[0]
    figure = Figure(figsize=(2 * len(FILLS) + 0.6, 2 * len(DIRECTIONS) + 2.4), layout="constrained")
    axes = figure.subplots(len(DIRECTIONS) + 1, len(FILLS))
    for column, fill in enumerate(FILLS):
        maps = {
            "image": image[_SIZE:-_SIZE, _SIZE:-_SIZE],
            **{direction: demo(image, direction, fill) for direction in DIRECTIONS},
        }
        for ax, (label, values) in zip(axes[:, column], maps.items()):
            ax.imshow(values, cmap="viridis", vmin=0, vmax=16)
            for (i, j), value in np.ndenumerate(values):
                ax.text(
                    j,
                    i,
                    f"{value:.3g}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if value < 10 else "black",
                )
            ax.set(xticks=[], yticks=[])
            if column == 0:
                ax.set_ylabel(label)
        axes[0, column].set_title(fill)
    figure.suptitle(
        "Seven layers that move the image by one pixel and add 1: padded with zeros, they forget it and know the position"
    )
    return figure


def _value(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )


def report(found: list[Finding]) -> str:
    """The ledger as Markdown."""
    tally = ", ".join(
        f"{sum(finding.judgment == judgment for finding in found)} {judgment}"
        for judgment in (HOLDS, READING, WRONG)
    )
    lines = [
        "# The claims ledger",
        "",
        f"{len(found)} claims: {tally}.",
        "",
        "![Section B](position.png)",
        "",
        "| | source | claim | judgment | note | computed |",
        "|---|---|---|---|---|---|",
    ]
    for finding in found:
        cells = (
            finding.id,
            finding.source,
            finding.claim,
            f"**{finding.judgment}**",
            finding.note,
            _value(finding.computed),
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description="Computes and judges the lectures' claims.")
    parser.add_workdir("runs/claims")
    folder = parser.parse_args(arguments).workdir

    def work():
        backend.start()
        found = findings()
        folder.mkdir(parents=True, exist_ok=True)
        workdir.write_json(
            folder / "claims.json", [dataclasses.asdict(finding) for finding in found]
        )
        workdir.write_figure(folder / "position.png", draw())
        workdir.write(folder / "report.md", report(found))
        print(f"{len(found)} claims: see {folder / 'report.md'}")

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
