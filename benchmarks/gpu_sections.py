"""The sections of the GPU check, their shares of the time, and the table of targets."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_correct, gpu_kernels, gpu_profile
from benchmarks.common import RESULTS, environment, hardware_name
from benchmarks.gpu_check import FIRST, MORE
from benchmarks.gpu_contenders import CLIP, build_ours, compare, contenders, missing_for_trl, our_optimizer, our_step
from benchmarks.gpu_work import CASES, TINY_CASES, Check, StepCase, errors_in
from fsdpsft.batch import Sample
from fsdpsft.train import train_step

TARGETS = {"0.5B": (130_000, 0.41), "1.5B": (55_000, 0.53), "7B": (13_500, 0.59), "7B-LoRA": (18_000, 0.53)}
"""Real tokens/s and share of 989 TFLOP/s on one H200."""
TIMES_TRL, MEMORY_OF_TRL = 1.5, 1.0
TITLES = {"0.5B": "0.5B full", "1.5B": "1.5B full", "7B": "7B full, bf16 states", "7B-LoRA": "7B LoRA"}
LONGEST = "longest"

Section = Callable[[Check], dict[str, Any]]


# ------------------------------------------------------------------------------------------------------------ sections


def steps(name: str, check: Check) -> dict[str, Any]:
    """A training step of one configuration, by everybody who is here."""

    def report(found: dict[str, Any]) -> None:
        check.results[name] = found
        check.save()

    case = (TINY_CASES if check.tiny else CASES)[name]
    found = compare(check, case, contenders(check, case), report)
    missing = missing_for_trl()
    return {**found, "TRL": f"not installed: {', '.join(missing)}"} if missing else found


def longest(check: Check) -> dict[str, Any]:
    """The longest single sequence of an 8B model with LoRA that trains, in doublings, as far as memory and time go.

    Attention's time grows with the square, so on a large device time ends first; the memory of the two longest that
    ran then tells how long a sequence would fit, as both activations and their copies grow linearly.
    """
    case = StepCase("tiny" if check.tiny else "8B", lora_rank=4 if check.tiny else 16)
    model = build_ours(check, case, "model.enable_gradient_checkpointing=full", "model.mlp_tiles=8")
    optimizer = our_optimizer(case, model)
    found: dict[str, Any] = {}
    seconds, shortest, doublings = 0.0, 128 if check.tiny else 16384, 3 if check.tiny else 7
    for length in (shortest << doubled for doubled in range(doublings)):
        if check.seconds_left < 5 * seconds:
            found["ended by"] = "time"
            break
        check.free()
        found[str(length)] = check.attempt(partial(_one_sequence, check, model, optimizer, case.vocabulary, length))
        check.results[LONGEST] = found
        check.save()
        if "error" in found[str(length)]:
            found["ended by"] = "memory" if "OutOfMemory" in found[str(length)]["error"] else "an error"
            break
        seconds = found[str(length)]["seconds"]
    return {**found, **longest_that_fits(found, check.device)}


def _one_sequence(check: Check, model: Any, optimizer: Any, vocabulary: int, length: int) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(3, vocabulary, length).astype(np.uint32)
    row = Sample(ids, (np.arange(length) > 0.65 * length).astype(np.float32), 0)
    step = our_step(check, [row], [[0]])
    check.wait()
    start = time.perf_counter()
    stats = train_step(model, optimizer, step, CLIP)
    loss = float(stats.losses[0])
    seconds = time.perf_counter() - start
    if not np.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    return {"seconds": seconds, "tokens_per_s": length / seconds, "peak_gib": check.peak_gib(), "loss": loss}


def longest_that_fits(found: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The longest that ran, and on a GPU the straight line through the memory of the last two."""
    ran = sorted(int(key) for key, row in found.items() if key.isdigit() and "error" not in row)
    result: dict[str, Any] = {"trained": ran[-1] if ran else None}
    if device.type != "cuda" or len(ran) < 2:
        return result
    (short, low), (long, high) = ((length, found[str(length)]["peak_gib"]) for length in ran[-2:])
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    slope = (high - low) / (long - short)
    return {**result, "would fit by memory (extrapolated)": int(long + (0.95 * total - high) / slope)}


SECTIONS: dict[str, Section] = {
    "correct": gpu_correct.correct, "gate": gpu_kernels.gate, "ceiling": gpu_kernels.ceiling,
    "profile": gpu_profile.profile, "attention": gpu_kernels.attention, "head": gpu_kernels.head,
    **{name: partial(steps, name) for name in CASES}, LONGEST: longest,
}  # fmt: skip
SHARES = {
    "correct": 1, "gate": 0.5, "ceiling": 0.1, "profile": 1.4, "attention": 0.7, "head": 0.7, "0.5B": 1.6,
    "7B-LoRA": 2, "1.5B": 2, "7B": 3, LONGEST: 2,
}  # fmt: skip
"""Of the time that is left, among the sections still to come; minutes, where there are eight for the first of them."""


# ------------------------------------------------------------------------------------------------------------- targets


def target_table(results: dict[str, Any], gpu: str | None) -> list[dict[str, Any]]:
    """Each target, what was measured, and whether it is met; None where it was not measured, or not on an H200."""
    table = []

    def add(what: str, target: float, measured: float | None, met: Callable[[float], bool]) -> None:
        judged = None if measured is None or "H200" not in (gpu or "") else met(measured)
        table.append({"what": what, "target": target, "measured": measured, "met": judged})

    for name, (speed, mfu) in TARGETS.items():
        ours, theirs = best_of(results, name)
        ratio = ours["real_tokens_per_s"] / theirs["real_tokens_per_s"] if ours and theirs else None
        memory = ours["peak_gib"] / theirs["peak_gib"] if ours and theirs and theirs["peak_gib"] else None
        add(f"{TITLES[name]}: real tokens/s", speed, ours.get("real_tokens_per_s"), lambda x, least=speed: x >= least)  # type: ignore[misc]
        add(f"{TITLES[name]}: MFU of 989 TFLOP/s", mfu, ours.get("mfu"), lambda x, least=mfu: x >= least)  # type: ignore[misc]
        add(f"{TITLES[name]}: speed over the fastest TRL's", TIMES_TRL, ratio, lambda x: x >= TIMES_TRL)
        add(f"{TITLES[name]}: memory over the fastest TRL's", MEMORY_OF_TRL, memory, lambda x: x <= MEMORY_OF_TRL)
    return table


def best_of(results: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fastest of ours and the fastest of TRL in a section; empty where there is none."""
    rows = results[name].get("contenders", {}) if name in results else {}
    best: list[dict[str, Any]] = []
    for prefix in ("fsdpsft", "TRL"):
        speeds = [row for key, row in rows.items() if key.startswith(prefix) and "real_tokens_per_s" in row]
        best.append(max(speeds, key=lambda row: row["real_tokens_per_s"], default={}))
    return best[0], best[1]


def as_text(table: list[dict[str, Any]]) -> str:
    """The table in Markdown."""

    def number(x: float | None) -> str:
        return "not measured" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.2f}"

    verdicts = {None: "", True: "yes", False: "no"}
    lines = [
        f"| {row['what']} | {number(row['target'])} | {number(row['measured'])} | {verdicts[row['met']]} |"
        for row in table
    ]
    return "\n".join(["| | target | measured | met |", "|---|---|---|---|", *lines])


# ------------------------------------------------------------------------------------------------------------- the run


def run_sections(check: Check, names: Sequence[str], deadline: float) -> list[str]:
    """Run the sections in turn, each with its share of the time that is left; what it has is saved after each.

    Returns:
        Sections that did not run because the device was lost.
    """
    for place, name in enumerate(names):
        rest = names[place:]
        left = deadline - time.monotonic()
        if left <= 0:
            check.results[name] = {"skipped": "no time left"}
            check.save()
            continue
        check.deadline = time.monotonic() + left * SHARES[name] / sum(SHARES[other] for other in rest)
        print(f"{name}:", flush=True)
        check.results.pop(name, None)
        start = time.monotonic()
        found = check.attempt(partial(SECTIONS[name], check), grace=60)
        check.results[name] = {**check.results.get(name, {}), **found, "took_s": round(time.monotonic() - start, 1)}
        check.results["targets"] = target_table(check.results, check.results["environment"]["gpu"])
        for where, what in errors_in(check.results[name]):
            print(f"  {where}: {what}", flush=True)
        lost = device_is_lost(check)
        check.save()
        if lost is not None:
            print(f"  the device is lost: {lost}", flush=True)
            return list(rest[1:])
        check.free()
    return []


def device_is_lost(check: Check) -> str | None:
    """What the device says when it no longer answers: after an illegal access nothing runs in this process."""
    try:
        check.wait()
        torch.zeros(1, device=check.device).sum()
        check.wait()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def run(options: argparse.Namespace, began: float) -> int:
    """Run what the command line asks for, which ``began`` at that ``time.monotonic``; returns the exit code."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device. Try the code with: python -m benchmarks.gpu_check --tiny --device cpu")
        return 2
    out = options.out or RESULTS / f"{hardware_name()}-gpu-check{'-tiny' if options.tiny else ''}.json"
    check = Check(torch.device(options.device), options.tiny, out)
    if options.add and out.is_file():
        check.results = json.loads(out.read_text())
    lacking = [name for name in (*FIRST, *MORE) if "took_s" not in check.results.get(name, {})]
    names = options.only or (lacking if options.add else FIRST)
    check.results |= {"what": "gpu check", "environment": environment(), "tiny": options.tiny}
    check.results["targets"] = target_table(check.results, check.results["environment"]["gpu"])
    undone = run_sections(check, names, began + 60 * options.minutes)
    print(f"{as_text(check.results['targets'])}\nwritten: {out}")
    left = options.minutes - (time.monotonic() - began) / 60
    if undone and left > 0:
        again = ["--only", *undone, "--add", "--out", str(out), "--minutes", f"{left:.2f}", "--device", options.device]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_check", *again, *["--tiny"] * options.tiny])
    return int(bool(undone) or any(list(errors_in(check.results[name])) for name in names if name in check.results))
