"""Fused kernels for the elementwise parts of a model: torch's for RMSNorm, or Liger's for all it has.

They read and write each activation once where the plain modules do so several times, and keep less for the backward.

torch's: ``torch.nn.functional.rms_norm``, one kernel forward and one backward on CUDA (from torch 2.9 on), which rounds
once where transformers' modules round twice.

Liger's: RMSNorm, rotary embedding and gated MLP. Head and loss stay ours: its cross-entropy variants are turned off.
Which parts are replaced in a family is Liger's knowledge, reached through its own patching function; rotary embedding
is replaced in the family's module, so for the whole process.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from fsdpsft.errors import ConfigError
from fsdpsft.model.block_parts import stand_in

logger = logging.getLogger(__name__)

OFF = ("cross_entropy", "fused_linear_cross_entropy")


def apply_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Replace what Liger has kernels for, in place; after LoRA, before checkpointing, as both wrap what this changes.

    Needs CUDA (Triton), so the tests see it with a stand-in for the package.

    Raises:
        ConfigError: no CUDA device, the package is missing, or it has no kernels for this family.
    """
    if device.type != "cuda":
        raise _refusal(f"its Triton kernels need a CUDA device, and this run is on {device.type}")
    if importlib.util.find_spec("liger_kernel") is None:
        raise _refusal("the package liger-kernel is not installed (pip install liger-kernel)")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    family = model.config.model_type
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise _refusal(f"the installed liger-kernel has no kernels for model type {family}")
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN[family]
    known = inspect.signature(patch).parameters
    patch(model=model, **{name: False for name in OFF if name in known})
    logger.info("Liger kernels in place for %s: %s", family, [name for name in known if name not in (*OFF, "model")])


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"model.use_liger=true cannot be used: {reason}. Set model.use_liger=false.")


def fuse_norms(model: PreTrainedModel, device: torch.device) -> int:
    """Let every RMSNorm run in torch's fused kernel, in place; before what wraps the modules' forward.

    A module is one if a copy of it with made-up weights does what ``rms_norm`` does; others (Gemma adds one to its
    weights, layer norms subtract the mean) stay as they are. Nothing happens on devices for which torch has no such
    kernel; it was slower in bfloat16 on CPU.

    Returns:
        How many were found.
    """
    if device.type != "cuda":
        return 0
    found = 0
    for module in model.modules():
        eps = _epsilon(module)
        if eps is not None and _is_rms_norm(module, eps):
            module.forward = _fused(module, eps)
            found += 1
    logger.info("RMSNorm in torch's fused kernel: %d modules", found)
    return found


def _epsilon(module: nn.Module) -> float | None:
    """Epsilon of a module that could be an RMSNorm: one weight and nothing else; None of others."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or "forward" in vars(module):
        return None
    return eps if [name for name, _ in module.named_parameters()] == ["weight"] else None


@torch.no_grad()
def _is_rms_norm(module: nn.Module, eps: float) -> bool:
    """Whether a copy of ``module`` in float32 on the host gives what ``rms_norm`` gives, on rows large and tiny."""
    dice, shape = torch.Generator().manual_seed(0), module.get_parameter("weight").shape
    copy = stand_in(module, {})
    copy.weight = nn.Parameter(torch.rand(shape, generator=dice, device="cpu") + 0.5)
    sizes = torch.tensor([30.0, 1.0, eps**0.5, 0.1 * eps**0.5], device="cpu")[:, None]  # the last are ruled by epsilon
    rows = (torch.randn(4, *shape, generator=dice, device="cpu") + 0.3) * sizes
    try:
        own = copy(rows)
    except (RuntimeError, TypeError, AttributeError):  # wants something else than hidden states
        return False
    fused = rms_norm(rows, shape, copy.weight, eps)
    return isinstance(own, Tensor) and own.shape == fused.shape and torch.allclose(own, fused, rtol=1e-5, atol=1e-6)


def _fused(module: Any, eps: float) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        weight = module.weight  # looked up each time: it is gathered, or swapped for a copy, around the forward
        return rms_norm(hidden_states, weight.shape, weight, eps)

    return forward
