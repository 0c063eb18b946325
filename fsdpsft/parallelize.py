"""The one place that states the order in which a model is made parallel.

    LoRA -> kernels -> attention -> last block -> compile -> activation checkpointing -> FSDP2 -> weights

LoRA first, as it changes which modules exist. Compile before checkpointing: attention is outside the compiler's graph,
which it must not be in a checkpoint that the compiler sees; so each unit's compiled forward is what is recomputed, and
FSDP's hooks stay out of it. FSDP last, around whole blocks; then each process reads only its rows of the weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fsdpsft.batch import PackedBatch
from fsdpsft.config.schema import ModelConfig
from fsdpsft.distributed import activation_checkpoint, ulysses
from fsdpsft.distributed.fsdp import MasterWeights, prepare_micro_batch, shard_model
from fsdpsft.distributed.mesh import Mesh
from fsdpsft.model import block_parts, dropout, experts, kernels, lora, rope
from fsdpsft.model.attention import IMPLEMENTATION, Attend, AttentionContext, check_architecture
from fsdpsft.model.attention_backends import choose_backend, requirements
from fsdpsft.model.head import prove_head
from fsdpsft.model.last_block import trim_last_block
from fsdpsft.model.load import build_meta_model, load_model_config, load_weights
from fsdpsft.model.sft_model import ModelInput, SFTModel, cut_layers, decoder_blocks, resolve_dtype

log = logging.getLogger(__name__)

COMPILE_PAYS_FROM = 1000
"""Steps: compiling takes about a minute, and is taken to save a tenth of steps of a second or less. To be measured."""


@dataclass
class ParallelModel:
    """A model on its mesh: what the step, validation and checkpoints work with.

    Attributes:
        module: the root module, sharded where there are several processes.
        attend: the attention backend, inside the Ulysses exchange where there is one.
        masters: stands between master weights and compute dtype for one process; None where FSDP does that.
        trimmed: whether the last block computes trained positions only.
        rope_limit: length beyond which a document has rotary frequencies of its own; None for most models.
        whole: FSDP units that stay whole between a step's micro-batches.
    """

    module: SFTModel
    mesh: Mesh
    attend: Attend
    masters: MasterWeights | None
    compute_dtype: torch.dtype
    trimmed: bool = False
    rope_limit: int | None = None
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
        mesh = self.mesh
        wanted = local.trained_index if self.trimmed and len(local.trained_index) else None
        return ModelInput(
            local.input_ids, local.position_ids,
            AttentionContext.of(batch, self.attend, mesh.device, wanted, self._long_tokens(batch)),
            local.trained_index, local.targets, local.loss_weights,
            exchange=partial(ulysses.spread, plan=local.plan, group=mesh.sp_group) if mesh.sp_group else None,
        )  # fmt: skip

    def _long_tokens(self, batch: PackedBatch) -> Tensor | None:
        if self.rope_limit is None:
            return None
        long = rope.long_tokens(batch, self.rope_limit, self.mesh.sp_rank, self.mesh.sp_size)
        return (long.pin_memory() if self.mesh.device.type == "cuda" else long).to(self.mesh.device, non_blocking=True)

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Forward and backward belong inside this."""
        return contextlib.nullcontext() if self.masters is None else self.masters.computing()

    def weights_changed(self) -> None:
        """Say so after an optimiser step or a load."""
        if self.masters is not None:
            self.masters.refresh()

    def prepare_micro_batch(self, *, last: bool, sync: bool) -> None:
        """Say whether the step's last micro-batch comes, and whether its backward sums gradients over processes."""
        prepare_micro_batch(self.module, self.whole, last=last, sync=sync)


def build_model(
    path: Path, settings: ModelConfig, mesh: Mesh, *, packed: bool, seed: int, layers: int | None = None,
    max_length: int | None = None,
) -> ParallelModel:  # fmt: skip
    """Build, adapt, shard and fill the model of a Hugging Face folder.

    Args:
        path: the folder.
        settings: the run's ``model`` section; ``compile`` is ``true``, or blocks are not compiled.
        mesh: the processes.
        packed: whether documents share a row, which some architectures cannot honour.
        seed: of new adapters.
        layers: cut the model to its first so many blocks (for a self-test); None: all.
        max_length: longest document; None: not known.

    Raises:
        ModelError: an architecture that cannot be trained exactly, by name, or files that do not fit it.
        ConfigError: a backend or kernel that cannot serve the model, by name.
    """
    dtype = resolve_dtype(settings.dtype, mesh.device)
    causal_lm = adapted_model(path, settings, dtype, layers)
    check_architecture(causal_lm, packed=packed)
    rope_limit = rope.rope_by_document(causal_lm, max_length=max_length)
    prove_head(causal_lm)
    if not mesh.rank:
        _tell(causal_lm)
    if settings.use_liger:
        kernels.apply_liger(causal_lm, mesh.device)
    else:
        kernels.fuse_norms(causal_lm, mesh.device)
    backend = choose_backend(settings.attn_implementation, requirements(causal_lm, mesh.device, dtype))
    attend = backend.attend if mesh.sp_group is None else ulysses.sequence_parallel(backend.attend, mesh.sp_group)
    module = SFTModel(causal_lm, settings.head_chunk_tokens)
    blocks = decoder_blocks(causal_lm)
    trimmed = settings.trim_last_block and trim_last_block(blocks[-1])
    # A trimmed last block works on another number of tokens each time, for which the compiler would start anew.
    plain = {id(module) for module in blocks[-1].modules()} if trimmed else set()
    activation_checkpoint.apply(
        blocks, settings.enable_gradient_checkpointing, offload=settings.activation_offload,
        mlp_tiles=settings.mlp_tiles, split=block_parts.split,
        prepare=lambda unit: compile_unit(unit) if settings.compile == "true" and id(unit) not in plain else None,
    )  # fmt: skip
    whole = _shard(module, blocks, settings, mesh, dtype)
    _fill(causal_lm, path, settings, mesh, seed, strict=layers is None)
    masters = MasterWeights(module, dtype) if mesh.fsdp is None else None
    return ParallelModel(module.train(), mesh, attend, masters, dtype, trimmed, rope_limit, whole)


def _tell(causal_lm: PreTrainedModel) -> None:
    """Say what of the model's training is not, or not only, predicting tokens."""
    for remark in filter(None, (*experts.remarks(causal_lm.config), dropout.remark(causal_lm))):
        log.warning("%s: %s", type(causal_lm).__name__, remark)


def wants_compile(setting: str, device_type: str, steps: int) -> bool:
    """Whether blocks are compiled; ``auto``: on CUDA, where the run has ``COMPILE_PAYS_FROM`` steps or more."""
    return setting == "true" or (setting == "auto" and device_type == "cuda" and steps >= COMPILE_PAYS_FROM)


def compile_unit(unit: nn.Module) -> None:
    """Compile a module's forward; a backend that is marked ``outside_graph`` cuts the graph and runs as it is."""
    unit.forward = torch.compile(unit.forward)


def adapted_model(path: Path, settings: ModelConfig, compute_dtype: torch.dtype, layers: int | None) -> PreTrainedModel:
    """The model of a folder on meta, with adapters where they are asked for.

    A frozen base needs no more than the compute dtype. ``layers`` cuts the model to its first so many blocks.
    """
    config = load_model_config(path, trust_remote_code=settings.trust_remote_code)
    if layers is not None:
        cut_layers(config, layers)
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
        settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.target_modules,
        settings.exclude_modules, tuple(settings.modules_to_save or ()), settings.use_rslora, settings.use_dora,
    )  # fmt: skip


def _adapter_path(settings: ModelConfig) -> Path | None:
    return Path(settings.lora_adapter_path) if settings.lora_adapter_path else None


def _shard(
    module: SFTModel, blocks: list[nn.Module], settings: ModelConfig, mesh: Mesh, dtype: torch.dtype
) -> list[FSDPModule]:
    if mesh.fsdp is None:
        return []
    fsdp = settings.fsdp_config
    return shard_model(
        module, blocks, mesh.fsdp, compute_dtype=dtype, reduce_dtype=resolve_dtype(fsdp.reduce_dtype, mesh.device),
        reshard_after_forward=fsdp.reshard_after_forward, offload=fsdp.offload_params,
        min_num_params=fsdp.wrap_policy.min_num_params,
    )  # fmt: skip


def _fill(
    causal_lm: PreTrainedModel, path: Path, settings: ModelConfig, mesh: Mesh, seed: int, *, strict: bool
) -> None:
    where = torch.device("cpu") if settings.fsdp_config.offload_params else mesh.device
    load_weights(causal_lm, path, device=where, buffer_device=mesh.device, strict=strict)
    if settings.uses_lora:
        lora.fill_adapters(causal_lm, seed=seed, adapter_path=_adapter_path(settings))
