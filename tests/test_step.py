"""What reaches a training step: rates, keys, random numbers, averages, clipping, types."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import CONSTANTS, MOMENTS, NUMBERS, Tiny, some_data

from cnnjax.models import Network, create_model
from cnnjax.models.small import SmallResNet
from cnnjax.nn import Dense, flatten, lowering
from cnnjax.runtime import imagenet
from cnnjax.train import defaults, step
from cnnjax.train.checkpoints import Checkpoints, _leaves
from cnnjax.train.data import moments_of
from cnnjax.train.parallel import Parallel
from cnnjax.train.run import build_numbers, build_recipe
from cnnjax.train.training import build_run

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Linear(Network):
    """A linear classifier of an image's pixels, after dropout."""

    input_shape: tuple[int, int, int] = (8, 8, 3)
    dropout: float = 0.0

    @nn.nowrap
    def walk(self, x, train):
        x = nn.Dropout(self.dropout, deterministic=not train)(flatten(x))
        yield "logits", Dense(self.num_classes, name="fc")(x)


take_step = jax.jit(step.batch_step, static_argnums=0)


def some_batch(count=16) -> step.Batch:
    images, labels = some_data(count)
    return step.Batch(images, labels, MOMENTS, jnp.float32(0.1), 4)


def bytes_of(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# ------------------------------------------------------------------ rates


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_each_step_has_the_rate_of_its_number(kind):
    """The second step has a rate of 0 and changes no parameter."""
    recipe = step.Recipe(Linear(num_classes=5))
    images, labels = some_data(32)
    constants = dataclasses.replace(CONSTANTS, rates=np.array([0.1, 0.0, 0.1], np.float32))
    parallel = Parallel("jit")

    def advance(state):
        if kind == "streamed":
            run = step.streamed_step(parallel, recipe)
            return run(state, constants, (images[:16], labels[:16]), NUMBERS, np.int32(4))
        data = step.Images(images=images, labels=labels, order=np.arange(32))
        run = step.resident_steps(parallel, recipe, 8)
        return run(state, constants, data, NUMBERS, np.int32(state.step + 1))

    state = step.init(recipe, (8, 8, 3), NUMBERS)
    params = [bytes_of(state.params)]
    for _ in range(3):
        state = advance(state)
        params.append(bytes_of(state.params))
    assert [new != old for old, new in zip(params, params[1:])] == [True, False, True]


# ------------------------------------------------------------------ keys of the configuration


def test_every_key_of_the_step_reaches_it():
    config = defaults.get_config()
    config.update(
        optimizer="adamw",
        decay_all=False,
        loss="sigmoid",
        augment={"flip": True, "crop": 2, "fill": "reflect", "cutout": 3, "colour": 0.1},
        mixup=0.3,
        ema_decay=0.75,
        clip_norm=2.5,
        accumulate=4,
        freeze=("stem",),
        rates=(("layer1", 0.5), ("logits", 2)),
        seed=7,
        momentum=0.8,
        weight_decay=0.01,
        label_smoothing=0.2,
    )
    model = create_model("resnet18")
    recipe = step.Recipe(
        model=model,
        optimizer="adamw",
        decay_all=False,
        loss="sigmoid",
        augment=(("colour", 0.1), ("crop", 2), ("cutout", 3), ("fill", "reflect"), ("flip", True)),
        mixup=True,
        ema=True,
        accumulate=4,
        freeze=("stem",),
        rates=("layer1", "logits"),
        clip=True,
    )
    numbers = step.Numbers(
        seed=7,
        momentum=0.8,
        weight_decay=0.01,
        label_smoothing=0.2,
        mixup=0.3,
        ema_decay=0.75,
        rates=(0.5, 2.0),
        clip_norm=2.5,
    )
    assert build_recipe(config, model) == recipe
    assert build_numbers(config) == numbers
    # A field that is added and left out here has its default.
    for built in (recipe, numbers):
        fields = dataclasses.fields(built)
        unchanged = [field.name for field in fields if getattr(built, field.name) == field.default]
        assert not unchanged


def test_keys_of_the_network_and_the_schedule_reach_a_run():
    config = defaults.get_config()
    config.update(model="mlp3", model_fields={"dropout": 0.25}, batch_size=64, epochs=2)
    config.schedule.update(name="step", learning_rate=0.5, factor=0.25, epochs=(1,))
    config.update(parallel="pmap", dtype="bfloat16", sync_batch_norm=False)
    training = build_run(config)
    assert training.parallel.way == "pmap" and training.steps_per_epoch == 1437 // 64
    assert (training.model.dropout, training.model.dtype) == (0.25, jnp.bfloat16)
    assert training.model.axis_name is None
    np.testing.assert_array_equal(training.rates, np.repeat([0.5, 0.125], 1437 // 64))
    config.sync_batch_norm = True
    assert build_run(config).model.axis_name == training.parallel.axis_name is not None


def test_images_are_normalized_as_the_key_says():
    config = defaults.get_config()
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
    expected = {
        "standardised": (mean, std),
        # From 0 to 255, minus the mean.
        "centred": (mean, np.full(3, 1 / 255)),
        "imagenet": imagenet.MOMENTS,
    }
    for config.pixels, moments in expected.items():
        np.testing.assert_allclose(moments_of(config, mean, std), moments, rtol=1e-6)


# ------------------------------------------------------------------ random numbers


def test_an_image_is_augmented_by_its_seed_step_and_place():
    recipe = step.Recipe(Linear(num_classes=5), augment=(("colour", 0.1), ("crop", 2)))
    images, labels = some_data(1)
    batch = dataclasses.replace(
        some_batch(), images=images.repeat(4, 0), labels=labels.repeat(4, 0)
    )

    @jax.jit
    def prepare(seed, number, rank):
        state = types.SimpleNamespace(step=number)
        key = step._key(state, step.Numbers(seed), step._AUGMENT)
        return step._prepare(recipe, batch, key, rank)[0]

    plain = (images / np.float32(255) - 0.5) / 0.25
    # Two seeds, two steps and two devices, with four places each.
    prepared = [prepare(*numbers) for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({bytes(image) for image in np.concatenate([plain, *prepared])}) == 17
    np.testing.assert_array_equal(prepare(0, 0, 0), prepared[0])


@pytest.mark.parametrize("kind", ["dropout", "mixup"])
def test_dropout_and_mixup_differ_by_seed_and_step(kind):
    """Steps of equal parameters and images have losses of their own."""
    recipe = step.Recipe(Linear(num_classes=5, dropout=0.5))
    if kind == "mixup":
        recipe = step.Recipe(Linear(num_classes=5), mixup=True)
    state = step.init(recipe, (8, 8, 3), step.Numbers(0))
    losses = set()
    for number, seed in ((0, 0), (1, 0), (0, 1)):
        numbers = step.Numbers(seed, mixup=1.0)
        at_number = dataclasses.replace(state, step=jnp.int32(number))
        after = take_step(recipe, at_number, some_batch(), numbers)
        losses.add(float(after.totals["loss"]))
    assert len(losses) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dropout", "mixup"])
@pytest.mark.parametrize("way, accumulate", [("jit", 8), ("shard_map", 1)])
def test_dropout_and_mixup_differ_by_device_and_part(kind, way, accumulate):
    """With one key for all parts of a batch, their order would not matter."""
    recipe = step.Recipe(Linear(num_classes=5, dropout=0.5), accumulate=accumulate)
    if kind == "mixup":
        recipe = step.Recipe(Linear(num_classes=5), mixup=True, accumulate=accumulate)
    numbers = step.Numbers(0, mixup=1.0)
    parallel = Parallel(way)
    constants = parallel.replicate(CONSTANTS)
    batch = some_batch()
    losses = []
    for order in (np.arange(8), np.arange(8)[::-1]):
        data = [x.reshape(8, 2, *x.shape[1:])[order] for x in (batch.images, batch.labels)]
        data = parallel.share(tuple(x.reshape(16, *x.shape[2:]) for x in data))
        state = parallel.replicate(step.init(recipe, (8, 8, 3), numbers))
        run = step.streamed_step(parallel, recipe)
        state = parallel.fetch(run(state, constants, data, numbers, np.int32(4)))
        losses.append(float(state.totals["loss"]))
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)


def test_mixup_counts_errors_in_the_shares_of_the_two_labels():
    """Errors of an image with two labels are no whole numbers."""
    recipe = step.Recipe(Linear(num_classes=5), mixup=True)
    numbers = step.Numbers(0, mixup=2.0)
    state = step.init(recipe, (8, 8, 3), numbers)
    errors = []
    for first, second in ((0, 0), (1, 1), (0, 1), (1, 0)):
        labels = np.repeat([first, second], 8).astype(np.int32)
        batch = dataclasses.replace(some_batch(), labels=labels)
        errors.append(float(take_step(recipe, state, batch, numbers).totals["errors"]))
    same, opposite = sum(errors[:2]), sum(errors[2:])
    # Whole numbers where both labels of a mixed image are equal. The two orders of two labels add
    # up to the same, since each order's shares are the other's.
    assert errors[0] == round(errors[0]) and errors[1] == round(errors[1])
    assert opposite == pytest.approx(same, rel=1e-5)
    assert abs(errors[2] - round(errors[2])) > 1e-3


# ------------------------------------------------------------------ averages


def test_scored_variables_are_all_averages_or_none():
    model = Tiny(num_classes=5)
    for recipe in (step.Recipe(model), step.Recipe(model, ema=True)):
        variables = jax.eval_shape(lambda recipe=recipe: step.init(recipe, (8, 8, 3), NUMBERS))
        numbered = jax.tree.unflatten(
            jax.tree.structure(variables), range(len(jax.tree.leaves(variables)))
        )
        scored = {"params": numbered.params, "batch_stats": numbered.batch_stats}
        if recipe.ema:
            scored = {"params": numbered.ema, "batch_stats": numbered.ema_batch_stats}
        assert numbered.variables_to_score() == scored


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [0.999, 0.2])
def test_averages_leave_their_random_start_within_a_few_steps(ema_decay):
    """The decay rises to `ema_decay`, which 0.2 reaches in the third step."""
    recipe = step.Recipe(Tiny(num_classes=5), ema=True)
    numbers = step.Numbers(seed=1, ema_decay=ema_decay)
    values = lambda state: jax.device_get((state.params, state.batch_stats))
    state = step.init(recipe, (8, 8, 3), numbers)
    start = values(state)
    averages = start
    for number in range(5):
        state = take_step(recipe, state, some_batch(), numbers)
        decay = min(ema_decay, (1 + number) / (10 + number))
        move = lambda average, new, decay=decay: decay * average + (1 - decay) * new
        averages = jax.tree.map(move, averages, values(state))
    ema = jax.device_get((state.ema, state.ema_batch_stats))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, ema, averages)
    distance = lambda other: optax.tree.norm(jax.tree.map(np.subtract, ema, other))
    assert distance(values(state)) < 0.5 * distance(start)


def test_a_checkpoint_without_averages_of_statistics_goes_on_from_the_statistics(tmp_path):
    state = step.init(step.Recipe(Tiny(num_classes=5), ema=True), (8, 8, 3), NUMBERS)
    numbers = iter(range(1, 1000))
    state = jax.tree.map(lambda leaf: np.full_like(leaf, next(numbers)), state)
    before = {name: leaf for name, leaf in _leaves(state).items() if "ema_batch" not in name}
    assert len(before) < len(_leaves(state))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnjax.train.checkpoints._leaves", lambda state: before)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, {})
    with Checkpoints(tmp_path) as checkpoints:
        _, restored, _ = checkpoints.restore(state)
        expected = dataclasses.replace(state, ema_batch_stats=state.batch_stats)
        jax.tree.map(np.testing.assert_array_equal, restored, expected)
        checkpoints.save(2, restored, {})
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(state)[1], expected)
        # A run without averages is still another one.
        with pytest.raises(ValueError, match="is of another model, optimizer or"):
            checkpoints.restore(dataclasses.replace(state, ema=None, ema_batch_stats=None))


# ------------------------------------------------------------------ clipped gradients


@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_the_gradients_of_all_parts_and_devices_are_clipped_before_weight_decay(way):
    """The network has no BatchNorm, so its gradients do not depend on the parts and devices."""
    plain = step.Recipe(Linear(num_classes=5), accumulate=2)
    clipped = dataclasses.replace(plain, clip=True)
    parallel = Parallel(way)
    constants = parallel.replicate(CONSTANTS)
    batch = some_batch()
    data = parallel.share((batch.images, batch.labels))

    def params_after(recipe, **settings):
        numbers = step.Numbers(seed=0, momentum=0.0, **settings)
        state = parallel.replicate(step.init(recipe, (8, 8, 3), numbers))
        run = step.streamed_step(parallel, recipe)
        return parallel.fetch(run(state, constants, data, numbers, np.int32(4))).params

    before = jax.device_get(step.init(plain, (8, 8, 3), step.Numbers(seed=0)).params)
    after = params_after(plain)
    grads = jax.tree.map(lambda p, q: (p - q) / 0.1, before, after)
    norm = float(optax.tree.norm(grads))
    expected = jax.tree.map(lambda p, g: p - 0.1 * (0.25 * g + 0.5 * p), before, grads)
    scaled = params_after(clipped, clip_norm=0.25 * norm, weight_decay=0.5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, scaled, expected)
    jax.tree.map(close, params_after(clipped, clip_norm=1.1 * norm), after)


# ------------------------------------------------------------------ types


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_a_step_in_bfloat16_is_nearly_that_in_float32(form):
    images, labels = some_data(64)
    images = images.repeat(2, 1).repeat(2, 2)
    numbers = step.Numbers(seed=1, momentum=0.0)
    batch = step.Batch(images, labels, MOMENTS, jnp.float32(0.1), 4)
    model = SmallResNet(5, widths=(4, 8), input_shape=(16, 16, 3))
    before = step.init(step.Recipe(model), images.shape[1:], numbers)
    with lowering(form):
        plain, rounded = (
            take_step(step.Recipe(model.clone(dtype=dtype)), before, batch, numbers)
            for dtype in (jnp.float32, jnp.bfloat16)
        )
    np.testing.assert_allclose(rounded.totals["loss"], plain.totals["loss"], rtol=1e-3)
    for name, tolerance in (("params", 0.15), ("batch_stats", 0.01)):
        start, exact, other = (getattr(state, name) for state in (before, plain, rounded))
        assert {leaf.dtype for leaf in jax.tree.leaves(other)} == {np.dtype(np.float32)}
        distance = lambda one, other: optax.tree.norm(jax.tree.map(np.subtract, one, other))
        assert distance(other, exact) < tolerance * distance(start, exact)
