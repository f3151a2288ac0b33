"""The chain of a network's windows, read from its traced operations."""

import dataclasses
import functools
from typing import NamedTuple

import jax

from cnnjax.inspect.fields import REARRANGED, UPSAMPLED, WHOLE_IMAGE, Field, Unlocated, seen
from cnnjax.inspect.trace import LOOPS, apply, follow, is_pool, trace, with_local_fill
from cnnjax.nn import output_size
from cnnjax.nn.parameters import eval_shape


class Window(NamedTuple):
    """A square convolution or pool.

    Attributes:
      name: the layer's name of a convolution; pool1, pool2, ... of pools.
      kernel: side of the kernel.
      stride: positions from one window to the next.
      padding: positions added on each side of the map.
      pool: whether it is a pool.
    """

    name: str
    kernel: int
    stride: int
    padding: int
    pool: bool = False


@dataclasses.dataclass(frozen=True)
class _Chain:
    """The windows between the image and a value.

    Attributes:
      field: the value's field.
      windows: the windows passed.
      field_after_window: the field of the map after the last window.
      size_after_window: that map's (height, width).
    """

    field: Field | Unlocated
    windows: tuple[Window, ...] = ()
    field_after_window: Field = Field()
    size_after_window: tuple[int, int] = (0, 0)


def windows(model) -> tuple[Window, ...]:
    """Lists the windows between a network's image and its logits.

    Only windows of more than one position count. Skips, which have fewer windows, are left out. A
    convolution has its layer's name; pools are counted: pool1, pool2, ...

    Raises `ValueError` if the network has different windows side by side, one that is dilated, not
    square or padded unequally, one after a map whose field is not known, or maps in a loop.
    """
    name = type(model).__name__
    model = with_local_fill(model)
    image = jax.ShapeDtypeStruct((1, *model.input_shape), "float32")
    variables = eval_shape(model.init, jax.random.key(0), image)
    program = trace(functools.partial(apply, model), variables, image)

    def visit(equation, chains):
        field = seen(equation, [None if chain is None else chain.field for chain in chains])
        if field is None:
            return None
        _check_is_followed(name, equation, chains)
        chain = _joined(name, [chain for chain in chains if chain is not None])
        chain = dataclasses.replace(chain, field=field)
        if is_pool(equation):
            count = sum(window.pool for window in chain.windows)
            return _extended(
                network=name,
                chain=chain,
                name=f"pool{count + 1}",
                is_pool=True,
                equation=equation,
            )
        # `trace` marks each layer's output with `checkpoint_name`.
        if equation.primitive.name == "name":
            return _extended(
                network=name,
                chain=chain,
                name=equation.params["name"],
                is_pool=False,
                equation=equation,
            )
        return chain

    start = _Chain(Field(), size_after_window=model.input_shape[:2])
    constants = [None] * (len(program.invars) - 1)
    (chain,) = follow(program, [*constants, start], visit)
    return chain.windows


def _check_is_followed(network, equation, chains):
    """Raises `ValueError` for an operation whose windows cannot be read from fields."""
    operation = equation.primitive.name
    inputs = [operand for chain, operand in zip(chains, equation.invars) if chain is not None]
    if operation in LOOPS and any(operand.aval.ndim > 3 for operand in inputs):
        raise ValueError(
            f"model={network} passes maps to a {operation} of jax, whose windows are not followed"
        )
    if operation == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape[:2]
        strides = equation.params["window_strides"]
        dilations = equation.params["rhs_dilation"]
    elif is_pool(equation):
        kernel = equation.params["window_dimensions"][1:3]
        strides = equation.params["window_strides"][1:3]
        dilations = equation.params["window_dilation"][1:3]
    else:
        return
    if max(dilations) > 1:
        raise ValueError(f"model={network} has a window of dilation {max(dilations)}; expected 1")
    # An upsampled or rearranged map is refused in `_extended`, which knows the layer's name.
    is_window = max(*kernel, *strides) > 1
    if is_window and chains[0] is not None and chains[0].field == WHOLE_IMAGE:
        raise ValueError(
            f"model={network} has a window of {kernel[0]}x{kernel[1]} on a map that "
            f"{WHOLE_IMAGE.reason}"
        )


def _joined(network, chains):
    """Returns the chain with most windows.

    Raises `ValueError` if another chain is not a shorter form of it (a skip).
    """
    longest, *others = sorted(chains, key=lambda chain: -len(_shapes(chain)))
    for chain in others:
        shapes = _shapes(chain)
        if shapes != _shapes(longest)[: len(shapes)]:
            raise ValueError(
                f"model={network} has windows side by side, {chain.windows[-1].name} and "
                f"{longest.windows[-1].name}: they form no chain"
            )
    return longest


def _shapes(chain):
    """Returns the shapes of the windows of more than one position."""
    return [
        (window.kernel, window.stride, window.padding, window.pool)
        for window in chain.windows
        if window.kernel > 1
    ]


def _extended(network, chain, name, is_pool, equation):
    """Returns the chain after a layer.

    It has one more window if the layer widened or strode the field.
    """
    before = chain.field_after_window
    after = chain.field
    if after in (REARRANGED, UPSAMPLED):
        raise ValueError(f"model={network} has a layer, {name}, whose map {after.reason}")
    if isinstance(after, Unlocated) or after == before:
        return chain
    # A window of k positions widens the field by (k - 1) steps, its stride multiplies the step, and
    # its padding p moves the start by p steps.
    size = equation.outvars[0].aval.shape[1:3]
    by_axis = []
    for axis in (0, 1):
        step = before.step[axis]
        growth = after.size()[axis] - before.size()[axis]
        window = Window(
            name=name,
            kernel=growth // step + 1,
            stride=after.step[axis] // step,
            padding=(before.low[axis] - after.low[axis]) // step,
            pool=is_pool,
        )
        by_axis.append(window)
        expected = output_size(
            chain.size_after_window[axis], window.kernel, window.stride, window.padding
        )
        if expected != size[axis]:
            raise ValueError(f"model={network} has a window, {name}, with unequal padding")
    if by_axis[0] != by_axis[1]:
        raise ValueError(f"model={network} has a window, {name}, that is not square")
    return _Chain(
        field=after,
        windows=(*chain.windows, by_axis[0]),
        field_after_window=after,
        size_after_window=size,
    )
