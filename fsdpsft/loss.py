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


@dataclass(frozen=True)
class _Room:
    """Memory for what one chunk after another computes, [V, ...] wide, made once a forward pass.

    Blocks of this size, asked for and freed by each chunk, would be torn apart by the small ones that stay between
    them: measured on CPU in bfloat16, the process grew by 50 MiB a step.

    Attributes:
        product: [m, V] what the head's product and its gradient are in the compute dtype.
        logits: [m, V] float32; ``product`` itself where that is float32.
        part: [V, D] a chunk's share of the weight's gradient, where it is not added up in the compute dtype.
    """

    product: Tensor
    logits: Tensor
    part: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, rows: int, accumulate: torch.dtype) -> _Room:
        """For chunks of up to ``rows`` positions."""
        product = hidden.new_empty(rows, weight.shape[0])
        same = product.dtype == torch.float32
        return cls(
            product,
            product if same else torch.empty_like(product, dtype=torch.float32),
            None if hidden.dtype == accumulate else torch.empty_like(weight, dtype=hidden.dtype),
        )

    def multiply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``hidden [m, D] @ weight^T + bias`` as float32 [m, V]."""
        product, logits = self.product[: len(hidden)], self.logits[: len(hidden)]
        if bias is None:
            torch.mm(hidden, weight.t(), out=product)
        else:
            torch.addmm(bias, hidden, weight.t(), out=product)
        return product if self.logits is self.product else logits.copy_(product)

    def rounded(self, gradient: Tensor) -> Tensor:
        """The gradient [m, V], which lies in ``logits``, in the compute dtype."""
        return gradient if self.logits is self.product else self.product[: len(gradient)].copy_(gradient)


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, formula: HeadFormula, room: _Room | None = None
) -> Tensor:
    """Logits [M, V] in float32 of hidden states [M, D]; in ``room``, without gradients, where one is given."""
    if room is None:
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
    else:
        logits = room.multiply(hidden, weight, bias)
    if formula.scale != 1.0:
        logits = logits.mul_(formula.scale)
    if formula.softcap is not None:
        logits = logits.div_(formula.softcap).tanh_().mul_(formula.softcap)
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

    @property
    def wanted(self) -> bool:
        """Whether there is any to fill."""
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(self, part: slice, gradient: Tensor, hidden: Tensor, weight: Tensor, room: _Room) -> None:
        """Take in the gradient [m, V] of the logits at ``part``, which came from ``hidden`` [m, D]."""
        if self.bias is not None:
            self.bias.add_(gradient.sum(0))
        gradient = room.rounded(gradient)
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[part])
        if self.weight is None:
            return
        if room.part is None:
            self.weight.addmm_(gradient.t(), hidden)
        else:
            self.weight.add_(torch.mm(gradient.t(), hidden, out=room.part))


def _chunk(
    gradients: _Gradients, room: _Room, part: slice, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    targets: Tensor, weights: Tensor, formula: HeadFormula,
) -> Tensor:  # fmt: skip
    """Cross-entropies [m] at ``part``; adds their gradients."""
    hidden, targets, weights = hidden[part], targets[part], weights[part]
    logits = head_logits(hidden, weight, bias, formula, room)
    slope = None if formula.softcap is None else 1 - (logits / formula.softcap).square()
    token_losses, total = _chunk_loss(logits, targets)
    if gradients.wanted:
        gradient = _logits_gradient(logits, total, slope, targets, weights, formula)
        gradients.add(part, gradient, hidden, weight, room)
    return token_losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
        formula: HeadFormula, chunk_size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        token_losses = torch.empty_like(weights)
        accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
        gradients = _Gradients(
            torch.empty_like(hidden) if needs_hidden else None,
            torch.zeros_like(weight, dtype=accumulate) if needs_weight else None,
            torch.zeros_like(bias, dtype=accumulate) if needs_bias and bias is not None else None,
        )
        room = _Room.of(hidden, weight, min(chunk_size, len(hidden)), accumulate if needs_weight else hidden.dtype)
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            token_losses[part] = _chunk(gradients, room, part, hidden, weight, bias, targets, weights, formula)
        # Not saved but handed over: with no other owner left, autograd keeps what the backward returns. Of a saved
        # tensor it would make a copy, as large as the head.
        ctx.gradients, ctx.dtype = gradients, hidden.dtype
        ctx.mark_non_differentiable(token_losses)
        return (token_losses * weights).sum(), token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the loss was already differentiated, and its gradients are used up"
        hidden, weight, bias = (_scaled(g, grad_loss, ctx.dtype) for g in vars(gradients).values())
        return hidden, weight, bias, None, None, None, None


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``gradient * factor`` in at least float32, rounded once to ``dtype``; in place where no rounding is needed."""
    if gradient is None:
        return None
    accurate = gradient.to(torch.promote_types(gradient.dtype, factor.dtype))
    return accurate.mul_(factor).to(dtype)


def default_chunk(device_type: str) -> int:
    """Positions of a chunk where no number is asked for: as few as a device's speed allows.

    Each chunk reads and writes the weight's gradient once, beside which its three products should take long. How many
    positions that takes depends on the device alone, for both grow with the vocabulary and with the hidden size.
    """
    return 512 if device_type == "cpu" else 4096


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
    *, formula: HeadFormula = HeadFormula(), chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weighted sum of the cross-entropies at trained positions; the caller divides once by the global weight.

    Args:
        hidden: [M, D] final hidden states at trained positions; M may be 0.
        weight: [V, D] the head's matrix; ``bias`` [V] where the head has one.
        targets: [M] int64 ids to predict.
        weights: [M] float32 weight of each token.
        formula: scale and soft cap of the logits.
        chunk_size: positions whose logits exist at one time; None for ``default_chunk``.

    Returns:
        The sum (a float32 scalar with gradients for ``hidden``, ``weight`` and ``bias``) and the unweighted loss of
        each token [M], detached.
    """
    chunk_size = chunk_size or default_chunk(hidden.device.type)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, weights, formula, chunk_size)  # type: ignore[no-any-return,no-untyped-call]
