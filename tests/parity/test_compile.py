"""Compiled blocks give the losses of plain ones, with checkpointing, adapters, sharding and sequence parallelism."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from fsdpsft import parallelize
from fsdpsft.config.schema import KEYS
from fsdpsft.model.attention_backends import ANY_FLOAT, BACKENDS
from fsdpsft.parallelize import COMPILE_PAYS_FROM, wants_compile
from fsdpsft.testing import run_distributed, save_tiny_model
from tests.parity.test_trainer_equals_reference import curves, ragged_rows, run_case

FAMILY = "qwen2-tied-gqa"
NONE, FULL = (f"model.enable_gradient_checkpointing={mode}" for mode in ("none", "full"))
CASES: dict[str, tuple[int, list[str]]] = {
    "tiles": (1, [FULL, "model.mlp_tiles=2"]),
    "selective": (1, []),
    "selective-ulysses-tiles": (2, ["ulysses_sequence_parallel_size=2", "model.mlp_tiles=2"]),
    "lora": (1, [NONE, "model.lora_rank=4"]),
    "fsdp": (2, [FULL]),
    "ulysses": (2, [NONE, "ulysses_sequence_parallel_size=2"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compile")
    lines = [json.dumps({"input_ids": ids, "loss_mask": [int(w) for w in weights]}) for ids, weights in ragged_rows()]
    (path / "rows.jsonl").write_text("\n".join(lines))
    save_tiny_model(path / FAMILY)
    return path


def both(folder: Path, name: str, overrides: Sequence[str]) -> int:
    """Run plainly and compiled; returns how many frames were compiled."""
    overrides = ["trainer.total_training_steps=3", "model.enable_gradient_checkpointing=selective", *overrides]
    run_case(folder, FAMILY, f"{name}-plain", overrides)
    torch._dynamo.reset()
    counters.clear()
    run_case(folder, FAMILY, f"{name}-compiled", [*overrides, "model.compile=true"])
    return counters["frames"]["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_plain(folder: Path, name: str) -> None:
    processes, overrides = CASES[name]
    if processes == 1:
        frames = [both(folder, name, overrides)]
    else:
        frames = run_distributed(both, processes, folder, name, overrides)
    assert min(frames) >= 2  # before and after attention, which stays outside
    for found, expected in zip(curves(folder, f"{name}-compiled"), curves(folder, f"{name}-plain"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- torch's varlen_attn inside compiled blocks: its operators get CPU kernels, which the registry keeps ------------


def documents(
    q: Tensor, k: Tensor, bounds: Tensor, scale: float, window: list[int]
) -> Iterator[tuple[slice, Callable[[Tensor], Tensor], Tensor]]:
    """For each document: its tokens, a function that gives each query head its part, and weights [H, L, L]."""
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part = slice(start, stop)

        def heads(x: Tensor, part: slice = part) -> Tensor:
            return x[part].transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0)

        hidden = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        if window[0] >= 0:
            hidden |= torch.ones_like(hidden).tril(-window[0] - 1)
        scores = heads(q) @ heads(k).transpose(1, 2) * scale
        yield part, heads, scores.masked_fill(hidden, float("-inf")).softmax(-1)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, is_causal: bool,
    scale: float, window: list[int], *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    output = torch.empty_like(q)
    for part, heads, weights in documents(q, k, cu_q, scale, window):
        output[part] = (weights @ heads(v)).transpose(0, 1)
    return output, q.new_zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
    max_k: int, is_causal: bool, rng: Tensor, scale: float, window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

    def add_groups(x: Tensor) -> Tensor:
        return x.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)

    for part, heads, weights in documents(q, k, cu_q, scale, window):
        of_weights = heads(grad) @ heads(v).transpose(1, 2)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        dq[part] = (of_scores @ heads(k)).transpose(0, 1)
        dk[part] = add_groups(of_scores.transpose(1, 2) @ heads(q))
        dv[part] = add_groups(weights.transpose(1, 2) @ heads(grad))
    return dq, dk, dv


@pytest.fixture
def varlen_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", varlen_forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", varlen_backward)
    here = replace(BACKENDS["varlen"], devices=frozenset({"cpu"}), dtypes=ANY_FLOAT, min_capability=(0, 0))
    monkeypatch.setitem(BACKENDS, "varlen", here)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_varlen_stands_inside_the_graph(
    mode: str, folder: Path, varlen_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No break, and after the third batch nothing is compiled again: sizes and the longest document have changed."""
    seen = CompileCounterWithBackend("aot_eager")
    graphs_by_batch: list[int] = []
    call, compiled = parallelize.ParallelModel.__call__, torch.compile

    def counted(self: Any, batch: Any, sources: int = 1) -> Any:
        graphs_by_batch.append(seen.frame_count)
        return call(self, batch, sources)

    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend=seen))
    monkeypatch.setattr(parallelize.ParallelModel, "__call__", counted)
    settings = [f"model.enable_gradient_checkpointing={mode}", "trainer.total_training_steps=3"]
    run_case(folder, FAMILY, f"varlen-{mode}-sdpa", settings)
    graphs_by_batch.clear()
    torch._dynamo.reset()
    counters.clear()
    run_case(folder, FAMILY, f"varlen-{mode}", [*settings, "model.attn_implementation=varlen", "model.compile=true"])
    assert not counters["graph_break"]
    assert graphs_by_batch[3:] == [graphs_by_batch[3]] * (len(graphs_by_batch) - 3) and len(graphs_by_batch) >= 6
    assert 2 <= graphs_by_batch[-1] <= 6  # of attention and MLP: of fixed sizes, of any size, of any longest document
    for found, expected in zip(*(curves(folder, f"varlen-{mode}{end}") for end in ("", "-sdpa")), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_compile_where_it_pays() -> None:
    many, few = COMPILE_PAYS_FROM, COMPILE_PAYS_FROM - 1
    assert wants_compile("auto", "cuda", many) and not wants_compile("auto", "cuda", few)
    assert not wants_compile("auto", "cpu", many)
    assert wants_compile("true", "cpu", 1) and not wants_compile("false", "cuda", many)
    assert str(COMPILE_PAYS_FROM) in KEYS["model.compile"].help
