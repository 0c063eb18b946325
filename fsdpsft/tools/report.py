"""All that a check has found, in one place; what the terminal and the page show."""

from __future__ import annotations

from dataclasses import dataclass, field

from fsdpsft.tools.facts import Histogram, ShownSample, SourceFacts
from fsdpsft.tools.proof import Proof
from fsdpsft.tools.run_plan import RunPlan


@dataclass(frozen=True)
class Report:
    """The outcome of a check.

    Attributes:
        model, template: the model's folder and the chat template in use (None where no row needs one).
        problems: why training would refuse to start, beside single rows.
        proof: of the rows.
        sources, histogram, samples, plan: of the tokenised data; empty or None where nothing could be tokenised.
    """

    model: str
    template: str | None
    problems: list[str]
    proof: Proof
    sources: list[SourceFacts] = field(default_factory=list)
    histogram: Histogram | None = None
    samples: list[ShownSample] = field(default_factory=list)
    plan: RunPlan | None = None

    @property
    def passed(self) -> bool:
        """Whether training may start."""
        return not self.problems and self.proof.holds

    @property
    def verdict(self) -> str:
        """One sentence."""
        p = self.proof
        if self.passed:
            whole = p.available is None or p.rows >= p.available
            extent = f"All {p.rows:,} rows" if whole else f"{p.rows:,} of {p.available:,} rows were looked at: all"
            if p.finished_tokens:
                return f"{extent} can be trained on; {p.finished_tokens:,} came as token ids, with a mask of their own."
            return f"{extent} are proven: what is trained is what the model must say, and nothing else."
        faults = [f"{p.failed_rows:,} of {p.rows:,} rows fail"] if p.failed_rows else []
        faults += ["a file cannot be read"] if p.errors and not p.failed_rows else []
        faults += ["training would not start"] if self.problems else []
        return " and ".join(faults).capitalize() + "."
