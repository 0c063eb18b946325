"""Locks, and writes that survive a crash: what the data side and the output folder both need of a file system.

A lock is the kernel's (``flock``): it ends with the process that holds it, however that process ends, so nobody has to
guess whether an owner still lives. The file's text names the owner to those who wait; it decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
REPEAT_SECONDS = 60.0
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class LockHeldError(Exception):
    """A lock was not released in time; ``owner`` is who holds it."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"the lock is held by {owner}")
        self.owner = owner


@contextlib.contextmanager
def exclusive(path: Path, purpose: str, patience_s: float = math.inf) -> Iterator[bool]:
    """Hold the lock file ``path``, waiting for its owner to finish or die.

    Args:
        path: the lock file; made when missing. Only its holder may delete it.
        purpose: what the owner is doing, for the message to those who wait.
        patience_s: seconds to wait at most.

    Yields:
        True; False where the file system has no locks, after a warning.

    Raises:
        LockHeldError: another process held it all that time.
        OSError: the lock file cannot be made.
    """
    deadline = next_message = time.monotonic()
    deadline += patience_s
    while (found := _try_to_lock(path)) is None:
        now = time.monotonic()
        if now >= deadline:
            raise LockHeldError(owner(path))
        if now >= next_message:
            limit = "" if math.isinf(patience_s) else f", {patience_s:.0f} s at most"
            log.warning("waiting for %s, which is %s (lock %s)%s", owner(path), purpose, path, limit)
            next_message += REPEAT_SECONDS
        time.sleep(POLL_SECONDS)
    descriptor, held = found
    try:
        if held and (dead := owner(path, default="")):
            log.warning("taking over from %s, which died while it was %s", dead, purpose)
        elif not held:
            log.warning("%s: this file system has no locks; %s without one", path, purpose)
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        _sign(descriptor, held, f"process {os.getpid()} on {socket.gethostname()} (since {started})")
        yield held
    finally:
        _sign(descriptor, held, "")  # a lock that names an owner and is not held is one whose owner was killed
        os.close(descriptor)


def _try_to_lock(path: Path) -> tuple[int, bool] | None:
    """An open descriptor of ``path``, and whether it is locked (or cannot be); None while another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    kept = False
    try:
        held = _flock(descriptor, fcntl.LOCK_EX)
        deleted = held and os.fstat(descriptor).st_nlink == 0  # by the holder before, after it was opened here
        kept = held is not False and not deleted
        return (descriptor, held is True) if kept else None
    finally:
        if not kept:
            os.close(descriptor)


def _flock(descriptor: int, operation: int) -> bool | None:
    """Whether the lock was free and is taken now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


def _sign(descriptor: int, held: bool, text: str) -> None:
    if held:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)


def owner(path: Path, default: str = "another process") -> str:
    """Who wrote the lock file last: process, machine and the time it began."""
    return path.read_text(errors="replace") or default if path.exists() else default


def is_held(path: Path) -> bool:
    """Whether some process holds the lock now."""
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _flock(descriptor, fcntl.LOCK_SH) is False
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder: a rename is lost in a power cut until this is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside ``path`` and rename it there: whenever this is killed, ``path`` is the old file or the new.

    Raises:
        OSError: it cannot be written, or ``path`` is a device, a pipe or a folder.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "not a regular file", str(path))
    beside = path.with_name(f".tmp-{path.name}")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    fsync(path.parent)
