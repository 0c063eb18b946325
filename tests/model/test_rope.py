"""Frequencies that depend on length follow each document's own, packed and padded; other such models are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fsdpsft.batch import Sample, pack
from fsdpsft.errors import ModelError
from fsdpsft.model.attention import IMPLEMENTATION, AttentionContext
from fsdpsft.model.attention_backends import attend_sdpa
from fsdpsft.model.rope import long_tokens, rope_by_document
from fsdpsft.testing import tiny_model

LIMIT = 16
LENGTHS = (10, 40, LIMIT, LIMIT + 1, 3)
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [3.0 + i for i in range(8)],
}  # fmt: skip
PHI3 = {"rope_parameters": LONGROPE, "num_key_value_heads": 4, "sliding_window": None, "max_position_embeddings": 128}
# Wide enough for a changed frequency to show in the attention of a random model.
SHARP = 8.0


def phi3(attention: str) -> Any:
    model = tiny_model("phi3", **{**PHI3, "original_max_position_embeddings": LIMIT}).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.qkv_proj.weight.mul_(SHARP)
    model.set_attn_implementation(attention)
    return model


def documents() -> list[Sample]:
    ids = [torch.randint(384, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    return [Sample(d.numpy().astype(np.uint32), np.ones(len(d), np.float32), row) for row, d in enumerate(ids)]


@torch.no_grad()
def alone() -> list[Tensor]:
    """Plain transformers, one document at a time."""
    model = phi3("eager")
    ids = [torch.from_numpy(d.input_ids.astype(np.int64))[None] for d in documents()]
    return [model.model(input_ids=x, use_cache=False).last_hidden_state[0] for x in ids]


@torch.no_grad()
def together(padded: bool, *, by_document: bool) -> list[Tensor]:
    """All documents in one micro-batch, each cut out again."""
    model = phi3(IMPLEMENTATION)
    limit = rope_by_document(model, max_length=None) if by_document else None
    assert limit == (LIMIT if by_document else None)
    batch = pack(documents(), pad_token_id=0, pad_to_multiple=4, padded=padded)
    long = long_tokens(batch, LIMIT, 0, 1) if by_document else None
    states = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
        attention_context=AttentionContext.of(batch, attend_sdpa, long=long),
    ).last_hidden_state.flatten(0, 1)  # fmt: skip
    starts = batch.cu_seqlens[:-1].tolist()
    return [states[start : start + length] for start, length in zip(starts, LENGTHS, strict=False)]


def differences(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("padded", [False, True])
def test_each_document_has_its_own_frequencies(padded: bool) -> None:
    assert max(differences(together(padded, by_document=True), alone())) < 1e-5  # frequencies are float32


def test_without_that_a_long_document_changes_the_short_ones() -> None:
    moved = differences(together(False, by_document=False), alone())
    assert [difference > 1e-2 for difference in moved] == [length <= LIMIT for length in LENGTHS]


@pytest.mark.parametrize("padded", [False, True])
def test_marks_are_those_of_this_ranks_slice(padded: bool) -> None:
    batch = pack(documents(), pad_token_id=0, pad_to_multiple=4, padded=padded)
    rows, length = batch.input_ids.shape
    expected = torch.zeros(rows * length, dtype=torch.bool)
    for start, stop, own in zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.lengths, strict=False):
        expected[start:stop] = own > LIMIT
    found = torch.cat([long_tokens(batch, LIMIT, rank, 4) for rank in range(4)], dim=1)
    assert torch.equal(found, expected.view(rows, length))
    assert 0 < int(found.sum()) < found.numel()
    assert not long_tokens(pack([], pad_token_id=0, pad_to_multiple=4), LIMIT, 0, 1).any()


def test_a_context_without_marks_is_as_in_transformers() -> None:
    """What probes the model by itself, such as the isolation probe, passes no marks."""
    model = phi3(IMPLEMENTATION)
    expected = alone()[1]
    rope_by_document(model, max_length=None)
    batch = pack(documents()[1:2], pad_token_id=0)
    with torch.no_grad():
        states = model.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
            attention_context=AttentionContext.of(batch, attend_sdpa),
        ).last_hidden_state[0]  # fmt: skip
    assert float((states - expected).abs().max()) < 1e-5


def test_frequencies_that_grow_with_length_are_refused_beyond_their_bound() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=dynamic, max_position_embeddings=64)
    assert rope_by_document(model, max_length=64) is None
    for length in (65, None):
        with pytest.raises(ModelError, match=r"LlamaForCausalLM.model.rotary_emb has rope_type=dynamic: beyond 64"):
            rope_by_document(model, max_length=length)
    assert rope_by_document(tiny_model("qwen2"), max_length=None) is None
