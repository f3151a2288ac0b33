"""What many tests use: programs that compile quickly, variables without an initialization, and the
exit code of a command.

Tests of what users' programs compute to the bit, or of the compiled program itself, use `jax.jit`
and commands without `FLAGS`.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import weights

# XLA's own optimization of a program stays. Left out is what takes most of a compilation: MLIR's
# emitters of fused loops, LLVM's optimization, and dividing a small program among threads.
OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# A release of XLA refuses an option that it no longer has.
try:
    jax.jit(lambda: 0, compiler_options=OPTIONS)()
except jax.errors.JaxRuntimeError:
    OPTIONS = {"xla_backend_optimization_level": 0}
# For a whole command, in XLA_FLAGS.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())

jit = functools.partial(jax.jit, compiler_options=OPTIONS)


def environment(inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the environment of a command of this checkout that compiles quickly, on the CPU."""
    paths = [str(pathlib.Path(__file__).parents[1]), inherited.get("PYTHONPATH", "")]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(paths).strip(os.pathsep),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{inherited.get('XLA_FLAGS', '')} {FLAGS}".strip(),
    }


def variables(model, image=None, *arguments, **options) -> dict:
    """Drawn by NumPy: He et al.'s variances, BatchNorm nearly at rest, small biases. To compile an
    initialization takes longer."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        if kind in ("scale", "var"):
            return jnp.asarray(np.ones(leaf.shape, np.float32))
        spread = {"mean": 0.1, "bias": 0.1}.get(kind, np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1)))
        return jnp.asarray(np.float32(spread) * rng.standard_normal(leaf.shape, np.float32))

    shapes = (
        weights.variable_shapes(model)
        if image is None
        else jax.eval_shape(
            lambda image: model.init(jax.random.key(0), image, *arguments, **options), image
        )
    )
    return jax.tree.map_with_path(draw, shapes)


def exit_code(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """A command's exit code, whether it returns it or, as argparse does, raises it."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code
