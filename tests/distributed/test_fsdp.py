"""What FSDP2 is told: how often weights are gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fsdpsft import load_config
from fsdpsft.batch import Sample, pack
from fsdpsft.data.loader import Step
from fsdpsft.distributed.mesh import init_mesh
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
    """Counts all-gathers."""

    gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gathers += "c10d" in str(func) and "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def gathers(folder: Path, overrides: list[str]) -> list[int]:
    """All-gathers of two steps."""
    config = load_config([f"model.partial_pretrain={folder}", "data.train_files=null", *overrides])
    mesh = init_mesh(torch.device("cpu"))
    model = build_model(folder, config.model, mesh, packed=True, seed=0)
    optimizer = build_optimizer(model.module, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    counts = []
    for _ in range(2):
        with Counted() as counted:
            train_step(model, optimizer, a_step(mesh.rank), 1.0)
        counts.append(counted.gathers)
    return counts


EXPECTED = {
    # Blocks for each forward and backward, the last for both at once; the root, needed at both ends, once a step.
    (): (2 * BLOCKS - 1) * MICRO_BATCHES + 1,
    ("model.fsdp_config.reshard_after_forward=false",): BLOCKS + 1,
    ("model.lora_rank=4",): (2 * BLOCKS - 1) * MICRO_BATCHES + 1,
    ("model.lora_rank=4", "model.fsdp_config.reshard_after_forward=false"): BLOCKS + 1,
}


def all_gathers(folder: Path) -> list[list[int]]:
    return [gathers(folder, list(overrides)) for overrides in EXPECTED]


def test_weights_are_gathered_as_often_as_said(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, num_hidden_layers=BLOCKS)
    for found in run_distributed(all_gathers, 2, tmp_path):
        assert found == [[count, count] for count in EXPECTED.values()]
