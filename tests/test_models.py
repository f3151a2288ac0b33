"""Every model held to one contract, and to torchvision's own outputs."""
import pathlib

import flax.traverse_util
import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import weights
from cnnjax.models import create_model, list_models

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "torchvision.npz")

# Published counts; torchvision's where it has the network.
PARAMETERS = {
    "vgg11": 132_863_336, "vgg11_bn": 132_868_840, "vgg11_lrn": 132_863_336, "vgg13": 133_047_848, "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544, "vgg16_bn": 138_365_992, "vgg16_c": 133_638_952, "vgg19": 143_667_240, "vgg19_bn": 143_678_248,
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808,
}


def small_size(name: str) -> int:
    """An image small enough for a quick test that every stage still has something of."""
    return 64 if name.startswith("resnet") else 32


def golden_variables(model) -> dict:
    """A model's variables with the values of tests/golden/formula.py."""
    flat = flax.traverse_util.flatten_dict(weights.variable_shapes(model))
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # ours -> torchvision's
    values = {}
    for key, path in weights.torchvision_keys(weights.variable_shapes(model)).items():
        order = axes[len(flat[path].shape)]
        theirs = formula.parameter(key, tuple(flat[path].shape[axis] for axis in order))
        values[path] = jnp.asarray(theirs.transpose(np.argsort(order)))
    return {"batch_stats": {}, **flax.traverse_util.unflatten_dict(values)}


@pytest.mark.parametrize("name", list_models())
def test_parameter_count(name):
    shapes = weights.variable_shapes(create_model(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == PARAMETERS[name]


@pytest.mark.parametrize("case", [case for case in GOLDEN.files if case.endswith("/eval")])
def test_logits_are_torchvisions(case):
    name, size, _ = case.split("/")
    model = create_model(name)
    logits = jax.jit(model.apply)(golden_variables(model), formula.images(2, int(size)).transpose(0, 2, 3, 1))
    assert np.abs(logits - GOLDEN[case]).max() <= 1e-4 * np.abs(GOLDEN[case]).max()


@pytest.mark.parametrize("name", list_models())
def test_every_parameter_receives_a_finite_gradient(name):
    model = create_model(name, num_classes=7)
    x = jax.random.normal(jax.random.key(1), (2, small_size(name), small_size(name), 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def loss(params):
        logits, _ = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)})
        assert logits.shape == (2, 7) and logits.dtype == jnp.float32
        return jnp.square(logits).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert np.isfinite(value)
    for path, grad in flax.traverse_util.flatten_dict(grads, sep="/").items():
        assert np.isfinite(grad).all() and np.any(grad != 0), path


@pytest.mark.parametrize("name, size, shapes", [
    ("vgg16", 64, {"block1": (64, 64), "block2": (32, 128), "block3": (16, 256), "block4": (8, 512), "block5": (4, 512)}),
    ("vgg11_lrn", 64, {"block1": (64, 64), "block2": (32, 128), "block3": (16, 256), "block4": (8, 512), "block5": (4, 512)}),
    ("resnet18", 64, {"stem": (32, 64), "layer1": (16, 64), "layer2": (8, 128), "layer3": (4, 256), "layer4": (2, 512)}),
    ("resnet50", 64, {"stem": (32, 64), "layer1": (16, 256), "layer2": (8, 512), "layer3": (4, 1024), "layer4": (2, 2048)}),
])
def test_stages_have_their_names_sizes_and_channels(name, size, shapes):
    model = create_model(name)
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = weights.variable_shapes(model)
    stages = jax.eval_shape(lambda v, x: model.apply(v, x, method="stages"), variables, x)
    assert list(stages) == list(shapes)
    assert {stage: (y.shape[1], y.shape[3]) for stage, y in stages.items()} == shapes
    last = list(shapes)[2]
    early = jax.eval_shape(lambda v, x: model.apply(v, x, method="stages", last=last), variables, x)
    assert list(early) == list(shapes)[:3]


@pytest.mark.parametrize("name, size", [("vgg16", 224), ("resnet18", 435), ("resnet50", 427)])
def test_without_padding_maps_shrink_to_the_last_pixel(name, size):
    """VGG-16's last block is 2x2 at 224; 435 and 427 are the least images that ResNet-18 and -50 reduce to one pixel."""
    model = create_model(name, padding="none")
    shapes = lambda size: jax.eval_shape(lambda v, x: model.apply(v, x, method="stages"), weights.variable_shapes(model),
                                         jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    last = list(shapes(size).values())[-1]
    assert last.shape[1] == (2 if name == "vgg16" else 1)
    if name != "vgg16":
        with pytest.raises(ValueError, match="too small for this network"):
            shapes(size - 1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_cropped_skip_is_centred_on_its_branch(name):
    """Without padding, features of a shifted image are the shifted features wherever strides divide the shift."""
    model = create_model(name, padding="none")
    image = jax.random.normal(jax.random.key(0), (1, 239, 239, 3))
    variables = jax.jit(lambda x: model.init(jax.random.key(1), x, method="stages", last="layer2"))(image)
    run = jax.jit(lambda x: model.apply(variables, x, method="stages", last="layer2")["layer2"])
    whole, part = run(image), run(image[:, 8:, 8:])
    np.testing.assert_allclose(whole[:, 1:, 1:][:, :part.shape[1], :part.shape[2]], part, atol=1e-4 * float(jnp.abs(part).max()))
    flipped = run(image[:, ::-1, ::-1])
    assert flipped.shape == whole.shape


@pytest.mark.parametrize("fill", ["zeros", "none", "reflect", "replicate", "circular", "partial"])
@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn", "resnet18", "resnet50"])
def test_every_fill_reaches_every_convolution_and_pool(name, fill):
    """On a constant image only zeros (and partial) can make a feature map vary: one layer left out would show."""
    last = "layer2" if name.startswith("resnet") else "block4"
    model = create_model(name, padding=fill)
    x = jnp.full((1, 160, 160, 3), 0.7)
    variables = jax.jit(lambda: create_model(name).init(jax.random.key(0), x, method="stages", last=last))()
    y = jax.jit(lambda x: model.apply(variables, x, method="stages", last=last)[last])(x)
    varies = float(jnp.ptp(y, axis=(1, 2)).max() / jnp.abs(y).max())
    assert varies > 0.1 if fill in ("zeros", "partial") else varies < 1e-5


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_bfloat16_computes_near_float32_with_float32_parameters(name):
    x = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    variables = jax.jit(create_model(name).init)(jax.random.key(0), x)
    exact = jax.jit(create_model(name).apply)(variables, x)
    half = jax.jit(create_model(name, dtype=jnp.bfloat16).apply)(variables, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables)) and half.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(half - exact).max() / jnp.abs(exact).max()) < 0.1


def test_listing_and_wrong_names():
    assert list_models("*vgg*") == sorted(name for name in list_models() if "vgg" in name) != []
    for message, call in {
        "model='vgg61' is not known; did you mean vgg19 or vgg16 or vgg13": lambda: create_model("vgg61"),
        "model='zzz' is not known; known models: ": lambda: create_model("zzz"),
        "fill='zeros' is not a field of vgg16; it accepts num_classes, padding": lambda: create_model("vgg16", fill="zeros"),
        "padding='mirror' is not one of zeros, none": lambda: create_model("vgg16", padding="mirror"),
        "num_classes=0 is not a positive number": lambda: create_model("vgg16", num_classes=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="last='conv9' is not a stage of this network; its stages are block1, block2"):
        jax.eval_shape(lambda x: create_model("vgg11").init(jax.random.key(0), x, method="stages", last="conv9"), jnp.ones((1, 32, 32, 3)))
