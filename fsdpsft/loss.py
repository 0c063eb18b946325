"""The training loss: a sum of token cross-entropies from hidden states, head and softmax in one chunked function.

Full logits [M, V] are never held: chunk by chunk, the head's product, the softmax, its gradient and the two gradient
products are done in the forward, three matrix products in all and nothing kept for the backward but the gradients
themselves (the method of Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989). The head's
weight gradient is accumulated in float32 over the chunks and rounded once.

Shapes: M trained positions, D hidden size, V vocabulary (legend in ``batch.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class HeadFormula:
    """What a model's head does beyond its matrix product: ``cap * tanh(scale * (h W^T + b) / cap)``."""

    scale: float = 1.0
    softcap: float | None = None


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, formula: HeadFormula) -> Tensor:
    """Logits [M, V] in float32 of hidden states [M, D]."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if formula.scale != 1.0:
        logits = logits * formula.scale
    if formula.softcap is not None:
        logits = formula.softcap * torch.tanh(logits / formula.softcap)
    return logits


def _chunk_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies [m] of logits [m, V], which become exp(logits - their largest) in place, and the sums of those.

    In place, and with one pass of exponentials for both the loss and its gradient, because on a vocabulary of 150
    thousand these passes over memory cost as much as a matrix product.
    """
    chosen, largest = logits.gather(1, targets[:, None]).squeeze(1), logits.amax(dim=-1)
    total = logits.sub_(largest[:, None]).exp_().sum(dim=-1)
    return total.log() + largest - chosen, total


def _logits_gradient(
    exponentials: Tensor, total: Tensor, slope: Tensor | None, targets: Tensor, weights: Tensor, formula: HeadFormula
) -> Tensor:
    """Turn ``_chunk_loss``'s exponentials [m, V] into the gradient of the weighted loss before the formula, in place.

    Args:
        slope: derivative of the soft cap at each logit; None without one.
    """
    factor = (weights * formula.scale).to(exponentials.dtype)
    gradient = exponentials.mul_((factor / total)[:, None])
    gradient.scatter_add_(1, targets[:, None], -factor[:, None])
    return gradient if slope is None else gradient.mul_(slope)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
        formula: HeadFormula, chunk_size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        token_losses = torch.empty_like(weights)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if needs_bias and bias is not None else None
        for start in range(0, hidden.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            logits = head_logits(hidden[part], weight, bias, formula)
            slope = None if formula.softcap is None else 1 - (logits / formula.softcap).square()
            token_losses[part], total = _chunk_loss(logits, targets[part])
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            gradient = _logits_gradient(logits, total, slope, targets[part], weights[part], formula)
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, gradient, hidden[part])
        ctx.save_for_backward(grad_hidden, _as(grad_weight, weight), _as(grad_bias, bias))
        ctx.mark_non_differentiable(token_losses)
        return (token_losses * weights).sum(), token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [g if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return (*gradients, None, None, None, None)


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or like is None else gradient.to(like.dtype)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """``total [V, D] += gradient^T [V, m] @ hidden [m, D]``, in the precision of ``total``."""
    if total.dtype == hidden.dtype:
        total.addmm_(gradient.t(), hidden)
    else:
        total += torch.mm(gradient.t(), hidden)


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
    *, formula: HeadFormula = HeadFormula(), chunk_size: int = 4096,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weighted sum of the cross-entropies at trained positions; the caller divides once by the global weight.

    Args:
        hidden: [M, D] final hidden states at trained positions; M may be 0.
        weight: [V, D] the head's matrix; ``bias`` [V] where the head has one.
        targets: [M] int64 ids to predict.
        weights: [M] float32 weight of each token.
        formula: scale and soft cap of the logits.
        chunk_size: positions whose logits exist at one time.

    Returns:
        The sum (a float32 scalar with gradients for ``hidden``, ``weight`` and ``bias``) and the unweighted loss of
        each token [M], detached.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, weights, formula, chunk_size)  # type: ignore[no-any-return,no-untyped-call]
