"""Memory and bytes that each of two processes needs to load a model of one gigabyte into its FSDP shards.

    python benchmarks/bench_load.py [--gigabytes 1.0] [--output benchmarks/results/load.json]

A random model is written in bfloat16 in shards of 250 MB. Two gloo processes then load it, once with bfloat16 and once
with float32 parameters, by ``load_weights`` and, for comparison, by ``from_pretrained`` in every process followed by
sharding. Per process it reports, as parts of the model's size in memory:

- ``peak``: the largest resident set (``VmHWM``, which counts anonymous memory and pages of mapped files alike, reset
  just before) less the resident set before loading;
- ``kept``: growth of anonymous memory once loading is over (the shards);
- ``read``: bytes that passed through ``read`` calls (``rchar`` of ``/proc/self/io``), as parts of the files' size. What
  ``from_pretrained`` reads goes through mapped files, which that counter does not see.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fsdpsft.model.load import build_meta_model, load_model_config, load_weights
from fsdpsft.testing import run_distributed

WIDTH = 1024
BLOCK = 4 * WIDTH * WIDTH + 3 * WIDTH * 4 * WIDTH + 2 * WIDTH  # parameters of one decoder block


def write_model(folder: Path, gigabytes: float) -> int:
    """Save a random Llama of about that many bytes in bfloat16 and return its number of parameters."""
    config = LlamaConfig(
        vocab_size=16384, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=8, num_key_value_heads=8,
        num_hidden_layers=max(round((gigabytes * 1e9 / 2 - 2 * 16384 * WIDTH) / BLOCK), 1), tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="250MB")
    return sum(parameter.numel() for parameter in model.parameters())


def counters() -> dict[str, int]:
    """This process's resident set, its peak, and bytes read, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    sizes = {
        name: int(status[key].split()[0]) * 1024
        for name, key in (("now", "VmRSS"), ("anon", "RssAnon"), ("peak", "VmHWM"))
    }
    return {**sizes, "read": int(io["rchar"])}


def shard(model: PreTrainedModel) -> None:
    """FSDP2 over all processes, per block and at the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def load(folder: str, method: str, dtype: str) -> dict[str, float]:
    """Load in this process and return what it took (bytes and seconds)."""
    path = Path(folder)
    shard(build_meta_model(LlamaConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64)))  # imports, groups
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, begin = counters(), time.perf_counter()
    if method == "load_weights":
        model = build_meta_model(load_model_config(path), dtype=getattr(torch, dtype))
        shard(model)
        load_weights(model, path, device="cpu")
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        shard(model)
    seconds, after = time.perf_counter() - begin, counters()
    gc.collect()
    return {
        "peak": after["peak"] - before["now"], "kept": counters()["anon"] - before["anon"],
        "read": after["read"] - before["read"], "seconds": seconds, "resident_before": before["now"],
    }  # fmt: skip


def measure(folder: Path, parameters: int) -> list[dict[str, Any]]:
    """All methods and dtypes; sizes become parts of the model's."""
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rows = []
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        for method in ("load_weights", "from_pretrained"):
            results = run_distributed(load, 2, str(folder), method, dtype)
            worst = {name: max(result[name] for result in results) for name in results[0]}
            rows.append(
                {
                    "method": method,
                    "dtype": dtype,
                    "model_bytes_in_memory": parameters * width,
                    "file_bytes": files,
                    "peak_of_model": round(worst["peak"] / (parameters * width), 3),
                    "kept_of_model": round(worst["kept"] / (parameters * width), 3),
                    "read_of_files": round(worst["read"] / files, 3) if method == "load_weights" else None,
                    "seconds": round(worst["seconds"], 2),
                    "resident_before_bytes": int(worst["resident_before"]),
                }
            )
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
    return rows


def main() -> None:
    """Write the model, measure, store the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the model's files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "load.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_model(Path(folder), arguments.gigabytes)
        rows = measure(Path(folder), parameters)
    report = {
        "processes": 2, "parameters": parameters, "rows": rows, "torch": torch.__version__,
        "transformers": transformers.__version__, "cores": os.cpu_count(), "machine": platform.machine(),
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
