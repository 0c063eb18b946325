"""Text that does not repeat: words drawn as natural ones are, new ones for ever, with numbers, names and code between.

Repeated rows flatter a tokeniser that remembers words. Here frequencies follow Zipf's law (in Mandelbrot's form) over
two million words, so that new words keep coming, as in conversations collected from the web.
"""

from __future__ import annotations

import numpy as np

_CLUSTERS = ("br", "ch", "cl", "cr", "dr", "fl", "fr", "gl", "gr", "pl", "pr", "sc", "sh", "sk", "sl", "sp", "st", "tr")
_ONSETS = (*"bcdfghjklmnprstvwz", *_CLUSTERS)
_VOWELS = (*"aeiouy", "ai", "au", "ea", "ee", "ei", "io", "oa", "oo", "ou")
_CODAS = ["", "", "", "n", "r", "s", "t", "l", "m", "nd", "ng", "nt", "rs", "st", "ck", "ll"]
_WORDS = 2_000_000
_EXPONENT, _SHIFT = 1.4, 12.0


def word(rank: int) -> str:
    """The word of a rank, from 0: common words are short, and no two ranks share one."""
    parts, left = [], rank
    while True:
        left, onset = divmod(left, len(_ONSETS))
        left, vowel = divmod(left, len(_VOWELS))
        parts.append(_ONSETS[onset] + _VOWELS[vowel])
        if not left:
            return "".join(parts) + _CODAS[rank % len(_CODAS)]
        left -= 1


def texts(count: int, mean_words: int = 60, seed: int = 0) -> list[str]:
    """``count`` texts of a geometric number of words."""
    dice = np.random.default_rng(seed)
    lengths = dice.geometric(1 / mean_words, count)
    shares = (np.arange(_WORDS) + _SHIFT) ** -_EXPONENT
    ranks = np.searchsorted(shares.cumsum() / shares.sum(), dice.random(int(lengths.sum())))
    shapes = dice.random(int(lengths.sum()))
    numbers = dice.integers(0, 100_000, int(lengths.sum()))
    words = [_shaped(int(r), float(s), int(n)) for r, s, n in zip(ranks, shapes, numbers, strict=True)]
    ends = lengths.cumsum()
    return [" ".join(words[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def _shaped(rank: int, shape: float, number: int) -> str:
    """A word as it stands in a text: mostly plain, sometimes a number, a name, the end of a sentence, code."""
    text = word(rank)
    if shape < 0.80:
        return text
    if shape < 0.90:
        return text + (", "[0] if number % 2 else ".\n" if number % 7 == 0 else ".")
    if shape < 0.95:
        return text.capitalize()
    if shape < 0.98:
        return str(number) if number % 3 else f"{number / 100:.2f}%"
    return f"`{text}_{number % 97}({text[:2]}=[{number}])`" if number % 2 else f"({text}'s)"
