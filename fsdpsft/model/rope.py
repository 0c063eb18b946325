"""Rotary frequencies that depend on how long a document is: each document gets its own.

transformers looks at the largest position of a whole batch: with ``longrope`` (Phi 3 and 4) one document beyond
``original_max_position_embeddings`` switches all others of its batch to the long frequencies, and under Ulysses each
rank would judge by its own slice. Here the choice is made per document, as it is made for a document on its own.

With ``dynamic`` scaling every length beyond ``max_position_embeddings`` has frequencies of its own, and a module's
answer depends on what it has seen before; such lengths are refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fsdpsft.batch import PackedBatch
from fsdpsft.errors import ModelError


def rope_by_document(causal_lm: PreTrainedModel, *, max_length: int | None) -> int | None:
    """Let a model's rotary frequencies follow each document's length, in place.

    Args:
        causal_lm: a model whose forward is given ``attention_context``.
        max_length: longest document; None: not known.

    Returns:
        The length beyond which a document has the long frequencies: its tokens then are to be marked in
        ``AttentionContext.long``. None where frequencies do not depend on length.

    Raises:
        ModelError: frequencies that depend on length in another way, where a document may be so long.
    """
    limit: int | None = None
    for name, module in causal_lm.named_modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and kinds == "longrope":
            limit = int(module.config.rope_parameters["original_max_position_embeddings"])
            _by_document(causal_lm, module, limit)
        elif kinds is not None:
            _check_static(causal_lm, name, kinds, max_length)
    return limit


def _check_static(causal_lm: PreTrainedModel, name: str, kinds: str | dict[str, str], max_length: int | None) -> None:
    changing = [kind for kind in ([kinds] if isinstance(kinds, str) else kinds.values()) if _changes(kind)]
    if not changing:
        return
    config = causal_lm.config.get_text_config()
    groups = [config.rope_parameters, *config.rope_parameters.values()]  # of all layers, or by type of layer
    originals = [g.get("original_max_position_embeddings") for g in groups if isinstance(g, dict)]
    bound = min([config.max_position_embeddings, *filter(None, originals)])
    if max_length is None or max_length > bound:
        raise ModelError(
            f"{type(causal_lm).__name__}.{name} has rope_type={changing[0]}: beyond {bound} tokens its frequencies "
            "depend on the longest document of a batch, so documents would change each other. Set "
            f"data.max_length={bound} or less (it is {max_length}); data.truncation says what becomes of longer ones."
        )


def _changes(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _by_document(causal_lm: PreTrainedModel, rotary: Any, limit: int) -> None:
    base: Any = causal_lm.base_model
    plain, forward, marked = rotary.forward, base.forward, _Marked()

    def rotate(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if marked.long is None:
            return plain(x, position_ids)  # type: ignore[no-any-return]
        # Positions decide: kept below the switch for the short frequencies, one beyond it added for the long ones.
        short = plain(x, position_ids.clamp(max=limit - 1))
        beyond = position_ids.new_full((position_ids.shape[0], 1), limit)
        long = plain(x, torch.cat([position_ids, beyond], dim=1))
        cos, sin = (torch.where(marked.long[..., None], a[:, :-1], b) for a, b in zip(long, short, strict=True))
        return cos, sin

    def run(*args: Any, attention_context: Any = None, **kwargs: Any) -> Any:
        marked.long = None if attention_context is None else attention_context.long
        return forward(*args, attention_context=attention_context, **kwargs)

    rotary.forward, base.forward = rotate, run


class _Marked:
    """The tokens of long documents in the micro-batch under way, [R, S] bool; None: not told."""

    long: Tensor | None = None


def long_tokens(batch: PackedBatch, limit: int, rank: int, size: int) -> Tensor:
    """[R, S/P] bool, on the host: which of this rank's tokens belong to documents longer than ``limit``."""
    rows, row_length = batch.input_ids.shape
    documents = np.zeros(len(batch.seqlens), dtype=bool)  # filler at the end is none
    documents[: len(batch.lengths)] = np.array(batch.lengths) > limit
    tokens = np.repeat(documents, batch.seqlens).reshape(rows, size, row_length // size)
    return torch.from_numpy(np.ascontiguousarray(tokens[:, rank]))
