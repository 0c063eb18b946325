"""Validation: the token losses of every row, summed, divided once."""

from __future__ import annotations

import torch

from fsdpsft.data.loader import Loader
from fsdpsft.parallelize import ParallelModel


@torch.no_grad()
def evaluate(model: ParallelModel, loader: Loader) -> dict[str, float]:
    """Mean loss over all trained tokens of the data (message weights included); the same on any number of processes.

    Args:
        model: left in evaluation mode during the pass, then put back.
        loader: one in evaluation mode: every row once, in order.

    Returns:
        ``val/loss`` and ``val/trained_tokens``.
    """
    module, mesh = model.module, model.mesh
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    denominator, trained = 0.0, 0
    module.eval()
    with model.computing():
        for step in loader.iterate():
            for micro_batch in step.micro_batches:
                loss_sum, _ = model(micro_batch)
                total += loss_sum
            denominator += step.loss_denominator
            trained += step.num_trained_tokens
    module.train()
    return {"val/loss": float(mesh.sum(total)) / denominator, "val/trained_tokens": float(trained)}
