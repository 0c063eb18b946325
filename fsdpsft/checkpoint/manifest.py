"""``manifest.json``: which files a checkpoint consists of, what each must contain, and what was proven about them.

A checkpoint is good if its manifest is whole (it carries a checksum of itself) and every file that it names has the
length and SHA-256 that it names. That recognises the torn, the truncated, the bit-flipped and the half-deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fsdpsft.checkpoint.files import FileRecord, record_of, write_json
from fsdpsft.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents.

    Attributes:
        step: optimiser steps done.
        metric: what "best" is judged by (None where the run measures nothing).
        files: path relative to the checkpoint (with ``/``) -> what the file must be; the manifest itself apart.
        verdict: what was checked before the checkpoint counted as saved, and what was found.
        fingerprints: of the model's files, chat template, data; tokens trained.
    """

    step: int
    metric: float | None
    files: Mapping[str, FileRecord]
    verdict: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, Any] = field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` with a checksum of its own content."""
    content = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    write_json(folder / MANIFEST, {**content, "sha256": _checksum(content)})


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` itself (not the files it names).

    Raises:
        CheckpointError: it is absent, torn, changed, or of a version this code does not know.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a finished checkpoint.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checksum = content.pop("sha256")
        version = content.pop("format_version")
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        manifest = Manifest(files=files, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); use another checkpoint.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format_version {version}; this version of fsdpsft reads {FORMAT_VERSION}.")
    if checksum != _checksum({"format_version": version, **asdict(manifest)}):
        raise CheckpointError(
            f"{path} is damaged: its content does not match its own checksum; use another checkpoint."
        )
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names {name!r}, which lies outside the checkpoint; it is not to be trusted.")
    return manifest


def verify(folder: Path, *, below: str = "", deep: bool = True, part: int = 0, parts: int = 1) -> Manifest:
    """Check a checkpoint against its manifest.

    Args:
        folder: a ``global_step_N`` folder.
        below: look only at files whose path begins so (``trainer_state/``).
        deep: also read and hash every file; else only existence and length are looked at.
        part: of ``parts``, which files to hash, so that the ranks can share the reading (by size, largest first).

    Raises:
        CheckpointError: names the first file that is missing, short, long or changed.
    """
    manifest = read_manifest(folder)
    files = {name: record for name, record in manifest.files.items() if name.startswith(below)}
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing, though {MANIFEST} names it; use another checkpoint.")
        if path.stat().st_size != record.size:
            raise CheckpointError(
                f"{folder}: {name} has {path.stat().st_size:,} bytes instead of {record.size:,}; it was cut short or "
                f"overwritten. Use another checkpoint."
            )
    if deep:
        by_size = sorted(files.items(), key=lambda item: (-item[1].size, item[0]))
        for name, record in by_size[part::parts]:
            if record_of(folder / name) != record:
                raise CheckpointError(
                    f"{folder}: the content of {name} does not match its checksum; it was changed or the disk is "
                    f"failing. Use another checkpoint."
                )
    return manifest


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
