"""Locks, and writes that survive a crash: what the data side and the output folder both need of a file system.

A lock is the kernel's (``flock``): it ends with the process that holds it, however that process ends, so no one has to
guess whether an owner still lives. The file's text names the owner to those who wait; it decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpsft.errors import CheckpointError, UserError

log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
"""Bytes hashed, read or written at once: large enough that the GIL is released nearly all the time."""

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


# --- Content, checksums, space ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its length in bytes and the SHA-256 of its content (hex)."""

    size: int
    sha256: str


def record_of(path: Path) -> FileRecord:
    """Hash a file as it is on disk, in constant memory."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileRecord(stream.tell(), digest)


def read_object(path: Path, error_class: type[UserError], advice: str) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        error_class: it is not UTF-8, not JSON, nested too deep or no object; ``advice`` ends the message.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise error_class(f"{path} is damaged: it is not JSON ({reason}). {advice}") from error
    if not isinstance(content, dict):
        raise error_class(f"{path} is damaged: it holds {type(content).__name__}, not a JSON object. {advice}")
    return content


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Write a small file, fsync it, and return what was written."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def write_json(path: Path, value: Any) -> FileRecord:
    """Write ``value`` as indented JSON, durably."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy a file's content, durably, making the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    fsync(target)
    return record_of(target)


def fsync_tree(folder: Path) -> None:
    """Make the names in a folder and in every folder below it durable (files are fsynced as they are closed)."""
    for below, _, _ in os.walk(folder):
        fsync(Path(below))


def require_space(folder: Path, needed: int, reserve: int = 64 << 20) -> None:
    """Refuse to begin writing ``needed`` bytes under ``folder`` where they do not fit with ``reserve`` to spare.

    Raises:
        CheckpointError: names the folder, the bytes needed and the bytes free.
    """
    free = shutil.disk_usage(folder).free
    if needed + reserve > free:
        raise CheckpointError(
            f"{folder}: the checkpoint needs {needed:,} bytes (and {reserve:,} to spare), but {free:,} are free. "
            f"Earlier checkpoints are untouched. Free some space (those of earlier runs stay there, as "
            f"aside_global_step_N, until you delete them), or keep fewer checkpoints (trainer.max_ckpt_to_keep)."
        )
