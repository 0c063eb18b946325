"""Locks end with their holder, however it ends; and their absence is said, not hidden."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fsdpsft.filesystem import LockHeldError, exclusive, is_held, owner, replace_file

HOLD = """
import sys, time
from pathlib import Path
from fsdpsft.filesystem import exclusive
with exclusive(Path(sys.argv[1]), "testing"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that holds the lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_and_after_a_kill_the_lock_is_free(tmp_path, caplog):
    lock = tmp_path / "lock"
    with another_holder(lock) as holder:
        with pytest.raises(LockHeldError) as refused, exclusive(lock, "testing", patience_s=0):
            pytest.fail("two hold it")
        assert refused.value.owner.startswith(f"process {holder.pid} on {os.uname().nodename} (since 20")
        holder.kill()
        holder.wait()
        assert not is_held(lock)
        assert owner(lock) == refused.value.owner  # killed, so it could not take its name away
    with caplog.at_level(logging.WARNING), exclusive(lock, "testing", patience_s=0) as held:
        assert held
        assert owner(lock).startswith(f"process {os.getpid()} on")
    assert f"taking over from {refused.value.owner}, which died while it was testing" in caplog.text


def test_waits_for_one_that_is_being_killed(tmp_path, caplog):
    lock = tmp_path / "lock"
    with another_holder(lock) as holder:
        threading.Timer(0.5, holder.kill).start()
        before = time.monotonic()
        with caplog.at_level(logging.WARNING), exclusive(lock, "testing", patience_s=30) as held:
            assert held
            assert 0.4 < time.monotonic() - before < 20
    assert f"waiting for process {holder.pid} on" in caplog.text
    assert "30 s at most" in caplog.text


def test_one_process_cannot_hold_it_twice(tmp_path):
    with (
        exclusive(tmp_path / "lock", "testing"),
        pytest.raises(LockHeldError),
        exclusive(tmp_path / "lock", "testing", patience_s=0),
    ):
        pytest.fail("held twice")


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), exclusive(tmp_path / "lock", "testing") as held:
        assert not held
    assert "this file system has no locks; testing without one" in caplog.text


def test_lock_left_by_an_ordinary_error_is_free_and_blames_nobody(tmp_path, caplog):
    with pytest.raises(KeyError), exclusive(tmp_path / "lock", "building"):
        raise KeyError
    assert not is_held(tmp_path / "lock")
    with caplog.at_level(logging.WARNING), exclusive(tmp_path / "lock", "building") as held:
        assert held
        assert is_held(tmp_path / "lock")
    assert caplog.text == ""


def test_a_lock_deleted_by_its_holder_is_not_taken_for_the_next_one(tmp_path):
    lock = tmp_path / "lock"
    with exclusive(lock, "testing"):
        opened_before = os.open(lock, os.O_RDWR)
        lock.unlink()
    with exclusive(lock, "testing", patience_s=0):
        fcntl.flock(opened_before, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the deleted file: it keeps nobody out
        assert is_held(lock)
    os.close(opened_before)


def test_a_full_disk_takes_the_name_from_a_lock_and_not_the_lock(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with exclusive(tmp_path / "lock", "testing") as held:
        assert held and is_held(tmp_path / "lock")


def test_replacing_a_file_leaves_the_old_one_or_the_new(tmp_path, monkeypatch):
    file = tmp_path / "file"
    replace_file(file, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            replace_file(file, b"new")
    assert (file.read_bytes(), [path.name for path in tmp_path.iterdir()]) == (b"old", ["file"])
    replace_file(file, b"new")
    assert (file.read_bytes(), [path.name for path in tmp_path.iterdir()]) == (b"new", ["file"])


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FileExistsError, match="not a regular file"):
            replace_file(path, b"text")
    assert (tmp_path / "pipe").is_fifo()
