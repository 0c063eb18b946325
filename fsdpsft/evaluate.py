"""Validation: the token losses of every row, summed, divided once."""

from __future__ import annotations

import numpy as np
import torch

from fsdpsft.data.loader import Loader
from fsdpsft.metrics import by_source
from fsdpsft.parallelize import ParallelModel


@torch.no_grad()
def evaluate(model: ParallelModel, loader: Loader) -> dict[str, float]:
    """Mean loss over all trained tokens of the data (message weights included); the same on any number of processes.

    Args:
        model: left in evaluation mode during the pass, then put back.
        loader: one in evaluation mode: every row once, in order.

    Returns:
        ``val/loss``, ``val/trained_tokens``, and ``val/loss/<source>`` where there are several sources.
    """
    module, mesh = model.module, model.mesh
    sources = len(loader.store.source_counts)
    totals = torch.zeros(1 + sources, dtype=torch.float64, device=mesh.device)  # the whole, then by source
    denominator, trained = 0.0, np.zeros(sources, dtype=np.int64)
    module.eval()
    with model.computing():
        for step in loader.iterate():
            for micro_batch in step.micro_batches:
                loss_sum, source_sums = model(micro_batch, sources)
                totals[0] += loss_sum
                totals[1:] += source_sums
            denominator += step.loss_denominator
            trained += step.trained_by_source
    module.train()
    total, *sums = mesh.sum(totals).tolist()
    names = loader.store.source_names if sources > 1 else ()
    return {
        "val/loss": total / denominator,
        "val/trained_tokens": float(trained.sum()),
        **by_source("val/loss", names, sums, trained),
    }
