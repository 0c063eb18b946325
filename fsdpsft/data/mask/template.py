"""Conversations to token ids and a loss mask that is proven, not guessed.

The rule. A trained token is one the model itself must produce: given the conversation before an assistant turn and the
template's generation prompt, every token after that prompt up to and including the stop token that ends the turn.

The proof, for assistant message ``i`` of ``messages``, from three renders of the unchanged template:

* ``prompt``, of ``messages[:i]`` with the generation prompt: what inference feeds the model;
* ``turn``, of ``messages[:i + 1]``, with an account of who wrote which characters (``rendering``). It must start with
  ``prompt``. What message ``i`` wrote after it, up to the last stop token, is the ``reply``. No later message can be in
  it, so a tool's result printed inside an assistant's turn is not;
* ``whole``, of all messages. Where it starts with ``prompt + reply``, training sees what inference sees.

Templates that rewrite history (Qwen 3 drops the thoughts of earlier turns) print an earlier turn differently in
``whole``. ``history`` says what becomes of such a conversation:

* ``auto``: as few samples as hold each trained reply behind exactly the prompt that inference gives: ``whole`` where it
  does, and a ``turn`` for each reply, or run of replies, that it does not hold so;
* ``per_turn``: a sample of each trained turn's ``turn``;
* ``as_rendered``: one sample, ``whole``. An earlier reply is trained as printed there, if that is the generation prompt
  followed by the reply with one piece cut out (the thought) and the same stop token. Such replies are not what
  inference makes; they are counted as rewritten.

What cannot be proven is refused with a ``DataError`` that names the message and the reason. Nothing falls back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from fsdpsft.data.mask.given import KINDS, Given, Missing, missing, require_allowed
from fsdpsft.data.mask.rendering import RESERVED, Hiding, JinjaTemplate, Message
from fsdpsft.data.mask.spans import Ids, SpanTokenizer
from fsdpsft.data.mask.turns import History, Span, TemplateText, TurnProver, refuse
from fsdpsft.data.rows.conversation import Conversation
from fsdpsft.errors import ConfigError, DataError, RowError

MASK_VERSION = 2
"""Part of every token store's key; raised whenever the same conversation would get other ids or another mask."""

_REASONING = {"reasoning_content", "reasoning", "thinking"}
_ROLE_AND_CONTENT = {"role", "content"}
_SPECIAL_IN_CONTENT = "special token in content"

SpecialTokens: TypeAlias = Literal["escape", "refuse"]

# The template of ``data.chat_template=chatml``. STOP is <|im_end|> where the tokenizer has it, else its EOS token.
_CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
    {{- 'Tools you can call, as JSON schemas:\\n' }}
    {%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}
    {{- 'Call one by writing <tool_call>{"name": ..., "arguments": {...}}</tool_call>.STOP\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '<tool_call>{"name": ' + call.name | tojson + ', "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- 'STOP\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


class Encoded(NamedTuple):
    """A tokenised conversation, or one turn of it with its history.

    Attributes:
        input_ids: [L] uint32 token ids.
        loss_weights: [L] float32, aligned with ``input_ids``: 0 where the token is not trained.
        escaped: how many special-token strings in the content were spelt as ordinary text.
        rewritten: how many trained turns the template prints otherwise than inference would see them.
        again: this is a further sample of its conversation, made because the template rewrites history.
        left_out: the kind of each thing that the conversation gives and the text does not hold, as allowed by
            ``may_drop``; on one of its samples.
    """

    input_ids: Ids
    loss_weights: NDArray[np.float32]
    escaped: int = 0
    rewritten: int = 0
    again: bool = False
    left_out: tuple[str, ...] = ()


class Plan(NamedTuple):
    """What one conversation becomes before tokenisation.

    Attributes:
        texts: one, or one per trained turn; with placeholders where something is hidden.
        messages: the messages as the template takes them, nothing hidden.
        hiding: what the placeholders stand for.
        left_out: what the conversation gives and no text holds.
    """

    texts: tuple[TemplateText, ...]
    messages: Sequence[Message]
    hiding: Hiding
    left_out: tuple[Missing, ...] = ()


def resolve_template(named: str | None, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str]:
    """The template that ``data.chat_template`` names: a file, the text itself, ``chatml``, or None for the model's.

    Raises:
        ConfigError: the value is none of these.
        DataError: the tokenizer has no template and none is named.
    """
    if named is None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template (a base model?); data.chat_template=chatml uses a built-in ChatML "
                "template, data.chat_template=FILE one of yours, and either is saved with the model"
            )
        source: str | dict[str, str] = tokenizer.chat_template
        return source
    if named == "chatml":
        known = "<|im_end|>" in tokenizer.get_vocab()
        return _CHATML.replace("STOP", "<|im_end|>" if known else str(tokenizer.eos_token))
    if "{%" in named or "{{" in named:
        return named
    path = Path(named)
    if not path.is_file():
        raise ConfigError(
            f"data.chat_template={named!r}: no such file, not the text of a Jinja template, and not 'chatml'"
        )
    return path.read_text(encoding="utf-8")


class ChatTemplate:
    """Turns conversations into token ids and loss weights. Holds compiled code, so each process makes its own.

    Args:
        tokenizer: a fast tokenizer.
        template: a file, Jinja text, or ``chatml``; None takes the tokenizer's own.
        kwargs: template variables for every conversation (``enable_thinking``, ``date_string``, …); a conversation's
            own ``template_kwargs`` go before them.
        special_tokens_in_content: what to do with the text of special tokens in messages and tools: ``escape`` spells
            it as ordinary text, ``refuse`` rejects the conversation. Special are tokens with ``special=True``, stop
            tokens, and those that the template prints around messages (``TemplateForm.markers``).
        history: ``auto``, ``per_turn`` or ``as_rendered``, see above.
        may_drop: kinds of what a conversation gives (``given.KINDS``) that the template need not print.
        eos_token_ids: ``generation_config.eos_token_id`` as a list; ``check`` compares stop tokens with it.
        now: what ``strftime_now`` reports in templates that print the date; by default the moment of construction.

    Raises:
        ModelError: slow tokenizer, template with a syntax error or without a generation prompt.
        DataError: no template at all.   ConfigError: ``template`` or an option is not understood.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        special_tokens_in_content: SpecialTokens = "escape",
        history: History = "auto",
        eos_token_ids: Sequence[int] = (),
        now: datetime | None = None,
        may_drop: Sequence[str] = (),
    ) -> None:
        """Compile the template; see the class."""
        if special_tokens_in_content not in ("escape", "refuse"):
            raise ConfigError(f"special_tokens_in_content={special_tokens_in_content!r}: 'escape' or 'refuse'")
        if history not in get_args(History):
            raise ConfigError(f"data.history={history!r}: one of {', '.join(get_args(History))}")
        if unknown := [kind for kind in may_drop if kind not in KINDS]:
            raise ConfigError(f"data.may_drop={unknown}: the kinds are {', '.join(KINDS)}")
        self.tokenizer = tokenizer
        self.replaced = template is not None
        self.eos_token_ids = tuple(eos_token_ids)
        self.history = history
        self.may_drop = frozenset(may_drop)
        self.special_tokens_in_content = special_tokens_in_content
        self.tokens = SpanTokenizer(tokenizer, self.eos_token_ids)
        self.now = now or datetime.now()
        self.variables = {**tokenizer.special_tokens_map, **(kwargs or {})}
        source = resolve_template(template, tokenizer)
        named = source if isinstance(source, dict) else {"default": source}
        if "default" not in named:
            raise DataError(
                f"the tokenizer's templates are {sorted(named)}; none is 'default', so set data.chat_template"
            )
        self.text = named["default"]
        self._origin = str(tokenizer.name_or_path) if template is None else "data.chat_template"
        self._prover = self._make_prover(self.text)
        self._tool_prover = self._make_prover(named["tool_use"]) if "tool_use" in named else self._prover
        self._stop_ids = frozenset(self.tokens.stops.values())
        for prover in {self._prover, self._tool_prover}:
            self.tokens.guard(prover.form.markers(self.tokens))
        self._hidden = re.compile(f"{self.tokens.guarded_pattern.pattern}|{RESERVED}")

    def _make_prover(self, text: str) -> TurnProver:
        return TurnProver(JinjaTemplate(text, self.now, self._origin), self.tokens, self.eos_token_ids, self.variables)

    def prover(self, conversation: Conversation) -> TurnProver:
        """The prover of the template that this conversation uses (some models have another one for tools)."""
        return self._tool_prover if conversation.tools else self._prover

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides ids and masks: tokenizer, template, options, the mask code's version."""
        provers = (self._prover, self._tool_prover)
        dated = any(prover.template.prints_date for prover in provers)
        options = [self.special_tokens_in_content, self.history, sorted(self.may_drop), self.eos_token_ids]
        day = self.now.date().isoformat() if dated else None
        texts = [prover.template.text for prover in provers]
        parts = [MASK_VERSION, texts, self.variables, options, day, self.tokens.source]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def encode(self, conversation: Conversation) -> list[Encoded]:
        """Tokenise a conversation: one sample, or one per trained turn; ``DataError`` where the mask is not proven."""
        (result,) = self.encode_batch([conversation])
        if isinstance(result, DataError):
            raise result
        return result

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[list[Encoded] | DataError]:
        """Tokenise many conversations in one call of the tokenizer; errors come back in the place of their rows."""
        plans = [self._try_plan(conversation) for conversation in conversations]
        texts = [text.text for plan in plans if isinstance(plan, Plan) and not plan.hiding.count for text in plan.texts]
        try:
            ids: Iterator[Ids | None] = iter(self.tokens.encode_batch(texts))
        except DataError:
            ids = iter([None] * len(texts))  # one row spoils the batch: each on its own, to find it
        results: list[list[Encoded] | DataError] = []
        for plan in plans:
            if isinstance(plan, DataError):
                results.append(plan)
                continue
            known = [None if plan.hiding.count else next(ids) for _ in plan.texts]
            results.append(self._try_mask(plan, known))
        return results

    def _try_plan(self, conversation: Conversation) -> Plan | DataError:
        try:
            return self.plan(conversation)
        except DataError as error:
            return error

    def _try_mask(self, plan: Plan, known: Sequence[Ids | None]) -> list[Encoded] | DataError:
        try:
            samples = [self.mask(plan, text, ids) for text, ids in zip(plan.texts, known, strict=True)]
        except DataError as error:
            return error
        if plan.left_out:
            samples[-1] = samples[-1]._replace(left_out=tuple(piece.kind for piece in plan.left_out))
        return [*(sample._replace(again=True) for sample in samples[:-1]), *samples[-1:]]  # the last is the longest

    def plan(self, conversation: Conversation) -> Plan:
        """Render a conversation and prove its trained spans."""
        if not conversation.messages:
            raise RowError("the conversation has no messages", "no messages")
        hiding = Hiding(self.tokens.guarded_pattern, self._hidden)
        prover = self.prover(conversation)
        plain = [prover.form.shaped(_prepared(message)) for message in conversation.messages]
        messages = [self._hide(index, message, hiding) for index, message in enumerate(plain)]
        variables = {**self.variables, **conversation.template_kwargs, "tools": hiding.hide(conversation.tools)}
        weights = {
            index: weight
            for index, (message, train, weight) in enumerate(
                zip(plain, conversation.train, conversation.weights, strict=True)
            )
            if train and weight > 0 and message.get("role") == "assistant"
        }
        texts = prover.texts(messages, weights, variables, self.history)
        left_out = missing(Given(messages, variables, weights), texts, prover)
        if left_out:
            require_allowed(left_out, self.may_drop, hiding.restore)
        if hiding.count:
            variables["tools"] = conversation.tools
            for text in texts:
                seen = prover.template.plain(plain[: text.messages], variables, False)
                if not hiding.restore(text.text).startswith(seen):
                    raise RowError(
                        "the template prints special-token text in the content otherwise than other text",
                        _SPECIAL_IN_CONTENT,
                    )
        return Plan(texts, plain, hiding, tuple(left_out))

    def _hide(self, index: int, message: Message, hiding: Hiding) -> Message:
        before = hiding.count
        if message.keys() == _ROLE_AND_CONTENT:  # nearly all
            content = hiding.hide(message["content"])
            hidden = message if content is message["content"] else {**message, "content": content}
        else:
            hidden = {key: value if key == "role" else hiding.hide(value) for key, value in message.items()}
        if hiding.count > before and self.special_tokens_in_content == "refuse":
            found = [text for text in hiding.originals.values() if text in self.tokens.guarded]
            if found:
                raise DataError(
                    f"message {index} ({message.get('role')}): its content holds the special token {found[0]!r}"
                )
        return hidden

    def mask(self, plan: Plan, text: TemplateText, ids: Ids | None) -> Encoded:
        """Turn a text's spans into loss weights; ``ids`` are the text's, or None to tokenise it here."""
        ids, bounds = self.locate(plan, text, ids)
        weights = np.zeros(len(ids), dtype=np.float32)
        for span, (start, end) in zip(text.spans, bounds, strict=True):
            weights[start:end] = span.weight
        rewritten = sum(span.opens and not span.exact for span in text.spans)
        return Encoded(ids, weights, plan.hiding.count, rewritten)

    def locate(self, plan: Plan, text: TemplateText, ids: Ids | None = None) -> tuple[Ids, list[tuple[int, int]]]:
        """Token bounds of each span; given ids change only where the last reply must be cut from its prompt."""
        hidden = plan.hiding.originals
        if ids is None:
            ids = self.tokens.encode_hidden(text.text, hidden) if hidden else self.tokens.encode(text.text)
        bounds = []
        for number, span in enumerate(text.spans):
            start = self._position(text.text, ids, span.start, hidden)
            if start is None and number == len(text.spans) - 1 and span.exact and span.opens and not hidden:
                ids, start = self._cut(text.text, ids, span)
            if start is None:
                around = text.text[max(0, span.start - 12) : span.start + 12]
                raise refuse(
                    span.message,
                    f"the tokenizer joins the end of its generation prompt and the start of its reply ({around!r}): no "
                    "token boundary, no exact mask. Strip the reply's leading space, or use data.history=per_turn",
                )
            end = self._stop_position(text.text, ids, span, start, hidden)
            bounds.append((start, end))
        return ids, bounds

    def _position(self, text: str, ids: Ids, position: int, hidden: dict[str, str]) -> int | None:
        if not hidden:
            return self.tokens.token_position(text, ids, position)
        prefix = self.tokens.encode_hidden(text[:position], hidden)
        return len(prefix) if np.array_equal(ids[: len(prefix)], prefix) else None

    def _stop_position(self, text: str, ids: Ids, span: Span, start: int, hidden: dict[str, str]) -> int:
        """The token bound after a span; behind a cut, positions are counted from the cut."""
        end = self._position(text, ids, span.end, hidden)
        if end is None:
            reply = self.tokens.encode(text[span.start : span.end])
            end = start + len(reply) if np.array_equal(ids[start : start + len(reply)], reply) else None
        if end is None or (span.closes and int(ids[end - 1]) not in self._stop_ids):
            raise refuse(span.message, f"its stop token is not a token by itself in {text[span.end - 20 : span.end]!r}")
        return end

    def _cut(self, text: str, ids: Ids, span: Span) -> tuple[Ids, int | None]:
        """Tokenise prompt and reply apart, as inference does: the prompt's ids are then right by construction.

        Only for the last trained reply, as it changes ids that later prompts would contain.
        """
        prompt, rest = self.tokens.encode_batch([text[: span.start], text[span.start :]])
        joined = np.concatenate([prompt, rest])
        return (joined, len(prompt)) if self.tokens.same_text(joined, ids) else (ids, None)


def _prepared(message: Message) -> Message:
    """A message as ``apply_chat_template`` hands it on: no nulls, plain types, reasoning by all its names."""
    kept = {key: value for key, value in message.items() if value is not None}
    if set(map(type, kept.values())) == {str} and kept.keys().isdisjoint(_REASONING):
        return kept
    plain, alias = (
        getattr(chat_template_utils, name, None) for name in ("_plain_template_data", "_alias_reasoning_fields")
    )
    if plain is not None:
        kept = plain(kept)
    return alias([kept])[0] if alias is not None else kept  # type: ignore[no-any-return]
