"""Memory of a run, estimated from the model's shapes alone, and the activations it leaves room for.

Counted is what PyTorch's allocator must hold at the worst moment, the backward pass of the last micro-batch, for a
decoder of standard blocks. Activations are counted product by product; fragmentation, NCCL's buffers and the CUDA
context (1 to 2 GiB) are not counted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fsdpsft.config.schema import ModelConfig
from fsdpsft.loss import default_chunk
from fsdpsft.model.sft_model import SFTModel, decoder_blocks, resolve_dtype

USABLE = {"cuda": 0.85, "cpu": 0.5}
"""Share of a device's memory that the estimate may fill; on a CPU all else that runs needs some too."""
CHECKPOINTING = ("none", "selective", "full")
"""From the most memory and the least time to the opposite."""


@dataclass(frozen=True)
class Work:
    """What a model will be fed, as far as building it depends on that.

    Attributes:
        packed: whether documents share a row.
        max_length: longest document in tokens; None: not known.
        token_budget: most tokens that one process has in a forward pass; None: not known.
        moments: dtype of AdamW's moments.
        steps: optimiser steps of the run.
    """

    packed: bool = True
    max_length: int | None = None
    token_budget: int | None = None
    moments: torch.dtype = torch.float32
    steps: int = 0


def states(
    module: SFTModel, settings: ModelConfig, shards: int, compute: int, moments: torch.dtype
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of weights, gradients and optimiser on a device, and of those in host memory instead.

    ``module`` is on meta; ``compute`` are the bytes of a number in the compute dtype.
    """
    fsdp = settings.fsdp_config
    reduce = resolve_dtype(fsdp.reduce_dtype, torch.device("cpu")).itemsize
    parameters, blocks = list(module.parameters()), decoder_blocks(module.causal_lm)
    stored = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    trained_bytes = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    everything = sum(p.numel() for p in parameters)
    block = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    memory = {
        "weights": stored / shards,
        "gradients": trained_bytes / shards,
        "AdamW's moments": 2 * moments.itemsize * trained / shards,
    }
    host: dict[str, float] = {}
    if fsdp.offload_params:
        locked = {"weights": parameters, "gradients": [p for p in parameters if p.requires_grad]}
        host = {name: float(sum(_power_of_two(local_bytes(p, shards)) for p in ps)) for name, ps in locked.items()}
        host["AdamW's moments"], memory = memory["AdamW's moments"], {}
    if shards == 1 and not fsdp.offload_params:
        memory["copy in the compute dtype"] = float(compute * everything if stored > compute * everything else 0)
    else:
        gathered = everything if not fsdp.reshard_after_forward else 2 * block + (everything - inside)
        memory["gathered weights"] = float(compute * gathered)
        on_their_way = (
            reduce * trained if fsdp.gradient_sync == "last" else (compute + reduce) * block * trained / everything
        )
        memory["gradients on their way"] = float(on_their_way)
    return memory, host


def local_bytes(parameter: Tensor, shards: int, itemsize: int | None = None) -> int:
    """Bytes of the rows that the fullest of ``shards`` processes keeps, ``itemsize`` bytes a number."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // shards) * (parameter.numel() // max(rows, 1)) * (itemsize or parameter.element_size())


def _power_of_two(size: int) -> int:
    """What torch's allocator of page-locked memory takes for one tensor, which is what FSDP's offloading uses."""
    return 1 << max(size - 1, 0).bit_length()


def activations(module: SFTModel, settings: ModelConfig, mode: str, tokens: int, compute: int) -> dict[str, float]:
    """Bytes of one micro-batch's activations on a device, of the logits that exist at one time, and of what they leave.

    ``tokens`` are those of the micro-batch on this device; for the rest see ``states``.
    """
    text = module.causal_lm.config.get_text_config()
    hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    queries, keys = heads * head_size, (getattr(text, "num_key_value_heads", None) or heads) * head_size
    width = getattr(text, "intermediate_size", None) or 4 * hidden
    # Of a token in one block: inputs of norms (float32 within), products, attention and the MLP's gate.
    tiled = settings.mlp_tiles > 1
    attention = compute * (2 * hidden + 2 * queries + 2 * keys) + 4 * hidden
    mlp = (compute * (2 * hidden + 4 * width) + 4 * hidden) / settings.mlp_tiles
    inputs = 0 if settings.activation_offload else compute * hidden * (3 if tiled else 1)
    results = compute * (2 * queries + 2 * keys + hidden + (0 if tiled else 2 * width))
    kept, recomputed = {
        "none": (attention + compute * hidden, mlp) if tiled else (attention + mlp, 0),
        "selective": (inputs + results, max(attention, mlp) if tiled else attention + mlp - results),
        "full": (inputs, max(attention, mlp) if tiled else attention + mlp),
    }[mode]
    head = module.head.weight
    chunk = min(settings.head_chunk_tokens or default_chunk("cuda", head.shape[0]), tokens)
    return {
        "activations": float(tokens * (layers * kept + recomputed + 2 * compute * hidden)),
        "logits of one chunk": float(chunk * head.shape[0] * compute),
        "the head's gradient, whole": float(torch.float32.itemsize * head.numel() if head.requires_grad else 0),
    }


def choose_checkpointing(
    module: SFTModel, settings: ModelConfig, work: Work, shards: int, compute: int, available: float
) -> str:
    """What ``model.enable_gradient_checkpointing=auto`` stands for: the least that fits into ``available`` bytes.

    ``none`` is no choice with ``activation_offload``, which moves what checkpointing keeps. Where nothing fits, it is
    ``full``.
    """
    assert work.token_budget is not None
    memory, _ = states(module, settings, shards, compute, work.moments)
    choices = CHECKPOINTING[1:] if settings.activation_offload else CHECKPOINTING
    for mode in choices:
        needed = sum(memory.values()) + sum(activations(module, settings, mode, work.token_budget, compute).values())
        if needed <= available:
            return mode
    return CHECKPOINTING[-1]


def available_memory(device: torch.device) -> float:
    """Bytes that the estimate may fill on this process's device; a CPU's are shared by the processes of the node."""
    if device.type == "cuda":
        return USABLE["cuda"] * torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return USABLE["cpu"] * total / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
