"""Compiling for tests of values: most of their time would go into optimising code that runs once."""
import functools

import jax

# XLA's own optimisation stays; LLVM's, which takes half of the compilation, is left out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
