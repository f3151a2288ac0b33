"""The common part of all reports: reading a run and describing its environment."""

import json
import pathlib
from typing import NamedTuple

from cnnjax.runtime import workdir


class Finished(NamedTuple):
    """The contents of a finished run's files."""

    config: dict
    environment: dict
    results: dict


def read(folder: pathlib.Path, kind: str) -> Finished:
    """Reads a finished run.

    Args:
      folder: its work directory.
      kind: the kind of job that its results must be of.

    Raises:
      ValueError: if the work directory holds no results, or those of another kind.
    """
    names = ("config", "environment", "results")
    missing = [f"{name}.json" for name in names if not (folder / f"{name}.json").is_file()]
    if missing:
        raise ValueError(
            f"workdir={str(folder)!r} has no {', '.join(missing)}: there is no finished run to "
            "report on"
        )
    run = Finished(*(workdir.read_json(folder / f"{name}.json") for name in names))
    if run.results.get("kind") != kind:
        raise ValueError(
            f"kind={run.results.get('kind')!r} of {folder / 'results.json'} is not {kind!r}"
        )
    return run


def footer(run: Finished) -> str:
    """Formats a report's last section: environment, seed, seconds and configuration.

    Each earlier start of the run with other code or on another machine has a paragraph.
    """
    environment = run.environment
    text = f"{_describe(environment)}; seed {environment['seed']}; {run.results['seconds']} s."
    for earlier in environment.get("earlier", ()):
        text += f"\n\nAn earlier start of the run: {_describe(earlier)}."
    return f"\n## Environment\n\n{text}\n\n```json\n{json.dumps(run.config, indent=1)}\n```\n"


def _describe(environment: dict) -> str:
    packages = [f"{name} {version}" for name, version in environment["packages"].items()]
    devices = sorted(set(environment["devices"]))
    return (
        f"{environment['backend']} ({', '.join(devices)}), {environment['cpus']} CPUs, "
        f"{environment['platform']}, Python {environment['python']}, {', '.join(packages)}; "
        f"XLA_FLAGS `{environment['xla_flags']}`; "
        f"revision {environment['git_revision'] or 'unknown'}"
    )
