"""Commands in processes of their own that import nothing anew.

`python -m` imports for longer than most commands of the tests compute. Here a process is forked
from one that has imported everything and computed nothing (imported.py). Tests of the start itself
use subprocess.

These processes share a folder of compiled programs, since many run the same one. What a test makes
smaller in the command's module, such as a number of images, is given as `changes`.

Their end is not Python's own: functions that are registered with atexit do not run.
"""

import atexit
import functools
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from unittest import mock

import deep_calls
import jax
import quick

from cnnjax.main import leave

ROOT = pathlib.Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def _cache() -> str:
    """Returns the folder of compiled programs, which is removed when the tests end."""
    folder = tempfile.mkdtemp(prefix="cnnjax-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _start_server() -> None:
    _CONTEXT.set_forkserver_preload(["imported"])
    # The server takes its import path from the environment.
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths).strip(os.pathsep)):
        multiprocessing.forkserver.ensure_running()


def _work(
    module: str,
    arguments: list[str],
    changes: dict,
    flags: str,
    config: dict,
    figures: bool,
    cache: str,
    output: str,
    errors,
) -> None:
    """Call `module`.main in the forked process as `python -m module` does."""
    assert "imported" in sys.modules
    # A daemonic process, which ends with the tests, may have no children, such as those that
    # decode images.
    multiprocessing.current_process()._config["daemon"] = False
    # A shell's background process ignores it, and so would this one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # jax reads it when it starts its backend.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    # For jax, which is imported already, and for the processes that the command starts.
    options = {
        "jax_compilation_cache_dir": cache,
        "jax_persistent_cache_min_compile_time_secs": 0,
        **config,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    os.dup2(os.open(output, os.O_WRONLY), 1)
    os.dup2(errors.fileno(), 2)
    errors.close()
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    quick.draw_once()
    if not figures:
        quick.without_figures()
    command = importlib.import_module(module)
    if hasattr(command, "__path__"):
        command = importlib.import_module(f"{module}.__main__")
    for name, value in changes.items():
        assert hasattr(command, name)
        setattr(command, name, value)
    try:
        code = deep_calls.call(command.main, arguments=arguments)
    except SystemExit as stop:
        code = stop.code
    if not code:
        # As at Python's own end. Without it, a process that is still ending aborts when the first
        # one, which the others are connected to, is gone.
        jax.distributed.shutdown()
    leave(code or 0)


class Popen:
    """A running command, with what tests need of subprocess.Popen.

    Args:
        module: the command's.
        arguments: of the command line.
        flags: added to XLA_FLAGS.
        changes: new values of the module's globals, by name.
        config: values of jax.config, by name.
        figures: whether reports of training have their figures, for tests of these.
    """

    def __init__(
        self,
        module: str,
        *arguments,
        flags: str = "",
        changes: Mapping = {},
        config: Mapping = {},
        figures: bool = False,
    ):
        _start_server()
        self._output = tempfile.NamedTemporaryFile("r")
        read, write = _CONTEXT.Pipe(duplex=False)
        self.args = [module, *map(str, arguments)]
        given = (self.args[1:], dict(changes), flags, dict(config), figures)
        work = (module, *given, _cache(), self._output.name, write)
        self._process = _CONTEXT.Process(target=_work, args=work, daemon=True)
        self._process.start()
        write.close()
        self.stderr = open(os.dup(read.fileno()))
        read.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 3600) -> tuple[str, str]:
        """Wait for the end and return standard output and the rest of standard error.

        Kills the command after `timeout` seconds.
        """
        late = threading.Timer(timeout, self.send_signal, [signal.SIGKILL])
        late.start()
        with self.stderr, self._output:
            errors = self.stderr.read()
            self._process.join()
            late.cancel()
            return self._output.read(), errors


def run(module: str, *arguments, **options) -> subprocess.CompletedProcess:
    """Run a command to its end, as subprocess.run does with captured text.

    The options are those of `Popen`.
    """
    process = Popen(module, *arguments, **options)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
