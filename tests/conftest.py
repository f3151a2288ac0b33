import os
import pathlib

import jax
import pytest

from cnnjax import backend

jax.config.update("jax_num_cpu_devices", 8)  # for what runs on many devices; the rest uses the first
backend.start()
jax.config.update("jax_numpy_dtype_promotion", "strict")


# What takes long to make, and would be made once on every worker.
_SHARED = ("ledger", "finished")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of one module that share a run share a worker."""
    for item in items:
        if set(_SHARED) & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """Real data sets laid out under $CNNJAX_DATA; tests that need them are skipped where it is not set."""
    if "CNNJAX_DATA" not in os.environ:
        pytest.skip("CNNJAX_DATA is not set: this test needs the real data sets")
    return pathlib.Path(os.environ["CNNJAX_DATA"])


@pytest.fixture
def standard_promotion():
    """For what runs through optax, which multiplies floats by integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield
