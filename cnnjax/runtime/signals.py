"""Signals that stop a run: it saves at the first one, and Ctrl-C after that ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

# A person or a system asks the process to stop; SIGHUP comes when its terminal is closed.
_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A scheduler announces the end of a job's time.
_ANNOUNCE = (signal.SIGUSR1, signal.SIGUSR2)
ALL = _STOP + _ANNOUNCE
# What a system sends, perhaps more than once.
_SYSTEM = (signal.SIGTERM, signal.SIGHUP, *_ANNOUNCE)


@contextlib.contextmanager
def catch_stop_signals(
    handler: Callable, on_first: Callable[[int], None] = lambda number: None
) -> Iterator[None]:
    """Handles SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 while the context is active.

    Each of them calls `handler`, with three exceptions:

    - SIGINT after SIGINT, SIGTERM or SIGHUP ends the process at once, and so does SIGTERM or SIGHUP
      after SIGINT.
    - After SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2, more of these four change nothing. A system may
      repeat its signals: Slurm sends SIGTERM twice within a moment, perhaps after SIGUSR1, and
      systemd may send SIGHUP right after SIGTERM.
    - A signal that is ignored already stays ignored, such as SIGINT in a command that a shell runs
      in the background, or SIGHUP under nohup.

    Args:
        handler: called with number and frame, as by `signal.signal`. Python calls it in the main
            thread, once a compilation or a long computation has ended.
        on_first: called with the number of the first signal, at once and from a thread.
    """

    def handle(number, frame):
        # Another signal of the system must not disturb the process while it saves and leaves.
        if number in _SYSTEM:
            for repeated in _SYSTEM:
                signal.signal(repeated, signal.SIG_IGN)
        handler(number, frame)

    previous_handlers = {}
    for number in ALL:
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous_handlers[number] = signal.signal(number, handle)

    # A handler in Python waits for compiled code to return; a thread does not. Python's signal
    # handler in C writes the number of each signal to the wakeup file descriptor at once, here a
    # pipe that a thread reads from.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch():
        has_reported = False
        stopped_by = 0
        # A zero, which is no signal, ends the thread.
        while number := os.read(reader, 1)[0]:
            if number not in previous_handlers:
                continue
            if number in _STOP:
                is_repeated = number in _SYSTEM and stopped_by in _SYSTEM
                if stopped_by and not is_repeated:
                    os._exit(128 + number)
                stopped_by = number
            if not has_reported:
                has_reported = True
                on_first(number)

    previous_descriptor = signal.set_wakeup_fd(writer)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            # `handle` may have set a signal to be ignored. Inside another context of this kind,
            # whose handler is a function, it stays ignored; the outermost context restores SIGTERM
            # and SIGHUP. Announcements stay ignored until the process ends.
            is_ignored = signal.getsignal(number) is signal.SIG_IGN
            is_nested = callable(previous)
            if is_ignored and (is_nested or number in _ANNOUNCE):
                continue
            signal.signal(number, previous)
        signal.set_wakeup_fd(previous_descriptor)
        os.write(writer, bytes(1))
        thread.join()
        os.close(reader)
        os.close(writer)
