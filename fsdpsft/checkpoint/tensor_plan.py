"""Which tensor goes into which file, who writes that file, and the writing itself.

The plan depends on the model and the largest file size alone, not on the number of ranks, so that a run on one process
and one on sixty-four write the same bytes under the same names. Each file is written by one rank, in order, and
different ranks write different files at the same time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fsdpsft.checkpoint.files import FileRecord
from fsdpsft.checkpoint.pieces import Piece, Request
from fsdpsft.checkpoint.safetensors_write import TensorFileWriter, TensorSpec, prove_tensor_file
from fsdpsft.errors import CheckpointError

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Unit:
    """Tensors of the model that become tensors of a file together.

    Attributes:
        sources: names in the model.
        outputs: what is written, all of one dtype.
        convert: turns the sources (whole, by name) into the outputs; None where it is one tensor under one name.
    """

    sources: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    convert: Convert | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype on disk."""
        return self.outputs[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True)
class PlannedFile:
    """One file: its path below the checkpoint and what it holds, in order."""

    path: str
    units: tuple[Unit, ...]

    @property
    def specs(self) -> list[TensorSpec]:
        """Its tensors, in order."""
        return [spec for unit in self.units for spec in unit.outputs]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(unit.nbytes for unit in self.units)


def split_into_files(units: Sequence[Unit], max_bytes: int) -> list[PlannedFile]:
    """Cut units, in order, into files of at most ``max_bytes`` (a unit larger than that has a file to itself).

    Names are those of the Hugging Face Hub: ``model.safetensors``, or ``model-00001-of-0000n.safetensors``.
    """
    groups: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not groups or size + unit.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.nbytes
    if len(groups) == 1:
        return [PlannedFile("model.safetensors", _widest_first(groups[0]))]
    total = len(groups)
    return [PlannedFile(f"model-{i:05d}-of-{total:05d}.safetensors", _widest_first(g)) for i, g in enumerate(groups, 1)]


def _widest_first(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Units in a stable order that keeps every tensor aligned to its element size."""
    return tuple(sorted(units, key=lambda unit: -unit.dtype.itemsize))


def build_index(files: Sequence[PlannedFile]) -> dict[str, object]:
    """Content of ``model.safetensors.index.json``."""
    weight_map = {spec.name: file.path for file in files for spec in file.specs}
    size = sum(file.nbytes for file in files)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


class _FileSink:
    """The files of one rank, being written. A failed write is kept, and what comes after is dropped.

    Peers go on sending to this rank whatever happens to its disk: if it stopped receiving, they would hang.
    """

    def __init__(self, folder: Path) -> None:
        self.records: dict[str, FileRecord] = {}
        self.error: Exception | None = None
        self._folder = folder
        self._writer: TensorFileWriter | None = None
        self._waiting: dict[str, Tensor] = {}

    def take(self, file: PlannedFile, unit: Unit, name: str, tensor: Tensor) -> None:
        """Accept the next whole tensor of the plan."""
        if self.error is not None:
            return
        try:
            self._waiting[name] = tensor
            if name == unit.sources[-1]:
                self._write(file, unit)
        except (OSError, CheckpointError) as error:
            self.error = error
            self._waiting = {}
            if self._writer is not None:
                self._writer.abandon()

    def _write(self, file: PlannedFile, unit: Unit) -> None:
        if self._writer is None:
            path = self._folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = TensorFileWriter(path, file.specs, {"format": "pt"})
        converted = _outputs(unit, self._waiting)
        self._waiting = {}
        for spec in unit.outputs:
            self._writer.write(spec.name, converted.pop(spec.name))
        if unit is file.units[-1]:
            record = self._writer.close()
            self._writer = None
            prove_tensor_file(self._folder / file.path, file.specs, record)
            self.records[file.path] = record


def _outputs(unit: Unit, sources: dict[str, Tensor]) -> dict[str, Tensor]:
    if unit.convert is None:
        return {unit.outputs[0].name: sources[unit.sources[0]]}
    made = unit.convert(sources)
    missing = [spec.name for spec in unit.outputs if spec.name not in made]
    if missing:
        raise CheckpointError(f"Converting {unit.sources} to the files' layout did not yield {missing}.")
    return {spec.name: made[spec.name].to(spec.dtype) for spec in unit.outputs}


class TensorSource(Protocol):
    """Where whole tensors come from: ``pieces.Exchange`` in training, files in a conversion."""

    rank: int
    size: int

    def collect(self, wanted: Sequence[Request | None]) -> Tensor | None:
        """Return what ``wanted`` names for this rank; called with the same list on every rank."""
        ...


def write_tensor_files(folder: Path, files: Sequence[PlannedFile], source: TensorSource) -> dict[str, FileRecord]:
    """Write the files of a plan and prove each by re-reading it. Collective: every rank calls it with the same plan.

    A rank holds one unit at a time beside its own pieces; with r ranks, file i of n is written by rank i * r // n.

    Returns:
        The files this rank wrote.

    Raises:
        CheckpointError, OSError: this rank could not write or prove a file. It has served its peers to the end.
    """
    owners = [index * source.size // len(files) for index in range(len(files))]
    queues: list[list[tuple[PlannedFile, Unit, str]]] = [[] for _ in range(source.size)]
    for file, owner in zip(files, owners, strict=True):
        queues[owner] += [(file, unit, name) for unit in file.units for name in unit.sources]
    sink = _FileSink(folder)
    for turn in zip_longest(*queues):
        tensor = source.collect([None if task is None else Request(task[2], task[1].dtype) for task in turn])
        mine = turn[source.rank]
        if mine is not None and tensor is not None:
            file, unit, name = mine
            sink.take(file, unit, name, tensor)
    if sink.error is not None:
        raise sink.error
    return sink.records


def write_local_pieces(folder: Path, path: str, pieces: Mapping[str, Piece]) -> dict[str, FileRecord]:
    """Write this rank's own boxes into one file, in the layout ``torch.distributed.checkpoint`` reads.

    That is safetensors with the boxes' offsets as JSON in the header (``HuggingFaceStorageReader``), not the default
    format, whose metadata is a pickle.

    Returns:
        The file written; nothing where this rank holds nothing.
    """
    held = {name: piece for name, piece in pieces.items() if piece.local is not None and piece.box is not None}
    if not held:
        return {}
    ordered = sorted(held.values(), key=lambda piece: -piece.dtype.itemsize)
    specs = [TensorSpec(p.name, p.dtype, p.box.size) for p in ordered if p.box is not None]
    offsets = {p.name: {"saved_offsets": p.box.offset} for p in ordered if p.box is not None}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    writer = TensorFileWriter(folder / path, specs, metadata)
    try:
        for piece in ordered:
            assert piece.local is not None
            writer.write(piece.name, piece.local)
        record = writer.close()
    except OSError:
        writer.abandon()
        raise
    return {path: record}
