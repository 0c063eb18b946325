"""The batches of a run: from a store of samples to this rank's micro-batches, step by step.

There is no state. Step k is computed from the seed and k, so resuming is starting at k, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fsdpsft.batch import PackedBatch, Sample, pack
from fsdpsft.data.batches.packing import Assignment, Order, assign_step, too_long
from fsdpsft.data.workers import in_order
from fsdpsft.errors import ConfigError, DataError, and_more

STEPS_AHEAD = 2
"""Steps built in the background before they are asked for."""


class SampleStore(Protocol):
    """What the loader reads: n samples in memory or on disk, those of one source next to each other.

    Attributes:
        lengths: [n] tokens of each sample.
        trained: [n] labels that count: positions from 1 on with a loss weight above 0.
        weights: [n] float64, the sum of those labels' loss weights.
        source_counts: number of samples of each source; their sum is n.
        source_names: what the sources are called in reports.
    """

    @property
    def lengths(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def trained(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def weights(self) -> NDArray[np.float64]: ...  # noqa: D102
    @property
    def source_counts(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def source_names(self) -> tuple[str, ...]: ...  # noqa: D102

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def sample(self, index: int) -> Sample:
        """Tokens and loss weights of one sample."""
        ...

    def describe(self, index: int) -> str:
        """File and row a sample came from, for messages."""
        ...


@dataclass(frozen=True)
class Step:
    """One optimiser step's data. All numbers are those of the global batch and the same on every rank.

    Attributes:
        index: the step, counted from 0 over all epochs.
        epoch: the epoch it belongs to, from 0.
        micro_batches: this data-parallel rank's part; equally many on every rank.
        loss_denominator: sum of the loss weights of all labels that count; the step's loss is divided by it, once.
        num_tokens: real tokens (no filler).
        num_trained_tokens: labels that count.
        trained_by_source: [sources] int64, the labels that count by source.
        squared_lengths: sum of the squared document lengths, which attention's cost grows with.
        rows: [B] int64, the samples' store indices, in the batch's order.
    """

    index: int
    epoch: int
    micro_batches: list[PackedBatch]
    loss_denominator: float
    num_tokens: int
    num_trained_tokens: int
    trained_by_source: NDArray[np.int64]
    squared_lengths: int
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class LoaderSettings:
    """What a run's batches are made by, and this rank's place among those that share them.

    Attributes:
        train_batch_size: samples of one step, all ranks together.
        token_budget: most tokens a GPU holds at a time, filler included; under Ulysses a micro-batch is spread over
            ``sp_size`` GPUs and may hold as many times more.
        pad_token_id: id of filler tokens.
        seed: names the order.
        dp_rank, dp_size: this rank among those that see different data, and their number.
        sp_size: Ulysses degree.
        max_rows: most samples of a micro-batch; None for no cap.
        padded: micro-batches are one padded row a sample instead of one flat row.
        drop_last: leave an epoch's incomplete last batch out.
        balance: make the ranks' work equal; False keeps the batch's order.
        source_weights: draws per sample and epoch of each source, see ``Order``.
        max_samples: use only the first so many samples of the store.
        evaluation: every sample once and in order; a step may lack trained tokens, since it is the sum over all
            steps that counts.
        pin_memory: build the batches in page-locked memory, for copies that do not block. Needs CUDA.
    """

    train_batch_size: int
    token_budget: int
    pad_token_id: int
    seed: int = 0
    dp_rank: int = 0
    dp_size: int = 1
    sp_size: int = 1
    max_rows: int | None = None
    padded: bool = False
    drop_last: bool = False
    balance: bool = True
    source_weights: tuple[float, ...] | None = None
    max_samples: int | None = None
    evaluation: bool = False
    pin_memory: bool = False


class Loader:
    """Steps of a training run, or of an evaluation."""

    def __init__(self, store: SampleStore, settings: LoaderSettings) -> None:
        """Read the lengths of ``store``, and no token.

        Raises:
            DataError: a sample does not fit into the budget, or there is nothing to train on.
            ConfigError: the number of source weights is not the number of sources.
        """
        weights = settings.source_weights
        if weights is not None and len(weights) != len(store.source_counts):
            raise ConfigError(f"{len(weights)} source weights were given for {len(store.source_counts)} sources.")
        self.store, self.settings = store, settings
        self.order = Order(
            counts=_first(store.source_counts, settings.max_samples),
            batch_size=settings.train_batch_size,
            seed=settings.seed,
            weights=weights,
            drop_last=settings.drop_last and not settings.evaluation,
            shuffle=not settings.evaluation,
        )
        lengths = store.lengths[: sum(self.order.counts)]
        longest = int(lengths.argmax())
        limit = settings.token_budget * settings.sp_size
        if lengths[longest] > limit:
            raise too_long(store.describe(longest), int(lengths[longest]), limit)

    def __len__(self) -> int:
        """Steps of one epoch."""
        return self.order.steps_per_epoch

    def assign(self, index: int) -> tuple[NDArray[np.int64], Assignment]:
        """Samples of step ``index`` and who computes them, from the index alone; no token is read."""
        rows, settings = self.order.batch(index), self.settings
        return rows, assign_step(
            self.store.lengths[rows],
            dp_size=settings.dp_size,
            token_budget=settings.token_budget * settings.sp_size,
            max_rows=settings.max_rows,
            balance=settings.balance,
            padded=settings.padded,
            pad_to_multiple=settings.sp_size,
        )

    def step(self, index: int) -> Step:
        """Build step ``index``; a pure function of the constructor's arguments and ``index``.

        Raises:
            DataError: no token of the step is trained, so that its loss is 0 / 0.
        """
        rows, assignment = self.assign(index)
        settings = self.settings
        trained = int(self.store.trained[rows].sum(dtype=np.int64))
        if trained == 0 and not settings.evaluation:
            raise self._nothing_trained(index, rows)
        micro_batches = [
            pack(
                [self.store.sample(int(rows[position])) for position in positions],
                pad_token_id=settings.pad_token_id,
                pad_to_multiple=settings.sp_size,
                padded=settings.padded,
            )
            for positions in assignment[settings.dp_rank]
        ]
        return Step(
            index=index,
            epoch=index // len(self),
            micro_batches=[batch.pin_memory() for batch in micro_batches] if settings.pin_memory else micro_batches,
            loss_denominator=float(self.store.weights[rows].sum()),
            num_tokens=int(self.store.lengths[rows].sum(dtype=np.int64)),
            num_trained_tokens=trained,
            trained_by_source=self._by_source(rows),
            squared_lengths=int(np.square(self.store.lengths[rows].astype(np.int64)).sum()),
            rows=rows,
        )

    def _by_source(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        ends = np.cumsum(self.store.source_counts)
        counts = np.zeros(len(ends), dtype=np.int64)
        np.add.at(counts, np.searchsorted(ends, rows, side="right"), self.store.trained[rows])
        return counts

    def _nothing_trained(self, index: int, rows: NDArray[np.int64]) -> DataError:
        named = and_more([self.store.describe(row) for row in rows.tolist()], join="; ")
        return DataError(
            f"No token of step {index} is trained: {named}. Take these rows out, or raise "
            f"data.train_batch_size or data.max_length, so that each step has a token to learn."
        )

    def iterate(self, start: int = 0, stop: int | None = None) -> Generator[Step, None, None]:
        """Yield the steps from ``start`` up to ``stop`` (one epoch when None), built ahead in a background thread.

        An error in the thread is raised here, at the step it belongs to. Leaving the loop early stops the thread.
        """
        stop = len(self) if stop is None else stop
        device = torch.cuda.current_device() if self.settings.pin_memory else None
        pool = ThreadPoolExecutor(1, "fsdpsft-loader", initializer=_use_device, initargs=(device,))
        try:
            yield from in_order(pool, self.step, range(start, stop), STEPS_AHEAD)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _use_device(device: int | None) -> None:
    """Make a new thread pin memory for this rank's device; it would open a context on device 0 otherwise."""
    if device is not None:
        torch.cuda.set_device(device)


def _first(counts: tuple[int, ...], limit: int | None) -> tuple[int, ...]:
    """Samples of each source among the first ``limit``."""
    if limit is None:
        return counts
    ends = np.minimum(np.cumsum(counts), limit)
    return tuple(np.diff(ends, prepend=0).tolist())
