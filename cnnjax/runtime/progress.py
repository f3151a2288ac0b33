"""Progress of long work: a bar on a terminal, a log line now and then elsewhere.

Also lines that are logged once.
"""

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator

import tqdm

_SECONDS_BETWEEN_LINES = 15


@contextlib.contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows progress; yields a function to call with the number of new units."""
    if sys.stderr is not None and sys.stderr.isatty():
        with tqdm.tqdm(total=total, unit=f" {unit}") as bar:
            yield bar.update
        return
    start = last = time.monotonic()
    done = 0

    def update(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or done >= total:
            last = now
            logging.getLogger("cnnjax").info("%d of %d %s, %.0f s", done, total, unit, now - start)

    yield update


@functools.cache
def log_once(level: int, text: str) -> None:
    """Logs a line, unless this process has logged it before.

    A command may open one run, or list one folder, several times.
    """
    logging.getLogger("cnnjax").log(level, text)
