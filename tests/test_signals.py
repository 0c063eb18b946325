"""A request to one rank stops every rank after the same step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from fsdpsft.signals import Request, StopSignal
from fsdpsft.testing import run_distributed


def ask_one_rank(folder: str) -> list[int]:
    trigger = Path(folder) / "save"
    seen = []
    with StopSignal(trigger) as stop:
        for step in range(7):
            if step == 1 and dist.get_rank() == 0:
                trigger.touch()
            if step == 4 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            seen.append(int(stop.poll()))
    return seen


def test_all_ranks_agree_one_step_later(tmp_path) -> None:
    first, second = run_distributed(ask_one_rank, 2, str(tmp_path))
    # the file is still there when the request is read back, so it is removed once and asked for once
    assert first == second == [0, 0, 1, 0, 0, 2, 2]
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_each_signal_stops_and_handlers_are_given_back(number) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.poll() is Request.NONE
        os.kill(os.getpid(), number)
        assert stop.poll() is Request.NONE
        assert stop.poll() is Request.STOP
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
