"""The shift of labels and the layout of a micro-batch, written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fsdpsft.batch import IGNORE_INDEX, Sample, pack

X = IGNORE_INDEX


def sample(ids: list[int], weights: list[float], row: int = 0) -> Sample:
    return Sample(np.array(ids, dtype=np.uint32), np.array(weights, dtype=np.float32), row)


FIRST = sample([10, 11, 12, 13], [0, 0, 1, 1], row=7)
SECOND = sample([20, 21, 22], [1, 0, 0.5], row=3)


def test_packed_layout() -> None:
    batch = pack([FIRST, SECOND], pad_token_id=0)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 20, 21, 22]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.labels.tolist() == [[X, 12, 13, X, X, 22, X]]
    assert batch.loss_weights.tolist() == [[0, 1, 1, 0, 0, 0.5, 0]]
    assert batch.trained_index.tolist() == [1, 2, 5]
    assert batch.cu_seqlens.tolist() == [0, 4, 7] and batch.seqlens == (4, 3) and batch.rows == (7, 3)


def test_first_token_of_a_document_is_nobodys_label() -> None:
    """SECOND trains its first token, which no position of its own can predict and FIRST's last position must not."""
    batch = pack([FIRST, SECOND], pad_token_id=0)
    assert batch.labels[0, 3].item() == IGNORE_INDEX


def test_filler_is_a_document_of_its_own() -> None:
    batch = pack([FIRST, SECOND], pad_token_id=99, pad_to_multiple=4)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 20, 21, 22, 99]]
    assert batch.seqlens == (4, 3, 1) and batch.labels[0, -1].item() == X


def test_padded_layout() -> None:
    batch = pack([FIRST, SECOND], pad_token_id=99, padded=True)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13], [20, 21, 22, 99]]
    assert batch.labels.tolist() == [[X, 12, 13, X], [X, 22, X, X]]
    assert batch.trained_index.tolist() == [1, 2, 5] and batch.cu_seqlens.tolist() == [0, 4, 8]


@pytest.mark.parametrize("padded", [False, True])
def test_idle_rank_gets_filler_that_trains_nothing(padded: bool) -> None:
    batch = pack([], pad_token_id=5, pad_to_multiple=2, padded=padded)
    assert batch.input_ids.tolist() == [[5, 5]] and batch.trained_index.numel() == 0 and batch.rows == ()
