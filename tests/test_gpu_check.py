"""The GPU check's code, in small on CPU: every section runs, and what is wrong is a row without a speed."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.models.qwen2 import modeling_qwen2

from benchmarks import gpu_check, gpu_contenders, gpu_correct, gpu_sections
from benchmarks.gpu_contenders import PADDING_FREE, Contender, Session, compare, contenders, gate_error
from benchmarks.gpu_correct import gradient_error
from benchmarks.gpu_profile import Interval, kernel_table
from benchmarks.gpu_work import (
    CASES,
    DEVICE_ROWS,
    TINY_CASES,
    Check,
    StepClock,
    count_trained,
    draw_work,
    errors_in,
    step_flops,
)
from fsdpsft.model.attention import AttentionContext, AttentionSpec
from fsdpsft.model.attention_backends import BACKENDS
from fsdpsft.parallelize import ParallelModel


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.setattr(gpu_contenders, "ROUNDS", 1)
    return Check(torch.device("cpu"), tiny=True, out=tmp_path / "check.json")


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert gpu_check.main(["--tiny", "--device", "cpu", "--out", str(out), *arguments]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_every_kind_of_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(gpu_contenders, "ROUNDS", 1)
    names = ("correct", "gate", "ceiling", "profile", "attention", "head", "7B-LoRA", "longest")
    found = run(tmp_path / "check.json", "--only", *names)
    assert list(errors_in(found)) == []
    assert {name for name, row in found["correct"].items() if isinstance(row, dict)} == {
        "saved and resumed", *gpu_correct.SETTINGS, "OLMo that clips in place, selective",
        "OLMo that clips in place, full",
    }  # fmt: skip
    assert found["correct"]["saved and resumed"]["loss_error"] < 1e-6
    assert found["gate"]["sdpa"]["loss_error"] < 3e-3
    assert 0 < found["profile"]["7B-LoRA"]["idle_share"] < 1 and len(found["profile"]["0.5B"]["kernels"]) == 25
    assert found["longest"]["trained"] == 512
    rows = found["7B-LoRA"]["contenders"]
    assert list(rows) == ["fsdpsft", "TRL, no padding, our attention", "TRL, stock (padded)"]
    for row in rows.values():
        assert row["slowest"] <= row["real_tokens_per_s"] <= row["fastest"]
        assert (row["rounds"], row["timed_steps"]) == (1, gpu_contenders.TIMED_STEPS)
        assert row["gate_error"] < 1e-3
    targets = {row["what"]: row for row in found["targets"]}
    speed = max(row["real_tokens_per_s"] for name, row in rows.items() if name.startswith("fsdpsft"))
    assert targets["7B LoRA: real tokens/s"] == {
        "what": "7B LoRA: real tokens/s", "target": 18000, "measured": speed, "met": None,
    }  # fmt: skip
    assert targets["0.5B full: real tokens/s"]["measured"] is None
    assert "| 0.5B full: real tokens/s | 130,000 | not measured |  |" in capsys.readouterr().out


def test_results_are_added_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sections, "SECTIONS", {"head": lambda check: {"new": True}})
    out = tmp_path / "check.json"
    out.write_text(json.dumps({"0.5B": {"kept": True}, "head": {"old": True}}))
    found = run(out, "--only", "head", "--add")
    assert found["0.5B"] == {"kept": True}
    assert found["head"].keys() == {"new", "took_s"}
    assert "0.5B" not in run(out, "--only", "head")


def test_without_time_every_section_says_so(tmp_path: Path) -> None:
    found = run(tmp_path / "check.json", "--minutes", "0", "--only", "head", "7B")
    assert found["head"] == found["7B"] == {"skipped": "no time left"}
    assert len(found["targets"]) == 16


def test_to_add_alone_is_to_run_what_the_file_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(gpu_sections, "run_sections", lambda check, names, deadline: started.extend(names) or [])
    out = tmp_path / "check.json"
    out.write_text(json.dumps({name: {"took_s": 1.0} for name in gpu_check.FIRST} | {"head": {"skipped": "no time"}}))
    gpu_check.main(["--tiny", "--device", "cpu", "--out", str(out), "--add"])
    assert started == ["head", "1.5B", "7B", "longest"]


def test_what_is_wrong_is_a_row_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    call, calls = ParallelModel.__call__, []

    def wrong_but_for_the_first(self: ParallelModel, batch: Any, sources: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(batch)
        loss, sums = call(self, batch, sources)
        return (loss if len(calls) == 1 else 1.01 * loss), sums

    monkeypatch.setattr(ParallelModel, "__call__", wrong_but_for_the_first)
    monkeypatch.setitem(gpu_sections.SECTIONS, "ceiling", lambda check: {"reached": True})
    out = tmp_path / "check.json"
    assert gpu_check.main(["--tiny", "--device", "cpu", "--out", str(out), "--only", "gate", "ceiling"]) == 1
    found = json.loads(out.read_text())
    assert found["gate"]["sdpa"]["passed"] is False and found["ceiling"]["reached"]
    assert "sdpa: did not pass" in capsys.readouterr().out


def test_what_takes_too_long_is_a_row(check: Check) -> None:
    def nested() -> dict[str, Any]:
        return {"inner": check.attempt(lambda: {"slept": time.sleep(30)}, most=0.2)}

    began = time.monotonic()
    found = check.attempt(nested, most=20)
    assert found["inner"]["error"] == "OutOfTimeError: took longer than 0 s"
    assert "error" in check.attempt(lambda: {"slept": time.sleep(30)}, most=0.2)
    assert time.monotonic() - began < 10


def test_a_python_that_lacks_something_is_told_at_once(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("hydra", "peft") else find(name))
    monkeypatch.setattr(gpu_sections, "run", lambda options, began: pytest.fail("begun all the same"))
    assert gpu_check.main([]) == 2
    assert "lacks peft, hydra. Where there is a network: pip install peft hydra-core" in capsys.readouterr().out


def test_every_dependency_is_asked_for() -> None:
    lines = (Path(__file__).parents[1] / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    assert set(re.findall(r'"([\w-]+)', lines)) <= set(gpu_check.NEEDED.values())


def test_make_takes_any_python(tmp_path: Path) -> None:
    root, out = Path(__file__).parents[1], tmp_path / "some" / "where.json"
    command = [shutil.which("make") or "make", "gpu-check", f"PYTHON={sys.executable}", f"RESULT={out}"]
    given = "GPU=--tiny --device cpu --only ceiling"
    subprocess.run([*command, given], cwd=root, check=True, capture_output=True, timeout=120)
    assert json.loads(out.read_text())["ceiling"]["matmul_tflops"] > 0


def test_kernel_table_of_intervals_one_can_count() -> None:
    found = kernel_table([
        Interval("gemm", 1000, 3000), Interval("flash_bwd", 2000, 3500), Interval("gemm", 5000, 6000),
    ])  # fmt: skip
    assert found["step_ms"] == 5.0 and found["idle_share"] == pytest.approx(1.5 / 5)
    assert found["kinds"] == {"products": 0.667, "attention": 0.333}
    rows = [(row["name"], row["calls"], row["ms"]) for row in found["kernels"]]
    assert rows == [("gemm", 2, 3.0), ("flash_bwd", 1, 1.5)]


def test_gradient_error() -> None:
    expected = [torch.tensor([3.0, 4.0]), torch.tensor([1e-9])]
    assert gradient_error([torch.tensor([3.0, 4.5]), torch.tensor([1e-9])], expected) == pytest.approx(0.1)
    assert gradient_error([torch.tensor([3.0, 4.0]), torch.tensor([2e-9])], expected) < 1e-6  # rounding, of a zero
    assert gradient_error([torch.tensor([3.0, float("nan")]), torch.tensor([1e-9])], expected) == float("inf")


def test_a_lost_device_costs_one_section(tmp_path: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sections, "device_is_lost", lambda check: "an illegal memory access")
    monkeypatch.setattr(gpu_sections, "SECTIONS", {"gate": lambda check: {"passed": True}})
    check.results = {"environment": {"gpu": None}}
    assert gpu_sections.run_sections(check, ["gate", "head", "7B"], float("inf")) == ["head", "7B"]
    assert json.loads(check.out.read_text())["gate"]["passed"]


def test_after_a_lost_device_the_rest_goes_on_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(gpu_sections, "run_sections", lambda check, names, deadline: list(names[1:]))
    monkeypatch.setattr(gpu_sections.os, "execv", lambda program, arguments: started.append(arguments))
    out = tmp_path / "check.json"
    gpu_check.main(["--tiny", "--device", "cpu", "--out", str(out), "--only", "head", "0.5B", "longest"])
    again = gpu_check.parse(started[0][3:])
    assert started[0][1:3] == ["-m", "benchmarks.gpu_check"]
    assert (again.only, again.add, again.out, again.tiny, again.device) == (["0.5B", "longest"], True, out, True, "cpu")
    assert 7.9 < again.minutes <= 8


def test_without_a_gpu_it_says_how_to_try_the_code(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--tiny --device cpu" in capsys.readouterr().out


def test_on_a_gpu_steps_are_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.milliseconds = -1.0

        def record(self) -> None:
            self.milliseconds = next(times)

        def elapsed_time(self, later: Event) -> float:
            return later.milliseconds - self.milliseconds

    times = iter([0.0, 1500.0, 2000.0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = StepClock(torch.device("cuda"))
    for _ in range(3):
        clock.mark()
    assert clock.seconds() == [1.5, 0.5]


def test_the_longest_sequence_that_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    total = SimpleNamespace(total_memory=100 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    found = {"16384": {"peak_gib": 30.0}, "32768": {"peak_gib": 40.0}, "65536": {"error": "OutOfMemoryError"}}
    expected = {"trained": 32768, "would fit by memory (extrapolated)": 32768 + int(55 * 16384 / 10)}
    assert gpu_sections.longest_that_fits(found, torch.device("cuda")) == expected
    assert gpu_sections.longest_that_fits({}, torch.device("cuda")) == {"trained": None}


def test_targets_are_judged_on_an_h200_alone() -> None:
    ours = {"real_tokens_per_s": 140_000.0, "mfu": 0.4, "peak_gib": 50.0}
    theirs = {"real_tokens_per_s": 100_000.0, "mfu": 0.3, "peak_gib": 60.0}
    slow = {"real_tokens_per_s": 9.0, "mfu": 0.9, "peak_gib": 1.0}
    results = {"0.5B": {"contenders": {"fsdpsft": ours, "TRL, a": slow, "TRL, b": theirs, "TRL, c": {"no_speed": "x"}}}}
    judged = gpu_sections.target_table(results, "NVIDIA H200")[:4]
    assert [row["measured"] for row in judged] == [140_000.0, 0.4, 1.4, 50 / 60]
    assert [row["met"] for row in judged] == [True, False, False, True]
    assert {row["met"] for row in gpu_sections.target_table(results, "NVIDIA H100 80GB HBM3")} == {None}


def leaky(**kwargs: Any) -> None:
    """Register attention in which documents see those before them, in the place of ours."""

    def attend(module, query, key, value, attention_mask=None, *, scaling, **kwargs):  # type: ignore[no-untyped-def]
        total = query.shape[2]
        context = AttentionContext(torch.tensor([0, total]), (total,), total, BACKENDS["sdpa"].attend)
        query, key = query.to(value.dtype), key.to(value.dtype)
        return context.attend(query, key, value, AttentionSpec(scaling), context).transpose(1, 2), None

    AttentionInterface.register(PADDING_FREE, attend)


def test_a_contender_whose_documents_see_each_other_gets_no_speed(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_contenders, "register_padding_free", lambda backend: leaky())
    case = TINY_CASES["0.5B"]
    everybody = contenders(check, case)
    pair = {name: everybody[name] for name in ("fsdpsft", "TRL, no padding, our attention")}
    reported: list[dict[str, Any]] = []
    rows = compare(check, case, pair, reported.append)["contenders"]
    assert rows["TRL, no padding, our attention"].keys() == {"no_speed", "gate"}
    assert rows["TRL, no padding, our attention"]["no_speed"].startswith("another loss on the same tokens: off by")
    assert "real_tokens_per_s" in rows["fsdpsft"]
    assert len(reported) == 2


def test_gate() -> None:
    ours = Session([4.0, 3.0], [], 100, 30, None)
    assert gate_error(Session([4.0, 3.03], [], 100, 30, None), ours) == pytest.approx(0.01)
    assert gate_error(Session([4.0, 3.0], [], 101, 30, None), ours) == float("inf")
    assert gate_error(Session([4.0, float("nan")], [], 100, 30, None), ours) == float("inf")


def test_what_does_not_fit_is_tried_in_another_way_and_not_again(check: Check) -> None:
    tried: list[tuple[int, str]] = []

    def greedy(check: Check, case: Any, work: Any, micro_batch: int, recompute: str) -> Session:
        tried.append((micro_batch, recompute))
        if recompute == "none":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Session([1.0, 1.0], [1.0], work.tokens, work.trained, 2.0)

    def broken(*args: Any) -> Session:
        raise KeyError("cu_seq_lens_q")

    ways = [(512, "none"), (256, "none"), (512, "full")]
    pair = {"a": Contender(greedy, [*ways]), "b": Contender(broken, [(1, "none")])}
    work = draw_work(TINY_CASES["0.5B"])
    for _ in range(2):
        for contender in pair.values():
            contender.take_turn(check, TINY_CASES["0.5B"], work)
    assert tried == [*ways, ways[-1]]
    assert len(pair["a"].sessions) == 2
    assert pair["b"].error == "KeyError: 'cu_seq_lens_q'"
    never = Contender(greedy, [(512, "none")])
    never.take_turn(check, TINY_CASES["0.5B"], work)
    assert never.error == "OutOfMemoryError: CUDA out of memory"


def test_kernels_replaced_for_one_contender_are_not_there_for_the_next(check: Check) -> None:
    original = modeling_qwen2.apply_rotary_pos_emb

    def patching(*args: Any) -> Session:
        modeling_qwen2.apply_rotary_pos_emb = None
        raise RuntimeError("no kernel")

    contender = Contender(patching, [(1, "none")])
    contender.take_turn(check, TINY_CASES["0.5B"], draw_work(TINY_CASES["0.5B"]))
    assert contender.error == "RuntimeError: no kernel"
    assert modeling_qwen2.apply_rotary_pos_emb is original


def test_without_trl_ours_runs_alone_and_the_result_says_so(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("trl", "datasets") else find(name))
    found = gpu_sections.steps("0.5B", check)
    assert found["TRL"] == "not installed: trl, datasets"
    assert list(found["contenders"]) == ["fsdpsft"]
    assert json.loads(check.out.read_text())["0.5B"]["contenders"].keys() == found["contenders"].keys()


@pytest.mark.parametrize("name", CASES)
def test_rows(name: str) -> None:
    case = CASES[name]
    work = draw_work(case)
    assert len(work.rows) % DEVICE_ROWS == 0
    assert len(work.gate) == len(work.rows)
    assert 0.95 * case.step_tokens < work.tokens <= 0.97 * case.step_tokens
    assert 0.33 < work.trained / work.tokens < 0.36
    assert 0.9 * 840 < work.tokens / len(work.rows) < 1.1 * 840
    assert work.lengths.std() / work.lengths.mean() > 0.8
    for budget, _ in (*case.ours, *case.trl):
        groups = work.groups(budget)
        assert sorted(np.concatenate(groups).tolist()) == list(range(len(work.rows)))
        assert max(sum(int(work.lengths[i]) for i in group) for group in groups) <= budget
    assert count_trained(work.gate) == len(work.gate) // 4


def test_required_operations_of_a_model_one_can_count() -> None:
    case = TINY_CASES["7B-LoRA"]
    work = draw_work(case)
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128  # q and o; k and v; the MLP
    attention = sum(int(n) ** 2 * 6 * 64 for n in work.lengths)
    expected = 2 * (4 * block * work.tokens + attention) + 4 * 64 * 512 * work.trained
    assert step_flops(case, work) == expected
