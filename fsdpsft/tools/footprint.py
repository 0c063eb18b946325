"""Memory and FLOPs of a run, estimated from ``config.json`` alone: no weights are read, no device is asked.

Memory is what PyTorch's allocator must hold at the worst moment, the backward pass of the last micro-batch, for a
decoder of standard blocks. Activations are counted product by product; fragmentation, NCCL's buffers and the CUDA
context (1 to 2 GiB) come on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fsdpsft.checkpoint.pieces import pinned_bytes
from fsdpsft.config.schema import Config
from fsdpsft.loss import default_chunk
from fsdpsft.metrics import PEAK_FLOPS
from fsdpsft.model.flops import flop_count
from fsdpsft.model.sft_model import SFTModel, decoder_blocks, resolve_dtype
from fsdpsft.parallelize import adapted_model
from fsdpsft.prepare import TrainingData
from fsdpsft.tools.run_plan import RunPlan

GIB = 2**30


@dataclass(frozen=True)
class Footprint:
    """An estimate for one GPU out of ``gpus``.

    Attributes:
        parameters, trained_parameters: of the model, tied weights once.
        memory: what takes how many bytes on a GPU.
        host: what takes how many bytes of host memory for each GPU, page-locked memory as it is rounded up.
        flops: of the whole run, forward and backward; recomputation is not counted.
        gpu, mfu: the device and the share of its bfloat16 peak that the time assumes.
        seconds: of the whole run.
    """

    gpus: int
    parameters: int
    trained_parameters: int
    memory: dict[str, float]
    host: dict[str, float]
    flops: float
    gpu: str
    mfu: float
    seconds: float


def estimate(config: Config, data: TrainingData, plan: RunPlan, *, gpus: int, gpu: str, mfu: float) -> Footprint:
    """Estimate a run on ``gpus`` devices of a kind in ``metrics.PEAK_FLOPS``.

    Raises:
        ModelError: a model that cannot be built.
    """
    m = config.model
    compute = torch.bfloat16 if m.dtype == "auto" else resolve_dtype(m.dtype, torch.device("cpu"))
    module = SFTModel(adapted_model(data.model_path, m, compute, None), m.head_chunk_tokens)
    memory, host = _states(module, config, gpus, compute.itemsize)
    memory |= _activations(module, config, compute.itemsize)
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    flops = flop_count(module)(plan.tokens, plan.trained_tokens, plan.squared_lengths)
    return Footprint(
        gpus=gpus,
        parameters=sum(n for n, _ in sizes),
        trained_parameters=sum(n for n, trained in sizes if trained),
        memory=memory,
        host=host,
        flops=flops,
        gpu=gpu,
        mfu=mfu,
        seconds=flops / (gpus * PEAK_FLOPS[gpu] * mfu),
    )


def _states(module: SFTModel, config: Config, gpus: int, compute: int) -> tuple[dict[str, float], dict[str, float]]:
    """What takes how many bytes on a GPU, for weights, gradients and optimiser, and in host memory for each GPU."""
    fsdp = config.model.fsdp_config
    shards = gpus // fsdp.replicate_size
    state = torch.bfloat16.itemsize if config.optim.state_dtype == "bfloat16" else torch.float32.itemsize
    reduce = resolve_dtype(fsdp.reduce_dtype, torch.device("cpu")).itemsize
    parameters = list(module.parameters())
    stored = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    trained_bytes = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    everything = sum(p.numel() for p in parameters)
    block = max(sum(p.numel() for p in block.parameters()) for block in decoder_blocks(module.causal_lm))
    inside = sum(p.numel() for block in decoder_blocks(module.causal_lm) for p in block.parameters())
    memory = {
        "weights": stored / shards,
        "gradients": trained_bytes / shards,
        "AdamW's moments": 2 * state * trained / shards,
    }
    host: dict[str, float] = {}
    if fsdp.offload_params:
        locked = {"weights": parameters, "gradients": [p for p in parameters if p.requires_grad]}
        host = {name: float(sum(_power_of_two(_local_bytes(p, shards)) for p in ps)) for name, ps in locked.items()}
        host["AdamW's moments"], memory = memory["AdamW's moments"], {}
    if config.trainer.async_save:
        host["copies for saving in the background"] = float(pinned_bytes(_staged(parameters, shards, state, config)))
    if shards == 1:
        memory["copy in the compute dtype"] = float(compute * everything if stored > compute * everything else 0)
    else:
        gathered = everything if not fsdp.reshard_after_forward else 2 * block + (everything - inside)
        memory["gathered weights"] = float(compute * gathered)
        trained_block = block * trained / everything
        memory["gradients on their way"] = (compute + reduce) * trained_block
        if fsdp.gradient_sync == "last":
            memory["gradients on their way"] = float(reduce * trained)
    return memory, host


def _local_bytes(parameter: Tensor, shards: int, itemsize: int | None = None) -> int:
    """Bytes of the rows that the fullest process keeps."""
    rows = -(-len(parameter) // shards) if parameter.ndim else 1
    return rows * parameter[:1].numel() * (itemsize or parameter.element_size())


def _power_of_two(size: int) -> int:
    """What torch's allocator of page-locked memory takes for one tensor, which is what FSDP's offloading uses."""
    return 1 << max(size - 1, 0).bit_length()


def _staged(parameters: list[nn.Parameter], shards: int, state: int, config: Config) -> Iterator[int]:
    """Bytes of each tensor that a background save copies to the host: weights, and AdamW's moments."""
    for parameter in parameters:
        yield _local_bytes(parameter, shards)
        if parameter.requires_grad and "state" in config.trainer.save_contents:
            yield from [_local_bytes(parameter, shards, state)] * 2


def _activations(module: SFTModel, config: Config, compute: int) -> dict[str, float]:
    """Bytes of one micro-batch's activations on a GPU, of the logits that exist at one time, and of what they leave."""
    m, text = config.model, module.causal_lm.config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    queries, keys = heads * head_size, (getattr(text, "num_key_value_heads", None) or heads) * head_size
    width = getattr(text, "intermediate_size", None) or 4 * hidden
    tokens = config.data.token_budget
    # Of a token in one block: inputs of norms (float32 within), products, attention and the MLP's gate.
    attention = compute * (2 * hidden + 2 * queries + 2 * keys) + 4 * hidden
    mlp = (compute * (2 * hidden + 4 * width) + 4 * hidden) / m.mlp_tiles
    mode, tiled = m.enable_gradient_checkpointing, m.mlp_tiles > 1
    apart = mode == "selective" or m.activation_offload or tiled
    inputs = 0 if m.activation_offload else compute * hidden * (2 if apart else 1)
    results = compute * (2 * queries + 2 * keys + (0 if tiled else 2 * width))
    kept, recomputed = {
        "none": (attention + compute * hidden, mlp) if tiled else (attention + mlp, 0),
        "selective": (inputs + results, max(attention, mlp)),
        "full": (inputs, max(attention, mlp) if apart else attention + mlp),
    }[mode]
    head = module.head.weight
    vocabulary = head.shape[0]
    chunk = min(m.head_chunk_tokens or default_chunk("cuda", vocabulary), tokens)
    return {
        "activations": float(tokens * (layers * kept + recomputed + 2 * compute * hidden)),
        "logits of one chunk": float(chunk * vocabulary * compute),
        "the head's gradient, whole": float(torch.float32.itemsize * head.numel() if head.requires_grad else 0),
    }
