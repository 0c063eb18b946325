"""Errors for people: an error about a row carries its place as fields, also between processes."""

from __future__ import annotations

import pickle

from fsdpsft.errors import RowError


def test_a_row_error_carries_its_place() -> None:
    error = RowError("column messages: empty", "empty").at("a.jsonl", 3, 4)
    copy = pickle.loads(pickle.dumps(error))
    for found in (error, copy):
        assert (found.file, found.row, found.line, found.reason) == ("a.jsonl", 3, 4, "empty")
        assert found.text == "column messages: empty"
        assert str(found) == "a.jsonl, row 3 (line 4), column messages: empty"
    assert str(RowError("cut off").at("b.jsonl", 0)) == "b.jsonl, row 0: cut off"
    assert str(RowError("cut off").at("b.parquet")) == "b.parquet: cut off"
    assert str(RowError("no place yet")) == "no place yet"
