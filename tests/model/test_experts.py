"""Mixtures of experts: the load-balancing term that transformers can add is not part of our loss, and is said so."""

from __future__ import annotations

import pytest
import torch

from fsdpsft.model.remarks import remarks
from fsdpsft.testing import tiny_model

MIXTURES = {
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": None},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_own_loss_has_no_extra_term_unless_asked_for(family: str) -> None:
    model = tiny_model(family, **MIXTURES[family]).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        plain = model(input_ids=ids, labels=ids)
        tokens = torch.nn.functional.cross_entropy(plain.logits[0, :-1].float(), ids[0, 1:])
        torch.testing.assert_close(plain.loss, tokens)
        assert remarks(model) == []
        model.config.output_router_logits = True
        assert float(model(input_ids=ids, labels=ids).loss - tokens) > 1e-4
    assert "not added here" in remarks(model)[0]


def test_random_routing_is_said() -> None:
    model = tiny_model("mixtral", **MIXTURES["mixtral"], router_jitter_noise=0.01)
    assert remarks(model) == [
        "config.json sets {'router_jitter_noise': 0.01}: the router draws random numbers in training, so losses differ "
        "slightly with the number of processes."
    ]
