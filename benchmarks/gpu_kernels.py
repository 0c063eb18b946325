"""Sections of the GPU check that look at one kernel at a time: the gate of attention backends, attention, the head."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_contenders import build_ours
from benchmarks.gpu_work import CASES, MODELS, TINY_CASES, Check, StepCase, draw_work, packed, random_causal_lm
from fsdpsft.batch import PackedBatch
from fsdpsft.loss import cross_entropy_sum
from fsdpsft.model.attention import IMPLEMENTATION, Attend, AttentionContext, AttentionSpec
from fsdpsft.model.attention_backends import BACKENDS, objections, requirements
from fsdpsft.model.sft_model import decoder_blocks

CHUNKS = (1024, 2048, 4096, 8192)
BACKEND_SECONDS = 45.0  # of one backend, its compilation with it


def _batch(tiny: bool, tokens: int) -> PackedBatch:
    """One micro-batch of ragged documents."""
    small = {"longest": 128, "step_tokens": 256} if tiny else {"step_tokens": tokens}
    work = draw_work(StepCase("gate", **small))  # type: ignore[arg-type]
    return packed(work.rows, [range(len(work.rows))])[0]


def gate(check: Check) -> dict[str, Any]:
    """Loss and gradient of each attention backend in bfloat16 against sdpa in float32, on a small model."""
    batch = _batch(check.tiny, 4096)
    whole = _loss_and_gradient(check, batch, "sdpa", "float32")
    found: dict[str, Any] = {"float32 loss": whole[0]}
    model = random_causal_lm(StepCase("gate"), check.device, IMPLEMENTATION)
    needs = requirements(model, check.device, torch.bfloat16)
    for name in BACKENDS:
        if reasons := objections(name, needs):
            found[name] = {"skipped": reasons}
            continue
        found[name] = check.attempt(
            lambda name=name: _judge(_loss_and_gradient(check, batch, name, "bfloat16"), whole, 3e-3, 6e-2),  # type: ignore[misc]
            most=BACKEND_SECONDS,
        )
    return found


def _loss_and_gradient(check: Check, batch: PackedBatch, backend: str, dtype: str) -> tuple[float, Tensor]:
    """The loss sum, and the gradient of the first block as one vector."""
    model = build_ours(check, StepCase("gate"), f"model.attn_implementation={backend}", dtype=dtype)
    with model.computing():
        model.prepare_micro_batch(last=True, sync=True)
        loss, _ = model(batch)
        loss.backward()
    block = decoder_blocks(model.module.causal_lm)[0]
    gradient = torch.cat([p.grad.flatten().float() for p in block.parameters() if p.grad is not None])
    return float(loss.detach()), gradient


def _judge(
    found: tuple[float, Tensor], expected: tuple[float, Tensor], loss_limit: float, limit: float
) -> dict[str, Any]:
    of_loss = abs(found[0] - expected[0]) / abs(expected[0])
    of_gradient = float((found[1] - expected[1]).norm() / expected[1].norm())
    passed = of_loss <= loss_limit and of_gradient <= limit
    return {"loss_error": of_loss, "gradient_error": of_gradient, "passed": passed}


def ceiling(check: Check) -> dict[str, float]:
    """What the device itself reaches: one large bfloat16 product and one large copy. On random data, as zeros cheat."""
    size = 256 if check.tiny else 8192
    a, b = (torch.randn(size, size, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << (16 if check.tiny else 29), device=check.device)
    target = torch.empty_like(source)
    product, copy = check.seconds(lambda: a @ b, 10), check.seconds(lambda: target.copy_(source), 10)
    return {"matmul_tflops": 2 * size**3 / product / 1e12, "copy_tb_per_s": 2 * source.nbytes / copy / 1e12}


def attention(check: Check) -> dict[str, Any]:
    """Forward and backward of each backend at head sizes 64 and 128; causal operations per second."""
    batch = _batch(check.tiny, 16384)
    found: dict[str, Any] = {}
    for size, heads, kv_heads in ((64, 14, 2), (128, 28, 4)):
        total = batch.input_ids.numel()
        shapes = [(1, heads, total, size), (1, kv_heads, total, size), (1, kv_heads, total, size)]
        qkv = [torch.randn(s, device=check.device, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        spec, flops = AttentionSpec(size**-0.5), 7 * heads * size * sum(n * n for n in batch.seqlens)
        for name, backend in BACKENDS.items():
            if check.device.type not in backend.devices or backend.missing() is not None or check.seconds_left < 0:
                continue
            found[f"{name}, head size {size}"] = check.attempt(
                lambda attend=backend.attend, qkv=qkv, spec=spec, flops=flops: _time_attention(  # type: ignore[misc]
                    check, attend, batch, qkv, spec, flops
                ),
                most=BACKEND_SECONDS,
            )
    return found


def _time_attention(
    check: Check, attend: Attend, batch: PackedBatch, qkv: list[Tensor], spec: AttentionSpec, flops: int
) -> dict[str, float]:
    context = AttentionContext.of(batch, attend, check.device)
    slope = torch.randn_like(qkv[0])

    def both() -> None:
        torch.autograd.grad(attend(*qkv, spec, context), qkv, slope)  # type: ignore[call-arg]

    seconds = check.seconds(both, 3 if check.tiny else 10)
    return {"ms": seconds * 1e3, "causal_tflops": flops / seconds / 1e12}


def head(check: Check) -> dict[str, Any]:
    """The head and its loss, forward and backward, on the trained positions of a micro-batch: ours and others'.

    Each variant's loss and gradient of the hidden states must be those of full logits in float32, or it gets no time.
    """
    found: dict[str, Any] = {}
    cases = TINY_CASES if check.tiny else CASES
    torch.manual_seed(0)
    for name in ("0.5B", "7B"):
        positions = 90 if check.tiny else 5734
        width = int(MODELS[cases[name].model]["hidden_size"])
        make = {"device": check.device, "dtype": torch.bfloat16}
        hidden = torch.randn(positions, width, requires_grad=True, **make)  # type: ignore[arg-type]
        weight = (torch.randn(cases[name].vocabulary, width, **make) * 0.02).requires_grad_()  # type: ignore[arg-type]
        targets = torch.randint(cases[name].vocabulary, (positions,), device=check.device)
        expected = _by_parts(hidden, weight, targets)
        for label, variant in head_variants(hidden, weight, targets).items():
            if check.seconds_left < 0:
                found[f"{name}, {label}"] = {"skipped": "no time left"}
                continue
            check.free()
            found[f"{name}, {label}"] = check.attempt(
                lambda variant=variant, wanted=(hidden, weight), expected=expected: _time_head(  # type: ignore[misc]
                    check, variant, wanted, expected
                )
            )
    return found


def _by_parts(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient of the hidden states in float32, a thousand positions at a time."""
    loss, gradients, head = 0.0, [], weight.detach().float()
    for h, t in zip(hidden.detach().split(1024), targets.split(1024), strict=True):
        part = h.float().requires_grad_()
        of_part = torch.nn.functional.cross_entropy(part @ head.t(), t, reduction="sum")
        gradients += torch.autograd.grad(of_part, part)
        loss += float(of_part.detach())
    return loss, torch.cat(gradients)


def head_variants(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to the sum of the losses, by name; those of packages that are not there are left out."""
    ones = torch.ones(len(targets), device=hidden.device)
    functional = torch.nn.functional
    variants: dict[str, Callable[[], Tensor]] = {
        "full logits": lambda: functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")
    }
    for chunk in CHUNKS:
        variants[f"fsdpsft, chunks of {chunk}"] = lambda chunk=chunk: cross_entropy_sum(  # type: ignore[misc]
            hidden, weight, None, targets, ones, chunk_size=chunk
        )[0]
    if hasattr(functional, "linear_cross_entropy"):
        variants["torch linear_cross_entropy"] = lambda: functional.linear_cross_entropy(
            hidden, weight, targets, reduction="sum"
        )
        variants.update(_torch_chunked(hidden, weight, targets))
    if hidden.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        variants["Liger fused linear cross-entropy"] = lambda: _liger(hidden, weight, targets)
    return variants


def _torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], Tensor]]:
    """torch's own chunked way, where ``linear_cross_entropy`` has options for it."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        return {}
    return {
        "torch linear_cross_entropy, chunked": lambda: torch.nn.functional.linear_cross_entropy(
            hidden, weight, targets, reduction="sum", options=options()
        )
    }


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    result: Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return result


def _time_head(
    check: Check, variant: Callable[[], Tensor], wanted: tuple[Tensor, Tensor], expected: tuple[float, Tensor]
) -> dict[str, Any]:
    loss = variant()
    gradient = torch.autograd.grad(loss, wanted)[0]
    # torch's own adds its sum up in bfloat16, which has eight bits; its gradients are as good as any
    judged = _judge((float(loss.detach()), gradient), expected, 2**-6 if loss.dtype == torch.bfloat16 else 3e-3, 3e-2)
    if not judged["passed"]:
        return {**judged, "error": "another loss or gradient than that of full logits in float32"}
    del loss, gradient
    check.free()
    seconds = check.seconds(lambda: torch.autograd.grad(variant(), wanted), 2 if check.tiny else 5)
    return {"ms": 1e3 * seconds, "peak_gib": check.peak_gib(), **judged}
