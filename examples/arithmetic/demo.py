"""The whole way on two CPU cores: make data and a model, train on two processes, ask what it was never shown.

make demo        or        python examples/arithmetic/demo.py demo
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from evaluate import exact_match
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent


def run(*command: str | Path) -> None:
    """Show a command, run it, and end with its exit code if it fails."""
    words = [str(word) for word in command]
    print("\n$ " + " ".join(words), flush=True)
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    code = subprocess.run(words, env={"OMP_NUM_THREADS": threads, **os.environ}).returncode
    if code:
        sys.exit(code)


def training_command(folder: Path, batch_size: int) -> list[str | Path]:
    """The command that trains, as one would type it."""
    return [
        Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2", "-m", "fsdpsft.train",
        f"data.train_files={folder}/data/train.parquet",
        f"data.val_files={folder}/data/val.parquet",
        f"data.cache_dir={folder}/cache",
        "data.multiturn.enable=true",
        f"data.train_batch_size={batch_size}",
        f"data.micro_batch_size_per_gpu={batch_size}",
        "data.max_length=512",
        f"model.partial_pretrain={folder}/model",
        "model.enable_gradient_checkpointing=none",
        "optim.lr=3e-3",
        "optim.warmup_steps_ratio=0.05",
        "trainer.total_epochs=1",
        "trainer.log_freq=50",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={folder}/run",
    ]  # fmt: skip


def answers(model_path: Path, questions: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Load a folder with plain transformers and count its right answers by kind of question, and over all."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    by_kind = exact_match(model, tokenizer, questions)
    right, asked = map(sum, zip(*by_kind.values(), strict=True))
    return {"all held-out questions": (right, asked), **by_kind}


def table(rows: list[tuple[str, str, str]]) -> str:
    """Three columns of text, aligned, as a Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    ruled = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in ruled
    )


def report(folder: Path, before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], seconds: float) -> str:
    """Everything the demo measured, as one table."""
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["train/loss"] for step in steps if "train/loss" in step]
    speeds = sorted(step["perf/tokens_per_second"] for step in steps if "perf/tokens_per_second" in step)
    shares = [
        (f"exact match, {kind} ({asked})", f"{before[kind][0] / asked:.1%}", f"{right / asked:.1%}")
        for kind, (right, asked) in after.items()
    ]
    return table(
        [
            ("", "before", "after"),
            ("training loss (first step, last step)", f"{losses[0]:.3f}", f"{losses[-1]:.3f}"),
            *shares,
            ("tokens per second (median)", "", f"{speeds[len(speeds) // 2]:,.0f}"),
            ("seconds, all told", "", f"{seconds:.0f}"),
            ("the model", f"{folder}/model", f"{folder}/run"),
        ]
    )


def main() -> None:
    """Run the demo in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conversations", type=int, default=24_000, help="to train on, once each")
    parser.add_argument("--questions", type=int, default=256, help="held out, asked before and after")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    folder: Path = args.folder
    start = time.monotonic()
    disable_progress_bar()

    run(sys.executable, HERE / "make_data.py", folder / "data",
        "--train", str(args.conversations), "--held-out", str(args.questions))  # fmt: skip
    run(sys.executable, HERE / "make_model.py", folder / "model", "--data", folder / "data" / "train.parquet")
    questions = pq.read_table(folder / "data" / "held_out.parquet").to_pylist()
    before = answers(folder / "model", questions)
    shutil.rmtree(folder / "run", ignore_errors=True)  # an earlier demo's
    run(*training_command(folder, args.batch_size))
    after = answers(folder / "run", questions)
    print("\n" + report(folder, before, after, time.monotonic() - start))


if __name__ == "__main__":
    main()
