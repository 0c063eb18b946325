"""Which part of a tensor this rank holds, and how a rank comes by a whole one.

A sharded parameter (DTensor) is a box per rank. For writing, every element must have exactly one writer: of the ranks
that hold the same box, the first one. ``Exchange`` brings the boxes of one tensor together on one rank at a time, over
a process group on the CPU, so that no rank ever holds more than the tensor it is about to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fsdpsft.errors import CheckpointError

SLAB_BYTES = 64 << 20
_SMALL, _PAGE, _ALIGNMENT = SLAB_BYTES // 8, 4096, 64


@dataclass(frozen=True)
class Box:
    """A block of a tensor: index of its first element and its extent, per dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The block as an index into the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.size, strict=True))


@dataclass(frozen=True)
class Piece:
    """This rank's part of a named tensor.

    Attributes:
        shape: of the whole tensor.
        box: the part that this rank writes; None where it holds nothing or another rank writes the same.
        local: the elements of ``box``, on any device.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box | None
    local: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


def piece_of(name: str, tensor: Tensor, rank: int) -> Piece:
    """The piece of ``tensor`` that ``rank`` (this process) answers for, without copying it.

    A plain tensor is the same on every rank, so rank 0 writes it.

    Raises:
        CheckpointError: the tensor is a pending sum (``Partial``), which no file can hold.
    """
    tensor = tensor.detach()
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        whole = Box((0,) * len(shape), shape)
        return Piece(name, tensor.dtype, shape, *((whole, tensor) if rank == 0 else (None, None)))
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(f"{name} is placed {tensor.placements}: a sum still to be reduced cannot be saved.")
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return Piece(name, tensor.dtype, shape, None, None)
    placed = zip(coordinate, tensor.placements, strict=True)
    is_copy = any(at > 0 and isinstance(placement, Replicate) for at, placement in placed)
    size, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    if is_copy or 0 in size:
        return Piece(name, tensor.dtype, shape, None, None)
    return Piece(name, tensor.dtype, shape, Box(tuple(offset), tuple(size)), tensor.to_local())


def rows_of(name: str, tensor: Tensor, rank: int, size: int) -> Piece:
    """The rows of a tensor that ``rank`` of ``size`` answers for, where every rank has the whole of it for a moment.

    So that a tensor made anew on all ranks (weights merged with an adapter) is not kept whole on any of them.
    """
    tensor = tensor.detach()
    shape = tuple(tensor.shape)
    if tensor.ndim == 0:
        return piece_of(name, tensor, rank)
    start, stop = (len(tensor) * at // size for at in (rank, rank + 1))
    if start == stop or 0 in shape:
        return Piece(name, tensor.dtype, shape, None, None)
    box = Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))
    return Piece(name, tensor.dtype, shape, box, tensor[start:stop])


def pinned_bytes(sizes: Iterable[int]) -> int:
    """Bytes of host memory that ``Staging`` takes for pieces of these sizes in bytes, copied in this order.

    At most 8 KiB more than a large piece has, and an eighth of a slab more than small ones together have. (torch's own
    allocator of page-locked memory rounds each tensor up to a power of two.)
    """
    total = room = 0
    for size in sizes:
        if size > _SMALL:
            total += _rounded(size, _PAGE)
            continue
        if _rounded(size, _ALIGNMENT) > room:
            total, room = total + SLAB_BYTES, SLAB_BYTES
        room -= _rounded(size, _ALIGNMENT)
    return total


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class Staging:
    """Host copies of pieces, so that training may change the tensors while they are being written.

    The buffers (page-locked where the pieces live on a GPU, one per piece) are kept and used again: a run allocates
    them once. Host memory: this rank's part of what it saves.
    """

    def __init__(self) -> None:
        """Begin without buffers."""
        self._buffers: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}
        self._pending = False

    def copy(self, piece: Piece) -> Piece:
        """Begin to copy a piece; the copy is good after ``finish``."""
        if piece.local is None:
            return piece
        key = (piece.name, piece.dtype, tuple(piece.local.shape))
        if key not in self._buffers:
            self._buffers[key] = torch.empty(piece.local.shape, dtype=piece.dtype, pin_memory=piece.local.is_cuda)
        self._pending = self._pending or piece.local.is_cuda
        return replace(piece, local=self._buffers[key].copy_(piece.local, non_blocking=True))

    def finish(self) -> None:
        """Wait for the copies begun; the originals may change from here on."""
        if self._pending:
            torch.cuda.current_stream().synchronize()
            self._pending = False


@dataclass(frozen=True)
class Request:
    """A tensor that a rank wants whole, and the dtype it wants it in."""

    name: str
    dtype: torch.dtype


class Exchange:
    """Brings whole tensors to the ranks that write them."""

    def __init__(self, pieces: Mapping[str, Piece], group: dist.ProcessGroup | None) -> None:
        """Tell every rank who holds what. Collective over ``group`` (CPU, all ranks); None: a single process.

        Raises:
            CheckpointError: the boxes of all ranks together do not make up a tensor.
        """
        self._pieces = pieces
        self._group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1
        mine = {name: piece.box for name, piece in pieces.items() if piece.box is not None}
        self._boxes: list[dict[str, Box]] = all_gather(mine, group)
        held = dict.fromkeys(pieces, 0)
        for boxes in self._boxes:
            for name, box in boxes.items():
                held[name] += prod(box.size)
        for name, piece in pieces.items():
            if held[name] != prod(piece.shape):
                raise CheckpointError(f"{name}: ranks hold {held[name]} elements of a tensor of shape {piece.shape}.")

    def collect(self, wanted: Sequence[Request | None]) -> Tensor | None:
        """One round: rank r receives the whole of ``wanted[r]``. Called with the same list on every rank.

        Returns:
            The tensor this rank asked for, on the CPU; None if it asked for none.
        """
        sends = []
        for owner, request in enumerate(wanted):
            if request is None or owner == self.rank or self._pieces[request.name].local is None:
                continue
            local = _host_bytes(self._pieces[request.name], request.dtype)
            sends.append((dist.isend(local, owner, self._group), local))
        mine = wanted[self.rank]
        whole = None if mine is None else self._receive(mine)
        for work, _ in sends:  # the second item keeps the bytes alive until they are sent
            if work is not None:
                work.wait()
        return whole

    def _receive(self, request: Request) -> Tensor:
        shape = self._pieces[request.name].shape
        whole = torch.empty(shape, dtype=request.dtype)
        arriving = []
        for peer, boxes in enumerate(self._boxes):
            if request.name not in boxes:
                continue
            target = whole[boxes[request.name].slices]
            if peer == self.rank:
                local = self._pieces[request.name].local
                assert local is not None
                target.copy_(local)
                continue
            # Rows of the whole tensor are received in place; any other box passes through a buffer.
            buffer = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
            work = dist.irecv(buffer.view(-1).view(torch.uint8), peer, self._group)
            arriving.append((work, buffer, target))
        for work, buffer, target in arriving:
            if work is not None:
                work.wait()
            if buffer is not target:
                target.copy_(buffer)
        return whole


def _host_bytes(piece: Piece, dtype: torch.dtype) -> Tensor:
    assert piece.local is not None
    return piece.local.to("cpu", dtype).contiguous().view(-1).view(torch.uint8)


def all_gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's ``value``, in rank order; small Python objects only. None: a single process."""
    if group is None:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group)
    return gathered
