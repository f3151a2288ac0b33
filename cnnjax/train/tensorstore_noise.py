"""Silence messages about writes that ran when another one of a checkpoint failed.

tensorstore finishes the other arrays of a failed checkpoint in the background. Python then prints
"Event loop is closed" for each of them, after the line that reports the failure. No caller can
catch this exception, so `sys.unraisablehook` is the only place to drop it; all others pass.
"""

import functools
import sys


@functools.cache
def quieten() -> None:
    """Drops this one message, and passes all others to the previous hook."""
    previous = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
