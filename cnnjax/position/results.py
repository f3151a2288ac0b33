"""The study's results as records, and the files that hold them.

A `Point` is one encoder under one padding with one seed. A `Measurement` is what was measured
there, image by image. Each has a file, so that an interrupted study continues after the last one.
`Results` summarize all of them, in results.json.
"""

import dataclasses
import itertools
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cnnjax.position.metrics import METRICS, RING_METRICS
from cnnjax.runtime import files, tables
from cnnjax.runtime.paths import expand_user

READOUTS = ("exact", "sgd")


# ------------------------------------------------------------------ one point


@dataclasses.dataclass(frozen=True)
class Point:
    """One encoder under one padding, with the weights and photographs of one seed."""

    encoder: str
    weights: str
    padding: str
    stages: tuple[str, ...]
    seed: int

    @property
    def file(self) -> str:
        """Returns the name of the measurement's file."""
        return f"{files.file_label(self.encoder)}-{self.padding}-{self.seed}.npz"


@dataclasses.dataclass(frozen=True)
class Scores:
    """One readout's scores for one target, image by image."""

    readout: str
    target: str
    data: str
    spc: Float[np.ndarray, " images"]
    mae: Float[np.ndarray, " images"]
    r2: Float[np.ndarray, " images"]


@dataclasses.dataclass(frozen=True)
class RingScores:
    """The exact readout's scores in each ring, image by image."""

    target: str
    data: str
    spc: Float[np.ndarray, "images rings"]
    mae: Float[np.ndarray, "images rings"]


@dataclasses.dataclass(frozen=True)
class Maps:
    """One readout's maps of all targets, for the first image of its kind."""

    readout: str
    data: str
    values: Float[np.ndarray, "targets height width"]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The measurement at a point.

    Attributes:
      point: where it was taken.
      scores: each readout's scores for each target.
      rings: the exact readout's scores in each ring.
      maps: each readout's maps for the first images.
      residual: the largest relative residual of the ridge systems solved.
      seconds: how long it took.
      strengths: the exact readout's ridge strength for each target; None in older files.
    """

    point: Point
    scores: list[Scores]
    rings: list[RingScores]
    maps: list[Maps]
    residual: float
    seconds: float
    strengths: dict[str, float] | None = None


def _key(*names: str) -> str:
    """Returns the name of an array in an npz file."""
    return "/".join(names)


def save(path: str | os.PathLike, measurement: Measurement) -> None:
    """Writes a measurement as an npz file; `~` is expanded."""
    arrays = {
        "residual": np.asarray(measurement.residual),
        "seconds": np.asarray(measurement.seconds),
    }
    for target, strength in (measurement.strengths or {}).items():
        arrays[_key("strength", target)] = np.asarray(strength)
    for scores in measurement.scores:
        for metric in METRICS:
            key = _key("scores", scores.readout, scores.target, scores.data, metric)
            arrays[key] = getattr(scores, metric)
    for rings in measurement.rings:
        for metric in RING_METRICS:
            arrays[_key("rings", rings.target, rings.data, metric)] = getattr(rings, metric)
    for maps in measurement.maps:
        arrays[_key("maps", maps.readout, maps.data)] = maps.values
    files.write_arrays(expand_user(path), arrays)


def load(
    path: str | os.PathLike, point: Point, targets: Sequence[str], data: Sequence[str]
) -> Measurement:
    """Reads the measurement of a point, for the study's targets and kinds of images.

    Raises `ValueError` if the file is damaged.
    """
    with files.open_arrays(expand_user(path)) as archive:
        return _collect(archive, point, targets, data)


def _collect(
    arrays: Mapping[str, np.ndarray], point: Point, targets: Sequence[str], data: Sequence[str]
) -> Measurement:
    """Collects a measurement from the arrays of its file."""
    scores = []
    rings = []
    maps = []
    for readout, kind in itertools.product(READOUTS, data):
        key = _key("maps", readout, kind)
        if key not in arrays:
            continue
        maps.append(Maps(readout, kind, arrays[key]))
        for target in targets:
            columns = {
                metric: arrays[_key("scores", readout, target, kind, metric)] for metric in METRICS
            }
            scores.append(Scores(readout, target, kind, **columns))
    for kind in data:
        columns = {
            metric: arrays[_key("rings", targets[0], kind, metric)] for metric in RING_METRICS
        }
        rings.append(RingScores(targets[0], kind, **columns))
    strengths = None
    if _key("strength", targets[0]) in arrays:
        strengths = {target: float(arrays[_key("strength", target)]) for target in targets}
    return Measurement(
        point=point,
        scores=scores,
        rings=rings,
        maps=maps,
        residual=float(arrays["residual"]),
        seconds=float(arrays["seconds"]),
        strengths=strengths,
    )


# ------------------------------------------------------------------ all points


@dataclasses.dataclass(frozen=True)
class Row:
    """Mean and sample standard deviation over images and seeds together.

    Attributes:
      r2_median: the median, as R2 has no lower bound; None in older results.
      strengths: the exact readout's ridge strength by seed; None for the authors' readout, and if a
        seed's file does not hold it.
      fitted_to: what the readout was fitted to: "photographs", "shuffled_pixels" or "noise".
      spc_by_seed: the mean over a seed's images, for each seed; None in older results.
      r2_by_seed: likewise.
    """

    encoder: str
    weights: str
    padding: str
    stages: Sequence[str]
    kernel: int
    readout: str
    target: str
    data: str
    depth: int
    spc: float
    spc_std: float | None
    mae: float
    mae_std: float | None
    r2: float
    r2_std: float | None
    n_images: int
    n_seeds: int
    r2_median: float | None = None
    strengths: Sequence[float] | None = None
    fitted_to: str = "photographs"
    spc_by_seed: Sequence[float] | None = None
    r2_by_seed: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class RingProfile:
    """Mean scores of the exact readout by ring, from the border inwards."""

    encoder: str
    weights: str
    padding: str
    target: str
    data: str
    spc: list[float]
    mae: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The contents of results.json.

    Attributes:
      chance_mae: the error of the best constant, by target.
      ridge_residual: the largest relative residual of all ridge systems.
      decisions: what the study decided where the literature is silent or the code departs from it.
      photographs: the number of photographs behind the crops: to fit ("train"), to choose strengths
        ("held_out"), to score ("natural"); None in older results.
    """

    kind: str = "position"
    rows: list[Row]
    rings: list[RingProfile]
    chance_mae: dict[str, float]
    ridge_residual: float
    decisions: Sequence[str]
    seconds: float
    photographs: dict[str, int] | None = None

    @classmethod
    def from_json(cls, values: dict) -> "Results":
        """Reads the records from the contents of results.json."""
        rows = [Row(**row) for row in values["rows"]]
        rings = [RingProfile(**profile) for profile in values["rings"]]
        return cls(**(values | {"rows": rows, "rings": rings}))


def summarize(
    measurements: list[Measurement], kernel: int, depth: int, fitted_to: str = "photographs"
) -> list[Row]:
    """Pools scores over images and seeds.

    There is one row per setting, readout, target and data.
    """
    rows = []
    for point, group in _by_setting(measurements):
        # All seeds list the same readouts, targets and data in the same order.
        for scores_by_seed in zip(*(measurement.scores for measurement in group)):
            first = scores_by_seed[0]
            columns: dict[str, Any] = {}
            all_r2 = np.concatenate([scores.r2 for scores in scores_by_seed])
            columns["r2_median"] = float(np.median(all_r2))
            if first.readout == "exact":
                columns["strengths"] = _strengths(group, first.target)
            for metric in METRICS:
                values = np.concatenate([getattr(scores, metric) for scores in scores_by_seed])
                columns[metric] = float(values.mean())
                columns[f"{metric}_std"] = tables.deviation(values)
            for metric in ("spc", "r2"):
                means = [float(getattr(scores, metric).mean()) for scores in scores_by_seed]
                columns[f"{metric}_by_seed"] = means
            rows.append(
                Row(
                    encoder=point.encoder,
                    weights=point.weights,
                    padding=point.padding,
                    stages=point.stages,
                    kernel=kernel,
                    readout=first.readout,
                    target=first.target,
                    data=first.data,
                    depth=depth if first.readout == "sgd" else 1,
                    n_images=len(first.spc),
                    n_seeds=len(scores_by_seed),
                    fitted_to=fitted_to,
                    **columns,
                )
            )
    return rows


def _strengths(group: list[Measurement], target: str) -> list[float] | None:
    """Lists a target's ridge strengths by seed, if all files hold them."""
    strengths = []
    for measurement in group:
        if measurement.strengths is None:
            return None
        strengths.append(measurement.strengths[target])
    return strengths


def ring_profiles(measurements: list[Measurement]) -> list[RingProfile]:
    """Averages the scores by ring over images and seeds."""
    profiles = []
    for point, group in _by_setting(measurements):
        # All seeds list the same targets and data in the same order.
        for rings_by_seed in zip(*(measurement.rings for measurement in group)):
            columns = {}
            for metric in RING_METRICS:
                values = np.concatenate([getattr(rings, metric) for rings in rings_by_seed])
                columns[metric] = values.mean(0).tolist()
            profiles.append(
                RingProfile(
                    encoder=point.encoder,
                    weights=point.weights,
                    padding=point.padding,
                    target=rings_by_seed[0].target,
                    data=rings_by_seed[0].data,
                    **columns,
                )
            )
    return profiles


def _by_setting(measurements: list[Measurement]) -> list[tuple[Point, list[Measurement]]]:
    """Groups measurements that differ only in their seed, with the point of the first."""
    groups: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        groups[measurement.point.encoder, measurement.point.padding].append(measurement)
    return [(group[0].point, group) for group in groups.values()]


# ------------------------------------------------------------------ maps.npz, for the figures


def save_maps(
    path: str | os.PathLike,
    targets: dict[str, Float[np.ndarray, "size size"]],
    images: dict[str, np.ndarray],
    measurements: list[Measurement],
) -> None:
    """Writes the targets, an image of each kind and the maps read from it, as an npz file."""
    arrays = {_key("target", name): values for name, values in targets.items()}
    arrays |= {_key("image", kind): image for kind, image in images.items()}
    for measurement in measurements:
        point = measurement.point
        for maps in measurement.maps:
            key = _key(point.encoder, point.padding, maps.readout, maps.data)
            arrays[key] = maps.values
    files.write_arrays(expand_user(path), arrays)


class MapsFile:
    """The contents of maps.npz."""

    def __init__(self, path: str | os.PathLike):
        with np.load(expand_user(path)) as archive:
            self._arrays = dict(archive)

    def target(self, name: str) -> Float[np.ndarray, "size size"]:
        """Returns the map that readouts must produce."""
        return self._arrays[_key("target", name)]

    def image(self, kind: str) -> np.ndarray:
        """Returns the image that maps were read from, uint8 [size, size, 3]."""
        return self._arrays[_key("image", kind)]

    def predicted(self, encoder: str, padding: str, readout: str, kind: str) -> np.ndarray:
        """Returns the maps of all targets, [targets, height, width]."""
        return self._arrays[_key(encoder, padding, readout, kind)]
