"""Fuzz: whatever is done to rows and files, the end is a named error or a conversation with something to train.

Never another exception, a hang, or a mask with nothing in it. All mutations follow from a seed that the test's name
shows, so a failure can be run again.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fsdpsft.data.rows.conversation import Conversation, RowFormat, Tokenized, recognise, to_conversation
from fsdpsft.data.rows.sources import Row, read_rows, read_shard, resolve_sources, shards
from fsdpsft.errors import DataError, RowError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": [1], "b": {"c": 2}}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be exact."},
    {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "add"},
    {"role": "tool", "content": "4", "name": "add"},
    {
        "role": "assistant",
        "content": [{"type": "reasoning", "text": "so"}, {"type": "text", "text": "4"}],
        "weight": 0.5,
    },
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "welcome", "train": True},
]
TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "array"}}}}]
SHAREGPT = [
    {"from": "human", "value": "2+2?"},
    {"from": "function_call", "value": json.dumps(CALL["function"])},
    {"from": "observation", "value": "4"},
    {"from": "gpt", "value": "4"},
]
BASES: dict[str, dict[str, Any]] = {
    "messages": {"messages": MESSAGES, "tools": TOOLS, "enable_thinking": True, "id": 5},
    "sharegpt": {"conversations": SHAREGPT, "tools": json.dumps(TOOLS), "system": "Be exact."},
    "pair": {"question": "2+2?", "answer": "4", "system": "s"},
    "completion": {"prompt": MESSAGES[:2], "completion": MESSAGES[6:]},
    "alpaca": {"instruction": "Add", "input": "2+2", "output": "4", "system": "s", "history": [["q", "a"], ["r", "b"]]},
    "mask": {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1], "attention_mask": [1, 1, 1, 1]},
    "labels": {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    "dicts": {"extra_info": {"question": "2+2?", "answer": "4"}, "prompt": MESSAGES[:2], "tools": None},
}
OPTIONS = {
    "dicts": RowFormat(
        prompt_key="extra_info",
        response_key="extra_info",
        prompt_dict_keys=("question",),
        response_dict_keys=("answer",),
    )
}


def deep(levels: int, value: Any) -> Any:
    for level in range(levels):
        value = [value] if level % 2 else {"k": value}
    return value


JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 3.5, 1e-300, 1e300, float("nan"), float("inf"), 2**63, 2**70, 10**5000,
    "", " \n", "x", "user", "assistant", "\x00", "\ud800", "a\udfffb", "[", "{}", "[{}]", "null", "[null]",
    '{"name": 1}', '{"name": "f", "arguments": "["}', "[" * 100_000, "9" * 5000, "x" * 1_000_000, "<|im_end|>",
    [], {}, [[]], [None], [{}], ["text"], [1, "a"], {"role": None}, {"type": "text"}, {"type": []},
    [{"type": "text", "text": 3}], {"a": {"b": {}}}, [["q", "a", "b"]], [["q", None]], b"bytes", b"\xff", object(),
    {1: 2}, {None: 1}, (1, 2), {1, 2}, deep(80, "x"), deep(5000, 1), list(range(1000)), {"x" * 100_000: 1},
    np.zeros(3), RowError("a reason of its own"),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The row with something wrong in one to three places, none inside another, so that the junk stays as it is."""
    row = copy.deepcopy(row)
    spots, touched = list(places(row)), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *path, last = rng.choice(spots)
        if any(path[: len(other)] == other for other in touched):
            continue
        touched.append(path)
        parent: Any = row
        for step in path:
            parent = parent[step]
        action = rng.randrange(6)
        if action == 0:
            del parent[last]
        elif action == 1 and isinstance(parent, dict):
            parent[rng.choice(["x", "role", "from", "content", "value", "weight", "train", "tool_calls"])] = rng.choice(
                JUNK
            )
        elif action == 2 and isinstance(parent, list):
            parent.insert(last, rng.choice([*JUNK, copy.copy(parent[last])]))
        elif action == 3 and isinstance(parent, dict):
            parent[rng.choice(["role", "labels", "messages", "kwargs", ""])] = parent.pop(last)
        else:
            parent[last] = rng.choice(JUNK)
    return row


def check(made: Conversation | Tokenized) -> None:
    """What every conversation that was let through must be."""
    if isinstance(made, Tokenized):
        assert made.input_ids.dtype == np.uint32 and made.loss_weights.dtype == np.float32
        assert made.input_ids.shape == made.loss_weights.shape and made.input_ids.ndim == 1
        assert np.isfinite(made.loss_weights).all() and (made.loss_weights >= 0).all()
        assert made.loss_weights[1:].any() and made.loss_weights[0] == 0
        return
    assert len(made.messages) == len(made.train) == len(made.weights)
    assert any(made.train)
    for message, train, weight in zip(made.messages, made.train, made.weights, strict=True):
        assert message["role"] in ("system", "developer", "user", "assistant", "tool")
        assert isinstance(message["content"], str)
        assert isinstance(train, bool) and isinstance(weight, float) and np.isfinite(np.float32(weight))
        if train:
            assert message["role"] == "assistant" and np.float32(weight) > 0
            assert message["content"].strip() or message["tool_calls"]
    json.dumps([made.messages, made.tools, made.template_kwargs], allow_nan=False, ensure_ascii=False).encode()


def read(row: Row, options: RowFormat, adapter: str | None = None) -> str:
    """Convert; tell how it ended."""
    try:
        made = to_conversation(row, adapter or recognise(list(row.columns), row, options), options)
    except DataError as exc:
        assert row.source in str(exc) or "data." in str(exc)
        assert len(str(exc)) < 5000
        return exc.reason if isinstance(exc, RowError) else "format"
    check(made)
    return "good"


@pytest.mark.parametrize("name", BASES)
def test_bases_are_good(name: str) -> None:
    assert read(Row("f", 0, BASES[name]), OPTIONS.get(name, RowFormat())) == "good"


@pytest.mark.parametrize("known_format", [True, False])
@pytest.mark.parametrize("name", BASES)
def test_mutated_rows(name: str, known_format: bool) -> None:
    """400 rows a case: 6,400 in all."""
    options = OPTIONS.get(name, RowFormat())
    adapter = recognise(list(BASES[name]), Row("f", 0, BASES[name]), options) if known_format else None
    rng = random.Random(f"{name} {known_format}")
    ends = Counter(read(Row("f.jsonl", i, mutate(BASES[name], rng)), options, adapter) for i in range(400))
    assert 0 < ends["good"] < 380, ends
    assert len(ends) >= 3, ends


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


def write_array(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(json.dumps(rows, indent=1, ensure_ascii=False).encode())


def write_compressed(path: Path, rows: list[dict[str, Any]]) -> None:
    with pa.output_stream(str(path), compression="gzip") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def write_arrow_file(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_arrow_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("question,answer\n" + '"two, and\n""two""?",4\nb,5\n' * len(rows))


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "x.jsonl": write_lines,
    "x.json": write_array,
    "x.jsonl.gz": write_compressed,
    "x.parquet": write_parquet,
    "x.arrow": write_arrow_stream,
    "x.feather": write_arrow_file,
    "x.csv": write_csv,
}


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, insert, remove or double bytes."""
    at = rng.randrange(len(data))
    length = rng.choice((1, 1, 2, 8, 100))
    action = rng.randrange(7)
    if action == 0:
        return data[:at]
    if action == 1:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if action == 2:
        return data[:at] + rng.randbytes(length) + data[at:]
    if action == 3:
        return data[:at] + data[at + length :]
    if action == 4:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if action == 5:
        return (
            data[:at] + rng.choice((b"\xff", b"\x00", b"\n", b'"', b"[" * 3000, b"\xef\xbb\xbf", b"\xc3")) + data[at:]
        )
    return data + data[at:]


def read_file(path: Path) -> str:
    """Read every row three ways: to the first error, passing over bad rows, and in small shards."""
    options = RowFormat()
    ends = []
    try:
        (source,) = resolve_sources(str(path))
        skipped: list[RowError] = []
        rows = list(read_rows(source, skipped.append))
        ends = [read(row, options) for row in rows]
        parts = [row for shard in shards(source, 100) for row in read_shard(shard, lambda _: None)]
        assert [(row.source, row.index) for row in parts] == [(row.source, row.index) for row in rows]
    except RowError as exc:
        raise AssertionError("a bad row must not end the reading when bad rows are passed over") from exc
    except DataError as exc:
        assert path.name in str(exc)
        return "bad file"
    try:
        assert len(list(read_rows(source))) == len(rows) and not skipped
    except RowError as exc:
        assert skipped and str(exc) == str(skipped[0])
        return "bad rows"
    return "good" if set(ends) == {"good"} else "bad rows"


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    """120 files of each kind: 840 in all."""
    path = tmp_path / name
    messages = [MESSAGES[0], *MESSAGES[2:4], *MESSAGES[5:]]  # content is text throughout, as Arrow needs it
    base = [BASES["messages"] | {"messages": messages, "id": number} for number in range(8)]
    WRITERS[name](path, base)
    assert read_file(path) == "good"
    data, rng = path.read_bytes(), random.Random(name)
    ends: Counter[str] = Counter()
    for _ in range(120):
        path.write_bytes(damage(data, rng))
        ends[read_file(path)] += 1
    assert ends["bad file"] + ends["bad rows"] > 20, ends


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl"])
def test_mutated_rows_through_files(tmp_path: Path, name: str) -> None:
    """Rows that Arrow or JSON can hold, one file each."""
    rng = random.Random(name)
    ends: Counter[str] = Counter()
    while ends.total() < 100:
        row = mutate(BASES[rng.choice(list(BASES))], rng)
        try:
            if name != "x.jsonl":
                list(places(row))  # too deep for this is too deep for Arrow's writer, which then kills the process
            WRITERS[name](tmp_path / name, [row])
        except (TypeError, ValueError, OverflowError, RecursionError, UnicodeError, pa.ArrowException, AttributeError):
            continue
        ends[read_file(tmp_path / name)] += 1
    assert ends["good"] > 10 and ends["bad rows"] > 10, ends


def test_every_truncation_of_a_small_file(tmp_path: Path) -> None:
    """Cut off at every byte, an array is never taken for a shorter one, and lines lose at most the last."""
    rows = [{"question": "2+2?", "answer": "é4"}] * 3
    for name in ("x.json", "x.jsonl"):
        path = tmp_path / name
        WRITERS[name](path, rows)
        data = path.read_bytes()
        for length in range(len(data) - 1):
            path.write_bytes(data[:length])
            if name == "x.json":
                assert read_file(path) == "bad file"
            else:
                whole_line = length + 1 == len(data) or data[:length].endswith((b"\n", b"}"))
                assert (read_file(path) == "good") == (whole_line and length > 0)
