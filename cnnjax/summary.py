"""Print a table of a network's layers.

    python -m cnnjax.summary vgg16 [--input 224] [--batch 1] [--padding reflect] [--sampling blur]
        [--format text|markdown|json]

A row is a layer with parameters or a max-pool: its output's shape, parameters, activation memory,
multiply-adds, receptive field and stride. Nothing is computed: the network is traced on shapes
alone (`cnnjax.inspect`). ReLU, LRN and dropout, which can work in place, and average pools, which
are small, are not counted; multiply-adds are those of kernels, as torchvision counts its GFLOPS.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cnnjax.runtime import command

if TYPE_CHECKING:
    from cnnjax.inspect import Layer

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
_TEXT_COLUMNS = 3  # the first columns are words, the others numbers
_STYLES = ("text", "markdown", "json")


def __getattr__(name: str):
    """Forwards to `cnnjax.inspect`, which needs JAX; the command's --help does not."""
    if name not in ("Field", "Layer", "layers", "receptive_field", "receptive_fields", "totals"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cnnjax import inspect

    return getattr(inspect, name)


def render(table: "Sequence[Layer]", style: str = "text") -> str:
    """Formats a table and its totals.

    Args:
      table: the rows, from `cnnjax.inspect.layers`.
      style: "text", "markdown" or "json".

    Raises `ValueError` if `style` is none of these.
    """
    _check_style(style)
    from cnnjax.inspect import totals

    total = totals(table)
    if style == "json":
        layers = [dataclasses.asdict(layer) for layer in table]
        return json.dumps({"layers": layers, "totals": total}, indent=1)
    last = ("total", "", "", *_numbers(**total), "", "")
    rows = [_HEADINGS, *map(_cells, table), last]
    return _markdown(rows) if style == "markdown" else _text(rows)


def _check_style(style):
    if style not in _STYLES:
        raise ValueError(f"format={style!r} is not one of {', '.join(_STYLES)}")


def _numbers(parameters, memory, macs):
    return f"{parameters:,}", f"{memory / 1024:,.1f}", f"{macs:,}"


def _cells(layer):
    return (
        layer.name,
        layer.kind,
        "x".join(map(str, layer.output or ())),
        *_numbers(layer.parameters, layer.memory, layer.macs),
        _extent(layer.receptive_field),
        _extent(layer.stride),
    )


def _extent(pixels):
    """Formats a (height, width) pair as "3" or "3x5"; empty for None."""
    if pixels is None:
        return ""
    height, width = pixels
    return str(height) if height == width else f"{height}x{width}"


def _markdown(rows):
    rule = "|" + "---|" * _TEXT_COLUMNS + "---:|" * (len(_HEADINGS) - _TEXT_COLUMNS)
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, rule, *body])


def _text(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        words = [
            cell.ljust(width) if column < _TEXT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(words))
    rule = "-" * max(map(len, lines))
    head, *body, total = lines
    return "\n".join([head, rule, *body, rule, total])


def _work(options: argparse.Namespace) -> None:
    _check_style(options.format)
    from cnnjax.inspect import layers
    from cnnjax.models import create_model

    model = create_model(options.model, **command.policies(options))
    height, width, channels = model.input_shape
    if options.input is not None:
        height = width = options.input
    try:
        table = layers(model, (height, width, channels), options.batch)
    except ValueError as error:
        if options.input is None:
            raise
        raise ValueError(f"input={height}x{width}: {error}") from error
    print(render(table, options.format))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(
        prog="python -m cnnjax.summary",
        description="Print a table of a network's layers: output shape, parameters, memory, "
        "multiply-adds,\nreceptive field and stride.",
    )
    parser.add_argument("model", help="a registered name, such as vgg16, or FILE.py:NAME")
    parser.add_argument(
        "--input",
        type=command.whole_number(1),
        metavar="PIXELS",
        help="height and width of the image (default: the publication's)",
    )
    parser.add_argument(
        "--batch",
        type=command.whole_number(1),
        default=1,
        metavar="N",
        help="images in a batch (default: %(default)s)",
    )
    parser.add_argument(
        "--padding",
        help="fill of every convolution and pool (default: zeros)",
    )
    parser.add_argument(
        "--sampling",
        help="how strides downsample: stride, blur, blur5 or aps (default: stride)",
    )
    parser.add_argument(
        "--format", default="text", help="text, markdown or json (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    return command.run(lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())
