"""Metrics are written for the first step, every n-th and the last, one interval late, each with its own loss."""

from __future__ import annotations

from collections.abc import Mapping

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


def take(recorder: Recorder, index: int, loss: float) -> None:
    step = Step(
        index, 0, [], 1.0, 10, 5, trained_by_source=np.array([3, 2]), squared_lengths=100, rows=np.array([index])
    )
    losses = torch.tensor([loss, 6 * loss, 2.0])  # of the step, then the sums of two sources
    recorder.record(step, StepStats(losses, torch.tensor(1.0)), lr=0.1)


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


def test_a_step_between_lines_that_is_not_finite_ends_the_run_and_is_named() -> None:
    recorder = recorder_of(Memory(), log_freq=4)
    with pytest.raises(NonFiniteError, match=r"step 6: the loss is nan.*row 5"):
        for index in range(12):
            take(recorder, index, loss=float("nan") if index == 5 else 1.0)
