"""One step, kernel by kernel: where its time goes, and how much of it the device is idle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.gpu_contenders import CLIP, build_ours, our_optimizer, our_step, ran_out_of_memory
from benchmarks.gpu_work import CASES, TINY_CASES, Check, StepCase, draw_work
from fsdpsft.train import train_step

SHOWN = 25
KINDS = {  # the first that fits a kernel's name
    "attention": r"flash|fmha|attention|attn|flex",
    "products": r"gemm|cutlass|nvjet|cublas|wgmma|splitk|aten::(add)?b?mm|aten::linear",
    "AdamW": r"adam|multi_tensor_apply",
    "softmax and loss": r"softmax|cross_entropy|nll",
    "norms": r"norm",
    "copies": r"memcpy|memset|copy",
    "reductions": r"reduce|aten::sum",
    "elementwise": r"elementwise|vectorized|triton|fused|aten::(mul|add|silu|div|cat|neg)",
}


class Interval(NamedTuple):
    """One kernel's run, in microseconds."""

    name: str
    start: float
    end: float


def profile(check: Check) -> dict[str, Any]:
    """One step of 0.5B and of 7B with LoRA."""
    found: dict[str, Any] = {}
    for name in ("0.5B", "7B-LoRA"):
        check.free()
        found[name] = check.attempt(partial(_first_that_fits, check, (TINY_CASES if check.tiny else CASES)[name]))
        check.results["profile"] = found
        check.save()
        if "error" not in found[name]:
            print(f"    {name}: idle {100 * found[name]['idle_share']:.0f} %; {found[name]['kinds']}", flush=True)
    return found


def _first_that_fits(check: Check, case: StepCase) -> dict[str, Any]:
    for way in case.ours:
        try:
            return {"way": way, **_profiled(check, case, *way)}
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
        check.free()
    raise MemoryError(f"none of {case.ours} fits")


def _profiled(check: Check, case: StepCase, micro_batch: int, recompute: str) -> dict[str, Any]:
    work = draw_work(case)
    step = our_step(check, work.rows, work.groups(micro_batch))
    model = build_ours(check, case, f"model.enable_gradient_checkpointing={recompute}")
    optimizer = our_optimizer(case, model)
    for _ in range(2):
        train_step(model, optimizer, step, CLIP)
    on_gpu = check.device.type == "cuda"
    check.wait()
    # The device's activity alone: following each operator on the host would slow the host down, and so show idle time.
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        train_step(model, optimizer, step, CLIP)
        check.wait()
    events = profiler.events() or []
    return kernel_table([
        Interval(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if (event.device_type == DeviceType.CUDA if on_gpu else not event.cpu_children)
    ])  # fmt: skip


def kernel_table(intervals: Sequence[Interval]) -> dict[str, Any]:
    """Where the time between the first kernel's start and the last one's end went.

    Returns:
        ``step_ms``; ``idle_share``, of that time without any kernel; ``kinds``, the share of all kernels' time by
        kind; ``kernels``, the ``SHOWN`` that took longest together: name, calls, ms, share.
    """
    if not intervals:
        raise ValueError("the profiler saw no kernel")
    ordered = sorted(intervals, key=lambda interval: interval.start)
    first, busy, reached = ordered[0].start, 0.0, ordered[0].start
    calls: dict[str, list[float]] = {}
    for name, start, end in ordered:
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
        calls.setdefault(name, []).append(end - start)
    total = sum(map(sum, calls.values())) or 1.0
    kinds: dict[str, float] = {}
    for name, times in calls.items():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + sum(times) / total
    longest = sorted(calls.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    return {
        "step_ms": (reached - first) / 1e3,
        "idle_share": 1 - busy / (reached - first),
        "kinds": {kind: round(share, 3) for kind, share in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": [
            {"name": name[:160], "calls": len(times), "ms": sum(times) / 1e3, "share": sum(times) / total}
            for name, times in longest
        ],
    }
