"""One training configuration, by us and by TRL's ``SFTTrainer`` as charitably as it can be run, in one process.

All start from the same weights, take the same rows, AdamW, clip and constant rate, and first make two steps on rows
with few trained tokens, whose losses are the gate. Then they take turns, A B A B, each built anew, as two models of 7B
with their optimisers do not fit side by side. TRL without padding gets the micro-batches that we plan, our attention
(its own would need flash-attn, or write out a mask), no recomputation where that fits, and batches made by a process of
its own; what it does beyond (accuracy and entropy of each token, for its log) it cannot be told not to do.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.models.qwen2 import modeling_qwen2

from benchmarks.gpu_work import (
    DEVICE_ROWS,
    Check,
    StepCase,
    StepClock,
    Work,
    at_most,
    causal_lm_config,
    count_trained,
    draw,
    draw_work,
    fill_adapters,
    packed,
    random_causal_lm,
    spread,
    step_flops,
)
from fsdpsft import parallelize
from fsdpsft.batch import Sample
from fsdpsft.config.load import load_config
from fsdpsft.data.batches.loader import Step
from fsdpsft.distributed.mesh import init_mesh
from fsdpsft.metrics import peak_flops
from fsdpsft.model import memory
from fsdpsft.model.attention import AttentionContext, AttentionSpec
from fsdpsft.model.attention_backends import BACKENDS, Backend, choose_backend, requirements
from fsdpsft.model.load import materialize
from fsdpsft.optim import build_optimizer
from fsdpsft.parallelize import ParallelModel
from fsdpsft.testing import tiny_tokenizer
from fsdpsft.train import train_step

LR, BETAS, EPS, DECAY, CLIP = 1e-5, (0.9, 0.95), 1e-8, 0.01, 1.0
GATE_STEPS, WARM_STEPS, TIMED_STEPS, ROUNDS = 2, 1, 3, 2
GATE_LIMIT = 3e-3  # relative, in bfloat16
COMPILING = 90.0  # seconds of a session that compiles
PADDING_FREE = "fsdpsft_padding_free"


@dataclass
class Session:
    """What one run of one contender came to.

    Attributes:
        losses: of the gate's steps. tokens, trained: real tokens and labels it was seen to take in a step.
        seconds: of each timed step.
        remark: what it chose, for the table.
    """

    losses: list[float]
    seconds: list[float]
    tokens: int
    trained: int
    peak_gib: float | None
    remark: str = ""


# ---------------------------------------------------------------------------------------------------------------- ours


def build_ours(check: Check, case: StepCase, *overrides: str, dtype: str = "bfloat16") -> ParallelModel:
    """The case's model as a run with these settings builds it, but for its weights, which are random.

    ``build_model`` itself puts it together. It is given a folder with ``config.json`` alone, and ``draw_weights`` in
    the place of the function that reads the files.
    """
    with tempfile.TemporaryDirectory(prefix="fsdpsft-gpu-check-") as folder:
        causal_lm_config(case).save_pretrained(folder)
        settings = [f"model.dtype={dtype}", "model.enable_gradient_checkpointing=none", *overrides]
        if case.lora_rank:
            settings += [f"model.lora_rank={case.lora_rank}", f"model.lora_alpha={2 * case.lora_rank}"]
        elif case.states == torch.bfloat16:
            settings += ["model.fsdp_config.model_dtype=bfloat16", "optim.state_dtype=bfloat16"]
        config = load_config(["data.train_files=none", f"model.partial_pretrain={folder}", *settings])
        with mock.patch.object(parallelize, "load_weights", draw_weights):
            model = parallelize.build_model(Path(folder), config.model, init_mesh(check.device), memory.Work(), seed=0)
    if case.lora_rank:
        fill_adapters(model.module)
    return model


def draw_weights(model: PreTrainedModel, path: Path, *, device: torch.device, **rest: Any) -> None:
    """What ``load_weights`` does, with numbers drawn instead of read."""
    materialize(model, device, device)
    draw(model)


def our_optimizer(case: StepCase, model: ParallelModel) -> torch.optim.Optimizer:
    """The trainer's AdamW; moments in the weights' own dtype."""
    states = torch.float32 if case.lora_rank else case.states
    return build_optimizer(model.module, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, state_dtype=states)


def our_step(check: Check, rows: Sequence[Sample], groups: Sequence[Sequence[int]]) -> Step:
    """A step as the loader would hand it on: on CUDA in page-locked memory."""
    batches, trained = packed(rows, groups), count_trained(rows)
    if check.device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    lengths = np.array([len(row.input_ids) for row in rows])
    return Step(
        0, 0, batches, float(trained), int(lengths.sum()), trained, np.array([trained]), int((lengths**2).sum()),
        np.arange(len(rows)),
    )  # fmt: skip


def run_ours(
    check: Check, case: StepCase, work: Work, micro_batch: int, recompute: str, overrides: Sequence[str] = ()
) -> Session:
    """The trainer's own step."""
    groups = work.groups(micro_batch)
    gate, step = our_step(check, work.gate, spread(len(work.gate), len(groups))), our_step(check, work.rows, groups)
    model = build_ours(check, case, f"model.enable_gradient_checkpointing={recompute}", *overrides)
    optimizer = our_optimizer(case, model)
    losses = [train_step(model, optimizer, gate, CLIP).losses[0] for _ in range(GATE_STEPS)]
    for _ in range(WARM_STEPS):
        train_step(model, optimizer, step, CLIP)
    clock = StepClock(check.device)
    clock.mark()
    for _ in range(TIMED_STEPS):
        train_step(model, optimizer, step, CLIP)
        clock.mark()
    tokens, trained = (sum(f(b) for b in step.micro_batches) for f in (_real_tokens, _labels))
    remark = f"{len(groups)} micro-batches, recomputing {recompute}, attention {model.attend.__name__}"
    return Session([float(x) for x in losses], clock.seconds(), tokens, trained, check.peak_gib(), remark)


def _real_tokens(batch: Any) -> int:
    return int(batch.input_ids.numel())


def _labels(batch: Any) -> int:
    return len(batch.trained_index)


# ----------------------------------------------------------------------------------------------------------------- TRL


def register_padding_free(backend: Backend) -> None:
    """Make our attention one that transformers' own models can be told to use, with the bounds TRL's collator makes."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
        cu_seq_lens_q: Tensor, max_length_q: int, scaling: float, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert attention_mask is None
        # The reference alone wants lengths on the host; reading them from a device would make it wait.
        lengths = tuple(cu_seq_lens_q.diff().tolist()) if backend is BACKENDS["sdpa"] else ()
        context = AttentionContext(cu_seq_lens_q, lengths, int(max_length_q), backend.attend)
        # Under autocast the rotary embedding leaves query and key in float32, which no kernel takes beside bfloat16.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return backend.attend(query, key, value, AttentionSpec(scaling), context).transpose(1, 2), None

    AttentionInterface.register(PADDING_FREE, attend)


class _Marks(TrainerCallback):  # type: ignore[misc]
    """Marks the clock after each step that is timed, and after the one before."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is over."""
        if state.global_step >= GATE_STEPS + WARM_STEPS:
            self.clock.mark()


@dataclass
class _Watch:
    """Losses of the gate's micro-batches, and what the first full step's held; left on the device until the end."""

    parts: int
    losses: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor | int] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def around(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """The trainer's ``compute_loss``, watched."""
        calls = 0

        def watched(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if GATE_STEPS * self.parts < calls <= (GATE_STEPS + 1) * self.parts:
                mask = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
                self.tokens.append(mask)
                self.labels.append((inputs["labels"][:, 1:] != -100).sum())
            loss = compute(model, inputs, *args, **kwargs)
            if calls <= GATE_STEPS * self.parts:
                self.losses.append(loss.detach())
            return loss

        return watched

    def step_losses(self) -> list[float]:
        """Of the gate's steps."""
        sums = torch.stack(self.losses).view(GATE_STEPS, self.parts).sum(1)
        return [float(x) for x in sums]


def trl_settings(check: Check, folder: str, steps: int, parts: int, recompute: str) -> dict[str, Any]:
    """Arguments of ``SFTConfig``: what all are told, and nothing that costs time and is not training."""
    return {
        "output_dir": folder, "max_steps": steps, "learning_rate": LR, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1],
        "adam_epsilon": EPS, "weight_decay": DECAY, "max_grad_norm": CLIP, "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused", "bf16": True, "use_cpu": check.device.type == "cpu", "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "logging_nan_inf_filter": False, "disable_tqdm": True,
        "seed": 0, "max_length": None, "per_device_train_batch_size": DEVICE_ROWS,
        "gradient_accumulation_steps": parts, "gradient_checkpointing": recompute == "full", "log_level": "error",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }  # fmt: skip


def run_trl(
    check: Check, case: StepCase, work: Work, micro_batch: int | None, recompute: str, *, liger: bool = False
) -> Session:
    """TRL's ``SFTTrainer``; ``micro_batch`` is the most tokens of a forward pass without padding, None pads 8 rows."""
    import trl
    from datasets import Dataset
    from torch.utils.data import DataLoader

    if micro_batch is None:
        groups = [list(range(i, i + DEVICE_ROWS)) for i in range(0, len(work.rows), DEVICE_ROWS)]
    else:
        groups = work.groups(micro_batch)
    steps, parts, on_gpu = GATE_STEPS + WARM_STEPS + TIMED_STEPS, len(groups), check.device.type == "cuda"
    first = len(work.rows)  # in the data set the gate's rows come after the step's
    gate = [[first + i for i in group] for group in spread(len(work.gate), parts)]
    batches = gate * GATE_STEPS + groups * (WARM_STEPS + TIMED_STEPS)
    model = random_causal_lm(case, check.device, "sdpa")
    if micro_batch is not None:
        register_padding_free(choose_backend("auto", requirements(model, check.device, torch.bfloat16)))
        model.set_attn_implementation(PADDING_FREE)
    clock, watch = StepClock(check.device), _Watch(parts)
    with tempfile.TemporaryDirectory(prefix="fsdpsft-gpu-check-") as folder:
        arguments = trl.SFTConfig(
            **trl_settings(check, folder, steps, parts, recompute),
            padding_free=micro_batch is not None, use_liger_kernel=liger,
        )  # fmt: skip
        data = Dataset.from_list([_as_trl(row) for row in chain(work.rows, work.gate)])
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=data, processing_class=tiny_tokenizer(), callbacks=[_Marks(clock)],
            peft_config=_lora_config(case) if case.lora_rank else None,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if case.lora_rank:
            fill_adapters(trainer.model)
        loader: Any = DataLoader(
            data, batch_sampler=batches, collate_fn=trainer.data_collator, num_workers=int(on_gpu), pin_memory=on_gpu
        )  # type: ignore[call-overload]
        trainer.get_train_dataloader = lambda: trainer.accelerator.prepare(loader)
        trainer.compute_loss = watch.around(trainer.compute_loss)
        trainer.train()
    remark = f"{parts} micro-batches, recomputing {recompute}"
    tokens, labels = (sum(int(x) for x in counts) for counts in (watch.tokens, watch.labels))
    return Session(watch.step_losses(), clock.seconds(), tokens, labels, check.peak_gib(), remark)


def _as_trl(row: Sample) -> dict[str, list[int]]:
    """A row in transformers' way: labels unshifted, -100 where not trained."""
    labels = np.where(row.loss_weights > 0, row.input_ids.astype(np.int64), -100)
    return {"input_ids": row.input_ids.tolist(), "labels": labels.tolist()}


def _lora_config(case: StepCase) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=case.lora_rank, lora_alpha=2 * case.lora_rank, lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- side by side


@dataclass
class Contender:
    """A trainer in one of its configurations, and what is known of it so far.

    Attributes:
        run: makes one session of a way: most tokens of a forward pass (None: padded), and what is recomputed.
        ways: still to be tried; one that did not fit in memory is not tried again.
        error: why it is out.
        most: seconds that a session may take.
        cost: seconds of its last session.
    """

    run: Callable[..., Session]
    ways: list[tuple[int | None, str]]
    most: float = 300.0
    sessions: list[Session] = field(default_factory=list)
    error: str | None = None
    cost: float = 0.0

    def take_turn(self, check: Check, case: StepCase, work: Work) -> None:
        """One session, in the first way that fits, whatever comes of it."""
        began = time.monotonic()
        while self.error is None:
            check.free()  # out of the handlers below: an error holds on to what it was about
            try:
                with as_it_was(modeling_qwen2), at_most(min(self.most, max(check.seconds_left, 60))):
                    self.sessions.append(self.run(check, case, work, *self.ways[0]))
                break
            except Exception as error:  # noqa: BLE001  # another's failure must not cost the other numbers
                if ran_out_of_memory(error) and len(self.ways) > 1:
                    print(f"    out of memory with {self.ways.pop(0)}", flush=True)
                else:
                    self.error = f"{type(error).__name__}: {str(error)[:300]}"
        self.cost = time.monotonic() - began


@contextmanager
def as_it_was(module: ModuleType) -> Iterator[None]:
    """Undo afterwards what is replaced in a module: Liger changes a family's for the whole process."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def contenders(check: Check, case: StepCase) -> dict[str, Contender]:
    """Who takes part here, ours first, then in the order in which they matter if time runs out."""
    on_gpu = check.device.type == "cuda"
    liger = on_gpu and importlib.util.find_spec("liger_kernel") is not None
    ours, free = list(case.ours), list(case.trl)
    found = {"fsdpsft": Contender(run_ours, [*ours])}
    if not missing_for_trl():
        found["TRL, no padding, our attention"] = Contender(run_trl, [*free])
        if liger:
            found["TRL, no padding, our attention, Liger"] = Contender(partial(run_trl, liger=True), [*free])
        found["TRL, stock (padded)"] = Contender(run_trl, [(None, "full")])
    if liger:
        found["fsdpsft, Liger"] = Contender(partial(run_ours, overrides=["model.use_liger=true"]), [*ours])
    if on_gpu:
        found["fsdpsft, compiled"] = Contender(partial(run_ours, overrides=["model.compile=true"]), [*ours], COMPILING)
    return found


def ran_out_of_memory(error: Exception) -> bool:
    """Whether the device had no memory left: the allocator says so itself, cuBLAS in words of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def missing_for_trl() -> list[str]:
    """Packages without which TRL's trainer cannot take part."""
    return [name for name in ("trl", "datasets", "accelerate") if importlib.util.find_spec(name) is None]


def compare(
    check: Check, case: StepCase, taking_part: dict[str, Contender], report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run all in turn, round after round, while there is time; ``report`` is told after each.

    Returns:
        The work, and a row for each contender: speed, spread and memory, or why it has none.
    """
    work = draw_work(case)
    for _ in range(ROUNDS):
        for name, contender in taking_part.items():
            expected = contender.cost or max(other.cost for other in taking_part.values())
            if contender.error is not None or check.seconds_left < expected:
                continue
            contender.take_turn(check, case, work)
            found = _table(case, work, taking_part, check.device)
            report(found)
            print(f"    {name}: {_line(found['contenders'][name])}", flush=True)
    return _table(case, work, taking_part, check.device)


def _line(row: dict[str, Any]) -> str:
    if "real_tokens_per_s" not in row:
        return str(row.get("no_speed"))
    peak = f", {row['peak_gib']:.1f} GiB" if row["peak_gib"] is not None else ""
    return f"{row['real_tokens_per_s']:,.0f} real tokens/s{peak}; {row['remark']}"


def gate_error(found: Session, expected: Session) -> float:
    """Largest relative difference of the gate's losses; infinite after other tokens, or where a loss is no number."""
    if (found.tokens, found.trained) != (expected.tokens, expected.trained):
        return float("inf")
    pairs = zip(found.losses, expected.losses, strict=True)
    differences = [abs(a - b) / abs(b) for a, b in pairs]
    return max(differences) if np.isfinite(differences).all() else float("inf")


def _table(case: StepCase, work: Work, taking_part: dict[str, Contender], device: torch.device) -> dict[str, Any]:
    """All rows; the losses of our first session are what the others' are held against."""
    first = next(iter(taking_part.values()))
    expected = first.sessions[0] if first.sessions else None
    rows = {name: _row(case, work, contender, expected, peak_flops(device)) for name, contender in taking_part.items()}
    return {
        "tokens": work.tokens, "trained": work.trained, "rows": len(work.rows), "longest": int(work.lengths.max()),
        "required_tflop": step_flops(case, work) / 1e12, "contenders": rows,
    }  # fmt: skip


def _row(
    case: StepCase, work: Work, contender: Contender, expected: Session | None, peak: float | None
) -> dict[str, Any]:
    sessions = contender.sessions
    if contender.error is not None or not sessions:
        return {"no_speed": contender.error or "no time left"}
    errors = [gate_error(session, expected) if expected else float("inf") for session in sessions]
    last = sessions[-1]
    if not max(errors) <= GATE_LIMIT:
        seen = {"losses": last.losses, "tokens": last.tokens, "trained": last.trained}
        return {"no_speed": f"another loss on the same tokens: off by {max(errors):.1e}", "gate": seen}
    seconds = [s for session in sessions for s in session.seconds]
    middle = statistics.median(seconds)
    tflops = step_flops(case, work) / middle / 1e12
    peaks = [session.peak_gib for session in sessions if session.peak_gib is not None]
    return {
        "real_tokens_per_s": work.tokens / middle, "slowest": work.tokens / max(seconds),
        "fastest": work.tokens / min(seconds), "trained_tokens_per_s": work.trained / middle, "tflops": tflops,
        "mfu": tflops * 1e12 / peak if peak else None, "peak_gib": max(peaks) if peaks else None,
        "gate_error": max(errors), "rounds": len(sessions), "timed_steps": len(seconds), "remark": last.remark,
    }  # fmt: skip
