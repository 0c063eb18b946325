"""Validation: the token losses of every row, summed, divided once. And one document's losses, token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fsdpsft.batch import Sample, pack
from fsdpsft.data.batches.loader import Loader
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


@torch.no_grad()
def token_losses(model: ParallelModel, input_ids: np.ndarray, *, padded: bool = False) -> Tensor:
    """Loss of each token of one document but the first, given those before it. Collective.

    Args:
        model: left in evaluation mode during the pass, then put back.
        input_ids: [L] the document; the same on every process.
        padded: whether the run lays its batches out in rows.

    Returns:
        [L - 1] float32, on the CPU and on every process.
    """
    module, mesh, count = model.module, model.mesh, len(input_ids) - 1
    document = Sample(input_ids, np.ones(len(input_ids), dtype=np.float32), row=0)
    batch = pack([document], pad_token_id=0, pad_to_multiple=mesh.sp_size, padded=padded)
    batch = replace(batch, trained_sources=torch.arange(count))  # a source for each token: their sums are its losses
    module.eval()
    with model.computing():
        _, losses = model(batch, count)
    module.train()
    return mesh.sum(losses).cpu() / mesh.dp_size  # each data-parallel rank has computed all of them
