"""The launcher that started this process, and whether it is still there."""

from __future__ import annotations

import os

# Taken at the package's first import: the launcher may die while torch is being imported.
_PARENT = os.getppid()


def launcher_is_gone() -> bool:
    """Whether torchrun started this process and has ended since. Without torchrun a run may outlive its shell."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT
