"""Real runs of the trainer, killed from outside at a chosen moment, and what is compared of them afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from fsdpsft.testing import save_tiny_model

ROWS, BATCH = 44, 8
STEPS_PER_EPOCH = 6  # the last batch of an epoch has 4 rows
TIMEOUT_S = 300


def make_inputs(folder: Path) -> list[str]:
    """Write a tiny model and ragged pre-tokenised rows; return the settings that all runs share."""
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(ROWS):
        length = int(generator.integers(4, 60))
        mask = (generator.random(length) < 0.4).astype(int)
        mask[-1] = 1
        ids = generator.integers(3, 250, length).tolist()
        lines.append(json.dumps({"input_ids": ids, "loss_mask": mask.tolist()}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    save_tiny_model(folder / "model")
    return [
        f"data.train_files={folder / 'rows.jsonl'}",
        f"data.cache_dir={folder / 'cache'}",
        f"model.partial_pretrain={folder / 'model'}",
        f"data.train_batch_size={BATCH}",
        "data.max_length=64",
        "data.micro_batch_size_per_gpu=2",
        "trainer.seed=3",
        "trainer.total_epochs=2",
        "trainer.save_freq=1",
        "trainer.async_save=true",
        "optim.lr=2e-3",
        # A gradient that is zero but for rounding (a key's bias) is divided by eps, not by itself.
        "optim.eps=1e-5",
        "optim.lr_scheduler=linear",
        "optim.warmup_steps=2",
        "optim.clip_grad=0.5",
        "model.enable_gradient_checkpointing=none",
    ]


def command(processes: int, overrides: Sequence[str], *, max_restarts: int = 0) -> list[str]:
    """The command line of a run, under torchrun where there are several processes."""
    if processes == 1:
        return [sys.executable, "-m", "fsdpsft.train", *overrides]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, f"--max-restarts={max_restarts}", "-m", "fsdpsft.train", *overrides]


@dataclass(frozen=True)
class Moment:
    """When to kill: ``delay`` seconds after the save of ``step`` or a later one has begun, or after that many steps.

    Attributes:
        during: "save", or "step": when that step's line stands in ``metrics.jsonl``.
        victim: "all" processes at once, or "worker": the one of rank 1 alone.
    """

    step: int
    delay: float
    during: str = "save"
    victim: str = "all"


@dataclass(frozen=True)
class Ended:
    """How a start ended.

    Attributes:
        kills: moments that came before the run's own end.
        code: exit code.
        torn: after how many of the kills a half-written checkpoint was lying about.
    """

    kills: int
    code: int
    torn: int


def run_and_kill(line: Sequence[str], folder: Path, log: Path, moments: Sequence[Moment] = ()) -> Ended:
    """Start a run that writes to ``folder``, kill it at each of the moments, and wait for the end of what is left."""
    kills = torn = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        for moment in moments:
            if not _wait_for(moment, folder, process):
                break
            _kill(process.pid, moment.victim)
            kills += 1
            torn += any(folder.glob(".tmp-global_step_*"))
        code = process.wait(TIMEOUT_S)
    finally:
        if process.poll() is None:
            _kill(process.pid, "all")
            process.wait()
    return Ended(kills, code, torn)


def _wait_for(moment: Moment, folder: Path, process: subprocess.Popen[bytes]) -> bool:
    """Wait for the moment; False where the run ends before."""
    deadline = time.monotonic() + TIMEOUT_S
    while not _has_come(moment, folder):
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"{moment} never came"
        time.sleep(0.001)
    time.sleep(moment.delay)
    return process.poll() is None


def _has_come(moment: Moment, folder: Path) -> bool:
    if moment.during == "save":
        begun = [int(path.name.rpartition("_")[2]) for path in folder.glob(".tmp-global_step_*")]
        return max(begun, default=0) >= moment.step
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return len(lines) >= moment.step


def _kill(launcher: int, victim: str) -> None:
    """SIGKILL the launcher and all below it (torchrun's workers lead sessions of their own), or rank 1 alone."""
    family = descendants(launcher)
    victims = [launcher, *family] if victim == "all" else [pid for pid in family if _is_rank_1(pid)]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    while any(_alive(pid) for pid in victims if pid != launcher):
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended since
            continue
        parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def _is_rank_1(pid: int) -> bool:
    return b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def _alive(pid: int) -> bool:
    """Whether a process still runs (a zombie, whose parent has not looked yet, does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every line of ``metrics.jsonl``."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    """The model at the root of a run's folder."""
    return load_file(folder / "model.safetensors")


def differences(folder: Path, other: Path) -> list[str]:
    """What differs, bit for bit, between two finished runs: their curves and their models."""
    found = []
    if curve(folder) != curve(other):
        pairs = zip(curve(folder), curve(other), strict=False)
        first = next((pair for pair in pairs if pair[0] != pair[1]), "number of lines")
        found.append(f"curves part at {first}")
    ours, theirs = weights(folder), weights(other)
    if ours.keys() != theirs.keys():
        found.append(f"tensors {ours.keys() ^ theirs.keys()}")
    found += [name for name in ours.keys() & theirs.keys() if not bool((ours[name] == theirs[name]).all())]
    return found
