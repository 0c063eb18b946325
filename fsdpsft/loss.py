"""The training loss: a sum of token cross-entropies from hidden states, head and softmax in one chunked function.

Full logits [M, V] never exist. The forward works in chunks: the head's product, the softmax, its gradient, and the two
products that carry the gradient on. Only the gradients are kept for the backward (the method of Liger-Kernel's fused
linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989). A chunk's logits exist in the compute dtype alone; the softmax
computes in float32. The head's weight gradient is accumulated in float32 over the chunks and rounded once.

Shapes: M trained positions, D hidden size, V vocabulary (legend in ``batch.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

# Logits that the softmax holds in float32 at one time; on CPU 4 MiB, which fit the cache.
_CPU_PIECE, _PIECE = 2**20, 2**25
# Columns of the vocabulary at a time, whose weight gradient is computed in the compute dtype and added in float32.
_COLUMNS = 8192


class HeadFormula(NamedTuple):
    """What a model's head does beyond its matrix product: ``cap * tanh(scale * (h W^T + b) / cap)``."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, product: Tensor) -> Tensor:
        """Logits of the head's product, in at least float32; the product itself where nothing is to be done."""
        logits, accurate = product, torch.promote_types(product.dtype, torch.float32)
        if self.scale != 1.0:
            logits = logits.to(accurate) * self.scale
        if self.softcap is not None:
            logits = (logits.to(accurate) / self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """The soft cap's derivative at these logits; None without one."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square()


LINEAR = HeadFormula()


def _slices(total: int, size: int) -> list[slice]:
    """``range(total)`` in pieces of ``size``, at least 1; the last may be smaller."""
    size = max(size, 1)
    return [slice(start, start + size) for start in range(0, total, size)]


def _few_rows(logits: Tensor) -> list[slice]:
    """The rows of [m, V], as many at a time as may be in float32."""
    piece = _CPU_PIECE if logits.device.type == "cpu" else _PIECE
    return _slices(len(logits), piece // logits.shape[1])


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

    def add(self, part: slice, gradient: Tensor, factor: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Take in ``factor`` [m, 1] times the gradient [m, V] of the product at ``part``, from ``hidden`` [m, D].

        The factor goes to the narrow side of each product; in float32, as rounding it would scale all gradients.
        """
        if self.bias is not None:
            for rows in _few_rows(gradient):
                self.bias.add_((gradient[rows] * factor[rows]).sum(0))
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[part]).mul_(factor)
        if self.weight is None:
            return
        hidden = (hidden * factor).to(hidden.dtype)
        if self.weight.dtype == gradient.dtype:
            self.weight.addmm_(gradient.t(), hidden)
        else:
            for column in _slices(len(weight), _COLUMNS):
                self.weight[column].add_(torch.mm(gradient[:, column].t(), hidden))


Softmax = Callable[[Tensor, Tensor, HeadFormula, bool], Tensor]


def plain_softmax(product: Tensor, targets: Tensor, formula: HeadFormula, gradient: bool) -> Tensor:
    """Cross-entropies [m] of targets [m]; with ``gradient``, their gradients replace the head's product [m, V].

    The gradients lack the formula's scale. A few rows at a time, so that no more than these exist in float32. The
    targets' own gradients are near zero where a token is certain, and so computed by ``expm1``.
    """
    accurate = torch.promote_types(product.dtype, torch.float32)
    losses = product.new_empty(len(product), dtype=accurate)
    for rows in _few_rows(product):
        chosen, logits = targets[rows, None], formula.logits(product[rows])
        slope = formula.slope(logits)
        log_p = torch.log_softmax(logits, -1, dtype=accurate)
        at_target = log_p.gather(1, chosen)
        losses[rows] = -at_target.squeeze(1)
        if not gradient:
            continue
        change = torch.exp(log_p, out=product[rows] if slope is None else log_p)
        change.scatter_(1, chosen, torch.expm1(at_target).to(change.dtype))
        if slope is not None:
            torch.mul(change, slope, out=product[rows])
    return losses


@cache
def softmax_for(device: torch.device, dtype: torch.dtype) -> Softmax:
    """On CUDA the fused kernel, if it runs there and gives what ``plain_softmax`` gives, which serves elsewhere."""
    if device.type != "cuda" or dtype == torch.float64:
        return plain_softmax
    try:
        from fsdpsft.loss_kernel import fused_softmax

        fault = disagreement(fused_softmax, device, dtype)
    except Exception as error:  # noqa: BLE001  # a compiler that fails may raise anything; we do without it
        fault = f"{type(error).__name__}: {error}"
    log.info("The head's softmax: %s", "a fused Triton kernel" if fault is None else f"plain operators, as {fault}")
    return fused_softmax if fault is None else plain_softmax


def disagreement(softmax: Softmax, device: torch.device, dtype: torch.dtype) -> str | None:
    """What ``softmax`` does otherwise than ``plain_softmax`` on made-up logits of several blocks; None: nothing."""
    dice = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 9001, generator=dice) * 4).to(device, dtype)
    targets = torch.tensor([0, 9000, 4096, 17, 4095], device=device)
    logits[3, 17] = 40.0  # a certain token
    for formula in (LINEAR, HeadFormula(0.5, 3.0)):
        for gradient in (True, False):
            found, expected = logits.clone(), logits.float()
            losses = softmax(found, targets, formula, gradient), plain_softmax(expected, targets, formula, gradient)
            if not torch.allclose(*losses, rtol=1e-5, atol=1e-5):
                return f"its losses with {formula} differ"
            if not torch.allclose(found.float(), expected, rtol=4 * torch.finfo(dtype).eps + 1e-5, atol=1e-6):
                return f"its gradients with {formula} differ"
    return None


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """``hidden [m, D] @ weight^T + bias`` in the first rows of ``buffer`` [.., V]."""
    product = buffer[: len(hidden)]
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
        softmax = softmax_for(hidden.device, hidden.dtype)
        # One buffer for all chunks: if each allocated its own, small tensors would fragment the memory in between.
        buffer = hidden.new_empty(min(chunk_size, len(hidden)), weight.shape[0])
        for part in _slices(len(hidden), chunk_size):
            product = _product(hidden[part], weight, bias, buffer)
            token_losses[part] = softmax(product, targets[part], formula, any(ctx.needs_input_grad))
            gradients.add(part, product, weights[part, None] * formula.scale, hidden[part], weight)
        # An attribute instead of a saved tensor: autograd would copy what it saved, and this is as large as the head.
        ctx.gradients, ctx.dtype, ctx.take_weight_gradient = gradients, hidden.dtype, take_weight_gradient
        ctx.mark_non_differentiable(token_losses)
        return (token_losses * weights).sum(), token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the backward ran a second time; its gradients are used up"
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
    """Positions of a chunk where none are asked for: as few as the device's speed allows.

    Each chunk reads and writes the weight's gradient once; its three products should take much longer than that. On CPU
    a large vocabulary gets fewer positions, as 32 Mi logits of a small model outweigh all its activations.
    """
    return min(512, max(128, 2**25 // vocabulary)) if device_type == "cpu" else 4096


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
    *, formula: HeadFormula = LINEAR, chunk_size: int | None = None,
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
        take_weight_gradient: called in the backward with the gradient of ``weight`` [V, D] in float32; autograd then
            gets none.

    Returns:
        The sum (a float32 scalar with gradients for ``hidden``, ``weight`` and ``bias``) and the unweighted loss of
        each token [M], detached.
    """
    chunk_size = chunk_size or default_chunk(hidden.device.type, weight.shape[0])
    if not torch.is_grad_enabled():  # a Function sees only that its inputs require gradients
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, weights, formula, chunk_size, take_weight_gradient)  # type: ignore[no-any-return,no-untyped-call]
