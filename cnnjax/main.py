"""Run a configuration in a work directory.

python -m cnnjax.main --config configs/posenet.py [--workdir runs/my_study] [--config.KEY=VALUE ...]

With --config FILE, --help lists the keys of that configuration and their values.
"""

import argparse
import contextlib
import logging
import os
import pathlib
import sys
import types
from collections.abc import Callable, Collection

import ml_collections

from cnnjax.runtime import backend, command, configuration, files, processes, workdir

_LOG = logging.getLogger("cnnjax")
# Keys left out of the default work directory's name, since a run may continue with other values:
# those of `cnnjax.train.adopt`, which takes long to import.
_UNNAMED_KEYS = {"skip_damaged", "workers"}


# ------------------------------------------------------------------ what is run


def job_of(config: ml_collections.ConfigDict) -> types.ModuleType:
    """Returns the module that does what the configuration's `kind` says.

    It has `check`, `adopt`, `run` and `report.write`. The training module also has
    `complete_record`, `is_equivalent` and `may_have_moved`, which sweeps use.

    Raises `ValueError` if there is no job of that kind.
    """
    # Imported when needed, so that --help does not wait for jax.
    if config.get("kind") == "train":
        from cnnjax.train import loop

        return loop
    if config.get("kind") == "position":
        from cnnjax.position import study

        return study
    raise ValueError(
        f"kind={config.get('kind')!r} of the configuration is not one of position, train"
    )


def run(
    config: ml_collections.ConfigDict, folder: pathlib.Path, overrides: Collection[str] = ()
) -> None:
    """Runs a configuration in a work directory.

    For a finished run, it only writes the report again. `overrides` are the keys that the command
    line sets.
    """
    job = job_of(config)
    backend.reach_devices()
    job.check(config, folder, overrides)
    backend.start()

    was_finished = True

    def adopt(config, folder):
        job.adopt(config, folder)
        processes.wait_for_others("the record is adopted")

    def begin(config, folder):
        nonlocal was_finished
        was_finished = False
        _LOG.info("running in %s", folder)
        job.run(config, folder)

    workdir.run_once(begin, config, folder, adopt)
    if was_finished:
        _LOG.info("%s holds the finished run", folder)
        job.report.write(folder)
    _LOG.info("finished: see %s", folder / "report.md")


def name_model_file(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Completes the name of a model of a user's file to FILE.py:NAME.

    FILE is the whole path, so that config.json tells every command that opens the run again where
    the model comes from.
    """
    # Without a model, the configuration is refused when it is checked.
    if config.get("kind") != "train" or "model" not in config:
        return config
    from cnnjax.models import base

    return configuration.override(config, {"model": base.name_with_file(config.model)})


# ------------------------------------------------------------------ the command line


def build_parser(module: str, description: str) -> command.Parser:
    """Builds a parser of the options that every command with a configuration has."""
    parser = command.Parser(
        prog=f"python -m {module}",
        usage="%(prog)s --config FILE [options] [--config.KEY=VALUE ...]",
        description=description,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a configuration file, such as configs/posenet.py"
    )
    parser.add_argument(
        "--workdir",
        type=command.path,
        metavar="FOLDER",
        help="the folder of the results (default: one under runs/, named after the configuration)",
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this help, and the keys of --config"
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
    """Reads the options, and the configuration with its changes.

    The options also hold the changes, as `overrides`.

    Raises `ValueError` if the input is bad.
    """
    options, rest = parser.parse_known_args(arguments)
    for argument in rest:
        name = argument.partition("=")[0]
        if name.startswith("--") and not name.startswith("--config."):
            known = ", ".join(f"--{option}" for option in vars(options))
            raise ValueError(
                f"{name} is not an option; there are {known}, and --config.KEY=VALUE for the keys "
                "of the configuration"
            )
    if options.config is None:
        raise ValueError(
            "--config is missing; name a configuration file, such as --config configs/posenet.py"
        )
    if not os.path.isfile(os.path.expanduser(options.config)):
        raise ValueError(
            f"config={options.config!r} is not a file; name a configuration file, such as "
            "configs/posenet.py"
        )
    original = configuration.load(options.config)
    options.overrides = configuration.parse_overrides(original, rest)
    config = name_model_file(configuration.override(original, options.overrides))
    if options.workdir is None:
        options.workdir = _default_workdir(options, original)
    return options, config


def print_help(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Prints the options and, if --config names a file, the keys of that configuration."""
    options, _ = parser.parse_known_args(arguments)
    print(parser.format_help())
    if options.config is None:
        print("  --config.KEY=VALUE  change a key of the configuration")
        return
    print(f"keys of {options.config}:")
    for key, value in configuration.flatten(configuration.load(options.config)).items():
        print(f"  --config.{key}={value}")


def _default_workdir(
    options: argparse.Namespace, original: ml_collections.ConfigDict
) -> pathlib.Path:
    """Returns runs/NAME, or runs/NAME-DIGEST for a changed configuration.

    The digest is that of the keys whose values differ from those of the configuration file. So it
    depends neither on keys that other versions have, nor on where the project is.

    Args:
      options: as `parse` returns them.
      original: the configuration without the changes.
    """
    folder = pathlib.Path("runs", pathlib.Path(options.config).stem)
    if not options.overrides:
        return folder

    def folder_for(keys):
        return folder.with_name(f"{folder.name}-{files.digest(keys)}")

    def change(overrides):
        return name_model_file(configuration.override(original, overrides))

    naming = {key: value for key, value in options.overrides.items() if key not in _UNNAMED_KEYS}
    # Earlier versions hashed all keys; their work directories are found first.
    all_keys = configuration.without_later(change(options.overrides).to_dict())
    named_keys = configuration.without_later(change(naming).to_dict())
    for keys in (all_keys, _movable(all_keys), _movable(named_keys)):
        earlier = folder_for(keys)
        if earlier.is_dir():
            return earlier
    before = configuration.flatten(change({}))
    after = configuration.flatten(change(naming))
    changed = {
        key: value for key, value in after.items() if key not in before or value != before[key]
    }
    if not changed:
        return folder
    return folder_for(_movable(changed))


def _movable(keys: dict) -> dict:
    """Names a user's network without its folder, so that a moved project finds its runs."""
    model = str(keys.get("model"))
    if not os.path.isabs(model):
        return keys
    return keys | {"model": os.path.basename(model)}


def run_command(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    work: Callable[[argparse.Namespace, ml_collections.ConfigDict], None],
) -> int:
    """Parses the arguments, does `work`, and returns the exit code of `command.run`."""

    def read_and_work():
        if {"-h", "--help"} & set(arguments):
            print_help(parser, arguments)
            return
        options, config = parse(parser, arguments)
        work(options, config)

    return command.run(read_and_work)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    if arguments is None:
        arguments = sys.argv[1:]
    parser = build_parser("cnnjax.main", __doc__)
    # Sweeps lack this option: each process of a sweep takes runs of its own.
    parser.add_argument(
        "--distributed",
        metavar="HOW",
        help="make this process one of several that train together: auto (Slurm, Cloud TPU, GKE), "
        "or HOST:PORT,PROCESSES,INDEX, where HOST:PORT is that of process 0",
    )

    def join_and_run(options, config):
        if options.distributed is not None:
            if config.get("kind") != "train":
                raise ValueError(
                    f"distributed={options.distributed!r} is for training; this configuration is "
                    f"of kind={config.get('kind')!r}"
                )
            processes.join(options.distributed)
        run(config, options.workdir, options.overrides)

    return run_command(parser, arguments, join_and_run)


def leave(code: int) -> None:
    """Ends the process as Python does, or at once after an interruption or a failure.

    Threads of the numerical libraries may then be busy, with nothing to save, and jax would wait
    for other processes, which may be gone.
    """
    is_done = code == 0
    is_refused = code == 2 and not processes.is_joined()
    if is_done or is_refused:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        # A stream may be closed (None), or nobody may read it any more.
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
