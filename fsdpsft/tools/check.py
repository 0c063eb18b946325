"""Prove what a training would train on, before it does: no GPU, no process group, every faulty row named.

    python -m fsdpsft.check <the keys of the training> check.html=report.html

Exit code 0 where everything holds, 1 where anything does not.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fsdpsft.config.schema import Config
from fsdpsft.data.batches.store import TokenStore
from fsdpsft.data.batches.store_parts import BuildOptions
from fsdpsft.data.mask.given import remarks
from fsdpsft.data.rows.conversation import unused_columns
from fsdpsft.data.rows.sources import Source, resolve_sources
from fsdpsft.data.workers import usable_cores
from fsdpsft.errors import ConfigError, DataError, and_more
from fsdpsft.model.load import load_tokenizer, resolve_model_path
from fsdpsft.prepare import TrainingData, generation_eos, make_encoder, prepare_data
from fsdpsft.tools import terminal
from fsdpsft.tools.facts import ShownSample, length_histogram, show_sample, source_facts
from fsdpsft.tools.page import write_page
from fsdpsft.tools.proof import Part, prove
from fsdpsft.tools.report import Report
from fsdpsft.tools.run_plan import plan_run
from fsdpsft.tools.tool_keys import run_tool, whole_number

log = logging.getLogger(__name__)

DEFAULT_ROWS = 100_000
USAGE = f"""python -m fsdpsft.check proves what would be trained; it takes the keys of fsdpsft.train and:

  check.html=FILE             write the report as one page, too
  check.rows={DEFAULT_ROWS}           rows to prove, at equal distances; all: every row
  check.samples=3             conversations to show

"""
_SHOWN_TOKENS = 3000
_SHOWN_IN_TERMINAL = 400
_SHOWN_COLUMNS = 20


@dataclass(frozen=True)
class Options:
    """The tool's own settings.

    Attributes:
        html: where the page goes; None for none.
        rows: most rows to prove; None for all.
        samples: conversations to show.
    """

    html: Path | None = None
    rows: int | None = DEFAULT_ROWS
    samples: int = 3

    @classmethod
    def parse(cls, values: dict[str, str]) -> Options:
        """Read the values of ``check.*``.

        Raises:
            ConfigError: one of them is not usable.
        """
        html = _page_path(values["html"]) if "html" in values else None
        rows = values["rows"] if "rows" in values else str(DEFAULT_ROWS)
        samples = values["samples"] if "samples" in values else str(cls.samples)
        limit = None if rows == "all" else whole_number("check.rows", rows, least=1)
        return cls(html, limit, whole_number("check.samples", samples, least=0))


def _page_path(name: str) -> Path:
    """The file to write, behind links.

    Raises:
        ConfigError: it cannot be written, or is something else than a file, which would be lost by writing it.
    """
    path = Path(os.path.realpath(os.path.expanduser(name)))  # noqa: PTH111 - leaves an unknown user's ~name as it is
    try:
        other = path.exists() and not path.is_file()
        writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    except (OSError, ValueError):  # too long, or a null character in it
        other = writable = False
    if other:
        raise ConfigError(f"check.html={name} is not a file but a folder, device or pipe; name a file")
    if not writable:
        raise ConfigError(f"check.html={name} cannot be written: name a file in a folder that exists")
    return path


def check(config: Config, options: Options) -> Report:
    """Examine the data of a run; looks at all rows whatever it finds.

    Raises:
        UserError: there is nothing to examine: no files, no tokenizer, no usable template.
    """
    parts = _parts(config)
    data, problems = _tokenised(config)
    stores = [] if data is None else [s for s in (data.train, data.validation) if s is not None]
    available = sum(store.stats["rows"] for store in stores) if stores else None
    log.info("proving the masks of %s", _extent(options.rows, available))
    processes = config.data.num_workers or usable_cores()
    proof = prove(parts, limit=options.rows, available=available, processes=processes)
    encoder = parts[0].encoder
    template = encoder.template.text if encoder.needs_template else None
    report = Report(config.model.partial_pretrain, template, problems, proof, _unused(parts))
    return report if data is None else _with_facts(report, config, data, options)


def _unused(parts: Sequence[Part]) -> list[str]:
    """The columns that nothing reads, a line for each source."""
    lines = []
    for source, encoder in ((part.source, part.encoder) for part in parts):
        if columns := unused_columns(source, encoder.adapters[source.name], encoder.formats[source.name]):
            lines.append(f"{source.name}: columns that nothing reads: {and_more(columns, _SHOWN_COLUMNS)}")
    return lines


def _extent(limit: int | None, available: int | None) -> str:
    if available is None:
        return "all rows" if limit is None else f"the first {limit:,} rows"
    return f"all {available:,} rows" if limit is None or limit >= available else f"{limit:,} of {available:,} rows"


def _parts(config: Config) -> list[Part]:
    """The sources of training and validation, each with what encodes it."""
    d = config.data
    tokenizer_path = resolve_model_path(config.model.partial_pretrain)
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=config.model.trust_remote_code)
    eos = generation_eos(tokenizer_path)
    options = BuildOptions(d.max_length, d.truncation, d.on_bad_row)

    def parts_of(split: str, sources: list[Source]) -> list[Part]:
        encoder = make_encoder(d, sources, tokenizer, eos)
        return [Part(split, source, encoder, options) for source in sources]

    parts = parts_of("train", resolve_sources(d.train_files, d.dataset_info))
    if d.val_files is not None:
        parts += parts_of("validation", resolve_sources(d.val_files, d.dataset_info, split="validation"))
    return parts


def _tokenised(config: Config) -> tuple[TrainingData | None, list[str]]:
    """The data as training would have it, and why training would refuse it.

    Where it would, the data without its bad rows, so that there is something to show; None where none are left.
    """
    try:
        return prepare_data(config, every_byte=True), []
    except (DataError, ConfigError) as error:
        problem = str(error)
    lenient = replace(config.data, on_bad_row="skip", max_bad_share=1.0, train_batch_size=1)
    try:
        return prepare_data(replace(config, data=lenient)), [problem]
    except DataError:
        return None, [problem]


def _with_facts(report: Report, config: Config, data: TrainingData, options: Options) -> Report:
    """Add what the tokenised data shows."""
    sources = source_facts(data.train, "train", [source.weight for source in data.sources])
    if data.validation is not None:
        sources += source_facts(data.validation, "validation", [1.0] * len(data.validation.source_names))
    report.remarks.extend(remarks(data.train.stats))
    try:
        plan = plan_run(config, data)
    except (DataError, ConfigError) as error:
        plan = None
        report.problems.append(str(error))
    return replace(
        report,
        sources=sources,
        histogram=length_histogram(data.train.lengths),
        plan=plan,
        samples=_samples(data.train, data, options.samples),
    )


def _samples(store: TokenStore, data: TrainingData, wanted: int) -> list[ShownSample]:
    """Samples at equal distances, so that every large source shows itself."""
    tokenizer = data.tokenizer
    special = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    places = [round((place + 0.5) * len(store) / wanted - 0.5) for place in range(min(wanted, len(store)))]
    return [show_sample(store.sample(i), store.describe(i), decode, special, _SHOWN_TOKENS) for i in places]


def print_report(report: Report, style: terminal.Style) -> None:
    """Write the report to standard output, the verdict last."""
    parts = [terminal.section_text(section, style) for section in report.sections]
    if report.samples:
        parts.append(terminal.samples_text([sample.shortened(_SHOWN_IN_TERMINAL) for sample in report.samples], style))
    parts.append(terminal.proof_text(report.proof, style))
    parts += [f"\n{style.bad('✗')} training would not start: {terminal.visible(text)}\n" for text in report.problems]
    parts.append("\n" + (style.good if report.passed else style.bad)(report.verdict) + "\n")
    for part in parts:
        sys.stdout.write(part)


def check_and_print(config: Config, options: Options) -> bool:
    """Examine the data, print the report, write the page where one is asked for; returns whether all holds."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every character of the data
    report = check(config, options)
    print_report(report, terminal.Style(colour=sys.stdout.isatty()))
    if options.html is not None:
        write_page(options.html, report)
        sys.stdout.write(f"the page: {options.html}\n")
    return report.passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m fsdpsft.check``: 0 where everything holds, else 1."""
    return run_tool("check", USAGE, Options, check_and_print, arguments)
