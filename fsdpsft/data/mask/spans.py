"""Text to token ids, and positions in the text to positions in the ids, without trusting a tokenizer's offsets.

A position ``c`` of a text is *proven* to be position ``n`` of its ids when tokenising ``text[:c]`` alone gives exactly
the first ``n`` ids. That is the statement a loss mask needs: the ids before a trained span are those that inference
feeds the model as its prompt. Offsets cannot show it (byte-level post-processors trim them, and several tokens of one
character share them). A special token before ``c`` makes the proof cheap: tokenizers cut the text at special tokens
before anything else, so only the few characters between it and ``c`` are tokenised again, and these are cached.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from fsdpsft.data.mask.pretoken_cuts import trie_pattern
from fsdpsft.data.mask.pretokens import PreTokenizer
from fsdpsft.errors import ModelError, RowError

Ids: TypeAlias = NDArray[np.uint32]

_UNSPELLABLE = "special token in content"
_HALF = ("the text holds a lone surrogate (half a character)", "not valid Unicode")
_NAME = "\U0010f100"  # reserved; around the other names of tokens
_SAMPLE = "Hello,  world!\nIt's 3.14 — naïve “quotes”, 漢字."
_WINDOW = 192  # how far back a special token is looked for; a generation prompt is shorter


class SpanTokenizer:
    """A fast tokenizer's backend that maps text positions to token positions.

    Args:
        tokenizer: a tokenizer of transformers with a ``tokenizers`` backend.
        stop_token_ids: ids that end a turn besides the special tokens.

    Attributes:
        added: text -> id of the tokens that are found in a text before it is cut into others.
        special: those of them that are special (``special=True``).
        stops: those that can end a turn.
        guarded: those that text in a message must not become; ``guarded_pattern`` finds their text.

    Raises:
        ModelError: the tokenizer is a slow one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int] = ()) -> None:
        """Copy the backend; see the class."""
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer; a tokenizer.json is needed. Convert it once: "
                "load it with AutoTokenizer and save_pretrained() the fast tokenizer into the model's folder."
            )
        source = tokenizer.backend_tokenizer.to_str()
        self._backend = _clean(source)
        self._table = PreTokenizer.of(self._backend)
        self._source = source
        decoder = self._backend.get_added_tokens_decoder()
        self.added = {token.content: token_id for token_id, token in decoder.items() if token.content}
        self.special = {text: token_id for text, token_id in self.added.items() if decoder[token_id].special}
        wanted = {*stop_token_ids, tokenizer.eos_token_id}
        self.stops = self.special | {text: token_id for text, token_id in self.added.items() if token_id in wanted}
        self.special_pattern = re.compile(trie_pattern(self.special))
        self._stop_lengths = sorted({len(text) for text in self.stops}, reverse=True)
        self._tail = lru_cache(maxsize=4096)(self._encode_uncached)
        self.guarded = dict(self.stops)
        self._renamed: Tokenizer | None = None
        self.guard(())

    @property
    def source(self) -> str:
        """The backend as JSON, for fingerprints."""
        return str(self._source)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Tokenise texts without adding special tokens, each once: by table, or else by all the backend's threads.

        Raises:
            RowError: a text is not valid Unicode; callers name the row by trying one at a time.
        """
        known = [None if self._table is None else self._table.encode(text) for text in texts]
        others = [text for text, ids in zip(texts, known, strict=True) if ids is None]
        try:
            encodings = iter(self._backend.encode_batch_fast(others, add_special_tokens=False) if others else ())
        except (TypeError, UnicodeEncodeError) as error:  # from an escape in JSON
            raise RowError(*_HALF) from error
        return [np.array(next(encodings).ids, dtype=np.uint32) if ids is None else ids for ids in known]

    def encode(self, text: str) -> Ids:
        """Tokenise one text."""
        return self.encode_batch([text])[0]

    def guard(self, names: Iterable[str]) -> None:
        """Keep further added tokens from being forged by content, besides the special ones and the stops."""
        self.guarded |= {name: self.added[name] for name in names}
        self.guarded_pattern = re.compile(trie_pattern(self.guarded))
        self._renamed = None

    def encode_hidden(self, text: str, originals: Mapping[str, str]) -> Ids:
        """Tokenise a text in which placeholders stand for strings of the content that must stay ordinary text.

        A tokenizer whose guarded tokens have other names reads the text, in which those that the template wrote have
        these names too. So the content's are ordinary text, in the very context in which they stand.

        Raises:
            RowError: the tokenizer cannot do this.
        """
        table = {ord(placeholder): original for placeholder, original in originals.items()}
        names = {name: f"{_NAME}{token_id}{_NAME}" for name, token_id in self.guarded.items()}
        if self._renamed is None:
            self._renamed = _with_names(self._source, names)
        renamed, count = self.guarded_pattern.subn(lambda match: names[match.group()], text)
        if any(_NAME in original for original in originals.values()) or not np.array_equal(
            self._encode_renamed(renamed), self.encode(text)
        ):
            raise RowError("this tokenizer cannot spell the text of its special tokens as ordinary text", _UNSPELLABLE)
        ids = self._encode_renamed(renamed.translate(table))
        if np.isin(ids, list(self.guarded.values())).sum() != count:
            raise RowError("this tokenizer makes a special token of ordinary text", _UNSPELLABLE)
        return ids

    def _encode_renamed(self, text: str) -> Ids:
        assert self._renamed is not None
        try:
            return np.array(self._renamed.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        except (TypeError, UnicodeEncodeError) as error:
            raise RowError(*_HALF) from error

    def same_text(self, ids: Ids, others: Ids) -> bool:
        """Whether both decode to the same text; so compared, a normalizer's changes are no difference."""
        return self.decode(ids) == self.decode(others)

    def decode(self, ids: Ids) -> str:
        """The text of ``ids``, special tokens included."""
        return str(self._backend.decode(ids.tolist(), skip_special_tokens=False))

    def token_position(self, text: str, ids: Ids, position: int) -> int | None:
        """The number of ids that ``text[:position]`` makes, or None if they are not the first ids of the whole text.

        Args:
            text: the whole text, without placeholders.
            ids: [L] its ids.
            position: a position in the text, in characters.
        """
        if position == 0:
            return 0
        found = self._from_anchor(text, ids, position)
        if found is not None:
            return found
        prefix = self.encode(text[:position])
        return len(prefix) if np.array_equal(ids[: len(prefix)], prefix) else None

    def _from_anchor(self, text: str, ids: Ids, position: int) -> int | None:
        """The same, proven from the last special token before ``position``; None where that shows nothing."""
        anchor = self._anchor(text, ids, position)
        if anchor is None:
            return None
        start, first = anchor
        tail = self._tail(text[start:position])
        after = first + len(tail) // ids.itemsize
        return after if ids[first:after].tobytes() == tail else None

    def _anchor(self, text: str, ids: Ids, position: int) -> tuple[int, int] | None:
        """The last special token a little before ``position``: its first character, and its number among the ids."""
        known = None if self._table is None else self._table.anchor(text, position)
        if known is not None:
            return known if position - known[0] <= _WINDOW else None
        anchor = None
        window = max(0, position - _WINDOW)
        for match in self.special_pattern.finditer(text, window, position):
            anchor = match
        if anchor is None:
            return None
        name, start = anchor.group(), anchor.start()
        (places,) = (ids == self.special[name]).nonzero()
        if len(places) != text.count(name):
            return None
        return start, int(places[text.count(name, 0, start)])

    def _encode_uncached(self, text: str) -> bytes:
        return self.encode(text).tobytes()

    def stop_at_end(self, text: str) -> tuple[int, str] | None:
        """(end, token text) of the stop token that ends ``text``, whitespace after it aside; None if there is none."""
        stripped = text.rstrip()
        for length in self._stop_lengths:
            if stripped[-length:] in self.stops:
                return len(stripped), stripped[-length:]
        return None

    def special_at(self, text: str, position: int) -> str | None:
        """The special token that is written at ``position`` of ``text``."""
        match = self.special_pattern.match(text, position)
        return match.group() if match else None


def _clean(source: str) -> Tokenizer:
    """A backend of our own: no truncation, no padding, special tokens recognised in text."""
    backend = Tokenizer.from_str(source)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend


def _with_names(source: str, names: Mapping[str, str]) -> Tokenizer:
    """The same backend with other names for some added tokens, which keep their ids.

    Raises:
        RowError: the model builds one of these tokens from parts, so that its name is not free to change.
    """
    settings = json.loads(source)
    model = settings["model"]
    settings["post_processor"] = None  # it names tokens too, and adds only what is not wanted
    for token in settings["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): number for name, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    try:
        return _clean(json.dumps(settings))
    except Exception as error:  # the library knows no narrower one
        text = f"the text of special tokens in content cannot be told from the tokens: {error}"
        raise RowError(text, _UNSPELLABLE) from error


def folder_disagrees(tokenizer: PreTrainedTokenizerBase, file: Path) -> str | None:
    """A warning if the tokenizer gives other ids than the ``tokenizer.json`` it was loaded from; else None.

    transformers rebuilds some tokenizers (Llama 2's, Yi's, InternLM's) by their class instead of reading that file,
    and what serves the model may read the file.
    """
    if not file.is_file():
        return None
    source, backend = file.read_text(encoding="utf-8"), tokenizer.backend_tokenizer
    if _is_alike(backend, json.loads(source)):
        return None
    ours, theirs = (b.encode(_SAMPLE, add_special_tokens=False) for b in (backend, Tokenizer.from_str(source)))
    if theirs.ids == ours.ids:
        return None
    place = next((n for n, (a, b) in enumerate(zip(ours.ids, theirs.ids, strict=False)) if a != b), "the end")
    return (
        f"{type(tokenizer).__name__}, as transformers loads it, gives other token ids than {file}: they part at token "
        f"{place} of {_SAMPLE!r} ({ours.tokens[:8]} and {theirs.tokens[:8]}). Training uses the first, as "
        "AutoTokenizer gives it; a server that reads tokenizer.json would prompt with the second"
    )


def _is_alike(backend: Tokenizer, settings: Mapping[str, Any]) -> bool:
    """Whether all but the vocabulary is as the file says; then there is no need to build its tokenizer (seconds)."""
    for name in ("normalizer", "pre_tokenizer"):
        part = getattr(backend, name)
        found = None if part is None else json.loads(part.__getstate__())
        # The offsets of tokens, which this is about, are not used.
        theirs, ours = (
            json.dumps(x).replace('"trim_offsets": false', '"trim_offsets": true') for x in (settings[name], found)
        )
        if theirs != ours:
            return False
    model = settings["model"]
    flags = {name: value for name, value in model.items() if name not in ("type", "vocab", "merges")}
    same = all(getattr(backend.model, name, None) == value for name, value in flags.items())
    return same and backend.get_vocab_size(with_added_tokens=False) == len(model["vocab"])
