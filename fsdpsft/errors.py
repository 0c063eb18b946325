"""Errors whose message is meant for the person at the keyboard.

Each says where the fault is (file, row, key), what was found, and what to do. ``main()`` prints the message alone,
once, and exits with code 1; anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


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
        text: what is wrong, without its place; ``str(error)`` puts the place in front.
        reason: a short constant text, the same for every row with this fault, to count skipped rows by.
        file: the row's file; None where it is not known yet.
        row: 0-based number of the row in its file; None for a fault of the file as a whole.
        line: 1-based line, for JSON lines.
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
        super().__init__(text)
        self.text, self.reason = text, reason
        self.file, self.row, self.line = file, row, line

    def at(self, file: str, row: int | None = None, line: int | None = None) -> RowError:
        """The same error with its place."""
        return RowError(self.text, self.reason, file=file, row=row, line=line)

    def __str__(self) -> str:
        """Place and text."""
        if self.file is None:
            return self.text
        join = ", " if self.text.startswith("column ") else ": "
        return place(self.file, self.row, self.line) + join + self.text


def place(file: str, row: int | None, line: int | None = None) -> str:
    """A file, row and line as messages quote them."""
    return file + ("" if row is None else f", row {row}") + ("" if line is None else f" (line {line})")
