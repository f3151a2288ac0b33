"""Signals that stop a run: it saves at the first one, and Ctrl-C after that ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

# A person or a system asks the process to stop.
_STOP = (signal.SIGINT, signal.SIGTERM)
# A scheduler announces the end of a job's time.
_ANNOUNCE = (signal.SIGUSR1, signal.SIGUSR2)
# What a system sends, perhaps more than once.
_SYSTEM = (signal.SIGTERM, *_ANNOUNCE)


@contextlib.contextmanager
def heeded(handler: Callable, first: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """Handle SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 for as long as the context is entered.

    A handler in Python waits for a compilation or a long computation to end; a thread does not.
    A signal that is ignored stays so, as for a command that a shell runs in the background.
    SIGINT after SIGINT or SIGTERM ends the process at once, and so does SIGTERM after SIGINT. A
    system may repeat its signals: Slurm sends SIGTERM twice within a moment, perhaps after the
    announcement. Those that follow change nothing.

    Args:
        handler: called with number and frame, as by `signal.signal`.
        first: called with the number of the first signal at once, from a thread.
    """

    def handle(number, frame):
        # One signal of the system is enough: another must not disturb the process while it saves
        # and leaves.
        if number in _SYSTEM:
            for repeated in _SYSTEM:
                signal.signal(repeated, signal.SIG_IGN)
        handler(number, frame)

    before = {}
    for number in _STOP + _ANNOUNCE:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def receive():
        is_told = False
        stopped_by = 0
        while number := os.read(reader, 1)[0]:
            if number not in before:
                continue
            if number in _STOP:
                is_repeated = number == stopped_by == signal.SIGTERM
                if stopped_by and not is_repeated:
                    os._exit(128 + number)
                stopped_by = number
            if not is_told:
                is_told = True
                first(number)

    descriptor = signal.set_wakeup_fd(writer)
    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number, previous in before.items():
            # Ignored until the outermost context ends, announcements until the process does.
            is_kept = number in _ANNOUNCE or callable(previous)
            if not is_kept or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, previous)
        signal.set_wakeup_fd(descriptor)
        os.write(writer, bytes(1))
        thread.join()
        os.close(reader)
        os.close(writer)
