"""The report as one HTML page: no script, nothing fetched, every text of the data escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path

from fsdpsft.errors import UserError
from fsdpsft.tools.charts import curve_svg, histogram_svg
from fsdpsft.tools.facts import Piece, ShownSample, SourceFacts
from fsdpsft.tools.proof import CLAIMS, NOTES, Group, HistoryCost, Proof
from fsdpsft.tools.report import Report
from fsdpsft.tools.run_plan import RunPlan
from fsdpsft.tools.terminal import counted, number, percent, ranges, visible

EXAMPLES = 8
_RANGES = 2000
# Nothing may run or be fetched, whatever a conversation holds; escaping alone should do, this is the second lock.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_page(path: Path, report: Report) -> None:
    """Write the page; a reader sees all of it or none.

    Raises:
        UserError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(render(report), encoding="utf-8", errors="xmlcharrefreplace")
        beside.replace(path)
    except OSError as error:
        raise UserError(f"check.html={path} cannot be written: {error}") from error


def render(report: Report, now: datetime | None = None) -> str:
    """The page's text; ``now`` is the moment it names."""
    style = resources.files("fsdpsft.tools").joinpath("style.css").read_text(encoding="utf-8")
    sections = [
        _proof(report.proof),
        _samples(report.samples) if report.samples else "",
        _lengths(report) if report.histogram is not None else "",
        _sources(report.sources) if report.sources else "",
        _plan(report.plan) + _curve(report.plan) if report.plan is not None else "",
        _history(report.proof.history) if report.proof.history is not None else "",
        _template(report.template) if report.template is not None else "",
    ]
    moment = (now or datetime.now()).strftime("%-d %B %Y, %H:%M")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{'passed' if report.passed else 'failed'}: fsdpsft check</title>\n<style>\n{style}</style></head>\n"
        f'<body class="{"passed" if report.passed else "failed"}">\n{_header(report)}\n'
        + "\n".join(section for section in sections if section)
        + f"\n<footer>python -m fsdpsft.check, {moment}. This page is one file; it fetches and runs nothing.</footer>"
        "\n</body></html>\n"
    )


def _text(value: str) -> str:
    """Text of the data, made harmless: markup escaped, control characters spelt out."""
    return escape(visible(value))


def _header(report: Report) -> str:
    problems = "".join(
        f'<p class="problem">Training would not start: {_text(problem)}</p>' for problem in report.problems
    )
    return (
        f'<header><p class="over">fsdpsft check · {_text(report.model)}</p><h1>{escape(report.verdict)}</h1>{problems}'
        f"{_figures(report)}</header>"
    )


def _figures(report: Report) -> str:
    p, plan = report.proof, report.plan
    train = [source for source in report.sources if source.split == "train"]
    tokens, trained = sum(s.tokens for s in train), sum(s.trained_tokens for s in train)
    figures = [("rows proven", number(p.rows - p.failed_rows)), ("replies", number(p.turns))]
    if tokens:
        figures += [("tokens", number(tokens)), ("of them trained", percent(trained / tokens))]
    if plan is not None:
        figures += [("steps", number(plan.total_steps)), ("tokens a step", number(plan.tokens_per_step))]
    return '<dl class="figures">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in figures) + "</dl>"


# -------------------------------------------------------------------------------------------------------------- proof


def _proof(proof: Proof) -> str:
    claims = "".join(
        f'<li class="broken">{escape(claim)}: not so in {proof.errors[name].extent}</li>'
        if name in proof.errors
        else f"<li>{escape(claim)}</li>"
        for name, claim in CLAIMS.items()
    )
    whole = proof.available is None or proof.rows >= proof.available
    share = "" if whole else f" of {number(proof.available or 0)}, taken at equal distances"
    rate = f", {number(proof.rows / proof.seconds)} a second" if proof.seconds else ""
    processes = f"{proof.processes} process{'es' if proof.processes > 1 else ''}"
    finished = (
        f"<p>{number(proof.finished_tokens)} rows came as token ids; their mask is taken at its word.</p>"
        if proof.finished_tokens
        else ""
    )
    return (
        f"<section><h2>Proof</h2><p>{number(proof.rows)} rows{share}, {number(proof.turns)} replies, in "
        f'{proof.seconds:.1f} s on {processes}{rate}.</p><ul class="claims">{claims}</ul>{finished}'
        + "".join(_finding(CLAIMS[name], group, "error") for name, group in proof.errors.items())
        + "".join(_finding(NOTES[name], group, "noted") for name, group in proof.notes.items())
        + "</section>"
    )


def _finding(title: str, group: Group, kind: str) -> str:
    prefix = "Broken: " if kind == "error" else f"{number(group.count)} "
    rows = "".join(
        f'<span class="place">{_text(file)}: {ranges(found, _RANGES)}</span>'
        for file, found in group.rows.items()
        if found
    )
    shown = group.shown(EXAMPLES if kind == "error" else 2)
    examples = "".join(
        f'<li><span class="place">{_text(finding.where)}{_like_it(count)}</span>{_text(finding.text)}</li>'
        for finding, count in shown
    )
    left = group.count - sum(count for _, count in shown)
    more = f'<p class="note">and {number(left)} others</p>' if left else ""
    return f'<div class="finding {kind}"><h3>{prefix}{escape(title)}</h3>{rows}<ul>{examples}</ul>{more}</div>'


def _like_it(count: int) -> str:
    return f", and {number(count - 1)} more like it" if count > 1 else ""


# ------------------------------------------------------------------------------------------------------------ samples


def _samples(samples: Sequence[ShownSample]) -> str:
    return (
        "<section><h2>Samples</h2><p>From all over the data, token by token as they are trained on. Point at a token "
        'to see its id.</p><p class="legend"><span class="t">trained</span><span>seen, not trained</span>'
        '<span><span class="s">special</span> token</span></p>' + "".join(map(_sample, samples)) + "</section>"
    )


def _sample(sample: ShownSample) -> str:
    gap = f'<span class="gap">{number(sample.omitted)} tokens left out here</span>' if sample.omitted else ""
    tokens = _tokens(sample.pieces[: sample.gap_at]) + gap + _tokens(sample.pieces[sample.gap_at :])
    share = f"{number(sample.tokens)} tokens, {number(sample.trained_tokens)} trained"
    return (
        f"<figure><figcaption><span>{_text(sample.where)}</span><span>{share}</span></figcaption>"
        f'<pre class="tokens" dir="auto">{tokens}</pre></figure>'
    )


def _tokens(pieces: Iterable[Piece]) -> str:
    return "".join(map(_token, pieces))


def _token(piece: Piece) -> str:
    classes = " ".join(name for name, on in (("t", piece.weight > 0), ("s", piece.special)) if on)
    ids = " ".join(map(str, piece.ids)) + (f" · weight {piece.weight:g}" if piece.weight not in (0.0, 1.0) else "")
    text = _text(piece.text).replace("\n", "<i>↵</i>\n")
    return f'<span{f" class={chr(34)}{classes}{chr(34)}" if classes else ""} data-id="{ids}">{text}</span>'


# --------------------------------------------------------------------------------------------------------------- data


def _lengths(report: Report) -> str:
    assert report.histogram is not None
    h = report.histogram
    return (
        f"<section><h2>Lengths</h2><p>Samples by their number of tokens; half have up to {number(h.median)}, the "
        f"longest has {number(h.longest)}.</p>{histogram_svg(h)}</section>"
    )


def _sources(sources: Sequence[SourceFacts]) -> str:
    titles = ["source", "rows", "samples", "tokens", "trained", "median", "longest", "truncated", "left out",
              "duplicates", "no trained token", "special tokens in text"]  # fmt: skip
    rows: list[list[str | int]] = [
        [_source_name(s), s.rows, s.samples, s.tokens, percent(s.trained_share), s.median, s.longest, s.truncated,
         s.left_out, s.duplicates, s.zero_label, s.escaped]
        for s in sources
    ]  # fmt: skip
    reasons = "".join(
        f"<li>{_text(s.name)}: {number(count)} {what}, {_text(reason)}</li>"
        for s in sources
        for what, counts in (("skipped", s.skipped), ("dropped", s.dropped))
        for reason, count in counts.items()
    )
    return (
        "<section><h2>Data</h2><p>Rows as they stand in the files, samples as they are trained on. Duplicates are "
        f"equal to an earlier sample and kept.</p>{_table(titles, rows)}"
        + (f'<ul class="note">{reasons}</ul>' if reasons else "")
        + "</section>"
    )


def _source_name(source: SourceFacts) -> str:
    weight = f", weight {source.weight:g}" if source.weight != 1 else ""
    return _text(source.name) + (" (validation)" if source.split == "validation" else "") + weight


def _table(titles: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """A table that scrolls by itself where the page is narrow; strings are HTML, numbers are not."""
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: str | int) -> str:
    if isinstance(value, str):
        return f"<td>{value}</td>"
    return f'<td class="zero">{value}</td>' if value == 0 else f"<td>{number(value)}</td>"


# ---------------------------------------------------------------------------------------------------------------- run


def _plan(plan: RunPlan) -> str:
    worst = max([b.in_order_cost - 1 for b in plan.balances] + [b.cost - 1 for b in plan.balances] + [1e-9])
    rows: list[list[str | int]] = []
    for b in plan.balances:
        bars = "".join(f'<span style="width:{100 * (v - 1) / worst:.1f}%"></span>' for v in (b.cost, b.in_order_cost))
        rows.append(
            [str(b.gpus), f"{b.micro_batches:.1f}", percent(b.fill), f"{b.tokens:.3f}", f"{b.in_order_tokens:.3f}",
             f"{b.cost:.3f}", f"{b.in_order_cost:.3f}", f'<span class="even">{bars}</span>', percent(b.lockstep - 1)]
        )  # fmt: skip
    titles = ["GPUs", "passes a step", "fill", "tokens", "in order", "cost", "in order", "", "waiting"]
    kind = "packed end to end" if plan.packed else "padded"
    return (
        f"<section><h2>Packing and balance</h2><p>{counted(plan.total_steps, 'step')} of {number(plan.batch_size)} "
        f"samples, {number(plan.steps_per_epoch)} an epoch; samples are {kind}, up to {number(plan.token_budget)} "
        f"tokens a GPU and pass. The fewest trained tokens of a step are {number(plan.trained_least)}.</p>"
        f"{_table(titles, rows)}"
        '<p class="note">Fill: share of the computed tokens that are real. Tokens and cost (with attention): the '
        "busiest GPU over the mean, as planned, and if documents were given to GPUs in their order; the bars show how "
        "far the cost is above the mean, planned and in order. Waiting: time lost as GPUs wait for each other at every "
        f"pass. Means over {plan.measured_steps} steps.</p></section>"
    )


def _curve(plan: RunPlan) -> str:
    warmup = f"{counted(plan.warmup_steps, 'step')} of warm-up"
    return (
        f"<section><h2>Learning rate</h2><p>{escape(plan.schedule.capitalize())}, {warmup}.</p>"
        f"{curve_svg(plan.lr)}</section>"
    )


def _history(cost: HistoryCost) -> str:
    costs = {"as_rendered": cost.as_rendered, "per_turn": cost.per_turn}
    rows: list[list[str | int]] = [[f"data.history={name}", tokens] for name, tokens in costs.items()]
    refused = f" {number(cost.refused)} further ones can be trained with per_turn alone." if cost.refused else ""
    return (
        "<section><h2>History</h2><p>The template prints earlier turns otherwise than the model wrote them. Of the "
        f"first {number(cost.conversations)} conversations with several replies, {number(cost.rewritten)} are "
        f"rewritten.{refused}</p>{_table(['', 'tokens'], rows)}</section>"
    )


def _template(text: str) -> str:
    lines = number(len(text.splitlines()))
    return (
        "<section><h2>Chat template</h2><p>It renders the conversations, and is saved with the model.</p>"
        f"<details><summary>{lines} lines</summary><pre>{_text(text)}</pre></details></section>"
    )
