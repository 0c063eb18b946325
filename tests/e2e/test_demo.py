"""The demo in short: its arithmetic is right, its held-out problems are held out, and all of its parts run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
TERM = re.compile(r"(\d+)((?: [+-] \d+)+) = (\d+), write (\d)(, (?:carry|borrow) one)?\.")


def run(*command: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    run(sys.executable, DEMO / "make_data.py", folder, "--train", "400", "--held-out", "200")
    return folder


def questions_and_replies(folder: Path, name: str) -> list[tuple[str, str]]:
    pairs = []
    for row in pq.read_table(folder / f"{name}.parquet").to_pylist():
        turns = [m for m in row["messages"] if m["role"] in ("user", "assistant")]
        pairs += [(q["content"], a["content"]) for q, a in pairwise(turns) if q["role"] == "user"]
    return pairs


def test_every_worked_step_and_answer_is_right(data: Path) -> None:
    worked = [reply for _, reply in questions_and_replies(data, "train") if " * " not in reply and reply]
    assert len(worked) > 400  # more than one a conversation: some have several turns
    for reply in worked:
        a, op, b = re.match(r"That is (\d+) ([+-]) (\d+)\. Ones: ", reply).groups()
        answer = int(a) + int(b) if op == "+" else int(a) - int(b)
        assert reply.endswith(f" The answer is {answer}.")
        steps = TERM.findall(reply)
        assert "".join(written for *_, written, _ in reversed(steps)) == str(answer)
        assert [eval(first + rest) for first, rest, *_ in steps] == [int(total) for _, _, total, *_ in steps]


def test_no_held_out_problem_is_trained_on_in_any_wording_or_turn(data: Path) -> None:
    def problems(name: str) -> set[tuple[str, ...]]:
        replies = [m["content"] for row in pq.read_table(data / f"{name}.parquet").to_pylist() for m in row["messages"]]
        found = [re.match(r"That is (\d+) ([-+*]) (\d+)[. ]", text) for text in replies]
        terms = [match.groups() for match in found if match]
        return {(a, op, b) for a, op, b in terms} | {(b, op, a) for a, op, b in terms if op != "-"}

    held_out = problems("held_out")
    assert len(held_out) > 200
    assert held_out.isdisjoint(problems("train"))
    assert held_out.isdisjoint(problems("val"))
    asked = {question for question, _ in questions_and_replies(data, "held_out") if re.search(r"\d.*\d{3}", question)}
    assert asked.isdisjoint(question for question, _ in questions_and_replies(data, "train"))


def test_template_renders_tools_calls_and_results(data: Path, tmp_path: Path) -> None:
    run(sys.executable, DEMO / "make_model.py", tmp_path, "--data", data / "train.parquet", "--layers", "1")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    function = {"name": "multiply", "arguments": {"a": 2, "b": 3}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 times 3?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "6"},
    ]
    tools = [{"type": "function", "function": {"name": "multiply"}}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.\n\nYou may call these functions:\n<tools>\n"
        '{"type": "function", "function": {"name": "multiply"}}\n</tools>\n'
        'A call is one JSON object with "name" and "arguments" between <tool_call> tags.<|im_end|>\n'
        "<|im_start|>user\nWhat is 2 times 3?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "multiply", "arguments": {"a": 2, "b": 3}}\n'
        "</tool_call><|im_end|>\n<|im_start|>tool\n6<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("is 1023.")[-5:] == ["Ġ1", "0", "2", "3", "."]


def test_demo_trains_exports_and_reports(tmp_path: Path) -> None:
    printed = run(
        sys.executable, DEMO / "demo.py", tmp_path, "--conversations", "320", "--questions", "12", "--batch-size", "32"
    )
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    cells = {name: (before, after) for name, before, after in table}
    first, last = map(float, cells["training loss (first step, last step)"])
    assert last < first - 0.5
    assert cells["exact match, all held-out questions (12)"][0] == "0.0%"
    assert cells["the model"] == (f"{tmp_path}/model", f"{tmp_path}/run")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("val/loss" in step for step in logged)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not model.lm_head.weight.equal(source.lm_head.weight)
