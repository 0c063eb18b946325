"""Thirty steps on GSM8K: the same column of losses on any layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fsdpsft import load_config
from fsdpsft import train as run_training
from fsdpsft.testing import run_distributed, save_tiny_model

STEPS = 30
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "one-small-budget": (1, ["data.max_token_len_per_gpu=512"]),
    "fsdp2": (2, []),
    "ulysses2": (2, ["ulysses_sequence_parallel_size=2"]),
}


def run(folder: Path, data: Path, name: str, overrides: Sequence[str]) -> None:
    run_training(load_config([
        f"data.train_files={data}", f"data.cache_dir={folder / 'cache'}", "data.prompt_key=question",
        "data.response_key=answer", "data.max_length=512", "data.truncation=right", "data.max_token_len_per_gpu=4096",
        "data.train_batch_size=8", "data.train_max_samples=200", f"model.partial_pretrain={folder / 'model'}",
        "optim.lr=1e-3", "optim.eps=1e-5", f"trainer.total_training_steps={STEPS}", "trainer.save_freq=-1",
        "trainer.save_contents=[model]", "trainer.resume_mode=disable", "model.enable_gradient_checkpointing=none",
        f"trainer.default_local_dir={folder / name}", *overrides,
    ]))  # fmt: skip


def run_together(folder: Path, data: Path) -> None:
    for name, (processes, overrides) in LAYOUTS.items():
        if processes == 2:
            run(folder, data, name, overrides)


def column(folder: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_same_losses_on_every_layout(tmp_path: Path, real_data: Path) -> None:
    data = real_data / "gsm8k" / "train.jsonl"
    save_tiny_model(tmp_path / "model")
    for name, (processes, overrides) in LAYOUTS.items():
        if processes == 1:
            run(tmp_path, data, name, overrides)
    run_distributed(run_together, 2, tmp_path, data)
    expected = column(tmp_path / "one")
    assert len(expected) == STEPS
    assert expected[-1] < expected[0] - 0.3
    for name in LAYOUTS:
        np.testing.assert_allclose(column(tmp_path / name), expected, rtol=1e-5, err_msg=name)
