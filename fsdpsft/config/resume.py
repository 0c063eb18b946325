"""Which settings may differ between a checkpoint and the run that resumes from it; the schema says it of each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fsdpsft.config.schema import KEYS
from fsdpsft.errors import CheckpointError


@dataclass(frozen=True)
class Change:
    """A setting that differs between the checkpoint and this run."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        """As a line of the diff."""
        return f"  {self.key}: {self.was!r} -> {self.now!r}"


def config_changes(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """Every leaf that differs between two nested mappings, in the order of ``now``.

    A key that one side does not have counts as its default: an older version did not know it. One that neither this
    version knows is left out.
    """
    changes = []
    for name in [*now, *(name for name in was if name not in now)]:
        key = prefix + name
        default = KEYS[key].default if key in KEYS else None
        old, new = (side.get(name, default) for side in (was, now))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += config_changes(old, new, f"{key}.")
        elif old != new:
            changes.append(Change(key, old, new))
    return changes


def is_harmful(change: Change) -> bool:
    """Whether a changed setting would make the run something else than the one that was begun."""
    owner = next((name for name in KEYS if change.key == name or change.key.startswith(f"{name}.")), None)
    if owner is None:  # a key of an older version, or what a run adds that is no key
        return change.now is not None
    rule = KEYS[owner].on_resume
    if rule == "grow":
        return change.was is None or change.now is None or change.now < change.was
    return rule == "fixed"


def check_config(was: Mapping[str, Any], now: Mapping[str, Any], *, allow: bool = False) -> list[Change]:
    """All changes from a checkpoint's nested settings to those of this run, for the log.

    ``allow`` (``trainer.allow_config_change``) takes harmful ones too.

    Raises:
        CheckpointError: a diff of the harmful ones.
    """
    changes = config_changes(was, now)
    harmful = [change for change in changes if is_harmful(change)]
    if harmful and not allow:
        raise CheckpointError(_refusal(harmful))
    return changes


def _refusal(harmful: Sequence[Change]) -> str:
    lines = "\n".join(str(change) for change in harmful)
    return (
        f"The checkpoint was made with other settings, so resuming would not continue that run:\n{lines}\n"
        f"Set them back, start a new run (another trainer.default_local_dir), or accept the difference with "
        f"trainer.allow_config_change=true."
    )
