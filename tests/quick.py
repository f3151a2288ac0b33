"""What many tests use: programs that compile quickly, variables without an initialization, random
numbers of few operations, reports without figures, and the exit code of a command.

The tests' own process compiles quickly (conftest.py): XLA's own optimization of a program stays,
and LLVM's is left out. `optimized` is jax.jit as users have it, for tests of the compiled program
itself, and `readable` is for tests of its text; commands without `FLAGS` are for what users'
programs compute to the bit.
"""

import functools
import io
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import jaxlib
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.extend.random import define_prng_impl

from cnnjax import weights
from cnnjax.nn.parameters import eval_shape
from cnnjax.runtime import files

# As users have it.
write_figure = files.write_figure

# What takes most of a compilation: LLVM's optimization, dividing a small program among threads, and
# MLIR's emitters of fused loops. Each with the tests' value and XLA's own.
_OPTIONS = {
    "xla_backend_optimization_level": (0, 3),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
# XLA ends the process on a flag that it does not have; later releases do not have this one.
if jaxlib.__version__.startswith("0.10."):
    _OPTIONS["xla_cpu_use_fusion_emitters"] = (False, True)

FLAGS = " ".join(f"--{name}={str(quick).lower()}" for name, (quick, _) in _OPTIONS.items())

_OWN = {name: own for name, (_, own) in _OPTIONS.items()}
optimized = functools.partial(jax.jit, compiler_options=_OWN)

# For tests that read a program's text, which is `optimized`'s: LLVM's part comes after it.
_WITHOUT_LLVM = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
readable = functools.partial(jax.jit, compiler_options=_OWN | _WITHOUT_LLVM)


def environment(inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the environment of a command of this checkout that compiles quickly, on the CPU."""
    paths = [str(pathlib.Path(__file__).parents[1]), inherited.get("PYTHONPATH", "")]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(paths).strip(os.pathsep),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{inherited.get('XLA_FLAGS', '')} {FLAGS}".strip(),
    }


def equations(program) -> Iterator:
    """Yields the operations of a jaxpr and of the jaxprs inside it."""
    for equation in program.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal float32, drawn by NumPy: jax would compile a program for each shape."""
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32))


_PERIOD = 1_000_003  # a prime, so that repeated numbers line up along no axis


@functools.cache
def _normal_numbers() -> np.ndarray:
    """Returns standard normal float32 [2 * _PERIOD], twice the same."""
    return np.tile(np.random.default_rng(0).standard_normal(_PERIOD, np.float32), 2)


def variables(model, image=None, *arguments, **options) -> dict:
    """Drawn by NumPy: He et al.'s variances, BatchNorm nearly at rest, small biases. To compile an
    initialization takes longer.

    Large arrays repeat a million numbers: a VGG's would take seconds to draw.
    """
    start = 0

    def draw(path, leaf):
        nonlocal start
        kind = path[-1].key
        if kind in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        spread = {"mean": 0.1, "bias": 0.1}.get(kind, np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1)))
        numbers = _normal_numbers()[start : start + min(leaf.size, _PERIOD)]
        start = (start + leaf.size) % _PERIOD
        return np.resize(np.float32(spread) * numbers, leaf.shape)

    shapes = (
        weights.variable_shapes(model)
        if image is None
        else eval_shape(
            lambda image: model.init(jax.random.key(0), image, *arguments, **options), image
        )
    )
    # jnp.asarray would compile a program for each shape.
    return jax.device_put(jax.tree.map_with_path(draw, shapes))


def _mix(bits: jax.Array) -> jax.Array:
    """Spreads every bit over all 32 (the end of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _random_bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    count = jax.lax.iota(np.uint32, math.prod(shape)).reshape(shape)
    return _mix(_mix(count) + key[0]).astype(f"uint{width}")


# jax's own generator takes some three hundred operations for each array that is drawn.
_HASH = define_prng_impl(
    key_shape=(1,),
    seed=lambda seed: _mix(seed.astype(np.uint32))[None],
    split=lambda key, shape: _random_bits(~key, 32, (*shape, 1)),
    random_bits=_random_bits,
    fold_in=lambda key, data: _mix(key * np.uint32(31) + data),
    name="hash",
    tag="hash",
)


def key(seed: int) -> jax.Array:
    """A key for initializations: its numbers are random enough for means, variances and ranges."""
    return jax.random.key(seed, impl=_HASH)


def without_figures(change: Callable = setattr) -> None:
    """Makes the figures of reports empty: to draw them takes longer than small runs do.

    The `setattr` of pytest's monkeypatch, as `change`, takes it back after the test.
    """
    # Here, since most tests need no matplotlib.
    from matplotlib.figure import Figure

    from cnnjax.train import report

    for name in ("_curves_figure", "_confusion_figure", "_mistakes_figure"):
        change(report, name, lambda *arguments: Figure((1, 1)))


def draw_once(change: Callable = setattr) -> None:
    """Makes figures of work directories be drawn once and not cropped.

    To crop them, matplotlib draws them twice. test_workdir.py tests `write_figure` itself.
    """
    change(files, "write_figure", _write_uncropped)


def _write_uncropped(path: pathlib.Path, figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    files.write(path, buffer.getvalue())


def exit_code(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """A command's exit code, whether it returns it or, as argparse does, raises it."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code
