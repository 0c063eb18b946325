"""Rows that are tokens already: ``input_ids`` with ``loss_mask`` or ``labels``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fsdpsft.data.rows.messages import column, fault, listed

_IGNORED_LABEL = -100


@dataclass(frozen=True)
class Tokenized:
    """A row that is tokens already.

    Attributes:
        input_ids: [L] uint32.
        loss_weights: [L] float32, aligned with ``input_ids``, 0 where not trained; position 0 never is, nothing
            predicts it.
    """

    input_ids: np.ndarray
    loss_weights: np.ndarray


def read_tokenized(columns: Mapping[str, Any]) -> Tokenized:
    """``input_ids`` with ``loss_mask`` (0, 1 or weights) or ``labels`` (the id at the same place, or -100).

    Raises:
        RowError: types or lengths do not fit, padding is left in, or no token is trained.
    """
    ids = _numbers(column(columns, "input_ids"), "input_ids", np.int64)
    if not len(ids) or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise fault("bad tokens", "input_ids", "expected token ids of 0 or more", "fix the row", columns["input_ids"])
    attention = columns.get("attention_mask")
    if attention is not None and not _numbers(attention, "attention_mask", np.int64).all():
        raise fault("bad tokens", "attention_mask", "the row is padded", "remove the padding tokens from every column")
    masks = [
        (name, read(columns[name], ids))
        for name, read in (("loss_mask", _from_mask), ("labels", _from_labels))
        if columns.get(name) is not None
    ]
    if not masks:
        problem = f"tokenised rows need loss_mask or labels; the columns are {listed(columns)}"
        raise fault("missing column", "loss_mask", problem, "add one of them")
    for name, weights in masks:
        if len(weights) != len(ids):
            problem = f"{len(weights)} entries for {len(ids)} input_ids"
            raise fault("bad tokens", name, problem, "give one entry per token")
    if len(masks) == 2 and not np.array_equal(masks[0][1][1:] > 0, masks[1][1][1:] > 0):
        raise fault("mixed formats", "loss_mask", "it trains other tokens than labels", "keep one of the two")
    weights = masks[0][1]
    weights[0] = 0
    if not weights.any():
        raise fault("nothing trained", masks[0][0], "no token after the first is trained", "remove the row")
    return Tokenized(ids.astype(np.uint32), weights)


def _numbers(value: Any, name: str, kind: type[np.generic]) -> np.ndarray:
    """A flat array of numbers; integers stay integers."""
    fits = isinstance(value, list | np.ndarray)
    try:
        array = np.asarray(value) if fits else np.zeros(())
    except (ValueError, OverflowError):  # rows of different lengths, or a number beyond any integer type
        array = np.zeros(())
    if array.size == 0 and array.ndim == 1:
        array = array.astype(kind)
    wanted = "iu" if issubclass(kind, np.integer) else "biuf"
    if array.ndim != 1 or array.dtype.kind not in wanted:
        raise fault("bad tokens", name, "expected a flat list of numbers", "fix the row", value)
    return array.astype(kind)


def _from_mask(value: Any, _: np.ndarray) -> np.ndarray:
    weights = _numbers(value, "loss_mask", np.float64)
    if not np.isfinite(weights).all() or ((weights != 0) & ((weights < 1e-6) | (weights > 1e6))).any():
        raise fault("bad weight", "loss_mask", "expected 0, 1, or weights from 1e-6 to 1e6", "fix the row", value)
    return weights.astype(np.float32)


def _from_labels(value: Any, ids: np.ndarray) -> np.ndarray:
    labels = _numbers(value, "labels", np.int64)
    trained = labels != _IGNORED_LABEL
    if len(labels) == len(ids) and not (labels[trained] == ids[trained]).all():
        position = int(np.flatnonzero(trained & (labels != ids))[0])
        shifted = trained[:-1] & (labels[:-1] != ids[1:])
        hint = "they look shifted by one already; " if not shifted.any() else ""
        problem = f"{hint}position {position} has {labels[position]}, expected the input id {ids[position]} or -100"
        raise fault("bad tokens", "labels", problem, "a label is at the token it names, unshifted")
    weights: np.ndarray = trained.astype(np.float32)
    return weights
