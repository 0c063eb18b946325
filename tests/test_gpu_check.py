"""The GPU check's code, in small on CPU: every part runs, the gate passes, no step case fails."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu_check import main


def test_tiny_run_on_cpu(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    assert main(["--tiny", "--device", "cpu", "--out", str(out), "--parts", "gate", "attention", "head", "steps",
                 "longest_sequence_8b_lora"]) == 0  # fmt: skip
    found = json.loads(out.read_text())
    assert found["gate"]["passed"]
    assert found["gate"]["sdpa"]["loss_error"] < 3e-3
    assert found["gate"]["float32, trimmed last block"]["passed"]
    for part in ("attention", "head", "steps", "longest_sequence_8b_lora"):
        assert found[part], part
        errors = {name: row["error"] for name, row in found[part].items() if "error" in row}
        assert not errors, errors
    for row in found["steps"].values():
        assert row["losses"][-1] < row["losses"][0]
        assert row["trimmed"]
