"""How a byte-level tokenizer cuts texts into pre-tokens, as functions of ``re``.

Tokenizers state it as regular expressions in Oniguruma's dialect (with Ruby's syntax). An expression is used only
if each of its constructs means the same in ``re``; classes of characters, which follow the Unicode version at hand, are
spelt out from ``unicodedata``.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any, TypeAlias

from tokenizers import pre_tokenizers

Cut: TypeAlias = Callable[[str], list[str]]

# The expression that is built into the ByteLevel pre-tokenizer (GPT-2's).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Alternatives whose matches hold a space only at their beginning or among white space alone, and which look no further
# than whether white space goes on behind them. Where an expression has no others, a text may be cut before each single
# space, and the parts cut as they stand.
_SPACE_ONLY_FIRST = {
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"(?i:[sdmt]|ll|ve|re)",
    r" ?\p{L}+", r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,2}", r"\p{N}{1,3}", r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
}  # fmt: skip

_WHITE_SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
_CONTEXTS = "{0}|a{0}a|A{0}A|a{0}A|A{0}a|1{0}1|.{0}.|'{0}|'{0}a|\n{0}\n| {0} |  {0}{0}  |{0}\n|{0}1|a{0}1"

_ESCAPE = r"\\(?P<property>[pP])\{(?P<category>[A-Z][a-z]?)\} | \\(?P<space>[sS]) | \\(?P<plain>[rntf]|[^\w\s])"
# Not among them: "." "^" "$", which differ at line ends; groups that are counted; "{2}+", there a repetition of a
# repetition and here a possessive one; within a class, another class, an intersection or a difference.
_OUTSIDE = re.compile(
    rf"{_ESCAPE} | (?P<group>\((?:\?:|\?i:|\?=|\?!|\?<=|\?<!)) | (?P<count>\{{\d+(?:,\d*)?\}}(?!\+)) | (?P<open>\[\^?)"
    r"| (?P<other>[^\\(^$.{\[\]])",
    re.VERBOSE,
)
_IN_CLASS = re.compile(rf"{_ESCAPE} | (?P<close>\]) | (?P<other>(?!&&|--|~~|\|\|)[^\\\[])", re.VERBOSE)


class Unlike(Exception):  # noqa: N818
    """The tokenizer cuts texts in a way that this module cannot."""


def require(condition: bool) -> None:
    """Raise ``Unlike`` unless the condition holds."""
    if not condition:
        raise Unlike


def in_contexts(character: str) -> str:
    """A text that shows how a character is cut: alone and next to itself, letters, digits, signs and white space."""
    return _CONTEXTS.replace("{0}", character)


def cut_of(pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> tuple[Cut, bool]:
    """What cuts a text into pre-tokens, and whether a single space always begins one.

    The second is about single spaces between other characters than white space.

    Args:
        pre_tokenizer: ByteLevel, or a sequence of isolating splits that ends with it.

    Raises:
        Unlike: another one.
    """
    require(pre_tokenizer is not None)
    settings = json.loads(pre_tokenizer.__getstate__())  # type: ignore[union-attr, arg-type]  # as in tokenizer.json
    *steps, last = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    require(last["type"] == "ByteLevel" and not last["add_prefix_space"])
    patterns = [_pattern(step) for step in steps] + ([_GPT2] if last["use_regex"] else [])
    require(bool(patterns))
    cuts = [_cutter(pattern) for pattern in patterns]
    if len(cuts) == 1:
        return cuts[0], _SPACE_ONLY_FIRST.issuperset(re.split(r"\|(?![^(]*\))", patterns[0]))
    return partial(_cut_in_turn, cuts), False


def _cut_in_turn(cuts: Sequence[Cut], text: str) -> list[str]:
    pretokens = [text]
    for cut in cuts:
        pretokens = list(chain.from_iterable(map(cut, pretokens)))
    return pretokens


def _pattern(step: dict[str, Any]) -> str:
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    require(step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"])
    require("Regex" in step["pattern"])
    return str(step["pattern"]["Regex"])


def _cutter(pattern: str) -> Cut:
    expression = translate(pattern)
    find, split = re.compile(expression).findall, re.compile(f"({expression})").split
    samples = [in_contexts(chr(number)) for number in range(128)]
    if all("".join(find(sample)) == sample for sample in samples):
        return find
    return lambda text: [piece for piece in split(text) if piece]  # what lies between two finds is a piece too


def translate(pattern: str) -> str:
    """An expression of the tokenizers' dialect for ``re``.

    Raises:
        Unlike: a construct that ``re`` lacks or may read otherwise.
    """
    parts: list[str] = []
    position, in_class = 0, False
    while position < len(pattern):
        found = (_IN_CLASS if in_class else _OUTSIDE).match(pattern, position)
        if found is None:
            raise Unlike
        position = found.end()
        text, kind = found.group(), found.lastgroup
        if kind in ("category", "space"):
            members = _WHITE_SPACE if kind == "space" else _category(found["category"])
            negated = found[1] == "P" or found["space"] == "S"
            require(not (in_class and negated))
            text = members if in_class else f"[^{members}]" if negated else f"[{members}]"
        elif kind in ("open", "close"):
            in_class = not in_class
        parts.append(text)
    require(not in_class)
    return "".join(parts)


@lru_cache
def _category(name: str) -> str:
    """The members of a general category as ranges of a class, within the first plane.

    Beyond it ``re`` would walk through the ranges one by one; those few letters are the tokenizer's.
    """
    runs = [run.span() for run in re.finditer(f"(?:{name.ljust(2, '.')})+", _categories())]
    require(bool(runs))
    return "".join(f"\\u{start // 2:04x}-\\u{end // 2 - 1:04x}" for start, end in runs)


@lru_cache
def _categories() -> str:
    """The categories of the characters of the first plane, two letters each."""
    return "".join(map(unicodedata.category, map(chr, range(1 << 16))))


def trie_pattern(words: Iterable[str]) -> str:
    """A regular expression for the longest of ``words``, factored by common prefixes so that thousands stay fast."""
    root: dict[str, dict] = {}  # type: ignore[type-arg]
    for word in words:
        node = root
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def build(node: dict[str, dict]) -> str:  # type: ignore[type-arg]
        branches = []
        while len(node) == 1 and "" not in node:  # a run without forks needs no group
            character, node = next(iter(node.items()))
            branches.append(re.escape(character))
        run = "".join(branches)
        if not any(node):
            return run
        choices = "|".join(re.escape(character) + build(child) for character, child in node.items() if character)
        return f"{run}(?:{choices})" + ("?" if "" in node else "")

    return build(root) if root else "(?!)"
