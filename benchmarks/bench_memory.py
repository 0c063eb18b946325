"""Peak memory and time of one step (forward, loss, backward) for each way of saving activations.

    python benchmarks/bench_memory.py --out benchmarks/results/memory.json

Runs on CPU. Peak memory is counted tensor by tensor, beyond weights and gradients, in a step whose gradients exist
already, as from the second micro-batch on. Host copies of offloaded inputs, which on a GPU would lie elsewhere, are
named apart; a GPU holds up to two of them on their way. Times are processor seconds, medians over rounds in which the
variants alternate. Two shapes: one shallow with a wide MLP, one deep, as what is kept of each block counts there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fsdpsft.batch import PackedBatch, Sample, pack
from fsdpsft.distributed import activation_checkpoint
from fsdpsft.distributed.mesh import keep_freed_memory
from fsdpsft.distributed.ulysses import shard
from fsdpsft.model.attention import IMPLEMENTATION, AttentionContext
from fsdpsft.model.attention_backends import attend_sdpa
from fsdpsft.model.sft_model import ModelInput, SFTModel, decoder_blocks
from fsdpsft.testing import PeakMemory, tiny_model

MIB = 1 << 20
SHAPES: dict[str, dict[str, int]] = {
    "6 blocks": {
        "vocab_size": 16384, "hidden_size": 192, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    },
    "24 blocks": {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 24,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    },
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "mode": "none", "offload": False, "mlp_tiles": 1, "head_chunk_tokens": 128,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"mode": "selective"},
    "full": {"mode": "full"},
    "full + offload": {"mode": "full", "offload": True},
    "none + 8 MLP tiles": {"mlp_tiles": 8},
    "selective + 8 MLP tiles": {"mode": "selective", "mlp_tiles": 8},
    "full + 8 MLP tiles": {"mode": "full", "mlp_tiles": 8},
    "full + 8 MLP tiles + offload": {"mode": "full", "mlp_tiles": 8, "offload": True},
    "full + 8 MLP tiles, head chunks of 32": {"mode": "full", "mlp_tiles": 8, "head_chunk_tokens": 32},
    "full + 8 MLP tiles, head in one piece": {"mode": "full", "mlp_tiles": 8, "head_chunk_tokens": 1 << 30},
}


def make_batch(tokens: int, vocabulary: int) -> PackedBatch:
    """Four documents of unequal length, the last 35 % of each trained."""
    samples = []
    for row, share in enumerate((0.4, 0.3, 0.2, 0.1)):
        length = int(tokens * share)
        ids = np.random.default_rng(row).integers(3, vocabulary, length).astype(np.uint32)
        weights = (np.arange(length) >= 0.65 * length).astype(np.float32)
        samples.append(Sample(ids, weights, row))
    return pack(samples, pad_token_id=0, pad_to_multiple=64)


class Variant:
    """A model with one way of saving memory, and its measurements."""

    def __init__(self, settings: dict[str, Any], batch: PackedBatch, shape: dict[str, int]) -> None:
        """Build the model; the same weights for every variant."""
        chosen = {**DEFAULTS, **settings}
        causal_lm = tiny_model("qwen2", **shape)
        causal_lm.set_attn_implementation(IMPLEMENTATION)
        self.model = SFTModel(causal_lm, chosen.pop("head_chunk_tokens")).train()
        activation_checkpoint.apply(decoder_blocks(causal_lm), activation_checkpoint.Recomputation(**chosen))
        local = shard(batch, 0, 1)
        context = AttentionContext.of(batch, attend_sdpa)
        self.inputs = ModelInput(
            local.input_ids, local.position_ids, context, local.trained_index, local.targets, local.loss_weights
        )
        self.seconds: list[float] = []

    def step(self) -> Tensor:
        """Forward, loss and backward, gradients added to those there are; returns the loss sum."""
        loss: Tensor = self.model(self.inputs)[0]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def timed(self) -> None:
        """One step, timed in processor seconds, which a busy machine does not stretch."""
        start = time.process_time()
        self.step()
        self.seconds.append(time.process_time() - start)

    def measured(self) -> dict[str, Any]:
        """Peak memory of a step beyond weights and gradients, in MiB, the loss, and the median time."""
        moved: list[int] = []
        send_out = activation_checkpoint.HostOffload._pack

        def uncounted(offload: activation_checkpoint.HostOffload, tensor: Tensor) -> Any:
            moved.append(tensor.numel() * tensor.element_size())
            with _disable_current_modes():
                return send_out(offload, tensor)

        with patch.object(activation_checkpoint.HostOffload, "_pack", uncounted), PeakMemory() as memory:
            loss = self.step()
        return {
            "peak_beyond_gradients_mib": round(memory.peak / MIB, 1),
            "copies_in_host_memory_mib": round(sum(moved) / MIB, 1),
            "cpu_seconds": round(statistics.median(self.seconds), 3),
            "loss_sum": loss.item(),
        }


def measure(shape: dict[str, int], tokens: int, rounds: int) -> dict[str, Any]:
    """Every variant of one shape."""
    batch = make_batch(tokens, shape["vocab_size"])
    variants = {name: Variant(settings, batch, shape) for name, settings in VARIANTS.items()}
    for _ in range(rounds):
        for variant in variants.values():
            variant.timed()
    return {
        "model": {"family": "qwen2", "dtype": "float32", **shape}, "tokens": int(batch.input_ids.numel()),
        "trained_tokens": int(batch.trained_index.numel()), "documents": list(batch.seqlens),
        "variants": {name: variant.measured() for name, variant in variants.items()},
    }  # fmt: skip


def main() -> None:
    """Measure every variant of every shape and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    arguments = parser.parse_args()
    keep_freed_memory()  # as training does: without it, time goes into pages mapped anew
    shapes = {name: measure(shape, arguments.tokens, arguments.rounds) for name, shape in SHAPES.items()}
    result = {
        "what": __doc__.split("\n")[0] if __doc__ else "", "rounds": arguments.rounds, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "shapes": shapes,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for shape, found in shapes.items():
        print(shape)
        for name, row in found["variants"].items():
            peak, seconds = row["peak_beyond_gradients_mib"], row["cpu_seconds"]
            print(f"  {name:42} {peak:8.1f} MiB {seconds:7.3f} s  loss {row['loss_sum']:.4f}")


if __name__ == "__main__":
    main()
