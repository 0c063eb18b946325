"""The head and its loss: our chunked function against torch's ``linear_cross_entropy``, full logits, and Liger's.

    python -m benchmarks.bench_head                      # one thread, float32 and bfloat16, a quarter of an hour
    python -m benchmarks.bench_head --vocab 32768 --dtypes fp32 --rounds 3

Forward and backward of the summed loss of 2,048 trained positions, with gradients for hidden states and head. The gate
comes first: loss and gradients must be those of full logits in float32. Then processor seconds (wall on CUDA), rounds
in turn, medians; and the most memory beyond the inputs, each variant in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_data import status
from benchmarks.common import RESULTS, environment, hardware_name, write_json
from fsdpsft import loss as loss_module
from fsdpsft.distributed.mesh import keep_freed_memory
from fsdpsft.loss import cross_entropy_sum, default_chunk

POSITIONS = 2048
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # of the norm; a gradient rounded to bfloat16 once is off by 2e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(chunk: int | None) -> Loss:
    """``fsdpsft.loss``; None for the chunk that the library takes on this device."""
    return lambda h, w, t: cross_entropy_sum(h, w, None, t, torch.ones(len(t), device=h.device), chunk_size=chunk)[0]


def without_kernel(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """``fsdpsft.loss`` with plain operators where it would take its Triton kernel."""
    with patch.object(loss_module, "softmax_for", lambda device, dtype: loss_module.plain_softmax):
        return ours(None)(hidden, weight, targets)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What everybody writes."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def torchs(**options: Any) -> Loss:
    """torch's chunked function (from 2.13 on)."""
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    return lambda h, w, t: F.linear_cross_entropy(h, w, t, reduction="sum", options=chosen)


def ligers(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy, a Triton kernel."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
    return loss


def contenders(device: str, vocabulary: int) -> dict[str, Loss]:
    """What can run here."""
    found: dict[str, Loss] = {
        f"ours, chunks of {default_chunk(device, vocabulary)} (default)": ours(None),
        "ours, one chunk": ours(POSITIONS),
        "full logits": full_logits,
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch, its own choice"] = torchs()
        same = {"chunking_method": None, "batch_chunk_size": default_chunk(device, vocabulary)}
        found["torch, accurate, our chunks"] = torchs(acc_policy="accurate", acc_dtype=torch.float32, **same)
    if device == "cuda":
        found["ours, plain softmax"] = without_kernel
        try:
            import liger_kernel  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            return found
        found["Liger"] = ligers
    return found


def tensors(hidden_size: int, vocabulary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets; the same numbers in each dtype, but for rounding."""
    dice = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, hidden_size, generator=dice).bfloat16()
    weight = (torch.randn(vocabulary, hidden_size, generator=dice) * hidden_size**-0.5).bfloat16()
    targets = torch.randint(vocabulary, (POSITIONS,), generator=dice)
    return (
        hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), targets.to(device)
    )  # fmt: skip


def run(loss: Loss, data: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward; returns the loss and both gradients, which the inputs no longer hold."""
    value = loss(*data)
    value.backward()  # type: ignore[no-untyped-call]
    hidden, weight = data[0].grad, data[1].grad
    assert hidden is not None and weight is not None
    data[0].grad = data[1].grad = None
    return value.detach(), hidden, weight


def gate(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference of loss and gradients, as a share of their norm."""
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def seconds(loss: Loss, data: tuple[Tensor, Tensor, Tensor]) -> float:
    """Processor seconds of one run, or wall seconds on CUDA."""
    if data[0].is_cuda:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(loss, data)
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    run(loss, data)
    return time.process_time() - start


def peak_mib(name: str, shape: tuple[int, int], dtype: str, device: str) -> float:
    """Most memory of one run beyond the inputs; in a fresh process, whose kernels are warm from a small run."""
    loss, data = contenders(device, shape[1])[name], tensors(*shape, DTYPES[dtype], device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        run(loss, data)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    torch.set_num_threads(1)
    run(loss, (data[0][:2].detach().requires_grad_(), data[1][:64].detach().requires_grad_(), data[2][:2] % 64))
    resident = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
    run(loss, data)
    return status("VmHWM") - resident


def compare(shape: tuple[int, int], dtype: str, device: str, rounds: int) -> dict[str, Any]:
    """One shape: gate, memory, rounds."""
    data = tensors(*shape, DTYPES[dtype], device)
    expected = run(full_logits, tensors(*shape, torch.float32, device))
    rows: dict[str, dict[str, Any]] = {}
    running = contenders(device, shape[1])
    for name, loss in list(running.items()):
        difference = gate(run(loss, data), expected)
        rows[name] = {"difference": difference, "gate": "passed"}
        if difference > TOLERANCE[dtype]:
            rows[name]["gate"] = "differs"
            del running[name]
    del expected
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, loss in running.items():
            times[name].append(seconds(loss, data))
    del data
    for name in running:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_mib, (name, shape, dtype, device))
        rows[name] |= {"seconds": statistics.median(times[name]), "all": times[name], "peak_mib": peak}
    return rows


def main() -> int:
    """Compare in every shape and write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[384, 1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 151936])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=1, help="timed ones, after the gate's")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{hardware_name()}-head.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()  # as a run on CPU does
        torch.set_num_threads(1)
    result: dict[str, Any] = {
        "what": "head and loss", "environment": environment(), "positions": POSITIONS, "tolerance": TOLERANCE,
        "results": [],
    }  # fmt: skip
    for dtype, vocabulary, hidden in (
        (d, v, h) for d in arguments.dtypes for v in arguments.vocab for h in arguments.hidden
    ):
        rows = compare((hidden, vocabulary), dtype, device, arguments.rounds)
        result["results"].append({"dtype": dtype, "vocabulary": vocabulary, "hidden_size": hidden, "rows": rows})
        for name, row in sorted(rows.items(), key=lambda item: item[1].get("seconds", float("inf"))):
            numbers = f"{row['seconds']:7.2f} s {row['peak_mib']:7.0f} MiB" if "seconds" in row else row["gate"]
            print(f"{dtype} V={vocabulary} D={hidden} {name:36} {numbers}  difference {row['difference']:.1e}")
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
