"""Tokenised samples on disk: flat, memory-mapped, shared by all processes of a machine, and whole or not there.

A store is a folder of plain arrays beside a ``manifest.json`` that lists each file's size and hash, and carries its own
hash; ``open`` refuses a folder in which anything is missing or changed. The files:

    tokens.bin       [tokens] uint16 (uint32 where an id does not fit), sample after sample
    runs.bin         [runs] (start, stop, weight): the trained stretches of each sample, all other tokens have weight 0
    offsets.bin      [n + 1] int64, where a sample starts in tokens
    run_offsets.bin  [n + 1] int64, where a sample starts in runs
    lengths.bin, trained.bin [n] int32, weights.bin [n] float64, row_numbers.bin [n] int64
    stats.json       what was dropped, truncated or skipped, and why

Samples of one source are next to each other, in the order of its rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fsdpsft.batch import Sample
from fsdpsft.errors import DataError

STORE_VERSION = 2
"""Part of every store's key; raised when the layout or the meaning of an array changes."""

RUN = np.dtype([("start", "<u4"), ("stop", "<u4"), ("weight", "<f4")])
COLUMNS = {"lengths": "<i4", "trained": "<i4", "weights": "<f8", "row_numbers": "<i8"}
"""Arrays of one entry a sample, and their types."""

OFFSETS = {"offsets": "<i8", "run_offsets": "<i8"}
MANIFEST = "manifest.json"
STATS = "stats.json"
SMALL_BYTES = 16 << 20
"""Files up to this size are hashed whenever a store is opened (milliseconds each), larger ones when asked for."""


@dataclass(frozen=True)
class TokenStore:
    """A read-only table of tokenised samples.

    Attributes:
        lengths: [n] int32, tokens of each sample.
        trained: [n] int32, labels that count: positions from 1 on with a loss weight above 0.
        weights: [n] float64, sum of those labels' loss weights.
        row_numbers: [n] int64, row of the source file a sample came from, from 0.
        source_names: the sources, in the order their samples are stored.
        source_counts: samples of each source.
        files: (file, samples) in the order of storage.
        fingerprint: the key the store was built for.
        stats: counts of what was truncated, dropped, skipped or found twice, by source and reason.
    """

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    runs: NDArray[np.void]
    offsets: NDArray[np.int64]
    run_offsets: NDArray[np.int64]
    lengths: NDArray[np.int32]
    trained: NDArray[np.int32]
    weights: NDArray[np.float64]
    row_numbers: NDArray[np.int64]
    source_names: tuple[str, ...]
    source_counts: tuple[int, ...]
    files: tuple[tuple[str, int], ...]
    fingerprint: str = ""
    stats: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    def source_of(self, index: int) -> int:
        """The source of sample ``index``, as a position in ``source_names``."""
        return int(np.searchsorted(np.cumsum(self.source_counts), index, side="right"))

    def describe(self, index: int) -> str:
        """File and row of sample ``index``, for messages to people."""
        ends = np.cumsum([samples for _, samples in self.files])
        file, _ = self.files[int(np.searchsorted(ends, index, side="right"))]
        return f"{file}, row {int(self.row_numbers[index])}"

    def sample(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            IndexError: ``index`` is not in ``range(len(self))``.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store of {len(self)}")
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.uint32)
        loss_weights = np.zeros(len(tokens), dtype=np.float32)
        for start, stop, weight in self.runs[self.run_offsets[index] : self.run_offsets[index + 1]].tolist():
            loss_weights[start:stop] = weight
        return Sample(tokens, loss_weights, index, self.source_of(index))

    @classmethod
    def open(cls, path: str | Path, every_byte: bool = False) -> TokenStore:
        """Map a finished store; costs nearly the same for any number of samples.

        ``every_byte`` compares the hashes of large arrays, too.

        Raises:
            DataError: the folder is no store, is not as it was written, or comes from another version.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        for name, (size, digest) in manifest["contents"].items():
            _check_file(folder / name, size, digest if every_byte or size <= SMALL_BYTES else None)
        names = (*COLUMNS, *OFFSETS)
        return cls(
            tokens=_map(folder, "tokens", manifest["token_dtype"]),
            runs=_map(folder, "runs", RUN),
            **{name: _map(folder, name, (COLUMNS | OFFSETS)[name]) for name in names},
            source_names=tuple(manifest["source_names"]),
            source_counts=tuple(manifest["source_counts"]),
            files=tuple((file, samples) for file, samples in manifest["files"]),
            fingerprint=manifest["fingerprint"],
            stats=json.loads((folder / STATS).read_text()),
        )


def columns_of(samples: Sequence[Sample]) -> dict[str, NDArray[Any]]:
    """Samples (one at least) as a store's arrays, with run_counts instead of offsets."""
    lengths = np.array([len(sample.input_ids) for sample in samples], COLUMNS["lengths"])
    weights = np.concatenate([sample.loss_weights for sample in samples]).astype(np.float32)
    owner = np.repeat(np.arange(len(samples)), lengths)
    first = np.cumsum(lengths, dtype=np.int64) - lengths
    runs, run_owner = _runs_of(weights, owner, first)
    counts = weights > 0
    counts[first[lengths > 0]] = False  # no position comes before a sample's first token that could predict it
    owner = owner[counts]
    return {
        "tokens": np.concatenate([sample.input_ids for sample in samples]).astype(np.uint32),
        "runs": runs,
        "run_counts": np.bincount(run_owner, minlength=len(samples)),
        "lengths": lengths,
        "trained": np.bincount(owner, minlength=len(samples)).astype(COLUMNS["trained"]),
        "weights": np.bincount(owner, weights[counts].astype(np.float64), len(samples)).astype(COLUMNS["weights"]),
        "row_numbers": np.array([sample.row for sample in samples], COLUMNS["row_numbers"]),
    }


def _runs_of(
    weights: NDArray[np.float32], owner: NDArray[np.int64], first: NDArray[np.int64]
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Stretches of equal weight above 0 within a sample, and the sample of each; places are counted in the sample."""
    changes = (weights[1:] != weights[:-1]) | (owner[1:] != owner[:-1])
    bounds = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(weights)]])
    trained = np.flatnonzero(weights[bounds[:-1]] > 0)
    starts, stops = bounds[:-1][trained], bounds[1:][trained]
    runs = np.empty(len(trained), RUN)
    runs["start"], runs["stop"] = starts - first[owner[starts]], stops - first[owner[starts]]
    runs["weight"] = weights[starts]
    return runs, owner[starts]


def digest_of(path: Path) -> str:
    """Hash of a file, 32 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sealed(content: dict[str, Any]) -> str:
    """The text of a manifest: its content with the content's own hash."""
    return json.dumps({"seal": _seal(content), "content": content}, indent=1)


def _seal(content: object) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a manifest that is as it was written; so its keys and types need no further look."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder} is not a finished token store ({type(error).__name__}: {error})") from error
    if isinstance(manifest, dict) and manifest.get("version") == 1:
        raise DataError(f"{folder} is a token store of fsdpsft 0.1.0, which has no checksums")
    if not isinstance(manifest, dict) or manifest.get("seal") != _seal(manifest.get("content")):
        raise DataError(f"{folder / MANIFEST} is not as it was written")
    content: dict[str, Any] = manifest["content"]
    if content["version"] != STORE_VERSION:
        raise DataError(f"{folder} is a token store of version {content['version']}, this one reads {STORE_VERSION}")
    return content


def is_readable(folder: Path) -> bool:
    """Whether the manifest of a store is one that this version reads; its arrays are not looked at."""
    try:
        return bool(_read_manifest(folder))
    except DataError:
        return False


def _check_file(path: Path, size: int, digest: str | None) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise DataError(f"{path} has {found} bytes, not {size}: the store is torn")
    if digest is not None and digest_of(path) != digest:
        raise DataError(f"{path} is not as it was written: its hash differs")


def _map(folder: Path, name: str, dtype: str | np.dtype[Any]) -> NDArray[Any]:
    """Map one array; an empty file, which cannot be mapped, is an empty array."""
    path = folder / f"{name}.bin"
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
