"""Safetensors files, read by rows and written one tensor at a time.

A file is eight bytes (the header's length, little-endian), a JSON header (name -> dtype, shape, byte range) and the
tensors' bytes in C order without gaps. So a process that keeps some rows of a tensor reads those alone, with ``pread``,
into the memory where they stay (a mapped file's pages would count as the process's own memory).

``safetensors.torch.save_file`` needs every tensor of a file in memory and holds the GIL; the writer here does neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fsdpsft.errors import CheckpointError, ModelError
from fsdpsft.filesystem import CHUNK_BYTES, FileRecord, read_object, record_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer headers too."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``start`` is the offset of its first byte in ``file``."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class TensorFiles(Mapping[str, TensorEntry]):
    """The tensors of one or several safetensors files, by name; only headers are read until ``read_into``.

    Attributes:
        bytes_read: tensor bytes this object has read so far.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the headers of ``files``.

        Raises:
            ModelError: a file is missing, is not a safetensors file, is shorter than its header says, or holds a dtype
                that torch lacks.
        """
        self._entries: dict[str, TensorEntry] = {}
        self._descriptors: dict[Path, int] = {}
        self.bytes_read = 0
        for file in files:
            self._entries.update(_read_header(file))

    def __getitem__(self, name: str) -> TensorEntry:
        """Return the entry called ``name``."""
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._entries)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, name: str) -> Tensor:
        """Return the whole tensor in its own dtype on the CPU."""
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(name, tensor, (0,) * len(entry.shape))
        return tensor

    def read_into(self, name: str, target: Tensor, offsets: Sequence[int]) -> None:
        """Fill ``target`` with the block of tensor ``name`` that begins at ``offsets`` and has the target's shape.

        The bytes read are those of the block's rows (dimension 0). They land in the target itself where it is
        contiguous CPU memory of the file's dtype and spans whole rows; else they pass, ``CHUNK_BYTES`` at a time,
        through a buffer and are cast and moved by ``copy_``.

        Args:
            name: tensor in the files.
            target: any device and dtype; for a sharded parameter, its local part.
            offsets: index of the block's first element, one per dimension.
        """
        entry = self._entries[name]
        if target.numel() == 0:
            return
        if target.ndim == 0:
            target, offsets = target.view(1), (0,)
        shape = entry.shape or (1,)
        row_bytes = prod(shape[1:]) * entry.dtype.itemsize
        start = entry.start + offsets[0] * row_bytes
        whole_rows = target.shape[1:] == shape[1:]
        if whole_rows and target.device.type == "cpu" and target.dtype == entry.dtype and target.is_contiguous():
            self._pread(entry.file, target, start)
            return
        step = max(CHUNK_BYTES // row_bytes, 1)
        buffer = torch.empty((min(step, len(target)), *shape[1:]), dtype=entry.dtype)
        for row in range(0, len(target), step):
            rows = buffer[: min(step, len(target) - row)]
            self._pread(entry.file, rows, start + row * row_bytes)
            block = rows
            for dim in range(1, target.ndim):
                block = block.narrow(dim, offsets[dim], target.shape[dim])
            target[row : row + len(rows)].copy_(block)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same dtype, shape and bytes, read piece by piece."""
        one, two = self._entries[first], self._entries[second]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        total = prod(one.shape) * one.dtype.itemsize
        for begin in range(0, total, CHUNK_BYTES):
            pieces = torch.empty(2, min(CHUNK_BYTES, total - begin), dtype=torch.uint8)
            self._pread(one.file, pieces[0], one.start + begin)
            self._pread(two.file, pieces[1], two.start + begin)
            if not torch.equal(pieces[0], pieces[1]):
                return False
        return True

    def _pread(self, file: Path, target: Tensor, offset: int) -> None:
        """Read exactly the bytes of ``target`` (contiguous, CPU) from ``offset`` of ``file``."""
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        memory = target.detach().view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(memory):  # one call returns at most 2 GiB
            count = os.preadv(self._descriptors[file], [memory[done:]], offset + done)
            if count == 0:
                raise ModelError(f"{file} ends at byte {offset + done}, in the middle of a tensor; fetch it again.")
            done += count
        self.bytes_read += done


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """Parse one file's header and check it against the file's size."""
    if not file.is_file():
        raise ModelError(f"{file} is missing; the model's index names it. Fetch the model again.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _LARGEST_HEADER):
            raise ModelError(f"{file} ({size} bytes) is not a safetensors file, or is cut short. Fetch it again.")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {name: _entry(file, name, described, 8 + length, size) for name, described in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file} is not a safetensors file: its header cannot be read ({error!r}).") from error


def _entry(file: Path, name: str, described: Any, start: int, size: int) -> TensorEntry:
    """One line of a header, checked."""
    if described["dtype"] not in _DTYPES:
        raise ModelError(f"{file}: tensor {name} has dtype {described['dtype']}, which cannot be trained.")
    dtype, shape = _DTYPES[described["dtype"]], tuple(described["shape"])
    begin, end = described["data_offsets"]
    if start + end > size:
        raise ModelError(f"{file} is cut short: tensor {name} ends at {start + end} of {size} bytes.")
    if begin < 0 or any(length < 0 for length in shape) or end - begin != prod(shape) * dtype.itemsize:
        raise ModelError(
            f"{file}: tensor {name} is {list(shape)} but has bytes {begin} to {end}; fetch the file again."
        )
    return TensorEntry(file, dtype, shape, start + begin)


def open_model_files(folder: Path) -> TensorFiles:
    """Open the safetensors files of a Hugging Face model folder.

    Raises:
        ModelError: there are none, or the index is damaged or names files outside the folder; where there are pickled
            weights instead, the message says why they are refused.
    """
    if (folder / INDEX_FILE).is_file():
        return TensorFiles([_inside(folder, name) for name in sorted(set(read_index(folder).values()))])
    if (folder / SINGLE_FILE).is_file():
        return TensorFiles([_inside(folder, SINGLE_FILE)])
    pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} holds its weights as {', '.join(pickled[:3])}: pickle files, which can run any code when opened "
            f"and cannot be read by rows. Convert them once: AutoModelForCausalLM.from_pretrained(...)"
            f".save_pretrained(...) writes safetensors."
        )
    found = ", ".join(sorted(f.name for f in folder.iterdir())[:20]) or "nothing"
    raise ModelError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}. Found: {found}.")


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a model folder.

    Raises:
        ModelError: the index is damaged, or is not one of a safetensors model.
    """
    path = folder / INDEX_FILE
    index = read_object(path, ModelError, "Fetch the model again.")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelError(f"{path} has no weight_map from tensors to names of files. Fetch the model again.")
    return weight_map


def _inside(folder: Path, name: str) -> Path:
    """The file of this name, if it lies in the folder or is a link of the Hub's cache (snapshots/… -> blobs/…)."""
    if Path(name).is_absolute() or ".." in Path(name).parts or name.strip() in ("", "."):
        raise ModelError(
            f"{folder / INDEX_FILE} names {name!r}, which is no file of this folder; it is not to be trusted."
        )
    home, file = folder.resolve(), (folder / name).resolve()
    blobs = home.parent.parent / "blobs"
    if not file.is_relative_to(home) and not (home.parent.name == "snapshots" and file.is_relative_to(blobs)):
        raise ModelError(
            f"{folder / name} is a link to {file}, outside the folder. Copy or hard-link the file instead."
        )
    return folder / name


# --- Writing ------------------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """``torch.bfloat16`` for ``bfloat16``.

    Raises:
        CheckpointError: a name that is no dtype a file can hold.
    """
    for dtype in DTYPE_NAMES:
        if dtype_name(dtype) == name:
            return dtype
    raise CheckpointError(f"{name!r} is not the name of a dtype; the checkpoint's state.json is damaged.")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


def build_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the first tensor: length, JSON, and blanks up to a multiple of eight.

    Readers view the file as elements, so each tensor must start at a multiple of its element size: ``specs`` come with
    the widest dtype first.
    """
    widths = [spec.dtype.itemsize for spec in specs]
    assert widths == sorted(widths, reverse=True), "tensors of a file must come widest dtype first"
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for spec in specs:
        if spec.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"Tensor {spec.name} has dtype {spec.dtype}, which safetensors cannot hold.")
        end = start + spec.nbytes
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class TensorFileWriter:
    """A safetensors file being written, its tensors given in the order of ``specs``."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Create the file (its folder exists) and write its header."""
        self._path = path
        self._specs = list(specs)
        self._next = 0
        self._hash = hashlib.sha256()
        self._size = 0
        self._file = path.open("wb", buffering=0)
        self._put(memoryview(build_header(self._specs, metadata)))

    def _put(self, content: memoryview) -> None:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            self._hash.update(chunk)
            while len(chunk):  # a raw write may take less than it was given
                chunk = chunk[self._file.write(chunk) or 0 :]
        self._size += len(content)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, which must be the one expected: same name, dtype and shape."""
        spec = self._specs[self._next]
        found = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        assert found == spec, f"{self._path}: {found} was given where {spec} was expected"
        host = tensor.detach().to("cpu").contiguous().view(-1)
        self._put(host.view(torch.uint8).numpy().data)
        self._next += 1

    def close(self) -> FileRecord:
        """Fsync and close; return what was written (hashed before it was written)."""
        assert self._next == len(self._specs), f"{self._path}: {len(self._specs) - self._next} tensors were not written"
        os.fsync(self._file.fileno())
        # The kernel may forget these pages: the proof that follows then reads the disk, and training keeps its memory.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        return FileRecord(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close after a failure, checking nothing; the file is removed with its folder."""
        self._file.close()


def prove_tensor_file(path: Path, specs: Sequence[TensorSpec], written: FileRecord) -> None:
    """Re-open a file just written and compare it with what was meant: key set, dtypes, shapes and every byte.

    Raises:
        CheckpointError: the disk returned something else.
    """
    with safe_open(path, framework="pt") as opened:
        keys = set(opened.keys())
        for spec in specs:
            if spec.name not in keys:
                raise CheckpointError(f"{path}: tensor {spec.name} is missing after writing.")
            held = opened.get_slice(spec.name)
            if tuple(held.get_shape()) != spec.shape or held.get_dtype() != DTYPE_NAMES[spec.dtype]:
                raise CheckpointError(
                    f"{path}: tensor {spec.name} is {held.get_dtype()} {held.get_shape()} on disk, not "
                    f"{DTYPE_NAMES[spec.dtype]} {list(spec.shape)} as written."
                )
    if len(keys) != len(specs):
        raise CheckpointError(f"{path}: tensors {sorted(keys - {s.name for s in specs})} are there and should not be.")
    if (found := record_of(path)) != written:
        raise CheckpointError(f"{path}: the disk returned other bytes than were written ({found} for {written}).")
