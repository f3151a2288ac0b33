"""Several processes that compute together, on one machine or several."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator

_DISTRIBUTED = re.compile(r"(?P<coordinator>[^,\s]+:\d+),(?P<count>\d+),(?P<index>\d+)")


def join(how: str) -> None:
    """Makes this process one of several that compute together; call it before `start`.

    Args:
      how: "auto", where the environment has the settings (Slurm, Cloud TPU, GKE, Open MPI), or
        "HOST:PORT,PROCESSES,INDEX".

    Raises:
      ValueError: for anything else, and for "auto" without a cluster.
      RuntimeError: if the other processes cannot be reached.
    """
    import jax

    settings = _DISTRIBUTED.fullmatch(how)
    if how != "auto" and not (settings and int(settings["index"]) < int(settings["count"])):
        raise ValueError(
            f"distributed={how!r} is neither 'auto' nor HOST:PORT,PROCESSES,INDEX with an INDEX "
            "below PROCESSES"
        )
    try:
        if settings:
            jax.distributed.initialize(
                settings["coordinator"], int(settings["count"]), int(settings["index"])
            )
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        # With "auto", jax raises `ValueError` if no cluster tells it the coordinator's address.
        if not settings and isinstance(error, ValueError):
            raise ValueError(
                "distributed='auto' found no cluster (Slurm, Cloud TPU, GKE, Open MPI); give "
                "HOST:PORT,PROCESSES,INDEX"
            ) from error
        raise RuntimeError(
            f"distributed={how!r}: the processes could not be joined: "
            f"{' '.join(str(error).split())}"
        ) from error
    if jax.process_index():
        # One process logs; the others only warn.
        logging.getLogger("cnnjax").setLevel(logging.WARNING)


def is_joined() -> bool:
    """Tells whether this process is one of several that compute together."""
    # Not imported here, which --help would wait for: without jax, nothing has been joined.
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def writes() -> bool:
    """Tells whether this process writes files: of several, only the first one does."""
    if not is_joined():
        return True
    import jax

    return jax.process_index() == 0


def wait_for_others(point: str) -> None:
    """Waits until all processes that compute together reach the point of this name."""
    if is_joined():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(point)


@contextlib.contextmanager
def writer_last(point: str) -> Iterator[None]:
    """Runs the context in the writing process only after all others have left it.

    So all processes read the files before one changes them. A process that fails has left the
    context, too, so the writer does not wait for it.
    """
    if writes():
        wait_for_others(point)
    try:
        yield
    finally:
        if not writes():
            wait_for_others(point)
