"""Does a readout of position follow the frame or the content?

    python -m experiments.position_shift --workdir runs/position_shift
        [--photographs FOLDER] [--seeds 3] [--paddings zeros ...]

A readout is fitted as in the position study, on encoders with random weights; then the content of
the image is moved. There are two kinds of scenes. In "photograph", a window moves over an unseen
photograph, so the content moves through the fixed frame. In "object", a piece of a photograph moves
over a gray image.

The predicted map of horizontal position (H), averaged over rows, is regressed on a pixel's place x
in the frame and on its place u in the scene, both in widths of the frame: H = frame x + scene u +
constant. The slopes (frame, scene) are

- (1, 0) for a readout of the absolute position;
- (0, 1) for a readout that follows the content: its prediction changes by as much as the content
  has moved;
- (0, 0) for a readout that knows nothing.

Finished encoders are not computed again. Writes report.md, shift.json and shift.png.
"""

import itertools
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cnnjax import study
from cnnjax.data import photographs
from cnnjax.nn import FILLS
from cnnjax.position.encoder import encode, random_encoder
from cnnjax.position.metrics import scores
from cnnjax.position.readout import fit_exact
from cnnjax.position.study import upsample
from cnnjax.position.targets import target
from cnnjax.runtime import tables

# Sides of the image and of the object, in pixels.
_SIZE = 192
_OBJECT = 64
# Shifts in pixels, multiples of every stage's stride. The object moves from the right end to the
# left end.
_SHIFTS = tuple(range(0, _SIZE - _OBJECT + 1, 32))
# Numbers of crops to fit to and to hold out; proportions of photographs for fitting, for holding
# out, and for the test.
_COUNTS = (24, 6)
_PARTS = (6, 2, 5)
# Test photographs whose scenes are encoded together, to limit memory. Without --photographs, there
# are five.
_TOGETHER = 5
ENCODERS = ("resnet18", "vgg11")
KINDS = ("photograph", "object")


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    encoder: str
    padding: str
    seed: int


def add_options(parser):
    parser.add_workdir("runs/position_shift")
    parser.add_photographs()
    parser.add_count("seeds", 3, "repetitions, each with its own weights, photographs and crops")
    parser.add_names("paddings", FILLS, ["zeros", "none", "reflect", "replicate", "circular"])
    parser.add_names("encoders", ENCODERS)


def load(options) -> list[pathlib.Path]:
    """Lists the photographs; raises `ValueError` if they are too few or one is too small."""
    paths = photographs.list_photographs(options.photographs)
    # Too few are refused here.
    photographs.split(paths, _PARTS, 0)
    for path in paths:
        check_size(path, *photographs.image_size(path))
    return paths


def check_size(path: pathlib.Path, height: int, width: int) -> None:
    """Raises `ValueError` if a photograph is too small for its scenes."""
    least = _SIZE + _SHIFTS[-1]
    if height < _SIZE or width < least:
        raise ValueError(f"photographs: {path} is {height}x{width}, smaller than {_SIZE}x{least}")


def draws(point: Point, options) -> bool:
    """Tells whether a point has more photographs to fit to than crops, and draws from them."""
    paths, _ = photographs.find_photographs(options.photographs)
    *fitting, _ = photographs.split(paths, _PARTS, point.seed)
    return photographs.is_random_choice(fitting, _COUNTS)


def points(options):
    grid = itertools.product(options.encoders, options.paddings, range(options.seeds))
    return itertools.starmap(Point, grid)


# --- One encoder ----------------------------------------------------------------------------------


def scenes(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Moves the content of a photograph further to the left with each shift.

    Returns uint8 [shifts, size, size, 3] by kind. "photograph" contains windows from the middle of
    the photograph, "object" the middle of the first window, on gray. Raises `ValueError` if the
    photograph is too small.
    """
    image = photographs.read_image(path)
    check_size(path, *image.shape[:2])
    width = _SIZE + _SHIFTS[-1]
    top = (image.shape[0] - _SIZE) // 2
    left = (image.shape[1] - width) // 2
    strip = image[top : top + _SIZE, left : left + width]
    low = (_SIZE - _OBJECT) // 2
    piece = strip[low : low + _OBJECT, low : low + _OBJECT]
    objects = np.full((len(_SHIFTS), _SIZE, _SIZE, 3), 128, np.uint8)
    for frame, shift in zip(objects, _SHIFTS):
        at = _SIZE - _OBJECT - shift
        frame[low : low + _OBJECT, at : at + _OBJECT] = piece
    windows = [strip[:, shift : shift + _SIZE] for shift in _SHIFTS]
    return {"photograph": np.stack(windows), "object": objects}


def slopes(maps: np.ndarray, kind: str) -> tuple[float, float]:
    """Regresses predictions on a pixel's place in the frame and in the scene.

    The fit is least squares over all pixels of a photograph, or over those of the object.

    Args:
      maps: the predictions of one scene [shifts, size, size].
      kind: one of `KINDS`.

    Returns the two slopes; a slope of 1 is that of H itself.
    """
    if kind == "object":
        low = (_SIZE - _OBJECT) // 2
        maps = maps[:, low : low + _OBJECT]
    rows = maps.mean(1)
    place = np.broadcast_to(np.arange(_SIZE), rows.shape)
    scene = place + np.reshape(_SHIFTS, (-1, 1))
    mask = np.ones(rows.shape, bool)
    if kind == "object":
        # The object covers these places of the scene, whatever the shift.
        mask = (scene >= _SIZE - _OBJECT) & (scene < _SIZE)
    regressors = [place[mask] / (_SIZE - 1), scene[mask] / (_SIZE - 1), np.ones(mask.sum())]
    values = rows[mask].astype(np.float64)
    coefficients, *_ = np.linalg.lstsq(np.stack(regressors, 1), values, rcond=None)
    frame, content, _ = coefficients
    return float(frame), float(content)


def encode_all(
    point: Point, images: list[np.ndarray], groups: list[list[pathlib.Path]]
) -> Iterator[np.ndarray]:
    """Encodes images, then the scenes of photographs, group by group.

    Args:
      point: the encoder, which has random weights.
      images: arrays of images, each uint8 [n, size, size, 3]; encoded with the first group.
      groups: the photographs whose scenes are encoded together.

    Yields one array [images, 28, 28, channels] for each array of `images`, then one for each scene:
    group by group, in a group kind by kind, in a kind photograph by photograph.
    """
    model, variables, stages = random_encoder(point.encoder, point.padding, _SIZE, point.seed)
    parts = list(images)
    first = 0
    for group in groups:
        moved = [scenes(path) for path in group]
        for kind in KINDS:
            parts += [scene[kind] for scene in moved]
        together = np.concatenate(parts)
        features = encode(model, variables, together, stages, first=first)
        ends = np.cumsum([len(part) for part in parts])
        yield from np.split(features, ends[:-1])
        first += len(together)
        parts = []


def follow(readout, kind: str, path: pathlib.Path, features: np.ndarray) -> dict:
    """Reads H from the features of a scene, and computes the slopes.

    Returns the kind, the photograph, R2, both slopes, and the profile at every eighth column.
    """
    [maps] = upsample(readout(features), _SIZE, align_corners=True)
    frame, scene = slopes(maps, kind)
    return {
        "kind": kind,
        "photograph": path.stem,
        "r2": float(scores(maps, target("H", _SIZE))["r2"].mean()),
        "frame": frame,
        "scene": scene,
        "profile": maps.mean(1)[:, ::8].tolist(),
    }


def measure(point: Point, options, paths: list[pathlib.Path]) -> dict:
    """Fits the readout of an encoder with random weights, and tests it on every scene."""
    *fitting, test = photographs.split(paths, _PARTS, point.seed)
    images = []
    for number, (part, count) in enumerate(zip(fitting, _COUNTS)):
        # Crops to fit to and held-out crops are drawn with different seeds.
        images.append(photographs.random_crops(part, count, _SIZE, 2 * point.seed + number))
    groups = [test[start : start + _TOGETHER] for start in range(0, len(test), _TOGETHER)]
    # `encode_all` yields the crops to fit to, the held-out crops, then the scenes in the order of
    # the loops below.
    features = encode_all(point, images, groups)
    train, held_out = itertools.islice(features, 2)
    readout = fit_exact(train, held_out, target("H", _SIZE)[None])
    followed: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for group in groups:
        for kind, path in itertools.product(KINDS, group):
            followed[kind].append(follow(readout, kind, path, next(features)))
    # All photographs come first, then all objects.
    return {"scenes": list(itertools.chain(*followed.values()))}


# --- Report ---------------------------------------------------------------------------------------


def scenes_of(results: list[dict], kind: str, **fields) -> list[dict]:
    """Returns the scenes of one kind from all selected results."""
    scenes = []
    for result in study.select(results, **fields):
        scenes += study.select(result["scenes"], kind=kind)
    return scenes


def tabulate(results: list[dict]) -> str:
    lines = []
    grid = itertools.product(
        study.unique(results, "encoder"), study.unique(results, "padding"), KINDS
    )
    for encoder, padding, kind in grid:
        scenes = scenes_of(results, kind, encoder=encoder, padding=padding)
        encoders = len(study.select(results, encoder=encoder, padding=padding))
        spread = {key: tables.spread(study.values(scenes, key), 2) for key in ("frame", "scene")}
        r2 = ""
        if kind == "photograph":
            r2 = tables.spread(study.values(scenes, "r2"), 2)
        count = f"{len(scenes)} ({encoders})"
        lines.append([encoder, padding, kind, spread["frame"], spread["scene"], r2, count])
    header = ["encoder", "padding", "content", "frame", "scene", "R2", "n (encoders)"]
    return tables.table(header, lines)


def draw(results: list[dict]) -> Figure:
    """Draws, for each encoder, the profiles under each padding and the slopes of each kind."""
    encoders = study.unique(results, "encoder")
    paddings = study.unique(results, "padding")
    widths = [1] * len(paddings) + [1.3] * len(KINDS)
    figure = Figure(figsize=(2.3 * len(paddings) + 5.5, 2.7 * len(encoders)), layout="constrained")
    axes = figure.subplots(len(encoders), len(widths), squeeze=False, width_ratios=widths)
    for axis_row, encoder in zip(axes, encoders):
        for axis, padding in zip(axis_row, paddings):
            draw_profiles(axis, scenes_of(results, "photograph", encoder=encoder, padding=padding))
            axis.set_title(f"{encoder}, {padding}")
        for axis, kind in zip(axis_row[len(paddings) :], KINDS):
            by_padding = [
                scenes_of(results, kind, encoder=encoder, padding=padding) for padding in paddings
            ]
            draw_slopes(axis, by_padding)
            axis.set_xticks(range(len(paddings)), paddings, fontsize=7)
            axis.set_title(f"{encoder}, {kind}")
        axis_row[0].set_ylabel("H as predicted")
    axes[0, 0].legend(fontsize=6)
    return figure


def draw_profiles(axis, scenes: list[dict]) -> None:
    """Draws the mean prediction along the frame, one line for each shift."""
    profiles = study.values(scenes, "profile").mean(0)
    shades = np.linspace(0, 0.85, len(_SHIFTS))
    colors = matplotlib.colormaps["viridis"](shades)
    for profile, shift, color in zip(profiles, _SHIFTS, colors):
        axis.plot(range(0, _SIZE, 8), profile, color=color, label=f"moved {shift} px")
    axis.plot([0, _SIZE - 1], [0, 1], color="black", lw=0.5, ls=":")
    axis.set(ylim=(-0.1, 1.1), xlabel="place in the frame, px")


def draw_slopes(axis, by_padding: list[list[dict]]) -> None:
    """Draws both slopes as bars, one pair for each padding."""
    series = {}
    for key in ("frame", "scene"):
        series[key] = [study.values(scenes, key) for scenes in by_padding]
    study.draw_bars(axis, series)
    axis.axhline(0, color="black", lw=0.5)
    axis.set_ylabel("slope")
    axis.legend(fontsize=7)


def report(results: list[dict], options) -> study.Report:
    text = f"""# Does the readout follow the frame or the content?

Random weights, exact readout of H, images of {_SIZE} px whose content moves by {_SHIFTS[0]} to
{_SHIFTS[-1]} px. Mean ± sample standard deviation over scenes, each a photograph that was not
fitted to, read by one of the encoders. Frame 1 and scene 0: the readout knows the absolute
position. Frame 0 and scene 1: it goes by content, and its prediction moves with it. R2 is that of H
on the moving windows: near 0 or below, there is little that could follow anything. On the object,
"frame" is how the prediction on it changes as it moves, and "scene" how it changes from its left to
its right: its edges against the gray are content as well.

{tabulate(results)}
![Predicted H as the content moves](shift.png)
"""
    return study.Report(text, {"shift.png": draw(results)})


STUDY = study.Study(
    description=__doc__,
    results="shift.json",
    add_options=add_options,
    axes=("paddings", "encoders", "seeds"),
    files=("photographs",),
    load=load,
    points=points,
    measure=measure,
    report=report,
    draws=draws,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
