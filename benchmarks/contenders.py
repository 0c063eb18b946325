"""One trainer, one process: train on given rows and report losses, times and peak memory as a line of JSON.

    python -m benchmarks.contenders NAME FOLDER DTYPE      (started by bench_step.py)

Every contender starts from the same weights, takes the same AdamW, clip and constant rate, and, in its first two steps,
the same rows; those two losses are the gate. FOLDER holds ``model/``, ``rows.jsonl``, ``ordered.jsonl`` (the same rows
in the order in which fsdpsft takes them, for trainers that are told to go through a file) and ``work.json`` (batch:
rows of a step; rows_a_pass: of a forward pass, where the trainer counts in rows; steps: how many in all).
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

LR, BETAS, EPS, DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.01, 1.0
GATE_STEPS = 2


class Clock:
    """Wall and processor time at the end of each step, and the step's loss.

    Attributes:
        peak_bytes: the process's peak memory until the end of the last step. What comes after (we save the model, the
            others do not) is not counted.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.trained: list[int] = []

    def tick(self) -> None:
        """The end of a step, or the start of the first."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_reserved()

    def report(self) -> dict[str, Any]:
        """Seconds of each step, losses, and the peak memory."""
        return {
            "seconds": [b - a for a, b in pairwise(self.wall)],
            "cpu_seconds": [b - a for a, b in pairwise(self.cpu)],
            "losses": self.losses, "tokens": self.tokens, "trained": self.trained,
            "peak_bytes": self.peak_bytes,
        }  # fmt: skip


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows with labels in transformers' way: unshifted, -100 where not trained."""
    rows = []
    for line in (folder / "ordered.jsonl").read_text().splitlines():
        row = json.loads(line)
        labels = [token if m else -100 for token, m in zip(row["input_ids"], row["loss_mask"], strict=True)]
        rows.append({"input_ids": row["input_ids"], "labels": labels})
    return rows


# ------------------------------------------------------------------------------------------- trainers of transformers


class Watch(TrainerCallback):
    """Ticks the clock at each step's end."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock before the first step."""
        if not self.clock.wall:
            self.clock.tick()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is over."""
        self.clock.tick()


# A trainer is imported by the contender that uses it: what it brings counts as that contender's memory alone.


def common_arguments(folder: Path, dtype: str, work: dict[str, Any]) -> dict[str, Any]:
    """What all trainers of transformers' family are told."""
    return {
        "output_dir": str(folder / "out"), "max_steps": work["steps"], "learning_rate": LR, "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1], "adam_epsilon": EPS, "weight_decay": DECAY, "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant", "bf16": dtype == "bf16", "use_cpu": not torch.cuda.is_available(),
        "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "seed": 0,
        "per_device_train_batch_size": work["rows_a_pass"],
        "gradient_accumulation_steps": work["batch"] // work["rows_a_pass"],
        "train_sampling_strategy": "sequential", "optim": "adamw_torch_fused", "remove_unused_columns": False,
    }  # fmt: skip


def watch_losses(trainer: Any, clock: Clock, parts_of_step: int) -> None:
    """Count each step's real and trained tokens, and add up the losses of its micro-batches for the gate's steps."""
    compute, parts = trainer.compute_loss, []

    def watched(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs["attention_mask"] if inputs.get("attention_mask") is not None else inputs["input_ids"] >= 0
        parts.append([int(mask.sum()), int((inputs["labels"] != -100).sum()), 0.0])
        result = compute(model, inputs, *args, **kwargs)
        if len(clock.losses) < GATE_STEPS:
            parts[-1][2] = float((result[0] if isinstance(result, tuple) else result).detach())
        if len(parts) == parts_of_step:
            tokens, trained, loss = (sum(column) for column in zip(*parts, strict=True))
            clock.tokens.append(tokens)
            clock.trained.append(trained)
            if len(clock.losses) < GATE_STEPS:
                clock.losses.append(loss)
            parts.clear()
        return result

    trainer.compute_loss = watched


def load_causal_lm(folder: Path) -> nn.Module:
    """The model as transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)  # type: ignore[no-any-return]


def run_trl_grouped(folder: Path, dtype: str, work: dict[str, Any], clock: Clock) -> None:
    """TRL with batches of like lengths; it chooses other rows for a step, so the gate has a short run of its own."""
    gate = Clock()
    run_trl(folder, dtype, {**work, "steps": 1}, gate, rows=work["batch"])
    run_trl(folder, dtype, work, clock, train_sampling_strategy="group_by_length")
    clock.losses = gate.losses


def run_trl(folder: Path, dtype: str, work: dict[str, Any], clock: Clock, **changes: Any) -> None:
    """TRL's SFTTrainer with its defaults, changed by ``changes``."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    compact = changes.pop("compact", False)
    if compact:  # what TRL does on a GPU only: score the trained positions alone
        import trl.trainer.utils as trl_utils

        trl_utils._use_triton = lambda device: True  # asked there for the compaction alone; its tiles stay torch's
    rows = read_rows(folder)[: changes.pop("rows", None)]
    settings = {**common_arguments(folder, dtype, work), "remove_unused_columns": True, **changes}
    arguments = trl.SFTConfig(**settings)
    trainer = trl.SFTTrainer(
        load_causal_lm(folder), arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[Watch(clock)],
    )  # fmt: skip
    watch_losses(trainer, clock, trainer.args.gradient_accumulation_steps)
    trainer.train()


def run_trl_packed(folder: Path, dtype: str, work: dict[str, Any], clock: Clock) -> None:
    """TRL packing each step's rows with its own best-fit packing, one forward pass a step, no recomputation."""
    import trl
    from datasets import Dataset, concatenate_datasets
    from transformers import AutoTokenizer
    from trl.data_utils import pack_dataset

    rows, batch, parts = read_rows(folder), work["batch"], []
    length = max(1024, *(len(row["input_ids"]) for row in rows))
    for start in range(0, len(rows), batch):  # step by step, so that the gate's steps hold the same rows
        part = Dataset.from_list(rows[start : start + batch])
        parts.append(pack_dataset(part, seq_length=length, strategy="bfd"))
    sizes = {len(part) for part in parts}
    bins = max(sizes)
    arguments = trl.SFTConfig(**{
        **common_arguments(folder, dtype, work), "per_device_train_batch_size": bins, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False, "packing": False, "padding_free": True, "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    })  # fmt: skip
    trainer = trl.SFTTrainer(
        load_causal_lm(folder), arguments, train_dataset=concatenate_datasets(parts),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[Watch(clock)],
    )  # fmt: skip
    trainer.get_train_dataloader = lambda: _step_loader(trainer, parts)
    watch_losses(trainer, clock, 1)
    trainer.train()


def _step_loader(trainer: Any, parts: list[Any]) -> Any:
    """Batches that are the packed rows of one step each, however many."""
    bounds = [0]
    for part in parts:
        bounds.append(bounds[-1] + len(part))
    batches = [list(range(a, b)) for a, b in pairwise(bounds)]
    loader = torch.utils.data.DataLoader(trainer.train_dataset, batch_sampler=batches, collate_fn=trainer.data_collator)
    return trainer.accelerator.prepare(loader)


def run_flattening(folder: Path, dtype: str, work: dict[str, Any], clock: Clock) -> None:
    """transformers' Trainer with its flattening collator."""
    from datasets import Dataset
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    arguments = TrainingArguments(**common_arguments(folder, dtype, work))
    trainer = Trainer(
        load_causal_lm(folder), arguments, data_collator=DataCollatorWithFlattening(),
        train_dataset=Dataset.from_list(read_rows(folder)), callbacks=[Watch(clock)],
    )  # fmt: skip
    watch_losses(trainer, clock, arguments.gradient_accumulation_steps)
    trainer.train()


# ----------------------------------------------------------------------------------------------------- plain loop, ours


def padded_batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows padded at the right to the longest."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    batch["attention_mask"] = torch.tensor(
        [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    )
    return batch


def run_plain(folder: Path, dtype: str, work: dict[str, Any], clock: Clock) -> None:
    """The loop everybody writes: pad, full logits, cross-entropy, backward, clip, step."""
    model = load_causal_lm(folder).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    rows, batch = read_rows(folder), work["batch"]
    clock.tick()
    for step in range(work["steps"]):
        mine = rows[step * batch : (step + 1) * batch]
        trained = sum(label != -100 for row in mine for label in row["labels"][1:])
        total = torch.zeros(())
        for start in range(0, batch, work["rows_a_pass"]):
            inputs = padded_batch(mine[start : start + work["rows_a_pass"]])
            labels = inputs.pop("labels")
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / trained
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        clock.tokens.append(sum(len(row["input_ids"]) for row in mine))
        clock.trained.append(trained)
        if step < GATE_STEPS:
            clock.losses.append(float(total))
        clock.tick()


def our_config(folder: Path, dtype: str, work: dict[str, Any], changes: list[str]) -> Any:
    """Settings of our run."""
    from fsdpsft import load_config

    return load_config([
        f"data.train_files={folder / 'rows.jsonl'}", f"model.partial_pretrain={folder / 'model'}",
        f"data.train_batch_size={work['batch']}", f"data.cache_dir={folder / 'cache'}", "data.num_workers=1",
        f"trainer.default_local_dir={folder / 'ours'}", f"optim.lr={LR}", f"optim.betas={list(BETAS)}",
        f"optim.eps={EPS}", f"optim.weight_decay={DECAY}", f"optim.clip_grad={CLIP}", "optim.lr_scheduler=constant",
        "optim.warmup_steps_ratio=0", f"trainer.total_training_steps={work['steps']}", "trainer.resume_mode=disable",
        "trainer.logger=[]", "trainer.save_freq=-1", "trainer.seed=1", "trainer.async_save=false",
        f"model.dtype={'bfloat16' if dtype == 'bf16' else 'float32'}", *changes,
    ])  # fmt: skip


def run_ours(folder: Path, dtype: str, work: dict[str, Any], clock: Clock, *changes: str) -> None:
    """fsdpsft: ``train()`` as it is, with a clock around its step."""
    import importlib

    from fsdpsft.data.batches.loader import Step

    module: Any = importlib.import_module("fsdpsft.train")
    train_step = module.train_step

    def watched(model: Any, optimizer: Any, step: Step, *args: Any, **kwargs: Any) -> Any:
        if not clock.wall:
            clock.tick()
        stats = train_step(model, optimizer, step, *args, **kwargs)
        clock.tokens.append(step.num_tokens)
        clock.trained.append(step.num_trained_tokens)
        if len(clock.losses) < GATE_STEPS:
            clock.losses.append(float(stats.losses[0]))
        clock.tick()
        return stats

    module.train_step = watched
    module.train(our_config(folder, dtype, work, list(changes)))


NO_RECOMPUTE = "model.enable_gradient_checkpointing=none"
CONTENDERS: dict[str, Callable[..., None]] = {
    "TRL SFTTrainer, stock": run_trl,
    "TRL, grouped by length": run_trl_grouped,
    "TRL, packed, no recomputation": run_trl_packed,
    "TRL, trained positions only, no recomputation": lambda *a: run_trl(*a, compact=True, gradient_checkpointing=False),
    "Trainer + flattening": run_flattening,
    "plain loop, padded": run_plain,
    "fsdpsft, defaults": run_ours,
    "fsdpsft, no recomputation": lambda *a: run_ours(*a, NO_RECOMPUTE),
    "fsdpsft, full recomputation, head chunks of 128": lambda *a: run_ours(
        *a, "model.enable_gradient_checkpointing=full", "model.head_chunk_tokens=128"
    ),
    "fsdpsft, no recomputation, padded": lambda folder, dtype, work, clock: run_ours(
        folder,
        dtype,
        work,
        clock,
        NO_RECOMPUTE,
        "use_remove_padding=false",
        f"data.micro_batch_size_per_gpu={work['rows_a_pass']}",
    ),
}


def main() -> None:
    """Run one contender and print its report."""
    name, folder, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    logging.disable(logging.WARNING)
    clock, work = Clock(), json.loads((folder / "work.json").read_text())
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    CONTENDERS[name](folder, dtype, work, clock)
    print("RESULT " + json.dumps(clock.report()))


if __name__ == "__main__":
    main()
