"""A model whose weights stay in their files answers as the whole one, and never holds more than one part of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fsdpsft.errors import ModelError
from fsdpsft.model import streamed
from fsdpsft.model.streamed import parts_of, token_losses
from fsdpsft.testing import PeakMemory, save_tiny_model

FAMILIES: dict[str, dict[str, object]] = {
    "qwen2": {},
    "llama": {"tie_word_embeddings": False},
    "gemma3_text": {},
    "mixtral": {"num_local_experts": 3, "tie_word_embeddings": False},
    "deepseek_v3": {
        "n_routed_experts": 4, "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}  # fmt: skip
IDS = torch.arange(3, 40)


def save(folder: Path, family: str, **more: object) -> Path:
    source = save_tiny_model(folder / "source", model_type=family, **{**FAMILIES[family], **more})
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    return source


@pytest.mark.parametrize("family", FAMILIES)
def test_its_losses_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    source = save(tmp_path, family)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = whole(input_ids=IDS[None], use_cache=False).logits[0, :-1]
    assert torch.equal(token_losses(source, IDS), nn.functional.cross_entropy(logits, IDS[1:], reduction="none"))
    held = sorted(name for part in parts_of(whole) for name, *_ in part.tensors())
    assert held == sorted(whole.state_dict().keys())


def test_a_trained_buffer_is_read_from_the_files(tmp_path: Path) -> None:
    source = save(tmp_path, "deepseek_v3")
    before = token_losses(source, IDS)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    model.save_pretrained(source)
    assert not torch.equal(token_losses(source, IDS), before)


def test_the_peak_is_one_part(tmp_path: Path) -> None:
    peaks, largest, total = {}, 0, {}
    for layers in (2, 8):
        source = save(tmp_path / str(layers), "llama", num_hidden_layers=layers, hidden_size=128, intermediate_size=512)
        model = AutoModelForCausalLM.from_pretrained(source)
        largest = max(sum(4 * t.numel() for *_, t in part.tensors()) for part in parts_of(model))
        total[layers] = sum(4 * p.numel() for p in model.parameters())
        with PeakMemory() as memory:
            token_losses(source, IDS[:4])
        peaks[layers] = memory.peak
    beside = 200_000  # activations, and the bfloat16 rows being read
    assert largest < peaks[8] < largest + beside < total[8] / 3
    assert peaks[8] - peaks[2] < beside / 10


def test_a_model_that_lacks_tensors_or_has_others_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path, "llama")
    config = json.loads((source / "config.json").read_text())
    for layers, complaint in ((1, "unexpected: model.layers.1"), (3, "missing: model.layers.2")):
        (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        with pytest.raises(ModelError, match=complaint):
            token_losses(source, IDS)


def test_a_model_that_reads_weights_of_what_it_does_not_call_is_told_apart(tmp_path: Path, monkeypatch) -> None:
    source = save(tmp_path, "llama")
    read = streamed._read_while_called
    monkeypatch.setattr(streamed, "_read_while_called", lambda part, files: part.name == "lm_head" or read(part, files))
    with pytest.raises(NotImplementedError, match="reads weights of a module that is not called"):
        token_losses(source, IDS)
