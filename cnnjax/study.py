'''The frame of a study: from a grid of points to a report with tables and figures.

A study states what is particular to it: its options, its points, how one point is measured, and
the report. The frame does what all studies share:

- `--help` shows the script's docstring, and an error is one line.
- Each point's result is a JSON file in `points/` of the work directory. After Ctrl-C, the same
  command measures what is missing.
- The work directory belongs to one set of options; a call with others is refused.
- The report is written from the results alone, and printed.

A complete study, one file in `experiments/`:

    """How far is an image from its blurred self under each fill?

        python -m experiments.blur --workdir runs/blur [--seeds 3]

    Writes report.md, blur.json and blur.png.
    """

    import itertools
    import sys
    from typing import NamedTuple

    import numpy as np
    from matplotlib.figure import Figure

    from cnnjax import study
    from cnnjax.nn import avg_pool
    from cnnjax.runtime import tables

    FILLS = ("zeros", "reflect", "circular")


    class Point(NamedTuple):
        fill: str
        seed: int


    def add_options(parser):
        parser.add_workdir("runs/blur")
        parser.add_count("size", 16, "pixels of a side")
        parser.add_count("seeds", 3, "images for each fill")


    def points(options):
        return itertools.starmap(Point, itertools.product(FILLS, range(options.seeds)))


    def measure(point, options):
        shape = (1, options.size, options.size, 1)
        image = np.random.default_rng(point.seed).random(shape, np.float32)
        blurred = avg_pool(image, 3, 1, padding=1, fill=point.fill)
        return {"error": float(np.abs(blurred - image).mean())}


    def tabulate(results):
        lines = []
        for fill in study.unique(results, "fill"):
            errors = study.values(results, "error", fill=fill)
            lines.append([fill, tables.spread(errors, 3), str(len(errors))])
        return tables.table(["fill", "error", "n"], lines)


    def draw(results):
        figure = Figure(figsize=(4, 3), layout="constrained")
        axis = figure.subplots()
        for fill in study.unique(results, "fill"):
            errors = study.values(results, "error", fill=fill)
            axis.bar(fill, errors.mean(), yerr=tables.bar(errors))
        axis.set(ylabel="mean absolute error")
        return figure


    def report(results, options):
        text = f"# Blur\\n\\n{tabulate(results)}\\n![Error by fill](blur.png)\\n"
        return study.Report(text, {"blur.png": draw(results)})


    STUDY = study.Study(
        description=__doc__,
        results="blur.json",
        add_options=add_options,
        axes=("seeds",),
        points=points,
        measure=measure,
        report=report,
    )
    main = STUDY.main

    if __name__ == "__main__":
        sys.exit(main())
'''

import argparse
import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.runtime.progress import progress

Options = argparse.Namespace
# Options that do not change any number.
_PLACES = ("workdir", "data_dir", "debug")


class Report(NamedTuple):
    """The Markdown of `report.md`, and figures by file name."""

    text: str
    figures: dict[str, Figure]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The parts that are particular to a study.

    `load` and `points` raise `ValueError` for bad options, before anything is written.

    Attributes:
      description: the script's docstring.
      results: the name of the JSON file of all results.
      add_options: `add_options(parser)` adds the command line's options; `--workdir` is one of
        them.
      points: `points(options)` returns the points, each a `NamedTuple` of strings and numbers.
      measure: `measure(point, options)`, or `measure(point, options, shared)` if there is a `load`,
        returns the fields of a result, as JSON holds them.
      report: `report(results, options)` makes the report; a result is a dictionary of the point's
        fields and the measured ones.
      axes: names of the options that choose points. They may change from call to call in one work
        directory; all other options except `data_dir` may not.
      load: `load(options)` checks the options and loads what all points share; optional.
    """

    description: str
    results: str
    add_options: Callable[[command.Parser], None]
    points: Callable[[Options], Iterable[NamedTuple]]
    measure: Callable[..., dict]
    report: Callable[[list[dict], Options], Report]
    axes: tuple[str, ...] = ()
    load: Callable[[Options], Any] | None = None

    def main(self, arguments: list[str] | None = None) -> int:
        """Runs the command line and returns its exit code."""
        # The script's module, which is __main__ while it runs, knows the name it was called by.
        script = self.add_options.__globals__["__spec__"]
        prog = script and f"python -m {script.name}"
        parser = command.Parser(prog=prog, description=self.description)
        self.add_options(parser)
        options = parser.parse_args(arguments)
        return command.run(lambda: self.run(options))

    def run(self, options: Options) -> None:
        """Measures the points that are missing, then writes and prints the report."""
        points = list(self.points(options))
        _check_distinct(points)
        # Before `load`, which may compute.
        backend.start()
        shared = (self.load(options),) if self.load else ()
        results = []
        with (
            workdir.prepared(options.workdir, self._settings(options)) as folder,
            progress(len(points), "points") as advance,
        ):
            for point in points:
                path = folder / "points" / f"{label(point)}.json"
                results.append(workdir.read_or_compute(path, self._result, point, options, *shared))
                advance(1)
        self._write(folder, results, self.report(results, options))

    def _settings(self, options: Options) -> dict:
        """Returns the options to which the work directory is bound."""
        unbound = (*_PLACES, *self.axes)
        settings = {name: value for name, value in vars(options).items() if name not in unbound}
        return json.loads(json.dumps(settings, default=str))

    def _result(self, point: NamedTuple, options: Options, *shared) -> dict:
        return point._asdict() | self.measure(point, options, *shared)

    def _write(self, folder: pathlib.Path, results: list[dict], report: Report) -> None:
        workdir.write_json(folder / self.results, results)
        for name, figure in report.figures.items():
            workdir.write_figure(folder / name, figure)
        workdir.write(folder / "report.md", report.text)
        print(report.text)


def _check_distinct(points: list[NamedTuple]) -> None:
    """Raises `ValueError` if a point is listed twice.

    It would count twice in every mean.
    """
    for point, count in collections.Counter(points).items():
        if count > 1:
            raise ValueError(f"the point {label(point)} is asked for {count} times; name each once")


def label(point: NamedTuple) -> str:
    """Names a point's files: "fill=zeros,seed=0"."""
    parts = []
    for name, value in point._asdict().items():
        if isinstance(value, float):
            text = _number_label(float(value))
        else:
            text = workdir.file_label(str(value))
        parts.append(f"{name}={text}")
    return ",".join(parts)


def _number_label(value: float) -> str:
    """Returns a number in six digits, or in as many as tell it from all others."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def select(results: list[dict], /, **fields) -> list[dict]:
    """Returns the results that have these values, in order."""
    return [result for result in results if fields.items() <= result.items()]


def unique(results: list[dict], name: str) -> list:
    """Returns the values of a field, each once, in order of appearance."""
    return list(dict.fromkeys(result[name] for result in results))


def values(results: list[dict], name: str, /, **fields) -> np.ndarray:
    """Returns one field of the selected results, one result per row."""
    return np.array([result[name] for result in select(results, **fields)])


def draw_bars(axis, series: dict[str, list[np.ndarray]]) -> None:
    """Draws groups of bars around 0, 1, 2, ...

    Bars are means, with their sample standard deviations.

    Args:
      axis: matplotlib's axes.
      series: by label, the values of each group; each series has a bar in each group.
    """
    width = 0.8 / len(series)
    for number, (label, groups) in enumerate(series.items()):
        shift = (number + 0.5) * width - 0.4
        axis.bar(
            [place + shift for place in range(len(groups))],
            [values.mean() for values in groups],
            width,
            yerr=[tables.bar(values) for values in groups],
            label=label,
        )
