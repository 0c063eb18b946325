"""The training run: ``main()`` for the command line, ``train(config)`` for Python, the loop and the step.

torchrun --nproc_per_node=2 -m fsdpsft.train data.train_files=chats.parquet model.partial_pretrain=path/to/model
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import torch

from fsdpsft.config.cli import run_command
from fsdpsft.config.schema import Config
from fsdpsft.data.batches.loader import Step
from fsdpsft.evaluate import evaluate
from fsdpsft.optim import clip_grad_norm, set_lr
from fsdpsft.parallelize import ParallelModel
from fsdpsft.recorder import StepStats
from fsdpsft.run import open_run
from fsdpsft.signals import EXIT_REQUEUE, Request, Stopped

log = logging.getLogger(__name__)


def train(config: Config) -> dict[str, float]:
    """Train as ``config`` says, in this process or, under torchrun, together with the others.

    Returns:
        The last values of all metrics (``train/loss``, ``val/loss`` and so on).

    Raises:
        UserError: settings, data or model that cannot work, before any training; a non-finite step, during it.
        Stopped: a signal asked for it; the run is saved and continues from there when started again.
        RunFailed: anything else, here or in another process; names rank and step.
    """
    t = config.trainer
    with open_run(config) as run:
        for step in run.steps():
            set_lr(run.optimizer, run.lr(step))
            stats = train_step(run.model, run.optimizer, step, config.optim.clip_grad, run.sync_every_micro_batch)
            run.recorder.record(step, stats, run.lr(step))
            if run.validation is not None and run.is_due(t.test_freq, step):
                run.recorder.flush()
                run.recorder.write(evaluate(run.model, run.validation), step.index + 1)
            request = run.requests.poll()
            if request or run.is_due(t.save_freq, step):
                run.recorder.flush()
                run.save(step)
            if request is Request.STOP and step.index + 1 < run.total_steps:
                raise Stopped(step.index + 1)
        run.recorder.flush()
        return run.recorder.last


def train_step(
    model: ParallelModel, optimizer: torch.optim.Optimizer, step: Step, clip_grad: float | None, sync_every: bool = True
) -> StepStats:
    """One optimiser step on the global batch ``step``; the host waits for nothing.

    The loss is a sum over trained tokens, divided once by their number in the whole batch, which the plan knows. So
    neither micro-batches nor processes nor padding can change it.

    Args:
        sync_every: sum gradients over processes after each micro-batch; False does it once, at the last.
    """
    device = model.mesh.device
    sources = len(step.trained_by_source)
    losses = torch.zeros(1 + sources, device=device)  # the step's, then the sums by source
    last = len(step.micro_batches) - 1
    with model.computing():
        for i, micro_batch in enumerate(step.micro_batches):
            model.prepare_micro_batch(last=i == last, sync=sync_every or i == last)
            loss_sum, source_sums = model(micro_batch, sources)
            (loss_sum / step.loss_denominator).backward()  # type: ignore[no-untyped-call]
            losses[0] += loss_sum.detach() / step.loss_denominator
            losses[1:] += source_sums
    grad_norm = clip_grad_norm(model.module.parameters(), clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return StepStats(model.mesh.sum(losses), grad_norm)


def main(arguments: list[str] | None = None) -> int:
    """``python -m fsdpsft.train key=value …``; returns the exit code."""
    try:
        return run_command(_train_and_report, sys.argv[1:] if arguments is None else arguments)
    except Stopped as stopped:
        log.warning("%s", stopped)
        return EXIT_REQUEUE


def _train_and_report(config: Config) -> None:
    train(config)
    if "model" in config.trainer.save_contents:
        log.info("the model is in %s", config.trainer.default_local_dir)


class _CallableModule(ModuleType):
    """Lets ``from fsdpsft import train; train(config)`` mean the function, whoever imported this module before."""

    def __call__(self, config: Config) -> dict[str, float]:
        return train(config)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
