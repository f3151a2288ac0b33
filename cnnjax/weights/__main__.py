"""List the ImageNet weights that torchvision publishes.

    python -m cnnjax.weights [--format text|markdown]

Names and tags are those of `cnnjax.load_pretrained`. Accuracies are torchvision's, in percent on
ImageNet's validation set.
"""

import sys

from cnnjax.runtime import command, tables
from cnnjax.weights import records

_HEADER = ["network", "tag", "top-1", "top-5", "resize", "crop", "file", "Hugging Face hub"]


def rows() -> list[list[str]]:
    """Returns the table's lines, one per set of weights."""
    lines = []
    for record in records.list_weights():
        lines.append(
            [
                record.network,
                record.tag,
                f"{record.top1:.3f}",
                f"{record.top5:.3f}",
                str(record.resize),
                str(record.crop),
                record.file,
                record.hub or "",
            ]
        )
    return lines


def markdown() -> str:
    return tables.table(_HEADER, rows()).rstrip()


def text() -> str:
    lines = [_HEADER, *rows()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        padded.append("  ".join(cells).rstrip())
    return "\n".join(padded)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code (`cnnjax.runtime.command.run`)."""
    parser = command.Parser(prog="python -m cnnjax.weights", description=__doc__)
    parser.add_argument(
        "--format", default="text", choices=("text", "markdown"), help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    table = {"text": text, "markdown": markdown}[options.format]
    return command.run(lambda: print(table()))


if __name__ == "__main__":
    sys.exit(main())
