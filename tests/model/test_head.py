"""The head's formula against the logits that each family's own forward gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fsdpsft.errors import ModelError
from fsdpsft.model.head import head_of, prove_head
from fsdpsft.model.load import build_meta_model
from fsdpsft.testing import tiny_model

FAMILIES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "qwen2": ({}, 1, None),
    "gpt2": ({}, 1, None),
    "gemma2": ({"final_logit_softcapping": 3.0}, 1, 3.0),
    "cohere": ({"logit_scale": 0.0625}, 0.0625, None),
    "granite": ({"logits_scaling": 8.0}, 0.125, None),
    "phi": ({"num_key_value_heads": 4}, 1, None),  # a head with a bias
    "mixtral": ({"num_local_experts": 2}, 1, None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_logits(family: str) -> None:
    settings, scale, softcap = FAMILIES[family]
    model = tiny_model(family, **settings).eval()
    head = head_of(model)
    nn.init.normal_(head.weight, std=1.0)  # large enough for the cap to bite
    if head.bias is not None:
        nn.init.normal_(head.bias)
    assert (head.formula, head.bias is not None) == ((scale, softcap), family == "phi")
    ids = torch.arange(3, 20)[None]
    hidden = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(head.logits(hidden), model(ids).logits)
    prove_head(model)
    prove_head(build_meta_model(model.config))


def test_scale_that_the_model_does_not_heed() -> None:
    model = tiny_model("qwen2")
    model.config.logit_scale = 0.5
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM's head is more than .* its logits differ"):
        prove_head(model)


def test_heads_that_are_more_than_linear() -> None:
    with pytest.raises(ModelError, match="BertLMHeadModel's head is more than a linear layer"):
        prove_head(tiny_model("bert", is_decoder=True))
    model = tiny_model("qwen2")
    model.lm_head = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 384))
    with pytest.raises(ModelError, match="Qwen2ForCausalLM has no linear head"):
        head_of(model)


def test_proof_leaves_the_model_alone() -> None:
    model = tiny_model("qwen2")
    before, forward = {name: p.clone() for name, p in model.named_parameters()}, model.forward
    prove_head(model)
    assert model.forward == forward and isinstance(model.lm_head, nn.Linear) and model.lm_head.out_features == 384
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
