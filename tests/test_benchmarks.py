"""The harness's own logic: the gate, the medians, the tables."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.bench_step import passes, summary
from benchmarks.table import step_table


def test_gate() -> None:
    assert passes([2.0, 3.0], [2.0, 3.0], 1e-5)
    assert passes([2.0], [2.00001, 9.0], 1e-5)  # a contender may have fewer steps to compare
    assert not passes([2.0, 3.1], [2.0, 3.0], 1e-5)
    assert not passes([float("nan")], [2.0], 1e-5)
    assert not passes([], [2.0], 1e-5)


def test_the_gate_s_steps_are_not_timed() -> None:
    run: dict[str, Any] = {
        "seconds": [100.0, 100.0, 1.0, 2.0], "cpu_seconds": [9.0, 9.0, 2.0, 4.0], "tokens": [7, 7, 10, 10],
        "trained": [1, 1, 4, 4], "peak_bytes": 2**30,
    }  # fmt: skip
    found = summary([run])
    assert found["timed_steps"] == 2
    assert found["real_tokens_per_s"] == pytest.approx(7.5)
    assert found["trained_tokens_per_s"] == pytest.approx(3.0)
    assert found["tokens_per_cpu_s"] == pytest.approx(3.75)
    assert (found["slowest"], found["fastest"], found["peak_gib"]) == (5.0, 10.0, 1.0)


def test_lost_and_failed_contenders_stay_in_the_table() -> None:
    row = {"real_tokens_per_s": 5.0, "slowest": 4.0, "fastest": 6.0, "peak_gib": 1.0, "gate": "passed"}
    environment = {"gpu": None, "cpu": "x", "cores": 2, "versions": {"torch": "2"}, "load": [0.0], "commit": "c"}
    table = step_table({
        "environment": environment, "model": "m", "vocabulary": 8, "data": "d", "batch": 2, "rows_a_pass": 2,
        "results": {"fp32": {"slow": row, "fast": {**row, "real_tokens_per_s": 9.0}, "other": {"gate": "did not run"}}},
    })  # fmt: skip
    names = [line.split("|")[1].strip() for line in table if line.startswith("| ")]
    assert names == ["fp32", "fast", "slow", "other"]
