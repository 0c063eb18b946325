"""Tokenising by a table of pre-tokens: several times as fast as the tokenizer, and held to be equal to it.

A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen, GPT-OSS, SmolLM, DeepSeek) cuts a text by regular expressions into
pre-tokens and merges bytes only within each. Texts repeat their words, so the ids of each distinct pre-token are
computed once, by the tokenizer's own model, and looked up from then on. What is ours is the cutting
(``pretoken_cuts``); it is right where it cuts as the tokenizer does, and that is not taken for granted:

* each character is tried in many contexts, by the tokenizer and by us, before a text that holds it is cut here;
  a text with a character on which the two differ (another Unicode version, say) goes to the tokenizer;
* one text in ``AUDIT_EVERY`` is tokenised both ways.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models, normalizers

from fsdpsft.data.mask.pretoken_cuts import Unlike, cut_of, in_contexts, require, trie_pattern

ENABLED = True  # False: the tokenizer alone, for measurements
AUDIT_EVERY = 512
_MOST_KEYS = 1 << 17  # some 20 MB a table
_LONGEST_KEY = 48  # longer ones seldom come again
_MOST_CHARACTERS = 1 << 23  # of the texts whose added tokens are remembered: more than a batch of rows has
_ID_BYTES = 4
_SHORT = 12  # as long as the text between added tokens that each turn repeats ("assistant\n")

# Byte-level tokenizers write bytes that are not printable in Latin-1 as the characters from 256 on (as GPT-2 does).
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_SPELLING = {byte: 256 + number for number, byte in enumerate(b for b in range(256) if b not in _PRINTABLE)}


class Table(dict[str, bytes]):
    """Ids of strings met so far, as the bytes of uint32 arrays; fills itself, and starts anew when it is full.

    Args:
        compute: the ids of a string that is not in it.
        fixed: what is in it from the start and stays.
    """

    def __init__(self, compute: Callable[[str], bytes], fixed: Mapping[str, bytes]) -> None:
        """Begin with what is fixed."""
        super().__init__(fixed)
        self._compute = compute
        self._fixed = fixed

    def __missing__(self, key: str) -> bytes:
        """Compute and keep."""
        ids = self._compute(key)
        if len(key) <= _LONGEST_KEY:
            if len(self) >= _MOST_KEYS:
                self.clear()
                self.update(self._fixed)
            self[key] = ids
        return ids


class PreTokenizer:
    """A byte-level BPE tokenizer by table; make one with ``of``.

    Attributes:
        cuts_at_spaces: texts are looked up by words, not only by pre-tokens.
    """

    def __init__(self, backend: Tokenizer) -> None:
        """See ``of``."""
        require(isinstance(backend.model, models.BPE) and not backend.model.dropout)
        require(_steps(backend.normalizer) in ([], ["NFC"]))
        self._backend, self._model = backend, backend.model
        self._composes = bool(_steps(backend.normalizer))
        self._cut, self.cuts_at_spaces = cut_of(backend.pre_tokenizer)
        added = {number: token for number, token in backend.get_added_tokens_decoder().items() if token.content}
        ours = {token.content: number for number, token in added.items() if not _is_odd(token)}
        odd = [token.content for token in added.values() if _is_odd(token)]
        self._odd = re.compile(trie_pattern(odd)) if odd else None
        self._at_added = re.compile("(" + trie_pattern(ours) + ")")
        # Added tokens are in it too: no pre-token can look like one, as texts are cut at them first.
        self._pretokens = Table(self._split, {text: _as_bytes([number]) for text, number in ours.items()})
        self._words = Table(self._inner_word, {})
        self._pieces = Table(self._by_pretokens, {})
        self._anchors: dict[str, list[tuple[int, int]]] = {}
        self._characters = 0  # of the texts in it
        self._trusted: set[str] = set()
        self._differing: set[str] = set()
        self._texts = 0
        ascii_characters = {chr(number) for number in range(128)}
        self._learn(ascii_characters)
        self._ascii_is_trusted = ascii_characters <= self._trusted

    @classmethod
    def of(cls, backend: Tokenizer) -> Self | None:
        """The same tokenizer by table, without post-processing; None where it cuts texts in a way that is not ours.

        Args:
            backend: recognises special tokens in text and neither truncates nor pads.
        """
        try:
            return cls(backend) if ENABLED else None
        except Unlike:
            return None

    def encode(self, text: str) -> NDArray[np.uint32] | None:
        """The ids of a text; None where only the tokenizer itself can say.

        Raises:
            AssertionError: the ids of a text that was tokenised both ways differ; no ids of this table can be trusted.
        """
        if not self._may_cut(text):
            return None
        found: list[bytes] = []
        anchors: list[tuple[int, int]] = []
        character = token = 0
        for number, piece in enumerate(self._at_added.split(text)):
            if number % 2:
                anchors.append((character, token))
            found.append(self._pretokens[piece] if number % 2 else self._ids(piece))
            character += len(piece)
            token += len(found[-1]) // _ID_BYTES
        self._characters += len(text)
        if self._characters > _MOST_CHARACTERS:
            self._anchors.clear()
            self._characters = len(text)
        self._anchors[text] = anchors
        ids: NDArray[np.uint32] = np.frombuffer(b"".join(found), np.uint32)
        self._texts += 1
        if self._texts % AUDIT_EVERY == 1:
            expected = self._backend.encode(text, add_special_tokens=False).ids
            assert ids.tolist() == expected, f"cut otherwise than the tokenizer does: {text!r}"
        return ids

    def anchor(self, text: str, position: int) -> tuple[int, int] | None:
        """The last added token that begins before a position: its first character, and the number of ids before it.

        None where there is none, and for texts that were not tokenised here, or too long ago.
        """
        anchors = self._anchors.get(text, [])
        number = bisect_left(anchors, (position,)) - 1
        return anchors[number] if number >= 0 else None

    def _ids(self, piece: str) -> bytes:
        """The ids of a text without added tokens."""
        if len(piece) <= _SHORT:
            return self._pieces[piece]
        # Two spaces in a row, or a line that begins with one (code, tables) would be found out word by word.
        if self.cuts_at_spaces and "\n " not in piece and "  " not in piece and len(words := piece.split(" ")) > 2:
            try:
                return self._by_words(words)
            except Unlike:  # other white space next to a space
                pass
        return self._by_pretokens(piece)

    def _by_words(self, words: list[str]) -> bytes:
        """The ids of words that single spaces join; ``Unlike`` if one has further white space at a joint."""
        first, *inner, last = words
        require(not first[-1:].isspace() and first != "" and not last[:1].isspace())
        return b"".join([self._pieces[first], *map(self._words.__getitem__, inner), self._pieces[" " + last]])

    def _inner_word(self, word: str) -> bytes:
        """The ids of a space and the word behind it, when another space follows."""
        if not word or word[0].isspace() or word[-1].isspace():
            raise Unlike
        return self._by_pretokens(" " + word)

    def _by_pretokens(self, piece: str) -> bytes:
        return b"".join(map(self._pretokens.__getitem__, self._cut(piece)))

    def _split(self, pretoken: str) -> bytes:
        """The ids of one pre-token, by the tokenizer's model."""
        return _as_bytes([token.id for token in self._model.tokenize(self._spell(pretoken))])

    @staticmethod
    def _spell(pretoken: str) -> str:
        """A pre-token as the model takes it, a printable character for each byte."""
        return pretoken.encode().decode("latin-1").translate(_SPELLING)

    def _may_cut(self, text: str) -> bool:
        """Whether all of a text's characters are trusted and nothing else in it is the tokenizer's alone to decide."""
        if not (self._ascii_is_trusted and text.isascii()):
            characters = set(text)
            if not characters <= self._trusted:
                self._learn(characters - self._trusted - self._differing)
                if not characters.isdisjoint(self._differing):
                    return False
            if self._composes and not unicodedata.is_normalized("NFC", text):
                return False
        return self._odd is None or self._odd.search(text) is None

    def _learn(self, characters: Iterable[str]) -> None:
        """Try characters in many contexts, by the tokenizer and by us."""
        pre_tokenizer, normalizer = self._backend.pre_tokenizer, self._backend.normalizer
        assert pre_tokenizer is not None
        for character in characters:
            sample = in_contexts(character)
            try:
                expected = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(sample)]
                same = expected == [self._spell(pretoken) for pretoken in self._cut(sample)]
                same = same and (normalizer is None or normalizer.normalize_str(character) == character)
            except (TypeError, UnicodeEncodeError):  # half a character, which the tokenizer refuses by name
                same = False
            (self._trusted if same else self._differing).add(character)


def _steps(normalizer: normalizers.Normalizer | None) -> list[str]:
    """The types of a normalizer's steps; an empty sequence has none, like no normalizer."""
    if normalizer is None:
        return []
    settings = json.loads(normalizer.__getstate__())  # type: ignore[attr-defined]
    return [step["type"] for step in settings.get("normalizers", [settings])]


def _as_bytes(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()  # four bytes each, as uint32


def _is_odd(token: AddedToken) -> bool:
    """Whether an added token takes more than its own text, or is looked for only after normalisation."""
    return bool(token.single_word or token.lstrip or token.rstrip or token.normalized)
