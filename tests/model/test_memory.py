"""What ``model.enable_gradient_checkpointing=auto`` stands for follows from the memory plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fsdpsft import load_config
from fsdpsft.config.schema import ModelConfig
from fsdpsft.distributed.mesh import init_mesh
from fsdpsft.model.memory import CHECKPOINTING, Work, activations, available_memory, choose_checkpointing, states
from fsdpsft.model.sft_model import SFTModel
from fsdpsft.parallelize import build_model
from fsdpsft.testing import save_tiny_model, tiny_model

WORK = Work(max_length=64, token_budget=4096)
SIZE = torch.float32.itemsize


def settings(folder: Path, *overrides: str) -> ModelConfig:
    return load_config([f"model.partial_pretrain={folder}", "data.train_files=null", *overrides]).model


def needed(module: SFTModel, model: ModelConfig, mode: str) -> float:
    memory, _ = states(module, model, 1, SIZE, WORK.moments)
    return sum(memory.values()) + sum(activations(module, model, mode, WORK.token_budget or 0, SIZE).values())


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_the_least_that_fits(tmp_path: Path, mode: str) -> None:
    module, model = SFTModel(tiny_model(num_hidden_layers=8)), settings(tmp_path)
    least = needed(module, model, mode)
    assert choose_checkpointing(module, model, WORK, 1, SIZE, least) == mode
    assert choose_checkpointing(module, model, WORK, 1, SIZE, least - 1) != mode or mode == "full"
    assert choose_checkpointing(module, model, WORK, 1, SIZE, 0.0) == "full"


def test_each_mode_is_planned_with_less_than_the_one_before(tmp_path: Path) -> None:
    module, model = SFTModel(tiny_model(num_hidden_layers=8)), settings(tmp_path)
    none, selective, full = (needed(module, model, mode) for mode in CHECKPOINTING)
    assert none > selective > full


def test_with_offload_something_is_recomputed(tmp_path: Path) -> None:
    offloaded = settings(tmp_path, "model.activation_offload=true")
    assert choose_checkpointing(SFTModel(tiny_model()), offloaded, WORK, 1, SIZE, 1e15) == "selective"


def test_processes_of_a_node_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = available_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory(torch.device("cpu")) == whole / 4


@pytest.mark.parametrize(("available", "mode"), [(1e15, "none"), (0.0, "full")])
def test_the_choice_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, available: float, mode: str
) -> None:
    monkeypatch.setattr("fsdpsft.parallelize.available_memory", lambda device: available)
    folder = save_tiny_model(tmp_path)
    with caplog.at_level("INFO"):
        build_model(folder, settings(folder), init_mesh(torch.device("cpu")), WORK, seed=0)
    assert f"activation checkpointing: {mode} (model.enable_gradient_checkpointing=auto)" in caplog.text
