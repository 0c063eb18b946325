"""The planned run, from the index of the tokenised data alone: steps, fill, balance, learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fsdpsft.config.schema import Config
from fsdpsft.data.batches.loader import Loader
from fsdpsft.data.batches.packing import Balance, assign_in_order, measure
from fsdpsft.distributed.mesh import Mesh, check_world
from fsdpsft.prepare import TrainingData, make_loader, make_schedule

VIRTUAL_RANKS = (8, 64)
_MEASURED_STEPS = 32
_SUMMED_STEPS = 4096
_CURVE_POINTS = 200


@dataclass(frozen=True)
class RankBalance(Balance):
    """How even the work is over some number of GPUs: means of ``Balance`` over the measured steps.

    Attributes:
        gpus: processes; ``dp_size`` of them see different data.
        in_order_tokens, in_order_cost: were sample i given to GPU i modulo their number.
        idle: GPUs without a sample in the average step.
    """

    gpus: int
    dp_size: int
    in_order_tokens: float
    in_order_cost: float
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
        packed: whether samples are laid end to end.
        balances: for each number of GPUs looked at.
        measured_steps: steps that these are means over.
        schedule, warmup_steps: of the learning rate.
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
    packed: bool
    balances: tuple[RankBalance, ...]
    measured_steps: int
    schedule: str
    warmup_steps: int
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

    ``gpus`` are numbers of processes to measure the balance for, besides ``VIRTUAL_RANKS``.

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
    return RunPlan(
        samples=loader.order.samples_per_epoch,
        batch_size=config.data.train_batch_size,
        total_steps=total_steps,
        steps_per_epoch=len(loader),
        token_budget=config.data.token_budget,
        packed=config.use_remove_padding,
        balances=balances,
        measured_steps=len(steps),
        schedule=schedule.name,
        warmup_steps=schedule.warmup_steps,
        lr=tuple((k, config.optim.lr * schedule(k)) for k in _spread(total_steps, _CURVE_POINTS).tolist()),
        **_sums(loader, data, total_steps),
    )


def virtual_mesh(world: int, sp_size: int) -> Mesh:
    """The first process of ``world``, without the others: enough to plan with."""
    return Mesh(torch.device("cpu"), 0, world, 0, world // sp_size, 0, sp_size, None, None)


def _spread(total: int, wanted: int) -> NDArray[np.int64]:
    """Up to ``wanted`` of ``range(total)``, at equal distances, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).round().astype(np.int64))


def _sums(loader: Loader, data: TrainingData, total_steps: int) -> dict[str, int]:
    """Tokens, trained tokens and squared lengths of the whole run, and the fewest trained tokens of a step.

    Taken from all steps of an epoch, as every epoch draws the same samples, or from ``_SUMMED_STEPS`` of very many.
    """
    steps = _spread(min(total_steps, len(loader)), _SUMMED_STEPS).tolist()
    batches = [loader.order.batch(step) for step in steps]
    sizes = [data.train.lengths[rows].astype(np.int64) for rows in batches]
    trained = [int(data.train.trained[rows].sum(dtype=np.int64)) for rows in batches]
    scale = total_steps / len(steps)
    return {
        "tokens": int(scale * sum(int(lengths.sum()) for lengths in sizes)),
        "trained_tokens": int(scale * sum(trained)),
        "squared_lengths": int(scale * sum(int(np.square(lengths).sum()) for lengths in sizes)),
        "trained_least": min(trained),
    }


def _balance(loader: Loader, world: int, steps: NDArray[np.int64]) -> RankBalance:
    """The balance of the loader's plan over some steps."""
    planned: list[tuple[float, ...]] = []
    in_order: list[Balance] = []
    dp_size = loader.settings.dp_size
    idle = 0
    for step in steps.tolist():
        rows, assignment = loader.assign(step)
        lengths = loader.store.lengths[rows]
        planned.append(astuple(measure(assignment, lengths)))
        in_order.append(measure(assign_in_order(len(rows), dp_size), lengths))
        idle += sum(not any(rank) for rank in assignment)
    means: dict[str, Any] = dict(zip((f.name for f in fields(Balance)), np.mean(planned, axis=0).tolist(), strict=True))
    return RankBalance(
        **means,
        gpus=world,
        dp_size=dp_size,
        in_order_tokens=float(np.mean([balance.tokens for balance in in_order])),
        in_order_cost=float(np.mean([balance.cost for balance in in_order])),
        idle=idle / len(steps) * (world // dp_size),
    )
