"""Batches that a careless trainer gets wrong: very uneven, with idle ranks, with one trained token, with none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdpsft import load_config
from fsdpsft import train as run_training
from fsdpsft.data.batches.packing import Order
from fsdpsft.errors import DataError
from fsdpsft.lr_schedule import LRSchedule
from fsdpsft.recorder import NonFiniteError
from fsdpsft.testing import run_distributed, save_tiny_model
from tests.parity.reference import Row, train_reference

BATCH, STEPS, SEED, LR, EPS = 8, 4, 5, 2e-3, 1e-5
ROWS = BATCH * (STEPS - 1) + 1
ORDER = Order(counts=(ROWS,), batch_size=BATCH, seed=SEED)
POISON = 251  # a token of one row of the second batch

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "one-padded": (1, ["use_remove_padding=false", "data.micro_batch_size_per_gpu=3"]),
    "fsdp2": (2, []),
    "sp2": (2, ["ulysses_sequence_parallel_size=2"]),
    "fsdp4": (4, ["model.enable_gradient_checkpointing=full"]),
    "sp4": (4, ["ulysses_sequence_parallel_size=4", "data.max_token_len_per_gpu=80"]),
    "fsdp2-sp2": (4, ["ulysses_sequence_parallel_size=2"]),
}


def nasty_rows() -> list[Row]:
    """A giant and seven tiny documents; long ones with one trained token each; usual ones; one with one token alone."""
    generator = np.random.default_rng(1)
    rows: list[Row] = [([], [])] * ROWS

    def put(place: int, length: int, trained: Sequence[int]) -> None:
        weights = [0.0] * length
        for position in trained:
            weights[position] = 1.0
        rows[place] = generator.integers(3, 250, length).tolist(), weights

    giant, sparse, usual, last = (ORDER.batch(step).tolist() for step in range(STEPS))
    assert len(last) == 1
    for number, place in enumerate(giant):
        put(place, 300 if number == 4 else 2 + number % 3, range(1, 300) if number == 4 else [1])
    for number, place in enumerate(sparse):
        put(place, 20 + 3 * number, [1 + 2 * number])
    for number, place in enumerate(usual):
        put(place, 10 + number, range(5, 10 + number, 2))
    put(last[0], 9, [8])
    return rows


def write(folder: Path, rows: list[Row]) -> None:
    lines = [json.dumps({"input_ids": ids, "loss_mask": [int(w) for w in weights]}) for ids, weights in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nasty")
    write(path, nasty_rows())
    save_tiny_model(path / "model")
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    rows, schedule = nasty_rows(), LRSchedule("linear", STEPS)
    batches = [[rows[i] for i in ORDER.batch(step).tolist()] for step in range(STEPS)]
    return train_reference(folder / "model", batches, lambda step: LR * schedule(step), eps=EPS, clip=0.5)


def run(folder: Path, name: str, *overrides: str) -> None:
    run_training(load_config([
        f"data.train_files={folder / 'rows.jsonl'}", f"data.cache_dir={folder / 'cache'}", "data.max_length=320",
        f"model.partial_pretrain={folder / 'model'}", f"data.train_batch_size={BATCH}", f"trainer.seed={SEED}",
        f"optim.lr={LR}", f"optim.eps={EPS}", "optim.lr_scheduler=linear", "optim.warmup_steps=0",
        "optim.clip_grad=0.5",
        "data.micro_batch_size_per_gpu=1", "trainer.save_freq=1", "trainer.save_contents=[model]",
        "trainer.async_save=false", "trainer.resume_mode=disable", f"trainer.default_local_dir={folder / name}",
        "model.enable_gradient_checkpointing=none", *overrides,
    ]))  # fmt: skip


def run_layouts(folder: Path, processes: int) -> None:
    for name, (needed, overrides) in LAYOUTS.items():
        if needed == processes:
            run(folder, name, *overrides)


@pytest.fixture(scope="module", params=[1, 2, 4])
def finished(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, int]:
    if request.param == 1:
        run_layouts(folder, 1)
    else:
        run_distributed(run_layouts, request.param, folder, request.param)
    return folder, request.param


def test_equal_to_the_reference(finished: tuple[Path, int], expected: dict[str, Any]) -> None:
    folder, processes = finished
    for name in (name for name, (needed, _) in LAYOUTS.items() if needed == processes):
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        np.testing.assert_allclose([x["train/loss"] for x in lines], expected["losses"], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose([x["train/grad_norm"] for x in lines], expected["norms"], rtol=1e-5, err_msg=name)
        for key, value in load_file(folder / name / "model.safetensors").items():
            change = (value.double() - expected["weights"][key]).norm() / expected["weights"][key].norm()
            assert change < 1e-5, f"{name}: {key} is off by {change:.1e}"


def test_a_row_with_nothing_to_learn_is_refused_by_name(tmp_path: Path) -> None:
    rows = nasty_rows()
    place = ORDER.batch(3).tolist()[0]
    rows[place] = rows[place][0], [0.0] * 9
    write(tmp_path, rows)
    save_tiny_model(tmp_path / "model")
    with pytest.raises(DataError, match=rf"rows.jsonl, row {place} .*no token after the first is trained"):
        run(tmp_path, "out")


def poison(folder: Path) -> list[int]:
    """A model whose embedding of one token is infinite, and that token in one row of the second batch."""
    rows = nasty_rows()
    second = ORDER.batch(1).tolist()
    rows[second[3]][0][0] = POISON
    weights = [1.0] * len(rows[second[3]][0])
    rows[second[3]] = rows[second[3]][0], weights
    write(folder, rows)
    save_tiny_model(folder / "model", tie_word_embeddings=False)
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][POISON] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    return second


def stop_at_poison(folder: Path, name: str) -> str:
    with pytest.raises(NonFiniteError) as stop:
        run(folder, name, "optim.clip_grad=null")
    return str(stop.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, processes: int) -> None:
    second = poison(tmp_path)
    if processes == 1:
        messages = [stop_at_poison(tmp_path, "out")]
    else:
        messages = run_distributed(stop_at_poison, processes, tmp_path, "out")
    for message in messages:
        assert message.startswith("step 2: the loss is nan")
        assert all(f"row {row}" in message or f"line {row + 1}" in message for row in second)
    assert (tmp_path / "out" / "global_step_1").is_dir()
    assert not (tmp_path / "out" / "global_step_2").exists()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
