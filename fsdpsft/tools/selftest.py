"""Prove on your own model and machine that nothing the trainer does changes the mathematics; about a minute.

    python -m fsdpsft.selftest model.partial_pretrain=path/to/model <other keys of the training> selftest.layers=2

One optimiser step's loss and gradients are computed in each of the trainer's ways and compared with plain
transformers: its own class, attention and full logits, one document at a time. The model is cut to its first layers;
without ``data.train_files`` the documents are random tokens.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from fsdpsft.checkpoint.export import Handoff
from fsdpsft.checkpoint.manager import CheckpointManager
from fsdpsft.checkpoint.state import TrainState
from fsdpsft.config.schema import Config
from fsdpsft.distributed.mesh import init_mesh
from fsdpsft.errors import ConfigError, UserError
from fsdpsft.model import lora
from fsdpsft.model.attention import AttentionContext, isolation_probe
from fsdpsft.model.sft_model import resolve_dtype
from fsdpsft.optim import build_optimizer
from fsdpsft.parallelize import ParallelModel
from fsdpsft.tools.selftest_subject import (
    Options,
    Outcome,
    Subject,
    build,
    enough_gpus,
    one_step,
    outcome,
    plain_model,
    prepare_subject,
    reference_outcome,
    together,
)
from fsdpsft.tools.terminal import Style
from fsdpsft.tools.tool_keys import run_tool
from fsdpsft.train import train_step

log = logging.getLogger(__name__)

USAGE = """python -m fsdpsft.selftest proves the trainer exact on your model and machine; keys of fsdpsft.train and:

  selftest.layers=2           first so many layers of the model
  selftest.documents=12       documents of the step that is compared
  selftest.length=192         longest of them, in tokens

"""
EXACT = 2e-4
"""Largest relative difference that float32 rounding explains; a mistake in the mathematics is far above it."""
ROUNDED = {torch.float32: EXACT, torch.bfloat16: 0.1}
"""The same for the run's own precision; gradients of random documents cancel, which leaves bfloat16 few digits."""
_WIDTH = 46


class Skip(Exception):  # noqa: N818 - not an error
    """Raised by a check that does not apply; the message is the reason."""


# --- The checks: each returns the largest difference it finds ---------------------------------------------------------


def check_isolation(subject: Subject, reference: Outcome) -> float:
    """Change one packed document and watch the others, with the run's own attention and precision."""
    _needs_packing(subject)
    settings = replace(subject.own, lora_rank=0, lora_adapter_path=None)
    model = build(subject, settings, init_mesh(subject.device), packed=True)

    def states(input_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
        with model.computing():
            return _hidden_states(model, input_ids, position_ids, context).float()

    vocabulary = model.module.head.weight.shape[0]
    return isolation_probe(states, model.attend, vocab_size=vocabulary, device=subject.device)


def isolation_tolerance(subject: Subject) -> float:
    """Nothing may move; with experts, whose products take all documents together, rounding may."""
    half = resolve_dtype(subject.own.dtype, subject.device) != torch.float32
    return (0.1 if half else 1e-5) if subject.has_experts else 0.0


def check_step(
    subject: Subject, reference: Outcome, *, padded: bool | None = None, longest: int | None = None, **changes: Any
) -> float:
    """One step of the plain settings, changed.

    Args:
        padded: a row for each document, or all in one; None: as the run does it.
        longest: how many of the longest document a micro-batch may hold; None: the whole step is one.
        changes: of the ``model`` section.
    """
    if padded is False:
        _needs_packing(subject)
    budget = None if longest is None else longest * int(subject.documents.lengths.max())
    settings = replace(subject.plain, **changes)
    return outcome(subject, settings, subject.device, padded=padded, budget=budget).difference(reference)


def check_data_parallel(subject: Subject, reference: Outcome) -> float:
    """Two processes share weights and documents."""
    return together(subject, reference, 2)


def check_ulysses(degree: int, subject: Subject, reference: Outcome) -> float:
    """So many processes share every sequence."""
    _needs_packing(subject)
    if subject.heads < degree:
        raise Skip(f"the model has {subject.heads} query heads")
    return together(subject, reference, degree, sp_size=degree)


def check_own_settings(subject: Subject, reference: Outcome) -> float:
    """One step just as the run will do it: its precision, attention, checkpointing, kernels, adapters."""
    found = outcome(subject, subject.own, subject.device)
    if subject.own.lora_adapter_path is not None:
        raise Skip("it starts from an adapter: see the row of LoRA")
    shared = {} if subject.own.uses_lora else found.gradients  # new adapters change no output, and have their own
    return Outcome(found.loss, shared).difference(reference)


def check_lora(subject: Subject, reference: Outcome) -> float:
    """Logits with adapters beside the weights, and with the adapters merged into them."""
    settings = replace(subject.plain, lora_rank=subject.own.lora_rank or 8, lora_dropout=0.0)
    model = build(subject, settings, init_mesh(subject.device), packed=subject.packed)
    causal_lm = model.module.causal_lm
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in causal_lm.named_parameters():
            if ".lora_B." in name:  # zero at first, which would prove nothing
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    merged = plain_model(subject)
    merged.load_state_dict(dict(lora.merged_state(causal_lm)), strict=False)
    untouched = _relative(_logits_of(plain_model(subject), subject), _own_logits(model, subject))
    if untouched < 10 * EXACT:
        raise ConfigError("the adapters change nothing, so that merging them proves nothing")
    return _relative(_logits_of(merged, subject), _own_logits(model, subject))


def check_export(subject: Subject, reference: Outcome) -> float:
    """Logits after an optimiser step, and those of transformers on what was exported."""
    model = build(subject, subject.plain, init_mesh(subject.device), packed=subject.packed)
    optimizer = build_optimizer(model.module, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    train_step(model, optimizer, one_step(subject, model.mesh, padded=not subject.packed), None)
    with tempfile.TemporaryDirectory(prefix="fsdpsft-selftest-") as folder:
        manager = CheckpointManager(Path(folder), Handoff(subject.folder, dtype=torch.float32))
        manager.save(model.module.causal_lm, optimizer, TrainState(step=1), contents=("model",))
        manager.close()
        again = plain_model(subject, Path(folder) / "global_step_1")
    return _relative(_logits_of(again, subject), _own_logits(model, subject))


def _hidden_states(model: ParallelModel, ids: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
    base = model.module.eval().causal_lm.base_model
    output = base(input_ids=ids, position_ids=positions, attention_context=context, use_cache=False)
    return output.last_hidden_state  # type: ignore[no-any-return]


def _needs_packing(subject: Subject) -> None:
    if not subject.packed:
        raise Skip("use_remove_padding=false")


def _longest(subject: Subject) -> Tensor:
    sample = subject.documents.sample(int(subject.documents.lengths.argmax()))
    return torch.from_numpy(sample.input_ids.astype(np.int64))[None].to(subject.device)


@torch.no_grad()
def _logits_of(model: PreTrainedModel, subject: Subject) -> Tensor:
    return model.eval()(input_ids=_longest(subject), use_cache=False).logits.float()  # type: ignore[no-any-return]


@torch.no_grad()
def _own_logits(model: ParallelModel, subject: Subject) -> Tensor:
    """Through our attention and head, on the longest document."""
    ids = _longest(subject)
    length = ids.shape[1]
    bounds = torch.tensor([0, length], dtype=torch.int32, device=ids.device)
    positions = torch.arange(length, device=ids.device)[None]
    context = AttentionContext(bounds, (length,), length, model.attend)
    return model.module.head.logits(_hidden_states(model, ids, positions, context))


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- The table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One row: its title, its function, what it tolerates, and how many processes it starts."""

    title: str
    run: Callable[[Subject, Outcome], float]
    processes: int = 1
    tolerance: Callable[[Subject], float] = lambda subject: EXACT


def _own_tolerance(subject: Subject) -> float:
    return ROUNDED[resolve_dtype(subject.own.dtype, subject.device)]


OFFLOADED: dict[str, Any] = {"enable_gradient_checkpointing": "full", "activation_offload": True}
CHECKS = (
    Check("packed documents do not see each other", check_isolation, tolerance=isolation_tolerance),
    Check("packed = one at a time", partial(check_step, padded=False)),
    Check("padded = one at a time", partial(check_step, padded=True, longest=3)),
    Check("head in chunks = full logits", partial(check_step, head_chunk_tokens=7)),
    Check("many micro-batches = one", partial(check_step, longest=1)),
    Check("checkpointing, selective", partial(check_step, enable_gradient_checkpointing="selective")),
    Check("checkpointing, full", partial(check_step, enable_gradient_checkpointing="full")),
    Check("checkpointing, offloaded to host memory", partial(check_step, **OFFLOADED)),
    Check("this run's own model settings", check_own_settings, tolerance=_own_tolerance),
    Check("data parallel, 2 processes (FSDP2)", check_data_parallel, 2),
    Check("sequence parallel, 2 processes (Ulysses)", partial(check_ulysses, 2), 2),
    Check("sequence parallel, 4 processes (Ulysses)", partial(check_ulysses, 4), 4),
    Check("LoRA merged = unmerged", check_lora),
    Check("export, loaded again", check_export),
)


@dataclass(frozen=True)
class Row:
    """The outcome of a check; ``difference`` is None where ``note`` says why it was skipped or failed."""

    title: str
    difference: float | None
    tolerance: float
    note: str = ""
    error: bool = False

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        if self.difference is None:
            return not self.error
        return self.difference <= self.tolerance  # false for NaN

    def text(self, style: Style) -> str:
        """One line."""
        numbers = " " * 10 if self.difference is None else f"{self.difference:10.1e}"
        skipped = self.difference is None and not self.error
        verdict = style.faint("skipped") if skipped else style.good("ok") if self.holds else style.bad("MISS")
        return f"  {self.title:{_WIDTH}}{numbers}{self.tolerance:11.1e}  {verdict}  {self.note}".rstrip() + "\n"


def run_check(check: Check, subject: Subject, reference: Outcome) -> Row:
    """Run one check; whatever ends it is shown in its row."""
    where = ""
    if check.processes > 1 and subject.device.type == "cuda" and not enough_gpus(subject, check.processes):
        where = f"(on CPU: {torch.cuda.device_count()} GPU here)"
    tolerance = check.tolerance(subject)
    try:
        return Row(check.title, check.run(subject, reference), tolerance, where)
    except Skip as reason:
        return Row(check.title, None, tolerance, str(reason))
    except UserError as error:
        return Row(check.title, None, tolerance, str(error), error=True)
    except ProcessException as error:
        log.debug("%s", error)
        return Row(check.title, None, tolerance, str(error).strip().splitlines()[-1], error=True)


def selftest(config: Config, options: Options) -> list[Row]:
    """Run every check on the model of ``config`` and print each row as it comes.

    Raises:
        UserError: model or data that training would refuse.
    """
    style, began = Style(colour=sys.stdout.isatty()), time.perf_counter()
    transformers_logging.disable_progress_bar()
    with _warnings_alone(), prepare_subject(config, options) as subject:
        documents = subject.documents
        sys.stdout.write(
            f"\n{style.strong('Self-test')} of {config.model.partial_pretrain}, {options.layers} layers, on "
            f"{subject.device.type}: {len(documents)} {'given' if config.data.train_files else 'random'} documents, "
            f"{subject.tokens} tokens, {int(documents.trained.sum())} trained\n\n"
            f"  {'each against plain transformers':{_WIDTH}}difference  tolerance\n"
        )
        reference = reference_outcome(subject)
        rows = []
        for check in CHECKS:
            rows.append(run_check(check, subject, reference))
            sys.stdout.write(rows[-1].text(style))
            sys.stdout.flush()
    misses = sum(not row.holds for row in rows)
    verdict = style.bad(f"{misses} of {len(rows)} checks miss.") if misses else style.good("Everything holds.")
    sys.stdout.write(f"\n{verdict} {style.faint(f'({time.perf_counter() - began:.0f} s)')}\n")
    return rows


@contextlib.contextmanager
def _warnings_alone() -> Iterator[None]:
    """Keep what builds of the model announce out of the table."""
    logger = logging.getLogger("fsdpsft")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m fsdpsft.selftest``: 0 where everything holds, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = ("--config-", ".yaml", ".yml")
    if not any("data.train_files=" in a or a.startswith(given) or a.endswith(given) for a in arguments):
        arguments = [*arguments, "data.train_files=null"]
    return run_tool(
        "selftest", USAGE, Options, lambda config, options: all(r.holds for r in selftest(config, options)), arguments
    )
