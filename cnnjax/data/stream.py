"""Batches of labeled images, decoded by grain while the devices compute.

A batch depends on (seed, step) alone, whatever the number of workers. So a stream that starts at a
step continues an interrupted one exactly, with the same images, order and crops.
"""

import atexit
import dataclasses
import functools
import gc
import math
import multiprocessing
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import PIL.Image

from cnnjax.data.crops import area_crop, center, check_resize, resized_crop
from cnnjax.data.folders import Source
from cnnjax.data.photographs import Damaged
from cnnjax.runtime import signals

# The number of images that one process decodes while worker processes would still be starting.
FEW_IMAGES = 500


# Two epochs, so that batches around the turn of an epoch can be read in any order.
@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclasses.dataclass(frozen=True)
class TrainingBatches:
    """The batches of training steps.

    Every epoch has its own order and drops the remainder. A batch is uint8 [batch, size, size, 3]
    and int32 [batch], of which each process gets its own part.

    Attributes:
      source: the images.
      batch_size: the number of images in a batch, over all processes.
      steps: training steps to produce batches for.
      seed: random seed of the order and the crops.
      size: the side of the square crops, in pixels.
      resize: the image's shorter side before the crop; 0 for crops of random area and aspect.
      process_index: the number of this process.
      process_count: the number of processes that share each batch.
      skip_damaged: whether an image that cannot be decoded is replaced by the next undamaged one of
        the epoch's order, with the same random numbers for the crop. Batches then have a third
        array, int32 [batch]: for each place the number of the damaged image, or -1.

    Raises:
      ValueError: if the processes do not divide the batch, or `resize` is below the crop's size.
    """

    source: Source
    batch_size: int
    steps: range
    seed: int
    size: int
    resize: int
    process_index: int = 0
    process_count: int = 1
    skip_damaged: bool = False

    def __post_init__(self):
        if self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of {self.process_count} processes"
            )
        check_resize(self.resize, self.size)

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        count = len(self.source)
        epoch, step_in_epoch = divmod(self.steps[index], count // self.batch_size)
        order = _epoch_order(self.seed, epoch, count)
        process_size = self.batch_size // self.process_count
        start = step_in_epoch * self.batch_size + self.process_index * process_size
        images = []
        labels = []
        damaged = []
        for place in range(start, start + process_size):
            image, label, damaged_number = self._decode(order, place)
            # The crop depends on the epoch and the image, not on the process or the worker.
            rng = np.random.default_rng([self.seed, epoch, int(order[place])])
            if self.resize:
                crop = resized_crop(image, self.size, self.resize, rng)
            else:
                crop = area_crop(image, self.size, rng)
            images.append(np.asarray(crop))
            labels.append(label)
            damaged.append(damaged_number)
        batch = [np.stack(images), np.asarray(labels, np.int32)]
        if self.skip_damaged:
            batch.append(np.asarray(damaged, np.int32))
        return tuple(batch)

    def _decode(self, order: np.ndarray, place: int) -> tuple[PIL.Image.Image, int, int]:
        """Decodes the image at a place in an epoch's order, or the next undamaged one.

        Returns:
          The image, its label, and the number of the damaged image that it replaces or -1.

        Raises:
          Damaged: for a damaged image, unless `skip_damaged`.
          ValueError: if all images are damaged.
        """
        for offset in range(len(order)):
            number = int(order[(place + offset) % len(order)])
            try:
                image, label = self.source[number]
            except Damaged as error:
                if not self.skip_damaged:
                    raise Damaged(f"{error}; skip_damaged=True trains without it") from error
                last_error = error
                continue
            damaged_number = int(order[place]) if offset else -1
            return image, label, damaged_number
        raise ValueError(
            f"skip_damaged=True: none of the {len(order)} images can be decoded; {last_error}"
        )


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """All images in order, in batches of the same form; the last one may be shorter.

    Attributes:
      source: the images.
      batch_size: the number of images in a batch.
      size: the side of the square crops, in pixels.
      resize: the image's shorter side before the crop; 0 for 256/224 of `size`.
    """

    source: Source
    batch_size: int
    size: int
    resize: int

    def __len__(self):
        return math.ceil(len(self.source) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        images = []
        labels = []
        start = index * self.batch_size
        for place in range(start, min(start + self.batch_size, len(self.source))):
            image, label = self.source[place]
            images.append(np.asarray(center(image, self.size, self.resize)))
            labels.append(label)
        return np.stack(images), np.asarray(labels, np.int32)


def iterate(
    batches: TrainingBatches | EvaluationBatches, workers: int = 0
) -> Iterator[tuple[np.ndarray, ...]]:
    """Streams batches, decoded by worker processes, or by this process if there are none.

    Raises:
      ValueError: from the iterator, for an image that cannot be read, or decoded.
    """
    # Imported when needed: whatever only opens a run does without it.
    import grain
    from absl import flags

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    stream = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        # grain asks for absl's flags, which a program without any never parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers)
        stream = stream.mp_prefetch(processes, _prepare_worker)
    iterator = _iterate_and_close(iter(stream), len(batches), has_workers=workers > 0)
    _open_iterators.add(iterator)
    return iterator


# ------------------------------------------------------------------ worker processes

# Iterators whose worker processes may still run. They are closed at exit, while the modules that
# closing needs still exist; an iterator of grain that is torn down later prints errors.
_open_iterators: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_iterators() -> None:
    for iterator in list(_open_iterators):
        iterator.close()


def _iterate_and_close(iterator, count: int, has_workers: bool) -> Iterator:
    """Yields `count` batches of one of grain's iterators and closes it.

    It is closed, which ends its worker processes, before the last batch is yielded: a caller that
    knows the number of batches never asks for more, so nothing after the last one would run. A
    caller that stops earlier closes it by letting go of this generator.
    """
    failure = None
    shared: list[SharedMemory] = []
    try:
        for number in range(1, count + 1):
            if has_workers and number == 1:
                batch = _start_workers(iterator)
            else:
                batch = next(iterator)
            if has_workers:
                # Forget blocks that grain has closed. It does so in a thread, some time after the
                # array is gone.
                shared = [memory for memory in shared if memory.buf]
                shared += [array.shm for array in batch if getattr(array, "shm", None)]
                # Copy the batch: its arrays lie in shared memory, which must not outlive the
                # workers.
                batch = tuple(map(np.array, batch))
            if number < count:
                yield batch
    except Exception as error:
        if not has_workers:
            raise
        # Raised below, and without its traceback, whose frames hold the iterator.
        failure = error.with_traceback(None)
    finally:
        iterator.close()
        if has_workers:
            # grain leaves its iterators in reference cycles, each with semaphores and a batch in
            # shared memory.
            del iterator
            gc.collect()
            _wait_until_closed(shared)
    if failure:
        raise failure
    if count:
        yield batch


def _wait_until_closed(memories: list[SharedMemory]) -> None:
    """Waits until grain has closed blocks of shared memory, for five seconds at most.

    grain closes them in a thread. A program that ended before would not wait for this thread, and
    Python would report the blocks as leaked.
    """
    deadline = time.monotonic() + 5
    while any(memory.buf for memory in memories) and time.monotonic() < deadline:
        time.sleep(0.001)


def _start_workers(iterator: Iterator) -> tuple:
    """Takes the first batch of one of grain's iterators, which starts its worker processes.

    Workers never get the signals that stop a run, which the parent handles. They inherit the
    signal mask of this thread, by way of the threads in which grain starts them. Ignoring signals
    in the worker would be too late: it imports for seconds before its own code runs.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signals.ALL)
    try:
        # The start of this process, which grain's queues need, unblocks SIGINT and SIGTERM.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.ALL)
        return next(iterator)
    finally:
        # Signals that no other thread has taken meanwhile arrive now.
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _prepare_worker(index: int, count: int) -> None:
    """Prepares a worker process, which ends when its parent ends.

    Args:
      index: the number of the worker, which grain passes.
      count: the number of workers.
    """
    # As in the parent (`command.run`).
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent():
        parent.join()
        os._exit(0)

    threading.Thread(target=exit_with_parent, daemon=True).start()
