"""The benchmarks' sides compute the same, their tables hold what was measured, and the speedrun learns."""

import functools
import json
import math
import sys

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from cnnjax import summary
from cnnjax.benchmark import __main__ as benchmark
from cnnjax.benchmark import programs, sides, turns
from cnnjax.models import Network, base, create_model
from cnnjax.models.speedrun import _partly_identity, whitening_filters
from cnnjax.nn import BatchNorm, Conv, Dense, max_pool
from cnnjax.train import loop
from experiments import speedrun


class Tiny(Network):
    """What the stock side replaces: a convolution with its bias, a depthwise one, BatchNorm, a max-pool."""

    num_classes: int = 3
    input_shape: tuple[int, int, int] = (8, 8, 2)

    def walk(self, x, train):
        x = Conv(4, 3, padding=1, name="conv1")(x)
        x = BatchNorm(name="norm")(Conv(4, 3, padding=1, groups=4, name="conv2")(x), train)
        yield "block", x
        yield "logits", Dense(self.num_classes, name="fc")(max_pool(x, 2).reshape(len(x), -1))


def test_the_stock_side_is_the_same_network(standard_promotion):
    """Loss and every gradient agree, and the stock gradients are those that jax derives."""
    model, x = Tiny(), jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
    variables = quick.jit(model.init)(jax.random.key(1), x)

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.square(logits).sum()

    results = {}
    for side in ("cnnjax", "stock"):
        with sides.side_lowering(side):
            results[side] = quick.jit(jax.value_and_grad(loss))(variables["params"])
            program = str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))
            assert ("select_and_scatter" in program) == (side == "stock")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        results["cnnjax"],
        results["stock"],
    )


def test_a_layers_passes_are_those_of_the_convolution():
    """The sizes that sides are compared by, from a convolution written out; and operations counted as the table of a network does."""
    shape = (2, 5, 4, 6, 3, 2, 1, 2)  # batch, side, in, out, kernel, stride, padding, groups
    _, facts = sides._layer("cnnjax", shape)
    rng = np.random.default_rng(0)
    x, w, dy = (
        rng.standard_normal(s, np.float32) for s in ((2, 5, 5, 4), (3, 3, 2, 6), (2, 3, 3, 6))
    )
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, dx, dw = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(w.shape)
    for group, i, j, a, b in np.ndindex(2, 3, 3, 3, 3):
        read, made = slice(2 * group, 2 * group + 2), slice(3 * group, 3 * group + 3)
        cell = padded[:, 2 * i + a, 2 * j + b, read]
        y[:, i, j, made] += cell @ w[a, b, :, made]
        dx[:, 2 * i + a, 2 * j + b, read] += dy[:, i, j, made] @ w[a, b, :, made].T
        dw[a, b, :, made] += cell.T @ dy[:, i, j, made]
    np.testing.assert_allclose(
        facts["sizes"], [np.abs(value).mean() for value in (y, dx[:, 1:-1, 1:-1], dw)], rtol=1e-4
    )


@pytest.mark.parametrize("network", sorted({name.partition(".")[0] for name in sides.LAYERS}))
def test_the_layers_are_of_the_networks_that_they_name(network):
    macs = {layer.name: layer.macs for layer in summary.layers(create_model(network))}
    for name, shape in sides.LAYERS.items():
        if name.partition(".")[0] == network:
            assert benchmark._layer_flops(shape) == 2 * shape[0] * macs[name.partition(".")[2]]


@pytest.mark.parametrize("name", sides.SPECIFICATIONS)
def test_the_specifications_are_the_networks(name):
    """The other side's list of layers has the parameters of the network here."""
    side, channels, layers = sides.SPECIFICATIONS[name]
    assert create_model(name).input_shape == (side, side, channels)
    count = 0
    for layer in layers:
        if layer == "pool":
            side //= 2
        elif isinstance(layer, tuple):
            count += (layer[1] ** 2 * channels + 1) * layer[0]
            channels, side = layer[0], side + 2 * layer[2] - layer[1] + 1
        else:
            inputs, side = channels * max(side, 1) ** 2, 0
            count, channels = count + (inputs + 1) * layer, layer
    assert count == summary.totals(summary.layers(create_model(name)))["parameters"]


def test_steps_in_one_call_are_those_one_by_one(monkeypatch, standard_promotion):
    assert sides._TRAINING_BURST == loop._SECONDS_A_CALL
    monkeypatch.setitem(base._REGISTRY, "lenet", Tiny)
    monkeypatch.setattr(sides, "_BATCHES", 1)
    one_by_one, at_once = (
        sides._jax_network("lenet", 4, "float32", looped)[0]["training"] for looped in (False, True)
    )
    states = [
        jax.tree.map(np.array, run(3)) for run in (one_by_one, at_once, one_by_one)
    ]  # the next run consumes them
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), states[0], states[1]
    )
    assert any(
        np.abs(a - b).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, (states[0], states[2])))
    )


def test_two_processes_take_turns_and_agree(monkeypatch):
    """The protocol, on one small layer; utilisation and ratios are those of the times."""
    monkeypatch.setitem(turns.SIDES, "layers", ("cnnjax", "stock"))
    facts, times = turns.measure("layers", ("cnnjax", "stock"), "lenet.conv1", 128, 2)
    rows = turns.rows_of("layers", "lenet.conv1", 128, 1e9, facts, times)
    assert [(row["pass"], row["side"]) for row in rows] == [
        (key, side) for key in sides.PASSES["layers"] for side in ("cnnjax", "stock")
    ]
    for ours, stock in zip(rows[::2], rows[1::2]):
        assert (
            ours["over_cnnjax"] == 1
            and stock["min_ms"] <= stock["ms"] <= stock["max_ms"]
            and stock["over_cnnjax"] > 0
        )
        assert ours["gflop_per_s"] == pytest.approx(1e3 / ours["ms"])
        assert ours["utilisation"] == pytest.approx(ours["gflop_per_s"] / ours["peak_gflop_per_s"])


def test_sides_that_differ_or_fail_are_refused(monkeypatch, capfd):
    with pytest.raises(
        RuntimeError, match="the nobody side of lenet.conv1 stopped with exit code 1"
    ):
        turns.measure("cpu", ("nobody",), "lenet.conv1", 1, 1)
    assert "lenet.conv1" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gpu"], "gpu compares with PyTorch, which cannot be imported"),
        (
            ["cpu", "--only", "vgg16"],
            "only='vgg16' is not one of tutorial_net, lenet, convnet, resnet18, mobilenet_v2",
        ),
        (["seeds", "--rounds", "0"], "argument --rounds: '0' is not a whole number of at least 1"),
    ],
)
def test_the_command_says_in_one_line_why_not(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    assert quick.exit_code(benchmark.main, [*arguments, "--workdir", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and error.count("\n") == 1 and not (tmp_path / "new").exists()
    assert message in error


def test_seeds_in_one_program_agree_and_are_reported(
    tmp_path, monkeypatch, standard_promotion, capsys
):
    monkeypatch.setitem(base._REGISTRY, "lenet", Tiny)
    monkeypatch.setattr(programs, "_LENET_BATCH", 8)
    benchmark.main(["seeds", "--configurations", "2", "--rounds", "1", "--workdir", str(tmp_path)])
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["way"] for row in found["results"]] == [
        "one after the other",
        "vmap",
        "lax.map",
        "unrolled",
    ]
    assert all(
        row["configurations"] == 2 and row["ms"] > 0 and row["compile_s"] > 0
        for row in found["results"]
    )
    assert (
        found["results"][0]["speedup"] == 1
        and "| unrolled | " in (tmp_path / "report.md").read_text()
    )
    assert "of 2 LeNets" in capsys.readouterr().out


def test_the_studys_arithmetic(monkeypatch, standard_promotion):
    """On a small part, the sums are those of the parts measured."""
    monkeypatch.setitem(base._REGISTRY, "tiny", functools.partial(Tiny, input_shape=(32, 32, 3)))
    found = programs.study(1, encoder="tiny", size=32, images=2, steps=2)
    seconds = found["seconds"]
    assert found["together_s"] == seconds["encode all"] + seconds["train all"]
    assert (
        found["authors_way_s"] == 5 * (2 * seconds["encode a batch"] + seconds["train one"])
        and found["batch"] == 2
    )


# ------------------------------------------------------------------ the speedrun


def test_whitened_patches_are_uncorrelated():
    images = (
        jax.random.normal(jax.random.key(0), (40, 9, 9, 3)).cumsum(1).cumsum(2)
    )  # neighbors are alike
    filters = whitening_filters(images)
    assert filters.shape == (2, 2, 3, 24) and jnp.array_equal(filters[..., :12], -filters[..., 12:])
    found = jax.lax.conv_general_dilated(
        images, filters[..., :12], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    flat = np.asarray(found, np.float64).reshape(-1, 12)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.eye(12), atol=0.05)


def test_the_network_of_the_record():
    """Jordan's network: 24 whitening filters, groups of 64, 256 and 256, ten classes, and the first filters copy their input."""
    shapes = jax.eval_shape(
        create_model("speedrun").init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    sizes = {
        path: leaf.size
        for path, leaf in flax.traverse_util.flatten_dict(shapes["params"], sep="/").items()
    }
    # The record has no BatchNorm scale: 2 * (64 + 256 + 256) are ours alone, fixed at 1.
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 256 * 256 * 3)
    assert sum(sizes.values()) == convolutions + 12 * 24 + 24 + 4 * (64 + 256 + 256) + 2560
    kernel = _partly_identity(jax.random.key(0), (3, 3, 8, 32))
    x = jax.random.normal(jax.random.key(1), (1, 6, 6, 8))
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert np.allclose(y[..., :8], x, atol=1e-6) and not np.allclose(y[..., 8:16], x, atol=0.1)


def test_each_parameter_is_trained_as_in_the_record():
    """After one step: Muon's filters have unit norm each plus the rate times an orthogonal matrix; frozen ones have not moved."""
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
    assert not updates["whiten"]["kernel"].any() and not updates["block1.norm1"]["scale"].any()
    for (module, name), rate in {
        ("whiten", "bias"): 0.053,
        ("block1.norm1", "bias"): 0.053,
        ("fc", "kernel"): 0.67,
    }.items():
        # PyTorch's Nesterov, first step: the gradient counts once and, through the momentum, 0.85 times.
        gradient = grads[module][name] + 2e-6 * 2000 / rate * params[module][name]
        np.testing.assert_allclose(updates[module][name], -rate * 1.85 * gradient, rtol=1e-4)
    kernel = params["block1.conv1"]["kernel"]
    moved = updates["block1.conv1"]["kernel"] + kernel * (1 - 8**0.5 / np.linalg.norm(kernel))
    singular = np.linalg.svd(np.asarray(moved).reshape(-1, 8), compute_uv=False) / 0.24
    assert (
        0.3 < singular.min() and singular.max() < 1.3
    )  # three Newton-Schulz steps leave them about 1


def test_views_and_t_test():
    images = jnp.arange(4 * 4, dtype=jnp.float32).reshape(1, 4, 4, 1)
    views, weights = speedrun._views(images)
    assert (
        sum(weights) == 1
        and len(views) == 6
        and all(jnp.array_equal(views[n + 3], views[n][:, :, ::-1]) for n in range(3))
    )
    assert jnp.array_equal(views[1][0, 1:, 1:], images[0, :-1, :-1]) and jnp.array_equal(
        views[2][0, :-1, :-1], images[0, 1:, 1:]
    )
    rows = [
        {"accuracy": a, "one_view": a - 1, "seconds": s, "compile_seconds": 1.0}
        for a, s in ((93.9, 3.0), (94.1, 1.0), (94.3, 2.0))
    ]
    found = speedrun.summarize(rows)
    # t = (94.1 - 94) / (0.2 / sqrt 3); Student's distribution with 2 degrees of freedom has P(T > t) = 1/2 - t / (2 sqrt(2 + t^2)).
    t = 0.1 / (0.2 / math.sqrt(3))
    assert (
        found["t"] == pytest.approx(t)
        and found["p"] == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))
        and found["seconds"] == 2
    )
    assert found["mean"] == pytest.approx(94.1) and found["half_width"] == pytest.approx(
        4.3027 * 0.2 / math.sqrt(3), rel=1e-4
    )


def test_the_speedrun_learns_and_goes_on(
    data_dir, tmp_path, monkeypatch, standard_promotion, capsys
):
    """2,000 images, a narrow network, two epochs: three times chance; a second call makes the missing run only."""
    arguments = [
        "--workdir",
        str(tmp_path),
        "--data_dir",
        str(data_dir),
        "--n_train",
        "2000",
        "--n_test",
        "500",
        "--batch_size",
        "200",
        "--width",
        "8",
        "--epochs",
        "2",
        "--whiten_epochs",
        "1",
    ]
    monkeypatch.setattr(
        speedrun,
        "train_and_test",
        quick.jit(speedrun.train_and_test.__wrapped__, static_argnames="config"),
    )
    speedrun.main([*arguments, "--runs", "1"])
    first = (tmp_path / "runs" / "0.json").read_text()
    found = json.loads((tmp_path / "speedrun.json").read_text())
    assert (
        found["mean"] > 30
        and found["t"] is None
        and found["runs"][0]["losses"][1] < found["runs"][0]["losses"][0]
    )
    table = capsys.readouterr().out
    assert f"{found['mean']:.2f}" in table and "| A100 | 94.01 | 200 | 2.59 |" in table
    assert (tmp_path / "speedrun.png").stat().st_size > 1000 and "![Losses" in (
        tmp_path / "report.md"
    ).read_text()
    (tmp_path / "runs" / "1.json").write_text(
        json.dumps({**json.loads(first), "seed": 1, "accuracy": found["mean"] + 1})
    )
    speedrun.main([*arguments, "--runs", "2"])
    assert (tmp_path / "runs" / "0.json").read_text() == first and "t = " in (
        tmp_path / "report.md"
    ).read_text()
    assert speedrun.main([*arguments, "--runs", "2", "--filter_rate", "0.1"]) == 2
    assert "filter_rate=0.24 there, 0.1 now" in capsys.readouterr().err
    assert speedrun.main([*arguments, "--batch_size", "4000"]) == 2
    assert "batch_size=4000" in capsys.readouterr().err
