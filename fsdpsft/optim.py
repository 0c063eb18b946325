"""The optimiser: parameter groups, AdamW, and gradient clipping over sharded parameters.

AdamW: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Elements that ``MixedAdamW`` updates at one time: on CPU their five float32 copies stay in the cache.
_CPU_PIECE, _PIECE = 2**18, 2**25


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: matrices with weight decay; norms, biases and other vectors without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = (
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


class MixedAdamW(torch.optim.Optimizer):
    """AdamW whose moments are kept in another dtype than the weights; all arithmetic is in float32.

    bfloat16 moments halve the optimiser's memory. Their 8 significant bits still resolve the second moment's decay at
    beta2 = 0.95; at 0.999 an update would round away, which ``config.py`` refuses.

    Args:
        groups: as from ``parameter_groups``.
        state_dtype: of both moments.
    """

    def __init__(
        self,
        groups: list[dict[str, object]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._state_dtype = state_dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    # On the host, so that reading it waits for no device.
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=self._state_dtype)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self._state_dtype)
                state["step"] += 1
                tensors = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
                for pieces in _pieces(*(_local(tensor) for tensor in tensors)):
                    _adamw_update(pieces, group, int(state["step"]))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut alike into pieces of whole rows, so that float32 copies are small beside a weight."""
    rows_of = [tensor if tensor.ndim else tensor[None] for tensor in tensors]
    size = _CPU_PIECE if tensors[0].device.type == "cpu" else _PIECE
    rows = max(1, size // max(1, rows_of[0][:1].numel()))
    for start in range(0, len(rows_of[0]), rows):
        yield tuple(tensor[start : start + rows] for tensor in rows_of)


def _adamw_update(tensors: tuple[Tensor, ...], group: dict[str, Any], step: int) -> None:
    """One elementwise AdamW update, in place, in float32 whatever the tensors' own dtypes.

    Args:
        tensors: parameter, gradient, first and second moment.
    """
    parameter, gradient, first, second = tensors
    beta1, beta2 = group["betas"]
    gradient = gradient.float()
    mean = first.float().lerp_(gradient, 1 - beta1)
    square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first.copy_(mean)
    second.copy_(square)
    scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    updated = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
    parameter.copy_(updated.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**step)))


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    state_dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters: torch's fused kernel, or ``MixedAdamW`` where moments differ in dtype."""
    groups = parameter_groups(model, weight_decay)
    if all(p.dtype == state_dtype for p in model.parameters() if p.requires_grad):
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return MixedAdamW(groups, lr=lr, betas=betas, eps=eps, state_dtype=state_dtype)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most ``max_norm``; nothing is read back by the host.

    Returns:
        The L2 norm before clipping, a scalar tensor, the same on every rank. Non-finite where a gradient is.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
