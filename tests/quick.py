"""What many tests use: a jit that compiles quickly, variables without an initialization, and the
exit code of a command."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import weights

# XLA's own optimization stays; LLVM's, which takes half of the compilation, is left out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


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
