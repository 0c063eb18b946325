"""Checkpointing, offload and tiles: same gradients, less memory, no more forward passes than promised."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from fsdpsft.model.block_parts import split
from torch import nn

from fsdpsft.distributed import activation_checkpoint
from fsdpsft.distributed.ulysses import sequence_parallel
from fsdpsft.errors import ConfigError, ModelError
from fsdpsft.model.attention import IMPLEMENTATION, AttentionContext
from fsdpsft.model.attention_backends import attend_sdpa
from fsdpsft.model.lora import LoraSettings, apply_lora, fill_adapters
from fsdpsft.testing import PeakMemory, run_distributed, tiny_model

SEQLENS = (30, 50, 48)
SEQLENS_BYTES = sum(SEQLENS) * 64 * 4  # one block's input
VARIANTS = {
    "selective": {"mode": "selective", "split": split},
    "selective, whole blocks": {"mode": "selective"},
    "full": {"mode": "full"},
    "full+offload": {"mode": "full", "offload": True, "split": split},
    "full+offload, whole blocks": {"mode": "full", "offload": True},
    "selective+offload": {"mode": "selective", "offload": True, "split": split},
    "tiles": {"mode": "none", "mlp_tiles": 4, "split": split},
    "selective+tiles": {"mode": "selective", "mlp_tiles": 4, "split": split},
    "full+tiles": {"mode": "full", "mlp_tiles": 4, "split": split},
    "full+tiles, children": {"mode": "full", "mlp_tiles": 4},
    "full+tiles+offload": {"mode": "full", "mlp_tiles": 4, "offload": True, "split": split},
}


def build(family: str = "qwen2", **changes):
    model = tiny_model(family, **changes)
    model.set_attn_implementation(IMPLEMENTATION)
    return model.train()


def step(model, attend=attend_sdpa) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    total = sum(SEQLENS)
    bounds = torch.tensor([0, *SEQLENS]).cumsum(0).to(torch.int32)
    ids = torch.randint(384, (1, total), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in SEQLENS])[None]
    context = AttentionContext(bounds, SEQLENS, max(SEQLENS), attend)
    states = model.model(
        input_ids=ids, position_ids=positions, attention_context=context, use_cache=False
    ).last_hidden_state
    states.square().sum().backward()
    return states.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "qwen2_moe"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_without(family, variant):
    settings = VARIANTS[variant]
    plain = build(family)
    expected_states, expected = step(plain)
    model = build(family)
    if family == "qwen2_moe" and "mlp_tiles" in settings:
        with pytest.raises(ModelError, match=r"plain MLP in each block; Qwen2MoeDecoderLayer has a mixture of experts"):
            activation_checkpoint.apply(model.model.layers, **settings)
        return
    activation_checkpoint.apply(model.model.layers, **settings)
    assert list(model.state_dict()) == list(plain.state_dict())
    states, found = step(model)
    assert found.keys() == expected.keys()
    tolerance = 3e-5 if "mlp_tiles" in settings else 0.0  # tiles round their products differently
    torch.testing.assert_close(states, expected_states, rtol=0, atol=tolerance)
    for name, gradient in found.items():
        scale = max(1.0, expected[name].abs().max().item())
        assert (gradient - expected[name]).abs().max() <= tolerance * scale, name


def test_dropout_draws_the_same_numbers_again():
    results = []
    for mode in ("none", "selective", "full"):
        model = build(attention_dropout=0.3)
        activation_checkpoint.apply(model.model.layers, mode, split=split)
        torch.manual_seed(5)
        results.append(step(model)[1])
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name])
        assert torch.equal(gradient, results[2][name])


def peak_of(**settings) -> int:
    model = build(num_hidden_layers=4, intermediate_size=512)
    activation_checkpoint.apply(model.model.layers, **settings)
    with PeakMemory() as memory:
        step(model)
    return memory.peak - sum(p.numel() * 4 for p in model.model.parameters())  # gradients are there at the end


def test_peak_memory_counts_what_lives_at_one_time():
    with PeakMemory() as memory:
        kept = torch.zeros(1000)
        for _ in range(3):
            (torch.zeros(500) + 1).view(2, 250)
        kept[:10].add_(1)
    assert (memory.peak, memory.live) == (4 * 2000, 4 * 1000)


def test_each_mode_needs_less_memory_than_the_one_before():
    none, selective, full = (peak_of(mode=mode, split=split) for mode in ("none", "selective", "full"))
    assert selective < 0.7 * none
    assert full < 0.75 * selective
    tiled = peak_of(mode="full", mlp_tiles=8, split=split)
    assert tiled < full
    assert selective < peak_of(mode="selective")
    assert tiled < peak_of(mode="full", mlp_tiles=8)
    # On CPU, a copy in host memory stands in for the original: no more than without, and freed as soon.
    assert peak_of(mode="full", offload=True) <= full + SEQLENS_BYTES


def kept_by_selective(monkeypatch, model) -> list[tuple[str, int]]:
    """What selective checkpointing keeps of each unit beyond its input: operator and numbers a token."""
    kept = []
    forget = activation_checkpoint._forget_last

    def watched(results, output):
        forget(results, output)
        for func, result in results:
            tensor = result[0] if isinstance(result, tuple) else result
            kept.append((func.__name__.split(".")[0], tensor.numel() // sum(SEQLENS)))

    monkeypatch.setattr(activation_checkpoint, "_forget_last", watched)
    activation_checkpoint.apply(model.model.layers, "selective", split=split)
    step(model)
    return kept


ATTENTION = [("_scaled_dot_product_flash_attention_for_cpu", n * 64 // sum(SEQLENS)) for n in SEQLENS]


def test_selective_keeps_what_it_says(monkeypatch):
    """Queries, keys, values and attention's output, each document's; gate and up; the last product of neither."""
    kept = kept_by_selective(monkeypatch, build(num_hidden_layers=1))
    products = [("addmm", 64), ("addmm", 32), ("addmm", 32)]
    assert kept == [*products, *ATTENTION, ("mm", 96), ("mm", 96)]


def test_selective_keeps_one_wide_result_of_an_adapted_layer(monkeypatch):
    """The base's product and the adapter's narrow one; what the adapter adds is made again, the same to the bit."""
    model = build(num_hidden_layers=1, intermediate_size=128)
    apply_lora(model, LoraSettings(rank=4, alpha=8, target_modules=["up_proj"]))
    fill_adapters(model, seed=0)
    model.enable_input_require_grads()
    kept = kept_by_selective(monkeypatch, model)
    assert kept[-3:] == [("mm", 128), ("mm", 128), ("mm", 4)]  # gate, up, and A's for up


def test_each_half_is_recomputed_when_its_own_turn_comes():
    """Backward: MLP again, MLP's gradients, and only then attention again."""
    model, seen = build(num_hidden_layers=1), []
    layer = model.model.layers[0]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        module = layer.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
        module.register_full_backward_hook(lambda *_, name=name: seen.append(f"{name} back"))
    activation_checkpoint.apply(model.model.layers, "selective", split=split)
    step(model)
    backward = seen[4:]
    assert backward.index("mlp.gate_proj back") < backward.index("self_attn.q_proj")


def test_with_adapters_selective_repeats_only_narrow_products():
    results = {}
    for mode in ("none", "selective"):
        model = build()
        apply_lora(model, LoraSettings(rank=4, alpha=8))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        model.enable_input_require_grads()
        activation_checkpoint.apply(model.model.layers, mode, split=split)
        with Operators() as operators:
            states, gradients = step(model)
        results[mode] = states, gradients, operators.counts
    (states, gradients, counts), (expected_states, expected, least) = results["selective"], results["none"]
    assert torch.equal(states, expected_states)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert counts["mm"] == least["mm"] + 2 * 3  # of query, gate and up, what adapters add: products of 4 terms


def count_calls(model: nn.Module, kind: str) -> list[int]:
    calls = []
    for name, module in model.named_modules():
        if name.endswith(kind):
            module.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    return calls


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"mode": "none"}, 1),
        ({"mode": "full"}, 2),
        ({"mode": "none", "mlp_tiles": 4, "split": split}, 2),
        ({"mode": "full", "mlp_tiles": 4, "split": split}, 2),
    ],
)
def test_the_mlp_runs_at_most_twice(settings, tokens):
    model = build(num_hidden_layers=1)
    calls = count_calls(model, "mlp.gate_proj")
    activation_checkpoint.apply(model.model.layers, **settings)
    step(model)
    assert sum(calls) == tokens * sum(SEQLENS)
    assert max(calls) == sum(SEQLENS) // settings.get("mlp_tiles", 1)


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def counted(**settings) -> dict[str, int]:
    model = build()
    activation_checkpoint.apply(model.model.layers, **settings)
    with Operators() as operators:
        step(model)
    return operators.counts


def test_selective_repeats_no_product_and_no_attention():
    none, selective, full = (counted(mode=mode, split=split) for mode in ("none", "selective", "full"))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for name in ("mm", "addmm", attention):
        assert selective.get(name, 0) == none.get(name, 0)
    assert selective["rsqrt"] > none["rsqrt"]
    assert full[attention] == 2 * none[attention]


def test_offload_copies_each_input_but_the_last_to_the_host(monkeypatch):
    rests = []
    pack = activation_checkpoint.HostRest._pack

    def watched(self, tensor):
        kept = pack(self, tensor)
        if kept is not tensor:
            rests.append(tensor.shape)
        return kept

    monkeypatch.setattr(activation_checkpoint.HostRest, "_pack", watched)
    model = build(num_hidden_layers=4)
    activation_checkpoint.apply(model.model.layers, "full", offload=True)
    step(model)
    assert rests == [(1, sum(SEQLENS), 64)] * 3
    parts = build(num_hidden_layers=2)
    activation_checkpoint.apply(parts.model.layers, "full", offload=True, split=split)
    step(parts)
    assert rests == [(1, sum(SEQLENS), 64)] * 6  # attention and MLP of two blocks, but for the last
    del rests[3:]
    with torch.no_grad():
        model.model(
            input_ids=torch.arange(4)[None], use_cache=False,
            attention_context=AttentionContext(torch.tensor([0, 4], dtype=torch.int32), (4,), 4, attend_sdpa),
        )  # fmt: skip
    assert len(rests) == 3


@pytest.mark.parametrize("settings", [{"mode": "full"}, {"mode": "selective", "split": split}], ids=str)
def test_offload_holds_no_input_on_the_device(monkeypatch, settings):
    inputs = []
    pack = activation_checkpoint.HostRest._pack

    def watched(self, tensor):
        kept = pack(self, tensor)
        if kept is not tensor:
            inputs.append(weakref.ref(tensor.untyped_storage()))
        return kept

    monkeypatch.setattr(activation_checkpoint.HostRest, "_pack", watched)
    model = build(num_hidden_layers=4)
    activation_checkpoint.apply(model.model.layers, offload=True, **settings)
    ids, bounds = torch.arange(12)[None], torch.tensor([0, 12], dtype=torch.int32)
    states = model.model(
        input_ids=ids, attention_context=AttentionContext(bounds, (12,), 12, attend_sdpa), use_cache=False
    )
    assert len(inputs) >= 3
    assert [reference() for reference in inputs] == [None] * len(inputs)
    del states


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigError, match="activation_offload=true"):
        activation_checkpoint.apply([nn.Linear(2, 2)], "none", offload=True)
    with pytest.raises(ModelError, match=r"model.mlp_tiles=4 needs a plain MLP in each block; Sequential has only"):
        activation_checkpoint.apply([nn.Sequential(nn.Linear(2, 2))], "full", mlp_tiles=4)


def run_with_ulysses(mode: str) -> tuple[bool, dict[str, int]]:
    """Gradients of this rank's slice with and without checkpointing, both under Ulysses; counts of the first."""
    rank, size = dist.get_rank(), dist.get_world_size()
    attend = sequence_parallel(attend_sdpa, dist.group.WORLD)
    results, counts = [], {}
    for applied in ("none", mode):
        model = build()
        activation_checkpoint.apply(model.model.layers, applied, split=split)
        total, bounds = sum(SEQLENS), torch.tensor([0, *SEQLENS]).cumsum(0).to(torch.int32)
        ids = torch.randint(384, (1, total), generator=torch.Generator().manual_seed(0)).chunk(size, dim=1)[rank]
        positions = torch.cat([torch.arange(n) for n in SEQLENS])[None].chunk(size, dim=1)[rank]
        with Operators() as operators:
            model.model(
                input_ids=ids, position_ids=positions, use_cache=False,
                attention_context=AttentionContext(bounds, SEQLENS, max(SEQLENS), attend),
            ).last_hidden_state.square().sum().backward()  # fmt: skip
        results.append([p.grad for p in model.model.parameters()])
        counts[applied] = operators.counts["all_to_all_single"]
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True)), counts


def run_modes_with_ulysses() -> list[tuple[bool, dict[str, int]]]:
    return [run_with_ulysses(mode) for mode in ("selective", "full")]


def test_under_ulysses_selective_repeats_no_exchange():
    layers = 2
    for selective, full in run_distributed(partial(run_modes_with_ulysses), 2):
        assert selective == (True, {"none": 4 * layers, "selective": 4 * layers})
        # A block's two exchanges in its forward pass, its recomputation and its backward pass.
        assert full == (True, {"none": 4 * layers, "full": 6 * layers})
