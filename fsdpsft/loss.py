"""The training loss: a sum of token cross-entropies from hidden states, head and softmax in one chunked function.

Full logits [M, V] are never held: chunk by chunk, the head's product, the softmax, its gradient and the two gradient
products are done in the forward, three matrix products in all and nothing kept for the backward but the gradients
themselves (the method of Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989). A chunk's
logits exist in the compute dtype alone; the softmax takes them through float32 by pieces of the vocabulary. The head's
weight gradient is accumulated in float32 over the chunks and rounded once.

Shapes: M trained positions, D hidden size, V vocabulary (legend in ``batch.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Width of the softmax's pieces of the vocabulary: on CPU, of 512 rows one is 4 MiB.
_CPU_COLUMNS, _COLUMNS = 2048, 16384


@dataclass(frozen=True)
class HeadFormula:
    """What a model's head does beyond its matrix product: ``cap * tanh(scale * (h W^T + b) / cap)``."""

    scale: float = 1.0
    softcap: float | None = None


def _apply(formula: HeadFormula, product: Tensor) -> Tensor:
    """Logits in at least float32 of the head's product [m, v]: the product itself where nothing is to be done."""
    logits = product.to(torch.promote_types(product.dtype, torch.float32))
    if formula.scale != 1.0:
        logits = logits * formula.scale
    if formula.softcap is not None:
        logits = (logits / formula.softcap).tanh_().mul_(formula.softcap)
    return logits


def _slope(formula: HeadFormula, logits: Tensor) -> Tensor | None:
    """The derivative of the soft cap at the logits that ``_apply`` gave; None without one."""
    return None if formula.softcap is None else 1 - (logits / formula.softcap).square()


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, formula: HeadFormula) -> Tensor:
    """Logits [..., V] in float32 of hidden states [..., D]."""
    return _apply(formula, torch.nn.functional.linear(hidden, weight, bias)).float()


def _columns(vocabulary: int, device_type: str) -> list[slice]:
    """The vocabulary in pieces, through which the softmax and the rounding of its gradient go one after another.

    So only one piece at a time exists in float32, and on CPU what a pass over it writes is in the cache for the next.
    """
    width = _CPU_COLUMNS if device_type == "cpu" else _COLUMNS
    return [slice(start, start + width) for start in range(0, vocabulary, width)]


@dataclass(frozen=True)
class _Gradients:
    """Gradients of the loss sum, filled chunk by chunk; None where not asked for.

    Attributes:
        hidden: [M, D] in the compute dtype.
        weight: [V, D] added up over the chunks in float32 (float64 for a float64 head); ``bias`` [V] likewise.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def add(self, part: slice, gradient: Tensor, hidden: Tensor, weight: Tensor, columns: list[slice]) -> None:
        """Take in the gradient [m, V] of the head's product at ``part``, which came from ``hidden`` [m, D]."""
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype))
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[part])
        if self.weight is None:
            return
        if self.weight.dtype == gradient.dtype:
            self.weight.addmm_(gradient.t(), hidden)
        else:
            for column in columns:
                self.weight[column].add_(torch.mm(gradient[:, column].t(), hidden))


def _softmax(
    product: Tensor, targets: Tensor, weights: Tensor, formula: HeadFormula, columns: list[slice]
) -> Tensor:  # fmt: skip
    """Cross-entropies [m] of targets [m]; the head's product [m, V] becomes the gradient of their weighted sum.

    One pass of exponentials serves both: each piece's are kept relative to its own largest logit and brought to the
    softmax by one factor for each row. The targets' own gradients, near zero where a token is certain, are set apart.
    """
    targets = targets[:, None]
    chosen = _apply(formula, product.gather(1, targets))
    weights = weights[:, None].to(chosen.dtype)
    pieces = []
    for column in columns:
        logits = _apply(formula, product[:, column])
        largest = logits.amax(dim=-1, keepdim=True)
        slope = _slope(formula, logits)
        logits.sub_(largest).exp_()
        pieces.append((largest, logits.sum(dim=-1, keepdim=True)))
        if slope is not None:
            logits.mul_(slope)
        if logits.dtype != product.dtype or formula != HeadFormula():  # else it is that piece of the product
            product[:, column] = logits
    log_total = torch.cat([largest + total.log() for largest, total in pieces], -1).logsumexp(-1, keepdim=True)
    for column, (largest, _) in zip(columns, pieces, strict=True):
        product[:, column].mul_(weights * formula.scale * (largest - log_total).exp())
    at_target = weights * formula.scale * torch.expm1(chosen - log_total)
    slope = _slope(formula, chosen)
    at_target = at_target if slope is None else at_target * slope
    product.scatter_(1, targets, at_target.to(product.dtype))
    return (log_total - chosen).squeeze(1)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
    """``hidden [m, D] @ weight^T + bias`` in the first rows of ``room`` [.., V]."""
    product = room[: len(hidden)]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=product)
    return torch.addmm(bias, hidden, weight.t(), out=product)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
        formula: HeadFormula, chunk_size: int, take_weight_gradient: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        token_losses = torch.empty_like(weights)
        accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
        gradients = _Gradients(
            torch.empty_like(hidden) if needs_hidden else None,
            torch.zeros_like(weight, dtype=accumulate) if needs_weight else None,
            torch.zeros_like(bias, dtype=accumulate) if needs_bias and bias is not None else None,
        )
        columns = _columns(weight.shape[0], hidden.device.type)
        # One room for all chunks: blocks of this size, asked for and freed by each, would be torn apart by small ones.
        room = hidden.new_empty(min(chunk_size, len(hidden)), weight.shape[0])
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            product = _product(hidden[part], weight, bias, room)
            token_losses[part] = _softmax(product, targets[part], weights[part], formula, columns)
            gradients.add(part, product, hidden[part], weight, columns)
        # Not saved but handed over: with no other owner left, autograd keeps what the backward returns. Of a saved
        # tensor it would make a copy, as large as the head.
        ctx.gradients, ctx.dtype, ctx.take_weight_gradient = gradients, hidden.dtype, take_weight_gradient
        ctx.mark_non_differentiable(token_losses)
        return (token_losses * weights).sum(), token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the loss was already differentiated, and its gradients are used up"
        hidden, bias = _scaled(gradients.hidden, grad_loss, ctx.dtype), _scaled(gradients.bias, grad_loss, ctx.dtype)
        if gradients.weight is not None and ctx.take_weight_gradient is not None:
            ctx.take_weight_gradient(gradients.weight.mul_(grad_loss))
            return hidden, None, bias, None, None, None, None, None
        return hidden, _scaled(gradients.weight, grad_loss, ctx.dtype), bias, None, None, None, None, None


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``gradient * factor`` in at least float32, rounded once to ``dtype``; in place where no rounding is needed."""
    if gradient is None:
        return None
    accurate = gradient.to(torch.promote_types(gradient.dtype, factor.dtype))
    return accurate.mul_(factor).to(dtype)


def default_chunk(device_type: str, vocabulary: int) -> int:
    """Positions of a chunk where no number is asked for: as few as a device's speed allows.

    Each chunk reads and writes the weight's gradient once, beside which its three products should take long. How many
    positions that takes depends on the device alone, for both grow with the vocabulary and with the hidden size; on CPU
    a large vocabulary gets fewer, as 32 Mi logits of small models are more than all their activations.
    """
    return min(512, max(128, 2**25 // vocabulary)) if device_type == "cpu" else 4096


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
    *, formula: HeadFormula = HeadFormula(), chunk_size: int | None = None,
    take_weight_gradient: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weighted sum of the cross-entropies at trained positions; the caller divides once by the global weight.

    Args:
        hidden: [M, D] final hidden states at trained positions; M may be 0.
        weight: [V, D] the head's matrix; ``bias`` [V] where the head has one.
        targets: [M] int64 ids to predict.
        weights: [M] float32 weight of each token.
        formula: scale and soft cap of the logits.
        chunk_size: positions whose logits exist at one time; None for ``default_chunk``.
        take_weight_gradient: given the gradient of ``weight`` [V, D], in float32, in the backward; autograd then gets
            none. For a weight whose gradient is finished elsewhere.

    Returns:
        The sum (a float32 scalar with gradients for ``hidden``, ``weight`` and ``bias``) and the unweighted loss of
        each token [M], detached.
    """
    chunk_size = chunk_size or default_chunk(hidden.device.type, weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, weights, formula, chunk_size, take_weight_gradient)  # type: ignore[no-any-return,no-untyped-call]
