import functools
import gc
import os
import pathlib
import re
import signal
import sys

import contexts
import deep_calls
import jax
import jaxtyping
import pytest
import threadpoolctl
from xdist.scheduler import LoadScopeScheduling

# Where it is set, as in many images of containers, every process of the tests compiles all that it
# imports anew, for up to seven seconds. The workers start after this.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Tracing makes objects by the million, few of them garbage: looking for it every 700 takes a
# quarter of the time.
gc.set_threshold(50_000)

# Of modules whose annotations name shapes they are checked at every call, an int being a float as
# everywhere in Python. It works on what is imported after it. Over the whole package the tests took
# a quarter longer.
jaxtyping.install_import_hook(
    [
        f"cnnjax.{name}"
        for name in (
            "nn",
            "models.base",
            "position",
            "data.augment",
            "ridge",
            "train.evaluate",
            "transfer",
            "visualize",
        )
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import quick  # noqa: E402

from cnnjax.runtime import backend  # noqa: E402


def pytest_configure(config):
    """Prepares a process that runs tests, not one that only hands them out to workers."""
    if config.getoption("dist", "no") != "no":
        return
    # For what runs on many devices; the rest uses the first.
    jax.config.update("jax_num_cpu_devices", 8)
    # OpenBLAS's threads wait for each other in busy loops, which several workers on few cores make
    # many times longer. NumPy's copy is loaded by now; the variable is for SciPy's, and for
    # commands.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Commands of the tests choose for themselves.
    inherited = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = f"{inherited} {quick.FLAGS}"
    contexts.share()
    quick.draw_once()
    backend.start()
    jax.devices()
    os.environ["XLA_FLAGS"] = inherited
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # What is imported by now is no garbage at all.
    gc.freeze()


def pytest_itemcollected(item):
    item.obj = functools.wraps(item.obj)(functools.partial(deep_calls.call, item.obj))


def pytest_runtest_setup(item):
    """Skips tests of real data sets where there are none.

    Skipped here and not in the fixture, all of them are one line of pytest's summary.
    """
    if "data_dir" in item.fixturenames and "CNNJAX_DATA" not in os.environ:
        pytest.skip("CNNJAX_DATA is not set: this test needs the real data sets")


def pytest_collection_modifyitems(items):
    """Puts long tests first, so that no worker is left with one at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


# Modules whose tests share what takes long to make, and would be made once on every worker.
_TOGETHER = tuple(
    f"tests/test_{name}.py"
    for name in (
        "basics",
        "combine",
        "docs",
        "ensemble",
        "faults",
        "notebooks",
        "position",
        "position_trained",
        "slurm",
        "visualize",
        "weights",
    )
)


# Modules whose tests run commands in forked processes (forked.py). Each worker with one of them
# would import the commands and compile their programs anew.
_FORKED = tuple(
    f"tests/test_{name}.py"
    for name in (
        "backend",
        "bad_input",
        "checkpoints",
        "claims",
        "configs",
        "distributed",
        "main",
        "own_models",
        "stream",
        "sweep",
        "train",
    )
)


# Tests of one network, whose name comes first in their brackets: it is traced once for all of them.
# VGGs are one, since most of their many values are the same in all.
_BY_NETWORK = re.compile(r"tests/test_(?:models|summary|torchvision)\.py::\w+\[(vgg|[A-Za-z]\w+)")


class _Scheduling(LoadScopeScheduling):
    """Hands out tests one by one, but those that share something all to one worker."""

    def _split_scope(self, nodeid):
        if nodeid.startswith(_FORKED):
            return "forked"
        if nodeid.startswith(_TOGETHER):
            return nodeid.split("::")[0]
        network = _BY_NETWORK.match(nodeid)
        return network[1] if network else nodeid


def pytest_xdist_make_scheduler(config, log):
    return _Scheduling(config, log)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """Real data sets laid out under $CNNJAX_DATA."""
    return pathlib.Path(os.environ["CNNJAX_DATA"])


@pytest.fixture
def standard_promotion():
    """For what runs through optax, which multiplies floats by integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def without_figures(monkeypatch):
    """Reports of training have empty figures."""
    quick.without_figures(monkeypatch.setattr)


@pytest.fixture
def handlers():
    """Puts back the handlers of signals after a test that stops a command by one.

    Such a command leaves SIGUSR1 and SIGUSR2 ignored until its process ends.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
