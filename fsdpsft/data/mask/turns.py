"""Where, in a rendered conversation, the characters are that the model itself must produce; proven from renders.

``chat_template`` states the rule and the three renders of the proof; this module carries it out on text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from fsdpsft.data.mask.rendering import JinjaTemplate, Message, Rendered
from fsdpsft.data.mask.spans import SpanTokenizer
from fsdpsft.errors import DataError, ModelError, RowError

Variables = Mapping[str, Any]
History: TypeAlias = Literal["auto", "as_rendered", "per_turn"]

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
_THOUGHTS = {"reasoning_content", "reasoning", "thinking"}


class Span(NamedTuple):
    """Trained characters ``[start, end)`` of a text.

    Attributes:
        message: index of the assistant message.
        weight: loss weight of its tokens.
        exact: the text before the turn's reply is what inference feeds the model; False where the template has
            rewritten the turn or the history before it.
        opens: this is the reply's beginning (a turn with ``{% generation %}`` blocks may have several spans).
        closes: this span ends with the stop token.
    """

    message: int
    start: int
    end: int
    weight: float
    exact: bool
    opens: bool
    closes: bool


class TemplateText(NamedTuple):
    """A text to tokenise and the spans of it that are trained, in order.

    Attributes:
        messages: how many messages, from the first, the text renders.
    """

    text: str
    spans: tuple[Span, ...]
    messages: int


class _Turn(NamedTuple):
    """A render that ends with assistant message ``message``: prompt, reply up to the stop token, the rest.

    Attributes:
        header_start: where the message's own text begins (its role header); None where the template's loops don't say.
    """

    message: int
    rendered: Rendered
    header_start: int | None
    prompt_end: int
    reply_end: int
    stop: str

    @property
    def reply(self) -> str:
        return self.rendered.text[self.prompt_end : self.reply_end]

    def is_in(self, rendered: Rendered) -> bool:
        """Whether a render begins with this turn's prompt and reply."""
        return rendered is self.rendered or rendered.text.startswith(self.rendered.text[: self.reply_end])


class _Group(NamedTuple):
    """Turns that are trained in one text, which renders the first ``messages`` messages."""

    rendered: Rendered
    messages: int
    turns: list[_Turn]


def _by_prefix(whole: Rendered, messages: int, turns: Sequence[_Turn]) -> list[_Group]:
    """As few texts as hold each turn behind its own prompt.

    A turn's prompt and reply are the beginning of a text or are not, and the beginnings of one text begin with each
    other. So the turns form a tree, and each leaf needs a text: from the last turn on, a turn that begins no text yet
    gets one.
    """
    groups: list[_Group] = []
    for turn in reversed(turns):
        group = next((group for group in groups if turn.is_in(group.rendered)), None)
        if group is None:
            in_whole = turn.is_in(whole)
            group = _Group(whole, messages, []) if in_whole else _Group(turn.rendered, turn.message + 1, [])
            groups.append(group)
        group.turns.insert(0, turn)
    return groups[::-1] or [_Group(whole, messages, [])]


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


def refuse(index: int, explanation: str) -> RowError:
    """The error for an assistant message whose trained tokens cannot be proven."""
    return RowError(f"message {index} (assistant): {explanation}", "loss mask not provable")


def _excerpt(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")


class TurnProver:
    """Proves which characters of a conversation are trained.

    Args:
        template: the compiled template.
        tokens: knows which strings are stop tokens.
        stop_token_ids: the ids at which generation stops (``generation_config.eos_token_id``). With them, templates
            that leave a turn's stop token to the next message's header (GLM) can be used.
        variables: template variables of every render.

    Attributes:
        wants_parts: the template prints only content given as a list of parts (vision models).
        prints_tools: it prints the definitions of tools.
        header: the generation prompt after a plain question, to know it where it must not be.

    Raises:
        ModelError: the template has no generation prompt but prints a role header, so that training could not tell
            the header from the reply.
    """

    def __init__(
        self, template: JinjaTemplate, tokens: SpanTokenizer, stop_token_ids: Sequence[int], variables: Variables
    ) -> None:
        """Render the probe; see the class."""
        self.template = template
        self._tokens = tokens
        self._stop_ids = frozenset(stop_token_ids)
        self.wants_parts, self.header = self._probe(variables)
        self._calls = (False, False)
        self._calls = self._probe_calls(variables)
        self.prints_tools = self._probe_tools(variables)

    def _probe(self, variables: Variables) -> tuple[bool, str]:
        """Learn from a question and a reply how the template takes content and how it prompts."""
        messages: list[Message] = [_ASK, {"role": "assistant", "content": _PROBE}]
        for wants_parts in (False, True):
            shaped = [as_parts(message) for message in messages] if wants_parts else messages
            try:
                prompt, before = (self.template.plain(shaped[:1], variables, generate) for generate in (True, False))
                text = self.template.plain(shaped, variables, False)
            except DataError:  # rejected in this form; conversations that are too say so themselves
                continue
            if _PROBE not in text or text[text.index(_PROBE) - 1] in "'\"":  # absent, or a list printed as it is
                continue
            header = prompt[_shared(prompt, before) :]
            lead = text[_shared(prompt, text) : text.index(_PROBE)]
            if not header.strip() and lead.strip():
                raise ModelError(
                    f"the chat template prints {lead!r} between the user's message and the reply, but with "
                    "add_generation_prompt it prints nothing: inference would not prompt as training does. Print the "
                    "assistant's header under {% if add_generation_prompt %} at the end of the template."
                )
            return wants_parts, header
        return False, ""

    def _probe_calls(self, variables: Variables) -> tuple[bool, bool]:
        """Learn in which form the template prints a tool call: arguments as text, and no content beside it."""
        for form in ((False, False), (True, False), (False, True), (True, True)):
            self._calls = form
            try:
                text = self.template.plain([self.shaped(_ASK), self.shaped(_CALLING)], variables, False)
            except DataError:
                continue
            if _NAME in text:
                return form
        return False, False

    def _probe_tools(self, variables: Variables) -> bool:
        tool = {"name": _NAME, "description": "probe", "parameters": {"type": "object", "properties": {}}}
        try:
            tools = {**variables, "tools": [{"type": "function", "function": tool}]}
            return _NAME in self.template.plain([self.shaped(_ASK)], tools, True)
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

    def markers(self, variables: Variables) -> set[str]:
        """Added tokens that are not special, but with which the template marks turns; content must not forge them.

        Left out are what a reply itself may hold (``<think>``, which some templates print in each reply) and tags
        around a tool's result (``<tool_response>``), which data sets write into messages.
        """
        names = [name for name in self._tokens.added if name not in self._tokens.guarded and _MARK.fullmatch(name)]
        if not names:
            return set()
        user, reply = {"role": "user", "content": "probe 0"}, {"role": "assistant", "content": "probe 1"}
        probes = [[user, reply, {**user, "content": "probe 2"}], [{"role": "system", "content": "probe 3"}, user]]
        frames, replies = zip(*(self._frame(probe, variables) for probe in probes), strict=True)
        around, within = "".join(frames), "".join(replies)
        said = {_tag(name) for name in names if name in within}
        tags = {_tag(name) for name in names if "</" in name}
        results = self._result_frame(variables)
        return {name for name in names if name in around and _tag(name) not in said} | {
            name for name in names if name in results and _tag(name) not in tags
        }

    def _frame(self, messages: Sequence[Message], variables: Variables) -> tuple[str, str]:
        """What the template prints around the content of these messages: outside of replies, and within them."""
        messages = [self.shaped(message) for message in messages]
        frame = reply = ""
        position = 0
        try:
            text = self.template.plain(messages, variables, False)
            for index, message in enumerate(messages):
                start = text.find(texts_of(message["content"])[0], position)
                if start < 0:
                    return "", ""
                end = start
                if message["role"] == "assistant":
                    prompt = self.template.plain(messages[:index], variables, True)
                    end = min(max(position, _shared(prompt, text)), start)
                frame, reply = frame + text[position:end], reply + text[end:start]
                position = start + len(texts_of(message["content"])[0])
        except DataError:  # no system role, for instance
            return "", ""
        return frame + text[position:], reply

    def _result_frame(self, variables: Variables) -> str:
        """What the template prints from a tool's result on."""
        result = {"role": "tool", "name": _NAME, "tool_call_id": "probe0000", "content": "probe 4"}
        messages = [self.shaped(message) for message in (_ASK, _CALLING, result)]
        try:
            rendered = self.template.marked(messages, variables)
        except DataError:  # no tools
            return ""
        owned = rendered.owned(2)
        return rendered.text[owned[0][0] :] if owned else ""

    def texts(
        self, messages: Sequence[Message], weights: Mapping[int, float], variables: Variables, history: History
    ) -> tuple[TemplateText, ...]:
        """The texts to train on, each with its trained spans; together they hold each trained message once.

        Args:
            messages: the conversation.
            weights: the loss weight of each trained message, by index.
            variables: of the template.
            history: see ``template``.
        """
        whole = self.template.marked(messages, variables)
        turns: list[_Turn] = []
        for index in weights:
            turns.append(self._turn(messages, index, variables, whole))
            if index == len(messages) - 1:
                whole = turns[-1].rendered
        if history == "as_rendered":
            groups = [_Group(whole, len(messages), turns)]
        elif history == "per_turn":
            groups = [_Group(turn.rendered, turn.message + 1, [turn]) for turn in turns]
        else:
            groups = _by_prefix(whole, len(messages), turns)
        return tuple(
            TemplateText(
                group.rendered.text,
                tuple(s for turn in group.turns for s in self._spans(group.rendered, turn, weights[turn.message])),
                group.messages,
            )
            for group in groups
        )

    def _turn(self, messages: Sequence[Message], index: int, variables: Variables, whole: Rendered) -> _Turn:
        try:
            prompt = self.template.plain(messages[:index], variables, True)
        except DataError as error:
            raise refuse(index, f"no generation prompt can be rendered for it: {error}") from error
        is_last = index == len(messages) - 1
        rendered = whole if is_last else self.template.marked(messages[: index + 1], variables)
        if not rendered.text.startswith(prompt):
            shared = len(re.sub(r"[^\s>]*\Z", "", prompt[: _shared(prompt, rendered.text)]))
            raise refuse(
                index,
                f"the generation prompt ends in {_excerpt(prompt[shared:])} where the template prints the turn as "
                f"{_excerpt(rendered.text[shared:])}; inference would never see this reply after its prompt. Use a "
                "template whose generation prompt is how its assistant turns begin (data.chat_template), or, where it "
                "has such a variable, e.g. data.chat_template_kwargs.enable_thinking",
            )
        segments = rendered.owned(index)
        start, end = segments[-1] if segments else (None, len(rendered.text))
        if start is not None and not start <= len(prompt) <= end:
            raise refuse(index, "the template prints the message in several places; its reply cannot be told apart")
        turn = self._close(_Turn(index, rendered, start, len(prompt), end, ""), messages, variables)
        self._require_complete(turn, messages[index])
        if self.header.strip() and turn.reply.lstrip().startswith(self.header.strip()):
            raise refuse(
                index,
                f"with add_generation_prompt the template does not print {_excerpt(self.header)} here; the reply would "
                "begin with the role header, which is never trained",
            )
        return turn

    def _close(self, turn: _Turn, messages: Sequence[Message], variables: Variables) -> _Turn:
        """Find the stop token: the last one the message wrote, or the one that stands right behind its text."""
        text, region_end = turn.rendered.text, turn.reply_end
        found = self._tokens.stop_at_end(text[turn.prompt_end : region_end])
        if found is not None:
            end, stop = turn.prompt_end + found[0], found[1]
            if turn.header_start is None:
                before = self._tokens.stop_at_end(text[turn.prompt_end : end - len(stop)])
                if before is not None:
                    raise refuse(
                        turn.message, f"it ends with two stop tokens, {before[1]!r} and {stop!r}; which ends the turn?"
                    )
            rendered = turn.rendered
        else:
            stop = self._tokens.special_at(text, region_end) or self._borrowed_stop(turn, messages, variables)
            end = region_end + len(stop)
            rendered = turn.rendered
            if not text.startswith(stop, region_end):
                rendered = Rendered(text[:region_end] + stop, rendered.segments, rendered.blocks)
        closed = _Turn(turn.message, rendered, turn.header_start, turn.prompt_end, end, stop)
        if closed.reply.count(stop) > 1:
            raise refuse(turn.message, f"its stop token {stop!r} occurs within the turn, where generation would end")
        return closed

    def _borrowed_stop(self, turn: _Turn, messages: Sequence[Message], variables: Variables) -> str:
        """The stop token of a turn that the template does not close: the special token that opens the next message."""
        index, end = turn.message, turn.reply_end
        # Without its thoughts, so that the next message cannot make the template rewrite the turn.
        message = {key: value for key, value in messages[index].items() if key not in _THOUGHTS}
        if isinstance(message.get("content"), str):
            message["content"] = message["content"].rpartition("</think>")[2]
        following = {"role": "tool" if "tool_calls" in message else "user", "content": "next"}
        if index + 1 < len(messages):
            following = messages[index + 1]
        stop = None
        try:
            closed = self.template.marked([*messages[:index], message, following], variables)
            owned = closed.owned(index)
            stop = self._tokens.special_at(closed.text, owned[-1][1]) if owned else None
        except DataError as error:
            raise refuse(index, f"no message can follow it to show which token ends the turn: {error}") from error
        if stop is None or self._tokens.special[stop] not in self._stop_ids:
            ending = _excerpt(turn.rendered.text[max(turn.prompt_end, end - 30) : end])
            raise refuse(
                index,
                f"the turn does not end with a stop token but with {ending}; a model trained on it would not stop. "
                "Print the end-of-turn token after the content (data.chat_template).",
            )
        return stop

    def _require_complete(self, turn: _Turn, message: Message) -> None:
        """Refuse a template that drops what the assistant said; content may be trimmed, and thoughts moved."""
        texts = [part.rpartition("</think>")[2].strip() for part in texts_of(message.get("content"))]
        if "tool_calls" in message:
            calls = [call.get("function", call) for call in message["tool_calls"] if isinstance(call, dict)]
            texts += [str(call["name"]) for call in calls if isinstance(call, dict) and "name" in call]
        reply = turn.reply
        for text in texts:
            if text not in reply:
                raise refuse(turn.message, f"the template does not print {_excerpt(text)} of the message as it is")

    def _spans(self, whole: Rendered, turn: _Turn, weight: float) -> tuple[Span, ...]:
        exact = turn.is_in(whole)
        start, end = (turn.prompt_end, turn.reply_end) if exact else self._rewritten(whole, turn)
        pieces = [(start, end)]
        if self.template.has_blocks:
            pieces = [(max(start, a), min(end, b)) for a, b in whole.blocks if max(start, a) < min(end, b)]
            if not pieces or pieces[-1][1] != end:
                raise refuse(turn.message, f"its {{% generation %}} block does not reach its stop token {turn.stop!r}")
        return tuple(Span(turn.message, a, b, weight, exact, opens=a == start, closes=b == end) for a, b in pieces)

    def _rewritten(self, whole: Rendered, turn: _Turn) -> tuple[int, int]:
        """(start, end) of a reply in a conversation whose history the template has rewritten."""
        remedy = "; use data.history=auto, or train only the last turn"
        segments = whole.owned(turn.message)
        if turn.header_start is None or len(segments) != 1:
            raise refuse(
                turn.message, "once others follow, the template rewrites the turn and does not show where" + remedy
            )
        header = turn.rendered.text[turn.header_start : turn.prompt_end]
        start = segments[0][0] + len(header)
        if not whole.text.startswith(header, segments[0][0]):
            raise refuse(
                turn.message,
                f"once others follow, the template prints it without the generation prompt {_excerpt(header)}" + remedy,
            )
        end = whole.text.find(turn.stop, start, segments[0][1] + len(turn.stop)) + len(turn.stop)
        if end < start or not _is_cut(whole.text[start:end], turn.reply):
            raise refuse(
                turn.message,
                f"once others follow, the template no longer prints the reply that ends with {turn.stop!r}, but "
                f"{_excerpt(whole.text[start : segments[0][1]])}" + remedy,
            )
        return start, end


def _is_cut(found: str, reply: str) -> bool:
    """Whether ``found`` is ``reply`` with at most one piece cut out."""
    head = _shared(found, reply)
    tail = _shared(found[::-1], reply[::-1])
    return len(found) <= len(reply) and head + tail >= len(found)


def _shared(one: str, other: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
