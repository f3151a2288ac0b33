"""Weight files: torchvision's names, two formats, all paddings, and refused files."""

import os
import stat

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import safetensors.flax
import safetensors.numpy

from cnnjax import weights
from cnnjax.models import Network, create_model, vgg
from cnnjax.nn import Dense
from cnnjax.train import defaults
from cnnjax.train.training import build_run


@pytest.fixture(scope="module")
def resnet():
    model = create_model("resnet18", num_classes=5)
    return model, quick.variables(model)


@pytest.fixture(scope="module")
def saved(resnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    weights.save_torchvision(resnet[1], path)
    return path


def test_round_trip_is_exact_and_has_torchvisions_names(resnet, saved):
    model, variables = resnet
    loaded = weights.load_torchvision(saved, model)
    assert jax.tree.structure(loaded) == jax.tree.structure(dict(variables))
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables))
    )
    tensors = safetensors.numpy.load_file(saved)
    assert tensors["conv1.weight"].shape == (64, 3, 7, 7) and tensors["fc.weight"].shape == (5, 512)
    assert tensors["layer2.0.downsample.1.running_var"].shape == (128,)
    assert tensors["layer2.0.bn1.num_batches_tracked"].dtype == np.int64
    # torchvision's own state dict of resnet18 has as many tensors.
    assert len(tensors) == 122


def test_what_does_not_fit_is_listed_whole(resnet, saved, tmp_path):
    model, _ = resnet
    tensors = safetensors.numpy.load_file(saved)
    tensors["conv1.weight"] = tensors["conv1.weight"][:, :, :5, :5].copy()
    tensors["extra.weight"] = tensors.pop("fc.weight")
    path = tmp_path / "wrong.safetensors"
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        weights.load_torchvision(path, model)
    for line in (
        "not in the file: fc.weight",
        "not in the model: extra.weight (5, 512)",
        "of another shape: conv1.weight is (64, 3, 5, 5)",
    ):
        assert line in str(error.value)


def test_safetensors_may_hold_bfloat16(tmp_path):
    values = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    safetensors.flax.save_file({"fc.weight": values}, tmp_path / "w.safetensors")
    (read,) = weights.read(tmp_path / "w.safetensors").values()
    assert read.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read, values)


def test_missing_names_modules_known_to_be_absent(resnet, saved, tmp_path):
    model, _ = resnet
    tensors = {
        key: value
        for key, value in safetensors.numpy.load_file(saved).items()
        if not key.startswith(("layer4.", "fc."))
    }
    path = tmp_path / "trunk.safetensors"
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"not in the file: fc.bias"):
        weights.load_torchvision(path, model)
    trunk = weights.load_torchvision(path, model, missing=("layer4", "fc"))
    stages = model.apply(trunk, jnp.zeros((1, 64, 64, 3)), method="stages", last="layer3")
    assert list(stages) == ["stem", "layer1", "layer2", "layer3"]
    with pytest.raises(
        ValueError,
        match=r"missing=\['layer5'\] are not modules of this model; its modules are bn1, conv1, fc",
    ):
        weights.load_torchvision(path, model, missing=("layer5",))
    # The module is declared missing, but the file has it.
    with pytest.raises(ValueError, match="or `missing` names .* not in the model: fc.bias"):
        weights.load_torchvision(saved, model, missing=("fc",))


@pytest.mark.slow
def test_timms_vgg_is_the_same_network_by_other_names(tmp_path, monkeypatch):
    """Its classifier is convolutions: the first over the whole map, the others over one pixel.

    The network is narrow, since VGG's own classifier has 120 million parameters.
    """
    wide = weights.torchvision_keys(weights.variable_shapes(create_model("vgg11")))
    monkeypatch.setattr(
        vgg, "Dense", lambda width, **fields: Dense(8 if width == 4096 else width, **fields)
    )
    model = vgg.VGG(blocks=((4,),) * 5, num_classes=3)
    variables = numbered(model)
    timm = state_dict(variables)
    is_head = lambda key: key.startswith("classifier.")
    assert set(filter(is_head, timm)) == set(filter(is_head, wide))
    convolutional = np.arange(8 * 4 * 49, dtype=np.float32).reshape(8, 4, 7, 7)
    timm["pre_logits.fc1.weight"] = convolutional
    timm["pre_logits.fc2.weight"] = timm.pop("classifier.3.weight").reshape(8, 8, 1, 1)
    for theirs, ours in (
        ("pre_logits.fc1.bias", "classifier.0.bias"),
        ("pre_logits.fc2.bias", "classifier.3.bias"),
        ("head.fc.weight", "classifier.6.weight"),
        ("head.fc.bias", "classifier.6.bias"),
    ):
        timm[theirs] = timm.pop(ours)
    del timm["classifier.0.weight"]
    path = tmp_path / "timm.safetensors"
    safetensors.numpy.save_file(timm, path)
    loaded = weights.load_torchvision(path, model)["params"]
    expected = variables["params"]
    expected["classifier.0"]["kernel"] = convolutional.reshape(8, -1).T
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_a_file_that_is_neither_safetensors_nor_pth(tmp_path, resnet):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(ValueError, match="is not a readable safetensors or .pth file .*header"):
        weights.load_torchvision(path, resnet[0])
    message = r"nowhere.safetensors' is not a file; expected a safetensors or .pth file"
    with pytest.raises(FileNotFoundError, match=message):
        weights.load_torchvision(tmp_path / "nowhere.safetensors", resnet[0])


def test_a_saved_file_follows_the_umask(tmp_path):
    """Weights have the same permissions as the other files of a work directory."""
    variables = {"params": {"fc": {"kernel": np.ones((2, 3), np.float32)}}}
    before = os.umask(0o027)
    try:
        for name in ("w.safetensors", "w.pth"):
            weights.save_torchvision(variables, tmp_path / name)
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640, name
    finally:
        os.umask(before)


def test_an_interrupted_save_leaves_nothing(resnet, tmp_path, monkeypatch):
    def interrupted(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.save_torchvision(resnet[1], tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_real_weights_of_resnet18_load(data_dir):
    model = create_model("resnet18")
    trunk = weights.load_torchvision(
        data_dir / "weights" / "resnet18_conv1-layer3_imagenet.safetensors",
        model,
        missing=("layer4", "fc"),
    )
    assert trunk["params"]["layer3.1"]["conv2"]["kernel"].shape == (3, 3, 256, 256)
    with pytest.raises(
        ValueError, match="not in the file: layer4.0.bn1.bias .512,.; .* and 20 more"
    ):
        weights.load_torchvision(
            data_dir / "weights" / "resnet18_conv1-layer3_imagenet.safetensors",
            model,
            missing=("fc",),
        )


# ------------------------------------------------------------------ both formats, every padding


def numbered(model) -> dict:
    """Returns a model's variables, in which every number is another one."""
    shapes = weights.variable_shapes(model)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)


def test_pth_and_safetensors_hold_the_same(tmp_path, monkeypatch):
    """Both formats give back the same variables; `~` in a path is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = create_model("mnasnet0_5", num_classes=3)
    variables = numbered(model)
    for name in ("w.pth", "w.pt", "w.safetensors"):
        weights.save_torchvision(variables, f"~/{name}")
        loaded = weights.load_torchvision(f"~/{name}", model)
        jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.pt", "w.pth", "w.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, padding",
    [
        ("lenet", "none"),
        ("alexnet_2012", "none"),
        ("zfnet", "none"),
        ("lenet5", "full"),
        ("tutorial_net", "full"),
        ("convnet", "full"),
    ],
)
def test_weights_of_every_padding_load(name, padding, tmp_path):
    """Dense layers on flattened maps have shapes that depend on the padding."""
    model = create_model(name, num_classes=3, padding=padding)
    shapes = weights.variable_shapes(model)
    image = jnp.zeros((1, *model.input_shape))
    assert shapes == jax.eval_shape(model.init, jax.random.key(0), image)
    assert shapes != weights.variable_shapes(model.clone(padding="zeros"))
    # Writing a large file would take long.
    if sum(leaf.size for leaf in jax.tree.leaves(shapes)) > 1e6:
        return
    variables = numbered(model)
    weights.save_torchvision(variables, tmp_path / "w.safetensors")
    loaded = weights.load_torchvision(tmp_path / "w.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])


@pytest.mark.slow
def test_weights_saved_under_zeros_serve_other_paddings(tmp_path):
    """Convolutions do not depend on the padding, so studies can load the same weights."""
    variables = numbered(create_model("lenet5", num_classes=3))
    weights.save_torchvision(variables, tmp_path / "w.safetensors")
    model = create_model("lenet5", num_classes=3, padding="full")
    loaded = weights.load_torchvision(tmp_path / "w.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])
    # Without padding, this network has no output at its own image size.
    deep = create_model("resnet18", padding="none")
    with pytest.raises(ValueError, match="has no output"):
        jax.eval_shape(deep.init, jax.random.key(0), jnp.zeros((1, *deep.input_shape)))
    assert weights.variable_shapes(deep) == weights.variable_shapes(create_model("resnet18"))


# ------------------------------------------------------------------ other names, wrong numbers


def state_dict(variables) -> dict:
    """Returns a network's tensors by torchvision's names."""
    flat = flax.traverse_util.flatten_dict(variables)
    tensors = {}
    for key, path in weights.torchvision_keys(variables).items():
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(flat[path].ndim, range(flat[path].ndim))
        tensors[key] = np.ascontiguousarray(flat[path].transpose(*axes))
    return tensors


@pytest.mark.slow
def test_names_of_parallel_training_and_of_old_densenets(tmp_path):
    model = create_model("densenet121", num_classes=2)
    variables = numbered(model)
    old = {}
    for key, value in state_dict(variables).items():
        for layer in ("norm1", "norm2", "conv1", "conv2"):
            key = key.replace(f".{layer}.", f".{layer[:-1]}.{layer[-1]}.")
        old[f"module.{key}"] = value
    assert "module.features.denseblock1.denselayer1.norm.1.weight" in old
    path = tmp_path / "old.safetensors"
    safetensors.numpy.save_file(old, path)
    loaded = weights.load_torchvision(path, model)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "model._orig_mod.",
        "net.",
        "learner.backbone.",
        "module.encoder_q.",
        "encoder._orig_mod.",
    ],
)
def test_wrappers_and_prefixes_of_all_names_are_understood(prefix, tmp_path):
    """A counter of AveragedModel stands outside the network."""
    model = create_model("lenet5", num_classes=3)
    variables = numbered(model)
    tensors = {prefix + key: value for key, value in state_dict(variables).items()}
    tensors["n_averaged"] = np.array(5)
    path = tmp_path / "wrapped.safetensors"
    safetensors.numpy.save_file(tensors, path)
    loaded = weights.load_torchvision(path, model)
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda key: key.replace("features.", "features.module."), id="a part"),
        pytest.param(lambda key: f"module.{key}", id="the average"),
    ],
)
def test_wrappers_of_a_part_and_of_an_average_are_understood(wrap, tmp_path):
    """PyTorch's ImageNet example wraps VGG's `features`; `AveragedModel` adds a counter."""
    names = ("features.0.weight", "classifier.6.bias")
    tensors = {wrap(name): np.full(1, number) for number, name in enumerate(names)}
    tensors["n_averaged"] = np.array(5)
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(tensors, path)
    assert weights.read(path) == {name: number for number, name in enumerate(names)}
    # A name of the model stays, under another wrapper too, and two of one name are refused.
    known = (*map(wrap, names), "n_averaged")
    safetensors.numpy.save_file({f"_orig_mod.{wrap(names[0])}": np.zeros(1)}, path)
    assert set(weights.read(path, known)) == {wrap(names[0])}
    safetensors.numpy.save_file({wrap(names[0]): np.zeros(1), names[0]: np.zeros(1)}, path)
    with pytest.raises(ValueError, match="are both 'features.0.weight'"):
        weights.read(path)


def test_a_prefix_of_some_names_is_no_wrapper(tmp_path):
    """Lightning's is that of all names, except where other modules have parameters, too."""
    tensors = {"model.fc.bias": np.zeros(1), "loss.weight": np.ones(1)}
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors")
    assert weights.read(tmp_path / "w.safetensors") == tensors


def test_a_prefix_is_removed_only_where_the_model_knows_the_rest(tmp_path):
    tensors = {"net.fc.bias": np.zeros(1), "net.fc.weight": np.ones(1)}
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors")
    names = {
        (): ["net.fc.bias", "net.fc.weight"],
        ("fc.bias",): ["fc.bias", "fc.weight"],
        ("bias",): ["bias", "weight"],
        ("net.fc.bias", "fc.weight"): ["net.fc.bias", "net.fc.weight"],
    }
    for known, expected in names.items():
        assert sorted(weights.read(tmp_path / "w.safetensors", known)) == expected


class OtherLeaves(Network):
    """A network with parameters that torchvision lacks: Flax's and some of its own."""

    input_shape: tuple[int, int, int] = (4, 4, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = nn.PReLU(name="act")(nn.Dense(5, name="mix")(x))
        x = yield "mix", x + self.param("gamma", nn.initializers.ones, ())
        classes = nn.Embed(self.num_classes, 5, name="classes").embedding
        scale = self.param("mean", nn.initializers.ones, (self.num_classes,))
        yield "logits", x.mean((1, 2)) @ classes.T * scale


class TwoWeights(Network):
    """A network whose own parameters are a kernel and a scale."""

    input_shape: tuple[int, int, int] = (4, 4, 3)

    @nn.nowrap
    def walk(self, x, train):
        kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], self.num_classes))
        scale = self.param("scale", nn.initializers.ones, (self.num_classes,))
        yield "logits", x.mean((1, 2)) @ kernel * scale


class Positions(Network):
    """A linear layer, and a parameter with two axes that is no kernel."""

    input_shape: tuple[int, int, int] = (4, 4, 3)

    @nn.nowrap
    def walk(self, x, train):
        position = self.param("position", nn.initializers.zeros, (64, 64))
        yield "logits", Dense(self.num_classes, name="fc")(x.mean((1, 2))) + position.sum()


def test_only_kernels_change_their_axes(tmp_path):
    tensors = {
        "fc.bias": np.zeros(2, np.float32),
        "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "position": np.arange(64 * 64, dtype=np.float32).reshape(64, 64),
    }
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(tensors, path)
    variables = weights.load_torchvision(path, Positions(num_classes=2))
    np.testing.assert_array_equal(variables["params"]["position"], tensors["position"])
    np.testing.assert_array_equal(variables["params"]["fc"]["kernel"], tensors["fc.weight"].T)
    weights.save_torchvision(variables, path)
    jax.tree.map(np.testing.assert_array_equal, dict(weights.read(path)), tensors)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_parameters_of_any_name_come_back(suffix, tmp_path):
    model = OtherLeaves(num_classes=7)
    variables = numbered(model)
    # A parameter called `mean` is no statistic, and may be negative.
    variables["params"]["mean"] = -variables["params"]["mean"]
    path = tmp_path / f"own.{suffix}"
    weights.save_torchvision(variables, path)
    assert set(weights.read(path)) == {
        "mix.weight",
        "mix.bias",
        "act.negative_slope",
        "gamma",
        "classes.embedding",
        "mean",
    }
    loaded = weights.load_torchvision(path, model)
    assert loaded["params"]["gamma"].shape == ()
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])


class Wrapped(Network):
    """A linear layer with the name of DataParallel's wrapper."""

    input_shape: tuple[int, int, int] = (4, 4, 3)

    @nn.nowrap
    def walk(self, x, train):
        yield "logits", Dense(self.num_classes, name="module")(x.mean((1, 2)))


class Headed(Network):
    """Two linear layers with names of timm's VGG."""

    input_shape: tuple[int, int, int] = (4, 4, 3)

    @nn.nowrap
    def walk(self, x, train):
        x = Dense(5, name="pre_logits")(x.mean((1, 2)))
        yield "logits", Dense(self.num_classes, name="head.fc")(x)


class Modeled(Network):
    """A linear layer with the name of the network in Lightning's checkpoints."""

    input_shape: tuple[int, int, int] = (4, 4, 3)

    @nn.nowrap
    def walk(self, x, train):
        yield "logits", Dense(self.num_classes, name="model")(x.mean((1, 2)))


@pytest.mark.parametrize("network", [Wrapped, Headed, Modeled])
def test_names_that_the_model_knows_stay_as_they_are(network, tmp_path):
    model = network(num_classes=2)
    variables = numbered(model)
    path = tmp_path / "w.safetensors"
    weights.save_torchvision(variables, path)
    loaded = weights.load_torchvision(path, model)["params"]
    jax.tree.map(np.testing.assert_array_equal, loaded, variables["params"])


def test_two_parameters_of_one_name_are_refused_before_training():
    with pytest.raises(ValueError, match="params/kernel and params/scale are both weight"):
        weights.torchvision_keys(weights.variable_shapes(TwoWeights()))
    config = defaults.get_config()
    config.dataset = "digits"
    config.model = f"{__name__}:TwoWeights"
    with pytest.raises(ValueError, match="^model='.*:TwoWeights': the parameters params/kernel"):
        build_run(config)


def test_a_refusal_shows_the_files_own_names(tmp_path):
    model = create_model("lenet5", num_classes=3)
    tensors = state_dict(numbered(model))
    path = tmp_path / "w.safetensors"
    wrapped = {f"module.{key}": value for key, value in tensors.items()}
    wrapped["module.extra"] = wrapped.pop("module.c1.bias")
    wrapped["module.c1.weight"] = np.zeros((2, 2), np.float32)
    safetensors.numpy.save_file(wrapped, path)
    with pytest.raises(ValueError) as error:
        weights.load_torchvision(path, model)
    for part in (
        "not in the file: c1.bias",
        "not in the model: module.extra (6,)",
        "of another shape: module.c1.weight is (2, 2) in the file",
        "the file holds tensors that the model lacks",
    ):
        assert part in str(error.value)
    assert "missing" not in str(error.value)
    safetensors.numpy.save_file({f"a.{key}": tensors[key][:1] for key in tensors}, path)
    with pytest.raises(ValueError, match="of another shape: a.c1.bias is "):
        weights.load_torchvision(path, model)
    renamed = {f"a.{key}.b": value for key, value in tensors.items()}
    safetensors.numpy.save_file(renamed, path)
    advice = (
        "none of the file's names .* are like a.c1.bias.b, the model's like c1.bias: choose the "
        "network of the file, or rename its tensors, which cnnjax.weights.read returns"
    )
    with pytest.raises(ValueError, match=advice):
        weights.load_torchvision(path, model)


def test_the_advice_leads_to_weights_that_load(tmp_path):
    model = create_model("lenet5", num_classes=3, output="linear")
    path = tmp_path / "w.safetensors"

    def refusal(tensors):
        safetensors.numpy.save_file(tensors, path)
        with pytest.raises(ValueError) as error:
            weights.load_torchvision(path, model)
        return str(error.value)

    ten = model.clone(num_classes=10)
    advice = refusal(state_dict(numbered(ten)))
    assert "(the file is of 10 classes, the model of 3; load_torchvision reads it into" in advice
    assert "into create_model(NAME, num_classes=10))" in advice
    assert weights.load_torchvision(path, ten)["params"]["output"]["bias"].shape == (10,)

    tensors = state_dict(numbered(model))
    without_head = {key: value for key, value in tensors.items() if key[0] not in "fo"}
    advice = "name them: missing=('f6', 'output',) in cnnjax.weights.load_torchvision, visualize or"
    assert advice in refusal(without_head)
    assert len(weights.load_torchvision(path, model, missing=("f6", "output"))["params"]) == 5

    part = {key: value for key, value in tensors.items() if key != "f6.bias"}
    assert "the file holds only parts of f6)" in refusal(part)
    loaded = weights.load_torchvision(path, model, missing=("f6.bias",))
    assert list(loaded["params"]["f6"]) == ["kernel"] and len(loaded["params"]) == 7
    other = tensors | {"c1.weight": np.zeros((6, 1, 3, 3), np.float32)}
    assert "the file is of another network or other fields)" in refusal(other)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("conv1.weight", np.nan, "module.conv1.weight holds values that are not finite"),
        ("bn1.running_mean", np.inf, "module.bn1.running_mean holds values that are not finite"),
        ("bn1.weight", -np.inf, "module.bn1.weight holds values that are not finite"),
        ("bn1.running_var", -0.5, "module.bn1.running_var holds a negative variance, -0.5"),
        ("bn1.running_var", np.nan, "module.bn1.running_var holds values that are not finite"),
    ],
)
def test_numbers_that_no_network_has_are_refused(key, value, message, trunk, tmp_path):
    tensors = {f"module.{name}": tensor.copy() for name, tensor in trunk.items()}
    tensors[f"module.{key}"].flat[-1] = value
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(tensors, path)
    model = create_model("resnet18", num_classes=5)
    absent = ("layer1", "layer2", "layer3", "layer4", "fc")
    with pytest.raises(ValueError, match=message):
        weights.load_torchvision(path, model, missing=absent)


@pytest.fixture(scope="module")
def trunk(saved):
    tensors = safetensors.numpy.load_file(saved)
    return {key: value for key, value in tensors.items() if key.startswith(("conv1.", "bn1."))}


def test_auxiliary_heads_of_a_file_are_passed_over_by_a_network_without_them(tmp_path):
    variables = numbered(create_model("googlenet", num_classes=3))
    weights.save_torchvision(variables, tmp_path / "w.safetensors")
    model = create_model("googlenet", num_classes=3, aux_logits=False)
    loaded = weights.load_torchvision(tmp_path / "w.safetensors", model)
    assert "aux1.fc1" not in loaded["params"] and not any("aux" in key for key in loaded["params"])
    conv = ("params", "conv1", "conv", "kernel")
    flat, expected = (flax.traverse_util.flatten_dict(tree) for tree in (loaded, variables))
    assert np.array_equal(flat[conv], expected[conv])


def test_variables_that_no_file_would_hold_are_refused(resnet, tmp_path):
    """Saved in silence, a file would lack them, or hold nothing at all."""
    params = resnet[1]["params"]
    cache = {"count": np.zeros(1)}
    for variables, named in (
        (params, "'bn1', 'conv1', 'fc', 'layer1.0', 'layer1.1', ..."),
        (resnet[1] | {"cache": cache}, "'cache'"),
    ):
        message = f"^variables has {named}; expected the collections 'params', 'batch_stats' only$"
        with pytest.raises(ValueError, match=message):
            weights.save_torchvision(variables, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_missing_folder_is_named(name, tmp_path):
    path = tmp_path / "missing" / name
    with pytest.raises(FileNotFoundError) as error:
        weights.save_torchvision({"params": {"fc": {"bias": np.ones(2)}}}, path)
    assert error.value.filename == str(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_users_own_partial_file_is_left_alone(name, tmp_path):
    own = tmp_path / f"{name}.partial"
    own.write_text("mine")
    weights.save_torchvision({"params": {"fc": {"bias": np.ones(2)}}}, tmp_path / name)
    assert own.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, own.name]
