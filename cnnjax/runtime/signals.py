"""SIGINT and SIGTERM: the first is heeded, a second one ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def heeded(handler: Callable, first: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """Calls `first` with the number of the first signal at once, from a thread, and `handler` as `signal.signal` does.

    A handler in Python waits for a compilation or a long computation to end; the thread does not. A signal that is ignored stays
    so, as for a command that a shell runs in the background.
    """
    heard = False
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def receive():
        nonlocal heard
        while number := os.read(reader, 1)[0]:
            if number in before:
                if heard:
                    os._exit(128 + number)
                heard = True
                first(number)

    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, handler) for number in numbers}
    descriptor, thread = signal.set_wakeup_fd(writer), threading.Thread(target=receive, daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
        signal.set_wakeup_fd(descriptor)
        os.write(writer, bytes(1))
        thread.join()
        os.close(reader)
        os.close(writer)
