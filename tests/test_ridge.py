"""Ridge regression compared with its definition, and the scaler with NumPy."""

import jax
import numpy as np
import pytest
import threadpoolctl

from cnnjax import ridge

STRENGTHS = np.array([0.01, 1.0, 100.0])


def random_problem(examples, features):
    """Returns centered features [n, d] and two centered targets [n, 2]."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((examples, features))
    y = rng.standard_normal((examples, 2))
    return x - x.mean(0), y - y.mean(0)


@pytest.mark.parametrize("examples, features", [(40, 7), (7, 40)])
def test_both_forms_solve_the_ridge_system(examples, features):
    x, y = random_problem(examples, features)
    weights = ridge.solve(ridge.factor(x.T @ x), x.T @ y, STRENGTHS)
    assert weights.shape == (3, features, 2)
    coefficients = ridge.solve(ridge.factor(x @ x.T), y, STRENGTHS)
    for number, strength in enumerate(STRENGTHS):
        expected = np.linalg.solve(x.T @ x + strength * np.eye(features), x.T @ y)
        np.testing.assert_allclose(weights[number], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(x.T @ coefficients[number], expected, rtol=1e-9, atol=1e-12)


def test_a_decomposition_takes_one_thread_and_gives_the_others_back(monkeypatch):
    def count_threads():
        pools = threadpoolctl.threadpool_info()
        return {pool["num_threads"] for pool in pools if pool["user_api"] == "blas"}

    ridge._blas.cache_clear()  # libraries may have been loaded since
    during = []
    decompose = np.linalg.eigh
    monkeypatch.setattr(
        np.linalg, "eigh", lambda gram: during.append(count_threads()) or decompose(gram)
    )
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        ridge.factor(np.eye(3))
        assert during == [{1}] and count_threads() == {2}


def test_one_strength_gives_one_solution():
    x, y = random_problem(20, 3)
    factors = ridge.factor(x.T @ x)
    several = ridge.solve(factors, x.T @ y, STRENGTHS)
    np.testing.assert_allclose(ridge.solve(factors, x.T @ y, 1.0), several[1], rtol=1e-12)


def test_a_singular_gram_matrix_has_a_solution():
    x, y = random_problem(20, 3)
    twice = np.concatenate([x, x], 1)
    factors = ridge.factor(twice.T @ twice)
    assert (factors.values >= 0).all()
    # Two copies of a feature share its weight; their penalty counts half.
    weights = ridge.solve(factors, twice.T @ y, 1.0)
    expected = ridge.solve(ridge.factor(x.T @ x), x.T @ y, 0.5) / 2
    np.testing.assert_allclose(weights, np.concatenate([expected, expected]), rtol=1e-9)


@pytest.mark.parametrize("fit", [ridge.fit_scaler, jax.jit(ridge.fit_scaler)])
def test_the_scaler_standardizes_and_silences_constants(fit):
    rng = np.random.default_rng(0)
    features = rng.normal(3, 5, (4, 6, 5, 2)).astype(np.float32)
    features[..., 1] = 0.1
    scaled = np.asarray(fit(features)(features))
    assert scaled[..., 0].mean() == pytest.approx(0, abs=1e-5)
    assert scaled[..., 0].std() == pytest.approx(1, abs=1e-5)
    assert (scaled[..., 1] == 0).all()
