"""Liger kernels: applied to the model with our head left alone, or refused by name."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fsdpsft.errors import ConfigError
from fsdpsft.model.kernels import apply_liger

CUDA = torch.device("cuda")
MODEL = SimpleNamespace(config=SimpleNamespace(model_type="qwen2"))


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for the package, which cannot run on CPU, with the signatures of its patching functions."""
    calls = []

    def qwen2(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        calls.append(
            {"loss": (cross_entropy, fused_linear_cross_entropy), "parts": (rope, rms_norm, swiglu), "model": model}
        )

    def old_family(rms_norm=True, model=None):
        calls.append({"parts": (rms_norm,), "model": model})

    patching = ModuleType("liger_kernel.transformers.monkey_patch")
    patching.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": qwen2, "old": old_family}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patching.__name__, patching)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    return calls


def test_all_parts_but_the_loss_are_replaced(liger):
    apply_liger(MODEL, CUDA)
    assert liger == [{"loss": (False, False), "parts": (True, True, True), "model": MODEL}]


def test_families_without_loss_switches_get_none(liger):
    model = SimpleNamespace(config=SimpleNamespace(model_type="old"))
    apply_liger(model, CUDA)
    assert liger == [{"parts": (True,), "model": model}]


def test_a_family_without_kernels_is_refused(liger):
    with pytest.raises(ConfigError, match="no kernels for model type rwkv"):
        apply_liger(SimpleNamespace(config=SimpleNamespace(model_type="rwkv")), CUDA)


def test_cpu_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"model\.use_liger=true cannot be used: .*CUDA device, and this run is on cpu"
    ):
        apply_liger(MODEL, torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="liger-kernel is not installed"):
        apply_liger(MODEL, CUDA)
