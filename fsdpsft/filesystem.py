"""What the data side and the output folder both need of a file system: locks, and writes that outlast a power cut.

A lock is the kernel's (``flock``), so it goes with the process that held it, however that died, and nobody has to guess
from a heartbeat whether an owner still lives. The file's text tells the others whom they wait for; it decides nothing.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
REPEAT_SECONDS = 60.0
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class LockHeldError(Exception):
    """A lock was not let go in time; ``owner`` is who holds it."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"the lock is held by {owner}")
        self.owner = owner


@contextmanager
def exclusive(path: Path, purpose: str, patience_s: float = math.inf) -> Iterator[bool]:
    """Hold the lock file ``path``, waiting for its owner to finish or die.

    Args:
        path: the lock file; made when missing and never deleted, since others may be waiting on it.
        purpose: what the owner is doing, for the message to those who wait.
        patience_s: seconds to wait at most.

    Yields:
        True; False where the file system has no locks, after a warning.

    Raises:
        LockHeldError: somebody else held it all that time.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        held = _acquire(descriptor, path, purpose, time.monotonic() + patience_s)
        if held:
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} (since {started})".encode(), 0)
        try:
            yield held
        finally:
            if held:
                os.ftruncate(descriptor, 0)  # so an owner named in a lock that nobody holds is one that was killed
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, purpose: str, deadline: float) -> bool:
    next_message = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            now = time.monotonic()
            if now >= deadline:
                raise LockHeldError(owner(path)) from None
            if now >= next_message:
                log.warning("waiting for %s, which is %s (lock %s)", owner(path), purpose, path)
                next_message += REPEAT_SECONDS
            time.sleep(POLL_SECONDS)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            log.warning("%s: this file system has no locks (%s); %s without one", path, error.strerror, purpose)
            return False
        else:
            if (dead := owner(path, default="")) != "":
                log.warning("taking over from %s, which died while it was %s", dead, purpose)
            return True


def owner(path: Path, default: str = "another process") -> str:
    """Who wrote the lock file last: process, machine and the time it began."""
    return path.read_text(errors="replace") or default if path.exists() else default


def is_held(path: Path) -> bool:
    """Whether some process holds the lock now."""
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
    return False


def fsync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder: a rename is lost in a power cut until this is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
