"""A report as plain text; colours only where a terminal shows them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fsdpsft.tools.facts import Piece, ShownSample
from fsdpsft.tools.proof import Group, Proof
from fsdpsft.tools.report import Section, claims, effort, examples, notes, number, places

_WIDTH, _EXAMPLES, _RANGES = 116, 3, 40
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


def _heading(title: str, style: Style) -> str:
    return f"\n{style.strong(visible(title))}\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, the first their titles; all but the first column are set flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(["", row[0].ljust(widths[0]), *cells[1:]]).rstrip() + "\n")
    return "".join(lines)


def section_text(section: Section, style: Style) -> str:
    """A section without its drawing."""
    curve = [section.curve] if section.curve else []
    text = "".join(f"  {visible(line)}\n" for line in [*curve, *section.text])
    if section.table:
        text += table([list(map(visible, row)) for row in section.table])
    for note in section.notes:
        lines = textwrap.wrap(visible(note), _WIDTH, break_on_hyphens=False)
        text += "".join(style.faint(f"  {line}") + "\n" for line in lines)
    return _heading(section.title, style) + text


def _sample_text(sample: ShownSample, style: Style) -> str:
    """A sample with its trained tokens marked."""
    share = f"{number(sample.tokens)} tokens, {number(sample.trained_tokens)} trained"
    text = f"… {number(sample.opening_tokens)} tokens before …\n" if sample.opening_tokens else ""
    text += _marked(sample.pieces[: sample.gap_at], style)
    text += f"\n… {number(sample.omitted)} tokens …\n" if sample.omitted else ""
    text += _marked(sample.pieces[sample.gap_at :], style)
    body = "\n".join("  │ " + line for line in text.split("\n"))
    return f"  {style.strong(visible(sample.where))}  {style.faint(share)}\n{body}\n"


def samples_text(samples: Sequence[ShownSample], style: Style) -> str:
    """The samples, and how to read them."""
    mark = "on green" if style.colour else "in ⟦brackets⟧"
    note = style.faint(f"  From all over the data, as trained on; trained tokens {mark}.") + "\n\n"
    return _heading("Samples", style) + note + "\n".join(_sample_text(sample, style) for sample in samples)


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
    marks = {"holds": style.good("✓"), "limited": "·", "broken": style.bad("✗")}
    lines = []
    for claim in claims(proof):
        extent = f"fails in {claim.broken.extent}" if claim.broken else claim.limits
        lines.append(f"  {marks[claim.state]} {claim.text}" + (f": {extent}" if extent else ""))
        lines += _named(claim.broken, style) if claim.broken else []
    for name, text, group in notes(proof):
        lines += [f"  · {text}", *(_named(group, style) if name == "skipped" else [])]
    if proof.finished_tokens:
        lines.append(f"  · {number(proof.finished_tokens)} rows came as token ids; their mask is not checked")
    return _heading("Proof", style) + "\n".join([*lines, style.faint(f"  {effort(proof)}")]) + "\n"


def _named(group: Group, style: Style) -> list[str]:
    """The rows of a group, all of them, and a few findings in full."""
    shown, left = examples(group, _EXAMPLES)
    lines = [f"      {visible(place)}" for place in places(group, _RANGES)]
    lines += [style.faint(f"      {visible(where)}: {visible(text)}") for where, text in shown]
    return lines + ([style.faint(f"      and {number(left)} others")] if left else [])
