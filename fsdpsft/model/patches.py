"""What replaces a part of a model's own code, in one ordered list; each proven on the model that is trained.

Nothing else replaces a ``forward``, but for what must wrap one: activation checkpointing and the compiler.

Fused kernels read and write each activation once, and keep less for the backward. torch's ``rms_norm`` is one kernel on
CUDA and rounds once where transformers' modules round twice. Liger's own function knows which parts of a family it can
replace; it replaces rotary embedding in the family's module, so for the whole process. Its losses stay off.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from fsdpsft.config.schema import ModelConfig
from fsdpsft.errors import ConfigError
from fsdpsft.model.block_proof import BlockProof, Change
from fsdpsft.model.lora import add_updates_by_product, plain_adapters
from fsdpsft.model.tied_weight import can_tie_gradients, prove_tied_gradients, tie_gradients

logger = logging.getLogger(__name__)

LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


@dataclass(frozen=True)
class Patch:
    """A change to a model's code, applied in place.

    Attributes:
        name: in messages.
        applies: to this model, with these settings, on this device? Raises ``ConfigError`` where it was asked for and
            cannot be had.
        apply: changes the model, which is on meta.
        prove: a context, around ``apply``, that notes in the proof, or raises ``ModelError``, where the changed model
            computes something else than it did.
    """

    name: str
    applies: Callable[[PreTrainedModel, ModelConfig, torch.device], bool]
    apply: Callable[[PreTrainedModel], None]
    prove: Callable[[PreTrainedModel, BlockProof], AbstractContextManager[None]]


def apply_patches(model: PreTrainedModel, settings: ModelConfig, device: torch.device, proof: BlockProof) -> None:
    """Apply every patch that applies, in the order of ``PATCHES``, each proven before the next; after LoRA.

    Raises:
        ConfigError: a patch was asked for and cannot be had.
        ModelError: a patch computes something else than the model.
    """
    for patch in PATCHES:
        if patch.applies(model, settings, device):
            with patch.prove(model, proof):
                patch.apply(model)
            logger.info("%s in place for %s", patch.name, type(model).__name__)


# --- torch's fused RMSNorm ------------------------------------------------------------------------------------------


def fused_norms_apply(model: PreTrainedModel, settings: ModelConfig, device: torch.device) -> bool:
    """On CUDA, where a module is a plain RMSNorm; on CPU the fused one was slower in bfloat16."""
    return device.type == "cuda" and not settings.use_liger and bool(plain_norms(model))


def fuse_norms(model: nn.Module) -> None:
    """Let every plain RMSNorm run in torch's kernel."""
    for module, eps in plain_norms(model):
        module.forward = _fused(module, eps)


def plain_norms(model: nn.Module) -> list[tuple[nn.Module, float]]:
    """The modules, with their epsilon, of which a copy with made-up weights does what ``rms_norm`` does.

    Others (Gemma adds one to its weights, layer norms subtract the mean) are not among them.
    """
    candidates = ((module, _epsilon(module)) for module in model.modules())
    return [(module, eps) for module, eps in candidates if eps is not None and _is_rms_norm(module, eps)]


def _epsilon(module: nn.Module) -> float | None:
    """Epsilon of a module that could be an RMSNorm: one weight and nothing else; None of others."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or "forward" in vars(module):
        return None
    return eps if [name for name, _ in module.named_parameters()] == ["weight"] else None


@torch.no_grad()
def _is_rms_norm(module: nn.Module, eps: float) -> bool:
    """Whether a copy of ``module`` in float32 on the host gives what ``rms_norm`` gives, on rows large and tiny."""
    generator, shape = torch.Generator().manual_seed(0), module.get_parameter("weight").shape
    own = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(torch.rand(shape, generator=generator, device="cpu") + 0.5)
    sizes = torch.tensor([30.0, 1.0, eps**0.5, 0.1 * eps**0.5], device="cpu")[:, None]  # the last are ruled by epsilon
    rows = (torch.randn(4, *shape, generator=generator, device="cpu") + 0.3) * sizes
    try:
        found = module(rows)
        fused = rms_norm(rows, shape, module.get_parameter("weight"), eps)
    except (RuntimeError, TypeError, AttributeError):  # wants something else than hidden states
        return False
    finally:
        module._parameters["weight"] = own
    return (
        isinstance(found, Tensor) and found.shape == fused.shape and torch.allclose(found, fused, rtol=1e-5, atol=1e-6)
    )


def _fused(module: Any, eps: float) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        weight = module.weight  # looked up each time: it is gathered, or swapped for a copy, around the forward
        return rms_norm(hidden_states, weight.shape, weight, eps)

    return forward


# --- Liger ----------------------------------------------------------------------------------------------------------


def liger_applies(model: PreTrainedModel, settings: ModelConfig, device: torch.device) -> bool:
    """Where ``model.use_liger`` asks for it.

    Raises:
        ConfigError: no CUDA device (nor Triton's interpreter), no package, or no kernels for this family.
    """
    if not settings.use_liger:
        return False
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise _refusal(f"its Triton kernels need a CUDA device, and this run is on {device.type}")
    if importlib.util.find_spec("liger_kernel") is None:
        raise _refusal("the package liger-kernel is not installed (pip install liger-kernel)")
    if model.config.model_type not in _liger_families():
        raise _refusal(f"the installed liger-kernel has no kernels for model type {model.config.model_type}")
    return True


def apply_liger(model: PreTrainedModel) -> None:
    """Replace what Liger has kernels for, but for the loss."""
    patch = _liger_families()[model.config.model_type]
    losses = [name for name in LOSSES if name in inspect.signature(patch).parameters]
    patch(model=model, **dict.fromkeys(losses, False))


def _liger_families() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    families: dict[str, Callable[..., None]] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return families


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"model.use_liger=true cannot be used: {reason}. Set model.use_liger=false.")


# --- Adapters -------------------------------------------------------------------------------------------------------


def adapters_apply(model: PreTrainedModel, settings: ModelConfig, device: torch.device) -> bool:
    """Where there are plain adapters."""
    return settings.uses_lora and bool(plain_adapters(model))


# --- The list -------------------------------------------------------------------------------------------------------


def _in_blocks(what: str, instead: str) -> Callable[[PreTrainedModel, BlockProof], AbstractContextManager[None]]:
    return lambda model, proof: proof.unchanged(Change(what, instead), same_kernels=False)


_PROVE_NORMS = _in_blocks("torch's fused RMSNorm", "Please report the model's name.")
_PROVE_LIGER = _in_blocks("model.use_liger=true", "Set model.use_liger=false.")
_PROVE_ADAPTERS = _in_blocks("adapters' updates added by their product", "Please report the model's name.")
PATCHES = (
    Patch("adapters' updates added by their product", adapters_apply, add_updates_by_product, _PROVE_ADAPTERS),
    Patch("torch's fused RMSNorm", fused_norms_apply, fuse_norms, _PROVE_NORMS),
    Patch("Liger's kernels", liger_applies, apply_liger, _PROVE_LIGER),
    Patch("one gradient for a tied head", can_tie_gradients, tie_gradients, prove_tied_gradients),
)
