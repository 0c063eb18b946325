"""Which tensor goes into which file, who writes that file, and the writing itself.

The plan depends on the model and the largest file size alone, not on the number of ranks, so that a run on one process
and one on sixty-four write the same bytes under the same names. Each file is written by one rank, in order, and
different ranks write different files at the same time.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from fsdpsft.checkpoint.pieces import Piece, Request
from fsdpsft.checkpoint.safetensors import (
    TensorFileWriter,
    TensorSpec,
    dtype_name,
    dtype_named,
    open_model_files,
    prove_tensor_file,
)
from fsdpsft.errors import CheckpointError
from fsdpsft.filesystem import FileRecord

logger = logging.getLogger(__name__)

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
DtypeOf = Callable[[str, torch.dtype], torch.dtype]
Collect = Callable[[Sequence[Request | None]], Tensor | None]


@dataclass(frozen=True)
class StoredDtypes:
    """Dtypes of a model's files: the usual floating-point one, and those of the tensors that have another."""

    usual: torch.dtype
    others: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, folder: Path) -> StoredDtypes:
        """Read them from the headers of a model folder's files."""
        with_dtypes = {name: entry.dtype for name, entry in open_model_files(folder).items()}
        floating = Counter(dtype for dtype in with_dtypes.values() if dtype.is_floating_point)
        usual = floating.most_common(1)[0][0] if floating else torch.float32
        return cls(usual, {name: dtype for name, dtype in with_dtypes.items() if dtype != usual})

    def as_json(self) -> dict[str, Any]:
        """As kept in ``state.json``."""
        return {"usual": dtype_name(self.usual), "others": {n: dtype_name(d) for n, d in self.others.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StoredDtypes:
        """What ``as_json`` made."""
        others = {name: dtype_named(dtype) for name, dtype in content["others"].items()}
        return cls(dtype_named(content["usual"]), others)


@dataclass(frozen=True)
class Layout:
    """What a model's weight files look like.

    Attributes:
        stored: dtypes in the files that training began from; kept tensor by tensor.
        dtype: of all floating-point tensors instead.
        max_shard_bytes: of the largest file.
    """

    stored: StoredDtypes
    dtype: torch.dtype | None
    max_shard_bytes: int

    def dtype_of(self, name: str, held: torch.dtype) -> torch.dtype:
        """Dtype on disk of a tensor, given its name there and the dtype in memory."""
        if not held.is_floating_point:
            return held
        if self.dtype is not None:
            return self.dtype
        return self.stored.others.get(name, self.stored.usual)


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


def plan_export(model: nn.Module, pieces: Mapping[str, Piece], layout: Layout) -> list[PlannedFile]:
    """Plan the weight files: names and shapes as on the Hub, dtypes and sizes as ``layout`` says.

    ``model`` is needed for its layout conversions; of the pieces, by name in the model, shape and dtype are used.
    """
    on_disk = layout.dtype_of
    whole = {name: torch.empty(piece.shape, dtype=piece.dtype, device="meta") for name, piece in pieces.items()}
    final = revert_weight_conversion(model, dict(whole))
    plain = [n for n, t in whole.items() if n in final and final[n].shape == t.shape]
    units = {n: Unit((n,), (TensorSpec(n, on_disk(n, whole[n].dtype), tuple(whole[n].shape)),)) for n in plain}
    rest = {n: t for n, t in whole.items() if n not in units}
    if rest:
        logger.info("%d tensors are stored in another layout than they have in memory; converting them", len(rest))
        wanted = {n: t for n, t in final.items() if n not in units}
        units.update({unit.sources[0]: unit for unit in _conversion_units(model, rest, wanted, on_disk)})
    return split_into_files([units[n] for n in whole if n in units], layout.max_shard_bytes)


def _conversion_units(
    model: nn.Module, rest: dict[str, Tensor], wanted: dict[str, Tensor], on_disk: DtypeOf
) -> list[Unit]:
    """Group tensors so that each group converts on its own to the very tensors the whole converts to.

    One tensor at a time where that works (experts split apart), else a layer at a time, else all at once.
    """
    groupings = ([[name] for name in rest], list(_by_layer(rest).values()), [list(rest)])
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    for groups in groupings:
        made = [_try_convert(model, {name: rest[name] for name in group}) for group in groups]
        if all(m is not None for m in made) and {n: t.shape for m in made if m for n, t in m.items()} == shapes:
            return [_unit(model, group, m, on_disk) for group, m in zip(groups, made, strict=True) if m]
    raise CheckpointError(f"{type(model).__name__}: cannot bring {sorted(rest)[:4]}... into the layout of its files.")


def _unit(model: nn.Module, group: list[str], made: dict[str, Tensor], on_disk: DtypeOf) -> Unit:
    dtypes = {on_disk(name, tensor.dtype) for name, tensor in made.items()}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    outputs = tuple(TensorSpec(name, widest, tuple(tensor.shape)) for name, tensor in made.items())
    return Unit(tuple(group), outputs, partial(revert_weight_conversion, model))


def _try_convert(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    try:
        return dict(revert_weight_conversion(model, tensors))
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError):  # a conversion that lacks its other sources
        return None


def _by_layer(names: Mapping[str, Tensor]) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for name in names:
        match = re.match(r".*?\.\d+\.", name)
        layers.setdefault(match[0] if match else "", []).append(name)
    return layers


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


def write_tensor_files(
    folder: Path, files: Sequence[PlannedFile], collect: Collect, rank: int = 0, size: int = 1
) -> dict[str, FileRecord]:
    """Write the files of a plan and prove each by re-reading it. Collective: every rank calls it with the same plan.

    A rank holds one unit at a time beside its own pieces; with r ranks, file i of n is written by rank i * r // n.

    Args:
        folder: of the checkpoint.
        files: the plan.
        collect: returns the whole tensor that this rank asks for, given what each rank asks for: ``Exchange.collect``
            in training, a read from files in a conversion.
        rank: of this process, among ``size``.
        size: number of processes.

    Returns:
        The files this rank wrote.

    Raises:
        CheckpointError, OSError: this rank could not write or prove a file. It has served its peers to the end.
    """
    owners = [index * size // len(files) for index in range(len(files))]
    queues: list[list[tuple[PlannedFile, Unit, str]]] = [[] for _ in range(size)]
    for file, owner in zip(files, owners, strict=True):
        queues[owner] += [(file, unit, name) for unit in file.units for name in unit.sources]
    sink = _FileSink(folder)
    for turn in zip_longest(*queues):
        tensor = collect([None if task is None else Request(task[2], task[1].dtype) for task in turn])
        mine = turn[rank]
        if mine is not None and tensor is not None:
            file, unit, name = mine
            sink.take(file, unit, name, tensor)
    if sink.error is not None:
        raise sink.error
    return sink.records
