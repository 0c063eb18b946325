"""What an error in one process of a run means: its own fault, a process that is gone, or one that is stuck."""

from __future__ import annotations

import re

import torch.distributed as dist

from fsdpsft.errors import RunFailed

# Gloo reports by plain RuntimeErrors, known by the source file they name or by these words.
_OF_GLOO = re.compile(r"gloo|Connection (closed|reset) by peer|Broken pipe|Socket closed|pair closure", re.IGNORECASE)
_TIME_OUT = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_PEER_GAVE_UP = re.compile(r"Application timeout caused pair closure", re.IGNORECASE)


def explain(error: Exception, *, rank: int, step: int, processes: int, timeout_s: int) -> RunFailed:
    """The error to raise in place of ``error``, naming the rank and the step (0 before the first)."""
    place = f"rank {rank}, step {step}" if step else f"rank {rank}, before the first step"
    text = str(error).strip().partition("\n")[0]
    between = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _OF_GLOO.search(text) is not None
    )
    if processes == 1 or not between:
        return RunFailed(f"[{place}] {type(error).__name__}: {text}", processes=processes, collateral=False)
    if _TIME_OUT.search(text) and not _PEER_GAVE_UP.search(text):
        message = (
            f"waited {timeout_s} s (trainer.timeout) for the other processes without an answer: one is stuck or slower."
            f" See where with py-spy dump on each node; raise trainer.timeout if it is only slow. ({text})"
        )
    else:
        message = f"another process is gone; its own message, or torchrun's summary, tells why. ({text})"
    return RunFailed(f"[{place}] {message}", processes=processes, collateral=True)
