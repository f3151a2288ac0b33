"""Transfer: what is taken, what is frozen, what trains at rates of its own; and the study of it."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from quick import jit
from test_train import MOMENTS, Tiny, some_data

import configs.lenet_digits
from cnnjax import transfer, weights
from cnnjax.data import arrays, augment
from cnnjax.models import base, create_model
from cnnjax.runtime import workdir
from cnnjax.train import loop, step
from cnnjax.train.optimizers import OPTIMIZERS, optimizer
from cnnjax.train.run import moments_of
from experiments import transfer as study

pytestmark = pytest.mark.usefixtures("standard_promotion")
MODEL = Tiny(num_classes=5)


def keys(model, parts) -> set[str]:
    """torchvision's names of what is selected."""
    chosen = transfer.select(model, parts)
    return {
        key
        for key, path in weights.torchvision_keys(weights.variable_shapes(model)).items()
        if path in chosen
    }


def steps(recipe, numbers=None, count=3, rate=0.1, taken=None):
    """A few steps on one batch -> the states before and after."""
    images, labels = (part[:16] for part in some_data())
    numbers = numbers or step.Numbers(seed=1, weight_decay=1e-2, ema_decay=0.5)
    state = before = step.init(recipe, (8, 8, 3), numbers, taken)
    run = jit(
        lambda state: step.batch_step(
            None, recipe, state, images, labels, MOMENTS, jnp.float32(rate), 4, numbers
        )
    )
    for _ in range(count):
        state = run(state)
    return before, state


def changed(before: dict, after: dict) -> set[str]:
    """The names of the leaves of two trees that are not the same to the bit."""
    before, after = (flatten_dict(tree, sep=".") for tree in (before, after))
    assert before.keys() == after.keys()
    return {
        name
        for name in before
        if np.asarray(before[name]).tobytes() != np.asarray(after[name]).tobytes()
    }


# ------------------------------------------------------------------ parts


def test_a_stage_is_what_it_adds_and_a_pattern_is_torchvisions_names():
    resnet = create_model("resnet18", num_classes=10)
    names = set(weights.torchvision_keys(weights.variable_shapes(resnet)))
    assert keys(resnet, ("stem",)) == {
        name for name in names if name.startswith(("conv1.", "bn1."))
    }
    assert (
        keys(resnet, ("layer3",))
        == keys(resnet, ("layer3.*",))
        == {name for name in names if name.startswith("layer3.")}
    )
    assert keys(resnet, ("logits",)) == {"fc.weight", "fc.bias"}
    assert (
        keys(resnet, ("stem", "layer1", "layer2", "layer3", "layer4", "logits"))
        == keys(resnet, ("*",))
        == names
    )
    assert keys(resnet, ("bn1.*",)) == {
        "bn1.weight",
        "bn1.bias",
        "bn1.running_mean",
        "bn1.running_var",
    }
    assert keys(resnet, ("bn1.weight",)) == {
        "bn1.weight"
    }  # half of a BatchNorm does not take its statistics along
    with pytest.raises(
        ValueError,
        match=r"freeze='layer5' names no parameters of the model; it accepts stages, stem, layer1, .*, logits, and",
    ):
        transfer.select(resnet, ("layer1", "layer5"), "freeze")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet18", {"fc.weight", "fc.bias"}),
        ("squeezenet1_1", {"classifier.1.weight", "classifier.1.bias"}),
        ("lenet5", set()),
        (
            "googlenet",
            {
                f"{head}.{leaf}"
                for head in ("fc", "aux1.fc2", "aux2.fc2")
                for leaf in ("weight", "bias")
            },
        ),
    ],
)
def test_the_head_is_what_depends_on_the_classes(name, expected):
    model = create_model(name)
    assert {
        key
        for key, path in weights.torchvision_keys(weights.variable_shapes(model)).items()
        if path in transfer.head(model)
    } == expected


# ------------------------------------------------------------------ the step


def test_frozen_parameters_and_statistics_stay_to_the_bit_and_have_no_optimizer_state():
    before, after = steps(step.Recipe(MODEL, freeze=("conv1",), ema=True))
    assert changed(before.params, after.params) == {
        "conv2.kernel",
        "conv2.bias",
        "bn2.scale",
        "bn2.bias",
        "fc.kernel",
        "fc.bias",
    }
    assert changed(before.ema, after.ema) == changed(before.params, after.params)
    assert changed(before.batch_stats, after.batch_stats) == {"bn2.mean", "bn2.var"}
    shapes = [leaf.shape for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
    assert sorted(shapes) == sorted(
        leaf.shape
        for name in ("conv2", "bn2", "fc")
        for leaf in jax.tree.leaves(after.params[name])
    )


def test_a_frozen_network_under_a_new_head_trains_as_the_head_on_its_features():
    """The gradient is that of a linear classifier on features in evaluation mode, which here are not those of training mode."""
    recipe, numbers = (
        step.Recipe(MODEL, freeze=("conv1", "conv2")),
        step.Numbers(seed=1, momentum=0.0),
    )
    before, after = steps(recipe, numbers, count=1)
    images, labels = (part[:16] for part in some_data())
    x = (images.astype(np.float32) / 255 - MOMENTS[0]) / MOMENTS[1]
    features = MODEL.apply(
        {"params": before.params, "batch_stats": before.batch_stats}, x, method="stages"
    )["conv2"].mean((1, 2))
    head = before.params["fc"]
    wrong = (
        nn.softmax(features @ head["kernel"] + head["bias"]) - np.eye(5, dtype=np.float32)[labels]
    ) / 16
    np.testing.assert_allclose(
        after.params["fc"]["kernel"], head["kernel"] - 0.1 * features.T @ wrong, atol=1e-6
    )
    np.testing.assert_allclose(
        after.params["fc"]["bias"], head["bias"] - 0.1 * wrong.sum(0), atol=1e-6
    )


def test_frozen_layers_cost_no_gradient():
    """With all but the head frozen, a step is little more than the forward pass; compiled, by XLA's own count of operations."""
    images, labels = some_data()

    def operations(parts):
        recipe, numbers = step.Recipe(MODEL, freeze=parts), step.Numbers(seed=1)
        run = jax.jit(
            lambda state: step.batch_step(
                None, recipe, state, images, labels, MOMENTS, jnp.float32(0.1), 4, numbers
            )
        )
        return run.lower(step.init(recipe, (8, 8, 3), numbers)).compile().cost_analysis()["flops"]

    assert operations(("conv1", "conv2")) < 0.6 * operations(())


def test_a_rate_multiplies_the_learning_rate_of_its_part():
    """With a tenth of the rate a part moves as it does when all have it; of two rates the last counts."""
    images, labels = (part[:16] for part in some_data())
    step_of = lambda recipe: jit(
        lambda state, rate, numbers: step.batch_step(
            None, recipe, state, images, labels, MOMENTS, rate, 4, numbers
        )
    )
    numbers = step.Numbers(seed=1, weight_decay=1e-2)
    state = step.init(step.Recipe(MODEL), (8, 8, 3), numbers)
    plain, rated = (
        step_of(step.Recipe(MODEL)),
        step_of(step.Recipe(MODEL, rates=("*", "conv1", "fc.bias"))),
    )
    whole, tenth = (plain(state, jnp.float32(rate), numbers).params for rate in (0.1, 0.01))
    mixed = rated(state, jnp.float32(0.1), numbers.replace(rates=(1.0, 0.1, 0.1))).params
    slow = {"conv1.kernel", "conv1.bias", "bn1.scale", "bn1.bias", "fc.bias"}
    whole, tenth, mixed = (flatten_dict(tree, sep=".") for tree in (whole, tenth, mixed))
    for name in mixed:
        np.testing.assert_allclose(
            mixed[name], (tenth if name in slow else whole)[name], rtol=1e-6, atol=1e-8
        )
    assert any(not np.allclose(tenth[name], whole[name], rtol=1e-6, atol=1e-8) for name in slow)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizers_update_is_proportional_to_the_learning_rate(name):
    """Of which `rates` makes use: what multiplies the update multiplies the rate."""
    generator = np.random.default_rng(0)
    params, grads = (
        {
            "kernel": generator.normal(size=(3, 4)).astype(np.float32),
            "bias": generator.normal(size=4).astype(np.float32),
        }
        for _ in range(2)
    )

    @jit
    def update(rate):
        made = optimizer(name, rate, 0.9, 1e-2)
        return made.update(grads, made.init(params), params)[0]

    whole, tenth = update(0.1), update(0.01)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 10 * b, rtol=1e-5), whole, tenth)


# ------------------------------------------------------------------ from another network


def test_a_file_of_other_classes_gives_all_but_its_head(tmp_path):
    given = jax.tree.map(
        np.asarray, Tiny(num_classes=7).init(jax.random.key(9), jnp.zeros((1, 8, 8, 3)))
    )
    weights.save_torchvision(given, tmp_path / "seven.safetensors")
    taken = transfer.take(tmp_path / "seven.safetensors", MODEL)
    assert set(flatten_dict(taken, sep="/")) == {
        name for name in flatten_dict(given, sep="/") if not name.startswith("params/fc")
    }
    state = step.init(step.Recipe(MODEL, ema=True), (8, 8, 3), step.Numbers(1), taken)
    fresh = step.init(step.Recipe(MODEL), (8, 8, 3), step.Numbers(1))
    assert not changed(
        {name: given["params"][name] for name in ("conv1", "bn2")},
        {name: state.params[name] for name in ("conv1", "bn2")},
    )
    assert not changed({"fc": fresh.params["fc"]}, {"fc": state.params["fc"]}) and not changed(
        state.params, state.ema
    )
    first = transfer.take(tmp_path / "seven.safetensors", MODEL, ("conv1",))
    assert set(flatten_dict(first, sep="/")) == {
        "params/conv1/kernel",
        "params/conv1/bias",
        "params/bn1/scale",
        "params/bn1/bias",
        "batch_stats/bn1/mean",
        "batch_stats/bn1/var",
    }
    with pytest.raises(
        ValueError,
        match=r"seven.safetensors': fc.bias is of 7 classes there; name what is to be taken in initial_parts",
    ):
        transfer.take(tmp_path / "seven.safetensors", MODEL, ("*",))
    with pytest.raises(ValueError, match="not in the model: bn1"):
        transfer.take(tmp_path / "seven.safetensors", create_model("lenet"))


def test_imagenets_weights_without_their_classifier_are_taken(data_dir):
    """torchvision's files: with a head of 1000 classes, without a head, and without the last stage, which has to be asked for."""
    folder = data_dir / "weights"
    for name in ("squeezenet1_1", "mobilenet_v2"):
        file, model = next(folder.glob(f"{name}*.safetensors")), create_model(name, num_classes=10)
        taken = set(flatten_dict(transfer.take(file, model)))
        assert set(flatten_dict(weights.variable_shapes(model))) - taken == transfer.head(model)
    file, model = (
        next(folder.glob("resnet18*.safetensors")),
        create_model("resnet18", num_classes=10),
    )
    with pytest.raises(
        ValueError,
        match=r"layer4\.0\.bn1\.bias is absent there; name what is to be taken in initial_parts, such as 'stem'",
    ):
        transfer.take(file, model)
    assert set(flatten_dict(transfer.take(file, model, ("stem", "layer1")))) == transfer.select(
        model, ("stem", "layer1")
    )


def test_the_linear_probe_is_the_exact_solution():
    """Two separable clouds are told apart; and against scikit-learn's ridge classifier of the strength that was chosen."""
    from sklearn.linear_model import RidgeClassifier

    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    x = generator.normal(size=(300, 20)) + np.eye(3)[labels] @ generator.normal(size=(3, 20))
    accuracy, strength = transfer.linear_probe(x[:200], labels[:200], x[200:], labels[200:])
    scaled = (x - x[:200].mean(0)) / x[:200].std(0)
    reference = (
        RidgeClassifier(alpha=strength)
        .fit(scaled[:200], labels[:200])
        .score(scaled[200:], labels[200:])
    )
    assert accuracy == pytest.approx(reference) and accuracy > 0.7


# ------------------------------------------------------------------ whole runs


def test_a_run_starts_from_another_and_goes_on_to_the_bit(tmp_path, monkeypatch):
    """What is frozen stays; stopped after an epoch, the run ends with the same weights."""
    monkeypatch.setitem(base._REGISTRY, "tiny", Tiny)

    def run(name, **settings):
        config = changed_config(
            model="tiny", batch_size=700, parallel="jit", checkpoint_every_steps=2, **settings
        )
        loop.check(config)
        loop.run(config, workdir.prepare(tmp_path / name, config.to_dict()))
        return weights.load_torchvision(
            tmp_path / name / transfer.WEIGHTS, Tiny(num_classes=10, input_shape=(8, 8, 1))
        )

    first = run("first", epochs=1)
    settings = {
        "initial_weights": str(tmp_path / "first"),
        "freeze": ("conv1",),
        "rates": (("bn2.*", 0.1),),
        "seed": 5,
        "epochs": 2,
    }
    second = run("second", **settings)
    assert changed(first["params"], second["params"]) == {
        "conv2.kernel",
        "conv2.bias",
        "bn2.scale",
        "bn2.bias",
        "fc.kernel",
        "fc.bias",
    }
    assert changed(first["batch_stats"], second["batch_stats"]) == {"bn2.mean", "bn2.var"}
    for name in ("results.json", transfer.WEIGHTS):
        (tmp_path / "second" / name).unlink()
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "4")
    again = run("second", **settings)
    assert not changed(second, again)


def changed_config(**settings):
    config = configs.lenet_digits.get_config()
    config.update(settings)
    return config


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"freeze": ("conv3",)},
            "freeze='conv3' names no parameters of the model; it accepts stages, conv1, conv2, logits, and patterns of names such as",
        ),
        ({"freeze": ("*",)}, r"freeze=\('\*',\) leaves no parameter to train"),
        ({"rates": (("linear.*", 0.1),)}, "rates='linear.*' names no parameters"),
        (
            {"rates": (("conv1", -1.0),)},
            r"rates=\('conv1', -1.0\) is not a pair of a part and a positive number",
        ),
        (
            {"initial_weights": "absent"},
            "initial_weights='absent' is neither a safetensors or .pth file nor the work directory of a finished training run",
        ),
        ({"initial_parts": ("conv1",)}, "needs initial_weights"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        loop.check(changed_config(**settings))


def test_imagenets_moments_are_for_colors():
    config = changed_config(pixels="imagenet")
    assert np.allclose(moments_of(config, *np.full((2, 3), 0.5)), augment.IMAGENET)
    with pytest.raises(
        ValueError,
        match="pixels='imagenet' is for three channels; the images of dataset='digits' have 1",
    ):
        moments_of(config, np.ones(1), np.ones(1))


# ------------------------------------------------------------------ the study


def test_balanced_halves_and_their_labels(data_dir):
    data = arrays.load("cifar10", data_dir)
    order = study.balanced(data.train.labels, 3)
    assert len(set(order)) == 50_000
    for count in (50, 500):
        assert set(np.bincount(data.train.labels[order[:count]])) == {count // 10}
    halves = study.divide(data, 0, 50)
    assert (
        set(halves["A"].classes) | set(halves["B"].classes) == set(data.classes)
        and len(halves["A"].classes) == 5
    )
    known = {image.tobytes(): data.classes[label] for image, label in zip(*data.test)}
    for half in halves.values():
        assert len(half.test.labels) == 5000 and set(np.bincount(half.train.labels)) == {10}
        assert all(
            known[image.tobytes()] == half.classes[label] for image, label in zip(*half.test)
        )
