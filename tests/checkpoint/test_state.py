"""What may differ between a checkpoint and the run that goes on from it, and how its parts are kept."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from fsdpsft.checkpoint.state import (
    HARMLESS,
    Change,
    allocate_optimizer_state,
    capture_rng,
    check_config,
    optimizer_tensors,
    restore_rng,
)
from fsdpsft.config.load import load_config
from fsdpsft.errors import CheckpointError

BASE = {
    "data": {"train_batch_size": 256, "num_workers": 2, "train_files": ["a.parquet"]},
    "trainer": {"seed": 1, "total_epochs": 2, "logger": ["console"], "save_freq": 10},
}


def changed(section: str, key: str, value: object) -> dict[str, dict[str, object]]:
    return {name: {**part, key: value} if name == section else dict(part) for name, part in BASE.items()}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "num_workers", 8),
        ("trainer", "logger", ["wandb"]),
        ("trainer", "save_freq", "epoch"),
        ("trainer", "total_epochs", 3),
    ],
)
def test_harmless_changes_are_taken_and_told(section, key, value) -> None:
    assert check_config(BASE, changed(section, key, value)) == [Change(f"{section}.{key}", BASE[section][key], value)]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "train_batch_size", 128),
        ("data", "train_files", ["b.parquet"]),
        ("trainer", "seed", 2),
        ("trainer", "total_epochs", 1),
    ],
)
def test_harmful_changes_are_refused_with_a_diff(section, key, value) -> None:
    now = changed(section, key, value)
    with pytest.raises(CheckpointError) as caught:
        check_config(BASE, now)
    assert f"  {section}.{key}: {BASE[section][key]!r} -> {value!r}" in str(caught.value)
    assert len(check_config(BASE, now, allow=True)) == 1


def test_a_key_that_came_or_went_is_a_change() -> None:
    gone = {"data": {"num_workers": 2}, "trainer": BASE["trainer"]}
    assert {change.key for change in check_config(BASE, gone, allow=True)} == {
        "data.train_batch_size",
        "data.train_files",
    }


def test_every_harmless_key_exists(tmp_path) -> None:
    settings = load_config([f"data.train_files={tmp_path}", f"model.partial_pretrain={tmp_path}"]).as_dict()
    for key in HARMLESS:
        part = settings
        for name in key.split("."):
            assert name in part, key
            part = part[name]


def test_generators_survive_json() -> None:
    random.random(), np.random.rand(), torch.rand(1)
    kept = json.loads(json.dumps(capture_rng()))
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    restore_rng(kept)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_optimizer_state_of_other_parameters_is_refused() -> None:
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    parameters = dict(layer.named_parameters())
    saved = {name: (t.dtype, tuple(t.shape)) for name, t in optimizer_tensors(parameters, optimizer).items()}
    assert saved["optimizer/weight/exp_avg"] == (torch.float32, (3, 2))
    assert saved["optimizer/bias/step"] == (torch.float32, ())
    fresh = torch.optim.AdamW([layer.weight])
    with pytest.raises(CheckpointError, match="bias, which this run does not train"):
        allocate_optimizer_state(parameters, fresh, saved)
    del saved["optimizer/bias/step"], saved["optimizer/bias/exp_avg"], saved["optimizer/bias/exp_avg_sq"]
    with pytest.raises(CheckpointError, match=r"no optimiser state for .*bias"):
        allocate_optimizer_state(parameters, optimizer, saved)


def test_a_parameter_the_model_does_not_know_is_refused() -> None:
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(CheckpointError, match="the model lacks"):
        optimizer_tensors({"weight": layer.weight}, optimizer)
