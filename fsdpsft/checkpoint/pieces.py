"""Which part of a tensor this rank holds, its copy in host memory, and how a rank gathers a whole tensor.

A sharded parameter (DTensor) is a box per rank. For writing, every element must have exactly one writer: of the ranks
that hold the same box, the first one. ``Exchange`` brings the boxes of one tensor together on one rank at a time, over
a process group on the CPU, so that no rank ever holds more than the tensor it is about to write. ``Peers`` are the
other ranks: a wait for one of them ends after a time-out, which names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from fsdpsft.checkpoint.parameters import local_block
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
    nothing = Piece(name, tensor.dtype, tuple(tensor.shape), None, None)
    is_mine = rank == 0
    if isinstance(tensor, DTensor):
        if any(placement.is_partial() for placement in tensor.placements):
            raise CheckpointError(f"{name} is placed {tensor.placements}: a sum still to be reduced cannot be saved.")
        coordinate = tensor.device_mesh.get_coordinate()
        is_mine = coordinate is not None and not any(
            at > 0 and isinstance(placement, Replicate)
            for at, placement in zip(coordinate, tensor.placements, strict=True)
        )
    if not is_mine:
        return nothing
    local, offset = local_block(tensor)
    if local.numel() == 0 and isinstance(tensor, DTensor):
        return nothing
    return replace(nothing, box=Box(offset, tuple(local.shape)), local=local)


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

    The buffers (page-locked where the pieces live on a GPU) are kept and used again: a run allocates them once. Small
    pieces share slabs of ``SLAB_BYTES``, others have memory of their own. Host memory: see ``pinned_bytes``.

    Attributes:
        reserved: bytes taken so far.
    """

    def __init__(self) -> None:
        """Begin without buffers."""
        self.reserved = 0
        self._buffers: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._pinned: list[Tensor] = []
        self._pending = False

    def copy(self, piece: Piece) -> Piece:
        """Begin to copy a piece; the copy is good after ``finish``."""
        if piece.local is None:
            return piece
        key = (piece.name, piece.dtype, tuple(piece.local.shape))
        if key not in self._buffers:
            memory = self._take(piece.local.nbytes, piece.local.is_cuda)
            self._buffers[key] = memory.view(piece.dtype).view(piece.local.shape)
        self._pending = self._pending or piece.local.is_cuda
        return replace(piece, local=self._buffers[key].copy_(piece.local, non_blocking=True))

    def finish(self) -> None:
        """Wait for the copies begun; the originals may change from here on."""
        if self._pending:
            torch.cuda.current_stream().synchronize()
            self._pending = False

    def close(self) -> None:
        """Free the memory."""
        self._buffers.clear()
        self._slab = torch.empty(0, dtype=torch.uint8)
        while self._pinned:
            _check(_cuda().cudaHostUnregister(self._pinned.pop().data_ptr()))

    def _take(self, size: int, pin: bool) -> Tensor:
        """[size] bytes of host memory."""
        if size > _SMALL:
            return self._allocate(_rounded(size, _PAGE), pin)[:size]
        if _rounded(size, _ALIGNMENT) > len(self._slab):
            self._slab = self._allocate(SLAB_BYTES, pin)
        taken, self._slab = self._slab[:size], self._slab[_rounded(size, _ALIGNMENT) :]
        return taken

    def _allocate(self, size: int, pin: bool) -> Tensor:
        """Whole pages, since the driver locks pages; locked as they are, for torch would lock the next power of two."""
        memory = torch.empty(size + _PAGE, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % _PAGE :][:size]
        self.reserved += size
        if pin:
            _check(_cuda().cudaHostRegister(memory.data_ptr(), size, 0))
            self._pinned.append(memory)
        return memory


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(error: Any) -> None:
    if int(error) != 0:
        raise CheckpointError(
            f"Host memory for saving in the background could not be page-locked (CUDA error {int(error)}). "
            f"Set trainer.async_save=false, or raise the limit of locked memory (ulimit -l)."
        )


_SLOWEST_DISK = 100_000_000
"""Bytes a second, all ranks together; slower ranks count as stuck."""
_BYTES_PER_PARAMETER = 16
"""Of a checkpoint: float32 weights and AdamW's two moments, and the exported weights."""


def patience(timeout_s: int, parameters: int) -> timedelta:
    """How long one rank waits for another while a model of so many parameters is saved or loaded."""
    return timedelta(seconds=timeout_s + parameters * _BYTES_PER_PARAMETER / _SLOWEST_DISK)


class Peers:
    """The ranks of a run while they save and load; over a gloo group of their own, or a single process.

    A wait that lasts longer than ``timeout`` ends the run with an error that names the rank waited for.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        """Take the group (CPU, all ranks of the run), whose own time-out must be longer than twice ``timeout``."""
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1
        self._timeout = timeout

    @classmethod
    def of_this_run(cls, timeout: timedelta) -> Peers:
        """All ranks, over a new group: a background save must not mix its messages with training's. Collective."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.new_group(backend="gloo", timeout=3 * timeout), timeout)

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order; what JSON can hold. Collective.

        By way of rank 0, which so knows who is missing. The others wait longer for it than it waits for anyone.
        """
        if self.group is None:
            return [value]
        if self.rank:
            self._send(value, 0, 2 * self._timeout)
            found: list[Any] = self._receive(0, 2 * self._timeout)
            return found
        values = [value, *(self._receive(peer, self._timeout) for peer in range(1, self.size))]
        for peer in range(1, self.size):
            self._send(values, peer, self._timeout)
        return values

    def wait(self, work: dist.Work | None, peer: int, limit: timedelta | None = None) -> None:
        """Wait until a message to or from ``peer`` has passed.

        Raises:
            RuntimeError: it has not in time, or the process is gone; names the rank.
        """
        if work is None:
            return
        try:
            work.wait(limit or self._timeout)
        except RuntimeError as error:
            text = str(error).strip().partition("\n")[0]
            raise RuntimeError(f"gloo: rank {self.rank} was waiting for rank {peer} to save or load: {text}") from error

    def _send(self, value: Any, peer: int, limit: timedelta) -> None:
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        for message in (torch.tensor([len(content)]), content):
            self.wait(dist.isend(message, peer, self.group), peer, limit)

    def _receive(self, peer: int, limit: timedelta) -> Any:
        length = torch.empty(1, dtype=torch.int64)
        self.wait(dist.irecv(length, peer, self.group), peer, limit)
        content = torch.empty(int(length), dtype=torch.uint8)
        self.wait(dist.irecv(content, peer, self.group), peer, limit)
        return json.loads(content.numpy().tobytes())


@dataclass(frozen=True)
class Request:
    """A tensor that a rank wants whole, and the dtype it wants it in."""

    name: str
    dtype: torch.dtype


class Exchange:
    """Brings whole tensors to the ranks that write them."""

    def __init__(self, pieces: Mapping[str, Piece], peers: Peers) -> None:
        """Tell every rank who holds what. Collective.

        Raises:
            CheckpointError: the boxes of all ranks together do not make up a tensor.
        """
        self._pieces = pieces
        self._peers = peers
        mine = {name: (piece.box.offset, piece.box.size) for name, piece in pieces.items() if piece.box is not None}
        self._boxes = [
            {name: Box(tuple(offset), tuple(size)) for name, (offset, size) in boxes.items()}
            for boxes in peers.all_gather(mine)
        ]
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
            if request is None or owner == self._peers.rank or self._pieces[request.name].local is None:
                continue
            local = _host_bytes(self._pieces[request.name], request.dtype)
            sends.append((dist.isend(local, owner, self._peers.group), owner, local))
        mine = wanted[self._peers.rank]
        whole = None if mine is None else self._receive(mine)
        for work, owner, _ in sends:  # the last item keeps the bytes alive until they are sent
            self._peers.wait(work, owner)
        return whole

    def _receive(self, request: Request) -> Tensor:
        shape = self._pieces[request.name].shape
        whole = torch.empty(shape, dtype=request.dtype)
        arriving = []
        for peer, boxes in enumerate(self._boxes):
            if request.name not in boxes:
                continue
            target = whole[boxes[request.name].slices]
            if peer == self._peers.rank:
                local = self._pieces[request.name].local
                assert local is not None
                target.copy_(local)
                continue
            # Rows of the whole tensor are received in place; any other box passes through a buffer.
            buffer = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
            work = dist.irecv(buffer.view(-1).view(torch.uint8), peer, self._peers.group)
            arriving.append((work, peer, buffer, target))
        for work, peer, buffer, target in arriving:
            self._peers.wait(work, peer)
            if buffer is not target:
                target.copy_(buffer)
        return whole


def _host_bytes(piece: Piece, dtype: torch.dtype) -> Tensor:
    assert piece.local is not None
    return piece.local.to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
