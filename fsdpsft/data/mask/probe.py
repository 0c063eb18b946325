"""What short conversations show of a chat template: in which form it takes messages, and what it prints around them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fsdpsft.data.mask.rendering import JinjaTemplate, Message
from fsdpsft.data.mask.spans import SpanTokenizer
from fsdpsft.errors import DataError, ModelError

Variables = Mapping[str, Any]

_PROBE = "probe of the reply"
_NAME = "probe_of_calls"
_ASK = {"role": "user", "content": "question"}
_CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "probe0000", "function": {"name": _NAME, "arguments": {"a": 1}}}],
}
# Added tokens that can mark something: they begin and end with a sign, and hold a letter.
_MARK = re.compile(r"[^\w\s](?=.*[^\W\d_]).+[^\w\s]", re.DOTALL)


class TemplateForm:
    """What a template takes and prints.

    Args:
        template: the compiled template.
        variables: template variables of every render.

    Attributes:
        wants_parts: the template prints only content given as a list of parts (vision models).
        header: the generation prompt after a plain question, to know it where it must not be.
        prints_tools: it prints the definitions of tools.

    Raises:
        ModelError: the template has no generation prompt but prints a role header, so that training could not tell
            the header from the reply.
    """

    def __init__(self, template: JinjaTemplate, variables: Variables) -> None:
        """Render the probes."""
        self._template, self._variables = template, variables
        self.wants_parts, self.header = self._probe()
        self._calls = (False, False)
        self._calls = self._probe_calls()
        self.prints_tools = self._probe_tools()

    def _probe(self) -> tuple[bool, str]:
        """Learn from a question and a reply how the template takes content and how it prompts."""
        messages: list[Message] = [_ASK, {"role": "assistant", "content": _PROBE}]
        for wants_parts in (False, True):
            shaped = [as_parts(message) for message in messages] if wants_parts else messages
            try:
                prompt, before = (
                    self._template.plain(shaped[:1], self._variables, generate) for generate in (True, False)
                )
                text = self._template.plain(shaped, self._variables, False)
            except DataError:  # rejected in this form; conversations that are too say so themselves
                continue
            if _PROBE not in text or text[text.index(_PROBE) - 1] in "'\"":  # absent, or a list printed as it is
                continue
            header = prompt[common(prompt, before) :]
            lead = text[common(prompt, text) : text.index(_PROBE)]
            if not header.strip() and lead.strip():
                raise ModelError(
                    f"the chat template prints {lead!r} between the user's message and the reply, but with "
                    "add_generation_prompt it prints nothing: inference would not prompt as training does. Print the "
                    "assistant's header under {% if add_generation_prompt %} at the end of the template."
                )
            return wants_parts, header
        return False, ""

    def _probe_calls(self) -> tuple[bool, bool]:
        """Learn in which form the template prints a tool call: arguments as text, and no content beside it."""
        for form in ((False, False), (True, False), (False, True), (True, True)):
            self._calls = form
            try:
                text = self._template.plain([self.shaped(_ASK), self.shaped(_CALLING)], self._variables, False)
            except DataError:
                continue
            if _NAME in text:
                return form
        return False, False

    def _probe_tools(self) -> bool:
        tool = {"name": _NAME, "description": "probe", "parameters": {"type": "object", "properties": {}}}
        try:
            tools = {**self._variables, "tools": [{"type": "function", "function": tool}]}
            return _NAME in self._template.plain([self.shaped(_ASK)], tools, True)
        except DataError:  # it wants others; conversations with tools are then looked at one by one
            return False

    def shaped(self, message: Message) -> Message:
        """The message in the form in which this template prints it."""
        if self.wants_parts:
            message = as_parts(message)
        as_text, null_content = self._calls
        if "tool_calls" not in message or not (as_text or null_content):
            return message
        if null_content and not message.get("content"):
            message = {**message, "content": None}
        return {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]} if as_text else message

    def markers(self, tokens: SpanTokenizer) -> set[str]:
        """Added tokens that are not special, but with which the template marks turns; content must not forge them.

        Left out are what a reply itself may hold (``<think>``, which some templates print in each reply) and tags
        around a tool's result (``<tool_response>``), which data sets write into messages.
        """
        names = [name for name in tokens.added if name not in tokens.guarded and _MARK.fullmatch(name)]
        if not names:
            return set()
        user, reply = {"role": "user", "content": "probe 0"}, {"role": "assistant", "content": "probe 1"}
        probes = [[user, reply, {**user, "content": "probe 2"}], [{"role": "system", "content": "probe 3"}, user]]
        frames, replies = zip(*(self._frame(probe) for probe in probes), strict=True)
        around, within = "".join(frames), "".join(replies)
        said = {_tag(name) for name in names if name in within}
        tags = {_tag(name) for name in names if "</" in name}
        results = self._result_frame()
        return {name for name in names if name in around and _tag(name) not in said} | {
            name for name in names if name in results and _tag(name) not in tags
        }

    def _frame(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What the template prints around the content of these messages: outside of replies, and within them."""
        messages = [self.shaped(message) for message in messages]
        frame = reply = ""
        position = 0
        try:
            text = self._template.plain(messages, self._variables, False)
            for index, message in enumerate(messages):
                start = text.find(texts_of(message["content"])[0], position)
                if start < 0:
                    return "", ""
                end = start
                if message["role"] == "assistant":
                    prompt = self._template.plain(messages[:index], self._variables, True)
                    end = min(max(position, common(prompt, text)), start)
                frame, reply = frame + text[position:end], reply + text[end:start]
                position = start + len(texts_of(message["content"])[0])
        except DataError:  # no system role, for instance
            return "", ""
        return frame + text[position:], reply

    def _result_frame(self) -> str:
        """What the template prints from a tool's result on."""
        result = {"role": "tool", "name": _NAME, "tool_call_id": "probe0000", "content": "probe 4"}
        messages = [self.shaped(message) for message in (_ASK, _CALLING, result)]
        try:
            rendered = self._template.marked(messages, self._variables)
        except DataError:  # no tools
            return ""
        owned = rendered.owned(2)
        return rendered.text[owned[0][0] :] if owned else ""


def as_parts(message: Message) -> Message:
    """The message with text content as a list of one part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are JSON text."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return call
    named = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**call, "function": named} if "function" in call else named


def _tag(name: str) -> str:
    """``<x>`` for ``<x>`` and ``</x>``."""
    return name.replace("</", "<", 1)


def texts_of(content: Any) -> list[str]:
    """The strings of a message's content, plain or in parts."""
    if isinstance(content, str):
        return [content]
    return [str(part["text"]) for part in content or () if isinstance(part, dict) and "text" in part]


def common(one: str, other: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
