"""Which columns of a data set hold what: what the user says, and what is recognised from the columns of a first row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fsdpsft.data.rows.messages import MessageKeys, fault, listed
from fsdpsft.data.rows.sources import Row, Source, first_row
from fsdpsft.errors import DataError, RowError

FORMATS = ("auto", "prompt_response", "messages", "sharegpt", "alpaca", "tokenized")
TRAIN_ON_TURNS = ("all", "last")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "response"),
    ("query", "response"),
    ("input", "output"),
)
MEDIA_COLUMNS = frozenset({"image", "images", "video", "videos", "audio", "audios"})
PREFERENCE_COLUMNS = frozenset({"chosen", "rejected"})
_VERDICT_COLUMNS = frozenset({"label", "kto_tag"})
_OTHER_TRAINING = MEDIA_COLUMNS | PREFERENCE_COLUMNS | _VERDICT_COLUMNS
_COLUMN_KEYS = (
    "prompt_key",
    "response_key",
    "query_key",
    "history_key",
    "system_key",
    "messages_key",
    "tools_key",
    "enable_thinking_key",
)
_ALPACA_COLUMNS = ("instruction", "input", "output", "history")
_TOKEN_COLUMNS = ("input_ids", "loss_mask", "labels", "attention_mask")
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")


@dataclass(frozen=True)
class RowFormat:
    """Which columns hold what. A key left at its default is looked for; any other key must be there.

    Attributes:
        format: one of ``FORMATS``; auto recognises it by the columns.
        prompt_key: column of the prompt (for alpaca: of the instruction).
        response_key: column of the response.
        prompt_dict_keys: where the prompt column holds dicts, the keys to follow in it, outermost first.
        response_dict_keys: the same for the response.
        query_key: alpaca's column of the instruction's input.
        history_key: alpaca's column of earlier turns, ``[[question, answer], …]``.
        messages_key: column of the list of messages; "messages" finds "conversations" too.
        system_key: column of a system prompt; None finds ``SYSTEM_COLUMNS``.
        tools_key: column of tool definitions.
        enable_thinking_key: column of the template's ``enable_thinking``.
        train_on_turns: "all" assistant messages, or only the "last" one. A message's ``train: false`` is obeyed in
            both; ``train: true`` does not bring back a turn that "last" leaves out.
        role_key: key of the role in a message, where it is neither ``role`` nor ``from``.
        content_key: key of its content, where it is neither ``content`` nor ``value``.
        role_names: further role names, each to user, assistant, system, developer, tool or function_call.
    """

    format: str = "auto"
    prompt_key: str | None = None
    response_key: str | None = None
    prompt_dict_keys: Sequence[str] = ()
    response_dict_keys: Sequence[str] = ()
    query_key: str | None = None
    history_key: str | None = None
    messages_key: str = "messages"
    system_key: str | None = None
    tools_key: str = "tools"
    enable_thinking_key: str = "enable_thinking"
    train_on_turns: str = "all"
    role_key: str | None = None
    content_key: str | None = None
    role_names: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def message_keys(self) -> MessageKeys:
        """What ``parse_message`` needs of this."""
        return MessageKeys(self.role_key, self.content_key, self.role_names)

    @cached_property
    def named(self) -> frozenset[str]:
        """The columns that the user names."""
        return frozenset(name for key in _COLUMN_KEYS if (name := getattr(self, key)) is not None)

    def messages_column(self, columns: Collection[str]) -> str:
        """Which of ``columns`` holds the list of messages."""
        if self.messages_key != _DEFAULTS.messages_key:
            return self.messages_key
        return next((name for name in MESSAGE_COLUMNS if name in columns), self.messages_key)

    @cached_property
    def is_recognised(self) -> bool:
        """No key says which columns are trained, so their names decide."""
        named = self.prompt_key or self.response_key or self.messages_key != _DEFAULTS.messages_key
        return self.format == "auto" and not named


_DEFAULTS = RowFormat()


def format_of(source: Source, options: RowFormat) -> RowFormat:
    """The options, overridden by the source's entry in a ``dataset_info.json``."""
    return replace(options, **source.row_format)


def recognise(column_names: Sequence[str], first_row: Row, options: RowFormat) -> str:
    """Name the format of a source by its first row: prompt_response, messages, sharegpt, alpaca or tokenized.

    Raises:
        DataError: an explicit column is missing, or the columns fit no format or several; names the columns there are.
    """
    if options.train_on_turns not in TRAIN_ON_TURNS:
        raise DataError(f"data.train_on_turns={options.train_on_turns} is not one of {', '.join(TRAIN_ON_TURNS)}")
    try:
        return _recognise(column_names, options)
    except DataError as exc:
        raise exc.at(first_row.source, first_row.index, first_row.line) from None


def _recognise(columns: Sequence[str], options: RowFormat) -> str:
    """Explicit keys go before everything that could be recognised."""
    for key in _COLUMN_KEYS:
        name = getattr(options, key)
        if name not in (getattr(_DEFAULTS, key), *columns):
            raise RowError(f"no column {name} (data.{key}); the columns are {listed(columns)}", "missing column")
    if options.format != "auto":
        if options.format not in FORMATS:
            raise DataError(f"data.format={options.format} is not known; use one of {', '.join(FORMATS)}")
        return options.format
    _refuse_preference(columns, options)
    fits = _fits(columns, options)
    if len(fits) == 1:
        return fits[0][0]
    there = listed(columns)
    if fits:
        several = " and ".join(f"{name} ({', '.join(keys)})" for name, keys in fits)
        advice = "set data.format, or data.prompt_key and data.response_key"
        raise DataError(f"the columns fit {several}; {advice}")
    raise DataError(
        f"no known format has the columns {there}; set data.prompt_key and data.response_key, or "
        "data.multiturn.messages_key, or bring the data into one of: messages; prompt and response; question and "
        "answer; instruction, input and output; input_ids and labels or loss_mask"
    )


def _fits(columns: Sequence[str], options: RowFormat) -> list[tuple[str, tuple[str, ...]]]:
    """Formats that could be meant, each with its columns; explicit keys leave one, a list of messages goes first."""
    there = set(columns)
    if options.prompt_key or options.response_key:
        return [("alpaca" if options.query_key or options.history_key else "prompt_response", ())]
    messages = options.messages_column(columns)
    if "input_ids" in there and options.messages_key == _DEFAULTS.messages_key:
        return [("tokenized", ("input_ids",))]
    if messages in there:
        return [("messages", (messages,))]
    pairs: list[tuple[str, tuple[str, ...]]] = [("prompt_response", pair) for pair in PAIRS if there.issuperset(pair)]
    if there.issuperset(("instruction", "output")):
        return [("alpaca", ("instruction", "output")), *(fit for fit in pairs if fit[1] != ("input", "output"))]
    return pairs


def _refuse_preference(columns: Collection[str], options: RowFormat) -> None:
    if options.is_recognised and not PREFERENCE_COLUMNS.isdisjoint(columns):
        name = "chosen" if "chosen" in columns else "rejected"
        problem = "this is preference data, answers to compare, and fine-tuning takes one answer"
        advice = (
            "to train the chosen answers set data.prompt_key=PROMPT data.response_key=chosen, or "
            "data.multiturn.messages_key=chosen where it holds whole conversations; to train other columns and pass "
            "over these set data.format"
        )
        raise fault("preference data", name, f"{problem} (the columns are {listed(columns)})", advice)


def refuse_other_training(columns: Mapping[str, Any], options: RowFormat) -> None:
    """Refuse a row whose further columns say that its text is not all there is, or not what the model should learn.

    Raises:
        RowError: the row holds images, sounds or answers to compare, or its answer is marked as unwanted.
    """
    if _OTHER_TRAINING.isdisjoint(columns):
        return
    for name in sorted(_OTHER_TRAINING.intersection(columns).difference(options.named)):
        value = columns[name]
        if name in PREFERENCE_COLUMNS:
            _refuse_preference(columns, options)
        elif name in MEDIA_COLUMNS and not _is_empty(value):
            advice = "leave such rows out with data.on_bad_row=skip, or remove the column where the text does without"
            raise fault("not text alone", name, "the row holds more than text, and only text is trained", advice)
        elif name in _VERDICT_COLUMNS and (value is False or (isinstance(value, str) and value.lower() == "false")):
            advice = (
                "leave such rows out with data.on_bad_row=skip and a data.max_bad_share for them, or remove the column "
                "if it means something else"
            )
            raise fault("unwanted answer", name, "it marks the answer as one the model must not give", advice, value)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def prompt_and_response(columns: Collection[str], options: RowFormat) -> tuple[str, str]:
    """The prompt's and the response's column: as the user says, completed by the well-known pairs.

    Raises:
        RowError: no pair fits, or several do.
    """
    prompt, response = options.prompt_key, options.response_key
    if prompt is not None and response is not None:
        return prompt, response
    fitting = [pair for pair in PAIRS if prompt in (None, pair[0]) and response in (None, pair[1])]
    pairs = [pair for pair in fitting if pair[0] in columns and pair[1] in columns]
    if len(pairs) != 1:
        problem = f"cannot recognise prompt and response among the columns {listed(columns)}"
        advice = "set data.prompt_key and data.response_key"
        raise fault("missing column", prompt or response or "prompt", problem, advice)
    return pairs[0]


def unused_columns(source: Source, adapter: str, options: RowFormat) -> list[str]:
    """Columns of the source's first row that nothing reads; ``adapter`` is from ``recognise``, or "custom"."""
    if adapter == "custom":
        return []
    columns = list(first_row(source).columns)
    used = {*options.named, *(SYSTEM_COLUMNS if options.system_key is None else ())}
    if adapter == "tokenized":
        used.update(_TOKEN_COLUMNS)
    elif adapter == "alpaca":
        keys = (options.prompt_key, options.query_key, options.response_key, options.history_key)
        used.update(key or name for key, name in zip(keys, _ALPACA_COLUMNS, strict=True))
    elif adapter == "prompt_response":
        with suppress(RowError):  # the row is named where it is read
            used.update(prompt_and_response(columns, options))
    else:
        used.add(options.messages_column(columns))
    return [name for name in columns if name not in used]
