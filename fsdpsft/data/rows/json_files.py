"""JSON lines and JSON arrays, read with memory that grows with neither the file nor the number of rows.

The parser is Python's own: Arrow's JSON reader infers one schema for a whole file, which breaks on columns whose type
differs between rows (a tool call's arguments, say) and cannot tell an absent key from a null one.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from fsdpsft.errors import DataError, RowError

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()
# A value cut off by the end of what has been read so far fails this close to that end (``-Infinity`` and a pair of
# ``\uXXXX`` escapes are the longest tokens); only a string fails where it starts.
_LONGEST_TOKEN = 16

RowFault = Callable[[RowError], None]
IndexedRow = tuple[int, dict[str, Any]]


def raise_fault(fault: RowError) -> None:
    """What is done with a bad row where no one else handles it."""
    raise fault


def _columns(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    hint = "; a JSON array of rows belongs into a file named .json" if isinstance(value, list) else ""
    raise RowError(f"a row must be a JSON object, found {type(value).__name__}{hint}", "row is not an object")


def _parse_line(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as exc:
        found = f"byte {exc.start} of the line is {raw[exc.start]:#04x}, which is not UTF-8"
        raise RowError(f"{found}; save the file as UTF-8", "invalid UTF-8") from None
    except json.JSONDecodeError as exc:
        found = f"broken JSON at character {exc.pos} of the line ({exc.msg})"
        raise RowError(f"{found}; write one JSON object per line", "broken JSON") from None
    except RecursionError:
        raise RowError("JSON nested too deeply to be read; flatten the row", "nested too deeply") from None
    except ValueError as exc:  # an integer of thousands of digits
        raise RowError(f"broken JSON ({exc}); fix the row", "broken JSON") from None
    return _columns(value)


def read_lines(
    stream: BinaryIO, path: str, *, first_row: int = 0, size: int | None = None, on_error: RowFault = raise_fault
) -> Iterator[IndexedRow]:
    """Rows of JSON lines.

    Args:
        stream: at the start of a line.
        path: the file's name, for messages.
        first_row: 0-based number of that line.
        size: bytes to read from there; None reads to the end.
        on_error: called with each broken line's error, and reading continues; by default the first is raised.

    Yields:
        (row number, columns). The row number is the 0-based line number, blank lines counted though they are no rows.

    Raises:
        RowError: a line is not UTF-8, not JSON or not an object.
    """
    done = 0
    for number, raw in enumerate(stream, first_row):
        done += len(raw)
        text = raw.removeprefix(_BOM) if number == 0 else raw
        blank = not text or text.isspace()
        try:
            if not blank:
                yield number, _parse_line(text)
        except RowError as fault:
            on_error(fault.at(path, number, number + 1))
        if size is not None and done >= size:
            return


def cut_lines(stream: BinaryIO, target_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut JSON lines into ranges of whole lines of about ``target_bytes``: (start, stop, first row, lines)."""
    start = row = 0
    while block := stream.read(target_bytes) + stream.readline():
        lines = block.count(b"\n") + (not block.endswith(b"\n"))
        yield start, start + len(block), row, lines
        start, row = start + len(block), row + lines


class _Window:
    """The part of a JSON text between what has been parsed and what has been read.

    Decoded as Latin-1, one character is one byte and JSON's structure stays the same, so ``offset`` counts bytes.
    """

    def __init__(self, stream: BinaryIO, path: str, size: int | None, encoding: str) -> None:
        self._stream, self._path, self._left, self._encoding = stream, path, size, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._text, self._at, self._dropped, self._bytes = "", 0, 0, 0
        self._ended = False
        bom = _BOM.decode(encoding)
        while len(self._text) < len(bom) and not self._ended:
            self._grow()
        self._at = len(bom) if self._text.startswith(bom) else 0

    @property
    def offset(self) -> int:
        """Characters parsed so far."""
        return self._dropped + self._at

    def _grow(self) -> None:
        """Read at least as much as is waiting, so that a long value costs linear time."""
        want = max(_BLOCK, len(self._text) - self._at)
        block = self._stream.read(want if self._left is None else min(want, self._left))
        try:
            more = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as exc:
            found = f"{exc.object[exc.start]:#04x}, which is not UTF-8"
            byte = self._bytes + exc.start
            text = f"byte {byte} or shortly after is {found}; save the file as UTF-8"
            raise DataError(text, file=self._path) from None
        self._text = self._text[self._at :] + more
        self._dropped, self._at = self._dropped + self._at, 0
        self._bytes += len(block)
        self._left = None if self._left is None else self._left - len(block)
        self._ended = not block

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            rest = len(self._text)
            while self._at < rest and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < rest:
                return self._text[self._at]
            if self._ended:
                return ""
            self._grow()

    def skip(self) -> None:
        """Step over the character that ``peek`` gave."""
        self._at += 1

    def value(self, row: int) -> Any:
        """Parse the value that starts here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as exc:
                cut_off = exc.pos >= len(self._text) - _LONGEST_TOKEN or exc.msg.startswith("Unterminated string")
                if self._ended or not cut_off:
                    found = f"broken JSON {exc.pos - self._at} characters into the row ({exc.msg})"
                    hint = "the file seems to be cut off" if self._ended and cut_off else "fix the file"
                    raise DataError(f"{found}; {hint}", file=self._path, row=row) from None
            except RecursionError:
                problem = "JSON nested too deeply to be read; flatten the row"
                raise DataError(problem, file=self._path, row=row) from None
            except ValueError as exc:  # an integer of thousands of digits
                raise DataError(f"broken JSON ({exc}); fix the row", file=self._path, row=row) from None
            else:
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            self._grow()


def _elements(window: _Window, path: str, first_row: int, whole: bool) -> Iterator[tuple[int, Any, int]]:
    """(row number, value, characters parsed before it) for the elements of an array, or of a range inside one."""
    if whole:
        if window.peek() != "[":
            raise DataError(f"expected a JSON array of rows, found {window.peek()!r} at its start", file=path)
        window.skip()
    row = first_row
    while window.peek() not in ("]", ""):
        start = window.offset
        yield row, window.value(row), start
        row += 1
        if window.peek() == ",":
            window.skip()
        elif window.peek() not in ("]", ""):
            raise DataError(f"expected ',' or ']' after row {row - 1}, found {window.peek()!r}", file=path)
    if not whole:
        return
    if window.peek() == "":
        problem = f"the JSON array is not closed after row {row - 1}; the file seems to be cut off"
        raise DataError(problem, file=path)
    window.skip()
    if window.peek():
        raise DataError(f"found {window.peek()!r} after the end of the JSON array; fix the file", file=path)


def read_array(
    stream: BinaryIO, path: str, *, first_row: int = 0, size: int | None = None, on_error: RowFault = raise_fault
) -> Iterator[IndexedRow]:
    """Rows of a JSON array, parsed one at a time.

    Args as of ``read_lines``; where ``size`` is given, ``stream`` is at an element inside the array, and ``size`` bytes
    hold whole elements.

    Raises:
        DataError: the text is not UTF-8 or not a JSON array.
        RowError: an element is not an object.
    """
    window = _Window(stream, path, size, "utf-8")
    for row, value, _ in _elements(window, path, first_row, whole=size is None):
        try:
            yield row, _columns(value)
        except RowError as fault:
            on_error(fault.at(path, row))


def cut_array(stream: BinaryIO, path: str, target_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a JSON array into ranges of whole elements of about ``target_bytes``: (start, stop, first row, rows).

    The array is parsed once to find them; a range reads ``element, element, …`` without the array's brackets.
    """
    window = _Window(stream, path, None, "latin-1")
    start = first_row = row = 0
    for row, _, offset in _elements(window, path, 0, whole=True):
        if row == 0:
            start = offset
        elif offset - start >= target_bytes:
            yield start, offset, first_row, row - first_row
            start, first_row = offset, row
    if start:  # the closing bracket is in the last range, where it ends the reading
        yield start, window.offset, first_row, row + 1 - first_row
