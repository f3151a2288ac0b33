"""The command line: python -m cnnjax.visualize COMMAND.

A command writes COMMAND.png and results.json to its work directory. What it looks at is a
registered network with weights (--model, --weights) or a finished training run (--run).
"""

import argparse
import dataclasses
import sys
import time

from cnnjax.runtime import command


@dataclasses.dataclass(frozen=True)
class _Command:
    """A command's description for its help, and its options.

    `images` is its default number of photographs: 0 for all, None if it needs none.
    """

    description: str
    images: int | None
    options: tuple[str, ...] = ()


_COMMANDS = {
    "filters": _Command("the kernels of the first convolution", None),
    "activations": _Command("maps of stages on photographs", 1, ("stages", "channels")),
    "maximise": _Command(
        "images that excite channels most", None, ("stages", "channels", "ascent")
    ),
    "patches": _Command(
        "the nine patches that excite each channel most, and their deconvolution",
        0,
        ("stage", "channels"),
    ),
    "occlusion": _Command(
        "the predicted class's probability while a gray square hides parts", 4, ("label", "square")
    ),
    "grad-cam": _Command("image regions that support the predicted class", 6, ("stage", "label")),
    "saliency": _Command("the gradient of the predicted class's score by pixel", 6, ("label",)),
    "field": _Command("effective receptive fields against theoretical ones", 32, ("stages",)),
    "equivariance": _Command(
        "the error of shifted features by distance to the border, for every padding",
        4,
        ("stages",),
    ),
    "levels": _Command(
        "low-, mid- and high-level features: three stages", 0, ("stages", "channels", "ascent")
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code (`cnnjax.runtime.command.run`)."""
    options = _parse(arguments)
    return command.run(lambda: _work(options))


def _parse(arguments):
    # Listed here, since Python 3.13 lays out argparse's own list of commands in another way.
    width = max(len(name) for name in _COMMANDS)
    listed = "".join(f"\n  {name:<{width}}  {_COMMANDS[name].description}" for name in _COMMANDS)
    top = command.Parser(
        prog="python -m cnnjax.visualize",
        description=f"Visualize what a network responds to. COMMAND is one of\n{listed}",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, entry in _COMMANDS.items():
        description = f"Shows {entry.description}."
        parser = commands.add_parser(name, description=description)
        parser.set_defaults(stages=None, channels=None, images=None, label=None)
        _add_subject(parser)
        if entry.images is not None:
            _add_photographs(parser, entry.images)
        for group in entry.options:
            _GROUPS[group](parser)
        parsers[name] = parser
    options = top.parse_args(arguments)
    _check_subject(parsers[options.command], options)
    return options


def _add_subject(parser):
    add = parser.add_argument
    add("--model", help="a registered name, such as squeezenet1_1, or FILE.py:NAME")
    add(
        "--weights",
        metavar="FILE",
        help="a safetensors or .pth file with torchvision's names; 'imagenet' (from PyTorch's "
        "cache, the Hugging Face hub, or torchvision's server); or 'random'",
    )
    add(
        "--run",
        metavar="FOLDER",
        help="a finished training run, in place of --model and --weights",
    )
    add(
        "--missing",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE",
        help="modules that the file is known not to hold",
    )
    add("--padding", help="fill of every convolution and pool (default: zeros, or the run's)")
    add(
        "--sampling",
        help="how strides downsample: stride, blur, blur5 or aps (default: stride, or the run's)",
    )
    add(
        "--every_layer",
        action="store_true",
        help="for a VGG, make every convolution a stage: conv1_1, conv1_2, ...",
    )
    add(
        "--workdir",
        type=command.path,
        required=True,
        metavar="FOLDER",
        help="where the figure and the numbers are written",
    )


def _check_subject(parser, options):
    named = {"--model": options.model, "--weights": options.weights}
    if options.run is None:
        missing = [name for name, value in named.items() if value is None]
        if missing:
            parser.error(
                f"the following arguments are required: {', '.join(missing)} (or --run FOLDER)"
            )
        if options.weights == "random" and options.missing:
            parser.error("--missing is for a file of weights; --weights=random has no file")
        return
    named["--missing"] = options.missing or None
    superfluous = [name for name, value in named.items() if value is not None]
    if superfluous:
        parser.error(f"--run names the network and its weights; leave out {', '.join(superfluous)}")


def _add_photographs(parser, images):
    parser.add_photographs()
    parser.add_argument(
        "--images",
        type=command.whole_number(1),
        default=images,
        metavar="N",
        help=f"photographs, evenly spread (default: {images or 'all'})",
    )


def _add_stages(parser):
    parser.add_argument(
        "--stages",
        nargs="+",
        action="extend",
        metavar="STAGE",
        help="stages to look at (default: all that yield maps; for levels, three evenly spread)",
    )


def _add_stage(parser):
    parser.add_argument(
        "--stage",
        dest="stages",
        nargs=1,
        required=True,
        metavar="STAGE",
        help="a stage of the network (required)",
    )


def _add_channels(parser):
    parser.add_argument(
        "--channels",
        nargs="+",
        action="extend",
        type=command.whole_number(0),
        metavar="N",
        help="channels of the stages (default: some evenly spread)",
    )


def _add_label(parser):
    parser.add_argument(
        "--label",
        metavar="CLASS",
        help="the class to explain, by its name or its number (default: the predicted one)",
    )


def _add_ascent(parser):
    parser.add_count("steps", 256, "steps of gradient ascent")
    parser.add_argument(
        "--jitter",
        type=command.whole_number(0),
        metavar="PIXELS",
        help="most pixels by which the image is shifted at each step (default: a quarter of the "
        "stage's stride)",
    )
    parser.add_argument(
        "--total_variation",
        type=_share,
        default=0.02,
        metavar="SHARE",
        help="penalty on edges: the share of the activation that one black-to-white edge across "
        "the image costs (default: %(default)s)",
    )


def _add_square(parser):
    parser.add_argument(
        "--size",
        type=command.whole_number(1),
        metavar="PIXELS",
        help="side of the square (default: 48 for images of 224 pixels, others in proportion)",
    )
    parser.add_argument(
        "--stride",
        type=command.whole_number(1),
        metavar="PIXELS",
        help="step between positions of the square, the last of which is flush with the border "
        "(default: 16 for images of 224 pixels, others in proportion)",
    )


_GROUPS = {
    "stages": _add_stages,
    "stage": _add_stage,
    "channels": _add_channels,
    "label": _add_label,
    "ascent": _add_ascent,
    "square": _add_square,
}


def _share(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _work(options: argparse.Namespace) -> None:
    started = time.monotonic()
    import numpy as np

    from cnnjax.runtime import backend, files, workdir
    from cnnjax.visualize.subject import Subject

    backend.start()
    subject = Subject(options)
    if options.command == "occlusion":
        _set_square(options, subject.model.input_shape)
    with workdir.prepared(options.workdir, _record(options)) as folder:
        figure, numbers = _look(subject)
        files.write_figure(folder / f"{options.command}.png", figure)
        seconds = round(time.monotonic() - started, 1)
        results = {"kind": options.command} | numbers | {"seconds": seconds}
        # Arrays, and numbers of NumPy, become lists and numbers.
        files.write_json(folder / "results.json", results, lambda value: np.asarray(value).tolist())
    print(f"see {folder / options.command}.png")


def _set_square(options, input_shape):
    """Sets the side and the stride of the occluding square where the options leave them out."""
    scale = min(input_shape[:2]) / 224
    if options.size is None:
        options.size = max(1, round(48 * scale))
    if options.stride is None:
        options.stride = max(1, round(16 * scale))


def _look(subject):
    """Runs a command; returns its figure and its numbers."""
    from flax import errors

    from cnnjax.visualize.commands import COMMANDS

    options = subject.options
    unfit = (
        errors.ScopeCollectionNotFound,
        errors.ScopeParamNotFoundError,
        errors.ScopeParamShapeError,
        errors.ScopeVariableNotFoundError,
    )
    try:
        return COMMANDS[options.command](subject)
    except unfit as error:
        reason = str(error).partition("\n")[0]
        origin = f"weights={options.weights!r}"
        if options.run is not None:
            origin = f"the weights of run={str(options.run)!r}"
        raise ValueError(
            f"{origin} do not hold all that {options.command} needs: {reason}"
        ) from error


def _record(options):
    """Returns the configuration that the work directory keeps.

    Options that were added later are left out if they are not set, so that older work directories
    still match.
    """
    unrecorded = ("debug", "workdir")
    config = {key: value for key, value in vars(options).items() if key not in unrecorded}
    for name in ("label", "sampling"):
        if config[name] is None:
            del config[name]
    if options.run is None:
        del config["run"]
        config["padding"] = options.padding or "zeros"
    return config


if __name__ == "__main__":
    sys.exit(main())
