"""All that a check or a plan has found, in the form that the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fsdpsft.tools.charts import curve_svg, histogram_svg, sparkline
from fsdpsft.tools.facts import Histogram, ShownSample, SourceFacts
from fsdpsft.tools.footprint import GIB, Footprint
from fsdpsft.tools.proof import Group, Proof
from fsdpsft.tools.run_plan import RunPlan

_CURVE_WIDTH = 40
CLAIMS = {
    "refused": "every row can be used",
    "prompt_ids": "prompt ids equal the generation prompt's ids",
    "prefix": "prefixes are stable: a turn reads the same at inference",
    "stop_not_trained": "the stop token of every reply is trained",
    "stop_not_in_eos": "the stop token is in generation_config.eos_token_id",
    "foreign_content": "no text of user, system or tool is trained",
    "text_missing": "the trained ids decode to the assistant's text",
}
"""What is proven, by the name of the finding that breaks it."""

NOTES = {
    "skipped": "rows left out (data.on_bad_row=skip)",
    "history_rewritten": "replies trained after another prompt than inference gives: the template rewrites earlier "
    "turns (data.history=auto trains each after its own)",
    "escaped": "conversations with special-token text in their content, spelt as ordinary text; apply_chat_template "
    "would make special tokens of it, so their prompts are not compared with its",
    "stop_not_in_eos": "replies whose stop token the model's generation_config lacks, as data.chat_template brings "
    "another; the exported model's will have it",
    "nothing_trained": "samples without a trained token",
    "left_out": "parts of rows that the template does not print, so that nothing is learnt from them (data.may_drop)",
}
"""What breaks no rule and is worth knowing, by the finding's name."""

_LIMITS = {
    "refused": ("skipped",),
    "prompt_ids": ("history_rewritten", "escaped"),
    "prefix": ("history_rewritten",),
    "stop_not_in_eos": ("stop_not_in_eos",),
    "text_missing": ("left_out",),
}
"""Claim -> notes that take something from it."""
_UNPROVEN = {
    "history_rewritten": "replies are trained after another prompt than inference gives",
    "left_out": "parts of rows are not printed by the template",
}
"""Notes with which what is trained is not all, or not exactly, what the model must say."""


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        text: sentences above the table.
        table: rows of cells, the titles first; empty for none.
        notes: explanations below it.
        curve: a drawing in one line, for the terminal.
        chart: the same as HTML, for the page.
    """

    title: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    curve: str = ""
    chart: str = ""


@dataclass(frozen=True)
class Claim:
    """Something to prove: whether it holds, for what it does not, and what was found."""

    text: str
    broken: Group | None
    limits: str

    @property
    def state(self) -> str:
        """``broken``, ``limited`` or ``holds``."""
        return "broken" if self.broken else "limited" if self.limits else "holds"


@dataclass(frozen=True)
class Report:
    """The outcome of a check.

    Attributes:
        model, template: the model's folder and the chat template in use (None where no row needs one).
        problems: why training would refuse to start, beside single rows.
        proof: of the rows.
        remarks: on the data, a line each.
        sources, histogram, samples, plan: of the tokenised data; empty or None where nothing could be tokenised.
    """

    model: str
    template: str | None
    problems: list[str]
    proof: Proof
    remarks: list[str] = field(default_factory=list)
    sources: list[SourceFacts] = field(default_factory=list)
    histogram: Histogram | None = None
    samples: list[ShownSample] = field(default_factory=list)
    plan: RunPlan | None = None

    @property
    def passed(self) -> bool:
        """Whether training may start."""
        return not self.problems and self.proof.holds

    @property
    def state(self) -> str:
        """``passed``, ``limited`` (it may start, but not everything is proven) or ``failed``."""
        return "failed" if not self.passed else "limited" if self._unproven else "passed"

    @property
    def _unproven(self) -> list[str]:
        notes = self.proof.notes
        return [f"{notes[name].count:,} {what}" for name, what in _UNPROVEN.items() if name in notes]

    @property
    def verdict(self) -> str:
        """One sentence."""
        p = self.proof
        if self.passed:
            skipped = p.notes["skipped"].count if "skipped" in p.notes else 0
            looked_at = f"{p.rows:,} of {p.available:,} rows were looked at: all"
            extent = f"All {p.rows:,} rows" if p.is_whole else looked_at
            extent += f" but {skipped:,} that are left out" if skipped else ""
            if self._unproven:
                return f"{extent} can be trained on, with limits: {' and '.join(self._unproven)}."
            if p.finished_tokens:
                return f"{extent} can be trained on; {p.finished_tokens:,} came as token ids, with a mask of their own."
            return f"{extent} are proven: what is trained is what the model must say, and nothing else."
        faults = [f"{p.failed_rows:,} of {p.rows:,} rows fail"] if p.failed_rows else []
        faults += ["a file cannot be read"] if p.errors and not p.failed_rows else []
        faults += ["training would not start"] if self.problems else []
        return " and ".join(faults).capitalize() + "."

    @property
    def figures(self) -> list[tuple[str, str]]:
        """The numbers to see first."""
        p, plan = self.proof, self.plan
        train = [source.counts for source in self.sources if source.split == "train"]
        tokens, trained = sum(counts.tokens for counts in train), sum(counts.trained_tokens for counts in train)
        figures = [("rows without fault", number(p.rows - p.failed_rows)), ("replies", number(p.turns))]
        if tokens:
            figures += [("tokens", number(tokens)), ("of them trained", percent(trained / tokens))]
        if plan is not None:
            figures += [("steps", number(plan.total_steps)), ("tokens a step", number(plan.tokens_per_step))]
        return figures

    @property
    def sections(self) -> list[Section]:
        """The tables, in order."""
        found = [sources_section(self.sources, self.remarks)] if self.sources else []
        found += [lengths_section(self.histogram)] if self.histogram is not None else []
        found += [plan_section(self.plan), rate_section(self.plan)] if self.plan is not None else []
        return found


# -------------------------------------------------------------------------------------------------------------- proof


def claims(proof: Proof) -> list[Claim]:
    """Each claim and its outcome."""
    return [Claim(text, proof.errors.get(name), _limits(proof, name)) for name, text in CLAIMS.items()]


def _limits(proof: Proof, claim: str) -> str:
    found = [proof.notes[note].extent for note in _LIMITS.get(claim, ()) if note in proof.notes]
    return f"not for {' and '.join(found)}, see below" if found else ""


def notes(proof: Proof) -> list[tuple[str, str, Group]]:
    """(name, text, findings) of what breaks no rule and is worth knowing."""
    return [(name, f"{number(group.count)} {NOTES[name]}", group) for name, group in proof.notes.items()]


def effort(proof: Proof) -> str:
    """How much was looked at, and what it took."""
    share = "all of them" if proof.is_whole else f"of {number(proof.available or 0)}, at equal distances"
    rate = f", {number(proof.rows / proof.seconds)} a second" if proof.seconds else ""
    return (
        f"{number(proof.rows)} rows ({share}), {number(proof.turns)} replies, in {proof.seconds:.1f} s on "
        f"{proof.processes} process{'es' * (proof.processes > 1)}{rate}"
        + ("" if proof.is_whole else "; check.rows=all looks at all")
    )


def places(group: Group, most: int) -> Iterator[str]:
    """Every file and its rows; of very many runs of rows the first ``most``."""
    yield from (f"{file}: {ranges(rows, most)}" for file, rows in group.rows.items() if rows)


def examples(group: Group, most: int) -> tuple[list[tuple[str, str]], int]:
    """(place, text) of the first findings, one of each kind, and the number of findings of other kinds."""
    shown = list(group.examples.values())[:most]
    like_it = [f" (and {number(count - 1)} more like it)" if count > 1 else "" for _, count in shown]
    left = group.count - sum(count for _, count in shown)
    return [(finding.where, finding.text + more) for (finding, _), more in zip(shown, like_it, strict=True)], left


def ranges(numbers: Sequence[int], most: int) -> str:
    """Numbers of rows as ``rows 0-7, 9, 12``; of very many runs the first."""
    runs: list[tuple[int, int]] = []
    for value in sorted(numbers):
        if runs and value == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    named = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:most])
    left = sum(b - a + 1 for a, b in runs[most:])
    more = f" and {left:,} more, the last {runs[-1][1]}" if left else ""
    return f"row{'s' * (len(numbers) != 1)} {named}{more}"


# ----------------------------------------------------------------------------------------------------------- sections


def sources_section(sources: Sequence[SourceFacts], remarks: Sequence[str] = ()) -> Section:
    """The sources, and what was left out of them."""
    titles = ["source", "rows", "samples", "tokens", "trained", "median", "longest"]
    table = [[*titles, "cut", "left out", "twice", "no label", "forged"]]
    reasons = []
    for s in sources:
        c, left_out = s.counts, s.left_out
        name = s.name + " (validation)" * (s.split == "validation") + f" x {s.weight:g}" * (s.weight != 1)
        numbers = (s.median, s.longest, c.truncated, sum(left_out.values()), c.duplicates, s.untrained, c.escaped)
        counts = [number(c.rows), number(c.samples), number(c.tokens), percent(s.trained_share)]
        table.append([name, *counts, *map(number, numbers)])
        reasons += [f"{s.name}: {count:,} skipped: {reason}" for reason, count in c.skipped.items()]
        reasons += [f"{s.name}: {count:,} dropped: {reason}" for reason, count in c.dropped.items()]
    legend = (
        "cut: samples truncated to data.max_length; twice: equal to an earlier one, and kept; no label: without a "
        "trained token; forged: with special-token text in the content, spelt as ordinary text"
    )
    return Section("Data", (), table, [legend, *reasons, *remarks])


def lengths_section(histogram: Histogram) -> Section:
    """Samples by length."""
    h = histogram
    text = f"half of the samples have up to {h.median:,} tokens, 95 % up to {h.percentile_95:,}"
    return Section("Lengths", [f"{text}, the longest {h.longest:,}"], curve=sparkline(h.counts), chart=histogram_svg(h))


def plan_section(plan: RunPlan) -> Section:
    """Steps, packing and balance."""
    text = [
        f"{counted(plan.total_steps, 'step')} of {number(plan.batch_size)} samples, {number(plan.steps_per_epoch)} "
        f"an epoch ({counted(plan.epochs, 'epoch')} of {number(plan.samples)} samples)",
        f"{number(plan.tokens)} tokens, {number(plan.trained_tokens)} of them trained; "
        f"{number(plan.tokens_per_step)} a step, at least {number(plan.trained_least)} trained",
        f"{'packed' if plan.packed else 'padded'}, up to {number(plan.token_budget)} tokens a GPU and pass",
    ]
    table = [["GPUs", "passes", "fill", "tokens", "cost", "in order: tokens", "cost", "waiting", "idle"]]
    for b in plan.balances:
        shares = [f"{value:.3f}" for value in (b.tokens, b.cost, b.in_order_tokens, b.in_order_cost)]
        passes = [str(b.gpus), f"{b.micro_batches:.1f}", percent(b.fill)]
        table.append([*passes, *shares, percent(b.lockstep - 1), f"{b.idle:.1f}"])
    legend = (
        "passes: forward passes of a GPU in a step; fill: share of computed tokens that are real; tokens, cost: the "
        "busiest GPU over the mean, by tokens and with attention, as planned and in the order of the data; waiting: "
        f"time lost as GPUs wait for each other at every pass. Means over {plan.measured_steps} steps."
    )
    return Section("Planned run", text, table, [legend])


def rate_section(plan: RunPlan) -> Section:
    """The learning rate over the steps."""
    rates = [rate for _, rate in plan.lr]
    warmup = f"{counted(plan.warmup_steps, 'step')} of warm-up"
    text = f"{plan.schedule}, {warmup}, up to {max(rates):.3g}, {rates[-1]:.3g} at the end"
    points = [rates[round(x * (len(rates) - 1) / (_CURVE_WIDTH - 1))] for x in range(_CURVE_WIDTH)]
    return Section("Learning rate", [text], curve=sparkline(points), chart=curve_svg(plan.lr))


def footprint_section(footprint: Footprint) -> Section:
    """Memory, FLOPs, time."""
    f = footprint
    table = [["memory of a GPU, estimated", ""], *([name, pretty_bytes(size)] for name, size in f.memory.items())]
    table += [["together", pretty_bytes(sum(f.memory.values()))], ["activation checkpointing", f.checkpointing]]
    table += [[f"in host memory for each GPU: {name}", pretty_bytes(size)] for name, size in f.host.items()]
    text = [
        f"{number(f.parameters)} parameters, {number(f.trained_parameters)} of them trained",
        f"{f.flops:.3g} FLOPs in all: {pretty_time(f.seconds)} on {f.gpus} x {f.gpu} at {100 * f.mfu:g} % of their "
        "bfloat16 peak",
    ]
    note = "Counted from config.json for standard blocks; CUDA's context, NCCL and fragmentation are not counted."
    return Section(f"On {f.gpus} x {f.gpu}", text, table, [note])


# -------------------------------------------------------------------------------------------------------------- words


def number(value: float) -> str:
    """A count with separators."""
    return f"{value:,.0f}"


def counted(value: float, unit: str) -> str:
    """A count and its unit, in the plural where it is not one."""
    figure = f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
    return f"{figure} {unit}{'s' * (value != 1)}"


def percent(share: float) -> str:
    """A share."""
    return f"{100 * share:.1f} %"


def pretty_bytes(size: float) -> str:
    """GiB, or MiB where that is less than a tenth of one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def pretty_time(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
