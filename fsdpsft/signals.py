"""Stopping and saving on request: by a signal, by a file that appears, or because the launcher is gone.

A request may reach one process only, yet every rank must act after the same step. So each step ends with an
asynchronous all-reduce of one byte over a process group on the CPU, whose result is read at the end of the next step:
all ranks learn of a request after the same step, one step late, and the GPU is never waited for.

Before the first step there is nothing to save: a signal then raises ``Stopped`` at once, so that every ``with`` and
``finally`` on the way out removes what was begun.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

EXIT_REQUEUE = 75
"""Exit code after a stop by signal: the run should be started again (EX_TEMPFAIL of sysexits.h)."""

GRACE_S = 5.0
"""Seconds that a process has to clean up in when it is stopped before its first step and its launcher is gone."""

_POLL_S = 0.5


class Request(enum.IntEnum):
    """What is asked for, the stronger above the weaker."""

    NONE = 0
    SAVE = 1
    STOP = 2


class Stopped(Exception):  # noqa: N818 - not an error: the run did as it was asked
    """A run ended by request.

    Attributes:
        step: it is saved after this step; 0 where it was stopped before the first step of this start.
    """

    def __init__(self, step: int) -> None:
        super().__init__(
            f"stopped by request after step {step}; it is saved, and continues from there when started again"
            if step
            else "stopped by request before the first step of this start; what it had begun is removed"
        )
        self.step = step


class StopSignal:
    """A context in which signals are requests; ``begin`` it before the first step, ``poll`` it once per step."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(
        self,
        save_on_file: Path | None = None,
        launcher_is_gone: Callable[[], bool] = lambda: False,
        save_within_s: float = 600.0,
    ) -> None:
        """Remember what to look at.

        Args:
            save_on_file: when this regular file appears, a save is asked for, and the file removed.
            launcher_is_gone: looked at twice a second; True is a request to stop.
            save_within_s: seconds from then until the process ends, whether it could save or not.
        """
        self._file, self._launcher_is_gone, self._save_within_s = save_on_file, launcher_is_gone, save_within_s
        self._group: dist.ProcessGroup | None = None
        self._begun = False
        self._asked = Request.NONE
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="launcher watch", daemon=True)

    def __enter__(self) -> StopSignal:
        """Take over the signals; possible on the main thread only, on any other they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in self.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup asks for SIGHUP to be ignored
                self._previous[number] = signal.signal(number, self._handle)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the former signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._over.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def begin(self, timeout: timedelta | None = None) -> None:
        """From now on a request waits for the end of the step. Collective where ``torch.distributed`` is initialised.

        Args:
            timeout: for one process waiting for another; None takes torch's own.

        Raises:
            Stopped: it was asked for before.
        """
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        if self._asked:
            raise Stopped(0)
        self._begun = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        asked, self._asked = self._asked, Request.STOP
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: the user does not want to wait for the save
        if not asked and not self._begun:
            raise Stopped(0)

    def _watch(self) -> None:
        """Stop the run when its launcher is gone; end the process where that takes too long."""
        while not self._launcher_is_gone():
            if self._over.wait(_POLL_S):
                return
        limit = self._save_within_s if self._begun else GRACE_S
        _print(f"the launcher of this process is gone; it stops, and ends in {limit:.0f} s at the latest")
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)  # to the main thread, as it may have to wake up for it
        if not self._over.wait(limit):
            _print(f"not done {limit:.0f} s after its launcher went: this process ends now, without saving")
            os._exit(EXIT_REQUEUE)

    def poll(self) -> Request:
        """The request that all ranks now agree on; made at the latest one step ago. Never waits for the device."""
        agreed = self._result()
        value = torch.tensor([self._own_request()], dtype=torch.uint8)
        work = None
        if self._group is not None:
            work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, value)
        return agreed

    def settle(self) -> None:
        """Wait for what ``poll`` has under way; before the process group is left."""
        self._result()
        self._pending = None

    def _result(self) -> Request:
        if self._pending is None:
            return Request.NONE
        work, value = self._pending
        if work is not None:
            work.wait()
        agreed = Request(int(value))
        if agreed is Request.SAVE and self._leads and self._file is not None:
            self._remove(self._file)
        return agreed

    def _own_request(self) -> Request:
        if self._asked is Request.STOP:
            return Request.STOP
        # A device or a folder of that name is not a request.
        if self._leads and self._file is not None and self._file.is_file():
            return Request.SAVE
        return Request.NONE

    @property
    def _leads(self) -> bool:
        return self._group is None or dist.get_rank() == 0

    def _remove(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("trainer.save_on_file=%s cannot be removed (%s); it is no longer looked at", file, error)
            self._file = None


def _print(message: str) -> None:
    with contextlib.suppress(OSError):  # the launcher may have been reading it
        sys.stderr.write(f"process {os.getpid()}: {message}\n")
        sys.stderr.flush()
