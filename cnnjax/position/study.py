"""The position study: what a readout learns about position from a frozen encoder's features.

`check` refuses a bad configuration before anything is computed. `run` measures every encoder under
every padding, then writes results.json and the report. `measure` is the core: it leads from images
to features, readouts, maps and scores.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
import time

import jax
import ml_collections
import numpy as np
from jaxtyping import Float, UInt8

from cnnjax import weights
from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.models.base import digest_network
from cnnjax.nn import resize
from cnnjax.position import defaults, report, results
from cnnjax.position.check import DATA, RINGS, check, common_stages, readout_side
from cnnjax.position.decisions import DECISIONS
from cnnjax.position.encoder import draw_variables, encode, encode_once, image_features
from cnnjax.position.metrics import by_ring, scores
from cnnjax.position.readout import Exact, Sgd, fit_exact, fit_sgd
from cnnjax.position.results import Maps, Measurement, Point, Results, RingScores, Scores
from cnnjax.position.targets import target
from cnnjax.runtime import files, workdir
from cnnjax.runtime.paths import expand_user, sha256
from cnnjax.runtime.progress import progress

__all__ = ["adopt", "check", "report", "run"]

_LOG = logging.getLogger("cnnjax")
# The file of a work directory with the digests of photographs, weights and networks' files.
_INPUTS = "inputs.json"
# Features without an encoder, and their stages: the image itself, with the paper's name, and the
# image with its pixels' coordinates, from which a linear readout can find the most.
CONTROLS = {"posenet": ("image",), "coordinates": ("image", "coordinates")}


# ------------------------------------------------------------------ the files of a study


def adopt(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Adds keys introduced after a study to its record, and checks its files' digests.

    Files that have been moved are recorded where they are now. A study continues with more seeds,
    since a point depends on its own seed only.

    Args:
      config: the configuration to run.
      folder: the work directory, which may not exist yet.

    Raises:
      ValueError: if the study was begun with other photographs or weights.
    """
    recorded = workdir.read_record(folder, config.kind)
    if recorded is None:
        return
    moved = _check_inputs(config, folder, recorded)
    completed = defaults.BEFORE | recorded | moved
    differences = workdir.differences(completed, config.to_dict())
    if differences == {"seeds"} and completed["seeds"] < config.seeds:
        workdir.check_seal(folder)
        # The results are written anew when the further seeds are measured.
        workdir.unseal(folder)
        (folder / "results.json").unlink(missing_ok=True)
        completed["seeds"] = config.seeds
    if completed != recorded:
        files.write_json(folder / "config.json", completed)


def _check_inputs(
    config: ml_collections.ConfigDict, folder: pathlib.Path, recorded: dict
) -> dict[str, str]:
    """Checks that a study continues with the photographs and weights it was begun with.

    Returns the configured paths, by key, of the files that are the same, which may have been moved.
    If both the path and the digest differ, `workdir.check_config` refuses the configuration.
    """
    path = folder / _INPUTS
    if not path.exists():
        _check_older_version(config, folder)
        return {}
    moved = {}
    before = files.read_json(path)
    for key, now in digest_inputs(config).items():
        if recorded.get(key) == config[key] and before.get(key, now) != now:
            raise ValueError(
                f"workdir={str(folder)!r} was begun with other files of {key}={config[key]!r} "
                f"({before[key]} there, {now} now); choose another --workdir"
            )
        is_same = before.get(key) == now
        if is_same and photographs.are_exchangeable(recorded.get(key, ""), config[key]):
            moved[key] = config[key]
    _warn_of_edits(config, before.get("networks", {}))
    return moved


def _check_older_version(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Refuses an unfinished study that took the first photographs of each part.

    Versions that took them recorded no digests.
    """
    is_unfinished = not (folder / "results.json").exists()
    if is_unfinished and any(_results_folder(config, folder).glob("*.npz")) and draws(config):
        raise ValueError(
            f"workdir={str(folder)!r} was begun by a version that did not draw the photographs of "
            f"photographs={config.photographs!r} at random; choose another --workdir"
        )


def _warn_of_edits(config: ml_collections.ConfigDict, recorded: dict[str, str]) -> None:
    """Logs a warning for each encoder whose file has changed since its digest was recorded.

    Earlier versions recorded none.
    """
    for name, now in digest_networks(config).items():
        if recorded.get(name, now) != now:
            # FILE.py of FILE.py:NAME
            file = name.rpartition(":")[0]
            _LOG.warning(
                "%s has changed since the study was begun; its points may mix two networks", file
            )


def digest_networks(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Hashes the files of the encoders that are networks of the user's own, by name."""
    digests = {name: digest_network(name) for name in config.encoders}
    return {name: digest for name, digest in digests.items() if digest is not None}


def digest_inputs(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Hashes the files that a configuration names by their paths, by key."""
    return digest_files(config.photographs, config.weights)


def digest_files(folder: str, file: str) -> dict[str, str]:
    """Hashes photographs and, if there is such a file, weights, by a configuration's keys."""
    digests = {"photographs": photographs.describe_files(folder)}
    path = expand_user(file)
    if file != "random" and path.is_file():
        digests["weights"] = sha256(path)[:8]
    return digests


# ------------------------------------------------------------------ the study


def run(
    config: ml_collections.ConfigDict, folder: pathlib.Path, memory: pathlib.Path | None = None
) -> None:
    """Measures every point and writes results.json, maps.npz, the report and its figures.

    Args:
      config: the configuration, which `check` has accepted.
      folder: the work directory; points whose results it holds are not measured again.
      memory: the folder of a cache of features, for other studies of the same images.

    Raises:
      workdir.Interrupted: if it was stopped; the same command continues from there.
    """
    targets = draw_targets(config)
    points = list_points(config)
    check_weights(config)
    try:
        measurements = _measure_missing(config, points, folder, targets, memory)
        _write_results(config, folder, targets, measurements)
    except KeyboardInterrupt as stop:
        raise workdir.Interrupted(
            "stopped; run the same command again to continue after the last encoder that was "
            "read out"
        ) from stop


def _write_results(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    targets: Float[np.ndarray, "targets size size"],
    measurements: list[Measurement],
) -> None:
    """Writes the results of all points, and the report."""
    images = draw_images(config, config.seed)
    results.save_maps(
        folder / "maps.npz",
        targets=dict(zip(config.targets, targets)),
        images={kind: images[kind][0] for kind in images if kind in config.data},
        measurements=[each for each in measurements if each.point.seed == config.seed],
    )
    summary = Results(
        rows=results.summarize(
            measurements, config.kernel, config.depth, fitted_to=config.fitted_to
        ),
        rings=results.ring_profiles(measurements),
        chance_mae={name: best_constant(goal) for name, goal in zip(config.targets, targets)},
        ridge_residual=max(measurement.residual for measurement in measurements),
        decisions=list(DECISIONS),
        photographs=count_photographs(config),
        seconds=round(sum(measurement.seconds for measurement in measurements), 1),
    )
    files.write_json(folder / "results.json", dataclasses.asdict(summary))
    report.write(folder)


def list_points(config: ml_collections.ConfigDict) -> list[Point]:
    """Lists a study's points: for every seed the controls, then encoders and paddings."""
    controls = CONTROLS if config.coordinates else ("posenet",)
    # Encoder, weights, padding and stages: a control has neither weights nor padding.
    subjects = [(name, "none", "none", CONTROLS[name]) for name in controls]
    for name in config.encoders:
        stages = common_stages(config, name)
        subjects += [(name, config.weights, fill, stages) for fill in config.paddings]
    seeds = range(config.seed, config.seed + config.seeds)
    return [Point(*subject, seed) for seed in seeds for subject in subjects]


def check_weights(config: ml_collections.ConfigDict) -> None:
    """Loads the weights of every encoder.

    Raises:
      ValueError: if they do not fit.
    """
    if config.weights != "random":
        for name in config.encoders:
            last = common_stages(config, name)[-1]
            load_variables(config, name, last, config.seed)


def _results_folder(config: ml_collections.ConfigDict, folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the points' files."""
    # Earlier versions measured shuffled targets of the images' size and saved them in "cells".
    # Those are of another control and are not read.
    return folder / ("shuffled" if config.shuffled else "cells")


def _measure_missing(
    config: ml_collections.ConfigDict,
    points: list[Point],
    folder: pathlib.Path,
    targets: Float[np.ndarray, "targets size size"],
    memory: pathlib.Path | None,
) -> list[Measurement]:
    """Measures the points that have no file yet; returns all measurements."""
    results_folder = _results_folder(config, folder)
    # Points of one seed share their images, and points of one encoder and seed its weights. They
    # follow each other, so keeping the last value is enough.
    keep_last = functools.lru_cache(maxsize=1)
    cached_images = keep_last(functools.partial(draw_images, config))
    cached_variables = keep_last(functools.partial(load_variables, config))

    measurements = []
    with progress(len(points), "encoders read out") as advance:
        for point in points:
            path = results_folder / point.file
            if not path.exists():
                measurement = measure(
                    config,
                    point,
                    images=cached_images(point.seed),
                    variables=cached_variables(point.encoder, point.stages[-1], point.seed),
                    targets=targets,
                    memory=memory,
                )
                if not (folder / _INPUTS).exists():
                    inputs = digest_inputs(config) | {"networks": digest_networks(config)}
                    files.write_json(folder / _INPUTS, inputs)
                path.parent.mkdir(exist_ok=True)
                results.save(path, measurement)
            measurements.append(results.load(path, point, config.targets, config.data))
            advance(1)
    return measurements


# ------------------------------------------------------------------ from images to scores


def measure(
    config: ml_collections.ConfigDict,
    point: Point,
    *,
    images: dict[str, UInt8[np.ndarray, "_ size size 3"]],
    variables: dict,
    targets: Float[np.ndarray, "targets size size"],
    memory: pathlib.Path | None,
) -> Measurement:
    """Measures one encoder under one padding: images, features, readouts, maps, scores.

    Args:
      config: the study's configuration.
      point: the encoder, the padding and the seed.
      images: those of `draw_images`, to fit readouts to and to score them on.
      variables: the encoder's weights.
      targets: those of `draw_targets`.
      memory: the folder of a cache of features, or None.
    """
    began = time.monotonic()
    all_scores = []
    rings = []
    all_maps = []

    # Images [n, size, size, 3] -> features [n, 28, 28, channels]
    features = extract_features(config, point, images, variables, memory)
    exact = fit_exact(
        features["train"],
        features["held_out"],
        targets,
        config.kernel,
        align_corners=config.align_corners,
    )
    readouts: dict[str, Exact | Sgd] = {"exact": exact}
    if point.encoder in CONTROLS or point.padding in config.sgd_paddings:
        readouts["sgd"] = train_readout(config, point.seed, features["train"], targets)

    for (name, readout), kind in itertools.product(readouts.items(), config.data):
        # -> maps [n, targets, 28, 28], smaller for larger kernels -> [targets, n, size, size]
        maps = readout(features[kind])
        predictions = upsample(maps, targets.shape[1], config.align_corners)
        all_maps.append(Maps(name, kind, maps[0]))
        # -> scores [n] of each target
        for label, goal, prediction in zip(config.targets, targets, predictions):
            all_scores.append(Scores(name, label, kind, **scores(prediction, goal)))
        if name == "exact":
            by_distance = by_ring(predictions[0], targets[0], RINGS)
            rings.append(RingScores(config.targets[0], kind, **by_distance))

    return Measurement(
        point=point,
        scores=all_scores,
        rings=rings,
        maps=all_maps,
        residual=exact.residual,
        seconds=time.monotonic() - began,
        strengths={name: float(chosen) for name, chosen in zip(config.targets, exact.strength)},
    )


def draw_targets(config: ml_collections.ConfigDict) -> Float[np.ndarray, "targets size size"]:
    """Returns the target maps of the readouts, at the images' size.

    With `shuffled`, their pixels are in random order, the same for all images and seeds, and they
    have the size of the exact readout's grid: upsampling to a larger map would smooth even a
    perfect readout.
    """
    if not config.shuffled:
        return np.stack([target(name, config.image_size) for name in config.targets])
    size = readout_side(config)
    targets = np.stack([target(name, size) for name in config.targets])
    order = np.random.default_rng(config.seed).permutation(size**2)
    return targets.reshape(-1, size**2)[:, order].reshape(targets.shape)


def _count_images(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Counts the images to fit to, to hold out, and the crops of photographs to score on."""
    return {"train": config.n_train, "held_out": config.n_held_out, "natural": config.n_test}


def divide_photographs(
    config: ml_collections.ConfigDict, seed: int
) -> dict[str, list[pathlib.Path]]:
    """Divides the photographs of a seed: to fit to, to hold out, and to score on."""
    # `check` has logged the files that are passed over.
    paths, _ = photographs.find_photographs(config.photographs)
    counts = _count_images(config)
    return dict(zip(counts, photographs.split(paths, tuple(counts.values()), seed)))


def count_photographs(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Counts the photographs of each part that are cropped, the same for all seeds."""
    parts = divide_photographs(config, config.seed)
    counts = {name: min(count, len(parts[name])) for name, count in _count_images(config).items()}
    if config.fitted_to == "noise":
        counts |= {"train": 0, "held_out": 0}
    return counts


def draws(config: ml_collections.ConfigDict) -> bool:
    """Tells whether a part has more photographs than are needed, which are drawn at random."""
    parts = divide_photographs(config, config.seed)
    return photographs.is_random_choice(list(parts.values()), tuple(_count_images(config).values()))


def draw_images(
    config: ml_collections.ConfigDict, seed: int
) -> dict[str, UInt8[np.ndarray, "_ size size 3"]]:
    """Draws a seed's images: "train", "held_out" and a test set for each kind of data."""
    size = config.image_size
    parts = divide_photographs(config, seed)
    images = {}
    for number, name in enumerate(("train", "held_out")):
        if config.fitted_to == "noise":
            # Other noise than that to score on, which is drawn with `seed` alone.
            stream = (seed, 1 + number)
            count = _count_images(config)[name]
            drawn = photographs.synthetic("noise", count, size, stream, *config.noise)
        else:
            is_shuffled = config.fitted_to == "shuffled_pixels"
            drawn = _draw_crops(config, parts, name, seed, is_shuffled)
        if config.mirrored:
            # [n, rows, columns, 3], mirrored along either axis and along both.
            mirrored = [drawn[:, :, ::-1], drawn[:, ::-1], drawn[:, ::-1, ::-1]]
            drawn = np.concatenate([drawn, *mirrored])
        images[name] = drawn
    for kind in DATA:
        if kind not in config.data:
            continue
        if kind in ("natural", "shuffled_pixels"):
            is_shuffled = kind == "shuffled_pixels"
            images[kind] = _draw_crops(config, parts, "natural", seed, is_shuffled)
        else:
            count = config.n_noise if kind == "noise" else 1
            images[kind] = photographs.synthetic(kind, count, size, seed, *config.noise)
    return images


def _draw_crops(
    config: ml_collections.ConfigDict,
    parts: dict[str, list[pathlib.Path]],
    name: str,
    seed: int,
    is_shuffled: bool,
) -> UInt8[np.ndarray, "_ size size 3"]:
    """Draws crops of a part of the photographs, with their pixels in order or shuffled."""
    # A random stream of its own for each of the three parts.
    stream = seed * 3 + list(parts).index(name)
    count = _count_images(config)[name]
    crops = photographs.random_crops(parts[name], count, config.image_size, stream)
    return photographs.shuffle_pixels(crops, stream) if is_shuffled else crops


def load_variables(config: ml_collections.ConfigDict, encoder: str, last: str, seed: int) -> dict:
    """Loads an encoder's weights, or draws random ones up to stage `last`.

    They do not depend on the padding.
    """
    if encoder in CONTROLS:
        return {}
    model = create_model(encoder, **weights.fields_for(encoder, config.weights))
    if config.weights != "random":
        path = weights.fetch(encoder) if config.weights == "imagenet" else config.weights
        return weights.load_torchvision(path, model, tuple(config.missing))
    return draw_variables(model, config.image_size, last, jax.random.key(seed))


def extract_features(
    config: ml_collections.ConfigDict,
    point: Point,
    images: dict[str, UInt8[np.ndarray, "_ size size 3"]],
    variables: dict,
    memory: pathlib.Path | None,
) -> dict[str, Float[np.ndarray, "_ side side channels"]]:
    """Encodes all images at once, and pads the features for a padded readout."""
    all_images = np.concatenate(list(images.values()))
    if point.encoder in CONTROLS:
        with_coordinates = point.encoder == "coordinates"
        features = image_features(all_images, config.pixels, with_coordinates)
    else:
        fields = weights.fields_for(point.encoder, point.weights)
        model = create_model(point.encoder, padding=point.padding, **fields)
        # The cache keeps stages one by one; registered ones depend on each other.
        if memory and not config.registered:
            run_encoder = functools.partial(encode_once, memory)
        else:
            run_encoder = functools.partial(encode, is_registered=config.registered)
        features = run_encoder(model, variables, all_images, point.stages, config.pixels)
    border = (config.readout_padding, config.readout_padding)
    features = np.pad(features, ((0, 0), border, border, (0, 0)))
    ends = np.cumsum([len(part) for part in images.values()])[:-1]
    return dict(zip(images, np.split(features, ends)))


def train_readout(
    config: ml_collections.ConfigDict,
    seed: int,
    train: Float[np.ndarray, "n side side channels"],
    targets: Float[np.ndarray, "targets size size"],
) -> Sgd:
    """Trains the authors' readout, with hidden layers if `depth` is above 1."""
    channels = config.hidden or train.shape[3]
    return fit_sgd(
        train,
        targets,
        size=config.kernel,
        steps=config.sgd_steps,
        seed=seed,
        hidden=(channels,) * (config.depth - 1),
        standardize=config.standardize,
        align_corners=config.align_corners,
    )


_resize = jax.jit(resize, static_argnames=("size", "align_corners"))


def upsample(
    maps: Float[np.ndarray, "n targets rows columns"], size: int, align_corners: bool
) -> Float[np.ndarray, "targets n size size"]:
    """Resizes maps to the images' size, bilinearly."""
    resized = _resize(maps.transpose(0, 2, 3, 1), size, align_corners)
    return np.asarray(resized).transpose(3, 0, 1, 2)


def best_constant(goal: Float[np.ndarray, "size size"]) -> float:
    """Returns the mean absolute error of the best constant map, which is the median."""
    return float(np.abs(goal - np.median(goal)).mean())
