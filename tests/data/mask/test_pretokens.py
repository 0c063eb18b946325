"""Tokenising by table against the tokenizer itself, on the expressions of the tokenizers that people train with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from fsdpsft.data.mask import pretokens
from fsdpsft.data.mask.pretoken_cuts import Unlike, translate
from fsdpsft.data.mask.pretokens import PreTokenizer

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The quick brown fox doesn't jump over 12,345 lazy dogs; it's THEIR day.\n\n  def main():\n\treturn [x ** 2]",
    "Größe, façade, naïve — “quoted” … 漢字かな交じり文 русский язык हिन्दी 한국어 العربية \u00a0x\u2003y",
] * 3
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_end|>x"]


def byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "qwen": lambda: pre_tokenizers.Sequence([split(QWEN), byte_level()]),
    "llama3": lambda: pre_tokenizers.Sequence([split(LLAMA3), byte_level()]),
    "o200k": lambda: pre_tokenizers.Sequence([split(O200K), byte_level()]),
    "digits": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "several cuts with gaps": lambda: pre_tokenizers.Sequence(
        [split(r"\p{N}{1,3}"), split(r"[一-龥ぁ-ヿ]+"), split(r"\s+|[!&~\]-]?[A-Za-z]+"), byte_level()]
    ),
}


def tokenizer(
    pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return backend


BACKENDS = {
    name: tokenizer(make(), normalizers.NFC() if name == "qwen" else None) for name, make in PRE_TOKENIZERS.items()
}
TABLES = {name: PreTokenizer.of(backend) for name, backend in BACKENDS.items()}

WORDS = st.sampled_from([
    " ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2003", "'s", "'LL", "'\u017f", "don't", "a", "Word",
    "word", "3", "12345", "²", "Ⅷ", ".", "...", "!?", "—", "é", "e\u0301", "ß", "Ǆ", "ʰ", "漢字", "かな", "हिन्दी",
    "العربية", "😀", "👩‍👩‍👧", "\U0001d49c", "\x00", "\x1c", "\x85", "\u200b", "\ufeff", "<", "|", "<|im", *SPECIAL,
])  # fmt: skip
TEXTS = st.one_of(st.lists(WORDS, max_size=30).map("".join), st.text(max_size=40))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_the_ids_are_the_tokenizers(name: str, text: str) -> None:
    table = TABLES[name]
    assert table is not None
    ids = table.encode(text)
    if ids is not None:
        assert ids.tolist() == BACKENDS[name].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ordinary_text_goes_by_table(name: str) -> None:
    """A table that hands everything back would pass the test above."""
    table = TABLES[name]
    assert table is not None
    for text in [*CORPUS, "Ask: 2 + 2?<|im_end|>\n<|im_start|>assistant\nIt is 4 — “four” 😀.<|im_end|>"]:
        ids = table.encode(text)
        assert ids is not None
        assert ids.tolist() == BACKENDS[name].encode(text, add_special_tokens=False).ids
        assert ids.dtype == np.uint32


@pytest.mark.parametrize(
    ("name", "by_spaces"), [("gpt2", True), ("qwen", True), ("llama3", True), ("o200k", True), ("digits", False)]
)
def test_which_expressions_let_texts_be_cut_at_spaces(name: str, by_spaces: bool) -> None:
    table = TABLES[name]
    assert table is not None
    assert table.cuts_at_spaces is by_spaces


@pytest.mark.parametrize("steps", [[], [normalizers.NFC()]])
def test_a_normalizer_may_be_a_sequence(steps: list[normalizers.Normalizer]) -> None:
    """An empty one changes nothing; as such it is DeepSeek's."""
    backend = tokenizer(PRE_TOKENIZERS["qwen"](), normalizers.Sequence(steps))
    table = PreTokenizer.of(backend)
    assert table is not None
    assert (table.encode("e\u0301") is None) == bool(steps)
    for text in CORPUS:
        ids = table.encode(text)
        assert ids is not None
        assert ids.tolist() == backend.encode(text, add_special_tokens=False).ids


def test_the_table_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokens, "ENABLED", False)
    assert PreTokenizer.of(BACKENDS["qwen"]) is None


def test_nearly_all_characters_are_cut_alike() -> None:
    table = PreTokenizer.of(BACKENDS["qwen"])
    assert table is not None
    sample = [chr(number) for number in range(0, 0xD800, 23)]
    differing = [character for character in sample if table.encode(character) is None]
    composed = [character for character in differing if normalizers.NFC().normalize_str(character) != character]
    assert len(differing) - len(composed) < 0.03 * len(sample)


def test_a_character_that_only_the_tokenizer_knows_is_left_to_it() -> None:
    table = TABLES["qwen"]
    assert table is not None
    assert table.encode("plain") is not None
    assert table.encode("\U0001d49c") is None  # a letter beyond the planes that our classes spell out
    assert table.encode("half \ud83d a character") is None
    assert table.encode("e\u0301") is None  # which NFC would change
    assert TABLES["llama3"] is not None
    assert TABLES["llama3"].encode("e\u0301") is not None  # no normalizer, no change


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip", "normalized"])
def test_added_tokens_that_take_more_than_their_text_are_left_to_the_tokenizer(flag: str) -> None:
    backend = tokenizer(PRE_TOKENIZERS["gpt2"]())
    backend.add_tokens([AddedToken("<odd>", **{"normalized": False, flag: True})])
    table = PreTokenizer.of(backend)
    assert table is not None
    assert table.encode("plain text") is not None
    assert table.encode("with <odd> in it") is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: tokenizer(pre_tokenizers.Metaspace()),
        lambda: tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), byte_level()])),
        lambda: tokenizer(pre_tokenizers.Sequence([split(r"\w+|\W"), byte_level()])),
        lambda: tokenizer(PRE_TOKENIZERS["gpt2"](), normalizers.Lowercase()),
        lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ],
)
def test_other_tokenizers_are_not_touched(make: Callable[[], Tokenizer]) -> None:
    assert PreTokenizer.of(make()) is None


@pytest.mark.parametrize(
    "pattern",
    [r"(a)", r"\d+", r"\bx", r"[a&&b]", r"[[a]b]", r"a{2}+", r"^a", r"a$", r"a.b", r"\p{Script=Han}", r"[\S]", r"[a"],
)
def test_constructs_that_could_mean_something_else_are_refused(pattern: str) -> None:
    with pytest.raises(Unlike):
        translate(pattern)


def test_a_wrong_table_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokens, "AUDIT_EVERY", 2)
    table = PreTokenizer.of(BACKENDS["gpt2"])
    assert table is not None
    table.encode("fine")
    monkeypatch.setattr(table, "_split", lambda pretoken: b"\0\0\0\0")
    monkeypatch.setattr(table._pretokens, "_compute", table._split)
    table.encode("wrong, but not looked at")
    with pytest.raises(AssertionError, match="otherwise than the tokenizer"):
        table.encode("wrong and looked at")


def test_added_tokens_are_remembered_for_the_texts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokens, "_MOST_CHARACTERS", 60)
    table = PreTokenizer.of(BACKENDS["gpt2"])
    assert table is not None
    text = "ab<|im_start|>cd<|im_end|>"
    ids = BACKENDS["gpt2"].encode(text, add_special_tokens=False).ids
    table.encode(text)
    number = BACKENDS["gpt2"].get_vocab()
    first, second = ids.index(number["<|im_start|>"]), ids.index(number["<|im_end|>"])
    places = [table.anchor(text, position) for position in (2, 3, 16, 17, 26)]
    assert places == [None, (2, first), (2, first), (16, second), (16, second)]
    table.encode("another text, long enough to push the first one out")
    assert table.anchor(text, 26) is None


def test_a_full_table_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokens, "_MOST_KEYS", 8)
    table = PreTokenizer.of(BACKENDS["gpt2"])
    assert table is not None
    for number in range(40):
        text = f"<|im_start|>number {number} of several more words like word{number}<|im_end|>"
        ids = table.encode(text)
        assert ids is not None
        assert ids.tolist() == BACKENDS["gpt2"].encode(text, add_special_tokens=False).ids
        assert max(len(table._pretokens), len(table._words), len(table._pieces)) <= 8 + len(SPECIAL)
