"""Any checkpoint to a Hugging Face model: one process, no GPU, one tensor at a time.

    python -m fsdpsft.export from=outputs/run/global_step_40 to=model dtype=bfloat16

``from`` is a ``global_step_N``, its ``trainer_state/`` alone, or any Hugging Face model folder. The result appears at
``to`` whole, or not at all.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from fsdpsft.checkpoint.export import Handoff, prove_model, write_hub_files
from fsdpsft.checkpoint.folder import MANIFEST, STEP_NAME, Manifest, holds_model, verify, write_manifest
from fsdpsft.checkpoint.manager import ADAPTER_FOLDER, HUB_FOLDER
from fsdpsft.checkpoint.parameters import named_tensors
from fsdpsft.checkpoint.pieces import Box, Piece
from fsdpsft.checkpoint.safetensors import TensorFiles, TensorSpec, open_model_files
from fsdpsft.checkpoint.state import MODEL, STATE_FILE, STATE_FOLDER, Saved, read_state, saved_tensors
from fsdpsft.checkpoint.tensor_plan import (
    Collect,
    PlannedFile,
    StoredDtypes,
    Unit,
    plan_export,
    split_into_files,
    write_tensor_files,
)
from fsdpsft.config.load import parse_size
from fsdpsft.errors import CheckpointError, ConfigError
from fsdpsft.filesystem import copy_file, fsync, fsync_tree, require_space, write_json
from fsdpsft.model import lora
from fsdpsft.model.load import WeightSource, build_meta_model, load_model_config
from fsdpsft.model.streamed import Part, allocate_trained, parts_of, present
from fsdpsft.tools.tool_keys import run_file_tool

USAGE = """usage: python -m fsdpsft.export from=FOLDER to=FOLDER [dtype=…] [adapter=only|merged] [max_shard_size=5GB]
                                [base=FOLDER] [trust_remote_code=false]

from               a global_step_N folder, its trainer_state alone, or a Hugging Face model folder
to                 where the model goes; must not exist, or be empty
dtype              bfloat16, float16 or float32; each tensor's dtype in the source model if not given
adapter            with LoRA: the adapter alone (only), or the model it was merged into (merged, the default)
max_shard_size     of a weights file
base               with LoRA, from trainer_state alone: the model the adapter belongs to, if it has moved
trust_remote_code  run code that comes with the model, where its class is not in transformers
"""
KEYS = ("from", "to", "dtype", "adapter", "max_shard_size", "base", "trust_remote_code")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """What the command line asks for; the fields are its keys."""

    source: Path
    target: Path
    dtype: torch.dtype | None = None
    adapter_only: bool = False
    max_shard_bytes: int = 5_000_000_000
    base: Path | None = None
    trust_remote_code: bool = False


Read = Callable[[str], Tensor]
"""Returns a whole tensor by its name in the model."""


def collecting(read: Read) -> Collect:
    """``read`` in the form that ``write_tensor_files`` wants, for one process."""
    return lambda wanted: None if wanted[0] is None else read(wanted[0].name).to(wanted[0].dtype)


def state_reader(folder: Path, shapes: Mapping[str, Saved]) -> Read:
    """Return a function that puts a tensor of ``trainer_state/`` together from the boxes its ranks wrote.

    Raises:
        CheckpointError: the boxes do not make up a tensor of ``shapes`` (by name, such as ``model/lm_head.weight``).
    """
    boxes: dict[str, list[tuple[TensorFiles, Box]]] = {name: [] for name in shapes}
    for path in sorted(folder.glob("rank-*.safetensors")):
        files = TensorFiles([path])
        with safe_open(path, framework="pt") as opened:
            offsets = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
        for name, entry in files.items():
            if name in boxes:
                boxes[name].append((files, Box(tuple(offsets[name]["saved_offsets"]), entry.shape)))
    for name, (_, shape) in shapes.items():
        if sum(prod(box.size) for _, box in boxes[name]) != prod(shape):
            raise CheckpointError(f"{folder}: parts of {name} {list(shape)} are missing; a rank-*.safetensors is gone.")

    def read(name: str) -> Tensor:
        dtype, shape = shapes[name]
        whole = torch.empty(shape, dtype=dtype)
        for files, box in boxes[name]:
            files.read_into(name, whole[box.slices], (0,) * len(shape))
        return whole

    return read


def merging_reader(model: PreTrainedModel, source: WeightSource) -> Read:
    """Return a function that reads a tensor of the base and merges the adapter into it; one block is held at a time.

    The adapters of ``model`` are in memory; all else is on meta, and read from ``source``.
    """
    homes: dict[str, Part] = {}
    for part in parts_of(model):
        homes.update((name, part) for name, *_ in part.tensors())
    held: dict[str, Tensor] = {}
    at: list[Part] = []

    def read(name: str) -> Tensor:
        part = homes[name]
        if at != [part]:
            at[:] = [part]
            held.clear()
            with present(part, source):
                held.update(lora.merged_state(model, within=f"{part.name}." if part.name else ""))
        return held[name]

    return read


def export(options: Options) -> Path:
    """Do what ``options`` say and return the folder written.

    Raises:
        UserError: a source that is no checkpoint or a damaged one, a target in use, no adapter where one is wanted.
    """
    source, target = options.source.resolve(), options.target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"to={options.target} is there already and not an empty folder; choose another.")
    if source.name == STATE_FOLDER:
        source = source.parent
        kind = STATE_FOLDER
    else:
        kind = "model" if holds_model(source) else STATE_FOLDER
    if STEP_NAME.fullmatch(source.name) and (source / MANIFEST).is_file():
        verify(source, below=f"{STATE_FOLDER}/" if kind == STATE_FOLDER else "")
    if kind == STATE_FOLDER and not (source / STATE_FILE).is_file():
        raise CheckpointError(f"from={options.source} holds neither a Hugging Face model nor a {STATE_FOLDER}/.")
    folder = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _write(source, kind, folder, options)
        fsync_tree(folder)
        folder.replace(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _write(source: Path, kind: str, folder: Path, options: Options) -> None:
    if options.adapter_only:
        _write_adapter(source, kind, folder, options)
        return
    if kind == "model":
        parts = _from_files(source, options)
    else:
        content = read_state(source)
        make = _from_state if content["complete"] else _from_adapter
        parts = make(source, content, options)
    require_space(folder, sum(file.nbytes for file in parts.files))
    records = write_tensor_files(folder, parts.files, collecting(parts.read))
    records.update(write_hub_files(folder, parts.files, parts.handoff))
    verdict = prove_model(folder, parts.files, parts.handoff, tied=parts.tied)
    write_manifest(folder, Manifest(parts.step, None, records, verdict, {"exported_from": str(source)}))


@dataclass(frozen=True)
class _Parts:
    """What a model is written from."""

    files: list[PlannedFile]
    read: Read
    handoff: Handoff
    tied: bool | None = None
    step: int = 0


def _from_files(source: Path, options: Options) -> _Parts:
    """A Hugging Face model: the same tensors under the same names."""
    found, handoff = open_model_files(source), _handoff(source, options)
    dtype_of = handoff.layout.dtype_of
    specs = [TensorSpec(name, dtype_of(name, entry.dtype), entry.shape) for name, entry in found.items()]
    files = split_into_files([Unit((spec.name,), (spec,)) for spec in specs], options.max_shard_bytes)
    return _Parts(files, found.read, handoff)


def _from_state(source: Path, content: Mapping[str, Any], options: Options) -> _Parts:
    """A whole ``trainer_state/``: the boxes of all ranks, brought into the layout of the Hub."""
    shapes = {name: saved for name, saved in saved_tensors(content).items() if name.startswith(MODEL)}
    read = state_reader(source / STATE_FOLDER, shapes)
    handoff = _handoff(source / HUB_FOLDER, options, StoredDtypes.from_json(content["dtypes"]))
    pieces = {n.removeprefix(MODEL): Piece(n, dtype, shape, None, None) for n, (dtype, shape) in shapes.items()}
    files = plan_export(_empty_model(handoff.source, options), pieces, handoff.layout)
    return _Parts(files, lambda name: read(MODEL + name), handoff, content["tied"], content["state"]["step"])


def _from_adapter(source: Path, content: Mapping[str, Any], options: Options) -> _Parts:
    """A ``trainer_state/`` of adapters: merged into the source model, block by block."""
    base = options.base or Path(content["source"])
    if not base.is_dir():
        raise CheckpointError(f"The adapter belongs to {base}, which is not there; say where it is with base=FOLDER.")
    handoff = _handoff(source / HUB_FOLDER, options, StoredDtypes.from_json(content["dtypes"]))
    model = _empty_model(base, options, handoff.layout.stored.usual)
    pieces = {name: Piece(name, t.dtype, tuple(t.shape), None, None) for name, t in named_tensors(model).items()}
    files = plan_export(model, pieces, handoff.layout)
    with tempfile.TemporaryDirectory() as adapter:
        _write_adapter(source, STATE_FOLDER, Path(adapter), Options(source, Path(adapter)))
        settings = lora.LoraSettings(rank=0, alpha=0)  # the adapter's own configuration decides
        lora.apply_lora(model, settings, Path(adapter))
        allocate_trained(model)
        lora.fill_adapters(model, seed=0, adapter_path=Path(adapter))
    read = merging_reader(model, WeightSource(model, base))
    return _Parts(files, read, handoff, content["tied"], content["state"]["step"])


def _write_adapter(source: Path, kind: str, folder: Path, options: Options) -> None:
    """The adapter alone, as PEFT reads it."""
    if kind == "model":
        if not (source / ADAPTER_FOLDER).is_dir():
            raise CheckpointError(f"from={source} has no {ADAPTER_FOLDER}/: it was not trained with LoRA.")
        found = TensorFiles([source / ADAPTER_FOLDER / lora.ADAPTER_FILE])
        read: Read = found.read
        names = {name: name for name in found}
        shapes: Mapping[str, Saved] = {name: (entry.dtype, entry.shape) for name, entry in found.items()}
        copy_file(source / ADAPTER_FOLDER / lora.ADAPTER_CONFIG, folder / lora.ADAPTER_CONFIG)
    else:
        content = read_state(source)
        if content["adapter_config"] is None:
            raise CheckpointError(f"{source / STATE_FOLDER} holds a whole model: it was not trained with LoRA.")
        shapes = {name: saved for name, saved in saved_tensors(content).items() if name.startswith(MODEL)}
        names = {lora.peft_name(name.removeprefix(MODEL)): name for name in shapes}
        read = state_reader(source / STATE_FOLDER, shapes)
        write_json(folder / lora.ADAPTER_CONFIG, content["adapter_config"])
    described = ((name, kept, *shapes[kept]) for name, kept in names.items())
    units = [Unit((kept,), (TensorSpec(name, options.dtype or dtype, s),)) for name, kept, dtype, s in described]
    write_tensor_files(folder, [PlannedFile(lora.ADAPTER_FILE, tuple(units))], collecting(read))


def _handoff(source: Path, options: Options, stored: StoredDtypes | None = None) -> Handoff:
    return Handoff(source, options.dtype, options.max_shard_bytes, stored=stored)


def _empty_model(folder: Path, options: Options, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = load_model_config(folder, trust_remote_code=options.trust_remote_code)
    return build_meta_model(config, dtype=dtype, trust_remote_code=options.trust_remote_code)


def parse(arguments: Sequence[str]) -> Options:
    """Read ``key=value`` arguments.

    Raises:
        ConfigError: an unknown key, a missing one, or a value that cannot be.
    """
    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in KEYS or not equals:
            raise ConfigError(f"{argument!r} is not understood; the keys are {', '.join(KEYS)} (see --help).")
        given[key] = value
    for key in ("from", "to"):
        if key not in given:
            raise ConfigError(f"{key}=FOLDER is missing (see --help).")
    choices = {"dtype": [*DTYPES], "adapter": ["only", "merged"], "trust_remote_code": ["true", "false"]}
    for key, allowed in choices.items():
        if key in given and given[key] not in allowed:
            raise ConfigError(f"{key}={given[key]} must be one of {', '.join(allowed)}.")
    return Options(
        Path(given["from"]),
        Path(given["to"]),
        DTYPES[given["dtype"]] if "dtype" in given else None,
        given.get("adapter") == "only",
        parse_size(given.get("max_shard_size", "5GB")),
        Path(given["base"]) if "base" in given else None,
        given.get("trust_remote_code") == "true",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_file_tool(USAGE, _export_and_show, arguments)


def _export_and_show(arguments: Sequence[str]) -> None:
    sys.stdout.write(f"{export(parse(arguments))}\n")
