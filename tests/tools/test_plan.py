"""The plan's numbers are those of the run: steps, tokens, balance, learning rate, parameters, FLOPs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from fsdpsft.checkpoint.pieces import pinned_bytes
from fsdpsft.config.load import Config, load_config
from fsdpsft.data.batches.packing import assign_in_order
from fsdpsft.distributed.mesh import Mesh
from fsdpsft.errors import ConfigError
from fsdpsft.prepare import make_loader, prepare_data
from fsdpsft.testing import save_tiny_model
from fsdpsft.tools.charts import sparkline
from fsdpsft.tools.footprint import estimate
from fsdpsft.tools.plan import Options, main, plan
from fsdpsft.tools.run_plan import plan_run, virtual_mesh

ROWS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    save_tiny_model(folder / "model")
    rng = np.random.default_rng(0)
    rows = [
        {"messages": [{"role": "user", "content": "q " * int(n)}, {"role": "assistant", "content": "a " * int(n // 2)}]}
        for n in rng.integers(2, 120, ROWS)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def arguments(folder: Path) -> Callable[..., list[str]]:
    places = [f"data.train_files={folder / 'chats.jsonl'}", f"model.partial_pretrain={folder / 'model'}"]
    places += [f"data.cache_dir={folder / 'cache'}", "data.train_batch_size=16", "data.num_workers=1"]
    return lambda *overrides: [*places, *overrides]


@pytest.fixture
def config(arguments: Callable[..., list[str]]) -> Callable[..., Config]:
    return lambda *overrides: load_config(arguments(*overrides))


def test_steps_and_sums_are_those_of_the_batches(config: Callable[..., Config]) -> None:
    settings = config("trainer.total_epochs=3")
    data = prepare_data(settings)
    found = plan_run(settings, data)
    assert (found.steps_per_epoch, found.total_steps, found.epochs) == (4, 12, 3)  # 16, 16, 16 and 2 samples
    lengths = data.train.lengths.astype(np.int64)
    assert found.tokens == 3 * lengths.sum()
    assert found.trained_tokens == 3 * data.train.trained.sum()
    assert found.squared_lengths == 3 * (lengths**2).sum()
    loader = make_loader(settings, data.train, data, virtual_mesh(1, 1))
    steps = [loader.step(k) for k in range(4)]
    assert found.trained_least == min(step.num_trained_tokens for step in steps)
    partial = plan_run(config("trainer.total_training_steps=2"), data)
    assert (partial.total_steps, partial.tokens) == (2, sum(step.num_tokens for step in steps[:2]))


def test_the_balance_is_what_the_ranks_would_get(config: Callable[..., Config]) -> None:
    settings = config("data.max_length=512", "data.max_token_len_per_gpu=600", "data.drop_last=true")
    data = prepare_data(settings)
    found = next(b for b in plan_run(settings, data, [2]).balances if b.gpus == 2)
    tokens, passes, in_order = [], [], []
    for k in range(3):
        loaders = [make_loader(settings, data.train, data, _rank(rank)) for rank in range(2)]
        steps = [loader.step(k) for loader in loaders]
        sums = [sum(batch.cu_seqlens[-1].item() for batch in step.micro_batches) for step in steps]
        tokens.append(max(sums) / np.mean(sums))
        passes.append(len(steps[0].micro_batches))
        lengths = data.train.lengths[steps[0].rows]
        sums = [lengths[ids].sum() for (ids,) in assign_in_order(16, 2)]
        in_order.append(max(sums) / np.mean(sums))
    assert found.tokens == pytest.approx(np.mean(tokens))
    assert found.micro_batches == pytest.approx(np.mean(passes))
    assert found.in_order_tokens == pytest.approx(np.mean(in_order))
    assert found.tokens < found.in_order_tokens
    assert 0 < found.fill <= 1 <= found.lockstep
    assert found.idle == 0


def _rank(rank: int) -> Mesh:
    return replace(virtual_mesh(2, 1), rank=rank, dp_rank=rank)


def test_virtual_ranks_and_ulysses(config: Callable[..., Config]) -> None:
    settings = config("ulysses_sequence_parallel_size=4")
    data = prepare_data(settings)
    balances = plan_run(settings, data, [16]).balances
    assert [(b.gpus, b.dp_size) for b in balances] == [(8, 2), (16, 4), (64, 16)]
    assert balances[-1].idle == pytest.approx(4 * np.mean([0, 0, 0, 14]))  # the last batch has 2 samples for 16
    with pytest.raises(ConfigError, match="does not divide the 6 processes"):
        plan_run(settings, data, [6])


def test_the_curve_is_the_schedule(config: Callable[..., Config]) -> None:
    settings = config("trainer.total_training_steps=1000", "optim.lr=0.5", "optim.lr_scheduler=linear",
                      "optim.warmup_steps=10")  # fmt: skip
    found = plan_run(settings, prepare_data(settings))
    curve = dict(found.lr)
    assert len(curve) == 200 and curve[0] == pytest.approx(0.05)
    assert curve[999] == pytest.approx(0.5 * (1 - 989 / 990))
    assert (found.schedule, found.warmup_steps) == ("linear", 10)


def test_the_footprint_counts_the_model(config: Callable[..., Config], folder: Path) -> None:
    settings = config()
    data = prepare_data(settings)
    run = plan_run(settings, data)
    found = estimate(settings, data, run, gpus=8, gpu="H100", mfu=0.5)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert found.parameters == found.trained_parameters == model.num_parameters()
    assert found.memory["weights"] == 4 * model.num_parameters() / 8
    assert found.memory["AdamW's moments"] == 2 * found.memory["gradients"] == 8 * model.num_parameters() / 8
    products = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    body = sum(p.numel() for p in products)
    head = model.lm_head.weight.numel()
    attention = 6 * 2 * 4 * 16 * run.squared_lengths  # layers, heads, head size
    assert found.flops == 6 * body * run.tokens + 6 * head * run.trained_tokens + attention
    assert found.seconds == found.flops / (8 * 989e12 * 0.5)
    lora = config("model.lora_rank=4")
    adapted = estimate(lora, data, run, gpus=8, gpu="H100", mfu=0.5)
    assert 0 < adapted.trained_parameters < found.parameters < adapted.parameters
    assert adapted.memory["AdamW's moments"] == 8 * adapted.trained_parameters / 8
    kept = [
        estimate(config(f"model.enable_gradient_checkpointing={mode}"), data, run, gpus=1, gpu="H100", mfu=1).memory
        for mode in ("none", "selective", "full")
    ]
    assert "gathered weights" not in kept[0]
    offloaded = estimate(config("model.fsdp_config.offload_params=true"), data, run, gpus=8, gpu="H100", mfu=1)
    assert "weights" not in offloaded.memory
    shares = [-(-len(p) // 8) * p[0].numel() * 4 for p in model.parameters()]
    rounded = sum(1 << (size - 1).bit_length() for size in shares)  # as torch takes page-locked memory
    assert offloaded.host["weights"] == offloaded.host["gradients"] == rounded > 4 * model.num_parameters() / 8
    assert offloaded.host["AdamW's moments"] == 8 * model.num_parameters() / 8
    staged = pinned_bytes([size for size in shares for _ in range(3)])  # weights and two moments
    assert found.host == {"copies for saving in the background": staged}
    model_alone = estimate(config("trainer.save_contents=[model]"), data, run, gpus=8, gpu="H100", mfu=1).host
    assert model_alone["copies for saving in the background"] == pinned_bytes(shares)
    assert estimate(config("trainer.async_save=false"), data, run, gpus=8, gpu="H100", mfu=1).host == {}


def test_the_command_prints_it_all(arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("plan.world_size=4", "+plan.gpu=H200", "plan.mfu=0.3")) == 0
    out = capsys.readouterr().out
    for text in (
        "4 steps of 16 samples, 4 an epoch (1 epoch of 50 samples)",
        "On 4 x H200",
        "Learning rate",
        "Lengths",
    ):
        assert text in out
    run, footprint = plan(load_config(arguments()), Options())
    assert (footprint.gpus, run.balances[0].gpus) == (8, 8)


def test_a_line_of_block_characters() -> None:
    assert sparkline([0, 1, 50, 100, 800]) == " ▁▁▁█"
    assert sparkline([0.0, 0.5, 1.0]) == " ▄█"
    assert sparkline([0, 0]) == "  "


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("plan.world=4", "unknown key plan.world; did you mean plan.world_size?"),
        ("plan.world_size=0", "plan.world_size=0 must be a whole number of at least 1"),
        ("plan.gpu=Z80", "plan.gpu=Z80 is not one of B200"),
        ("plan.mfu=2", "plan.mfu=2 must be above 0 and at most 1"),
        ("plan.mfu=fast", "plan.mfu=fast is not a number"),
        ("data.train_batch_size=99", "data.train_batch_size=99 is more than the 50 samples"),
    ],
)
def test_wrong_settings_are_named(
    arguments: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    assert main(arguments(argument)) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
