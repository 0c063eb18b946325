"""What the trainer costs beyond forward, backward, clip and optimiser, which a bare loop on the same model does.

    python -m benchmarks.bench_overhead

In one process, step by step in turn: the bare loop on batches that lie ready, and the trainer's own step with the
loader's thread, the recorder and the files it writes. Processor seconds, medians.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, SHAPE_25M, environment, hardware_name, save_model, tokenized_rows, write_json
from benchmarks.contenders import CLIP, NO_RECOMPUTE, our_config
from fsdpsft.data.batches.loader import Step
from fsdpsft.optim import set_lr
from fsdpsft.run import Run, open_run
from fsdpsft.train import train_step

STEPS, BATCH = 12, 16


def bare_step(run: Run, step: Step) -> None:
    """What cannot be left out."""
    with run.model.computing():
        for batch in step.micro_batches:
            loss = run.model(batch, len(step.trained_by_source))[0] / step.loss_denominator
            loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.module.parameters(), CLIP)
    run.optimizer.step()
    run.optimizer.zero_grad()


def measure(folder: Path) -> dict[str, Any]:
    """Alternate the two, in a new order each time, and compare medians."""
    work = {"batch": BATCH, "steps": STEPS}
    seconds: dict[str, list[float]] = {"bare": [], "trainer": []}
    with open_run(our_config(folder, "fp32", work, [NO_RECOMPUTE])) as run:
        steps = run.loader.iterate(0, STEPS)
        for _ in range(STEPS):
            start = time.process_time()
            step = next(steps)
            set_lr(run.optimizer, run.lr(step))
            run.recorder.record(step, train_step(run.model, run.optimizer, step, CLIP), run.lr(step))
            run.requests.poll()
            middle = time.process_time()
            bare_step(run, step)
            seconds["trainer"].append(middle - start)
            seconds["bare"].append(time.process_time() - middle)
    ratios = [a / b for a, b in zip(seconds["trainer"], seconds["bare"], strict=True)][2:]
    return {"overhead": statistics.median(ratios) - 1, "ratios": sorted(ratios), "cpu_seconds": seconds}


def main() -> None:
    """Measure on the 25M model and write JSON."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows, tokenizer, source = tokenized_rows(STEPS * BATCH, 32768)
        save_model(folder / "model", 32768, SHAPE_25M, tokenizer)
        lines = (json.dumps({"input_ids": ids, "loss_mask": mask}) for ids, mask in rows)
        (folder / "rows.jsonl").write_text("\n".join(lines))
        result = {"what": "trainer overhead", "environment": environment(), "data": source, **measure(folder)}
    print(f"the trainer takes {100 * result['overhead']:+.1f} % more than the bare loop")
    write_json(RESULTS / f"{hardware_name()}-overhead.json", result)


if __name__ == "__main__":
    main()
