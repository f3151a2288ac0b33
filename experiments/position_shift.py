"""Does a readout of position follow the frame or the content? It is fitted as in the position
study; then the content is moved.

    python -m experiments.position_shift --workdir runs/position_shift
        [--photographs FOLDER] [--seeds 3] [--paddings zeros ...]

The encoders have random weights. A window moves over a photograph it has not seen: the frame stays,
the content wanders through it. Or a piece of a photograph wanders over a gray image. The map of H
that is predicted, averaged over rows, is regressed on a pixel's place in the frame and on its place
in the scene, both in widths of the frame: H = frame x + scene u + constant. A readout of the
absolute position has (1, 0); one that goes by content has (0, 1): its prediction changes by as much
as the content has moved; one that knows nothing has (0, 0). A cell that is finished is not computed
again. Writes report.md, shift.json and shift.png.
"""

import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.nn import FILLS, resize
from cnnjax.position.encoder import encode, reachable_stages
from cnnjax.position.metrics import scores
from cnnjax.position.readout import fit_exact
from cnnjax.position.targets import target
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.runtime.progress import progress

_SIZE, _OBJECT = 192, 64  # px
_SHIFTS = tuple(
    range(0, _SIZE - _OBJECT + 1, 32)
)  # px, multiples of every stage's stride; the object goes from the right end to the left
_COUNTS, _PARTS = (
    (24, 6),
    (6, 2, 5),
)  # crops for training and held out; shares of the photographs for these and the test
ENCODERS = ("resnet18", "vgg11")
KINDS = ("photograph", "object")


def scenes(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Moved content, uint8 [shifts, size, size, 3] by kind: in each image it lies further to the
    left by its shift.

    "photograph": windows of its middle. "object": the middle of the first window, on gray. Raises
    `ValueError` for a photograph that is too small.
    """
    image, width = photographs.read_image(path), _SIZE + _SHIFTS[-1]
    top, left = ((has - needs) // 2 for has, needs in zip(image.shape, (_SIZE, width)))
    if min(top, left) < 0:
        raise ValueError(
            f"photographs: {path} is {image.shape[0]}x{image.shape[1]}, smaller than "
            f"{_SIZE}x{width}"
        )
    strip, low = image[top : top + _SIZE, left : left + width], (_SIZE - _OBJECT) // 2
    objects = np.full((len(_SHIFTS), _SIZE, _SIZE, 3), 128, np.uint8)
    for frame, shift in zip(objects, _SHIFTS):
        at = _SIZE - _OBJECT - shift
        frame[low : low + _OBJECT, at : at + _OBJECT] = strip[
            low : low + _OBJECT, low : low + _OBJECT
        ]
    return {
        "photograph": np.stack([strip[:, shift : shift + _SIZE] for shift in _SHIFTS]),
        "object": objects,
    }


def slopes(maps: np.ndarray, kind: str) -> tuple[float, float]:
    """How predicted maps [shifts, size, size] of one scene change with a pixel's place in the frame
    and with its place in the scene.

    Least squares over all pixels of a photograph, or over those of the object. 1 is as much as H
    changes.
    """
    low = (_SIZE - _OBJECT) // 2
    rows = maps.mean(1) if kind == "photograph" else maps[:, low : low + _OBJECT].mean(1)
    place, shift = np.broadcast_to(np.arange(_SIZE), rows.shape), np.reshape(_SHIFTS, (-1, 1))
    scene = place + shift
    taken = (kind == "photograph") | ((scene >= _SIZE - _OBJECT) & (scene < _SIZE))
    design = np.stack(
        [place[taken] / (_SIZE - 1), scene[taken] / (_SIZE - 1), np.ones(taken.sum())], 1
    )
    frame, content, _ = np.linalg.lstsq(design, rows[taken].astype(np.float64), rcond=None)[0]
    return float(frame), float(content)


def cell(
    encoder: str, padding: str, stages: list[str], seed: int, paths: list[pathlib.Path]
) -> dict:
    """One encoder with random weights: R2 of the windows of unseen photographs, and the slopes of
    each scene."""
    parts = photographs.split(paths, _PARTS, seed)
    images = [
        photographs.crops(part, count, _SIZE, 2 * seed + number)
        for number, (part, count) in enumerate(zip(parts, _COUNTS))
    ]
    moved = [scenes(path) for path in parts[2]]
    images += [scene[kind] for kind in KINDS for scene in moved]
    model = create_model(encoder, padding=padding)
    init = jax.jit(
        lambda key: model.init(
            key, jnp.zeros((1, _SIZE, _SIZE, 3)), method="stages", last=stages[-1]
        )
    )
    features = encode(model, init(jax.random.key(seed)), np.concatenate(images), stages)
    train, held_out, *rest = np.split(features, np.cumsum([len(part) for part in images])[:-1])
    readout, goal, found = (
        fit_exact(train, held_out, target("H", _SIZE)[None]),
        target("H", _SIZE),
        [],
    )
    upsample = jax.jit(lambda maps: resize(maps, _SIZE))
    for number, part in enumerate(rest):
        kind = KINDS[number // len(moved)]
        maps = np.asarray(upsample(readout(part).transpose(0, 2, 3, 1)))[..., 0]
        found.append(
            {
                "kind": kind,
                "photograph": parts[2][number % len(moved)].stem,
                "r2": float(scores(maps, goal)["r2"].mean()),
            }
            | dict(zip(("frame", "scene"), slopes(maps, kind)))
            | {"profile": maps.mean(1)[:, ::8].tolist()}
        )
    return {"encoder": encoder, "padding": padding, "seed": seed, "scenes": found}


def write(folder: pathlib.Path, rows: list[dict]) -> str:
    """Writes the results, the report and the figure; returns the table."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    encoders, paddings = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("encoder", "padding")
    )
    size, widths = (
        (2.3 * len(paddings) + 5.5, 2.7 * len(encoders)),
        [1] * len(paddings) + [1.3, 1.3],
    )
    figure, axes = pyplot.subplots(
        len(encoders),
        len(widths),
        figsize=size,
        squeeze=False,
        layout="constrained",
        width_ratios=widths,
    )
    lines = []
    for axis_row, encoder in zip(axes, encoders):
        for number, padding in enumerate(paddings):
            mine = [row for row in rows if (row["encoder"], row["padding"]) == (encoder, padding)]
            for panel, kind in enumerate(KINDS):
                found = [scene for row in mine for scene in row["scenes"] if scene["kind"] == kind]
                values = {key: [scene[key] for scene in found] for key in ("frame", "scene", "r2")}
                lines.append(
                    [
                        encoder,
                        padding,
                        kind,
                        *(tables.spread(values[key], 2) for key in ("frame", "scene")),
                        tables.spread(values["r2"], 2) if kind == "photograph" else "",
                        f"{len(found)} ({len(mine)})",
                    ]
                )
                for shift, key in ((-0.2, "frame"), (0.2, "scene")):
                    axis_row[len(paddings) + panel].bar(
                        number + shift,
                        np.mean(values[key]),
                        0.4,
                        yerr=tables.bar(values[key]),
                        color="C0" if key == "frame" else "C1",
                        label=None if number else key,
                    )
            profiles = np.mean(
                [
                    scene["profile"]
                    for row in mine
                    for scene in row["scenes"]
                    if scene["kind"] == "photograph"
                ],
                0,
            )
            for profile, shift, shade in zip(profiles, _SHIFTS, np.linspace(0, 0.85, len(_SHIFTS))):
                axis_row[number].plot(
                    range(0, _SIZE, 8),
                    profile,
                    color=pyplot.get_cmap("viridis")(shade),
                    label=f"moved {shift} px",
                )
            axis_row[number].plot([0, _SIZE - 1], [0, 1], color="black", lw=0.5, ls=":")
            axis_row[number].set(
                title=f"{encoder}, {padding}", ylim=(-0.1, 1.1), xlabel="place in the frame, px"
            )
        for axis, kind in zip(axis_row[len(paddings) :], KINDS):
            axis.set_xticks(range(len(paddings)), paddings, fontsize=7)
            axis.axhline(0, color="black", lw=0.5)
            axis.set(title=f"{encoder}, {kind}", ylabel="slope")
            axis.legend(fontsize=7)
        axis_row[0].set_ylabel("H as predicted")
    axes[0, 0].legend(fontsize=6)
    workdir.write_figure(folder / "shift.png", figure)
    pyplot.close(figure)
    table = tables.table(
        ["encoder", "padding", "content", "frame", "scene", "R2", "n (encoders)"], lines
    )
    workdir.write_json(folder / "shift.json", rows)
    workdir.write(
        folder / "report.md",
        f"""# Does the readout follow the frame or the content?

Random weights, exact readout of H, images of {_SIZE} px whose content moves by {_SHIFTS[0]} to
{_SHIFTS[-1]} px. Mean ± sample standard deviation over scenes, each a photograph that was not
fitted to, read by one of the encoders. Frame 1 and scene 0: the readout knows the absolute
position. Frame 0 and scene 1: it goes by content, and its prediction moves with it. R2 is that of H
on the moving windows: near 0 or below, there is little that could follow anything. On the object,
"frame" is how the prediction on it changes as it moves, and "scene" how it changes from its left to
its right: its edges against the gray are content as well.

{table}
![Predicted H as the content moves](shift.png)
""",
    )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/position_shift")
    parser.add_photographs()
    parser.add_count("seeds", 3, "of weights, photographs and crops")
    parser.add_argument(
        "--paddings",
        nargs="+",
        choices=FILLS,
        default=["zeros", "none", "reflect", "replicate", "circular"],
    )
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        paths = photographs.list_photographs(options.photographs)
        photographs.split(paths, _PARTS, 0)
        for path in paths:
            scenes(path)  # refuses one that is too small
        folder, rows = workdir.prepare(options.workdir, {"photographs": options.photographs}), []
        with progress(
            options.seeds * len(options.encoders) * len(options.paddings), "encoders"
        ) as done:
            for encoder in options.encoders:
                stages = reachable_stages(
                    create_model(encoder, padding="none"), _SIZE
                )  # the same for every padding
                for padding, seed in itertools.product(options.paddings, range(options.seeds)):
                    path = folder / "cells" / f"{encoder}_{padding}_{seed}.json"
                    rows.append(workdir.finished(path, cell, encoder, padding, stages, seed, paths))
                    done(1)
        print(write(folder, rows))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
