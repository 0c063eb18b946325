"""Rows to samples with the real template code: every kind of row, and the whole way into a store."""

from __future__ import annotations

import json
import pickle
import textwrap

import pytest

from fsdpsft.data.batches.store_build import open_or_build
from fsdpsft.data.batches.store_parts import BuildOptions
from fsdpsft.data.mask.row_encoder import RowEncoder
from fsdpsft.data.rows.conversation import RowFormat
from fsdpsft.data.rows.sources import read_rows, resolve_sources
from fsdpsft.errors import DataError, RowError
from fsdpsft.testing import CHATML, tiny_tokenizer

TALK = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "The answer is 7."}]
OPTIONS = BuildOptions(num_workers=2)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return resolve_sources(str(path))


def trained_text(tokenizer, sample):
    return tokenizer.decode([i for i, w in zip(sample.input_ids, sample.loss_weights, strict=True) if w > 0])


def test_conversations_and_token_rows_and_bad_rows_in_their_places(tmp_path, tokenizer):
    sources = written(
        tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": []}, {"messages": TALK[::-1][1:]}, {"messages": TALK}]
    )
    encoder = RowEncoder(sources, tokenizer)
    first, empty, silent, last = encoder.encode(sources[0], list(read_rows(sources[0])))
    assert trained_text(tokenizer, first[0]) == trained_text(tokenizer, last[0]) == "The answer is 7.<|im_end|>"
    for error, row in ((empty, 1), (silent, 2)):
        assert isinstance(error, RowError)
        assert f"a.jsonl, row {row}" in str(error)
    tokens = written(tmp_path / "b.jsonl", [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}])
    (sample,) = RowEncoder(tokens, tiny_tokenizer(template=None)).encode(tokens[0], list(read_rows(tokens[0])))[0]
    assert (sample.input_ids.tolist(), sample.loss_weights.tolist()) == ([5, 6, 7], [0, 1, 1])


def test_template_error_becomes_a_row_error_with_a_constant_reason(tmp_path, tokenizer):
    rows = [{"messages": [{"role": "user", "content": f"{i} <|im_end|>"}, TALK[1]]} for i in range(3)]
    sources = written(tmp_path / "a.jsonl", rows)
    encoder = RowEncoder(sources, tokenizer, special_tokens_in_content="refuse")
    results = encoder.encode(sources[0], list(read_rows(sources[0])))
    assert all(isinstance(result, RowError) for result in results)
    assert "row 2" in str(results[2])
    assert len({result.reason for result in results}) == 1
    (escaped,) = RowEncoder(sources, tokenizer).encode(sources[0], list(read_rows(sources[0])))[0]
    assert escaped.escaped == 1


def test_no_template_and_unknown_columns_are_named_before_any_work(tmp_path, tokenizer):
    sources = written(tmp_path / "a.jsonl", [{"messages": TALK}])
    with pytest.raises(DataError, match="chat_template=chatml"):
        RowEncoder(sources, tiny_tokenizer(template=None))
    with pytest.raises(DataError, match="left, right"):
        RowEncoder(written(tmp_path / "b.jsonl", [{"left": 1, "right": 2}]), tokenizer)


def test_fingerprint_follows_all_that_decides_the_tokens(tmp_path, tokenizer):
    sources = written(tmp_path / "a.jsonl", [{"messages": TALK}])
    custom = tmp_path / "custom.py"
    body = "class Rows:\n    def to_conversation(self, row):\n        return row\n"
    custom.write_text(body)
    known = RowEncoder(sources, tokenizer).fingerprint
    assert RowEncoder(sources, tiny_tokenizer()).fingerprint == known
    others = [
        RowEncoder(sources, tokenizer, RowFormat(train_on_turns="last")).fingerprint,
        RowEncoder(sources, tokenizer, chat_template="chatml").fingerprint,
        RowEncoder(sources, tokenizer, history="per_turn").fingerprint,
        RowEncoder(sources, tokenizer, special_tokens_in_content="refuse").fingerprint,
        RowEncoder(sources, tokenizer, custom_cls=(str(custom), "Rows")).fingerprint,
        RowEncoder(sources, tiny_tokenizer(vocab_size=300)).fingerprint,
    ]
    custom.write_text(body + "\n# changed\n")
    others.append(RowEncoder(sources, tokenizer, custom_cls=(str(custom), "Rows")).fingerprint)
    assert len({known, *others}) == 8


def test_pickled_encoder_encodes_the_same(tmp_path, tokenizer):
    sources = written(tmp_path / "a.jsonl", [{"messages": TALK}])
    encoder = RowEncoder(sources, tokenizer)
    copy = pickle.loads(pickle.dumps(encoder))
    rows = list(read_rows(sources[0]))
    (first,), (second,) = encoder.encode(sources[0], rows)[0], copy.encode(sources[0], rows)[0]
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.loss_weights.tolist() == second.loss_weights.tolist()
    assert copy.fingerprint == encoder.fingerprint


def test_custom_class(tmp_path, tokenizer):
    custom = tmp_path / "custom.py"
    custom.write_text(
        textwrap.dedent(
            """
            class Rows:
                def to_conversation(self, row):
                    return {"prompt": row["ask"], "response": row["say"]}
            """
        )
    )
    sources = written(tmp_path / "a.jsonl", [{"ask": "hello", "say": "good day"}, {"ask": "hello"}])
    encoder = RowEncoder(sources, tokenizer, custom_cls=(str(custom), "Rows"))
    good, bad = encoder.encode(sources[0], list(read_rows(sources[0])))
    assert trained_text(tokenizer, good[0]) == "good day<|im_end|>"
    assert "row 1" in str(bad)
    assert "KeyError" in bad.reason


def test_real_files_into_a_store(real_data, tmp_path, tokenizer):
    spec = [str(real_data / "gsm8k" / "test.jsonl"), str(real_data / "sharegpt" / "glaive_toolcall_en_demo.json")]
    sources = resolve_sources(spec)
    encoder = RowEncoder(sources, tokenizer, chat_template="chatml")
    store = open_or_build(sources, encoder, BuildOptions(max_length=100_000), tmp_path, progress=False)
    assert store.stats["skipped"] == store.stats["dropped"] == {}
    assert sum(store.source_counts) == len(store) == store.stats["rows"]
    assert min(store.source_counts) > 0
    for index in (0, store.source_counts[0] - 1, store.source_counts[0], len(store) - 1):
        sample = store.sample(index)
        assert trained_text(tokenizer, sample).endswith("<|im_end|>")
        assert store.trained[index] == (sample.loss_weights[1:] > 0).sum()


@pytest.mark.parametrize("train", [True, False])
def test_a_refused_conversation_that_begins_with_the_assistant_has_a_hint(tmp_path, train):
    """Templates that look at the first message cannot prompt for it."""
    looks = "{% if messages[0]['role'] == 'system' %}{% endif %}"
    refuses = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    turns = [("assistant", "Hello."), ("user", "hi"), ("assistant", "yes")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[0]["train"] = train
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    (source,) = resolve_sources(str(file))
    encoder = RowEncoder([source], tiny_tokenizer((looks if train else refuses) + CHATML), eos_token_ids=[2])
    (result,) = encoder.encode(source, list(read_rows(source)))
    assert isinstance(result, RowError)
    assert str(result).startswith(f"{file}, row 0 (line 1): ")
    assert "begins with the assistant" in str(result) and ("train: false" in str(result)) is train
