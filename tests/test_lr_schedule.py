"""Schedules against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from fsdpsft.config.load import load_config
from fsdpsft.lr_schedule import LRSchedule, build_schedule


def resolved(total_steps: int, *settings: str) -> LRSchedule:
    """The schedule of a run with these ``optim`` settings."""
    needed = ["data.train_files=x", "model.partial_pretrain=x", *(f"optim.{setting}" for setting in settings)]
    return build_schedule(load_config(needed).optim, total_steps)


def curve(schedule: LRSchedule) -> list[float]:
    return [schedule(step) for step in range(schedule.total_steps)]


def test_cosine_with_warmup() -> None:
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert curve(LRSchedule("cosine", 10, warmup_steps=2)) == pytest.approx(expected)


def test_linear_to_a_floor() -> None:
    assert curve(LRSchedule("linear", 4, min_ratio=0.2)) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_wsd_is_flat_then_decays_over_its_share() -> None:
    schedule = LRSchedule("wsd", 10, warmup_steps=2, decay_steps=4, decay_shape="linear")
    assert curve(schedule) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_wsd_sqrt_shape() -> None:
    schedule = LRSchedule("wsd", 4, decay_steps=4, decay_shape="sqrt")
    assert curve(schedule) == pytest.approx([1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])


def test_constant_after_warmup() -> None:
    assert curve(LRSchedule("constant", 4, warmup_steps=2)) == [0.5, 1.0, 1.0, 1.0]


def test_ratios_span_the_actual_steps() -> None:
    schedule = resolved(
        200, "lr_scheduler=wsd", "warmup_steps_ratio=0.05", "decay_ratio=0.2", "min_lr_ratio=0.1", "decay_shape=cosine"
    )
    assert (schedule.warmup_steps, schedule.decay_steps) == (10, 40)
    assert schedule(159) == 1.0 and schedule(160) == 1.0 and schedule(161) < 1.0
    assert schedule(199) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 39 / 40)))


def test_number_of_warmup_steps_wins_over_the_default_ratio() -> None:
    assert resolved(100, "warmup_steps=3").warmup_steps == 3
