"""Rows of tensors straight out of safetensors files.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header (name -> dtype, shape, byte range)
and the tensors' bytes in C order. Consecutive rows are therefore one byte range, and a process that keeps some rows of
a tensor can read those alone, with ``pread``, into the memory where they stay. Mapping the file instead would count the
touched pages as the process's own memory, and read around them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fsdpsft.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHUNK_BYTES = 16 << 20
"""Largest piece read at once where the bytes cannot go straight to their place (cast, device copy, other layout)."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


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
        if length > size - 8:
            raise ModelError(f"{file} ({size} bytes) is not a safetensors file, or is cut short. Fetch it again.")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ModelError(f"{file} is not a safetensors file: its header is not JSON ({error}).") from error
    entries = {}
    for name, described in header.items():
        if name == "__metadata__":
            continue
        if described["dtype"] not in _DTYPES:
            raise ModelError(f"{file}: tensor {name} has dtype {described['dtype']}, which cannot be trained.")
        begin, end = described["data_offsets"]
        if 8 + length + end > size:
            raise ModelError(f"{file} is cut short: tensor {name} ends at {8 + length + end} of {size} bytes.")
        entries[name] = TensorEntry(file, _DTYPES[described["dtype"]], tuple(described["shape"]), 8 + length + begin)
    return entries


def open_model_files(folder: Path) -> TensorFiles:
    """Open the safetensors files of a Hugging Face model folder.

    Raises:
        ModelError: there are none; where there are pickled weights instead, the message says why they are refused.
    """
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        return TensorFiles([folder / name for name in sorted(set(index["weight_map"].values()))])
    if (folder / SINGLE_FILE).is_file():
        return TensorFiles([folder / SINGLE_FILE])
    pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} holds its weights as {', '.join(pickled[:3])}: pickle files, which can run any code when opened "
            f"and cannot be read by rows. Convert them once: AutoModelForCausalLM.from_pretrained(...)"
            f".save_pretrained(...) writes safetensors."
        )
    found = ", ".join(sorted(f.name for f in folder.iterdir())[:20]) or "nothing"
    raise ModelError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}. Found: {found}.")
