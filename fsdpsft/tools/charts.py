"""Drawings: a line of block characters for the terminal, inline SVG that stretches to any width for the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fsdpsft.tools.facts import Histogram

_LEVELS = " ▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """One character a value, as high as its share of the largest; what is above zero shows."""
    top = max(values, default=0) or 1
    return "".join(_LEVELS[max(round(8 * value / top), value > 0)] for value in values)


def histogram_svg(histogram: Histogram) -> str:
    """Bars of samples by length, with marks at the median and the 95th percentile."""
    h, most, end = histogram, max(histogram.counts), len(histogram.counts) * histogram.width
    bars = "".join(
        f'<rect x="{place + 0.05:.2f}" y="{100 - height:.2f}" width="0.9" height="{height:.2f}">'
        f"<title>{place * h.width + 1:,} to {(place + 1) * h.width:,} tokens: {count:,} samples</title></rect>"
        for place, count in enumerate(h.counts)
        for height in [max(100 * count / most, 0.8 if count else 0)]
    )
    marks = "".join(
        f'<span class="mark{" left" if share > 0.6 else ""}" style="left:{100 * share:.2f}%">{label}</span>'
        for share, label in (
            (h.median / end, f"median {h.median:,}"),
            (h.percentile_95 / end, f"95 % {h.percentile_95:,}"),
        )
    )
    drawing = f'<svg viewBox="0 0 {len(h.counts)} 100" preserveAspectRatio="none" role="img">{bars}</svg>'
    return _framed(drawing + marks, ["0", f"{end // 2:,}", f"{end:,} tokens"], f"{most:,} samples")


def curve_svg(points: Sequence[tuple[int, float]]) -> str:
    """The learning rate over the steps."""
    last, top = points[-1][0] or 1, max(rate for _, rate in points) or 1.0
    path = " ".join(f"{100 * step / last:.2f},{100 - 97 * rate / top:.2f}" for step, rate in points)
    drawing = (
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="Learning rate by step">'
        f'<polygon points="0,100 {path} 100,100"/><polyline points="{path}"/></svg>'
    )
    return _framed(drawing, ["0", f"{last // 2:,}", f"step {last:,}"], f"{top:.3g}")


def _framed(drawing: str, ticks: Sequence[str], top: str) -> str:
    """A drawing with a label at its top and ticks below; labels are HTML, so that they do not stretch."""
    below = "".join(f"<span>{escape(tick)}</span>" for tick in ticks)
    return (
        f'<div class="chart"><div class="top">{escape(top)}</div><div class="plot">{drawing}</div>'
        f'<div class="ticks">{below}</div></div>'
    )
