"""The output directory: checkpoints that appear whole, old ones that vanish whole, and the model at its root.

A checkpoint is written as ``.tmp-global_step_N`` and renamed when it is proven; one to be deleted is renamed to
``.trash-global_step_N`` first. So a ``global_step_N`` is whole at any moment, and what a crash leaves behind starts
with a dot and is cleared away at the next start.

The root holds hard links to one checkpoint's Hugging Face files (no second copy on disk; the links outlive the
checkpoint's own deletion). Several files cannot be renamed at once, so the switch hangs on one: sharded weights are
linked under names that carry the step (``model-step40-00001-of-00004.safetensors``), and the index that lists them is
renamed over the old one last, then the old shards go. A reader gets all its weights from one step, because it learns
their names from one index; if it was slow enough to find an old shard gone, it fails to open it, and tries again. An
unsharded model is one file, and its rename the switch.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from fsdpsft.checkpoint.files import fsync_tree, write_json
from fsdpsft.checkpoint.manifest import Manifest, read_manifest
from fsdpsft.errors import CheckpointError, ConfigError
from fsdpsft.filesystem import LockHeldError, exclusive, fsync

logger = logging.getLogger(__name__)

STEP_NAME = re.compile(r"global_step_(\d+)")
TEMPORARY, TRASH, LINK, ASIDE = ".tmp-", ".trash-", ".link-", "aside_"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LOCK_FILE = ".lock"
PATIENCE_S = 10.0
"""Seconds for a process that is being killed to go: a restarted run meets the one it replaces."""


@contextlib.contextmanager
def only_run_in(root: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Keep every other run out of an output folder, which is made when missing; for rank 0 of a training run.

    The lock ends with the process, so that a killed run leaves none, while one whose launcher alone was killed, and
    which goes on writing, keeps it. On a file system without locks a warning says so.

    Raises:
        ConfigError: another run writes there, and did not end within ``patience_s``; or nobody can write there.
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
        temporary = self.root / f"{TEMPORARY}global_step_{step}"
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, step: int) -> Path:
        """Make the temporary folder of ``step``, all its files fsynced, the checkpoint. A damaged one is replaced."""
        temporary, final = self.root / f"{TEMPORARY}global_step_{step}", self.path(step)
        fsync_tree(temporary)
        if final.exists():
            self._discard(final)
        temporary.rename(final)
        fsync(self.root)
        return final

    def abandon(self, step: int) -> None:
        """Remove the temporary folder of a save that failed, and give its space back."""
        shutil.rmtree(self.root / f"{TEMPORARY}global_step_{step}", ignore_errors=True)

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
        thread = threading.Thread(target=shutil.rmtree, args=(trash,), kwargs={"ignore_errors": True}, daemon=True)
        thread.start()
        self._deletions.append(thread)

    def finish_deletions(self) -> None:
        """Wait until the background deletions are done."""
        while self._deletions:
            self._deletions.pop().join()

    def set_aside(self, after: int) -> None:
        """Rename checkpoints of later steps than ``after`` out of the way: this run does not go on from them.

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

    def best(self, lower_is_better: bool = True) -> int | None:
        """Step of the checkpoint with the best metric (of equals, the newest); None where none carries a metric."""
        sign = -1 if lower_is_better else 1
        scored = [(sign * metric, step) for step, metric in self.metrics().items()]
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
        index = json.loads((source / INDEX_FILE).read_text(encoding="utf-8"))
        index["weight_map"] = {tensor: shards[name] for tensor, name in index["weight_map"].items()}
        prepared = self.root / f"{LINK}{INDEX_FILE}"
        write_json(prepared, index)
        prepared.replace(self.root / INDEX_FILE)


def is_shard(name: str) -> bool:
    """Whether a file name is that of one shard among several of a model's weights."""
    return re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) is not None


def is_model_file(name: str) -> bool:
    """Whether a checkpoint's file belongs to the Hugging Face model itself (not to the state or the adapter)."""
    return not name.startswith(("trainer_state/", "lora_adapter/"))


def _metric(path: Path) -> float | None:
    try:
        manifest: Manifest = read_manifest(path)
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
