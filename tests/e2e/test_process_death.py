"""A process that raises, dies or gets stuck ends the whole run soon, and the first thing to read is the cause."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdpsft.distributed.failure import explain
from fsdpsft.testing import free_port, save_tiny_model

SCRIPT = Path(__file__).with_name("faulty_train.py")
STEP = 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("death")
    rows = [{"input_ids": list(range(3, 3 + n)), "loss_mask": [0] + [1] * (n - 1)} for n in range(4, 28)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_tiny_model(folder / "model")
    return [
        f"data.train_files={folder / 'rows.jsonl'}", f"data.cache_dir={folder / 'cache'}", "data.max_length=32",
        f"model.partial_pretrain={folder / 'model'}", "data.train_batch_size=4", "trainer.save_freq=1",
        "trainer.resume_mode=disable", f"trainer.default_local_dir={folder / 'out'}",
    ]  # fmt: skip


def run(settings: list[str], fault: str, rank: int, *overrides: str) -> tuple[str, str, float, int]:
    """What the two processes wrote, then torchrun's summary; seconds from the fault on at most; the exit code."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
        str(SCRIPT), fault, str(rank), str(STEP), *settings, *overrides,
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines, last_step = [], time.monotonic()
        for line in process.stderr:
            lines.append(line)
            if f"checkpoint of step {STEP - 1}" in line:
                last_step = time.monotonic()
        code = process.wait(timeout=120)
    summary = next(i for i, line in enumerate(lines) if "torch/distributed/elastic" in line)
    return "".join(lines[:summary]), "".join(lines[summary:]), time.monotonic() - last_step, code


@pytest.mark.parametrize("rank", [0, 1])
def test_own_error_first(settings: list[str], rank: int) -> None:
    text, summary, seconds, code = run(settings, "raise", rank)
    own = text.index(f"[rank {rank}, step {STEP}] ZeroDivisionError: division by zero")
    assert text.count("ZeroDivisionError: division by zero\n") == 2, text  # its line, and its traceback's last
    assert text.count("Traceback (most recent call last)") == 1, text
    assert text.index("Traceback") > own
    other = text.find(f"[rank {1 - rank}")
    assert other == -1 or other > own
    assert f"rank      : {rank} " in summary.partition("Root Cause")[2]
    assert code != 0
    assert seconds < 30


def test_killed_process(settings: list[str]) -> None:
    text, summary, seconds, code = run(settings, "kill", 1)
    assert "Traceback (most recent call last)" not in text, text
    assert "SIGKILL" in summary.partition("Root Cause")[2]
    assert f"[rank 0, step {STEP}] another process is gone" in text
    assert code != 0
    assert seconds < 30


@pytest.mark.slow  # torchrun gives the stuck process 30 s to end by itself
def test_stuck_process(settings: list[str]) -> None:
    text, _, seconds, code = run(settings, "sleep", 1, "trainer.timeout=5")
    assert f"[rank 0, step {STEP}] waited 5 s (trainer.timeout) for the other processes in vain" in text, text
    assert "Traceback (most recent call last)" not in text
    assert code != 0
    assert seconds < 60


def test_explanations() -> None:
    where = {"rank": 2, "step": 7, "processes": 4, "timeout_s": 600}
    closed = explain(RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"), **where)
    assert closed.collateral
    assert "[rank 2, step 7] another process is gone" in str(closed)
    gave_up = explain(RuntimeError("[../gloo/pair.cc:1] Application timeout caused pair closure"), **where)
    assert "another process is gone" in str(gave_up)
    late = explain(RuntimeError("[/gloo/unbound_buffer.cc:78] Timed out waiting 600000ms for recv"), **where)
    assert "waited 600 s (trainer.timeout)" in str(late)
    own = explain(RuntimeError("CUDA out of memory"), **where)
    assert not own.collateral
    assert str(own) == "[rank 2, step 7] RuntimeError: CUDA out of memory"
    early = explain(ValueError("x\ny"), rank=0, step=0, processes=1, timeout_s=600)
    assert str(early) == "[rank 0, before the first step] ValueError: x"
