"""Liger's kernels are applied with our head left alone, or refused by name; torch's norm where it is the same."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from fsdpsft.errors import ConfigError
from fsdpsft.model import patches
from fsdpsft.model.patches import apply_liger, fuse_norms, fused_norms_apply, liger_applies, plain_norms

CUDA = torch.device("cuda")
MODEL = SimpleNamespace(config=SimpleNamespace(model_type="qwen2"))
WITH_LIGER, WITHOUT = SimpleNamespace(use_liger=True), SimpleNamespace(use_liger=False)


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
    assert liger_applies(MODEL, WITH_LIGER, CUDA) and not liger_applies(MODEL, WITHOUT, CUDA)
    apply_liger(MODEL)
    assert liger == [{"loss": (False, False), "parts": (True, True, True), "model": MODEL}]


def test_families_without_loss_switches_get_none(liger):
    model = SimpleNamespace(config=SimpleNamespace(model_type="old"))
    apply_liger(model)
    assert liger == [{"parts": (True,), "model": model}]


def test_a_family_without_kernels_is_refused(liger):
    with pytest.raises(ConfigError, match="no kernels for model type rwkv"):
        liger_applies(SimpleNamespace(config=SimpleNamespace(model_type="rwkv")), WITH_LIGER, CUDA)


def test_cpu_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"model\.use_liger=true cannot be used: .*CUDA device, and this run is on cpu"
    ):
        liger_applies(MODEL, WITH_LIGER, torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="liger-kernel is not installed"):
        liger_applies(MODEL, WITH_LIGER, CUDA)


# ------------------------------------------------------------------------------------------------------- torch's norms

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32, "head_dim": 8, "pad_token_id": 0, "attn_implementation": "eager",
}  # fmt: skip


def small(family: type[PreTrainedConfig]) -> PreTrainedModel:
    """A small model of a family with weights of norms that are not all one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family(**SMALL))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("family", "norms"), [(Qwen2Config, 5), (LlamaConfig, 5), (Qwen3Config, 9), (MistralConfig, 5)]
)
def test_plain_norms_are_fused_and_nothing_changes(monkeypatch, family, norms):
    model, ids = small(family), torch.arange(20)[None]
    model(ids).logits.logsumexp(-1).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert len(plain_norms(model)) == norms
    fuse_norms(model)
    calls = []
    monkeypatch.setattr(patches, "rms_norm", lambda *a: calls.append(a) or F.rms_norm(*a))
    model(ids).logits.logsumexp(-1).sum().backward()
    assert len(calls) == norms
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [Gemma2Config, Gemma3TextConfig, GPT2Config, StableLmConfig])
def test_other_norms_stay_as_they_are(family):
    model = small(family)
    forwards = [module.forward for module in model.modules()]
    fuse_norms(model)
    assert [module.forward for module in model.modules()] == forwards


def test_norms_stay_as_they_are_on_cpu():
    model = small(Qwen2Config)
    assert not fused_norms_apply(model, WITHOUT, torch.device("cpu"))
    assert fused_norms_apply(model, WITHOUT, CUDA) and not fused_norms_apply(model, WITH_LIGER, CUDA)


class Doubled(nn.RMSNorm):
    """Twice what it looks like."""

    def forward(self, x):
        return 2 * super().forward(x)


class WithoutEpsilon(nn.RMSNorm):
    """The same but where epsilon rules."""

    def forward(self, x):
        return self.weight * x * x.square().mean(-1, keepdim=True).clamp(min=1e-9).rsqrt()


@pytest.mark.parametrize("impostor", [Doubled, WithoutEpsilon])
def test_a_norm_that_only_looks_like_one_is_found_out(impostor):
    assert plain_norms(nn.Sequential(impostor(8, eps=1e-5))) == []
    assert len(plain_norms(nn.Sequential(nn.RMSNorm(8, eps=1e-5)))) == 1


def test_weights_that_are_swapped_later_are_the_ones_used():
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-5))
    fuse_norms(model)
    rows = torch.randn(3, 8)
    before = model(rows)
    model[0].weight = nn.Parameter(torch.full((8,), 3.0))
    torch.testing.assert_close(model(rows), 3 * before)
