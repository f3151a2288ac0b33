"""The position study: what a readout finds of an absolute position in the features of a frozen encoder, under each padding.

`check` refuses a bad configuration before anything is computed; `run` computes the table and writes it to a work directory.
"""
import io
import itertools
import pathlib
import time
from collections import defaultdict

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cnnjax import report, weights, workdir
from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.nn import check_fill, resize
from cnnjax.position.encoder import FEATURE_SIZE, PIXELS, encode, image_features, reachable_stages
from cnnjax.position.metrics import CONSTANT, by_ring, scores
from cnnjax.position.readout import STRENGTHS, fit_exact, fit_sgd
from cnnjax.position.targets import TARGETS, target
from cnnjax.progress import progress

DATA = ("natural", "black", "white", "noise")
RINGS = 7  # of the profile by the distance to the border
CONTROL = "posenet"  # the readout on the image itself, named as in the paper

# What the literature leaves open and this study decides; printed in every report.
DECISIONS = (
    "Inputs: RGB / 255 with ImageNet's mean and standard deviation taken out, for random weights too, so that a black image is not "
    "equal to the zeros of the padding (unless `pixels` is 'unit').",
    "Stages: VGG's five blocks, each before its max-pool (the authors' taps); ResNet's stem before its max-pool and its layers (the "
    "authors take the layers only). With `stages` empty, those that every padding under study leaves something of at this image "
    "size are used for all paddings.",
    f"Every stage is resized to {FEATURE_SIZE}x{FEATURE_SIZE} (bilinear, corners aligned); the channels of all are joined and each is "
    "standardised over the training images.",
    "'none' pads nothing anywhere (residual skips are cropped to their branch); the readout itself is padded only where `readout_padding` "
    "says so, with zeros before the features are standardised.",
    "Readout 'sgd' is the authors' code: convolution, BatchNorm, sigmoid; SGD of learning rate 0.1 (a tenth after two thirds of the "
    "steps), momentum 0.9, weight decay 1e-4, batches of 32, mean squared error at the image's size. Readout 'exact' is the ridge "
    f"solution on the readout's own grid, its strength chosen from {STRENGTHS[0]:g} to {STRENGTHS[-1]:g} for each target on held-out "
    "photographs.",
    "Predictions are upsampled to the image's size (bilinear, corners aligned) and scored there, image by image.",
    f"SPC is Spearman's rank correlation; a map whose range is under {CONSTANT:g} of the target's counts as constant and scores 0. SPC "
    "is blind to amplitude: read it beside R2, the share of the target's variance explained (0 for a constant, negative for worse).",
    "Targets span 0 to 1, stripes included (the paper's tables have stripes from -1 to 1: its errors on HS and VS are twice as large).",
    "Each seed draws its own division of the photographs (training, held-out, test: disjoint), its own crops, its own random weights "
    "and its own start of the SGD readout. Mean and std (of the sample) are over images and seeds together.",
)


def _stages(config: ml_collections.ConfigDict, name: str) -> list[str]:
    """The stages that the study reads of an encoder, the same for all its paddings."""
    reachable = {fill: reachable_stages(create_model(name, padding=fill), config.image_size) for fill in config.paddings}
    if not config.stages:
        common = min(reachable.values(), key=len)
        if not common:
            raise ValueError(f"image_size={config.image_size} leaves nothing of any stage of {name} under some padding; take a larger one")
        return common
    for fill, names in reachable.items():
        for stage in config.stages:
            if stage not in names:
                raise ValueError(f"stages={stage!r} is not a stage that {name} reaches with padding={fill!r} at image_size="
                                 f"{config.image_size}; it reaches {', '.join(names) or 'none'}")
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
        raise ValueError(f"kernel={config.kernel} is not between 1 and {side}, the side of the features")
    if config.pixels not in PIXELS:
        raise ValueError(f"pixels={config.pixels!r} is not one of {', '.join(PIXELS)}")
    if config.image_size < 2:
        raise ValueError(f"image_size={config.image_size} is not a number of pixels of at least 2")
    for name in config.encoders:
        create_model(name)
    if config.weights not in ("random", "imagenet") and not pathlib.Path(config.weights).is_file():
        raise ValueError(f"weights={config.weights!r} is neither 'random', 'imagenet' nor a safetensors file")
    paths = photographs.list_photographs(config.photographs)
    photographs.split(paths, (1, 1, 1), 0)
    for path in paths:
        height, width = photographs.image_size(path)
        if min(height, width) < config.image_size:
            raise ValueError(f"photographs: {path} is {height}x{width}, smaller than image_size={config.image_size}")
    for name in config.encoders:
        _stages(config, name)


def _images(config: ml_collections.ConfigDict, seed: int) -> dict[str, np.ndarray]:
    """One seed's images: "train", "held_out" and one test set for each kind of data, uint8 [n, size, size, 3]."""
    counts = (config.n_train, config.n_held_out, config.n_test)
    parts = photographs.split(photographs.list_photographs(config.photographs), counts, seed)
    sets = {name: photographs.crops(part, count, config.image_size, seed * 3 + number)
            for number, (name, part, count) in enumerate(zip(("train", "held_out", "natural"), parts, counts))}
    for kind in DATA[1:]:
        sets[kind] = photographs.synthetic(kind, config.n_noise if kind == "noise" else 1, config.image_size, seed)
    if config.mirrored:
        sets |= {name: np.concatenate([sets[name][:, ::v, ::h] for v in (1, -1) for h in (1, -1)]) for name in ("train", "held_out")}
    return {name: images for name, images in sets.items() if name in ("train", "held_out", *config.data)}


def _variables(config: ml_collections.ConfigDict, name: str, stages: list[str], seed: int) -> dict:
    """An encoder's weights, which do not depend on its padding: of the seed, from the hub or from a file."""
    model = create_model(name)
    if config.weights == "random":
        image = jnp.zeros((1, config.image_size, config.image_size, 3))
        return jax.jit(lambda key: model.init(key, image, method="stages", last=stages[-1]))(jax.random.key(seed))
    path = weights.fetch(name) if config.weights == "imagenet" else config.weights
    return weights.load_torchvision(path, model, tuple(config.missing))


def _encoders(config: ml_collections.ConfigDict):
    """Every (encoder, weights, padding) of the study; the control first."""
    yield CONTROL, "none", "none"
    for name in config.encoders:
        for fill in config.paddings:
            yield name, config.weights, fill


def run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Computes every row, and writes results.json, maps.npz, report.md and the figures to the work directory."""
    started = time.monotonic()
    goals = np.stack([target(name, config.image_size) for name in config.targets])
    if config.shuffled:
        order = np.random.default_rng(config.seed).permutation(config.image_size**2)
        goals = goals.reshape(len(goals), -1)[:, order].reshape(goals.shape)
    side = FEATURE_SIZE + 2 * config.readout_padding - config.kernel + 1
    border = ((0, 0), *((config.readout_padding,) * 2,) * 2, (0, 0))
    stages = {name: _stages(config, name) for name in config.encoders}
    profiles = defaultdict(list)  # the same for the exact readout of the first target, ring by ring
    values = defaultdict(list)  # (encoder, weights, padding, readout, target, data) -> one dict of per-image scores a seed
    maps, residual = {f"target/{name}": goal for name, goal in zip(config.targets, goals)}, 0.0

    combinations = list(itertools.product(range(config.seed, config.seed + config.seeds), _encoders(config)))
    with progress(len(combinations), "encoders read out") as advance:
        for seed, (name, origin, fill) in combinations:
            if name == CONTROL:  # the first of each seed
                images = _images(config, seed)
                everything = np.concatenate(list(images.values()))
                features = image_features(everything, config.pixels)
            else:
                if fill == config.paddings[0]:
                    variables = _variables(config, name, stages[name], seed)
                features = encode(create_model(name, padding=fill), variables, everything, stages[name], config.pixels)
            features = np.pad(features, border)
            parts = dict(zip(images, np.split(features, np.cumsum([len(part) for part in images.values()])[:-1])))
            exact = fit_exact(parts["train"], parts["held_out"], goals, config.kernel)
            residual = max(residual, exact.residual)
            readouts = {"exact": exact}
            if name == CONTROL or fill in config.sgd_paddings:
                readouts["sgd"] = fit_sgd(parts["train"], goals, config.kernel, config.sgd_steps, seed=seed)
            for (kind, readout), data in itertools.product(readouts.items(), config.data):
                predicted = readout(jnp.asarray(parts[data])).reshape(-1, len(goals), side, side)
                upsampled = np.asarray(resize(jnp.asarray(predicted.transpose(0, 2, 3, 1)), config.image_size)).transpose(3, 0, 1, 2)
                for goal_name, goal, prediction in zip(config.targets, goals, upsampled):
                    values[name, origin, fill, kind, goal_name, data].append(scores(prediction, goal))
                    if kind == "exact" and goal_name == config.targets[0]:
                        profiles[name, origin, fill, goal_name, data].append(by_ring(prediction, goal, RINGS))
                if seed == config.seed:
                    maps[f"{name}/{fill}/{kind}/{data}"] = predicted[0].astype(np.float32)
                    maps[f"image/{data}"] = images[data][0]
            advance(1)

    rows = []
    for (name, origin, fill, kind, goal_name, data), per_seed in values.items():
        row = {"encoder": name, "weights": origin, "padding": fill, "stages": stages.get(name, ["image"]), "kernel": config.kernel,
               "readout": kind, "target": goal_name, "data": data}
        for metric in ("spc", "mae", "r2"):
            pooled = np.concatenate([seed_scores[metric] for seed_scores in per_seed])
            row[metric] = float(pooled.mean())
            row[f"{metric}_std"] = float(pooled.std(ddof=1)) if len(pooled) > 1 else None
        rows.append(row | {"n_images": len(per_seed[0]["spc"]), "n_seeds": len(per_seed)})
    means = {key: {metric: np.concatenate([of[metric] for of in per_seed]).mean(0).tolist() for metric in ("spc", "mae")}
             for key, per_seed in profiles.items()}
    results = {
        "kind": "position",
        "rows": rows,
        "rings": [dict(zip(("encoder", "weights", "padding", "target", "data"), key)) | mean for key, mean in means.items()],
        "chance_mae": {name: float(np.abs(goal - np.median(goal)).mean()) for name, goal in zip(config.targets, goals)},
        "ridge_residual": residual,
        "decisions": list(DECISIONS),
        "seconds": round(time.monotonic() - started, 1),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **maps)
    workdir.write(folder / "maps.npz", buffer.getvalue())
    workdir.write_json(folder / "results.json", results)
    report.write(folder)
