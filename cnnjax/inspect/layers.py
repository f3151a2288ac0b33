"""A network's layers: shapes, parameters, memory, multiply-adds and fields."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax

from cnnjax.inspect.fields import Field, seen
from cnnjax.inspect.trace import (
    LOOPS,
    apply,
    follow,
    is_max_pool,
    operations,
    own_parameters,
    trace,
    with_local_fill,
)
from cnnjax.nn.parameters import eval_shape


@dataclasses.dataclass(frozen=True)
class Layer:
    """A row of a network's table.

    Attributes:
      name: the layer's path, joined with dots; empty for the input and max-pools.
      kind: the layer's class, "input", "max-pool", or "in training only".
      output: shape of the output; None for a layer that runs in training only.
      parameters: number of parameters.
      memory: bytes of the output, for the whole batch.
      macs: multiply-adds of the kernel, for the whole batch.
      receptive_field: (height, width) in pixels; None if the layer sees the whole image, or if
        something up to it upsamples or rearranges a map.
      stride: (height, width) in pixels; None if there is no receptive field.
    """

    name: str
    kind: str
    output: tuple[int, ...] | None
    parameters: int = 0
    memory: int = 0
    macs: int = 0
    receptive_field: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None


def layers(model, input_shape: tuple[int, int, int] | None = None, batch: int = 1) -> list[Layer]:
    """Lists the layers of a network in the order in which they run.

    Parameters of layers that run in training only, such as auxiliary classifiers, come last. A
    layer that runs twice has two rows; its parameters are counted in the first.

    Args:
      model: a `cnnjax.models.Network`.
      input_shape: height, width and channels of an image; the publication's unless given.
      batch: number of images.

    Raises `ValueError` if the network has no output for such an image, or runs layers in a loop or
    branch of jax, such as `flax.linen.scan`, where they cannot be counted.
    """
    model = with_local_fill(model)
    images = jax.ShapeDtypeStruct((batch, *(input_shape or model.input_shape)), model.dtype)
    variables = eval_shape(model.init, jax.random.key(0), images)
    reported: dict[str, Layer] = {}
    kernels: dict[str, int] = {}

    def report(name, module, _):
        parameters = own_parameters(module)
        kernels[name] = parameters["kernel"].size if "kernel" in parameters else 0
        reported[name] = Layer(
            name=name,
            kind=type(module).__name__,
            output=None,
            parameters=sum(value.size for value in parameters.values()),
        )

    run = functools.partial(apply, model)
    program = trace(run, variables, images, report=report)
    rows = [_measured(Layer("", "input", None), program.invars[-1].aval, Field())]

    # The latest convolution: a layer's operation "name" follows its convolution.
    convolution = None

    def visit(equation, fields):
        nonlocal convolution
        field = seen(equation, fields)
        if equation.primitive.name in LOOPS:
            _check_has_no_layer(model, equation, reported)
        if equation.primitive.name == "conv_general_dilated":
            convolution = equation
        output = equation.outvars[0].aval
        if is_max_pool(equation):
            rows.append(_measured(Layer("", "max-pool", None), output, field))
        elif equation.primitive.name == "name" and equation.params["name"] in reported:
            name = equation.params["name"]
            macs = kernels[name] * _positions(output, convolution)
            convolution = None
            layer = dataclasses.replace(reported[name], macs=macs)
            rows.append(_measured(layer, output, field))
            # A layer that runs again brings no further parameters.
            reported[name] = dataclasses.replace(reported[name], parameters=0)
        return field

    # The last input is the images; the others, the network's variables, see nothing of them.
    constants = [None] * (len(program.invars) - 1)
    follow(program, [*constants, Field()], visit)
    return rows + _in_training_only(variables["params"], reported)


def _check_has_no_layer(model, loop, reported):
    """Raises `ValueError` if a layer or a max-pool runs in a loop or a branch."""
    for equation in operations([loop]):
        is_layer = equation.primitive.name == "name" and equation.params["name"] in reported
        if is_layer or is_max_pool(equation):
            layer = equation.params["name"] if is_layer else "a max-pool"
            raise ValueError(
                f"model={type(model).__name__} runs {layer} in a {loop.primitive.name} of jax, "
                "where layers cannot be counted; expected a Python loop"
            )


def _positions(output, convolution) -> int:
    """Counts the positions at which a layer uses every weight of its kernel, for the whole batch.

    Args:
      output: the layer's output.
      convolution: the layer's convolution; None if it has none.
    """
    if convolution is not None and max(convolution.params["lhs_dilation"]) > 1:
        # A transposed convolution puts its kernel down at every position of its input.
        output = convolution.invars[0].aval
    return math.prod(output.shape[:-1])


def _measured(layer, output, field):
    """Returns the layer with its output's shape, memory and field."""
    layer = dataclasses.replace(
        layer, output=tuple(output.shape), memory=output.size * output.dtype.itemsize
    )
    if not isinstance(field, Field) or output.ndim != 4:
        return layer
    return dataclasses.replace(layer, receptive_field=field.size(), stride=field.step)


def _in_training_only(parameters, reported):
    """Lists layers that have parameters but did not run in evaluation mode."""
    sizes: dict[str, int] = {}
    for path, value in jax.tree.leaves_with_path(parameters):
        name = ".".join(key.key for key in path[:-1])
        if name not in reported:
            sizes[name] = sizes.get(name, 0) + value.size
    return [Layer(name, "in training only", None, parameters=size) for name, size in sizes.items()]


def totals(table: Sequence[Layer]) -> dict[str, int]:
    """Sums a table's parameters, activation memory in bytes, and multiply-adds."""
    return {
        "parameters": sum(layer.parameters for layer in table),
        "memory": sum(layer.memory for layer in table),
        "macs": sum(layer.macs for layer in table),
    }
