"""Precisions and places of the weights: what FSDP2 does on two processes is what one process does without it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fsdpsft import load_config
from fsdpsft import train as run_training
from fsdpsft.testing import run_distributed, save_tiny_model
from tests.parity.test_trainer_equals_reference import BASE, ragged_rows

BF16 = ["model.dtype=bfloat16"]
PURE = [*BF16, "model.fsdp_config.model_dtype=bfloat16"]
ZERO2 = "model.fsdp_config.reshard_after_forward=false"
LORA = ["model.lora_rank=4", *BF16]

# name: (settings of both runs, of the two processes alone, largest relative difference of a loss)
CASES: dict[str, tuple[list[str], list[str], float]] = {
    "masters": (BF16, [], 2e-3),
    "masters-sp": (BF16, ["ulysses_sequence_parallel_size=2"], 2e-3),
    "masters-offload": (BF16, ["model.fsdp_config.offload_params=true"], 2e-3),
    "reduce-bf16": (BF16, ["model.fsdp_config.reduce_dtype=bfloat16"], 1e-2),
    "pure-fp32-states": (PURE, [], 1e-2),
    "pure-bf16-states": ([*PURE, "optim.state_dtype=bfloat16"], [], 1e-2),
    "lora": (LORA, [], 2e-3),
    "lora-zero2": (LORA, [ZERO2], 2e-3),
    "zero2-sync-last": ([], [ZERO2, "model.fsdp_config.gradient_sync=last"], 1e-5),
    "offload": ([], ["model.fsdp_config.offload_params=true"], 1e-5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("precision")
    lines = [json.dumps({"input_ids": ids, "loss_mask": [int(w) for w in weights]}) for ids, weights in ragged_rows()]
    (path / "rows.jsonl").write_text("\n".join(lines))
    save_tiny_model(path / "qwen2-tied-gqa")
    return path


def run(folder: Path, name: str, overrides: Sequence[str]) -> None:
    run_training(load_config([
        *BASE, "trainer.total_training_steps=6", f"data.train_files={folder / 'rows.jsonl'}",
        f"model.partial_pretrain={folder / 'qwen2-tied-gqa'}",
        f"data.cache_dir={folder / 'cache'}", f"trainer.default_local_dir={folder / name}",
        *overrides,
    ]))  # fmt: skip


def run_together(folder: Path) -> None:
    for name, (both, together, _) in CASES.items():
        run(folder, f"{name}-2", [*both, *together])


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    run_distributed(run_together, 2, folder)
    return folder


def column(folder: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@cache
def alone(folder: Path, settings: tuple[str, ...]) -> Path:
    """The run of one process with these settings."""
    name = f"alone-{len(list(folder.glob('alone-*')))}"
    run(folder, name, settings)
    return folder / name


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(two: Path, name: str) -> None:
    both, _, tolerance = CASES[name]
    reference, found = alone(two, tuple(both)), two / f"{name}-2"
    np.testing.assert_allclose(column(found, "train/loss"), column(reference, "train/loss"), rtol=tolerance)
    norms, expected = column(found, "train/grad_norm"), column(reference, "train/grad_norm")
    np.testing.assert_allclose(norms[0], expected[0], rtol=tolerance)
    np.testing.assert_allclose(norms, expected, rtol=10 * tolerance)  # rounding grows from step to step


def test_one_process_offloads_too(folder: Path) -> None:
    run(folder, "one-offload", ["model.fsdp_config.offload_params=true"])
    for key in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose(column(folder / "one-offload", key), column(alone(folder, ()), key), rtol=1e-5)


def test_dtypes_are_those_asked_for(two: Path) -> None:
    def dtypes(name: str, kind: str) -> set[torch.dtype]:
        files = (two / name / "global_step_6" / "trainer_state").glob("*.safetensors")
        return {t.dtype for file in files for key, t in load_file(file).items() if key.startswith(kind) and t.ndim > 1}

    assert dtypes("masters-2", "model/") == dtypes("masters-2", "optimizer/") == {torch.float32}
    assert dtypes("pure-fp32-states-2", "model/") == {torch.bfloat16}
    assert dtypes("pure-fp32-states-2", "optimizer/") == {torch.float32}
    assert dtypes("pure-bf16-states-2", "optimizer/") == {torch.bfloat16}
    assert dtypes("lora-2", "model/") == dtypes("lora-2", "optimizer/") == {torch.float32}  # adapters
