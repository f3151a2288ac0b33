"""The position study: what a readout finds of an absolute position in the features of a frozen encoder, under each padding.

`check` refuses a bad configuration before anything is computed; `run` computes the table and writes it to a work directory.
"""

import functools
import itertools
import pathlib
import time
from collections import defaultdict

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cnnjax import report, weights
from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.nn import check_fill, resize
from cnnjax.position.encoder import (
    FEATURE_SIZE,
    PIXELS,
    encode,
    encode_once,
    image_features,
    reachable_stages,
)
from cnnjax.position.metrics import CONSTANT, by_ring, scores
from cnnjax.position.readout import STRENGTHS, Exact, Sgd, fit_exact, fit_sgd
from cnnjax.position.targets import TARGETS, target
from cnnjax.runtime import workdir
from cnnjax.runtime.progress import progress

DATA = ("natural", "black", "white", "noise")
RINGS = 7  # of the profile by the distance to the border
# Read out without an encoder: the image itself, named as in the paper, and one with its pixels' coordinates, the most there is to find.
CONTROLS = {"posenet": ["image"], "coordinates": ["image", "coordinates"]}

# What the literature leaves open and this study decides; printed in every report.
DECISIONS = (
    "Inputs: RGB / 255 with ImageNet's mean and standard deviation taken out, for random weights too, so that a black image is not "
    "equal to the zeros of the padding (unless `pixels` is 'unit').",
    "Stages: VGG's five blocks, each before its max-pool (the authors' taps); ResNet's stem before its max-pool and its layers (the "
    "authors take the layers only). With `stages` empty, those that every padding under study leaves something of at this image "
    "size are used for all paddings.",
    f"Every stage is resized to {FEATURE_SIZE}x{FEATURE_SIZE} (bilinear, corners aligned); the channels of all are joined and each is "
    "standardized over the training images.",
    "'none' pads nothing anywhere (residual skips are cropped to their branch); the readout itself is padded only where `readout_padding` "
    "says so, with zeros before the features are standardized.",
    "Readout 'sgd' is the authors' code: convolution, BatchNorm, sigmoid; SGD of learning rate 0.1 (a tenth after two thirds of the "
    "steps), momentum 0.9, weight decay 1e-4, batches of 32, mean squared error at the image's size. Readout 'exact' is the ridge "
    f"solution on the readout's own grid, its strength chosen from {STRENGTHS[0]:g} to {STRENGTHS[-1]:g} for each target on held-out "
    "photographs.",
    "Predictions are upsampled to the image's size (bilinear, corners aligned) and scored there, image by image.",
    "With `depth` above 1 the readout 'sgd' has as many convolutions, each but the last followed by BatchNorm and ReLU; 'exact' keeps one.",
    f"SPC is Spearman's rank correlation; a map whose range is under {CONSTANT:g} of the target's counts as constant and scores 0. SPC "
    "is blind to amplitude: read it beside R2, the share of the target's variance explained (0 for a constant, negative for worse).",
    "Targets span 0 to 1, stripes included (the paper's tables have stripes from -1 to 1: its errors on HS and VS are twice as large).",
    "Each seed draws its own division of the photographs (training, held-out, test: disjoint), its own crops, its own random weights "
    "and its own start of the SGD readout. Mean and std (of the sample) are over images and seeds together.",
)


def _stages(config: ml_collections.ConfigDict, name: str) -> list[str]:
    """The stages that the study reads of an encoder, the same for all its paddings."""
    reachable = {
        fill: reachable_stages(create_model(name, padding=fill), config.image_size)
        for fill in config.paddings
    }
    if not config.stages:
        common = min(reachable.values(), key=len)
        if not common:
            raise ValueError(
                f"image_size={config.image_size} leaves nothing of any stage of {name} under some padding; take a larger one"
            )
        return common
    for fill, names in reachable.items():
        for stage in config.stages:
            if stage not in names:
                raise ValueError(
                    f"stages={stage!r} is not a stage that {name} reaches with padding={fill!r} at image_size="
                    f"{config.image_size}; it reaches {', '.join(names) or 'none'}"
                )
    return [stage for stage in names if stage in config.stages]  # in the network's order


def check(config: ml_collections.ConfigDict) -> None:
    """Raises `ValueError`, naming the key, its value and what is accepted, for whatever can be seen to be wrong before computing."""
    for key, accepted in (("targets", TARGETS), ("data", DATA)):
        for value in config[key]:
            if value not in accepted:
                raise ValueError(f"{key}={value!r} is not one of {', '.join(accepted)}")
    for key in ("targets", "data", "paddings"):
        if not config[key] or len(set(config[key])) < len(config[key]):
            raise ValueError(f"{key}={tuple(config[key])} must name at least one, each once")
    for fill in (*config.paddings, *config.sgd_paddings):
        check_fill(fill)
    for key in ("n_train", "n_held_out", "n_test", "n_noise", "seeds", "sgd_steps"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]} is not a positive number")
    if config.readout_padding < 0:
        raise ValueError(f"readout_padding={config.readout_padding} is not a number of at least 0")
    side = FEATURE_SIZE + 2 * config.readout_padding
    if not 1 <= config.kernel <= side:
        raise ValueError(
            f"kernel={config.kernel} is not between 1 and {side}, the side of the features"
        )
    if config.depth < 1 or config.depth * (config.kernel - 1) >= side:
        raise ValueError(
            f"depth={config.depth} is not a number of {config.kernel}x{config.kernel} convolutions, at least 1, that leave "
            f"something of {side}x{side} features"
        )
    if config.hidden < 0:
        raise ValueError(
            f"hidden={config.hidden} is not a number of channels, or 0 for as many as the features have"
        )
    if config.pixels not in PIXELS:
        raise ValueError(f"pixels={config.pixels!r} is not one of {', '.join(PIXELS)}")
    if config.image_size < 2:
        raise ValueError(f"image_size={config.image_size} is not a number of pixels of at least 2")
    for name in config.encoders:
        create_model(name)
    is_file = pathlib.Path(config.weights).expanduser().is_file()
    if config.weights not in ("random", "imagenet") and not is_file:
        raise ValueError(
            f"weights={config.weights!r} is neither 'random', 'imagenet' nor a safetensors or .pth "
            "file"
        )
    paths = photographs.list_photographs(config.photographs)
    photographs.split(paths, (1, 1, 1), 0)
    for path in paths:
        height, width = photographs.image_size(path)
        if min(height, width) < config.image_size:
            raise ValueError(
                f"photographs: {path} is {height}x{width}, smaller than image_size={config.image_size}"
            )
    if config.weights == "imagenet":
        for name in config.encoders:
            weights.fetch(name)  # where there is no network, this says so before any computation
    for name in config.encoders:
        _stages(config, name)


def _images(config: ml_collections.ConfigDict, seed: int) -> dict[str, np.ndarray]:
    """One seed's images: "train", "held_out" and one test set for each kind of data, uint8 [n, size, size, 3]."""
    counts = (config.n_train, config.n_held_out, config.n_test)
    parts = photographs.split(photographs.list_photographs(config.photographs), counts, seed)
    sets = {
        name: photographs.crops(part, count, config.image_size, seed * 3 + number)
        for number, (name, part, count) in enumerate(
            zip(("train", "held_out", "natural"), parts, counts)
        )
    }
    for kind in DATA[1:]:
        sets[kind] = photographs.synthetic(
            kind, config.n_noise if kind == "noise" else 1, config.image_size, seed
        )
    if config.mirrored:
        sets |= {
            name: np.concatenate([sets[name][:, ::v, ::h] for v in (1, -1) for h in (1, -1)])
            for name in ("train", "held_out")
        }
    return {
        name: images for name, images in sets.items() if name in ("train", "held_out", *config.data)
    }


def _variables(config: ml_collections.ConfigDict, name: str, stages: list[str], seed: int) -> dict:
    """An encoder's weights, which do not depend on its padding: of the seed, from the hub or from a file."""
    model = create_model(name, **weights.fields_for(name, config.weights))
    if config.weights == "random":
        image = jnp.zeros((1, config.image_size, config.image_size, 3))
        return jax.jit(lambda key: model.init(key, image, method="stages", last=stages[-1]))(
            jax.random.key(seed)
        )
    path = weights.fetch(name) if config.weights == "imagenet" else config.weights
    return weights.load_torchvision(path, model, tuple(config.missing))


def _encoders(config: ml_collections.ConfigDict):
    """Every (encoder, weights, padding) of the study; the controls first."""
    for name in CONTROLS if config.coordinates else ("posenet",):
        yield name, "none", "none"
    for name in config.encoders:
        for fill in config.paddings:
            yield name, config.weights, fill


def _cell(
    config: ml_collections.ConfigDict,
    seed: int,
    name: str,
    fill: str,
    images: dict[str, np.ndarray],
    features: np.ndarray,
    goals: np.ndarray,
) -> dict[str, np.ndarray]:
    """What the readouts of one encoder find: each image's scores, the exact readout's by ring, and the maps of the first images."""
    border = ((0, 0), *((config.readout_padding,) * 2,) * 2, (0, 0))
    splits = np.cumsum([len(part) for part in images.values()])[:-1]
    parts = dict(zip(images, np.split(np.pad(features, border), splits)))
    exact = fit_exact(parts["train"], parts["held_out"], goals, config.kernel)
    readouts: dict[str, Exact | Sgd] = {"exact": exact}
    if name in CONTROLS or fill in config.sgd_paddings:
        hidden = (config.hidden or features.shape[3],) * (config.depth - 1)
        readouts["sgd"] = fit_sgd(
            parts["train"], goals, config.kernel, config.sgd_steps, seed=seed, hidden=hidden
        )
    found = {"residual": np.asarray(exact.residual)}
    for (kind, readout), data in itertools.product(readouts.items(), config.data):
        predicted = readout(jnp.asarray(parts[data]))
        predicted = predicted.reshape(-1, *predicted.shape[-3:])  # one seed
        upsampled = np.asarray(
            resize(jnp.asarray(predicted.transpose(0, 2, 3, 1)), config.image_size)
        ).transpose(3, 0, 1, 2)
        for goal_name, goal, prediction in zip(config.targets, goals, upsampled):
            found |= {
                f"scores/{kind}/{goal_name}/{data}/{metric}": value
                for metric, value in scores(prediction, goal).items()
            }
            if kind == "exact" and goal_name == config.targets[0]:
                found |= {
                    f"rings/{goal_name}/{data}/{metric}": value
                    for metric, value in by_ring(prediction, goal, RINGS).items()
                }
        found[f"maps/{kind}/{data}"] = predicted[0].astype(np.float32)
    return found


def _cells(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    goals: np.ndarray,
    stages: dict[str, list[str]],
    memory: pathlib.Path | None,
) -> dict[tuple[int, str, str, str], dict[str, np.ndarray]]:
    """(seed, encoder, weights, padding) -> its cell, computed where the work directory does not hold it yet."""
    (folder / "cells").mkdir(exist_ok=True)
    combinations, found = (
        list(itertools.product(range(config.seed, config.seed + config.seeds), _encoders(config))),
        {},
    )
    images = functools.lru_cache(maxsize=1)(functools.partial(_images, config))
    variables = functools.lru_cache(maxsize=1)(
        lambda name, seed: _variables(config, name, stages[name], seed)
    )
    run_encoder = functools.partial(encode_once, memory) if memory else encode
    with progress(len(combinations), "encoders read out") as advance:
        for seed, (name, origin, fill) in combinations:
            path = folder / "cells" / f"{name}-{fill}-{seed}.npz"
            if not path.exists():
                began, everything = time.monotonic(), np.concatenate(list(images(seed).values()))
                features = (
                    image_features(everything, config.pixels, name == "coordinates")
                    if name in CONTROLS
                    else run_encoder(
                        create_model(
                            name, padding=fill, **weights.fields_for(name, config.weights)
                        ),
                        variables(name, seed),
                        everything,
                        stages[name],
                        config.pixels,
                    )
                )
                cell = _cell(config, seed, name, fill, images(seed), features, goals)
                workdir.write_arrays(path, cell | {"seconds": np.asarray(time.monotonic() - began)})
            with np.load(path) as kept:
                found[seed, name, origin, fill] = dict(kept)
            advance(1)
    return found


def run(
    config: ml_collections.ConfigDict, folder: pathlib.Path, memory: pathlib.Path | None = None
) -> None:
    """Computes every row, and writes results.json, maps.npz, report.md and the figures to the work directory.

    `memory` is a folder that keeps what the encoders give, for other studies of the same images. Raises `workdir.Interrupted` when it
    was stopped: the encoders that were read out are not read out again.
    """
    goals = np.stack([target(name, config.image_size) for name in config.targets])
    if config.shuffled:
        order = np.random.default_rng(config.seed).permutation(config.image_size**2)
        goals = goals.reshape(len(goals), -1)[:, order].reshape(goals.shape)
    stages = {name: _stages(config, name) for name in config.encoders}
    for name in (
        config.encoders if config.weights != "random" else ()
    ):  # a file that does not fit is refused before anything is computed
        _variables(config, name, stages[name], config.seed)
    try:
        cells = _cells(config, folder, goals, stages, memory)
    except KeyboardInterrupt as stop:
        raise workdir.Interrupted(
            "stopped; the same command goes on after the last encoder that was read out"
        ) from stop

    maps = {f"target/{name}": goal for name, goal in zip(config.targets, goals)}
    maps |= {
        f"image/{data}": images[0]
        for data, images in _images(config, config.seed).items()
        if data in config.data
    }
    # "scores" or "rings", and what they are of -> by metric, one array a seed
    pooled: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for (seed, *subject), cell in cells.items():
        for key, value in cell.items():
            what, *rest = key.split("/")
            if what in ("scores", "rings"):
                pooled[what, *subject, *rest[:-1]][rest[-1]].append(value)
            elif what == "maps" and seed == config.seed:
                maps[f"{subject[0]}/{subject[2]}/{'/'.join(rest)}"] = value
    rows: list[dict] = []
    rings: list[dict] = []
    for (what, name, origin, fill, *rest), metrics in pooled.items():
        row = {"encoder": name, "weights": origin, "padding": fill}
        values = {metric: np.concatenate(per_seed) for metric, per_seed in metrics.items()}
        if what == "rings":
            rings.append(
                row
                | dict(zip(("target", "data"), rest))
                | {metric: found.mean(0).tolist() for metric, found in values.items()}
            )
            continue
        row |= {"stages": (stages | CONTROLS)[name], "kernel": config.kernel} | dict(
            zip(("readout", "target", "data"), rest)
        )
        row["depth"] = config.depth if row["readout"] == "sgd" else 1
        for metric, found in values.items():
            row |= {
                metric: float(found.mean()),
                f"{metric}_std": float(found.std(ddof=1)) if len(found) > 1 else None,
            }
        rows.append(row | {"n_images": len(found) // config.seeds, "n_seeds": config.seeds})
    results = {
        "kind": "position",
        "rows": rows,
        "rings": rings,
        "chance_mae": {
            name: float(np.abs(goal - np.median(goal)).mean())
            for name, goal in zip(config.targets, goals)
        },
        "ridge_residual": float(max(cell["residual"] for cell in cells.values())),
        "decisions": list(DECISIONS),
        "seconds": round(float(sum(cell["seconds"] for cell in cells.values())), 1),
    }
    workdir.write_arrays(folder / "maps.npz", maps)
    workdir.write_json(folder / "results.json", results)
    report.write(folder)
