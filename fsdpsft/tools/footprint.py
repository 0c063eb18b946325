"""Memory and FLOPs of a run, estimated from ``config.json`` alone: no weights are read, no device is asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fsdpsft.checkpoint.pieces import pinned_bytes
from fsdpsft.config.schema import Config
from fsdpsft.metrics import GPUS
from fsdpsft.model.flops import flop_count
from fsdpsft.model.memory import USABLE, Work, activations, choose_checkpointing, local_bytes, states
from fsdpsft.model.sft_model import SFTModel, count_parameters, resolve_dtype
from fsdpsft.parallelize import adapted_model
from fsdpsft.prepare import TrainingData
from fsdpsft.tools.run_plan import RunPlan

GIB = 2**30


@dataclass(frozen=True)
class Footprint:
    """An estimate for one GPU out of ``gpus``.

    Attributes:
        parameters, trained_parameters: of the model, tied weights once.
        checkpointing: of activations; what ``auto`` stands for on such a GPU.
        memory: what takes how many bytes on a GPU.
        host: what takes how many bytes of host memory for each GPU, page-locked memory as it is rounded up.
        flops: of the whole run, forward and backward; recomputation is not counted.
        gpu, mfu: the device and the share of its bfloat16 peak that the time assumes.
        seconds: of the whole run.
    """

    gpus: int
    parameters: int
    trained_parameters: int
    checkpointing: str
    memory: dict[str, float]
    host: dict[str, float]
    flops: float
    gpu: str
    mfu: float
    seconds: float


def estimate(config: Config, data: TrainingData, plan: RunPlan, *, gpus: int, gpu: str, mfu: float) -> Footprint:
    """Estimate a run on ``gpus`` devices of a kind in ``metrics.GPUS``.

    Raises:
        ModelError: a model that cannot be built.
    """
    m = config.model
    compute = torch.bfloat16 if m.dtype == "auto" else resolve_dtype(m.dtype, torch.device("cpu"))
    module = SFTModel(adapted_model(data.model_path, m, compute), m.head_chunk_tokens)
    moments, shards = resolve_dtype(config.optim.state_dtype, torch.device("cpu")), gpus // m.fsdp_config.replicate_size
    teraflops, gib = GPUS[gpu]
    memory, host = states(module, m, shards, compute.itemsize, moments)
    if config.trainer.async_save:
        staged = _staged(module.parameters(), shards, moments, config)
        host["copies for saving in the background"] = float(pinned_bytes(staged))
    mode = m.enable_gradient_checkpointing
    if mode == "auto":
        work = Work(token_budget=config.data.token_budget, moments=moments)
        mode = choose_checkpointing(module, m, work, shards, compute.itemsize, USABLE["cuda"] * gib * GIB)
    memory |= activations(module, m, mode, config.data.token_budget, compute.itemsize)
    parameters, trained = count_parameters(module)
    flops = flop_count(module)(plan.tokens, plan.trained_tokens, plan.squared_lengths)
    return Footprint(
        gpus, parameters, trained, mode, memory, host, flops, gpu, mfu, seconds=flops / (gpus * teraflops * 1e12 * mfu)
    )


def _staged(parameters: Iterable[nn.Parameter], shards: int, moments: torch.dtype, config: Config) -> Iterator[int]:
    """Bytes of each tensor that a background save copies to the host: weights, and AdamW's moments."""
    for parameter in parameters:
        yield local_bytes(parameter, shards)
        if parameter.requires_grad and "state" in config.trainer.save_contents:
            yield from [local_bytes(parameter, shards, moments.itemsize)] * 2
