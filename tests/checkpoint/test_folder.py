"""Old checkpoints vanish whole, new ones appear whole, and the root never shows a mixture of two."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdpsft.checkpoint.folder import INDEX_FILE, LOCK_FILE, Manifest, RunFolder, only_run_in, write_manifest
from fsdpsft.errors import CheckpointError, ConfigError
from fsdpsft.filesystem import is_held, record_of, write_json

SHARDS = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]


def make_checkpoint(folder: RunFolder, step: int, metric: float | None = None, shards: list[str] = SHARDS) -> None:
    """A checkpoint whose every tensor holds its step."""
    at = folder.begin(step)
    for name in shards:
        save_file({name: torch.full((3,), float(step))}, at / name)
    if len(shards) > 1:
        write_json(at / INDEX_FILE, {"weight_map": {name: name for name in shards}})
    write_json(at / "config.json", {"model_type": "toy"})
    (at / "trainer_state").mkdir()
    write_json(at / "trainer_state/state.json", {})
    files = {p.relative_to(at).as_posix(): record_of(p) for p in at.rglob("*") if p.is_file()}
    write_manifest(at, Manifest(step, metric, files))
    folder.commit(step)


def read_root(root: Path) -> set[float]:
    """The steps whose weights a reader finds: it opens the index, then one file after the other."""
    index = json.loads((root / INDEX_FILE).read_text())
    return {float(load_file(root / name)[key][0]) for key, name in index["weight_map"].items()}


def test_a_reader_never_sees_two_steps_at_once(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        make_checkpoint(folder, step)
    folder.publish(1)
    seen: list[set[float]] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                seen.append(read_root(tmp_path))
            except FileNotFoundError:  # overtaken by a switch: it sees none of it
                continue

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(80):
        folder.publish(1 + turn % 2)
    stop.set()
    reader.join()
    assert {frozenset(steps) for steps in seen} == {frozenset({1.0}), frozenset({2.0})}


def test_the_root_holds_links_to_one_step_and_nothing_else(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    make_checkpoint(folder, 1)
    folder.publish(1)
    make_checkpoint(folder, 2)
    (tmp_path / "metrics.jsonl").write_text("")
    folder.publish(2)
    linked = [name.replace("model-", "model-step2-") for name in SHARDS]
    expected = {*linked, INDEX_FILE, "config.json", "manifest.json", "metrics.jsonl"}
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == expected
    assert (tmp_path / linked[0]).stat().st_ino == (folder.path(2) / SHARDS[0]).stat().st_ino
    assert read_root(tmp_path) == {2.0}


def test_links_outlive_the_checkpoint(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        make_checkpoint(folder, step)
    folder.publish(1)
    folder.retire(keep=1, keep_every=None, best=None)
    folder.finish_deletions()
    assert [step for step, _ in folder.checkpoints()] == [3]
    assert read_root(tmp_path) == {1.0}


def test_one_file_and_several_replace_each_other(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    make_checkpoint(folder, 1, shards=["model.safetensors"])
    make_checkpoint(folder, 2)
    for step in (1, 2, 1):
        folder.publish(step)
        weights = sorted(p.name for p in tmp_path.glob("model*"))
        assert weights == (["model.safetensors"] if step == 1 else [*sorted(weights)[:4], INDEX_FILE])
        assert len(weights) == (1 if step == 1 else 5)


@pytest.mark.parametrize(
    ("keep", "keep_every", "best", "left"),
    [
        (None, None, None, [10, 20, 30, 40, 50]),
        (2, None, None, [40, 50]),
        (1, 20, None, [20, 40, 50]),
        (1, None, 30, [30, 50]),
    ],
)
def test_retention(tmp_path, keep, keep_every, best, left) -> None:
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30, 40, 50):
        make_checkpoint(folder, step)
    folder.retire(keep, keep_every, best)
    assert [step for step, _ in folder.checkpoints()] == left
    folder.finish_deletions()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_best_goes_by_the_manifests_and_the_newest_of_equals(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    for step, metric in [(1, 2.0), (2, 1.0), (3, 1.0), (4, None)]:
        make_checkpoint(folder, step, metric)
    assert folder.best() == 3
    assert RunFolder(tmp_path / "empty").best() is None


def test_what_a_crash_left_is_cleared_and_never_listed(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    make_checkpoint(folder, 1)
    (folder.begin(2) / "model.safetensors").write_bytes(b"half")
    folder.path(1).rename(tmp_path / ".trash-global_step_1")
    (tmp_path / ".link-config.json").write_text("{}")
    (tmp_path / "global_step_x").mkdir()
    (tmp_path / ".hidden-of-someone-else").write_text("")
    assert folder.checkpoints() == []
    folder.clean()
    assert {p.name for p in tmp_path.iterdir()} == {"global_step_x", ".hidden-of-someone-else"}


def test_without_hard_links_the_model_is_copied_and_said_so(tmp_path, monkeypatch, caplog) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    folder = RunFolder(tmp_path)
    make_checkpoint(folder, 1)
    monkeypatch.setattr(os, "link", refuse)
    folder.publish(1)
    assert read_root(tmp_path) == {1.0}
    assert "no hard links" in caplog.text


def test_a_state_without_a_model_cannot_be_published(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    make_checkpoint(folder, 1, shards=[])
    with pytest.raises(CheckpointError, match="no model files"):
        folder.publish(1)


def test_two_runs_cannot_share_a_folder(tmp_path) -> None:
    root = tmp_path / "new" / "run"
    with only_run_in(root):
        assert is_held(root / LOCK_FILE)
        with (
            pytest.raises(ConfigError, match=rf"default_local_dir=.*run: process {os.getpid()} on .*another folder"),
            only_run_in(root, patience_s=0),
        ):
            pytest.fail("two runs at once")
        RunFolder(root).clean()
        assert is_held(root / LOCK_FILE), "cleaning up lets nobody in"
    with only_run_in(root, patience_s=0):
        pass


def test_a_folder_nobody_can_write_to(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"default_local_dir=.*cannot be written to"), only_run_in(tmp_path / "file"):
        pytest.fail("a file is no folder")


def test_an_error_of_the_run_is_not_taken_for_the_folder_s(tmp_path) -> None:
    with pytest.raises(OSError, match="the run's own"), only_run_in(tmp_path):
        raise OSError("the run's own")
