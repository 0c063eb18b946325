"""The launcher that started this process, and whether it is still there."""

from __future__ import annotations

import os

_parent = 0


def _remember_parent() -> None:
    global _parent
    _parent = os.getppid()


_remember_parent()  # at the package's first import: the launcher may die while torch is being imported
os.register_at_fork(after_in_child=_remember_parent)


def launcher_is_gone() -> bool:
    """Whether torchrun started this process and has ended since. Without torchrun a run may outlive its shell."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _parent
