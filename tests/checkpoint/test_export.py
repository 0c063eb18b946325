"""What is exported is what ``save_pretrained`` would write, beside the source's own files, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fsdpsft.checkpoint import export as export_module
from fsdpsft.checkpoint.export import Handoff, carried_files, prove_model, source_template
from fsdpsft.checkpoint.manager import CheckpointManager
from fsdpsft.checkpoint.parameters import named_tensors
from fsdpsft.checkpoint.pieces import piece_of
from fsdpsft.checkpoint.state import TrainState
from fsdpsft.checkpoint.tensor_plan import StoredDtypes, plan_export
from fsdpsft.errors import CheckpointError, ModelError
from fsdpsft.filesystem import write_json
from fsdpsft.testing import save_tiny_model, tiny_model

FAMILIES: dict[str, dict[str, object]] = {
    "qwen2": {}, "llama": {"tie_word_embeddings": False}, "qwen3": {}, "gemma3_text": {}, "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "deepseek_v3": {
        "n_routed_experts": 4, "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        found.update(load_file(path))
    return found


def export(model: PreTrainedModel, handoff: Handoff, root: Path) -> Path:
    CheckpointManager(root, handoff).save(model, None, TrainState(1), contents=("model",))
    return root / "global_step_1"


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tensors_as_save_pretrained(family, tmp_path) -> None:
    source = save_tiny_model(tmp_path / "source", model_type=family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "expected")
    expected = tensors_in(tmp_path / "expected")
    found = tensors_in(export(model, Handoff(source, max_shard_bytes=60_000), tmp_path / "run"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "source")


def load(source: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source)


def test_files_that_training_did_not_change_stay_byte_for_byte(source, tmp_path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "made_up_key": [1]}, indent=7))
    (source / "LICENSE").write_text("free")
    for name in ("optimizer.pt", "README.md", "trainer_state.json", "model.gguf", ".secret.json"):
        (source / name).write_text("{}")
    path = export(load(source), Handoff(source), tmp_path / "run")
    for file in carried_files(source):
        assert (path / file.name).read_bytes() == file.read_bytes(), file
    expected = {p.name for p in carried_files(source)} | {"model.safetensors", "manifest.json"}
    assert {p.name for p in path.iterdir()} == expected and "LICENSE" in expected


def test_the_config_follows_the_dtype(source, tmp_path) -> None:
    path = export(load(source), Handoff(source, dtype=torch.bfloat16), tmp_path / "run")
    assert AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype == torch.bfloat16
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"


def test_each_tensor_keeps_the_dtype_it_has_in_the_source(tmp_path) -> None:
    source = save_tiny_model(tmp_path / "source")
    model = load(source).bfloat16()
    model.model.norm.float()
    model.save_pretrained(source)
    assert StoredDtypes.of(source) == StoredDtypes(torch.bfloat16, {"model.norm.weight": torch.float32})
    assert StoredDtypes.from_json(StoredDtypes.of(source).as_json()) == StoredDtypes.of(source)
    found = tensors_in(export(tiny_model(vocab_size=model.config.vocab_size), Handoff(source), tmp_path / "run"))
    assert {name for name, tensor in found.items() if tensor.dtype == torch.float32} == {"model.norm.weight"}


def test_a_lost_tie_is_refused(source, tmp_path) -> None:
    model = load(source)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ModelError, match=r"lm_head\.weight is declared tied"):
        named_tensors(model)


def test_an_undeclared_tie_is_refused(source) -> None:
    model = load(source)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match="are one tensor"):
        named_tensors(model)


def test_a_config_that_would_untie_the_model_is_refused(source, tmp_path) -> None:
    model = load(source)
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**config, "tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match="tie_word_embeddings=False, but the trained embeddings are tied"):
        export(model, Handoff(source), tmp_path / "run")


def test_a_tokenizer_that_loads_another_template_is_refused(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export_module, "_put_template", lambda folder, template: {})
    with pytest.raises(CheckpointError, match="chat template is not the one trained with"):
        export(load(source), Handoff(source, chat_template="another"), tmp_path / "run")


@pytest.mark.parametrize("kept", [None, 2, [2], [5, 2]])
def test_stop_tokens_are_added_to_those_there(source, tmp_path, kept) -> None:
    write_json(source / "generation_config.json", {"temperature": 0.5, "do_sample": True, "eos_token_id": kept})
    path = export(load(source), Handoff(source, eos_token_ids=(2, 1)), tmp_path / "run")
    config = json.loads((path / "generation_config.json").read_text())
    assert config["eos_token_id"] == ([5, 2, 1] if kept == [5, 2] else [2, 1]) and config["temperature"] == 0.5


@pytest.mark.parametrize("form", ["file", "key", "list", "none"])
def test_a_new_template_reaches_every_reader(source, tmp_path, form) -> None:
    (source / "chat_template.jinja").unlink()
    config = json.loads((source / "tokenizer_config.json").read_text())
    if form == "file":
        (source / "chat_template.jinja").write_text("old")
    elif form != "none":
        old = "old" if form == "key" else [{"name": "default", "template": "old"}, {"name": "rag", "template": "x"}]
        write_json(source / "tokenizer_config.json", {**config, "chat_template": old})
    assert source_template(source) == (None if form == "none" else "old")
    path = export(load(source), Handoff(source, chat_template="new"), tmp_path / "run")
    assert source_template(path) == "new"
    loaded = AutoTokenizer.from_pretrained(path).chat_template
    assert loaded == "new" or loaded["default"] == "new"
    held = json.loads((path / "tokenizer_config.json").read_text()).get("chat_template")
    named = [{"name": "default", "template": "new"}, {"name": "rag", "template": "x"}]
    assert held == {"file": None, "none": None, "key": "new", "list": named}[form]


def test_the_proof_sees_stop_tokens_dtypes_and_keys_go_wrong(source, tmp_path) -> None:
    model, handoff = load(source), Handoff(source, eos_token_ids=(2,))
    path = export(model, handoff, tmp_path / "run")
    pieces = {name: piece_of(name, tensor, 0) for name, tensor in named_tensors(model).items()}
    files = plan_export(model, pieces, handoff.layout)
    assert prove_model(path, files, handoff, tied=True)["eos_token_id"] == [2]
    with pytest.raises(CheckpointError, match=r"stops at \[2\] but training ends turns with \[9\]"):
        prove_model(path, files, Handoff(source, eos_token_ids=(9,)), tied=True)
    with pytest.raises(CheckpointError, match=r"float32 .* expected"):
        prove_model(path, plan_export(model, pieces, Handoff(source, dtype=torch.float16).layout), handoff, tied=True)
    del pieces["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"\['model\.norm\.weight'\] differ"):
        prove_model(path, plan_export(model, pieces, handoff.layout), handoff, tied=True)
