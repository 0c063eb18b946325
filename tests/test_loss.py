"""The chunked loss against the plain formula on full logits, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fsdpsft import loss as loss_module
from fsdpsft.loss import HeadFormula, cross_entropy_sum
from fsdpsft.testing import PeakMemory


def slow_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, formula: HeadFormula
):
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logits = logits * formula.scale
    if formula.softcap is not None:
        logits = formula.softcap * torch.tanh(logits / formula.softcap)
    log_probabilities = torch.log_softmax(logits, dim=-1)
    token_losses = -log_probabilities[torch.arange(len(targets)), targets]
    return (token_losses * weights).sum(), token_losses


def inputs(dtype: torch.dtype, with_bias: bool, positions: int = 37):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(positions, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(101, 16, generator=generator, dtype=torch.float64)
    bias = torch.randn(101, generator=generator, dtype=torch.float64) if with_bias else None
    targets = torch.randint(101, (positions,), generator=generator)
    weights = torch.rand(positions, generator=generator) * 2
    leaves = [t if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    return leaves, targets, weights.to(torch.float32)


@pytest.mark.parametrize(
    "formula", [HeadFormula(), HeadFormula(scale=0.25), HeadFormula(softcap=3.0), HeadFormula(0.5, 2.0)]
)
@pytest.mark.parametrize("chunk_size", [1, 7, 37, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_full_logits(formula: HeadFormula, chunk_size: int, with_bias: bool) -> None:
    leaves, targets, weights = inputs(torch.float32, with_bias)
    slow_leaves, _, _ = inputs(torch.float64, with_bias)
    loss, token_losses = cross_entropy_sum(*leaves, targets, weights, formula=formula, chunk_size=chunk_size)
    slow, slow_tokens = slow_loss(*slow_leaves, targets, weights.double(), formula)
    (loss / 3).backward()
    (slow / 3).backward()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-6)
    torch.testing.assert_close(token_losses.double(), slow_tokens, rtol=1e-5, atol=1e-5)
    for leaf, slow_leaf in zip(leaves, slow_leaves, strict=True):
        if leaf is not None:
            torch.testing.assert_close(leaf.grad.double(), slow_leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("formula", [HeadFormula(), HeadFormula(0.5, 2.0)])
@pytest.mark.parametrize("piece", [1, 250, 1010])
def test_the_rows_in_float32_at_one_time_change_nothing(
    monkeypatch: pytest.MonkeyPatch, formula: HeadFormula, piece: int
) -> None:
    found = []
    for size in (2**20, piece):
        monkeypatch.setattr(loss_module, "_CPU_PIECE", size)
        leaves, targets, weights = inputs(torch.float32, True)
        loss, token_losses = cross_entropy_sum(*leaves, targets, weights, formula=formula)
        loss.backward()
        found.append([token_losses, *(leaf.grad for leaf in leaves)])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [0.1, 1 / 6])
def test_weights_and_scale_are_not_rounded_to_bfloat16(factor: float) -> None:
    """0.1 is 0.1001 in bfloat16, 1/6 is 0.1670: rounded, they would scale every gradient alike."""
    norms = []
    for weight_of_token in (1.0, factor):
        (hidden, weight, _), targets, _ = inputs(torch.bfloat16, False, positions=300)
        loss, _ = cross_entropy_sum(hidden, weight, None, targets, torch.full((300,), weight_of_token))
        loss.backward()
        norms.append([leaf.grad.double().norm() for leaf in (hidden, weight)])
    for whole, scaled in zip(*norms, strict=True):
        assert (scaled / whole).item() == pytest.approx(factor, rel=4e-4)


def test_no_trained_position_gives_zero_and_zero_gradients() -> None:
    (hidden, weight, _), targets, weights = inputs(torch.float32, False, positions=0)
    loss, token_losses = cross_entropy_sum(hidden, weight, None, targets, weights)
    loss.backward()
    assert loss.item() == 0.0 and token_losses.shape == (0,)
    assert weight.grad is not None and not weight.grad.any()


def test_bfloat16_head_gradient_is_accumulated_in_float32() -> None:
    """Many chunks in bfloat16 lose no more than one chunk does: the sum over chunks is not rounded in between."""
    grads = []
    for chunk_size in (1, 512):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(512, 8, generator=generator).bfloat16().requires_grad_()
        weight = torch.randn(11, 8, generator=generator).bfloat16().requires_grad_()
        targets = torch.randint(11, (512,), generator=generator)
        loss, _ = cross_entropy_sum(hidden, weight, None, targets, torch.ones(512), chunk_size=chunk_size)
        loss.backward()
        grads.append(weight.grad.float())
    exact_error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert exact_error < 4e-3  # one rounding to bfloat16 of the products; 512 roundings would be some 5e-2


def test_evaluation_needs_no_gradient() -> None:
    (hidden, weight, _), targets, weights = inputs(torch.float32, False)
    with torch.no_grad():
        loss, _ = cross_entropy_sum(hidden, weight, None, targets, weights, chunk_size=5)
    assert loss.item() == pytest.approx(
        slow_loss(hidden, weight, None, targets, weights, HeadFormula())[0].item(), rel=1e-5
    )


@pytest.mark.parametrize("formula", [HeadFormula(), HeadFormula(0.5, 2.0)])
def test_evaluation_makes_no_gradient(formula: HeadFormula) -> None:
    """Neither the head's, as large as the head, nor the logits': some products and one softmax are all that is done."""
    (hidden, _, _), targets, weights = inputs(torch.float32, False)
    wide = torch.ones(20_000, 16, requires_grad=True)

    def work() -> tuple[list[str], int]:
        with PeakMemory() as memory, Operators() as operators:
            cross_entropy_sum(hidden, wide, None, targets, weights, formula=formula, chunk_size=4)
        return operators.names, memory.peak

    trained, peak = work()
    with torch.no_grad():
        evaluated, evaluation_peak = work()
    of_gradients = {"exp", "expm1", "scatter_", "addmm", "addmm_"}
    assert of_gradients & set(trained) and not of_gradients & set(evaluated)
    assert evaluated.count("mm") == 10  # one for each chunk
    assert peak - evaluation_peak >= wide.nbytes


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_gradients_are_scaled_in_float32() -> None:
    """Rounded to bfloat16, 1 / 1535 is off by a thousandth, and with it each gradient; so the factor stays float32."""
    grads = []
    for divisor in (1.0, 1535.0):
        (hidden, weight, _), targets, weights = inputs(torch.bfloat16, False)
        loss, _ = cross_entropy_sum(hidden, weight, None, targets, weights, chunk_size=10)
        (loss / divisor).backward()
        grads.append(hidden.grad)
    whole, divided = grads
    assert torch.equal(divided, (whole.float() / 1535.0).bfloat16())


def test_the_head_gradient_is_handed_over_without_a_copy() -> None:
    """A copy of it would be as large as the head: the parameter's gradient is the very memory it was added up in."""
    (hidden, weight, _), targets, weights = inputs(torch.float32, False)
    loss, _ = cross_entropy_sum(hidden, weight, None, targets, weights)
    made = loss.grad_fn.gradients.weight.data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == made


def test_no_chunk_asks_for_memory_of_its_own() -> None:
    """The peak is that of one chunk, however many there are."""
    peaks = []
    for positions in (8, 80):
        (hidden, weight, _), targets, weights = inputs(torch.bfloat16, True, positions)
        weight, wide = weight.detach(), torch.zeros(20_000, 16, dtype=torch.bfloat16, requires_grad=True)
        with PeakMemory() as memory:
            cross_entropy_sum(hidden, wide, None, targets, weights, chunk_size=8)
        peaks.append(memory.peak)
    assert peaks[1] < 1.05 * peaks[0]
