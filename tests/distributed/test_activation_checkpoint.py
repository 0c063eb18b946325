"""Checkpointing, offload and tiles: same gradients, less memory, no more forward passes than promised."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fsdpsft.distributed import activation_checkpoint
from fsdpsft.distributed.activation_checkpoint import HostOffload, Recomputation, apply
from fsdpsft.distributed.ulysses import sequence_parallel
from fsdpsft.errors import ConfigError, ModelError
from fsdpsft.model.attention import IMPLEMENTATION, AttentionContext
from fsdpsft.model.attention_backends import attend_sdpa
from fsdpsft.model.lora import LoraSettings, apply_lora, fill_adapters
from fsdpsft.testing import PeakMemory, run_distributed, tiny_model

SEQLENS = (30, 50, 48)
SEQLENS_BYTES = sum(SEQLENS) * 64 * 4  # one block's input
VARIANTS = {
    "selective": {"mode": "selective"},
    "full": {"mode": "full"},
    "full+offload": {"mode": "full", "offload": True},
    "selective+offload": {"mode": "selective", "offload": True},
    "tiles": {"mode": "none", "mlp_tiles": 4},
    "selective+tiles": {"mode": "selective", "mlp_tiles": 4},
    "full+tiles": {"mode": "full", "mlp_tiles": 4},
    "full+tiles+offload": {"mode": "full", "mlp_tiles": 4, "offload": True},
}
MIXTURE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {  # some write in place, some share weights, gate, cap or route
    "qwen2": {}, "gemma2": {"attn_logit_softcapping": 20.0}, "gemma3_text": {}, "phi3": {}, "olmo": {"clip_qkv": 0.1},
    "gpt_oss": MIXTURE, "qwen2_moe": MIXTURE, "mixtral": {**MIXTURE, "sliding_window": None}, "granite": {},
    "cohere": {}, "olmo2": {}, "starcoder2": {}, "diffllama": {}, "apertus": {}, "glm4": {}, "helium": {},
}  # fmt: skip


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_without(family, variant):
    settings, changes = Recomputation(**VARIANTS[variant]), FAMILIES[family]
    plain = build(family, **changes)
    expected_states, expected = step(plain)
    model = build(family, **changes)
    if settings.mlp_tiles > 1 and changes.items() >= MIXTURE.items():
        with pytest.raises(ModelError, match=r"plain MLP in each block; .*DecoderLayer has a mixture of experts"):
            apply(model.model.layers, settings)
        return
    apply(model.model.layers, settings)
    assert list(model.state_dict()) == list(plain.state_dict())
    states, found = step(model)
    assert found.keys() == expected.keys()
    tolerance = 3e-5 if settings.mlp_tiles > 1 else 0.0  # tiles round their products differently
    torch.testing.assert_close(states, expected_states, rtol=0, atol=tolerance)
    for name, gradient in found.items():
        scale = max(1.0, expected[name].abs().max().item())
        assert (gradient - expected[name]).abs().max() <= tolerance * scale, name


class Unseen(torch.autograd.Function):
    """A kernel that torch does not see: it doubles what it is given in place, and no version counter moves."""

    @staticmethod
    def forward(ctx, x):
        x.detach().numpy()[...] *= 2
        return x.view(x.shape)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


WRITERS = {
    "clamp": lambda q: q.clamp_(-0.3, 0.3),
    "through a view": lambda q: (q.view(-1)[:100].mul_(3.0), q)[1],
    "several at once": lambda q: (torch._foreach_mul_([q], 3.0), q)[1],
    "a foreign kernel": Unseen.apply,
}


class InPlace(nn.Module):
    """Two products, with something between them that writes in place."""

    def __init__(self, write) -> None:
        super().__init__()
        self.first, self.second, self.write = nn.Linear(64, 64), nn.Linear(64, 64), write

    def forward(self, x):
        return x + self.second(torch.tanh(self.write(self.first(x))))


def gradients_of(blocks, mode, after=lambda x: x) -> list[torch.Tensor]:
    apply(blocks, Recomputation(mode))
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    states = x
    for block in blocks:
        states = after(block(states))
    states.square().sum().backward()
    return [x.grad, *(p.grad for p in blocks.parameters())]


def in_place_blocks(write, compiled: bool = False) -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = nn.ModuleList([InPlace(write), InPlace(write)])
    for block in blocks if compiled else ():
        block.forward = torch.compile(block.forward, backend="aot_eager")
    return blocks


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("write", WRITERS)
def test_what_is_kept_cannot_be_written_to(write, compiled):
    expected = gradients_of(in_place_blocks(WRITERS[write]), "none")
    for mode in ("selective", "full"):
        found = gradients_of(in_place_blocks(WRITERS[write], compiled), mode)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), mode


@pytest.mark.parametrize("write", ["clamp", "through a view", "a foreign kernel"])
def test_without_the_copy_gradients_would_be_wrong(write, monkeypatch):
    """What the tests above rest on: the writers do spoil what is kept where nothing moves it away."""
    expected = gradients_of(in_place_blocks(WRITERS[write]), "none")
    monkeypatch.setattr(activation_checkpoint._Keep, "protect", lambda self, given: None)
    monkeypatch.setattr(activation_checkpoint, "_detached", torch.Tensor.detach)  # no version counter either
    found = gradients_of(in_place_blocks(WRITERS[write]), "selective")
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) > 0.1


class Product(nn.Module):
    """Returns what it keeps, and hands it to whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        self.made = self.linear(x)
        return torch.tanh(self.made) if self.training else self.made


def test_what_a_unit_returns_may_be_written_to():
    results = []
    for mode in ("none", "selective"):
        torch.manual_seed(0)
        results.append(gradients_of(nn.ModuleList([Product(), Product()]).eval(), mode, lambda x: x.mul_(2.0)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_write_after_the_block_is_an_error():
    blocks = nn.ModuleList([Product()])

    def after(x):
        with torch.no_grad():
            blocks[0].made.zero_()
        return x

    with pytest.raises(ModelError, match=r"was written to after its block had ended.*checkpointing=full or none"):
        gradients_of(blocks, "selective", after)


def test_nothing_is_copied_where_nothing_writes():
    model = build()
    apply(model.model.layers, Recomputation("selective"))
    plain = build()
    with Operators() as expected:
        step(plain)
    with Operators() as operators:
        step(model)
    assert operators.counts.get("clone", 0) == expected.counts.get("clone", 0)


def test_foreign_functions_are_watched_inside_blocks_alone():
    model = build()
    apply(model.model.layers, Recomputation("selective"))
    step(model)
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)
    assert activation_checkpoint._watching is None


def test_dropout_draws_the_same_numbers_again():
    results = []
    for mode in ("none", "selective", "full"):
        model = build(attention_dropout=0.3)
        apply(model.model.layers, Recomputation(mode))
        torch.manual_seed(5)
        results.append(step(model)[1])
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name])
        assert torch.equal(gradient, results[2][name])


def peak_of(**settings) -> int:
    model = build(num_hidden_layers=4, intermediate_size=512)
    apply(model.model.layers, Recomputation(**settings))
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
    none, selective, full = (peak_of(mode=mode) for mode in ("none", "selective", "full"))
    assert selective < 0.7 * none
    assert full < 0.75 * selective
    assert peak_of(mode="full", mlp_tiles=8) < full
    # On CPU, a copy in host memory stands in for the original: no more than without, and freed as soon.
    assert peak_of(mode="full", offload=True) <= full + SEQLENS_BYTES


def kept_by_selective(monkeypatch, model) -> list[tuple[str, int]]:
    """What selective checkpointing keeps of each unit beyond its input: operator and numbers a token."""
    kept = []
    release = activation_checkpoint._Keep.release

    def watched(self, output):
        release(self, output)
        for each in self.results:
            if each.result is None:
                continue
            tensor = each.result[0] if isinstance(each.result, tuple) else each.result
            kept.append((each.op.__name__.split(".")[0], tensor.numel() // sum(SEQLENS)))

    monkeypatch.setattr(activation_checkpoint._Keep, "release", watched)
    apply(model.model.layers, Recomputation("selective"))
    step(model)
    return kept


ATTENTION = [("_scaled_dot_product_flash_attention_for_cpu", n * 64 // sum(SEQLENS)) for n in SEQLENS]


def test_selective_keeps_what_it_says(monkeypatch):
    """Queries, keys, values, attention's output of each document and its product; gate and up."""
    kept = kept_by_selective(monkeypatch, build(num_hidden_layers=1))
    products = [("addmm", 64), ("addmm", 32), ("addmm", 32)]
    assert kept == [*products, *ATTENTION, ("mm", 64), ("mm", 96), ("mm", 96)]


def test_selective_keeps_one_wide_result_of_an_adapted_layer(monkeypatch):
    """The base's product and the adapter's narrow one; what the adapter adds is made again, the same to the bit."""
    model = build(num_hidden_layers=1, intermediate_size=128)
    apply_lora(model, LoraSettings(rank=4, alpha=8, target_modules=["up_proj"]))
    fill_adapters(model, seed=0)
    model.enable_input_require_grads()
    kept = kept_by_selective(monkeypatch, model)
    assert kept[-3:] == [("mm", 128), ("mm", 128), ("mm", 4)]  # gate, up, and A's for up


def test_with_adapters_selective_repeats_only_narrow_products():
    results = {}
    for mode in ("none", "selective"):
        model = build()
        apply_lora(model, LoraSettings(rank=4, alpha=8))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        model.enable_input_require_grads()
        apply(model.model.layers, Recomputation(mode))
        with Operators() as operators:
            states, gradients = step(model)
        results[mode] = states, gradients, operators.counts
    (states, gradients, counts), (expected_states, expected, least) = results["selective"], results["none"]
    assert torch.equal(states, expected_states)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert counts["mm"] == least["mm"] + 2 * 4  # of query, output, gate and up, what adapters add: products of 4 terms


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
        ({"mode": "none", "mlp_tiles": 4}, 2),
        ({"mode": "full", "mlp_tiles": 4}, 2),
    ],
)
def test_the_mlp_runs_at_most_twice(settings, tokens):
    model = build(num_hidden_layers=1)
    calls = count_calls(model, "mlp.gate_proj")
    apply(model.model.layers, Recomputation(**settings))
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
    apply(model.model.layers, Recomputation(**settings))
    with Operators() as operators:
        step(model)
    return operators.counts


def test_selective_repeats_no_product_and_no_attention():
    none, selective, full = (counted(mode=mode) for mode in ("none", "selective", "full"))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for name in ("mm", "addmm", attention):
        assert selective.get(name, 0) == none.get(name, 0)
    assert selective["rsqrt"] > none["rsqrt"]
    assert full[attention] == 2 * none[attention]


def test_offload_copies_each_input_but_the_last_to_the_host(monkeypatch):
    rests = []
    pack = HostOffload._pack

    def watched(self, tensor):
        kept = pack(self, tensor)
        if kept is not tensor:
            rests.append(tensor.shape)
        return kept

    monkeypatch.setattr(HostOffload, "_pack", watched)
    model = build(num_hidden_layers=4)
    apply(model.model.layers, Recomputation("full", offload=True))
    step(model)
    assert rests == [(1, sum(SEQLENS), 64)] * 3
    with torch.no_grad():
        model.model(
            input_ids=torch.arange(4)[None], use_cache=False,
            attention_context=AttentionContext(torch.tensor([0, 4], dtype=torch.int32), (4,), 4, attend_sdpa),
        )  # fmt: skip
    assert len(rests) == 3


@pytest.mark.parametrize("settings", [{"mode": "full"}, {"mode": "selective"}], ids=str)
def test_offload_holds_no_input_on_the_device(monkeypatch, settings):
    inputs = []
    pack = HostOffload._pack

    def watched(self, tensor):
        kept = pack(self, tensor)
        if kept is not tensor:
            inputs.append(weakref.ref(tensor.untyped_storage()))
        return kept

    monkeypatch.setattr(HostOffload, "_pack", watched)
    model = build(num_hidden_layers=4)
    apply(model.model.layers, Recomputation(offload=True, **settings))
    ids, bounds = torch.arange(12)[None], torch.tensor([0, 12], dtype=torch.int32)
    states = model.model(
        input_ids=ids, attention_context=AttentionContext(bounds, (12,), 12, attend_sdpa), use_cache=False
    )
    assert len(inputs) >= 3
    assert [reference() for reference in inputs] == [None] * len(inputs)
    del states


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigError, match="activation_offload=true"):
        apply([nn.Linear(2, 2)], Recomputation("none", offload=True))
    with pytest.raises(ModelError, match=r"model.mlp_tiles=4 needs a plain MLP in each block; Sequential has only"):
        apply([nn.Sequential(nn.Linear(2, 2))], Recomputation("full", mlp_tiles=4))


def run_with_ulysses(mode: str) -> tuple[bool, dict[str, int]]:
    """Gradients of this rank's slice with and without checkpointing, both under Ulysses; counts of the first."""
    rank, size = dist.get_rank(), dist.get_world_size()
    attend = sequence_parallel(attend_sdpa, dist.group.WORLD)
    results, counts = [], {}
    for applied in ("none", mode):
        model = build()
        apply(model.model.layers, Recomputation(applied))
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
