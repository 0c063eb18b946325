"""A process that raises, dies or gets stuck ends the whole run soon, and the first thing to read is the cause."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fsdpsft.distributed.failure import explain
from fsdpsft.filesystem import is_held
from fsdpsft.testing import free_port, save_tiny_model
from tests.e2e.killing import descendants

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


def start(settings: list[str], fault: str, rank: int, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
        str(SCRIPT), fault, str(rank), str(STEP), *settings, *overrides,
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def run(settings: list[str], fault: str, rank: int, *overrides: str) -> tuple[str, str, float, int]:
    """What the two processes wrote, then torchrun's summary; seconds from the fault on at most; the exit code."""
    with start(settings, fault, rank, *overrides) as process:
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
    assert f"[rank 0, step {STEP}] waited 5 s (trainer.timeout) for the other processes without an answer" in text, text
    assert "Traceback (most recent call last)" not in text
    assert code != 0
    assert seconds < 60


@pytest.mark.parametrize("fault", ["launcher", "hang up", "user signal"])
def test_workers_save_and_end_when_their_launcher_is_gone(settings: list[str], tmp_path: Path, fault: str) -> None:
    out = tmp_path / "out"
    overrides = ["trainer.save_freq=-1", "trainer.total_epochs=100000", f"trainer.default_local_dir={out}"]
    with start(settings, fault, 1, *overrides) as launcher:
        assert launcher.stderr is not None
        while not is_held(out / ".lock"):
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.05)
        limit = threading.Timer(120, kill, [descendants(launcher.pid)])
        limit.start()
        text = launcher.stderr.read()  # up to the end of the last process that can write to it
        limit.cancel()
    (saved,) = out.glob("global_step_*")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, int(saved.name.rpartition("_")[2]) + 1)), text
    assert f"stopped by request after step {steps[-1]}; it is saved" in text
    assert not is_held(out / ".lock")


def kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


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
