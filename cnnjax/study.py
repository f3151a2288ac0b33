r'''The frame of a study: from a grid of points to a report with tables and figures.

A study states what is particular to it: its options, its points, how one point is measured, and
the report. The frame does what all studies share:

- `--help` shows the script's docstring, and an error is one line.
- Each point's result is a JSON file in `points/` of the work directory. After Ctrl-C, the same
  command measures what is missing.
- The work directory belongs to one study, told by the name of its results, to one set of options,
  and to the contents of the files that they name; a call with others is refused, and so is a second
  process. If the file of a user's network (FILE.py:NAME) has changed since a point was measured, a
  call logs a warning.
- The report is written from the results alone, and printed. The frame adds the environment that
  measured them.

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
        text = f"# Blur\n\n{tabulate(results)}\n![Error by fill](blur.png)\n"
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
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib.style
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from cnnjax.data import photographs
from cnnjax.models.base import digest_network
from cnnjax.runtime import backend, command, files, tables, workdir
from cnnjax.runtime.paths import expand_user, sha256
from cnnjax.runtime.progress import progress
from cnnjax.runtime.report import describe_environments
from cnnjax.train.adopt import complete_record
from cnnjax.transfer import WEIGHTS

_LOG = logging.getLogger("cnnjax")
Options = argparse.Namespace
# Options that do not change any number.
_PLACES = ("workdir", "data_dir", "debug")
# The digest of a file of weights, or of a folder of photographs, that does not exist.
_ABSENT = "absent"


class Report(NamedTuple):
    """The Markdown of `report.md`, and figures by file name."""

    text: str
    figures: dict[str, Figure]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The parts that are particular to a study.

    `load` and `points` raise `ValueError` for bad options. A refused call leaves no new folder.

    Attributes:
      description: the script's docstring.
      results: the name of the JSON file of all results, of which each study has one of its own.
      add_options: `add_options(parser)` adds the command line's options; `--workdir` is one of
        them.
      points: `points(options)` returns the points, each a `NamedTuple` of strings and numbers.
      measure: `measure(point, options)`, or `measure(point, options, shared)` if there is a `load`,
        returns the fields of a result, as JSON holds them.
      report: `report(results, options)` makes the report; a result is a dictionary of the point's
        fields and the measured ones. The name `network_sha256` is taken, for a user's networks.
      axes: names of the options that choose points. They may change from call to call in one work
        directory; all other options except `data_dir` may not.
      files: names of the options that name files, to which the work directory is bound. The files
        may be moved from call to call.
        - `photographs` is a folder, of which names and sizes count (`add_photographs`).
        - All others name weights, of which the contents count. Their value is a file or a training
          run, a list of pairs of a name and one of these, or names as in `add_trained`.
      load: `load(options)` checks the options and loads what all points share; optional. It runs
        after the work directory has been checked, and only if a point is missing.
      environment: `environment(options)` describes what else the results depend on, as JSON holds
        it, such as the machine whose times are measured; optional. It becomes
        `options.environment`. The work directory is bound to it. A call that measures nothing
        ignores the current machine and reports the recorded one.
      draws: `draws(point, options)` tells whether the photographs of a point are drawn at random
        from more; optional. Work directories of versions that took the first photographs accept
        no further points of this kind.
    """

    description: str
    results: str
    add_options: Callable[[command.Parser], None]
    points: Callable[[Options], Iterable[NamedTuple]]
    measure: Callable[..., dict]
    report: Callable[[list[dict], Options], Report]
    axes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    load: Callable[[Options], Any] | None = None
    environment: Callable[[Options], dict] | None = None
    draws: Callable[[Any, Options], bool] | None = None

    def main(self, arguments: list[str] | None = None) -> int:
        """Runs the command line and returns its exit code."""
        # The spec of a module that runs as __main__ still has the module's name. A file that runs
        # without -m has no spec.
        spec = self.add_options.__globals__["__spec__"]
        prog = f"python -m {spec.name}" if spec else None
        parser = command.Parser(prog=prog, description=self.description)
        self.add_options(parser)
        options = parser.parse_args(arguments)
        return command.run(lambda: self.run(options))

    def run(self, options: Options) -> None:
        """Measures the points that are missing, then writes and prints the report.

        Raises:
          workdir.Interrupted: if it was stopped; the same command continues.
        """
        points = list(self.points(options))
        _check_distinct(points)
        # Before `load`, which may compute.
        backend.start()
        if self.environment:
            options.environment = self.environment(options)
        paths = [options.workdir / "points" / f"{label(point)}.json" for point in points]
        missing = [point for point, path in zip(points, paths) if not path.exists()]
        settings = self._settings(options, missing)
        with workdir.prepared(options.workdir, settings, computes=bool(missing)) as folder:
            if self.environment and not missing:
                record = files.read_json(folder / "config.json")
                options.environment = record.get("environment", options.environment)
            try:
                results = self._measure_missing(dict(zip(points, paths)), options)
                # Colors that color-blind readers can tell apart. Some are looked up while the
                # figure is written.
                with matplotlib.style.context("petroff10"):
                    self._write(folder, results, self.report(results, options))
            except KeyboardInterrupt as stop:
                raise workdir.Interrupted(
                    "stopped; run the same command again to continue after the last finished point"
                ) from stop

    def _measure_missing(
        self, paths: dict[NamedTuple, pathlib.Path], options: Options
    ) -> list[dict]:
        """Measures the points whose files are missing; returns the results of all points."""
        shared: tuple = ()
        _warn_of_edits(paths, options)
        # A report alone may be written where the data and the weights are not.
        if self.load and not all(path.exists() for path in paths.values()):
            shared = (self.load(options),)
        results = []
        with progress(len(paths), "points") as advance:
            for point, path in paths.items():
                results.append(files.read_or_compute(path, self._result, point, options, *shared))
                advance(1)
        return results

    def _settings(self, options: Options, missing: list[NamedTuple]) -> dict:
        """Returns the study, the options and the contents of files that bind the work directory.

        Raises `ValueError` if a missing point cannot be combined with the finished ones.
        """
        unbound = (*_PLACES, *self.axes)
        settings = {name: value for name, value in vars(options).items() if name not in unbound}
        settings = json.loads(json.dumps(settings, default=str))
        settings["study"] = pathlib.Path(self.results).stem
        recorded = workdir.read_record(options.workdir, settings.get("kind")) or {}
        paths = _list_files(settings, self.files)
        # A call that measures nothing needs no photographs, if it names those of the record.
        is_needed = bool(missing) or recorded.get("photographs") != paths.get("photographs")
        if contents := _digest_contents(paths, is_needed):
            settings["contents"] = contents
        self._check_weights(settings, recorded, computes=bool(missing))
        settings |= self._keep_paths(settings, recorded)
        settings |= self._record_drawing(options, missing, recorded)
        # Earlier versions recorded some of the options that are axes now. These values stay as they
        # were, and say nothing of later points.
        return settings | {name: recorded[name] for name in self.axes if name in recorded}

    def _check_weights(self, settings: dict, recorded: dict, computes: bool) -> None:
        """Raises `ValueError` if a file of weights is missing that the study was begun with.

        A call that measures nothing does not need it.
        """
        contents = settings.get("contents", {})
        recorded_digests = recorded.get("contents") or {}
        recorded_paths = _list_files(recorded, self.files)
        for name, file in _list_files(settings, self.files).items():
            was_there = recorded_digests.get(name, _ABSENT) != _ABSENT
            is_named_anew = recorded_paths.get(name) != file
            # Needed to measure, or to tell whether a file at another path is the same.
            if was_there and contents[name] == _ABSENT and (computes or is_named_anew):
                raise ValueError(
                    f"{name}={file!r} is neither a file of weights nor a finished training run"
                )

    def _keep_paths(self, settings: dict, recorded: dict) -> dict:
        """Returns the options that name files, with the recorded paths of moved files."""
        recorded_digests = recorded.get("contents") or {}
        recorded_paths = _list_files(recorded, self.files)
        paths = _list_files(settings, self.files)
        for name, digest in settings.get("contents", {}).items():
            is_same = digest != _ABSENT and recorded_digests.get(name) == digest
            recorded_path = recorded_paths.get(name, "")
            if is_same and photographs.are_exchangeable(paths[name], recorded_path):
                paths[name] = recorded_paths[name]
        options: dict[str, Any] = {}
        # Options that are axes are in the points, not in the settings.
        for option in set(self.files) & set(settings):
            value = settings[option]
            if isinstance(value, dict):
                # As in `add_trained`: {name: [file, *the modules that it lacks]}.
                options[option] = {}
                for name, (_, *missing) in value.items():
                    options[option][name] = [paths[name], *missing]
            elif isinstance(value, list):
                options[option] = [[name, paths[name]] for name, _ in value]
            else:
                options[option] = paths.get(option)
        return options

    def _record_drawing(
        self, options: Options, missing: list[NamedTuple], recorded: dict
    ) -> dict[str, str]:
        """Returns the record that photographs are drawn at random, or {}.

        It is {} for a study that draws none, and for a directory begun by a version that took the
        first photographs.

        Raises `ValueError` if a point that draws is missing in such a directory.
        """
        if self.draws is None:
            return {}
        key = "photographs_drawn"
        is_begun = any((options.workdir / "points").glob("*.json"))
        took_first = bool(recorded) and is_begun and key not in recorded
        if not took_first:
            return {key: recorded.get(key, "at random")}
        if any(self.draws(point, options) for point in missing):
            raise ValueError(
                f"workdir={str(options.workdir)!r} was begun by a version that took the first of "
                f"photographs={options.photographs!r}, which are drawn at random now; choose "
                "another --workdir"
            )
        return {}

    def _result(self, point: NamedTuple, options: Options, *shared) -> dict:
        # Before the measurement, which may take hours.
        networks = _digest_networks(point, options)
        result = point._asdict() | self.measure(point, options, *shared)
        if networks:
            result |= {"network_sha256": networks}
        return result

    def _write(self, folder: pathlib.Path, results: list[dict], report: Report) -> None:
        files.write_json(folder / self.results, results)
        for name, figure in report.figures.items():
            files.write_figure(folder / name, figure)
        environments = describe_environments(workdir.read_environments(folder))
        text = f"{report.text.rstrip()}\n{environments}"
        files.write(folder / "report.md", text)
        print(text)


def update_record(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    keys: Iterable[str] = ("data_dir", "dataset", "initial_weights"),
) -> None:
    """Records where a trained network's files are now, and keys of later versions.

    The project may have been moved since, and `--data_dir` may change from call to call. The caller
    has checked the study's own work directory.

    Args:
      config: the configuration of the network, changed in place as by `complete_record`.
      folder: the network's work directory, which may not exist yet.
      keys: those of the files; without "initial_weights" where the study's work directory is not
        bound to the contents of these.
    """
    recorded = workdir.read_record(folder, config.kind)
    if recorded is None:
        return
    paths = {name: config[name] for name in keys}
    if recorded | paths != recorded:
        files.write_json(folder / "config.json", recorded | paths)
    complete_record(config, folder)


def _list_files(settings: dict, options: tuple[str, ...]) -> dict[str, str | os.PathLike]:
    """Returns the files that options name, by the option or by the names in its value."""
    paths: dict[str, str | os.PathLike] = {}
    for option in options:
        value = settings.get(option)
        if isinstance(value, dict):
            paths |= {name: file for name, (file, *_) in value.items()}
        elif isinstance(value, list):
            paths |= dict(value)
        elif value is not None:
            paths[option] = value
    return paths


def _digest_contents(
    paths: dict[str, str | os.PathLike], needs_photographs: bool
) -> dict[str, str]:
    """Returns digests of photographs and of files of weights.

    Raises `ValueError` if there are no photographs although they are needed.
    """
    contents = {}
    for name, file in paths.items():
        if name == "photographs":
            contents[name] = _digest_photographs(file, needs_photographs)
        else:
            contents[name] = _digest_weights(expand_user(file))
    return contents


def _digest_photographs(folder: str | os.PathLike, is_needed: bool) -> str:
    """Returns the digest of a folder of photographs, or `_ABSENT`.

    The folder "" stands for the photographs included in packages.
    """
    try:
        return photographs.describe_files(folder)
    except ValueError:
        if is_needed:
            raise
        return _ABSENT


def _digest_weights(path: pathlib.Path) -> str:
    """Returns the digest of a file of weights, or of a training run's, or `_ABSENT`."""
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        # The loader reports the reason.
        return _ABSENT
    return f"SHA-256 {sha256(file)[:16]}"


def _digest_networks(point: NamedTuple, options: Options) -> dict[str, str]:
    """Hashes the files of the user's own networks that a point or an option names, by name."""
    digests = {}
    for value in (*point, *vars(options).values()):
        # A report alone may be written where the networks' files are not.
        with contextlib.suppress(OSError):
            if isinstance(value, str) and (digest := digest_network(value)):
                digests[value] = digest
    return digests


def _warn_of_edits(paths: dict[NamedTuple, pathlib.Path], options: Options) -> None:
    """Logs a warning for each user's network whose file has changed since a point was measured.

    Points of earlier versions recorded no digests.
    """
    edited = set()
    for point, path in paths.items():
        digests = _digest_networks(point, options)
        if digests and path.exists():
            recorded = files.read_json(path).get("network_sha256", {})
            edited |= {name for name, now in digests.items() if recorded.get(name, now) != now}
    for name in sorted(edited):
        # FILE.py of FILE.py:NAME
        file = name.rpartition(":")[0]
        _LOG.warning(
            "%s has changed since points were measured; the results may mix two networks", file
        )


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
            text = files.file_label(str(value))
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
    # Together, the bars of a group are 0.8 wide, centered on its place.
    width = 0.8 / len(series)
    for number, (name, groups) in enumerate(series.items()):
        shift = (number + 0.5) * width - 0.4
        axis.bar(
            [place + shift for place in range(len(groups))],
            [group.mean() for group in groups],
            width,
            yerr=[tables.bar(group) for group in groups],
            label=name,
        )


def draw_curve(axis, x: Sequence, groups: Sequence[np.ndarray], **style) -> None:
    """Draws a curve through the means of groups, with their sample standard deviations.

    Args:
      axis: matplotlib's axes.
      x: the place of each group.
      groups: the values of each group.
      style: keywords of matplotlib's `errorbar`.
    """
    means = [group.mean() for group in groups]
    bars = [tables.bar(group) for group in groups]
    axis.errorbar(x, means, bars, capsize=2, **style)
