"""Rendezvous: no address of a process that died is found, and nobody waits there whose launcher is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from fsdpsft.distributed.mesh import _fresh_store
from fsdpsft.filesystem import is_held
from fsdpsft.testing import free_port, save_tiny_model

LIMIT = timedelta(seconds=20)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The environment of a worker of two on one node, and the store that the agent lends all its restarts."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LIMIT)
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return server


def test_a_restart_begins_with_an_empty_store(torchrun: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, peer = _fresh_store(2, LIMIT), _fresh_store(2, LIMIT)
    first.set("address of rank 1", "of a process that will die")
    assert peer.get("address of rank 1") == b"of a process that will die"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not _fresh_store(2, LIMIT).check(["address of rank 1"])


def test_over_several_nodes_the_count_of_one_agent_says_nothing(
    torchrun: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    _fresh_store(2, LIMIT).set("address of rank 1", "here")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the other node's agent may still be at 0
    assert _fresh_store(2, LIMIT).check(["address of rank 1"])


LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-m', 'fsdpsft.train', *sys.argv[1:]]))"


def test_a_worker_alone_in_the_rendezvous_ends_with_its_launcher(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]})] * 4))
    out = tmp_path / "out"
    settings = [
        f"data.train_files={tmp_path / 'rows.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.train_batch_size=2", f"model.partial_pretrain={save_tiny_model(tmp_path / 'model')}",
        f"trainer.default_local_dir={out}",
    ]  # fmt: skip
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    command = [sys.executable, "-c", LAUNCHER, *settings]
    with subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True) as launcher:
        wait_until(lambda: is_held(out / ".lock"))
        time.sleep(2)  # into the rendezvous, where the second process never comes
        launcher.kill()
        wait_until(lambda: not is_held(out / ".lock"), 30)
        assert launcher.stderr is not None
        assert "the launcher of this process is gone" in launcher.stderr.read()


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
