"""What a conversation gives and its text does not hold: named, refused, and let go only where a key says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fsdpsft.config.rules import MAY_DROP
from fsdpsft.data.batches.store_build import open_or_build
from fsdpsft.data.batches.store_parts import BuildOptions
from fsdpsft.data.mask.given import KINDS, remarks
from fsdpsft.data.mask.proof import check_conversation
from fsdpsft.data.mask.row_encoder import RowEncoder
from fsdpsft.data.mask.template import ChatTemplate
from fsdpsft.data.rows.conversation import Conversation
from fsdpsft.data.rows.sources import resolve_sources
from fsdpsft.errors import ConfigError, RowError
from tests.data.mask import golden_templates as golden
from tests.data.mask.golden_templates import conversation, message, tokenizer_for

ASK, SAY = message("user", "What is 2+2?"), message("assistant", "It is 4.")
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 7}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds two numbers."}}]
ONLY_TALK = golden.CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') and m.content %}"
)
GIVEN: dict[str, Conversation] = {
    "reasoning": conversation(ASK, {**SAY, "reasoning_content": "two and two"}),
    "system": conversation(message("system", "Be brief."), ASK, SAY),
    "developer": conversation(message("developer", "Be brief."), ASK, SAY),
    "tools": conversation(ASK, SAY, tools=TOOLS),
    "tool_calls": conversation(ASK, message("assistant", "", tool_calls=CALL), ASK, SAY),
    "tool_results": conversation(ASK, message("tool", "fourteen"), SAY),
    "content": conversation(ASK, SAY),
}
GIVEN["tool_calls"].train = (False, False, False, True)


def template(text: str = ONLY_TALK, **options: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer_for(text), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_template_drops_is_refused_by_name_or_counted(kind: str) -> None:
    text = (
        ONLY_TALK.replace("m.content }}", "m.content if m.role == 'assistant' }}") if kind == "content" else ONLY_TALK
    )
    with pytest.raises(
        RowError, match=rf"does not print its {kind.replace('_', ' ')} '.*data\.may_drop=\[{kind}\]"
    ) as e:
        template(text).encode(GIVEN[kind])
    assert e.value.reason == f"the template drops {kind.replace('_', ' ')}"
    allowing = template(text, may_drop=[kind])
    (sample,) = allowing.encode(GIVEN[kind])
    assert set(sample.left_out) == {kind}
    findings = check_conversation(allowing, GIVEN[kind])
    assert {(finding.name, finding.is_error) for finding in findings} == {("left_out", False)}
    assert allowing.fingerprint != template(text).fingerprint


def test_thoughts_within_content_count_as_reasoning() -> None:
    text = golden.CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}")
    case = conversation(ASK, message("assistant", "<think>two and two</think>It is 4."))
    with pytest.raises(RowError, match="does not print its reasoning 'two and two'"):
        template(text).encode(case)
    (sample,) = template(text, may_drop=["reasoning"]).encode(case)
    assert sample.left_out == ("reasoning",)


def test_thoughts_of_turns_that_are_not_trained_may_go() -> None:
    """At inference they are gone too."""
    thought = {**SAY, "reasoning_content": "two and two"}
    case = conversation(ASK, thought, ASK, {**thought, "reasoning_content": "again"})
    case.train = (False, False, False, True)
    (sample,) = template(golden.QWEN3).encode(case)
    assert sample.left_out == ()


@pytest.mark.parametrize(
    "printed",
    [
        "m.content | tojson",
        "m.content | trim | upper",
        "m.content | replace('\\n', ' ')",
        "m.content.split() | join('\\n')",
    ],
)
def test_a_template_may_format_what_it_prints(printed: str) -> None:
    text = golden.CHATML.replace("{{ m.content }}", f"{{{{ {printed} if m.role != 'assistant' else m.content }}}}")
    case = conversation(message("system", ' "Be"\n brief.\n'), message("user", 'é "so"\nwhat? '), SAY)
    (sample,) = template(text).encode(case)
    assert sample.left_out == ()


def test_tools_that_only_a_call_mentions_are_not_printed() -> None:
    text = golden.TOOLS.replace("{% if tools %}", "{% if false %}")
    case = conversation(ASK, message("assistant", "", tool_calls=CALL), tools=[{"function": {"name": "add"}}])
    with pytest.raises(RowError, match="does not print its tools 'add'"):
        template(text).encode(case)
    (sample,) = template(golden.TOOLS).encode(case)
    assert sample.left_out == ()


def test_the_counts_reach_the_store_and_are_said(tmp_path: Path) -> None:
    thought = {**SAY, "reasoning_content": "two and two"}
    rows = [{"messages": [ASK, thought, ASK, thought]}, {"messages": [message("developer", "Be brief."), ASK, SAY]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = resolve_sources(str(tmp_path / "a.jsonl"))
    text = golden.QWEN3.replace("{% for m in messages %}<", "{% for m in messages if m.role != 'developer' %}<")
    tokenizer = tokenizer_for(text)
    found = {}
    for history in ("auto", "as_rendered"):
        encoder = RowEncoder(sources, tokenizer, history=history, may_drop=["developer", "reasoning"])
        store = open_or_build(sources, encoder, BuildOptions(num_workers=1), tmp_path, progress=False)
        found[history] = store.stats
    auto, rendered = found["auto"], found["as_rendered"]
    assert (auto["samples"], auto["again"], auto["rewritten"]) == (3, 1, 0)
    first = tokenizer.apply_chat_template([ASK, thought], return_dict=False)
    assert auto["again_tokens"] == len(first)
    assert auto["left_out"] == {"developer": 1}
    assert (rendered["samples"], rendered["again"], rendered["rewritten"]) == (2, 0, 1)
    assert rendered["left_out"] == {"developer": 1, "reasoning": 1}
    said = remarks(auto)
    assert [line.partition(":")[2] for line in said[:1]] == [" 1 developer"]
    assert f"1 further samples with {auto['again_tokens']} tokens" in said[1] and len(said) == 2
    assert "1 replies are trained as the chat template rewrites them" in remarks(rendered)[1]
    assert "not proven" in remarks(rendered)[1]


def test_the_key_and_the_mask_know_the_same_kinds() -> None:
    assert KINDS == MAY_DROP


def test_arguments_of_calls_are_given_too() -> None:
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": ["seven"]}}}]
    case = conversation(ASK, message("assistant", "", tool_calls=call), ASK, SAY)
    (sample,) = template(golden.TOOLS).encode(case)
    assert sample.left_out == ()
    with pytest.raises(RowError, match="message 1: the chat template does not print its tool calls 'seven'"):
        template(golden.TOOLS.replace("c.function | tojson", "c.function.name")).encode(case)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.may_drop=\['thoughts'\].*reasoning, system"):
        template(may_drop=["thoughts"])
