"""The proof of every row's loss mask: rows to processes, findings back, grouped so that each row is named once.

This process reads the rows and hands them out; the workers encode and prove them. A row is a failure where training
would refuse it, or where ``mask_check`` finds that a token is trained that must not be, or one is not that must.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from tqdm import tqdm

from fsdpsft.data.batches.store_parts import NO_TRAINED_TOKEN, TOO_LONG
from fsdpsft.data.mask.row_encoder import RowEncoder
from fsdpsft.data.mask.template import ChatTemplate, Encoded
from fsdpsft.data.rows.conversation import Conversation
from fsdpsft.data.rows.sources import Row, Source, read_rows
from fsdpsft.errors import DataError, RowError, place

CLAIMS = {
    "refused": "every row can be used",
    "prompt_ids": "prompt ids equal the generation prompt's ids",
    "prefix": "prefixes are stable: a turn reads the same at inference",
    "stop_not_trained": "the stop token of every reply is trained",
    "stop_not_in_eos": "the stop token is in generation_config.eos_token_id",
    "foreign_content": "no text of user, system or tool is trained",
    "text_missing": "the trained ids decode to the assistant's text",
}
"""What is proven, by the name of the finding that breaks it."""

NOTES = {
    "skipped": "rows left out (data.on_bad_row=skip)",
    "history_rewritten": "replies trained as the template remembers them, not as inference makes them "
    "(data.history=per_turn trains them exactly)",
    "escaped": "conversations with special-token text in their content, spelt as ordinary text; apply_chat_template "
    "would make special tokens of it, so their prompts are not compared with its",
    "stop_not_in_eos": "replies whose stop token the model's generation_config lacks, as data.chat_template brings "
    "another; the exported model's will have it",
    "nothing_trained": "samples without a trained token",
    "reasoning_dropped": "messages whose reasoning the template does not print",
}
"""What breaks no rule and is worth knowing, by the finding's name."""

BATCH_ROWS = 32
_POOL_FROM_ROWS = 256
_EXAMPLES = 200
_HISTORY_CONVERSATIONS = 200
_HISTORY_ROWS = 4000
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Part:
    """A source whose rows are to be proven.

    Attributes:
        split: "train" or "validation".
        encoder: turns the source's rows into tokens.
        length_limit: most tokens of a sample where a longer one is an error; None where it is cut or dropped.
    """

    split: str
    source: Source
    encoder: RowEncoder
    length_limit: int | None


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
        examples: the first finding of each text, and how many have that text; of very many texts the first.
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
        if finding.text in self.examples or len(self.examples) < _EXAMPLES:
            first, count = self.examples.get(finding.text, (finding, 0))
            self.examples[finding.text] = (first, count + 1)

    @property
    def row_count(self) -> int:
        """Rows with such a finding."""
        return sum(map(len, self.rows.values()))

    def shown(self, most: int) -> list[tuple[RowFinding, int]]:
        """The first examples, each with the number of findings of its text."""
        return list(self.examples.values())[:most]

    @property
    def extent(self) -> str:
        """How many rows, or files as a whole, are concerned."""
        files = sum(not rows for rows in self.rows.values())
        parts = [f"{count:,} {unit}{'s' * (count != 1)}" for count, unit in ((self.row_count, "row"), (files, "file"))]
        return " and ".join(part for part in parts if not part.startswith("0 "))


@dataclass(frozen=True)
class HistoryCost:
    """Tokens of the same conversations under each ``data.history``.

    Attributes:
        conversations: how many with several trained turns were counted.
        as_rendered, per_turn: their tokens.
        rewritten: how many of them the template prints otherwise than inference sees them.
        refused: further ones that only ``per_turn`` can train.
    """

    conversations: int
    as_rendered: int
    per_turn: int
    rewritten: int
    refused: int


@dataclass
class Proof:
    """The outcome.

    Attributes:
        errors, notes: findings by name.
        rows: rows looked at.
        available: rows there are; None where unknown.
        turns: trained turns proven.
        finished_tokens: rows that came as token ids, whose mask is taken at its word.
        failed_rows: rows with at least one error.
        seconds, processes: what it took.
        history: the cost of each way to treat history; None where the template rewrites none.
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
    history: HistoryCost | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing failed."""
        return not self.errors

    def add(self, finding: RowFinding) -> None:
        """Take a finding in."""
        (self.errors if finding.is_error else self.notes).setdefault(finding.name, Group()).add(finding)


@dataclass
class Outcome:
    """What a worker found in its rows."""

    rows: int = 0
    turns: int = 0
    finished_tokens: int = 0
    failed_rows: int = 0
    findings: list[RowFinding] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------- a few rows


def prove_rows(part: Part, rows: Sequence[Row], skip_bad: bool) -> Outcome:
    """Encode and prove some rows of one source.

    Args:
        part: where the rows are from.
        rows: the rows.
        skip_bad: a row that cannot be used is a note, not an error.
    """
    outcome = Outcome(rows=len(rows))
    for row, result in zip(rows, part.encoder.encode(part.source, rows), strict=True):
        fault = result if isinstance(result, RowError) else _unusable(part, row, result)
        if fault is not None:
            outcome.findings.append(_refusal(fault.at(row.source, row.index, row.line), skip_bad))
            outcome.failed_rows += not skip_bad
            continue
        item = part.encoder.read(part.source, row)
        if not isinstance(item, Conversation):
            outcome.finished_tokens += 1
            continue
        found = part.encoder.template.check(item)
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
    longest = max(len(sample.input_ids) for sample in samples)
    if part.length_limit is not None and longest > part.length_limit:
        return row.error(
            f"{longest} tokens, more than data.max_length={part.length_limit}; raise data.max_length, or "
            "choose data.truncation=left, right or drop",
            TOO_LONG,
        )
    return None


def _refusal(fault: DataError, skip_bad: bool) -> RowFinding:
    """The finding for a row or file that training refuses."""
    name = "skipped" if skip_bad else "refused"
    return RowFinding(name, not skip_bad, fault.file or "", fault.row, fault.line, None, fault.text)


# ---------------------------------------------------------------------------------------------------------- all rows


def prove(parts: Sequence[Part], *, limit: int | None, available: int | None, skip_bad: bool, processes: int) -> Proof:
    """Prove the masks of all rows, or of ``limit`` rows at equal distances.

    Args:
        parts: the sources.
        limit: most rows to prove; None for all.
        available: rows of all sources together, where known; without it, a limit takes the first rows.
        skip_bad: see ``prove_rows``.
        processes: workers; with 1, or few rows, the work is done here.

    Raises:
        DataError: a worker was killed.
    """
    proof = Proof(available=available)
    started = time.monotonic()
    rows = _chosen(_all_rows(parts, proof, skip_bad), limit, available)
    batches = _batched(rows)
    few = available is not None and min(available, limit or available) < _POOL_FROM_ROWS
    proof.processes = 1 if few else processes
    total = available if limit is None else min(limit, available or limit)
    with tqdm(total=total, desc="proving", unit=" rows", disable=None, leave=False, file=sys.stderr) as bar:
        for outcome in _outcomes(parts, batches, skip_bad, proof.processes):
            for finding in outcome.findings:
                proof.add(finding)
            proof.rows += outcome.rows
            proof.turns += outcome.turns
            proof.finished_tokens += outcome.finished_tokens
            proof.failed_rows += outcome.failed_rows
            bar.update(outcome.rows)
    proof.history = history_cost(parts)
    proof.seconds = time.monotonic() - started
    return proof


def _all_rows(parts: Sequence[Part], proof: Proof, skip_bad: bool) -> Iterator[tuple[int, Row]]:
    """(part, row) of every readable row; what cannot be read becomes a finding, and the next file is gone on with."""
    for number, file in ((number, file) for number, part in enumerate(parts) for file in part.source.files):

        def note(fault: RowError, file: str = file) -> None:
            proof.add(_refusal(fault.at(file), skip_bad))
            proof.rows += 1
            proof.failed_rows += not skip_bad

        try:
            for row in read_rows(replace(parts[number].source, files=(file,)), note):
                yield number, row
        except DataError as fault:
            proof.add(_refusal(fault.at(file), skip_bad=False))


def _chosen(rows: Iterator[tuple[int, Row]], limit: int | None, available: int | None) -> Iterator[tuple[int, Row]]:
    """All rows, or ``limit`` of them at equal distances."""
    if limit is None:
        return rows
    if available is None or available <= limit:
        return islice(rows, limit)
    return (row for place, row in enumerate(rows) if place * limit // available != (place - 1) * limit // available)


def _batched(rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, list[Row]]]:
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


# ------------------------------------------------------------------------------------------------------- processes

_worker: tuple[Sequence[Part], bool] | None = None


def _outcomes(
    parts: Sequence[Part], batches: Iterator[tuple[int, list[Row]]], skip_bad: bool, processes: int
) -> Iterator[Outcome]:
    """What is found in each batch, in order; the rows that wait for a worker are few, however many there are."""
    if processes == 1:
        yield from (prove_rows(parts[number], rows, skip_bad) for number, rows in batches)
        return
    # Forked processes share the tokenizers. Elsewhere than on Linux, forking is not safe with the system's libraries.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    arguments = (parts, skip_bad, os.getpid())
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=arguments)
    waiting: deque[Future[Outcome]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_prove_batch, *batch))
            if len(waiting) > 4 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that was proving rows was killed, most likely for want of memory; set data.num_workers to a "
            "smaller number."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(parts: Sequence[Part], skip_bad: bool, parent: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the parallelism is in the processes
    _worker = (parts, skip_bad)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process when its parent has died; nobody would read what it finds."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _prove_batch(number: int, rows: list[Row]) -> Outcome:
    assert _worker is not None
    parts, skip_bad = _worker
    return prove_rows(parts[number], rows, skip_bad)


# -------------------------------------------------------------------------------------------------------- history


def history_cost(parts: Sequence[Part]) -> HistoryCost | None:
    """Tokens of the first conversations with several trained turns under each ``data.history``.

    Returns:
        None where the template rewrites no history, so that there is nothing to choose.
    """
    counts = Counter[str]()
    for part in parts:
        if part.split != "train" or not part.encoder.needs_template:
            continue
        as_rendered, per_turn = (_with_history(part.encoder, history) for history in ("as_rendered", "per_turn"))
        for conversation in _several_turns(part, _HISTORY_CONVERSATIONS - counts["seen"]):
            counts["seen"] += 1
            (whole,), (turns,) = (t.encode_batch([conversation]) for t in (as_rendered, per_turn))
            if isinstance(turns, DataError):
                continue
            if isinstance(whole, DataError):
                counts["refused"] += 1
                continue
            counts["conversations"] += 1
            counts["rewritten"] += any(sample.rewritten for sample in whole)
            counts["as_rendered"] += sum(len(sample.input_ids) for sample in whole)
            counts["per_turn"] += sum(len(sample.input_ids) for sample in turns)
    if not counts["rewritten"] and not counts["refused"]:
        return None
    names = ("conversations", "as_rendered", "per_turn", "rewritten", "refused")
    return HistoryCost(*(counts[name] for name in names))


def _with_history(encoder: RowEncoder, history: str) -> ChatTemplate:
    """The encoder's template under ``history``."""
    return ChatTemplate(
        encoder.tokenizer, encoder.chat_template, encoder.template_kwargs, encoder.special_tokens_in_content,
        history, encoder.eos_token_ids, encoder.now,  # type: ignore[arg-type]
    )  # fmt: skip


def _several_turns(part: Part, wanted: int) -> Iterator[Conversation]:
    """The first conversations with several trained turns, among the first rows of a source."""
    try:
        for row in islice(read_rows(part.source, _ignore), _HISTORY_ROWS):
            if wanted <= 0:
                return
            item = part.encoder.read(part.source, row)
            if isinstance(item, Conversation) and sum(item.train) > 1:
                wanted -= 1
                yield item
    except DataError:  # a damaged file; the proof names it
        return


def _ignore(_: RowError) -> None:
    """An unreadable row: the proof names it."""
