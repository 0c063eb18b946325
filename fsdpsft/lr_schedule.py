"""Learning-rate schedules: pure functions from a step to a multiplier of the peak rate.

Cosine: Loshchilov & Hutter, "SGDR" (2017). WSD (warm-up, stable, decay): Hu et al., "MiniCPM" (2024). ``sqrt`` decay,
``1 - sqrt(progress)``: Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fsdpsft.config.schema import OptimConfig

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}


@dataclass(frozen=True)
class LRSchedule:
    """A schedule over the steps that the run really takes.

    Attributes:
        name: ``cosine``, ``wsd``, ``linear`` or ``constant``.
        total_steps: optimiser steps of the whole run.
        warmup_steps: steps of linear warm-up; step 0 already has ``1 / warmup_steps`` of the peak.
        decay_steps: ``wsd`` only: the steps at the end that decay.
        decay_shape: ``wsd`` only: ``cosine``, ``linear`` or ``sqrt``.
        min_ratio: the multiplier that the decay approaches at ``total_steps``.
    """

    name: str
    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    decay_shape: str = "cosine"
    min_ratio: float = 0.0

    def __call__(self, step: int) -> float:
        """Multiplier of the peak learning rate for 0-based ``step``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        start = self.total_steps - self.decay_steps if self.name == "wsd" else self.warmup_steps
        progress = min(max(step - start, 0) / max(self.total_steps - start, 1), 1.0)
        shape = self.decay_shape if self.name == "wsd" else self.name
        return self.min_ratio + (1 - self.min_ratio) * DECAY_SHAPES[shape](progress)


def build_schedule(settings: OptimConfig, total_steps: int) -> LRSchedule:
    """Resolve ratios against the actual number of steps; ``warmup_steps`` wins over ``warmup_steps_ratio``."""
    o = settings
    warmup = round(o.warmup_steps_ratio * total_steps) if o.warmup_steps is None else o.warmup_steps
    decay = min(round(o.decay_ratio * total_steps), max(total_steps - warmup, 0))
    return LRSchedule(o.lr_scheduler, total_steps, min(warmup, total_steps), decay, o.decay_shape, o.min_lr_ratio)
