"""The proof of a conversation's mask against transformers' own ``apply_chat_template``, finding by finding.

``template`` proves spans from its own renders; this asks transformers, as inference does, token by token, and so
would also notice a fault of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers.utils import chat_template_utils

from fsdpsft.data.mask.given import WITNESS
from fsdpsft.data.mask.probe import texts_of
from fsdpsft.data.mask.spans import Ids
from fsdpsft.data.mask.template import ChatTemplate, Plan
from fsdpsft.data.mask.turns import Span, TemplateText
from fsdpsft.data.rows.conversation import Conversation
from fsdpsft.errors import DataError


@dataclass(frozen=True)
class Finding:
    """Something a check has found in one conversation.

    Attributes:
        name: ``refused``, ``prompt_ids``, ``prefix``, ``stop_not_trained``, ``stop_not_in_eos``, ``foreign_content``,
            ``text_missing``; notes: ``history_rewritten``, ``escaped``, ``nothing_trained``, ``left_out``.
        message: index of the message, or None where it concerns the conversation.
        text: what was found, for people.
        is_error: whether it breaks the rule of what is trained; the others are worth knowing.
    """

    name: str
    message: int | None
    text: str
    is_error: bool = True


def check_conversation(template: ChatTemplate, conversation: Conversation) -> list[Finding]:
    """Check every trained turn of a conversation.

    Proven: the ids before a reply are those of ``apply_chat_template(messages[:i], add_generation_prompt=True)``; the
    ids to its end are a prefix of those of ``messages[:i + 1]``; the last trained id is a stop token and in
    ``eos_token_ids``; no text of users, system, tools or tool schemas is trained; the trained ids decode to a text
    that holds the assistant's.
    """
    try:
        plan = template.plan(conversation)
        samples = [template.locate(plan, text) for text in plan.texts]
    except DataError as error:
        return [Finding("refused", None, str(error))]
    findings = list(_foreign(template, conversation))
    if plan.hiding.count:
        strings = ", ".join(map(repr, plan.hiding.originals.values()))
        findings.append(Finding("escaped", None, f"spelt as ordinary text in the content: {strings}", is_error=False))
    for kind, index, piece in plan.left_out:
        note = f"{kind.replace('_', ' ')} that the template does not print (data.may_drop): {piece[:60]!r}"
        findings.append(Finding("left_out", index, note, is_error=False))
    for text, (ids, bounds) in zip(plan.texts, samples, strict=True):
        if not text.spans:
            findings.append(Finding("nothing_trained", None, "no token of this sample is trained", is_error=False))
        for index in dict.fromkeys(span.message for span in text.spans):
            pieces = [(span, bound) for span, bound in zip(text.spans, bounds, strict=True) if span.message == index]
            findings += _check_turn(template, conversation, plan, text, ids, pieces)
    return findings


def _check_turn(
    template: ChatTemplate,
    conversation: Conversation,
    plan: Plan,
    text: TemplateText,
    ids: Ids,
    pieces: list[tuple[Span, tuple[int, int]]],
) -> Iterator[Finding]:
    (first, (start, _)), (final, (_, end)) = pieces[0], pieces[-1]
    index = first.message
    if not first.exact:
        note = "trained as the template remembers it, not as inference produces it"
        yield Finding("history_rewritten", index, note, is_error=False)
    elif not plan.hiding.count:
        yield from _against_inference(template, conversation, plan, text.text[: final.end], ids[:start], first)
    last = int(ids[end - 1])
    stops = {token_id: name for name, token_id in template.tokens.stops.items()}
    if last not in stops:
        ending = template.tokens.decode(ids[end - 1 : end])
        yield Finding("stop_not_trained", index, f"the last trained token is {ending!r}, no stop token")
    elif template.eos_token_ids and last not in template.eos_token_ids:
        yield Finding(
            "stop_not_in_eos", index,
            f"the turn ends with {stops[last]!r} (id {last}), but generation stops at {list(template.eos_token_ids)}; "
            "add it to eos_token_id in generation_config.json",
            is_error=not template.replaced,  # a template of the user's own is exported together with its stop token
        )  # fmt: skip
    trained = "".join(template.tokens.decode(ids[a:b]) for _, (a, b) in pieces)
    message = plan.messages[index]
    for part in texts_of(message.get("content")):
        wanted = part.rpartition("</think>")[2].strip()
        if "".join(wanted.split()) not in "".join(trained.split()):
            yield Finding("text_missing", index, f"the trained tokens do not spell {wanted[:60]!r}")


def _against_inference(
    template: ChatTemplate, conversation: Conversation, plan: Plan, text: str, before: Ids, span: Span
) -> Iterator[Finding]:
    """Compare the ids before a reply, and the text to its end, with what the tokenizer's own method gives."""
    prover, index = template.prover(conversation), span.message
    kwargs = {**template.variables, **conversation.template_kwargs}
    prompt, turn = (
        chat_template_utils.render_jinja_template(
            [plan.messages[:count]], tools=conversation.tools, chat_template=prover.template.text,
            add_generation_prompt=count == index, **kwargs,
        )[0][0]  # as apply_chat_template does, but for nulls, which it leaves out and some templates ask for
        for count in (index, index + 1)
    )  # fmt: skip
    if prover.template.prints_date:  # the clock may have moved on since
        prompt = prover.template.plain(plan.messages[:index], {**kwargs, "tools": conversation.tools}, True)
        turn = text
    expected = template.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if before[: len(expected)].tolist() != list(expected):
        agree = int((np.cumprod(before[: len(expected)] == np.array(expected)[: len(before)])).sum())
        yield Finding("prompt_ids", index, f"training and inference prompts part at token {agree} of {len(expected)}")
    if not (turn.startswith(text) or text.startswith(turn.rstrip())):
        yield Finding("prefix", index, "the sample's text is not what the conversation up to this turn renders to")


def _foreign(template: ChatTemplate, conversation: Conversation) -> Iterator[Finding]:
    """Put a witness character into everything the assistant did not say, and look for it in the trained spans."""
    messages = [
        message
        if message.get("role") == "assistant"
        else {k: v if k == "role" else _witnessed(v) for k, v in message.items()}
        for message in conversation.messages
    ]
    witnessed = replace(conversation, messages=messages, tools=_witnessed(conversation.tools))
    try:
        plan = template.plan(witnessed)
    except DataError:  # the template reads the content it prints; only the proof of the spans is left
        return
    for text in plan.texts:
        for span in text.spans:
            if any(plan.hiding.originals.get(character) == WITNESS for character in text.text[span.start : span.end]):
                yield Finding("foreign_content", span.message, "text of another message is among the trained tokens")


def _witnessed(value: Any) -> Any:
    """``value`` with a witness in the middle of each string, where prefix, suffix and trimming don't feel it."""
    if isinstance(value, str) and value.strip():
        return value[: (len(value) + 1) // 2] + WITNESS + value[(len(value) + 1) // 2 :]
    if isinstance(value, dict):
        return {key: _witnessed(item) for key, item in value.items()}
    return [_witnessed(item) for item in value] if isinstance(value, list) else value
