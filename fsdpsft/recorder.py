"""From a step's tensors to written metrics, without making the step wait.

A step's loss and gradient norm are copied to the host right behind the step, without waiting for it. They are read when
the next logging interval ends, by which time the copy has long arrived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fsdpsft.data.batches.loader import Step
from fsdpsft.errors import UserError, and_more
from fsdpsft.metrics import Throughput, Trackers, by_source


@dataclass(frozen=True)
class StepStats:
    """What a step leaves behind, on the device.

    Attributes:
        losses: [1 + sources]: the step's loss over all processes, then the unweighted sums of token losses by source.
        grad_norm: scalar, before clipping.
    """

    losses: Tensor
    grad_norm: Tensor


class HostCopy:
    """A step's numbers on their way to the host.

    From a GPU they are copied to page-locked memory, and an event marks the end of the copy: reading waits for that
    alone, not for the steps launched since. On a CPU they are copied at once.

    Attributes:
        arrived: the event; None on a CPU, where the step is over by now.
    """

    def __init__(self, stats: StepStats) -> None:
        """Begin the copy; the host does not wait."""
        losses = stats.losses
        norm = stats.grad_norm.to(losses.device, losses.dtype, non_blocking=True)  # on the host where weights are
        self._values = torch.cat([norm.reshape(1), losses])
        self.arrived: torch.cuda.Event | None = None
        if losses.is_cuda:
            values, self._values = self._values, torch.empty(1 + len(losses), dtype=losses.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record()

    def read(self) -> tuple[float, float, list[float]]:
        """The gradient norm, the step's loss, and the sums of token losses by source."""
        if self.arrived is not None:
            self.arrived.synchronize()
        norm, loss, *sums = self._values.tolist()
        return norm, loss, sums


@dataclass(frozen=True)
class _Pending:
    step: int
    values: dict[str, float]
    numbers: HostCopy
    trained_by_source: np.ndarray
    rows: np.ndarray
    work: tuple[int, int, int]  # tokens, trained tokens, squared lengths


class NonFiniteError(UserError):
    """A loss or gradient norm that is not a number."""


class Recorder:
    """Collects steps and writes them out one logging interval later.

    Args:
        trackers: where the metrics go.
        throughput: counts tokens and time.
        describe: names a sample's file and row, for the error of a non-finite step.
        steps_per_epoch: to tell the epoch as a fraction.
        log_freq: steps between written lines; the first step has one too.
        source_names: losses are given for each where there are several.
        tokens_seen: trained on before this run (on resume).
    """

    def __init__(
        self,
        trackers: Trackers,
        throughput: Throughput,
        describe: Callable[[int], str],
        *,
        steps_per_epoch: int,
        log_freq: int,
        source_names: Sequence[str] = (),
        tokens_seen: int = 0,
        trained_tokens_seen: int = 0,
    ) -> None:
        self._trackers, self._throughput, self._describe = trackers, throughput, describe
        self._steps_per_epoch, self._log_freq = steps_per_epoch, log_freq
        self._source_names = source_names if len(source_names) > 1 else ()
        self.tokens, self.trained_tokens = tokens_seen, trained_tokens_seen
        self._finished: list[_Pending] = []  # the logging interval before this one
        self._pending: list[_Pending] = []
        self.last: dict[str, float] = {}

    def record(self, step: Step, stats: StepStats, lr: float) -> None:
        """Take a step's numbers; reads those of the interval before when a new line is due."""
        self.tokens += step.num_tokens
        self.trained_tokens += step.num_trained_tokens
        count = step.index + 1
        values = {
            "epoch": count / self._steps_per_epoch,
            "train/lr": lr,
            "train/tokens": float(self.tokens),
            "train/trained_tokens": float(self.trained_tokens),
        }
        work = step.num_tokens, step.num_trained_tokens, step.squared_lengths
        item = _Pending(count, values, HostCopy(stats), step.trained_by_source, step.rows, work)
        self._pending.append(item)
        if item.numbers.arrived is None:
            self._throughput.add(*work)
        if self._is_logged(count):
            finished, self._finished, self._pending = self._finished, self._pending, []
            self._read(finished)

    def flush(self) -> None:
        """Read and write all that is pending; waits for the device. Call it before validation, a save, and the end.

        Raises:
            NonFiniteError: a step's loss or gradient norm is not finite; names the step and its rows.
        """
        pending, self._finished, self._pending = self._finished + self._pending, [], []
        self._read(pending)

    def write(self, values: dict[str, float], step: int) -> None:
        """Write metrics that are floats already (validation)."""
        self.last |= values
        self._trackers.log(values, step)
        self._throughput.restart()

    def close(self) -> None:
        """Close every tracker; what is still pending is lost."""
        self._trackers.close()

    def _is_logged(self, step: int) -> bool:
        return step == 1 or step % self._log_freq == 0

    def _read(self, pending: list[_Pending]) -> None:
        for position, item in enumerate(pending):
            grad_norm, loss, sums = item.numbers.read()
            if item.numbers.arrived is not None:  # only now is the step known to be over
                self._throughput.add(*item.work)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise self._not_finite(item, loss, grad_norm)
            values = {"train/loss": loss, "train/grad_norm": grad_norm, **item.values}
            values |= by_source("train/loss", self._source_names, sums, item.trained_by_source)
            if position == len(pending) - 1:
                values |= self._throughput.read()
            self.last |= values
            if self._is_logged(item.step) or position == len(pending) - 1:
                self._trackers.log(values, item.step)

    def _not_finite(self, item: _Pending, loss: float, grad_norm: float) -> NonFiniteError:
        named = and_more([self._describe(int(row)) for row in item.rows], join="; ")
        return NonFiniteError(
            f"step {item.step}: the loss is {loss}, the gradient norm {grad_norm}; the run stops and nothing of this "
            f"step is saved. Rows of its batch: {named}. Lower optim.lr, or look at these rows with "
            f"python -m fsdpsft.check"
        )
