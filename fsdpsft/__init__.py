"""Supervised fine-tuning that proves what it trains on: FSDP2, Ulysses, packing, exact loss masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fsdpsft.distributed.launcher  # noqa: F401 - looks at once who started this process
from fsdpsft.config.load import load_config
from fsdpsft.config.schema import Config

if TYPE_CHECKING:
    from fsdpsft.train import train

__all__ = ["Config", "load_config", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `train` pulls in torch and transformers; a typing mistake in the settings is reported before that.
    if name == "train":
        from fsdpsft.train import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
