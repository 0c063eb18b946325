"""Supervised fine-tuning that proves what it trains on: FSDP2, Ulysses, packing, exact loss masks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import fsdpsft.distributed.launcher  # noqa: F401 - looks at once who started this process
from fsdpsft.config.load import load_config
from fsdpsft.config.schema import Config

if TYPE_CHECKING:
    from fsdpsft.train import train

if "OMP_WAIT_POLICY" not in os.environ:
    # Threads meet at the end of each small operator. By default one that waits keeps its core busy for milliseconds,
    # which on a machine with other work holds up the very thread that it waits for. Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["Config", "load_config", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `train` pulls in torch and transformers; a typing mistake in the settings is reported before that.
    if name == "train":
        from fsdpsft.train import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
