"""The slow, obvious twin of the whole trainer, in float64: one sample at a time, its own mask, its own AdamW.

It shares with the trainer the model's class (plain transformers, eager attention) and the order of the data, nothing
else: no packing, no chunked loss, no fused optimiser, no process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

Row = tuple[list[int], list[float]]  # token ids and their loss weights, aligned


def sample_loss(model: nn.Module, ids: Sequence[int], weights: Sequence[float]) -> Tensor:
    """Weighted sum of -log p(id | ids before it) over the trained ids of one sample."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    total = torch.zeros((), dtype=torch.float64)
    for position in range(1, len(ids)):
        if weights[position] > 0:
            log_probabilities = torch.log_softmax(logits[position - 1].double(), dim=-1)
            total = total - weights[position] * log_probabilities[ids[position]]
    return total


class SlowAdamW:
    """AdamW as in the paper, one parameter at a time; decay on matrices only, so not on experts' stacked biases."""

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], betas: tuple[float, float], eps: float, weight_decay: float
    ):
        parameters = [p for _, p in named]
        self.parameters, self.betas, self.eps, self.weight_decay = parameters, betas, eps, weight_decay
        self.decays = [p.ndim >= 2 and not name.endswith("bias") for name, p in named]
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]
        self.count = 0

    def step(self, gradients: list[Tensor], lr: float) -> None:
        self.count += 1
        b1, b2 = self.betas
        moments = zip(self.first, self.second, strict=True)
        for p, decays, g, (m, v) in zip(self.parameters, self.decays, gradients, moments, strict=True):
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            if decays:
                p.data.mul_(1 - lr * self.weight_decay)
            m_hat, v_hat = m / (1 - b1**self.count), v / (1 - b2**self.count)
            p.data.sub_(lr * m_hat / (v_hat.sqrt() + self.eps))


def train_reference(
    model_path: Path,
    batches: Sequence[Sequence[Row]],
    lr_of: Callable[[int], float],
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    wrap: Callable[[nn.Module], nn.Module] = lambda m: m,
) -> dict[str, Any]:
    """Train on given batches of rows and return losses, gradient norms before clipping, and the final weights."""
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    model = wrap(model).train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    optimizer = SlowAdamW(named, betas, eps, weight_decay)
    losses, norms = [], []
    for index, rows in enumerate(batches):
        model.zero_grad()
        denominator = math.fsum(w for _, weights in rows for w in weights[1:] if w > 0)
        loss = 0.0
        for ids, weights in rows:
            part = sample_loss(model, ids, weights) / denominator
            if part.requires_grad:
                part.backward()
            loss += part.item()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        norm = math.sqrt(math.fsum(float(g.square().sum()) for g in gradients))
        scale = min(1.0, clip / (norm + 1e-6))
        optimizer.step([g * scale for g in gradients], lr_of(index))
        losses.append(loss)
        norms.append(norm)
    return {"losses": losses, "norms": norms, "weights": {n: p.detach() for n, p in model.named_parameters()}}
