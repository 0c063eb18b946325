"""Text to token ids, and positions in the text to positions in the ids, without trusting a tokenizer's offsets.

A position ``c`` of a text is *proven* to be position ``n`` of its ids when tokenising ``text[:c]`` alone gives exactly
the first ``n`` ids. That is the statement a loss mask needs: the ids before a trained span are those that inference
feeds the model as its prompt. Offsets cannot show it (byte-level post-processors trim them, and several tokens of one
character share them). A special token before ``c`` makes the proof cheap: tokenizers cut the text at special tokens
before anything else, so only the few characters between it and ``c`` are tokenised again, and these are cached.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from fsdpsft.data.mask.pretoken_cuts import trie_pattern
from fsdpsft.data.mask.pretokens import PreTokenizer
from fsdpsft.errors import ModelError, RowError

Ids: TypeAlias = NDArray[np.uint32]

_UNSPELLABLE = "special token in content"
_WINDOW = 192  # how far back a special token is looked for; a generation prompt is shorter


class SpanTokenizer:
    """A fast tokenizer's backend that maps text positions to token positions.

    Args:
        tokenizer: a tokenizer of transformers with a ``tokenizers`` backend.
        stop_token_ids: ids that end a turn besides the special tokens.

    Attributes:
        special: text -> id of the tokens that are special (``special=True``).
        stops: text -> id of the tokens that can end a turn.

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
        added = {token.content: (token_id, token.special) for token_id, token in decoder.items()}
        self.special = {text: token_id for text, (token_id, special) in added.items() if special and text}
        wanted = {*stop_token_ids, tokenizer.eos_token_id}
        self.stops = self.special | {text: token_id for text, (token_id, _) in added.items() if token_id in wanted}
        self.special_pattern = re.compile(trie_pattern(self.special))
        self._special_ids = np.array(sorted(self.special.values()), dtype=np.uint32)
        self._stop_lengths = sorted({len(text) for text in self.stops}, reverse=True)
        self._tail = lru_cache(maxsize=4096)(self._encode_uncached)
        self._literal: Tokenizer | None = None

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
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate, from an escape in JSON
            raise RowError("the text holds a lone surrogate (half a character)", "not valid Unicode") from error
        return [np.array(next(encodings).ids, dtype=np.uint32) if ids is None else ids for ids in known]

    def encode(self, text: str) -> Ids:
        """Tokenise one text."""
        return self.encode_batch([text])[0]

    def encode_hidden(self, text: str, originals: dict[str, str]) -> Ids:
        """Tokenise a text in which placeholders stand for strings that must not become special tokens.

        The text is cut at the special tokens that the template wrote; in a piece that holds placeholders they are
        replaced by the original strings and the piece is tokenised with special tokens switched off.

        Raises:
            RowError: the tokenizer cannot spell the piece as ordinary text.
        """
        table = {ord(placeholder): original for placeholder, original in originals.items()}
        parts: list[Ids] = []
        plain_start = 0
        for start, end in self._between_special(text):
            piece = text[start:end]
            restored = piece.translate(table)
            if restored == piece:
                continue
            parts += [self.encode(text[plain_start:start]), self._encode_literal(restored)]
            plain_start = end
        parts.append(self.encode(text[plain_start:]))
        ids = np.concatenate(parts)
        if not self.same_text(ids, self._encode_literal(text.translate(table))):
            raise RowError("this tokenizer cannot spell special-token text in content as ordinary text", _UNSPELLABLE)
        return ids

    def _between_special(self, text: str) -> list[tuple[int, int]]:
        bounds = [0, *(edge for match in self.special_pattern.finditer(text) for edge in match.span()), len(text)]
        return [(start, end) for start, end in zip(bounds[::2], bounds[1::2], strict=True) if start < end]

    def _encode_literal(self, text: str) -> Ids:
        """Tokenise a text in which special tokens are ordinary text."""
        if self._literal is None:
            self._literal = _clean(self._source)
            self._literal.encode_special_tokens = True
        ids = np.array(self._literal.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        if np.isin(ids, self._special_ids).any():
            raise RowError("this tokenizer makes a special token of ordinary text", _UNSPELLABLE)
        return ids

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
