"""One message, one tool call, one tool definition: from what data sets hold to what chat templates take.

Every function here gets the column it works on by name (``messages[2].content``) and raises a ``RowError`` that names
it, what was found and what to do; ``conversation.to_conversation`` puts the file and row in front.
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from fsdpsft.errors import RowError, did_you_mean

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
_TEXT_PARTS = {"text", "input_text", "output_text"}
_PART_KEYS = ("text", "value", "content")
_MEDIA_PARTS = ("image", "video", "audio", "input_image", "input_audio", "file")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CONTROL = {"train", "weight", "loss_weight", "tool_calls", "function_call", *_REASONING}
_MAX_DEPTH = 64
_MAX_INT_BITS = 10_000  # Python refuses to write integers of more than 4,300 digits as text
_WEIGHT_RANGE = (1e-6, 1e6)  # weights end in float32, where a tinier one would silently be 0
# JSON Schema gives a null a meaning under these keys; elsewhere in a tool's definition it is what Arrow left behind.
_NULL_MEANS_NULL = {"default", "const"}


@dataclass(frozen=True)
class MessageKeys:
    """Where a message says who speaks and what.

    Attributes:
        role: key of the role; None: ``role`` or ShareGPT's ``from``, whichever there is.
        content: key of the content; None: ``content`` or ``value``, to match.
        roles: names of roles in the data, to user, assistant, system, developer, tool or function_call (an assistant's
            call whose content is JSON); added to the well-known names.
    """

    role: str | None = None
    content: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def usual(self) -> bool:
        """Nothing differs from the well-known names."""
        return self == MessageKeys()


_ROLE_AND_CONTENT = {"role", "content"}


class Message(NamedTuple):
    """One message, clean.

    Attributes:
        entries: what the template gets: role, content (text), and where given reasoning_content, tool_calls (objects
            with arguments as dicts), tool_call_id, name and whatever else the data has.
        train: what the data says about training this message; None: nothing.
        weight: loss weight of its tokens, 0 or more.
    """

    entries: dict[str, Any]
    train: bool | None = None
    weight: float = 1.0

    @property
    def role(self) -> str:
        """system, developer, user, assistant or tool."""
        return str(self.entries["role"])


def show(value: Any) -> str:
    """A value as an error message quotes it: short, whatever its size and depth."""
    printer = reprlib.Repr()
    printer.maxstring = printer.maxother = 60
    try:
        return printer.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; an object's own repr
        return f"a {type(value).__name__}"


def listed(names: Iterable[Any]) -> str:
    """Names of columns or keys as an error message lists them: all, unless they are very many or very long."""
    shown = list(itertools.islice(names, 41))
    texts = [name if isinstance(name, str) and len(name) <= 60 else show(name) for name in shown[:40]]
    return ", ".join(texts + ["…"] * (len(shown) > 40)) or "none"


def fault(reason: str, column: str, problem: str, advice: str, *found: Any) -> RowError:
    """A ``RowError`` without its row: ``reason`` to count by, then the column, what is wrong with it, what to do."""
    quoted = "".join(f", found {show(value)}" for value in found)
    return RowError(f"column {column}: {problem}{quoted}; {advice}", reason)


def column(columns: Mapping[str, Any], name: str) -> Any:
    """A column that must be there.

    Raises:
        RowError: it is not; the message lists the columns there are.
    """
    if name not in columns:
        problem = f"there is none; the columns are {listed(columns)}"
        raise fault("missing column", name, problem, "name another or fix the row")
    return columns[name]


def text_of(value: Any, column: str) -> str:
    """``value``, checked to be a string that can be written as UTF-8.

    Raises:
        RowError: it is not.
    """
    if not isinstance(value, str):
        reason = "null value" if value is None else "wrong type"
        raise fault(reason, column, "expected text", "write it as a string", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            problem = f"half a character ({value[exc.start]!r} alone) at position {exc.start}"
            raise fault("invalid UTF-8", column, problem, "write the text again as UTF-8") from None
    return value


def plain(value: Any, column: str, *, drop_nulls: bool = False, depth: int = 0) -> Any:
    """A copy of nested data, checked to be what JSON can hold and not nested too deeply.

    ``drop_nulls`` leaves out keys whose value is null, except where JSON Schema gives null a meaning.

    Raises:
        RowError: a value of another type, a broken string, or more than 64 levels.
    """
    if isinstance(value, str):
        return text_of(value, column)
    if value is None or _is_json_number(value):
        return value
    if depth >= _MAX_DEPTH:
        raise fault("nested too deeply", column, f"nested more than {_MAX_DEPTH} levels deep", "flatten the data")
    if isinstance(value, list | tuple):
        return [plain(item, column, drop_nulls=drop_nulls, depth=depth + 1) for item in value]
    if isinstance(value, dict):
        copy = {}
        for key, item in value.items():
            drop = drop_nulls and key not in _NULL_MEANS_NULL
            if item is not None or not drop:
                copy[text_of(key, column)] = plain(item, column, drop_nulls=drop, depth=depth + 1)
        return copy
    problem = f"a {type(value).__name__} cannot be part of a message"
    raise fault("wrong type", column, problem, "use text, numbers, lists and objects", value)


def _is_json_number(value: Any) -> bool:
    if isinstance(value, int):
        return value.bit_length() <= _MAX_INT_BITS
    return isinstance(value, float) and math.isfinite(value)


def parse_json(text: str, column: str, reason: str, wanted: str) -> Any:
    """JSON that a data set holds as text.

    Raises:
        RowError: counted by ``reason``; the text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        problem = f"expected {wanted}, but the text is not JSON ({str(exc)[:80]})"
        raise fault(reason, column, problem, "fix the JSON", text) from None


def parse_message(raw: Any, column: str, keys: MessageKeys) -> Message:
    """Bring one message into the form templates take.

    ``raw`` is a dict with a role and content, as OpenAI or ShareGPT write it; null values count as absent.
    ``column`` is its place, as ``messages[2]``.

    Raises:
        RowError: unknown role, missing or mistyped content, a tool call that is not one, a bad weight.
    """
    if not isinstance(raw, dict):
        raise fault("wrong type", column, "a message must be an object with a role and content", "fix the row", raw)
    given = {key: value for key, value in raw.items() if value is not None}
    if keys.usual and given.keys() == _ROLE_AND_CONTENT and _is_usual(given):
        return Message(given)
    role_key, content_key = _keys_of(given, column, keys)
    role = _role(given[role_key], column, role_key, keys.roles)
    entries: dict[str, Any] = {"role": "assistant" if role == "function_call" else role}
    text, reasoning = _content(given, content_key, column, role)
    calls = _calls(given, content_key, column, role, text)
    entries["content"] = "" if role == "function_call" else text
    if not given.keys().isdisjoint(_REASONING):
        reasoning = _reasoning(given, column, reasoning)
    for name, value in (("reasoning_content", reasoning), ("tool_calls", calls)):
        if value:
            if entries["role"] != "assistant":
                raise fault("wrong type", column, f"{name} in a message of role {role}", "only the assistant has it")
            entries[name] = value
    for key, value in given.items():
        if key not in _CONTROL and key not in (role_key, content_key, "role", "content"):
            entries[text_of(key, column)] = plain(value, f"{column}.{key}")
    return Message(entries, _train(given, column, entries["role"]), _weight(given, column))


def _is_usual(given: dict[str, Any]) -> bool:
    """What nearly all messages are: a plain role and ASCII text, which need no change and no further check."""
    role, content = given["role"], given["content"]
    usual = isinstance(role, str) and role in ("system", "user", "assistant")
    return usual and isinstance(content, str) and content.isascii()


def _keys_of(given: dict[str, Any], column: str, keys: MessageKeys) -> tuple[str, str]:
    """Names of the role's and the content's keys."""
    role_key = keys.role or ("from" if "from" in given and "role" not in given else "role")
    if role_key not in given:
        problem = f"a message needs the key {role_key} (or ShareGPT's from), it has {listed(given)}"
        raise fault("missing role", column, problem, "add it")
    if keys.role is None and "from" in given and "role" in given:
        raise fault("mixed formats", column, "a message has both role and from", "keep one of them", given)
    return role_key, keys.content or ("value" if role_key == "from" and "content" not in given else "content")


def _role(value: Any, column: str, key: str, names: Mapping[str, str]) -> str:
    if isinstance(value, str):
        role = names.get(value) or ROLES.get(value)
        if role is not None:
            return role
    known = sorted({*names, *ROLES})
    meant = did_you_mean(value, known) if isinstance(value, str) else ""
    advice = (
        f"known are {', '.join(known)}; for others, data.dataset_info names a dataset_info.json with an entry for the "
        "data set, whose tags map them, as user_tag: customer"
    )
    raise RowError(f"column {column}.{key}: unknown role {show(value)}{meant} ({advice})", "unknown role")


def _content(given: dict[str, Any], key: str, column: str, role: str) -> tuple[str, str]:
    """(text, reasoning found in typed parts)."""
    value = given.get(key)
    if isinstance(value, str) and value.isascii():
        return value, ""
    where = f"{column}.{key}"
    if isinstance(value, str):
        return text_of(value, where), ""
    if value is None:
        if role == "assistant" and not _CONTROL.isdisjoint(given.keys() - {"train", "weight", "loss_weight"}):
            return "", ""
        problem = f"missing or null; the message has the keys {listed(given)}"
        raise fault("null value", where, problem, "give each message content")
    if role == "tool" and (isinstance(value, dict) or not _are_parts(value)):
        return json.dumps(plain(value, where), ensure_ascii=False), ""
    if role == "function_call" and isinstance(value, dict):
        return json.dumps(plain(value, where), ensure_ascii=False), ""
    if not isinstance(value, list):
        raise fault("wrong type", where, "expected text or a list of typed parts", "write it as a string", value)
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(value):
        _part(part, f"{where}[{index}]", texts, thoughts)
    return "".join(texts), "".join(thoughts)


def _are_parts(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in value)


def _part(part: Any, column: str, texts: list[str], thoughts: list[str]) -> None:
    if isinstance(part, str):
        texts.append(text_of(part, column))
        return
    if not isinstance(part, dict):
        raise fault("wrong type", column, "a part must be text or an object with type and text", "fix the row", part)
    kind = part.get("type", "text")
    if not isinstance(kind, str):
        raise fault("wrong type", f"{column}.type", "expected text", "write it as a string", kind)
    if kind in _TEXT_PARTS or kind in _REASONING:
        key = next((name for name in (*_PART_KEYS, *_REASONING) if part.get(name) is not None), "text")
        (texts if kind in _TEXT_PARTS else thoughts).append(text_of(part.get(key), f"{column}.{key}"))
    elif kind.startswith(_MEDIA_PARTS):
        problem = "only text is trained"
        raise fault("not text alone", column, problem, "leave such rows out with data.on_bad_row=skip", kind)
    else:
        problem = "only parts of type text and reasoning can be used"
        raise fault("unknown part", column, problem, "write tool calls as tool_calls, or remove the part", kind)


def _reasoning(given: dict[str, Any], column: str, from_parts: str) -> str:
    found = {text_of(given[key], f"{column}.{key}") for key in _REASONING if key in given} | {from_parts}
    found.discard("")
    if len(found) > 1:
        raise fault("mixed formats", column, "two different reasonings in one message", "keep one", *sorted(found)[:2])
    return next(iter(found), "")


def _calls(given: dict[str, Any], content_key: str, column: str, role: str, text: str) -> list[dict[str, Any]]:
    """The message's tool calls: its own, OpenAI's older function_call, or the content of a function_call message."""
    if role == "function_call":
        return parse_tool_calls(text, f"{column}.{content_key}")
    if "tool_calls" in given:
        return parse_tool_calls(given["tool_calls"], f"{column}.tool_calls")
    if "function_call" in given:
        return parse_tool_calls(given["function_call"], f"{column}.function_call")
    return []


def parse_tool_calls(value: Any, column: str) -> list[dict[str, Any]]:
    """Tool calls as ``[{"type": "function", "function": {"name": …, "arguments": {…}}}, …]``.

    ``value`` is a list of calls, one call, or either as a JSON string. A call may be wrapped as above, bare, or a JSON
    string; its arguments are an object or a JSON string of one. Nulls inside them are kept.

    Raises:
        RowError: it is not that.
    """
    if isinstance(value, str):
        value = parse_json(value, column, "bad tool call", "tool calls") if value.strip() else []
    calls = value if isinstance(value, list) else [value]
    return [_tool_call(call, f"{column}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, column: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = parse_json(call, column, "bad tool call", "a tool call")
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise fault("bad tool call", column, "a tool call needs a name and arguments", "fix the call", call)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        where = f"{column}.arguments"
        arguments = parse_json(arguments, where, "bad tool call", "arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise fault("bad tool call", f"{column}.arguments", "arguments must be an object", "fix the call", arguments)
    name = text_of(function["name"], f"{column}.name")
    parsed = {"type": "function", "function": {"name": name, "arguments": plain(arguments, f"{column}.arguments")}}
    if call.get("id") is not None:
        parsed["id"] = text_of(call["id"], f"{column}.id")
    return parsed


def parse_tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    """Tool definitions in the form inference servers hand to templates: ``[{"type": "function", "function": {…}}, …]``.

    ``value`` is a list of definitions (wrapped as above or bare objects with a name, or JSON strings of these), a JSON
    string of a list, or None. Nulls stay in JSON strings; elsewhere Arrow made them. None where there are none.

    Raises:
        RowError: it is not that.
    """
    written = isinstance(value, str)
    if isinstance(value, str):
        value = parse_json(value, column, "bad tools", "tool definitions") if value.strip() else None
    if value is None:
        return None
    tools = value if isinstance(value, list) else [value]
    return [_tool(tool, f"{column}[{index}]", written) for index, tool in enumerate(tools)] or None


def _tool(tool: Any, column: str, written: bool) -> dict[str, Any]:
    """``written``: the definition was JSON text, so its nulls are the author's own."""
    if isinstance(tool, str):
        tool, written = parse_json(tool, column, "bad tools", "a tool definition"), True
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise fault("bad tools", column, "a tool definition needs a name", "fix the definition", tool)
    tool = plain(tool, column, drop_nulls=not written)
    return tool if "function" in tool else {"type": "function", "function": tool}


def _train(given: dict[str, Any], column: str, role: str) -> bool | None:
    train = given.get("train")
    if train is None or isinstance(train, bool):
        if train and role != "assistant":
            problem = f"train is true for a message of role {role}"
            advice = "only what the assistant says is trained; remove it"
            raise fault("foreign message trained", column, problem, advice)
        return train
    raise fault("wrong type", f"{column}.train", "train must be true or false", "fix the row", train)


def _weight(given: dict[str, Any], column: str) -> float:
    if "weight" not in given and "loss_weight" not in given:
        return 1.0
    found = {key: given[key] for key in ("weight", "loss_weight") if key in given}
    for key, weight in found.items():
        low, high = _WEIGHT_RANGE
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not (weight == 0 or low <= weight <= high):
            problem = f"a weight must be 0 or a number from {low:g} to {high:g}"
            raise fault("bad weight", f"{column}.{key}", problem, "fix the row", weight)
    if len(set(found.values())) > 1:
        raise fault("bad weight", column, "weight and loss_weight differ", "keep one of them", found)
    return float(next(iter(found.values())))
