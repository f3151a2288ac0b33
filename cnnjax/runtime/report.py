"""The common part of all reports: reading a run and describing its environment."""

import json
import pathlib
from typing import NamedTuple

from cnnjax.runtime import files


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
    run = Finished(*(files.read_json(folder / f"{name}.json") for name in names))
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
    details = f"; seed {environment['seed']}; {run.results['seconds']} s"
    text = describe_environments([*environment.get("earlier", ()), environment], details)
    return f"{text}\n```json\n{json.dumps(run.config, indent=1)}\n```\n"


def describe_environments(environments: list[dict], details: str = "") -> str:
    """Formats a section on the environments of a run's starts; empty if none is known.

    Args:
      environments: those of `workdir.read_environments`, the last start's last.
      details: what follows the last start's.
    """
    if not environments:
        return ""
    *earlier_starts, last = environments
    text = f"\n## Environment\n\n{_describe(last)}{details}.\n"
    for earlier in earlier_starts:
        text += f"\nAn earlier start of the run: {_describe(earlier)}.\n"
    return text


def _describe(environment: dict) -> str:
    packages = [f"{name} {version}" for name, version in environment["packages"].items()]
    devices = sorted(set(environment["devices"]))
    return (
        f"{environment['backend']} ({', '.join(devices)}), {environment['cpus']} CPUs, "
        f"{environment['platform']}, Python {environment['python']}, {', '.join(packages)}; "
        f"XLA_FLAGS `{environment['xla_flags']}`; "
        f"revision {environment['git_revision'] or 'unknown'}"
    )
