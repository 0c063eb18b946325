"""What a mistaken user reads: one clear message before any model loads, exit code 1, no traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fsdpsft.testing import CHATML, save_tiny_model, tiny_tokenizer
from fsdpsft.train import main

GOOD = {"question": "What is 1 + 1?", "answer": "It is 2."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def complaint(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> str:
    """Run the command, expect failure, and return what it wrote."""
    code = main(
        [
            "data.train_batch_size=4",
            "data.max_length=1024",
            "data.truncation=error",
            f"data.cache_dir={folder / 'cache'}",
            f"trainer.default_local_dir={folder / 'out'}",
            *overrides,
        ]
    )
    text = capsys.readouterr().err
    assert code == 1 and "error: " in text and "Traceback" not in text
    assert not (folder / "out").exists(), "nothing is written before the settings are known to work"
    return text


ROW_FAULTS = {
    "null response": ([GOOD] * 5 + [{"question": "q", "answer": None}], [r"row 5", "answer", "null|None"]),
    "empty response": ([GOOD] * 5 + [{"question": "q", "answer": "  "}], [r"row 5", "answer", "empty|blank"]),
    "no assistant": ([{"messages": [{"role": "user", "content": "hi"}]}] * 5, [r"row 0", "assistant"]),
    "answers to compare": (
        [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 5,
        ["row 0", "preference data", "data.response_key=chosen"],
    ),
    "unwanted answer": ([GOOD | {"label": True}] * 5 + [GOOD | {"label": False}], ["row 5", "column label", "False"]),
    "images": ([GOOD | {"images": ["a.png"]}] * 5, ["row 0", "column images", "only text"]),
    "unknown role": (
        [{"messages": [{"role": "wizard", "content": "hi"}, {"role": "assistant", "content": "x"}]}] * 5,
        ["row 0", "wizard", "data.dataset_info"],
    ),
    "too long": (
        [GOOD] * 5 + [{"question": "q", "answer": "word " * 2000}],
        [r"row 5", "data.max_length=1024", "truncation"],
    ),
    "fewer rows than a batch": ([GOOD] * 3, ["data.train_batch_size=4", "3 samples"]),
}


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_rows(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, patterns = ROW_FAULTS[name]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    text = complaint(capsys, tmp_path, f"data.train_files={path}", f"model.partial_pretrain={model}")
    for pattern in patterns if "batch" in name else ["rows.jsonl", *patterns]:
        assert re.search(pattern, text), f"{pattern!r} is not in: {text}"


def test_missing_column_lists_those_there_are(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"ask": ["q"] * 5, "reply": ["a"] * 5}), path)
    text = complaint(
        capsys, tmp_path, f"data.train_files={path}", f"model.partial_pretrain={model}", "data.prompt_key=prompt"
    )
    assert "prompt" in text and "ask" in text and "reply" in text and "rows.parquet" in text


def test_missing_and_empty_files(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "chats.jsonl", [GOOD] * 5)
    text = complaint(capsys, tmp_path, f"data.train_files={tmp_path / 'chat.jsonl'}", f"model.partial_pretrain={model}")
    assert "chat.jsonl" in text and "chats.jsonl" in text
    (tmp_path / "empty.jsonl").touch()
    text = complaint(
        capsys, tmp_path, f"data.train_files={tmp_path / 'empty.jsonl'}", f"model.partial_pretrain={model}"
    )
    assert "empty.jsonl" in text and "empty" in text


def test_model_path_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD] * 5)
    (tmp_path / "not_a_model").mkdir()
    (tmp_path / "not_a_model" / "notes.txt").touch()
    text = complaint(capsys, tmp_path, f"data.train_files={path}", f"model.partial_pretrain={tmp_path / 'not_a_model'}")
    assert "config.json" in text and "notes.txt" in text
    text = complaint(capsys, tmp_path, f"data.train_files={path}", "model.partial_pretrain=nobody/nothing")
    assert "nobody/nothing" in text and "folder" in text


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"eos_token_id": "x"}', b'{"eos_token_id": {}}', b"\xff", b"[" * 9999]
)
def test_generation_config_that_cannot_be_read(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model")
    (model / "generation_config.json").write_bytes(content)
    path = write_rows(tmp_path / "rows.jsonl", [GOOD] * 5)
    text = complaint(capsys, tmp_path, f"data.train_files={path}", f"model.partial_pretrain={model}")
    assert "generation_config.json: eos_token_id cannot be read" in text


def test_base_model_without_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_tokenizer(template=None))
    path = write_rows(tmp_path / "rows.jsonl", [GOOD] * 5)
    text = complaint(capsys, tmp_path, f"data.train_files={path}", f"model.partial_pretrain={base}")
    assert "data.chat_template=chatml" in text


def test_role_that_the_template_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
    )
    model = save_tiny_model(tmp_path / "model", tiny_tokenizer(template=template))
    turns = [{"role": r, "content": "x y"} for r in ("system", "user", "assistant")]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": turns[1:]}] * 2 + [{"messages": turns}] * 3)
    text = complaint(capsys, tmp_path, f"data.train_files={path}", f"model.partial_pretrain={model}")
    assert "row 2" in text and "no system role here" in text


def test_more_sequence_parallelism_than_processes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD] * 5)
    overrides = [f"data.train_files={path}", f"model.partial_pretrain={model}", "ulysses_sequence_parallel_size=2"]
    text = complaint(capsys, tmp_path, *overrides)
    assert "ulysses_sequence_parallel_size=2" in text and "1 processes" in text


def test_told_once_under_torchrun(model: Path, tmp_path: Path) -> None:
    """8 Ulysses ranks need 8 heads; this model has 4. Two processes say so once, with exit code 1."""
    path = write_rows(tmp_path / "rows.jsonl", [GOOD] * 5 + [{"question": "q", "answer": None}])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "fsdpsft.train",
        f"data.train_files={path}",
        f"model.partial_pretrain={model}",
        "data.train_batch_size=4",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"trainer.default_local_dir={tmp_path / 'out'}",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "row 5" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "unknown option --frobnicate"),
        (["optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
        ([], "data.train_files is not set"),
    ],
)
def test_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_help_and_cfg(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--help"]) == 0
    assert "train_files: ???" in capsys.readouterr().out
    assert main(["--cfg", "job", "data.train_files=a", "model.partial_pretrain=b", "optim.lr=3e-4"]) == 0
    assert "lr: 0.0003" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [], "no folders are left behind"
