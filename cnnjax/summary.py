"""A network's table: every layer's output shape, parameters, activation memory, multiply-adds, receptive field and stride.

    python -m cnnjax.summary vgg16 [--input 224] [--batch 1] [--padding reflect] [--format text|markdown|json]

Nothing is computed: layers with parameters report themselves while the network is traced on shapes alone, and receptive
fields are followed through the traced operations, whatever the network. Counted are activations that a layer or a max-pool
puts out (ReLU, LRN and dropout can work in place, average pools are small) and the multiply-adds of kernels, as torchvision
counts its GFLOPS.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Generator, Sequence
from typing import Any

from cnnjax.runtime import command

_LOOK_AROUND = (
    "mean",
    "random",
    "interpolate",
)  # fills made from the whole map; all have the grid of 'zeros'


@dataclasses.dataclass(frozen=True)
class Field:
    """What one output position sees along height and width: position i sees input pixels step * i + low ... step * i + high."""

    step: tuple[int, ...] = (1, 1)
    low: tuple[int, ...] = (0, 0)
    high: tuple[int, ...] = (0, 0)

    def shifted(self, by: Sequence[int]) -> "Field":
        """The field of a map that lacks its first `by` positions."""
        low, high = (
            tuple(at + step * n for at, step, n in zip(side, self.step, by))
            for side in (self.low, self.high)
        )
        return Field(self.step, low, high)

    def strided(self, strides: Sequence[int]) -> "Field":
        return Field(tuple(step * n for step, n in zip(self.step, strides)), self.low, self.high)

    def widened(self, by: Sequence[int]) -> "Field":
        """The field of a window that reaches `by` positions further."""
        return Field(
            self.step,
            self.low,
            tuple(at + step * n for at, step, n in zip(self.high, self.step, by)),
        )

    def size(self) -> tuple[int, ...]:
        return tuple(high - low + 1 for low, high in zip(self.low, self.high))


EVERYTHING = "everything"  # the field of a value that has no position: what comes after flattening or global pooling


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row of the table; `memory` in bytes, `macs` multiply-adds, both for the whole batch.

    `receptive_field` and `stride` are (height, width) in input pixels, None where a layer sees the whole image; a layer that
    runs in training only has no `output` either.
    """

    name: str
    kind: str
    output: tuple[int, ...] | None
    parameters: int
    memory: int
    macs: int
    receptive_field: tuple[int, ...] | None
    stride: tuple[int, ...] | None


def _union(fields: list) -> Field | str | None:
    """What a value sees that is made, position by position, from values with these fields; None is a constant's."""
    fields = [field for field in fields if field is not None]
    if not fields or EVERYTHING in fields:
        return EVERYTHING if fields else None
    low = tuple(map(min, zip(*(field.low for field in fields))))
    high = tuple(map(max, zip(*(field.high for field in fields))))
    return Field(fields[0].step, low, high)


def _seen(equation, fields: list) -> Field | str | None:
    """The field of an operation's output, from those of its operands."""
    operation, parameters = equation.primitive.name, equation.params
    field, shape = fields[0], equation.invars[0].aval.shape
    if _union(fields) in (None, EVERYTHING):
        return _union(fields)
    if operation == "conv_general_dilated":
        reach = tuple(
            (n - 1) * d for n, d in zip(equation.invars[1].aval.shape, parameters["rhs_dilation"])
        )
        return (
            field.shifted([-low for low, _ in parameters["padding"]])
            .widened(reach)
            .strided(parameters["window_strides"])
        )
    if operation.startswith("reduce_window"):
        reach = tuple(size - 1 for size in parameters["window_dimensions"][1:3])
        before = [-low for low, _ in parameters["padding"][1:3]]
        return field.shifted(before).widened(reach).strided(parameters["window_strides"][1:3])
    if (
        operation == "dot_general" or equation.outvars[0].aval.ndim == 2
    ):  # adaptive pooling, flattening
        return EVERYTHING
    if operation.startswith("reduce_") and {1, 2} & set(parameters["axes"]):
        return EVERYTHING
    if len(shape) == 4 and operation == "pad":
        return field.shifted([-int(low) for low, _, _ in parameters["padding_config"][1:3]])
    if len(shape) == 4 and operation == "slice":
        return field.shifted(parameters["start_indices"][1:3]).strided(
            (parameters["strides"] or (1,) * 4)[1:3]
        )
    if operation == "concatenate" and parameters["dimension"] in (
        1,
        2,
    ):  # a mirrored, repeated or wrapped border and the map itself
        axis, sizes = (
            parameters["dimension"],
            [variable.aval.shape[parameters["dimension"]] for variable in equation.invars],
        )
        inner = sizes.index(max(sizes))
        before = sum(sizes[:inner])
        return fields[inner].shifted((-before, 0) if axis == 1 else (0, -before))
    return _union(fields)


def _walk(jaxpr, fields: list, rows: dict[str, Layer]) -> Generator[Layer, None, list]:
    """Yields the rows of a traced computation in order; `fields` are those of its inputs and, on return, its outputs' are the result.

    A layer's output carries its name through the trace, which is where `rows` gets its receptive field.
    """
    known = dict(zip(jaxpr.invars, fields))
    for equation in jaxpr.eqns:
        inputs = [
            None if hasattr(variable, "val") else known.get(variable)
            for variable in equation.invars
        ]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            outputs = yield from _walk(inner, inputs, rows)
        else:
            outputs = [_seen(equation, inputs)] * len(equation.outvars)
            if equation.primitive.name == "reduce_window_max":
                yield _row("", "max-pool", equation.outvars[0].aval, outputs[0])
            if equation.primitive.name == "name" and equation.params["name"] in rows:
                row = rows[equation.params["name"]]
                yield _row(
                    row.name,
                    row.kind,
                    equation.outvars[0].aval,
                    outputs[0],
                    row.parameters,
                    row.macs,
                )
        known.update(zip(equation.outvars, outputs))
    return [None if hasattr(variable, "val") else known.get(variable) for variable in jaxpr.outvars]


def _row(name, kind, value, field, parameters=0, macs=0) -> Layer:
    located = isinstance(field, Field) and value.ndim == 4
    return Layer(
        name,
        kind,
        tuple(value.shape),
        parameters,
        value.size * value.dtype.itemsize,
        macs,
        field.size() if located else None,
        field.step if located else None,
    )


def layers(model, input_shape: tuple[int, int, int] | None = None, batch: int = 1) -> list[Layer]:
    """The rows of a `cnnjax.models.Network` for a batch of images [batch, height, width, channels], in the order in which they run.

    `input_shape` is (height, width, channels), the publication's where none is given. Parameters of layers that run in training
    only, such as auxiliary classifiers, come last. Raises `ValueError` where the network has no output for such an image.
    """
    import flax.linen as nn
    import jax
    from jax.ad_checkpoint import checkpoint_name

    from cnnjax.nn import lowering

    images = jax.ShapeDtypeStruct((batch, *(input_shape or model.input_shape)), model.dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    rows: dict[str, Layer] = {}

    def report(call, args, kwargs, context):
        y, module = call(*args, **kwargs), context.module
        own = {
            name: value
            for name, value in module.variables.get("params", {}).items()
            if hasattr(value, "size")
        }
        if context.method_name != "__call__" or not own:
            return y
        name = ".".join(module.path)
        kernel = (
            own["kernel"].size if "kernel" in own else 0
        )  # every weight is used once at every position
        rows[name] = Layer(
            name,
            type(module).__name__,
            y.shape,
            sum(value.size for value in own.values()),
            0,
            kernel * math.prod(y.shape[:-1]),
            None,
            None,
        )
        return checkpoint_name(y, name)

    with nn.intercept_methods(report), lowering("reference"):
        jaxpr = jax.make_jaxpr(model.apply)(variables, images).jaxpr
    fields = [None] * (len(jaxpr.invars) - 1) + [Field()]
    table = [_row("", "input", jaxpr.invars[-1].aval, Field()), *_walk(jaxpr, fields, rows)]

    unused: dict[str, int] = {}
    for path, value in jax.tree.leaves_with_path(variables["params"]):
        name = ".".join(key.key for key in path[:-1])
        if name not in rows:
            unused[name] = unused.get(name, 0) + value.size
    return table + [
        Layer(name, "in training only", None, size, 0, 0, None, None)
        for name, size in unused.items()
    ]


@functools.cache
def receptive_fields(
    model, stages: tuple[str, ...], shape: tuple[int, int, int] | None = None
) -> tuple[tuple[Field, tuple[int, ...]], ...]:
    """What a position of each of the named stages, the last of them last, sees of the image at most, and the stage's shape.

    `shape` [height, width, channels] is that of the image, by default the publication's. Under a fill that looks at the whole map, it
    is what the position sees beside the border.
    """
    import jax

    from cnnjax.nn import lowering

    model = model.clone(padding="zeros") if model.padding in _LOOK_AROUND else model
    image = jax.ShapeDtypeStruct((1, *(shape or model.input_shape)), "float32")
    run = {"method": "stages", "last": stages[-1]}
    variables = jax.eval_shape(lambda key, x: model.init(key, x, **run), jax.random.key(0), image)
    maps = lambda variables, x: [model.apply(variables, x, **run)[stage] for stage in stages]
    with lowering("reference"):
        jaxpr: Any = jax.make_jaxpr(maps)(variables, image).jaxpr
    found: list[Any] = []

    def follow():
        found.extend((yield from _walk(jaxpr, [None] * (len(jaxpr.invars) - 1) + [Field()], {})))

    list(follow())
    return tuple((field, output.aval.shape) for field, output in zip(found, jaxpr.outvars))


def receptive_field(model, stage: str) -> Field:
    """What a position of one stage sees of the image at most. Raises `ValueError` if there is no such stage."""
    return receptive_fields(model, (stage,))[0][0]


def totals(table: list[Layer]) -> dict[str, int]:
    """The sums over a table: parameters, activation memory in bytes, multiply-adds."""
    return {
        name: sum(getattr(layer, name) for layer in table)
        for name in ("parameters", "memory", "macs")
    }


_HEADINGS = (
    "layer",
    "kind",
    "output",
    "parameters",
    "memory (KiB)",
    "multiply-adds",
    "field",
    "stride",
)


def _cells(layer: Layer) -> tuple[str, ...]:
    def extent(both):
        return (
            "" if both is None else str(both[0]) if both[0] == both[1] else f"{both[0]}x{both[1]}"
        )

    return (
        layer.name,
        layer.kind,
        "x".join(map(str, layer.output or ())),
        f"{layer.parameters:,}",
        f"{layer.memory / 1024:,.1f}",
        f"{layer.macs:,}",
        extent(layer.receptive_field),
        extent(layer.stride),
    )


def render(table: list[Layer], style: str = "text") -> str:
    """The table and its totals as "text", "markdown" or "json"; raises `ValueError` for another style."""
    if style == "json":
        return json.dumps(
            {"layers": [dataclasses.asdict(layer) for layer in table], "totals": totals(table)},
            indent=1,
        )
    total = totals(table)
    rows = [
        _HEADINGS,
        *map(_cells, table),
        (
            "total",
            "",
            "",
            f"{total['parameters']:,}",
            f"{total['memory'] / 1024:,.1f}",
            f"{total['macs']:,}",
            "",
            "",
        ),
    ]
    if style == "markdown":
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * 3 + "---:|" * 5, *lines[1:]])
    if style != "text":
        raise ValueError(f"format={style!r} is not one of text, markdown, json")
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = [str.ljust] * 3 + [str.rjust] * 5
    lines = [
        "  ".join(side(cell, width) for side, cell, width in zip(align, row, widths))
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _work(options: argparse.Namespace) -> None:
    from cnnjax.models import create_model

    render([], options.format)
    model = create_model(options.model, padding=options.padding)
    height, width, channels = model.input_shape
    height, width = options.input or height, options.input or width
    try:
        table = layers(model, (height, width, channels), options.batch)
    except ValueError as error:
        raise ValueError(f"input={height}x{width}: {error}") from error
    print(render(table, options.format))


def main(arguments: list[str] | None = None) -> int:
    """The command line -> the exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(
        prog="python -m cnnjax.summary", description="Prints a network's table."
    )
    parser.add_argument("model", help="a registered name, such as vgg16")
    parser.add_argument(
        "--input",
        type=command.whole(1),
        metavar="PIXELS",
        help="height and width of the image (default: the publication's)",
    )
    parser.add_argument(
        "--batch",
        type=command.whole(1),
        default=1,
        metavar="N",
        help="images in a batch (default: %(default)s)",
    )
    parser.add_argument(
        "--padding",
        default="zeros",
        help="fill of every convolution and pool (default: %(default)s)",
    )
    parser.add_argument(
        "--format", default="text", help="text, markdown or json (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    return command.run(lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())
