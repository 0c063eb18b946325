"""Errors whose message is meant for the person at the keyboard.

Each says where the fault is (file, row, key), what was found, and what to do. ``main()`` prints the message alone,
once, and exits with code 1; anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Self

_LISTED = 8


class UserError(ValueError):
    """A mistake the user can fix."""


class ConfigError(UserError):
    """A key, its value, or a combination of keys that cannot work."""


class DataError(UserError):
    """A file, row or conversation that cannot be trained on.

    Attributes:
        text: what is wrong and what to do, without the place.
        file: path of the file; None where it is not known, or named in the text.
        row, line: 0-based row of the file and, for JSON lines, 1-based line.
    """

    def __init__(self, text: str, *, file: str | None = None, row: int | None = None, line: int | None = None) -> None:
        super().__init__(text)
        self.text, self.file, self.row, self.line = text, file, row, line

    def __str__(self) -> str:
        """Place and text."""
        if self.file is None:
            return self.text
        join = ", " if self.text.startswith("column ") else ": "
        return place(self.file, self.row, self.line) + join + self.text

    def at(self, file: str, row: int | None = None, line: int | None = None) -> Self:
        """The same error with its place, unless it has one already."""
        if self.file is None:
            self.file, self.row, self.line = file, row, line
        return self


class RowError(DataError):
    """One row that cannot be used, while its neighbours may be fine.

    Attributes:
        reason: a short constant text, the same for every row with this fault, to count skipped rows by.
    """

    def __init__(
        self,
        text: str,
        reason: str = "unusable row",
        *,
        file: str | None = None,
        row: int | None = None,
        line: int | None = None,
    ) -> None:
        super().__init__(text, file=file, row=row, line=line)
        self.reason = reason


class ModelError(UserError):
    """A model folder, architecture or tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is torn, foreign to this run, or cannot be written."""


class RunFailed(RuntimeError):  # noqa: N818 - unlike the user's mistakes above
    """A run that ended for no fault of its settings: a bug, a lost process, a time-out. The cause is chained to it.

    Attributes:
        processes: of the run.
        collateral: another process is at fault; this one only noticed.
    """

    def __init__(self, message: str, *, processes: int, collateral: bool) -> None:
        super().__init__(message)
        self.processes, self.collateral = processes, collateral


def place(file: str, row: int | None = None, line: int | None = None) -> str:
    """A file and row as messages name them."""
    return file + ("" if row is None else f", row {row}") + ("" if line is None else f" (line {line})")


def nearest(name: str, known: Iterable[str], most: int = 1, alike: float = 0.6) -> list[str]:
    """The known names closest to ``name``, at least ``alike`` of 1, best first."""
    return difflib.get_close_matches(name[:80], list(known), n=most, cutoff=alike)


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """``; did you mean NAME?`` where a known name is close, else nothing."""
    return "".join(f"; did you mean {prefix}{close}?" for close in nearest(name, known))


def and_more(names: Collection[object], most: int = _LISTED, join: str = ", ") -> str:
    """The first names and how many more there are: ``a, b and 3 more``."""
    shown = join.join(map(str, islice(names, most)))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
