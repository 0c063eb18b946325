"""Errors whose message is meant for the person at the keyboard.

Each says where the fault is (file, row, key), what was found, and what to do. ``main()`` prints the message alone,
once, and exits with code 1; anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

_LISTED = 8


class UserError(ValueError):
    """A mistake the user can mend."""


class ConfigError(UserError):
    """A key, its value, or a combination of keys that cannot work."""


class DataError(UserError):
    """A file, row or conversation that cannot be trained on."""


class ModelError(UserError):
    """A model folder, architecture or tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is torn, foreign to this run, or cannot be written."""


class RunFailed(RuntimeError):  # noqa: N818 - told apart from the user's mistakes above
    """A run that ended for no fault of its settings: a bug, a lost process, a time-out. The cause is chained to it.

    Attributes:
        processes: of the run.
        collateral: another process is at fault; this one has nothing to tell but that it noticed.
    """

    def __init__(self, message: str, *, processes: int, collateral: bool) -> None:
        super().__init__(message)
        self.processes, self.collateral = processes, collateral


class RowError(DataError):
    """One row that cannot be used, while its neighbours may be fine.

    Attributes:
        reason: a short constant text, the same for every row with this fault, to count skipped rows by.
    """

    def __init__(self, message: str, reason: str = "unusable row") -> None:
        super().__init__(message)
        self.reason = reason


def and_more(names: Collection[object], most: int = _LISTED) -> str:
    """The first names and how many more there are: ``a, b and 3 more``."""
    shown = ", ".join(map(str, islice(names, most)))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
