"""Where the gradient of the head's weight goes: one gradient for a weight that is embedding and head at once.

Autograd makes two, each as large as the head, and adds them up; with a large vocabulary and a small model they are most
of a step's memory. Here the head's gradient, which is ready first, waits for the embedding's backward, which adds the
rows of its tokens to it. The sum is made in the precision in which the head's was added up, and rounded once, or not at
all where the weight stands for a master in that precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from fsdpsft.errors import ModelError

Take = Callable[[Tensor], None]


def taker(weight: Tensor) -> Take | None:
    """What takes a weight's gradient, in any precision, instead of autograd; None where autograd does."""
    take: Take | None = getattr(weight, "take_gradient", None)
    return take


class TiedGradient:
    """Carries the head's gradient [V, D] to the embedding's backward."""

    def __init__(self) -> None:
        self._waiting: Tensor | None = None

    def put(self, gradient: Tensor) -> None:
        """Leave the head's gradient, which belongs to the embedding's backward from now on."""
        assert self._waiting is None, "the embedding's backward never took the head's last gradient"
        self._waiting = gradient

    def take(self) -> Tensor | None:
        """The gradient that waits, once."""
        gradient, self._waiting = self._waiting, None
        return gradient


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.tied, ctx.take, ctx.size = padding_idx, tied, taker(weight), weight.shape
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        gradient = ctx.tied.take()
        if gradient is None:
            gradient = grad_output.new_zeros(ctx.size)
        rows = grad_output.to(gradient.dtype)
        if ctx.padding_idx is not None:
            rows = rows.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        # Unlike index_add_, it adds in the same order each time on CUDA too.
        gradient.index_put_((ids,), rows, accumulate=True)
        if ctx.take is None:
            return gradient.to(grad_output.dtype), None, None, None
        ctx.take(gradient)
        return None, None, None, None


def can_tie_gradients(causal_lm: PreTrainedModel, *_: Any) -> bool:
    """Whether embedding and head share a weight, and the embedding does no more than look rows up."""
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    plain = isinstance(embedding, nn.Embedding) and type(embedding).forward is nn.Embedding.forward
    if not plain or embedding.weight is not getattr(head, "weight", None):
        return False
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


def tie_gradients(causal_lm: PreTrainedModel) -> None:
    """Let the embedding's backward finish the gradient of a weight that it shares with the head."""
    embedding, tied = causal_lm.get_input_embeddings(), TiedGradient()
    embedding.tied_gradient = tied
    embedding.forward = lambda ids: _Embed.apply(  # type: ignore[no-untyped-call]
        embedding.weight, ids, embedding.padding_idx, tied
    )


def tied_gradient(causal_lm: PreTrainedModel) -> TiedGradient | None:
    """Where the loss leaves the head's gradient; None where autograd adds the two up."""
    tied: TiedGradient | None = getattr(causal_lm.get_input_embeddings(), "tied_gradient", None)
    return tied


@contextmanager
def prove_tied_gradients(causal_lm: PreTrainedModel, *_: Any) -> Iterator[None]:
    """Around ``tie_gradients``: compare its sum with autograd's, on the model's embedding with a weight of eight rows.

    Raises:
        ModelError: they differ.
    """
    yield
    embedding: Any = causal_lm.get_input_embeddings()
    generator, ids, own = torch.Generator().manual_seed(0), torch.tensor([[3, 0, 5, 3]]), embedding.weight
    small, head, weights = (torch.randn(shape, generator=generator) for shape in ((8, 4), (8, 4), (1, 4, 4)))
    padding = embedding.padding_idx if (embedding.padding_idx or 0) < len(small) else None
    small.requires_grad_()
    looked_up = nn.functional.embedding(ids, small, padding)
    expected = head + torch.autograd.grad((looked_up * weights).sum(), small)[0]
    embedding._parameters["weight"] = small
    try:
        embedding.tied_gradient.put(head.clone())
        found = torch.autograd.grad((embedding(ids) * weights).sum(), small)[0]
    finally:
        embedding._parameters["weight"] = own
    if not torch.allclose(found, expected):
        raise ModelError(f"the gradient of {type(causal_lm).__name__}'s tied weight is wrong. Please report its name.")
