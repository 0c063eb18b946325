"""From what the user names (paths, globs, folders, lists, weights, Hub data sets) to rows with their place of origin.

Files are read by ``files.py``; this module decides which files, and gives every row a name that an error can quote.
Work is divided by shards: ``shards(source)`` cuts a source into runs of rows, ``read_shard(shard)`` streams one with
the row numbers it has in its file, and the shards in order give exactly the rows of ``read_rows(source)``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from fsdpsft.data.rows import files
from fsdpsft.data.rows.dataset_info import DatasetInfo
from fsdpsft.data.rows.files import TARGET_BYTES, Shard
from fsdpsft.data.rows.hub import fetch_hub_path, fetch_hub_rows, is_hub_name
from fsdpsft.data.rows.json_files import RowFault, raise_fault
from fsdpsft.data.workers import usable_cores
from fsdpsft.errors import DataError, RowError, and_more, nearest, place

__all__ = ["Row", "Shard", "Source", "fingerprint", "first_row", "read_rows", "read_shard", "resolve_sources", "shards"]

log = logging.getLogger(__name__)

_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json"}
_HELD_OUT = {"test", "val", "valid", "validation", "dev", "eval"}
_HASH_BLOCK = 4 << 20  # hashed by a thread each


@dataclass(slots=True)  # not frozen, which takes three times as long to make
class Row:
    """One row and its place.

    Attributes:
        source: path of its file.
        index: 0-based row number in that file (for JSON lines the 0-based line number).
        columns: the row's values as plain Python objects; nulls that Arrow adds inside structs are gone.
        line: 1-based line number, for JSON lines.
    """

    source: str
    index: int
    columns: dict[str, Any]
    line: int | None = None

    @property
    def where(self) -> str:
        """The place as an error message quotes it."""
        return place(self.source, self.index, self.line)

    def error(self, text: str, reason: str) -> RowError:
        """An error of this row; see ``RowError``."""
        return RowError(text, reason, file=self.source, row=self.index, line=self.line)


@dataclass(frozen=True)
class Source:
    """Files that are one part of the mixture.

    Attributes:
        name: short name for reports.
        files: local paths, in order.
        weight: share in the mixture relative to the other sources'.
        row_format: fields of ``conversation.RowFormat`` that this source states itself (from a dataset_info.json).
    """

    name: str
    files: tuple[str, ...]
    weight: float = 1.0
    row_format: dict[str, Any] = field(default_factory=dict)


def resolve_sources(
    spec: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any],
    dataset_info: str | os.PathLike[str] | None = None,
    *,
    split: str = "train",
) -> list[Source]:
    """Find the files a specification names. Reads no rows; every file is there, not empty and of a known kind.

    Args:
        spec: a path, glob, folder, ``hf://datasets/owner/name/path``, Hub name ``owner/name[:config[:split]]`` (where
            no such path exists and ``datasets`` is installed), name in ``dataset_info``, mapping with ``path`` and
            optional ``weight`` (default 1) and ``name``, or a list of these. Each item of a list is one source.
        dataset_info: a LLaMA-Factory ``dataset_info.json`` (or its folder), whose names ``spec`` may use.
        split: "train" or "validation". Matters for a folder or Hub data set that holds both: of a folder with
            ``train.jsonl`` and ``test.jsonl``, "train" takes the first alone (with a warning), "validation" the other.

    Raises:
        DataError: nothing there (with the nearest names), unusable files, the same file named twice, a bad weight.
    """
    items = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    if not items:
        raise DataError("no data files are named; set data.train_files to a path, a glob, a folder or a list of these")
    info = None if dataset_info is None else DatasetInfo.load(os.fspath(dataset_info))
    sources = [_resolve_item(item, info, split) for item in items]
    _refuse_repeats(sources)
    return _with_unique_names(sources)


def _resolve_item(item: Any, info: DatasetInfo | None, split: str) -> Source:
    if not isinstance(item, Mapping):
        item = {"path": item}
    unknown = sorted(map(str, set(item) - {"path", "weight", "name"}))
    if unknown or "path" not in item:
        found = f"unknown {', '.join(unknown)}" if unknown else "no path"
        raise DataError(f"data source {dict(item)}: {found}; a source has the keys path, weight and name")
    path, weight = item["path"], item.get("weight", 1.0)
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise DataError(f"data source {path!r}: a source is a path, a glob, a folder, a Hub name or a {{path, weight}}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise DataError(f"data source {path}: weight must be a number above 0, found {weight!r}")
    path = os.fspath(path)
    row_format: dict[str, Any] = {}
    name = item.get("name") or _short_name(path)
    if info is not None and path in info.entries:
        path, row_format = info.resolve(path)
    try:
        found_files = tuple(_find_files(path, split, info))
    except OSError as exc:
        raise DataError(f"{path[:200]}: not a path that can be opened ({exc.strerror}); name another") from None
    for file in found_files:
        files.file_kind(file)
    return Source(str(name), found_files, float(weight), row_format)


def _short_name(path: str) -> str:
    stem = path.rstrip("/").rsplit("/", 1)[-1]
    if has_magic(stem):
        return path
    while files.suffix_kind(stem) or Path(stem).suffix in files.COMPRESSED:
        stem = Path(stem).stem
    return stem or path


def _find_files(path: str, split: str, info: DatasetInfo | None) -> list[str]:
    if path.startswith("hf://"):
        path = fetch_hub_path(path)
    local = Path(os.path.expanduser(path))  # noqa: PTH111 - leaves an unknown user's ~name as it is
    if local.is_dir():
        return _folder_files(local, split)
    if local.is_file():
        return [str(local)]
    if local.exists():
        raise DataError(f"{path}: neither a file nor a folder (a device or a pipe); write the rows to a file")
    if has_magic(path):
        found = glob(str(local), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        matches = sorted(match for match in found if _is_data(Path(match)))
        if matches:
            return matches
        raise DataError(f"{path}: the pattern matches no data file ({', '.join(files.SUFFIXES)}); {_nearest(local)}")
    if is_hub_name(path) and not local.parent.exists():
        return fetch_hub_rows(path, split)
    names = "" if info is None else f"; {info.path} has the data sets {', '.join(info.entries)}"
    raise DataError(f"{path}: no such file or folder; {_nearest(local)}{names}")


def _nearest(path: Path) -> str:
    """What there is instead of a path that does not exist."""
    while not path.parent.is_dir():
        path = path.parent
    there = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    close = nearest(path.name, there, most=3, alike=0.5) or there[:5]
    if not close:
        return f"the folder {path.parent} is empty"
    return f"the folder {path.parent} has no {path.name}, it has {', '.join(close)}" + (" …" if len(there) > 5 else "")


def _is_data(path: Path) -> bool:
    return path.name not in _NOT_DATA and files.suffix_kind(path.name) is not None and path.is_file()


def _folder_files(folder: Path, split: str) -> list[str]:
    inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    data = [p for p in inside if _is_data(p)]
    if not data:
        there = ", ".join(p.name + "/" * p.is_dir() for p in inside[:8]) or "nothing"
        known = ", ".join(files.SUFFIXES)
        raise DataError(f"{folder}: the folder has no data file ({known}); it has {there}. Name the files or a glob")
    held_out = [p for p in data if _HELD_OUT & set(re.split(r"[^a-z]+", p.name.lower()))]
    rest = [p for p in data if p not in held_out]
    if held_out and rest:
        if not any("train" in p.name.lower() for p in rest):
            problem = f"cannot tell whether {_names(held_out)} is kept for validation"
            raise DataError(f"{folder}: {problem}, beside {_names(rest)}; name the files or a glob")
        taken, left = (rest, held_out) if split == "train" else (held_out, rest)
        log.warning("%s: taking %s for %s, leaving %s", folder, _names(taken), split, _names(left))
        return [str(p) for p in taken]
    return [str(p) for p in data]


def _names(paths: list[Path]) -> str:
    return and_more([path.name for path in paths])


def _refuse_repeats(sources: list[Source]) -> None:
    owner: dict[str, str] = {}
    for source in sources:
        for file in source.files:
            path = os.path.realpath(file)
            if path in owner:
                by = f"by {owner[path]} and {source.name}"
                raise DataError(f"{file}: named twice ({by}); to see a file more often use {{path, weight}}")
            owner[path] = source.name


def _with_unique_names(sources: list[Source]) -> list[Source]:
    """Two sources called train get names of their folders, or numbers."""
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        names = [f"{Path(s.files[0]).parent.name}/{s.name}" if names.count(s.name) > 1 else s.name for s in sources]
    seen: dict[str, int] = {}
    unique = []
    for source, name in zip(sources, names, strict=True):
        seen[name] = seen.get(name, 0) + 1
        label = name if names.count(name) == 1 else f"{name}#{seen[name]}"
        unique.append(Source(label, source.files, source.weight, source.row_format))
    return unique


def shards(source: Source, target_bytes: int = TARGET_BYTES) -> list[Shard]:
    """Cut a source into shards of about ``target_bytes``, in row order, for workers to share.

    ``Shard.rows`` says how many rows there are, where that is cheap to know.

    Raises:
        DataError: a file is damaged.
    """
    return [shard for file in source.files for shard in files.cut_file(file, target_bytes)]


def read_shard(shard: Shard, on_error: RowFault = raise_fault) -> Iterator[Row]:
    """Stream a shard's rows, numbered as in their file.

    Args:
        shard: from ``shards``.
        on_error: called with the error of each unreadable row, and reading continues; by default the first is raised.

    Raises:
        RowError: a row cannot be read.
        DataError: the file is damaged or has no rows; this ends the reading with or without ``on_error``.
    """
    for index, columns in files.read_shard(shard, on_error):
        yield Row(shard.file, index, columns, index + 1 if shard.kind == "jsonl" else None)


def read_rows(source: Source, on_error: RowFault = raise_fault) -> Iterator[Row]:
    """Stream all rows of a source in order, with memory that grows with neither files nor rows.

    ``on_error`` and what is raised are as in ``read_shard``.
    """
    for file in source.files:
        yield from read_shard(Shard(file, files.file_kind(file)), on_error)


def first_row(source: Source) -> Row:
    """The source's first readable row, by which its format is recognised.

    Raises:
        DataError: there is none.
    """
    faults: list[RowError] = []
    for row in read_rows(source, faults.append):
        return row
    raise faults[0]


def fingerprint(source: Source) -> str:
    """A hash of the bytes of the source's files, in order; names, places and dates do not matter.

    Raises:
        DataError: a file cannot be read.
    """

    def digest(part: tuple[str, int]) -> bytes:
        file, start = part
        with files.named_faults(file), Path(file).open("rb") as stream:
            stream.seek(start)
            return hashlib.blake2b(stream.read(_HASH_BLOCK), digest_size=32).digest()

    total = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        for file in source.files:
            with files.named_faults(file):
                size = Path(file).stat().st_size
            total.update(json.dumps([files.file_kind(file), size]).encode())
            for part in pool.map(digest, ((file, start) for start in range(0, size, _HASH_BLOCK))):
                total.update(part)
    return total.hexdigest()
