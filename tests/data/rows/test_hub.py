"""Hub names without a Hub: what is asked of the libraries, and what is said when nothing comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fsdpsft.data.rows.hub import fetch_hub_path, is_hub_name
from fsdpsft.data.rows.sources import read_rows, resolve_sources
from fsdpsft.errors import DataError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai/gsm8k", True),
        ("openai/gsm8k:main", True),
        ("openai/gsm8k:main:test", True),
        ("openai/gsm8k::test", True),
        ("data/train.parquet", False),
        ("data/train.jsonl.gz", False),
        ("gsm8k", False),
        ("/abs/path", False),
        ("a/b/c", False),
        ("../x", False),
    ],
)
def test_what_looks_like_a_hub_name(name: str, expected: bool) -> None:
    assert is_hub_name(name) is expected


def test_rows_come_from_the_arrow_files_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "p", "response": "r"}\n')
    cached = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return cached

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    for name, split in (("owner/name", "train"), ("owner/name:main", "validation"), ("owner/name::test", "train")):
        (source,) = resolve_sources(name, split=split)
        assert [row.columns for row in read_rows(source)] == [{"prompt": "p", "response": "r"}]
    assert asked == [
        (("owner/name", None), {"split": "train"}),
        (("owner/name", "main"), {"split": "validation"}),
        (("owner/name", None), {"split": "test"}),
    ]


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such path, nor on the Hub .*Couldn't reach"):
        resolve_sources("owner/name")


def test_without_datasets_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="need the package datasets"):
        resolve_sources("owner/name")


def test_a_folder_that_is_there_is_never_taken_for_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        resolve_sources("data/gsm8k")


def test_addresses_of_files_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"a": 1}\n')
    asked: list[Any] = []

    def snapshot(repo: str, **kwargs: Any) -> str:
        asked.append((repo, kwargs["revision"], kwargs["allow_patterns"][0]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for address in (
        "hf://datasets/o/n/data/train.jsonl",
        "hf://datasets/o/n@v1/data/*.jsonl",
        "hf://datasets/o/n/data",
    ):
        (source,) = resolve_sources(address)
        assert [Path(file).name for file in source.files] == ["train.jsonl"]
    assert asked == [("o/n", None, "data/train.jsonl"), ("o/n", "v1", "data/*.jsonl"), ("o/n", None, "data")]


@pytest.mark.parametrize("address", ["hf://o/n/file", "hf://datasets/o", "hf://datasets/o/n"])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(DataError, match="an address on the Hub looks like"):
        fetch_hub_path(address)


def test_files_offline() -> None:
    with pytest.raises(DataError, match="could not be fetched from the Hub"):
        fetch_hub_path("hf://datasets/owner-that-is-not/cached/x.parquet")
