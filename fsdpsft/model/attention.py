"""Attention that keeps documents apart: one function registered with transformers, one context a micro-batch.

The train step passes ``attention_context=AttentionContext(...)`` to the model's forward, which passes it on to the
attention function registered as ``IMPLEMENTATION``. That calls ``context.attend``: a backend of
``attention_backends.py``, inside the Ulysses exchange where there is one. No *mask* function is registered under our
name: with one, transformers would look for packed sequences in ``position_ids`` and wait for the device.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fsdpsft.batch import PackedBatch
from fsdpsft.errors import ModelError

IMPLEMENTATION = "fsdpsft"
"""What ``config._attn_implementation`` must say for a model to use this module."""

HONOURED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention", "sparse", "dense", "mlp", "moe"})
RECURRENT_LAYERS = frozenset(
    {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "mamba2", "recurrent", "lightning_attention"}
)
RECURRENT_MODULES = re.compile(
    r"Mamba|Rwkv|RecurrentBlock|RgLru|GatedDelta|ShortConv|LinearAttention|LightningAttention|LSTM|RetNet|HyenaFilter"
)


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer asks of attention, which is always causal within a document.

    Attributes:
        scaling: factor on the scores before anything else.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; None for all before it.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None for none.
        sinks: [H] learned extra logit a head, which takes part in the softmax and carries no value; None for none.
        dropout: share of attention probabilities dropped.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    def for_heads(self, start: int, stop: int) -> AttentionSpec:
        """The same for query heads ``start:stop``."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[start:stop])


@dataclass(frozen=True)
class AttentionContext:
    """Document bounds of one micro-batch, never sharded, and the function that honours them.

    Attributes:
        cu_seqlens: [N + 1] int32 on the device, bounds in the flat token axis (rows laid end to end).
        seqlens: the documents' lengths as host integers; max_seqlen is the longest.
        attend: ``attend(q, k, v, spec, context)``: q [R, H, S, E] and k, v [R, K, S, E] to [R, H, S, E].
        derived: what a backend computes once from the bounds and keeps for the other layers (a block mask).
    """

    cu_seqlens: Tensor
    seqlens: tuple[int, ...]
    max_seqlen: int
    attend: Attend
    derived: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, batch: PackedBatch, attend: Attend, device: torch.device | str | None = None) -> AttentionContext:
        """The context of a whole batch, packed or padded; under Ulysses too, as bounds are never sharded."""
        bounds = batch.cu_seqlens if device is None else batch.cu_seqlens.to(device, non_blocking=True)
        return cls(bounds, batch.seqlens, batch.max_seqlen, attend)


Attend = Callable[[Tensor, Tensor, Tensor, AttentionSpec, AttentionContext], Tensor]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attention_context: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every attention layer.

    Args:
        module: the attention layer.
        query: [R, H, S, E]; ``key`` and ``value``: [R, K, S, E].
        attention_mask: must be None: bounds come from ``attention_context``.
        scaling, dropout, sliding_window, softcap, s_aux: see ``AttentionSpec``; ``s_aux`` are the sinks.
        attention_context: the micro-batch's bounds.
        **kwargs: what the model passes to any attention function; what would change the result is refused.

    Returns:
        [R, S, H, E], and None for the attention weights.

    Raises:
        ModelError: the architecture did not pass the context on, or asks for something that would be ignored.
    """
    if attention_context is None:
        raise _unsupported(module, "does not pass its keyword arguments on to attention, so document bounds are lost")
    if attention_mask is not None:
        raise _unsupported(module, "builds an attention mask of its own, which a kernel with document bounds ignores")
    if kwargs.get("position_bias") is not None:
        raise _unsupported(module, "adds a position bias to its scores")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise _unsupported(module, "has attention that is not causal")
    if getattr(module, "layer_type", None) == "sliding_attention" and sliding_window is None:
        raise _unsupported(module, "has a sliding-window layer that does not tell attention its window")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    spec = AttentionSpec(scale, sliding_window, softcap, s_aux, dropout)
    return attention_context.attend(query, key, value, spec, attention_context).transpose(1, 2), None


def _unsupported(module: nn.Module, reason: str) -> ModelError:
    model_type = getattr(getattr(module, "config", None), "model_type", "this model")
    return ModelError(
        f"{type(module).__name__} of {model_type} {reason}. This architecture cannot be trained here; "
        "please report its name, or train a model of another family."
    )


AttentionInterface.register(IMPLEMENTATION, attention_forward)


def check_architecture(model: PreTrainedModel, *, packed: bool) -> None:
    """Refuse, by name, a model that cannot keep packed documents apart or does not use our attention.

    Layers that carry a state along the row (recurrent, linear attention, convolution) carry it into the next packed
    document. One padded row a document is safe for them, as padding comes last.

    Raises:
        ModelError: naming the architecture, the layer and the key to change.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or ())
    if packed and (found := sorted(kinds & RECURRENT_LAYERS) or _recurrent_modules(model)):
        raise ModelError(
            f"{name} has {found} layers, which carry state from one packed document into the next. "
            "Set use_remove_padding=false: one padded row a document is exact for them."
        )
    if unknown := sorted(kinds - HONOURED_LAYERS - RECURRENT_LAYERS):
        raise ModelError(f"{name} has layers of type {unknown}, whose attention pattern is not supported here.")
    if getattr(config, "is_heterogeneous", False):
        raise ModelError(f"{name} has layers of different shapes, which are not supported here.")
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError(f"{name} has use_bidirectional_attention set; only causal language models can be trained.")
    if not (_uses_attention_interface(model) or (kinds and kinds <= RECURRENT_LAYERS)):
        raise own_attention_code(name)


def own_attention_code(name: str) -> ModelError:
    """The error for a model whose attention is not looked up in transformers' attention interface."""
    return ModelError(
        f"{name} has its own attention code, outside transformers' attention interface, and would ignore document "
        "bounds. Train a model of another family, or use a version of transformers that has moved it over."
    )


def _uses_attention_interface(model: PreTrainedModel) -> bool:
    # Hybrid families do not set the class flag, though their attention layers look the function up; their modeling file
    # then has imported the table.
    modeling_file = sys.modules[type(model).__module__]
    return model._supports_attention_backend or hasattr(modeling_file, "ALL_ATTENTION_FUNCTIONS")


def _recurrent_modules(model: nn.Module) -> list[str]:
    return sorted(
        {
            type(module).__name__
            for module in model.modules()
            if isinstance(module, nn.Conv1d) or RECURRENT_MODULES.search(type(module).__name__)
        }
    )


@torch.no_grad()
def isolation_probe(
    forward: Callable[[Tensor, Tensor, AttentionContext], Tensor],
    attend: Attend,
    *,
    vocab_size: int,
    device: torch.device | str = "cpu",
    lengths: tuple[int, ...] = (13, 5, 22, 8),
) -> float:
    """Prove that packed documents do not see each other: change one, and compare the others' hidden states.

    Args:
        forward: ``forward(input_ids [1, T], position_ids [1, T], context)`` to hidden states [1, T, D] of the loaded
            model in evaluation mode.
        attend: the backend under test.
        vocab_size: ids are drawn below it.
        device: of the inputs.
        lengths: the documents' lengths; one should be longer than the model's sliding window.

    Returns:
        The largest absolute change of a hidden state outside the changed document, over all choices of it. A
        deterministic kernel gives exactly 0.

    Raises:
        ModelError: the changed document's own states did not move, so the probe would prove nothing.
    """
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocab_size, (1, total), generator=generator)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    cu_seqlens = bounds.to(device, torch.int32)

    def states(ids: Tensor) -> Tensor:
        return forward(ids.to(device), position_ids, AttentionContext(cu_seqlens, lengths, max(lengths), attend))

    reference = states(input_ids)
    leak = 0.0
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        changed = input_ids.clone()
        changed[:, start:stop] = (changed[:, start:stop] + vocab_size // 2) % vocab_size
        moved = (states(changed) - reference).abs().amax(dim=-1)[0]
        if not bool((moved[start:stop] > 0).all()):
            raise ModelError(
                "the isolation probe changed a document, but its own states did not move: it proves nothing"
            )
        leak = max(leak, torch.cat([moved[:start], moved[stop:]]).max().item())
    return leak
