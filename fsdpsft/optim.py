"""The optimiser: parameter groups, AdamW, and gradient clipping over sharded parameters.

AdamW: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

# Elements that ``MixedAdamW`` updates at one time: on CPU their five float32 copies stay in the cache.
_CPU_PIECE, _PIECE = 2**18, 2**25
_MATRIX_LAYERS = (nn.Linear, nn.Embedding, Conv1D)  # the last is GPT-2's linear layer, with its weight transposed


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: those that decay (``decays``) and those that do not; empty ones left out."""
    chosen = decaying(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = (
        {"params": [p for name, p in trained.items() if chosen[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in trained.items() if not chosen[name]], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def decaying(model: nn.Module) -> dict[str, bool]:
    """Name of each trainable parameter, tied ones once, and whether weight decay acts on it."""
    found: dict[str, bool] = {}
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in names:
                full = names[id(parameter)]
                found[full] = found.get(full, False) or decays(module, f"{path}.{name}")
    return found


def decays(module: nn.Module, name: str) -> bool:
    """Whether weight decay acts on the parameter ``name`` (its full name) that ``module`` itself holds.

    It acts on matrices that hidden states are multiplied with or looked up in, recognised by their module:

    - the ``weight`` of linear layers and embeddings (LoRA's among them),
    - the ``weight`` of a mixture's router,
    - the stacked matrices of a mixture's experts.

    It does not act on anything else, however many dimensions it has: norms, biases (experts' stacked ones too), DoRA's
    magnitudes, convolutions, the parameters of activations (Apertus), and what a mixer holds besides its projections
    (Mamba's ``A_log`` and ``D``, DiffLlama's lambdas, attention sinks).
    """
    kind, leaf = type(module).__name__, name.rpartition(".")[2]
    if isinstance(module, _MATRIX_LAYERS):
        return leaf == "weight"
    if isinstance(module, nn.ParameterDict):  # peft keeps an embedding's adapters in one
        return "lora_embedding_" in name
    if "Expert" in kind:
        return getattr(module, leaf).ndim >= 2 and "bias" not in leaf
    return ("Router" in kind or kind.endswith("Gate")) and leaf == "weight"


def decay_report(model: nn.Module) -> str:
    """Which parameters decay and which do not, for the log: one line a name, equal ones of all blocks together."""
    counts: dict[tuple[bool, str], int] = {}
    for name, decayed in decaying(model).items():
        key = decayed, re.sub(r"\.\d+(?=\.|$)", ".*", name)
        counts[key] = counts.get(key, 0) + 1
    lines = [
        f"  {'decays' if decayed else 'does not'}: {name}" + (f" ({count} of them)" if count > 1 else "")
        for (decayed, name), count in sorted(counts.items(), key=lambda item: not item[0][0])
    ]
    return "\n".join(["weight decay by parameter:", *lines])


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
