"""The resumable part of a checkpoint: what is saved beside the weights, and how it is read again.

Numbers, names and random-generator states are JSON (``state.json``); tensors are safetensors. Nothing is pickled, so
nothing of a checkpoint can run code when it is opened.
"""

from __future__ import annotations

import base64
import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.tensor import DTensor

from fsdpsft.checkpoint.folder import require_version
from fsdpsft.checkpoint.pieces import Piece
from fsdpsft.checkpoint.safetensors import TensorFileWriter, TensorSpec, dtype_named
from fsdpsft.errors import CheckpointError
from fsdpsft.filesystem import FileRecord, read_object

MODEL, OPTIMIZER = "model/", "optimizer/"
Saved = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and whole shape of a saved tensor."""
STATE_FOLDER = "trainer_state"
STATE_FILE = "trainer_state/state.json"
_FORMER_FIELDS = {"extra", "best_metric", "best_step"}


@dataclass
class TrainState:
    """Progress of a run. Batches are a function of (seed, step), so there is no data position to keep.

    Attributes:
        step: optimiser steps done.
        epoch: passes over the data done, with fraction.
        tokens, trained_tokens: seen so far, all ranks together.
        config: the resolved settings, as nested plain values.
        data_fingerprint: content hash of the training data as tokenised.
    """

    step: int
    epoch: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    data_fingerprint: str = ""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> TrainState:
        """What ``read_state`` found. Version 0.1.0 wrote three more fields, which nothing read."""
        state = {key: value for key, value in content["state"].items() if key not in _FORMER_FIELDS}
        return cls(**state)

    def as_dict(self) -> dict[str, Any]:
        """As written to ``state.json``."""
        return asdict(self)


def read_state(path: Path) -> dict[str, Any]:
    """Content of a checkpoint's ``state.json``.

    Raises:
        CheckpointError: there is none, or it is not what this version writes.
    """
    file = path / STATE_FILE
    if not file.is_file():
        raise CheckpointError(f"{path} holds no {STATE_FILE}: there is no state to resume from.")
    content = read_object(file, CheckpointError, "Use another checkpoint.")
    require_version(file, content.get("format_version"))
    try:
        TrainState.of(content)
        saved_tensors(content)
        for key in ("complete", "source", "adapter_config", "dtypes", "tied", "rng"):
            content[key]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); use another checkpoint.") from error
    return content


def saved_tensors(content: Mapping[str, Any]) -> dict[str, Saved]:
    """Name -> (dtype, shape) of every tensor in a state."""
    return {name: (dtype_named(dtype), tuple(shape)) for name, (dtype, shape) in content["tensors"].items()}


def write_local_pieces(folder: Path, rank: int, pieces: Mapping[str, Piece]) -> dict[str, FileRecord]:
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
    path = f"{STATE_FOLDER}/rank-{rank:05d}.safetensors"
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


def read_tensors(folder: Path, target: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Fill ``target`` in place from the files of all ranks. Collective.

    The planner of ``torch.distributed.checkpoint`` cuts and joins the boxes where the ranks are others now.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        reader = HuggingFaceStorageReader(str(folder))
        load_sharded(target, storage_reader=reader, process_group=group, no_dist=group is None)


def compare_tensors(path: Path, saved: Mapping[str, Saved], target: Mapping[str, Tensor]) -> None:
    """Refuse to load a checkpoint into a model with other tensors.

    Raises:
        CheckpointError: names tensors that one side lacks, or whose shapes differ.
    """
    if missing := sorted(set(target) - set(saved)):
        raise CheckpointError(f"{path} was saved from another model: it lacks {missing[:4]} and {len(missing)} in all.")
    if surplus := sorted(set(saved) - set(target)):
        raise CheckpointError(f"{path} was saved from another model: it has {surplus[:4]}, {len(surplus)} such.")
    for name, tensor in target.items():
        if saved[name][1] != tuple(tensor.shape):
            raise CheckpointError(f"{path}: {name} has shape {saved[name][1]}, this model's has {tuple(tensor.shape)}.")


def capture_rng() -> dict[str, Any]:
    """This process's generator states (Python, numpy, torch, the current GPU) as JSON values."""
    version, words, gauss = random.getstate()
    # numpy's global generator is not ours, but dropout-like code in a model's own file may draw from it.
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, list(words), gauss],
        "numpy": [name, _encode(torch.from_numpy(np.asarray(keys).view(np.uint8))), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    return states


def restore_rng(states: Mapping[str, Any]) -> None:
    """Put back what ``capture_rng`` returned; a GPU state is ignored where there is no GPU."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, _decode(keys).numpy().view(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(states["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def optimizer_tensors(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as ``optimizer/<parameter>/<key>`` -> tensor.

    Raises:
        CheckpointError: a parameter that the model does not name, or a state that is neither tensor nor number.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        if id(parameter) not in names:
            raise CheckpointError(f"The optimiser holds a parameter of shape {tuple(parameter.shape)} the model lacks.")
        for key, value in state.items():
            if not isinstance(value, (Tensor, int, float)):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {key} of {names[id(parameter)]} as {type(value).__name__}; only "
                    f"tensors and numbers can be saved."
                )
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            tensors[f"{OPTIMIZER}{names[id(parameter)]}/{key}"] = tensor
    return tensors


def allocate_optimizer_state(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, saved: Mapping[str, Saved]
) -> dict[str, Tensor]:
    """Give ``optimizer`` empty state of the saved keys, dtypes and shapes, sharded like the parameters.

    Returns:
        ``optimizer/<parameter>/<key>`` -> the state tensor to be filled in place.

    Raises:
        CheckpointError: the optimiser trains other parameters than the checkpoint has state for.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in parameters.items() if id(p) in groups}
    per_name: dict[str, dict[str, Tensor]] = {}
    for full, (dtype, shape) in saved.items():
        name, key = full.removeprefix(OPTIMIZER).rsplit("/", 1)
        if name not in trained:
            raise CheckpointError(f"The checkpoint has optimiser state for {name}, which this run does not train.")
        parameter = trained[name]
        if shape == tuple(parameter.shape) and shape != ():
            tensor = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:  # AdamW counts steps on the host unless the step itself runs on the device
            group = groups[id(parameter)]
            on_device = any(group[flag] for flag in ("fused", "capturable") if flag in group)
            tensor = torch.zeros(shape, dtype=dtype, device=_device(parameter) if on_device else "cpu")
        per_name.setdefault(name, {})[key] = tensor
    if per_name and (missing := sorted(set(trained) - set(per_name))):
        raise CheckpointError(f"The checkpoint has no optimiser state for {missing[:4]}, which this run trains.")
    for name, state in per_name.items():
        optimizer.state[trained[name]] = state
    return {f"{OPTIMIZER}{name}/{key}": t for name, state in per_name.items() for key, t in state.items()}


def _device(parameter: Tensor) -> torch.device:
    return parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
