"""What a conversation gives must be in the texts that are trained on; what is not there is named by its kind.

A template may ignore what it does not know: thoughts, developer messages, tools, a system prompt. The model would then
learn to answer without what the answer rests on, and nothing in the mask would show it.

A piece of a conversation is held where a text spells it, trimmed or as JSON. Where it does not, the piece gets a
witness character in its middle, and is held if that is printed; so a template may format what it prints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fsdpsft.data.mask.probe import texts_of
from fsdpsft.data.mask.rendering import Message
from fsdpsft.data.mask.turns import TemplateText, TurnProver
from fsdpsft.errors import DataError, RowError

KINDS = ("reasoning", "system", "developer", "tools", "tool_calls", "tool_results", "content")
"""What ``data.may_drop`` can name. The content and calls of a trained message are never dropped."""

WITNESS = "\U0010f002"  # reserved, so it stands in no conversation

_BY_ROLE = {"system": "system", "developer": "developer", "tool": "tool_results"}


class Given(NamedTuple):
    """A conversation as its template gets it.

    Attributes:
        variables: the template's, the tools among them.
        trained: indices of the trained messages.
    """

    messages: Sequence[Message]
    variables: Mapping[str, Any]
    trained: Collection[int]


class Missing(NamedTuple):
    """A piece of a conversation that no text holds; ``message`` is None for tools."""

    kind: str
    message: int | None
    text: str


def missing(given: Given, texts: Sequence[TemplateText], prover: TurnProver) -> list[Missing]:
    """What a conversation gives and the texts made of it do not hold.

    Pieces of messages that come after those of all texts are not looked for.
    """
    if not texts or _is_plainly_held(given, texts[-1]):
        return []
    count = max(text.messages for text in texts)
    printed = [text.text for text in reversed(texts)]  # the longest first
    replies: dict[int, str] = {}
    for text in texts:
        for span in text.spans:
            replies[span.message] = replies.get(span.message, "") + text.text[span.start : span.end]
    lacking = [
        piece
        for piece in _pieces(given, count)
        if (piece.kind == "tools" and not prover.form.prints_tools) or not any(_spells(t, piece.text) for t in printed)
    ]
    lacking += [
        Missing("reasoning", index, thought)
        for index, reply in replies.items()
        for thought in _thoughts(given.messages[index])
        if not _spells(reply, thought)
    ]
    return [piece for piece in lacking if piece.kind == "reasoning" or not _witnessed(given, count, piece, prover)]


def _is_plainly_held(given: Given, text: TemplateText) -> bool:
    """Whether all there is are roles and content, and one text spells it: as in nearly all conversations."""
    if given.variables.get("tools"):
        return False
    position = 0  # behind what was found last: nearly all templates print the messages in their order
    for message in given.messages[: text.messages]:
        content = message.get("content")
        if len(message) != 2 or not isinstance(content, str) or "</think>" in content:
            return False
        content = content.strip()
        found = text.text.find(content, position)
        if found >= 0:
            position = found + len(content)
        elif content not in text.text:
            return False
    return True


def require_allowed(found: Sequence[Missing], may_drop: Collection[str], restore: Callable[[str], str]) -> None:
    """Refuse what may not be dropped.

    Raises:
        RowError: names the first such piece and what can be done.
    """
    refused = [piece for piece in found if piece.kind not in may_drop]
    if not refused:
        return
    kind, message, text = refused[0]
    where = "" if message is None else f"message {message}: "
    kinds = ", ".join(dict.fromkeys([*may_drop, *(piece.kind for piece in refused)]))
    remedy = "data.history=auto, or " if kind == "reasoning" else ""
    raise RowError(
        f"{where}the chat template does not print its {kind.replace('_', ' ')} {restore(text)[:60]!r}, so the model "
        f"would not learn from it. Use {remedy}a template that prints it (data.chat_template), or let it go with "
        f"data.may_drop=[{kinds}]",
        f"the template drops {kind.replace('_', ' ')}",
    )


def remarks(stats: Mapping[str, Any]) -> list[str]:
    """What people should know of a store's conversations, from its counts; a line each."""
    lines = []
    if stats["left_out"]:
        kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in sorted(stats["left_out"].items()))
        lines.append(f"not printed by the chat template, so not learnt from (data.may_drop): {kinds}")
    if stats["rewritten"]:
        lines.append(
            f"{stats['rewritten']:,} replies are trained as the chat template rewrites them once others follow, not "
            "as inference makes them: their mask is not proven. data.history=auto trains what inference sees"
        )
    if stats["again"]:
        share = stats["again_tokens"] / max(stats["tokens"], 1)
        lines.append(
            f"the chat template rewrites earlier turns: {stats['again']:,} further samples with "
            f"{stats['again_tokens']:,} tokens ({share:.0%} of all), so that each reply follows the prompt of inference"
        )
    return lines


def _pieces(given: Given, count: int) -> Iterator[Missing]:
    for index, message in enumerate(given.messages[:count]):
        role = message.get("role", "")
        for text in texts_of(message.get("content")):
            shown = text.rpartition("</think>")[2] if role == "assistant" else text
            if shown.strip():
                yield Missing(_BY_ROLE.get(role, "content"), index, shown.strip())
        for call in message.get("tool_calls") or ():
            yield from (Missing("tool_calls", index, text) for text in _texts(call))
    for tool in given.variables.get("tools") or ():
        yield from (Missing("tools", None, text) for text in _texts(tool))


def _texts(item: Any) -> list[str]:
    """The texts of a tool or call: its name, description and arguments. Of parameters, a template may print a part."""
    inner = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(inner, dict):
        return []
    texts = _strings([inner.get(key) for key in ("name", "description", "arguments")])
    return [text.strip() for text in texts if text.strip()]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _thoughts(message: Message) -> list[str]:
    """Reasoning of a message, in a field of its own or at the start of its content."""
    within = [text.rpartition("</think>")[0].partition("<think>") for text in texts_of(message.get("content"))]
    texts = [*texts_of(message.get("reasoning_content")), *(after or before for before, _, after in within)]
    return [text.strip() for text in texts if text.strip()]


def _spells(text: str, piece: str) -> bool:
    """Whether a text holds a piece as it is, as JSON, or with other white space."""
    if piece in text:
        return True
    if any(json.dumps(piece, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True)):
        return True
    return len(piece.split()) > 1 and "".join(piece.split()) in "".join(text.split())


def _witnessed(given: Given, count: int, piece: Missing, prover: TurnProver) -> bool:
    """Whether the template prints a witness in the middle of a piece."""
    middle = (len(piece.text) + 1) // 2
    marked = piece.text[:middle] + WITNESS + piece.text[middle:]

    def put(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(piece.text, marked)
        if isinstance(value, dict):
            return {key: item if key == "role" else put(item) for key, item in value.items()}
        return [put(item) for item in value] if isinstance(value, list) else value

    messages, variables = list(given.messages[:count]), dict(given.variables)
    if piece.message is None:
        variables["tools"] = put(variables["tools"])
    else:
        messages[piece.message] = put(messages[piece.message])
    try:
        return WITNESS in prover.template.plain(messages, variables, False)
    except DataError:  # it reads what it prints
        return False
