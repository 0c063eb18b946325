"""What importing the package does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = "import os, sys, fsdpsft; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("theirs", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(theirs: dict[str, str], expected: str) -> None:
    ours = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", SHOW], env=ours | theirs, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "False"], "it must be said before torch is imported"
