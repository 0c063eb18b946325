"""The batch that every part shares, and the one place where labels are shifted.

Shape legend, used in the whole package:
    R  rows of the model's input (1 when packed)      S  tokens in a row         T  tokens of a micro-batch, R * S
    M  trained positions of a micro-batch             D  hidden size             V  vocabulary size
    H  query heads   K  key/value heads   E  head size    N  documents           P  Ulysses degree (sp)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Sample:
    """One tokenised conversation.

    Attributes:
        input_ids: [L] uint32 token ids.
        loss_weights: [L] float32, aligned with ``input_ids``; 0 where the token is not trained, else its weight (1
            unless the message says otherwise). ``loss_weights > 0`` is the loss mask.
        row: index of the sample in its token store.
        source: which of the store's sources it is from.
    """

    input_ids: np.ndarray
    loss_weights: np.ndarray
    row: int
    source: int = 0


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch: documents laid end to end, or one padded row a document.

    Attributes:
        input_ids: [R, S] int64.
        position_ids: [R, S] int64, starting at 0 in each document.
        labels: [R, S] int64, already shifted: the id to predict at this position, or ``IGNORE_INDEX``.
        loss_weights: [R, S] float32, shifted with the labels; 0 where the label is ``IGNORE_INDEX``.
        trained_index: [M] int64, the flat positions whose label counts, ascending. Built on the host, so that the
            step selects them without a device sync.
        trained_sources: [M] int64, the source of each trained position's sample.
        cu_seqlens: [N + 1] int32, bounds of the documents in the flat token axis; padding is a document of its own.
        seqlens: the documents' lengths as host integers (same information as ``cu_seqlens``).
        rows: store indices of the real documents, for error messages and per-row reports.
        lengths: of the real documents, without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    trained_index: Tensor
    trained_sources: Tensor
    cu_seqlens: Tensor
    seqlens: tuple[int, ...]
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def max_seqlen(self) -> int:
        """Length of the longest document."""
        return max(self.seqlens)

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """Copy to page-locked host memory, from which a copy to the device does not block."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move all tensors to ``device`` without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


def pack(
    samples: Sequence[Sample], *, pad_token_id: int, pad_to_multiple: int = 1, padded: bool = False
) -> PackedBatch:
    """Lay samples out as one micro-batch and shift the labels, here and nowhere else.

    Args:
        samples: documents in order; empty for an idle rank's zero-weight micro-batch.
        pad_token_id: id of padding, which is never trained and which no document attends to.
        pad_to_multiple: the flat length is padded at its end to a multiple of this (the Ulysses degree).
        padded: one row a sample, padded at the right to the longest; causal attention does not see padding there.

    Returns:
        The batch on the CPU: R = 1 when packed, R = len(samples) when ``padded``.
    """
    lengths = [len(s.input_ids) for s in samples]
    if padded and samples:
        stride = -(-max(lengths) // pad_to_multiple) * pad_to_multiple
        seqlens, total = [stride] * len(samples), stride * len(samples)
        starts = list(range(0, total, stride))
    else:
        used = sum(lengths)
        total = max(-(-used // pad_to_multiple), 1) * pad_to_multiple
        starts = [0, *accumulate(lengths)][: len(samples)]
        seqlens = lengths + ([total - used] if total > used else [])
    input_ids = np.full(total, pad_token_id, dtype=np.int64)
    labels = np.full(total, IGNORE_INDEX, dtype=np.int64)
    weights = np.zeros(total, dtype=np.float32)
    sources = np.zeros(total, dtype=np.int64)
    for sample, start, length in zip(samples, starts, lengths, strict=True):
        input_ids[start : start + length] = sample.input_ids
        sources[start : start + length] = sample.source
        weights[start : start + length - 1] = sample.loss_weights[1:]
        targets = sample.input_ids[1:].astype(np.int64)
        labels[start : start + length - 1] = np.where(sample.loss_weights[1:] > 0, targets, IGNORE_INDEX)
    shape = (len(samples), -1) if padded and samples else (1, -1)
    cu_seqlens = np.concatenate([[0], np.cumsum(seqlens)])
    position_ids = np.arange(total) - np.repeat(cu_seqlens[:-1], seqlens)
    trained_index = np.flatnonzero(labels != IGNORE_INDEX)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids).view(shape),
        position_ids=torch.from_numpy(position_ids).view(shape),
        labels=torch.from_numpy(labels).view(shape),
        loss_weights=torch.from_numpy(weights).view(shape),
        trained_index=torch.from_numpy(trained_index),
        trained_sources=torch.from_numpy(sources[trained_index]),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        seqlens=tuple(seqlens),
        rows=tuple(s.row for s in samples),
        lengths=tuple(lengths),
    )
