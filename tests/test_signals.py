"""A request to one rank stops every rank after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fsdpsft.signals import EXIT_REQUEUE, Request, Stopped, StopSignal
from fsdpsft.testing import run_distributed


def ask_one_rank(folder: str) -> list[int]:
    trigger = Path(folder) / "save"
    seen = []
    with StopSignal(trigger) as stop:
        stop.begin()
        for step in range(7):
            if step == 1 and dist.get_rank() == 0:
                trigger.touch()
            if step == 4 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            seen.append(int(stop.poll()))
        stop.settle()
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
        stop.begin()
        assert stop.poll() is Request.NONE
        os.kill(os.getpid(), number)
        assert stop.poll() is Request.NONE
        assert stop.poll() is Request.STOP
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        stop.begin()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_before_the_first_step_a_signal_stops_at_once() -> None:
    with pytest.raises(Stopped, match="before the first step") as stopped, StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stopped.value.step == 0


def test_a_request_that_somebody_swallowed_is_not_forgotten() -> None:
    with pytest.raises(Stopped, match="before the first step"), StopSignal() as stop:
        with contextlib.suppress(Exception):  # as a library may do around the moment
            os.kill(os.getpid(), signal.SIGTERM)
        stop.begin()


def test_an_ignored_hang_up_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.begin()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_regular_files_ask_for_a_save_and_are_removed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for trigger in (tmp_path / "pipe", tmp_path):
        with StopSignal(trigger) as stop:
            stop.begin()
            assert [stop.poll(), stop.poll(), stop.poll()] == [Request.NONE] * 3
        assert trigger.exists()


def test_a_file_that_cannot_be_removed_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "save").touch()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with StopSignal(tmp_path / "save") as stop:
        stop.begin()
        assert [stop.poll() for _ in range(4)] == [Request.NONE, Request.SAVE, Request.NONE, Request.NONE]


def test_a_launcher_that_is_gone_asks_for_a_stop_and_no_thread_is_left() -> None:
    gone = threading.Event()
    with StopSignal(launcher_is_gone=gone.is_set) as stop:
        stop.begin()
        assert stop.poll() is Request.NONE
        gone.set()
        deadline = time.monotonic() + 20
        while stop.poll() is not Request.STOP and time.monotonic() < deadline:
            time.sleep(0.05)
        assert stop.poll() is Request.STOP
    assert [thread.name for thread in threading.enumerate() if thread.name == "launcher watch"] == []


STUCK = """
import ctypes, sys
from fsdpsft.signals import StopSignal
begun = []
with StopSignal(launcher_is_gone=lambda: bool(begun), save_within_s=1.0) as stop:
    stop.begin()
    begun.append(True)
    while True:  # as a collective that waits for a process which is gone
        ctypes.CDLL(None).sleep(60)
"""


def test_a_process_that_cannot_save_ends_after_its_launcher_anyway() -> None:
    before = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", STUCK], stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == EXIT_REQUEUE
    assert "not done 1 s after its launcher went" in ended.stderr
    assert time.monotonic() - before < 50
