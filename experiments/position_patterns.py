"""What padding does without any readout: the pattern it leaves in the features, and how often which
pixel is read.

    python -m experiments.position_patterns --workdir runs/patterns [--photographs FOLDER]
        [--encoders resnet18 ...] [--trained squeezenet1_1 FILE]
        [--trained resnet18 FILE layer4 fc] ...

The features of a crop of a photograph, less those of the same pixels inside the photograph, are
what the padding did: how strong it is, how much of it all photographs share, how far it reaches,
for random weights and for those of a safetensors file (followed by the modules that the file is
known not to hold; the stages before those are then compared). Photographs are scaled and cut to the
size that a network needs around the crop. Each seed has random weights and photographs of its own.
Then, by arithmetic: which image sizes every strided layer reads to the same distance on both sides,
and the map of how often each pixel is read. Finished cells are not computed again. Writes
report.md, results.json, patterns.png, distances.png and reads.png.
"""

import functools
import json
import pathlib
import sys

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageOps
import scipy.ndimage
from matplotlib.figure import Figure

from cnnjax import weights
from cnnjax.data import photographs
from cnnjax.models import Network, create_model
from cnnjax.nn import output_size
from cnnjax.position import patterns
from cnnjax.position.encoder import stage_shapes
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.runtime.progress import progress
from cnnjax.summary import receptive_field

PADDINGS = ("zeros", "partial", "reflect", "replicate", "circular")
READ_BY, SIZES, SHOWN = ("resnet18", "vgg16", "mobilenet_v2"), range(193, 257), (224, 225)
_READ_FILLS = ("zeros", "none", "partial", "reflect", "replicate", "circular", "full")
_SMOOTH = 9  # pixels, in the figure of reads: a stride reads every second pixel more often
_LARGEST_MAP = 28  # positions: larger patterns are not kept


def known_stages(model: Network, size: int, missing: tuple[str, ...]) -> list[str]:
    """The stages that need none of the missing modules; raises `ValueError` if there are none."""
    shapes = weights.variable_shapes(model)
    held = {
        kind: {
            name: tree
            for name, tree in shapes.get(kind, {}).items()
            if name.split(".")[0] not in missing
        }
        for kind in shapes
    }
    image, names = (
        jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
        list(stage_shapes(model, size)),
    )
    while names:
        try:
            return list(
                jax.eval_shape(
                    functools.partial(model.apply, method="stages", last=names[-1]), held, image
                )
            )
        except flax.errors.FlaxError:  # of a class that depends on what is absent
            names.pop()
    raise ValueError(f"no stage of the network can do without its modules {', '.join(missing)}")


class Subject:
    """One network with one origin of its weights: `random`, or a file."""

    def __init__(self, name: str, size: int, file: str | None, missing: tuple[str, ...]):
        self.name, self.file, self.missing, self.size = name, file, missing, size
        self.model = create_model(name)
        self.origin = "random" if file is None else "trained"
        self.stages = known_stages(self.model, size, missing)
        self.margin = max(patterns.margin(self.model, stage, size) for stage in self.stages)
        step = receptive_field(self.model, self.stages[-1]).step[0]
        self.margin = -(-self.margin // step) * step
        image = jnp.zeros((1, 64, 64, 3))
        self.init = jax.jit(
            lambda key: self.model.init(key, image, method="stages", last=self.stages[-1])
        )
        self.loaded = file and weights.load_torchvision(file, self.model, missing)

    def variables(self, seed: int) -> dict:
        return self.loaded or self.init(jax.random.key(seed))

    def cells(self, seed: int, paths: list[pathlib.Path], paddings: list[str]) -> dict[str, dict]:
        """A cell for each padding, on one seed's weights and photographs."""
        side, variables = self.size + 2 * self.margin, self.variables(seed)
        scaled = [
            PIL.ImageOps.fit(
                PIL.Image.fromarray(photographs.read_image(path)),
                (side, side),
                PIL.Image.Resampling.BICUBIC,
            )
            for path in paths
        ]
        context = np.stack([np.asarray(image) for image in scaled])
        crop = context[:, self.margin : -self.margin, self.margin : -self.margin]
        inside, found = (
            patterns.features_inside(self.model, variables, context, self.size, self.stages),
            {},
        )
        for padding in paddings:
            padded, rows = (
                patterns.features(self.model.clone(padding=padding), variables, crop, self.stages),
                [],
            )
            for stage in self.stages:
                row = patterns.strength(padded[stage], inside[stage])._asdict()
                small = len(row["pattern"]) <= _LARGEST_MAP
                step = receptive_field(self.model, stage).step[0]
                rows.append(
                    row
                    | {
                        "stage": stage,
                        "step": step,
                        "profile": row["profile"].tolist(),
                        "pattern": row["pattern"].tolist() if small else None,
                    }
                )
            found[padding] = {
                "encoder": self.name,
                "weights": self.origin,
                "padding": padding,
                "seed": seed,
                "images": len(paths),
                "stages": rows,
            }
        return found


def _strengths(folder: pathlib.Path, cells: list[dict]) -> str:
    """The figures of the patterns and the distances -> the table."""
    subjects = list(dict.fromkeys((row["encoder"], row["weights"]) for row in cells))
    paddings, lines = list(dict.fromkeys(row["padding"] for row in cells)), []
    maps = Figure(figsize=(2 * len(paddings) + 0.5, 2.2 * len(subjects)), layout="constrained")
    curves = Figure(figsize=(3.6 * len(subjects), 3.4), layout="constrained")
    map_axes = maps.subplots(len(subjects), len(paddings), squeeze=False)
    curve_axes = curves.subplots(1, len(subjects), squeeze=False, sharey=True)[0]
    for subject, row_of_axes, curve_axis in zip(subjects, map_axes, curve_axes):
        by_padding = {
            padding: [
                row["stages"]
                for row in cells
                if (row["encoder"], row["weights"], row["padding"]) == (*subject, padding)
            ]
            for padding in paddings
        }
        stages = by_padding[paddings[0]][0]
        for number, stage in enumerate(stages):
            for padding, per_seed in by_padding.items():
                rows = [of[number] for of in per_seed]
                found = (
                    tables.spread([row[key] for row in rows], 3) for key in ("mae", "snr", "shared")
                )
                lines.append([*subject, stage["stage"], padding, *found, str(len(rows))])
        shown = max(
            number for number, stage in enumerate(stages) if len(stage["profile"]) >= 7
        )  # the last of 14 positions or more
        pictures = [
            np.mean([of[shown]["pattern"] for of in per_seed], 0)
            for per_seed in by_padding.values()
        ]
        for axis, padding, picture, per_seed in zip(
            row_of_axes, paddings, pictures, by_padding.values()
        ):
            image = axis.imshow(picture, vmin=0, vmax=np.max(pictures), cmap="magma")
            axis.set(title=padding, xticks=[], yticks=[])
            profile = np.mean([of[shown]["profile"] for of in per_seed], 0)
            curve_axis.plot(
                stages[shown]["step"] * np.arange(len(profile)), profile, marker=".", label=padding
            )
        maps.colorbar(image, ax=row_of_axes)
        row_of_axes[0].set_ylabel(f"{' '.join(subject)}\n{stages[shown]['stage']}", fontsize=8)
        curve_axis.set(
            title=f"{' '.join(subject)}, {stages[shown]['stage']}",
            xlabel="distance to the border, pixels",
            yscale="log",
        )
    curve_axes[0].set_ylabel("rms difference / rms feature")
    curve_axes[-1].legend(fontsize=8)
    workdir.write_figure(folder / "patterns.png", maps)
    workdir.write_figure(folder / "distances.png", curves)
    return tables.table(
        ["encoder", "weights", "stage", "padding", "MAE", "SNR", "shared", "n"], lines
    )


def unpadded(chain: tuple[patterns.Window, ...], size: int) -> tuple[patterns.Window, ...]:
    """The first windows of a chain, as far as there is something to read without padding."""
    for number, window in enumerate(chain):
        size = output_size(size, window.kernel, window.stride, 0)
        if size < 1:
            return chain[:number]
    return chain


def blind_spots(folder: pathlib.Path) -> tuple[str, dict]:
    """The figure of how often pixels are read, the tables, and their numbers."""
    chains, lines, numbers = (
        {name: patterns.windows(create_model(name)) for name in READ_BY},
        [],
        {"unread": {}, "asymmetry": {}},
    )
    for name, chain in chains.items():
        unread = numbers["unread"][name] = {size: patterns.unread(chain, size) for size in SIZES}
        even = [str(size) for size in SIZES if not any(unread[size].values())]
        uneven = {
            size: [window for window, cells in unread[size].items() if cells] for size in SHOWN
        }
        lines.append(
            [
                name,
                str(len(unread[SHOWN[0]])),
                ", ".join(even),
                *(", ".join(uneven[size]) or "none" for size in SHOWN),
            ]
        )
    header = [
        "network",
        "strided windows",
        f"sizes {SIZES[0]} to {SIZES[-1]} that all of them read evenly",
    ]
    sizes = tables.table([*header, *(f"uneven at {size}" for size in SHOWN)], lines)
    figure, lines = Figure(figsize=(2 * len(_READ_FILLS) + 0.5, 4.4), layout="constrained"), []
    axes = figure.subplots(len(SHOWN), len(_READ_FILLS))
    for name, chain in chains.items():
        for number, size in enumerate(SHOWN):
            maps = [
                patterns.reads(unpadded(chain, size) if fill == "none" else chain, size, fill)
                for fill in _READ_FILLS
            ]
            found = numbers["asymmetry"][f"{name} at {size}"] = dict(
                zip(_READ_FILLS, map(patterns.asymmetry, maps))
            )
            lines.append([name, str(size), *(f"{100 * value:.2f}" for value in found.values())])
            if name == READ_BY[0]:
                for axis, fill, counts in zip(axes[number], _READ_FILLS, maps):
                    image = axis.imshow(
                        scipy.ndimage.uniform_filter(counts, _SMOOTH), vmin=0, vmax=2
                    )
                    axis.set(title=f"{fill}, {size}", xticks=[], yticks=[])
    figure.colorbar(
        image,
        ax=axes,
        label=f"reads of a pixel by {READ_BY[0]} / average,\naveraged over {_SMOOTH}x{_SMOOTH} "
        "pixels",
    )
    workdir.write_figure(folder / "reads.png", figure)
    return f"{sizes}\n{tables.table(['network', 'size', *_READ_FILLS], lines)}", numbers


def write(folder: pathlib.Path, cells: list[dict]) -> str:
    """Writes the results, the report and the figures; returns the tables."""
    table, (sizes, numbers) = _strengths(folder, cells), blind_spots(folder)
    workdir.write_json(folder / "results.json", {"patterns": cells, "blind_spots": numbers})
    count = min(row["images"] for row in cells)
    text = (
        "# What padding does without a readout\n\n## Patterns\n\nMean ± sample standard "
        "deviation over n seeds of photographs, "
        f"and of weights where they are random; {count} photographs or more each. MAE is the "
        "mean absolute difference that the padding "
        "makes, relative to the features; SNR its mean over photographs, absolute, over its "
        "standard deviation (with no pattern at "
        f"all {0.8 / count**0.5:.2f}); shared is the part of its energy that all photographs "
        f"have in common, from 0 to 1.\n\n{table}\n"
        "![patterns](patterns.png)\n\n![distances](distances.png)\n\n## Blind spots\n\nA strided "
        "window reads a size evenly if it "
        "leaves no row and column at the far side unread. The second table is the share of all "
        "reading, in percent, that differs "
        "between the left and the right half; ways through skips are left out, and without "
        "padding the windows behind the one that has "
        f"nothing left to read.\n\n{sizes}\n![reads](reads.png)\n"
    )
    workdir.write(folder / "report.md", text)
    return f"{table}\n{sizes}"


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/patterns")
    parser.add_photographs()
    parser.add_argument(
        "--encoders",
        nargs="*",
        default=["squeezenet1_1", "mobilenet_v2", "resnet18"],
        help="with random weights",
    )
    parser.add_trained()
    parser.add_argument("--paddings", nargs="+", choices=patterns.ALIGNED, default=list(PADDINGS))
    parser.add_count("size", 224, "pixels of the crop")
    parser.add_count("images", 12, "photographs of one seed, at most", 2)
    parser.add_count("seeds", 3, "of random weights and photographs")
    options = parser.parse_args(arguments)

    def work():
        paths = photographs.list_photographs(options.photographs)
        parts = [
            part[: options.images] for part in photographs.split(paths, (1,) * options.seeds, 0)
        ]
        if min(map(len, parts)) < 2:
            raise ValueError(
                f"images={options.images} and seeds={options.seeds} leave a seed fewer than 2 of "
                f"{len(paths)} photographs"
            )
        subjects = [
            Subject(name, options.size, None, options.trained.get(name, (None, ()))[1])
            for name in options.encoders
        ]
        subjects += [Subject(name, options.size, *rest) for name, rest in options.trained.items()]
        if not subjects:
            raise ValueError("encoders= and trained= are empty: there is no network to look at")
        config = {
            key: getattr(options, key)
            for key in ("photographs", "size", "images", "seeds", "trained")
        }
        folder = workdir.prepare(options.workdir, config)
        backend.start()
        cells = []
        with progress(len(subjects) * options.seeds, "encoders") as done:
            for subject in subjects:
                for seed in range(options.seeds):
                    files = {
                        padding: folder / f"{subject.name}-{subject.origin}-{padding}-{seed}.json"
                        for padding in options.paddings
                    }
                    if open_ones := [
                        padding for padding, path in files.items() if not path.exists()
                    ]:
                        for padding, found in subject.cells(seed, parts[seed], open_ones).items():
                            workdir.write_json(files[padding], found)
                    cells += [json.loads(path.read_text()) for path in files.values()]
                    done(1)
        print(write(folder, cells))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
