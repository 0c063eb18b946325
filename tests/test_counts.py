"""What a training step does, counted: waits for the device, floating-point operations, head rows, collectives.

These numbers do not depend on the machine, so that a step that grew slower fails here; no time is measured.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fsdpsft import load_config, loss
from fsdpsft.config.load import Config
from fsdpsft.data.batches.loader import Step
from fsdpsft.run import Run, open_run
from fsdpsft.testing import run_distributed, save_tiny_model
from fsdpsft.train import train_step

LAYERS, D, WIDTH, HEADS, KV_HEADS, HEAD_SIZE = 4, 128, 384, 4, 2, 32
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "item"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, dice = tmp_path_factory.mktemp("counts"), np.random.default_rng(0)
    lines = []
    for _ in range(16):
        length = int(dice.integers(8, 60))
        ids = dice.integers(3, 250, length).tolist()
        lines.append(json.dumps({"input_ids": ids, "loss_mask": [0] * (length - length // 3) + [1] * (length // 3)}))
    (path / "rows.jsonl").write_text("\n".join(lines))
    save_tiny_model(
        path / "model", hidden_size=D, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_SIZE,
    )  # fmt: skip
    return path


def settings(folder: Path, *changes: str) -> Config:
    return load_config([
        f"data.train_files={folder / 'rows.jsonl'}", f"model.partial_pretrain={folder / 'model'}",
        f"data.cache_dir={folder / 'cache'}", f"trainer.default_local_dir={folder / 'out'}",
        "data.train_batch_size=16", "data.max_length=64", "data.max_token_len_per_gpu=256", "trainer.logger=[]",
        "trainer.resume_mode=disable", "model.enable_gradient_checkpointing=none", *changes,
    ])  # fmt: skip


class OperatorCount(TorchDispatchMode):
    """Counts operators by name; indexing by booleans, which makes a device tell how many there are, as ``nonzero``."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "index" and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:])
        ):
            name = "nonzero"
        self.count[name] += 1
        return func(*args, **(kwargs or {}))


def one_step(run: Run, step: Step) -> None:
    train_step(run.model, run.optimizer, step, 1.0, run.sync_every_micro_batch)


@pytest.mark.parametrize("changes", [[], ["model.enable_gradient_checkpointing=full"], ["model.lora_rank=4"]], ids=str)
def test_no_step_waits_for_the_device(folder: Path, changes: list[str]) -> None:
    with open_run(settings(folder, *changes)) as run:
        step = run.loader.step(0)
        one_step(run, step)
        with OperatorCount() as operators:
            one_step(run, step)
    assert operators.count["mm"] > 0
    assert {name: operators.count[name] for name in WAITS if operators.count[name]} == {}


def test_a_wait_would_be_counted() -> None:
    with OperatorCount() as operators:
        x = torch.arange(4.0)
        x[x > 1]
        x.sum().item()
    assert operators.count["nonzero"] == 1
    assert operators.count["_local_scalar_dense"] == 1


def least_flops(step: Step, vocabulary: int) -> int:
    """Forward and backward of what the batch asks of the model.

    Two operations a multiply-add; backward is twice the forward. The head sees trained positions alone; torch's
    counter does not know the in-place sum of its weight's gradient, a third of the head's products. Attention counts
    whole squares of each document, as torch's counter does (causal kernels do about half of that), four products of the
    square forward and ten backward, since kernels make the scores anew.
    """
    queries, keys = D * HEADS * HEAD_SIZE, D * 2 * KV_HEADS * HEAD_SIZE
    block = keys + 2 * queries + 3 * D * WIDTH  # with queries, attention output, gate, up and down
    total = 0
    for batch in step.micro_batches:
        total += 6 * LAYERS * sum(batch.seqlens) * block + 4 * len(batch.trained_index) * D * vocabulary
        total += 14 * LAYERS * sum(n * n for n in batch.seqlens) * HEADS * HEAD_SIZE
    return total


def _squares(products: int, query: Any, key: Any, value: Any) -> int:
    """Operations of ``products`` matrix products as large as the scores of [N, H, L, E] queries and keys."""
    (documents, heads, queries, size), keys = query, key[2]
    return 2 * products * int(documents * heads * queries * keys * size)


ATTENTION = {  # torch's counter knows the CUDA kernels alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: _squares(2, *shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: _squares(5, *shapes[1:4]),
}


def test_floating_point_operations(folder: Path) -> None:
    with open_run(settings(folder)) as run:
        step = run.loader.step(0)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            one_step(run, step)
        executed = counter.get_total_flops()
        assert "attention" in str(counter.get_flop_counts()["Global"])
        least = least_flops(step, run.model.module.head.weight.shape[0])
    assert executed == least


def test_head_rows_are_the_trained_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    whole = loss._product

    def watched(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(hidden.shape[0])
        return whole(hidden, *args)

    monkeypatch.setattr(loss, "_product", watched)
    with open_run(settings(folder)) as run:
        step = run.loader.step(0)
        one_step(run, step)
    assert sum(rows) == step.num_trained_tokens
    assert step.num_trained_tokens == sum(len(json.loads(line)["input_ids"]) // 3 for line in _lines(folder))


def _lines(folder: Path) -> list[str]:
    return (folder / "rows.jsonl").read_text().splitlines()


def count_collectives(folder: Path) -> dict[str, dict[str, int]]:
    found = {}
    for name, changes in {"zero-3": [], "zero-2, summed once": ZERO2}.items():
        with open_run(settings(folder, *changes)) as run:
            step = run.loader.step(0)
            one_step(run, step)
            with OperatorCount() as operators:
                one_step(run, step)
            found[name] = {"micro_batches": len(step.micro_batches), **operators.count}
    return found


ZERO2 = ["model.fsdp_config.reshard_after_forward=false", "model.fsdp_config.gradient_sync=last"]
GATHER, SCATTER, REDUCE = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"


def test_collectives_of_a_step(folder: Path) -> None:
    """Per micro-batch each block once a forward and once a backward pass; the last one and the first one save some.

    The root is gathered once a step, the last block once for both passes, and the first one's weights stay from one
    micro-batch's backward pass to the next one's forward pass.
    """
    (counts, other) = run_distributed(count_collectives, 2, folder)
    assert counts == other
    zero3, zero2 = counts["zero-3"], counts["zero-2, summed once"]
    micro_batches = zero3["micro_batches"]
    assert micro_batches == zero2["micro_batches"] > 1
    assert zero3[GATHER] == 1 + micro_batches * (LAYERS + LAYERS - 1) - (micro_batches - 1)
    assert zero3[SCATTER] == micro_batches * (LAYERS + 1)
    assert zero2[GATHER] == zero2[SCATTER] == LAYERS + 1
    assert zero3[REDUCE] == zero2[REDUCE] == 1  # the losses; the norm is added up inside DTensor, out of sight
