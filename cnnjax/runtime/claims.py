"""Claims, which keep a work directory for one process at a time.

A claim is a lock file, run.claim, that names the host, the process and an id of its own. To claim
a directory, a process

1. writes its claim as .ID.claim (`own_claim` below);
2. makes run.claim a hard link to it, which fails if there is a run.claim already;
3. if there is one that is stale, renames it to .ID.void, deletes it, and repeats step 2. A claim
   is stale if its process is gone from this machine or, where that cannot be seen, has not
   renewed it for two minutes. A suspended process (Ctrl-Z) of this machine keeps its claim;
4. renews run.claim while it works: a thread sets the file's time. Before it writes a checkpoint or
   results, it looks whether run.claim is still its own (`check_held`);
5. removes run.claim and .ID.claim.

Two processes may find the same stale claim, and the slower one may remove the claim that the
faster one has just made. So a process that has removed a stale claim waits a moment after step 2
and then looks whether run.claim is still its own.
"""

import contextlib
import errno
import json
import os
import pathlib
import platform
import threading
import time
import uuid
from collections.abc import Iterator

from cnnjax.runtime import files, processes

CLAIM = "run.claim"
# Seconds between two renewals of a claim, and the age at which it is stale.
_RENEWAL_SECONDS = 15.0
_STALE_SECONDS = 120.0
# Seconds within which all processes that found the same stale claim have removed it.
_SETTLING_SECONDS = 0.2


class Claimed(ValueError):
    """Another process is using a work directory."""


class Lost(RuntimeError):
    """A process no longer holds its claim of a work directory."""


def _pid_namespace() -> str | None:
    """Returns the namespace of process numbers, of which each container has its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _boot_id() -> str | None:
    """Returns the id of this start of the system, which tells machines of one host name apart."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _started_at(process: int) -> int | None:
    """Returns when a process of this machine began, in ticks of its clock; None if it has ended.

    Raises `OSError` if that cannot be seen.
    """
    try:
        # This asks the system itself. /proc may hide the processes of other users (hidepid).
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        # It is another user's, and running.
        pass
    content = pathlib.Path(f"/proc/{process}/stat").read_bytes()
    # The fields after the name, which is in brackets and may hold spaces and brackets: the state is
    # field 3 of proc(5), and the start time field 22.
    state, *fields = content.rpartition(b")")[2].split()
    # A zombie has ended, and waits for its parent to notice.
    return None if state in (b"Z", b"X") else int(fields[18])


def _own_start() -> int | None:
    """Returns when this process began; None if /proc does not tell."""
    try:
        # /proc may be that of another namespace (unshare --pid), with other numbers.
        if os.readlink("/proc/self") == str(os.getpid()):
            return _started_at(os.getpid())
    except OSError:
        # Some systems have no /proc.
        pass
    return None


def _this_process() -> dict:
    """Describes this process as its claims name it."""
    return {
        "host": platform.node(),
        "process": os.getpid(),
        "namespace": _pid_namespace(),
        "boot": _boot_id(),
        "started": _own_start(),
    }


def _is_running(holder: dict) -> bool | None:
    """Tells whether the process that a claim names is running; None if that cannot be seen."""
    # Claims of earlier versions name neither their namespace nor the start of their system.
    here = {"host": platform.node(), "namespace": _pid_namespace(), "boot": _boot_id()}
    is_here = all(holder.get(name, value) == value for name, value in here.items())
    # A /proc that does not show this process cannot be asked about others.
    if not is_here or _own_start() is None:
        return None
    try:
        started = _started_at(holder["process"])
    except OSError:
        return None
    if started is None:
        return False
    # Claims of earlier versions do not say when their process began. Another process may have its
    # number by now.
    if holder.get("started") is None:
        return None
    return started == holder["started"]


def _describe_holder(path: pathlib.Path, content: bytes, own_claim: pathlib.Path) -> str | None:
    """Names the process that holds a claim, for an error; None if the claim is stale.

    Args:
        path: run.claim.
        content: what was read from it.
        own_claim: the claim of this process, whose time is set to now.
    """
    try:
        # Both times are the file system's, whatever this machine's clock says.
        os.utime(own_claim)
        age = own_claim.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        holder = json.loads(content)
        description = f"process {holder['process']} on {holder['host']}"
        is_running = _is_running(holder)
        # Only a process that is known to be the holder is safe to end.
        if is_running:
            description += (
                " (if it is suspended, continue it with fg; if it hangs, end it with "
                f"kill -9 {holder['process']})"
            )
    # A damaged claim is not renewed, and so it is stale before long.
    except (ValueError, KeyError, TypeError, OverflowError):
        description = "another process, whose claim cannot be read"
        is_running = None
    if is_running is None:
        is_running = age <= _STALE_SECONDS
    return description if is_running else None


def _link(own_claim: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a claim the name `path`. Raises `FileExistsError` if there is such a file."""
    try:
        # Of several processes, only one can create the link.
        os.link(own_claim, path)
    except OSError as error:
        # File systems such as exFAT have no hard links; there the claim is copied.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        with path.open("xb") as file:
            file.write(own_claim.read_bytes())


def _remove_stale(path: pathlib.Path, content: bytes, own_claim: pathlib.Path) -> None:
    """Removes a stale claim, unless another process has replaced it since it was read."""
    removed = own_claim.with_suffix(".void")
    # Of several processes, only one can rename it. Which one shows below, since on NFS this may
    # fail although it was done (`_acquire`).
    with contextlib.suppress(FileNotFoundError):
        path.rename(removed)
    with contextlib.suppress(FileNotFoundError):
        if removed.read_bytes() != content:
            # It is another's valid claim, which is put back.
            with contextlib.suppress(FileExistsError):
                _link(removed, path)
        removed.unlink()


def _acquire(path: pathlib.Path, own_claim: pathlib.Path) -> None:
    """Claims the directory. Raises `Claimed` if another process holds it."""
    own_content = own_claim.read_bytes()
    has_met_stale = False
    while True:
        # If NFS loses a reply, it repeats the request, which then fails although it was done. So
        # what is read below decides whose claim it is.
        with contextlib.suppress(FileExistsError):
            _link(own_claim, path)
        # A process that met the same stale claim may be removing ours in its place.
        if has_met_stale:
            time.sleep(_SETTLING_SECONDS)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        if content == own_content:
            return
        if holder := _describe_holder(path, content, own_claim):
            raise Claimed(
                f"workdir={str(path.parent)!r} is in use by {holder}; wait for it, or choose "
                "another --workdir"
            )
        has_met_stale = True
        _remove_stale(path, content, own_claim)


def _is_own(path: pathlib.Path, own_claim: pathlib.Path) -> bool:
    """Tells whether run.claim is the claim of this process, which has an id of its own."""
    try:
        return path.read_bytes() == own_claim.read_bytes()
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _renewed(path: pathlib.Path, own_claim: pathlib.Path) -> Iterator[None]:
    """Renews a claim now and then, from a thread, while the context lasts."""
    done = threading.Event()

    def renew():
        while not done.wait(_RENEWAL_SECONDS):
            with contextlib.suppress(OSError):
                if _is_own(path, own_claim):
                    os.utime(path)

    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def check_held(folder: pathlib.Path) -> None:
    """Checks that this process still holds the claim that it made of a work directory, if any.

    Another process takes the claim over if this one has not renewed it for two minutes and cannot
    be seen, as when it is suspended on another machine.

    Raises:
        Lost: if it does not.
    """
    this_process = _this_process()
    for own_claim in folder.glob(".*.claim"):
        # A file that cannot be read now does not tell that the claim is lost.
        with contextlib.suppress(OSError, ValueError):
            is_of_this = files.read_json(own_claim).items() >= this_process.items()
            if is_of_this and not _is_own(folder / CLAIM, own_claim):
                raise Lost(
                    f"workdir={str(folder)!r} has been taken over: {CLAIM} is no longer that of "
                    "this process, which did not renew it for two minutes, as when it is "
                    "suspended; nothing more is written"
                )


def unusable(folder: pathlib.Path, error: OSError) -> ValueError:
    """Describes why a work directory cannot be created or written to."""
    # Unlike `Path.is_file`, this never raises, whatever keeps the folder from being seen.
    if os.path.isfile(folder):
        return ValueError(f"workdir={str(folder)!r} is a file; expected a folder")
    return ValueError(f"workdir={str(folder)!r} cannot be written to: {error.strerror}")


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of a work directory, which is created, while the context lasts.

    Raises:
        Claimed: if another process is using the directory.
        ValueError: if the directory is a file, or cannot be written to.
    """
    # Of several processes that compute together, the first one claims for all.
    if not processes.writes():
        yield
        return
    path = folder / CLAIM
    own_claim = folder / f".{uuid.uuid4().hex}.claim"
    # The id tells this claim from an earlier one of the same process.
    holder = _this_process() | {"id": own_claim.stem}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(own_claim, json.dumps(holder))
    except OSError as error:
        raise unusable(folder, error) from error
    try:
        _acquire(path, own_claim)
        try:
            with _renewed(path, own_claim):
                yield
        finally:
            # On a disk that can no longer be written to, the failure itself is reported.
            with contextlib.suppress(OSError):
                if _is_own(path, own_claim):
                    path.unlink()
    finally:
        with contextlib.suppress(OSError):
            own_claim.unlink()
