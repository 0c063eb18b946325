"""From a row to one checked conversation: what the chat template gets, and which of its messages are trained.

``formats.recognise`` tells the format of a source once; ``to_conversation`` reads every row by it and checks it. What
it lets through has something to train.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fsdpsft.data.rows.formats import (
    MEDIA_COLUMNS,
    SYSTEM_COLUMNS,
    RowFormat,
    format_of,
    prompt_and_response,
    recognise,
    refuse_other_training,
    unused_columns,
)
from fsdpsft.data.rows.messages import Message, column, fault, listed, parse_json, parse_message, parse_tools, text_of
from fsdpsft.data.rows.sources import Row
from fsdpsft.data.rows.tokenized import Tokenized, read_tokenized
from fsdpsft.errors import DataError, RowError

_PLACEHOLDERS = ("<image>", "<video>", "<audio>")

__all__ = [
    "Conversation",
    "CustomRows",
    "Message",
    "RowFormat",
    "Tokenized",
    "custom_conversation",
    "format_of",
    "load_custom_rows",
    "opening_hint",
    "recognise",
    "to_conversation",
    "unused_columns",
]


@dataclass(slots=True)  # not frozen, which takes three times as long to make
class Conversation:
    """A conversation with at least one trained assistant message.

    Attributes:
        messages: what the chat template gets: dicts with role (system, developer, user, assistant, tool), content
            (text), and where the data has them reasoning_content, tool_calls, tool_call_id, name and other keys.
        tools: tool definitions for the template, or None.
        train: for each message, whether it is trained; only assistant messages are.
        weights: for each message, the loss weight of its tokens.
        template_kwargs: further variables for the template, as ``enable_thinking``.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    train: tuple[bool, ...]
    weights: tuple[float, ...]
    template_kwargs: dict[str, Any]


def opening_hint(conversation: Conversation) -> str:
    """What to do about a conversation that a template refuses and that begins with the assistant; empty for others."""
    roles = [message["role"] for message in conversation.messages]
    first = next((index for index, role in enumerate(roles) if role not in ("system", "developer")), 0)
    if roles[first] != "assistant":
        return ""
    advice = "mark it train: false if it is context, or " if conversation.train[first] else ""
    return f". The conversation begins with the assistant, and nothing prompts message {first}: {advice}leave it out"


def to_conversation(row: Row, adapter: str, options: RowFormat) -> Conversation | Tokenized:
    """Read a row in the format that ``recognise`` gave for these options.

    Raises:
        RowError: the row cannot be used. The message names file, row, column, what was found and what to do.
    """
    try:
        refuse_other_training(row.columns, options)
        if adapter == "tokenized":
            return read_tokenized(row.columns)
        messages = READERS[adapter](row.columns, options)
        return _finish(_with_system(messages, row.columns, options), row.columns, options)
    except RowError as exc:
        raise exc.at(row.source, row.index, row.line) from None


def _finish(messages: list[Message], columns: Mapping[str, Any], options: RowFormat) -> Conversation:
    """Everything that holds for conversations of all formats."""
    train = _trained(messages, options.train_on_turns)
    if not MEDIA_COLUMNS.isdisjoint(columns):
        _refuse_placeholders(messages)
    return Conversation(
        messages=[message.entries for message in messages],
        tools=parse_tools(columns.get(options.tools_key), options.tools_key),
        train=train,
        weights=tuple(message.weight for message in messages),
        template_kwargs=_template_kwargs(columns, options.enable_thinking_key),
    )


def _refuse_placeholders(messages: list[Message]) -> None:
    """In rows with a column of images, ``<image>`` stands for one; it would be trained as seven letters."""
    for index, message in enumerate(messages):
        for tag in _PLACEHOLDERS:
            if tag in message.entries["content"]:
                problem = f"{tag} is a placeholder for something that is not text"
                raise fault("not text alone", f"messages[{index}].content", problem, "leave such rows out")


def _with_system(messages: list[Message], columns: Mapping[str, Any], options: RowFormat) -> list[Message]:
    """Put the system column's prompt first, unless it is blank or null."""
    names = SYSTEM_COLUMNS if options.system_key is None else (options.system_key,)
    name = next((name for name in names if columns.get(name) is not None), None)
    if name is None:
        return messages
    text = text_of(columns[name], name)
    if not text.strip():
        return messages
    if messages[0].role in ("system", "developer"):
        if messages[0].entries["content"] != text:
            raise fault("mixed formats", name, "the messages begin with another system prompt", "keep one", text)
        return messages
    return [Message({"role": "system", "content": text}), *messages]


def _trained(messages: list[Message], train_on_turns: str) -> tuple[bool, ...]:
    turns = [index for index, message in enumerate(messages) if message.entries["role"] == "assistant"]
    if not turns:
        roles = ", ".join(message.role for message in messages[:8])
        advice = "remove the row, or leave it out with data.on_bad_row=skip"
        raise fault("no assistant turn", "messages", f"no assistant message, only {roles}", advice)
    chosen = {turns[-1]} if train_on_turns == "last" else set(turns)
    train = tuple(
        index in chosen and message.train is not False and message.weight > 0 for index, message in enumerate(messages)
    )
    if not any(train):
        problem = "no assistant message is trained (train is false or weight 0 for all that could be)"
        raise fault("nothing trained", "messages", problem, "remove the row or mark one")
    for index, message in enumerate(messages):
        if train[index] and not message.entries["content"].strip() and "tool_calls" not in message.entries:
            problem = "a trained assistant message is empty"
            raise fault("empty response", f"messages[{index}].content", problem, "remove it, or set its train to false")
    return train


def _template_kwargs(columns: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = columns.get(name)
    if value is None:
        return {}
    if not isinstance(value, bool):
        raise fault("wrong type", name, "expected true or false", "fix the row", value)
    return {"enable_thinking": value}


def read_messages(columns: Mapping[str, Any], options: RowFormat) -> list[Message]:
    """Messages of a ``messages`` or ``conversations`` column, in the form of OpenAI or ShareGPT.

    Raises:
        RowError: what is there is not a list of messages.
    """
    name = options.messages_column(columns)
    return _message_list(column(columns, name), name, options)


def _message_list(value: Any, name: str, options: RowFormat) -> list[Message]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, name, "bad messages", "a list of messages")
    if not isinstance(value, list):
        reason = "null value" if value is None else "wrong type"
        raise fault(reason, name, "expected a list of messages", "fix the row", value)
    if not value:
        raise fault("empty conversation", name, "the list of messages is empty", "remove the row")
    keys = options.message_keys
    return [parse_message(raw, f"{name}[{index}]", keys) for index, raw in enumerate(value)]


def read_prompt_response(columns: Mapping[str, Any], options: RowFormat) -> list[Message]:
    """A prompt and a response: text, or text inside dicts, or lists of messages. Only the response is trained.

    Raises:
        RowError: a column or key is missing, or holds neither text nor messages.
    """
    prompt_key, response_key = prompt_and_response(columns, options)
    prompt, prompt_name = _follow(columns, prompt_key, options.prompt_dict_keys)
    response, response_name = _follow(columns, response_key, options.response_dict_keys)
    if isinstance(prompt, list):
        before = [message._replace(train=False) for message in _message_list(prompt, prompt_name, options)]
    else:
        before = [_user(prompt, prompt_name)]
    if isinstance(response, list):
        replies = _message_list(response, response_name, options)
        if replies[0].role in ("system", "user"):
            problem = f"the response begins with a message of role {replies[0].role}, so it is a whole conversation"
            advice = f"set data.multiturn.messages_key={response_name} and no data.prompt_key"
            raise fault("mixed formats", response_name, problem, advice)
        return before + replies
    return [*before, _assistant(response, response_name)]


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


def _follow(columns: Mapping[str, Any], key: str, path: Sequence[str]) -> tuple[Any, str]:
    """The value at ``columns[key][path[0]][path[1]]…`` and its name."""
    value, name = column(columns, key), key
    for step in path:
        if not isinstance(value, dict):
            raise fault("wrong type", name, f"expected an object with the key {step}", "see data.*_dict_keys", value)
        if step not in value:
            raise fault("missing column", name, f"has no key {step}; it has {listed(value)}", "see data.*_dict_keys")
        value, name = value[step], f"{name}.{step}"
    if isinstance(value, dict) and not {"role", "from"}.isdisjoint(value):
        return [value], name  # one message
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
        raise fault("wrong type", name, "expected a list of [question, answer] pairs", "fix the row", value)
    return turns


READERS = {
    "prompt_response": read_prompt_response,
    "messages": read_messages,
    "sharegpt": read_messages,
    "alpaca": read_alpaca,
}


class CustomRows(Protocol):
    """What the class named by ``data.custom_cls`` must offer.

    It is created without arguments, once in every process that prepares data, and must not depend on the order of
    the rows. Example::

        class MyRows:
            def to_conversation(self, row):
                return {"messages": [{"role": "user", "content": row["ask"]},
                                     {"role": "assistant", "content": row["reply"], "weight": 0.5}]}
    """

    def to_conversation(self, row: dict[str, Any]) -> Mapping[str, Any] | Conversation | Tokenized:
        """Turn a row's columns into a conversation.

        Returns:
            Columns of any known format (``{"messages": […], "tools": […]}``, ``{"prompt": …, "response": …}``,
            ``{"input_ids": …, "loss_mask": …}``), which are checked like a row's, or a finished ``Conversation`` or
            ``Tokenized``, taken unchanged. Raise ``ValueError`` with a sentence for a row that cannot be used.
        """
        ...


def load_custom_rows(path: str, name: str) -> CustomRows:
    """Create the user's own row reader: the class ``name`` of the Python file ``path``.

    Raises:
        DataError: the file cannot be imported, has no such class, or the class lacks ``to_conversation``.
    """
    key = f"data.custom_cls.path={path}"
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{key}: no such file; name the Python file that defines your class")
    spec = importlib.util.spec_from_file_location(f"custom_rows_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise DataError(f"{key}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as exc:
        raise DataError(f"{key}: importing it raised {type(exc).__name__}: {exc}") from exc
    if not hasattr(module, name):
        there = ", ".join(sorted(n for n, value in vars(module).items() if isinstance(value, type))) or "none"
        raise DataError(f"{key}: no class {name} (data.custom_cls.name) in it; the classes are {there}")
    try:
        rows: CustomRows = getattr(module, name)()
    except Exception as exc:
        raise DataError(f"{key}: creating {name}() without arguments raised {type(exc).__name__}: {exc}") from exc
    if not callable(getattr(rows, "to_conversation", None)):
        interface = "to_conversation(self, row), see fsdpsft.data.rows.conversation.CustomRows"
        raise DataError(f"{key}: the class {name} needs a method {interface}")
    return rows


def custom_conversation(row: Row, custom: CustomRows, options: RowFormat) -> Conversation | Tokenized:
    """Read a row with the user's own class; of ``options`` only ``train_on_turns`` is used.

    Raises:
        RowError: the class raised, or returned something unusable.
    """
    name = type(custom).__name__
    try:
        result = custom.to_conversation(row.columns)
    except Exception as exc:
        text = f"{name}.to_conversation raised {type(exc).__name__}: {exc}"
        raise row.error(text, f"{name} raised {type(exc).__name__}") from exc
    if isinstance(result, Conversation | Tokenized):
        return result
    if not isinstance(result, Mapping):
        wanted = "a dict with messages, a Conversation or a Tokenized"
        found = type(result).__name__
        raise row.error(f"{name}.to_conversation must return {wanted}, found {found}", "wrong type")
    made = Row(row.source, row.index, dict(result), row.line)
    known = RowFormat(train_on_turns=options.train_on_turns)
    return to_conversation(made, recognise(list(made.columns), made, known), known)
