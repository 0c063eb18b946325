"""What a checkpoint costs: how long training stands still, how long the files take, how much host memory it needs.

    python benchmarks/bench_checkpoint.py [processes=2] [gigabytes=1]

A random Qwen2 of the given size in float32 (weights alone; AdamW state is twice as much again), exported as bfloat16,
sharded by FSDP2 on gloo. Written to benchmarks/results/checkpoint.json.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from fsdpsft.checkpoint.export import Handoff
from fsdpsft.checkpoint.manager import CheckpointManager
from fsdpsft.checkpoint.state import TrainState
from fsdpsft.testing import run_distributed, save_tiny_model

GIB = 2**30
BLOCK = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
BLOCK_BYTES = 4 * (1024 * 1024 * 3 + 3 * 1024 * 4096)


def memory() -> int:
    """Private memory of this process in bytes: mapped files, which the kernel may drop, are left out."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss")
    )
    return (int(fields["RssAnon"].split()[0]) + int(fields["RssShmem"].split()[0])) * 1024


class Peak:
    """Largest ``memory()`` while the block runs, above what it was before; looked at every 2 ms."""

    def __enter__(self) -> Peak:
        self.before = self.highest = memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.highest = max(self.highest, memory())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def gib(self) -> float:
        """GiB above the start."""
        return round((self.highest - self.before) / GIB, 3)


def measure(folder: str) -> dict[str, Any]:
    """Save at once, then twice in the background (the first also allocates the buffers), then load."""
    root = Path(folder)
    model = AutoModelForCausalLM.from_pretrained(root / "source", dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    manager = CheckpointManager(root / "run", Handoff(root / "source", max_shard_bytes=200_000_000), keep=1)
    result: dict[str, Any] = {}
    for step, name in enumerate(["at_once", "background_first", "background"], 1):
        dist.barrier()
        with Peak() as peak:
            began = time.perf_counter()
            stall = manager.save(model, optimizer, TrainState(step), background=name != "at_once")
            manager.wait()
            whole = time.perf_counter() - began
        result[name] = {"stall_s": round(stall, 3), "whole_s": round(whole, 2), "extra_host_memory_gib": peak.gib}
    dist.barrier()
    began = time.perf_counter()
    with Peak() as peak:
        manager.load(root / "run/global_step_3", model, optimizer)
    result["load"] = {"whole_s": round(time.perf_counter() - began, 2), "extra_host_memory_gib": peak.gib}
    manager.close()
    held = sum(p.to_local().nbytes for p in model.parameters()) * 3
    return {**result, "rank_state_gib": round(held / GIB, 3)}


def main() -> None:
    """Build, measure in processes of their own, write the result."""
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    processes, gigabytes = int(options.get("processes", 2)), float(options.get("gigabytes", 1))
    embeddings = 4 * 32_000 * 1024
    layers = max(1, round((gigabytes * 1e9 - embeddings) / BLOCK_BYTES))
    folder = Path(tempfile.mkdtemp(dir=options.get("folder")))
    try:
        settings = {**BLOCK, "num_hidden_layers": layers}
        source = save_tiny_model(folder / "source", **settings)
        config = json.loads((source / "config.json").read_text())
        config["vocab_size"] = 32_000
        model = AutoModelForCausalLM.from_config(type(AutoModelForCausalLM.from_pretrained(source).config)(**config))
        model.bfloat16().save_pretrained(source)
        largest = max(p.nbytes for p in model.parameters())
        size = sum(p.numel() for p in model.parameters())
        del model
        ranks = run_distributed(measure, processes, str(folder))
    finally:
        shutil.rmtree(folder)
    result = {
        "processes": processes, "parameters": size, "float32_gib": round(size * 4 / GIB, 3),
        "largest_tensor_bfloat16_gib": round(largest / GIB, 3), "cpus": os.cpu_count(), "machine": platform.machine(),
        "torch": torch.__version__, "ranks": ranks,
    }  # fmt: skip
    target = Path(__file__).parent / "results" / f"checkpoint_{processes}_processes.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
