"""Runs commands one after the other in one process, for test_bad_input.py.

Each ends before it computes much: a process of its own would do little but start jax.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback

from cnnjax import combine, summary, sweep, visualize
from cnnjax import main as single

COMMANDS = {
    "main": single.main,
    "sweep": sweep.main,
    "combine": combine.main,
    "summary": summary.main,
    "visualize": visualize.main,
}


@contextlib.contextmanager
def redirected(descriptor: int):
    """Sends what is written to a descriptor, by Python or by a library, to the file it gives."""
    own = os.dup(descriptor)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), descriptor)
        try:
            yield file
        finally:
            os.dup2(own, descriptor)
            os.close(own)


def run(command: str, arguments: list[str]) -> tuple[int, str, str]:
    """Returns a command's exit code, standard output and standard error."""
    with redirected(1) as output, redirected(2) as errors:
        try:
            code = COMMANDS[command](arguments) or 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for file in (output, errors):
            file.seek(0)
        return code, output.read(), errors.read()


def main(arguments: list[str]) -> int:
    """Runs the commands of a file in a folder; writes what `run` returns of each to another file.

    Each outcome is a line of JSON, written as it comes: after a crash, the next command is named.
    """
    # No __pycache__ beside configuration files: the test checks that commands leave no files.
    sys.dont_write_bytecode = True
    folder, cases, found = arguments
    os.chdir(folder)
    with open(cases) as file:
        commands = json.load(file)
    with open(found, "w") as file:
        for command, given in commands:
            print(json.dumps(run(command, given)), file=file, flush=True)
    return 0
