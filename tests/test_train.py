"""The training engine: one step in three parallel modes, and resumed runs."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import time
import types
import unicodedata
from typing import ClassVar

import flax.linen as nn
import forked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
import quick
import safetensors.numpy

import cnnjax.main
import cnnjax.sweep
from cnnjax import classifier
from cnnjax.data import arrays, augment
from cnnjax.models import Network, create_model
from cnnjax.models.googlenet import sow_logits
from cnnjax.models.small import SmallConvNet, SmallResNet
from cnnjax.nn import BatchNorm, Conv, Dense, global_avg_pool, lowering
from cnnjax.runtime import claims, figures, files, processes, workdir
from cnnjax.train import adopt, defaults, evaluate, loop, schedules, step
from cnnjax.train import data as training_data
from cnnjax.train import results as training_results
from cnnjax.train.adopt import adopt_changes, complete_record, is_equivalent
from cnnjax.train.checkpoints import Checkpoints, NotWritten
from cnnjax.train.parallel import Parallel
from cnnjax.train.run import open_run, read_config
from cnnjax.train.training import Training, build_run

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Tiny(Network):
    """Two convolutions with BatchNorm, which compile quickly."""

    input_shape: tuple[int, int, int] = (8, 8, 3)

    @nn.nowrap
    def walk(self, x, train):
        for number in (1, 2):
            x = Conv(8, 3, padding=1, fill=self.padding, name=f"conv{number}")(x)
            x = nn.relu(BatchNorm(axis_name=self.axis_name, name=f"bn{number}")(x, train))
            yield f"conv{number}", x
        yield "logits", Dense(self.num_classes, name="fc")(global_avg_pool(x))


def some_data(count=64):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8), generator.integers(
        0, 5, count
    ).astype(np.int32)


MOMENTS = (np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32))
CONSTANTS = step.Constants(moments=MOMENTS, rates=np.full(50, 0.1, np.float32))
RECIPE = step.Recipe(Tiny(num_classes=5), augment=(("crop", 1), ("flip", True)), ema=True)
NUMBERS = step.Numbers(seed=3, momentum=0.9, weight_decay=1e-3, label_smoothing=0.1, ema_decay=0.9)


def losses(
    way: str, recipe: step.Recipe, steps: int = 50, batch_size: int = 16
) -> tuple[list[float], step.State]:
    """Returns the loss of every single step, and the state at the end."""
    parallel = Parallel(way)
    recipe = step.dataclasses.replace(
        recipe, model=recipe.model.clone(axis_name=parallel.axis_name)
    )
    data = parallel.replicate(some_data())
    state = parallel.replicate(step.init(recipe, (8, 8, 3), NUMBERS))
    rates = np.full(steps, 0.1, np.float32)
    constants = parallel.replicate(step.Constants(moments=MOMENTS, rates=rates))
    run, step_losses, previous_total = step.resident_steps(parallel, recipe, batch_size), [], 0.0
    for number in range(steps):
        # An epoch has four steps.
        if number % 4 == 0:
            order = parallel.replicate(step.epoch_order(64, number // 4, NUMBERS.seed))
        images = step.Images(images=data[0], labels=data[1], order=order)
        state = run(state, constants, images, NUMBERS, np.int32(number + 1))
        total = float(parallel.fetch(state.totals)["loss"])
        previous_total = 0.0 if number % 4 == 0 else previous_total
        step_losses.append((total - previous_total) / batch_size)
        previous_total = total
    return step_losses, parallel.fetch(state)


@pytest.fixture(scope="module")
def on_one_device():
    with jax.numpy_dtype_promotion("standard"):
        return losses("jit", RECIPE)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pmap", "shard_map"])
def test_eight_devices_train_as_one(way, on_one_device):
    """Compares the losses of 50 steps and the final states.

    The steps have augmentation, BatchNorm over all devices, momentum, weight decay, and an average
    of the parameters.
    """
    assert Parallel(way).size == 8
    step_losses, state = losses(way, RECIPE)
    np.testing.assert_allclose(step_losses, on_one_device[0], rtol=1e-5)
    # The network learns, although the labels are random.
    assert step_losses[-1] < 0.9 * step_losses[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state, on_one_device[1])


def main(arguments: list[str]) -> int:
    """One of the two processes below: trains in both ways, and process 0 prints the losses."""
    port, rank = arguments
    jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
    assert jax.device_count() == 8 and jax.process_count() == 2
    step_losses = {way: losses(way, RECIPE, steps=12)[0] for way in ("pmap", "shard_map")}
    if jax.process_index() == 0:
        print(json.dumps(step_losses))
    jax.distributed.shutdown()
    return 0


@pytest.mark.slow
def test_two_processes_train_as_one(on_one_device):
    """Each process has four devices, and jax.distributed joins them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = {"flags": quick.FLAGS, "config": {"jax_num_cpu_devices": 4}}
    processes = [forked.Popen("test_train", port, rank, **options) for rank in (0, 1)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    step_losses = json.loads(outputs[0][0].splitlines()[-1])
    assert step_losses.keys() == {"pmap", "shard_map"}
    for way in step_losses:
        np.testing.assert_allclose(step_losses[way], on_one_device[0][:12], rtol=1e-5)


def test_several_devices_use_shard_map_where_jax_has_no_pmap(monkeypatch):
    assert jax.device_count() > 1 and Parallel("auto").way == "pmap"
    monkeypatch.delattr(jax, "pmap")
    assert Parallel("auto").way == "shard_map"
    with pytest.raises(ValueError, match="parallel='pmap': this jax has no pmap; use 'shard_map'"):
        Parallel("pmap")


@pytest.mark.slow
def test_how_many_steps_a_call_takes_changes_no_bit(on_one_device):
    parallel = Parallel("jit")
    state = step.init(RECIPE, (8, 8, 3), NUMBERS)
    run = step.resident_steps(parallel, RECIPE, 16)
    for epoch in range(13):
        order = step.epoch_order(64, epoch, NUMBERS.seed)
        images, labels = some_data()
        data = step.Images(images=images, labels=labels, order=order)
        state = run(state, CONSTANTS, data, NUMBERS, np.int32(min(50, 4 * epoch + 4)))
    jax.tree.map(np.testing.assert_array_equal, state, on_one_device[1])


@pytest.mark.slow
def test_seeds_and_numbers_share_one_compilation():
    run = step.resident_steps(Parallel("jit"), RECIPE, 16)
    images, labels = some_data()
    data = step.Images(images=images, labels=labels, order=step.epoch_order(64, 0, 0))
    compiled = None
    for seed, momentum, decay in ((0, 0.9, 0.0), (1, 0.5, 0.1), (2, 0.0, 0.2)):
        numbers = step.Numbers(seed, momentum, decay)
        run(step.init(RECIPE, (8, 8, 3), numbers), CONSTANTS, data, numbers, np.int32(1))
        compiled = compiled or (run._cache_size(), step.init._cache_size())
    assert (run._cache_size(), step.init._cache_size()) == compiled


def test_every_epoch_has_its_own_order():
    orders = [
        np.asarray(step.epoch_order(64, epoch, seed)) for epoch, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert not any((a == b).all() for a, b in ((orders[0], orders[1]), (orders[0], orders[2])))


take_step = jax.jit(step.batch_step, static_argnums=0)


def one_step(recipe: step.Recipe, numbers: step.Numbers, images, labels, rate=0.1):
    state = step.init(recipe, images.shape[1:], numbers)
    batch = step.Batch(
        images=images,
        labels=labels,
        moments=MOMENTS,
        learning_rate=jnp.float32(rate),
        steps_per_epoch=4,
    )
    return state, take_step(recipe, state, batch, numbers)


@pytest.mark.slow
def test_a_step_is_plain_gradient_descent():
    """Compares a step with the formulas, computed without the engine.

    The averages of parameters and statistics and the sums for the epoch are compared, too.
    """
    images, labels = some_data(16)
    recipe, numbers = (
        step.Recipe(Tiny(num_classes=5), ema=True),
        step.Numbers(seed=1, momentum=0.0, ema_decay=0.75),
    )
    before, after = one_step(recipe, numbers, images, labels)
    x = (images / np.float32(255) - 0.5) / 0.25

    def loss(params):
        variables = {"params": params, "batch_stats": before.batch_stats}
        logits, new = recipe.model.apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (
            logits,
            new["batch_stats"],
        )

    value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (logits, stats)), grads = value_and_gradient(before.params)
    close = functools.partial(
        jax.tree.map, lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    )
    close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, before.params, grads))
    # In the first step, the decay of the averages is at most 1 / 10.
    average = functools.partial(jax.tree.map, lambda p, q: 0.1 * p + 0.9 * q)
    close(after.ema, average(before.params, after.params))
    close(after.batch_stats, stats)
    close(after.ema_batch_stats, average(before.batch_stats, stats))
    np.testing.assert_allclose(after.totals["loss"], 16 * value, rtol=1e-5)
    assert (
        after.totals["errors"] == (logits.argmax(-1) != labels).sum()
        and after.totals["count"] == 16
        and after.step == 1
    )


class Headed(Network):
    """Two linear classifiers of the mean color, of which one is auxiliary."""

    auxiliary_weight: ClassVar[float] = 0.7

    input_shape: tuple[int, int, int] = (8, 8, 3)

    @nn.nowrap
    def walk(self, x, train):
        color = global_avg_pool(x)
        sow_logits(self, Dense(self.num_classes, name="aux")(color))
        yield "logits", Dense(self.num_classes, name="fc")(color)


def test_auxiliary_losses_have_the_weight_of_the_networks_class():
    images, labels = some_data(16)
    recipe = step.Recipe(Headed(num_classes=5))
    before, after = one_step(recipe, step.Numbers(seed=1, momentum=0.0), images, labels)
    x = (images / np.float32(255) - 0.5) / 0.25

    def loss(params):
        logits, sown = recipe.model.apply({"params": params}, x, train=True, mutable=["auxiliary"])
        (auxiliary_logits,) = jax.tree.leaves(sown)
        losses, auxiliary_losses = (
            optax.softmax_cross_entropy_with_integer_labels(head, labels)
            for head in (logits, auxiliary_logits)
        )
        return losses.mean() + 0.7 * auxiliary_losses.mean()

    gradient = jax.jit(jax.grad(loss))(before.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before.params, gradient)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, after.params, expected)


def test_the_weights_of_the_published_auxiliary_losses():
    names = ("googlenet", "googlenet_2014", "inception_v3")
    assert [create_model(name).auxiliary_weight for name in names] == [0.3, 0.3, 0.4]


@pytest.mark.slow
def test_accumulated_parts_are_the_whole_batch():
    images, labels = some_data(16)
    # This network has no BatchNorm, whose statistics would be those of a part.
    model = SmallConvNet(num_classes=5, input_shape=(8, 8, 3), layers=((8, 1), (8, 2)))
    whole, parts = (
        one_step(step.Recipe(model, accumulate=count), NUMBERS, images, labels)[1]
        for count in (1, 4)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, parts)


def test_accumulated_parts_are_computed_one_by_one():
    """Each part is a fourth of the batch, and BatchNorm's statistics pass from part to part."""
    images, labels = some_data(16)
    recipe = step.Recipe(Tiny(num_classes=5), accumulate=4)
    numbers = step.Numbers(seed=1)
    state = step.init(recipe, (8, 8, 3), numbers)
    batch = step.Batch(images, labels, MOMENTS, jnp.float32(0.1), 4)
    take = functools.partial(step.batch_step, recipe)
    with lowering("reference"):
        program = jax.make_jaxpr(take)(state, batch, numbers).jaxpr
    (scan,) = [e for e in quick.equations(program) if e.primitive.name == "scan"]
    assert scan.params["length"] == 4
    batches = lambda program: [
        e.invars[0].aval.shape[0]
        for e in quick.equations(program)
        if e.primitive.name == "conv_general_dilated" and e.invars[0].aval.shape[1:3] == (8, 8)
    ]
    inside = batches(scan.params["jaxpr"].jaxpr)
    assert len(inside) >= 2 and batches(program) == inside

    after = jax.jit(take)(state, batch, numbers)
    x = (images / np.float32(255) - 0.5) / 0.25
    update = jax.jit(functools.partial(recipe.model.apply, train=True, mutable=["batch_stats"]))
    stats = state.batch_stats
    for part in np.split(x, 4):
        _, updated = update({"params": state.params, "batch_stats": stats}, part)
        stats = updated["batch_stats"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.batch_stats, stats)


@pytest.mark.slow
def test_losses_are_their_formulas():
    generator = np.random.default_rng(0)
    logits, labels = (
        generator.normal(size=(4, 3, 3, 5)).astype(np.float32),
        generator.integers(0, 5, (4, 3, 3)),
    )
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    # PyTorch's label smoothing spreads 0.1 of the probability over all classes, the true one
    # included.
    smooth = lambda y: 0.9 * np.eye(5)[y] + 0.1 / 5
    losses, errors = step.loss_and_errors("cross_entropy", logits[:, 0, 0], labels[:, 0, 0], 0.1)
    np.testing.assert_allclose(
        losses, -(logs[:, 0, 0] * smooth(labels[:, 0, 0])).sum(-1), rtol=1e-5
    )
    np.testing.assert_array_equal(errors, logits[:, 0, 0].argmax(-1) != labels[:, 0, 0])
    ignored = labels.copy()
    ignored[0, 0, 0] = ignored[1] = step.IGNORED
    losses, errors = step.loss_and_errors("pixelwise", logits, ignored)
    each = -np.take_along_axis(logs, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        losses, [each[0].ravel()[1:].mean(), 0, each[2].mean(), each[3].mean()], rtol=1e-5
    )
    wrong = logits.argmax(-1) != labels
    np.testing.assert_allclose(
        errors, [wrong[0].ravel()[1:].mean(), 0, wrong[2].mean(), wrong[3].mean()], rtol=1e-5
    )
    losses, _ = step.loss_and_errors("pixelwise", logits[2:], labels[2:], 0.1)
    each = -(logs[2:] * smooth(labels[2:])).sum(-1)
    np.testing.assert_allclose(losses, each.mean((1, 2)), rtol=1e-5)
    many = generator.integers(0, 2, (4, 5))
    probability = 1 / (1 + np.exp(-logits[:, 0, 0]))
    losses, errors = step.loss_and_errors("sigmoid", logits[:, 0, 0], many)
    np.testing.assert_allclose(
        losses, -np.where(many, np.log(probability), np.log(1 - probability)).mean(-1), rtol=1e-5
    )
    np.testing.assert_allclose(errors, ((probability > 0.5) != many).mean(-1), rtol=1e-6)
    # Smoothed, each class has 0.1 of its probability spread over its two answers.
    losses, _ = step.loss_and_errors("sigmoid", logits[:, 0, 0], many, 0.1)
    soft = 0.9 * many + 0.05
    each = -(soft * np.log(probability) + (1 - soft) * np.log(1 - probability))
    np.testing.assert_allclose(losses, each.mean(-1), rtol=1e-5)


def test_an_unknown_loss_is_named():
    message = "loss='mse' is not one of cross_entropy, sigmoid, pixelwise"
    with pytest.raises(ValueError, match=message):
        step.loss_and_errors("mse", np.zeros((4, 5), np.float32), np.zeros(4, np.int32))


@pytest.mark.slow
def test_mixup_mixes_images_and_losses():
    """An image is mixed with its opposite in the batch.

    If that is the same image with the same label, nothing changes.
    """
    images, labels = some_data(16)
    images[8:] = images[7::-1]
    same = labels.copy()
    same[8:] = labels[7::-1]
    plain, mixing = step.Recipe(Tiny(num_classes=5)), step.Recipe(Tiny(num_classes=5), mixup=True)
    loss = lambda recipe, labels, mixup: one_step(
        recipe, step.Numbers(0, mixup=mixup), images, labels
    )[1].totals["loss"]
    for mixup in (0.2, 50.0):
        np.testing.assert_allclose(loss(mixing, same, mixup), loss(plain, same, 0.0), rtol=1e-5)
    # With so large a parameter, the share is one half. Compare with the formula for other images.
    images, labels = some_data(16)
    state, after = one_step(mixing, step.Numbers(0, mixup=1e8), images, labels)
    x = (images / np.float32(255) - 0.5) / 0.25
    train = functools.partial(mixing.model.apply, train=True, mutable=["batch_stats"])
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, _ = jax.jit(train)(variables, (x + x[::-1]) / 2)
    both = [
        optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()
        for y in (labels, labels[::-1].copy())
    ]
    np.testing.assert_allclose(after.totals["loss"], sum(both) / 2, rtol=1e-4)


def test_a_network_that_draws_in_evaluation_is_evaluated():
    model = SmallResNet(5, widths=(4, 8), permute=True, input_shape=(16, 16, 3))
    variables, x = quick.variables(model), quick.normal(0, 2, 16, 16, 3)
    one, again = (evaluate.logits(model, variables, x) for _ in range(2))
    assert one.shape == (2, 5) and np.array_equal(one, again)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jit", "pmap", "shard_map"])
def test_predictions_run_the_same_three_ways(way):
    # 37 is a multiple neither of the batch size nor of the number of devices.
    images, _ = some_data(37)
    model = Tiny(num_classes=5)
    variables = quick.variables(model)
    parallel = Parallel(way)
    placed, moments = parallel.replicate(variables), parallel.replicate(MOMENTS)
    x = (images / np.float32(255) - 0.5) / 0.25
    logits = jax.jit(model.apply)
    upright, mirrored = (nn.softmax(logits(variables, view)) for view in (x, x[:, :, ::-1]))
    for output, want in (
        (evaluate.logits, logits(variables, x)),
        (evaluate.averaged(2), jnp.log((upright + mirrored) / 2)),
    ):
        predicted = evaluate.predict_batches(
            parallel,
            model,
            placed,
            moments,
            batches=evaluate.batches_of(images, 16),
            batch_size=16,
            output=output,
        )
        np.testing.assert_allclose(np.concatenate([*predicted]), want, atol=1e-5)


class LastPixel(Network):
    """Its logits are the last pixel."""

    input_shape: tuple[int, int, int] = (3, 2, 5)

    @nn.nowrap
    def walk(self, x, train):
        yield "logits", x[:, -1, -1]


@pytest.mark.parametrize("height, width", [(6, 4), (4, 6)])
def test_views_of_images_that_are_not_square(height, width):
    images = jax.random.normal(jax.random.key(0), (3, height, width, 5))
    # Two views are the whole image and its mirror image.
    averaged = evaluate.averaged(2)(LastPixel(num_classes=5), {}, images)
    want = (nn.softmax(images[:, -1, -1]) + nn.softmax(images[:, -1, 0])) / 2
    np.testing.assert_allclose(jnp.exp(averaged), want, rtol=1e-5)
    # Ten views have the size of the network's input.
    crops = augment.views(images, 10, (3, 2))
    rows = (slice(0, 3), slice(height - 3, height))
    columns = (slice(0, 2), slice(width - 2, width))
    for crop, mirrored, (row, column) in zip(crops, crops[5:], itertools.product(rows, columns)):
        np.testing.assert_array_equal(crop, images[:, row, column])
        np.testing.assert_array_equal(mirrored, crop[:, :, ::-1])
    averaged = evaluate.averaged(10)(LastPixel(num_classes=5), {}, images)
    want = np.mean([nn.softmax(crop[:, -1, -1]) for crop in crops], 0)
    np.testing.assert_allclose(jnp.exp(averaged), want, rtol=1e-5)


# ------------------------------------------------------- whole runs, as a user starts them

SMALL = [
    "cnnjax.main",
    "--config",
    "configs/lenet_digits.py",
    "--config.epochs=3",
    "--config.n_validation=100",
    "--config.augment.crop=1",
    "--config.ema_decay=0.9",
    "--config.checkpoint_every_steps=4",
]


def command(*arguments, **options):
    return forked.run(*SMALL, *arguments, **options)


def parameters(folder: pathlib.Path) -> dict[str, str]:
    """Returns the last checkpoint's step, history, and arrays as bytes."""
    from cnnjax.train.checkpoints import Checkpoints, _leaves

    model = create_model("lenet", input_shape=(8, 8, 1))
    like = step.init(step.Recipe(model, augment=(), ema=True), (8, 8, 1), step.Numbers(0))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        at, state, record = checkpoints.restore(like)
    return {
        "step": at,
        "history": record["history"],
        **{name: np.asarray(leaf).tobytes() for name, leaf in _leaves(state).items()},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = command("--workdir", folder, figures=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_run_leaves_its_record(finished):
    results = json.loads((finished / "results.json").read_text())
    final, history = results["final"], results["history"]
    assert (
        results["kind"] == "train"
        and len(history) == 3
        and final["epoch"] == 3
        and final["step"] == 3 * (1337 // 128)
    )
    assert {
        "train_loss",
        "train_error",
        "validation_loss",
        "validation_error",
        "test_loss",
        "test_error",
    } <= set(final)
    assert 0 <= final["train_error"] < 0.2 and 0 <= final["test_error"] < 0.3
    assert [
        json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()
    ] == history
    for name in ("curves.png", "confusion.png", "mistakes.png", "report.md"):
        assert (finished / name).stat().st_size > 1000
    assert any((finished / "tensorboard").iterdir())
    with np.load(finished / "test.npz") as saved:
        assert (saved["labels"] != saved["predicted"]).mean() == pytest.approx(final["test_error"])
        assert (saved["labels"] != saved["predicted"])[saved["shown"]].all()
    # A second call finds the run finished and only rewrites the report.
    assert command("--workdir", finished).returncode == 0
    assert json.loads((finished / "results.json").read_text()) == results


@pytest.mark.slow
def test_a_finished_run_is_reopened_as_it_was_evaluated(finished):
    """The reopened network gives the recorded predictions."""
    reopened = open_run(finished)
    assert reopened.image_shape == (8, 8, 1) and reopened.resize == 8
    assert reopened.classes == tuple("0123456789")
    with np.load(finished / "test.npz") as test:
        predicted = test["predicted"]
    images = arrays.load("digits").test.images / np.float32(255)
    x = (images - reopened.mean) / reopened.std
    logits = jax.jit(reopened.model.apply)(reopened.variables, x)
    np.testing.assert_array_equal(logits.argmax(-1), predicted)


@pytest.mark.slow
def test_a_run_without_a_recorded_normalization_is_reopened(finished, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
    results = json.loads((folder / "results.json").read_text())
    for key in ("mean", "std", "image_shape"):
        del results[key]
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="results.json is not as it was written"):
        open_run(folder)
    (folder / "manifest.json").unlink()
    old = open_run(folder)
    new = open_run(finished)
    np.testing.assert_array_equal([old.mean, old.std], [new.mean, new.std])
    assert old.image_shape == new.image_shape
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dataset": "camvid"}))
    with pytest.raises(ValueError, match=f"{folder} was trained before .* cannot be read"):
        open_run(folder)


@pytest.mark.slow
def test_a_folder_that_is_no_finished_training_run_is_named(finished, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is not a finished training run: it has no"):
        open_run(tmp_path)
    shutil.copy(finished / "config.json", tmp_path / "config.json")
    shutil.copy(finished / "results.json", tmp_path / "results.json")
    with pytest.raises(ValueError, match="training run: it has no weights.safetensors$"):
        open_run(tmp_path)
    for name in ("results.json", "weights.safetensors"):
        shutil.copy(finished / name, tmp_path / name)
    (tmp_path / "config.json").write_text('{"kind": "position"}')
    with pytest.raises(ValueError, match=f"{tmp_path} is not a training run"):
        open_run(tmp_path)


def test_an_unfinished_run_and_a_failed_one_are_not_reopened(tmp_path):
    workdir.prepare(tmp_path, defaults.get_config().to_dict())
    with pytest.raises(ValueError, match=f"{tmp_path} is not finished, .*: run its own command"):
        open_run(tmp_path)
    # A sweep does not start it again.
    failure = tmp_path / "failure.json"
    files.write_json(failure, {"error": "the loss is not finite"})
    message = rf"{tmp_path} failed \(the loss is not finite\): remove {failure} and run the sweep"
    with pytest.raises(ValueError, match=message):
        open_run(tmp_path)


@pytest.mark.parametrize("model, padding", [("alexnet", "zeros"), ("lenet", "none")])
def test_images_that_are_too_small_are_named_with_the_network(model, padding):
    config = defaults.get_config()
    config.update({"model": model, "model_fields": {"padding": padding}, "parallel": "jit"})
    message = f"^model='{model}' on images of 8x8x1: a .* padding='{padding}' has no output on a "
    with pytest.raises(ValueError, match=message):
        build_run(config).state_shapes()


# Small enough for this process: three epochs of a linear network on digits.
QUICK = {
    "model": "mlp1",
    "epochs": 3,
    "n_validation": 100,
    "parallel": "jit",
    "checkpoint_every_steps": 4,
}


def train_here(folder: pathlib.Path, **changes) -> dict:
    """Trains in this process, without a report; returns results.json."""
    config = defaults.get_config()
    config.update_from_flattened_dict({**QUICK, **changes})
    loop.check(config)
    loop.train(config, workdir.prepare(folder, config.to_dict()))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_a_process_that_does_not_write_leaves_only_checkpoints(tmp_path, monkeypatch):
    """Of several processes, each saves its part of a checkpoint and one writes the other files."""
    monkeypatch.setattr(processes, "writes", lambda: False)
    config = defaults.get_config()
    config.update_from_flattened_dict({**QUICK, "epochs": 2})
    workdir.prepare(tmp_path, config.to_dict())
    loop.train(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.slow
def test_a_schedule_of_few_keys_has_the_defaults_of_the_others(tmp_path):
    config = defaults.get_config()
    config.update({**QUICK, "epochs": 1})
    config.schedule = {"name": "plateau", "learning_rate": 0.1}
    loop.check(config)
    loop.train(config, workdir.prepare(tmp_path, config.to_dict()))
    assert json.loads((tmp_path / "results.json").read_text())["final"]["epoch"] == 1


@pytest.fixture
def worse_after_first_epoch(monkeypatch):
    """Makes validation errors rise from the first epoch on, whatever is learned."""
    score = Training.score
    errors = itertools.count(1)

    def rising(self, state, split, views=1):
        scored = score(self, state, split, views)
        if split == "validation":
            scored.scores["error"] = next(errors) / 100
        return scored

    monkeypatch.setattr(Training, "score", rising)


@pytest.mark.slow
def test_the_best_epochs_weights_are_kept_and_scored(worse_after_first_epoch, tmp_path):
    """Later checkpoints exist, but the first epoch's weights are used."""
    one = train_here(tmp_path / "one", epochs=1)
    best = train_here(tmp_path / "best")
    assert best["weights"] == {
        "epoch": 1,
        "step": 10,
        "chosen_by": "the smallest validation error",
    }
    assert best["final"]["epoch"] == 3 and best["final"]["step"] == 30
    for name in ("train_loss", "validation_loss", "test_loss"):
        assert best["final"][name] == one["final"][name]
    files = [tmp_path / name / "weights.safetensors" for name in ("one", "best")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_the_last_weights_are_kept_where_a_key_says_so(worse_after_first_epoch, tmp_path):
    last = train_here(tmp_path, final_weights="last")
    assert last["weights"] == {"epoch": 3, "step": 30, "chosen_by": "the end of training"}
    assert last["final"]["validation_loss"] == last["history"][2]["validation_loss"]


@pytest.mark.slow
def test_training_ends_early(worse_after_first_epoch, tmp_path):
    """Training ends after two epochs without a smaller validation error."""
    results = train_here(tmp_path, epochs=9, early_stopping=2)
    assert len(results["history"]) == 3 and results["weights"]["epoch"] == 1
    config = defaults.get_config()
    config.early_stopping = 2
    with pytest.raises(ValueError, match="early_stopping=2 watches the validation error"):
        loop.check(config)


@pytest.mark.slow
def test_a_reduced_rate_is_that_of_the_next_steps(worse_after_first_epoch, tmp_path):
    """A plateau after the second epoch trains as a schedule that has the lower rate from there."""
    plateau = {"schedule.name": "plateau", "schedule.patience": 0, "schedule.factor": 0.25}
    table = {"schedule.name": "step", "schedule.epochs": (2,), "schedule.factor": 0.25}
    runs = {}
    for name, changes in (("plateau", plateau), ("step", table), ("constant", {})):
        results = train_here(tmp_path / name, epochs=4, final_weights="last", **changes)
        runs[name] = results["history"]
    rates = [entry["learning_rate"] for entry in runs["plateau"]]
    # The third epoch is worse again.
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.025, 0.00625], rtol=1e-6)
    losses = {name: [entry["train_loss"] for entry in history] for name, history in runs.items()}
    np.testing.assert_allclose(losses["plateau"][:3], losses["step"][:3], rtol=1e-6)
    assert losses["constant"][2] != pytest.approx(losses["step"][2], rel=1e-3)


@pytest.mark.slow
def test_a_folder_is_trained_on_in_the_same_three_ways(tmp_path):
    """Streamed batches are divided over eight devices; the run is evaluated as it was tested."""
    generator = np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "val"), "ab", range(16)):
        path = tmp_path / split / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (14, 12, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(path)
    options = {
        "dataset": "folder",
        "data_dir": str(tmp_path),
        "n_validation": 0,
        "image_size": 8,
        "resize": 10,
        "workers": 0,
        "augment.flip": True,
        "augment.crop": 2,
        "test_views": 10,
        "batch_size": 16,
    }
    runs = {}
    for way in ("jit", "pmap", "shard_map"):
        runs[way] = train_here(tmp_path / way, **options, parallel=way)
        losses = [entry["train_loss"] for entry in runs[way]["history"]]
        losses.append(runs[way]["final"]["test_loss"])
        first = [entry["train_loss"] for entry in runs["jit"]["history"]]
        first.append(runs["jit"]["final"]["test_loss"])
        np.testing.assert_allclose(losses, first, rtol=1e-5)

    network = classifier.trained(tmp_path / "jit")
    photographs = sorted((tmp_path / "val").rglob("*.png"))
    outputs = np.concatenate([*classifier.logits(network, photographs, Parallel("jit"), 16)])
    labels = np.array([path.parent.name == "b" for path in photographs], np.int32)
    scores = evaluate.score("cross_entropy", outputs, labels)
    assert scores["loss"] == pytest.approx(runs["jit"]["final"]["test_loss"], rel=1e-5)
    assert scores["error"] == runs["jit"]["final"]["test_error"]


@pytest.mark.parametrize("count, text", [(1, "1 damaged image"), (2, "2 damaged images")])
def test_the_log_counts_damaged_images(count, text, caplog):
    config = defaults.get_config()
    training = types.SimpleNamespace(config=config, steps_per_epoch=1)
    entry = {"epoch": 1, "train_loss": 0.0, "learning_rate": 0.1, "damaged": count}
    history = types.SimpleNamespace(entries=[entry], seconds=1.0)
    with caplog.at_level("INFO", "cnnjax"):
        loop._log_epoch(training, history, 1.0)
    assert f" {text} passed over, rate" in caplog.text


@pytest.mark.slow
# The rate is infinite in float32, of which NumPy warns unless jax has cached the number.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_a_diverged_last_step_is_one_line_and_leaves_no_weights(tmp_path):
    """The only step has a finite loss but breaks the parameters."""
    message = "a parameter is not finite after step 1 .* lower schedule.learning_rate$"
    with pytest.raises(FloatingPointError, match=message):
        train_here(
            tmp_path,
            epochs=1,
            batch_size=1437,
            n_validation=0,
            **{"schedule.learning_rate": 1e39},
        )
    assert not (tmp_path / "weights.safetensors").exists()
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_scores_that_are_not_finite_end_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "score", lambda *given: {"loss": float("nan"), "error": 0.5})
    with pytest.raises(FloatingPointError, match="validation_loss=nan is not finite after step 10"):
        train_here(tmp_path)


def test_the_axis_of_losses_has_plain_numbers():
    # The import is here because it imports matplotlib, which takes time.
    from cnnjax.train import report

    history = []
    for epoch, loss in enumerate((2.1, 0.55)):
        entry = {"epoch": epoch, "learning_rate": 0.1, "train_loss": loss, "train_error": 0.5}
        history.append(entry)
    figure = report._curves_figure(history)
    figure.draw_without_rendering()
    labels = {label.get_text() for label in figure.axes[0].get_yticklabels(which="both")}
    assert {"0.6", "1", "2"} <= labels


@pytest.mark.slow
def test_events_and_curves_appear_while_a_run_goes_on(monkeypatch, tmp_path):
    """An epoch's events are in the file when the next epoch begins."""
    monkeypatch.setattr(training_results, "_SECONDS_BETWEEN_CURVES", 0.0)
    history = training_results.History(tmp_path)
    sizes = []
    for epoch in (1, 2):
        entry = {
            "epoch": epoch,
            "step": 10 * epoch,
            "learning_rate": 0.1,
            "train_loss": 1.0 / epoch,
            "train_error": 0.5,
        }
        history.append(entry, 1.0)
        (events,) = (tmp_path / "tensorboard").iterdir()
        sizes.append(events.stat().st_size)
        assert (tmp_path / "curves.png").stat().st_size > 1000
    assert 0 < sizes[0] < sizes[1]
    assert b"train_loss" in events.read_bytes()


@pytest.mark.parametrize(
    ("kind", "labels", "shape", "message"),
    [
        ("cross_entropy", [0, -1], (2, 3), "has the label -1; expected 0 to 2$"),
        ("cross_entropy", [0, 3], (2, 3), "has the label 3; expected 0 to 2$"),
        ("sigmoid", [[0, 1, 2]], (1, 3), "has the label 2; expected 0 to 1$"),
        ("pixelwise", [[[0, 254]]], (1, 1, 2, 3), "has the label 254; expected 0 to 2$"),
    ],
)
def test_labels_of_no_class_are_not_scored(kind, labels, shape, message):
    with pytest.raises(ValueError, match=message):
        evaluate.score(kind, np.zeros(shape, np.float32), np.array(labels))


@pytest.mark.slow
def test_a_record_of_before_is_read_with_what_was_in_force(finished, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    for key in defaults.BEFORE:
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).final_weights == "last"


@pytest.mark.parametrize("changes", [{"schedule.factor": 0.5}, {"resize": 300}])
def test_a_run_that_has_started_keeps_keys_without_effect(changes, tmp_path):
    """Earlier versions accepted them."""
    config = defaults.get_config()
    config.update_from_flattened_dict(changes)
    files.write_json(tmp_path / "config.json", config.to_dict())
    with pytest.raises(ValueError, match="accepts"):
        loop.check(config, tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    loop.check(config, tmp_path)


@pytest.mark.parametrize(
    "name, changes, unread",
    [
        ("cosine", {"min_lr": 1e-5}, "schedule.min_lr=1e-05"),
        ("cosine", {"every": 10, "epochs": (1,)}, r"schedule.epochs=\(1,\), schedule.every=10"),
        ("step", {"every": 5, "patience": 3}, "schedule.patience=3"),
        ("restarts", {"every": 5, "factor": 0.5}, "schedule.factor=0.5"),
        ("plateau", {"patience": 3, "every": 5}, "schedule.every=5"),
        ("plateau", {"factor": 0.5, "mode": "max", "metric": "accuracy", "cooldown": 1}, ""),
        ("cosine", {"min_lr": 0.0, "warmup_epochs": 1.0}, ""),
    ],
)
def test_keys_of_other_schedules_are_refused_on_the_command_line(name, changes, unread):
    """A configuration file may have them: the command line may change its schedule."""
    config = defaults.get_config()
    config.n_validation = 100
    config.schedule.update(name=name, **changes)
    loop.check(config)
    overrides = {"schedule.name", *(f"schedule.{key}" for key in changes)}
    if not unread:
        loop.check(config, overrides=overrides)
        return
    message = f"^{unread}: schedule.name='{name}' reads none of these and accepts their defaults, "
    with pytest.raises(ValueError, match=message):
        loop.check(config, overrides=overrides)


@pytest.mark.parametrize("command", [cnnjax.main, cnnjax.sweep])
def test_a_command_says_which_keys_it_sets(command, tmp_path, capsys):
    """The configuration file has keys of the schedule "step"."""
    arguments = ["--config=configs/lenet_mnist.py", f"--workdir={tmp_path / 'run'}"]
    arguments += ["--config.schedule.name=cosine", "--config.schedule.factor=0.5"]
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: schedule.factor=0.5: schedule.name='cosine' reads none of")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", schedules.NAMES)
def test_a_run_may_be_extended_if_its_learning_rates_do_not_depend_on_the_epochs(name, tmp_path):
    shorter = defaults.get_config()
    shorter.epochs = 5
    shorter.schedule.update(name=name, learning_rate=0.5, warmup_epochs=0.5, every=2)
    longer = shorter.copy_and_resolve_references()
    longer.epochs = 8
    rates = [schedules.learning_rates(run.schedule, 10, run.epochs) for run in (shorter, longer)]
    are_equal = np.array_equal(rates[0], rates[1][:50])
    recorded = [json.loads(json.dumps(run.to_dict())) for run in (shorter, longer)]
    (tmp_path / "results.json").touch()
    refusal = contextlib.nullcontext()
    if name == "cosine":
        refusal = pytest.raises(workdir.OtherConfiguration, match="cosine schedule cannot be")
    with refusal:
        adopt._check_extension(tmp_path, 5, longer)
    assert are_equal == (name != "cosine")
    assert adopt._has_more_epochs(recorded[0], longer)
    assert not adopt._has_more_epochs(recorded[1], shorter)


@pytest.mark.parametrize(
    "schedule, name, reason",
    [
        ("cosine", "results.json", "a run with the cosine schedule cannot be extended; choose"),
        ("cosine", "metrics.jsonl", "a run with the cosine schedule cannot be extended; choose"),
        ("constant", "metrics.jsonl", "finish it with epochs=6 first, or choose"),
    ],
)
def test_a_refused_extension_names_its_reason(schedule, name, reason, tmp_path):
    config = defaults.get_config()
    config.epochs = 6
    config.schedule.name = schedule
    files.write_json(tmp_path / "config.json", config.to_dict())
    config.epochs = 8
    # A run that has not started may become another.
    adopt_changes(config, tmp_path)
    (tmp_path / name).touch()
    message = rf"configuration \(epochs=6 there, 8 now\); {reason} another --workdir$"
    with pytest.raises(workdir.OtherConfiguration, match=message):
        adopt_changes(config, tmp_path)


@pytest.mark.slow
def test_a_finished_run_extended_is_the_longer_run(tmp_path, monkeypatch):
    """Results are equal bit for bit; a cosine schedule is refused."""
    # Ten seconds pass between two looks at the clock.
    clock = types.SimpleNamespace(monotonic=itertools.count(0, 10).__next__)
    monkeypatch.setattr(loop, "time", clock)
    longer = train_here(tmp_path / "longer", epochs=4)
    folder = tmp_path / "extended"
    shorter = train_here(folder, epochs=2)
    config = defaults.get_config()
    config.update_from_flattened_dict({**QUICK, "epochs": 4})
    workdir.seal(folder)
    checkpoints = folder / "checkpoints"
    checkpoints.rename(folder / "elsewhere")
    with pytest.raises(ValueError, match="epochs=4: there is no .*/checkpoints/.*2 epochs"):
        adopt_changes(config, folder)
    assert json.loads((folder / "results.json").read_text())["final"] == shorter["final"]
    (folder / "elsewhere").rename(checkpoints)
    adopt_changes(config, folder)
    # The seal no longer covers files that will change.
    workdir.check_seal(folder)
    results = train_here(folder, epochs=4)
    assert results["extended_from"] == [shorter["final"]]
    assert results["history"] == longer["history"] and results["final"] == longer["final"]
    # The seconds are those of both starts.
    assert shorter["seconds"] * 1.5 < longer["seconds"] <= results["seconds"]
    config.update_from_flattened_dict({"epochs": 6, "schedule.name": "cosine"})
    files.write_json(folder / "config.json", config.to_dict())
    config.epochs = 8
    with pytest.raises(ValueError, match="another configuration .epochs=6 there, 8 now"):
        adopt_changes(config, folder)


@pytest.mark.slow
def test_a_run_that_cannot_be_extended_stays_finished(tmp_path):
    """Neither other images nor a number of devices takes it apart."""
    digits = arrays.load("digits[:200]")
    file = tmp_path / "own.npz"
    options = {"dataset": str(file), "epochs": 1, "batch_size": 20, "n_validation": 0}
    arrays.save(digits, file)
    folder = tmp_path / "run"
    train_here(folder, **options)
    workdir.seal(folder)
    config = read_config(folder)
    config.epochs = 2

    def refuse(message):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=message):
            adopt_changes(config, folder)
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert after == before
        assert open_run(folder).config.epochs == 1

    manifests = sorted((folder / "checkpoints").glob("*/manifest.json"))
    whole = [path.read_bytes() for path in manifests]
    arrays.save(arrays.load("digits[:180]"), file)
    refuse("n_train=200 then, 180 now")
    # Damaged checkpoints keep their names.
    manifests[0].write_text("{}")
    refuse("n_train=200 then, 180 now")
    arrays.save(digits, file)
    for path in manifests:
        path.write_text("{}")
    refuse("no whole checkpoint from which the run could continue; train in another folder")
    for path, content in zip(manifests, whole, strict=True):
        path.write_bytes(content)
    file.unlink()
    refuse("own.npz")
    arrays.save(digits, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parallel, "size", 3, raising=False)
        patch.setattr(Parallel, "__init__", lambda self, way: None)
        refuse("batch_size=20 is not a multiple of 3 device")
    adopt_changes(config, folder)
    assert read_config(folder).epochs == 2
    # As if that had been interrupted before its last file: the old command restores the results.
    config.epochs = 1
    files.write_json(folder / "config.json", config.to_dict())
    assert "extended_from" not in train_here(folder, **options)


@pytest.mark.parametrize("epoch, kept", [(6, [2, 4]), (4, [2]), (2, None)])
def test_a_given_up_extension_leaves_the_earlier_ones(epoch, kept, tmp_path):
    """A run was extended from 2 epochs to 4 and, before a step of it was taken, to more."""
    files.write_json(tmp_path / "extended.json", [{"epoch": 2}, {"epoch": 4}])
    data = types.SimpleNamespace(
        classes=("a", "b"),
        image_shape=(1, 1, 1),
        moments=MOMENTS,
        n_train=1,
        n_validation=0,
        test_digest="0a1b2c3d",
    )
    training_results.write_results(
        tmp_path,
        training=types.SimpleNamespace(data=data, config=defaults.get_config()),
        origin={},
        state=types.SimpleNamespace(params={}),
        history=types.SimpleNamespace(entries=[], seconds=1.0),
        final={"epoch": epoch},
        chosen={"epoch": epoch},
        tested=types.SimpleNamespace(outputs=np.eye(2), labels=np.arange(2)),
        seconds=1.0,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.get("extended_from") == (kept and [{"epoch": number} for number in kept])


def test_an_extended_run_used_the_test_set_more_than_once():
    # As above.
    from cnnjax.train import report

    scores = {f"{part}_{name}": 0.5 for part in ("train", "test") for name in ("loss", "error")}
    results = {
        "final": scores | {"epoch": 2, "step": 20},
        "weights": {"epoch": 2, "chosen_by": "the end of training"},
        "parameters": 1,
        "training_seconds": 1.0,
        "n_train": 1,
        "n_test": 1,
        "classes": ["cat", "dog"],
    }
    config = defaults.get_config().to_dict()
    once = "The test set was used once, at the end. The scores are"
    assert once in report._body(config, results, [])
    extended = report._body(config, results | {"extended_from": [scores | {"epoch": 1}]}, [])
    assert "used once" not in extended and "extended after 1 epochs" in extended


@pytest.mark.slow
def test_another_process_does_not_change_the_configuration_of_a_run_under_way(finished, tmp_path):
    """Even an extension of a finished run is refused while another process holds it."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = read_config(folder)
    with claims.claim(folder):
        config.epochs += 1
        with pytest.raises(claims.Claimed):
            cnnjax.main.run(config, folder)
    assert read_config(folder).epochs == config.epochs - 1
    assert (folder / "results.json").exists()


def test_class_names_are_compared_in_one_unicode_form():
    """Names of .npz files and of tfds, as well as the recorded ones, may be in either form."""
    forms = {form: unicodedata.normalize(form, "kälber") for form in ("NFC", "NFD")}
    assert forms["NFC"] != forms["NFD"]
    for name in forms.values():
        fields = dict.fromkeys(field.name for field in dataclasses.fields(Training))
        data = types.SimpleNamespace(
            classes=(name, "null"), n_train=9, n_validation=0, digest="0a1b2c3d"
        )
        run = Training(**fields | {"config": defaults.get_config(), "data": data})
        for saved in forms.values():
            run.check_data(run.data_record() | {"classes": [saved, "null"]})
        with pytest.raises(ValueError, match="missing classes: eins; additional: kälber"):
            run.check_data({"classes": ["eins", "null"]})


EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


@pytest.mark.parametrize(
    ("error", "explained", "message"),
    [
        (KeyboardInterrupt(), workdir.Interrupted, "run the same command again to continue"),
        (
            EXHAUSTED,
            MemoryError,
            "batch_size=128 does not .*, in another --workdir; this one continues only with",
        ),
    ],
)
def test_a_failure_while_an_extension_is_checked_is_explained(
    error, explained, message, tmp_path, monkeypatch
):
    def fail(config):
        raise error

    monkeypatch.setattr(adopt, "build_run", fail)
    config = defaults.get_config()
    files.write_json(tmp_path / "config.json", config.to_dict())
    files.write_json(tmp_path / "results.json", {"history": [{"step": 1}]})
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    config.epochs += 1
    with pytest.raises(explained, match=message):
        loop.adopt(config, tmp_path)


def test_a_data_set_that_does_not_fit_is_named(tmp_path):
    """Its error does not blame the size of the batch."""

    class Full(Parallel):
        def replicate(self, tree):
            if max(leaf.ndim for leaf in jax.tree.leaves(tree)) == 4:
                raise EXHAUSTED
            return super().replicate(tree)

    config = defaults.get_config()
    message = r"dataset='digits' does not fit into memory .RESOURCE_EXHAUSTED: .*; take fewer"
    with pytest.raises(MemoryError, match=message), loop._explain_failures(config, tmp_path):
        training_data.open_data(config, Full("jit"))


@pytest.mark.parametrize(
    "error, is_lost",
    [
        (RuntimeError("connection reset"), True),
        (RuntimeError(), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: no heartbeat"), True),
        (EXHAUSTED, False),
        (NotWritten("a checkpoint could not be written to runs/a"), False),
        (claims.Lost("workdir='runs/a' has been taken over"), False),
    ],
)
def test_of_several_processes_one_that_fails_says_why(error, is_lost, monkeypatch):
    """Only an error that may come from the loss of another process is explained by one."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RuntimeError) as raised, loop._explain_lost_peers():
        raise error
    assert ("another has died" in str(raised.value)) == is_lost


def test_of_several_processes_all_decide_by_the_scores_of_the_first(monkeypatch):
    """This process is the second one, and has computed another error."""
    first = np.array([0.1, 1 / 3])
    gather = lambda own: np.stack([first.view(np.int32), own])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax.experimental.multihost_utils, "process_allgather", gather)
    scored = types.SimpleNamespace(scores={"loss": 0.1, "error": 0.25})
    current = types.SimpleNamespace(
        parallel=types.SimpleNamespace(
            fetch=lambda tree: tree, from_first_process=Parallel.from_first_process
        ),
        steps_per_epoch=1,
        data=types.SimpleNamespace(damaged=None),
        score=lambda state, split: scored,
    )
    state = types.SimpleNamespace(totals={"loss": 1.0, "errors": 1.0, "count": 2.0})
    entry = loop._evaluate_epoch(current, state, 1, np.float32([0.1]))
    assert (entry["validation_loss"], entry["validation_error"]) == tuple(first)


def test_of_several_processes_one_that_trains_something_else_is_named():
    def check(gather, origin, **changes):
        config = defaults.get_config()
        config.update(changes)
        parallel = types.SimpleNamespace(gather=gather)
        loop._check_processes(types.SimpleNamespace(config=config, parallel=parallel), origin)

    def number(origin, **changes) -> int:
        """Returns what a process tells the others."""
        told = []
        check(lambda own: told.append(own) or told, origin, **changes)
        return told[0]

    same = number({"data": "a"})
    assert same == number({"data": "a"}) < 2**31
    assert len({same, number({"data": "b"}), number({"data": "a"}, seed=1)}) == 3
    assert same != number({"data": "a"}, workers=7)
    with pytest.raises(ValueError, match="^process 2 of 3 has another configuration, images,"):
        check(lambda own: [own, own, own + 1], {})


@pytest.mark.slow
def test_other_images_are_not_gone_on_with(tmp_path):
    digits = arrays.load("digits[:200]")
    file = tmp_path / "own.npz"
    fewer = arrays.load("digits[:180]")
    renamed = dataclasses.replace(digits, classes=("null", *digits.classes[1:]))
    reordered = dataclasses.replace(digits, classes=digits.classes[::-1])
    images, labels = digits.train
    turned = dataclasses.replace(digits, train=arrays.Split(images[:, ::-1], labels))
    options = {"dataset": str(file), "epochs": 1, "batch_size": 20, "n_validation": 0}
    arrays.save(digits, file)
    train_here(tmp_path / "run", **options)
    for changed, message in (
        (fewer, r"n_train=200 then, 180 now"),
        (renamed, r"missing classes: 0; additional: null"),
        (reordered, r"the classes are in another order"),
        (turned, r"digest=[0-9a-f]{8} then, [0-9a-f]{8} now"),
    ):
        arrays.save(changed, file)
        with pytest.raises(ValueError, match=f"have changed since the run began .{message}"):
            train_here(tmp_path / "run", **options)
    arrays.save(digits, file)
    train_here(tmp_path / "run", **options)


@pytest.mark.slow
def test_a_run_goes_on_with_its_images_in_another_folder(tmp_path, monkeypatch):
    """A finished run, too, alone or for more epochs; other images are refused."""
    folder = tmp_path / "run"
    train_here(folder, epochs=1)
    config = read_config(folder)
    # scikit-learn's digits are the same whatever the folder is.
    config.data_dir = "/elsewhere"
    adopt_changes(config, folder)
    workdir.check_config(folder, config.to_dict())
    config.update(data_dir="/somewhere", epochs=2)
    adopt_changes(config, folder)
    workdir.check_config(folder, config.to_dict())
    assert not (folder / "results.json").exists()

    config.data_dir = "/nowhere"
    before = (folder / "config.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(training_data, "digest_arrays", lambda *parts: "other")
        with pytest.raises(ValueError, match="digest=[0-9a-f]{8} then, other now"):
            adopt_changes(config, folder)
    assert (folder / "config.json").read_bytes() == before
    # Checkpoints of earlier versions count the images only, which is too little to tell them apart.
    monkeypatch.setattr(Checkpoints, "record", lambda self, step: {"data": {"n_train": 1337}})
    adopt_changes(config, folder)
    assert (folder / "config.json").read_bytes() == before


def test_a_finished_run_without_checkpoints_accepts_its_images_elsewhere(
    tmp_path, monkeypatch, caplog
):
    """Its results tell which images they were; those of the test are not compared."""
    checked = []
    run = types.SimpleNamespace(check_data=checked.append)
    monkeypatch.setattr(adopt, "build_run", lambda config: run)
    config = defaults.get_config()
    workdir.prepare(tmp_path, config.to_dict())
    images = {"n_train": 1337, "digest": "0a1b2c3d"}
    files.write_json(tmp_path / "results.json", {"data": images})
    config.data_dir = "/elsewhere"
    with caplog.at_level("INFO", "cnnjax"):
        adopt_changes(config, tmp_path)
    workdir.check_config(tmp_path, config.to_dict())
    assert checked == [images]
    assert caplog.messages[-1].endswith("holds the same training and validation images")


def test_a_finished_run_is_reported_again_without_its_images(tmp_path):
    config = defaults.get_config()
    config.update(dataset="folder", data_dir=str(tmp_path / "gone"), early_stopping=2)
    with pytest.raises(ValueError, match="gone"):
        loop.check(config, tmp_path)
    (tmp_path / "results.json").touch()
    loop.check(config, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_past_a_damaged_image(tmp_path):
    """A run that has begun may go on with `skip_damaged` switched on."""
    config = defaults.get_config()
    folder = workdir.prepare(tmp_path / "run", config.to_dict())
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step").touch()
    config.skip_damaged = True
    with pytest.raises(ValueError, match="skip_damaged=False there, True now"):
        workdir.check_config(folder, config.to_dict())
    adopt_changes(config, folder)
    workdir.check_config(folder, config.to_dict())
    # Switching it off is refused, since images may already have been skipped.
    config.skip_damaged = False
    adopt_changes(config, folder)
    with pytest.raises(ValueError, match="skip_damaged=True there, False now"):
        workdir.check_config(folder, config.to_dict())


@pytest.mark.parametrize("change", [{"workers": 0}, {"checkpoint_every_steps": 50}])
def test_a_run_goes_on_with_keys_that_change_no_result(change, tmp_path):
    config = defaults.get_config()
    folder = workdir.prepare(tmp_path / "run", config.to_dict())
    (folder / "metrics.jsonl").touch()
    config.update(change)
    assert is_equivalent(config, folder)
    adopt_changes(config, folder)
    workdir.check_config(folder, config.to_dict())
    # Beside a key that no run adopts, they stay as they are.
    record = (folder / "config.json").read_bytes()
    config.update(workers=3, seed=1)
    assert not is_equivalent(config, folder)
    adopt_changes(config, folder)
    assert (folder / "config.json").read_bytes() == record
    # Nor do keys change whose run is refused for another one that a run may adopt.
    config.update(seed=0, epochs=config.epochs + 1)
    with pytest.raises(workdir.OtherConfiguration, match="finish it with epochs=10 first"):
        adopt_changes(config, folder)
    assert (folder / "config.json").read_bytes() == record


@pytest.mark.slow
def test_a_work_directory_of_before_goes_on_as_before(tmp_path):
    results = train_here(tmp_path, epochs=1, final_weights="last")
    config = json.loads((tmp_path / "config.json").read_text())
    for key in defaults.BEFORE:
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    now = defaults.get_config()
    now.update_from_flattened_dict({**QUICK, "epochs": 1})
    complete_record(now, tmp_path)
    assert now.final_weights == "last"
    workdir.prepare(tmp_path, now.to_dict())
    assert results["weights"]["chosen_by"] == "the end of training"


@pytest.mark.slow
def test_a_killed_run_ends_as_the_uninterrupted_one(finished, tmp_path):
    """Sends SIGKILL at random moments, three times or as often as CNNJAX_KILLS says."""
    generator = random.Random(1)
    folder = tmp_path / "killed"
    kills = 0
    while kills < int(os.environ.get("CNNJAX_KILLS", 3)):
        process = forked.Popen(*SMALL, "--workdir", folder, figures=True)
        assert any("running in" in line for line in process.stderr)
        time.sleep(generator.uniform(0.1, 2.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (folder / "results.json").exists():
            # The run ended before it was killed, so the next one begins anew.
            assert parameters(folder) == parameters(finished)
            shutil.rmtree(folder)
    # One more kill, at the first checkpoint, so that the last start has one to go on from.
    process = forked.Popen(*SMALL, "--workdir", folder, figures=True)
    while not list(folder.glob("checkpoints/*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    last = command("--workdir", folder)
    assert last.returncode == 0 and "resuming from step" in last.stderr
    assert parameters(folder) == parameters(finished)


@pytest.mark.slow
def test_a_run_under_x64_is_nearly_the_same_and_saves_float32(finished, tmp_path):
    done = forked.run(
        *SMALL,
        "--config.epochs=1",
        "--workdir",
        tmp_path,
        flags=quick.FLAGS,
        config={"jax_enable_x64": True},
    )
    assert done.returncode == 0, done.stderr
    first = {}
    for folder in (finished, tmp_path):
        first[folder] = json.loads((folder / "results.json").read_text())["history"][0]
        arrays = safetensors.numpy.load_file(folder / "weights.safetensors").values()
        assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    for name in ("train_loss", "validation_loss"):
        assert first[tmp_path][name] == pytest.approx(first[finished][name], rel=1e-2)


def test_class_names_are_no_formulas(tmp_path):
    # As above.
    from cnnjax.train import report

    classes = ["$5_$10", "a$"]
    labels = np.array([0, 1, 1])
    test = {
        "shown": [0],
        "images": np.zeros((1, 4, 4, 3), np.uint8),
        "labels": labels,
        "predicted": labels[::-1],
        "confidence": np.ones(3),
    }
    for name, figure in (
        ("confusion", report._confusion_figure(labels, labels, classes)),
        ("mistakes", report._mistakes_figure(test, classes)),
    ):
        figure.savefig(tmp_path / f"{name}.png")


@pytest.mark.filterwarnings("error:Glyph")
def test_class_names_that_the_font_lacks_are_numbers_in_figures(tmp_path):
    # As above.
    from cnnjax.train import report

    entry = {"epoch": 1, "train_loss": 1.0, "train_error": 0.5, "learning_rate": 0.1}
    config = {"loss": "cross_entropy"}
    results = {"history": [entry], "classes": ["cat", "\u732b", "k\xe4lber"]}
    np.savez(
        tmp_path / "test.npz",
        shown=np.array([0]),
        images=np.zeros((1, 4, 4, 3), np.uint8),
        labels=np.array([1]),
        predicted=np.array([2]),
        confidence=np.ones(1),
    )
    report._write_figures(tmp_path, config, results)
    assert figures.label_classes(results["classes"]) == ["cat", "#1", "k\xe4lber"]
    line = "In the figures, numbers stand for classes: #1 = \u732b.\n\n"
    assert report._describe_labels(config, results) == line
    assert report._describe_labels(config, {"classes": ["cat"]}) == ""


@pytest.mark.parametrize(
    "shape", [(8, 8, 3), (8, 1, 3), (8, 8, 2), (8, 8, 4), (8, 8, 5), (1, 8, 1)]
)
def test_mistakes_of_all_shapes_are_drawn(shape):
    # As above.
    from cnnjax.train import report

    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    test = {
        "shown": [0],
        "images": image[None],
        "labels": np.array([0]),
        "predicted": np.array([1]),
        "confidence": np.ones(1),
    }
    figure = report._mistakes_figure(test, ["a", "b"])
    (picture,) = figure.axes[0].images
    # Only three channels are colors; one channel keeps its values.
    expected = image if shape[-1] == 3 else image.mean(-1)
    np.testing.assert_array_equal(picture.get_array(), expected)


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_compiles_saves_and_goes_on(finished, tmp_path):
    """Signals at other moments are tested in test_faults.py."""
    stopped = [*SMALL, "--config.checkpoint_every_steps=100000", "--workdir", tmp_path]
    process = forked.Popen(*stopped)
    assert any("compiling the training step" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "run the same command again to continue from there" in rest
    assert "Traceback" not in rest
    assert forked.run(*stopped).returncode == 0
    assert parameters(tmp_path) == parameters(finished)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = command("--config.schedule.learning_rate=1e6", "--workdir", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "the loss is not finite at step" in done.stderr and "(learning rate 1e+06)" in done.stderr
    )
