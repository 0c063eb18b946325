"""Stopping and saving on request: SIGTERM, SIGINT, SIGUSR1, or a file that appears.

The request may reach one process only, or all at different moments, yet every rank must act after the same step. So
each step ends with an asynchronous all-reduce (maximum of one byte) over a process group on the CPU, whose result is
read at the end of the next step: by then it has long arrived. The GPU is never waited for, and all ranks learn of a
request after the same step, one step late.
"""

from __future__ import annotations

import enum
import logging
import signal
import threading
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 75
"""Exit code after a stop by signal: the run is saved and wants to be started again (EX_TEMPFAIL of sysexits.h)."""


class Request(enum.IntEnum):
    """What is asked for, the stronger above the weaker."""

    NONE = 0
    SAVE = 1
    STOP = 2


class Stopped(Exception):  # noqa: N818 - not an error: the run did as it was asked
    """A run ended by request, after saving."""

    def __init__(self, step: int) -> None:
        """Remember after which ``step`` the run stopped."""
        super().__init__(
            f"stopped by request after step {step}; it is saved, and goes on from there when started again"
        )
        self.step = step


class StopSignal:
    """A context in which signals are requests. Every rank enters it and calls ``poll`` once per step."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, save_on_file: Path | None = None, timeout: timedelta | None = None) -> None:
        """Collective where ``torch.distributed`` is initialised: makes a gloo group of its own.

        Args:
            save_on_file: when this file appears, a save is asked for, and the file removed.
            timeout: for one process waiting for another; None takes torch's own.
        """
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._leads = self._group is None or dist.get_rank() == 0
        self._file = save_on_file
        self._asked = Request.NONE
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        """Take over the signals; possible on the main thread only, on any other they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back to whom they were taken from."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None and self._pending[0] is not None and error is None:
            self._pending[0].wait()
        self._pending = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked is Request.STOP and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: the user does not want to wait for the save
        self._asked = Request.STOP

    def poll(self) -> Request:
        """The request that all ranks now agree on; made at the latest one step ago. Never waits for the device."""
        agreed = self._result()
        value = torch.tensor([self._own_request()], dtype=torch.uint8)
        work = None
        if self._group is not None:
            work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, value)
        return agreed

    def _result(self) -> Request:
        if self._pending is None:
            return Request.NONE
        work, value = self._pending
        if work is not None:
            work.wait()
        agreed = Request(int(value))
        if agreed is Request.SAVE and self._leads and self._file is not None:
            self._file.unlink(missing_ok=True)
        return agreed

    def _own_request(self) -> Request:
        if self._asked is Request.STOP:
            return Request.STOP
        if self._leads and self._file is not None and self._file.exists():
            return Request.SAVE
        return Request.NONE
