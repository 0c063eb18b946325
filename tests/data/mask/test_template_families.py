"""Every original chat template that ships with TRL, in six kinds of conversation, against the rule of the loss mask."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from fsdpsft.data.mask.proof import check_conversation
from fsdpsft.data.mask.template import ChatTemplate
from fsdpsft.data.rows.conversation import Conversation
from fsdpsft.errors import DataError
from fsdpsft.testing import tiny_tokenizer
from tests.data.mask.golden_templates import PLAIN_ADDED, conversation, message

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))

_BAR = "\uff5c"  # the full-width bar of DeepSeek's special tokens
_NAME = rf"[^<>\s'\"{{}}|{_BAR}]+"
_SPECIAL = re.compile(
    rf"<[|{_BAR}]{_NAME}[|{_BAR}]?>|<{_NAME}[|{_BAR}]>|</s>|<(?:start|end)_of_(?:turn|utterance|image)>|\[gMASK\]|<sop>"
)

QUESTION, ANSWER = message("user", "USERSAYS what is 2+2?"), message("assistant", "It is 4.")
SECOND, LAST = message("user", "USERSAYS and 3+3?"), message("assistant", "Then 6.")
CALL = [{"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 7}}}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "SYSTEMSAYS adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
]
CONVERSATIONS = {
    "plain": conversation(QUESTION, ANSWER),
    "multi-turn": conversation(QUESTION, ANSWER, SECOND, LAST),
    "system": conversation(message("system", "SYSTEMSAYS be brief."), QUESTION, ANSWER),
    "tool": conversation(
        QUESTION,
        message("assistant", "", tool_calls=CALL),
        message("tool", "TOOLSAYS 14", name="add", tool_call_id="c1"),
        message("assistant", "It is 14."),
        tools=TOOLS,
    ),
    "reasoning": conversation(QUESTION, {**ANSWER, "reasoning_content": "two and two"}),
    "reasoning, multi-turn": conversation(
        QUESTION, {**ANSWER, "reasoning_content": "two and two"}, SECOND, {**LAST, "reasoning_content": "three, twice"}
    ),
}

OPENS_A_THOUGHT = "generation prompt ends in"  # that the template does not print before a reply without one
NO_TOOLS = "rejects the conversation|does not print 'add'"
NEEDS_AUTO = "history=auto"
NEMOTRON = {"nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"}
WITHOUT_TOOLS = {
    "cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3", "phi3_5", "qwen2_5_vl",
    "smolvlm",
}  # fmt: skip


def refusal(name: str, kind: str, history: str) -> str | None:
    """Why a template is refused for a kind of conversation, as far as it is; the reason is looked up in its text."""
    if name in {"deepseek_r1_distill", "deepseekv3"}:  # cut thoughts off all replies, yet prompt with <think>
        return "rejects the conversation|" + OPENS_A_THOUGHT
    if name in NEMOTRON and not kind.startswith("reasoning"):  # <think> and a line break, or <think></think>
        return OPENS_A_THOUGHT
    if name == "qwen3_5_nothink" and kind.startswith("reasoning"):  # prompts with an empty thought
        return OPENS_A_THOUGHT
    if name == "gemma" and kind == "system":
        return "System role not supported"
    if name == "diffusion_gemma" and kind == "tool":  # no generation prompt behind a tool's result, but a header
        return "role header"
    if kind == "tool" and name in WITHOUT_TOOLS:
        return NO_TOOLS
    forgets = {"gptoss", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6"}
    if history == "as_rendered" and (
        (name in forgets and kind.endswith("multi-turn")) or (name in NEMOTRON and kind == "reasoning, multi-turn")
    ):
        return NEEDS_AUTO
    return None


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    text = (FOLDER / f"{name}.jinja").read_text()
    tokenizer = tiny_tokenizer(text)
    special = [token for token in sorted(set(_SPECIAL.findall(text))) if token not in PLAIN_ADDED]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_ADDED])
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    tokenizer.chat_template = text
    return tokenizer


@cache
def template_of(name: str, history: Any) -> ChatTemplate:
    tokenizer = tokenizer_of(name)
    ends = ["<|user|>", "<|observation|>"] if name == "glm4moe" else []
    return ChatTemplate(
        tokenizer, history=history, may_drop=["reasoning"], eos_token_ids=tokenizer.convert_tokens_to_ids(ends)
    )


def prompt_ids(name: str, case: Conversation, index: int) -> list[int]:
    messages = case.messages
    if name in {"idefics3", "llava_next", "smolvlm"}:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return list(
        tokenizer_of(name).apply_chat_template(
            messages[:index], tools=case.tools, add_generation_prompt=True, return_dict=False
        )
    )


@pytest.mark.parametrize("history", ["as_rendered", "per_turn", "auto"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_rule(name: str, kind: str, history: str) -> None:
    template, case = template_of(name, history), CONVERSATIONS[kind]
    reason = refusal(name, kind, history)
    if reason is not None:
        with pytest.raises(DataError, match=reason):
            template.encode(case)
        return
    samples = template.encode(case)
    assistants = [index for index, m in enumerate(case.messages) if m["role"] == "assistant"]
    turns = [(sample, run) for sample in samples for run in trained_runs(sample.loss_weights)]
    assert len(turns) == len(assistants) and len(samples) == expected_samples(name, case, history, len(assistants))
    exact = 0
    for index, (sample, (start, end)) in zip(assistants, turns, strict=True):
        text = template.tokens.decode(sample.input_ids[start:end])
        exact += sample.input_ids[:start].tolist() == prompt_ids(name, case, index)
        assert said(case.messages[index]) in text
        assert not re.search("USERSAYS|SYSTEMSAYS|TOOLSAYS", text)
        stop = template.tokens.decode(sample.input_ids[end - 1 : end])
        assert stop in template.tokens.special and stop not in {"<|start|>", "<|im_start|>"}
        assert int(sample.input_ids[end - 1]) not in sample.input_ids[start : end - 1]
    # A turn is either after exactly the prompt of inference, or counted as rewritten by the template.
    rewritten = sum(sample.rewritten for sample in samples)
    assert exact >= len(turns) - rewritten
    assert history == "as_rendered" or rewritten == 0
    if not template._prover.template.prints_date:
        assert [finding for finding in check_conversation(template, case) if finding.is_error] == []


def expected_samples(name: str, case: Conversation, history: str, turns: int) -> int:
    """One; one a turn; or as many as there are turns whose prompt and reply begin no other turn's."""
    if history != "auto":
        return 1 if history == "as_rendered" else turns
    ends = [trained_runs(sample.loss_weights)[-1][1] for sample in template_of(name, "per_turn").encode(case)]
    told = [
        sample.input_ids[:end].tolist()
        for sample, end in zip(template_of(name, "per_turn").encode(case), ends, strict=True)
    ]
    return sum(not any(len(o) > len(own) and o[: len(own)] == own for o in told) for own in told)


def trained_runs(weights: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.r_[0, weights > 0, 0])).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def said(spoken: dict[str, Any]) -> str:
    return spoken["content"] or "add"


def test_rewriting_is_what_we_think_it_is() -> None:
    """Which templates train an earlier turn otherwise than inference sees it, if rendered whole."""
    found = set()
    for name in NAMES:
        for kind, case in CONVERSATIONS.items():
            if refusal(name, kind, "as_rendered") is None:
                found |= {(name, kind) for sample in template_of(name, "as_rendered").encode(case) if sample.rewritten}
    assert {kind for name, kind in found if name == "qwen3"} == {"multi-turn", "tool", "reasoning, multi-turn"}
    assert {name for name, _ in found} <= {
        "diffusion_gemma", "gemma4_v5", "glm4moe", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "qwen3",
    }  # fmt: skip


def test_dropping_the_tools_keeps_the_mask() -> None:
    """The definition of tools is the system's, wherever a template prints it."""
    template = template_of("llama3_1", "as_rendered")
    case = CONVERSATIONS["tool"]
    with_tools, without = template.encode(case)[0], template.encode(replace(case, tools=None))[0]
    assert (with_tools.loss_weights > 0).sum() == (without.loss_weights > 0).sum()
