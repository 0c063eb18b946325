"""The shapes in which data sets hold conversations, how each is recognised, and how its columns become messages.

A format's reader takes a row's columns and gives messages with a default for training them; what holds for all
formats (tools, system columns, which turns are trained, is there anything to train) is in ``conversation.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fsdpsft.data.rows.messages import Message, MessageKeys, fault, listed, parse_message, text_of
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
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
_IGNORED_LABEL = -100


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


_DEFAULTS = RowFormat()


@dataclass(frozen=True)
class Tokenized:
    """A row that is tokens already.

    Attributes:
        input_ids: [L] uint32.
        loss_weights: [L] float32, aligned with ``input_ids``, 0 where not trained; position 0 never is, nothing
            predicts it.
    """

    input_ids: np.ndarray
    loss_weights: np.ndarray


def recognise_columns(columns: Sequence[str], options: RowFormat) -> str:
    """Name the format of rows with these columns.

    Args:
        columns: the columns there are.
        options: what the user says; explicit keys go before everything that could be recognised.

    Returns:
        One of ``FORMATS`` without auto.

    Raises:
        DataError: an explicit column is missing, or the columns fit no format, or more than one.
    """
    for key in ("prompt_key", "response_key", "query_key", "history_key", "system_key"):
        _need(getattr(options, key), f"data.{key}", columns)
    for key in ("messages_key", "tools_key", "enable_thinking_key"):
        name = getattr(options, key)
        _need(None if name == getattr(_DEFAULTS, key) else name, f"data.{key}", columns)
    if options.format != "auto":
        if options.format not in FORMATS:
            raise DataError(f"data.format={options.format} is not known; use one of {', '.join(FORMATS)}")
        return options.format
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
    if options.messages_key != _DEFAULTS.messages_key:
        return [("messages", (options.messages_key,))]
    if "input_ids" in there:
        return [("tokenized", ("input_ids",))]
    for name in MESSAGE_COLUMNS:
        if name in there:
            return [("messages", (name,))]
    pairs: list[tuple[str, tuple[str, ...]]] = [("prompt_response", pair) for pair in PAIRS if there.issuperset(pair)]
    if there.issuperset(("instruction", "output")):
        return [("alpaca", ("instruction", "output")), *(fit for fit in pairs if fit[1] != ("input", "output"))]
    return pairs


def _need(name: str | None, key: str, columns: Sequence[str]) -> None:
    if name is not None and name not in columns:
        raise RowError(f"no column {name} ({key}); the columns are {listed(columns)}", "missing column")


def column(columns: Mapping[str, Any], name: str) -> Any:
    """A column that must be there.

    Raises:
        RowError: it is not; the message lists the columns there are.
    """
    if name not in columns:
        problem = f"there is none; the columns are {listed(columns)}"
        raise fault("missing column", name, problem, "name another or mend the row")
    return columns[name]


def read_messages(columns: Mapping[str, Any], options: RowFormat) -> list[Message]:
    """Messages of a ``messages`` or ``conversations`` column, in OpenAI's or ShareGPT's manner.

    Raises:
        RowError: what is there is not a list of messages.
    """
    name = options.messages_key
    if name == _DEFAULTS.messages_key and name not in columns:
        name = next((known for known in MESSAGE_COLUMNS if known in columns), name)
    return _message_list(column(columns, name), name, options)


def _message_list(value: Any, name: str, options: RowFormat) -> list[Message]:
    if not isinstance(value, list):
        reason = "null value" if value is None else "wrong type"
        raise fault(reason, name, "expected a list of messages", "mend the row", value)
    if not value:
        raise fault("empty conversation", name, "the list of messages is empty", "remove the row")
    keys = options.message_keys
    messages = [parse_message(raw, f"{name}[{index}]", keys) for index, raw in enumerate(value)]
    styles = {message.style for message in messages}
    if len(styles) > 1:
        raise fault("mixed formats", name, "some messages have role, others from", "write all in one manner")
    return messages


def read_prompt_response(columns: Mapping[str, Any], options: RowFormat) -> list[Message]:
    """A prompt and a response: text, or text inside dicts, or lists of messages. Only the response is trained.

    Raises:
        RowError: a column or key is missing, or holds neither text nor messages.
    """
    prompt_key, response_key = _pair(columns, options)
    prompt, prompt_name = _follow(columns, prompt_key, options.prompt_dict_keys)
    response, response_name = _follow(columns, response_key, options.response_dict_keys)
    if isinstance(prompt, list):
        before = [_untrained(message) for message in _message_list(prompt, prompt_name, options)]
    else:
        before = [_user(prompt, prompt_name)]
    if isinstance(response, list):
        return before + _message_list(response, response_name, options)
    return [*before, _assistant(response, response_name)]


def _untrained(message: Message) -> Message:
    return Message(message.entries, message.style, False, message.weight)


def _user(value: Any, name: str) -> Message:
    text = text_of(value, name)
    if not text.strip():
        raise fault("empty prompt", name, "the prompt is empty", "remove the row", text)
    return Message({"role": "user", "content": text})


def _assistant(value: Any, name: str, train: bool | None = None) -> Message:
    text = text_of(value, name)
    if not text.strip():
        raise fault("empty response", name, "the response is empty", "remove the row", text)
    return Message({"role": "assistant", "content": text}, train=train)


def _pair(columns: Mapping[str, Any], options: RowFormat) -> tuple[str, str]:
    """The prompt's and the response's column: as the user says, completed by the well-known pairs."""
    prompt, response = options.prompt_key, options.response_key
    if prompt is not None and response is not None:
        return prompt, response
    fitting = [pair for pair in PAIRS if prompt in (None, pair[0]) and response in (None, pair[1])]
    pairs = [pair for pair in fitting if pair[0] in columns and pair[1] in columns]
    if len(pairs) != 1:
        problem = f"cannot tell prompt and response among the columns {listed(columns)}"
        advice = "set data.prompt_key and data.response_key"
        raise fault("missing column", prompt or response or "prompt", problem, advice)
    return pairs[0]


def _follow(columns: Mapping[str, Any], key: str, path: Sequence[str]) -> tuple[Any, str]:
    """The value at ``columns[key][path[0]][path[1]]…`` and its name."""
    value, name = column(columns, key), key
    for step in path:
        if not isinstance(value, dict):
            raise fault("wrong type", name, f"expected an object with the key {step}", "see data.*_dict_keys", value)
        if step not in value:
            raise fault("missing column", name, f"has no key {step}; it has {listed(value)}", "see data.*_dict_keys")
        value, name = value[step], f"{name}.{step}"
    if isinstance(value, dict):
        hint = f"name one of its keys ({listed(value)}) in data.prompt_dict_keys or data.response_dict_keys"
        raise fault("wrong type", name, "holds an object, expected text", hint)
    return value, name


def read_alpaca(columns: Mapping[str, Any], options: RowFormat) -> list[Message]:
    """Alpaca's instruction with optional input below it, output, and earlier turns in ``history``.

    Raises:
        RowError: a column is missing or is not text; a history that is not pairs of texts.
    """
    messages: list[Message] = []
    history_key = options.history_key or "history"
    for index, turn in enumerate(_history(columns.get(history_key), history_key)):
        name = f"{history_key}[{index}]"
        messages += [_user(turn[0], f"{name}[0]"), _assistant(turn[1], f"{name}[1]")]
    prompt_key, response_key = options.prompt_key or "instruction", options.response_key or "output"
    query_key = options.query_key or "input"
    parts = [text_of(column(columns, prompt_key), prompt_key)]
    if columns.get(query_key) is not None:
        parts.append(text_of(columns[query_key], query_key))
    prompt = "\n".join(part for part in parts if part.strip())
    return [*messages, _user(prompt, prompt_key), _assistant(column(columns, response_key), response_key)]


def _history(value: Any, name: str) -> list[Any]:
    turns = [] if value is None else value
    if not isinstance(turns, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        raise fault("wrong type", name, "expected a list of [question, answer] pairs", "mend the row", value)
    return turns


def read_tokenized(columns: Mapping[str, Any], _: RowFormat) -> Tokenized:
    """``input_ids`` with ``loss_mask`` (0, 1 or weights) or ``labels`` (the id at the same place, or -100).

    Raises:
        RowError: types or lengths do not fit, padding is left in, or no token is trained.
    """
    ids = _numbers(column(columns, "input_ids"), "input_ids", np.int64)
    if not len(ids) or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise fault("bad tokens", "input_ids", "expected token ids of 0 or more", "mend the row", columns["input_ids"])
    attention = columns.get("attention_mask")
    if attention is not None and not _numbers(attention, "attention_mask", np.int64).all():
        raise fault("bad tokens", "attention_mask", "the row is padded", "remove the padding tokens from every column")
    masks = [
        (name, read(columns[name], ids))
        for name, read in (("loss_mask", _from_mask), ("labels", _from_labels))
        if columns.get(name) is not None
    ]
    if not masks:
        problem = f"tokenised rows need loss_mask or labels; the columns are {listed(columns)}"
        raise fault("missing column", "loss_mask", problem, "add one of them")
    for name, weights in masks:
        if len(weights) != len(ids):
            problem = f"{len(weights)} entries for {len(ids)} input_ids"
            raise fault("bad tokens", name, problem, "give one entry per token")
    if len(masks) == 2 and not np.array_equal(masks[0][1][1:] > 0, masks[1][1][1:] > 0):
        raise fault("mixed formats", "loss_mask", "it trains other tokens than labels", "keep one of the two")
    weights = masks[0][1]
    weights[0] = 0
    if not weights.any():
        raise fault("nothing trained", masks[0][0], "no token after the first is trained", "remove the row")
    return Tokenized(ids.astype(np.uint32), weights)


def _numbers(value: Any, name: str, kind: type[np.generic]) -> np.ndarray:
    """A flat array of numbers; integers stay integers."""
    fits = isinstance(value, list | np.ndarray)
    try:
        array = np.asarray(value) if fits else np.zeros(())
    except (ValueError, OverflowError):  # rows of different lengths, or a number beyond any integer type
        array = np.zeros(())
    if array.size == 0 and array.ndim == 1:
        array = array.astype(kind)
    wanted = "iu" if issubclass(kind, np.integer) else "biuf"
    if array.ndim != 1 or array.dtype.kind not in wanted:
        raise fault("bad tokens", name, "expected a flat list of numbers", "mend the row", value)
    return array.astype(kind)


def _from_mask(value: Any, _: np.ndarray) -> np.ndarray:
    weights = _numbers(value, "loss_mask", np.float64)
    if not np.isfinite(weights).all() or ((weights != 0) & ((weights < 1e-6) | (weights > 1e6))).any():
        raise fault("bad weight", "loss_mask", "expected 0, 1, or weights from 1e-6 to 1e6", "mend the row", value)
    return weights.astype(np.float32)


def _from_labels(value: Any, ids: np.ndarray) -> np.ndarray:
    labels = _numbers(value, "labels", np.int64)
    trained = labels != _IGNORED_LABEL
    if len(labels) == len(ids) and not (labels[trained] == ids[trained]).all():
        position = int(np.flatnonzero(trained & (labels != ids))[0])
        shifted = trained[:-1] & (labels[:-1] != ids[1:])
        hint = "they look shifted by one already; " if not shifted.any() else ""
        problem = f"{hint}position {position} has {labels[position]}, expected the input id {ids[position]} or -100"
        raise fault("bad tokens", "labels", problem, "labels stand at the token they name, unshifted")
    weights: np.ndarray = trained.astype(np.float32)
    return weights


READERS = {
    "prompt_response": read_prompt_response,
    "messages": read_messages,
    "sharegpt": read_messages,
    "alpaca": read_alpaca,
}
