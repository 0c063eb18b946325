"""What may differ between a checkpoint and the run that goes on from it, and how its parts are kept."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from fsdpsft.checkpoint.state import allocate_optimizer_state, capture_rng, optimizer_tensors, restore_rng
from fsdpsft.errors import CheckpointError


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
