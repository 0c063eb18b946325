"""A last block trimmed to trained positions gives the loss and every gradient of the whole block."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fsdpsft.batch import PackedBatch, Sample, pack
from fsdpsft.distributed import activation_checkpoint
from fsdpsft.model import last_block, lora
from fsdpsft.model.attention import IMPLEMENTATION, AttentionContext
from fsdpsft.model.attention_backends import attend_sdpa
from fsdpsft.model.sft_model import ModelInput, SFTModel, decoder_blocks
from fsdpsft.testing import tiny_model

TRIMMED: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {"num_key_value_heads": 4, "attention_bias": True},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 20.0},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
}
UNTRIMMED: dict[str, dict[str, Any]] = {"phi3": {}, "olmo2": {}, "cohere": {}, "granite": {"residual_multiplier": 0.3}}


def make_batch(padded: bool = False) -> PackedBatch:
    dice = np.random.default_rng(0)
    masks = ([0, 0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1], [0] * 12 + [1])
    rows = [(dice.integers(3, 384, len(mask)).astype(np.uint32), np.float32(mask)) for mask in masks]
    return pack([Sample(ids, mask, row) for row, (ids, mask) in enumerate(rows)], pad_token_id=0, padded=padded)


FLOAT32 = ("gemma", "mixtral")  # whose norms or experts work in float32 whatever they are given


def build(family: str, prepare: Callable[[Any], None] = lambda model: None, **settings: Any) -> SFTModel:
    causal_lm = tiny_model(family, **settings)
    causal_lm.set_attn_implementation(IMPLEMENTATION)
    prepare(causal_lm)
    return SFTModel(causal_lm if family.startswith(FLOAT32) else causal_lm.double()).train()


def run(model: SFTModel, batch: PackedBatch, *, trimmed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    index = batch.trained_index
    context = AttentionContext.of(batch, attend_sdpa, wanted=index if trimmed else None)
    targets, weights = (x.flatten()[index] for x in (batch.labels, batch.loss_weights.to(model.head.weight.dtype)))
    loss, _ = model(ModelInput(batch.input_ids, batch.position_ids, context, index, targets, weights))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: SFTModel, batch: PackedBatch) -> None:
    expected_loss, expected = run(model, batch, trimmed=False)
    loss, gradients = run(model, batch, trimmed=True)
    exact = loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-6 if exact else 1e-4, atol=1e-7 if exact else 1e-5, msg=name
        )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", TRIMMED)
def test_loss_and_gradients(family: str, padded: bool) -> None:
    model = build(family, **TRIMMED[family])
    assert last_block.trim_last_block(decoder_blocks(model.causal_lm)[-1])
    assert_same(model, make_batch(padded))


@pytest.mark.parametrize(
    "options", [{"mode": "full"}, {"mode": "selective"}, {"mode": "full", "mlp_tiles": 3}], ids=str
)
def test_recomputed(options: dict[str, Any]) -> None:
    model = build("qwen3")
    blocks = decoder_blocks(model.causal_lm)
    assert last_block.trim_last_block(blocks[-1])
    activation_checkpoint.apply(blocks, **options)
    assert_same(model, make_batch())


def test_adapters() -> None:
    def adapt(causal_lm: Any) -> None:
        lora.apply_lora(causal_lm, lora.LoraSettings(4, 8, 0.0, "all-linear", None, (), False, False))
        torch.manual_seed(0)
        for name, parameter in causal_lm.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)

    model = build("qwen2", adapt)
    assert last_block.trim_last_block(decoder_blocks(model.causal_lm)[-1])
    assert_same(model, make_batch())


def test_rows_that_enter_the_parts() -> None:
    """Queries, attention output and MLP see the trained positions; keys and values all of them."""
    model, batch, rows = build("llama"), make_batch(), {}
    block = decoder_blocks(model.causal_lm)[-1]
    assert last_block.trim_last_block(block)
    linear = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows[id(weight)] = x.shape[:-1].numel()
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watched)
        run(model, batch, trimmed=True)
    counts = {name: rows[id(p)] for name, p in block.named_parameters() if id(p) in rows}
    trained, total = len(batch.trained_index), batch.input_ids.numel()
    assert {name for name, count in counts.items() if count == total} == {
        "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    }  # fmt: skip
    assert {name for name, count in counts.items() if count == trained} == {
        "self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }  # fmt: skip


@pytest.mark.parametrize("family", UNTRIMMED)
def test_other_structures_are_left_alone(family: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = build(family, **UNTRIMMED[family])
    block = decoder_blocks(model.causal_lm)[-1]
    assert not last_block.trim_last_block(block)
    assert "forward" not in vars(block)
    assert type(block).__name__ in caplog.text
