"""Speed and memory of training, against the trainers people would pick instead.

    python -m benchmarks.bench_step                      # float32 and bfloat16, 32k vocabulary
    python -m benchmarks.bench_step --vocab 151936 --dtypes fp32 --only "TRL SFTTrainer, stock" "fsdpsft"

Each contender runs in a process of its own, so that its peak memory is its own; rounds alternate the contenders
(A B C, A B C). The gate comes first: a contender whose loss on the same tokens differs gets no speed number. Seconds
are those of steps after the gate's two, which also warm up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    SHAPE_25M,
    TINY,
    environment,
    hardware_name,
    save_model,
    tokenized_rows,
    write_json,
)
from benchmarks.contenders import CONTENDERS, GATE_STEPS
from fsdpsft.data.batches.packing import Order

TOLERANCE = {"fp32": 1e-5, "bf16": 3e-3}
STOCK = "TRL SFTTrainer, stock"
REFERENCE = "plain loop, padded"  # the most obvious program is the judge of the loss


def run_once(name: str, folder: Path, dtype: str, threads: int) -> dict[str, Any]:
    """One process of one contender."""
    environ = {
        **os.environ,
        "BENCH_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "benchmarks.contenders", name, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        return {"error": "\n".join(done.stderr.splitlines()[-12:])}
    result: dict[str, Any] = json.loads(found[-1][len("RESULT ") :])
    return result


def passes(losses: list[float], expected: list[float], tolerance: float) -> bool:
    """Whether all losses a contender has of the gate's steps are those of the reference."""
    return bool(losses) and all(abs(a - b) <= tolerance * abs(b) for a, b in zip(losses, expected, strict=False))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all timed steps of all rounds."""
    steps = [
        (seconds, cpu, tokens, trained)
        for run in runs
        for seconds, cpu, tokens, trained in list(
            zip(run["seconds"], run["cpu_seconds"], run["tokens"], run["trained"], strict=False)
        )[GATE_STEPS:]
    ]  # fmt: skip
    speeds = sorted(tokens / seconds for seconds, _, tokens, _ in steps)
    return {
        "real_tokens_per_s": statistics.median(speeds), "slowest": speeds[0], "fastest": speeds[-1],
        "trained_tokens_per_s": statistics.median(trained / seconds for seconds, _, _, trained in steps),
        "tokens_per_cpu_s": statistics.median(tokens / cpu for _, cpu, tokens, _ in steps),
        "peak_gib": statistics.median(run["peak_bytes"] for run in runs) / 2**30, "timed_steps": len(steps),
    }  # fmt: skip


def compare(folder: Path, dtype: str, names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders in one dtype: gate, rounds, medians, ratios to the stock trainer."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names:
            started = time.perf_counter()
            runs[name].append(run_once(name, folder, dtype, arguments.threads))
            print(f"{dtype} round {number + 1} {name}: {time.perf_counter() - started:.0f} s", flush=True)
    judge = REFERENCE if REFERENCE in names else names[0]
    expected = runs[judge][0]["losses"]
    rows: dict[str, Any] = {}
    for name in names:
        failed = next((run["error"] for run in runs[name] if "error" in run), None)
        if failed is not None:
            rows[name] = {"gate": "did not run", "error": failed}
            continue
        losses = runs[name][0]["losses"]
        rows[name] = {"gate": "passed", "losses": losses}
        if passes(losses, expected, TOLERANCE[dtype]):
            rows[name] |= summary(runs[name])
        else:
            rows[name]["gate"] = f"loss differs from the {judge}'s {expected}"
    stock = rows.get(STOCK, {})
    for row in rows.values():
        if "real_tokens_per_s" in row and "real_tokens_per_s" in stock:
            row["speed_of_stock"] = row["real_tokens_per_s"] / stock["real_tokens_per_s"]
            row["cpu_speed_of_stock"] = row["tokens_per_cpu_s"] / stock["tokens_per_cpu_s"]
            row["memory_of_stock"] = row["peak_gib"] / stock["peak_gib"]
    return rows


def main() -> int:
    """Prepare data and model once, compare, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=16, help="rows of an optimiser step")
    parser.add_argument("--rows-a-pass", type=int, default=8, help="for trainers that count in rows; 8: TRL's default")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round, the gate's two included")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose name contains one of these")
    parser.add_argument("--tiny", action="store_true", help="a model that trains in milliseconds, to try the harness")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.batch % arguments.rows_a_pass:
        parser.error(f"--rows-a-pass {arguments.rows_a_pass} does not divide --batch {arguments.batch}")
    names = [name for name in CONTENDERS if any(part in name for part in arguments.only)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows, tokenizer, source = tokenized_rows(arguments.batch * arguments.steps, arguments.vocab)
        parameters = save_model(folder / "model", arguments.vocab, TINY if arguments.tiny else SHAPE_25M, tokenizer)
        lines = [json.dumps({"input_ids": ids, "loss_mask": mask}) for ids, mask in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines))
        order = Order((len(rows),), arguments.batch, seed=1)
        taken = [lines[i] for step in range(arguments.steps) for i in order.batch(step).tolist()]
        (folder / "ordered.jsonl").write_text("\n".join(taken))
        work = {"batch": arguments.batch, "rows_a_pass": arguments.rows_a_pass, "steps": arguments.steps}
        (folder / "work.json").write_text(json.dumps(work))
        result: dict[str, Any] = {
            "what": "training step", "environment": environment(), "model": f"Qwen2, {parameters:,} parameters",
            "vocabulary": arguments.vocab, "data": source, "batch": arguments.batch,
            "rows_a_pass": arguments.rows_a_pass, "rounds": arguments.rounds,
            "tokens": sum(len(ids) for ids, _ in rows), "trained_tokens": sum(sum(mask) for _, mask in rows),
            "tolerance": TOLERANCE, "results": {},
        }  # fmt: skip
        rows_a_step = "" if arguments.batch == 16 else f"-batch{arguments.batch}"
        rows_a_step += "" if arguments.rows_a_pass == 8 else f"-pass{arguments.rows_a_pass}"
        out = arguments.out or RESULTS / f"{hardware_name()}-step-25m-vocab{arguments.vocab}{rows_a_step}.json"
        for dtype in arguments.dtypes:
            result["results"][dtype] = compare(folder, dtype, names, arguments)
            write_json(out, result)  # after each, so that a run that is cut short leaves something
    for dtype, table in result["results"].items():
        for contender, row in table.items():
            if "real_tokens_per_s" in row:
                ratio = row["speed_of_stock"] if "speed_of_stock" in row else float("nan")
                speed = f"{row['real_tokens_per_s']:8.0f} tok/s{ratio:5.2f}x"
                print(f"{dtype} {contender:45}{speed} {row['peak_gib']:5.2f} GiB")
            else:
                print(f"{dtype} {contender:45}{row['gate']}\n{row.get('error', '')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
