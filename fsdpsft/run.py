"""Everything a run holds, put together from its settings: data, processes, model, optimiser, metrics, checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fsdpsft.config import Config, to_yaml
from fsdpsft.data.loader import Loader, SampleStore, Step
from fsdpsft.distributed.mesh import Mesh, choose_device, close_mesh, init_mesh
from fsdpsft.errors import ConfigError
from fsdpsft.lr_schedule import LRSchedule, build_schedule
from fsdpsft.metrics import Console, FlopCount, JsonLines, TensorBoard, Throughput, Tracker, Trackers, WandB
from fsdpsft.optim import build_optimizer
from fsdpsft.parallelize import ParallelModel, build_model
from fsdpsft.recorder import Recorder


@dataclass(frozen=True)
class TrainingData:
    """What the data side hands to a run.

    Attributes:
        model_path: local folder of the model.
        train, validation: token stores; validation may be None.
        source_weights: draws per sample and epoch of each training source; None where all are 1.
        pad_token_id: id of filler tokens.
    """

    model_path: Path
    train: SampleStore
    validation: SampleStore | None
    source_weights: tuple[float, ...] | None
    pad_token_id: int


@dataclass
class Run:
    """A run ready to go. See ``train.py`` for what is done with it."""

    config: Config
    data: TrainingData
    mesh: Mesh
    model: ParallelModel
    optimizer: torch.optim.Optimizer
    loader: Loader
    validation: Loader | None
    schedule: LRSchedule
    recorder: Recorder
    total_steps: int
    start_step: int = 0

    def lr(self, step: int) -> float:
        """Learning rate of 0-based ``step``."""
        return self.config.optim.lr * self.schedule(step)

    def squared_lengths(self, step: Step) -> int:
        """Sum of the squared document lengths of a step, which attention's cost grows with."""
        return int(np.square(self.data.train.lengths[step.rows].astype(np.int64)).sum())

    def is_due(self, frequency: int | str, step: Step) -> bool:
        """Whether something done every ``frequency`` (steps, "epoch", -1: only at the end) is due after ``step``."""
        done = step.index + 1
        every = len(self.loader) if frequency == "epoch" else int(frequency)
        return done == self.total_steps or (every > 0 and done % every == 0)


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Run]:
    raise NotImplementedError
    yield
