"""Combine trained networks.

Ensembles average the networks' outputs; soups and Polyak averages average their parameters.

    python -m cnnjax.combine --runs 'runs/a/*' --method greedy --workdir FOLDER

`--runs` matches work directories of finished training runs: several, or for snapshot and polyak one
that kept several checkpoints. Writes results.json and report.md; the test set is scored once, at
the end.
"""

import os
import sys

from cnnjax.combine.methods import METHODS
from cnnjax.runtime import command


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (`cnnjax.runtime.command.run`)."""
    methods = "\n".join(f"  {name:18}{text}" for name, text in METHODS.items())
    parser = command.Parser(
        prog="python -m cnnjax.combine", description=__doc__, epilog=f"methods:\n{methods}"
    )
    parser.add_argument(
        "--runs",
        required=True,
        nargs="+",
        action="extend",
        metavar="FOLDER",
        help="work directories, or patterns that match them",
    )
    parser.add_argument(
        "--method", required=True, choices=METHODS, metavar="METHOD", help="one of those below"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=command.path,
        metavar="FOLDER",
        help="where the results are written",
    )
    parser.add_argument(
        "--data_dir",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="the folder of the runs' data set, if it has moved since they were trained",
    )
    options = parser.parse_args(arguments)

    def work():
        # Imported late: --help and wrong arguments need no jax.
        from cnnjax.combine import combination
        from cnnjax.runtime import backend

        backend.start()
        combination.run(options.runs, options.method, options.workdir, options.data_dir)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
