"""Networks used elsewhere: in loops of one's own, in Flax NNX, and through jax.export."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import test_models

from cnnjax import nn
from cnnjax.models import create_model
from cnnjax.models.mlp import MLP
from cnnjax.models.small import SmallResNet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

DOCS = pathlib.Path(__file__).parents[1] / "docs"
RATE = 0.1


def draw_images(*shape: int) -> jax.Array:
    return quick.normal(0, 2, *shape)


def loss_of(logits: jax.Array) -> jax.Array:
    labels = jnp.arange(len(logits))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# LeNet is plain, the ResNet has BatchNorm in modules of modules, and the MLP has dropout.
@pytest.mark.parametrize(
    "model, shape",
    [
        pytest.param(create_model("lenet", num_classes=10), (28, 28, 1), id="lenet"),
        pytest.param(SmallResNet(widths=(4, 8)), (16, 16, 3), id="resnet"),
        pytest.param(MLP(hidden=(16,), dropout=0.5), (4, 4, 3), id="mlp"),
    ],
)
def test_a_training_step_of_nnx_is_that_of_linen(model, shape):
    # Imported here, since every worker of the tests collects this module.
    from flax import nnx

    images = draw_images(*shape)

    @nnx.jit
    def create():
        rngs = nnx.Rngs(params=0, dropout=1)
        return nnx.bridge.ToNNX(model, rngs=rngs).lazy_init(images)

    network = create()
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    variables = {name: nnx.to_pure_dict(nnx.state(network, kind)) for name, kind in kinds.items()}
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, shapes["params"])
    # The dropout key that the network will draw next.
    dropout = nnx.clone(network).to_nnx__rngs.dropout()
    graph, state = nnx.split(network)

    @jax.jit
    def step_nnx(state):
        network = nnx.merge(graph, state)
        optimizer = nnx.Optimizer(network, optax.sgd(RATE), wrt=nnx.Param)
        loss, gradients = nnx.value_and_grad(
            lambda network: loss_of(network(images, train=True, mutable=["batch_stats"]))
        )(network)
        optimizer.update(network, gradients)
        return loss, {
            name: nnx.to_pure_dict(nnx.state(network, kind)) for name, kind in kinds.items()
        }

    @jax.jit
    def step_linen(variables):
        def loss(params):
            logits, new = model.apply(
                variables | {"params": params},
                images,
                train=True,
                rngs={"dropout": dropout},
                mutable=["batch_stats"],
            )
            return loss_of(logits), new.get("batch_stats", {})

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - RATE * g, variables["params"], gradients)
        return value, {"params": params, "batch_stats": statistics}

    # As NumPy's arrays, since to compare jax's compiles a program for each shape.
    loss, new = jax.device_get(step_nnx(state))
    expected_loss, expected = jax.device_get(step_linen(variables))
    before = jax.device_get(variables)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    jax.tree.map(
        lambda value, right: np.testing.assert_allclose(value, right, rtol=1e-4, atol=1e-5),
        new,
        expected,
    )
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), new, before)
    assert any(jax.tree.leaves(moved["params"]))


@pytest.mark.parametrize(
    "name, shape, padding",
    [
        # Every operation is exported in test_lowering.py.
        ("resnet18", (64, 64, 3), "reflect"),
        ("mobilenet_v2", (32, 32, 3), "replicate"),
        ("squeezenet1_1", (64, 64, 3), "circular"),
        ("densenet121", (32, 32, 3), "symmetric"),
    ],
)
def test_an_exported_network_computes_the_same_for_every_batch_size(
    name, shape, padding, monkeypatch
):
    model = test_models.shallow(name, monkeypatch).clone(padding=padding)
    images = draw_images(*shape)
    variables = quick.variables(model, images)
    (batch,) = jax.export.symbolic_shape("batch")
    with nn.lowering("reference"):
        exported = jax.export.export(jax.jit(model.apply), platforms=("cpu", "cuda", "tpu"))(
            variables, jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
        )
    opened = jax.export.deserialize(exported.serialize())
    assert opened.platforms == ("cpu", "cuda", "tpu")
    expected = jax.jit(model.apply)(variables, images)
    logits = jax.jit(opened.call)(variables, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_onnx_files_compute_the_same():
    """The page's example, and five networks.

    In a process of their own: jax2onnx changes functions of other packages, and warns.
    """
    if not all(map(importlib.util.find_spec, ("jax2onnx", "onnxruntime"))):
        pytest.skip("jax2onnx and onnxruntime are not installed")
    done = subprocess.run(
        [sys.executable, "tests/onnx_files.py", "docs/export.md"],
        cwd=DOCS.parent,
        env=quick.environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["page"]
    assert len(results["networks"]) == 5
    for name, difference in results["networks"].items():
        assert difference <= 1e-4, name


@pytest.mark.parametrize("page", ["nnx.md", "export.md"])
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch):
    text = (DOCS / page).read_text()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "jax2onnx" not in block:
            exec(block, names)
    assert names["is_same"]


def test_the_loop_for_those_from_pytorch_trains(tmp_path, monkeypatch):
    text = (DOCS / "pytorch.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    # A smaller network, and what it begins with.
    changes = {
        '"resnet18"': '"cnnjax.models.small:SmallResNet"',
        '"fc"': '"head"',
        "optimizer_state = optimizer.init": "first = variables\noptimizer_state = optimizer.init",
    }
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for old, new in changes.items():
            block = block.replace(old, new)
        exec(block, names)
    assert names["accuracy"] > 0.8
    assert {"kernel", "bias"} == set(names["gradients"])
    assert all(np.any(value) for value in names["gradients"].values())
    for name in ("params", "batch_stats"):
        first, last = names["first"][name], names["variables"][name]
        assert not jax.tree.all(jax.tree.map(np.array_equal, first, last))
    assert jax.tree.all(jax.tree.map(np.array_equal, names["variables"], names["loaded"]))
