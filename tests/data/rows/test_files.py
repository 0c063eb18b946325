"""Kinds of files, shards, and what Arrow does to nested rows."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from fsdpsft.data.rows.files import Shard, cut_file, file_kind, read_shard
from fsdpsft.errors import DataError, RowError

Rows = list[dict[str, Any]]


def write_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_array(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=1))


def write_gzip(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_zst(path: Path, rows: Rows) -> None:
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(json.dumps(rows).encode())


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=37)


def write_ipc_file(path: Path, rows: Rows) -> None:
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), str(path), chunksize=17)


def write_ipc_stream(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=17)


def write_csv(path: Path, rows: Rows) -> None:
    cells = [[str(cell).replace('"', '""') for cell in row.values()] for row in rows]
    lines = [",".join(rows[0])] + [",".join(f'"{cell}"' for cell in row) for row in cells]
    path.write_text("\ufeff" + "\r\n".join(lines))


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "a.jsonl": write_lines,
    "b.json": write_lines,
    "c.json": write_array,
    "d.jsonl.gz": write_gzip,
    "e.json.zst": write_zst,
    "f.parquet": write_parquet,
    "g.feather": write_ipc_file,
    "h.arrow": write_ipc_stream,
    "i.csv": write_csv,
}
ROWS: Rows = [{"prompt": f'one, "two"\nthree {i} é', "response": "x" * (i % 50)} for i in range(200)]


def whole(path: Path) -> Shard:
    return Shard(str(path), file_kind(str(path)))


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_its_rows_and_shards_give_the_same(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    assert list(read_shard(whole(tmp_path / name))) == list(enumerate(ROWS))
    for target in (1, 700, 1 << 24):
        shards = cut_file(str(tmp_path / name), target)
        parts = [list(read_shard(shard)) for shard in shards]
        assert [row for part in parts for row in part] == list(enumerate(ROWS))
        assert [shard.first_row for shard in shards] == [part[0][0] for part in parts]
        assert all(shard.rows in (None, len(part)) for shard, part in zip(shards, parts, strict=True))
        splits = name not in ("d.jsonl.gz", "e.json.zst", "i.csv")
        assert (len(shards) > 3) == (splits and target == 700) or target == 1


@pytest.mark.parametrize("name", WRITERS)
def test_one_row_is_enough(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS[:1])
    assert list(read_shard(whole(tmp_path / name))) == [(0, ROWS[0])]
    assert [list(read_shard(shard)) for shard in cut_file(str(tmp_path / name))] == [[(0, ROWS[0])]]


@pytest.mark.parametrize("name", ["a.jsonl", "c.json", "f.parquet", "g.feather", "h.arrow"])
def test_one_large_row_group_or_batch_is_still_cut(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows: Rows = [{"prompt": f"question {i} " + "x" * (i % 50), "response": str(i)} for i in range(4000)]
    if name == "f.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name in ("g.feather", "h.arrow"):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        WRITERS[name](path, rows)
    shards = cut_file(str(path), 20_000)
    assert len(shards) > 5
    assert [row for shard in shards for row in read_shard(shard)] == list(enumerate(rows))


@pytest.mark.parametrize("name", ["a.jsonl", "c.json", "f.parquet", "h.arrow", "i.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """Python's peak over twenty times the rows stays where it was; Arrow's pool returns to where it began."""

    def peak(rows: Rows, folder: str) -> int:
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / name
        WRITERS[name](path, rows)
        shard = whole(path)
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        count, arrow = 0, 0
        for _ in read_shard(shard):
            count += 1
            arrow = max(arrow, pa.total_allocated_bytes() - before)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == len(rows)
        return python + arrow

    long: Rows = [{"prompt": "y" * 2000, "response": "z"}] * 1500
    small, large = peak(long, "small"), peak(long * 12, "large")
    assert large < 1.5 * small + 2_000_000 < 20_000_000


def test_arrow_nulls_inside_structs_are_dropped(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "tool_calls": [{"a": {"city": "Rome"}}]},
            ]
        },
        {
            "messages": [{"role": "assistant", "content": "yo", "tool_calls": [{"a": {"day": 3}}, {"a": {}}]}],
            "top": None,
        },
        {"messages": None, "top": 1},
    ]
    pq.write_table(
        pa.Table.from_pylist(rows, schema=pa.Table.from_pylist([*rows[:2], {**rows[2]}]).schema), tmp_path / "x.parquet"
    )
    read = [row["messages"] for _, row in read_shard(whole(tmp_path / "x.parquet"))]
    assert read == [row["messages"] for row in rows]


def test_arrow_maps_become_dicts_and_nulls_in_lists_stay(tmp_path: Path) -> None:
    table = pa.table(
        {
            "m": pa.array([[("k", 1), ("n", None)], []], pa.map_(pa.string(), pa.int64())),
            "l": pa.array([[{"a": 1}, None], [{"b": 2}]]),
            "s": pa.array(
                [{"deep": [{"m": [("x", {"a": 1, "b": None})]}]}, None],
                pa.struct(
                    [
                        (
                            "deep",
                            pa.list_(
                                pa.struct(
                                    [("m", pa.map_(pa.string(), pa.struct([("a", pa.int8()), ("b", pa.int8())])))]
                                )
                            ),
                        )
                    ]
                ),
            ),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    assert [row for _, row in read_shard(whole(tmp_path / "x.parquet"))] == [
        {"m": {"k": 1, "n": None}, "l": [{"a": 1}, None], "s": {"deep": [{"m": {"x": {"a": 1}}}]}},
        {"m": {}, "l": [{"b": 2}], "s": None},
    ]


def test_json_nulls_are_the_datas_own(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", [{"a": {"b": None}}])
    assert list(read_shard(whole(tmp_path / "x.jsonl"))) == [(0, {"a": {"b": None}})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "the file is empty"),
        ("x.parquet", b"", "the file is empty"),
        ("x.jsonl.gz", gzip.compress(b""), "the file is empty"),
        ("x.jsonl", b"\n \n", "no rows"),
        ("x.json", b"[ ]", "no rows"),
        ("x.csv", b"a,b\n", "no rows"),
        ("x.csv", b"a,a\n1,2\n", "must name each column once"),
        ("x.csv", b'a,b\n"1,2\n', "broken CSV"),
        ("x.csv", b"a,b\n1,\xff\n", "not UTF-8"),
        ("x.csv", b"a,b\n1,2\n3\n", r"row 1 \(line 3\): 1 cells where the header has 2"),
        ("x.txt", b"hello", "unknown kind of data file; rename it to one of .parquet"),
        ("x.parquet", b'{"a": 1}\n', "the name says parquet, the file holds no such data"),
        ("x.jsonl", b"PAR1....", "the name says jsonl, the file holds parquet data"),
        ("x.csv", b"ARROW1..", "the name says csv, the file holds arrow data"),
        ("x.feather", b"FEA1....", "Feather version 1"),
        ("x.parquet", b"PAR1" + b"\0" * 50, "cut off or damaged"),
        ("x.arrow", b"ARROW1\0\0" + b"\0" * 50, "cut off or damaged"),
        ("x.arrow", b"\xff\xff\xff\xff" + b"\1" * 50, "cut off or damaged"),
        ("x.jsonl.gz", b"{}", "not compressed that way"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 100)[:-20], "cut off or damaged"),
    ],
)
def test_unusable_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_shard(whole(tmp_path / name)))
    assert str(tmp_path / name) in str(caught.value)


def test_truncated_parquet_and_arrow_are_named(tmp_path: Path) -> None:
    for name in ("f.parquet", "g.feather", "h.arrow"):
        path = tmp_path / name
        WRITERS[name](path, ROWS)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        with pytest.raises(DataError, match=f"{name}: cannot be read, the file may be cut off or damaged"):
            list(read_shard(whole(path)))


def test_text_that_is_not_utf8_in_parquet_is_a_bad_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"b\xff\xfed", b"fine"], pa.binary()).view(pa.binary()).buffers()
    column = pa.StringArray.from_buffers(3, texts[1], texts[2])
    pq.write_table(pa.table({"prompt": column, "response": ["a", "b", "c"]}), tmp_path / "x.parquet")
    with pytest.raises(RowError, match=r"x\.parquet, row 1: a value cannot be read"):
        list(read_shard(whole(tmp_path / "x.parquet")))
    faults: list[RowError] = []
    rows = list(read_shard(whole(tmp_path / "x.parquet"), faults.append))
    assert [row for row, _ in rows] == [0, 2]
    assert [fault.reason for fault in faults] == ["invalid UTF-8"]


def test_a_column_name_given_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="two columns have the same name"):
        list(read_shard(whole(tmp_path / "x.parquet")))


def test_a_file_of_bad_rows_only_is_not_called_empty(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{\n")
    faults: list[RowError] = []
    assert list(read_shard(whole(tmp_path / "x.jsonl"), faults.append)) == []
    assert len(faults) == 1
