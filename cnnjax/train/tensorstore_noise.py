"""Silence about writes that were under way when another of the same checkpoint failed.

tensorstore finishes the other arrays of a failed checkpoint in the background. Python then prints
"Event loop is closed" once for each, after the one line that tells of the failure. The exception
belongs to no caller, so `sys.unraisablehook` is the only place to drop it; all others pass.
"""

import functools
import sys


@functools.cache
def quieten() -> None:
    """Drop that one message, and leave the others to the hook that was installed before."""
    previous = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
