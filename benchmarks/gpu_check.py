"""Correctness, speed and memory on one CUDA GPU, in one command of under ten minutes, without a network.

    python -m benchmarks.gpu_check                       # all parts, within --minutes
    python -m benchmarks.gpu_check --tiny --device cpu   # the same code on small shapes, to try it anywhere

Parts, in order: environment; gate (loss and gradients of bfloat16 against float32, every attention backend); attention;
head; steps (0.5B, 1.5B, 7B full, 7B LoRA on packed ragged chats); TRL where it can be imported; the longest sequence of
an 8B model with LoRA. A failed gate stops the speed parts. Each part writes what it has, so that a run that is cut
short leaves its results. Random weights throughout; floating-point operations are counted causal.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.common import RESULTS, environment, hardware_name, write_json
from fsdpsft.batch import PackedBatch, Sample, pack
from fsdpsft.data.packing import plan_step
from fsdpsft.distributed import activation_checkpoint
from fsdpsft.distributed.fsdp import MasterWeights
from fsdpsft.distributed.ulysses import shard
from fsdpsft.loss import cross_entropy_sum
from fsdpsft.model.attention import IMPLEMENTATION, Attend, AttentionContext, AttentionSpec
from fsdpsft.model.attention_backends import BACKENDS, choose_backend, objections, requirements
from fsdpsft.model.last_block import trim_last_block
from fsdpsft.model.lora import LoraSettings, apply_lora
from fsdpsft.model.sft_model import ModelInput, SFTModel, decoder_blocks
from fsdpsft.optim import build_optimizer, clip_grad_norm

PEAK_TFLOPS = {"H200": 989, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362, "RTX 4090": 165}
MEAN, SQUARED_CV, LONGEST, TRAINED = 840, 1.69, 4096, 0.35  # of the chats: lognormal, CV 1.3

MODELS: dict[str, dict[str, Any]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
}  # fmt: skip


@dataclass(frozen=True)
class StepCase:
    """One training configuration.

    Attributes:
        states: dtype of weights, gradients and moments; float32 means master weights beside bfloat16 copies.
        recompute: activation checkpointing.
        micro_batch: tokens of a forward pass; a step has ``micro_batches`` of them.
    """

    model: str
    lora_rank: int = 0
    states: torch.dtype = torch.float32
    recompute: str = "none"
    micro_batch: int = 16384
    micro_batches: int = 4
    compiled: bool = False
    trim: bool = True


CASES = {
    "0.5B full": StepCase("0.5B"),
    "0.5B full, whole last block": StepCase("0.5B", trim=False),
    "0.5B full, compiled": StepCase("0.5B", compiled=True),
    "1.5B full": StepCase("1.5B", recompute="selective"),
    "7B full, bf16 states": StepCase("7B", states=torch.bfloat16, recompute="selective", micro_batches=2),
    "7B LoRA": StepCase("7B", lora_rank=16, recompute="selective", micro_batches=2),
}
TINY_CASES = {
    "tiny full": StepCase("tiny", micro_batch=256, micro_batches=2),
    "tiny full, bf16 states": StepCase(
        "tiny", states=torch.bfloat16, recompute="full", micro_batch=256, micro_batches=2
    ),
    "tiny LoRA": StepCase("tiny", lora_rank=4, recompute="selective", micro_batch=256, micro_batches=2),
}


@dataclass
class Check:
    """The run: its device, its clock, its results."""

    device: torch.device
    tiny: bool
    deadline: float
    out: Path
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return torch.bfloat16

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Median seconds of ``run``, by the device's own events where it has them; one call before is not counted."""
        run()
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def free(self) -> None:
        """Drop what the last case left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Most memory the allocator has reserved since ``free``; None on CPU."""
        return torch.cuda.max_memory_reserved() / 2**30 if self.device.type == "cuda" else None

    def save(self) -> None:
        """Write what there is."""
        write_json(self.out, self.results)


# ------------------------------------------------------------------------------------------------------- data, models


def ragged_batches(tokens: int, count: int, vocabulary: int, longest: int) -> list[PackedBatch]:
    """``count`` packed micro-batches of at most ``tokens`` tokens of made-up chats, the last 35 % of each trained."""
    dice, variance = np.random.default_rng(0), np.log(1 + SQUARED_CV)
    drawn = dice.lognormal(np.log(min(MEAN, longest / 4)) - variance / 2, np.sqrt(variance), 64 * count + 64)
    lengths = np.clip(drawn, 16, longest).astype(np.int64)
    lengths = lengths[: max(int(np.searchsorted(lengths.cumsum(), int(tokens * count * 0.97))), 1)]
    (plan,) = plan_step(lengths, dp_size=1, token_budget=tokens)
    batches = []
    for positions in plan:
        samples = []
        for row in positions:
            ids = dice.integers(3, vocabulary, int(lengths[row])).astype(np.uint32)
            weights = (np.arange(len(ids)) >= (1 - TRAINED) * len(ids)).astype(np.float32)
            samples.append(Sample(ids, weights, int(row)))
        batches.append(pack(samples, pad_token_id=0))
    return batches


def build(case: StepCase, check: Check, attention: str = "auto") -> tuple[SFTModel, Attend, bool]:
    """A random model on the device, set up in the order of ``parallelize.py``."""
    config = Qwen2Config(max_position_embeddings=1 << 20, bos_token_id=None, eos_token_id=2, **MODELS[case.model])
    config._attn_implementation = IMPLEMENTATION
    frozen = case.lora_rank > 0
    torch.manual_seed(0)
    with torch.device(check.device):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=check.dtype if frozen else case.states)
    if frozen:
        apply_lora(
            causal_lm, LoraSettings(case.lora_rank, 2 * case.lora_rank, 0.0, "all-linear", None, (), False, False)
        )
        for name in [name for name, _ in causal_lm.named_parameters() if "lora_" in name]:
            _fill_adapter(causal_lm, name, check.device)
    backend = choose_backend(attention, requirements(causal_lm, check.device, check.dtype))
    blocks = decoder_blocks(causal_lm)
    trimmed = case.trim and trim_last_block(blocks[-1])
    activation_checkpoint.apply(blocks, case.recompute)
    if case.compiled:
        for block in blocks:
            block.compile()
    return SFTModel(causal_lm, 4096).train(), backend.attend, trimmed


def _fill_adapter(causal_lm: Any, name: str, device: torch.device) -> None:
    """Give an adapter's matrix, which is on meta or not filled yet, random values."""
    owner, _, last = name.rpartition(".")
    module = causal_lm.get_submodule(owner)
    old = getattr(module, last)
    values = torch.randn(old.shape, dtype=old.dtype, device=device) * 0.02
    setattr(module, last, torch.nn.Parameter(values, requires_grad=old.requires_grad))


def loss_of(model: SFTModel, batch: PackedBatch, attend: Attend, device: torch.device, trimmed: bool) -> Tensor:
    """Loss sum of a micro-batch."""
    local = shard(batch, 0, 1).to(device)
    context = AttentionContext.of(batch, attend, device, local.trained_index if trimmed else None)
    result: Tensor = model(
        ModelInput(local.input_ids, local.position_ids, context, local.trained_index, local.targets, local.loss_weights)
    )[0]
    return result


# --------------------------------------------------------------------------------------------------------------- parts


def gate(check: Check) -> dict[str, Any]:
    """Loss and gradient of each attention backend in bfloat16 against sdpa in float32, on a small model."""
    small = {**MODELS["tiny"], "hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096}
    MODELS["gate"] = small
    batch = ragged_batches(256 if check.tiny else 2048, 1, 4096, 128 if check.tiny else 1024)[0]
    model, attend, _ = build(StepCase("gate", trim=False), check, "sdpa")
    reference, expected = _loss_and_gradient(model, batch, attend, check.device, trimmed=False)
    found: dict[str, Any] = {"float32 loss": reference, "passed": True}
    model, attend, trimmed = build(StepCase("gate"), check, "sdpa")
    loss, gradient = _loss_and_gradient(model, batch, attend, check.device, trimmed=trimmed)
    found["float32, trimmed last block"] = _judge(loss, reference, gradient, expected, 1e-5, 1e-3)
    for name in BACKENDS:
        model, _, trimmed = build(StepCase("gate", states=torch.bfloat16), check, "sdpa")
        reasons = objections(name, requirements(model.causal_lm, check.device, check.dtype))
        if reasons:
            found[name] = {"skipped": reasons}
            continue
        loss, gradient = _loss_and_gradient(model, batch, BACKENDS[name].attend, check.device, trimmed=trimmed)
        found[name] = _judge(loss, reference, gradient, expected, 3e-3, 6e-2)
    found["passed"] = all(row["passed"] for row in found.values() if isinstance(row, dict) and "passed" in row)
    return found


def _loss_and_gradient(
    model: SFTModel, batch: PackedBatch, attend: Attend, device: torch.device, *, trimmed: bool
) -> tuple[float, Tensor]:
    loss = loss_of(model, batch, attend, device, trimmed)
    loss.backward()
    block = decoder_blocks(model.causal_lm)[0]
    return float(loss.detach()), torch.cat([p.grad.flatten().float() for p in block.parameters() if p.grad is not None])


def _judge(
    loss: float, reference: float, gradient: Tensor, expected: Tensor, loss_limit: float, limit: float
) -> dict[str, Any]:
    of_loss = abs(loss - reference) / abs(reference)
    of_gradient = float((gradient - expected).norm() / expected.norm())
    return {
        "loss_error": of_loss,
        "gradient_error": of_gradient,
        "passed": of_loss <= loss_limit and of_gradient <= limit,
    }


def attention(check: Check) -> dict[str, Any]:
    """Forward and backward of each backend at head sizes 64 and 128; causal operations per second."""
    tokens = 256 if check.tiny else 16384
    batch = ragged_batches(tokens, 1, 512, 128 if check.tiny else LONGEST)[0]
    found: dict[str, Any] = {}
    for size, heads, kv_heads in ((64, 14, 2), (128, 28, 4)):
        total = batch.input_ids.numel()
        shapes = [(1, heads, total, size), (1, kv_heads, total, size), (1, kv_heads, total, size)]
        q, k, v = (torch.randn(s, device=check.device, dtype=check.dtype, requires_grad=True) for s in shapes)
        spec, flops = AttentionSpec(size**-0.5), 7 * heads * size * sum(n * n for n in batch.seqlens)
        for name, backend in BACKENDS.items():
            if check.device.type not in backend.devices or backend.missing() is not None:
                continue
            found[f"{name}, head size {size}"] = attempt(
                lambda backend=backend, q=q, k=k, v=v, spec=spec, flops=flops: _time_attention(  # type: ignore[misc]
                    check, backend.attend, batch, (q, k, v), spec, flops
                )
            )
    return found


def _time_attention(
    check: Check, attend: Attend, batch: PackedBatch, qkv: tuple[Tensor, ...], spec: AttentionSpec, flops: int
) -> dict[str, float]:
    context = AttentionContext.of(batch, attend, check.device)

    def both() -> None:
        output = attend(*qkv, spec, context)  # type: ignore[call-arg]
        torch.autograd.grad(output, qkv, torch.ones_like(output))

    seconds = check.seconds(both, 3 if check.tiny else 10)
    return {"ms": seconds * 1e3, "causal_tflops": flops / seconds / 1e12}


def head(check: Check) -> dict[str, Any]:
    """The head and its loss on 35 % of 16k positions: chunk sizes, full logits, and torch's own chunked loss."""
    positions = 90 if check.tiny else 5734
    found: dict[str, Any] = {}
    for name, width, vocabulary in [("tiny", 64, 512)] if check.tiny else [("0.5B", 896, 151936), ("7B", 3584, 152064)]:
        make = {"device": check.device, "dtype": check.dtype}
        hidden = torch.randn(positions, width, requires_grad=True, **make)
        weight = (torch.randn(vocabulary, width, **make) * 0.02).requires_grad_()
        targets = torch.randint(vocabulary, (positions,), device=check.device)
        ones = torch.ones(positions, device=check.device)

        def full(hidden: Tensor = hidden, weight: Tensor = weight, targets: Tensor = targets) -> Tensor:
            return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")

        variants: dict[str, Callable[[], Tensor]] = {"full logits": full}
        for chunk in (1024, 2048, 4096, 8192):
            variants[f"chunks of {chunk}"] = lambda h=hidden, w=weight, t=targets, o=ones, c=chunk: cross_entropy_sum(  # type: ignore[misc]
                h, w, None, t, o, chunk_size=c
            )[0]
        if hasattr(torch.nn.functional, "linear_cross_entropy"):
            variants["torch linear_cross_entropy"] = lambda h=hidden, w=weight, t=targets: (  # type: ignore[misc]
                torch.nn.functional.linear_cross_entropy(h, w, t, reduction="sum")
            )
        for label, variant in variants.items():
            check.free()
            wanted = (hidden, weight)
            found[f"{name}, {label}"] = attempt(
                lambda variant=variant, wanted=wanted: {  # type: ignore[misc]
                    "ms": 1e3 * check.seconds(lambda: torch.autograd.grad(variant(), wanted), 3),
                    "peak_gib": check.peak_gib(),
                }
            )
    return found


def step_flops(case: StepCase, batches: list[PackedBatch]) -> float:
    """Operations a step requires: products on real tokens, causal attention, head on trained positions only."""
    shape = MODELS[case.model]
    width, heads, kv_heads = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    head_size = width // heads
    body = 2 * width * heads * head_size + 2 * width * kv_heads * head_size + 3 * width * shape["intermediate_size"]
    tokens, trained = sum(b.input_ids.numel() for b in batches), sum(len(b.trained_index) for b in batches)
    pairs = sum(n * n for b in batches for n in b.seqlens)
    layers, factor = shape["num_hidden_layers"], 4 if case.lora_rank else 6
    return (
        layers * (factor * body * tokens + 6 * heads * head_size * pairs)
        + factor * trained * width * shape["vocab_size"]
    )


def time_step(check: Check, case: StepCase, repeats: int) -> dict[str, Any]:
    """Whole optimiser steps: tokens per second, MFU, peak memory."""
    check.free()
    batches = ragged_batches(
        case.micro_batch, case.micro_batches, MODELS[case.model]["vocab_size"], 128 if check.tiny else LONGEST
    )
    model, attend, trimmed = build(case, check)
    optimizer = build_optimizer(
        model, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01,
        state_dtype=torch.float32 if case.lora_rank else case.states,
    )  # fmt: skip
    masters = MasterWeights(model, check.dtype)
    trained = sum(len(b.trained_index) for b in batches)
    losses: list[Tensor] = []

    def step() -> None:
        total = torch.zeros((), device=check.device)
        with masters.computing():
            for batch in batches:
                loss = loss_of(model, batch, attend, check.device, trimmed) / trained
                loss.backward()
                total += loss.detach()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        masters.refresh()
        losses.append(total)

    step()
    seconds = check.seconds(step, repeats)
    if not all(torch.isfinite(loss) for loss in losses):
        return {"error": f"losses {[float(loss) for loss in losses]}"}
    tokens = sum(b.input_ids.numel() for b in batches)
    peak = next(
        (v for k, v in PEAK_TFLOPS.items() if check.device.type == "cuda" and k in torch.cuda.get_device_name()), None
    )
    tflops = step_flops(case, batches) / seconds / 1e12
    return {
        "seconds": seconds, "real_tokens_per_s": tokens / seconds, "trained_tokens_per_s": trained / seconds,
        "tflops": tflops, "mfu": tflops / peak if peak else None, "peak_gib": check.peak_gib(), "tokens": tokens,
        "losses": [float(loss) for loss in losses], "trimmed": trimmed,
    }  # fmt: skip


def steps(check: Check) -> dict[str, Any]:
    """Every case, as long as there is time."""
    found: dict[str, Any] = {}
    for name, case in (TINY_CASES if check.tiny else CASES).items():
        if time.monotonic() > check.deadline - 60:
            found[name] = {"skipped": "no time left"}
            continue
        found[name] = attempt(lambda case=case: time_step(check, case, 2 if check.tiny else 4))  # type: ignore[misc]
        print(f"  {name}: {found[name]}", flush=True)
    return found


def longest(check: Check) -> dict[str, Any]:
    """The longest single sequence of an 8B model with LoRA that trains: doubled until memory runs out."""
    case = StepCase("tiny" if check.tiny else "8B", lora_rank=4 if check.tiny else 16, recompute="full")
    model, attend, trimmed = build(case, check)
    found: dict[str, Any] = {}
    length = 128 if check.tiny else 32768
    while length <= (256 if check.tiny else 1 << 20) and time.monotonic() < check.deadline:
        check.free()
        ids = np.random.default_rng(0).integers(3, MODELS[case.model]["vocab_size"], length).astype(np.uint32)
        batch = pack([Sample(ids, (np.arange(length) > 0.65 * length).astype(np.float32), 0)], pad_token_id=0)

        def train(batch: PackedBatch = batch) -> dict[str, Any]:
            start = time.perf_counter()
            loss_of(model, batch, attend, check.device, trimmed).backward()
            check.wait()
            model.zero_grad()
            return {"seconds": time.perf_counter() - start, "peak_gib": check.peak_gib()}

        found[str(length)] = attempt(train)
        if "error" in found[str(length)]:
            break
        length *= 2
    return found


def trl(check: Check) -> dict[str, Any]:
    """The step benchmark's contenders on this device, where TRL is installed."""
    import subprocess

    try:
        import trl as installed
    except ImportError:
        return {"skipped": "TRL is not installed"}
    if check.tiny:
        return {"version": installed.__version__, "skipped": "a tiny run; see benchmarks.bench_step"}
    out = check.out.with_name(check.out.stem + "-trl.json")
    command = [sys.executable, "-m", "benchmarks.bench_step", "--dtypes", "bf16", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    return {"version": installed.__version__, "file": out.name, "output": done.stdout.splitlines()[-12:]}


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run`` returns, or its error: one kernel's failure must not cost the other numbers."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001
        return {
            "error": f"{type(error).__name__}: {str(error)[:300]}",
            "where": traceback.format_exc().splitlines()[-4:-1],
        }


PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "gate": gate, "attention": attention, "head": head, "steps": steps, "longest_sequence_8b_lora": longest, "trl": trl,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 0 when the gate passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device. Try the code with: python -m benchmarks.gpu_check --tiny --device cpu")
        return 2
    out = options.out or RESULTS / f"{hardware_name()}-gpu-check{'-tiny' if options.tiny else ''}.json"
    check = Check(torch.device(options.device), options.tiny, time.monotonic() + 60 * options.minutes, out)
    check.results = {"what": "gpu check", "environment": environment(), "tiny": options.tiny}
    for part in options.parts:
        if time.monotonic() > check.deadline:
            check.results[part] = {"skipped": "no time left"}
            continue
        start = time.monotonic()
        check.results[part] = attempt(lambda part=part: PARTS[part](check))  # type: ignore[misc]
        check.free()
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
        check.save()
        if part == "gate" and not check.results["gate"].get("passed", False):
            print(f"The gate failed, so no speed is measured: {check.results['gate']}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
