"""A token store in memory, for tests of what reads one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fsdpsft.batch import Sample
from fsdpsft.data.batches.store import COLUMNS, TokenStore, columns_of


def memory_store(
    samples: Iterable[tuple[Sequence[int], Sequence[float]]], source_counts: Mapping[str, int] | None = None
) -> TokenStore:
    """A store of (token ids, loss weights) pairs, those of one source next to each other."""
    arrays = columns_of(
        [Sample(np.asarray(ids), np.asarray(weights), row) for row, (ids, weights) in enumerate(samples)]
    )
    counts = source_counts if source_counts is not None else {"memory": len(arrays["lengths"])}
    assert sum(counts.values()) == len(arrays["lengths"])
    return TokenStore(
        tokens=arrays["tokens"],
        runs=arrays["runs"],
        offsets=np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)]),
        run_offsets=np.concatenate([[0], np.cumsum(arrays["run_counts"], dtype=np.int64)]),
        source_names=tuple(counts),
        source_counts=tuple(counts.values()),
        files=tuple(counts.items()),
        **{name: arrays[name] for name in COLUMNS},
    )
