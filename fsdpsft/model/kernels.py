"""Liger's fused kernels for the elementwise parts of a model: RMSNorm, rotary embedding and gated MLP.

They read and write each activation once where the plain modules do so several times. Head and loss stay ours: Liger's
cross-entropy variants are turned off. Which parts are replaced in a family is Liger's knowledge, reached through its
own patching function; rotary embedding is replaced in the family's module, so for the whole process.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging

import torch
from transformers import PreTrainedModel

from fsdpsft.errors import ConfigError

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
