"""An encoder whose rows spell their own tokens, for tests of what happens around encoding."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fsdpsft.data.mask.template import Encoded
from fsdpsft.errors import RowError


@dataclass(frozen=True)
class ToyEncoder:
    vocab_size: int = 1000
    seconds_per_batch: float = 0.0
    die_at: int | None = None
    fingerprint: str = "toy"

    def encode(self, source, rows):
        time.sleep(self.seconds_per_batch)
        return [self._encode(row) for row in rows]

    def _encode(self, row):
        if row.index == self.die_at:
            os.kill(os.getpid(), 9)
        if "bad" in row.columns:
            return RowError(f"{row.source}, row {row.index}: {row.columns['bad']}", row.columns["bad"])
        ids = np.array(row.columns["ids"], np.uint32)
        weights = np.array(row.columns["weights"], np.float32)
        times = row.columns.get("times", 1)
        return [Encoded(ids, weights)] * times


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
