"""Every network of torchvision against its own outputs (tests/golden) and real weights."""

import argparse
import functools
import inspect
import json
import pathlib

import flax.traverse_util
import formula
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import quick

from cnnjax import weights
from cnnjax.data import arrays
from cnnjax.models import base, create_model
from cnnjax.nn import lowering
from experiments import probe

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "torchvision.npz")
NAMES = sorted(case.split("/")[0] for case in GOLDEN.files if case.endswith("/keys"))
# The smallest network of each kind of block; the others are the same code at other sizes. All are
# compared with torchvision's outputs here and trained in experiments/zoo.py. What takes longer
# (three steps, every fill, operation by operation) is asked of these.
KINDS = (
    "alexnet",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "squeezenet1_1",
    "vgg11",
    "vgg11_bn",
)
# One network for each form of convolution and pooling is compiled as users' programs are.
OPTIMIZED = (
    "alexnet/97",
    "googlenet/97",
    "mobilenet_v2/97",
    "resnet50/97",
    "resnext50_32x4d/97",
)
# Networks with one of each kind of operation also run operation by operation, up to a stage after
# which the same blocks repeat. Each operation would be compiled again for its own shape. DenseNet
# and Inception v3 run with fewer blocks (test_models.py).
EAGER = {
    "alexnet/97": "logits",
    "googlenet/97": "inception3b",
    "mobilenet_v2/97": "stage3",
    "resnet50/97": "layer2",
    "shufflenet_v2_x0_5/97": "stage2",
}
AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # ours -> torchvision's
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def golden_value(key: str, shape: tuple[int, ...]) -> jax.Array:
    """Returns the value that tests/golden/formula.py gives a parameter, in our axes."""
    order = AXES[len(shape)]
    theirs = formula.parameter(key, tuple(shape[axis] for axis in order))
    # jnp.asarray would compile a program for each shape.
    return jax.device_put(theirs.transpose(np.argsort(order)))


# Most of a VGG's values are in two dense layers, which are the same in all VGGs.
large_golden_value = functools.lru_cache(maxsize=2)(golden_value)


@functools.lru_cache(maxsize=1)
def golden_variables(name: str) -> dict:
    """Returns a network's variables with the values of tests/golden/formula.py."""
    shapes = weights.variable_shapes(create_model(name))
    flat = flax.traverse_util.flatten_dict(shapes)
    values = {}
    for key, path in weights.torchvision_keys(shapes).items():
        value = large_golden_value if flat[path].size > 1e7 else golden_value
        values[path] = value(key, flat[path].shape)
    return {"batch_stats": {}, **flax.traverse_util.unflatten_dict(values)}


def golden_images(batch: int, size: int, key: str = "input") -> np.ndarray:
    return formula.images(batch, size, key).transpose(0, 2, 3, 1)


def golden_keys(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns torchvision's keys and shapes, in its order."""
    lines = [line.split() for line in bytes(GOLDEN[f"{name}/keys"]).decode().splitlines()]
    return [(key, tuple(map(int, shape.split("x")))) for key, shape in lines]


def without_dropout(name: str, **fields):
    parameters = inspect.signature(base._REGISTRY[name]).parameters
    rates = [field for field in ("dropout", "dropout_aux") if field in parameters]
    return create_model(name, **dict.fromkeys(rates, 0.0), **fields)


@pytest.mark.parametrize(
    "name",
    [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_keys_and_shapes_are_torchvisions(name):
    shapes = weights.variable_shapes(create_model(name))
    flat = flax.traverse_util.flatten_dict(shapes)
    ours = {
        key: tuple(flat[path].shape[axis] for axis in AXES[len(flat[path].shape)])
        for key, path in weights.torchvision_keys(shapes).items()
    }
    assert ours == dict(golden_keys(name))


def test_networks_that_run_in_other_ways_have_golden_outputs():
    """Those that run operation by operation, and those that are compiled as users' programs are."""
    assert {f"{case}/eval" for case in (*EAGER, *OPTIMIZED)} <= {*GOLDEN.files}


@pytest.mark.parametrize("case", [case for case in GOLDEN.files if case.endswith("/eval")])
def test_golden_logits_depend_on_the_image(case):
    """They differ by a hundred times the error that `test_evaluation_is_torchvisions` allows."""
    first, second = GOLDEN[case]
    assert np.abs(second - first).max() > 1e-2 * np.abs(GOLDEN[case]).max()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in GOLDEN.files if case.endswith("/eval")])
def test_evaluation_is_torchvisions(case):
    """Logits of a compiled network equal the golden ones.

    Those of `EAGER` give the same for one image alone, operation by operation.
    """
    name, size, _ = case.split("/")
    model, images = create_model(name), golden_images(2, int(size))
    variables = golden_variables(name)
    compile_model = quick.optimized if f"{name}/{size}" in OPTIMIZED else jax.jit
    run = functools.partial(model.apply, method="_run", train=False)
    maps = compile_model(functools.partial(run, last="logits"))(variables, images)
    logits = maps["logits"]
    scale = np.abs(GOLDEN[case]).max()
    assert np.abs(logits - GOLDEN[case]).max() <= 1e-4 * scale
    if last := EAGER.get(f"{name}/{size}"):
        alone = run(variables, images[:1], last=last)[last]
        error = np.abs(alone - maps[last][:1]).max()
        assert error <= 1e-5 * np.abs(maps[last]).max()


# Training differs from evaluation by BatchNorm and auxiliary heads, dropout aside. test_models.py
# has the gradients of networks with neither, and of these, which repeat their blocks, with fewer
# or narrower ones.
DEEP = (
    "densenet121",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "vgg11_bn",
)
TRAINED = [
    case
    for case in GOLDEN.files
    if case.endswith("/train")
    and case.split("/")[0] in KINDS
    and case.replace("/train", "/statistics") in GOLDEN.files
]


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINED)
def test_training_is_torchvisions(case):
    """After three passes in training mode, logits and running statistics equal the golden ones.

    All parameters of the networks that are not in `DEEP` receive gradients.
    """
    name, size, _ = case.split("/")
    model = without_dropout(name)
    variables = golden_variables(name)
    params = variables["params"]
    state = {"batch_stats": variables["batch_stats"]}

    def loss(params, state, images):
        logits, new = model.apply(
            {"params": params, **state}, images, train=True, mutable=["batch_stats", "auxiliary"]
        )
        outputs = {"train": logits}
        for head, sown in new.get("auxiliary", {}).items():
            outputs[head] = sown["logits"]
        total = sum(jnp.square(output).sum() for output in outputs.values())
        return total, (outputs, {"batch_stats": new.get("batch_stats", {})})

    run = jax.jit(loss if name in DEEP else jax.grad(loss, has_aux=True))
    for number in range(3):
        images = golden_images(len(GOLDEN[case]), int(size), f"input {number}")
        result, (outputs, state) = run(params, state, images)

    heads = {key.split("/")[2] for key in GOLDEN.files if key.startswith(f"{name}/{size}/")}
    assert set(outputs) == heads - {"eval", "statistics"}
    for head, logits in outputs.items():
        expected = GOLDEN[f"{name}/{size}/{head}"]
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max(), head
    assert_statistics(name, size, state)
    if name not in DEEP:
        assert_gradients(result)


def assert_gradients(grads):
    """Checks that gradients are finite, and that every parameter has one that is not zero."""
    for path, grad in flax.traverse_util.flatten_dict(jax.device_get(grads), sep="/").items():
        assert np.isfinite(grad).all() and np.any(grad != 0), path


def assert_statistics(name, size, state):
    """Compares running statistics with torchvision's, of which the golden file has digests."""
    paths = weights.torchvision_keys(state)
    flat = flax.traverse_util.flatten_dict(state)
    running = [key for key, _ in golden_keys(name) if "running_" in key]
    assert (f"{name}/{size}/statistics" in GOLDEN.files) == bool(running) == bool(flat)
    statistics = GOLDEN[f"{name}/{size}/statistics"] if running else ()
    for key, expected in zip(running, statistics, strict=True):
        digest = formula.digest(key, flat[paths[key]])
        np.testing.assert_allclose(digest, expected, rtol=0, atol=1e-4 * expected[2], err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*KINDS} - {"resnet18", "squeezenet1_0", "vgg11"}))
def test_initialization_has_torchvisions_distributions(name):
    """Compares mean, spread and family of each parameter.

    A uniform distribution ends at sqrt(3) standard deviations, JAX's truncated normal at 2.27; a
    normal one reaches 2.5 in 500 draws. Networks that differ from one of these in numbers only are
    left out, and vgg11, which is vgg11_bn without BatchNorm.
    """
    model = create_model(name)
    shapes = weights.variable_shapes(model)
    image = jnp.zeros((1, *model.input_shape))
    # Where there are most numbers to draw, LLVM's optimization takes less time than it saves.
    compile_init = quick.optimized if name in ("alexnet", "vgg11_bn") else jax.jit
    # An initialization computes no map, and the plain forms take less time to trace.
    with lowering("reference"):
        variables = compile_init(lambda key: model.init(key, image))(quick.key(0))
    flat = flax.traverse_util.flatten_dict(variables)
    paths = weights.torchvision_keys(shapes)
    keys = [key for key, _ in golden_keys(name) if "running_" not in key]
    for key, (mean, std, largest) in zip(keys, GOLDEN[f"{name}/moments"], strict=True):
        values = np.asarray(flat[paths[key]])
        if std == 0:
            assert (values == mean).all(), key
            continue
        # Six standard errors of the difference of two samples, and for the smallest ones less.
        error = min(6 * np.sqrt(2 / values.size), 0.5)
        spread = values.std()
        assert abs(values.mean() - mean) <= error * std, key
        assert abs(spread / std - 1) <= error, key
        if values.size >= 500:
            # np.abs would copy the largest kernels.
            reach = max(values.max(), -values.min())
            assert (reach / spread < 2.5) == (largest / std < 2.5), key
    for path, values in flat.items():
        if path[0] == "batch_stats":
            assert (values == (0 if path[-1] == "mean" else 1)).all(), path


@pytest.mark.slow
def test_squeezenet_with_real_weights(data_dir):
    """The published network has its reference output and its accuracy on 500 photographs."""
    folder = data_dir / "weights"
    model = create_model("squeezenet1_1")
    variables = weights.load_torchvision(folder / "squeezenet1_1_imagenet.safetensors", model)
    apply = quick.optimized(model.apply)
    pair = np.load(folder / "squeezenet1_1_test_vector.npz")
    example = pair["input_0"].transpose(0, 2, 3, 1)
    largest = 290  # logit
    files = sorted((data_dir / "imagenet_sample").glob("*.*"))
    assert len(files) == 500
    labels = np.array([int(file.name.split("_")[0]) for file in files])
    answers = []
    for start in range(0, 500, 50):
        images = [PIL.Image.open(file).convert("RGB") for file in files[start : start + 50]]
        images = (np.stack(images) / np.float32(255) - MEAN) / STD
        # The example is in every batch: alone it would be a second program.
        logits = apply(variables, np.concatenate([example, images]))
        error = np.abs(logits[0] - pair["output_0"].ravel()).max()
        assert error <= 2e-4 * largest
        answers.append(logits[1:].argmax(1))
    assert (np.concatenate(answers) == labels).sum() == 306


def test_the_probe_extracts_features_when_they_are_needed(monkeypatch):
    """A finished study prints its report without them."""
    images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)
    split = arrays.Split(images, np.arange(60) % 10)
    data = arrays.Dataset(split, None, split, tuple("abcdefghij"))
    monkeypatch.setattr(arrays, "load", lambda *arguments: data)
    monkeypatch.setattr(probe, "open_features", lambda path: (path, {}))
    extracted = []

    def extract(model, variables, images, size):
        extracted.append(model)
        return images.reshape(len(images), 1)

    monkeypatch.setattr(probe, "extract", extract)
    options = argparse.Namespace(
        weights="file", data_dir="", train=50, test=20, repeats=1, size=8, workdir=None
    )
    shared = probe.load(options)
    assert not extracted
    train, test = shared.features("ImageNet")
    shared.features("ImageNet")
    # The features of the training and of the test images, each once.
    assert extracted == ["file", "file"]
    assert train.shape == (50, 1) and test[:, 0].tolist() == list(range(20))
    assert (shared.train.labels == train[:, 0] % 10).all()


class Optimized(probe.Parallel):
    """On one device, with programs that are compiled as users' are."""

    def __init__(self):
        super().__init__("jit")

    def compile(self, function, **counts):
        return quick.optimized(functools.partial(function, self.axis_name))


@pytest.mark.slow
def test_mobilenets_real_features_tell_cifar_classes_apart(data_dir, tmp_path, monkeypatch):
    """A linear probe on 120 images is far better with real weights than with random ones."""
    file = data_dir / "weights" / "mobilenet_v2_features_imagenet.safetensors"
    with pytest.raises(ValueError, match=r"not in the file: classifier.1.weight"):
        weights.load_torchvision(file, create_model("mobilenet_v2"))
    # Batches without filling, on one device.
    monkeypatch.setattr(probe, "_BATCH", 60)
    monkeypatch.setattr(probe, "Parallel", Optimized)
    # quick.key would call itself.
    monkeypatch.setattr(jax.random, "key", functools.partial(jax.random.key, impl=quick._HASH))
    probe.main(
        [
            "--weights",
            str(file),
            "--data_dir",
            str(data_dir),
            "--workdir",
            str(tmp_path),
            "--train",
            "120",
            "--test",
            "60",
            "--repeats",
            "1",
        ]
    )
    results = json.loads((tmp_path / "probe.json").read_text())
    trained, untrained = [result["accuracy"] for result in results]
    assert trained > 0.5 > 0.35 > untrained
    assert "| ImageNet | " in (tmp_path / "report.md").read_text()
