"""LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fsdpsft.data.rows.conversation import Conversation, RowFormat, format_of, recognise, to_conversation
from fsdpsft.data.rows.sources import first_row, resolve_sources
from fsdpsft.errors import DataError


def write(folder: Path, entries: dict[str, Any], **files: Any) -> str:
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return str(folder / "dataset_info.json")


def first(folder: Path, name: str) -> Conversation:
    (source,) = resolve_sources([name], str(folder))
    options = format_of(source, RowFormat())
    row = first_row(source)
    conversation = to_conversation(row, recognise(list(row.columns), row, options), options)
    assert isinstance(conversation, Conversation)
    return conversation


def test_alpaca_is_the_default_with_columns_mapped(tmp_path: Path) -> None:
    columns = {"prompt": "ask", "query": "about", "response": "reply", "system": "rules", "history": "before"}
    row = {
        "ask": "Sum up",
        "about": "Text",
        "reply": "Short",
        "rules": "Be brief",
        "before": [["q", "a"]],
        "instruction": 7,
    }
    write(tmp_path, {"mine": {"file_name": "d.json", "columns": columns}}, d=[row])
    assert [(m["role"], m["content"]) for m in first(tmp_path, "mine").messages] == [
        ("system", "Be brief"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Sum up\nText"),
        ("assistant", "Short"),
    ]


def test_sharegpt_with_tags(tmp_path: Path) -> None:
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "customer", "assistant_tag": "agent"}
    tags |= {"observation_tag": "result", "function_tag": "use", "system_tag": "boss"}
    turns = [
        ("boss", "s"),
        ("customer", "u"),
        ("use", '{"name": "f", "arguments": {}}'),
        ("result", "4"),
        ("agent", "a"),
    ]
    rows = [{"talk": [{"who": who, "says": says} for who, says in turns]}]
    entry = {"file_name": "d.json", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags}
    write(tmp_path, {"mine": entry}, d=rows)
    conversation = first(tmp_path, "mine")
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.train == (False, False, True, False, True)
    assert conversation.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_openai_formatting_and_the_sources_name(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}]
    info = write(tmp_path, {"mine": {"file_name": "d.json", "formatting": "openai"}}, d=rows)
    assert len(first(tmp_path, "mine").messages) == 2
    (source,) = resolve_sources({"path": "mine", "weight": 2}, info)
    assert (source.name, source.weight, Path(source.files[0]).name) == ("mine", 2.0, "d.json")


def test_paths_still_work_beside_names(tmp_path: Path) -> None:
    info = write(tmp_path, {"mine": {"file_name": "d.json"}}, d=[{"a": 1}], e=[{"a": 1}])
    assert [s.name for s in resolve_sources(["mine", str(tmp_path / "e.json")], info)] == ["mine", "e"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "d.json", "ranking": True}, "ranking=True is not supported; preference data"),
        ({"file_name": "d.json", "num_samples": 5}, "num_samples=5 is not supported; use data.train_max_samples"),
        ({"script_url": "x"}, "script_url='x' is not supported"),
        ({"ms_hub_url": "x/y"}, "names neither file_name nor hf_hub_url"),
        ({"file_name": "d.json", "formating": "alpaca"}, "unknown key formating; did you mean formatting"),
        ({"file_name": "d.json", "formatting": "xml"}, "formatting='xml' is not one of alpaca, sharegpt, openai"),
        ({"file_name": "d.json", "columns": {"images": "i"}}, "images='i' is not supported: only text"),
        ({"file_name": "d.json", "columns": {"kto_tag": "label"}}, "kto_tag='label' is not supported: preference data"),
        ({"file_name": "d.json", "columns": {"promt": "i"}}, "unknown key promt; did you mean prompt"),
        ({"file_name": "d.json", "formatting": ["alpaca"]}, "is not one of alpaca, sharegpt, openai"),
        ({"file_name": "d.json", "tags": {"user_tag": ["human"]}}, r"user_tag must be text, found \['human'\]"),
        ({"file_name": "d" * 5000}, "not a path that can be opened"),
        ({"file_name": "d.json", "tags": {"user": "i"}}, "tags: unknown key user"),
        ({"file_name": "d.json", "tags": []}, None),
        ({"file_name": "gone.json"}, r"gone\.json: no such file or folder"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path: Path, entry: dict[str, Any], message: str | None) -> None:
    info = write(tmp_path, {"mine": entry}, d=[{"a": 1}])
    if message is None:
        assert len(resolve_sources("mine", info)) == 1
        return
    with pytest.raises(DataError, match=message):
        resolve_sources("mine", info)


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    info = write(tmp_path, {"mine": {"file_name": "d.json"}}, d=[{"a": 1}])
    with pytest.raises(DataError, match=r"dataset_info\.json has the data sets mine"):
        resolve_sources("yours", info)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', "\x00", "[" * 100_000])
def test_broken_info(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(DataError, match=r"data\.dataset_info="):
        resolve_sources("mine", str(tmp_path))
    with pytest.raises(DataError, match=r"data\.dataset_info="):
        resolve_sources("mine", str(tmp_path / "gone.json"))
