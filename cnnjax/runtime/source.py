"""Import users' Python files: configurations, and networks of their own."""

import contextlib
import contextvars
import functools
import hashlib
import importlib.util
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator

from cnnjax.runtime.errors import one_line
from cnnjax.runtime.paths import expand_user

# The user's file whose code is running. `register` records it with a network, so that the network
# can be found again. It cannot be an argument of `register`: the file that calls it does not know
# by which path it was imported.
_running: contextvars.ContextVar[str | None] = contextvars.ContextVar("running", default=None)


def running_file() -> str | None:
    """Returns the path of the user's file whose code is running; None without one."""
    return _running.get()


def import_file(path: str | pathlib.Path) -> types.ModuleType:
    """Imports a Python file, once per process.

    Raises:
        ValueError: with the file and the line, for any error in the file.
    """
    return _import_resolved(expand_user(path).resolve())


# Cached, since the classes of a file must stay the same classes: jax recognizes a network that it
# has compiled by its class.
@functools.cache
def _import_resolved(path: pathlib.Path) -> types.ModuleType:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"cnnjax_file_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"there is no Python file {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[name] = module
    try:
        with running(path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_module(name: str) -> types.ModuleType:
    """Imports a module by its dotted name.

    Raises:
        ValueError: if it is not the name of a module, or with the file and the line, for any error
            in the module.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name!r} is not the name of a module")
    try:
        return importlib.import_module(name)
    # Any exception, because a user's module may raise any.
    except Exception as error:
        raise ValueError(f"{_place_of(error)}{_reason(error)}") from error


@contextlib.contextmanager
def running(path: str | pathlib.Path) -> Iterator[None]:
    """Runs code of a user's file; errors become `ValueError` with file and line."""
    resolved = str(expand_user(path).resolve())
    token = _running.set(resolved)
    try:
        yield
    except Exception as error:
        line = _line_of(error, resolved)
        place = f"{str(path)!r}, line {line}" if line else repr(str(path))
        raise ValueError(f"{place}: {_reason(error)}") from error
    finally:
        _running.reset(token)


def _reason(error: Exception) -> str:
    """Describes an error in one line; the messages of libraries may have many."""
    return f"{type(error).__name__}: {one_line(error)}"


def _place_of(error: Exception) -> str:
    """Describes the file and line of an error in a module; empty if no module raised it."""
    if isinstance(error, SyntaxError):
        return f"{error.filename!r}, line {error.lineno}: "
    frames = traceback.extract_tb(error.__traceback__)
    modules = [frame for frame in frames if frame.name == "<module>"]
    return f"{modules[-1].filename!r}, line {modules[-1].lineno}: " if modules else ""


def _line_of(error: Exception, path: str) -> int | None:
    """Finds the line of a file that an error comes from; None if from elsewhere."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return lines[-1] if lines else None
