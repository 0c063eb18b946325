"""Which files a specification names, the names rows get, and errors that say what is there instead."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fsdpsft.data.rows.sources import Source, fingerprint, first_row, read_rows, read_shard, resolve_sources, shards
from fsdpsft.errors import DataError, RowError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("maths", "prose"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(f'{{"prompt": "{name} {i}", "response": "r"}}\n' for i in range(5))
        )
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    return tmp_path


def names_of(sources: list[Source]) -> list[list[str]]:
    return [[Path(file).name for file in source.files] for source in sources]


def test_path_glob_folder_and_lists(folder: Path) -> None:
    maths, both = ["maths.jsonl"], ["maths.jsonl", "prose.jsonl"]
    assert names_of(resolve_sources(str(folder / "maths.jsonl"))) == [maths]
    assert names_of(resolve_sources(folder / "maths.jsonl")) == [maths]
    assert names_of(resolve_sources(str(folder))) == [both]
    assert names_of(resolve_sources(str(folder / "*.*"))) == [both]
    assert names_of(resolve_sources(str(folder / "**" / "m*.jsonl"))) == [maths]
    assert names_of(resolve_sources([str(folder / f"{n}.jsonl") for n in ("prose", "maths")])) == [both[1:], maths]


def test_weights_and_names(folder: Path) -> None:
    spec = [{"path": str(folder / "maths.jsonl"), "weight": 3}, {"path": str(folder / "prose.jsonl"), "name": "mine"}]
    assert [(s.name, s.weight) for s in resolve_sources(spec)] == [("maths", 3.0), ("mine", 1.0)]
    assert resolve_sources(spec[0])[0].name == "maths"


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "train.jsonl", tmp_path / "b" / "train.json", tmp_path / "c.csv"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"a": 1}\n')
    assert [s.name for s in resolve_sources([str(p) for p in paths])] == ["a/train", "b/train", "c"]
    named = [{"path": str(p), "name": "x"} for p in paths[:2]]
    assert [s.name for s in resolve_sources(named)] == ["a/x", "b/x"]


def test_path_with_glob_characters_that_exists_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text('{"a": 1}\n')
    assert names_of(resolve_sources(str(tmp_path / "a[1].jsonl"))) == [["a[1].jsonl"]]


def test_folder_with_splits_gives_the_one_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-00000.jsonl", "train-00001.jsonl", "test.jsonl", "latest.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n')
    with caplog.at_level(logging.WARNING):
        train = resolve_sources(str(tmp_path))
    assert names_of(train) == [["latest.jsonl", "train-00000.jsonl", "train-00001.jsonl"]]
    assert "leaving test.jsonl" in caplog.text
    assert names_of(resolve_sources(str(tmp_path), split="validation")) == [["test.jsonl"]]


def test_folder_where_the_split_is_unclear_is_refused(tmp_path: Path) -> None:
    for name in ("maths.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"cannot tell whether test\.jsonl is kept for validation, beside maths\.jsonl"):
        resolve_sources(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/math.jsonl", r"no such file or folder; the folder .* has no math\.jsonl, it has maths\.jsonl"),
        ("{}/nowhere/x.jsonl", "has no nowhere, it has"),
        ("{}/*.parquet", r"matches no data file \(\.parquet, .*it has"),
        ("{}/notes.txt", "unknown kind of data file"),
        ("{}/sub", "the folder has no data file .*; it has deeper/, x.md"),
        ([], "no data files are named"),
        ("", "a source is a path"),
        ([None], "a source is a path"),
        ({"path": "{}/maths.jsonl", "wieght": 2}, "unknown wieght; a source has the keys path, weight and name"),
        ({"weight": 2}, "no path"),
        ({"path": "{}/maths.jsonl", "weight": -1}, "weight must be a number above 0, found -1"),
        ({"path": "{}/maths.jsonl", "weight": True}, "weight must be a number above 0"),
        ({"path": "{}/maths.jsonl", "weight": float("nan")}, "weight must be a number above 0"),
        (["{}/maths.jsonl", "{}/*.jsonl"], "named twice .*use {path, weight}"),
    ],
)
def test_what_cannot_be_found_is_told_with_what_is_there(folder: Path, spec: Any, message: str) -> None:
    (folder / "sub" / "deeper").mkdir(parents=True)
    (folder / "sub" / "x.md").write_text("")

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{}", str(folder))
        if isinstance(value, list):
            return [fill(item) for item in value]
        return {key: fill(item) for key, item in value.items()} if isinstance(value, dict) else value

    with pytest.raises(DataError, match=message):
        resolve_sources(fill(spec))


def test_rows_carry_their_place(folder: Path) -> None:
    (source,) = resolve_sources(str(folder))
    rows = list(read_rows(source))
    assert [(Path(row.source).name, row.index, row.line) for row in rows[4:6]] == [
        ("maths.jsonl", 4, 5),
        ("prose.jsonl", 0, 1),
    ]
    assert rows[5].columns == {"prompt": "prose 0", "response": "r"}
    assert rows[5].where == f"{folder}/prose.jsonl, row 0 (line 1)"
    assert [row for shard in shards(source, 40) for row in read_shard(shard)] == rows
    assert len(shards(source, 40)) > 4
    assert pickle.loads(pickle.dumps(shards(source, 40))) == shards(source, 40)


def test_first_row_passes_over_broken_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{broken\n{"b": 1, "a": 2}\n')
    (source,) = resolve_sources(str(path))
    assert (first_row(source).index, list(first_row(source).columns)) == (1, ["b", "a"])
    path.write_text("{broken\n")
    with pytest.raises(RowError, match="row 0"):
        first_row(source)


def test_fingerprint_is_of_the_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsdpsft.data.rows.sources._HASH_BLOCK", 16)
    text = b'{"a": "0123456789012345678901234567890"}\n'
    for name in ("x.jsonl", "y.jsonl"):
        (tmp_path / name).write_bytes(text)

    def of(*names: str) -> str:
        return fingerprint(Source("s", tuple(str(tmp_path / name) for name in names)))

    assert of("x.jsonl") == of("y.jsonl") != of("x.jsonl", "y.jsonl")
    (tmp_path / "y.jsonl").write_bytes(text.replace(b"5", b"4", 1))
    assert of("x.jsonl") != of("y.jsonl")
    (tmp_path / "y.jsonl").write_bytes(text + text)
    assert of("x.jsonl", "x.jsonl") != of("y.jsonl")
    assert of("x.jsonl", "y.jsonl") != of("y.jsonl", "x.jsonl")


def test_saved_datasets_folder(tmp_path: Path) -> None:
    """The layout of ``datasets``' save_to_disk: Arrow streams beside two JSON files that are not data."""
    table = pa.table({"prompt": ["a", "b"], "response": ["c", "d"]})
    with pa.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text(json.dumps({"x": 1}))
    (source,) = resolve_sources(str(tmp_path))
    assert [row.columns["prompt"] for row in read_rows(source)] == ["a", "b"]


def test_parquet_folder_as_spark_writes_it(tmp_path: Path) -> None:
    folder = tmp_path / "data.parquet"
    folder.mkdir()
    (folder / "_SUCCESS").write_text("")
    for part in range(2):
        pq.write_table(pa.table({"prompt": [f"p{part}"], "response": ["r"]}), folder / f"part-{part}.snappy.parquet")
    (source,) = resolve_sources(str(folder))
    assert [row.columns["prompt"] for row in read_rows(source)] == ["p0", "p1"]


def test_real_data_is_found_and_read(real_data: Path) -> None:
    (gsm8k,) = resolve_sources(str(real_data / "gsm8k"))
    assert names_of([gsm8k]) == [["train.jsonl"]]
    assert list(first_row(gsm8k).columns) == ["question", "answer"]
    assert sum(1 for _ in read_rows(gsm8k)) == 7473
    (glaive,) = resolve_sources(str(real_data / "sharegpt" / "glaive_toolcall_en_demo.json"))
    rows = list(read_rows(glaive))
    expected = json.loads(Path(glaive.files[0]).read_text())
    assert [row.columns for row in rows] == expected
    assert [row for shard in shards(glaive, 50_000) for row in read_shard(shard)] == rows


def test_devices_pipes_and_impossible_paths_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")  # opening it would wait for a writer that never comes
    for path, message in (
        (str(tmp_path / "pipe.jsonl"), "neither a file nor a folder"),
        ("/dev/null", "neither a file nor a folder"),
        ("x" * 5000, "not a path that can be opened"),
        ("~nobody-of-this-name/x.jsonl", "no such file or folder"),
    ):
        with pytest.raises(DataError, match=message):
            resolve_sources(path)
