import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cnnjax import weights
from cnnjax.models import create_model


@pytest.fixture(scope="module")
def resnet():
    model = create_model("resnet18", num_classes=5)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


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
    assert len(tensors) == 122  # as many as torchvision's own state dict of resnet18


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
    with pytest.raises(ValueError, match="not in the model: fc.bias"):  # declared absent, yet there
        weights.load_torchvision(saved, model, missing=("fc",))


def test_timms_vgg_is_the_same_network_by_other_names(tmp_path):
    model = create_model("vgg11", num_classes=3)
    rng = np.random.default_rng(0)
    flat = weights.torchvision_keys(weights.variable_shapes(model))
    shapes = weights.variable_shapes(model)
    timm = {}
    for key, (collection, module, leaf) in flat.items():
        shape = shapes[collection][module][leaf].shape
        value = np.full(
            shape, rng.standard_normal(), np.float32
        )  # one number a tensor: the names are tested here
        timm[key] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    convolutional = np.arange(4096 * 512 * 49, dtype=np.float32).reshape(4096, 512, 7, 7)
    timm["pre_logits.fc1.weight"] = convolutional
    timm["pre_logits.fc2.weight"] = timm.pop("classifier.3.weight").reshape(4096, 4096, 1, 1)
    for theirs, ours in (
        ("pre_logits.fc1.bias", "classifier.0.bias"),
        ("pre_logits.fc2.bias", "classifier.3.bias"),
        ("head.fc.weight", "classifier.6.weight"),
        ("head.fc.bias", "classifier.6.bias"),
    ):
        timm[theirs] = timm.pop(ours)
    del timm["classifier.0.weight"]
    path = tmp_path / "timm.safetensors"
    safetensors.numpy.save_file(
        {key: np.ascontiguousarray(value) for key, value in timm.items()}, path
    )
    loaded = weights.load_torchvision(path, model)["params"]
    assert np.array_equal(loaded["classifier.0"]["kernel"], convolutional.reshape(4096, -1).T)
    assert loaded["classifier.6"]["kernel"].shape == (4096, 3)


def test_a_file_that_is_not_safetensors(tmp_path, resnet):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(
        ValueError, match="is not a readable safetensors file .*pickled .pth files are not read"
    ):
        weights.load_torchvision(path, resnet[0])
    with pytest.raises(
        FileNotFoundError, match=r"nowhere.safetensors' is not a file; expected a safetensors file"
    ):
        weights.load_torchvision(tmp_path / "nowhere.safetensors", resnet[0])


def test_an_interrupted_save_leaves_nothing(resnet, tmp_path, monkeypatch):
    def interrupted(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.save_torchvision(resnet[1], tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_hub_offline_says_what_to_do(tmp_path):
    code = "from cnnjax import weights\ntry: weights.fetch('vgg16')\nexcept RuntimeError as error: print(error)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith(
        "weights='imagenet': timm/vgg16.tv_in1k is neither in the Hugging Face cache nor to be had from the hub"
    )
    assert "give its path as the weights" in out and len(out.splitlines()) == 1


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
