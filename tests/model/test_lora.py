"""Adapters against peft itself and against plain matrix products; merged, written and read again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from fsdpsft.checkpoint.parameters import is_adapter, tied_groups
from fsdpsft.errors import ConfigError, ModelError
from fsdpsft.model.head import head_of, prove_head
from fsdpsft.model.load import build_meta_model, load_model_config, load_weights
from fsdpsft.model.lora import (
    LoraSettings,
    adapter_config,
    adapter_state,
    add_updates_by_product,
    apply_lora,
    fill_adapters,
    merged_state,
)
from fsdpsft.testing import run_distributed, tiny_model

IDS = torch.arange(3, 40)[None]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "regex": {"target_modules": r".*layers\.1\..*(q|down)_proj", "exclude_modules": r".*down_proj"},
    "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"]},
}


def settings(**changes: Any) -> LoraSettings:
    return LoraSettings(**{"rank": 4, "alpha": 8.0, **changes})


def adapted(folder: Path, adapter: Path | None = None, shard: Any = None, **changes: Any) -> PreTrainedModel:
    model = build_meta_model(load_model_config(folder))
    apply_lora(model, settings(**changes), adapter)
    if shard is not None:
        shard(model)
    load_weights(model, folder, device="cpu")
    fill_adapters(model, seed=1, adapter_path=adapter)
    return model.eval()


def disturb(model: PreTrainedModel) -> None:
    """Move everything trainable away from its first value, as training would; the same for any sharding."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(noise)


def write_adapter(model: PreTrainedModel, folder: Path, base: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(adapter_state(model)), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(model, str(base))))


def merged_model(model: PreTrainedModel, base: Path) -> PreTrainedModel:
    plain = AutoModelForCausalLM.from_pretrained(base)
    state = dict(merged_state(model))
    result = plain.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {name for group in tied_groups(plain) for name in group[1:]}
    return plain.eval()


def close_to_peft(pefts: torch.Tensor, ours: torch.Tensor, *, dora: bool) -> None:
    """The same to the bit where the layers are peft's own (DoRA); ours add an update within its product."""
    torch.testing.assert_close(pefts, ours, rtol=0 if dora else 1e-5, atol=0 if dora else 1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_start_merge_and_reload(tmp_path: Path, variant: str, tied: bool) -> None:
    base = tiny_model("qwen2", tie_word_embeddings=tied)
    base.save_pretrained(tmp_path)
    model = adapted(tmp_path, **VARIANTS[variant])
    torch.testing.assert_close(model(IDS).logits, base.eval()(IDS).logits)
    disturb(model)
    logits = model(IDS).logits
    assert (logits - base(IDS).logits).abs().max() > 1e-3
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(merged_model(model, tmp_path)(IDS).logits, logits, rtol=1e-4, atol=2e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    write_adapter(model, tmp_path / "adapter", tmp_path)
    reopened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter").eval()
    close_to_peft(reopened(IDS).logits, logits, dora=variant == "dora")
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert names == set(get_peft_model_state_dict(reopened))
    continued = adapted(tmp_path, tmp_path / "adapter", rank=0)
    assert torch.equal(continued(IDS).logits, logits)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2", "qwen2_moe", "mixtral"])
@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_families(tmp_path: Path, family: str, dora: bool) -> None:
    experts = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    base = tiny_model(family, **(experts if family in ("qwen2_moe", "mixtral") else {}))
    base.save_pretrained(tmp_path)
    model = adapted(tmp_path, use_dora=dora)
    disturb(model)
    logits = model(IDS).logits
    torch.testing.assert_close(merged_model(model, tmp_path)(IDS).logits, logits, rtol=1e-4, atol=2e-6)
    write_adapter(model, tmp_path / "adapter", tmp_path)
    reopened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter").eval()
    close_to_peft(reopened(IDS).logits, logits, dora=dora)


@torch.no_grad()
def test_one_layer_by_hand(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    for use_rslora, scale in ((False, 8 / 4), (True, 8 / 2)):
        model = adapted(tmp_path, use_rslora=use_rslora, use_dora=True)
        disturb(model)
        layer = model.model.layers[0].mlp.up_proj
        moved = layer.base_layer.weight + scale * layer.lora_B.default.weight @ layer.lora_A.default.weight
        magnitudes = layer.lora_magnitude_vector.default.weight
        by_hand = torch.stack([m * row / row.square().sum().sqrt() for m, row in zip(magnitudes, moved, strict=True)])
        torch.testing.assert_close(dict(merged_state(model))["model.layers.0.mlp.up_proj.weight"], by_hand)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"dropout": 0.5}])
def test_an_adapted_layer_does_what_pefts_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    model = adapted(tmp_path, **changes).train()
    disturb(model)
    add_updates_by_product(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert "forward" in vars(layer)
    found = {}
    for name, forward in (("ours", layer.forward), ("peft's", lambda x: type(layer).forward(layer, x))):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3), requires_grad=True)
        torch.manual_seed(4)
        output = forward(x)
        output.square().sum().backward()
        down, up = layer.lora_A.default.weight, layer.lora_B.default.weight
        found[name] = [output.detach(), x.grad, down.grad, up.grad]
        down.grad = up.grad = None
    for ours, pefts in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, pefts, rtol=1e-5, atol=1e-5)


def test_an_adapted_layer_takes_inputs_of_the_base_s_precision(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    model = build_meta_model(load_model_config(tmp_path), dtype=torch.bfloat16)
    apply_lora(model, settings())
    load_weights(model, tmp_path, device="cpu")
    fill_adapters(model, seed=0)
    add_updates_by_product(model)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(1, 5, 64, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), type(layer).forward(layer, x))


def test_what_is_trained_and_in_which_dtype(tmp_path: Path) -> None:
    tiny_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path)
    model = build_meta_model(load_model_config(tmp_path), dtype=torch.bfloat16)
    apply_lora(model, settings(modules_to_save=["lm_head"], use_dora=True))
    load_weights(model, tmp_path, device="cpu")
    assert all(p.isnan().all() for name, p in model.named_parameters() if is_adapter(name))  # cannot be forgotten
    fill_adapters(model, seed=0)
    for name, parameter in model.named_parameters():
        trained = is_adapter(name) or "modules_to_save" in name
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
        assert not parameter.isnan().any()
    assert sum(is_adapter(name) for name, _ in model.named_parameters()) == 2 * 7 * 3  # layers, linears, A B and m


def test_first_values(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    model = adapted(tmp_path, rank=16, use_dora=True)
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    for layer in layers.values():
        down = layer.lora_A.default.weight
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.9 * bound < down.abs().max() <= bound
        assert down.mean().abs() < 4 * bound / math.sqrt(3 * down.numel())  # four standard errors
        assert not layer.lora_B.default.weight.any()
        torch.testing.assert_close(layer.lora_magnitude_vector.default.weight, layer.weight.norm(dim=1))
    draws = [layer.lora_A.default.weight.flatten()[:8] for layer in layers.values()]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(layers)  # each its own


def test_embeddings_stay_tied(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    for saved in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]):
        model = adapted(tmp_path, modules_to_save=saved)
        weight = model.get_input_embeddings().weight
        assert head_of(model).weight is weight and weight.requires_grad
        prove_head(model)
        assert "lm_head.weight" not in dict(merged_state(model))


def _sharded(folder: str) -> dict[str, Any]:
    """Adapters on two processes: their values, logits and exports."""
    mesh = init_device_mesh("cpu", (2,))

    def shard(model: PreTrainedModel) -> None:
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    results: dict[str, Any] = {}
    for variant, changes in VARIANTS.items():
        adapter = Path(folder) / "adapter" / variant
        model = adapted(Path(folder), shard=shard, rank=3, **changes)
        first = dict(adapter_state(model))
        continued = adapted(Path(folder), adapter, shard=shard, rank=0, **changes)
        results[variant] = {
            "first": first, "adapter": dict(adapter_state(continued)), "merged": dict(merged_state(continued)),
            "logits": continued(IDS).logits.detach(),
        }  # fmt: skip
    return results


@torch.no_grad()
def test_two_processes(tmp_path: Path) -> None:
    tiny_model("qwen2", hidden_size=60, intermediate_size=97, vocab_size=385).save_pretrained(tmp_path)
    expected: dict[str, Any] = {}
    for variant, changes in VARIANTS.items():
        model = adapted(tmp_path, rank=3, **changes)  # a rank that two does not divide
        expected[variant] = {"first": dict(adapter_state(model))}
        disturb(model)
        write_adapter(model, tmp_path / "adapter" / variant, tmp_path)
        state = {
            "adapter": dict(adapter_state(model)),
            "merged": dict(merged_state(model)),
            "logits": model(IDS).logits,
        }
        expected[variant].update(state)
    for results in run_distributed(_sharded, 2, str(tmp_path)):
        for variant, parts in expected.items():
            for part in ("first", "adapter"):
                assert list(results[variant][part]) == list(parts[part])
                for name, tensor in parts[part].items():
                    assert torch.equal(results[variant][part][name], tensor), (variant, part, name)
            torch.testing.assert_close(results[variant]["merged"], parts["merged"])
            torch.testing.assert_close(results[variant]["logits"], parts["logits"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank": 0}, ConfigError, "model.lora_rank=0 must be positive"),
        ({"rank": -4}, ConfigError, "model.lora_rank=-4 must be positive"),
        ({"target_modules": ["q_proj", "query"]}, ConfigError,
         "model.target_modules: 'query' matches no module .* down_proj, gate_proj, k_proj, lm_head, o_proj"),
        ({"target_modules": r".*\.query"}, ConfigError, "matches no module"),
        ({"target_modules": "("}, ConfigError, "not a regular expression"),
        ({"exclude_modules": ["kproj"]}, ConfigError, "model.exclude_modules: 'kproj' matches no module"),
        ({"modules_to_save": ["embeddings"]}, ConfigError, "model.modules_to_save: 'embeddings' .* embed_tokens"),
        ({"target_modules": ["embed_tokens"]}, ConfigError, "matches no module"),
        ({"target_modules": ["lm_head"]}, ModelError, "model.modules_to_save"),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build_meta_model(tiny_model("qwen2", tie_word_embeddings=False).config)
    with pytest.raises(error, match=message):
        apply_lora(model, settings(**changes))


def test_quantised_base_refused() -> None:
    model = build_meta_model(tiny_model("qwen2").config)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="quantised"):
        apply_lora(model, settings())


def test_tie_that_peft_would_break() -> None:
    model = build_meta_model(tiny_model("gpt2").config)
    with pytest.raises(ModelError, match="ties its head to its embeddings"):
        apply_lora(model, settings(modules_to_save=["wte"]))


def test_adapters_that_cannot_be_gone_on_from(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_model("qwen2").save_pretrained(base)
    with pytest.raises(ModelError, match="no such folder"):
        adapted(base, folder)
    write_adapter(adapted(base), folder, base)
    with pytest.raises(ConfigError, match=r"model\.lora_rank=8, but the adapter in .* has rank 4"):
        adapted(base, folder, rank=8)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    spoiled = {**tensors, name: torch.ones(3, 3), "base_model.model.other": torch.ones(1)}
    spoiled.pop(list(tensors)[1])
    save_file(spoiled, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError) as caught:
        adapted(base, folder)
    for part in ("is missing", "base_model.model.other is not in the model", "is [3, 3], not [4, "):
        assert part in str(caught.value)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    with pytest.raises(ModelError, match="adapters with bias=all are not supported"):
        adapted(base, folder)


@torch.no_grad()
def test_goes_on_from_an_adapter_of_peft(tmp_path: Path) -> None:
    base = tiny_model("llama")
    base.save_pretrained(tmp_path)
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, use_rslora=True
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(adapted(tmp_path, tmp_path / "theirs")(IDS).logits, theirs(IDS).logits)
