"""A run that is stopped or killed and started again is the run that was never interrupted.

On one layout bit for bit, in float32: the same losses, gradient norms and weights. On another layout to rounding, for
sums over tokens and processes are then taken in another order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fsdpsft import load_config
from fsdpsft import train as run_training
from fsdpsft.checkpoint.folder import read_manifest
from fsdpsft.errors import CheckpointError
from fsdpsft.signals import EXIT_REQUEUE, Stopped
from fsdpsft.testing import free_port, run_distributed
from fsdpsft.train import main
from tests.e2e.killing import STEPS_PER_EPOCH, Moment, command, curve, differences, make_inputs, run_and_kill, weights

STEPS = 2 * STEPS_PER_EPOCH
SYNCHRONOUS = ["trainer.async_save=false"]
LORA = ["model.lora_rank=4", "model.lora_dropout=0.1", "model.target_modules=all-linear"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes started here: the number of threads decides the order of sums, and so the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "settings").write_text("\n".join(make_inputs(folder)))
    return folder


def settings(home: Path, name: str, *more: str) -> list[str]:
    """The overrides of the run called ``name``."""
    shared = (home / "settings").read_text().splitlines()
    return [*shared, f"trainer.default_local_dir={home / name}", *more]


@contextlib.contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """A SIGTERM in time for the run to stop after ``step`` (a request is agreed on one step late)."""
    module = sys.modules["fsdpsft.train"]
    original = module.train_step

    def train_step(model, optimizer, batch, *rest):  # type: ignore[no-untyped-def]
        if batch.index + 2 == step:
            signal.raise_signal(signal.SIGTERM)
        return original(model, optimizer, batch, *rest)

    module.train_step = train_step
    try:
        yield
    finally:
        module.train_step = original


def run(home: Path, name: str, *more: str, until: int | None = None) -> None:
    """Train in this process, to the end or until it is stopped after a step."""
    config = load_config(settings(home, name, *more))
    if until is None:
        run_training(config)
        return
    with interrupted_after(until), pytest.raises(Stopped) as stopped:
        run_training(config)
    assert stopped.value.step == until


def run_all(home: Path, runs: Sequence[tuple[str, Sequence[str], int | None]]) -> None:
    """Several runs in one set of processes, for starting them costs more than a tiny run."""
    for name, more, until in runs:
        run(home, name, *more, until=until)


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    """A run on one process that nobody interrupts."""
    run(home, "straight", "trainer.save_freq=-1")
    assert [step for step, _, _ in curve(home / "straight")] == list(range(1, STEPS + 1))
    return home / "straight"


@pytest.fixture(scope="module")
def stopped_at_4(home: Path) -> Path:
    """A run stopped after step 4, with a checkpoint of every step."""
    run(home, "stopped", until=4)
    return home / "stopped"


def copy(source: Path, name: str) -> Path:
    return Path(shutil.copytree(source, source.parent / name))


def assert_close(folder: Path, other: Path) -> None:
    """Equal to rounding: 1e-5 of each value is some 80 units in the last place of float32, after 12 steps of AdamW."""
    ours, theirs = np.array(curve(folder)), np.array(curve(other))
    assert ours[:, 0].tolist() == theirs[:, 0].tolist()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for name, tensor in weights(other).items():
        change = (weights(folder)[name] - tensor).norm() / tensor.norm().clamp_min(1e-3)
        assert change < 1e-5, f"{name} is off by {change:.1e}"


# --- kills ---


def test_one_process_killed_in_its_saves(home: Path, straight: Path) -> None:
    chance = random.Random(1)
    line = command(1, settings(home, "killed"))
    for step in (2, 5, 9):
        ended = run_and_kill(line, home / "killed", home / "killed.log", [Moment(step, chance.uniform(0, 0.03))])
        assert (ended.kills, ended.code) == (1, -signal.SIGKILL)
    last = run_and_kill(line, home / "killed", home / "killed.log")
    assert last.code == 0, (home / "killed.log").read_text()
    assert differences(home / "killed", straight) == []


def test_torchrun_killed_whole_and_one_worker_that_comes_back(home: Path, two_processes: Path) -> None:
    """First all processes die in a save, then one worker, which torchrun brings back with the others."""
    log = home / "torchrun.log"
    line = command(2, settings(home, "torchrun"), max_restarts=2)
    ended = run_and_kill(line, home / "torchrun", log, [Moment(3, 0.01)])
    assert (ended.kills, ended.code) == (1, -signal.SIGKILL)
    ended = run_and_kill(line, home / "torchrun", log, [Moment(7, 0.02, victim="worker")])
    assert (ended.kills, ended.code) == (1, 0), log.read_text()
    assert log.read_text().count("resuming at step") == 2
    assert differences(home / "torchrun", two_processes / "straight-2") == []


def test_a_process_that_is_stuck_in_the_last_save_is_named(home: Path) -> None:
    """Rank 1 is stopped while the only checkpoint is being written; rank 0 ends after trainer.timeout and says why."""
    folder, log = home / "stuck", home / "stuck.log"
    line = command(1, settings(home, "stuck", "trainer.save_freq=-1", "trainer.total_epochs=1", "trainer.timeout=5"))
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with log.open("wb") as output:
        processes = [
            subprocess.Popen(line, stdout=output, stderr=output, env={**shared, "RANK": rank, "LOCAL_RANK": rank})
            for rank in ("0", "1")
        ]
    try:
        while not any(folder.glob(".tmp-global_step_*")):
            assert processes[0].poll() is None, log.read_text()
            time.sleep(0.0005)
        processes[1].send_signal(signal.SIGSTOP)
        assert processes[0].wait(60) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = log.read_text()
    assert "waited 5 s (trainer.timeout)" in told and "rank 0 was waiting for rank 1 to save" in told, told
    assert "Traceback" not in told


# --- stops ---


@pytest.mark.parametrize("until", [4, STEPS_PER_EPOCH], ids=["mid-epoch", "epoch-boundary"])
def test_stopped_and_started_again(home: Path, straight: Path, until: int) -> None:
    name = f"stopped-{until}"
    run(home, name, "trainer.save_freq=-1", until=until)
    assert (home / name / f"global_step_{until}/manifest.json").is_file()
    assert len(curve(home / name)) == until
    run(home, name, "trainer.save_freq=-1")
    assert differences(home / name, straight) == []


def test_after_the_last_step_there_is_nothing_to_do(home: Path, straight: Path, caplog) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.INFO):
        assert main(settings(home, "straight", "trainer.save_freq=-1")) == 0
    assert f"already finished: step {STEPS} of {STEPS} is done" in caplog.text
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_a_signal_saves_and_asks_to_be_started_again(home: Path) -> None:
    with interrupted_after(3):
        assert main(settings(home, "signal", "trainer.save_freq=-1")) == EXIT_REQUEUE == 75
    assert [path.name for path in (home / "signal").glob("global_step_*")] == ["global_step_3"]


def test_a_file_asks_for_a_save(home: Path) -> None:
    (home / "save-now").touch()
    run(home, "file", "trainer.save_freq=-1", f"trainer.save_on_file={home / 'save-now'}")
    assert sorted(p.name for p in (home / "file").glob("global_step_*")) == ["global_step_12", "global_step_2"]
    assert not (home / "save-now").exists()


def test_lora_with_dropout_goes_on_as_if_nothing_had_happened(home: Path) -> None:
    run(home, "lora-straight", *LORA, "trainer.save_freq=-1")
    run(home, "lora", *LORA, until=5)
    run(home, "lora", *LORA)
    assert differences(home / "lora", home / "lora-straight") == []
    adapters = [home / name / "global_step_12/lora_adapter" for name in ("lora", "lora-straight")]
    ours, theirs = ((folder / "adapter_model.safetensors").read_bytes() for folder in adapters)
    assert ours == theirs


# --- other layouts ---

TWO_PROCESSES = [
    ("straight-2", ["trainer.save_freq=-1"], None),
    ("layouts", SYNCHRONOUS, 5),  # FSDP, begun on one process
    ("layouts", ["ulysses_sequence_parallel_size=2", "data.micro_batch_size_per_gpu=4"], 7),
    ("lora-layouts", LORA[:1], None),  # from one process
]
FOUR_PROCESSES = [("layouts", ["ulysses_sequence_parallel_size=2", "data.micro_batch_size_per_gpu=3"], 10)]


@pytest.fixture(scope="module")
def two_processes(home: Path) -> Path:
    run(home, "layouts", until=3)
    run(home, "lora-layouts", *LORA[:1], until=6)
    run_distributed(run_all, 2, home, TWO_PROCESSES)
    return home


def test_every_step_on_another_layout(two_processes: Path, straight: Path) -> None:
    """1 process, 2 with FSDP, 2 with Ulysses, 4 with both, 1 again, each with another micro-batch budget."""
    run_distributed(run_all, 4, two_processes, FOUR_PROCESSES)
    run(two_processes, "layouts", "data.max_token_len_per_gpu=64", "use_remove_padding=true")
    assert_close(two_processes / "layouts", straight)
    for step in range(1, STEPS + 1):  # each export was loaded and compared with the model in training
        probe = read_manifest(two_processes / f"layouts/global_step_{step}").verdict["probe"]
        assert probe["compared"] and probe["largest_nats"] < 1e-4


def test_two_processes_equal_one(two_processes: Path, straight: Path) -> None:
    assert_close(two_processes / "straight-2", straight)


def test_lora_on_another_layout(two_processes: Path) -> None:
    run(two_processes, "lora-one", *LORA[:1], "trainer.save_freq=-1")
    assert_close(two_processes / "lora-layouts", two_processes / "lora-one")


# --- changed settings ---


def test_harmless_changes_are_taken(home: Path, stopped_at_4: Path, straight: Path) -> None:
    folder = copy(stopped_at_4, "harmless")
    changes = ["trainer.save_freq=epoch", "trainer.experiment_name=other", "trainer.logger=[]", "data.num_workers=1"]
    run(home, "harmless", *changes)
    assert differences(folder, straight) == []


def test_harmful_changes_are_refused_with_a_diff(home: Path, stopped_at_4: Path) -> None:
    folder = copy(stopped_at_4, "harmful")
    rows = (home / "rows.jsonl").read_text().splitlines()
    (home / "fewer.jsonl").write_text("\n".join(rows[:-4]))
    changes = ["data.train_batch_size=4", "trainer.seed=9", f"data.train_files={home / 'fewer.jsonl'}"]
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError) as refused:
        run(home, "harmful", *changes, "trainer.log_freq=2")
    told = str(refused.value)
    assert "data.train_batch_size: 8 -> 4" in told and "trainer.seed: 3 -> 9" in told
    assert "fewer.jsonl" in told and "trainer.log_freq" not in told and "allow_config_change" in told
    assert sorted(path.name for path in folder.iterdir()) == before
    run(home, "harmful", *changes, "trainer.allow_config_change=true")
    assert curve(folder)[-1][0] == 20  # 40 rows in batches of 4, twice


def test_changed_rows_in_the_same_file_are_refused(home: Path, stopped_at_4: Path) -> None:
    copy(stopped_at_4, "rewritten")
    rows = home / "rows.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace('"loss_mask": [0', '"loss_mask": [1', 1))
    try:
        with pytest.raises(CheckpointError, match=r"content of data\.train_files as tokenised: "):
            run(home, "rewritten")
    finally:
        rows.write_text(before)


def test_epochs_may_be_added(home: Path, straight: Path) -> None:
    folder = copy(straight, "longer")
    run(home, "longer", "trainer.total_epochs=3", "trainer.save_freq=-1")
    assert [step for step, _, _ in curve(folder)] == list(range(1, STEPS + STEPS_PER_EPOCH + 1))
    assert curve(folder)[:STEPS] == curve(straight)


# --- damage ---


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.unlink()  # the root has hard links to some of these files
    path.write_bytes(content)


DAMAGES = {
    "truncated": (truncate, "trainer_state/rank-00000.safetensors"),
    "bit-flipped": (flip_a_bit, "model.safetensors"),
    "state-flipped": (flip_a_bit, "trainer_state/state.json"),
    "half-deleted": (shutil.rmtree, "trainer_state"),
    "no-manifest": (Path.unlink, "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(home: Path, stopped_at_4: Path, straight: Path, damage, caplog) -> None:
    folder = copy(stopped_at_4, damage)
    harm, victim = DAMAGES[damage]
    harm(folder / "global_step_4" / victim)
    with caplog.at_level(logging.INFO):
        run(home, damage, "trainer.save_freq=-1")
    assert "not resuming from global_step_4: " in caplog.text and victim.split("/")[0] in caplog.text
    assert "resuming at step 3 of 12" in caplog.text
    assert differences(folder, straight) == []


def test_a_damaged_checkpoint_that_was_named_is_refused(home: Path, stopped_at_4: Path) -> None:
    folder = copy(stopped_at_4, "named")
    flip_a_bit(folder / "global_step_4/model.safetensors")
    named = [f"trainer.resume_from_path={folder / 'global_step_4'}", "trainer.resume_mode=resume_path"]
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        run(home, "named", *named)
