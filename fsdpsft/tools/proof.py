"""The proof of every row's loss mask: rows to processes, findings back, grouped so that each row is named once.

This process reads the rows and hands them out; the workers encode and prove them. A row is a failure where training
would refuse it, or where ``data.mask.proof`` finds that a token is trained that must not be, or one is not that must.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
from tqdm import tqdm

from fsdpsft.data.batches.store_parts import NO_TRAINED_TOKEN, BuildOptions, truncate
from fsdpsft.data.mask.proof import check_conversation
from fsdpsft.data.mask.row_encoder import RowEncoder
from fsdpsft.data.mask.template import Encoded
from fsdpsft.data.rows.conversation import Conversation
from fsdpsft.data.rows.sources import Row, Source, read_rows
from fsdpsft.data.workers import map_in_processes
from fsdpsft.errors import DataError, RowError, place

BATCH_ROWS = 32
_POOL_FROM_ROWS = 256
_EXAMPLES = 200
# Quoted text and numbers differ from row to row; an apostrophe inside a word quotes nothing.
_QUOTED = re.compile(r"(?<!\w)'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+")

Batch = tuple[int, list[Row]]


@dataclass(frozen=True)
class Part:
    """A source whose rows are to be proven.

    Attributes:
        split: "train" or "validation".
        encoder: turns the source's rows into tokens.
        options: what training does with long rows, and with rows that it cannot use.
    """

    split: str
    source: Source
    encoder: RowEncoder
    options: BuildOptions

    @property
    def skips_bad_rows(self) -> bool:
        """A row that cannot be used is a note, not an error."""
        return self.options.on_bad_row == "skip"


@dataclass(frozen=True)
class RowFinding:
    """A finding and the row it was made in.

    Attributes:
        row, line: 0-based row and, for JSON lines, 1-based line; None where the file's fault has no row.
        message: index of the message, or None where it concerns the whole row.
    """

    name: str
    is_error: bool
    file: str
    row: int | None
    line: int | None
    message: int | None
    text: str

    @property
    def where(self) -> str:
        """File, row and message for people."""
        return place(self.file, self.row, self.line) + ("" if self.message is None else f", message {self.message}")


@dataclass
class Group:
    """All findings of one name.

    Attributes:
        count: how many there are; a row may have several.
        rows: file -> rows, in the order they were found, each once.
        examples: by text without its quotes, the first such finding and how many there are; of very many the first.
    """

    count: int = 0
    rows: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, tuple[RowFinding, int]] = field(default_factory=dict)

    def add(self, finding: RowFinding) -> None:
        """Count a finding and remember its row."""
        self.count += 1
        rows = self.rows.setdefault(finding.file, [])
        if finding.row is not None and (not rows or rows[-1] != finding.row):
            rows.append(finding.row)
        kind = _QUOTED.sub("…", finding.text)
        if kind in self.examples or len(self.examples) < _EXAMPLES:
            first, count = self.examples.get(kind, (finding, 0))
            self.examples[kind] = (first, count + 1)

    @property
    def extent(self) -> str:
        """How many rows, or files as a whole, are concerned."""
        counts = {"row": sum(map(len, self.rows.values())), "file": sum(not rows for rows in self.rows.values())}
        return " and ".join(f"{count:,} {unit}{'s' * (count != 1)}" for unit, count in counts.items() if count)


@dataclass
class Proof:
    """The outcome, of a few rows or of all.

    Attributes:
        errors, notes: findings by name.
        rows: rows looked at.
        available: rows there are; None where unknown.
        turns: trained turns proven.
        finished_tokens: rows that came as token ids, whose mask is not checked.
        failed_rows: rows with at least one error.
        seconds, processes: what it took.
    """

    errors: dict[str, Group] = field(default_factory=dict)
    notes: dict[str, Group] = field(default_factory=dict)
    rows: int = 0
    available: int | None = None
    turns: int = 0
    finished_tokens: int = 0
    failed_rows: int = 0
    seconds: float = 0.0
    processes: int = 1

    @property
    def holds(self) -> bool:
        """Whether nothing failed."""
        return not self.errors

    @property
    def is_whole(self) -> bool:
        """Whether no row was left out."""
        return self.available is None or self.rows >= self.available

    def add(self, finding: RowFinding) -> None:
        """Take a finding in."""
        (self.errors if finding.is_error else self.notes).setdefault(finding.name, Group()).add(finding)

    def refuse(self, fault: DataError, skip: bool) -> None:
        """Take in a row or file that training refuses, or skips."""
        name = "skipped" if skip else "refused"
        self.add(RowFinding(name, not skip, fault.file or "", fault.row, fault.line, None, fault.text))


@dataclass
class Outcome:
    """What a worker found in its rows."""

    rows: int = 0
    turns: int = 0
    finished_tokens: int = 0
    failed_rows: int = 0
    refused: list[RowError] = field(default_factory=list)
    findings: list[RowFinding] = field(default_factory=list)


def prove_rows(parts: Sequence[Part], batch: Batch) -> Outcome:
    """Encode and prove some rows of one source."""
    part, rows = parts[batch[0]], batch[1]
    outcome = Outcome(rows=len(rows))
    for row, result in zip(rows, part.encoder.encode(part.source, rows), strict=True):
        fault = result if isinstance(result, RowError) else _unusable(part, row, result)
        if fault is not None:
            outcome.refused.append(fault.at(row.source, row.index, row.line))
            outcome.failed_rows += not part.skips_bad_rows
            continue
        item = part.encoder.read(part.source, row)
        if not isinstance(item, Conversation):
            outcome.finished_tokens += 1
            continue
        found = check_conversation(part.encoder.template, item)
        outcome.turns += sum(item.train)
        outcome.failed_rows += any(finding.is_error for finding in found)
        outcome.findings += [
            RowFinding(f.name, f.is_error, row.source, row.index, row.line, f.message, f.text) for f in found
        ]
    return outcome


def _unusable(part: Part, row: Row, samples: Sequence[Encoded]) -> RowError | None:
    """What the token store would refuse in an encoded row."""
    if not any(np.any(sample.loss_weights[1:] > 0) for sample in samples):
        return row.error("no token of it is trained", NO_TRAINED_TOKEN)
    try:
        for sample in samples:
            truncate(sample, part.options, row)
    except RowError as fault:
        return fault
    return None


def prove(parts: Sequence[Part], *, limit: int | None, available: int | None, processes: int) -> Proof:
    """Prove the masks of all rows, or of ``limit`` rows at equal distances.

    ``available`` are the rows of all sources together; where not known, a limit takes the first rows. With one process,
    or few rows, the work is done here.

    Raises:
        DataError: a worker was killed.
    """
    proof = Proof(available=available)
    started = time.monotonic()
    batches = _batched(_chosen(_all_rows(parts, proof), limit, available))
    few = available is not None and min(available, limit or available) < _POOL_FROM_ROWS
    proof.processes = 1 if few else processes
    total = available if limit is None else min(limit, available or limit)
    skip = parts[0].skips_bad_rows
    with tqdm(total=total, desc="proving", unit=" rows", disable=None, leave=False, file=sys.stderr) as bar:
        for outcome in map_in_processes(partial(prove_rows, parts), batches, proof.processes):
            for fault in outcome.refused:
                proof.refuse(fault, skip)
            for finding in outcome.findings:
                proof.add(finding)
            for name in ("rows", "turns", "finished_tokens", "failed_rows"):
                setattr(proof, name, getattr(proof, name) + getattr(outcome, name))
            bar.update(outcome.rows)
    proof.seconds = time.monotonic() - started
    return proof


def _all_rows(parts: Sequence[Part], proof: Proof) -> Iterator[tuple[int, Row]]:
    """(part, row) of every readable row; what cannot be read becomes a finding, and the next is read."""
    for number, file in ((number, file) for number, part in enumerate(parts) for file in part.source.files):
        skip = parts[number].skips_bad_rows

        def note(fault: RowError, skip: bool = skip) -> None:
            proof.refuse(fault, skip)
            proof.rows += 1
            proof.failed_rows += not skip

        try:
            for row in read_rows(replace(parts[number].source, files=(file,)), note):
                yield number, row
        except DataError as fault:
            proof.refuse(fault.at(file), skip=False)


def _chosen(rows: Iterator[tuple[int, Row]], limit: int | None, available: int | None) -> Iterator[tuple[int, Row]]:
    """All rows, or ``limit`` of them at equal distances."""
    if limit is None:
        return rows
    if available is None or available <= limit:
        return islice(rows, limit)
    return (row for at, row in enumerate(rows) if at * limit // available != (at - 1) * limit // available)


def _batched(rows: Iterator[tuple[int, Row]]) -> Iterator[Batch]:
    """Runs of rows of one part, at most ``BATCH_ROWS`` long."""
    batch: list[Row] = []
    owner = 0
    for number, row in rows:
        if batch and (number != owner or len(batch) == BATCH_ROWS):
            yield owner, batch
            batch = []
        owner = number
        batch.append(row)
    if batch:
        yield owner, batch
