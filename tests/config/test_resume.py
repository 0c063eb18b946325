"""What may differ between a checkpoint's settings and those of the run that resumes from it."""

from __future__ import annotations

import pytest

from fsdpsft.config.resume import Change, check_config
from fsdpsft.config.schema import KEYS
from fsdpsft.errors import CheckpointError

BASE = {
    "data": {"train_batch_size": 32, "num_workers": 2, "train_files": ["a.parquet"]},
    "trainer": {"seed": 1, "total_epochs": 2, "logger": ["console"], "save_freq": 10},
}


def changed(section: str, key: str, value: object) -> dict[str, dict[str, object]]:
    return {name: {**part, key: value} if name == section else dict(part) for name, part in BASE.items()}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "num_workers", 8),
        ("trainer", "logger", ["wandb"]),
        ("trainer", "save_freq", "epoch"),
        ("trainer", "total_epochs", 3),
    ],
)
def test_harmless_changes_are_taken_and_told(section, key, value) -> None:
    assert check_config(BASE, changed(section, key, value)) == [Change(f"{section}.{key}", BASE[section][key], value)]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "train_batch_size", 128),
        ("data", "train_files", ["b.parquet"]),
        ("trainer", "seed", 2),
        ("trainer", "total_epochs", 1),
    ],
)
def test_harmful_changes_are_refused_with_a_diff(section, key, value) -> None:
    now = changed(section, key, value)
    with pytest.raises(CheckpointError) as caught:
        check_config(BASE, now)
    assert f"  {section}.{key}: {BASE[section][key]!r} -> {value!r}" in str(caught.value)
    assert len(check_config(BASE, now, allow=True)) == 1


def test_a_key_that_one_side_lacks_counts_as_its_default() -> None:
    older = {"data": {"num_workers": 2}, "trainer": BASE["trainer"]}
    assert {change.key for change in check_config(older, BASE, allow=True)} == {
        "data.train_batch_size",
        "data.train_files",
    }
    at_default = changed("data", "max_length", KEYS["data.max_length"].default)
    assert check_config(BASE, at_default) == []


def test_a_key_that_this_version_no_longer_has_does_not_stop_a_run() -> None:
    assert [c.key for c in check_config(changed("data", "long_gone", 1), BASE)] == ["data.long_gone"]
    with pytest.raises(CheckpointError, match="content"):
        check_config({"content": "a"} | BASE, {"content": "b"} | BASE)
