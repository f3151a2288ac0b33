"""What many tests use: a jit that compiles quickly, and the exit code of a command."""
import functools
from collections.abc import Callable

import jax

# XLA's own optimisation stays; LLVM's, which takes half of the compilation, is left out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def exit_code(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """A command's exit code, whether it returns it or, as argparse does, raises it."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code
