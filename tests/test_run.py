"""A run as a whole: who may write to its folder, and what is left of it when it ends early."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest

from fsdpsft import Config, load_config, run
from fsdpsft.data.batches import store_build
from fsdpsft.errors import ConfigError
from fsdpsft.filesystem import is_held
from fsdpsft.metrics import JsonLines, Trackers
from fsdpsft.signals import Stopped
from fsdpsft.testing import save_tiny_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rows = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_config([
        f"data.train_files={tmp_path / 'rows.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=1",
        f"model.partial_pretrain={save_tiny_model(tmp_path / 'model')}", "data.train_batch_size=2",
        f"trainer.default_local_dir={tmp_path / 'out'}", "trainer.logger=[]",
    ])  # fmt: skip


def test_a_run_keeps_its_folder_to_itself_while_it_lasts(tmp_path, config, monkeypatch):
    monkeypatch.setattr(run, "LOCK_PATIENCE_S", 0.0)
    with run.open_run(config):
        assert is_held(tmp_path / "out" / ".lock")
        with pytest.raises(ConfigError, match="is training into this folder"), run.open_run(config):
            pytest.fail("two runs in one folder")
    assert not is_held(tmp_path / "out" / ".lock")
    monkeypatch.setenv("RANK", "1")  # the other processes of a run ask for no lock, or rank 0 would keep them out
    with run.only_run_in(tmp_path / "out"), run.open_run(config):
        pass


@pytest.mark.parametrize(
    ("module", "name"), [(store_build, "_finish"), (run, "make_optimizer"), (run, "make_schedule")]
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopped_before_the_first_step_a_run_leaves_nothing_behind(tmp_path, config, monkeypatch, module, name, number):
    monkeypatch.setattr(module, name, lambda *_, **__: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match="before the first step of this start") as stopped, run.open_run(config):
        pytest.fail("it began")
    assert stopped.value.step == 0
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").glob(".building-*"))


def test_a_folder_that_was_there_stays(tmp_path, config, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(run, "make_schedule", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped), run.open_run(config):
        pytest.fail("it began")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert not is_held(tmp_path / "out" / ".lock")


def test_a_device_is_no_file_to_save_on(tmp_path, config):
    os.mkfifo(tmp_path / "pipe")
    config.trainer.save_on_file = str(tmp_path / "pipe")
    with (
        pytest.raises(ConfigError, match=r"trainer\.save_on_file=.*pipe is a device or a folder"),
        run.open_run(config),
    ):
        pytest.fail("it began")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- metrics


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_steps(path: Path, *steps: int, resumed: int = 0) -> None:
    lines = JsonLines(path, resumed)
    for step in steps:
        lines.log({"train/loss": 0.5}, step)
    lines.close()


def test_a_resume_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, *range(1, 9))
    with path.open("a") as file:
        file.write('[]\n{"step": 4, "train/lo')
    write_steps(path, 7, 8, resumed=6)
    assert lines_of(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    write_steps(path, 1)
    assert lines_of(path) == [1]


def test_killed_while_metrics_are_cut_back_the_old_ones_are_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, *range(1, 9))
    child = os.fork()
    if child == 0:
        os.replace = os.rename = Path.replace = lambda *_: os._exit(7)  # type: ignore[assignment]
        write_steps(path, 3, resumed=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert lines_of(path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_full_disk_ends_no_run_and_leaves_no_torn_line(tmp_path, caplog, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    trackers = Trackers([lines])
    trackers.log({"train/loss": 0.5}, 1)
    real, lines._file = lines._file, Full(path)
    for step in (2, 3):
        trackers.log({"train/loss": 0.5}, step)
        assert lines_of(path) == [1]
    lines._file = real
    trackers.log({"train/loss": 0.5}, 4)
    trackers.close()
    assert lines_of(path) == [1, 2, 3, 4]
    assert trackers.failures == {"JsonLines": 2}
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 2, "one at the first failure, one at the end"
    assert "No space left on device" in warnings[0] and "failed 2 times" in warnings[1]


class Full(io.FileIO):
    """A file on a disk with room for five more bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "a")

    def write(self, data: bytes) -> int:
        return super().write(data[:5])


def test_a_tracker_of_other_peoples_code_ends_no_run(caplog):
    class Broken:
        def log(self, values: object, step: int) -> None:
            raise RuntimeError("the service is away")

        def close(self) -> None:
            raise KeyError("run")

    trackers = Trackers([Broken()])
    for step in range(3):
        trackers.log({}, step)
    trackers.close()
    assert trackers.failures == {"Broken": 4}
    assert "RuntimeError: the service is away" in caplog.text
