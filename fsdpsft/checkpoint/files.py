"""Files that survive a power cut: checksums, fsync, free space. Nothing here knows what a model is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpsft.errors import CheckpointError, UserError
from fsdpsft.filesystem import fsync

CHUNK_BYTES = 16 << 20
"""Bytes hashed, read or written at once: large enough that the GIL is released nearly all the time."""


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
