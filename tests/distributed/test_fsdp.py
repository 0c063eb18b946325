"""What FSDP2 is told: how often weights are gathered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fsdpsft import load_config
from fsdpsft.batch import Sample, pack
from fsdpsft.data.batches.loader import Step
from fsdpsft.distributed.mesh import init_mesh
from fsdpsft.model.memory import Work
from fsdpsft.optim import build_optimizer
from fsdpsft.parallelize import build_model
from fsdpsft.testing import run_distributed, save_tiny_model
from fsdpsft.train import train_step

BLOCKS, MICRO_BATCHES = 3, 4


def a_step(rank: int) -> Step:
    generator = np.random.default_rng(rank)
    micro_batches = []
    for row in range(MICRO_BATCHES):
        ids = generator.integers(3, 250, 12).astype(np.uint32)
        micro_batches.append(pack([Sample(ids, np.ones(12, np.float32), row)], pad_token_id=0))
    count = 11 * MICRO_BATCHES * 2
    return Step(0, 0, micro_batches, float(count), 96, count, np.array([count]), 96, np.arange(4))


class Counted(TorchDispatchMode):
    """Counts all-gathers, and the bytes that reductions take in."""

    gathers = reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gathers += "c10d" in str(func) and "allgather" in str(func)
        if "c10d" in str(func) and "reduce_scatter" in str(func):
            self.reduced += args[1].numel() * args[1].element_size()
        return func(*args, **(kwargs or {}))


def counts_of(folder: Path, overrides: list[str]) -> tuple[list[int], list[int], list[int]]:
    """All-gathers and reduced bytes of each of two steps; trained numbers of the root and of all blocks."""
    config = load_config([f"model.partial_pretrain={folder}", "data.train_files=null", *overrides])
    mesh = init_mesh(torch.device("cpu"))
    model = build_model(folder, config.model, mesh, Work(max_length=64, token_budget=256), seed=0)
    optimizer = build_optimizer(model.module, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    trained = {name: p.numel() for name, p in model.module.named_parameters() if p.requires_grad}
    inside = sum(count for name, count in trained.items() if ".layers." in name)
    gathers, reduced = [], []
    for _ in range(2):
        with Counted() as counted:
            train_step(model, optimizer, a_step(mesh.rank), 1.0)
        gathers.append(counted.gathers)
        reduced.append(counted.reduced)
    return gathers, reduced, [sum(trained.values()) - inside, inside]


# The first block's weights stay from a backward pass to the next forward pass, the last one's the other way round.
ZERO_3 = 2 * BLOCKS * MICRO_BATCHES - MICRO_BATCHES - (MICRO_BATCHES - 1)
LORA, ZERO_2 = "model.lora_rank=4", "model.fsdp_config.reshard_after_forward=false"
EXPECTED = {  # gathers of the first step and of the second
    (): (1 + ZERO_3, 1 + ZERO_3),
    (ZERO_2,): (1 + BLOCKS, 1 + BLOCKS),
    (LORA,): (1 + ZERO_3, ZERO_3),  # a frozen root is gathered once and for all
    (LORA, ZERO_2): (1 + BLOCKS, BLOCKS),
    (LORA, "model.modules_to_save=[embed_tokens,lm_head]"): (1 + ZERO_3, 1 + ZERO_3),
    # A last block without adapters is frozen, too, and whole up to its backward pass.
    (LORA, ZERO_2, f"model.exclude_modules='.*layers[.]{BLOCKS - 1}[.].*'"): (1 + BLOCKS, BLOCKS - 1),
    # Blocks below all adapters have no backward pass.
    (LORA, "model.target_modules='.*layers[.][12][.].*q_proj'"): (
        1 + ZERO_3 - 1, MICRO_BATCHES * (2 * BLOCKS - 2),
    ),
}  # fmt: skip


def all_counts(folder: Path) -> list[tuple[list[int], list[int], list[int]]]:
    return [counts_of(folder, list(overrides)) for overrides in EXPECTED]


def test_weights_are_gathered_and_gradients_reduced_as_often_as_said(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, num_hidden_layers=BLOCKS)
    for found in run_distributed(all_counts, 2, tmp_path):
        assert dict(zip(EXPECTED, (tuple(gathers) for gathers, _, _ in found), strict=True)) == EXPECTED
        for _, reduced, (root, inside) in found:
            # Frozen weights send nothing. The root's gradients are reduced once a micro-batch, as the blocks' are.
            assert inside > 0
            assert reduced == [4 * MICRO_BATCHES * (root + inside)] * 2


def norms_and_weights(folder: Path) -> list[tuple[float, list[torch.Tensor]]]:
    """Gradient norm and weights after one step, with gradients summed at each micro-batch and once a step."""
    found = []
    for sync_every in (True, False):
        config = load_config([f"model.partial_pretrain={folder}", "data.train_files=null"])
        model = build_model(
            folder, config.model, init_mesh(torch.device("cpu")), Work(max_length=64, token_budget=256), seed=0
        )
        optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
        stats = train_step(model, optimizer, a_step(model.mesh.rank), None, sync_every)
        weights = [p.full_tensor().detach() for p in model.module.parameters()]  # type: ignore[attr-defined]
        found.append((stats.grad_norm.item(), weights))
    return found


def test_gradients_summed_once_a_step_are_those_of_all_micro_batches(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, num_hidden_layers=BLOCKS)
    first, second = a_step(0), a_step(1)
    step = replace(first, micro_batches=first.micro_batches + second.micro_batches)
    config = load_config([f"model.partial_pretrain={tmp_path}", "data.train_files=null"])
    work = Work(max_length=64, token_budget=256)
    alone = build_model(tmp_path, config.model, init_mesh(torch.device("cpu")), work, seed=0)
    expected = train_step(alone, torch.optim.SGD(alone.module.parameters(), lr=0.1), step, None).grad_norm.item()
    for (norm, weights), (norm_of_last, weights_of_last) in run_distributed(norms_and_weights, 2, tmp_path):
        assert norm == pytest.approx(expected, rel=1e-5) and norm_of_last == pytest.approx(expected, rel=1e-5)
        for weight, weight_of_last in zip(weights, weights_of_last, strict=True):
            torch.testing.assert_close(weight_of_last, weight, rtol=1e-5, atol=1e-6)
