"""The output directory: checkpoints that appear and disappear whole, and the model at its root.

A checkpoint is written as ``.tmp-global_step_N`` and renamed when it is proven; one to be deleted is renamed to
``.trash-global_step_N`` first. So a ``global_step_N`` is whole at any moment, and what a crash leaves behind starts
with a dot and is cleared away at the next start.

The root holds hard links to one checkpoint's Hugging Face files. Several files cannot be renamed at once, so one
decides: sharded weights are linked under names that carry the step (``model-step40-00001-of-00004.safetensors``), the
index that lists them is renamed over the old one, then the old shards go. So a reader gets all weights from one step.

A checkpoint is good if ``manifest.json`` matches its own checksum, and every file that it names its length and SHA-256.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fsdpsft.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, read_index
from fsdpsft.errors import CheckpointError, ConfigError
from fsdpsft.filesystem import (
    FileRecord,
    LockHeldError,
    exclusive,
    fsync,
    fsync_tree,
    read_object,
    record_of,
    write_json,
)

logger = logging.getLogger(__name__)

STEP_NAME = re.compile(r"global_step_(\d+)")
TEMPORARY, TRASH, LINK, ASIDE = ".tmp-", ".trash-", ".link-", "aside_"
LOCK_FILE = ".lock"
PATIENCE_S = 10.0
"""Seconds for a process that is being killed to go: a restarted run meets the one it replaces."""
MANIFEST = "manifest.json"
FORMAT_VERSION = 1


# --- The manifest -------------------------------------------------------------------------------------------------


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
    content = read_object(path, CheckpointError, "Use another checkpoint.")
    version = content.pop("format_version", None)
    require_version(path, version)
    try:
        checksum = content.pop("sha256")
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        manifest = Manifest(files=files, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); use another checkpoint.") from error
    if checksum != _checksum({"format_version": version, **asdict(manifest)}):
        raise CheckpointError(
            f"{path} is damaged: its content does not match its own checksum; use another checkpoint."
        )
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names {name!r}, which lies outside the checkpoint; it is not to be trusted.")
    return manifest


def require_version(path: Path, version: object) -> None:
    """Refuse a manifest or state that another version wrote."""
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version}; this version of fsdpsft reads {FORMAT_VERSION}. Resume with the "
            f"version that wrote it."
        )


def verify(folder: Path, *, below: str = "", part: int = 0, parts: int = 1) -> Manifest:
    """Check a checkpoint against its manifest.

    Args:
        folder: a ``global_step_N`` folder.
        below: look only at files whose path begins so (``trainer_state/``).
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
    by_size = sorted(files.items(), key=lambda item: (-item[1].size, item[0]))
    for name, record in by_size[part::parts]:
        if record_of(folder / name) != record:
            raise CheckpointError(
                f"{folder}: the content of {name} does not match its checksum; it was changed or the disk is failing. "
                f"Use another checkpoint."
            )
    return manifest


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- The folder ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_run_in(root: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Keep every other run out of an output folder, which is made when missing; for rank 0 of a training run.

    The lock ends with the process, so that a killed run leaves none, while one whose launcher alone was killed, and
    which still writes, keeps it. On a file system without locks a warning says so.

    Raises:
        ConfigError: another run did not end within ``patience_s``, or the folder cannot be written to.
    """
    lock = root / LOCK_FILE
    with contextlib.ExitStack() as held:
        try:
            root.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(lock, f"training into {root}", patience_s))
        except LockHeldError as error:
            raise ConfigError(
                f"trainer.default_local_dir={root}: {error.owner} is training into this folder. Wait for it to end, "
                "or end it, or name another folder. (Where that process is gone and its machine cannot be reached, "
                f"delete {lock}.)"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"trainer.default_local_dir={root} cannot be written to ({error.strerror}); name another folder"
            ) from error
        yield


class RunFolder:
    """``trainer.default_local_dir``. Only one process of a run (rank 0) may call the methods that write."""

    def __init__(self, root: Path) -> None:
        """Name the folder; it is made when first written to."""
        self.root = root
        self._deletions: list[threading.Thread] = []

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.root / f"global_step_{step}"

    def temporary(self, step: int) -> Path:
        """Where the checkpoint of a step is written."""
        return self.root / f"{TEMPORARY}global_step_{step}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Finished checkpoints as ``(step, path)``, oldest first; nothing is verified."""
        if not self.root.is_dir():
            return []
        found = ((STEP_NAME.fullmatch(path.name), path) for path in self.root.iterdir() if path.is_dir())
        return sorted((int(match[1]), path) for match, path in found if match)

    def clean(self) -> None:
        """Remove what an earlier run left half-written or half-deleted."""
        if not self.root.is_dir():
            return
        for path in self.root.iterdir():
            if path.name.startswith((f"{TEMPORARY}global_step_", f"{TRASH}global_step_")):
                logger.info("removing %s, left behind by an interrupted run", path)
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(LINK):
                path.unlink(missing_ok=True)

    def begin(self, step: int) -> Path:
        """Make the empty temporary folder in which the checkpoint of ``step`` is written."""
        temporary = self.temporary(step)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, step: int) -> Path:
        """Make the temporary folder of ``step``, all its files fsynced, the checkpoint. A damaged one is replaced."""
        temporary, final = self.temporary(step), self.path(step)
        fsync_tree(temporary)
        if final.exists():
            self._discard(final)
        temporary.rename(final)
        fsync(self.root)
        return final

    def abandon(self, step: int) -> None:
        """Remove the temporary folder of a save that failed, and give its space back."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def retire(self, keep: int | None, keep_every: int | None, best: int | None) -> None:
        """Delete, in the background, all but the ``keep`` newest checkpoints.

        Args:
            keep: None keeps all.
            keep_every: checkpoints of steps divisible by it stay (None: no such rule).
            best: a step that stays in any case.
        """
        if keep is None:
            return
        for step, path in self.checkpoints()[:-keep]:
            if step != best and not (keep_every and step % keep_every == 0):
                self._discard(path)

    def _discard(self, path: Path) -> None:
        trash = self.root / f"{TRASH}{path.name}"
        if trash.exists():
            shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        thread = threading.Thread(target=shutil.rmtree, args=(trash,), kwargs={"ignore_errors": True})
        thread.start()
        self._deletions.append(thread)

    def finish_deletions(self) -> None:
        """Wait until the background deletions are done."""
        while self._deletions:
            self._deletions.pop().join()

    def set_aside(self, after: int) -> None:
        """Rename checkpoints of later steps than ``after`` out of the way: this run does not continue from them.

        They would pass for the newest ones of a run that began anew, or again from an earlier step. Nothing is deleted.
        """
        for step, path in self.checkpoints():
            if step <= after:
                continue
            target = self.root / f"{ASIDE}{path.name}"
            for number in itertools.count(1):
                if not target.exists():
                    break
                target = self.root / f"{ASIDE}{path.name}.{number}"
            logger.warning(
                "%s is of another run than the one begun at step %d; renamed to %s", path, after, target.name
            )
            path.rename(target)

    def metrics(self) -> dict[int, float]:
        """Step -> metric of the checkpoints that carry one."""
        found = {step: _metric(path) for step, path in self.checkpoints()}
        return {step: metric for step, metric in found.items() if metric is not None}

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest metric (of equals, the newest); None where none carries a metric."""
        scored = [(-metric, step) for step, metric in self.metrics().items()]
        return max(scored)[1] if scored else None

    def published(self) -> int | None:
        """Step whose model the root shows; None where it shows none."""
        try:
            return read_manifest(self.root).step
        except CheckpointError:
            return None

    def publish(self, step: int) -> None:
        """Make the root directory the model of checkpoint ``step``; the module's text says what a reader sees.

        Raises:
            CheckpointError: the checkpoint has no Hugging Face model.
        """
        source = self.path(step)
        names = [name for name in read_manifest(source).files if is_model_file(name)]
        switch = next((name for name in (INDEX_FILE, SINGLE_FILE) if name in names), None)
        if switch is None:
            raise CheckpointError(f"{source} holds no model files to link into {self.root}.")
        shards = {n: n.replace("model-", f"model-step{step}-", 1) for n in names if is_shard(n)}
        for name, linked in shards.items():
            _link(source / name, self.root / linked)
        for name in names:
            if name not in shards and name != switch:
                _link(source / name, self.root / name)
        if switch == INDEX_FILE:
            self._switch_index(source, shards)
        else:
            _link(source / switch, self.root / switch)
        _link(source / "manifest.json", self.root / "manifest.json")
        fsync(self.root)
        for path in self.root.glob("model*.safetensors*"):
            if path.name not in (*shards.values(), switch):
                path.unlink()

    def _switch_index(self, source: Path, shards: dict[str, str]) -> None:
        """Write the index with the shards' names at the root, and rename it over the one in place."""
        index = read_object(source / INDEX_FILE, CheckpointError, "Use another checkpoint.")
        index["weight_map"] = {tensor: shards[name] for tensor, name in read_index(source).items()}
        prepared = self.root / f"{LINK}{INDEX_FILE}"
        write_json(prepared, index)
        prepared.replace(self.root / INDEX_FILE)


def is_shard(name: str) -> bool:
    """Whether a file name is that of one shard among several of a model's weights."""
    return re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) is not None


def is_model_file(name: str) -> bool:
    """Whether a checkpoint's file belongs to the Hugging Face model itself (not to the state or the adapter)."""
    return not name.startswith(("trainer_state/", "lora_adapter/"))


def holds_model(path: Path) -> bool:
    """Whether a folder holds a Hugging Face model's weights."""
    return (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file()


def _metric(path: Path) -> float | None:
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        logger.warning("%s", error)
        return None
    return manifest.metric


def _link(source: Path, target: Path) -> None:
    """Put a hard link to ``source`` in the place of ``target`` at once; a copy where the file system has no links."""
    prepared = target.with_name(f"{LINK}{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    prepared.unlink(missing_ok=True)
    try:
        os.link(source, prepared)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        logger.warning("%s: no hard links on this file system (%s); the model is copied", target, error.strerror)
        shutil.copyfile(source, prepared)
    prepared.replace(target)


_NO_LINKS: Sequence[int] = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
