"""The head's fused kernel in Triton's interpreter, against the plain operators that it stands for."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fsdpsft import loss
from fsdpsft.loss import LINEAR, HeadFormula, disagreement, plain_softmax, softmax_for

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    """A process in which Triton interprets: it must know so before it is imported, and torch may have done that."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool


def compare(dtype: torch.dtype, formula: HeadFormula, columns: int) -> None:
    from fsdpsft.loss_kernel import fused_softmax

    dice = torch.Generator().manual_seed(columns)
    found = (torch.randn(4, columns, generator=dice) * 6).to(dtype)
    targets = torch.tensor([0, columns - 1, columns // 2, columns // 3])
    found[3, targets[3]] = 30.0  # a token that is almost certain
    expected, before = found.double(), found.clone()
    losses = plain_softmax(expected, targets, formula, True)
    close = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(fused_softmax(found, targets, formula, False).double(), losses, **close)
    assert torch.equal(found, before)
    torch.testing.assert_close(fused_softmax(found, targets, formula, True).double(), losses, **close)
    # Where a cap has flattened a logit, its slope is a difference of nearly equal numbers, in the twin too.
    smallest = torch.finfo(dtype).smallest_normal + (1e-9 if formula.softcap is None else 1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps + 1e-5, atol=smallest)
    assert fused_softmax(found[:0], targets[:0], formula, True).shape == (0,)


@pytest.mark.parametrize("formula", [LINEAR, HeadFormula(0.25), HeadFormula(softcap=3.0), HeadFormula(0.5, 2.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 101, 8192, 9001])
def test_equals_plain_operators_in_float64(
    interpreter: Executor, dtype: torch.dtype, formula: HeadFormula, columns: int
) -> None:
    interpreter.submit(compare, dtype, formula, columns).result()


def gate(dtype: torch.dtype) -> str | None:
    from fsdpsft.loss_kernel import fused_softmax

    return disagreement(fused_softmax, CPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_opens(interpreter: Executor, dtype: torch.dtype) -> None:
    assert interpreter.submit(gate, dtype).result() is None


def off_by_a_thousandth(product: Tensor, targets: Tensor, formula: HeadFormula, gradient: bool) -> Tensor:
    return plain_softmax(product, targets, formula, gradient) * 1.001


def without_slope(product: Tensor, targets: Tensor, formula: HeadFormula, gradient: bool) -> Tensor:
    capped = (formula.scale * product / (formula.softcap or 1)).tanh() * (formula.softcap or 1)
    logits = product if formula.softcap is None else capped
    losses = plain_softmax(logits, targets, LINEAR, gradient)
    product.copy_(logits)
    return losses


def writes_where_it_should_not(product: Tensor, targets: Tensor, formula: HeadFormula, gradient: bool) -> Tensor:
    losses = plain_softmax(product, targets, formula, gradient)
    product[0, 8192:] = 0.0
    return losses


@pytest.mark.parametrize("wrong", [off_by_a_thousandth, without_slope, writes_where_it_should_not])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_stays_closed(wrong: loss.Softmax, dtype: torch.dtype) -> None:
    assert "differ" in str(disagreement(wrong, CPU, dtype))
    assert disagreement(plain_softmax, CPU, dtype) is None


def test_cuda_alone_gets_it_and_only_when_it_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert softmax_for(CPU, torch.bfloat16) is plain_softmax and not caplog.text
    fake = ModuleType("fsdpsft.loss_kernel")
    fake.fused_softmax = off_by_a_thousandth  # type: ignore[attr-defined]
    cuda, here = torch.device("cuda"), loss.disagreement
    monkeypatch.setattr(loss, "disagreement", lambda softmax, device, dtype: here(softmax, CPU, dtype))
    monkeypatch.setitem(sys.modules, "fsdpsft.loss_kernel", fake)
    cases = [
        (off_by_a_thousandth, plain_softmax, "plain operators, as its losses with"),
        (lambda *given: plain_softmax(*given), None, "a fused Triton kernel"),
        (lambda *given: given[9], plain_softmax, "plain operators, as IndexError: tuple index out of range"),
    ]
    with caplog.at_level("INFO"):
        for function, chosen, words in cases:
            fake.fused_softmax = function  # type: ignore[attr-defined]
            softmax_for.cache_clear()
            assert softmax_for(cuda, torch.bfloat16) is (chosen or function)
            assert words in caplog.messages[-1]
    monkeypatch.setitem(sys.modules, "fsdpsft.loss_kernel", None)
    softmax_for.cache_clear()
    assert softmax_for(cuda, torch.bfloat16) is plain_softmax
    softmax_for.cache_clear()
