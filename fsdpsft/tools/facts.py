"""What the tokenised data is like: counts by source, lengths, and samples to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fsdpsft.batch import Sample
from fsdpsft.data.batches.store import TokenStore
from fsdpsft.data.batches.store_parts import NO_TRAINED_TOKEN, NOTHING_LEFT, Tally

BINS = 32
_STEPS = (1, 2, 4, 5, 8, 10)
_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 8  # tokens; a character of four bytes is at most four byte tokens
_LONG_OPENING, _LEAD = 200, 40  # tokens before the first trained one; from so many on, only so many are shown at once


@dataclass(frozen=True)
class SourceFacts:
    """Counts of one source.

    Attributes:
        split: "train" or "validation".
        counts: its rows, samples and tokens, and what was left out.
        median, longest: tokens of a sample; 0 where there is none.
    """

    name: str
    split: str
    weight: float
    counts: Tally
    median: int
    longest: int

    @property
    def trained_share(self) -> float:
        """Share of the tokens that is trained."""
        return self.counts.trained_tokens / self.counts.tokens if self.counts.tokens else 0.0

    @property
    def left_out(self) -> dict[str, int]:
        """Rows and samples left out, by reason."""
        return dict(self.counts.skipped) | dict(self.counts.dropped)

    @property
    def untrained(self) -> int:
        """Rows and samples without a trained token, left out."""
        return sum(n for reason, n in self.left_out.items() if reason in (NO_TRAINED_TOKEN, NOTHING_LEFT))


@dataclass(frozen=True)
class Histogram:
    """Samples by length.

    Attributes:
        width: tokens a bin spans.
        counts: samples with ``bin * width < length <= (bin + 1) * width``.
    """

    width: int
    counts: tuple[int, ...]
    median: int
    percentile_95: int
    longest: int


@dataclass(frozen=True)
class Piece:
    """A token, or the few tokens that make up one character.

    Attributes:
        ids: the token ids.
        weight: loss weight; 0 where it is not trained.
        special: whether it is a special token.
    """

    text: str
    ids: tuple[int, ...]
    weight: float
    special: bool


@dataclass(frozen=True)
class ShownSample:
    """A sample as it is trained on.

    Attributes:
        where: file and row.
        opening: pieces long before the first trained token, as of tools and a system prompt; the last of them.
        opening_tokens: all tokens there.
        pieces: what follows; of a long sample the first and last ones.
        omitted: tokens left out in the middle, after ``gap_at`` pieces.
    """

    where: str
    tokens: int
    trained_tokens: int
    opening: tuple[Piece, ...]
    opening_tokens: int
    pieces: tuple[Piece, ...]
    omitted: int = 0
    gap_at: int = 0

    def shortened(self, most: int) -> ShownSample:
        """The same without its opening and with at most ``most`` pieces, of the beginning and the end."""
        if len(self.pieces) <= most:
            return self
        head = most // 2
        tail = len(self.pieces) - (most - head)
        left_out = sum(len(piece.ids) for piece in self.pieces[head:tail])
        pieces = self.pieces[:head] + self.pieces[tail:]
        return replace(self, pieces=pieces, omitted=self.omitted + left_out, gap_at=head)


def source_facts(store: TokenStore, split: str, weights: Sequence[float]) -> list[SourceFacts]:
    """Counts of each source of a store."""
    ends = np.cumsum(store.source_counts)
    facts = []
    for name, end, count, weight in zip(store.source_names, ends, store.source_counts, weights, strict=True):
        lengths = store.lengths[end - count : end]
        median = int(np.median(lengths)) if len(lengths) else 0
        counts = Tally(**store.stats["sources"][name])
        facts.append(SourceFacts(name, split, weight, counts, median, int(lengths.max(initial=0))))
    return facts


def length_histogram(lengths: NDArray[np.int32]) -> Histogram:
    """Count samples by length, in at most ``BINS`` bins of a round width."""
    longest = int(lengths.max())
    least = max(-(-longest // BINS), 1)
    scale = 10 ** (len(str(least)) - 1)
    width = next(step * scale for step in _STEPS if step * scale >= least)
    bins = -(-longest // width)
    counts = np.bincount((np.maximum(lengths, 1) - 1) // width, minlength=bins)
    median, high = np.percentile(lengths, (50, 95), method="higher")
    return Histogram(width, tuple(counts.tolist()), int(median), int(high), longest)


def show_sample(
    sample: Sample, where: str, decode: Callable[[list[int]], str], special: dict[int, str], most: int
) -> ShownSample:
    """Cut a sample into pieces to look at, beginning shortly before the first trained token.

    ``special`` holds the text of special tokens by id. Of a sample longer than ``most`` tokens, its beginning and end
    are shown.
    """
    ids, weights = sample.input_ids.tolist(), sample.loss_weights.tolist()
    weights[0] = 0.0  # nothing comes before it that could predict it
    first = next((at for at, weight in enumerate(weights) if weight > 0), 0)
    start = max(first - _LEAD, 0) if first > _LONG_OPENING else 0

    def pieces(low: int, high: int) -> tuple[Piece, ...]:
        return tuple(_pieces(ids[low:high], weights[low:high], decode, special))

    omitted = max(len(ids) - start - most, 0)
    head = start + most // 2 if omitted else len(ids)
    shown = pieces(start, head)
    return ShownSample(
        where,
        len(ids),
        sum(weight > 0 for weight in weights),
        pieces(max(start - most, 0), start),
        start,
        shown + pieces(head + omitted, len(ids)),
        omitted,
        len(shown),
    )


def _pieces(
    ids: list[int], weights: list[float], decode: Callable[[list[int]], str], special: dict[int, str]
) -> list[Piece]:
    """Text of each token. A tokenizer may print a token otherwise at the beginning of a text than within one, so each
    is what the text gains by it; tokens that only together make a character stay together.
    """
    pieces: list[Piece] = []
    context = start = 0
    for end in range(1, len(ids) + 1):
        text = _gain(ids, context, start, end, decode, special)
        whole = not text.endswith(_REPLACEMENT) or end - start == _LONGEST_CHARACTER
        if not whole and end < len(ids) and ids[end] not in special and weights[end] == weights[start]:
            continue
        pieces.append(Piece(text, tuple(ids[start:end]), weights[start], ids[start] in special))
        context, start = start, end
    return pieces


def _gain(
    ids: list[int], context: int, start: int, end: int, decode: Callable[[list[int]], str], special: dict[int, str]
) -> str:
    """What ``ids[start:end]`` add to the text of ``ids[context:start]``."""
    if end - start == 1 and ids[start] in special:
        return special[ids[start]]
    before = decode(ids[context:start])
    return decode(ids[context:end])[len(before) :]
