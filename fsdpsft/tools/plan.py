"""What a run will do, before any GPU is asked for: steps, packing, balance, learning rate, memory, FLOPs.

python -m fsdpsft.plan <the keys of the training> plan.world_size=8 plan.gpu=H100
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fsdpsft.config.schema import Config
from fsdpsft.errors import ConfigError
from fsdpsft.metrics import GPUS
from fsdpsft.prepare import prepare_data
from fsdpsft.tools.facts import length_histogram, source_facts
from fsdpsft.tools.footprint import Footprint, estimate
from fsdpsft.tools.report import footprint_section, lengths_section, plan_section, rate_section, sources_section
from fsdpsft.tools.run_plan import RunPlan, plan_run
from fsdpsft.tools.terminal import Style, section_text
from fsdpsft.tools.tool_keys import run_tool, whole_number

USAGE = f"""python -m fsdpsft.plan shows what a run will do; it takes the keys of fsdpsft.train and:

  plan.world_size=8           GPUs, all nodes together
  plan.gpu=H100               their kind: {", ".join(GPUS)}
  plan.mfu=0.4                share of their bfloat16 peak to count on

"""


@dataclass(frozen=True)
class Options:
    """The tool's own settings; see ``USAGE``."""

    world_size: int = 8
    gpu: str = "H100"
    mfu: float = 0.4

    @classmethod
    def parse(cls, values: dict[str, str]) -> Options:
        """Read the values of ``plan.*``.

        Raises:
            ConfigError: one of them is not usable.
        """
        given = {"world_size": str(cls.world_size), "gpu": cls.gpu, "mfu": str(cls.mfu), **values}
        world_size = whole_number("plan.world_size", given["world_size"], least=1)
        gpu, share = given["gpu"], given["mfu"]
        if gpu not in GPUS:
            raise ConfigError(f"plan.gpu={gpu} is not one of {', '.join(GPUS)}")
        try:
            mfu = float(share)
        except ValueError as error:
            raise ConfigError(f"plan.mfu={share} is not a number") from error
        if not 0 < mfu <= 1:
            raise ConfigError(f"plan.mfu={share} must be above 0 and at most 1")
        return cls(world_size, gpu, mfu)


def plan(config: Config, options: Options) -> tuple[RunPlan, Footprint]:
    """Tokenise what is not tokenised yet, plan the run of ``config`` and print the plan.

    Raises:
        UserError: settings or data that training would refuse.
    """
    data = prepare_data(config)
    run = plan_run(config, data, [options.world_size])
    footprint = estimate(config, data, run, gpus=options.world_size, gpu=options.gpu, mfu=options.mfu)
    style = Style(colour=sys.stdout.isatty())
    sources = source_facts(data.train, "train", [source.weight for source in data.sources])
    sections = [sources_section(sources), lengths_section(length_histogram(data.train.lengths))]
    for section in [*sections, plan_section(run), rate_section(run), footprint_section(footprint)]:
        sys.stdout.write(section_text(section, style))
    return run, footprint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m fsdpsft.plan``: 0, or 1 after a user's mistake."""
    return run_tool("plan", USAGE, Options, plan, arguments)
