"""Optimizers, schedules, and the plateau rule, compared with PyTorch's results.

tests/golden/make_optimizers.py recorded them.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax.train.optimizers import OPTIMIZERS, optimizer
from cnnjax.train.schedules import Plateau, learning_rates, settings

pytestmark = pytest.mark.usefixtures("standard_promotion")
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "optimizers.json").read_text())
RATES = [0.1] * 3 + [0.05] * 4 + [0.01] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, tolerance",
    [("sgd", 2e-6), ("nesterov", 2e-6), ("adam", 5e-6), ("adamw", 5e-6), ("muon", 5e-3)],
)
def test_ten_steps_are_pytorchs(name, tolerance):
    """Compares ten steps with weight decay and a changing learning rate.

    In float32, ten steps of Adam differ by about 3e-6. PyTorch's Muon computes Newton-Schulz steps
    in bfloat16, cnnjax in float32: they differ by a hundredth of each step of 0.1.
    """
    generator = np.random.default_rng(0)
    w, a = (jnp.asarray(generator.normal(size=(6, 4)), jnp.float32) for _ in range(2))
    traced = []

    @jax.jit
    def step(w, state, rate, momentum, decay):
        traced.append(name)
        grad = jax.grad(lambda w: (jnp.sin(3 * w) * a).sum())(w)
        updates, state = optimizer(name, rate, momentum, decay).update(grad, state, w)
        return w + updates, state

    state = optimizer(name, 0.0).init(w)
    for rate, want in zip(RATES, GOLDEN["trajectories"][name]):
        w, state = step(w, state, rate, 0.8, 0.05)
        np.testing.assert_allclose(w, want, atol=tolerance)
    # Other rates do not compile the step again.
    assert traced == [name]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_can_spare_biases(name):
    params = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}
    grads = jax.tree.map(jnp.zeros_like, params)
    for decay_all in (True, False):
        transform = optimizer(name, 0.1, 0.9, 0.5, decay_all)
        updates, _ = transform.update(grads, transform.init(params), params)
        assert (updates["kernel"] < 0).all()
        assert (updates["bias"] < 0).all() == decay_all and (updates["bias"] == 0).all() == (
            not decay_all
        )


def test_muon_trains_biases_by_nadamw():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.array([0.5, -1.0, 2.0])}
    first = jax.tree.map(lambda p: p - 1.5, params)
    grads = [first, jax.tree.map(jnp.cos, params)]

    def two_steps(transform, params, grads):
        state = transform.init(params)
        for grad in grads:
            updates, state = transform.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params

    muon = two_steps(optimizer("muon", 0.1, 0.8, 0.05), params, grads)
    nadamw = optax.nadamw(0.1, b1=0.9, b2=0.999, weight_decay=0.05)
    expected = two_steps(nadamw, params["bias"], [grad["bias"] for grad in grads])
    np.testing.assert_allclose(muon["bias"], expected, rtol=1e-6)


@pytest.mark.slow
def test_muon_makes_a_convolutions_update_orthogonal():
    """Newton-Schulz steps bring singular values near one.

    By the coefficients, they lie between 0.68 and 1.13, times sqrt(out / in) if that is above 1.
    """
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 12))
    transform = optimizer("muon", 1.0)
    updates, _ = transform.update(
        {"kernel": kernel}, transform.init({"kernel": kernel}), {"kernel": kernel}
    )
    values = jnp.linalg.svd(updates["kernel"].reshape(18, 12), compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.3


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="optimizer='sdg' is not one of sgd, nesterov"):
        optimizer("sdg", 0.1)


def test_a_warmup_that_leaves_no_step_is_named(caplog):
    cosine = {"name": "cosine", "learning_rate": 1.0}
    learning_rates(cosine | {"warmup_epochs": 2}, 10, 3)
    assert not caplog.records
    learning_rates(cosine | {"warmup_epochs": 3}, 10, 3)
    assert "schedule.warmup_epochs=3 covers all epochs=3" in caplog.text


def test_changes_of_the_rate_after_the_last_epoch_are_named(caplog):
    step = {"name": "step", "learning_rate": 1.0, "factor": 0.5}
    learning_rates(step | {"epochs": (2, 4)}, 10, 5)
    assert not caplog.records
    learning_rates(step | {"epochs": (2, 5, 7.5)}, 10, 5)
    message = "schedule.epochs=(2, 5, 7.5): the rate does not change at 5, 7.5, since epochs=5"
    assert message in caplog.text


def test_schedules():
    # The lectures' schedules: 0.25 divided by 1.5 every 5 epochs; 0.25 halved at epochs 10, 14, 18.
    rates = learning_rates(
        {"name": "step", "learning_rate": 0.25, "factor": 1 / 1.5, "every": 5}, 7, 20
    )
    np.testing.assert_allclose(
        rates, np.repeat([0.25, 0.25 / 1.5, 0.25 / 1.5**2, 0.25 / 1.5**3], 35), rtol=1e-6
    )
    rates = learning_rates(
        {"name": "step", "learning_rate": 0.25, "factor": 0.5, "epochs": (10, 14, 18)}, 3, 20
    )
    np.testing.assert_allclose(
        rates, np.repeat([0.25, 0.125, 0.0625, 0.03125], [30, 12, 12, 6]), rtol=1e-6
    )
    assert rates.dtype == np.float32
    rates = learning_rates({"name": "cosine", "learning_rate": 1.0}, 10, 10)
    np.testing.assert_allclose(rates, 0.5 * (1 + np.cos(np.pi * np.arange(100) / 100)), atol=1e-6)
    # After a warmup, the cosine takes the rest.
    rates = learning_rates({"name": "cosine", "learning_rate": 1.0, "warmup_epochs": 2}, 10, 10)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(80) / 80))
    np.testing.assert_allclose(rates, [*np.arange(20) / 20, *cosine], atol=1e-6)
    # The last cycle is cut short.
    rates = learning_rates(
        {"name": "restarts", "learning_rate": 1.0, "every": 3, "warmup_epochs": 1}, 10, 8
    )
    cycle = 0.5 * (1 + np.cos(np.pi * np.arange(30) / 30))
    np.testing.assert_allclose(rates, [*np.arange(10) / 10, *cycle, *cycle, *cycle[:10]], atol=1e-6)
    rates = learning_rates(
        {"name": "step", "learning_rate": 1.0, "factor": 0.5, "epochs": (3,), "warmup_epochs": 1},
        4,
        5,
    )
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.75] + [1] * 8 + [0.5] * 8, rtol=1e-6)
    np.testing.assert_array_equal(
        learning_rates({"name": "plateau", "learning_rate": 0.5}, 2, 2), [0.5] * 4
    )


def test_fractions_of_epochs_are_rounded_to_steps():
    halved = {"name": "step", "learning_rate": 1.0, "factor": 0.5}
    # In floating point, 2.3 * 100 is less than 230.
    rates = learning_rates(halved | {"epochs": (2.3,)}, 100, 3)
    np.testing.assert_array_equal(rates, np.repeat([1, 0.5], [230, 70]))
    # Both changes are at the fourth step.
    rates = learning_rates(halved | {"epochs": (1.9, 2.1)}, 2, 3)
    np.testing.assert_array_equal(rates, np.repeat([1, 0.25], [4, 2]))
    rates = learning_rates(halved | {"every": 1.5}, 2, 4)
    np.testing.assert_array_equal(rates, np.repeat([1, 0.5, 0.25], [3, 3, 2]))


@pytest.mark.parametrize(
    "schedule, message",
    [
        (
            {"name": "stairs"},
            "schedule.name='stairs' is not one of constant, step, cosine, restarts, plateau",
        ),
        ({"name": "constant"}, "schedule.learning_rate=None"),
        (
            {"name": "constant", "learning_rate": 0.1, "gamma": 2},
            "schedule.gamma=2 is not a key of schedules; they have cooldown, epochs, every",
        ),
        (
            {"name": "restarts", "learning_rate": 0.1},
            "schedule.every=0 is not a positive number of epochs",
        ),
        ({"name": "step", "learning_rate": 0.1}, "give one of them"),
        ({"name": "step", "learning_rate": 0.1, "every": 2, "epochs": (3,)}, "give one of them"),
        ({"name": "step", "learning_rate": 0.1, "epochs": (3, 2)}, "are not rising"),
        (
            {"name": "step", "learning_rate": 0.1, "epochs": (0.5, 2)},
            "are not rising numbers of at least 1$",
        ),
        (
            {"name": "plateau", "learning_rate": 0.1, "factor": 1.0},
            "schedule.factor=1.0 is not between 0 and 1",
        ),
        (
            {"name": "plateau", "learning_rate": 0.1, "mode": "least"},
            "schedule.mode='least' is not one of min, max",
        ),
        ({"name": "plateau", "learning_rate": 0.1, "patience": -1}, "schedule.patience=-1"),
        (
            {"name": "plateau", "learning_rate": 0.1, "metric": "accuracy"},
            "schedule.metric='accuracy' with schedule.mode='min' is not one of",
        ),
        (
            {"name": "plateau", "learning_rate": 0.1, "mode": "max"},
            "schedule.metric='error' with schedule.mode='max' is not one of",
        ),
        # Every comparison with NaN is false, so a check must be written to fail for NaN.
        (
            {"name": "cosine", "learning_rate": 0.1, "warmup_epochs": math.nan},
            "schedule.warmup_epochs=nan is not a number of at least 0",
        ),
        (
            {"name": "cosine", "learning_rate": 0.1, "warmup_epochs": math.inf},
            "schedule.warmup_epochs=inf is not a finite number",
        ),
        ({"name": "cosine", "learning_rate": math.inf}, "schedule.learning_rate=inf is not a fin"),
        (
            {"name": "plateau", "learning_rate": 0.1, "threshold": math.nan},
            "schedule.threshold=nan is not a number of at least 0",
        ),
        (
            {"name": "step", "learning_rate": 0.1, "every": 2, "factor": math.inf},
            "schedule.factor=inf is not a positive number",
        ),
        ({"name": "step", "learning_rate": 0.1, "epochs": (math.nan,)}, "are not rising"),
        ({"name": "step", "learning_rate": 0.1, "epochs": ("10-14",)}, "are not rising"),
    ],
)
def test_wrong_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        settings(schedule)


def test_the_plateau_rule_has_the_settings_of_its_schedule():
    schedule = {"name": "plateau", "learning_rate": 0.5, "factor": 0.25, "patience": 2}
    rule = Plateau.of(settings(schedule))
    assert (rule.rate, rule.factor, rule.patience, rule.mode) == (0.5, 0.25, 2, "min")
    with pytest.raises(ValueError, match="schedule.factor=1.0 is not between 0 and 1"):
        Plateau.of(settings(schedule) | {"factor": 1.0})


@pytest.mark.parametrize("case", range(len(GOLDEN["plateaus"])))
def test_plateau_decides_as_pytorch_and_resumes_anywhere(case):
    case = GOLDEN["plateaus"][case]
    rule = Plateau(0.25, **case["settings"])
    for metric, want in zip(case["metrics"], case["rates"]):
        rule.update(math.nan if metric is None else metric)
        assert rule.rate == want
        assert rule.scale == want / 0.25
        fresh = Plateau(0.25, **case["settings"])
        fresh.restore(json.loads(json.dumps(rule.state())))
        rule = fresh


def test_the_recorded_plateaus_show_every_behavior():
    """The recorded cases include several cuts, the smallest rate, and a NaN metric."""
    rates = [case["rates"] for case in GOLDEN["plateaus"]]
    assert (
        sum(len(set(r)) > 3 for r in rates) > 10
        and any(r[-1] == 0.02 for r in rates)
        and any(None in case["metrics"] for case in GOLDEN["plateaus"])
    )
