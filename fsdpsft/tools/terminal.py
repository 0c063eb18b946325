"""The facts as plain text; colours only where a terminal shows them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fsdpsft.tools.charts import sparkline
from fsdpsft.tools.facts import Histogram, Piece, ShownSample, SourceFacts
from fsdpsft.tools.footprint import GIB, Footprint
from fsdpsft.tools.proof import CLAIMS, NOTES, Group, HistoryCost, Proof
from fsdpsft.tools.run_plan import RunPlan

EXAMPLES = 3
_CURVE_WIDTH = 40
_RANGES = 40
# Control characters would act on the terminal, and marks of writing direction could make a text look like another.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Style:
    """How to print: in colours, or with trained stretches in brackets."""

    colour: bool

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and text else text

    def strong(self, text: str) -> str:
        """A heading."""
        return self._paint("1", text)

    def faint(self, text: str) -> str:
        """What matters less."""
        return self._paint("2", text)

    def good(self, text: str) -> str:
        """What holds."""
        return self._paint("32", text)

    def bad(self, text: str) -> str:
        """What fails."""
        return self._paint("1;31", text)

    def trained(self, text: str) -> str:
        """Text whose tokens are trained."""
        return self._paint("30;42", text) if self.colour else f"⟦{text}⟧"

    def special(self, text: str) -> str:
        """A special token that is not trained."""
        return self._paint("36", text)


def visible(text: str) -> str:
    """``text`` with control characters spelt out; line ends stay."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def heading(title: str, style: Style) -> str:
    """A section's title."""
    return f"\n{style.strong(title)}\n"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of equal length, the first their titles; all but the first ``left`` columns are set flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines) + "\n"


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


def sources_text(sources: Sequence[SourceFacts], style: Style) -> str:
    """The table of sources and what was left out."""
    titles = ["source", "rows", "samples", "tokens", "trained", "median", "longest", "cut", "left out", "twice",
              "no label", "forged"]  # fmt: skip
    rows = [titles]
    for s in sources:
        name = s.name + " (validation)" * (s.split == "validation") + f" x {s.weight:g}" * (s.weight != 1)
        rows.append(
            [visible(name), number(s.rows), number(s.samples), number(s.tokens), percent(s.trained_share),
             number(s.median), number(s.longest), number(s.truncated), number(s.left_out), number(s.duplicates),
             number(s.zero_label), number(s.escaped)]
        )  # fmt: skip
    legend = (
        "  cut: samples truncated to data.max_length; twice: equal to an earlier one; no label: without a trained\n"
        "  token; forged: with special-token text in the content, spelt as ordinary text\n"
    )
    reasons = "".join(
        f"  {visible(s.name)}: {count:,} {what}: {visible(reason)}\n"
        for s in sources
        for what, counts in (("skipped", s.skipped), ("dropped", s.dropped))
        for reason, count in counts.items()
    )
    return heading("Data", style) + table(rows) + style.faint(legend) + reasons


def histogram_text(histogram: Histogram, style: Style) -> str:
    """Samples by length, in one line."""
    h = histogram
    caption = f"median {h.median:,}, 95 % up to {h.percentile_95:,}, longest {h.longest:,} tokens"
    return heading("Lengths", style) + f"  {sparkline(h.counts)}  {style.faint(caption)}\n"


def plan_text(plan: RunPlan, style: Style) -> str:
    """Steps, packing and balance."""
    head = (
        f"  {counted(plan.total_steps, 'step')} of {number(plan.batch_size)} samples, {number(plan.steps_per_epoch)} "
        f"an epoch ({counted(plan.epochs, 'epoch')} of {number(plan.samples)} samples)\n"
        f"  {number(plan.tokens)} tokens, {number(plan.trained_tokens)} of them trained; "
        f"{number(plan.tokens_per_step)} a step, at least {number(plan.trained_least)} trained\n"
        f"  {'packed' if plan.packed else 'padded'}, up to {number(plan.token_budget)} tokens a GPU and pass\n\n"
    )
    rows = [["GPUs", "passes", "fill", "tokens", "cost", "in order: tokens", "cost", "waiting", "idle"]]
    for b in plan.balances:
        rows.append(
            [str(b.gpus), f"{b.micro_batches:.1f}", percent(b.fill), f"{b.tokens:.3f}", f"{b.cost:.3f}",
             f"{b.in_order_tokens:.3f}", f"{b.in_order_cost:.3f}", percent(b.lockstep - 1), f"{b.idle:.1f}"]
        )  # fmt: skip
    legend = (
        "  passes: forward passes of a GPU in a step; fill: share of computed tokens that are real; tokens, cost: the\n"
        "  busiest GPU over the mean, by tokens and with attention, as planned and in the order of the data; waiting:\n"
        f"  time lost because GPUs wait for each other at every pass. Means over {plan.measured_steps} steps.\n"
    )
    return heading("Planned run", style) + head + table(rows, left=0) + style.faint(legend)


def curve_text(plan: RunPlan, style: Style) -> str:
    """The learning rate over the steps, in one line."""
    rates = [plan.lr[round(x * (len(plan.lr) - 1) / (_CURVE_WIDTH - 1))][1] for x in range(_CURVE_WIDTH)]
    caption = f"{plan.schedule} to {max(rates):.2e}, {counted(plan.warmup_steps, 'step')} of warm-up"
    return heading("Learning rate", style) + f"  {sparkline(rates)}  {style.faint(caption)}\n"


def footprint_text(footprint: Footprint, style: Style) -> str:
    """Memory, FLOPs, time."""
    f = footprint
    rows = [["memory of a GPU, estimated", ""]]
    rows += [[name, pretty_bytes(size)] for name, size in f.memory.items()]
    rows += [["together", pretty_bytes(sum(f.memory.values()))], ["activation checkpointing", f.checkpointing]]
    rows += [[f"in host memory for each GPU: {name}", pretty_bytes(size)] for name, size in f.host.items()]
    head = f"  {number(f.parameters)} parameters, {number(f.trained_parameters)} of them trained\n"
    tail = (
        f"  {f.flops:.3g} FLOPs in all: {pretty_time(f.seconds)} on {f.gpus} x {f.gpu} at {100 * f.mfu:g} % of their "
        "bfloat16 peak\n"
    )
    note = "  Counted from config.json for standard blocks; CUDA's context, NCCL and fragmentation come on top.\n"
    return heading(f"On {f.gpus} x {f.gpu}", style) + head + table(rows) + tail + style.faint(note)


def history_text(cost: HistoryCost, style: Style) -> str:
    """What each way to treat history costs."""
    ratio = f" ({cost.per_turn / cost.as_rendered:.2f} times as many)" if cost.as_rendered else ""
    refused = f"  {number(cost.refused)} further ones can be trained with per_turn alone\n" if cost.refused else ""
    return heading("History", style) + (
        "  The template prints earlier turns otherwise than the model wrote them. Of the first "
        f"{number(cost.conversations)} conversations\n  with several replies, {number(cost.rewritten)} are rewritten; "
        "their tokens:\n"
        f"  data.history=as_rendered {number(cost.as_rendered)}, data.history=per_turn {number(cost.per_turn)}{ratio}\n"
        + refused
    )


def sample_text(sample: ShownSample, style: Style) -> str:
    """A sample with its trained tokens marked."""
    share = f"{number(sample.tokens)} tokens, {number(sample.trained_tokens)} trained"
    first = _marked(sample.pieces[: sample.gap_at], style)
    text = first + (f"\n… {number(sample.omitted)} tokens …\n" if sample.omitted else "")
    text += _marked(sample.pieces[sample.gap_at :], style)
    body = "\n".join("  │ " + line for line in text.split("\n"))
    return f"  {style.strong(visible(sample.where))}  {style.faint(share)}\n{body}\n"


def samples_text(samples: Sequence[ShownSample], style: Style) -> str:
    """The samples, and how to read them."""
    mark = "on green" if style.colour else "in ⟦brackets⟧"
    note = style.faint(f"  From all over the data, as trained on; trained tokens {mark}.") + "\n\n"
    return heading("Samples", style) + note + "\n".join(sample_text(sample, style) for sample in samples)


def _marked(pieces: Iterable[Piece], style: Style) -> str:
    """Text of the pieces, stretch by stretch; a line end within a stretch keeps its mark on both sides."""
    stretches: list[tuple[str, str]] = []
    for piece in pieces:
        kind = "trained" if piece.weight > 0 else "special" if piece.special else "plain"
        if stretches and stretches[-1][0] == kind:
            stretches[-1] = (kind, stretches[-1][1] + piece.text)
        else:
            stretches.append((kind, piece.text))
    paint: dict[str, Callable[[str], str]] = {"trained": style.trained, "special": style.special, "plain": str}
    if not style.colour:
        return "".join(paint[kind](visible(text)) for kind, text in stretches)
    return "".join("\n".join(paint[kind](line) for line in visible(text).split("\n")) for kind, text in stretches)


def proof_text(proof: Proof, style: Style) -> str:
    """What is proven, what is not, and where."""
    lines = []
    for name, claim in CLAIMS.items():
        group = proof.errors.get(name)
        if group is None:
            lines.append(f"  {style.good('✓')} {claim}")
        else:
            lines += [f"  {style.bad('✗')} {claim}: not so in {group.extent}", *_named(group, style)]
    for name, group in proof.notes.items():
        lines += [f"  · {number(group.count)} {NOTES[name]}", *(_named(group, style) if name == "skipped" else [])]
    if proof.finished_tokens:
        lines.append(f"  · {number(proof.finished_tokens)} rows came as token ids; their mask is taken at its word")
    rate = f"{number(proof.rows / proof.seconds)} rows/s" if proof.seconds else ""
    whole = proof.available is None or proof.rows >= proof.available
    share = "all of them" if whole else f"of {number(proof.available or 0)}, at equal distances; check.rows=all: all"
    foot = (
        f"  {number(proof.rows)} rows ({share}), {number(proof.turns)} replies, in {proof.seconds:.1f} s on "
        f"{proof.processes} {'process' if proof.processes == 1 else 'processes'}, {rate}"
    )
    return heading("Proof", style) + "\n".join([*lines, style.faint(foot)]) + "\n"


def _named(group: Group, style: Style) -> list[str]:
    """The rows of a group, all of them, and a few findings in full."""
    lines = [f"      {visible(file)}: {ranges(rows)}" for file, rows in group.rows.items() if rows]
    shown = group.shown(EXAMPLES)
    for finding, count in shown:
        like_it = f" (and {number(count - 1)} more like it)" if count > 1 else ""
        lines.append(style.faint(f"      {visible(finding.where)}: {visible(finding.text)}{like_it}"))
    if left := group.count - sum(count for _, count in shown):
        lines.append(style.faint(f"      and {number(left)} others"))
    return lines


def ranges(numbers: Sequence[int], most: int = _RANGES) -> str:
    """Numbers of rows as ``rows 0-7, 9, 12``; of very many runs the first."""
    runs: list[tuple[int, int]] = []
    for value in sorted(numbers):
        if runs and value == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    named = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:most])
    left = sum(b - a + 1 for a, b in runs[most:])
    return (
        ("row " if len(numbers) == 1 else "rows ")
        + named
        + (f" and {left:,} more, the last {runs[-1][1]}" if left else "")
    )
