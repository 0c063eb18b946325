"""Compiled blocks give the losses of plain ones, with checkpointing, adapters, sharding and sequence parallelism."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

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
