"""The work of one building process: a shard's rows become samples in part files, with a tally of what was left out.

Memory is bounded by a batch of rows, whatever the shard's size.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fsdpsft.batch import Sample
from fsdpsft.data.batches.store import COLUMNS, columns_of
from fsdpsft.data.mask.template import Encoded
from fsdpsft.data.rows.sources import Row, Shard, Source, read_shard
from fsdpsft.errors import RowError

T = TypeVar("T")

BATCH_ROWS = 256
HASH_DTYPE = "<u8"
PART_ARRAYS = ("tokens", "runs", "run_counts", "hashes", *COLUMNS)
_EXAMPLES = 20

TOO_LONG = "longer than data.max_length"
NO_TRAINED_TOKEN = "no trained token"
NOTHING_LEFT = "no trained token left after truncation"


class Encoder(Protocol):
    """What turns rows into samples. It is handed to the building processes, so it must be picklable."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same row would be encoded to something else."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    def encode(self, source: Source, rows: Sequence[Row]) -> Sequence[Sequence[Encoded] | RowError]:
        """The samples of each row (more than one where a conversation is split up), or what is wrong with it."""
        ...


@dataclass(frozen=True)
class BuildOptions:
    """What is kept of the rows. All but ``num_workers`` and ``max_bad_share`` are part of a store's key.

    Attributes:
        max_length: most tokens of a sample.
        truncation: for a longer one: "error", "left" (its end is kept), "right" (its beginning) or "drop".
        on_bad_row: "error" stops at a row that cannot be used, "skip" counts it.
        max_bad_share: a larger share of rows that gave nothing is an error in any case.
        num_workers: building processes; None for one per core.
    """

    max_length: int = 1024
    truncation: str = "error"
    on_bad_row: str = "error"
    max_bad_share: float = 0.05
    num_workers: int | None = None


@dataclass
class Tally:
    """Counts of what was read and what became of it; all in rows but ``samples`` and the tokens.

    Attributes:
        truncated: samples cut to the length limit and kept.
        duplicates: samples whose tokens are equal to an earlier one's (kept).
        escaped: samples with special-token text in their content, which was spelt as ordinary text.
        rewritten: trained turns that the template prints otherwise than inference would see them.
        again, again_tokens: further samples of conversations whose history the template rewrites, and their tokens.
        left_out: what conversations give and their texts do not hold, by kind (``data.may_drop``).
        dropped: samples left out on purpose, by reason.
        skipped: rows that could not be used, by reason.
        examples: the first messages about skipped and dropped rows.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    duplicates: int = 0
    escaped: int = 0
    rewritten: int = 0
    again: int = 0
    again_tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add another tally's counts to this one's."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        del self.examples[_EXAMPLES:]

    def note(self, message: str) -> None:
        """Keep a message as an example, unless there are enough."""
        if len(self.examples) < _EXAMPLES:
            self.examples.append(message)

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain values."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @property
    def unusable(self) -> int:
        """Rows and samples that gave nothing to train on although no setting leaves them out."""
        return sum(self.skipped.values()) + self.dropped.get(NOTHING_LEFT, 0)


@dataclass(frozen=True)
class Job:
    """All that a building process needs to know.

    Attributes:
        folder: where the part files go, ``part-<number>.<array>``.
        work: (source, shard) pairs; a shard's place in this list is its number.
        token_dtype: type of the stored token ids.
    """

    folder: Path
    work: Sequence[tuple[Source, Shard]]
    encoder: Encoder
    options: BuildOptions
    token_dtype: str

    def part(self, number: int, array: str) -> Path:
        """The file of one array of shard ``number``."""
        return self.folder / f"part-{number:06d}.{array}"

    def run(self, number: int) -> Tally:
        """Encode shard ``number`` into its part files.

        Raises:
            RowError: a row cannot be used, and bad rows are errors.
            DataError: the file is damaged.
            OSError: the part files cannot be written.
        """
        source, shard = self.work[number]
        tally = Tally()

        def unreadable(fault: RowError) -> None:
            tally.rows += 1
            self._refuse(fault, tally)

        with ExitStack() as stack:
            files = {name: stack.enter_context(self.part(number, name).open("wb")) for name in PART_ARRAYS}
            for rows in _batches(read_shard(shard, unreadable), BATCH_ROWS):
                self._write(self._samples(source, rows, tally), files, tally)
                tally.rows += len(rows)
        return tally

    def _samples(self, source: Source, rows: list[Row], tally: Tally) -> list[Sample]:
        kept: list[Sample] = []
        for row, result in zip(rows, self.encoder.encode(source, rows), strict=True):
            try:
                kept += self._usable(row, result, tally)
            except RowError as fault:
                self._refuse(fault, tally)
        return kept

    def _refuse(self, fault: RowError, tally: Tally) -> None:
        if self.options.on_bad_row == "error":
            raise fault
        tally.skipped[fault.reason] += 1
        tally.note(str(fault))

    def _usable(self, row: Row, samples: Sequence[Encoded] | RowError, tally: Tally) -> Iterator[Sample]:
        """A row's samples, as far as they may stay.

        Raises:
            RowError: nothing of the row can be trained, or a sample is not what it must be.
        """
        if isinstance(samples, RowError):
            raise samples
        trained = [_is_trained(sample.loss_weights) for sample in samples]
        if not any(trained):
            raise row.error(
                "no token of it is trained (no assistant message, an empty one, or all of them marked "
                "train: false or weight: 0); fix the row, or leave it out with data.on_bad_row=skip",
                NO_TRAINED_TOKEN,
            )
        for sample, is_trained in zip(samples, trained, strict=True):
            _check_ids(row, sample, self.encoder.vocab_size)
            kept = truncate(sample, self.options, row)
            cut = len(sample.input_ids) > self.options.max_length
            if kept is None or not (_is_trained(kept.loss_weights) if cut else is_trained):
                reason = TOO_LONG if kept is None else NOTHING_LEFT if cut else NO_TRAINED_TOKEN
                tally.dropped[reason] += 1
                tally.note(f"{row.where}: dropped, {reason} ({len(sample.input_ids)} tokens)")
                continue
            tally.truncated += cut
            tally.escaped += sample.escaped > 0
            tally.rewritten += sample.rewritten
            tally.again += sample.again
            tally.again_tokens += len(kept.input_ids) if sample.again else 0
            tally.left_out.update(sample.left_out)
            yield Sample(kept.input_ids, kept.loss_weights, row.index)

    def _write(self, samples: Sequence[Sample], files: Mapping[str, BinaryIO], tally: Tally) -> None:
        """Append samples to the part files, and count them."""
        if not samples:
            return
        arrays = columns_of(samples)
        arrays["tokens"] = arrays["tokens"].astype(self.token_dtype)
        spelt = (np.ascontiguousarray(sample.input_ids, "<u4").data for sample in samples)
        digests = [hashlib.blake2b(ids, digest_size=8).digest() for ids in spelt]
        arrays["hashes"] = np.frombuffer(b"".join(digests), HASH_DTYPE)
        for name, file in files.items():
            file.write(arrays[name].tobytes())
        tally.samples += len(samples)
        tally.tokens += len(arrays["tokens"])
        tally.trained_tokens += int(arrays["trained"].sum(dtype=np.int64))


def _check_ids(row: Row, sample: Encoded, vocab_size: int) -> None:
    ids = sample.input_ids
    if len(ids) != len(sample.loss_weights):
        raise row.error(f"{len(ids)} tokens, {len(sample.loss_weights)} loss weights", "unequal lengths")
    if (largest := int(ids.max())) >= vocab_size:
        raise row.error(f"token id {largest}, but the tokenizer has only {vocab_size}", "unknown token id")


def truncate(sample: Encoded, options: BuildOptions, row: Row) -> Encoded | None:
    """Cut a sample's ids and loss weights to the length limit, both at the same place; None when it is dropped.

    Raises:
        RowError: it is too long and that is an error.
    """
    limit, length = options.max_length, len(sample.input_ids)
    if length <= limit:
        return sample
    if options.truncation == "drop":
        return None
    if options.truncation in ("left", "right"):
        kept = slice(-limit, None) if options.truncation == "left" else slice(limit)
        return sample._replace(input_ids=sample.input_ids[kept], loss_weights=sample.loss_weights[kept])
    raise row.error(
        f"{length} tokens, more than data.max_length={limit}; raise data.max_length, or choose "
        f"data.truncation=left, right or drop",
        TOO_LONG,
    )


def _is_trained(loss_weights: NDArray[Any]) -> bool:
    """Whether any token has a weight that some position before it can learn from. Weights are never negative."""
    return bool(np.count_nonzero(loss_weights[1:]))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
