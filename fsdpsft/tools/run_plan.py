"""The planned run, from the index of the tokenised data alone: steps, fill, balance, learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fsdpsft.config.schema import Config
from fsdpsft.data.batches.loader import Loader
from fsdpsft.data.batches.packing import Balance, assign_in_order, measure
from fsdpsft.distributed.mesh import Mesh, check_world
from fsdpsft.lr_schedule import LRSchedule
from fsdpsft.prepare import TrainingData, make_loader, make_schedule

VIRTUAL_RANKS = (8, 64)
_MEASURED_STEPS = 32
_SUMMED_STEPS = 4096
_CURVE_POINTS = 200


@dataclass(frozen=True)
class RankBalance:
    """How even the work is over some number of GPUs; means over the measured steps, 1 is perfect.

    Attributes:
        gpus: processes; ``dp_size`` of them see different data.
        micro_batches: forward passes of each GPU in a step.
        fill: real tokens over tokens computed, had every micro-batch the size of the largest.
        tokens, cost: most of a GPU over the mean, in tokens and in tokens with attention.
        in_order_tokens, in_order_cost: the same, were document i given to GPU i modulo their number.
        lockstep: time with all waiting for the slowest at every micro-batch, over the time without waiting.
        idle: GPUs without a document in the average step.
    """

    gpus: int
    dp_size: int
    micro_batches: float
    fill: float
    tokens: float
    cost: float
    in_order_tokens: float
    in_order_cost: float
    lockstep: float
    idle: float


@dataclass(frozen=True)
class RunPlan:
    """What training will do.

    Attributes:
        samples: samples drawn in one epoch.
        batch_size: samples of a step.
        total_steps, steps_per_epoch: optimiser steps.
        tokens, trained_tokens, squared_lengths: sums over the whole run.
        token_budget: most tokens of one forward pass on a GPU.
        max_length: of a sample.
        packed: whether samples are laid end to end.
        balances: for each number of GPUs looked at.
        measured_steps: steps that these are means over.
        peak_lr: the highest learning rate there may be.
        warmup_steps: steps until then.
        schedule: name of the schedule.
        lr: (step, learning rate) at up to 200 steps, the first and the last among them.
        trained_least: fewest trained tokens of a step.
    """

    samples: int
    batch_size: int
    total_steps: int
    steps_per_epoch: int
    tokens: int
    trained_tokens: int
    squared_lengths: int
    token_budget: int
    max_length: int
    packed: bool
    balances: tuple[RankBalance, ...]
    measured_steps: int
    peak_lr: float
    warmup_steps: int
    schedule: str
    lr: tuple[tuple[int, float], ...]
    trained_least: int

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.total_steps / self.steps_per_epoch

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens of a step."""
        return self.tokens / self.total_steps


def plan_run(config: Config, data: TrainingData, gpus: Sequence[int] = ()) -> RunPlan:
    """Plan the run of ``config``.

    Args:
        config: the settings.
        data: the tokenised data.
        gpus: numbers of processes to measure the balance for, besides ``VIRTUAL_RANKS``.

    Raises:
        DataError: a sample does not fit into the token budget.
        ConfigError: the processes cannot be arranged as asked.
    """
    sp = config.ulysses_sequence_parallel_size
    for world in gpus:
        check_world(world, sp, config.model.fsdp_config.replicate_size)
    loader = make_loader(config, data.train, data, virtual_mesh(sp, sp))
    schedule = make_schedule(config, len(loader))
    total_steps = schedule.total_steps
    worlds = sorted({*gpus, *(world for world in VIRTUAL_RANKS if world % sp == 0)})
    steps = _spread(total_steps, _MEASURED_STEPS)
    balances = tuple(
        _balance(make_loader(config, data.train, data, virtual_mesh(world, sp)), world, steps) for world in worlds
    )
    tokens, trained, squares, least = _sums(loader, data, total_steps)
    return RunPlan(
        loader.order.samples_per_epoch, config.data.train_batch_size, total_steps, len(loader), tokens, trained,
        squares, config.data.token_budget, config.data.max_length, config.use_remove_padding, balances, len(steps),
        config.optim.lr, schedule.warmup_steps, schedule.name, _curve(schedule, config.optim.lr), least,
    )  # fmt: skip


def virtual_mesh(world: int, sp_size: int) -> Mesh:
    """The first process of ``world``, without the others: enough to plan with."""
    return Mesh(torch.device("cpu"), 0, world, 0, world // sp_size, 0, sp_size, None, None)


def _spread(total: int, wanted: int) -> NDArray[np.int64]:
    """Up to ``wanted`` of ``range(total)``, at equal distances, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).round().astype(np.int64))


def _curve(schedule: LRSchedule, peak: float) -> tuple[tuple[int, float], ...]:
    return tuple((step, peak * schedule(step)) for step in _spread(schedule.total_steps, _CURVE_POINTS).tolist())


def _sums(loader: Loader, data: TrainingData, total_steps: int) -> tuple[int, int, int, int]:
    """Tokens, trained tokens and squared lengths of the whole run, and the fewest trained tokens of a step.

    From all steps of an epoch, which are all alike in what they draw, or from ``_SUMMED_STEPS`` of very many.
    """
    lengths, trained = data.train.lengths, data.train.trained
    sums, least = np.zeros(3), np.inf
    steps = _spread(min(total_steps, len(loader)), _SUMMED_STEPS)
    for step in steps.tolist():
        rows = loader.order.batch(step)
        sizes = lengths[rows].astype(np.int64)
        step_trained = int(trained[rows].sum(dtype=np.int64))
        sums += (sizes.sum(), step_trained, np.square(sizes).sum())
        least = min(least, step_trained)
    scaled = sums * (total_steps / len(steps))
    return int(scaled[0]), int(scaled[1]), int(scaled[2]), int(least)


def _balance(loader: Loader, world: int, steps: NDArray[np.int64]) -> RankBalance:
    """The balance of the loader's plan over some steps."""
    planned: list[Balance] = []
    in_order: list[Balance] = []
    dp_size = loader.settings.dp_size
    idle = 0
    for step in steps.tolist():
        rows, assignment = loader.assign(step)
        lengths = loader.store.lengths[rows]
        planned.append(measure(assignment, lengths))
        in_order.append(measure(assign_in_order(len(rows), dp_size), lengths))
        idle += sum(not any(rank) for rank in assignment)

    def mean(values: Sequence[Balance], name: str) -> float:
        return float(np.mean([getattr(value, name) for value in values]))

    return RankBalance(
        world, dp_size, mean(planned, "micro_batches"), mean(planned, "fill"), mean(planned, "tokens"),
        mean(planned, "cost"), mean(in_order, "tokens"), mean(in_order, "cost"), mean(planned, "lockstep"),
        idle / len(steps) * (world // dp_size),
    )  # fmt: skip
