"""Tracing on shapes, and facts about values followed through the operations."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

from cnnjax.nn import lowering

# Operations whose program runs several times, or perhaps not at all.
LOOPS = ("scan", "while", "cond")
# Operations whose program combines two values.
_REDUCTIONS = ("reduce", "reduce_window")
# Fills whose border depends on the whole map. Each has the grid of "zeros"; "interpolate", which
# stretches maps, has not.
_WHOLE_MAP_FILLS = ("mean", "random")

Report = Callable[[str, nn.Module, Any], None]


def with_local_fill(model: nn.Module) -> nn.Module:
    """Returns the network, padded with zeros if its own border depends on the whole map.

    A module without a field `padding`, such as a single block, is returned unchanged.
    """
    if getattr(model, "padding", None) in _WHOLE_MAP_FILLS:
        return model.clone(padding="zeros")
    return model


def apply(model: nn.Module, variables, images, **options):
    """Runs a network in evaluation mode.

    A network that draws random numbers then draws the same for every batch. The noise of
    padding='random' differs between the images of a batch.
    """
    keys = {"padding": jax.random.key(0), "dropout": jax.random.key(0)}
    return model.apply(variables, images, rngs=keys, **options)


def trace(function: Callable, *arguments, report: Report | None = None):
    """Traces a function of shapes, with windows as networks define them.

    The output of every layer that has parameters carries the layer's name through the trace, as an
    operation "name".

    Args:
      function: a function of the arguments.
      arguments: trees of `jax.ShapeDtypeStruct`.
      report: called with each layer's name, module and output.

    Returns the jaxpr, whose inputs are the leaves of the arguments.
    """

    def name_layers(call, args, kwargs, context):
        output = call(*args, **kwargs)
        module = context.module
        if context.method_name != "__call__" or not own_parameters(module):
            return output
        name = ".".join(module.path)
        if report is not None:
            report(name, module, output)
        return checkpoint_name(output, name)

    # A fresh function, since jax caches traces by function, and a cached one may lack the names.
    fresh = lambda *arguments: function(*arguments)
    with nn.intercept_methods(name_layers), lowering("reference"):
        return jax.make_jaxpr(fresh)(*arguments).jaxpr


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """Returns a layer's parameters, without those of layers inside it."""
    parameters = module.variables.get("params", {})
    return {name: value for name, value in parameters.items() if hasattr(value, "size")}


def inner_program(equation):
    """Returns the program that an operation runs once on its operands, or None.

    Compiled functions and custom gradients have one. Loops and branches do not: what they compute
    is not followed.
    """
    if equation.primitive.name in (*LOOPS, *_REDUCTIONS):
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    # A closed jaxpr (a program with its constants) holds the program; some operations hold it bare.
    return getattr(inner, "jaxpr", inner)


def follow(program, inputs: Sequence, visit: Callable[[Any, list], Any]) -> list:
    """Follows facts about values through a program, in the order of its operations.

    Args:
      program: a jaxpr.
      inputs: a fact for each input; None is that of a constant.
      visit: (operation, facts of its operands) -> fact of its outputs. Operations without outputs
        are not visited.

    Returns the facts of the program's outputs.
    """
    facts = dict(zip(program.invars, inputs))

    def fact(variable):
        is_literal = hasattr(variable, "val")
        return None if is_literal else facts.get(variable)

    for equation in program.eqns:
        # Callbacks, such as `jax.debug.print`, have no outputs.
        if not equation.outvars:
            continue
        operands = [fact(variable) for variable in equation.invars]
        inner = inner_program(equation)
        if inner is None:
            outputs = [visit(equation, operands)] * len(equation.outvars)
        else:
            outputs = follow(inner, operands, visit)
        facts.update(zip(equation.outvars, outputs))
    return [fact(variable) for variable in program.outvars]


def operations(equations: Sequence) -> Iterator:
    """Yields operations, and those of all programs inside them."""
    for equation in equations:
        yield equation
        for program in jaxprs_in_params(equation.params):
            yield from operations(program.eqns)


def is_pool(equation) -> bool:
    """Tells whether an operation is a pool."""
    return equation.primitive.name.startswith("reduce_window")


def is_max_pool(equation) -> bool:
    """Tells whether an operation is a max-pool."""
    return equation.primitive.name == "reduce_window_max"
