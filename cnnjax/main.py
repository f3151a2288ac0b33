"""The command line: reads a configuration and runs it in a work directory.

python -m cnnjax.main --config configs/posenet.py [--workdir runs/mine] [--config.KEY=VALUE ...]
"""

import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable

import ml_collections
from absl import flags
from ml_collections import config_flags

from cnnjax.runtime import backend, command, workdir

# What a configuration's `kind` may be, and the module whose `check`, `run` and `report.write` do it.
_JOBS = {"position": "cnnjax.position.study", "train": "cnnjax.train.loop"}

_LOG = logging.getLogger("cnnjax")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A configuration file, such as configs/posenet.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The folder of the results; by default one under runs/ named after the configuration.",
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "Makes this process one of several: auto (Slurm, Cloud TPU, GKE), or "
    "HOST:PORT,PROCESSES,INDEX, where HOST:PORT is that of process 0.",
)
flags.DEFINE_boolean("debug", False, "Shows the traceback of an error.")


def _default_workdir() -> pathlib.Path:
    """runs/NAME, and with overrides runs/NAME-DIGEST, so that a changed configuration never meets another's results."""
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    if not config_flags.get_override_values(flags.FLAGS["config"]):
        return pathlib.Path("runs") / name
    return pathlib.Path("runs") / f"{name}-{workdir.digest(_CONFIG.value.to_dict())}"


def _parse(argv: list[str]) -> None:
    """Parses the flags; raises `ValueError` in one line for whatever is wrong with them or the configuration file."""
    try:
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise ValueError(
                f"unexpected argument {rest[0]!r}; options are written --workdir=FOLDER or --config.KEY=VALUE"
            )
        if not flags.FLAGS["config"].present:
            raise ValueError(
                "--config is missing; name a configuration file, such as --config configs/posenet.py"
            )
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        if not pathlib.Path(path).is_file():
            raise ValueError(
                f"config={path!r} is not a file; name a configuration file, such as configs/posenet.py"
            )
        config = _CONFIG.value  # read and overridden here
    except (KeyError, AttributeError) as error:
        quoted = (
            str(error).replace("\\n", " ").replace("\\", "").strip("\"'")
        )  # ml_collections quotes its own message, and again
        key, _, advice = " ".join(quoted.split()).partition("'")
        raise ValueError(f"--config has no such key: {key!r}{advice}") from error
    except flags.UnrecognizedFlagError as error:
        known = ", ".join(f"--{name}" for name in _options())
        raise ValueError(
            f"--{error.flagname} is not an option; there are {known}, and --config.KEY=VALUE for the keys of the "
            "configuration"
        ) from error
    except (flags.Error, TypeError, ImportError, SyntaxError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if config.get("kind") not in _JOBS:
        raise ValueError(
            f"kind={config.get('kind')!r} of the configuration is not one of {', '.join(_JOBS)}"
        )


def run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Runs one configuration in a work directory; of a finished run, only the report is written anew."""
    job = importlib.import_module(_JOBS[config.kind])
    if _DISTRIBUTED.value:
        backend.join(_DISTRIBUTED.value)
    job.check(config)
    backend.start()

    def begin(config, folder):
        _LOG.info("running in %s", folder)
        job.run(config, folder)

    if is_finished := (folder / "results.json").exists():
        _LOG.info("%s holds the finished run", folder)
    workdir.completed(begin, config, folder)
    if is_finished:
        job.report.write(folder)
    _LOG.info("finished: see %s", folder / "report.md")


def _options() -> list[str]:
    """The names of this package's own options; libraries have some too."""
    mine = (
        "cnnjax.main",
        "cnnjax.sweep",
        sys.argv[0],
    )  # the last is what absl calls the module that runs
    return [name for name in flags.FLAGS if flags.FLAGS.find_module_defining_flag(name) in mine]


def main(
    argv: list[str], work: Callable[[ml_collections.ConfigDict, pathlib.Path], None] = run
) -> int:
    """Does `work` with a configuration and returns the exit code (`cnnjax.runtime.command.run`)."""
    if {"-h", "-help", "--help"} & set(argv[1:]):
        told = (f"  --{name:12}{flags.FLAGS[name].help}" for name in _options())
        print(
            sys.modules[work.__module__].__doc__,
            *told,
            "  --config.KEY=VALUE  changes a key of the configuration.",
            sep="\n",
        )
        return 0

    def do():
        _parse(argv)
        work(_CONFIG.value, pathlib.Path(_WORKDIR.value or _default_workdir()))

    return command.run(do)


def leave(code: int) -> None:
    """Ends the process at once: at an interruption, threads of the numerical libraries may still be busy, and nothing is left to save."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv))
