"""Validation sums and divides once, and tells sources apart: the same on any split of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fsdpsft.config.load import load_config
from fsdpsft.data.batches.loader import Loader, LoaderSettings
from fsdpsft.data.batches.store import TokenStore
from fsdpsft.distributed.mesh import init_mesh
from fsdpsft.evaluate import evaluate
from fsdpsft.model.memory import Work
from fsdpsft.parallelize import build_model
from fsdpsft.testing import run_distributed, save_tiny_model
from tests.data.memory_store import memory_store
from tests.parity.reference import sample_loss

COUNTS = {"maths": 7, "chat": 4}


def store() -> TokenStore:
    generator = np.random.default_rng(2)
    samples = []
    for _ in range(sum(COUNTS.values())):
        length = int(generator.integers(3, 30))
        weights = generator.choice([0.0, 1.0, 0.5], length)
        weights[-1] = 1.0
        samples.append((generator.integers(3, 250, length).tolist(), weights.tolist()))
    return memory_store(samples, COUNTS)


def run_evaluation(path: Path, batch_size: int, budget: int, sp_size: int = 1) -> dict[str, float]:
    config = load_config(["data.train_files=x", f"model.partial_pretrain={path}"])
    mesh = init_mesh(torch.device("cpu"), sp_size=sp_size)
    model = build_model(path, config.model, mesh, Work(max_length=64, token_budget=256), seed=0)
    loader = Loader(
        store(),
        LoaderSettings(
            train_batch_size=batch_size,
            token_budget=budget,
            pad_token_id=0,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            sp_size=sp_size,
            evaluation=True,
        ),
    )
    values = evaluate(model, loader)
    assert model.module.training, "training goes on after validation"
    return values


def expected(path: Path) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
    data, values = store(), {}
    samples = [data.sample(i) for i in range(len(data))]
    weighted = [sample_loss(model, s.input_ids.tolist(), s.loss_weights.tolist()).item() for s in samples]
    plain = [sample_loss(model, s.input_ids.tolist(), (s.loss_weights > 0).tolist()).item() for s in samples]
    values["val/loss"] = sum(weighted) / sum(float(s.loss_weights[1:].sum()) for s in samples)
    values["val/trained_tokens"] = float(sum((s.loss_weights[1:] > 0).sum() for s in samples))
    start = 0
    for name, count in COUNTS.items():
        part = range(start, start + count)
        values[f"val/loss/{name}"] = sum(plain[i] for i in part) / sum(
            (samples[i].loss_weights[1:] > 0).sum() for i in part
        )
        start += count
    return values


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("batch_size", "budget"), [(100, 512), (3, 64), (1, 32)])
def test_one_process(model: Path, batch_size: int, budget: int) -> None:
    assert run_evaluation(model, batch_size, budget) == pytest.approx(expected(model), rel=1e-5)


@pytest.mark.parametrize("sp_size", [1, 2])
def test_two_processes(model: Path, sp_size: int) -> None:
    for values in run_distributed(run_evaluation, 2, model, 5, 64, sp_size):
        assert values == pytest.approx(expected(model), rel=1e-5)
