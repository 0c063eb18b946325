"""The streaming JSON readers against ``json.loads`` of the whole text."""

from __future__ import annotations

import io
import json
import random

import pytest

from fsdpsft.data.rows import json_files
from fsdpsft.data.rows.json_files import cut_array, cut_lines, read_array, read_lines
from fsdpsft.errors import DataError, RowError

ROWS = [
    {"a": 1, "text": 'quotes " and \\ and ] , { [', "nested": {"x": [1, [2, {"y": None}]]}},
    {"text": "mixed: \u00e9 \u4f60 \U0001f600", "a": "another type"},
    {},
    {"text": "\u2028 not a line end \x85", "n": [-1.5e-7, True, False, None]},
]


def stream(text: str) -> io.BytesIO:
    return io.BytesIO(text.encode())


@pytest.fixture(params=[1, 7, 64, 1 << 20])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Reads so short that every token gets cut somewhere."""
    monkeypatch.setattr(json_files, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_array_equals_loads(block: int, indent: int | None, bom: str, ascii_only: bool) -> None:
    text = bom + json.dumps(ROWS * 3, indent=indent, ensure_ascii=ascii_only) + "\n"
    assert list(read_array(stream(text), "f")) == list(enumerate(ROWS * 3))


@pytest.mark.parametrize("target", [1, 100, 1 << 20])
def test_array_cut_into_ranges_reads_the_same(block: int, target: int) -> None:
    data = ("\ufeff \n" + json.dumps(ROWS * 5, indent=1, ensure_ascii=False) + " \n").encode()
    cuts = list(cut_array(io.BytesIO(data), "f", target))
    read = []
    for start, stop, first, rows in cuts:
        part = list(read_array(io.BytesIO(data[start:stop]), "f", first_row=first, size=stop - start))
        assert len(part) == rows
        read += part
    assert read == list(enumerate(ROWS * 5))
    assert len(cuts) == (1 if target > 1000 else len(cuts)) and (target > 1 or len(cuts) == 20)


def test_long_value_is_read_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "_BLOCK", 1 << 10)
    decoded = 0
    decode = json_files._DECODER.raw_decode

    class Counting:
        def raw_decode(self, text: str, at: int) -> object:
            nonlocal decoded
            decoded += len(text) - at
            return decode(text, at)

    monkeypatch.setattr(json_files, "_DECODER", Counting())
    long = {"text": "x" * 3_000_000}
    assert [row for _, row in read_array(stream(json.dumps([long])), "f")] == [long]
    assert decoded < 5 * 3_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": 2}', "not closed after row 1"),
        ('[{"a": 1}, {"a"', "row 1: broken JSON.*cut off"),
        ('[{"a": 1}, {"a": "unclosed', "row 1: broken JSON.*cut off"),
        ('[{"a": 1} {"a": 2}]', "expected ',' or ']' after row 0"),
        ('[{"a": 1}, {"a" 2}]', "row 1: broken JSON.*Expecting ':'"),
        ('[{"a": 1}] [', "after the end of the JSON array"),
        ('{"a": 1}', "expected a JSON array of rows, found '{'"),
        ("[" * 200_000, "nested too deeply"),
        ('[{"a": ' + "9" * 5000 + "}]", "row 0: broken JSON"),
    ],
)
def test_broken_array_is_named(block: int, text: str, message: str) -> None:
    if block < 64 and len(text) > 5000:
        pytest.skip("the same with longer reads")
    with pytest.raises(DataError, match=message):
        list(read_array(stream(text), "f.json"))


def test_fault_in_a_row_does_not_read_the_rest_of_the_file() -> None:
    data = stream('[{"a" 1},' + '{"a": 1},' * 500_000)
    with pytest.raises(DataError, match="row 0"):
        list(read_array(data, "f.json"))
    assert data.tell() <= json_files._BLOCK


def test_invalid_utf8_in_array_names_the_byte(block: int) -> None:
    data = b'[{"a": "x"}, {"a": "\xff"}]'
    with pytest.raises(DataError, match=r"f\.json: byte 20 or shortly after is 0xff"):
        list(read_array(io.BytesIO(data), "f.json"))


def test_element_that_is_no_object_is_a_bad_row() -> None:
    text = '[{"a": 1}, 5, {"a": 2}]'
    with pytest.raises(RowError, match="row 1: a row must be a JSON object, found int"):
        list(read_array(stream(text), "f"))
    faults: list[RowError] = []
    assert [row for row, _ in read_array(stream(text), "f", on_error=faults.append)] == [0, 2]
    assert [fault.reason for fault in faults] == ["row is not an object"]


def test_lines_are_numbered_with_blank_ones_counted() -> None:
    text = '\ufeff{"a": 1}\n\n  \r\n{"a": "\u2028"}\r\n{"a": 3}'
    assert list(read_lines(stream(text), "f")) == [(0, {"a": 1}), (3, {"a": "\u2028"}), (4, {"a": 3})]


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_lines_cut_into_ranges_read_the_same(end: str) -> None:
    rng = random.Random(1)
    lines = [json.dumps({"n": i, "t": "é" * rng.randrange(40)}, ensure_ascii=False) for i in range(200)]
    data = ("\n".join(lines) + end).encode()
    for target in (1, 50, 5000, 1 << 20):
        read, size = [], 0
        for start, stop, first, count in cut_lines(io.BytesIO(data), target):
            part = io.BytesIO(data)
            part.seek(start)
            read += list(read_lines(part, "f", first_row=first, size=stop - start))
            size += count
        assert read == [(i, json.loads(line)) for i, line in enumerate(lines)]
        assert size == len(lines) + (end == "\n\n")


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"a": 1', "broken JSON", r"f, row 1 \(line 2\): broken JSON at character 8 of the line"),
        (b"\xff\xfe{", "invalid UTF-8", "byte 0 of the line is 0xff"),
        (b"[1, 2]", "row is not an object", "found list; a JSON array of rows belongs into a file named .json"),
        (b"[" * 200_000, "nested too deeply", "nested too deeply"),
        (b"9" * 5000, "broken JSON", "broken JSON"),
    ],
)
def test_bad_line_is_named_and_can_be_passed_over(line: bytes, reason: str, message: str) -> None:
    data = b'{"a": 0}\n' + line + b'\n{"a": 2}\n'
    with pytest.raises(RowError, match=message) as caught:
        list(read_lines(io.BytesIO(data), "f"))
    assert caught.value.reason == reason
    faults: list[RowError] = []
    assert [row for row, _ in read_lines(io.BytesIO(data), "f", on_error=faults.append)] == [0, 2]
    assert [fault.reason for fault in faults] == [reason]
