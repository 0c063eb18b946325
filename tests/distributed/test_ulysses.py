"""Ulysses: equal to one process in outputs and gradients, also for uneven heads; cost equal to its formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fsdpsft.batch import IGNORE_INDEX, Sample, pack
from fsdpsft.distributed.ulysses import balanced_bounds, head_plan, sequence_parallel, shard, spread
from fsdpsft.errors import ConfigError
from fsdpsft.model.attention import IMPLEMENTATION, AttentionContext, AttentionSpec
from fsdpsft.model.attention_backends import attend_sdpa
from fsdpsft.testing import run_distributed, tiny_model

HEADS = [(4, 4), (4, 2), (14, 2), (28, 4), (6, 1), (6, 2), (12, 4)]
HEAD_SIZE = 8


def sample(length: int, seed: int, trained: slice = slice(None)) -> Sample:
    weights = np.zeros(length, dtype=np.float32)
    weights[trained] = 1 + seed % 3
    ids = np.random.default_rng(seed).integers(3, 384, length).astype(np.uint32)
    return Sample(ids, weights, seed)


def batches(size: int, padded: bool = False):
    """Uneven documents; all trained tokens in the last one."""
    samples = [sample(9, 0, slice(0)), sample(2, 1, slice(0)), sample(17, 2, slice(5, None))]
    return pack(samples, pad_token_id=0, pad_to_multiple=size, padded=padded)


# --- pure functions -------------------------------------------------------------------------------------------------


def test_balanced_bounds():
    assert balanced_bounds(28, 8) == (0, 4, 7, 11, 14, 18, 21, 25, 28)
    assert balanced_bounds(6, 4) == (0, 2, 3, 5, 6)
    assert balanced_bounds(0, 3) == (0, 0, 0, 0)
    assert balanced_bounds(2, 4) == (0, 1, 1, 2, 2)


def test_head_plan_of_qwen_7b_on_eight():
    plan = head_plan(28, 4, 8)
    assert plan.query == ((0, 4), (4, 7), (7, 11), (11, 14), (14, 18), (18, 21), (21, 25), (25, 28))
    assert plan.key_value == ((0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3, 4), (3, 4))


@pytest.mark.parametrize("heads", [*HEADS, (32, 8), (40, 8), (25, 5), (7, 7)])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 8])
def test_head_plan_gives_each_query_head_once_with_its_own_kv_head(heads, degree):
    num_heads, num_kv = heads
    if degree > num_heads:
        with pytest.raises(
            ConfigError, match=f"ulysses_sequence_parallel_size={degree} exceeds the model's {num_heads}"
        ):
            head_plan(num_heads, num_kv, degree)
        return
    plan = head_plan(num_heads, num_kv, degree)
    assert [h for start, stop in plan.query for h in range(start, stop)] == list(range(num_heads))
    for (start, stop), (first, last) in zip(plan.query, plan.key_value, strict=True):
        assert stop - start in (num_heads // degree, -(-num_heads // degree))
        assert sorted({h * num_kv // num_heads for h in range(start, stop)}) == list(range(first, last))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_shards_together_are_the_batch(size, padded):
    batch = batches(size, padded)
    parts = [shard(batch, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([p.input_ids for p in parts], dim=1), batch.input_ids)
    assert torch.equal(torch.cat([p.position_ids for p in parts], dim=1), batch.position_ids)
    # Each trained position once among the slices, and each target once among the heads' shares.
    flat = torch.arange(batch.input_ids.numel()).view(batch.input_ids.shape)
    slices = flat.chunk(size, dim=1)
    held = torch.cat([s.flatten()[p.trained_index] for s, p in zip(slices, parts, strict=True)])
    assert torch.equal(held.sort().values, batch.trained_index)
    assert torch.equal(torch.cat([p.targets for p in parts]), batch.labels.flatten()[held])
    assert torch.equal(torch.cat([p.loss_weights for p in parts]), batch.loss_weights.flatten()[held])
    sizes = [len(p.targets) for p in parts]
    assert max(sizes) - min(sizes) <= 1
    for a in range(size):
        assert sum(parts[a].plan.send) == len(parts[a].trained_index)
        assert sum(parts[a].plan.receive) == len(parts[a].targets)
        assert [parts[a].plan.send[b] for b in range(size)] == [parts[b].plan.receive[a] for b in range(size)]


def test_shard_of_one_is_the_batch_itself():
    batch = batches(1)
    whole = shard(batch, 0, 1)
    assert torch.equal(whole.trained_index, batch.trained_index)
    assert torch.equal(whole.targets, batch.labels[batch.labels != IGNORE_INDEX])


# --- in processes ---------------------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Writes down, for each all-to-all, how many numbers leave this rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.numbers = rank, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "all_to_all_single" in str(func):
            splits = list(args[2])
            rows = args[0].shape[1:].numel()
            self.numbers.append((sum(splits) - splits[self.rank]) * rows)
        return func(*args, **(kwargs or {}))


def qkv(heads: int, kv_heads: int, rows: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(heads)
    return [
        torch.randn(rows, n, length, HEAD_SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    ]


def attention_cases(size: int):
    for heads, kv_heads in HEADS:
        if heads >= size:
            for padded in (False, True):
                for spec in (
                    AttentionSpec(0.3, sliding_window=6),
                    AttentionSpec(0.3, sinks=torch.linspace(-2, 2, heads)),
                ):
                    yield heads, kv_heads, padded, spec


def run_attention(size: int) -> list[str]:
    """Each rank compares its slice of output and gradients with the whole computed alone; returns what differs."""
    rank, group = dist.get_rank(), dist.group.WORLD
    attend = sequence_parallel(attend_sdpa, group)
    wrong = []
    for heads, kv_heads, padded, spec in attention_cases(size):
        batch = batches(size, padded)
        rows, length = batch.input_ids.shape
        context = AttentionContext.of(batch, attend_sdpa)
        alone = qkv(heads, kv_heads, rows, length)
        weight = torch.linspace(-1, 1, rows * heads * length * HEAD_SIZE, dtype=torch.float64).view(
            rows, heads, length, HEAD_SIZE
        )
        expected = attend_sdpa(*alone, spec, context)
        (expected * weight).sum().backward()
        here = [x.detach().chunk(size, dim=2)[rank].clone().requires_grad_() for x in alone]
        with Sent(rank) as sent:
            found = attend(*here, spec, context)
            (found * weight.chunk(size, dim=2)[rank]).sum().backward()
        pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(here, alone, strict=True))]
        for name, (a, b) in zip("oqkv", pairs, strict=True):
            if (a - b.chunk(size, dim=2)[rank]).abs().max() > 1e-12:
                wrong.append(f"{name} of {heads}/{kv_heads} padded={padded}")
        if sent.numbers != expected_numbers(heads, kv_heads, rows * length, size, rank):
            wrong.append(f"{sent.numbers} numbers sent by {heads}/{kv_heads}")
    return wrong


def expected_numbers(heads: int, kv_heads: int, tokens: int, size: int, rank: int) -> list[int]:
    """The formula of the module's docstring: forward there and back, then backward there and back."""
    plan = head_plan(heads, kv_heads, size)
    of = [(b - a, d - c) for (a, b), (c, d) in zip(plan.query, plan.key_value, strict=True)]
    mine, my_kv = of[rank]
    all_kv = sum(kv for _, kv in of)
    there = tokens // size * ((heads - mine) + 2 * (all_kv - my_kv)) * HEAD_SIZE
    back = tokens // size * (size - 1) * mine * HEAD_SIZE
    # The gradient of an exchange is the opposite exchange: what this rank sends is what it had received.
    there_again = tokens // size * (heads - mine) * HEAD_SIZE
    back_again = tokens // size * (size - 1) * (mine + 2 * my_kv) * HEAD_SIZE
    return [there, back, there_again, back_again]


def run_spread(size: int) -> list[str]:
    rank, group = dist.get_rank(), dist.group.WORLD
    wrong = []
    trained = {"many": slice(5, None), "one": slice(16, None), "none": slice(0)}
    for (name, which), padded in [(item, p) for item in trained.items() for p in (False, True)]:
        samples = [sample(9, 0, slice(0)), sample(17, 2, which)]
        batch = pack(samples, pad_token_id=0, pad_to_multiple=size, padded=padded)
        states = torch.randn(*batch.input_ids.shape, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
        local = shard(batch, rank, size)
        here = states.detach().chunk(size, dim=1)[rank].clone().requires_grad_()
        found = spread(here.flatten(0, 1).index_select(0, local.trained_index), local.plan, group)
        if found.shape[0] != len(local.targets):
            wrong.append(f"{name}: {found.shape[0]} states for {len(local.targets)} targets")
        scores = torch.linspace(-1, 1, 384 * 3).view(384, 3)  # a head of which each target takes its own row

        def loss(hidden, targets, weights, scores=scores):
            return (hidden.sin() * scores[targets] * weights[:, None]).sum()

        part = loss(found, local.targets, local.loss_weights)
        part.backward()
        flat = [x.flatten(0, 1)[batch.trained_index] for x in (states, batch.labels, batch.loss_weights)]
        whole = loss(*flat)
        whole.backward()
        total = part.detach().clone()
        dist.all_reduce(total)
        if (total - whole).abs() > 1e-5:
            wrong.append(f"{name} padded={padded}: {total} is not {whole}")
        if not torch.equal(here.grad, states.grad.chunk(size, dim=1)[rank]):
            wrong.append(f"{name} padded={padded}: gradient")
    return wrong


def run_model(size: int) -> list[str]:
    """A whole model with uneven heads, packed: hidden states and weight gradients as in one process."""
    rank, group = dist.get_rank(), dist.group.WORLD
    wrong = []
    for family, heads, kv_heads in [("qwen2", 14, 2), ("gemma2", 6, 3), ("gpt_oss", 6, 2)]:
        changes = {"sliding_window": 8, "hidden_size": 96} if family != "qwen2" else {}
        model = tiny_model(family, num_attention_heads=heads, num_key_value_heads=kv_heads, **changes).double()
        model.set_attn_implementation(IMPLEMENTATION)
        model.config._experts_implementation = "eager"  # the grouped product has no float64
        batch = batches(size)
        context = AttentionContext.of(batch, attend_sdpa)
        gradients = []
        for local, attend in (
            (shard(batch, 0, 1), attend_sdpa),
            (shard(batch, rank, size), sequence_parallel(attend_sdpa, group)),
        ):
            model.zero_grad()
            states = model.model(
                input_ids=local.input_ids, position_ids=local.position_ids, use_cache=False,
                attention_context=replace(context, attend=attend),
            ).last_hidden_state  # fmt: skip
            states[0].index_select(0, local.trained_index).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.model.parameters() if p.grad is not None])
        for whole, part in zip(*gradients, strict=True):
            dist.all_reduce(part)
            if (whole - part).abs().max() > 1e-6 * max(1.0, whole.abs().max().item()):
                wrong.append(f"{family}: {(whole - part).abs().max()} of {whole.abs().max()}")
    return wrong


def run_all(size: int) -> list[str]:
    return run_attention(size) + run_spread(size) + run_model(size)


@pytest.mark.parametrize("size", [2, 4])
def test_equal_to_one_process(size):
    assert run_distributed(run_all, size, size) == [[]] * size
