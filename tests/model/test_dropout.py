"""What a model drops in training is found under its names, and said."""

from __future__ import annotations

from fsdpsft.model.lora import LoraSettings, apply_lora
from fsdpsft.model.remarks import active_dropout, remarks
from fsdpsft.testing import tiny_model


def test_dropout_is_found_wherever_it_is() -> None:
    assert active_dropout(tiny_model("qwen2")) == {}
    model = tiny_model("phi3", attention_dropout=0.1, resid_pdrop=0.2)
    apply_lora(model, LoraSettings(rank=2, alpha=4, dropout=0.05))
    assert active_dropout(model) == {
        "attention_dropout": 0.1, "lora_dropout": 0.05, "resid_attn_dropout": 0.2, "resid_mlp_dropout": 0.2,
    }  # fmt: skip


def test_a_model_that_drops_says_so() -> None:
    assert remarks(tiny_model("llama")) == []
    (said,) = remarks(tiny_model("llama", attention_dropout=0.25))
    assert said.startswith("dropout is on (attention_dropout=0.25): losses depend on the random draws")
