"""The root module of a training run: a Hugging Face causal LM whose forward ends in the loss.

Head and loss live inside the root's forward, so that FSDP gathers the head's weight there and full logits are never
made. The causal LM keeps its own structure and names: a parameter is called ``causal_lm.`` plus its Hugging Face name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fsdpsft.errors import ModelError
from fsdpsft.loss import cross_entropy_sum
from fsdpsft.model.head import head_of
from fsdpsft.model.tied_weight import taker, tied_gradient


@dataclass(frozen=True)
class ModelInput:
    """What one process feeds its model for one micro-batch (shape legend in ``batch.py``).

    Attributes:
        input_ids: [R, S] or this process's slice [1, T / P].
        position_ids: like ``input_ids``.
        attention_context: the documents' bounds, handed to every attention layer.
        trained_index: [m] flat positions in ``input_ids`` whose hidden states the head needs.
        targets: [m'] ids to predict; [m] unless ``exchange`` evens them out.
        loss_weights: [m'] float32.
        exchange: [m, D] -> [m', D], evens the head's work out over a Ulysses group; None without one.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_context: Any
    trained_index: Tensor
    targets: Tensor
    loss_weights: Tensor
    exchange: Callable[[Tensor], Tensor] | None = None


class SFTModel(nn.Module):
    """Base model, head and loss in one forward.

    Args:
        causal_lm: any ``AutoModelForCausalLM`` whose head ``model/head.py`` knows.
        head_chunk_tokens: trained positions whose logits exist at one time; None: chosen by device and vocabulary.
    """

    def __init__(self, causal_lm: PreTrainedModel, head_chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.head = head_of(causal_lm)
        self.head_chunk_tokens = head_chunk_tokens
        self.tied = tied_gradient(causal_lm)

    def hidden_states(self, batch: ModelInput) -> Tensor:
        """Final hidden states [R, S, D]."""
        output = self.causal_lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_context=batch.attention_context,
            use_cache=False,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def forward(self, batch: ModelInput) -> tuple[Tensor, Tensor]:
        """Weighted sum of the losses at trained positions (float32 scalar), and each one's loss [m'], detached."""
        hidden = self.hidden_states(batch).flatten(0, 1).index_select(0, batch.trained_index)
        if batch.exchange is not None:
            hidden = batch.exchange(hidden)
        return cross_entropy_sum(
            hidden,
            self.head.weight,
            self.head.bias,
            batch.targets,
            batch.loss_weights,
            formula=self.head.formula,
            chunk_size=self.head_chunk_tokens,
            take_weight_gradient=taker(self.head.weight) if self.tied is None else self.tied.put,
        )


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks in forward order: the longest ``ModuleList`` of the model, whatever it is called.

    Raises:
        ModelError: the model has no list of blocks.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    # Experts of a mixture are ModuleLists too, but inside a block: the outermost list comes first in `modules()`.
    if not lists:
        raise ModelError(
            f"{type(model).__name__} holds no list of decoder blocks, so it cannot be sharded block by block"
        )
    return list(lists[0])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of all and of trainable parameters, tied weights counted once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a CUDA device that has it and float32 elsewhere."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def cut_layers(config: PreTrainedConfig, layers: int) -> None:
    """Shorten a model's configuration to its first ``layers`` blocks, in place; for trying a large model in small."""
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
