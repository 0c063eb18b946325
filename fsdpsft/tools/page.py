"""A report as one HTML page: no script, nothing fetched, every text of the data escaped."""

from __future__ import annotations

from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fsdpsft.errors import UserError
from fsdpsft.tools.facts import Piece
from fsdpsft.tools.report import Report, claims, effort, examples, notes, number, places
from fsdpsft.tools.terminal import visible

_EXAMPLES, _NOTED, _RANGES = 8, 2, 2000


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
    files = resources.files("fsdpsft.tools")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "ids": _ids, "classes": _classes, "line_ends": _line_ends}
    proof = report.proof
    findings = [
        (f"Broken: {claim.text}", "error", list(places(claim.broken, _RANGES)), *examples(claim.broken, _EXAMPLES))
        for claim in claims(proof)
        if claim.broken
    ]
    findings += [
        (text, "noted", list(places(group, _RANGES)), *examples(group, _NOTED)) for _, text, group in notes(proof)
    ]
    return environment.from_string(files.joinpath("page.html.j2").read_text(encoding="utf-8")).render(
        report=report,
        style=Markup(files.joinpath("style.css").read_text(encoding="utf-8")),
        claims=claims(proof),
        effort=effort(proof),
        findings=findings,
        moment=(now or datetime.now()).strftime("%-d %B %Y, %H:%M"),
    )


def _finalize(value: Any) -> Any:
    """Control characters spelt out in every text of the data; Jinja escapes it afterwards."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _ids(piece: Piece) -> str:
    weight = f" · weight {piece.weight:g}" if piece.weight not in (0.0, 1.0) else ""
    return " ".join(map(str, piece.ids)) + weight


def _classes(piece: Piece) -> str:
    return " ".join(name for name, on in (("t", piece.weight > 0), ("s", piece.special)) if on)


def _line_ends(text: str) -> Markup:
    """The text of a token, its line ends marked."""
    return Markup("<i>↵</i>\n").join(Markup.escape(line) for line in visible(text).split("\n"))
