"""Benchmarks: equal computations, right tables, and a speedrun that learns."""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import PIL.Image
import pytest
import quick
from matplotlib.figure import Figure

from cnnjax import summary
from cnnjax.benchmark import __main__ as benchmark
from cnnjax.benchmark import cases, jax_side, onednn, programs, sides, turns
from cnnjax.data import arrays
from cnnjax.models import Network, base, create_model
from cnnjax.models.speedrun import _partly_identity, whitening_filters
from cnnjax.nn import BatchNorm, Conv, Dense, conv, flatten, max_pool
from cnnjax.runtime import files, host
from cnnjax.train import data
from experiments import speedrun


@pytest.fixture(autouse=True)
def own_environment():
    """The command sets variables for the sides that it starts."""
    with mock.patch.dict(os.environ):
        yield


class Tiny(Network):
    """A network of the layers that cnnjax computes in its own way on the CPU."""

    num_classes: int = 3
    input_shape: tuple[int, int, int] = (8, 8, 2)

    def walk(self, x, train):
        x = Conv(4, 3, padding=1, name="conv1")(x)
        x = BatchNorm(name="norm")(Conv(4, 3, padding=1, groups=4, name="conv2")(x), train)
        yield "block", x
        yield "logits", Dense(self.num_classes, name="fc")(flatten(max_pool(x, 2)))


@pytest.mark.slow
def test_the_stock_side_is_the_same_network(standard_promotion):
    """Both sides have the same loss and gradients; jax derives the stock side's."""
    model, x = Tiny(), jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
    variables = jax.jit(model.init)(jax.random.key(1), x)

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.square(logits).sum()

    results = {}
    for side in ("cnnjax", "stock"):
        with jax_side.traced(side):
            results[side] = jax.jit(jax.value_and_grad(loss))(variables["params"])
            program = str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))
            assert ("select_and_scatter" in program) == (side == "stock")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        results["cnnjax"],
        results["stock"],
    )


@pytest.mark.slow
def test_a_layers_passes_are_those_of_the_convolution():
    """Compares mean magnitudes of output and gradients with a convolution in loops."""
    case = cases.Convolution(
        batch=2, size=5, inputs=4, outputs=6, kernel=3, stride=2, padding=1, groups=2
    )
    _, facts = sides.layer_passes("cnnjax", case)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 5, 4), np.float32)
    kernel = rng.standard_normal((3, 3, 2, 6), np.float32)
    dy = rng.standard_normal((2, 3, 3, 6), np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros(dy.shape)
    dx = np.zeros(padded.shape)
    dkernel = np.zeros(kernel.shape)
    for group, i, j, a, b in np.ndindex(2, 3, 3, 3, 3):
        inputs = slice(2 * group, 2 * group + 2)
        outputs = slice(3 * group, 3 * group + 3)
        values = padded[:, 2 * i + a, 2 * j + b, inputs]
        y[:, i, j, outputs] += values @ kernel[a, b, :, outputs]
        dx[:, 2 * i + a, 2 * j + b, inputs] += dy[:, i, j, outputs] @ kernel[a, b, :, outputs].T
        dkernel[a, b, :, outputs] += values.T @ dy[:, i, j, outputs]
    sizes = [np.abs(value).mean() for value in (y, dx[:, 1:-1, 1:-1], dkernel)]
    np.testing.assert_allclose(facts["sizes"], sizes, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("network", sorted({name.partition(".")[0] for name in cases.LAYERS}))
def test_the_layers_are_of_the_networks_that_they_name(network):
    macs = {layer.name: layer.macs for layer in summary.layers(create_model(network))}
    for name, case in cases.LAYERS.items():
        owner, _, layer = name.partition(".")
        if owner == network:
            assert case.flops == 2 * case.batch * macs[layer]


@pytest.mark.parametrize("name", cases.SPECIFICATIONS)
def test_the_specifications_are_the_networks(name):
    """The list of layers for PyTorch has as many parameters as cnnjax's network."""
    side, channels, layers = cases.SPECIFICATIONS[name]
    assert create_model(name).input_shape == (side, side, channels)
    count = 0
    for layer in layers:
        if layer == "pool":
            side //= 2
        elif isinstance(layer, tuple):
            features, kernel, padding = layer
            count += (kernel**2 * channels + 1) * features
            side += 2 * padding - kernel + 1
            channels = features
        else:
            inputs = channels * max(side, 1) ** 2
            count += (inputs + 1) * layer
            channels = layer
            side = 0
    assert count == summary.totals(summary.layers(create_model(name)))["parameters"]


@pytest.mark.slow
def test_steps_in_one_call_are_those_one_by_one(monkeypatch, standard_promotion):
    assert sides.TRAINING_BURST == data.SECONDS_A_CALL
    monkeypatch.setitem(base._REGISTRY, "lenet", Tiny)
    monkeypatch.setattr(jax_side, "_BATCHES", 1)

    def training(looped):
        passes, _ = jax_side.network("lenet", 4, "float32", looped)
        return passes["training"]

    one_by_one = training(looped=False)
    at_once = training(looped=True)
    # The state is copied, since the next run reuses its buffers.
    states = [jax.tree.map(np.array, run(3)) for run in (one_by_one, at_once, one_by_one)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), states[0], states[1]
    )
    pairs = zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[2]))
    assert any(np.abs(a - b).max() > 1e-4 for a, b in pairs)


@pytest.mark.slow
def test_two_processes_take_turns_and_agree(monkeypatch):
    """Measures one small layer: rates and utilization follow from the times."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # as the command sets it
    both = ("cnnjax", "stock")
    facts, times = turns.measure("layers", both, "lenet.conv1", 128, 2, burst=0.01)
    rows = turns.rows_of("layers", "lenet.conv1", 128, 1e9, facts, times)
    assert [(row["pass"], row["side"]) for row in rows] == [
        (key, side) for key in cases.PASSES["layers"] for side in both
    ]
    for ours in rows[::2]:
        assert ours["gflop_per_s"] == pytest.approx(1e3 / ours["ms"])
        assert ours["utilisation"] == pytest.approx(ours["gflop_per_s"] / ours["peak_gflop_per_s"])


def test_rates_and_ratios_follow_from_the_times():
    """The ratio is the median of the rounds' own; a step counts as three forward passes."""
    facts = {"cnnjax": {}, "stock": {}}
    ms = {"cnnjax": [1.0, 2.0, 4.0], "stock": [3.0, 4.0, 16.0]}
    times = {(side, key): ms[side] for key in cases.PASSES["cpu"] for side in ms}
    times["cnnjax", "product"] = [2.0, 1.0]
    rows = turns.rows_of("cpu", "lenet", 8, 1e9, facts, times)
    assert [row["over_cnnjax"] for row in rows] == [1, 3] * 3
    assert [row["images_per_s"] for row in rows] == [4000, 2000] * 3
    rates = {"forward": [500, 250], "step": [1500, 750], "training": [1500, 750]}
    for key, expected in rates.items():
        assert [row["gflop_per_s"] for row in rows if row["pass"] == key] == expected
    assert rows[0]["peak_gflop_per_s"] == pytest.approx(2 * 2048**3 * 1e3 / 1e9)


@pytest.mark.parametrize(
    "change", [{"sizes": [1.0, 2.1]}, {"parameters": 8}], ids=["sizes", "parameters"]
)
def test_sides_that_compute_something_else_are_refused(change):
    facts = {"parameters": 7, "sizes": [1.0, 2.0]}
    turns._check_agreement("lenet", {"cnnjax": facts, "stock": facts | {"sizes": [1.0, 2.01]}})
    with pytest.raises(RuntimeError, match="the sides of lenet do not compute the same: cnnjax"):
        turns._check_agreement("lenet", {"cnnjax": facts, "stock": facts | change})


@pytest.mark.slow
def test_compilation_is_of_the_training_step_and_starts_anew(monkeypatch):
    """Each run traces the network again, and compiles what a training step of `network` is."""
    traces = []
    monkeypatch.setitem(base._REGISTRY, "lenet", Tiny)
    make_step = jax_side._make_step

    def traced(model, optimizer):
        step = make_step(model, optimizer)

        def counted(params, stats, momentum, images, labels, key):
            traces.append((images.shape, labels.shape))
            return step(params, stats, momentum, images, labels, key)

        return counted

    monkeypatch.setattr(jax_side, "_make_step", traced)
    passes, facts = jax_side.compilation("lenet", 4)
    passes["compile"](2)
    assert traces == 2 * [((4, *Tiny().input_shape), (4,))]
    assert facts == {"parameters": jax_side.network("lenet", 4, "float32")[1]["parameters"]}


def test_compilation_is_reported_with_its_ratio(tmp_path, monkeypatch, capsys):
    seconds = {("cnnjax", "compile"): [3000.0, 5000.0], ("stock", "compile"): [2000.0, 2000.0]}
    monkeypatch.setattr(turns, "measure", lambda *arguments: ({}, seconds))
    arguments = ["compile", "--rounds", "2", "--only", "vgg11", "--workdir", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    assert "| vgg11 | 8 | 4.0 | 2.0 | 2.00 |" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert recorded[0]["seconds"] == {"cnnjax": 4.0, "stock": 2.0}


def test_sides_that_differ_or_fail_are_refused(capfd):
    message = "the nobody side of lenet.conv1 stopped with exit code 1"
    with pytest.raises(RuntimeError, match=message):
        turns.measure("cpu", ("nobody",), "lenet.conv1", 1, 1)
    assert "lenet.conv1" in capfd.readouterr().err


def test_a_side_that_died_while_it_waited_is_named():
    side = object.__new__(turns._Side)
    side.side, side.name = "stock", "lenet"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    side.process = subprocess.Popen(["false"], text=True, **pipes)
    side.process.wait()
    with pytest.raises(RuntimeError, match="the stock side of lenet stopped with exit code 1"):
        side.answer("forward\n")
    side.stop()


def test_labels_are_classes_of_the_network():
    _, labels = jax_side._random_batches(64, (2, 2, 1), 1)
    assert not labels.any()
    _, labels = jax_side._random_batches(64, (2, 2, 1), 10)
    assert {*np.unique(labels)} == {*range(10)}


def test_a_network_that_labels_pixels_is_refused():
    message = r"only='fcn' has outputs of shape \(180, 240, 1000\); expected a network with a logit"
    with pytest.raises(ValueError, match=message):
        benchmark.check("cpu", ["fcn"], ["cnnjax", "stock"])


def test_memory_that_the_system_does_not_tell_is_left_out(monkeypatch):
    def refuse(path, text):
        raise PermissionError

    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: "Name:\tpython\n")
    monkeypatch.setattr(pathlib.Path, "write_text", refuse)
    assert sides._memory_mb("VmRSS") is None
    assert sides._peak_memory("cnnjax", "cpu", lambda n: None, 1.0) is None


def test_other_options_have_another_default_folder(monkeypatch):
    folders = []
    monkeypatch.setattr(benchmark, "_work", lambda options, folder: folders.append(folder))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for options in ([], ["--rounds", "5"], ["--rounds", "5", "--only", "vgg16"], ["--rounds", "5"]):
        assert quick.exit_code(benchmark.main, ["cpu", *options]) == 0
    assert folders[0] == pathlib.Path("runs/benchmark_cpu")
    assert folders[1] == folders[3] and len({*folders}) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gpu"], "gpu compares with PyTorch, which cannot be imported"),
        (
            ["cpu", "--only", "vgg99"],
            "only='vgg99' is not one of tutorial_net, lenet, convnet, resnet18, mobilenet_v2",
        ),
        (["cpu", "--sides", "cnnjax", "tf"], "sides='tf' is not one of cnnjax, stock, torch,"),
        (["cpu", "--sides", "stock", "cnnjax"], "cnnjax comes first, and others are compared"),
        (["layers", "--sides", "cnnjax"], "sides=['cnnjax']: cnnjax comes first, and others"),
        (["layers", "--sides", "cnnjax", "stock", "stock"], "each named once"),
        (["layers", "--sides", "cnnjax", "oneDNN"], "oneDNN needs ONEDNN_LIBRARY, the path of"),
        (["seeds", "--sides", "cnnjax"], "sides='cnnjax' is not one of nothing: seeds has no"),
        (["seeds", "--rounds", "0"], "argument --rounds: '0' is not a whole number of at least 1"),
    ],
)
def test_the_command_says_in_one_line_why_not(arguments, message, tmp_path, monkeypatch, capsys):
    # Importing PyTorch fails as if it were not installed.
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delenv("ONEDNN_LIBRARY", raising=False)
    assert quick.exit_code(benchmark.main, [*arguments, "--workdir", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and error.count("\n") == 1 and not (tmp_path / "new").exists()
    assert message in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["seeds", "--photographs", "FOLDER"], "photographs='FOLDER' is not used by seeds, only"),
        (["study", "--configurations", "4"], "configurations=4 is not used by study, only by"),
        (["study", "--photographs", "nowhere"], "photographs='nowhere' is not a folder"),
    ],
)
def test_an_option_that_a_benchmark_does_not_use_is_refused(arguments, message, tmp_path, capsys):
    assert quick.exit_code(benchmark.main, [*arguments, "--workdir", str(tmp_path / "new")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_file_or_the_folder_of_another_is_no_work_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "run_input", pytest.fail)
    (tmp_path / "file").touch()
    assert quick.exit_code(benchmark.main, ["input", "--workdir", str(tmp_path / "file")]) == 2
    message = f"error: workdir='{tmp_path / 'file'}' is a file; expected a folder\n"
    assert capsys.readouterr().err.endswith(message)
    (tmp_path / "report.md").write_text("my own")
    assert quick.exit_code(benchmark.main, ["input", "--workdir", str(tmp_path)]) == 2
    message = f"error: workdir='{tmp_path}' holds report.md of something else; remove it or choose "
    assert capsys.readouterr().err.endswith(f"{message}another --workdir\n")
    assert (tmp_path / "report.md").read_text() == "my own"


def test_a_folder_belongs_to_one_set_of_options(tmp_path, monkeypatch, capsys):
    def run_seeds(rounds, configurations, save):
        save(f"{configurations} networks", [])
        # Nobody else may use the folder meanwhile.
        assert (tmp_path / "run.claim").exists()

    monkeypatch.setattr(benchmark, "run_seeds", run_seeds)
    command = ["seeds", "--workdir", str(tmp_path), "--configurations"]
    # An earlier version left no record.
    (tmp_path / "report.md").write_text("an earlier report")
    files.write_json(tmp_path / "benchmark.json", {"what": "seeds"})
    assert benchmark.main([*command, "4"]) == 0
    assert quick.exit_code(benchmark.main, [*command, "2"]) == 2
    assert "configurations=4 there, 2 now); choose another" in capsys.readouterr().err
    assert "4 networks" in (tmp_path / "report.md").read_text()
    # The same command measures anew.
    assert benchmark.main([*command, "4"]) == 0


def test_the_study_measures_the_photographs_that_are_named(tmp_path, monkeypatch):
    folders = []

    def measure(rounds, folder):
        folders.append(folder)
        names = ("encode all", "train all", "encode a batch", "train one")
        numbers = ("steps", "batch", "targets", "together_s", "authors_way_s", "ratio")
        fixed = {"encoder": "vgg16", "images": 24, "size": 224, "photographs": 1}
        return fixed | {"seconds": dict.fromkeys(names, 1.0)} | dict.fromkeys(numbers, 1)

    monkeypatch.setattr(programs, "study", measure)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = ["study", "--photographs", str(tmp_path), "--workdir", str(tmp_path / "run")]
    assert benchmark.main(arguments) == 0
    assert folders == [str(tmp_path)]
    assert "24 crops of 224 px from 1 photographs" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    "library, reason", [("/nowhere/libdnnl.so", "cannot open"), ("libm.so.6", "does not export")]
)
def test_a_library_that_is_not_onednn_is_refused(library, reason, monkeypatch, capsys):
    monkeypatch.setenv("ONEDNN_LIBRARY", library)
    assert quick.exit_code(benchmark.main, ["layers", "--sides", "cnnjax", "oneDNN"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and reason in error
    assert f"ONEDNN_LIBRARY='{library}' cannot be loaded as oneDNN: " in error


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_onednns_convolutions_are_ours(groups):
    """oneDNN's results equal cnnjax's: in jit, loops, pmap, and two threads."""
    if "ONEDNN_LIBRARY" not in os.environ:
        pytest.skip("ONEDNN_LIBRARY is not set: this test needs oneDNN's libdnnl.so.3")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 4, 17, 16, 8), np.float32))
    kernel = jnp.asarray(rng.standard_normal((3, 3, 8 // groups, 16), np.float32))

    def check(compute):
        """Asserts that `compute` returns the same with both convolutions."""
        results = []
        for convolution in (onednn.conv, conv):
            convolve = functools.partial(convolution, stride=2, padding=1, groups=groups)
            loss = lambda x, kernel, convolve=convolve: jnp.square(convolve(x, kernel)).sum()
            results.append(compute(jax.value_and_grad(loss, (0, 1))))
        for theirs, ours in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5 * np.abs(ours).max())

    def descend(gradient):
        step = lambda kernel, _: (kernel - 1e-4 * gradient(x[0], kernel)[1][1], None)
        return jax.jit(lambda kernel: jax.lax.scan(step, kernel, None, length=20)[0])(kernel)

    def threads(gradient):
        gradient = jax.jit(gradient)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda number: gradient(x[number % 2], kernel), range(40)))

    check(lambda gradient: jax.jit(gradient)(x[0], kernel))
    check(descend)
    check(lambda gradient: jax.pmap(gradient, in_axes=(0, None))(x, kernel))
    check(threads)
    with pytest.raises(TypeError, match="bfloat16 and float32: oneDNN is called for float32 only"):
        onednn.conv(x[0].astype(jnp.bfloat16), kernel)


@pytest.mark.slow
def test_seeds_in_one_program_agree_and_are_reported(
    tmp_path, monkeypatch, standard_promotion, capsys
):
    monkeypatch.setitem(base._REGISTRY, "lenet", Tiny)
    monkeypatch.setattr(programs, "_LENET_BATCH", 8)
    benchmark.main(["seeds", "--configurations", "2", "--rounds", "1", "--workdir", str(tmp_path)])
    rows = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    ways = ["one after the other", "vmap", "lax.map", "unrolled"]
    assert [row["way"] for row in rows] == ways
    for row in rows:
        assert row["configurations"] == 2
        # Of one round, the median is its only value.
        assert row["speedup"] == pytest.approx(rows[0]["ms"] / row["ms"])
    assert "| unrolled | " in (tmp_path / "report.md").read_text()
    assert "of 2 LeNets" in capsys.readouterr().out


@pytest.mark.slow
def test_the_studys_arithmetic(monkeypatch, standard_promotion):
    """A small study's totals are the sums of its measured parts."""
    monkeypatch.setitem(base._REGISTRY, "tiny", functools.partial(Tiny, input_shape=(32, 32, 3)))
    results = programs.study(1, encoder="tiny", size=32, images=2, steps=2)
    seconds = results["seconds"]
    assert results["together_s"] == seconds["encode all"] + seconds["train all"]
    one_target = 2 * seconds["encode a batch"] + seconds["train one"]
    assert results["authors_way_s"] == 5 * one_target
    assert results["batch"] == 2


# ------------------------------------------------------------------ the speedrun


def native_conv(x, kernel, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.slow
def test_whitened_patches_are_uncorrelated():
    images = jax.random.normal(jax.random.key(0), (40, 9, 9, 3))
    # Cumulative sums correlate neighboring pixels.
    images = images.cumsum(1).cumsum(2)
    with jax.numpy_rank_promotion("raise"):
        filters = whitening_filters(images)
    assert filters.shape == (2, 2, 3, 24)
    assert jnp.array_equal(filters[..., :12], -filters[..., 12:])
    whitened = native_conv(images, filters[..., :12], "VALID")
    flat = np.asarray(whitened, np.float64).reshape(-1, 12)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.eye(12), atol=0.05)


@pytest.mark.slow
def test_the_network_of_the_record():
    """The network has the record's parameters, and its first filters copy inputs."""
    shapes = jax.eval_shape(
        create_model("speedrun").init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    # There are 24 whitening filters, groups of 64, 256, and 256 filters, and ten classes. The
    # record has no BatchNorm scales; cnnjax adds 2 * (64 + 256 + 256), fixed at 1.
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 256 * 256 * 3)
    assert count == convolutions + 12 * 24 + 24 + 4 * (64 + 256 + 256) + 2560
    kernel = _partly_identity(jax.random.key(0), (3, 3, 8, 32))
    x = jax.random.normal(jax.random.key(1), (1, 6, 6, 8))
    y = native_conv(x, kernel, "SAME")
    assert np.allclose(y[..., :8], x, atol=1e-6)
    assert not np.allclose(y[..., 8:16], x, atol=0.1)


@pytest.mark.slow
def test_each_parameter_is_trained_as_in_the_record():
    """Checks one step of the optimizer.

    Muon scales a kernel to the root of its number of filters, then adds the rate times a nearly
    orthogonal matrix. Frozen parameters do not move.
    """
    config = speedrun.speedrun_cifar10.get_config()
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    params = {
        "whiten": {"kernel": draw(2, 2, 3, 24), "bias": draw(24)},
        "block1.conv1": {"kernel": draw(3, 3, 4, 8)},
        "block1.norm1": {"scale": draw(8), "bias": draw(8)},
        "fc": {"kernel": draw(8, 10)},
    }
    grads = jax.tree.map(lambda p: draw(*p.shape), params)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = speedrun._optimizer(config, 200, 75)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert not updates["whiten"]["kernel"].any()
    assert not updates["block1.norm1"]["scale"].any()
    rates = {
        ("whiten", "bias"): 0.053,
        ("block1.norm1", "bias"): 0.053,
        ("fc", "kernel"): 0.67,
    }
    for (module, name), rate in rates.items():
        # PyTorch's first Nesterov step is 1 + 0.85 times the gradient, with momentum 0.85.
        gradient = grads[module][name] + 2e-6 * 2000 / rate * params[module][name]
        np.testing.assert_allclose(updates[module][name], -rate * 1.85 * gradient, rtol=1e-4)
    kernel = params["block1.conv1"]["kernel"]
    moved = updates["block1.conv1"]["kernel"] + kernel * (1 - 8**0.5 / np.linalg.norm(kernel))
    singular = np.linalg.svd(np.asarray(moved).reshape(-1, 8), compute_uv=False) / 0.24
    # Three Newton-Schulz steps bring the singular values near 1.
    assert 0.3 < singular.min() and singular.max() < 1.3


@pytest.mark.parametrize("number, is_mirrored", [(0, True), (1, True), (2, False), (4, True)])
def test_training_views_are_mirrored_in_turn(number, is_mirrored):
    """An epoch has two steps here; the second image's views are the first's, mirrored."""
    config = ml_collections.ConfigDict({"batch_size": 2, "n_train": 4, "crop": 0})
    image = jnp.arange(4 * 4 * 3, dtype=jnp.float32).reshape(4, 4, 3)
    views = speedrun._training_views(
        config,
        jnp.stack([image, image]),
        jnp.array([True, False]),
        (jnp.zeros(3), jnp.ones(3)),
        number,
        jax.random.key(0),
    )
    expected = [image[:, ::-1], image] if is_mirrored else [image, image[:, ::-1]]
    np.testing.assert_allclose(views, jnp.stack(expected) / 255, rtol=1e-6)


def test_six_views_are_weighted_and_shifted():
    images = jnp.arange(4 * 4, dtype=jnp.float32).reshape(1, 4, 4, 1)
    views, weights = speedrun._views(images)
    assert sum(weights) == 1 and len(views) == 6
    for number in range(3):
        assert jnp.array_equal(views[number + 3], views[number][:, :, ::-1])
    assert jnp.array_equal(views[1][0, 1:, 1:], images[0, :-1, :-1])
    assert jnp.array_equal(views[2][0, :-1, :-1], images[0, 1:, 1:])


def test_runs_are_summarized_by_a_t_test():
    rows = [
        {"accuracy": accuracy, "one_view": accuracy - 1, "seconds": s, "compile_seconds": 1.0}
        for accuracy, s in ((93.9, 3.0), (94.1, 1.0), (94.3, 2.0))
    ]
    results = speedrun.summarize(rows)
    # t = (94.1 - 94) / (0.2 / sqrt 3). Student's distribution with 2 degrees of freedom has
    # P(T > t) = 1/2 - t / (2 sqrt(2 + t^2)).
    t = 0.1 / (0.2 / math.sqrt(3))
    assert results["t"] == pytest.approx(t)
    assert results["p"] == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))
    assert results["seconds"] == 2
    assert results["mean"] == pytest.approx(94.1)
    assert results["half_width"] == pytest.approx(4.3027 * 0.2 / math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize(
    "n_test, most, size", [(10_000, 2000, 2000), (10_000, 1024, 1000), (200, 500, 200), (7, 4, 1)]
)
def test_the_speedrun_tests_in_equal_batches(n_test, most, size):
    assert speedrun._test_batch(n_test, most) == size


@pytest.mark.parametrize("key", ["weight_decay", "crop"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_the_speedrun_refuses_what_is_no_amount(key, value):
    config = speedrun.speedrun_cifar10.get_config()
    # The configuration's own key accepts values of its type only.
    changed = ml_collections.ConfigDict(config.to_dict() | {key: value})
    with pytest.raises(ValueError, match=f"^{key}={value} is not a "):
        speedrun.check(changed)


@pytest.mark.parametrize("key", ["epochs", "filter_rate"])
@pytest.mark.parametrize("value", [0, float("nan"), float("inf")])
def test_the_speedrun_refuses_what_is_not_positive(key, value):
    config = speedrun.speedrun_cifar10.get_config()
    changed = ml_collections.ConfigDict(config.to_dict() | {key: value})
    with pytest.raises(ValueError, match=f"^{key}={value} is not a positive number$"):
        speedrun.check(changed)


def test_speedruns_of_two_machines_are_not_mixed(tmp_path, monkeypatch, capsys):
    """Every processor is jax's device "cpu"; a stopped call goes on."""
    row = {"accuracy": 94.0, "one_view": 93.0, "seconds": 1.0, "compile_seconds": 1.0, "losses": []}
    monkeypatch.setattr(speedrun.arrays, "load", lambda *arguments: None)
    monkeypatch.setattr(speedrun, "draw", lambda *arguments: Figure())

    class Program:
        def __init__(self, *arguments):
            pass

        def run(self, seed):
            if seed == 2:
                raise KeyboardInterrupt
            return row | {"seed": seed}

    monkeypatch.setattr(speedrun, "Program", Program)
    command = ["--workdir", str(tmp_path), "--runs"]
    assert speedrun.main([*command, "3"]) == 75
    assert speedrun.main([*command, "2"]) == 0
    assert "## Environment\n" in (tmp_path / "report.md").read_text()
    machine = host.machine() | {"processor": "another"}
    monkeypatch.setattr(host, "machine", lambda: machine)
    capsys.readouterr()
    assert speedrun.main([*command, "3"]) == 2
    assert "environment.processor=" in capsys.readouterr().err
    # A report of finished runs can be made anywhere, and binds to no other machine.
    record = json.loads((tmp_path / "config.json").read_text())
    assert speedrun.main([*command, "2"]) == 0
    assert json.loads((tmp_path / "config.json").read_text()) == record
    # A work directory of an earlier version names no processor.
    del record["environment"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert speedrun.main([*command, "2"]) == 0
    assert json.loads((tmp_path / "config.json").read_text()) == record


@pytest.mark.slow
def test_the_speedrun_learns_and_goes_on(
    data_dir, tmp_path, monkeypatch, standard_promotion, capsys
):
    """Two epochs of a narrow network reach 30 %; a second call adds the missing runs."""
    arguments = f"--workdir {tmp_path} --data_dir {data_dir} --n_train 2000 --n_test 200".split()
    arguments += "--batch_size 200 --width 8 --epochs 2 --whiten_epochs 1".split()
    load = arrays.load

    def beginning(split, count):
        return arrays.Split(split.images[:count], split.labels[:count])

    # CIFAR-10 is read once; the pixels of 50,000 images would be averaged by every call.
    @functools.cache
    def load_first(name, data_dir):
        data = load(name, data_dir)
        parts = {"train": beginning(data.train, 2000), "test": beginning(data.test, 200)}
        return dataclasses.replace(data, **parts)

    monkeypatch.setattr(speedrun.arrays, "load", load_first)

    speedrun.main([*arguments, "--runs", "1"])
    first = (tmp_path / "runs" / "0.json").read_text()
    results = json.loads((tmp_path / "speedrun.json").read_text())
    losses = results["runs"][0]["losses"]
    assert results["mean"] > 30 and results["t"] is None and losses[1] < losses[0]
    table = capsys.readouterr().out
    assert f"{results['mean']:.2f}" in table and "| A100 | 94.01 | 200 | 2.59 |" in table
    assert (tmp_path / "speedrun.png").stat().st_size > 1000
    assert "![Losses" in (tmp_path / "report.md").read_text()

    second = {**json.loads(first), "seed": 1, "accuracy": results["mean"] + 1}
    (tmp_path / "runs" / "1.json").write_text(json.dumps(second))
    speedrun.main([*arguments, "--runs", "2"])
    assert (tmp_path / "runs" / "0.json").read_text() == first
    assert "t = " in (tmp_path / "report.md").read_text()
    assert speedrun.main([*arguments, "--runs", "2", "--filter_rate", "0.1"]) == 2
    assert "filter_rate=0.24 there, 0.1 now" in capsys.readouterr().err
    assert speedrun.main([*arguments, "--batch_size", "4000"]) == 2
    assert "batch_size=4000" in capsys.readouterr().err
