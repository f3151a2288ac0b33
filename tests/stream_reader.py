"""Reads images with a worker process until it is killed, for test_stream.py."""

import multiprocessing
import signal
import sys

from cnnjax.data import folders, stream


def main(arguments: list[str]) -> int:
    """Prints the worker's number and waits."""
    source = folders.Folder(arguments[0])
    batches = stream.TrainingBatches(source, 4, range(1000), seed=0, size=16, resize=20)
    images = stream.iterate(batches, workers=1)
    next(images)
    (worker,) = multiprocessing.active_children()
    print(worker.pid, file=sys.stderr)
    signal.pause()
    return 0
