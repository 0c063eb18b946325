"""Tokenise once: sources to a token store, in parallel processes, before any process group exists.

The shards of all sources are handed to building processes, each of which writes part files; the parts are then strung
together in the order of the shards, so that the store does not depend on the number of processes. It is built in a
folder of its own, fsynced, and renamed to its place at the very end: what is at that place is whole.

A store's key is the content of the files, the encoder (tokenizer, template, mask code, options) and this layout's
version. When any of it changes, another store is built; the old one stays valid for what it was built for.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fsdpsft.data.batches.store import COLUMNS, MANIFEST, OFFSETS, STATS, STORE_VERSION, TokenStore
from fsdpsft.data.batches.store_parts import (
    HASH_DTYPE,
    PART_ARRAYS,
    BuildOptions,
    Encoder,
    Job,
    Tally,
)
from fsdpsft.data.rows.files import TARGET_BYTES
from fsdpsft.data.rows.sources import Source, fingerprint, shards
from fsdpsft.errors import DataError
from fsdpsft.filesystem import exclusive, fsync, is_held, owner

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 600.0
GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.2
_YOUNG_OBJECTS = 50_000  # between collections: a batch of rows makes tens of thousands, hardly any of them in cycles
_BLOCK = 1 << 18
_SETTLED_NS = 2_000_000_000
_SHARDS, _SMALLEST_SHARD = 64, 128 << 10


# ------------------------------------------------------------------------------------------------------ open or build


def open_or_build(
    sources: Sequence[Source],
    encoder: Encoder,
    options: BuildOptions,
    cache_dir: str | Path,
    *,
    may_build: bool = True,
    progress: bool = True,
) -> TokenStore:
    """Open the store of these sources, building it first where it is not there yet.

    Any number of processes on any number of machines may call this for the same folder at the same time: one builds,
    the others wait with a message and open what it made.

    Args:
        sources: what to tokenise; a store keeps their order.
        encoder: turns rows into samples.
        options: truncation and the treatment of bad rows.
        cache_dir: folder of all stores; made when missing.
        may_build: False only waits for another process's store (all local ranks but one).
        progress: show a progress bar on standard error while building.

    Raises:
        DataError: a row or file cannot be used, too many rows cannot, nothing is left to train on, or the process
            that was waited for ended without a store.
    """
    cache = Path(cache_dir).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    key = store_key(sources, encoder, options, cache)
    folder, lock = cache / key, cache / f"{key}.lock"
    if (store := _open_if_whole(folder)) is not None:
        return _checked(store, options)
    if not may_build:
        return _checked(_wait_for(folder, lock), options)
    with exclusive(lock, "tokenising the same data") as held:
        store = _open_if_whole(folder)  # the one we waited for may have made it
        if store is None:
            if held:
                _sweep(folder)
            build(folder, sources, encoder, options, fingerprint=key, progress=progress)
            store = TokenStore.open(folder)
    return _checked(store, options)


def store_key(sources: Sequence[Source], encoder: Encoder, options: BuildOptions, cache: Path) -> str:
    """The name of the store of this content, 32 hex digits."""
    parts = {
        "version": STORE_VERSION,
        "encoder": encoder.fingerprint,
        "max_length": options.max_length,
        "truncation": options.truncation,
        "on_bad_row": options.on_bad_row,
        "sources": [[s.name, _content_hash(s, cache), sorted(s.row_format.items())] for s in sources],
    }
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _content_hash(source: Source, cache: Path) -> str:
    """The hash of a source's files, remembered while they stay the same files, unchanged since.

    Unchanged means: same path, inode, size, and times of change to the nanosecond. Files changed in the last two
    seconds are not remembered, as a further change could fall within the clock's resolution.
    """
    stats = [(os.path.realpath(name), Path(name).stat()) for name in source.files]
    identity = [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]
    note = cache / "content" / hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
    if note.is_file() and len(known := note.read_text()) > 0:
        return known
    content = fingerprint(source)
    if all(time.time_ns() - max(s.st_mtime_ns, s.st_ctime_ns) > _SETTLED_NS for _, s in stats):
        note.parent.mkdir(exist_ok=True)
        beside = note.with_suffix(f".{uuid.uuid4().hex}")
        beside.write_text(content)
        beside.replace(note)
    return content


def _open_if_whole(folder: Path) -> TokenStore | None:
    if not folder.exists():
        return None
    try:
        return TokenStore.open(folder)
    except DataError as error:
        log.warning("not using a damaged token store: %s", error)
        return None


def _wait_for(folder: Path, lock: Path) -> TokenStore:
    """Wait until another process has built the store."""
    started = last_held = last_message = time.monotonic()
    seen, builder = False, ""
    while True:
        if folder.exists() and (store := _open_if_whole(folder)) is not None:
            return store
        now = time.monotonic()
        if is_held(lock):
            seen, last_held, builder = True, now, owner(lock)
        if now - last_held > (GRACE_SECONDS if seen else PATIENCE_SECONDS):
            raise DataError(
                f"Waited {now - started:.0f} s for the tokenised data in {folder}, and "
                + (
                    f"{builder}, which was making it, ended without it; see its message."
                    if seen
                    else "nobody makes it."
                )
            )
        if now - last_message > GRACE_SECONDS:
            log.info("waiting for %s, which tokenises the data into %s", builder or "another process", folder)
            last_message = now
        time.sleep(_POLL_SECONDS)


def _sweep(folder: Path) -> None:
    """Delete what builders that died have left, and a damaged store. Only under the lock."""
    for remains in folder.parent.glob(f".building-{folder.name}-*"):
        shutil.rmtree(remains, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)


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
    """
    target = Path(folder)
    scratch = target.parent / f".building-{target.name}-{uuid.uuid4().hex[:8]}"
    scratch.mkdir(parents=True)
    try:
        token_dtype = "<u2" if encoder.vocab_size <= 1 << 16 else "<u4"
        target_bytes = _shard_bytes(sources)
        work = [(source, shard) for source in sources for shard in shards(source, target_bytes)]
        job = Job(scratch, work, encoder, options, token_dtype)
        tallies = _run(job, progress)
        _string_together(scratch, tallies)
        _finish(scratch, job, tallies, sources, fingerprint)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _shard_bytes(sources: Sequence[Source]) -> int:
    """Small enough that every process gets many shards and none is left with a long last one."""
    total = sum(Path(name).stat().st_size for source in sources for name in source.files)
    return min(max(total // _SHARDS, _SMALLEST_SHARD), TARGET_BYTES)


def _run(job: Job, progress: bool) -> list[Tally]:
    """Encode all shards; the tallies are in the order of the shards."""
    sizes = [shard.rows for _, shard in job.work]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    workers = min(job.options.num_workers or _usable_cores(), len(job.work))
    with tqdm(total=total, desc="tokenising", unit=" rows", disable=not progress, file=sys.stderr) as bar:
        if workers <= 1:
            return [job.run(number, bar.update) for number in range(len(job.work))]
        return _run_in_processes(job, workers, bar)


def _run_in_processes(job: Job, workers: int, bar: Any) -> list[Tally]:
    # Forked processes share the encoder and do not run the user's main module again. Elsewhere than on Linux, forking
    # is not safe with the system's libraries.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    done_rows = context.Value("q", 0)
    gc.freeze()  # so that collections in the forked processes do not touch, and thereby copy, what they share
    with (
        _single_threaded_tokenizers(),
        ProcessPoolExecutor(
            workers, context, initializer=_start_worker, initargs=(job, done_rows, os.getpid())
        ) as pool,
    ):
        try:
            futures = [pool.submit(_run_one, number) for number in range(len(job.work))]
            _watch(futures, lambda: bar.update(done_rows.value - bar.n))
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise DataError(
                "A process that was tokenising was killed, most likely for want of memory; set data.num_workers to a "
                "smaller number."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            gc.unfreeze()


def _watch(futures: Sequence[Future[Tally]], show: Callable[[], None]) -> None:
    """Wait for all, or the first that fails, and keep the progress bar moving."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        show()
        if any(future.exception() is not None for future in done):
            return


_worker: tuple[Job, Any] | None = None


def _start_worker(job: Job, done_rows: Any, parent: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    # The parallelism is in the processes; threads of the tokenizers' own would not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(_YOUNG_OBJECTS)
    _worker = (job, done_rows)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process when its parent has died: nobody would read what it writes, and it holds the parent's lock."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _run_one(number: int) -> Tally:
    assert _worker is not None
    job, done_rows = _worker

    def advance(rows: int) -> None:
        with done_rows.get_lock():
            done_rows.value += rows

    return job.run(number, advance)


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Keep the tokenizers library from warning about forks, without touching what the user has set."""
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------------- assemble


def _string_together(folder: Path, tallies: Sequence[Tally]) -> None:
    """Make one file of each array's parts, in order, deleting the parts on the way; then the offsets."""
    for name in PART_ARRAYS:
        _join([folder / f"part-{number:06d}.{name}" for number in range(len(tallies))], folder / f"{name}.bin")
    _accumulate(folder / "lengths.bin", COLUMNS["lengths"], folder / "offsets.bin")
    _accumulate(folder / "run_counts.bin", "<i8", folder / "run_offsets.bin")
    (folder / "run_counts.bin").unlink()


def _join(parts: Sequence[Path], whole: Path) -> None:
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, out, _BLOCK)
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

    Sorting all hashes would take memory by the sample, so they go to buckets first, of about a block each.
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


def _finish(scratch: Path, job: Job, tallies: Sequence[Tally], sources: Sequence[Source], fingerprint: str) -> None:
    """Write statistics and manifest, and make all of it durable."""
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
    contents = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
    manifest = {
        "version": STORE_VERSION,
        "fingerprint": fingerprint,
        "token_dtype": job.token_dtype,
        "source_names": list(by_source),
        "source_counts": [tally.samples for tally in by_source.values()],
        "files": list(files.items()),
        "bytes": contents,
    }
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1))
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
            f"{options.max_bad_share:g} allows ({reasons(stats)}). Mend the data, or raise data.max_bad_share."
        )
    if stats["skipped"] or stats["dropped"]:
        log.warning("%d samples of %d rows: %s", stats["samples"], stats["rows"], reasons(stats))
    return store
