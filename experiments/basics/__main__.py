"""The lectures' basics as pictures and numbers.

    python -m experiments.basics --workdir runs/basics [--photograph camera]

Edges, one convolution step by step, unfolding, pooling, shifting, and sizes: one figure per topic,
`basics.json` with the numbers, and `report.md` with a sentence beside each figure, in about half a
minute on two CPU cores. The layers are those of `cnnjax.nn`.
"""

import sys

import numpy as np

from cnnjax.data import photographs
from cnnjax.nn import FILLS
from cnnjax.runtime import backend, command, files, workdir
from experiments.basics import figures, numbers, report


def make_figures(computed: dict, gray: np.ndarray, example: tuple, fills=FILLS) -> dict:
    """Draws the figure of each topic, by file name."""
    return {
        "sobel.png": figures.draw_sobel(gray),
        "steps.png": figures.draw_steps(*example, stride=2),
        "im2col.png": figures.draw_unfolded(*example, stride=2),
        "pooling.png": figures.draw_pooling(computed["pooling"]["one pixel"]),
        "shift.png": figures.draw_shift(numbers.shift_images(), fills),
        "sizes.png": figures.draw_sizes(),
    }


def run(folder, photograph: str, path, example: tuple, fills=FILLS, cases=numbers.CASES) -> None:
    """Computes everything and writes the figures, basics.json, and report.md."""
    gray = photographs.read_image(path).astype(np.float32).mean(2)
    computed = numbers.compute(gray, example, fills, cases)
    for name, figure in make_figures(computed, gray, example, fills).items():
        files.write_figure(folder / name, figure)
    files.write_json(folder / "basics.json", computed)
    files.write(folder / "report.md", report.render(computed, photograph))


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(prog="python -m experiments.basics", description=__doc__)
    parser.add_workdir("runs/basics")
    parser.add_argument(
        "--photograph",
        choices=photographs.EMBEDDED,
        default="camera",
        help="a photograph from scikit-image or scikit-learn (default: %(default)s)",
    )
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        paths = {path.stem: path for path in photographs.list_photographs()}
        name = options.photograph
        with workdir.prepared(options.workdir, {"photograph": name}) as folder:
            run(folder, name, paths[name], numbers.worked_example())
        print(f"6 figures: see {folder / 'report.md'}")

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
