"""Rows to samples: the row's format, the chat template and the loss mask put together, as the token store wants it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdpsft.data.mask.template import ChatTemplate, Encoded, SpecialTokens
from fsdpsft.data.mask.turns import History
from fsdpsft.data.rows.conversation import (
    Conversation,
    CustomRows,
    RowFormat,
    Tokenized,
    custom_conversation,
    format_of,
    load_custom_rows,
    opening_hint,
    recognise,
    to_conversation,
)
from fsdpsft.data.rows.sources import Row, Source, first_row
from fsdpsft.errors import DataError, RowError

_CACHED = ("template", "custom")
_REASON_LENGTH = 80


@dataclass
class RowEncoder:
    """Encodes rows of given sources; see ``token_store_parts.Encoder``. Picklable: compiled parts are made per process.

    Attributes:
        sources: their formats are recognised at once, by their first rows, so that a wrong column is named early.
        tokenizer: a fast tokenizer.
        row_format: which columns hold what.
        chat_template: a file, Jinja text, or "chatml"; None takes the tokenizer's own.
        template_kwargs: template variables for every conversation.
        special_tokens_in_content, history, eos_token_ids, may_drop: see ``ChatTemplate``.
        custom_cls: (Python file, class name) of the user's own reader of rows.
        now: the time that templates which print the date see, in all processes.

    Raises:
        DataError: a source's columns fit no format, there is no chat template, or the custom class is unusable.
    """

    sources: Sequence[Source]
    tokenizer: PreTrainedTokenizerBase
    row_format: RowFormat = field(default_factory=RowFormat)
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_in_content: SpecialTokens = "escape"
    history: History = "auto"
    eos_token_ids: Sequence[int] = ()
    custom_cls: tuple[str, str] | None = None
    may_drop: Sequence[str] = ()
    now: datetime = field(default_factory=datetime.now)

    def __post_init__(self) -> None:
        """Recognise the sources' formats and compile the template."""
        self.formats = {source.name: format_of(source, self.row_format) for source in self.sources}
        if self.custom_cls is not None:
            load_custom_rows(*self.custom_cls)
            self.adapters = dict.fromkeys(self.formats, "custom")
        else:
            self.adapters = {source.name: self._recognise(source) for source in self.sources}
        if self.needs_template:
            _ = self.template

    def _recognise(self, source: Source) -> str:
        row = first_row(source)
        return recognise(list(row.columns), row, self.formats[source.name])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be pickled and is made again."""
        return {name: value for name, value in vars(self).items() if name not in _CACHED}

    @property
    def needs_template(self) -> bool:
        """Whether any source holds conversations, not finished token ids."""
        return any(adapter != "tokenized" for adapter in self.adapters.values())

    @cached_property
    def template(self) -> ChatTemplate:
        """The compiled chat template."""
        return ChatTemplate(
            self.tokenizer,
            self.chat_template,
            self.template_kwargs,
            self.special_tokens_in_content,
            self.history,
            self.eos_token_ids,
            self.now,
            self.may_drop,
        )

    @cached_property
    def custom(self) -> CustomRows | None:
        """The user's reader of rows, one for each process."""
        return None if self.custom_cls is None else load_custom_rows(*self.custom_cls)

    @cached_property
    def vocab_size(self) -> int:
        """Token ids are below this. Asked for with each row, and not at hand in every tokenizer."""
        return len(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides a row's ids and mask, save the row."""
        parts = {
            "template": self.template.fingerprint if self.needs_template else self.vocab_size,
            "row_format": asdict(self.row_format),
            "custom_cls": None
            if self.custom_cls is None
            else [Path(self.custom_cls[0]).read_text(), self.custom_cls[1]],
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=list).encode(), digest_size=16).hexdigest()

    def encode(self, source: Source, rows: Sequence[Row]) -> list[Sequence[Encoded] | RowError]:
        """The samples of each row, or what is wrong with it, in the order of the rows."""
        read = [self.read(source, row) for row in rows]
        conversations = [item for item in read if isinstance(item, Conversation)]
        encoded = iter(self.template.encode_batch(conversations) if conversations else ())
        results: list[Sequence[Encoded] | RowError] = []
        for row, item in zip(rows, read, strict=True):
            if isinstance(item, RowError):
                results.append(item)
            elif isinstance(item, Tokenized):
                results.append([Encoded(item.input_ids, item.loss_weights)])
            else:
                results.append(_named(row, item, next(encoded)))
        return results

    def read(self, source: Source, row: Row) -> Conversation | Tokenized | RowError:
        """The conversation, or finished tokens, of one row, or what is wrong with it."""
        row_format = self.formats[source.name]
        try:
            if self.custom is not None:
                return custom_conversation(row, self.custom, row_format)
            return to_conversation(row, self.adapters[source.name], row_format)
        except RowError as error:
            return error


def _named(row: Row, item: Conversation, result: list[Encoded] | DataError) -> list[Encoded] | RowError:
    """Put the row's name on an error of the template, which does not know it."""
    if not isinstance(result, DataError):
        return result
    return row.error(f"{result}{opening_hint(item)}", _reason(result))


def _reason(error: DataError) -> str:
    """What to count an error by: its own reason, or its message without what differs from row to row."""
    if isinstance(error, RowError):
        return error.reason
    text = re.sub(r"^message \d+ \(\w+\): ", "", str(error).split(";")[0])
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", text)[:_REASON_LENGTH]
