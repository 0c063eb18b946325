"""Tokenise once: sources to a token store, in parallel processes, before any process group exists.

Each process encodes shards into part files, which are joined in the order of the shards: the store does not depend on
the number of processes. It is built in a folder of its own, fsynced and renamed at the end, so what is there is whole.
A store's key is the content of the files, the encoder (tokenizer, template, mask code, options) and the layout version.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fsdpsft.data.batches.store import (
    COLUMNS,
    MANIFEST,
    OFFSETS,
    STATS,
    STORE_VERSION,
    TokenStore,
    digest_of,
    is_readable,
    sealed,
)
from fsdpsft.data.batches.store_parts import HASH_DTYPE, PART_ARRAYS, BuildOptions, Encoder, Job, Tally
from fsdpsft.data.rows.files import TARGET_BYTES
from fsdpsft.data.rows.sources import Source, fingerprint, shards
from fsdpsft.data.workers import map_in_processes, usable_cores
from fsdpsft.errors import ConfigError, DataError
from fsdpsft.filesystem import LockHeldError, exclusive, fsync, is_held, owner, replace_file

log = logging.getLogger(__name__)

DEFAULT_CACHE = "~/.cache/fsdpsft"
PATIENCE_SECONDS = 600.0
BUILD_SECONDS = 86_400.0
"""Longest wait for another process that is building."""

GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.2
_BLOCK = 1 << 18
_SETTLED_NS = 2_000_000_000
_SHARDS, _SMALLEST_SHARD = 64, 128 << 10
_NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


# ------------------------------------------------------------------------------------------------------ open or build


def open_or_build(
    sources: Sequence[Source],
    encoder: Encoder,
    options: BuildOptions,
    cache_dir: str | Path | None = None,
    *,
    may_build: bool = True,
    progress: bool = True,
    every_byte: bool = False,
) -> TokenStore:
    """Open the store of these sources, building it first where there is none that is whole.

    Any number of processes on any number of machines may call this for the same folder at the same time: one builds,
    the others wait with a message and open what it made.

    Args:
        sources: what to tokenise; a store keeps their order.
        encoder: turns rows into samples.
        options: truncation and the treatment of bad rows.
        cache_dir: folder of all stores; made when missing. None takes ``DEFAULT_CACHE``, or a folder for temporary
            files where that cannot be written to.
        may_build: False only waits for another process's store (all local ranks but one).
        progress: show a progress bar on standard error while building.
        every_byte: compare the hashes of large arrays, too.

    Raises:
        DataError: a row or file cannot be used, too many rows cannot, nothing is left to train on, or the process
            that was waited for ended without a store.
        ConfigError: no folder can be written to.
    """
    caches = cache_folders(cache_dir)
    key = store_key(sources, encoder, options, caches)
    for cache in caches:
        if (store := _open_if_whole(cache / key, every_byte)) is not None:
            return _checked(store, options)
    if not may_build:
        return _checked(_wait_for([cache / key for cache in caches]), options)
    faults: list[str] = []
    for cache in caches:
        try:
            store = _built(cache / key, sources, encoder, options, progress, every_byte)
        except OSError as error:
            if not _is_of(cache, error):
                raise
            faults.append(f"{cache} cannot be written to ({error.strerror})")
            log.warning("data.cache_dir: %s", faults[-1])
        else:
            return _checked(store, options)
    raise ConfigError(f"data.cache_dir: {'; '.join(faults)}. Free some space, or name another folder")


def _built(
    folder: Path, sources: Sequence[Source], encoder: Encoder, options: BuildOptions, progress: bool, every_byte: bool
) -> TokenStore:
    with _building(folder) as alone:
        store = _open_if_whole(folder, every_byte, quiet=True)  # the process we waited for may have made it
        if store is None:
            _sweep(folder, alone)
            build(folder, sources, encoder, options, fingerprint=folder.name, progress=progress)
            store = TokenStore.open(folder)
    return store


def cache_folders(cache_dir: str | Path | None) -> list[Path]:
    """Where stores are looked for, and built, the first that can be written to."""
    if cache_dir is not None:
        return [Path(cache_dir).expanduser()]
    spare = Path(tempfile.gettempdir()) / f"fsdpsft-{os.getuid()}"
    # Anybody may make a folder there: one that is another user's is not read.
    ours = not os.path.lexists(spare) or (not spare.is_symlink() and spare.stat().st_uid == os.getuid())
    return [Path(DEFAULT_CACHE).expanduser(), *([spare] if ours else [])]


def _is_of(cache: Path, error: OSError) -> bool:
    """Whether an error came from writing to ``cache``; a full disk is named by no file."""
    if error.errno in _NOT_WRITABLE or not isinstance(error.filename, str | Path):
        return error.errno in _NOT_WRITABLE
    named = Path(error.filename)
    return named.is_relative_to(cache) or cache.is_relative_to(named)


def store_key(sources: Sequence[Source], encoder: Encoder, options: BuildOptions, caches: Sequence[Path]) -> str:
    """The name of the store of this content, 32 hex digits."""
    parts = {
        "version": STORE_VERSION,
        "encoder": encoder.fingerprint,
        "max_length": options.max_length,
        "truncation": options.truncation,
        "on_bad_row": options.on_bad_row,
        "sources": [[s.name, _content_hash(s, caches), sorted(s.row_format.items())] for s in sources],
    }
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _content_hash(source: Source, caches: Sequence[Path]) -> str:
    """The hash of a source's files, remembered while they stay the same files, unchanged since.

    Unchanged means: same path, inode, size, and times of change to the nanosecond. Files changed in the last two
    seconds are not remembered, as a further change could fall within the clock's resolution.
    """
    stats = [(os.path.realpath(name), Path(name).stat()) for name in source.files]
    identity = [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]
    name = hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
    notes = [cache / "content" / name for cache in caches]
    for note in notes:
        if note.is_file() and re.fullmatch(r"[0-9a-f]{32}", known := note.read_text(errors="replace")):
            return known
    content = fingerprint(source)
    if all(time.time_ns() - max(s.st_mtime_ns, s.st_ctime_ns) > _SETTLED_NS for _, s in stats):
        with contextlib.suppress(OSError):  # without a note the files are read again the next time
            notes[0].parent.mkdir(parents=True, exist_ok=True)
            replace_file(notes[0], content.encode())
    return content


def _open_if_whole(folder: Path, every_byte: bool = False, quiet: bool = False) -> TokenStore | None:
    if not folder.exists():
        return None
    try:
        return TokenStore.open(folder, every_byte)
    except (DataError, OSError) as error:  # unreadable, or another process is just removing it
        if not quiet:
            log.warning("%s; the data is tokenised anew", error)
        return None


def _wait_for(folders: Sequence[Path]) -> TokenStore:
    """Wait until another process has built the store in one of the folders."""
    started = last_held = last_message = time.monotonic()
    builder = ""
    while (now := time.monotonic()) - started < BUILD_SECONDS:
        for folder in folders:
            if (store := _open_if_whole(folder, quiet=True)) is not None:
                return store
            if is_held(lock := folder.with_suffix(".lock")):
                last_held, builder = now, owner(lock)
        if now - last_held > (GRACE_SECONDS if builder else PATIENCE_SECONDS):
            break
        if now - last_message > GRACE_SECONDS:
            log.info("waiting for %s, which tokenises the data", builder or "another process")
            last_message = now
        time.sleep(_POLL_SECONDS)
    fault = f"{builder}, which was making it, ended without it; see its message" if builder else "none is made"
    raise DataError(f"Waited {time.monotonic() - started:.0f} s for the tokenised data in {folders[0]}, and {fault}.")


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[bool]:
    """Let one process at a time build the store ``folder``; False where the file system has no locks for that."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_suffix(".lock")
    try:
        with exclusive(lock, "tokenising the same data", BUILD_SECONDS) as alone:
            yield alone
    except LockHeldError as error:
        raise DataError(f"waited a day for {error.owner}, which tokenises the same data ({lock}); end it") from error


def _sweep(folder: Path, alone: bool) -> None:
    """Delete a damaged store and what builders that died have left, and name stores that only take space."""
    for remains in folder.parent.glob(f".building-{folder.name}-*") if alone else ():
        shutil.rmtree(remains, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)
    old = sorted(path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}") if not is_readable(path.parent))
    if old:
        names = ", ".join(old)
        log.info(f"{folder.parent} holds {len(old)} token stores of an earlier version, never read again: {names}")


# --------------------------------------------------------------------------------------------------------------- build


def build(
    folder: str | Path,
    sources: Sequence[Source],
    encoder: Encoder,
    options: BuildOptions,
    *,
    fingerprint: str = "",
    progress: bool = False,
) -> None:
    """Tokenise ``sources`` into a new store at ``folder``; memory does not grow with the number of rows.

    Where ``folder`` is there already when the store is finished, another process was faster, and that one stays.

    Raises:
        DataError: a row or file cannot be used, too many rows cannot, or no sample is left.
        OSError: the folder cannot be written to; nothing is left in it.
    """
    target = Path(folder)
    scratch = target.parent / f".building-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir(parents=True)
        token_dtype = "<u2" if encoder.vocab_size <= 1 << 16 else "<u4"
        target_bytes = _shard_bytes(sources)
        work = [(source, shard) for source in sources for shard in shards(source, target_bytes)]
        job = Job(scratch, work, encoder, options, token_dtype)
        tallies = _encode_all(job, progress)
        _join_parts(job)
        _finish(job, tallies, sources, fingerprint)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _shard_bytes(sources: Sequence[Source]) -> int:
    """Small enough that every process gets many shards and none is left with a long last one."""
    total = sum(Path(name).stat().st_size for source in sources for name in source.files)
    return min(max(total // _SHARDS, _SMALLEST_SHARD), TARGET_BYTES)


def _encode_all(job: Job, progress: bool) -> list[Tally]:
    """Encode all shards; the tallies are in the order of the shards."""
    sizes = [shard.rows for _, shard in job.work]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    processes = min(job.options.num_workers or usable_cores(), len(job.work))
    tallies: list[Tally] = []
    with (
        tqdm(total=total, desc="tokenising", unit=" rows", disable=not progress, file=sys.stderr) as bar,
        contextlib.closing(map_in_processes(job.run, range(len(job.work)), processes)) as results,
    ):
        for tally in results:
            tallies.append(tally)
            bar.update(tally.rows)
    return tallies


# ------------------------------------------------------------------------------------------------------------- assemble


def _join_parts(job: Job) -> None:
    """Make one file of each array's parts, in order, deleting the parts on the way; then the offsets."""
    folder = job.folder
    for name in PART_ARRAYS:
        with (folder / f"{name}.bin").open("wb") as whole:
            for number in range(len(job.work)):
                _move_into(whole, job.part(number, name))
    _accumulate(folder / "lengths.bin", COLUMNS["lengths"], folder / "offsets.bin")
    _accumulate(folder / "run_counts.bin", "<i8", folder / "run_offsets.bin")
    (folder / "run_counts.bin").unlink()


def _move_into(whole: BinaryIO, part: Path) -> None:
    with part.open("rb") as stream:
        shutil.copyfileobj(stream, whole, _BLOCK)
    part.unlink()


def _accumulate(counts: Path, dtype: str, offsets: Path) -> None:
    """Write [n + 1] offsets for a file of n counts."""
    total = np.zeros(1, OFFSETS["offsets"])
    with offsets.open("wb") as out:
        out.write(total.tobytes())
        for block in _blocks(counts, dtype):
            sums = total[-1] + np.cumsum(block, dtype=np.int64)
            out.write(sums.astype(OFFSETS["offsets"]).tobytes())
            total = sums[-1:]


def _blocks(path: Path, dtype: str) -> Iterator[NDArray[Any]]:
    with path.open("rb") as stream:
        while data := stream.read(_BLOCK * np.dtype(dtype).itemsize):
            yield np.frombuffer(data, dtype)


def _count_duplicates(folder: Path, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Samples equal to an earlier one, for each range of samples that ends before ``ends``. Deletes the hashes.

    Sorting all hashes would take memory for every sample, so they go to buckets first, of about a block each.
    """
    record = np.dtype([("hash", HASH_DTYPE), ("index", "<i8")])
    count = sum(len(hashes) for hashes in _blocks(folder / "hashes.bin", HASH_DTYPE)) // _BLOCK + 1
    buckets = [folder / f"bucket-{number}" for number in range(count)]
    first = 0
    for hashes in _blocks(folder / "hashes.bin", HASH_DTYPE):
        records = np.empty(len(hashes), record)
        records["hash"], records["index"] = hashes, np.arange(first, first + len(hashes))
        first += len(hashes)
        for number, bucket in enumerate(buckets):
            with bucket.open("ab") as out:
                out.write(records[hashes % count == number].tobytes())
    found = np.zeros(len(ends), np.int64)
    for bucket in buckets:
        records = np.fromfile(bucket, record) if bucket.exists() else np.empty(0, record)
        repeated = np.ones(len(records), bool)
        repeated[np.unique(records["hash"], return_index=True)[1]] = False
        owners = np.searchsorted(ends, records["index"][repeated], side="right")
        found += np.bincount(owners, minlength=len(ends))
        bucket.unlink(missing_ok=True)
    (folder / "hashes.bin").unlink()
    return found


def _finish(job: Job, tallies: Sequence[Tally], sources: Sequence[Source], fingerprint: str) -> None:
    """Write statistics and manifest, and make all of it durable."""
    scratch = job.folder
    duplicates = _count_duplicates(scratch, np.cumsum([tally.samples for tally in tallies]))
    total, by_source = Tally(), {source.name: Tally() for source in sources}
    files: dict[str, int] = {}
    for (source, shard), tally, repeated in zip(job.work, tallies, duplicates.tolist(), strict=True):
        tally.duplicates = repeated
        total.add(tally)
        by_source[source.name].add(tally)
        files[shard.file] = files.get(shard.file, 0) + tally.samples
    stats = total.as_dict() | {"sources": {name: tally.as_dict() for name, tally in by_source.items()}}
    (scratch / STATS).write_text(json.dumps(stats, indent=1))
    if total.samples == 0:
        raise DataError(f"Nothing to train on: none of {total.rows} rows gave a sample. {reasons(stats)}")
    manifest = {
        "version": STORE_VERSION,
        "fingerprint": fingerprint,
        "token_dtype": job.token_dtype,
        "source_names": list(by_source),
        "source_counts": [tally.samples for tally in by_source.values()],
        "files": list(files.items()),
        "contents": {path.name: [path.stat().st_size, digest_of(path)] for path in sorted(scratch.iterdir())},
    }
    (scratch / MANIFEST).write_text(sealed(manifest))
    for path in [*scratch.iterdir(), scratch]:
        fsync(path)


def _publish(scratch: Path, target: Path) -> None:
    """Rename a finished store to its place."""
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        log.info("%s was built by another process in the meantime; using that one", target)
    fsync(target.parent)


# --------------------------------------------------------------------------------------------------------------- report


def reasons(stats: dict[str, Any]) -> str:
    """What was left out and why, in one line, with an example."""
    counts = [f"{count} skipped: {reason}" for reason, count in stats["skipped"].items()]
    counts += [f"{count} dropped: {reason}" for reason, count in stats["dropped"].items()]
    example = f"; for example {stats['examples'][0]}" if stats["examples"] else ""
    return ", ".join(counts) + example


def _checked(store: TokenStore, options: BuildOptions) -> TokenStore:
    """Refuse a store that lost too many rows; say what it lost."""
    stats = store.stats
    unusable = Tally(**{name: value for name, value in stats.items() if name != "sources"}).unusable
    if unusable > options.max_bad_share * max(stats["rows"], 1):
        raise DataError(
            f"{unusable} of {stats['rows']} rows cannot be trained on, more than data.max_bad_share="
            f"{options.max_bad_share:g} allows ({reasons(stats)}). Fix the data, or raise data.max_bad_share."
        )
    if stats["skipped"] or stats["dropped"]:
        log.warning("%d samples of %d rows: %s", stats["samples"], stats["rows"], reasons(stats))
    return store
