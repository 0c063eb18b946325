"""From a row to one checked conversation: what the chat template gets, and which of its messages are trained.

Of each source, ``recognise`` tells the format once, from the first row; ``to_conversation`` then reads every row by it
and checks it. What it lets through has something to train.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fsdpsft.data.rows.formats import (
    READERS,
    SYSTEM_COLUMNS,
    TRAIN_ON_TURNS,
    RowFormat,
    Tokenized,
    read_tokenized,
    recognise_columns,
)
from fsdpsft.data.rows.messages import Message, fault, parse_tools, text_of
from fsdpsft.data.rows.sources import Row, Source
from fsdpsft.errors import DataError, RowError

__all__ = [
    "Conversation",
    "CustomRows",
    "Message",
    "RowFormat",
    "Tokenized",
    "custom_conversation",
    "format_of",
    "load_custom_rows",
    "recognise",
    "to_conversation",
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
            ``Tokenized``, taken as it is. Raise ``ValueError`` with a sentence for a row that cannot be used.
        """
        ...


def format_of(source: Source, options: RowFormat) -> RowFormat:
    """The options with what the source's entry in a ``dataset_info.json`` states put in."""
    return replace(options, **source.row_format)


def recognise(column_names: Sequence[str], first_row: Row, options: RowFormat) -> str:
    """Name the format of a source.

    Args:
        column_names: the columns of ``first_row``.
        first_row: the source's first row.
        options: from ``format_of``.

    Returns:
        The adapter for ``to_conversation``: prompt_response, messages, sharegpt, alpaca or tokenized.

    Raises:
        DataError: an explicit column is missing, or the columns fit no format or several; names the columns there are.
    """
    if options.train_on_turns not in TRAIN_ON_TURNS:
        raise DataError(f"data.train_on_turns={options.train_on_turns} is not one of {', '.join(TRAIN_ON_TURNS)}")
    try:
        return recognise_columns(column_names, options)
    except DataError as exc:
        raise exc.at(first_row.source, first_row.index, first_row.line) from None


def to_conversation(row: Row, adapter: str, options: RowFormat) -> Conversation | Tokenized:
    """Read a row.

    Args:
        row: from ``read_rows`` or ``read_shard``.
        adapter: from ``recognise``.
        options: the same as there.

    Raises:
        RowError: the row cannot be used. The message names file, row, column, what was found and what to do.
    """
    try:
        if adapter == "tokenized":
            return read_tokenized(row.columns, options)
        messages = READERS[adapter](row.columns, options)
        return _finish(_with_system(messages, row.columns, options), row.columns, options)
    except RowError as exc:
        raise exc.at(row.source, row.index, row.line) from None


def _finish(messages: list[Message], columns: Mapping[str, Any], options: RowFormat) -> Conversation:
    """Everything that holds for conversations of all formats."""
    train = _trained(messages, options.train_on_turns)
    return Conversation(
        messages=[message.entries for message in messages],
        tools=parse_tools(columns.get(options.tools_key), options.tools_key),
        train=train,
        weights=tuple(message.weight for message in messages),
        template_kwargs=_template_kwargs(columns, options.enable_thinking_key),
    )


def _with_system(messages: list[Message], columns: Mapping[str, Any], options: RowFormat) -> list[Message]:
    """Put the system column's prompt first; blank and null are none."""
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
        raise fault("no assistant turn", "messages", f"no assistant message, only {roles}", "remove the row")
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
        raise fault("wrong type", name, "expected true or false", "mend the row", value)
    return {"enable_thinking": value}


def load_custom_rows(path: str, name: str) -> CustomRows:
    """Create the user's own row reader.

    Args:
        path: a Python file (``data.custom_cls.path``).
        name: a class in it with the interface of ``CustomRows`` (``data.custom_cls.name``).

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
    """Read a row with the user's own class.

    Args:
        row: as for ``to_conversation``.
        custom: from ``load_custom_rows``.
        options: its column names are not used (the class names the columns it returns), its ``train_on_turns`` is.

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
