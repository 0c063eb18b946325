"""What the GPU check works on: model shapes, ragged chats, and the run's device, clock and results."""

from __future__ import annotations

import gc
import json
import math
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from fsdpsft.batch import PackedBatch, Sample, pack
from fsdpsft.data.batches.packing import assign_step

MEAN, SQUARED_CV, LONGEST, TRAINED = 840, 1.69, 4096, 0.35  # of the chats: lognormal, CV 1.3
GATE_LONGEST, GATE_EVERY = 24, 4  # tokens of the gate's rows; of so many rows one has a trained token, its last
LIMIT = 3600.0  # seconds of one attempt, whatever the time that is left
DEVICE_ROWS = 8  # rows of a padded forward pass: transformers' and TRL's default

MODELS: dict[str, dict[str, Any]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "gate": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
}  # fmt: skip


@dataclass(frozen=True)
class StepCase:
    """One training configuration.

    Attributes:
        states: dtype of weights, gradients and moments; float32 means master weights beside bfloat16 copies.
        step_tokens: about so many tokens a step.
        ours: what is tried in turn until it fits in memory: most tokens of a forward pass, and what is recomputed.
        trl: the same for TRL without padding, which knows ``none`` and ``full``.
        longest: tokens of the longest document.
    """

    model: str
    lora_rank: int = 0
    states: torch.dtype = torch.float32
    step_tokens: int = 65536
    ours: tuple[tuple[int, str], ...] = ((16384, "none"), (16384, "selective"))
    trl: tuple[tuple[int, str], ...] = ((16384, "none"), (4096, "none"), (16384, "full"))
    longest: int = LONGEST

    @property
    def vocabulary(self) -> int:
        """Token ids there are."""
        return int(MODELS[self.model]["vocab_size"])


_BIG = {
    "step_tokens": 32768, "ours": ((8192, "none"), (16384, "selective"), (16384, "full")),
    "trl": ((8192, "none"), (4096, "none"), (16384, "full")),
}  # fmt: skip
CASES = {
    "0.5B": StepCase("0.5B"),
    "1.5B": StepCase("1.5B"),
    "7B": StepCase("7B", states=torch.bfloat16, **_BIG),  # type: ignore[arg-type]
    "7B-LoRA": StepCase("7B", lora_rank=16, **_BIG),  # type: ignore[arg-type]
}
_SMALL = {"step_tokens": 512, "longest": 128, "ours": ((256, "none"),), "trl": ((128, "none"),)}
TINY_CASES = {
    "0.5B": StepCase("tiny", **_SMALL),  # type: ignore[arg-type]
    "1.5B": StepCase("tiny", **_SMALL | {"ours": ((256, "selective"),)}),  # type: ignore[arg-type]
    "7B": StepCase("tiny", states=torch.bfloat16, **_SMALL | {"trl": ((256, "full"),)}),  # type: ignore[arg-type]
    "7B-LoRA": StepCase("tiny", lora_rank=4, **_SMALL),  # type: ignore[arg-type]
}
"""The same rows in small; their names are kept, so that every section runs."""


@dataclass(frozen=True)
class Work:
    """One step's rows, and as many short ones for the gate.

    The gate's rows carry few trained tokens, where a wrong label, bound or gradient shows in the loss instead of
    vanishing in the mean of twenty thousand.
    """

    rows: tuple[Sample, ...]
    gate: tuple[Sample, ...]

    @property
    def lengths(self) -> np.ndarray:
        """[n] tokens of each row."""
        return np.array([len(row.input_ids) for row in self.rows])

    @property
    def tokens(self) -> int:
        """Real tokens of a step."""
        return int(self.lengths.sum())

    @property
    def trained(self) -> int:
        """Labels of a step that count."""
        return count_trained(self.rows)

    def groups(self, budget: int) -> list[list[int]]:
        """The step's rows as micro-batches of at most ``budget`` tokens."""
        (plan,) = assign_step(self.lengths, dp_size=1, token_budget=budget)
        return [list(map(int, positions)) for positions in plan]


def count_trained(rows: Sequence[Sample]) -> int:
    """Labels that count: positions from the second on with a weight."""
    return int(sum((row.loss_weights[1:] > 0).sum() for row in rows))


def spread(rows: int, groups: int) -> list[list[int]]:
    """Row numbers dealt out to so many micro-batches."""
    return [list(map(int, part)) for part in np.array_split(np.arange(rows), groups)]


def draw_work(case: StepCase) -> Work:
    """Made-up chats, the last 35 % of each trained; their number is a multiple of a padded forward pass's rows."""
    dice, variance = np.random.default_rng(0), np.log(1 + SQUARED_CV)
    tokens = 0.97 * case.step_tokens
    count = max(round(tokens / min(MEAN, case.longest / 4) / DEVICE_ROWS), 1) * DEVICE_ROWS
    drawn = dice.lognormal(0.0, np.sqrt(variance), count)
    for _ in range(4):  # so few draws miss the mean, and cutting the longest moves it again
        drawn = np.clip(drawn * tokens / drawn.sum(), 16, case.longest)
    lengths = np.floor(drawn).astype(np.int64)
    rows, gate = [], []
    for number, length in enumerate(lengths):
        ids = dice.integers(3, case.vocabulary, int(length)).astype(np.uint32)
        rows.append(Sample(ids, (np.arange(len(ids)) >= (1 - TRAINED) * len(ids)).astype(np.float32), number))
        ids = dice.integers(3, case.vocabulary, int(dice.integers(6, GATE_LONGEST))).astype(np.uint32)
        trained = np.arange(len(ids)) >= len(ids) - (number % GATE_EVERY == GATE_EVERY - 1)
        gate.append(Sample(ids, trained.astype(np.float32), number))
    return Work(tuple(rows), tuple(gate))


def packed(rows: Sequence[Sample], groups: Sequence[Sequence[int]]) -> list[PackedBatch]:
    """Micro-batches of the rows with these numbers."""
    return [pack([rows[i] for i in group], pad_token_id=0) for group in groups]


def step_flops(case: StepCase, work: Work) -> float:
    """Operations a step requires: products on real tokens, causal attention, head on trained positions only."""
    shape = MODELS[case.model]
    width, heads, kv_heads = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    head_size = width // heads
    body = 2 * width * heads * head_size + 2 * width * kv_heads * head_size + 3 * width * shape["intermediate_size"]
    pairs = float((work.lengths.astype(np.float64) ** 2).sum())
    layers, factor = shape["num_hidden_layers"], 4 if case.lora_rank else 6
    attention = 6 * heads * head_size * pairs
    return float(layers * (factor * body * work.tokens + attention) + factor * work.trained * width * case.vocabulary)


def causal_lm_config(case: StepCase) -> Qwen2Config:
    """The case's model as a configuration."""
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"], max_position_embeddings=1 << 20, bos_token_id=None, eos_token_id=2,
        pad_token_id=0, use_cache=False, **MODELS[case.model],
    )  # fmt: skip


def random_causal_lm(case: StepCase, device: torch.device, attention: str) -> PreTrainedModel:
    """The case's model as transformers builds it, with the weights of ``draw``."""
    dtype = torch.bfloat16 if case.lora_rank else case.states
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(causal_lm_config(case), dtype=dtype, attn_implementation=attention)
    draw(model)
    return model


@torch.no_grad()
def draw(model: torch.nn.Module) -> None:
    """Give a Qwen2 weights that depend on the seed alone, so that all contenders start from the same.

    Matrices are drawn in float32 whatever the model's dtype, for which torch may draw other numbers. Values and outputs
    of attention are made large, or random weights would let the MLPs drown what attention does, and the gate would not
    see a wrong one. Adapters are left as they are.
    """
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        if parameter.ndim == 2:
            deviation = 0.12 if "v_proj." in name or "o_proj." in name else 0.04
            parameter.copy_(torch.randn(parameter.shape, device=parameter.device) * deviation)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@torch.no_grad()
def fill_adapters(model: torch.nn.Module) -> None:
    """Give LoRA's matrices values that depend on their order alone; B is not zero, so that the gate sees both."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, device=parameter.device) * 0.02)


@dataclass
class Check:
    """The run: its device, its clock, its results.

    Attributes:
        deadline: of the section under way, in seconds of ``time.monotonic``.
    """

    device: torch.device
    tiny: bool
    out: Path
    deadline: float = float("inf")
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Of the section under way."""
        return self.deadline - time.monotonic()

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Median seconds of ``run`` on the device; one call before is not counted, the host waits for the last only."""
        run()
        clock = StepClock(self.device)
        self.wait()
        clock.mark()
        for _ in range(repeats):
            run()
            clock.mark()
        return statistics.median(clock.seconds())

    def attempt(self, run: Callable[[], dict[str, Any]], most: float = math.inf, grace: float = 0) -> dict[str, Any]:
        """What ``run`` returns, or its error: one kernel's failure must not cost the other numbers.

        It ends after ``most`` seconds, and with its section at the latest, but for ``grace`` seconds.
        """
        seconds = min(most, max(self.seconds_left, 1) + grace, LIMIT)
        try:
            with at_most(seconds):
                return run()
        except Exception as error:  # noqa: BLE001
            return {
                "error": f"{type(error).__name__}: {str(error)[:300]}",
                "where": traceback.format_exc().splitlines()[-4:-1],
            }

    def free(self) -> None:
        """Drop what the last case left."""
        if self.device.type == "cuda":
            torch.compiler.reset()  # its caches would keep a model alive
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Most memory the allocator has reserved since ``free``; None on CPU."""
        return torch.cuda.max_memory_reserved() / 2**30 if self.device.type == "cuda" else None

    def save(self) -> None:
        """Write what there is, whole or not at all."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        beside = self.out.with_suffix(".writing")
        beside.write_text(json.dumps(self.results, indent=1) + "\n")
        beside.replace(self.out)


class StepClock:
    """Marks in the device's own time; reading them waits, setting them does not."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Now, in the order of what the device has been given."""
        if self._device.type != "cuda":
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        if self._device.type != "cuda":
            return np.diff(self._times).tolist()
        torch.cuda.synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


class OutOfTimeError(RuntimeError):
    """What ``at_most`` ends its body with."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End the body by ``OutOfTimeError`` after so many seconds: a compilation may take very long. Main thread only."""

    def stop(signum: int, frame: Any) -> None:
        raise OutOfTimeError(f"took longer than {seconds:.0f} s")

    before, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        left = max(outer - (time.monotonic() - began), 0.1) if outer else 0.0
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def errors_in(found: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Where and what: every error, and everything that did not pass, in a result, however deep."""
    if not isinstance(found, dict):
        return
    for key in ("error", "no_speed"):
        if key in found:
            yield where, str(found[key])
    if found.get("passed") is False and "error" not in found:
        yield where, f"did not pass: {found}"
    for key, value in found.items():
        yield from errors_in(value, f"{where}, {key}" if where else str(key))
