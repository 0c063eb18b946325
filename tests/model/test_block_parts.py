"""Blocks taken apart compute what they did, and those that would not are left whole."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsdpsft.model.block_parts import split
from fsdpsft.model.sft_model import decoder_blocks
from fsdpsft.testing import tiny_model

TWO = ["attention", "mlp"]
FOUR = ["attention", "norm", "mlp", "norm"]
APART: dict[str, tuple[dict[str, Any], list[str]]] = {
    "qwen2": ({}, TWO),
    "llama": ({}, TWO),
    "phi3": ({"pad_token_id": 0}, TWO),
    "granite": ({"residual_multiplier": 0.3}, TWO),
    "mixtral": ({"num_local_experts": 4, "sliding_window": None}, TWO),
    "gpt2": ({"head_dim": None}, TWO),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, TWO),
    "gemma2": ({}, FOUR),
    "gemma3_text": ({}, FOUR),
}
WHOLE = {"cohere": "one norm feeds both", "olmo2": "norms stand behind", "phi": "both parts add to one residual"}


def kind(module: nn.Module) -> str:
    name = type(module).__name__.lower()
    return next(k for k in ("attention", "norm", "mlp") if k in name.replace("sparsemoeblock", "mlp"))


def results(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model.train()(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", APART)
def test_a_block_taken_apart_computes_the_same(family: str) -> None:
    settings, expected = APART[family]
    dropout = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop")}.get(family, ())
    settings = {**settings, **dict.fromkeys(dropout, 0.0)}
    plain, apart = tiny_model(family, **settings), tiny_model(family, **settings)
    for block in decoder_blocks(apart):
        parts = split(block)
        assert parts is not None
        assert [kind(part) for part in parts] == expected
    (logits, gradients), (found, found_gradients) = results(plain), results(apart)
    assert torch.equal(logits, found)
    assert all(torch.equal(gradients[name], found_gradients[name]) for name in gradients)
    assert list(apart.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("family", WHOLE)
def test_other_structures_stay_whole(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(family)
    with caplog.at_level(logging.INFO):
        assert [split(block) for block in decoder_blocks(model)] == [None, None]
    assert caplog.text.count("is recomputed as a whole") == 1
    assert torch.equal(results(model)[0], results(tiny_model(family))[0])


class Block(nn.Module):
    """A block that reads its second norm's output, or its place in the sequence, in one more place."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        self.self_attn, self.mlp = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states))[0]
        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.odd == "residual" else hidden_states
        return residual + self.mlp(normed) + (normed.mean() if self.odd == "mean" else 0)


@pytest.mark.parametrize("odd", ["residual", "mean", ""])
def test_a_norm_that_is_read_elsewhere_is_noticed(odd: str) -> None:
    assert (split(Block(odd)) is None) == bool(odd)
