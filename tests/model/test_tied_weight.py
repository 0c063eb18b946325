"""The one gradient of a tied weight against the two that autograd makes and adds up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fsdpsft.batch import Sample, pack
from fsdpsft.distributed.fsdp import MasterWeights
from fsdpsft.distributed.ulysses import shard
from fsdpsft.errors import ModelError
from fsdpsft.loss import _LinearCrossEntropy
from fsdpsft.model.attention import IMPLEMENTATION, AttentionContext
from fsdpsft.model.attention_backends import attend_sdpa
from fsdpsft.model.sft_model import ModelInput, SFTModel
from fsdpsft.model.tied_weight import TiedGradient, can_tie_gradients, prove_tied_gradients, tie_gradients
from fsdpsft.testing import PeakMemory, tiny_model

ROWS = [([0, 5, 9, 5, 0, 7, 301], [0, 0, 1, 1, 0, 1, 1]), ([5, 5, 8, 0], [0, 1, 1, 1])]
BATCH = pack([Sample(np.array(ids), np.array(mask, bool), row) for row, (ids, mask) in enumerate(ROWS)], pad_token_id=0)


def build(family: str = "qwen2", dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    model = tiny_model(family, attn_implementation=IMPLEMENTATION, **changes).to(dtype)
    model.get_input_embeddings().padding_idx = 0  # its gradient from the look-up is dropped, the head's is not
    return model


def loss_of(module: SFTModel) -> Tensor:
    local = shard(BATCH, 0, 1)
    context = AttentionContext.of(BATCH, attend_sdpa, torch.device("cpu"))
    return module(ModelInput(
        local.input_ids, local.position_ids, context, local.trained_index, local.targets, local.loss_weights
    ))[0]  # fmt: skip


def run(model: PreTrainedModel, *, apart: bool, times: int = 1) -> Tensor:
    """The embedding's gradient after so many backward passes; with autograd's own look-up if ``apart``."""
    if not apart:
        tie_gradients(model)
    module = SFTModel(model).train()
    assert (module.tied is None) == apart
    for _ in range(times):
        loss_of(module).backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    return gradient


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("times", [1, 3])
def test_equals_autograds_sum(times: int) -> None:
    expected = run(build(), apart=True, times=times)
    found = run(build(), apart=False, times=times)
    assert error(found, expected) < 1e-6
    assert (found[0] != 0).any() and (found[301] != 0).any()


def test_bfloat16_sum_is_rounded_once() -> None:
    """Two rounded gradients and their rounded sum are further from the truth than one rounded sum."""
    whole = build().bfloat16().double()  # the weights of the others, in arithmetic that rounds nothing
    expected = run(whole, apart=True)
    apart, together = (error(run(build(dtype=torch.bfloat16), apart=a), expected) for a in (True, False))
    assert together <= apart < 0.05


def test_the_head_gradient_is_the_one_that_the_weight_gets() -> None:
    model = build(tie_word_embeddings=True)
    kept: list[int] = []
    module_put = TiedGradient.put

    class Watched(TiedGradient):
        def put(self, gradient: Tensor) -> None:
            kept.append(gradient.data_ptr())
            module_put(self, gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fsdpsft.model.tied_weight.TiedGradient", Watched)
        gradient = run(model, apart=False)
    assert kept == [gradient.data_ptr()]


def test_peak_memory_is_less_by_one_gradient() -> None:
    peaks = []
    for apart in (True, False):
        model = build(vocab_size=20_000)
        with PeakMemory() as memory:
            run(model, apart=apart)
        peaks.append(memory.peak)
    assert peaks[0] - peaks[1] > 0.9 * model.get_input_embeddings().weight.nbytes


def test_left_to_autograd() -> None:
    """No weight in common; an embedding that scales its rows; one with rules of its own."""
    assert can_tie_gradients(build())
    assert not can_tie_gradients(build(tie_word_embeddings=False))
    assert not can_tie_gradients(build("gemma2"))
    for rule, value in {"max_norm": 1.0, "scale_grad_by_freq": True, "sparse": True}.items():
        model = build()
        setattr(model.get_input_embeddings(), rule, value)
        assert not can_tie_gradients(model)


def test_each_model_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    with prove_tied_gradients(model):
        tie_gradients(model)
    assert model.get_input_embeddings().weight.shape[0] > 8
    monkeypatch.setattr(TiedGradient, "take", lambda self: torch.zeros(8, 4))  # the head's is lost
    broken = build()
    with pytest.raises(ModelError, match="tied weight is wrong"), prove_tied_gradients(broken):
        tie_gradients(broken)


def test_a_look_up_that_no_head_follows() -> None:
    model = build()
    embedding, ids = model.get_input_embeddings(), torch.tensor([[3, 0, 3]])
    tie_gradients(model)
    embedding(ids).sum().backward()
    expected = torch.zeros_like(embedding.weight)
    expected[3] = 2
    assert torch.equal(embedding.weight.grad, expected)


def test_a_gradient_that_nobody_took_is_an_error() -> None:
    tied = TiedGradient()
    tied.put(torch.zeros(2))
    with pytest.raises(AssertionError, match="never took"):
        tied.put(torch.zeros(2))


@pytest.mark.parametrize("tied", [True, False])
def test_a_master_gets_the_sum_unrounded(tied: bool) -> None:
    """Behind a bfloat16 copy stands a float32 master: the head's gradient reaches it as it was added up."""
    model, seen = build(tie_word_embeddings=tied), []
    if tied:
        tie_gradients(model)
    module = SFTModel(model).train()
    masters = MasterWeights(module, torch.bfloat16)
    head = model.get_output_embeddings().weight
    backward = _LinearCrossEntropy.backward

    def watched(ctx, *gradients):
        seen.append(ctx.gradients.weight.data_ptr())
        return backward(ctx, *gradients)

    with pytest.MonkeyPatch.context() as patch, masters.computing():
        patch.setattr(_LinearCrossEntropy, "backward", staticmethod(watched))
        (loss_of(module) / 3).backward()
    assert head.grad.dtype == torch.float32 and seen == [head.grad.data_ptr()]
    assert (head.grad != head.grad.bfloat16()).any()
    once = head.grad.clone()
    with masters.computing():
        (loss_of(module) / 3).backward()
    torch.testing.assert_close(head.grad, 2 * once)
    exact = build(tie_word_embeddings=tied).bfloat16().double()
    (loss_of(SFTModel(exact).train()) / 3).backward()
    assert error(once, exact.get_output_embeddings().weight.grad) < 0.05
