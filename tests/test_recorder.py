"""Metrics are written for the first step, every n-th and the last, one interval late, each with its own loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fsdpsft.data.batches.loader import Step
from fsdpsft.metrics import Throughput, Trackers
from fsdpsft.model.flops import FlopCount
from fsdpsft.recorder import NonFiniteError, Recorder, StepStats


class Memory:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, float]] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.lines.append((step, values["train/loss"]))

    def close(self) -> None:
        pass


def recorder_of(memory: Memory, log_freq: int) -> Recorder:
    flops = FlopCount(body=1, frozen_body=0, head=1, layers=1, heads=1, head_size=1)
    throughput = Throughput(torch.device("cpu"), 1, flops)
    return Recorder(Trackers([memory]), throughput, "row {}".format, steps_per_epoch=4, log_freq=log_freq)


def step_at(index: int) -> Step:
    return Step(
        index, 0, [], 1.0, 10, 5, trained_by_source=np.array([3, 2]), squared_lengths=100, rows=np.array([index])
    )


def take(recorder: Recorder, index: int, loss: float) -> None:
    losses = torch.tensor([loss, 6 * loss, 2.0])  # of the step, then the sums of two sources
    recorder.record(step_at(index), StepStats(losses, torch.tensor(1.0)), lr=0.1)


@pytest.mark.parametrize(
    ("log_freq", "logged"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6, 7]), (7, [1, 7]), (100, [1, 7])]
)
def test_first_every_nth_and_last_step_are_written_with_their_own_loss(log_freq: int, logged: list[int]) -> None:
    memory = Memory()
    recorder = recorder_of(memory, log_freq)
    for index in range(7):
        take(recorder, index, loss=float(index + 1))
    recorder.flush()
    recorder.flush()  # nothing is left to write
    assert memory.lines == [(step, float(step)) for step in logged]
    assert recorder.last["train/tokens"] == 70


def test_a_step_is_read_only_when_the_next_interval_has_ended() -> None:
    memory = Memory()
    recorder = recorder_of(memory, log_freq=2)
    seen = []
    for index in range(6):
        take(recorder, index, loss=1.0)
        seen.append([step for step, _ in memory.lines])
    assert seen == [[], [1], [1], [1, 2], [1, 2], [1, 2, 4]]


def test_what_becomes_of_a_step_s_tensors_afterwards_changes_nothing() -> None:
    memory = Memory()
    recorder = recorder_of(memory, log_freq=1)
    stats = StepStats(torch.tensor([7.0, 6.0, 2.0]), torch.tensor(1.0))
    recorder.record(step_at(0), stats, lr=0.1)
    stats.losses.fill_(99.0)  # as the next step does on a GPU, where the memory is used again
    recorder.flush()
    assert memory.lines == [(1, 7.0)]


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_on_a_gpu_a_step_is_waited_for_by_its_own_event(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.name = f"step {len([entry for entry in recorded if entry.startswith('end')]) + 1}"

        def record(self) -> None:
            recorded.append(f"end of {self.name}")

        def synchronize(self) -> None:
            recorded.append(f"wait for {self.name}")

    empty = torch.empty

    def pinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        assert pin_memory, "the copy from a GPU to ordinary memory would wait"
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("the whole device is waited for"))
    memory = Memory()
    recorder = recorder_of(memory, log_freq=1)
    for index in range(3):
        losses = torch.tensor([float(index), 6.0, 2.0]).as_subclass(OnGPU)
        recorder.record(step_at(index), StepStats(losses, torch.tensor(1.0)), lr=0.1)
    assert recorded == ["end of step 1", "end of step 2", "wait for step 1", "end of step 3", "wait for step 2"]
    assert memory.lines == [(1, 0.0), (2, 1.0)]


def test_a_step_between_lines_that_is_not_finite_ends_the_run_and_is_named() -> None:
    recorder = recorder_of(Memory(), log_freq=4)
    with pytest.raises(NonFiniteError, match=r"step 6: the loss is nan.*row 5"):
        for index in range(12):
            take(recorder, index, loss=float("nan") if index == 5 else 1.0)


def test_a_gradient_norm_that_is_not_finite_ends_the_run_beside_a_finite_loss() -> None:
    recorder = recorder_of(Memory(), log_freq=1)
    recorder.record(step_at(0), StepStats(torch.tensor([1.0, 6.0, 2.0]), torch.tensor(float("inf"))), lr=0.1)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is 1\.0, the gradient norm inf"):
        recorder.flush()
