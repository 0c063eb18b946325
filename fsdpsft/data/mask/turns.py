"""Where, in a rendered conversation, the characters are that the model itself must produce; proven from renders.

``template`` states the rule and the three renders of the proof; this module carries it out on text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from fsdpsft.data.mask.probe import TemplateForm, Variables, common, texts_of
from fsdpsft.data.mask.rendering import JinjaTemplate, Message, Rendered
from fsdpsft.data.mask.spans import SpanTokenizer
from fsdpsft.errors import DataError, RowError

History: TypeAlias = Literal["auto", "as_rendered", "per_turn"]

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
    if all(turn.is_in(whole) for turn in turns):
        return [_Group(whole, messages, list(turns))]
    groups: list[_Group] = []
    for turn in reversed(turns):
        group = next((group for group in groups if turn.is_in(group.rendered)), None)
        if group is None:
            in_whole = turn.is_in(whole)
            group = _Group(whole, messages, []) if in_whole else _Group(turn.rendered, turn.message + 1, [])
            groups.append(group)
        group.turns.insert(0, turn)
    return groups[::-1]


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
        form: what probes have shown of the template; raises ``ModelError`` where it has no generation prompt.
    """

    def __init__(
        self, template: JinjaTemplate, tokens: SpanTokenizer, stop_token_ids: Sequence[int], variables: Variables
    ) -> None:
        """Render the probe; see the class."""
        self.template = template
        self._tokens = tokens
        self._stop_ids = frozenset(stop_token_ids)
        self.form = TemplateForm(template, variables)
        self._header = self.form.header.strip()

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
        texts = []
        for group in groups:
            spans: list[Span] = []
            for turn in group.turns:
                spans += self._spans(group.rendered, turn, weights[turn.message])
            texts.append(TemplateText(group.rendered.text, tuple(spans), group.messages))
        return tuple(texts)

    def _turn(self, messages: Sequence[Message], index: int, variables: Variables, whole: Rendered) -> _Turn:
        try:
            prompt = self.template.plain(messages[:index], variables, True)
        except DataError as error:
            raise refuse(index, f"no generation prompt can be rendered for it: {error}") from error
        is_last = index == len(messages) - 1
        rendered = whole if is_last else self.template.marked(messages[: index + 1], variables)
        if not rendered.text.startswith(prompt):
            shared = len(re.sub(r"[^\s>]*\Z", "", prompt[: common(prompt, rendered.text)]))
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
        if self._header and turn.reply.lstrip().startswith(self._header):
            raise refuse(
                index,
                f"with add_generation_prompt the template does not print {_excerpt(self.form.header)} here; the reply "
                "would begin with the role header, which is never trained",
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
                raise refuse(
                    turn.message,
                    f"the template does not print {_excerpt(text)} of the message unchanged; use a template that does "
                    "(the model's own for tools, or data.chat_template=chatml)",
                )

    def _spans(self, whole: Rendered, turn: _Turn, weight: float) -> list[Span]:
        exact = turn.is_in(whole)
        start, end = (turn.prompt_end, turn.reply_end) if exact else self._rewritten(whole, turn)
        if not self.template.has_blocks:
            return [Span(turn.message, start, end, weight, exact, opens=True, closes=True)]
        pieces = [(max(start, a), min(end, b)) for a, b in whole.blocks if max(start, a) < min(end, b)]
        if not pieces or pieces[-1][1] != end:
            raise refuse(turn.message, f"its {{% generation %}} block does not reach its stop token {turn.stop!r}")
        return [Span(turn.message, a, b, weight, exact, opens=a == start, closes=b == end) for a, b in pieces]

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
    head = common(found, reply)
    tail = common(found[::-1], reply[::-1])
    return len(found) <= len(reply) and head + tail >= len(found)
