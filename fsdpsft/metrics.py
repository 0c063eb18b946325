"""Metrics of a run: throughput, FLOPs, memory, and the places they are written to."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from fsdpsft.errors import ConfigError
from fsdpsft.filesystem import replace_file

log = logging.getLogger(__name__)

GPUS = {
    "B200": (2250, 180),
    "H200": (989, 141),
    "H100 PCIe": (756, 80),
    "H100": (989, 80),
    "H800": (989, 80),
    "H20": (148, 96),
    "A100": (312, 80),
    "A800": (312, 80),
    "L40S": (362, 48),
    "L4": (121, 24),
    "A10": (125, 24),
    "4090": (165, 24),
    "MI300X": (1307, 192),
}
"""By a part of the name: dense bf16 peak in TFLOP/s, and memory in GiB of the largest variant; vendors' data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known (CPUs among them)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((teraflops * 1e12 for part, (teraflops, _) in GPUS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far in GiB: of the CUDA allocator, or the resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def by_source(name: str, sources: Sequence[str], sums: Sequence[float], counts: np.ndarray) -> dict[str, float]:
    """Mean token loss of each source that has trained tokens, as ``name/source``."""
    rows = zip(sources, sums, counts.tolist(), strict=False)  # no names, no rows
    return {f"{name}/{source}": total / count for source, total, count in rows if count}


class Tracker(Protocol):
    """A place that metrics go to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the metrics of one step."""

    def close(self) -> None:
        """Write out what is left."""


class JsonLines:
    """``metrics.jsonl``: one JSON object a line. On resume, lines of steps that will be taken again are dropped.

    Lines that cannot be written (a full disk) are kept, and written with the first one that can.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path, self._resumed_step = path, resumed_step
        self._file: io.FileIO | None = None
        self._waiting = b""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append one line at once, so that a killed run keeps all it wrote.

        Raises:
            OSError: it cannot be written now; no part of it is left in the file.
        """
        self._waiting += (json.dumps({"step": step, **values}) + "\n").encode()
        file = self._file = self._file or self._open()
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            file.truncate(end)
            raise
        self._waiting = b""

    def _open(self) -> io.FileIO:
        """Leave out what is not kept (the last line of a killed run may be torn, too), and open the rest to append."""
        found = self._path.read_bytes() if self._path.exists() else b""
        kept = b"".join(line for line in found.splitlines(keepends=True) if _step_of(line) <= self._resumed_step)
        if kept != found:
            replace_file(self._path, kept)
        return io.FileIO(self._path, "a")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else sys.maxsize
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


class Console:
    """A progress bar and one line a logged step, on standard error."""

    def __init__(self, total_steps: int, resumed_step: int, lines: bool) -> None:
        self._lines, self._total = lines, total_steps
        self._bar = tqdm(
            total=total_steps, initial=resumed_step, desc="training", unit="step", disable=None, leave=False
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Move the bar to ``step`` and print its line."""
        self._bar.update(step - self._bar.n)
        if self._lines:
            known = _SHOWN | {name: (name, ".4g") for name in values if name.startswith("val/")}
            shown = [f"{known[name][0]} {value:{known[name][1]}}" for name, value in values.items() if name in known]
            tqdm.write(f"step {step}/{self._total}  {'  '.join(shown)}", file=sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


_SHOWN = {
    "epoch": ("epoch", ".4g"),
    "train/loss": ("loss", ".4f"),
    "train/grad_norm": ("grad_norm", ".4g"),
    "train/lr": ("lr", ".2e"),
    "perf/tokens_per_second": ("tokens/s", ",.0f"),
    "perf/mfu": ("mfu", ".4g"),
    "perf/memory_gib": ("GiB", ".4g"),
}
"""Metrics on the console: what each is called there, and its format."""


class TensorBoard:
    """TensorBoard event files under ``tensorboard/``."""

    def __init__(self, folder: Path, settings: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "trainer.logger has tensorboard, which is not installed: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]
        self._writer.add_text("config", f"```yaml\n{settings}\n```")  # type: ignore[no-untyped-call]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write each metric as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()  # type: ignore[no-untyped-call]


class WandB:
    """Weights & Biases, with the run's settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], project: str, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("trainer.logger has wandb, which is not installed: pip install wandb") from error
        self._run = wandb.init(project=project, name=name, config=dict(settings), dir=str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the metrics."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackers:
    """All places at once; holds none on ranks other than 0. A place that fails never ends the run.

    Attributes:
        failures: how often each place failed, by its class's name.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self.failures: Counter[str] = Counter()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand the metrics of ``step`` (1-based: steps taken) to every place."""
        for tracker in self._trackers:
            with self._counted(tracker):
                tracker.log(values, step)

    def close(self) -> None:
        """Close every place, and say how often one failed."""
        for tracker in self._trackers:
            with self._counted(tracker):
                tracker.close()
        for name, count in self.failures.items():
            log.warning("metrics: %s failed %d times", name, count)

    @contextlib.contextmanager
    def _counted(self, tracker: Tracker) -> Iterator[None]:
        name = type(tracker).__name__
        try:
            yield
        except Exception as error:  # noqa: BLE001 - code of others must not end the run
            self.failures[name] += 1
            if self.failures[name] == 1:
                log.warning("metrics: %s failed, and the run continues: %s: %s", name, type(error).__name__, error)


class Throughput:
    """Tokens, FLOPs and seconds since the last reading.

    Args:
        device: of this process.
        world_size: devices that the tokens are spread over.
        flops: FLOPs that (tokens, trained tokens, squared lengths) require, see ``flops.py``.
    """

    def __init__(self, device: torch.device, world_size: int, flops: Callable[[int, int, int], float]) -> None:
        peak = peak_flops(device)
        self._peak = peak * world_size if peak else None
        self._device, self._flops = device, flops
        self._last: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Forget what was counted: what follows starts now (after validation or a save, say)."""
        self._tokens = self._trained = 0
        self._work = 0.0
        self._start = time.perf_counter()

    def add(self, tokens: int, trained_tokens: int, squared_lengths: int) -> None:
        """Count one optimiser step over all processes."""
        self._tokens += tokens
        self._trained += trained_tokens
        self._work += self._flops(tokens, trained_tokens, squared_lengths)

    def read(self) -> dict[str, float]:
        """Rates since the last reading (or that one again, if nothing was counted since).

        Call it where the host has just waited for the device.
        """
        if not self._tokens:
            return dict(self._last)
        seconds = time.perf_counter() - self._start
        values = {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/trained_tokens_per_second": self._trained / seconds,
            "perf/memory_gib": peak_memory_gib(self._device),
        }
        if self._peak:
            values["perf/mfu"] = self._work / seconds / self._peak
        self._last = values
        self.restart()
        return dict(values)
