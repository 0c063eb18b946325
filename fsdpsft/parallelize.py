"""The one place that states the order in which a model is made parallel; see ``build_model``.

LoRA first, as it changes which modules exist. Patches before what wraps the blocks. Compile before checkpointing:
attention is outside the compiler's graph, which it must not be in a checkpoint that the compiler sees; so each unit's
compiled forward is what is recomputed, and FSDP's hooks stay out of it. FSDP last, around whole blocks; then each
process reads only its rows of the weights. Each change to the blocks is proven to leave their gradients as they were.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fsdpsft.batch import PackedBatch
from fsdpsft.config.schema import ModelConfig
from fsdpsft.distributed import activation_checkpoint, ulysses
from fsdpsft.distributed.activation_checkpoint import Recomputation
from fsdpsft.distributed.fsdp import MasterWeights, Sharding, prepare_micro_batch, shard_model
from fsdpsft.distributed.mesh import Mesh
from fsdpsft.model import lora
from fsdpsft.model.attention import IMPLEMENTATION, Attend, AttentionContext, check_architecture
from fsdpsft.model.attention_backends import choose_backend, requirements
from fsdpsft.model.block_proof import BlockProof, Change
from fsdpsft.model.head import prove_head
from fsdpsft.model.load import build_meta_model, load_model_config, load_weights
from fsdpsft.model.memory import CHECKPOINTING, Work, available_memory, choose_checkpointing
from fsdpsft.model.patches import apply_patches
from fsdpsft.model.remarks import active_dropout, remarks
from fsdpsft.model.rope import check_rope
from fsdpsft.model.sft_model import ModelInput, SFTModel, decoder_blocks, resolve_dtype

log = logging.getLogger(__name__)

COMPILE_PAYS_FROM = 1000
"""Steps: compiling takes about a minute, and is taken to save a tenth of steps of a second or less. To be measured."""


@dataclass
class ParallelModel:
    """A model on its mesh: what the step, validation and checkpoints work with.

    Attributes:
        module: the root module, sharded where there are several processes.
        attend: the attention backend, inside the Ulysses exchange where there is one.
        masters: copies of the weights in the compute dtype, for one process; None where FSDP makes them.
        whole: FSDP units that stay whole between a step's micro-batches.
    """

    module: SFTModel
    mesh: Mesh
    attend: Attend
    masters: MasterWeights | None
    compute_dtype: torch.dtype
    whole: Sequence[FSDPModule] = ()

    def __call__(self, batch: PackedBatch, sources: int = 1) -> tuple[Tensor, Tensor]:
        """Run this process's part of ``batch``.

        Returns:
            The weighted loss sum (scalar, with gradient), and the unweighted sum of token losses by source [sources].
        """
        local = self.local(batch)
        loss_sum, token_losses = self.module(self.inputs(batch, local))
        return loss_sum, token_losses.new_zeros(sources).index_add_(0, local.sources, token_losses)

    def local(self, batch: PackedBatch) -> ulysses.LocalBatch:
        """This process's part of a batch, on its device: the whole of it, or its slice under Ulysses."""
        local = ulysses.shard(batch, self.mesh.sp_rank, self.mesh.sp_size)
        if self.mesh.device.type == "cuda":
            local = local.pin_memory()  # a copy from pageable memory would make the host wait
        return local.to(self.mesh.device)

    def inputs(self, batch: PackedBatch, local: ulysses.LocalBatch) -> ModelInput:
        """What this process feeds its model."""
        group = self.mesh.sp_group
        return ModelInput(
            local.input_ids,
            local.position_ids,
            AttentionContext.of(batch, self.attend, self.mesh.device),
            local.trained_index,
            local.targets,
            local.loss_weights,
            exchange=partial(ulysses.spread, plan=local.plan, group=group) if group else None,
        )

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Forward and backward belong inside this."""
        return contextlib.nullcontext() if self.masters is None else self.masters.computing()

    def prepare_micro_batch(self, *, last: bool, sync: bool) -> None:
        """Say whether the step's last micro-batch comes, and whether its backward sums gradients over processes."""
        prepare_micro_batch(self.module, self.whole, last=last, sync=sync)


def build_model(path: Path, settings: ModelConfig, mesh: Mesh, work: Work, *, seed: int) -> ParallelModel:
    """Build, adapt, prove, shard and fill the model of a Hugging Face folder.

    Args:
        path: the folder.
        settings: the run's ``model`` section.
        mesh: the processes.
        work: what the model will be fed.
        seed: of new adapters.

    Raises:
        ModelError: an architecture that cannot be trained exactly, by name, or files that do not fit it; a kernel,
            checkpointing, offload or compile that would change its gradients.
        ConfigError: a backend or kernel that cannot serve the model, by name.
    """
    dtype = resolve_dtype(settings.dtype, mesh.device)
    causal_lm = adapted_model(path, settings, dtype)
    check_model(causal_lm, work)
    proof = BlockProof(causal_lm, mesh.device, packed=work.packed, place=(mesh.sp_rank, mesh.sp_size))
    apply_patches(causal_lm, settings, mesh.device, proof)
    attend = _attention(causal_lm, settings, mesh, dtype)
    proof.compute_with(attend, dtype)
    module = SFTModel(causal_lm, settings.head_chunk_tokens)
    how = _recomputation(module, settings, mesh, work, draws=proof.draws)
    if wants_compile(settings.compile, mesh.device.type, work.steps):
        _compile(causal_lm, settings.mlp_tiles, proof)
    _checkpoint(causal_lm, how, proof)
    proof.finish(mesh.sum)
    whole = _shard(module, settings, mesh, dtype)
    _fill(causal_lm, path, settings, mesh, seed)
    masters = MasterWeights(module, dtype) if mesh.fsdp is None else None
    if not mesh.rank:
        _announce(causal_lm, settings, how)
    return ParallelModel(module.train(), mesh, attend, masters, dtype, whole)


def check_model(causal_lm: PreTrainedModel, work: Work) -> None:
    """Refuse a model that cannot be trained exactly.

    Raises:
        ModelError: by name, with what to set where something can be set.
    """
    check_architecture(causal_lm, packed=work.packed)
    check_rope(causal_lm, work.max_length)
    prove_head(causal_lm)


def _announce(causal_lm: PreTrainedModel, settings: ModelConfig, how: Recomputation) -> None:
    """Say how activations are kept, and what of the model's training is not, or not only, predicting tokens."""
    asked = settings.enable_gradient_checkpointing
    log.info("activation checkpointing: %s (model.enable_gradient_checkpointing=%s)", how.mode, asked)
    for remark in remarks(causal_lm):
        log.warning("%s: %s", type(causal_lm).__name__, remark)


def wants_compile(setting: str, device_type: str, steps: int) -> bool:
    """Whether blocks are compiled; ``auto``: on CUDA, where the run has ``COMPILE_PAYS_FROM`` steps or more."""
    return setting == "true" or (setting == "auto" and device_type == "cuda" and steps >= COMPILE_PAYS_FROM)


def _attention(causal_lm: PreTrainedModel, settings: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> Attend:
    """The attention backend, inside the Ulysses exchange where there is one."""
    backend = choose_backend(settings.attn_implementation, requirements(causal_lm, mesh.device, dtype))
    return backend.attend if mesh.sp_group is None else ulysses.sequence_parallel(backend.attend, mesh.sp_group)


def _recomputation(module: SFTModel, settings: ModelConfig, mesh: Mesh, work: Work, *, draws: bool) -> Recomputation:
    """What is recomputed; all processes choose alike, as full checkpointing repeats exchanges between them."""
    mode = settings.enable_gradient_checkpointing
    if mode == "auto":
        shards = mesh.world_size // settings.fsdp_config.replicate_size
        size = resolve_dtype(settings.dtype, mesh.device).itemsize
        chosen = choose_checkpointing(module, settings, work, shards, size, available_memory(mesh.device))
        votes = torch.tensor([float(chosen == mode) for mode in CHECKPOINTING], device=mesh.device)
        mode = CHECKPOINTING[int(mesh.sum(votes).nonzero().max())]
    draws = draws or bool(active_dropout(module))
    return Recomputation(mode, settings.activation_offload, settings.mlp_tiles, draws)


def _compile(causal_lm: PreTrainedModel, mlp_tiles: int, proof: BlockProof) -> None:
    """Compile each unit's forward, which the compiler must see without what wraps it.

    A backend that is marked ``outside_graph`` cuts the graph and runs uncompiled.
    """
    log.info("blocks are compiled: the first steps take a minute longer")
    with proof.unchanged(Change("model.compile", "Set model.compile=false."), same_kernels=False):
        for unit in activation_checkpoint.units(decoder_blocks(causal_lm), mlp_tiles):
            unit.forward = torch.compile(unit.forward)


def _checkpoint(causal_lm: PreTrainedModel, how: Recomputation, proof: BlockProof) -> None:
    """Wrap the blocks' forward, inside FSDP's hooks, which must not run again when a block is recomputed."""
    keys = f"model.enable_gradient_checkpointing={how.mode}"
    keys += ", model.activation_offload=true" * how.offload + f", model.mlp_tiles={how.mlp_tiles}" * (how.mlp_tiles > 1)
    instead = "Set model.enable_gradient_checkpointing=none, model.activation_offload=false and model.mlp_tiles=1."
    with proof.unchanged(Change(keys, instead), same_kernels=True):
        activation_checkpoint.apply(decoder_blocks(causal_lm), how)


def adapted_model(path: Path, settings: ModelConfig, compute_dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder on meta, with adapters if asked for; their frozen base has the compute dtype."""
    config = load_model_config(path, trust_remote_code=settings.trust_remote_code)
    stored = (
        compute_dtype if settings.uses_lora else resolve_dtype(settings.fsdp_config.model_dtype, torch.device("cpu"))
    )
    causal_lm = build_meta_model(
        config, attn_implementation=IMPLEMENTATION, dtype=stored, trust_remote_code=settings.trust_remote_code
    )
    if settings.uses_lora:
        lora.apply_lora(causal_lm, _lora_settings(settings), _adapter_path(settings))
    return causal_lm


def _lora_settings(settings: ModelConfig) -> lora.LoraSettings:
    return lora.LoraSettings(
        settings.lora_rank,
        settings.lora_alpha,
        settings.lora_dropout,
        settings.target_modules,
        settings.exclude_modules,
        tuple(settings.modules_to_save or ()),
        settings.use_rslora,
        settings.use_dora,
    )


def _adapter_path(settings: ModelConfig) -> Path | None:
    return Path(settings.lora_adapter_path) if settings.lora_adapter_path else None


def _shard(module: SFTModel, settings: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> list[FSDPModule]:
    if mesh.fsdp is None:
        return []
    fsdp, reduce = settings.fsdp_config, resolve_dtype(settings.fsdp_config.reduce_dtype, mesh.device)
    how = Sharding(dtype, reduce, fsdp.reshard_after_forward, fsdp.offload_params, fsdp.wrap_policy.min_num_params)
    return shard_model(module, decoder_blocks(module.causal_lm), mesh.fsdp, how)


def _fill(causal_lm: PreTrainedModel, path: Path, settings: ModelConfig, mesh: Mesh, seed: int) -> None:
    where = torch.device("cpu") if settings.fsdp_config.offload_params else mesh.device
    load_weights(causal_lm, path, device=where, buffer_device=mesh.device)
    if settings.uses_lora:
        lora.fill_adapters(causal_lm, seed=seed, adapter_path=_adapter_path(settings))
