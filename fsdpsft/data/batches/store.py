"""Tokenised samples on disk: flat, memory-mapped, shared by all processes of a machine, and whole or not there.

A store is a folder of plain arrays beside a ``manifest.json`` that lists each array's type and size; ``open`` refuses
a folder in which a file is missing or has another size. The files:

    tokens.bin       [tokens] uint16 (uint32 where an id does not fit), sample after sample
    runs.bin         [runs] (start, stop, weight): the trained stretches of each sample, all other tokens have weight 0
    offsets.bin      [n + 1] int64, where a sample starts in tokens
    run_offsets.bin  [n + 1] int64, where a sample starts in runs
    lengths.bin, trained.bin [n] int32, weights.bin [n] float64, row_numbers.bin [n] int64
    stats.json       what was dropped, truncated or skipped, and why

Samples of one source are next to each other, in the order of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fsdpsft.batch import Sample
from fsdpsft.errors import DataError

STORE_VERSION = 1
"""Part of every store's key; raised when the layout or the meaning of an array changes."""

RUN = np.dtype([("start", "<u4"), ("stop", "<u4"), ("weight", "<f4")])
COLUMNS = {"lengths": "<i4", "trained": "<i4", "weights": "<f8", "row_numbers": "<i8"}
"""Arrays of one entry a sample, and their types."""

OFFSETS = {"offsets": "<i8", "run_offsets": "<i8"}
MANIFEST = "manifest.json"
STATS = "stats.json"


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
        fingerprint: the key the store was built for; empty for one in memory.
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

    @property
    def source_ids(self) -> NDArray[np.uint16]:
        """[n] uint16: the source of each sample. Made on demand."""
        return np.repeat(np.arange(len(self.source_counts), dtype=np.uint16), self.source_counts)

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
    def open(cls, path: str | Path) -> TokenStore:
        """Map a finished store; costs the same for any number of samples.

        Raises:
            DataError: the folder is no store, was left torn, or comes from another version.
        """
        folder = Path(path)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder} is not a finished token store ({error}). Delete it; it is built anew."
            ) from error
        if manifest["version"] != STORE_VERSION:
            raise DataError(
                f"{folder} is a token store of version {manifest['version']}, this program reads {STORE_VERSION}. "
                f"Delete it; it is built anew."
            )
        for name, size in manifest["bytes"].items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                raise DataError(f"{folder / name} has {found} bytes, not {size}: the store is torn. Delete {folder}.")
        columns = {name: _map(folder, name, dtype) for name, dtype in (COLUMNS | OFFSETS).items()}
        return cls(
            tokens=_map(folder, "tokens", manifest["token_dtype"]),
            runs=_map(folder, "runs", RUN),
            offsets=columns["offsets"],
            run_offsets=columns["run_offsets"],
            lengths=columns["lengths"],
            trained=columns["trained"],
            weights=columns["weights"],
            row_numbers=columns["row_numbers"],
            source_names=tuple(manifest["source_names"]),
            source_counts=tuple(manifest["source_counts"]),
            files=tuple((file, samples) for file, samples in manifest["files"]),
            fingerprint=manifest["fingerprint"],
            stats=json.loads((folder / STATS).read_text()),
        )

    @classmethod
    def from_samples(
        cls, samples: Iterable[tuple[Sequence[int], Sequence[float]]], source_counts: Mapping[str, int] | None = None
    ) -> TokenStore:
        """Make a store in memory, for tests and small experiments.

        Args:
            samples: (token ids, loss weights) pairs of equal length, those of one source next to each other.
            source_counts: number of samples of each source; one source called "memory" when None.
        """
        arrays = columns_of([(np.asarray(ids), np.asarray(weights), row) for row, (ids, weights) in enumerate(samples)])
        counts = source_counts if source_counts is not None else {"memory": len(arrays["lengths"])}
        if sum(counts.values()) != len(arrays["lengths"]):
            raise DataError(f"source_counts name {sum(counts.values())} samples, there are {len(arrays['lengths'])}.")
        return cls(
            tokens=arrays["tokens"],
            runs=arrays["runs"],
            offsets=np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)]),
            run_offsets=np.concatenate([[0], np.cumsum(arrays["run_counts"], dtype=np.int64)]),
            lengths=arrays["lengths"],
            trained=arrays["trained"],
            weights=arrays["weights"],
            row_numbers=arrays["row_numbers"],
            source_names=tuple(counts),
            source_counts=tuple(counts.values()),
            files=tuple(counts.items()),
        )


def columns_of(samples: Sequence[tuple[NDArray[Any], NDArray[Any], int]]) -> dict[str, NDArray[Any]]:
    """Lay (token ids, loss weights, row number) triples out as arrays; run_counts stand for offsets."""
    lengths = np.array([len(ids) for ids, _, _ in samples], COLUMNS["lengths"])
    weights = np.concatenate([np.empty(0, np.float32), *(weights for _, weights, _ in samples)]).astype(np.float32)
    owner = np.repeat(np.arange(len(samples)), lengths)
    first = np.cumsum(lengths, dtype=np.int64) - lengths
    runs, run_owner = _runs_of(weights, owner, first)
    counts = weights > 0
    counts[first[lengths > 0]] = False  # no position comes before a sample's first token that could predict it
    owner = owner[counts]
    return {
        "tokens": np.concatenate([np.empty(0, np.uint32), *(ids for ids, _, _ in samples)]).astype(np.uint32),
        "runs": runs,
        "run_counts": np.bincount(run_owner, minlength=len(samples)),
        "lengths": lengths,
        "trained": np.bincount(owner, minlength=len(samples)).astype(COLUMNS["trained"]),
        "weights": np.bincount(owner, weights[counts].astype(np.float64), len(samples)).astype(COLUMNS["weights"]),
        "row_numbers": np.array([row for _, _, row in samples], COLUMNS["row_numbers"]),
    }


def _runs_of(
    weights: NDArray[np.float32], owner: NDArray[np.int64], first: NDArray[np.int64]
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Stretches of equal weight above 0 within a sample, and the sample of each; places are counted in the sample."""
    changes = (weights[1:] != weights[:-1]) | (owner[1:] != owner[:-1])
    bounds = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(weights)]])
    trained = np.flatnonzero(weights[bounds[:-1]] > 0) if len(weights) else np.empty(0, np.int64)
    starts, stops = bounds[:-1][trained], bounds[1:][trained]
    runs = np.empty(len(trained), RUN)
    runs["start"], runs["stop"] = starts - first[owner[starts]], stops - first[owner[starts]]
    runs["weight"] = weights[starts]
    return runs, owner[starts]


def _map(folder: Path, name: str, dtype: str | np.dtype[Any]) -> NDArray[Any]:
    """Map one array; an empty file, which cannot be mapped, is an empty array."""
    path = folder / f"{name}.bin"
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
