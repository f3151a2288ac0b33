"""The backend's setup: XLA flags, numerical check, compilation cache, and logging."""

import importlib.metadata
import logging
import os
import re
import subprocess
import sys

import forked
import jax
import pytest

from cnnjax.runtime import backend, host, processes

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def python(code: str, **environment) -> str:
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_flag_is_set_before_jax_and_appended_to_the_users():
    code = "import cnnjax, os, sys; print('jax' in sys.modules, os.environ['XLA_FLAGS'])"
    assert python(code) == f"False {FLAG}=individual_dot"
    assert (
        python(code, XLA_FLAGS="--xla_cpu_enable_fast_math=false")
        == f"False --xla_cpu_enable_fast_math=false {FLAG}=individual_dot"
    )
    assert python(code, XLA_FLAGS=f"{FLAG}=-reduce") == f"False {FLAG}=-reduce"


@pytest.mark.parametrize(
    "version, has_flag",
    [("0.10.1", False), ("0.10.2+local", True), ("0.12.0.1", True), ("0.13.0rc1", False)],
)
def test_the_flag_is_for_some_releases(version, has_flag, monkeypatch):
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: version)
    monkeypatch.delitem(sys.modules, "jax._src.xla_bridge")
    monkeypatch.setenv("XLA_FLAGS", "")
    backend.set_flags()
    assert (FLAG in os.environ["XLA_FLAGS"]) == has_flag


def test_warns_only_when_jax_has_started():
    """XLA flags have no effect after jax has started its backend, so cnnjax warns."""
    code = """
import importlib, os, warnings
import jax
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import cnnjax
    print(len(caught))
    jax.numpy.zeros(1) + 1
    del os.environ["XLA_FLAGS"]
    importlib.reload(cnnjax)
    print(len(caught))
"""
    assert python(code) == "0\n1"


@pytest.mark.skipif(jax.__version__ != "0.10.2", reason="the miscompilation is of jaxlib 0.10.2")
def test_canary_sings_on_the_default_of_this_jaxlib(tmp_path):
    """A command ends at once with jaxlib's default, which miscompiles a reduction."""
    train = ("cnnjax.main", "--config", "configs/lenet_digits.py", "--workdir", tmp_path / "run")
    done = forked.run(*train, flags=f"{FLAG}=dot")
    assert done.returncode == 1
    assert not (tmp_path / "run").exists()
    # The error is 8.37e+06 with AVX-512 and 2.10e+06 without.
    (error,) = re.findall(r"computes a reduction wrongly \(off by (\S+);", done.stderr)
    assert float(error) > 1e6


def test_canary_is_silent_here():
    """`check_numerics` does not raise with the flag that cnnjax sets."""
    backend.check_numerics()


def test_cache_is_keyed_by_jaxlib_and_cores(tmp_path, monkeypatch):
    """The folder names the number of cores, on which compiled code depends.

    Code compiled for one core runs on one, and jax's own cache key does not contain the number of
    cores.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = str(backend._cache_dir())
    assert own.startswith(str(tmp_path / "cnnjax" / "xla" / f"jaxlib-{jax.lib.__version__}-"))
    assert own.endswith(f"-{host.cores()}")
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, [min(cores)])
        try:
            single = str(backend._cache_dir())
        finally:
            os.sched_setaffinity(0, cores)
        assert single == own.rpartition("-")[0] + "-1"


def test_without_a_home_folder_there_is_no_cache(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert backend._cache_dir() is None


def test_a_cache_that_the_user_has_set_is_kept(tmp_path):
    code = """
import jax
from cnnjax.runtime import backend
backend.start()
print(jax.config.jax_compilation_cache_dir)
jax.config.update("jax_compilation_cache_dir", None)
backend.start.cache_clear()
backend.start()
print(jax.config.jax_compilation_cache_dir == str(backend._cache_dir()))
"""
    mine = str(tmp_path / "mine")
    told = python(code, XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=mine)
    assert told == f"{mine}\nTrue"


@pytest.mark.parametrize("index, level", [(0, logging.INFO), (1, logging.WARNING)])
def test_of_several_processes_one_logs(monkeypatch, index, level):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: None)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    log = logging.getLogger("cnnjax")
    monkeypatch.setattr(log, "level", log.level)
    log.setLevel(logging.INFO)
    processes.join(f"localhost:1234,2,{index}")
    assert log.level == level
    assert processes.writes() == (index == 0)


def test_a_process_that_fails_does_not_keep_the_writer_waiting(monkeypatch):
    points = []
    monkeypatch.setattr(processes, "writes", lambda: False)
    monkeypatch.setattr(processes, "wait_for_others", points.append)
    with pytest.raises(ValueError, match="not JSON"), processes.writer_last("the record is read"):
        raise ValueError("config.json is not JSON")
    assert points == ["the record is read"]


def test_the_environment_names_the_packages_that_are_installed(monkeypatch):
    """An installation without extras has no scikit-image."""
    packages = host.describe()["packages"]
    assert packages.keys() >= {"jax", "scikit-learn", "scikit-image", "pillow"}
    version = importlib.metadata.version

    def without_extras(name):
        if name == "scikit-image":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_extras)
    packages = host.describe()["packages"]
    assert "jax" in packages and "scikit-image" not in packages
