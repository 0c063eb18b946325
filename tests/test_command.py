"""The command ``fsdpsft`` hands each sub-command to its module."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fsdpsft.__main__ import COMMANDS, main


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert [name for name in COMMANDS if f"\n  {name} " not in shown] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_a_module_with_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(import_module(f"fsdpsft.{name}").main)
    assert main([name, "--help"]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("trian", "did you mean fsdpsft train"),
        ("covert", "did you mean fsdpsft convert"),
        ("run.yaml", "did you mean fsdpsft train run.yaml"),
        ("optim.lr=1", "did you mean fsdpsft train optim.lr=1"),
        ("dance", "train, check, plan, selftest, export, convert"),
    ],
)
def test_an_unknown_command_is_named(typed: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == 1
    assert message in capsys.readouterr().err


def test_train_takes_a_yaml_file_and_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(
        "data: {train_files: a.jsonl}\nmodel: {partial_pretrain: m}\noptim: {lr: 1e-4}\n"
    )
    assert main(["train", str(tmp_path / "run.yaml"), "optim.lr=2e-5", "--cfg", "job"]) == 0
    assert "lr: 2.0e-05" in capsys.readouterr().out
    assert main(["train", "--learning_rate", "2e-5"]) == 1
    assert "here it is optim.lr" in capsys.readouterr().err


def test_help_and_mistakes_do_not_import_torch() -> None:
    probe = "import sys; from fsdpsft.__main__ import main; main(['--help']); main(['convert', '--help']); main(['x'])"
    subprocess.run([sys.executable, "-c", f"{probe}; assert 'torch' not in sys.modules"], check=True, timeout=60)
