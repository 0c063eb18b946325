"""Loading against ``from_pretrained``: bit for bit, on one process and on two, whatever the family and the files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedModel

from fsdpsft.checkpoint.parameters import full, tied_groups
from fsdpsft.errors import ModelError
from fsdpsft.model import load as load_module
from fsdpsft.model.attention import IMPLEMENTATION
from fsdpsft.model.load import build_meta_model, load_model_config, load_tokenizer, load_weights, resolve_model_path
from fsdpsft.testing import run_distributed, save_tiny_model, tiny_model

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {}, "qwen3": {}, "llama": {}, "gemma2": {}, "gemma3_text": {}, "mistral": {}, "phi3": {},
    "gpt2": {}, "qwen2_moe": EXPERTS, "mixtral": EXPERTS,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512},
}  # fmt: skip


def save(folder: Path, family: str, **settings: Any) -> None:
    tiny_model(family, **{**FAMILIES[family], **settings}).save_pretrained(folder, max_shard_size="100KB")


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    model = build_meta_model(load_model_config(folder), dtype=dtype)
    assert all(p.is_meta for p in model.parameters())
    load_weights(model, folder, device="cpu", **options)
    return model.eval()


def assert_same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(full(ours[name]), tensor), name
    assert tied_groups(found) == tied_groups(expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_from_pretrained(tmp_path: Path, family: str, tied: bool) -> None:
    save(tmp_path, family, tie_word_embeddings=tied)
    assert (tmp_path / "model.safetensors.index.json").exists()
    found, expected = load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert bool(tied_groups(found)) == tied
    assert_same(found, expected)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(found(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_frequencies_of_all_kinds(tmp_path: Path, rope: str) -> None:
    save(tmp_path, "llama", rope_parameters=ROPES[rope])
    found = load(tmp_path)
    buffers = [name for name, _ in found.named_buffers()]
    assert "model.rotary_emb.inv_freq" in buffers and "model.rotary_emb.original_inv_freq" in buffers
    assert_same(found, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_casts_while_copying(tmp_path: Path, stored: str, wanted: str) -> None:
    tiny_model("gemma2").to(getattr(torch, stored)).save_pretrained(tmp_path)
    dtype = getattr(torch, wanted)
    assert_same(load(tmp_path, dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))


def _load_sharded(folders: dict[str, str]) -> list[tuple[str, float]]:
    """On each of two processes, for every family: shard, load, compare; return the part of the bytes that was read."""
    read = []
    for family, folder in folders.items():
        config = load_model_config(Path(folder))
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()
        size = sum(t.nbytes for file in Path(folder).glob("*.safetensors") for t in load_file(file).values())
        for shape in ((2,), (1, 2), (2, 1)) if family == "qwen2" else ((2,),):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
            model = build_meta_model(config)
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            count = load_weights(model, Path(folder), device="cpu")
            assert all(isinstance(p, DTensor) for p in model.parameters())
            assert_same(model, expected)
            ids = torch.arange(3, 40)[None]
            assert torch.allclose(model.eval()(ids).logits, expected(ids).logits, atol=1e-6)
            read.append((f"{family}{shape}", count / size))
    return read


def test_two_processes_read_half_each(tmp_path: Path) -> None:
    sizes = {"hidden_size": 60, "intermediate_size": 97, "vocab_size": 385}  # rows that two does not divide
    families = ("qwen2", "qwen3", "llama", "gemma2", "gemma3_text", "mistral", "phi3", "qwen2_moe", "mixtral")
    for family in families:
        settings = {**sizes, "intermediate_size": 96, "num_local_experts": 3} if family == "mixtral" else sizes
        save(tmp_path / family, family, tie_word_embeddings=family in ("qwen2", "gemma2"), **settings)
    results = run_distributed(_load_sharded, 2, {family: str(tmp_path / family) for family in families})
    for first, second in zip(*results, strict=True):
        if "moe" in first[0] or "mixtral" in first[0]:  # experts are read whole
            continue
        assert first[1] + second[1] == pytest.approx(2 if "(2, 1)" in first[0] else 1), first
        assert max(first[1], second[1]) < (1.01 if "(2, 1)" in first[0] else 0.52), first


def test_converted_layouts_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, "mixtral")
    assert any(".experts.0.w1" in name for file in tmp_path.glob("*.safetensors") for name in load_file(file))
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert "24 tensors are stored in another layout" in caplog.text  # 2 layers, 4 experts, 3 matrices


def rewrite(folder: Path, change: Any) -> None:
    """Replace a folder's tensors by ``change`` of them."""
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    save(tmp_path, "qwen2")
    rewrite(tmp_path, lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()})
    assert_same(load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_tied_head_under_either_name(tmp_path: Path) -> None:
    save(tmp_path, "qwen2")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    embedding = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t[embedding].clone()})
    assert_same(load(tmp_path), expected)
    rewrite(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if name != embedding})
    assert_same(load(tmp_path), expected)
    rewrite(tmp_path, lambda t: {**t, embedding: t["lm_head.weight"] + 1})
    with pytest.raises(
        ModelError, match=r"ties model\.embed_tokens\.weight and lm_head\.weight, but the files hold two"
    ):
        load(tmp_path)


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    save(tmp_path, "qwen2", tie_word_embeddings=False)

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["lm_head.weight"]
        tensors["model.norm.weight"] = torch.ones(3)
        return {**tensors, "score.weight": torch.ones(2)}

    rewrite(tmp_path, spoil)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    for part in (
        "do not fit Qwen2ForCausalLM", "missing: lm_head.weight", "unexpected: score.weight",
        "wrong shape: model.norm.weight is [3] in the files, [64] in the model",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_stacked_experts_of_a_wrong_shape(tmp_path: Path) -> None:
    save(tmp_path, "mixtral")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 3}))
    with pytest.raises(ModelError, match=r"gate_up_proj is \[4, 192, 64\], the model's is \[3, 192, 64\]|wrong shape"):
        load(tmp_path)


def test_fewer_layers_than_the_files(tmp_path: Path) -> None:
    save(tmp_path, "qwen2", num_hidden_layers=3)
    config = load_model_config(tmp_path)
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    model = build_meta_model(config)
    with pytest.raises(ModelError, match=r"unexpected: model\.layers\.1"):
        load_weights(model, tmp_path, device="cpu")
    load_weights(model, tmp_path, device="cpu", strict=False)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight)


def test_model_paths(tmp_path: Path) -> None:
    assert resolve_model_path(str(save_tiny_model(tmp_path / "model"))) == tmp_path / "model"
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"no config\.json\. Found: model, notes\.txt"):
        resolve_model_path(str(tmp_path))
    with pytest.raises(ModelError, match="is a file"):
        resolve_model_path(str(tmp_path / "notes.txt"))
    for name in ("nobody/no-such-model", str(tmp_path / "missing" / "model")):
        with pytest.raises(ModelError, match=r"no folder of this name .* as a Hub id it could not be downloaded"):
            resolve_model_path(name)


def test_every_process_may_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None looks in the cache alone: it would not find what another has not finished."""
    asked: list[dict[str, Any]] = []
    folder = save_tiny_model(tmp_path)
    monkeypatch.setattr(load_module, "snapshot_download", lambda repo, **options: asked.append(options) or folder)
    assert resolve_model_path("somebody/some-model") == folder
    assert asked == [{"allow_patterns": list(load_module.ALLOWED_FILES)}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config"}}, "model.trust_remote_code=true"),
        ({"model_type": "mystery"}, "mystery"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForCausalLM is needed"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "CLIPModel; only causal language models"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "only causal language models"),
    ],
)
def test_models_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tiny_model("qwen2").config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=message):
        load_model_config(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "null"])
def test_a_configuration_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        load_model_config(tmp_path)


def test_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.is_fast and tokenizer.eos_token == "<|im_end|>"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: ByT5Tokenizer())
    with pytest.raises(ModelError, match="ByT5Tokenizer is a slow tokenizer"):
        load_tokenizer(tmp_path)
    monkeypatch.undo()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer: none of tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_an_architecture_with_its_own_table_of_attentions_is_refused_by_name(tmp_path):
    folder = save_tiny_model(tmp_path)
    config = CONFIG_MAPPING["gptj"](vocab_size=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"gptj has its own attention code.*another family"):
        build_meta_model(load_model_config(folder), attn_implementation=IMPLEMENTATION)
