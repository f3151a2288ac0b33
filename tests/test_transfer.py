"""Transfer: parts loaded, frozen, or trained at their own rates; and its study."""

import argparse
import hashlib
import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import safetensors.numpy
from flax.traverse_util import flatten_dict
from test_train import MOMENTS, Tiny, some_data

import configs.lenet_digits
from cnnjax import ridge, transfer, weights
from cnnjax import study as frame
from cnnjax.data import arrays
from cnnjax.models import base, create_model
from cnnjax.nn import BatchNorm
from cnnjax.runtime import files, imagenet, workdir
from cnnjax.runtime.paths import sha256
from cnnjax.train import check, defaults, loop, step
from cnnjax.train.checkpoints import Checkpoints
from cnnjax.train.data import moments_of
from cnnjax.train.optimizers import OPTIMIZERS, optimizer
from cnnjax.train.training import build_run
from experiments import transfer as study

pytestmark = pytest.mark.usefixtures("standard_promotion")
MODEL = Tiny(num_classes=5)


def names_of(model, paths) -> set[str]:
    """Returns torchvision's names of the variables at `paths`."""
    keys = weights.torchvision_keys(weights.variable_shapes(model))
    return {key for key, path in keys.items() if path in paths}


def keys(model, parts) -> set[str]:
    """Returns torchvision's names of the selected parts' variables."""
    return names_of(model, transfer.select(model, parts))


def small_batch() -> tuple[np.ndarray, np.ndarray]:
    """Returns 16 images and their labels."""
    images, labels = some_data()
    return images[:16], labels[:16]


def as_batch(images, labels, learning_rate) -> step.Batch:
    return step.Batch(
        images=images,
        labels=labels,
        moments=MOMENTS,
        learning_rate=learning_rate,
        steps_per_epoch=4,
    )


def steps(recipe, numbers=None, count=3, rate=0.1, pretrained=None):
    """Trains for a few steps on one batch; returns the states before and after."""
    images, labels = small_batch()
    numbers = numbers or step.Numbers(seed=1, weight_decay=1e-2, ema_decay=0.9)
    before = step.init(recipe, (8, 8, 3), numbers, pretrained)
    state = before
    run = jax.jit(
        lambda state: step.batch_step(
            recipe, state, as_batch(images, labels, jnp.float32(rate)), numbers
        )
    )
    for _ in range(count):
        state = run(state)
    return before, state


def changed(before: dict, after: dict) -> set[str]:
    """Returns the names of the leaves that differ between two trees in any bit."""
    before = flatten_dict(before, sep=".")
    after = flatten_dict(after, sep=".")
    assert before.keys() == after.keys()
    to_bytes = lambda leaf: np.asarray(leaf).tobytes()
    return {name for name in before if to_bytes(before[name]) != to_bytes(after[name])}


# ------------------------------------------------------------------ parts


def test_a_stage_is_what_it_adds_and_a_pattern_is_torchvisions_names():
    resnet = create_model("resnet18", num_classes=10)
    names = set(weights.torchvision_keys(weights.variable_shapes(resnet)))
    stem = {name for name in names if name.startswith(("conv1.", "bn1."))}
    layer3 = {name for name in names if name.startswith("layer3.")}
    stages = ("stem", "layer1", "layer2", "layer3", "layer4", "logits")
    assert keys(resnet, ("stem",)) == stem
    assert keys(resnet, ("layer3",)) == layer3
    assert keys(resnet, ("layer3.*",)) == layer3
    assert keys(resnet, ("logits",)) == {"fc.weight", "fc.bias"}
    assert keys(resnet, stages) == names
    assert keys(resnet, ("*",)) == names
    norm = {"bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"}
    assert keys(resnet, ("bn1.*",)) == norm
    # One parameter of a BatchNorm does not select its statistics.
    assert keys(resnet, ("bn1.weight",)) == {"bn1.weight"}
    message = (
        "freeze='layer5' names no parameters of the model; it accepts stages, stem, layer1, .*, "
        "logits, and"
    )
    with pytest.raises(ValueError, match=message):
        transfer.select(resnet, ("layer1", "layer5"), "freeze")


def test_auxiliary_classifiers_are_no_part_of_a_stage():
    googlenet = create_model("googlenet", num_classes=10)
    names = set(weights.torchvision_keys(weights.variable_shapes(googlenet)))
    auxiliary = {name for name in names if name.startswith(("aux1.", "aux2."))}
    assert auxiliary
    inception4 = {name for name in names if name.startswith("inception4")}
    assert keys(googlenet, ("inception4e",)) == inception4
    assert keys(googlenet, ("logits",)) == {"fc.weight", "fc.bias"} | auxiliary


class OtherNorm(base.Network):
    """A network with Flax's BatchNorm beside cnnjax's."""

    input_shape: tuple[int, int, int] = (4, 4, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = BatchNorm(name="bn1")(x, train)
        x = yield "stem", nn.BatchNorm(name="bn2")(x, use_running_average=not train)
        yield "logits", nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


def test_another_batch_norm_cannot_be_frozen():
    transfer.check_statistics(create_model("resnet18"), "freeze=('stem',)")
    config = defaults.get_config()
    config.model = f"{__name__}:OtherNorm"
    check.check(config)
    config.freeze = ("stem",)
    message = r"freeze=\('stem',\) needs .*; in OtherNorm, other modules keep statistics: bn2$"
    with pytest.raises(ValueError, match=message):
        check.check(config)


GOOGLENET_HEADS = {
    "fc.weight",
    "fc.bias",
    "aux1.fc2.weight",
    "aux1.fc2.bias",
    "aux2.fc2.weight",
    "aux2.fc2.bias",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet18", {"fc.weight", "fc.bias"}),
        ("squeezenet1_1", {"classifier.1.weight", "classifier.1.bias"}),
        ("lenet5", set()),
        ("googlenet", GOOGLENET_HEADS),
    ],
)
def test_the_head_is_what_depends_on_the_classes(name, expected):
    model = create_model(name)
    assert names_of(model, weights.head(model)) == expected


# ------------------------------------------------------------------ the step


TRAINED = {"conv2.kernel", "conv2.bias", "bn2.scale", "bn2.bias", "fc.kernel", "fc.bias"}


@pytest.mark.slow
def test_frozen_parameters_and_statistics_stay_to_the_bit_and_have_no_optimizer_state():
    before, after = steps(step.Recipe(MODEL, freeze=("conv1",), ema=True))
    assert changed(before.params, after.params) == TRAINED
    assert changed(before.ema, after.ema) == TRAINED
    assert changed(before.batch_stats, after.batch_stats) == {"bn2.mean", "bn2.var"}
    assert changed(before.ema_batch_stats, after.ema_batch_stats) == {"bn2.mean", "bn2.var"}
    trained = {name: after.params[name] for name in ("conv2", "bn2", "fc")}
    momenta = [leaf.shape for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
    assert sorted(momenta) == sorted(leaf.shape for leaf in jax.tree.leaves(trained))


@pytest.mark.slow
def test_a_frozen_network_under_a_new_head_trains_as_the_head_on_its_features():
    """The gradient is that of a linear classifier on features in evaluation mode.

    In training mode, BatchNorm would give other features.
    """
    recipe = step.Recipe(MODEL, freeze=("conv1", "conv2"))
    before, after = steps(recipe, step.Numbers(seed=1, momentum=0.0), count=1)
    images, labels = small_batch()
    x = (images.astype(np.float32) / 255 - MOMENTS[0]) / MOMENTS[1]
    variables = {"params": before.params, "batch_stats": before.batch_stats}
    features = MODEL.apply(variables, x, method="stages")["conv2"].mean((1, 2))
    head = before.params["fc"]
    probabilities = nn.softmax(features @ head["kernel"] + head["bias"])
    # The gradient with respect to the logits.
    gradient = (probabilities - np.eye(5, dtype=np.float32)[labels]) / 16
    kernel = head["kernel"] - 0.1 * features.T @ gradient
    bias = head["bias"] - 0.1 * gradient.sum(0)
    np.testing.assert_allclose(after.params["fc"]["kernel"], kernel, atol=1e-6)
    np.testing.assert_allclose(after.params["fc"]["bias"], bias, atol=1e-6)


@pytest.mark.slow
def test_frozen_layers_cost_no_gradient():
    """With all but the head frozen, a step is little more than the forward pass.

    XLA counts the operations of the compiled step.
    """
    images, labels = some_data()

    def operations(parts):
        recipe = step.Recipe(MODEL, freeze=parts)
        numbers = step.Numbers(seed=1)
        run = jax.jit(
            lambda state: step.batch_step(
                recipe, state, as_batch(images, labels, jnp.float32(0.1)), numbers
            )
        )
        compiled = run.lower(step.init(recipe, (8, 8, 3), numbers)).compile()
        return compiled.cost_analysis()["flops"]

    assert operations(("conv1", "conv2")) < 0.6 * operations(())


@pytest.mark.slow
def test_a_rate_multiplies_the_learning_rate_of_its_part():
    """A part at a tenth of the rate moves as if all parts had that rate.

    If two rates match a parameter, the last one counts.
    """
    images, labels = small_batch()

    def params_after(recipe, rate, numbers):
        run = jax.jit(
            lambda state, rate, numbers: step.batch_step(
                recipe, state, as_batch(images, labels, rate), numbers
            )
        )
        return flatten_dict(run(state, jnp.float32(rate), numbers).params, sep=".")

    numbers = step.Numbers(seed=1, weight_decay=1e-2)
    plain = step.Recipe(MODEL)
    rated = step.Recipe(MODEL, rates=("*", "conv1", "fc.bias"))
    state = step.init(plain, (8, 8, 3), numbers)
    whole = params_after(plain, 0.1, numbers)
    tenth = params_after(plain, 0.01, numbers)
    mixed = params_after(rated, 0.1, numbers.replace(rates=(1.0, 0.1, 0.1)))
    slow = {"conv1.kernel", "conv1.bias", "bn1.scale", "bn1.bias", "fc.bias"}
    for name in mixed:
        expected = tenth if name in slow else whole
        np.testing.assert_allclose(mixed[name], expected[name], rtol=1e-6, atol=1e-8)
    assert any(not np.allclose(tenth[name], whole[name], rtol=1e-6, atol=1e-8) for name in slow)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizers_update_is_proportional_to_the_learning_rate(name):
    """`rates` multiplies updates, which is the same as multiplying the learning rate."""
    generator = np.random.default_rng(0)

    def draw():
        kernel = generator.normal(size=(3, 4)).astype(np.float32)
        return {"kernel": kernel, "bias": generator.normal(size=4).astype(np.float32)}

    params = draw()
    grads = draw()

    @jax.jit
    def update(rate):
        transform = optimizer(name, rate, 0.9, 1e-2)
        return transform.update(grads, transform.init(params), params)[0]

    whole = update(0.1)
    tenth = update(0.01)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 10 * b, rtol=1e-5), whole, tenth)


# ------------------------------------------------------------------ from another network


@pytest.mark.slow
def test_a_file_of_other_classes_gives_all_but_its_head(tmp_path):
    file = tmp_path / "seven.safetensors"
    source_variables = Tiny(num_classes=7).init(jax.random.key(9), jnp.zeros((1, 8, 8, 3)))
    source_variables = jax.tree.map(np.asarray, source_variables)
    weights.save_torchvision(source_variables, file)
    loaded = transfer.load_initial_weights(file, MODEL)
    names = set(flatten_dict(source_variables, sep="/"))
    heads = {name for name in names if name.startswith("params/fc")}
    assert set(flatten_dict(loaded, sep="/")) == names - heads

    state = step.init(step.Recipe(MODEL, ema=True), (8, 8, 3), step.Numbers(1), loaded)
    fresh = step.init(step.Recipe(MODEL), (8, 8, 3), step.Numbers(1))
    for name in ("conv1", "bn2"):
        assert not changed(source_variables["params"][name], state.params[name])
    assert not changed(fresh.params["fc"], state.params["fc"])
    assert not changed(state.params, state.ema)

    first = transfer.load_initial_weights(file, MODEL, ("conv1",))
    assert set(flatten_dict(first, sep="/")) == {
        "params/conv1/kernel",
        "params/conv1/bias",
        "params/bn1/scale",
        "params/bn1/bias",
        "batch_stats/bn1/mean",
        "batch_stats/bn1/var",
    }
    message = (
        "seven.safetensors': fc.bias is of 7 classes there; name what is to be taken in "
        "initial_parts"
    )
    with pytest.raises(ValueError, match=message):
        transfer.load_initial_weights(file, MODEL, ("*",))
    message = "^initial_weights='.*seven.safetensors' does not fit .* not in the model: bn1"
    with pytest.raises(ValueError, match=message) as caught:
        transfer.load_initial_weights(file, create_model("lenet"))
    # A training run has no argument `missing`.
    assert "missing" not in str(caught.value)


def test_named_parts_are_taken_from_a_file_of_a_larger_network(tmp_path):
    """Without names, the file is refused for what the model lacks, not for its head."""
    file = tmp_path / "larger.safetensors"
    variables = quick.variables(MODEL, jnp.zeros((1, 8, 8, 3)))
    weights.save_torchvision(jax.tree.map(np.asarray, variables), file)
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors | {"conv3.weight": np.ones(3, np.float32)}, file)
    loaded = transfer.load_initial_weights(file, MODEL, ("conv1",))
    assert np.array_equal(loaded["params"]["bn1"]["bias"], tensors["bn1.bias"])
    with pytest.raises(ValueError, match=r": not in the model: conv3.weight \(3,\)$"):
        transfer.load_initial_weights(file, MODEL)


class TwoDense(base.Network):
    """A network whose classifier has two layers, like AlexNet's and VGG's."""

    input_shape: tuple[int, int, int] = (4, 4, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = yield "features", x
        x = nn.Dense(4, name="classifier.0")(x.mean((1, 2)))
        yield "logits", nn.Dense(self.num_classes, name="classifier.2")(x)


def test_a_file_may_lack_a_part_of_a_module_that_is_not_loaded(tmp_path):
    model = TwoDense(num_classes=3)
    file = tmp_path / "w.safetensors"
    params = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    trunk = {"classifier.0": params["classifier.0"]}
    weights.save_torchvision({"params": trunk}, file)
    loaded = transfer.load_initial_weights(file, model)
    assert loaded["params"].keys() == trunk.keys()
    message = "classifier.2.bias is absent there; name what is to be taken in initial_parts"
    with pytest.raises(ValueError, match=message):
        transfer.load_initial_weights(file, model, ("*",))


def test_a_file_of_other_names_is_told_how_to_rename_them(tmp_path):
    params = {"classifier.first": {"bias": np.zeros(3, np.float32)}}
    weights.save_torchvision({"params": params}, tmp_path / "w.safetensors")
    advice = "none of the file's names .* are like classifier.first.bias, the model's like"
    with pytest.raises(ValueError, match=advice):
        transfer.load_initial_weights(tmp_path / "w.safetensors", TwoDense(num_classes=3))


def test_a_scalar_in_place_of_the_heads_bias_is_named(tmp_path):
    params = TwoDense(num_classes=3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    params["classifier.2"]["bias"] = np.float32(0)
    weights.save_torchvision({"params": params}, tmp_path / "w.safetensors")
    message = r"classifier.2.bias is of another shape there, \(\) instead of \(3,\); name what"
    with pytest.raises(ValueError, match=message):
        transfer.load_initial_weights(tmp_path / "w.safetensors", TwoDense(num_classes=3), ("*",))
    # The head is not loaded unless it is named.
    loaded = transfer.load_initial_weights(tmp_path / "w.safetensors", TwoDense(num_classes=3))
    assert loaded["params"].keys() == {"classifier.0"}


@pytest.mark.parametrize(
    "name, shapes, parts, others",
    [
        ("lenet", ((28, 28, 1), (8, 8, 1)), ("conv1", "conv2"), "linear1.weight"),
        ("resnet18", ((32, 32, 3), (32, 32, 1)), ("layer1",), "conv1.weight"),
    ],
    ids=["lenet", "resnet18"],
)
def test_what_is_not_loaded_may_have_another_shape(name, shapes, parts, others, tmp_path):
    """Parts of a network for other images start one of the user's."""
    source, model = (create_model(name, input_shape=shape) for shape in shapes)
    ones = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32), weights.variable_shapes(source)
    )
    weights.save_torchvision(ones, tmp_path / "w.safetensors")
    loaded = flatten_dict(transfer.load_initial_weights(tmp_path / "w.safetensors", model, parts))
    assert set(loaded) == transfer.select(model, parts)
    assert all(np.all(value == 1) for value in loaded.values())
    message = f"w.safetensors': {others} is of another shape there, .* instead of .*; name what"
    with pytest.raises(ValueError, match=message):
        transfer.load_initial_weights(tmp_path / "w.safetensors", model, (*parts, others))


def test_a_refusal_names_the_parts_that_fit(tmp_path):
    """The file is of color images; its head may be another one."""
    file = tmp_path / "w.safetensors"
    shapes = weights.variable_shapes(MODEL)
    weights.save_torchvision(jax.tree.map(lambda leaf: np.ones(leaf.shape), shapes), file)
    gray = Tiny(num_classes=5, input_shape=(8, 8, 1))
    message = (
        r"conv1.weight is of another shape there, \(8, 3, 3, 3\) instead of \(8, 1, 3, 3\), since "
        r"its images have 3 channels and not 1; name what is to be taken in initial_parts, such as "
        r"\('conv2',\)$"
    )
    with pytest.raises(ValueError, match=message):
        transfer.load_initial_weights(file, gray)
    loaded = transfer.load_initial_weights(file, gray, ("conv2",))
    assert set(flatten_dict(loaded)) == transfer.select(gray, "conv2")

    tensors = safetensors.numpy.load_file(file)
    for name in ("weight", "bias"):
        tensors[f"fc.1.{name}"] = tensors.pop(f"fc.{name}")
    safetensors.numpy.save_file(tensors, file)
    message = (
        "w.safetensors': its head is another one, with fc.1.bias; name what is to be taken in "
        r"initial_parts, such as \('conv1', 'conv2'\)$"
    )
    with pytest.raises(ValueError, match=message):
        transfer.load_initial_weights(file, MODEL)
    loaded = transfer.load_initial_weights(file, MODEL, ("conv1", "conv2"))
    assert set(flatten_dict(loaded)) == transfer.select(MODEL, ("conv1", "conv2"))

    scalars = {name: np.ones(()) for name in tensors if "fc" not in name}
    safetensors.numpy.save_file(scalars, file)
    with pytest.raises(ValueError, match="does not fit the model"):
        transfer.load_initial_weights(file, MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("padding, state", [("none", None), ("zeros", "of another shape")])
def test_a_file_saved_without_padding_gives_what_fits(padding, state, tmp_path):
    """A network without padding loads all but the head; one with padding is refused."""
    given = create_model("lenet", num_classes=3, padding="none")
    shapes = weights.variable_shapes(given)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    weights.save_torchvision(zeros, tmp_path / "w.pth")
    model = create_model("lenet", num_classes=10, padding=padding)
    if state is None:
        loaded = set(flatten_dict(transfer.load_initial_weights(tmp_path / "w.pth", model)))
        assert loaded == set(flatten_dict(shapes)) - weights.head(model)
    else:
        with pytest.raises(ValueError, match=state):
            transfer.load_initial_weights(tmp_path / "w.pth", model)


@pytest.mark.slow
def test_imagenets_weights_without_their_classifier_are_taken(data_dir):
    """Files may have a head of 1000 classes or none.

    If the last stage is absent as well, the parts to load have to be named.
    """
    folder = data_dir / "weights"
    for name in ("squeezenet1_1", "mobilenet_v2"):
        file = next(folder.glob(f"{name}*.safetensors"))
        model = create_model(name, num_classes=10)
        loaded = set(flatten_dict(transfer.load_initial_weights(file, model)))
        assert set(flatten_dict(weights.variable_shapes(model))) - loaded == weights.head(model)
    file = next(folder.glob("resnet18*.safetensors"))
    model = create_model("resnet18", num_classes=10)
    message = (
        r"layer4\.0\.bn1\.bias is absent there; name what is to be taken in initial_parts, such as "
        r"\('stem', 'layer1', 'layer2', 'layer3'\)$"
    )
    with pytest.raises(ValueError, match=message):
        transfer.load_initial_weights(file, model)
    parts = ("stem", "layer1")
    loaded = set(flatten_dict(transfer.load_initial_weights(file, model, parts)))
    assert loaded == transfer.select(model, parts)


def test_a_run_that_is_not_finished_gives_no_weights(tmp_path):
    """A run that is being extended has the weights of its earlier end, and no results."""
    file = tmp_path / transfer.WEIGHTS
    file.touch()
    with pytest.raises(ValueError, match="nor the work directory of a finished training run"):
        transfer.weights_file(tmp_path)
    assert transfer.weights_file(file) == file
    (tmp_path / "results.json").touch()
    assert transfer.weights_file(tmp_path) == file
    with pytest.raises(ValueError, match="^weights=net='absent' is neither a safetensors or .pth"):
        transfer.weights_file("absent", "weights=net")


def test_a_damaged_file_of_initial_weights_is_named(tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=f"^initial_weights='{file}' is not a readable"):
        transfer.load_initial_weights(file, MODEL)


def test_parts_are_a_list_or_a_single_one(tmp_path):
    paths = transfer.select(MODEL, ("conv1",))
    assert transfer.select(MODEL, ["conv1"]) == transfer.select(MODEL, "conv1") == paths
    with pytest.raises(ValueError, match="^parts='conv9' names no parameters"):
        transfer.select(MODEL, "conv9")
    shapes = weights.variable_shapes(MODEL)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    weights.save_torchvision(zeros, tmp_path / "w.safetensors")
    loaded = transfer.load_initial_weights(tmp_path / "w.safetensors", MODEL, "conv1")
    assert set(flatten_dict(loaded)) == paths


def test_the_linear_probe_is_the_exact_solution():
    """Compares with scikit-learn's ridge classifier of the chosen strength.

    On these examples, the test set and the last fifth after a fit of all choose other strengths.
    """
    from sklearn.linear_model import RidgeClassifier

    generator = np.random.default_rng(5)
    labels = generator.integers(0, 3, 300)
    x = generator.normal(size=(300, 20)) + np.eye(3)[labels] @ generator.normal(size=(3, 20))
    accuracy, strength = transfer.linear_probe(x[:200], labels[:200], x[200:], labels[200:])
    scaled = (x - x[:200].mean(0)) / x[:200].std(0)
    reference = RidgeClassifier(alpha=strength).fit(scaled[:200], labels[:200])
    assert accuracy == pytest.approx(reference.score(scaled[200:], labels[200:]))
    assert accuracy > 0.7
    scaled = (x - x[:160].mean(0)) / x[:160].std(0)
    accuracies = []
    for alpha in transfer.STRENGTHS:
        reference = RidgeClassifier(alpha=alpha).fit(scaled[:160], labels[:160])
        accuracies.append(reference.score(scaled[160:200], labels[160:200]))
    assert strength == transfer.STRENGTHS[np.argmax(accuracies)]


@pytest.mark.parametrize(
    "labels, held_out",
    [
        ([0, 1, 0, 1, 0, 1, 0, 1, 0, 1], [8, 9]),
        # Class 2 is in the last fifth only.
        ([0, 1, 0, 1, 0, 1, 0, 1, 2, 2], [6, 7, 9]),
        ([0, 1, 0, 1, 0, 1, 0, 1, 0, 2], [7, 8]),
        # Sorted by class.
        ([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], [4, 9]),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [8, 9]),
    ],
)
def test_the_linear_probe_holds_out_no_whole_class(labels, held_out, monkeypatch):
    """The scaler sees what is fitted to choose the strength, then all examples."""
    fitted = []
    fit_scaler = ridge.fit_scaler
    monkeypatch.setattr(ridge, "fit_scaler", lambda x: fitted.append(x) or fit_scaler(x))
    x = np.random.default_rng(0).normal(size=(10, 3))
    accuracy, _ = transfer.linear_probe(x, np.array(labels), x, np.array(labels))
    assert 0 <= accuracy <= 1
    np.testing.assert_array_equal(fitted[0], np.delete(x, held_out, 0))
    np.testing.assert_array_equal(fitted[1], x)


def test_the_linear_probe_refuses_too_few_examples():
    x = np.random.default_rng(0).normal(size=(5, 3))
    labels = np.arange(5)
    with pytest.raises(ValueError, match="^labels: each of the 5 classes has one example"):
        transfer.linear_probe(x, labels, x, labels)
    with pytest.raises(ValueError, match="^train has 4 examples; expected at least 5"):
        transfer.linear_probe(x[:4], labels[:4], x, labels)


def test_the_linear_probe_refuses_negative_labels():
    """-1 would index the last class."""
    x = np.random.default_rng(0).normal(size=(20, 3))
    labels = np.arange(20) % 3
    wrong = np.where(labels == 2, -1, labels)
    with pytest.raises(ValueError, match="^train has the label -1; expected 0 to 2"):
        transfer.linear_probe(x, wrong, x, labels)
    with pytest.raises(ValueError, match="^test has the label -1; expected 0 to 2"):
        transfer.linear_probe(x, labels, x, wrong)


# ------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_a_run_starts_from_another_and_goes_on_to_the_bit(tmp_path, monkeypatch, caplog):
    """Frozen parts do not change, and a resumed run ends with the same weights.

    Once it has a checkpoint, the run that it started from may be gone.
    """
    caplog.set_level("INFO", "cnnjax")
    monkeypatch.setitem(base._REGISTRY, "tiny", Tiny)

    def run(name, **settings):
        config = changed_config(
            model="tiny", batch_size=700, parallel="jit", checkpoint_every_steps=2, **settings
        )
        loop.check(config, tmp_path / name)
        folder = workdir.prepare(tmp_path / name, config.to_dict())
        loop.train(config, folder)
        model = Tiny(num_classes=10, input_shape=(8, 8, 1))
        return weights.load_torchvision(folder / transfer.WEIGHTS, model)

    first = run("first", epochs=1)
    settings = {
        "initial_weights": str(tmp_path / "first"),
        "freeze": ("conv1",),
        "rates": (("bn2.*", 0.1),),
        "seed": 5,
        "epochs": 2,
    }
    second = run("second", **settings)
    assert changed(first["params"], second["params"]) == TRAINED
    assert changed(first["batch_stats"], second["batch_stats"]) == {"bn2.mean", "bn2.var"}
    for name in ("results.json", transfer.WEIGHTS):
        (tmp_path / "second" / name).unlink()
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "4")
    digest = sha256(tmp_path / "first" / transfer.WEIGHTS)
    shutil.rmtree(tmp_path / "first")
    again = run("second", **settings)
    assert not changed(second, again)
    results = files.read_json(tmp_path / "second" / "results.json")
    assert results["initial_weights_sha256"] == digest
    (start,) = [message for message in caplog.messages if message.startswith("starting from")]
    assert re.fullmatch(r"starting from .*/first: [\d,]+ of [\d,]+ parameters", start)
    # A finished run is only reported, and needs no checkpoint either.
    shutil.rmtree(tmp_path / "second" / "checkpoints")
    config = changed_config(model="tiny", **settings)
    loop.check(config, tmp_path / "second")
    with pytest.raises(ValueError, match="is neither a safetensors or .pth file nor"):
        loop.check(config, tmp_path / "third")


def changed_config(**settings):
    config = configs.lenet_digits.get_config()
    config.update(settings)
    return config


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"freeze": ("conv3",)},
            "freeze='conv3' names no parameters of the model; it accepts stages, conv1, conv2, "
            "logits, and patterns of names such as",
        ),
        ({"freeze": ("*",)}, r"freeze=\('\*',\) leaves no parameter to train"),
        ({"rates": (("linear.*", 0.1),)}, "rates='linear.*' names no parameters"),
        (
            {"rates": (("conv1", -1.0),)},
            r"rates=\(\('conv1', -1.0\),\) is not a tuple of pairs of a part and a positive "
            r"number, such as \(\('conv1', 0.1\),\)",
        ),
        (
            {"initial_weights": "absent"},
            "initial_weights='absent' is neither a safetensors or .pth file nor the work directory "
            "of a finished training run",
        ),
        ({"initial_parts": ("conv1",)}, "needs initial_weights"),
        (
            {"freeze": ("conv1", "conv2"), "rates": (("*", 0.1), ("conv1.weight", 0.5))},
            r"freeze=\('conv1', 'conv2'\) freezes all of 'conv1.weight', so its rate would have no "
            "effect; leave out this pair",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        loop.check(changed_config(**settings))


def test_rates_may_have_frozen_parameters_among_others(tmp_path):
    loop.check(changed_config(freeze=("conv1",), rates=(("*", 0.1),)))
    # A run that has started may keep a rate without effect.
    (tmp_path / "metrics.jsonl").touch()
    loop.check(changed_config(freeze=("conv1",), rates=(("conv1", 0.1),)), tmp_path)


def test_a_run_that_scaled_its_images_otherwise_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(base._REGISTRY, "tiny", Tiny)
    shapes = weights.variable_shapes(Tiny(num_classes=10, input_shape=(8, 8, 1)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    weights.save_torchvision(zeros, tmp_path / transfer.WEIGHTS)
    files.write_json(tmp_path / "config.json", {"kind": "train"})
    settings = {"model": "tiny", "parallel": "jit", "initial_weights": str(tmp_path)}
    standardised = build_run(changed_config(**settings))
    centred = build_run(changed_config(pixels="centred", **settings))
    std = float(standardised.data.moments[1][0])

    def warnings(training, results) -> list[str]:
        files.write_json(tmp_path / "results.json", results)
        caplog.clear()
        training.initial_state()
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    (warning,) = warnings(standardised, {"std": [1 / 255]})
    assert warning.startswith(
        f"pixels='standardised' divides images by a standard deviation of {std:.2g}, the run of "
        f"initial_weights='{tmp_path}' by 0.0039, so that"
    )
    (warning,) = warnings(centred, {"std": [std]})
    assert warning.startswith("pixels='centred' divides images by a standard deviation of 0.0039")
    assert not warnings(centred, {"std": [1 / 255]})
    assert not warnings(standardised, {"std": [1.9 * std]})
    assert not warnings(standardised, {"std": [0.1, 0.1, 0.1]})
    # Earlier versions recorded no scale.
    assert not warnings(standardised, {})


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_continues_with_its_initial_weights_elsewhere(is_finished, tmp_path, caplog):
    """The same contents are accepted under another path, others are refused."""
    first = tmp_path / "first.safetensors"
    first.write_bytes(b"weights")
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(b"weights")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other weights")
    config = changed_config(initial_weights=str(first))
    folder = workdir.prepare(tmp_path / "run", config.to_dict())
    origin = {"initial_weights_sha256": sha256(first)}
    if is_finished:
        files.write_json(folder / "results.json", origin)
    else:
        with Checkpoints(folder / "checkpoints", 1) as checkpoints:
            checkpoints.save(1, {"x": np.zeros(1)}, origin)
    first.unlink()

    before = (folder / "config.json").read_bytes()
    for wrong in ({"initial_weights": str(other)}, {"initial_weights": ""}, {"seed": 9}):
        config = changed_config(**{"initial_weights": str(copied)} | wrong)
        loop.adopt(config, folder)
        assert (folder / "config.json").read_bytes() == before
        with pytest.raises(workdir.OtherConfiguration, match="another configuration"):
            workdir.check_config(folder, config.to_dict())

    config = changed_config(initial_weights=str(copied))
    with caplog.at_level("INFO", "cnnjax"):
        loop.adopt(config, folder)
    workdir.check_config(folder, config.to_dict())
    assert caplog.messages[-1].endswith("copied.safetensors', which has the same contents")


def test_imagenets_moments_are_for_colors():
    config = changed_config(pixels="imagenet")
    assert np.allclose(moments_of(config, *np.full((2, 3), 0.5)), imagenet.MOMENTS)
    message = "pixels='imagenet' is for three channels; the images of dataset='digits' have 1"
    with pytest.raises(ValueError, match=message):
        moments_of(config, np.ones(1), np.ones(1))


# ------------------------------------------------------------------ the study


@pytest.mark.slow
def test_balanced_halves_and_their_labels(data_dir):
    data = arrays.load("cifar10", data_dir)
    order = study.balanced(data.train.labels, 3)
    assert len(set(order)) == 50_000
    for count in (50, 500):
        assert set(np.bincount(data.train.labels[order[:count]])) == {count // 10}
    halves = study.divide(data, 0, 50)
    assert set(halves["A"].classes) | set(halves["B"].classes) == set(data.classes)
    assert len(halves["A"].classes) == 5
    known = {image.tobytes(): data.classes[label] for image, label in zip(*data.test)}
    for half in halves.values():
        assert len(half.test.labels) == 5000
        assert set(np.bincount(half.train.labels)) == {10}
        for image, label in zip(*half.test):
            assert known[image.tobytes()] == half.classes[label]


@pytest.mark.slow
def test_each_network_of_the_study_has_its_images_and_parts(
    data_dir, tmp_path, monkeypatch, capsys
):
    """Runs the whole command; instead of training, settings are recorded."""
    settings_by_name = {}

    def train(folder, settings):
        data = arrays.load(settings["dataset"])
        settings_by_name[folder.name] = settings | {"data": data}
        return len(data.train.labels) / 10_000

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(
        study, "probe", lambda network, file, data: {"accuracy": 0.25, "strength": 1.0}
    )
    options = "--seeds 1 --size 32 --test 20 --steps 100 --half_images 50 --epochs 3"
    weights_folder = data_dir / "weights"
    command = ["--workdir", str(tmp_path), "--data_dir", str(data_dir), *options.split()]
    assert study.main([*command, "--weights", str(weights_folder)]) == 0, capsys.readouterr().err

    # Few labels: the first images of one balanced pool.
    pool = settings_by_name["squeezenet1_1-5000-fine-tuned-0"]
    tuned = settings_by_name["squeezenet1_1-50-fine-tuned-0"]
    scratch = settings_by_name["squeezenet1_1-50-from-scratch-0"]
    partly = settings_by_name["squeezenet1_1-50-partly-frozen-0"]
    np.testing.assert_array_equal(tuned["data"].train.images, pool["data"].train.images[:50])
    assert set(np.bincount(tuned["data"].train.labels)) == {5}
    assert len(tuned["data"].test.labels) == 20
    assert (tuned["epochs"], pool["epochs"]) == (100, 1)
    assert tuned["rates"] == (("*", 0.1), ("logits", 1.0))
    assert "initial_weights" not in scratch
    assert partly["freeze"] and "logits" not in partly["freeze"]

    # Halves: AnB and BnB learn the same images from layers of different networks.
    base = settings_by_name["baseB-0"]
    assert base["data"].classes != settings_by_name["baseA-0"]["data"].classes
    assert settings_by_name["longB-0"]["epochs"] == 2 * base["epochs"] == 6
    for name, origin in (("A2B-0", "baseA-0"), ("B2B-0", "baseB-0")):
        settings = settings_by_name[name]
        assert settings["data"].classes == base["data"].classes
        assert settings["initial_weights"].endswith(origin)
        assert settings["initial_parts"] == settings["freeze"] == ("conv1.*", "conv2.*")
        assert settings["seed"] != base["seed"]
    assert "freeze" not in settings_by_name["A2B+-0"]

    report = (tmp_path / "report.md").read_text()
    assert "| squeezenet1_1 | frozen | 25.0 | 25.0 | 25.0 | 1 |" in report
    assert "| squeezenet1_1 | fine-tuned | 0.5 | 5.0 | 50.0 | 1 |" in report
    assert "| AnB | +0.0 | +0.0 | +0.0 | +0.0 |" in report
    for figure in ("labels.png", "halves.png"):
        assert (tmp_path / figure).stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        ("--images 5050", "images=5050 and steps=200 do not fit: images is a multiple of 5000, at"),
        ("--steps 150", "images=5000 and steps=150 do not fit"),
        ("--studies labels", "weights is not given; expected the folder of ImageNet's weights"),
        (
            "--studies labels --weights nowhere",
            "weights='nowhere' is not a folder with one file squeezenet1_1*",
        ),
    ],
)
def test_wrong_options_of_the_study_are_named(options, message, tmp_path, capsys):
    assert study.main(["--workdir", str(tmp_path / "out"), *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stopped_network_of_the_study_continues_with_the_same_weights(tmp_path, monkeypatch):
    """The folder of the weights may be written in another way; other weights are refused."""
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    settings = {"dataset": "digits", "model": "lenet", "initial_weights": file.name}

    def stop(config, folder):
        with Checkpoints(folder / "checkpoints", 1) as checkpoints:
            checkpoints.save(1, {"x": np.zeros(1)}, {"initial_weights_sha256": sha256(file)})
        raise workdir.Interrupted

    def finish(config, folder):
        files.write_json(folder / "results.json", {"final": {"test_error": 0.25}})

    monkeypatch.setattr(loop, "run", stop)
    with pytest.raises(workdir.Interrupted):
        study.train(tmp_path / "run", settings)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other weights")
    monkeypatch.setattr(loop, "run", finish)
    with pytest.raises(workdir.OtherConfiguration, match="initial_weights='weights.safetensors'"):
        study.train(tmp_path / "run", settings | {"initial_weights": str(other)})
    assert study.train(tmp_path / "run", settings | {"initial_weights": str(file)}) == 0.75


def test_results_of_two_weight_files_are_not_mixed(tmp_path, monkeypatch):
    """A result names its weights, and other weights are refused."""
    file = tmp_path / "weights" / "squeezenet1_1.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"some weights")
    options = argparse.Namespace(
        workdir=tmp_path / "run",
        data_dir="",
        weights=file.parent,
        networks=["squeezenet1_1"],
        studies=["labels"],
        images=5000,
        test=10,
        steps=200,
    )
    train, test = (
        arrays.Split(np.zeros((count, 1, 1, 3), np.uint8), np.zeros(count, np.int32))
        for count in (5000, 10)
    )
    data = arrays.Dataset(train, None, test, ("cat",))
    monkeypatch.setattr(arrays, "load", lambda *arguments: data)
    monkeypatch.setattr(study, "labels_file", lambda *arguments: "labels.npz")
    monkeypatch.setattr(study, "probe", lambda *arguments: {"accuracy": 0.5})
    shared = study.load(options)
    point = study.FewLabels("labels", "squeezenet1_1", 50, "frozen", 0)
    result = study.measure(point, options, shared)
    assert result["weights_sha256"] == hashlib.sha256(b"some weights").hexdigest()

    path = options.workdir / "points" / f"{frame.label(point)}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(point._asdict() | result))
    study.load(options)
    file.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="has other weights of squeezenet1_1 than .*SHA-256"):
        study.load(options)
    # The halves need no weights.
    options.studies = ["halves"]
    study.load(options)
    options.test = 11
    with pytest.raises(ValueError, match="test=11 is more than the 10 images of that part"):
        study.load(options)
