"""Finding published weights: in caches, on the Hugging Face hub, at torchvision.

A file is looked for in this order:

1. PyTorch's cache: `$TORCH_HOME/hub/checkpoints`, by default ~/.cache/torch/hub/checkpoints;
2. the Hugging Face cache, if the hub carries the same numbers;
3. the Hugging Face hub;
4. torchvision's server, by https: the hash is checked, an interrupted download is resumed, and
   the file goes to PyTorch's cache.
"""

import errno
import fcntl
import functools
import http.client
import logging
import math
import os
import pathlib
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import BinaryIO
from urllib.parse import urlsplit

from cnnjax.runtime import files
from cnnjax.runtime.paths import expand_user, sha256
from cnnjax.runtime.progress import progress
from cnnjax.weights import records

_LOG = logging.getLogger("cnnjax")
_HUB_FILE = "model.safetensors"
# How long servers are waited for in a first round; then in a second one and during a download.
_PROBE_SECONDS = 2.0
_STALLED_SECONDS = 30.0
_CHUNK = 1 << 20  # bytes, 1 MiB


def checkpoints_folder() -> pathlib.Path:
    """Returns the folder in which PyTorch keeps downloaded weights."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")
    return expand_user(home) / "hub" / "checkpoints"


def fetch(name: str, tag: str = records.V1) -> str:
    """Returns the path of a network's ImageNet weights, downloading them if necessary.

    Args:
      name: the network, such as "resnet50".
      tag: "imagenet1k_v1", what `pretrained=True` means in torchvision, or "imagenet1k_v2".

    Raises `ValueError` if there are no such weights, and `RuntimeError`, which says where to put
    which file, if they cannot be obtained. Reading a file with a published name checks its hash
    (`read`).
    """
    record = records.find(name, tag)
    cached = checkpoints_folder() / record.file
    if cached.is_file():
        return str(cached)
    if record.hub and (path := _in_hub_cache(record.hub)):
        return path
    servers: dict[str, Callable[[], str | pathlib.Path]] = {}
    if record.hub and (endpoint := _hub_endpoint()):
        servers[endpoint] = functools.partial(_from_hub, record.hub)
    servers[record.url] = functools.partial(download, record.url, cached, record.sha256)
    failures: dict[str, str] = {}
    waiting = list(servers)
    # A slow server is waited for only if no other one has the file.
    for seconds in (_PROBE_SECONDS, _STALLED_SECONDS):
        refusals, slow = _ask(waiting, seconds)
        failures |= refusals
        for address in waiting:
            if address in refusals or address in slow:
                continue
            try:
                return str(servers[address]())
            except OSError as error:
                failures[address] = _first_line(error)
        waiting = slow
    failures |= dict.fromkeys(waiting, f"no answer within {_STALLED_SECONDS:g} s")
    reasons = [f"{urlsplit(address).netloc}: {reason}" for address, reason in failures.items()]
    raise RuntimeError(
        f"no weights of {name!r} were found or downloaded ({'; '.join(reasons)}); download "
        f"{record.url} on another machine and put it into {cached.parent}, or give the path of a "
        "file that you have (--weights FILE, path=FILE, --config.weights=FILE of the position "
        "study or --config.initial_weights=FILE of training)"
    )


def _first_line(error: BaseException) -> str:
    if isinstance(error, urllib.error.URLError):
        error = error.reason if isinstance(error.reason, BaseException) else error
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ------------------------------------------------------------------ the Hugging Face hub


def _in_hub_cache(repository: str) -> str | None:
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repository, _HUB_FILE)
    return path if isinstance(path, str) else None


def _hub_endpoint() -> str | None:
    """Returns the hub's address; None if the user keeps the hub's client offline."""
    from huggingface_hub import constants

    return None if constants.HF_HUB_OFFLINE else constants.ENDPOINT


def _from_hub(repository: str) -> str:
    """Returns the path of a file in the Hugging Face cache, downloading it if needed.

    Raises `OSError` if that fails.
    """
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(repository, _HUB_FILE)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise OSError(f"{repository}: {_first_line(error)}") from error


def _ask(urls: list[str], seconds: float) -> tuple[dict[str, str], list[str]]:
    """Asks servers whether they answer.

    The clients' own attempts to connect, with their retries, take up to a minute without a network.
    Looking up a server's name cannot be timed out, so each server is asked by a thread.

    Returns the reasons of those that refuse, and those that have not answered within `seconds`.
    """
    refusals: dict[str, str] = {}
    slow = set(urls)

    def ask(url: str) -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError as error:  # an answer too
            error.close()
        # `ValueError` is of an address that is none, such as one without "https://".
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                return
            refusals[url] = _first_line(error)
        slow.discard(url)

    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    # Copies, since late threads keep running.
    return dict(refusals), [url for url in urls if url in slow]


# ------------------------------------------------------------------ torchvision's server


def download(url: str, path: pathlib.Path, prefix: str) -> pathlib.Path:
    """Downloads a file whose SHA-256 begins with `prefix`, or resumes its download.

    What has arrived is kept beside the file as FILE.partial, for this call and for later ones. One
    of several processes downloads, and the others wait for it.

    Raises `OSError` if the server cannot be reached, stops answering or sends another file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("ab") as stream:
        _lock(stream)
        if path.is_file():  # another process has finished the download meanwhile
            return path
        _LOG.info("downloading %s to %s", url, path.parent)
        reached = 0
        while not _receive(url, stream):
            # A server that starts over each time may never get further.
            if stream.tell() <= reached:
                raise OSError(f"{url}: cut off again after {stream.tell() / 1e6:.1f} MB")
            reached = stream.tell()
            _LOG.info("cut off after %.1f MB; resuming", reached / 1e6)
        stream.flush()
        files.sync(partial)
        digest = sha256(partial)
        if not digest.startswith(prefix):
            stream.truncate(0)  # others that wait for the lock go on with this file
            raise OSError(
                f"{url} is another file: its SHA-256 begins with {digest[: len(prefix)]}, the "
                f"published file's with {prefix}"
            )
        partial.replace(path)
    return path


def _lock(stream: BinaryIO) -> None:
    """Waits until no other process has locked a file, and locks it until it is closed.

    Some file systems have no locks. There, two processes that download one file at the same time
    spoil it, which its hash shows.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        no_locks = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
        if error.errno not in no_locks:
            raise


def _receive(url: str, stream: BinaryIO) -> bool:
    """Appends the rest of a file to the stream; returns whether the file is complete.

    Raises `OSError` if nothing at all arrives.
    """
    before = stream.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={before}-"} if before else {})
    try:
        with urllib.request.urlopen(request, timeout=_STALLED_SECONDS) as response:
            if before and response.status != http.HTTPStatus.PARTIAL_CONTENT:
                stream.truncate(0)  # the server starts at the beginning
                before = stream.seek(0)
            missing = response.length
            if missing is None:
                # A chunked answer says where it ends, not how long it is. For other answers
                # without a length, the hash tells whether they are complete.
                shutil.copyfileobj(response, stream)
            else:
                with progress(math.ceil(missing / _CHUNK), "MiB") as advance:
                    while chunk := response.read(_CHUNK):
                        stream.write(chunk)
                        advance(1)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return True  # nothing is missing
        raise
    except (OSError, http.client.HTTPException) as error:
        if stream.tell() == before:
            raise OSError(f"{url}: {_first_line(error)}") from error
        return False
    if stream.tell() == before and missing != 0:
        raise OSError(f"{url}: nothing arrived")
    return missing is None or stream.tell() == before + missing
