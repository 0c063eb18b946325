"""Write a safetensors file one tensor at a time, hashing it on the way.

``safetensors.torch.save_file`` wants every tensor of the file in memory at once and holds the GIL while it writes;
this writer needs one tensor and lets training go on. The format: eight bytes (the header's length, little-endian), a
JSON header (name -> dtype, shape, byte range), then the tensors' bytes in C order without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fsdpsft.checkpoint.files import CHUNK_BYTES, FileRecord, record_of
from fsdpsft.errors import CheckpointError

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


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
    """A tensor as it stands in a file."""

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
        """Append the next tensor, which must be the one announced: same name, dtype and shape."""
        spec = self._specs[self._next]
        found = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        assert found == spec, f"{self._path}: {found} came where {spec} was announced"
        host = tensor.detach().to("cpu").contiguous().view(-1)
        self._put(host.view(torch.uint8).numpy().data)
        self._next += 1

    def close(self) -> FileRecord:
        """Fsync and close; return what was written (hashed as it was handed over, not as the disk returned it)."""
        assert self._next == len(self._specs), f"{self._path}: {len(self._specs) - self._next} tensors were not written"
        os.fsync(self._file.fileno())
        # The kernel may forget these pages: the proof that follows then reads the disk, and training keeps its memory.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        return FileRecord(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close without a word after a failure; the file is removed with its folder."""
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
