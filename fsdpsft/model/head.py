"""The language model's head, applied by our loss to chosen hidden states instead of by the model to all of them.

That is right only where the model's logits are a known function of its final hidden states. ``head_of`` reads the
function from the configuration, ``prove_head`` compares it with what the model's own class computes.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fsdpsft.errors import ModelError
from fsdpsft.loss import LINEAR, HeadFormula

# Configuration keys by which transformers' models scale their logits: +1 multiplies by the value, -1 divides.
_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}


@dataclass(frozen=True)
class Head:
    """What turns final hidden states into logits.

    Attributes:
        module: the linear module. Its weight is looked up at each use, as FSDP swaps it for the gathered one.
        formula: what is applied to its output.
    """

    module: nn.Module
    formula: HeadFormula = LINEAR

    @property
    def weight(self) -> Tensor:
        """[V, D], as it is now (gathered inside the root module's forward, a shard outside)."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """[V], or None."""
        bias = self.module.bias if hasattr(self.module, "bias") else None
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] in float32, by the formula that the loss uses."""
        return self.formula.logits(nn.functional.linear(hidden, self.weight, self.bias)).float()


def head_of(causal_lm: PreTrainedModel) -> Head:
    """Find a model's head; works on meta, with adapters, and sharded.

    Raises:
        ModelError: there is no linear head, or LoRA has been put on it.
    """
    name = type(causal_lm).__name__
    module = causal_lm.get_output_embeddings()
    if isinstance(module, LoraLayer):
        raise ModelError("LoRA cannot be put on the head; list it in model.modules_to_save to train it whole.")
    if module is None or not isinstance(getattr(module, "weight", None), Tensor) or module.weight.ndim != 2:
        raise ModelError(f"{name} has no linear head, which the loss needs.")
    return Head(module, _formula(causal_lm.config))


def _formula(config: Any) -> HeadFormula:
    """What a configuration says about logits; ``prove_head`` checks that the model does it."""
    scale = 1.0
    for key, power in _SCALES.items():
        value = getattr(config, key, None)
        scale *= value**power if value is not None else 1.0
    return HeadFormula(float(scale), getattr(config, "final_logit_softcapping", None))


class _StubOutput(dict[str, Any]):
    """Any base model's output: hidden states under their name or index 0, None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, name: str) -> Any:
        return self["last_hidden_state"] if name == "last_hidden_state" else None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("last_hidden_state" if key == 0 else key)


class _StubBase(nn.Module):
    """A base model that returns the same hidden states whatever it is given."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> _StubOutput:
        return _StubOutput(self.hidden)


@torch.no_grad()
def prove_head(causal_lm: PreTrainedModel) -> None:
    """Run the model class's own forward on made-up hidden states and a small head, and compare it with ``Head``.

    Nothing of the model's size is allocated: the stand-in has the model's top level, no base model, and 16 outputs.

    Raises:
        ModelError: the logits differ, so our head would train another model than this one.
    """
    plain_class = next(c for c in type(causal_lm).__mro__ if not issubclass(c, FSDPModule))
    refusal = f"{plain_class.__name__}'s head is more than a linear layer with a scale and a soft cap"
    head_module = causal_lm.get_output_embeddings()
    hidden = torch.randn(1, 4, head_of(causal_lm).weight.shape[1], generator=torch.Generator().manual_seed(0)) * 3
    stand_in: Any = plain_class.__new__(plain_class)
    nn.Module.__init__(stand_in)
    small = nn.Linear(hidden.shape[-1], 16, bias=head_of(causal_lm).bias is not None)
    for name, value in vars(causal_lm).items():
        if name not in stand_in.__dict__:
            stand_in.__dict__[name] = value
    stand_in.config = deepcopy(causal_lm.config)
    for name, child in causal_lm.named_children():
        replacement = small if child is head_module else child
        setattr(stand_in, name, _StubBase(hidden) if name == causal_lm.base_model_prefix else replacement)
    # Weights far from the origin, so that a soft cap or a shift shows
    nn.init.normal_(small.weight, std=8 / math.sqrt(hidden.shape[-1]), generator=torch.Generator().manual_seed(1))
    expected = Head(small, _formula(causal_lm.config)).logits(hidden)
    try:
        found = stand_in.forward(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False).logits
    except Exception as error:  # whatever it is, this class does not do what we think
        raise ModelError(f"{refusal}: {type(error).__name__}: {error}") from error
    if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-4):
        raise ModelError(f"{refusal}: its logits differ from what the configuration says. It is not supported.")
