"""Softmax, cross-entropy and gradient of the head's logits in one Triton kernel, for CUDA.

It reads the logits twice and writes the gradient over them, 6 to 7 bytes a bfloat16 logit, where ``plain_softmax`` of
``loss.py``, its slow twin, moves about 28. Not yet measured on a GPU. To take it out, remove this file, its test, and
what ``loss.softmax_for`` says of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of a row at work at one time


@triton.jit  # type: ignore[untyped-decorator]
def _shaped(x, scale, softcap, capped: tl.constexpr):  # type: ignore[no-untyped-def]
    """``softcap * tanh(scale * x / softcap)`` in float32."""
    x = x.to(tl.float32) * scale
    if capped:
        x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _one_row(  # type: ignore[no-untyped-def]
    logits, targets, losses, scale, softcap,
    columns: tl.constexpr, capped: tl.constexpr, gradient: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    at_target = _shaped(tl.load(logits + target), scale, softcap, capped)
    offsets = tl.arange(0, block)
    # Each lane's largest logit and sum of exponentials, the target's apart: its gradient is minus the others' share,
    # which a difference from 1 would round away.
    largest = tl.full([block], -1e38, tl.float32)
    total = tl.zeros([block], tl.float32)
    for start in range(0, columns, block):
        at = start + offsets
        x = _shaped(tl.load(logits + at, mask=at < columns, other=0.0), scale, softcap, capped)
        x = tl.where((at < columns) & (at != target), x, float("-inf"))
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    top = tl.maximum(tl.max(largest, 0), at_target)
    others = tl.sum(total * tl.exp(largest - top), 0)
    everything = others + tl.exp(at_target - top)
    tl.store(losses + row, tl.log(everything) - (at_target - top))
    if gradient:
        for start in range(0, columns, block):
            at = start + offsets
            x = _shaped(tl.load(logits + at, mask=at < columns, other=0.0), scale, softcap, capped)
            slope = tl.where(at == target, -others, tl.exp(x - top)) / everything
            if capped:
                slope *= 1 - (x / softcap) * (x / softcap)
            tl.store(logits + at, slope.to(logits.dtype.element_ty), mask=at < columns)


def fused_softmax(product: Tensor, targets: Tensor, formula: tuple[float, float | None], gradient: bool) -> Tensor:
    """What ``loss.plain_softmax`` does, for contiguous logits [m, V] of at most float32."""
    losses = torch.empty(len(product), dtype=torch.float32, device=product.device)
    scale, softcap = formula
    if len(product):
        _one_row[(len(product),)](
            product, targets, losses, float(scale), float(softcap or 1),
            product.shape[1], softcap is not None, gradient, BLOCK, num_warps=8,
        )  # fmt: skip
    return losses
