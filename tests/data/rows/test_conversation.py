"""Golden conversations per format, what is trained, and errors that name file, row and column."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fsdpsft.data.rows.conversation import (
    Conversation,
    RowFormat,
    Tokenized,
    custom_conversation,
    format_of,
    load_custom_rows,
    recognise,
    to_conversation,
    unused_columns,
)
from fsdpsft.data.rows.sources import Row, first_row, read_rows, resolve_sources
from fsdpsft.errors import DataError, RowError

USER = {"role": "user", "content": "2+2?"}
REPLY = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def convert(columns: dict[str, Any], **options: Any) -> Conversation | Tokenized:
    row = Row("file.jsonl", 7, columns, 8)
    row_format = RowFormat(**options)
    return to_conversation(row, recognise(list(columns), row, row_format), row_format)


def chat(columns: dict[str, Any], **options: Any) -> Conversation:
    conversation = convert(columns, **options)
    assert isinstance(conversation, Conversation)
    return conversation


def adapter_of(*columns: str, **options: Any) -> str:
    return recognise(columns, Row("f", 0, dict.fromkeys(columns)), RowFormat(**options))


# ---- recognition


@pytest.mark.parametrize(
    ("columns", "adapter"),
    [
        (("prompt", "response"), "prompt_response"),
        (("prompt", "completion", "id"), "prompt_response"),
        (("question", "answer"), "prompt_response"),
        (("instruction", "response"), "prompt_response"),
        (("query", "response"), "prompt_response"),
        (("input", "output"), "prompt_response"),
        (("messages",), "messages"),
        (("prompt", "prompt_id", "messages"), "messages"),
        (("conversations", "tools"), "messages"),
        (("instruction", "output"), "alpaca"),
        (("instruction", "input", "output", "system", "history"), "alpaca"),
        (("input_ids", "labels", "attention_mask"), "tokenized"),
    ],
)
def test_formats_are_recognised(columns: tuple[str, ...], adapter: str) -> None:
    assert adapter_of(*columns) == adapter


def test_explicit_keys_go_before_what_could_be_recognised() -> None:
    assert adapter_of("messages", "input_ids", "a", "b", prompt_key="a", response_key="b") == "prompt_response"
    assert adapter_of("messages", "talk", messages_key="talk") == "messages"
    assert adapter_of("messages", "prompt", "response", format="prompt_response") == "prompt_response"
    assert adapter_of("a", "b", "c", prompt_key="a", query_key="b", response_key="c") == "alpaca"


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (("text", "id"), {}, "no known format has the columns text, id; set data.prompt_key"),
        (("prompt", "response", "question", "answer"), {}, r"fit prompt_response \(prompt, response\) and prompt_resp"),
        (("instruction", "output", "response"), {}, "fit alpaca .* and prompt_response"),
        (("a", "b"), {"prompt_key": "c"}, r"no column c \(data\.prompt_key\); the columns are a, b"),
        (("prompt", "b"), {"response_key": "c"}, r"no column c \(data\.response_key\)"),
        (("a", "b"), {"messages_key": "c"}, r"no column c \(data\.messages_key\)"),
        (("messages",), {"tools_key": "c"}, r"no column c \(data\.tools_key\)"),
        (("messages",), {"system_key": "c"}, r"no column c \(data\.system_key\)"),
        (("messages",), {"format": "xml"}, "data.format=xml is not known"),
        (("messages",), {"train_on_turns": "first"}, "data.train_on_turns=first"),
    ],
)
def test_columns_that_cannot_be_recognised(columns: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        adapter_of(*columns, **options)


# ---- golden conversations


def test_prompt_and_response() -> None:
    assert chat({"question": "2+2?", "answer": "4", "id": 3, "system": "Be brief"}) == Conversation(
        messages=[{"role": "system", "content": "Be brief"}, USER, REPLY],
        tools=None,
        train=(False, False, True),
        weights=(1.0, 1.0, 1.0),
        template_kwargs={},
    )
    assert chat({"q": "2+2?", "r": "4", "s": "S"}, prompt_key="q", response_key="r", system_key="s").messages[0] == {
        "role": "system",
        "content": "S",
    }
    for nothing in (None, "", " \n"):
        assert chat({"prompt": "2+2?", "response": "4", "system": nothing}).messages == [USER, REPLY]


def test_only_one_key_given_is_completed_by_its_pair() -> None:
    columns = {"question": "2+2?", "answer": "4", "prompt": [1], "response": [2]}
    assert chat(columns, prompt_key="question").messages == [USER, REPLY]
    assert chat(columns, response_key="answer").messages == [USER, REPLY]


def test_dicts_with_the_prompt_column_also_holding_messages() -> None:
    columns = {
        "prompt": [{"role": "user", "content": "another one"}],
        "reward_model": {"ground_truth": "4"},
        "extra_info": {"question": "2+2?", "answer": "4", "deep": {"er": "5"}},
    }
    keys: dict[str, Any] = {"prompt_key": "extra_info", "response_key": "extra_info", "prompt_dict_keys": ["question"]}
    assert chat(columns, **keys, response_dict_keys=["answer"]).messages == [USER, REPLY]
    assert chat(columns, **keys, response_dict_keys=["deep", "er"]).messages[1]["content"] == "5"
    for path, message in (
        (["anser"], r"column extra_info: has no key anser; it has question, answer, deep"),
        (["deep", "x"], r"column extra_info\.deep: has no key x; it has er"),
        (["answer", "x"], r"column extra_info\.answer: expected an object with the key x, found '4'"),
        ([], r"column extra_info: holds an object.*name one of its keys \(question, answer, deep\)"),
    ):
        with pytest.raises(RowError, match=message):
            chat(columns, **keys, response_dict_keys=path)


def test_prompt_and_completion_as_messages_train_the_completion_only() -> None:
    before = [USER, REPLY, {"role": "user", "content": "and 3+3?"}]
    after = {"role": "assistant", "content": "6"}
    for completion in ([after], "6"):
        conversation = chat({"prompt": before, "completion": completion})
        assert conversation.messages == [*before, after]
        assert conversation.train == (False, False, False, True)


def test_messages_in_both_manners_are_the_same() -> None:
    openai = [
        {"role": "system", "content": "S"},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        REPLY,
    ]
    call = json.dumps(CALL["function"])
    pairs = [("system", "S"), ("human", "2+2?"), ("function_call", call), ("observation", "4"), ("gpt", "4")]
    sharegpt = [{"from": who, "value": text} for who, text in pairs]
    bare = json.dumps([TOOL["function"]])
    conversation = chat({"conversations": sharegpt, "tools": bare})
    assert conversation == chat({"messages": openai, "tools": [TOOL]})
    assert conversation.messages == openai
    assert conversation.tools == [TOOL]
    assert conversation.train == (False, False, True, False, True)
    assert chat({"conversations": sharegpt[1:], "tools": bare, "system": "S"}) == conversation
    assert chat({"conversations": sharegpt, "tools": bare}, format="sharegpt") == conversation


def test_alpaca() -> None:
    columns = {"instruction": "Add", "input": "2+2", "output": "4", "history": [["q", "a"]], "system": "S"}
    conversation = chat(columns)
    assert [(m["role"], m["content"]) for m in conversation.messages] == [
        ("system", "S"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Add\n2+2"),
        ("assistant", "4"),
    ]
    assert conversation.train == (False, False, True, False, True)
    for nothing in (None, ""):
        plain = chat({"instruction": "2+2?", "input": nothing, "output": "4", "history": None})
        assert plain.messages == [USER, REPLY]


def test_one_message_of_the_assistant_alone() -> None:
    assert chat({"messages": [REPLY]}).train == (True,)


def test_typed_parts_and_reasoning_keys() -> None:
    parts = [
        {"type": "thinking", "thinking": "add "},
        {"type": "reasoning", "text": "them"},
        {"type": "text", "text": "4"},
    ]
    expected = {"role": "assistant", "content": "4", "reasoning_content": "add them"}
    assert chat({"messages": [USER, {"role": "assistant", "content": parts}]}).messages[1] == expected
    for key in ("reasoning_content", "reasoning", "thinking"):
        message = {"role": "assistant", "content": "4", key: "add them"}
        assert chat({"messages": [USER, message]}).messages[1] == expected
    user = {"role": "user", "content": [{"type": "text", "text": "2+"}, "2?"]}
    assert chat({"messages": [user, REPLY]}).messages[0] == USER


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        CALL,
        [CALL["function"]],
        json.dumps([CALL]),
        json.dumps(CALL["function"]),
        [json.dumps(CALL)],
        [{"function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}}],  # type: ignore[index]
    ],
)
def test_tool_calls_in_every_manner_keep_nulls_of_json(calls: Any) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    made = chat({"messages": [USER, message]}).messages[1]
    assert made == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_other_keys_of_a_message_reach_the_template() -> None:
    call = CALL | {"id": "c1"}
    result = {"role": "tool", "content": {"sum": 4}, "tool_call_id": "c1", "name": "add"}
    made = chat({"messages": [USER, {"role": "assistant", "tool_calls": [call], "plan": ["x"]}, result]}).messages
    assert made[1] == {"role": "assistant", "content": "", "tool_calls": [call], "plan": ["x"]}
    assert made[2] == {"role": "tool", "content": '{"sum": 4}', "tool_call_id": "c1", "name": "add"}


def test_nulls_in_tool_definitions_are_dropped_where_they_mean_nothing() -> None:
    tool = {"name": "f", "description": None, "parameters": {"x": {"default": None, "enum": None}, "y": None}}
    assert chat({"messages": [USER, REPLY], "tools": [tool]}).tools == [
        {"type": "function", "function": {"name": "f", "parameters": {"x": {"default": None}}}}
    ]
    for nothing in (None, "", "[]", []):
        assert chat({"messages": [USER, REPLY], "tools": nothing}).tools is None


def test_enable_thinking_column() -> None:
    assert chat({"messages": [USER, REPLY], "enable_thinking": False}).template_kwargs == {"enable_thinking": False}
    assert chat({"messages": [USER, REPLY], "enable_thinking": None}).template_kwargs == {}
    with pytest.raises(RowError, match="column enable_thinking: expected true or false, found 'no'"):
        chat({"messages": [USER, REPLY], "enable_thinking": "no"})


# ---- what is trained


def test_train_and_weight_of_messages() -> None:
    messages = [USER, REPLY | {"train": False}, USER, REPLY | {"weight": 0.5}, USER, REPLY | {"loss_weight": 0}]
    conversation = chat({"messages": messages})
    assert conversation.train == (False, False, False, True, False, False)
    assert conversation.weights == (1.0, 1.0, 1.0, 0.5, 1.0, 0.0)
    assert all(message in (USER, REPLY) for message in conversation.messages)


def test_last_turn_only() -> None:
    assert chat({"messages": [USER, REPLY, USER, REPLY, USER]}, train_on_turns="last").train == (False,) * 3 + (
        True,
        False,
    )
    with pytest.raises(RowError, match="no assistant message is trained"):
        chat({"messages": [USER, REPLY | {"train": True}, USER, REPLY | {"train": False}]}, train_on_turns="last")


def test_an_empty_reply_is_fine_where_it_is_not_trained() -> None:
    messages = [USER, REPLY | {"content": ""}, USER, REPLY]
    with pytest.raises(RowError, match=r"column messages\[1\]\.content: a trained assistant message is empty"):
        chat({"messages": messages})
    messages[1] = messages[1] | {"train": False}
    assert chat({"messages": messages}).train == (False, False, False, True)


# ---- tokens


def tokens(columns: dict[str, Any]) -> Tokenized:
    made = convert(columns)
    assert isinstance(made, Tokenized)
    return made


def test_tokenized_rows() -> None:
    expected = np.array([0, 0, 1, 1], np.float32)
    for extra in (
        {"loss_mask": [0, 0, 1, 1]},
        {"loss_mask": [1, 0, 1, 1]},
        {"loss_mask": [False, False, True, True]},
        {"labels": [-100, -100, 7, 8]},
        {"labels": [5, -100, 7, 8], "loss_mask": [0, 0, 1, 1], "attention_mask": [1] * 4},
    ):
        made = tokens({"input_ids": [5, 6, 7, 8], **extra})
        assert made.input_ids.dtype == np.uint32
        assert made.input_ids.tolist() == [5, 6, 7, 8]
        assert made.loss_weights.dtype == np.float32
        np.testing.assert_array_equal(made.loss_weights, expected)
    assert tokens({"input_ids": [5, 6], "loss_mask": [0, 0.25]}).loss_weights.tolist() == [0, 0.25]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [1, 2]}, "need loss_mask or labels; the columns are input_ids"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "column loss_mask: 1 entries for 2 input_ids"),
        ({"input_ids": [1, 2], "loss_mask": [1, 0]}, "no token after the first is trained"),
        ({"input_ids": [], "loss_mask": []}, "expected token ids"),
        ({"input_ids": [1, -2], "loss_mask": [0, 1]}, "expected token ids of 0 or more"),
        ({"input_ids": [1, 2**70], "loss_mask": [0, 1]}, "expected a flat list of numbers"),
        ({"input_ids": [1, 2**63], "loss_mask": [0, 1]}, "column input_ids"),
        ({"input_ids": [1.0, 2.0], "loss_mask": [0, 1]}, "expected a flat list of numbers"),
        ({"input_ids": [True, False], "loss_mask": [0, 1]}, "expected a flat list of numbers"),
        ({"input_ids": [[1], [2, 3]], "loss_mask": [0, 1]}, "expected a flat list of numbers"),
        ({"input_ids": "12", "loss_mask": [0, 1]}, "expected a flat list of numbers, found '12'"),
        ({"input_ids": [1, 2], "loss_mask": [0, -1]}, "column loss_mask: expected 0, 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, float("nan")]}, "column loss_mask: expected 0, 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, None]}, "column loss_mask: expected a flat list"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "look shifted by one already; position 0 has 2, expected"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 9, 3]}, "labels: position 1 has 9, expected the input id 2 or -100"),
        ({"input_ids": [1, 2], "labels": [-100, 2], "loss_mask": [0, 0]}, "trains other tokens than labels"),
        ({"input_ids": [1, 2], "loss_mask": [0, 1], "attention_mask": [0, 1]}, "the row is padded"),
    ],
)
def test_bad_tokens(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        convert(columns)


# ---- what cannot be used


@pytest.mark.parametrize(
    ("messages", "reason", "message"),
    [
        (None, "null value", "column messages: expected a list of messages, found None"),
        ("hello", "wrong type", "column messages: expected a list of messages, found 'hello'"),
        ([], "empty conversation", "the list of messages is empty"),
        ([USER], "no assistant turn", "no assistant message, only user"),
        ([None, REPLY], "wrong type", r"column messages\[0\]: a message must be an object"),
        (
            [USER, {"role": "asistant", "content": "4"}],
            "unknown role",
            r"messages\[1\]\.role: .*'asistant'; did you mean assistant",
        ),
        ([USER, {"role": 3, "content": "4"}], "unknown role", "unknown role 3 \\(known are assistant, developer"),
        ([USER, {"content": "4"}], "missing role", "it has content"),
        ([USER, {"role": "assistant"}], "null value", "the message has the keys role"),
        ([USER, {"role": "assistant", "content": None}], "null value", r"messages\[1\]\.content: missing or null"),
        ([USER, {"role": "assistant", "content": "  "}], "empty response", "a trained assistant message is empty"),
        ([USER, {"role": "assistant", "content": "", "reasoning": "hm"}], "empty response", "is empty"),
        ([USER, {"role": "assistant", "content": 4}], "wrong type", "expected text or a list of typed parts, found 4"),
        ([{"role": "user", "content": {"a": 1}}, REPLY], "wrong type", "expected text or a list"),
        ([USER, {"role": "assistant", "content": [{"type": "image_url"}]}], "not text alone", "found 'image_url'"),
        ([USER, {"role": "assistant", "content": [{"type": ["text"]}]}], "wrong type", r"content\[0\]\.type"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "invalid UTF-8", "half a character"),
        ([USER, {"from": "gpt", "role": "assistant", "content": "4"}], "mixed formats", "both role and from"),
        ([USER, REPLY | {"train": "yes"}], "wrong type", "train must be true or false, found 'yes'"),
        ([USER | {"train": True}, REPLY], "foreign message trained", "train is true for a message of role user"),
        ([USER, REPLY | {"train": False}], "nothing trained", "no assistant message is trained"),
        ([USER, REPLY | {"weight": -1}], "bad weight", r"messages\[1\]\.weight: a weight must be 0 or"),
        ([USER, REPLY | {"weight": float("inf")}], "bad weight", "found inf"),
        ([USER, REPLY | {"weight": 1e-50}], "bad weight", "found 1e-50"),
        ([USER, REPLY | {"weight": True}], "bad weight", "found True"),
        ([USER, REPLY | {"weight": 1, "loss_weight": 2}], "bad weight", "weight and loss_weight differ"),
        ([USER, REPLY | {"reasoning": "a", "thinking": "b"}], "mixed formats", "two different reasonings"),
        ([USER | {"reasoning": "a"}, REPLY], "wrong type", "reasoning_content in a message of role user"),
        ([USER | {"tool_calls": [CALL]}, REPLY], "wrong type", "tool_calls in a message of role user"),
        ([USER, REPLY | {"tool_calls": "{"}], "bad tool call", "the text is not JSON"),
        (
            [USER, REPLY | {"tool_calls": [{"arguments": {}}]}],
            "bad tool call",
            r"tool_calls\[0\]: a tool call needs a name",
        ),
        (
            [USER, REPLY | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}],
            "bad tool call",
            "must be an object, found",
        ),
        ([{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(1)"}], "bad tool call", "not JSON"),
    ],
)
def test_bad_messages_are_named(messages: Any, reason: str, message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        chat({"messages": messages})
    assert caught.value.reason == reason
    error = caught.value
    assert (error.file, error.row, error.line) == ("file.jsonl", 7, 8)
    assert str(error) == f"file.jsonl, row 7 (line 8), {error.text}" and error.text.startswith("column messages")
    copy = pickle.loads(pickle.dumps(error))  # as it comes from a process that builds
    assert (str(copy), copy.reason, copy.row) == (str(error), reason, 7)
    assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("columns", "reason", "message"),
    [
        ({"prompt": "p", "response": None}, "null value", "column response: expected text, found None"),
        ({"prompt": "p", "response": " "}, "empty response", "column response: the response is empty, found ' '"),
        ({"prompt": "", "response": "r"}, "empty prompt", "column prompt: the prompt is empty"),
        (
            {"prompt": "p", "response": 42},
            "wrong type",
            "column response: expected text, found 42; write it as a string",
        ),
        ({"prompt": "p", "response": "x", "system": 3}, "wrong type", "column system: expected text, found 3"),
        ({"prompt": [], "response": "x"}, "empty conversation", "column prompt"),
        ({"instruction": "i", "output": ""}, "empty response", "column output"),
        ({"instruction": "", "input": "", "output": "o"}, "empty prompt", "column instruction"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "wrong type", "column history: expected a list of"),
        ({"messages": [USER, REPLY], "tools": "nope"}, "bad tools", "column tools: expected tool definitions"),
        (
            {"messages": [USER, REPLY], "tools": ["{}"]},
            "bad tools",
            r"column tools\[0\]: a tool definition needs a name",
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, USER, REPLY], "system": "b"},
            "mixed formats",
            "column system: the messages begin with another system prompt",
        ),
    ],
)
def test_bad_columns_are_named(columns: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        chat(columns)
    assert caught.value.reason == reason


def test_a_row_without_the_column_lists_what_it_has() -> None:
    with pytest.raises(RowError, match=r"row 3, column messages: there is none; the columns are prompt, response"):
        to_conversation(Row("f", 3, {"prompt": "p", "response": "r"}), "messages", RowFormat())
    with pytest.raises(RowError, match="cannot recognise prompt and response among the columns messages"):
        to_conversation(Row("f", 3, {"messages": []}), "prompt_response", RowFormat())


def test_nesting_beyond_reason_and_foreign_objects() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RowError, match="nested more than 64 levels deep"):
        chat({"messages": [USER, REPLY | {"plan": deep}]})
    with pytest.raises(RowError, match="a bytes cannot be part of a message"):
        chat({"messages": [USER, REPLY | {"plan": [b"x"]}]})


# ---- columns that say what a row is for


PAIR = {"prompt": "2+2?", "response": "4"}


@pytest.mark.parametrize(
    ("columns", "reason", "message"),
    [
        (PAIR | {"label": False}, "unwanted answer", "column label: it marks the answer as one .*found False"),
        (PAIR | {"kto_tag": "false"}, "unwanted answer", "column kto_tag"),
        ({"input_ids": [1, 2], "labels": [1, 2], "label": False}, "unwanted answer", "column label"),
        ({"messages": [USER, REPLY], "images": ["a.png"]}, "not text alone", "column images: .*only text is trained"),
        ({"messages": [USER, REPLY], "audio": {"path": "a.wav"}}, "not text alone", "column audio"),
        (
            {"messages": [USER | {"content": "<image>What is it?"}, REPLY], "images": []},
            "not text alone",
            r"column messages\[0\].content: <image> is a placeholder for something that is not text",
        ),
        (PAIR | {"rejected": "5"}, "preference data", "column rejected: this is preference data"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "preference data", "data.response_key=chosen"),
        ({"conversations": [USER], "chosen": REPLY, "rejected": REPLY}, "preference data", "set data.format"),
    ],
)
def test_columns_that_change_what_a_row_means_are_not_passed_over(
    columns: dict[str, Any], reason: str, message: str
) -> None:
    with pytest.raises(RowError, match=message) as caught:
        chat(columns)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (PAIR | {"label": True, "kto_tag": None, "images": [], "image": None}, {}),
        (PAIR | {"label": 0}, {}),  # a class, for all one knows
        ({"messages": [USER, REPLY], "chosen": "4", "rejected": "5"}, {"format": "messages"}),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {"prompt_key": "prompt", "response_key": "chosen"}),
        ({"conversations": [USER], "chosen": REPLY}, {"prompt_key": "conversations", "response_key": "chosen"}),
        ({"prompt": "2+2?", "chosen": [USER, REPLY], "rejected": []}, {"messages_key": "chosen"}),
        ({"prompt": "2+2?", "label": "4"}, {"prompt_key": "prompt", "response_key": "label"}),
    ],
)
def test_such_columns_may_be_named_or_hold_nothing(columns: dict[str, Any], options: dict[str, Any]) -> None:
    made = chat(columns, **options)
    assert (made.messages, made.train) == ([USER, REPLY], (False, True))


def test_a_response_that_is_a_whole_conversation_is_not_put_behind_its_prompt() -> None:
    with pytest.raises(RowError, match=r"begins with a message of role user.*data.multiturn.messages_key=chosen"):
        chat({"prompt": "2+2?", "chosen": [USER, REPLY]}, prompt_key="prompt", response_key="chosen")


@pytest.mark.parametrize(
    ("columns", "options", "unused"),
    [
        ({"messages": [], "conversations": [], "tools": [], "id": 1}, {}, ["conversations", "id"]),
        (PAIR | {"system": "s", "note": "n"}, {"system_key": "note"}, ["system"]),
        ({"instruction": "", "output": "", "input": "", "source": ""}, {}, ["source"]),
        ({"input_ids": [], "labels": [], "text": ""}, {}, ["text"]),
    ],
)
def test_unused_columns_are_told(
    columns: dict[str, Any], options: dict[str, Any], unused: list[str], tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(columns))
    (source,) = resolve_sources(str(tmp_path / "x.jsonl"))
    row_format = RowFormat(**options)
    assert unused_columns(source, recognise(list(columns), first_row(source), row_format), row_format) == unused
    assert unused_columns(source, "custom", row_format) == []


# ---- forms that are read


def test_messages_may_be_json_text_and_parts_have_values() -> None:
    assert chat({"messages": json.dumps([USER, REPLY])}).messages == [USER, REPLY]
    parts = [{"type": "reasoning", "value": "so"}, {"type": "text", "value": "4"}]
    made = chat({"messages": [USER, REPLY | {"content": parts}]})
    assert made.messages[1] == REPLY | {"reasoning_content": "so"}
    assert chat({"messages": [USER, {"from": "gpt", "value": "4"}]}).messages == [USER, REPLY]
    with pytest.raises(RowError, match="column messages: expected a list of messages, but the text is not JSON"):
        chat({"messages": "[{"})


def test_nulls_that_a_tool_definition_has_as_text_stay() -> None:
    """Arrow adds nulls to objects; to JSON text only its author does, and inference would see them."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"required": None}}}
    for tools in (json.dumps([tool]), [json.dumps(tool)]):
        assert chat({"messages": [USER, REPLY], "tools": tools}).tools == [tool]
    bare = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert chat({"messages": [USER, REPLY], "tools": [tool]}).tools == [bare]


# ---- through files


def test_arrow_round_trip_strips_its_nulls_and_keeps_those_in_json(tmp_path: Path) -> None:
    """One row's tool call must not give keys to another's, nor to messages that have none."""

    def call(arguments: Any) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }

    rows = [
        {"messages": [USER, call({"city": "Rome"}), {"role": "tool", "content": "1", "name": "f"}, REPLY]},
        {
            "messages": [USER, call({"day": 3}), REPLY | {"weight": 0.5}],
            "tools": [{"name": "f", "parameters": {"a": 1}}],
        },
        {"messages": [USER, REPLY], "tools": [{"name": "g", "description": "d"}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema(rows)), tmp_path / "x.parquet")
    text = [{"messages": [USER, call('{"city": "Rome", "day": null}'), REPLY]}]
    pq.write_table(pa.Table.from_pylist(text), tmp_path / "y.parquet")
    made = {name: _read(tmp_path / f"{name}.parquet") for name in "xy"}
    assert made["x"] == [chat(row) for row in rows]
    assert made["x"][0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert made["x"][2].messages == [USER, REPLY]
    assert made["x"][2].tools == [{"type": "function", "function": {"name": "g", "description": "d"}}]
    assert made["y"][0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "day": None}


def _schema(rows: list[dict[str, Any]]) -> pa.Schema:
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in ("messages", "tools")])


def _read(path: Path) -> list[Conversation]:
    (source,) = resolve_sources(str(path))
    options = format_of(source, RowFormat())
    adapter = recognise(list(first_row(source).columns), first_row(source), options)
    made = [to_conversation(row, adapter, options) for row in read_rows(source)]
    return [conversation for conversation in made if isinstance(conversation, Conversation)]


@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_files_with_dict_columns(tmp_path: Path, rows: int) -> None:
    table = pa.Table.from_pylist([{"extra_info": {"question": "2+2?", "answer": "4"}}] * rows)
    pq.write_table(table, tmp_path / "x.parquet")
    keys: dict[str, Any] = {"prompt_key": "extra_info", "response_key": "extra_info"}
    (source,) = resolve_sources(str(tmp_path / "x.parquet"))
    for row in read_rows(source):
        assert chat(row.columns, **keys, prompt_dict_keys=["question"], response_dict_keys=["answer"]).messages == [
            USER,
            REPLY,
        ]


def test_csv_rows_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("question,answer,system\n2+2?,4,\n")
    assert _read(tmp_path / "x.csv")[0].messages == [USER, REPLY]


def test_real_data_needs_nothing_but_its_path(real_data: Path) -> None:
    gsm8k = _read(real_data / "gsm8k" / "train.jsonl")
    assert len(gsm8k) == 7473
    assert gsm8k[0].messages[1]["content"].endswith("#### 72")
    glaive = _read(real_data / "sharegpt" / "glaive_toolcall_en_demo.json")
    assert len(glaive) == 300
    assert glaive[0].messages[3]["tool_calls"][0]["function"] == {
        "name": "search_recipes",
        "arguments": {"ingredients": ["chicken", "bell peppers", "rice"]},
    }
    assert glaive[0].tools is not None and glaive[0].tools[0]["function"]["name"] == "search_recipes"
    assert [m["role"] for m in glaive[0].messages][3:6] == ["assistant", "tool", "assistant"]
    assert glaive[0].train == (False, True, False, True, False, True, False, True)


# ---- the user's own class

CUSTOM = """
import fsdpsft.data.rows.conversation as c

class Good:
    def to_conversation(self, row):
        if "refuse" in row:
            raise ValueError("this one is spam")
        return {"messages": [{"role": "user", "content": row["ask"]}, {"role": "assistant", "content": row["reply"]}]}

class Pair:
    def to_conversation(self, row):
        return {"prompt": row["ask"], "response": row["reply"]}

class Bad:
    def to_conversation(self, row):
        return row["ask"]

class Needy:
    def __init__(self, x):
        pass

class Other:
    pass
"""


@pytest.fixture
def custom(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CUSTOM)
    return str(tmp_path / "mine.py")


def test_custom_class(custom: str) -> None:
    row = Row("f", 2, {"ask": "2+2?", "reply": "4"})
    for name in ("Good", "Pair"):
        made = custom_conversation(row, load_custom_rows(custom, name), RowFormat())
        assert isinstance(made, Conversation)
        assert (made.messages, made.train) == ([USER, REPLY], (False, True))
    for columns, name, message in (
        ({"refuse": 1}, "Good", r"f, row 2: Good\.to_conversation raised ValueError: this one is spam"),
        ({}, "Good", r"Good\.to_conversation raised KeyError: 'ask'"),
        ({"ask": "q", "reply": ""}, "Good", r"f, row 2, column messages\[1\]\.content"),
        ({"ask": "q"}, "Bad", "Bad.to_conversation must return a dict .*, found str"),
    ):
        with pytest.raises(RowError, match=message):
            custom_conversation(Row("f", 2, columns), load_custom_rows(custom, name), RowFormat())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Gone", "no class Gone .*the classes are Bad, Good, Needy, Other, Pair"),
        ("Needy", r"creating Needy\(\) without arguments raised TypeError"),
        ("Other", "the class Other needs a method to_conversation"),
    ],
)
def test_custom_class_that_does_not_fit(custom: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_custom_rows(custom, name)


def test_custom_file_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "text.txt").write_text("")
    for file, message in (
        ("gone.py", "no such file"),
        ("broken.py", "importing it raised ModuleNotFoundError"),
        ("text.txt", "not a Python file"),
    ):
        with pytest.raises(DataError, match=message):
            load_custom_rows(str(tmp_path / file), "X")
