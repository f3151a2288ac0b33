"""The networks: shapes, parameters, memory, operations."""

import math

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import summary
from cnnjax.models import Network, create_model
from cnnjax.models.googlenet_2014 import Inception, NaiveInception
from cnnjax.nn import Conv, conv, local_response_norm, max_pool
from cnnjax.nn.parameters import eval_shape
from cnnjax.weights import list_weights, variable_shapes
from experiments.claims.ledger import Section, Verdict, judge
from experiments.claims.operations import layers, module_shape, pooled_size

NETWORKS = Section("Networks: shapes, parameters, memory, operations")


def layers_without_input(name: str, **fields) -> tuple[summary.Layer, ...]:
    """Returns a network's layers without the input."""
    return layers(name, **fields)[1:]


def parameters(name: str, **fields) -> int:
    shapes = variable_shapes(create_model(name, **fields))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def by_layer(name: str) -> dict[str, int]:
    """Returns the number of parameters by layer; layers without parameters are left out."""
    return {row.name: row.parameters for row in layers_without_input(name) if row.parameters}


def kernel_shape(name: str, layer: str) -> tuple[int, ...]:
    return variable_shapes(create_model(name))["params"][layer]["kernel"].shape


def windows(name: str) -> list[tuple[str, int, int, int]]:
    """Returns kind, size, stride, and padding of a chain's convolutions and max-pools."""
    chain = [row for row in layers(name) if row.receptive_field]
    found = []
    for before, row in zip(chain, chain[1:]):
        step = before.stride[0]
        size = (row.receptive_field[0] - before.receptive_field[0]) // step + 1
        stride = row.stride[0] // step
        # The least padding that gives the output's size.
        missing = (row.output[1] - 1) * stride + size - before.output[1]
        found.append((row.kind, size, stride, max(0, math.ceil(missing / 2))))
    return found


def shape_text(row: summary.Layer) -> str:
    return "x".join(str(size) for size in row.output[1:])


def millions(count: float) -> int:
    return round(count / 1e6)


# ---------------------------------------------------------------------------------------------
# LeNet


@NETWORKS.claim(
    "A9", "NUS", "The lecture's LeNet: 500 + 45,100 + 490,100 + 1,010 = 536,710 parameters"
)
def lenet_parameters() -> Verdict:
    counts = by_layer("lenet")
    total = sum(counts.values())
    holds = list(counts.values()) == [500, 45_100, 490_100, 1_010] and total == 536_710
    return judge(holds, {**counts, "total": total})


@NETWORKS.claim(
    "A52", "NUS", "The lecture's LeNet: 50x28x28, 50x14x14, 100x14x14, 100x7x7, then 4,900 values"
)
def lenet_shapes() -> Verdict:
    shapes = [row.output[1:] for row in layers_without_input("lenet") if len(row.output) == 4]
    flat = math.prod(shapes[-1])
    expected = [(28, 28, 50), (14, 14, 50), (14, 14, 100), (7, 7, 100)]
    return judge(
        shapes == expected and flat == 4900,
        {"shapes": shapes, "flattened": flat},
        note="the slide prints a ReLU after each convolution, both of which it calls CL1, and none "
        "between the linear layers; ours has one there, as the lecture's VGG has",
    )


@NETWORKS.claim("A50", "NUS", "LeNet-5 takes 28x28 images and has 0.6 M parameters")
def lenet5_size() -> Verdict:
    model = create_model("lenet5")
    count = parameters("lenet5")
    size = model.input_shape[0]
    ours = parameters("lenet")
    return judge(
        size == 28 and round(count / 1e6, 1) == 0.6,
        {"input": size, "parameters": count, "the lecture's own LeNet": ours},
        note=f"LeNet-5 of 1998 takes {size}x{size} and has {count:,}; the lecture's own network "
        f"takes 28x28 and has {ours / 1e6:.2f} M",
    )


@NETWORKS.claim("A51", "NUS UBC", "LeNet-5 is conv, pool, conv, pool, and fully connected layers")
def lenet5_layers() -> Verdict:
    model = create_model("lenet5")
    kinds = {row.name: row.kind for row in layers_without_input("lenet5")}
    shapes = variable_shapes(model)["params"]
    after_pools = {
        "c5": shapes["c5"]["kernel"].shape[-1],
        "f6": shapes["f6"]["kernel"].shape[-1],
        "output": model.num_classes,
    }
    first_layers = list(kinds.values())[:4]
    units = ", ".join(str(count) for count in after_pools.values())
    return judge(
        False,
        {"layers": kinds, "units after the pools": after_pools},
        as_read=first_layers == ["Conv", "Subsample", "TableConv", "Subsample"],
        note=f"after the second pool LeNet-5 has {len(after_pools)} layers ({units} units), where "
        "NUS draws two and UBC one. Its pools sum each 2x2 square with trained coefficients, where "
        "NUS has max-pools",
    )


@NETWORKS.claim("A51.1", "UBC", "LeNet-5 has 5x5 filters at stride 1 and 2x2 pools at stride 2")
def lenet5_sizes() -> Verdict:
    rows = {row.name: row for row in layers_without_input("lenet5")}
    ours = {}
    expected = {}
    field, stride = 1, 1
    for name, size, step in (("c1", 5, 1), ("s2", 2, 2), ("c3", 5, 1), ("s4", 2, 2)):
        field += (size - 1) * stride
        stride *= step
        expected[name] = {"field": field, "stride": stride}
        ours[name] = {"field": rows[name].receptive_field[0], "stride": rows[name].stride[0]}
    return judge(
        ours == expected,
        {"receptive field and stride after each layer": ours},
        note="these sizes and strides follow from the receptive fields",
    )


# ---------------------------------------------------------------------------------------------
# The ConvNet ("VGG") for CIFAR


@NETWORKS.claim(
    "A53", "NUS", "VGG for CIFAR: blocks end at 64x16x16, 128x8x8, 256x4x4, and 512x2x2"
)
def convnet_shapes() -> Verdict:
    shapes = [row.output[1:] for row in layers_without_input("convnet") if row.kind == "max-pool"]
    expected = [(16, 16, 64), (8, 8, 128), (4, 4, 256), (2, 2, 512)]
    return judge(shapes == expected, {"shapes": shapes})


@NETWORKS.claim("A55", "NUS", "VGG for CIFAR has four convolutional layers")
def convnet_depth() -> Verdict:
    kinds = [row.kind for row in layers_without_input("convnet")]
    convolutions = kinds.count("Conv")
    return judge(
        convolutions == 4,
        {"convolutions": convolutions},
        as_read=kinds.count("max-pool") == 4,
        note=f"four blocks, with {convolutions} convolutions",
    )


@NETWORKS.claim(
    "A10.1",
    "NUS",
    "VGG for CIFAR: blocks of 38 K, 221 K, and 885 K parameters, linear layers of 25.2 M",
)
def convnet_blocks() -> Verdict:
    counts = by_layer("convnet")
    sizes = {}
    for part in ("conv1", "conv2", "conv3", "linear"):
        sizes[part] = sum(count for name, count in counts.items() if name.startswith(part))
    thousands = [math.floor(sizes[part] / 1e3) for part in ("conv1", "conv2", "conv3")]
    holds = thousands == [38, 221, 885] and round(sizes["linear"] / 1e6, 1) == 25.2
    return judge(
        holds,
        sizes,
        note="linear layers of 4096, 4096, and 10 units on 2x2x512 values; 38,720 is cut to 38 K",
    )


@NETWORKS.claim("A54", "NUS", "The fourth block of VGG for CIFAR has 3.3 M parameters")
def convnet_fourth_block() -> Verdict:
    counts = {}
    for name in ("convnet", "convnet_512x2"):
        counts_by_layer = by_layer(name).items()
        counts[name] = sum(count for layer, count in counts_by_layer if layer.startswith("conv4"))
    printed = 512 * 216 * 9 + 512 + 512 * 512 * 9 + 512
    return judge(
        math.floor(counts["convnet_512x2"] / 1e5) == 33,
        {
            "drawn": counts["convnet"],
            "two convolutions": counts["convnet_512x2"],
            "as printed": printed,
        },
        note=f"{counts['convnet_512x2'] / 1e6:.2f} M with two convolutions and "
        f"{counts['convnet'] / 1e6:.2f} M "
        "with the one that is drawn; 3.36 M results from the misprint 216 for 256",
    )


@NETWORKS.claim("A10.2", "NUS", "VGG for CIFAR has ten layers and 30 M parameters")
def convnet_total() -> Verdict:
    one = parameters("convnet")
    two = parameters("convnet_512x2")
    depth = {}
    for name in ("convnet", "convnet_512x2"):
        depth[name] = sum(row.kind in ("Conv", "Dense") for row in layers_without_input(name))
    return judge(
        millions(one) == 30 and depth["convnet"] == 10,
        {"one convolution": one, "two convolutions": two, "layers": depth},
        as_read=millions(two) == 30,
        note=f"{two / 1e6:.1f} M with two 512-channel convolutions, which makes 11 layers; the "
        f"ten layers that are drawn have {one / 1e6:.1f} M",
    )


@NETWORKS.claim(
    "A10.3", "NUS", "The fourth block's first convolution of VGG for CIFAR is 512x216x3x3"
)
def convnet_misprint() -> Verdict:
    rows, columns, inputs, outputs = kernel_shape("convnet_512x2", "conv4a")
    return judge(
        inputs == 216,
        {"kernel": (outputs, inputs, rows, columns)},
        note=f"{outputs}x{inputs}x{rows}x{columns}",
    )


# ---------------------------------------------------------------------------------------------
# Perceptrons


@NETWORKS.claim("A59.1", "NUS", "A one-layer perceptron for CIFAR-10 has 0.03 M parameters")
def one_layer_perceptron() -> Verdict:
    count = parameters("mlp1")
    return judge(round(count / 1e6, 2) == 0.03, {"parameters": count})


@NETWORKS.claim("A59.2", "NUS", "A three-layer perceptron for CIFAR-10 has 2 M parameters")
def three_layer_perceptron() -> Verdict:
    count = parameters("mlp3")
    return judge(
        False,
        {"parameters": count},
        as_read=millions(count) == 2,
        note=f"rounded, for two hidden layers of 512 units ({count / 1e6:.2f} M); the lecture "
        "prints no widths",
    )


# ---------------------------------------------------------------------------------------------
# Tutorials


@NETWORKS.claim(
    "A11",
    "WPI",
    "The PyTorch tutorial's Net: 6, 16, 120, 84, and 10 features on 32x32x3, with 16 * 5 * 5 = "
    "400 values flattened",
)
def tutorial_net() -> Verdict:
    names = ("conv1", "conv2", "fc1", "fc2", "fc3")
    widths = [kernel_shape("tutorial_net", name)[-1] for name in names]
    flat = kernel_shape("tutorial_net", "fc1")[0]
    holds = widths == [6, 16, 120, 84, 10] and flat == 16 * 5 * 5
    return judge(holds, {"widths": widths, "flattened": flat})


@NETWORKS.claim(
    "A12",
    "WPI",
    "The Keras ConvNet on 150x150x3: 896, 18,496, 73,856, 147,584, 3,211,776, and 513 parameters, "
    "3,453,121 in total; maps of 148, 74, 72, 36, 34, 17, 15, and 7 pixels; 6272 values flattened",
)
def keras_convnet() -> Verdict:
    rows = layers_without_input("keras_convnet")
    counts = [row.parameters for row in rows if row.parameters]
    maps = [row.output for row in rows if len(row.output) == 4]
    sizes = [shape[1] for shape in maps]
    flat = math.prod(maps[-1])
    holds = (
        counts == [896, 18_496, 73_856, 147_584, 3_211_776, 513]
        and sum(counts) == 3_453_121
        and sizes == [148, 74, 72, 36, 34, 17, 15, 7]
        and flat == 6272
    )
    return judge(
        holds, {"parameters": counts, "total": sum(counts), "sizes": sizes, "flattened": flat}
    )


# ---------------------------------------------------------------------------------------------
# AlexNet and ZFNet


@NETWORKS.claim(
    "A14.1",
    "UBC UTSA",
    "AlexNet: 227x227x3, 55x55x96 (35 K parameters), 27x27x96, 27x27x256, 13x13x256, 13x13x384 "
    "twice, 13x13x256, 6x6x256, 4096, 4096, 1000; filters of 11x11 (stride 4, pad 0), 5x5 (pad 2), "
    "and 3x3 (pad 1); max-pools of 3x3 (stride 2)",
)
def alexnet_shapes() -> Verdict:
    rows = layers("alexnet_2012")
    shapes = " ".join(shape_text(row) for row in rows)
    first = rows[1].parameters
    printed = (
        "227x227x3 55x55x96 27x27x96 27x27x256 13x13x256 13x13x384 13x13x384 13x13x256 6x6x256 "
        "4096 4096 1000"
    )
    pool = ("max-pool", 3, 2, 0)
    three = ("Conv", 3, 1, 1)
    printed_windows = [("Conv", 11, 4, 0), pool, ("Conv", 5, 1, 2), pool, three, three, three, pool]
    ours = windows("alexnet_2012")
    holds = shapes == printed and round(first / 1e3) == 35 and ours == printed_windows
    return judge(
        holds,
        {
            "shapes": shapes,
            "parameters of the first convolution": first,
            "size, stride, and padding": ours,
        },
    )


@NETWORKS.claim(
    "A47",
    "UBC",
    "AlexNet's first max-pool has 96 11x11 filters at stride 4; its output is 27x27x96",
)
def alexnet_pool() -> Verdict:
    sizes = {"11x11, stride 4": pooled_size(55, 11, 4), "3x3, stride 2": pooled_size(55, 3, 2)}
    return judge(
        sizes["11x11, stride 4"] == 27,
        sizes,
        note="the pool is 3x3 at stride 2, as the same lecture's summary says; 11x11 at stride 4 "
        f"would leave {sizes['11x11, stride 4']}x{sizes['11x11, stride 4']}",
    )


@NETWORKS.claim("A14.2", "UBC UTSA", "AlexNet normalizes (LRN) after its first and second max-pool")
def alexnet_normalization() -> Verdict:
    model = create_model("alexnet_2012")
    # The values are large enough for the normalization to matter.
    x = 1000 * jax.random.normal(jax.random.key(0), (1, 67, 67, 3))
    variables = model.init(jax.random.key(1), x, method="stages", last="conv2")
    maps = model.apply(variables, x, method="stages", last="conv2")
    kernel = variables["params"]["conv2"]["kernel"]
    bias = variables["params"]["conv2"]["bias"]
    inputs = {
        "pool, then LRN": local_response_norm(max_pool(maps["conv1"], 3, 2)),
        "LRN, then pool": max_pool(local_response_norm(maps["conv1"]), 3, 2),
    }
    difference = {}
    for order, y in inputs.items():
        expected = jax.nn.relu(conv(y, kernel, padding=2) + bias)
        difference[order] = float(jnp.abs(expected - maps["conv2"]).max())
    return judge(
        False,
        {"greatest difference in convolution 2": difference},
        as_read=difference["pool, then LRN"] < 1e-4 < difference["LRN, then pool"],
        note="in the lectures' (and Caffe's) network; the publication (section 3.5) normalizes "
        "before it pools",
    )


@NETWORKS.claim("A14.3", "NUS", "AlexNet has 62 M parameters")
def alexnet_parameters() -> Verdict:
    whole = parameters("alexnet_2012")
    split = parameters("alexnet_2012", groups=2)
    return judge(
        millions(split) == 62,
        {"one group": whole, "two groups": split, "torchvision's form": parameters("alexnet")},
        as_read=millions(whole) == 62,
        note="without groups; as published, with convolutions 2, 4, and 5 split over two GPUs, "
        f"it has {split / 1e6:.1f} M",
    )


@NETWORKS.claim(
    "A48", "NUS", "AlexNet has 7 convolutional layers, 3 max-pools, and 2 fully connected layers"
)
def alexnet_layers() -> Verdict:
    kinds = [row.kind for row in layers_without_input("alexnet_2012")]
    counts = {kind: kinds.count(kind) for kind in ("Conv", "max-pool", "Dense")}
    return judge(
        counts == {"Conv": 7, "max-pool": 3, "Dense": 2},
        counts,
        note="5 convolutions, 3 max-pools, 3 fully connected layers",
    )


@NETWORKS.claim("A49", "NUS", "VGG, GoogLeNet, and ResNet take 227x227x3 images")
def input_sizes() -> Verdict:
    sizes = {}
    for name in ("alexnet_2012", "vgg16", "googlenet_2014", "resnet152"):
        sizes[name] = create_model(name).input_shape[0]
    return judge(
        all(sizes[name] == 227 for name in ("vgg16", "googlenet_2014", "resnet152")),
        sizes,
        note="224x224x3; only AlexNet, as the lectures draw it, takes 227",
    )


@NETWORKS.claim(
    "A15.1",
    "UBC UTSA",
    "ZFNet is AlexNet with 7x7 filters at stride 2 first, and 512, 1024, 512 filters in "
    "convolutions 3 to 5",
)
def zfnet() -> Verdict:
    def convolutions(name):
        return {f"conv{n}": kernel_shape(name, f"conv{n}") for n in range(1, 6)}

    first = next(row for row in layers_without_input("zfnet") if row.kind == "Conv")
    ours = convolutions("zfnet")
    changed = (
        ours["conv1"][:2] == (7, 7)
        and first.stride[0] == 2
        and [ours[f"conv{n}"][3] for n in (3, 4, 5)] == [512, 1024, 512]
    )
    # AlexNet with only these changes.
    literally = layers_without_input(
        "alexnet_2012",
        convolutions=(
            (96, 7, 2, 0),
            (256, 5, 1, 2),
            (512, 3, 1, 1),
            (1024, 3, 1, 1),
            (512, 3, 1, 1),
        ),
    )
    last = [row.output[1:3] for row in literally if row.kind == "Conv"][-1]
    return judge(
        changed and last == (13, 13),
        {"zfnet": ours, "map of convolution 5, changed as printed": last},
        as_read=changed,
        note="with convolution 2 at stride 2 as well (Zeiler and Fergus 2013, figure 3): AlexNet "
        f"with only the printed changes has {last[0]}x{last[1]} maps at convolution 5, not 13x13",
    )


@NETWORKS.claim("A15.2", "UTSA", "ZFNet's fourth convolution has 1025 filters")
def zfnet_misprint() -> Verdict:
    filters = kernel_shape("zfnet", "conv4")[3]
    return judge(
        filters == 1025,
        {"filters": filters},
        note=f"{filters}, as the publication (section 4.3) and UBC have it",
    )


# ---------------------------------------------------------------------------------------------
# VGG. Four lectures print the same table; each of its rows is a claim.

VGG16_TABLE = (
    # (row, shape, memory as printed, weights as printed)
    ("input", (224, 224, 3), 150e3, 0),
    ("CONV3-64, first", (224, 224, 64), 3.2e6, 1_728),
    ("CONV3-64, second", (224, 224, 64), 3.2e6, 36_864),
    ("POOL2 to 112", (112, 112, 64), 800e3, 0),
    ("CONV3-128, first", (112, 112, 128), 1.6e6, 73_728),
    ("CONV3-128, second", (112, 112, 128), 1.6e6, 147_456),
    ("POOL2 to 56", (56, 56, 128), 400e3, 0),
    ("CONV3-256, first", (56, 56, 256), 800e3, 294_912),
    ("CONV3-256, second", (56, 56, 256), 800e3, 589_824),
    ("CONV3-256, third", (56, 56, 256), 800e3, 589_824),
    ("POOL2 to 28", (28, 28, 256), 200e3, 0),
    ("CONV3-512, first", (28, 28, 512), 400e3, 1_179_648),
    ("CONV3-512, second", (28, 28, 512), 400e3, 2_359_296),
    ("CONV3-512, third", (28, 28, 512), 400e3, 2_359_296),
    ("POOL2 to 14", (14, 14, 512), 100e3, 0),
    ("CONV3-512, fourth", (14, 14, 512), 100e3, 2_359_296),
    ("CONV3-512, fifth", (14, 14, 512), 100e3, 2_359_296),
    ("CONV3-512, sixth", (14, 14, 512), 100e3, 2_359_296),
    ("POOL2 to 7", (7, 7, 512), 25e3, 0),
    ("FC, first", (4096,), 4096, 102_760_448),
    ("FC, second", (4096,), 4096, 16_777_216),
    ("FC-1000", (1000,), 1000, 4_096_000),
)


def weights_without_biases(row: summary.Layer) -> int:
    """Returns a layer's weights; it has as many biases as output channels."""
    return row.parameters - row.output[-1] if row.parameters else 0


@NETWORKS.claim(
    "A16.1", "WPI UBC Inha NUS", "VGG-16 has 138 M parameters and 16 layers with weights"
)
def vgg16_parameters() -> Verdict:
    total = parameters("vgg16")
    depth = len(by_layer("vgg16"))
    return judge(millions(total) == 138 and depth == 16, {"parameters": total, "layers": depth})


@NETWORKS.claim(
    "A16.2", "WPI UBC Inha", "VGG-16 keeps 24 M activations, 96 MB, per image in the forward pass"
)
def vgg16_memory() -> Verdict:
    values: dict[str, int] = {}
    for row in layers("vgg16"):
        values[row.kind] = values.get(row.kind, 0) + math.prod(row.output)
    total = sum(values.values())
    # The last layer has no ReLU.
    with_relus = total + values["Conv"] + values["Dense"] - 1000
    return judge(
        millions(total) == 24,
        {**values, "total": total, "bytes": 4 * total, "with ReLUs kept apart": with_relus},
        as_read=millions(with_relus) == 24,
        note=f"the rows of the table sum to {total / 1e6:.1f} M values, {4 * total / 1e6:.0f} MB "
        f"in float32, input included; {with_relus / 1e6:.1f} M if each ReLU's output is kept "
        "beside its input",
    )


def add_vgg16_row(number: int, row: tuple) -> None:
    """Adds the claim of one row of the table."""
    name, shape, memory, weights = row

    @NETWORKS.claim(
        f"A16.4.{number + 1}",
        "WPI UBC UTSA Inha",
        f"VGG-16, {name}: output {'x'.join(map(str, shape))}, {memory:,.0f} values, {weights:,} "
        "weights",
    )
    def vgg16_row() -> Verdict:
        layer = layers("vgg16")[number]
        values = math.prod(layer.output)
        ours = weights_without_biases(layer)
        # The table rounds memory to two digits.
        near = abs(values - memory) < 0.01 * memory
        holds = layer.output[1:] == shape and near and ours == weights
        return judge(holds, {"output": layer.output[1:], "values": values, "weights": ours})


for _number, _row in enumerate(VGG16_TABLE):
    add_vgg16_row(_number, _row)


@NETWORKS.claim(
    "A23",
    "WPI",
    "Most memory is in the early convolutions, most parameters in the late fully connected layers",
)
def vgg16_where() -> Verdict:
    rows = layers_without_input("vgg16")
    total = summary.totals(rows)
    # The first two blocks have two convolutions each; their maps have strides 1 and 2.
    early = [row.memory for row in rows if row.kind == "Conv" and row.stride[0] <= 2]
    late = [row.parameters for row in rows if row.kind == "Dense"]
    shares = {
        "memory in the first four of 13 convolutions": sum(early) / total["memory"],
        "parameters in the fully connected layers": sum(late) / total["parameters"],
    }
    return judge(min(shares.values()) > 0.5, shares, note="in VGG-16")


# Columns of the configuration table (Simonyan and Zisserman 2014, table 1) -> our networks.
CONFIGURATIONS = {
    "A": "vgg11",
    "A-LRN": "vgg11_lrn",
    "B": "vgg13",
    "C": "vgg16_c",
    "D": "vgg16",
    "E": "vgg19",
}
# Numbers of convolutions in blocks 1 to 5, for each column of UTSA's two tables.
UTSA_TABLES = {
    "first table": {
        "A": (1, 1, 2, 2, 2),
        "A-LRN": (1, 1, 2, 2, 2),
        "B": (2, 1, 2, 2, 2),
        "C": (2, 2, 3, 3, 3),
        "D": (2, 2, 3, 3, 3),
        "E": (2, 2, 4, 4, 4),
    },
    "second table": {
        "A": (1, 1, 1, 1, 1),
        "A-LRN": (1, 1, 1, 2, 2),
        "B": (2, 2, 2, 2, 2),
        "C": (2, 2, 2, 2, 3),
        "D": (2, 2, 2, 3, 3),
        "E": (2, 2, 3, 4, 4),
    },
}
# As the headers of both tables have them.
UTSA_WEIGHT_LAYERS = {"A": 11, "A-LRN": 11, "B": 13, "C": 16, "D": 16, "E": 19}


@NETWORKS.claim(
    "A17",
    "UTSA",
    "VGG's configurations A, A-LRN, B, C, D, E have 11, 11, 13, 16, 16, and 19 weight layers",
)
def configurations() -> Verdict:
    depth = {column: len(by_layer(name)) for column, name in CONFIGURATIONS.items()}
    return judge(list(depth.values()) == [11, 11, 13, 16, 16, 19], depth)


def convolutions_by_block(name: str) -> tuple[int, ...]:
    """Returns the numbers of convolutions in the five blocks of a VGG."""
    blocks = [0] * 5
    for row in layers_without_input(name):
        if row.kind == "Conv":
            # The stride doubles from block to block.
            blocks[int(math.log2(row.stride[0]))] += 1
    return tuple(blocks)


@NETWORKS.claim(
    "A57",
    "UTSA",
    "VGG's configuration table, printed twice: the convolutions of each block under headers with "
    "the number of weight layers",
)
def configuration_tables() -> Verdict:
    right = {column: convolutions_by_block(name) for column, name in CONFIGURATIONS.items()}
    different = {}
    for printed, columns in UTSA_TABLES.items():
        different[printed] = [column for column in right if columns[column] != right[column]]
    # Columns that differ in the second table, by block.
    wrong: dict[int, list[str]] = {}
    for column, blocks in UTSA_TABLES["second table"].items():
        for number, (ours, theirs) in enumerate(zip(right[column], blocks), 1):
            if theirs != ours:
                wrong.setdefault(number, []).append(column)
    wrong_rows = "; ".join(
        f"row {number} of {', '.join(columns)}" for number, columns in sorted(wrong.items())
    )
    right_columns = [column for column in right if column not in different["second table"]]
    # A VGG ends in three linear layers.
    depth = {column: sum(blocks) + 3 for column, blocks in right.items()}
    # Lines that are lost from a text leave too few convolutions, never too many.
    only_lost = True
    for columns in UTSA_TABLES.values():
        for column, blocks in columns.items():
            only_lost &= all(theirs <= ours for ours, theirs in zip(right[column], blocks))
    has_right_headers = depth == UTSA_WEIGHT_LAYERS
    return judge(
        has_right_headers and not any(different.values()),
        {
            "convolutions by block": right,
            "columns that differ": different,
            "weight layers in both headers": UTSA_WEIGHT_LAYERS,
        },
        as_read=has_right_headers and only_lost,
        note="by the headers of its columns, which give the right numbers of weight layers. The "
        "rows, as their text reads, contradict these headers, probably because repeated lines "
        "were lost when the text was extracted: the first table lacks one 3x3-128 in column B; "
        "the second is right only in column "
        f"{', '.join(right_columns)} and lacks one convolution each in {wrong_rows} (rows of "
        "convolutions, from the top)",
    )


@NETWORKS.claim("A57.1", "UBC", "VGG16 and VGG19, as drawn: two 3x3 convolutions of 256 channels")
def drawn_vgg() -> Verdict:
    # Convolutions by block, as drawn.
    drawn = {"vgg16": (2, 2, 2, 3, 3), "vgg19": (2, 2, 2, 4, 4)}
    right = {name: convolutions_by_block(name) for name in drawn}
    # A VGG ends in three linear layers.
    depth = {name: sum(blocks) + 3 for name, blocks in drawn.items()}
    return judge(
        drawn == right,
        {"convolutions by block": right, "weight layers as drawn": depth},
        note=f"{right['vgg16'][2]} in VGG16, as the same lecture's table has it, and "
        f"{right['vgg19'][2]} in VGG19; the drawn networks have {depth['vgg16']} and "
        f"{depth['vgg19']} weight layers",
    )


@NETWORKS.claim(
    "A56",
    "WPI UTSA NUS",
    "VGG has only 3x3 convolutions of stride 1 and pad 1, and 2x2 max-pools of stride 2",
)
def only_three_by_three() -> Verdict:
    # Sorted: convolutions before max-pools.
    ours = {column: sorted(set(windows(name))) for column, name in CONFIGURATIONS.items()}
    stated = [("Conv", 3, 1, 1), ("max-pool", 2, 2, 0)]
    others = [column for column in ours if ours[column] != stated]
    return judge(
        not others,
        {"size, stride, and padding": ours},
        as_read=others == ["C"] and ours["C"] == [("Conv", 1, 1, 0), *stated],
        note="in all configurations but C, which also has 1x1 convolutions",
    )


@NETWORKS.claim(
    "A58",
    "UBC",
    "From AlexNet (8 layers) to VGG (16 or 19) networks get deeper and filters smaller (3x3)",
)
def deeper() -> Verdict:
    depth = {name: len(by_layer(name)) for name in ("alexnet_2012", "vgg16", "vgg19")}
    largest = {}
    for name in ("alexnet_2012", "vgg16"):
        params = variable_shapes(create_model(name))["params"]
        shapes = [layer["kernel"].shape for layer in params.values() if "kernel" in layer]
        largest[name] = max(shape[0] for shape in shapes if len(shape) == 4)
    holds = list(depth.values()) == [8, 16, 19] and largest["vgg16"] == 3
    return judge(holds, {"layers": depth, "largest filter": largest})


class Stack(Network):
    """A chain of convolutions of the given sizes, padded to keep the size of the map."""

    sizes: tuple[int, ...] = (3, 3, 3)
    width: int = 64
    input_shape: tuple[int, int, int] = (32, 32, 64)

    @nn.nowrap
    def walk(self, x, train):
        for number, size in enumerate(self.sizes, 1):
            layer = Conv(
                self.width, size, padding=size // 2, fill=self.padding, name=f"conv{number}"
            )
            x = jax.nn.relu(layer(x))
        yield "logits", x


@NETWORKS.claim(
    "A18",
    "UBC",
    "Three stacked 3x3 convolutions see the 7x7 field of one 7x7 convolution, with fewer "
    "parameters and more nonlinearities",
)
def stacked() -> Verdict:
    three = summary.layers(Stack(sizes=(3, 3, 3)))
    one = summary.layers(Stack(sizes=(7,)))
    fields = [three[-1].receptive_field, one[-1].receptive_field]
    three_parameters = summary.totals(three)["parameters"]
    one_parameters = summary.totals(one)["parameters"]
    # Each layer but the input ends in a ReLU.
    three_relus = len(three) - 1
    one_relus = len(one) - 1
    has_fewer_parameters = three_parameters < one_parameters
    holds = fields == [(7, 7), (7, 7)] and has_fewer_parameters and three_relus > one_relus
    return judge(
        holds,
        {
            "fields": fields,
            "parameters at 64 channels": [three_parameters, one_parameters],
            "nonlinearities": [three_relus, one_relus],
        },
    )


# ---------------------------------------------------------------------------------------------
# GoogLeNet


@NETWORKS.claim("A19.1", "UBC NUS", "GoogLeNet has 22 layers")
def googlenet_depth() -> Verdict:
    rows = layers_without_input("googlenet_2014", aux_logits=False)
    names = [row.name for row in rows if row.parameters]
    modules = {name.split(".")[0] for name in names if name.startswith("inception")}
    outside = [name for name in names if not name.startswith("inception")]
    depth = len(outside) + 2 * len(modules)
    return judge(
        len(names) == 22,
        {"deepest path": depth, "layers with parameters in all": len(names)},
        as_read=depth == 22,
        note="counted along the deepest path: two layers with parameters in each of the nine "
        "modules",
    )


def linear_layers(auxiliary: bool) -> int:
    shapes = variable_shapes(create_model("googlenet_2014", aux_logits=auxiliary))
    return sum(leaf.ndim == 2 for leaf in jax.tree.leaves(shapes))


@NETWORKS.claim("A19.2", "UBC", "GoogLeNet has no fully connected layers")
def googlenet_linear() -> Verdict:
    main = linear_layers(False)
    full = linear_layers(True)
    return judge(
        main == full == 0,
        {"linear layers without auxiliary heads": main, "with": full},
        as_read=main == 1,
        note="no hidden ones: one linear layer of 1000 outputs remains. Each auxiliary head, used "
        "in training only, has a hidden layer of 1024 units",
    )


@NETWORKS.claim("A19.3", "UBC NUS", "GoogLeNet has 5 M parameters")
def googlenet_parameters() -> Verdict:
    main = parameters("googlenet_2014", aux_logits=False)
    full = parameters("googlenet_2014")
    convolutions = main - by_layer("googlenet_2014")["fc"]
    return judge(
        millions(main) == 5,
        {"without auxiliary heads": main, "with": full, "convolutions": convolutions},
        as_read=millions(convolutions) == 5,
        note=f"{main / 1e6:.1f} M without auxiliary heads and {full / 1e6:.1f} M with them; the "
        f"convolutions alone have {convolutions / 1e6:.1f} M",
    )


@NETWORKS.claim("A19.4", "UBC", "GoogLeNet has 12 times fewer parameters than AlexNet")
def googlenet_ratio() -> Verdict:
    alexnet = parameters("alexnet_2012")
    main = alexnet / parameters("googlenet_2014", aux_logits=False)
    full = alexnet / parameters("googlenet_2014", aux_logits=True)
    return judge(
        round(main) == 12,
        {"without auxiliary heads": main, "with": full},
        as_read=round(full) == 12,
        note=f"{main:.1f} times without auxiliary heads, {full:.1f} times with them; the "
        "publication's introduction (Szegedy et al. 2014) says 12, too",
    )


def inception(module: nn.Module) -> tuple[tuple[int, ...], int]:
    """Returns output shape and multiply-adds of an Inception module on 28x28x256."""
    rows = summary.layers(module, (28, 28, 256))
    return module_shape(module, 1, 28, 28, 256)[1:], summary.totals(rows)["macs"]


@NETWORKS.claim(
    "A20.1",
    "UBC",
    "The naive Inception module on 28x28x256 joins 28x28x128, 28x28x192, 28x28x96, and the "
    "pooled input: more than it takes in",
)
def naive_inception() -> Verdict:
    shape, macs = inception(NaiveInception((128, 192, 96)))
    return judge(
        shape == (28, 28, 128 + 192 + 96 + 256),
        {"output": shape, "multiply-adds": macs},
        note=f"{shape[2]} channels, {macs / 1e6:.0f} M multiply-adds",
    )


@NETWORKS.claim(
    "A20.2", "UBC", "1x1 bottlenecks save about 60 % of the naive Inception module's computation"
)
def bottlenecks() -> Verdict:
    naive = inception(NaiveInception((128, 192, 96)))[1]
    macs = {}
    for width in (64, 80, 96):
        macs[width] = inception(Inception((128, width, 192, width, 96, width)))[1]
    saved = {width: 1 - count / naive for width, count in macs.items()}
    # The figure that is often quoted counts the 3x3 convolution twice.
    twice = macs[64] + 28 * 28 * 192 * 9 * 64
    near = [0.55 < share < 0.65 for share in saved.values()]
    # The text gives no width, so the claim is decided only if all widths agree.
    holds = all(near)
    return judge(
        None if any(near) and not holds else holds,
        {"naive": naive, "with bottlenecks of": macs, "saved": saved},
        undecided=f"the text gives no width: {saved[80]:.0%} with bottlenecks of 80 channels; with "
        f"the usual 64, {naive / 1e6:.0f} M multiply-adds become {macs[64] / 1e6:.0f} M, "
        f"{saved[64]:.0%} less (counting the 3x3 convolution twice gives {twice / 1e6:.0f} M, "
        f"{1 - twice / naive:.0%} less)",
    )


# ---------------------------------------------------------------------------------------------
# ResNet and torchvision's networks


@NETWORKS.claim(
    "A21.1",
    "Inha",
    "ResNet: a stem, residual blocks, filters that double where the stride does, and only "
    "FC-1000 at the end",
)
def resnet_structure() -> Verdict:
    rows = layers_without_input("resnet34")
    stages = {}
    for name in ("layer1", "layer2", "layer3", "layer4"):
        row = next(row for row in rows if row.name == f"{name}.0.conv2")
        stages[name] = (row.output[3], row.stride[0])
    linear = [row.output for row in rows if row.kind == "Dense"]
    holds = list(stages.values()) == [(64, 4), (128, 8), (256, 16), (512, 32)]
    return judge(
        holds and linear == [(1, 1000)] and rows[0].name == "conv1",
        {"channels and stride": stages, "linear layers": linear},
        note="shown on ResNet-34",
    )


@NETWORKS.claim("A21.2", "Inha", "Every residual block has two 3x3 convolutions")
def residual_blocks() -> Verdict:
    blocks = {}
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        params = variable_shapes(create_model(name))["params"]["layer1.0"]
        convolutions = [key for key in sorted(params) if key.startswith("conv")]
        blocks[name] = [params[key]["kernel"].shape[:2] for key in convolutions]
    pairs = [name for name in blocks if blocks[name] == [(3, 3), (3, 3)]]
    return judge(
        len(pairs) == len(blocks),
        blocks,
        as_read=pairs == ["resnet18", "resnet34"],
        note="in ResNet-18 and -34; from 50 layers on a block is 1x1, 3x3, 1x1",
    )


@NETWORKS.claim("A21.3", "NUS", "ResNet-152 has 152 layers and 60 M parameters")
def resnet152() -> Verdict:
    rows = [row for row in layers_without_input("resnet152") if row.kind in ("Conv", "Dense")]
    depth = sum("downsample" not in row.name for row in rows)
    total = parameters("resnet152")
    return judge(
        depth == 152 and millions(total) == 60,
        {"layers": depth, "parameters": total},
        note="the four 1x1 convolutions on shortcuts are not counted",
    )


@NETWORKS.claim("A21.4", "Inha", "A ResNet can be trained on images of any size")
def any_size() -> Verdict:
    sizes = (1, 32, 75, 224, 227, 258, 259, 300)
    works = {}
    for name in ("resnet18", "vgg16", "alexnet", "alexnet_2012"):
        model = create_model(name)
        variables = variable_shapes(model)
        works[name] = [size for size in sizes if accepts(model, variables, size)]
    fixed = works["alexnet_2012"]
    return judge(
        works["resnet18"] == list(sizes),
        works,
        note="shown on ResNet-18's outputs in training, from 1 to 300 pixels; its last pool is "
        "global. torchvision's VGG and AlexNet take other sizes too, by "
        f"adaptive pooling, as long as anything is left; the AlexNet of 2012 takes {fixed[0]} to "
        f"{fixed[-1]}",
    )


def accepts(model: Network, variables: dict, size: int) -> bool:
    """Returns whether the network, in training, accepts images of `size` x `size` pixels."""
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)

    def outputs(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        y, _ = model.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return y

    try:
        return eval_shape(outputs, variables, images).shape == (2, 1000)
    except (ValueError, TypeError, flax.errors.FlaxError):
        # A wrong size.
        return False


@NETWORKS.claim(
    "A60", "UBC", "Transfer to C classes, as drawn: the re-initialized last layer is FC-1000"
)
def transferred_head() -> Verdict:
    classes = 10
    head = variable_shapes(create_model("vgg16", num_classes=classes))["params"]["classifier.6"]
    inputs, outputs = head["kernel"].shape
    return judge(
        outputs == 1000,
        {"classes": classes, "kernel of VGG-16's last layer": (inputs, outputs)},
        note="FC-C: the new last layer has as many outputs as there are classes",
    )


TORCHVISION = {
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


@NETWORKS.claim("A22", "Inha", "The twelve torchvision networks can be built by name")
def torchvision_networks() -> Verdict:
    counts = {name: parameters(name) for name in TORCHVISION}
    return judge(
        counts == TORCHVISION,
        counts,
        note="each with torchvision's number of parameters, auxiliary heads included",
    )


@NETWORKS.claim(
    "A22.1", "Inha", "`pretrained=True` gives each of the twelve networks trained weights"
)
def pretrained_networks() -> Verdict:
    known = {record.network for record in list_weights() if record.tag == "imagenet1k_v1"}
    missing = [name for name in TORCHVISION if name not in known]
    return judge(
        not missing,
        {"networks without weights": missing},
        note="torchvision now calls these weights IMAGENET1K_V1; here, they are the tag "
        "imagenet1k_v1",
    )
