"""One data file: what kind it is, how it splits into shards, and how a shard's rows are streamed.

Every kind is read with memory that grows with neither the file nor the number of rows, and every fault is named with
the file and, where there is one, the row; no library's traceback reaches the user.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from fsdpsft.data.rows.json_files import IndexedRow, RowFault, cut_array, cut_lines, raise_fault, read_array, read_lines
from fsdpsft.errors import DataError, RowError

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
}
COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
TARGET_BYTES = 16 << 20
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"FEA1": "feather 1"}
_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 128  # bounds memory where Parquet keeps a long text once for all the rows that repeat it
# Rows inside a Parquet row group are only reached by decoding those before them, so a group is cut into few shards.
_MAX_SHARDS_PER_GROUP = 16
_READ_FAULTS = (OSError, pa.ArrowException, EOFError, MemoryError, RecursionError, ValueError)
_VALUE_FAULTS = (pa.ArrowException, ValueError, ArithmeticError, LookupError)


@dataclass(frozen=True)
class Shard:
    """A run of consecutive rows of one file, small enough to be one unit of work.

    Attributes:
        file: path of the file.
        kind: parquet, arrow, jsonl, json (an array) or csv.
        start: first row (parquet, arrow) or byte (jsonl, json) of the run.
        stop: one past the last; None: to the end of the file (compressed files and CSV are one shard).
        first_row: 0-based number, in the file, of the run's first row.
        rows: number of rows (an upper bound for jsonl, whose blank lines are no rows); None where not known.
    """

    file: str
    kind: str
    start: int = 0
    stop: int | None = None
    first_row: int = 0
    rows: int | None = None


def suffix_kind(path: str) -> str | None:
    """The kind that a file's name promises, or None for a name that is not a data file's."""
    name = Path(path)
    return SUFFIXES.get((Path(name.stem) if name.suffix in COMPRESSED else name).suffix.lower())


def file_kind(path: str) -> str:
    """Tell the kind of a file by its name and its first bytes.

    Returns:
        parquet, arrow, jsonl, json (an array) or csv.

    Raises:
        DataError: the file is missing, empty, of no known kind, or holds something else than its name says.
    """
    kind = suffix_kind(path)
    with named_faults(path):
        size = Path(path).stat().st_size
        with open_stream(path) as stream:
            head = stream.read(4096)
    if not head:
        raise DataError(f"the file is empty ({size} bytes); a data file needs at least one row", file=path)
    if kind is None:
        known = ", ".join(SUFFIXES)
        raise DataError(
            f"unknown kind of data file; rename it to one of {known} (JSON and CSV also .gz, .zst)", file=path
        )
    found = next((held for magic, held in _MAGIC.items() if head.startswith(magic)), None)
    if found == "feather 1":
        raise DataError("Feather version 1 is not read; write it again with pyarrow.feather (version 2)", file=path)
    wanted = kind if kind in ("parquet", "arrow") else None
    if found != wanted:
        said, held = (kind, found or "no such data") if wanted else (kind, f"{found} data")
        raise DataError(f"the name says {said}, the file holds {held}; rename it or write it again", file=path)
    if kind == "json":
        first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        return "json" if first == b"[" else "jsonl"
    return kind


@contextmanager
def named_faults(path: str) -> Iterator[None]:
    """Turn whatever a library raises while reading ``path`` into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except _READ_FAULTS as exc:
        first_line = next(iter(str(exc).splitlines()), "") or type(exc).__name__
        raise DataError(f"cannot be read, the file may be cut off or damaged ({first_line[:200]})", file=path) from exc


def open_stream(path: str) -> BinaryIO:
    """Open a file for reading, decompressing ``.gz`` and ``.zst`` on the way."""
    magic = COMPRESSED.get(Path(path).suffix)
    if magic is None:
        return Path(path).open("rb")
    with Path(path).open("rb") as file:
        head = file.read(4)
    if head and not head.startswith(magic):
        suffix = Path(path).suffix
        raise DataError(f"the name says {suffix}, but the file is not compressed that way; rename it", file=path)
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(path, compression="detect")))


def cut_file(path: str, target_bytes: int = TARGET_BYTES) -> list[Shard]:
    """Cut a file into shards of about ``target_bytes`` (before compression), in row order, together all its rows.

    Costs one pass over JSON (counting lines, or parsing an array) and a look at the index of Parquet and Arrow.

    Raises:
        DataError: the file is damaged.
    """
    kind = file_kind(path)
    with named_faults(path):
        if kind == "parquet":
            return _cut_parquet(path, target_bytes)
        if kind == "arrow":
            sizes = ((len(batch), batch.nbytes) for batch in _record_batches(path))
            return _cut_groups(path, "arrow", sizes, target_bytes)
        if kind == "csv" or Path(path).suffix in COMPRESSED:
            return [Shard(path, kind)]
        with Path(path).open("rb") as stream:
            cuts = cut_lines(stream, target_bytes) if kind == "jsonl" else cut_array(stream, path, target_bytes)
            shards = [Shard(path, kind, *cut) for cut in cuts]
    return shards or [Shard(path, kind)]


def read_shard(shard: Shard, on_error: RowFault = raise_fault) -> Iterator[IndexedRow]:
    """Stream the rows of a shard as (row number in the file, columns).

    Args:
        shard: from ``cut_file``, or ``Shard(path, file_kind(path))`` for a whole file.
        on_error: called with the error of each row that cannot be read while its neighbours can (a broken JSON line),
            and reading continues; by default the first is raised.

    Raises:
        RowError: a row cannot be read.
        DataError: the file is damaged, or it is read whole and has no rows.
    """
    readers: dict[str, Callable[[Shard, RowFault], Iterator[IndexedRow]]] = {
        "parquet": _read_columnar,
        "arrow": _read_columnar,
        "csv": _read_csv,
        "jsonl": _read_json,
        "json": _read_json,
    }
    faults = 0

    def count(fault: RowError) -> None:
        nonlocal faults
        faults += 1
        on_error(fault)

    row = None
    with named_faults(shard.file):
        for row in readers[shard.kind](shard, count):
            yield row
    if row is None and not faults and shard.stop is None:
        raise DataError("the file has no rows; a data file needs at least one", file=shard.file)


def _read_json(shard: Shard, on_error: RowFault) -> Iterator[IndexedRow]:
    read = read_lines if shard.kind == "jsonl" else read_array
    size = None if shard.stop is None else shard.stop - shard.start
    with open_stream(shard.file) as stream:
        if shard.start:
            stream.seek(shard.start)
        yield from read(stream, shard.file, first_row=shard.first_row, size=size, on_error=on_error)


def _read_csv(shard: Shard, on_error: RowFault) -> Iterator[IndexedRow]:
    """Every cell is text: what looks like a number in one row is words in the next."""
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))  # the library's own limit, 128 KiB, is a short document
    with open_stream(shard.file) as stream:
        lines = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
        try:
            rows = enumerate(_csv_rows(lines, shard.file, on_error))
            yield from ((index, columns) for index, columns in rows if columns is not None)
        except csv.Error as exc:
            text = f"broken CSV in line {lines.line_num} ({exc}); fix the quoting"
            raise DataError(text, file=shard.file) from None
        except UnicodeDecodeError as exc:
            text = f"byte {exc.object[exc.start]:#04x} soon after line {lines.line_num} is not UTF-8"
            raise DataError(f"{text}; save the file as UTF-8", file=shard.file) from None


def _csv_rows(lines: Any, path: str, on_error: RowFault) -> Iterator[dict[str, Any] | None]:
    """The rows below the header; one with another number of cells goes to ``on_error`` and comes as None."""
    header: list[str] = next(lines, [])
    if not header or len(set(header)) < len(header) or "" in header:
        raise DataError(f"the first line must name each column once, found {header}", file=path)
    for index, cells in enumerate(cells for cells in lines if cells):
        if len(cells) == len(header):
            yield dict(zip(header, cells, strict=True))
            continue
        text = f"{len(cells)} cells where the header has {len(header)}; quote cells that hold commas"
        on_error(RowError(text, "wrong number of cells", file=path, row=index, line=lines.line_num))
        yield None


def _read_columnar(shard: Shard, on_error: RowFault) -> Iterator[IndexedRow]:
    batches = _parquet_batches(shard) if shard.kind == "parquet" else _arrow_batches(shard)
    tidy: dict[str, _Tidy] | None = None
    for first, batch in batches:
        if tidy is None:
            tidy = _tidiers(batch.schema, shard.file)
        for index, columns in enumerate(_python_rows(batch, shard.file, first, on_error), first):
            if columns is not None:
                yield index, columns | {name: function(columns[name]) for name, function in tidy.items()}


def _python_rows(batch: pa.RecordBatch, path: str, first: int, on_error: RowFault) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; one that Arrow cannot turn into Python values goes to ``on_error`` and comes as None."""
    try:
        yield from batch.to_pylist()
        return
    except _VALUE_FAULTS:
        pass  # find the row
    for index in range(len(batch)):
        try:
            (row,) = batch.slice(index, 1).to_pylist()
        except _VALUE_FAULTS as exc:
            reason = "invalid UTF-8" if isinstance(exc, UnicodeDecodeError) else "unreadable value"
            text = f"a value cannot be read ({str(exc)[:200]}); write the row again"
            on_error(RowError(text, reason, file=path, row=first + index))
            row = None
        yield row


_Tidy = Callable[[Any], Any]


def _tidiers(schema: pa.Schema, path: str) -> dict[str, _Tidy]:
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"two columns have the same name, found {', '.join(schema.names)}; rename one", file=path)
    functions = {field.name: _tidier(field.type) for field in schema}
    return {name: function for name, function in functions.items() if function is not None}


def _tidier(kind: pa.DataType) -> _Tidy | None:
    """A function that drops the nulls Arrow adds to structs and makes maps dicts; None where there is nothing to do.

    Arrow gives every struct of a column the keys of all of them: a tool call without the argument ``city`` comes back
    with ``city: null`` once any other call has it. Which nulls were in the data is not known; none are kept.
    """
    if pa.types.is_struct(kind):
        fields = {field.name: _tidier(field.type) or _as_is for field in kind}
        return lambda row: row and {key: fields[key](value) for key, value in row.items() if value is not None}
    if pa.types.is_map(kind):
        item = _tidier(kind.item_type) or _as_is
        return lambda pairs: None if pairs is None else {key: item(value) for key, value in pairs}
    lists = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    if any(getattr(pa.types, name)(kind) for name in lists):
        element = _tidier(kind.value_type)
        return None if element is None else lambda values: values and [element(value) for value in values]
    return None


def _as_is(value: Any) -> Any:
    return value


def _batch_rows(size: int, rows: int) -> int:
    """Rows of a batch of about ``_BATCH_BYTES``, when ``rows`` of them have ``size`` bytes."""
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))


def _cut_parquet(path: str, target_bytes: int) -> list[Shard]:
    metadata = pq.read_metadata(path)
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return _cut_groups(path, "parquet", ((group.num_rows, group.total_byte_size) for group in groups), target_bytes)


def _cut_groups(path: str, kind: str, groups: Iterable[tuple[int, int]], target_bytes: int) -> list[Shard]:
    """Shards from (rows, bytes) of a file's row groups or batches: small ones put together, large ones cut."""
    shards: list[Shard] = []
    start = stop = size = 0
    for rows, group_bytes in groups:
        pieces = max(1, min(_MAX_SHARDS_PER_GROUP, group_bytes // target_bytes, rows))
        for piece in range(pieces):
            stop += rows * (piece + 1) // pieces - rows * piece // pieces
            size += group_bytes // pieces
            if size >= target_bytes and stop > start:
                shards.append(Shard(path, kind, start, stop, start, stop - start))
                start, size = stop, 0
    if stop > start:
        shards.append(Shard(path, kind, start, stop, start, stop - start))
    return shards or [Shard(path, kind)]


def _parquet_batches(shard: Shard) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pq.ParquetFile(shard.file, buffer_size=_BATCH_BYTES, page_checksum_verification=True) as file:
        metadata, first = file.metadata, 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            after = first + group.num_rows
            if after > shard.start and (shard.stop is None or first < shard.stop):
                size = _batch_rows(group.total_byte_size, group.num_rows)
                batches = file.iter_batches(batch_size=size, row_groups=[index], use_threads=False)
                yield from _within(shard, first, batches)
            first = after


def _within(shard: Shard, first: int, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The parts of consecutive batches, the first starting at row ``first``, that lie in the shard."""
    for batch in batches:
        low = max(shard.start - first, 0)
        high = len(batch) if shard.stop is None else min(shard.stop - first, len(batch))
        if high > low:
            yield first + low, batch.slice(low, high - low)
        first += len(batch)
        if shard.stop is not None and first >= shard.stop:
            return


def _record_batches(path: str) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow file or stream; memory-mapped, so that skipped ones cost almost nothing."""
    with pa.memory_map(path) as memory:
        is_file = memory.read(6) == b"ARROW1"
        memory.seek(0)
        if is_file:
            reader = pa.ipc.open_file(memory)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(memory)


def _arrow_batches(shard: Shard) -> Iterator[tuple[int, pa.RecordBatch]]:
    for first, batch in _within(shard, 0, _record_batches(shard.file)):
        batch.validate(full=True)  # offsets of a damaged file would be followed out of bounds
        size = _batch_rows(batch.nbytes, len(batch))
        yield from ((first + low, batch.slice(low, size)) for low in range(0, len(batch), size))
