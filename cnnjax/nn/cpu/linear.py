"""Linear functions with a transpose of their own.

Reverse mode transposes linear functions. The transposes that JAX derives are slow on the CPU, so
the fast gradients of this package are stated as transposes. `jax.custom_vjp` would state them
too, but leaves no forward mode (`jax.jvp`, `jax.linearize`, `jax.hessian`), and
`jax.custom_derivatives.linear_call` has no rule for `vmap` and none for tangents of its
residuals. So this module defines a primitive, by the interface that JAX documents for that
(https://docs.jax.dev/en/latest/jax-primitives.html).
"""

import functools
import operator
from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cnnjax.runtime.types import AnyArray

_linear_call = Primitive("cnnjax_linear_call")


def linear_call(
    function: Callable,
    transpose: Callable,
    residuals: Sequence,
    *arguments,
    like: AnyArray | None = None,
) -> jax.Array:
    """Calls a function that is linear in its arguments, with its transpose given.

    Args:
      function: `function(residuals, *arguments)` returns an array. It receives `None` for an
        argument that is a symbolic zero.
      transpose: `transpose(residuals, cotangent)` returns a tuple of the arguments' cotangents.
      residuals: arrays in which the function need not be linear.
      arguments: arrays, or symbolic zeros as `jax.custom_jvp` gives them.
      like: an array of the result's shape and type, if there is one. Otherwise the function is
        traced once more to find them.
    """
    given = tuple(not isinstance(argument, SymbolicZero) for argument in arguments)

    def call_with_zeros_as_none(residuals, *nonzero):
        remaining = iter(nonzero)
        all_arguments = []
        for is_given in given:
            all_arguments.append(next(remaining) if is_given else None)
        return function(residuals, *all_arguments)

    def transpose_to_given(residuals, cotangent):
        cotangents = transpose(residuals, cotangent)
        nonzero = [value for value, is_given in zip(cotangents, given) if is_given]
        return vary_alike(cotangent, *nonzero)[1:]

    operands = vary_alike(
        *residuals, *(value for value, is_given in zip(arguments, given) if is_given)
    )
    return _linear_call.bind(
        *operands,
        function=call_with_zeros_as_none,
        transpose=transpose_to_given,
        residual_count=len(residuals),
        result=None if like is None else jax.typeof(like),
    )


def vary_alike(*arrays: AnyArray) -> tuple[AnyArray, ...]:
    """Makes arrays vary over the same mesh axes.

    Operations inside `jax.shard_map` need this; JAX's own do it by themselves. Outside `shard_map`
    it changes nothing.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset().union(*varying)
    return tuple(
        lax.pcast(array, tuple(sorted(union - own)), to="varying") if union - own else array
        for array, own in zip(arrays, varying)
    )


def add_given(*terms: jax.Array | None) -> jax.Array:
    """Adds the terms that are not `None`."""
    return functools.reduce(operator.add, (term for term in terms if term is not None))


def _evaluate(*operands, function, residual_count, **_):
    return function(operands[:residual_count], *operands[residual_count:])


def _abstract_value(*avals, result, **parameters):
    if result is None:
        (result,) = jax.make_jaxpr(functools.partial(_evaluate, **parameters))(*avals).out_avals
    return result


def _tangent(primals, tangents, **parameters):
    """Differentiates in the arguments and in the residuals.

    In the arguments, the function is its own tangent.
    """
    count = parameters["residual_count"]
    zero = [isinstance(tangent, ad.Zero) for tangent in tangents]
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    in_arguments = None
    if not all(zero[count:]):
        in_arguments = _linear_call.bind(*primals[:count], *tangents[count:], **parameters)
    in_residuals = None
    if not all(zero[:count]):
        _, in_residuals = jax.jvp(
            lambda *residuals: _evaluate(*residuals, *primals[count:], **parameters),
            tuple(primals[:count]),
            tuple(tangents[:count]),
        )
    return _linear_call.bind(*primals, **parameters), add_given(in_arguments, in_residuals)


def _transpose(cotangent, *operands, transpose, residual_count, **_):
    residuals = operands[:residual_count]
    cotangents = transpose(residuals, ad.instantiate_zeros(cotangent))
    return [None] * residual_count + [
        value if ad.is_undefined_primal(argument) else None
        for value, argument in zip(cotangents, operands[residual_count:])
    ]


def _batch(axis, operands, dimensions, **parameters):
    """Maps the function and its transpose over the batch.

    Unbatched arguments are broadcast, and so their cotangents are summed.
    """
    if all(dimension is None for dimension in dimensions):
        # JAX calls this rule without a batch, too; `jax.hessian` needs unbatched results then.
        return _linear_call.bind(*operands, **parameters), None
    residual_count = parameters["residual_count"]
    residuals = operands[:residual_count]
    residual_axes = tuple(dimensions[:residual_count])
    arguments = [
        batching.bdim_at_front(operand, dimension, axis.size)
        for operand, dimension in zip(operands[residual_count:], dimensions[residual_count:])
    ]
    over = functools.partial(jax.vmap, axis_name=axis.name, axis_size=axis.size)
    mapped = over(parameters["function"], in_axes=(residual_axes, *(0 for _ in arguments)))
    mapped_transpose = over(parameters["transpose"], in_axes=(residual_axes, 0))
    result = _linear_call.bind(
        *residuals,
        *arguments,
        function=mapped,
        transpose=mapped_transpose,
        residual_count=residual_count,
        result=None,
    )
    return result, 0


_linear_call.def_impl(_evaluate)
_linear_call.def_abstract_eval(_abstract_value)
mlir.register_lowering(_linear_call, mlir.lower_fun(_evaluate, multiple_results=False))
ad.primitive_jvps[_linear_call] = _tangent
ad.primitive_transposes[_linear_call] = _transpose
batching.fancy_primitive_batchers[_linear_call] = _batch
