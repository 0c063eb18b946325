"""Which samples make a step, and who computes them: pure functions on counts and lengths, numpy only.

Two questions are kept apart on purpose. The *order* says which samples batch k is made of; it depends on the seed, the
data and the batch size alone. The *assignment* says which rank computes which of them in which micro-batch; it may
depend on the hardware, because it cannot change what is summed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from fsdpsft.errors import DataError

Ints = NDArray[np.int64]
Assignment = list[list[list[int]]]
"""``assignment[rank][micro_batch]`` is a list of positions in the step's batch."""

ATTENTION_COST = 1 / 24576
"""Cost of attention per pair of tokens, in units of a token's matrix products.

With hidden size D and L layers a token costs about 72 L D^2 FLOPs in products and 6 L D len in causal attention, so
the ratio is 1 / (12 D); this is its value at D = 2048.
"""

_FEISTEL_ROUNDS = 8


# ----------------------------------------------------------------------------------------------------------- order


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Ints, size: int, *key: int) -> Ints:
    """Apply the pseudo-random permutation of ``range(size)`` named by ``key`` to some of its elements.

    A generalised Feistel network (Black and Rogaway 2002) on pairs (left < a, right < b) with a * b just above
    ``size``; the few results outside the range are sent round again (cycle walking) until they fall inside. Nothing
    of length ``size`` is ever made.

    Args:
        index: [B] elements of ``range(size)``.
        size: number of elements permuted.
        key: non-negative integers that name the permutation.

    Returns:
        [B] int64; distinct elements stay distinct.
    """
    a = np.uint64(isqrt(size - 1) + 1 if size > 1 else 1)
    b = np.uint64(-(-size // int(a)))
    round_keys = np.random.SeedSequence(key).generate_state(_FEISTEL_ROUNDS, np.uint64)

    def network(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x // b, x % b
        for even, odd in round_keys.reshape(-1, 2):
            left = (left + _mix(right ^ even) % a) % a
            right = (right + _mix(left ^ odd) % b) % b
        return left * b + right

    result = network(index.astype(np.uint64))
    while (outside := result >= size).any():
        result[outside] = network(result[outside])
    return result.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The samples of every batch of a run, as a pure function of (seed, step).

    Samples of one source are consecutive: source s owns ``counts[s]`` samples after those of the sources before it.
    One epoch draws ``round(weights[s] * counts[s])`` samples of source s (at least one, unless the weight is 0),
    taken from an endless stream that goes through all of its samples in a new random order each time. So with weight
    1 every sample is drawn exactly once an epoch; with weight 2, twice; with weight 0.5, half of them without
    repetition in one epoch and the other half in the next.

    Attributes:
        counts: number of samples of each source.
        batch_size: samples of a step, all ranks together.
        seed: names the order; not negative.
        weights: draws per sample and epoch for each source; None means 1 for all.
        drop_last: leave an epoch's last, incomplete batch out instead of training on it.
        shuffle: False takes the samples in their order, each once (evaluation).
    """

    counts: tuple[int, ...]
    batch_size: int
    seed: int = 0
    weights: tuple[float, ...] | None = None
    drop_last: bool = False
    shuffle: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no epoch."""
        if self.samples_per_epoch == 0:
            raise DataError("There is nothing to train on: all sources are empty or have weight 0.")
        if self.steps_per_epoch == 0:
            raise DataError(
                f"data.train_batch_size={self.batch_size} is larger than the data set of {self.samples_per_epoch} "
                f"samples an epoch, and data.drop_last=true leaves nothing; lower it or set data.drop_last=false."
            )

    @cached_property
    def draws(self) -> tuple[int, ...]:
        """Samples drawn from each source in one epoch."""
        if self.weights is None or not self.shuffle:
            return self.counts
        pairs = zip(self.counts, self.weights, strict=True)
        return tuple(max(round(weight * count), 1) if weight * count > 0 else 0 for count, weight in pairs)

    @cached_property
    def samples_per_epoch(self) -> int:
        """Samples drawn in one epoch, before an incomplete batch is dropped."""
        return sum(self.draws)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        full, rest = divmod(self.samples_per_epoch, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def batch(self, step: int) -> Ints:
        """Sample ids of batch ``step`` (counted from 0 over all epochs), [<= batch_size] int64, in O(batch) time."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        first = batch * self.batch_size
        places = np.arange(first, min(first + self.batch_size, self.samples_per_epoch), dtype=np.int64)
        if not self.shuffle:
            return places
        slots = permute(places, self.samples_per_epoch, self.seed, 0, epoch)
        draw_ends = np.cumsum(self.draws)
        source_of = np.searchsorted(draw_ends, slots, side="right")
        samples = np.empty_like(slots)
        for source in np.unique(source_of).tolist():
            mine = source_of == source
            offsets = slots[mine] - (draw_ends[source] - self.draws[source])
            samples[mine] = self._from_stream(source, epoch * self.draws[source] + offsets)
        return samples

    def _from_stream(self, source: int, places: Ints) -> Ints:
        """Sample ids at ``places`` of a source's endless stream."""
        count = self.counts[source]
        passes, inside = np.divmod(places, count)
        samples = np.empty_like(places)
        for number in np.unique(passes).tolist():
            mine = passes == number
            samples[mine] = permute(inside[mine], count, self.seed, 1, source, number)
        return samples + sum(self.counts[:source])


# -------------------------------------------------------------------------------------------------- assignment


def costs_of(lengths: Ints, attention_cost: float = ATTENTION_COST) -> NDArray[np.float64]:
    """Work of each document in units of one token's matrix products: len + attention_cost * len^2."""
    exact = lengths.astype(np.float64)
    return exact + attention_cost * exact * exact


def assign_step(
    lengths: Sequence[int] | NDArray[np.integer],
    *,
    dp_size: int,
    token_budget: int,
    max_rows: int | None = None,
    balance: bool = True,
    padded: bool = False,
    pad_to_multiple: int = 1,
    attention_cost: float = ATTENTION_COST,
) -> Assignment:
    """Share one step's documents out over ranks and micro-batches.

    All ranks get the same number of micro-batches, as few as bin packing finds under the budget. With ``balance``
    the micro-batches are made equal in cost (longest first into the cheapest that has room), and those that run at
    the same time on different ranks are neighbours in cost, since FSDP makes ranks wait for each other at each
    layer. A micro-batch is empty only where there are fewer documents than places.

    Args:
        lengths: [B] tokens of each document.
        dp_size: ranks that see different data.
        token_budget: most tokens of a micro-batch, filler included.
        max_rows: most documents of a micro-batch.
        balance: False fills micro-batches in the order of the documents.
        padded: micro-batches are rectangles of rows as long as the longest.
        pad_to_multiple: filler brings the flat length (of each row when ``padded``) to a multiple of this.
        attention_cost: see ``costs_of``.

    Returns:
        ``assignment[rank][micro_batch]``: positions in ``lengths``, each exactly once; the same on every call.

    Raises:
        DataError: a document is longer than the budget.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    limit = token_budget // pad_to_multiple * pad_to_multiple
    if padded:
        sizes = -(-sizes // pad_to_multiple) * pad_to_multiple
    longest = int(sizes.argmax()) if sizes.size else 0
    if sizes.size and sizes[longest] > limit:
        raise too_long(f"sample {longest}", int(sizes[longest]), limit)
    bound = _Bound(limit, max_rows if max_rows is not None else max(sizes.size, 1), padded)
    costs = costs_of(sizes, attention_cost)
    if not balance:
        bins = _next_fit(range(sizes.size), sizes.tolist(), bound)
    elif padded:
        bins = _even_rectangles(sizes, bound, dp_size)
    else:
        bins = _even_bins(sizes, costs, bound, dp_size)
    _fill_up(bins, dp_size)
    loads = [len(b) * costs[b].max(initial=0.0) if padded else costs[b].sum() for b in bins]
    return _deal(bins, np.asarray(loads), dp_size, balance)


def too_long(name: str, length: int, limit: int) -> DataError:
    """The error for a sample that no micro-batch can hold."""
    return DataError(
        f"{name} has {length} tokens, but a micro-batch holds at most {limit} (data.max_token_len_per_gpu times "
        f"ulysses_sequence_parallel_size). Raise data.max_token_len_per_gpu to at least the longest sample, raise "
        f"ulysses_sequence_parallel_size, or lower data.max_length."
    )


@dataclass(frozen=True)
class _Bound:
    """What one micro-batch may hold."""

    tokens: int
    rows: int
    padded: bool


def _next_fit(order: Sequence[int] | range, lengths: list[int], bound: _Bound) -> list[list[int]]:
    """Fill micro-batches one after another in the given order. For descending lengths in rectangles this is optimal."""
    bins: list[list[int]] = []
    total = longest = 0
    for i in order:
        longest, total = max(longest, lengths[i]), total + lengths[i]
        size = (len(bins[-1]) + 1) * longest if bound.padded and bins else total
        if not bins or size > bound.tokens or len(bins[-1]) == bound.rows:
            bins.append([])
            longest = total = lengths[i]
        bins[-1].append(i)
    return bins


def _best_fit(order: list[int], lengths: list[int], bound: _Bound) -> list[list[int]]:
    """Best-fit-decreasing bin packing: each document goes where the least room is left over."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending, of the bins that are not full
    for i in order:
        found = bisect_left(room, (lengths[i], -1))
        left, target = room.pop(found) if found < len(room) else (bound.tokens, len(bins))
        if target == len(bins):
            bins.append([])
        bins[target].append(i)
        if left > lengths[i] and len(bins[target]) < bound.rows:
            insort(room, (left - lengths[i], target))
    return bins


def _cheapest_fit(
    order: list[int], lengths: Ints, costs: NDArray[np.float64], bound: _Bound, number: int
) -> list[list[int]] | None:
    """Longest-processing-time scheduling under caps: each document to the cheapest bin with room; None if none has."""
    bins: list[list[int]] = [[] for _ in range(number)]
    left = np.full(number, bound.tokens)
    load, rows = np.zeros(number), np.zeros(number, dtype=np.int64)
    for i in order:
        choice = np.where((left >= lengths[i]) & (rows < bound.rows), load, np.inf)
        target = int(choice.argmin())
        if choice[target] == np.inf:
            return None
        bins[target].append(i)
        left[target] -= lengths[i]
        load[target] += costs[i]
        rows[target] += 1
    return bins


def _even_bins(lengths: Ints, costs: NDArray[np.float64], bound: _Bound, dp_size: int) -> list[list[int]]:
    """Packed micro-batches: the smallest multiple of ``dp_size`` that holds all, equal in cost where the caps allow."""
    order: list[int] = np.argsort(-lengths, kind="stable").tolist()
    tight = _best_fit(order, lengths.tolist(), bound)
    most = -(-len(tight) // dp_size)
    least = max(-(-int(lengths.sum()) // (bound.tokens * dp_size)), -(-len(order) // (bound.rows * dp_size)), 1)
    for per_rank in range(least, most + 1):
        if (bins := _cheapest_fit(order, lengths, costs, bound, per_rank * dp_size)) is not None:
            return bins
    return tight  # so full that only best fit holds all; then the bins are nearly equal by themselves


def _even_rectangles(lengths: Ints, bound: _Bound, dp_size: int) -> list[list[int]]:
    """Padded micro-batches: neighbours in length share a rectangle; the largest is as small as their number allows."""
    order: list[int] = np.argsort(-lengths, kind="stable").tolist()
    plain = lengths.tolist()
    allowed = -(-len(_next_fit(order, plain, bound)) // dp_size) * dp_size
    low, high = max(plain, default=0), bound.tokens
    while low < high:
        middle = (low + high) // 2
        fits = len(_next_fit(order, plain, _Bound(middle, bound.rows, padded=True))) <= allowed
        low, high = (low, middle) if fits else (middle + 1, high)
    return _next_fit(order, plain, _Bound(high, bound.rows, padded=True))


def _fill_up(bins: list[list[int]], dp_size: int) -> None:
    """Bring the number of micro-batches to a multiple of ``dp_size``: halve the fullest, add empty ones at last."""
    missing = max(-(-len(bins) // dp_size), 1) * dp_size - len(bins)
    for _ in range(missing):
        fullest = max(range(len(bins)), key=lambda b: len(bins[b]), default=None)
        half = len(bins[fullest]) // 2 if fullest is not None else 0
        if fullest is None or half == 0:
            bins.append([])
            continue
        whole = bins[fullest]
        bins[fullest : fullest + 1] = [whole[:half], whole[half:]]


def _deal(bins: list[list[int]], loads: NDArray[np.float64], dp_size: int, balance: bool) -> Assignment:
    """Give each rank one of every ``dp_size`` micro-batches next to each other in cost, the least busy the heaviest."""
    assignment: Assignment = [[] for _ in range(dp_size)]
    busy = np.zeros(dp_size)
    by_load = np.argsort(-loads, kind="stable") if balance else np.arange(len(bins))
    for first in range(0, len(bins), dp_size):
        group = by_load[first : first + dp_size]
        ranks = np.argsort(busy, kind="stable") if balance else np.arange(dp_size)
        for rank, chosen in zip(ranks.tolist(), group.tolist(), strict=True):
            assignment[rank].append(sorted(bins[chosen]) if balance else bins[chosen])
        busy[ranks] += loads[group]
    return assignment


# ---------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Balance:
    """How even an assignment is; 1 is perfect.

    Attributes:
        tokens: most tokens of a rank over the mean.
        cost: most cost (see ``costs_of``) of a rank over the mean.
        lockstep: time with all ranks waiting for the slowest at every micro-batch, over the time without waiting.
        micro_batches: micro-batches of each rank.
        fill: real tokens over tokens computed, had every micro-batch the size of the largest.
    """

    tokens: float
    cost: float
    lockstep: float
    micro_batches: int
    fill: float


def measure(
    assignment: Assignment, lengths: Sequence[int] | NDArray[np.integer], attention_cost: float = ATTENTION_COST
) -> Balance:
    """Measure how even ``assignment`` is for documents of these lengths."""
    sizes = np.asarray(lengths, dtype=np.int64)
    costs = costs_of(sizes, attention_cost)

    def table(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([[values[micro_batch].sum() for micro_batch in rank] for rank in assignment])

    def worst(values: NDArray[np.float64]) -> float:
        ranks = table(values).sum(axis=1)
        return float(ranks.max() / ranks.mean())

    tokens, work = table(sizes.astype(np.float64)), table(costs)
    return Balance(
        tokens=worst(sizes.astype(np.float64)),
        cost=worst(costs),
        lockstep=float(work.max(axis=0).sum() / work.mean(axis=0).sum()),
        micro_batches=len(assignment[0]),
        fill=float(tokens.sum() / (tokens.size * tokens.max())),
    )


def assign_in_order(count: int, dp_size: int) -> Assignment:
    """What a plain distributed sampler does: document i to rank i modulo ``dp_size``. Only to compare with."""
    return [[list(range(rank, count, dp_size))] for rank in range(dp_size)]
